"""Writes adapters in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with PEFT's names.

    pasta_jax                            PEFT
    layer_0/attn/q_proj_lora_a [D, R]    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R, D]
    layer_0/attn/q_proj_lora_b [R, N, H] base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight [N H, R]
    embed/embedding_rows [n, D]          base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta

The table in `model.weights` gives the module of each matrix. The layout is that of peft 0.15 and later, with
`trainable_token_indices` in `LoraConfig`. Two files beside them say what PEFT has no fields for, and `peft_reading`
reads them: `pasta_tags.json` the ids of the tags, `pasta_adapter.json` how the adapters were trained (`Trained`).
"""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from pasta_jax.checkpoints.fingerprint import FEW, sample
from pasta_jax.config import Config
from pasta_jax.files import json_bytes
from pasta_jax.foreign import Fields, parse_object
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import Origin
from pasta_jax.interchange.reading import ADAPTERS as CONFIG
from pasta_jax.interchange.writing import check_destination, unfinished, write_files
from pasta_jax.lang.tags import Dialect
from pasta_jax.messages import message_of
from pasta_jax.model import Lora, ModelConfig
from pasta_jax.model.families import config_from_hf
from pasta_jax.model.lora import TABLES
from pasta_jax.model.weights import MULTIMODAL_PREFIXES, HfTensor, hf_tensors
from pasta_jax.sharding import MATRICES
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.chat import Chat
from pasta_jax.tokens.export import tags_json
from pasta_jax.tokens.load import TAGS_FILE
from pasta_jax.tokens.positions import Positions

WEIGHTS, TRAINED, FORMAT = "adapter_model.safetensors", "pasta_adapter.json", 1

WRAPPED = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

DTYPES = ("float32", "bfloat16", "float16")

SIZES = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
"""Fields of a base's configuration without which adapters do not fit it."""

_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab.", "merges.")


@dataclasses.dataclass(frozen=True)
class Trained:
    """How adapters were trained, as far as PEFT has no fields for it: the content of `pasta_adapter.json`.

    Attributes:
      step: optimizer steps taken; 0 if unknown.
      dtype: of the model that they were trained in; "" means that of the base.
      positions: the scheme that the model was trained with.
      max_depth: how deep its promises may nest.
      dialect: its tags.
      chat: the format of its prompts; auto means that of the base.
      sizes: of the base, by the names in SIZES.
      base: values of the base's weights (`checkpoints.fingerprint.sample`), float32 [leaves, FEW]; None if unknown.
    """

    step: int = 0
    dtype: str = ""
    positions: Positions = Positions()
    max_depth: int = 1
    dialect: Dialect = "pasta"
    chat: str = "auto"
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    base: np.ndarray | None = None

    def to_json(self) -> bytes:
        """The file. The base's values are in bfloat16, so that dtypes that lose less look alike."""
        tree = {
            name: getattr(self, name) for name in ("step", "dtype", "max_depth", "dialect", "chat", "sizes")
        }
        tree = {"format": FORMAT, **tree, "positions": dataclasses.asdict(self.positions)}
        if self.base is not None:
            bits = self.base.astype(ml_dtypes.bfloat16).view(np.uint16).astype("<u2")
            tree["base"] = base64.b64encode(bits.tobytes()).decode("ascii")
        return json_bytes(tree)

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Trained:
        """The content of the file. Raises InterchangeError, which names it and the field."""
        fields = Fields(parse_object(data, name, InterchangeError), name, error=InterchangeError)
        if fields["format"] != FORMAT:
            raise fields.fault("format", f"this version of pasta_jax reads format {FORMAT}")
        try:
            sizes, values = fields.inner("sizes"), None
            if fields["base"] is not None:
                bits = np.frombuffer(base64.b64decode(fields["base"], validate=True), "<u2")
                values = bits.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, FEW)
            return cls(
                step=fields.size("step") if fields["step"] else 0,
                dtype=fields.choice("dtype", ("", "float32", "bfloat16"), "is no dtype to compute in"),
                positions=Positions(**fields.inner("positions").tree),
                max_depth=fields.size("max_depth"),
                dialect=fields.choice("dialect", get_args(Dialect), "is no dialect of tags"),  # type: ignore[arg-type]
                chat=fields.choice("chat", get_args(Chat), "is no format of prompts"),
                sizes={key: sizes.size(key) for key in SIZES if key in sizes.tree},
                base=values,
            )
        except InterchangeError:
            raise
        except (ValueError, TypeError) as error:  # of base64, and of what Positions refuses
            raise InterchangeError(f"{name} is damaged: {message_of(error)}.") from error


def trained_with(config: Config, step: int = 0, base: Any = None) -> Trained:
    """What the configuration of a run says of its adapters.

    Args:
      config: of the run.
      step: optimizer steps taken.
      base: parameters of the base.
    """
    data = config.data
    sizes = {name: getattr(config.model, name) for name in SIZES}
    values = None if base is None else sample(base)
    return Trained(
        step, config.model.dtype, data.positions, data.max_depth, data.dialect, data.chat, sizes, values
    )


def write_adapters(
    destination: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    config: Config,
    tokenizer: TextTokenizer,
    origin: Origin | None,
    *,
    base_step: int,
    trained: Trained | None = None,
    dtype: str = "float32",
    base_name: str = "",
    tokenizer_files: bool = True,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads beside the published base.

    Args:
      destination: a folder that does not exist or is empty.
      adapters: from a checkpoint (`load_adapters`).
      config: that they were trained with.
      tokenizer: of the trained model.
      origin: of the base.
      base_step: number of training steps that the base has had here.
      trained: what `pasta_adapter.json` says; by default what `config` does, and nothing of the base's weights.
      dtype: of the tensors.
      base_name: the base's published name; by default that under which it was imported.
      tokenizer_files: write the base's tokenizer too, as PEFT's own examples do.

    Raises:
      InterchangeError: the base is not exactly a published model, or the destination is not empty.
    """
    check_destination(destination)
    advice = "Add --merge_lora, which writes a whole model."
    if origin is None:
        raise InterchangeError(
            f"PEFT's adapters name a published base; the base of these was not imported. {advice}"
        )
    if base_step:
        raise InterchangeError(
            f"The base of these adapters was itself trained for {base_step} steps, so {origin.source} is not "
            f"their base. {advice}"
        )
    published = config_from_hf(origin.tree("config.json") or {}, "config.json")
    if published.vocab_size != config.model.vocab_size:
        raise InterchangeError(
            f"The base has {config.model.vocab_size} embedding rows here and {published.vocab_size} as published: "
            f"its tokenizer was extended. {advice}"
        )
    prefix = origin.prefix
    if prefix in MULTIMODAL_PREFIXES:  # transformers has one name for both
        prefix = "model.language_model."
    files = {
        name: content
        for name, content in origin.files.items()
        if tokenizer_files and name.startswith(_TOKENIZER_FILES) and "/" not in name
    }
    files[TAGS_FILE] = tags_json(tokenizer.vocabulary)
    files[TRAINED] = (trained or trained_with(config)).to_json()
    files[CONFIG] = json_bytes(peft_config(config.model, config.lora, base_name or origin.source, prefix))
    tensors = peft_tensors(adapters, config.model, config.lora, prefix, dtype)
    files[WEIGHTS] = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    with unfinished(destination) as folder:
        write_files(folder, files)


def adapter_tensors(config: ModelConfig, lora: Lora, prefix: str = "model.") -> Iterator[HfTensor]:
    """The tensors of adapters in PEFT's file, and the parameters of ours that they are."""
    for matrix in hf_tensors(config, prefix):
        *folder, name = matrix.path
        module = f"{WRAPPED}{matrix.name.removesuffix('.weight')}"
        if name in lora.targets:
            inner = len(MATRICES[name][0])
            (out, into), (rows, columns) = matrix.shape, (matrix.ours[:inner], matrix.ours[inner:])
            for letter, shape, ours in (
                ("A", (lora.rank, into), (*rows, lora.rank)),
                ("B", (out, lora.rank), (lora.rank, *columns)),
            ):
                path = (*folder, f"{name}_lora_{letter.lower()}")
                yield HfTensor(f"{module}.lora_{letter}.weight", shape, path, ours, transposed=True)
        elif name in TABLES and lora.rows:
            shape = (len(lora.rows), config.model_dim)
            ours = shape[::-1] if matrix.transposed else shape
            path = (*folder, f"{name}_rows")
            named = f"{module}.token_adapter.trainable_tokens_delta"
            yield HfTensor(named, shape, path, ours, transposed=matrix.transposed)


def peft_tensors(
    adapters: Mapping[str, Any],
    config: ModelConfig,
    lora: Lora,
    prefix: str = "model.",
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """The adapters under PEFT's names."""
    flat, kind = flatten_dict(adapters), np.dtype(dtype)
    return {
        tensor.name: np.ascontiguousarray(tensor.to_hf(np.asarray(flat[tensor.path])).astype(kind))
        for tensor in adapter_tensors(config, lora, prefix)
    }


def peft_config(config: ModelConfig, lora: Lora, base: str, prefix: str = "model.") -> dict[str, Any]:
    """The content of adapter_config.json: the base, and the modules that have adapters."""
    targets: str | list[str] = list(lora.targets)
    if prefix != "model.":  # the vision model has matrices of the same names
        targets = rf"{prefix.replace('.', chr(92) + '.')}.*\.({'|'.join(lora.targets)})"
    rows: Any = list(lora.rows) or None
    if rows and not config.tie_embeddings:
        rows = {"embed_tokens": rows, "lm_head": rows}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "trainable_token_indices": rows,
        "inference_mode": True,
    }
