"""Reads adapters in PEFT's layout, ours and those of the `peft` package, as far as `model.lora` has them.

`open_adapters` checks the configuration and the header of the tensors; `AdapterFolder.fit` checks them against a
base, before its weights are read; `AdapterFolder.read` reads the adapters, and tells whether the base's weights are
those that they were trained beside.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pasta_jax import sharding
from pasta_jax.checkpoints.about import BaseWeights, find_checkpoint, read_metadata, write_run_info
from pasta_jax.checkpoints.fingerprint import apart, fingerprint, sample
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.foreign import Fields, parse_object, read_bytes
from pasta_jax.interchange import tensors
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import carry
from pasta_jax.interchange.peft import CONFIG, TRAINED, WEIGHTS, WRAPPED, Trained, adapter_tensors
from pasta_jax.interchange.reading import read_tensor
from pasta_jax.interchange.tensors import Stored
from pasta_jax.messages import name_shown, shown
from pasta_jax.model import Lora, ModelConfig, lora, param_shapes
from pasta_jax.model.config import DENSE
from pasta_jax.model.lora import TABLES
from pasta_jax.model.weights import MULTIMODAL_PREFIXES, PREFIX, HfTensor
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import TAGS_FILE
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")

SAME, ALIKE = 0.01, 0.5
"""Bases less far apart (`fingerprint.apart`) are the same, but for rounding; or the same in fewer bits."""

_READ = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"),
    "trainable_token_indices",
)
_IDLE = (
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "eva_config",
    ),
    *("target_modules", "exclude_modules", "layers_pattern", "megatron_core", "qalora_group_size"),
    "ensure_weight_tying",
)
"""Fields that say nothing of what trained adapters compute; which modules have them, the tensors say."""

_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the base's weights stay as they are."""

_LORA = re.compile(r"(.*\.)layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.lora_[AB]\.weight")
_ROWS = re.compile(r"(?:(.*\.)(embed_tokens)|(?:.*\.)?(lm_head))\.token_adapter\.trainable_tokens_delta")
_TABLES = {"embed_tokens": "embedding", "lm_head": "head"}

_UNKNOWN = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "adapters of the embedding",
    "modules_to_save": "modules that are trained in full",
    "embed_tokens.weight": "a whole embedding",
    "lm_head.weight": "a whole output matrix",
    ".bias": "biases",
}
"""Parts of the names of tensors that we have nothing for, and what they are."""


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A folder of adapters whose configuration and header passed all checks.

    Attributes:
      path: of the folder.
      base_name: name or path of the base, by PEFT's configuration.
      lora: rank, alpha, targets and rows.
      trained: how they were trained.
      tag_ids: the ids of the tags; None in a folder that is not ours.
      prefix: of the names of the base's tensors.
      tables: the tables that have rows of their own, "embedding" and "head".
      dtype: of the adapters here.
      stored: the tensors, by name.
    """

    path: str
    base_name: str
    lora: Lora
    trained: Trained
    tag_ids: Mapping[str, int] | None
    prefix: str
    tables: tuple[str, ...]
    dtype: str
    stored: Mapping[str, Stored]

    def fit(self, config: ModelConfig, tokenizer: Tokenizer, base: str) -> tuple[HfTensor, ...]:
        """Checks that a base has the sizes and the tags of these adapters.

        Args:
          config: of the base.
          tokenizer: of the base.
          base: its name in messages.

        Returns:
          the tensors to read.

        Raises:
          InterchangeError: it has not; with the first difference.
        """
        for name, size in self.trained.sizes.items():
            if getattr(config, name) != size:
                raise self._misfit(f"{name} is {size} by {TRAINED}", f"{getattr(config, name)}", base)
        wanted = tuple(
            tensor
            for tensor in adapter_tensors(config, self.lora, self.prefix)
            if not tensor.path[-1].endswith("_rows") or tensor.path[-1].removesuffix("_rows") in self.tables
        )
        for tensor in wanted:
            found = self.stored.get(tensor.name)
            if found is None or found.shape != tensor.shape:
                what = "not there" if found is None else f"{list(found.shape)}"
                raise self._misfit(f"{tensor.name} is {what}", f"{list(tensor.shape)}", base)
        if more := self.stored.keys() - {tensor.name for tensor in wanted}:
            raise self._misfit(f"{name_shown(min(more))} is there", "no such matrix", base)
        if max(self.lora.rows, default=0) >= config.vocab_size:
            raise self._misfit(f"row {max(self.lora.rows)} is trained", f"{config.vocab_size} rows", base)
        own = tokenizer.vocabulary.tag_ids
        if self.tag_ids is not None and self.tag_ids != own:
            piece = next(piece for piece in own if self.tag_ids.get(piece) != own[piece])
            have = self.tag_ids.get(piece)
            raise self._misfit(f"the tag {piece!r} is id {have} by {TAGS_FILE}", f"id {own[piece]}", base)
        return wanted

    def _misfit(self, have: str, want: str, base: str) -> InterchangeError:
        return InterchangeError(
            f"{self.path} has adapters for another base than {base}: {have}, {want} by the base. They were trained "
            f"beside {self.base_name or 'a base that they do not name'}."
        )

    def read(self, wanted: tuple[HfTensor, ...], base: Any, name: str, mesh: Any = None) -> dict[str, Any]:
        """The adapters, as a tree for `lora.join` with the base's parameters.

        Weights that are the base's but for rounding pass in silence; those of the same model in fewer bits, or
        finetuned a little, with a warning.

        Args:
          wanted: from `fit`.
          base: plain parameters of the base. An untied table whose rows were not trained gives them.
          name: of the base in messages.
          mesh: that they are placed on; by default the first device alone.

        Raises:
          InterchangeError: the base has other weights.
        """
        self._check_weights(base, name)
        kind, flat = np.dtype(self.dtype), flatten_dict(base)
        found = {t.path: read_tensor(t, self.stored[t.name], kind) for t in wanted}
        for path, leaf in flat.items() if self.lora.rows else ():
            own = (*path[:-1], f"{path[-1]}_rows")
            if path[-1] in TABLES and own not in found:
                found[own] = np.asarray(jnp.take(leaf, jnp.array(self.lora.rows), axis=TABLES[path[-1]]))
        tree = unflatten_dict(found)
        places = None if mesh is None else sharding.param_shardings(tree, mesh)
        placed: dict[str, Any] = jax.device_put(tree, places or jax.local_devices()[0])
        return placed

    def _check_weights(self, base: Any, name: str) -> None:
        if self.trained.base is None:
            LOG.info("%s does not say beside what weights it was trained; %s has the sizes.", self.path, name)
            return
        distance = apart(sample(base), self.trained.base)
        beside = self.base_name or "a base that it does not name"
        if distance > ALIKE:
            raise InterchangeError(
                f"{self.path} has adapters for other weights than those in {name}: it was trained beside {beside}. "
                f"By {self.trained.base.size:,} values they are {distance:.2g} of their size apart."
            )
        if distance > SAME:
            LOG.warning(
                "The weights in %s are not quite those of %s, beside which %s was trained: they are %.2g of their "
                "size apart, as after another quantization or a little training. Answers may be worse.",
                *(name, beside, self.path, distance),
            )

    def tokenizer(self, own: TextTokenizer) -> TextTokenizer:
        """The tokenizer of the adapted model, from the base's."""
        chat = self.trained.chat
        return (own if chat == "auto" else own.with_chat(chat)).with_dialect(self.trained.dialect)


def open_adapters(path: str | os.PathLike[str]) -> AdapterFolder:
    """Opens a folder of adapters. Reads its configuration and the header of its tensors only.

    Raises:
      InterchangeError: there are none, or they have what `model.lora` has not; by its name.
    """
    path = os.path.expanduser(path)
    file = os.path.join(path, CONFIG)
    if not os.path.exists(file):
        raise InterchangeError(f"{path} holds no adapters of PEFT: it has no {CONFIG}.")
    tree = parse_object(read_bytes(file, InterchangeError), file, InterchangeError)
    fields = Fields(tree, file, error=InterchangeError)
    _check_fields(fields)
    if not os.path.exists(weights := os.path.join(path, WEIGHTS)):
        raise InterchangeError(f"{path} has no {WEIGHTS}. Other files are pickles, which are never opened.")
    header = tensors.read_header(weights)
    targets, tables, prefixes = set[str](), set[str](), set[str]()
    for tensor in header.tensors:
        name = tensor.name.removeprefix(WRAPPED)
        if tensor.dtype not in tensors.DTYPES:
            raise InterchangeError(
                f"{weights}: {name_shown(tensor.name)} is {tensor.dtype}; {', '.join(tensors.DTYPES)} are taken."
            )
        if (match := _LORA.fullmatch(name)) and match[2] in DENSE:
            prefixes.add(match[1])
            targets.add(match[2])
        elif match := _ROWS.fullmatch(name):
            prefixes |= {match[1]} - {None}
            tables.add(_TABLES[match[2] or match[3]])
        else:
            known = (words for part, words in _UNKNOWN.items() if part in name)
            why = next(known, f"adapters go with {', '.join(DENSE)} of the layers")
            raise InterchangeError(
                f"{weights}: {name_shown(tensor.name)}: there is nothing for it here ({why}). Merge these adapters "
                "where peft is installed: merge_and_unload."
            )
    if len(prefixes) > 1 or not prefixes <= {PREFIX, *MULTIMODAL_PREFIXES}:
        raise InterchangeError(
            f"{weights}: the model's tensors are named {shown(sorted(prefixes))}, not {PREFIX}..."
        )
    if not targets:
        raise InterchangeError(f"{weights} has no matrices of adapters.")
    tag_ids, trained = None, Trained()
    if os.path.exists(name := os.path.join(path, TRAINED)):
        trained = Trained.from_json(read_bytes(name, InterchangeError), name)
    if os.path.exists(name := os.path.join(path, TAGS_FILE)):
        tag_ids = parse_object(read_bytes(name, InterchangeError), name, InterchangeError)
    rank, alpha = fields.size("r"), fields.number("lora_alpha")
    return AdapterFolder(
        path=path,
        base_name=str(fields["base_model_name_or_path"] or ""),
        # PEFT scales by alpha / sqrt(rank) then, we always by alpha / rank.
        lora=Lora(
            rank=rank,
            alpha=alpha * math.sqrt(rank) if fields["use_rslora"] else alpha,
            targets=tuple(name for name in DENSE if name in targets),
            rows=_rows(fields, tables),
        ),
        trained=trained,
        tag_ids=tag_ids,
        prefix=prefixes.pop(),
        tables=tuple(sorted(tables)),
        dtype="bfloat16" if {t.dtype for t in header.tensors} == {"BF16"} else "float32",
        stored={tensor.name: tensor for tensor in header.tensors},
    )


def _check_fields(fields: Fields) -> None:
    """Refuses what `model.lora` has not, by its name."""
    if fields["peft_type"] != "LORA":
        raise fields.fault("peft_type", "only LORA is read")
    if fields["bias"] not in (None, "none"):
        raise fields.fault("bias", "adapters have no biases here")
    if fields["init_lora_weights"] not in _STARTS:
        raise fields.fault("init_lora_weights", "with it the base's own weights were changed")
    for name, value in fields.tree.items():
        if name not in (*_READ, *_IDLE) and value not in (None, False, 0, "", [], {}):
            what = "DoRA is not known here" if name == "use_dora" else "there is nothing for it here"
            raise fields.fault(
                name, f"{what}. Merge these adapters where peft is installed: merge_and_unload"
            )


def _rows(fields: Fields, tables: set[str]) -> tuple[int, ...]:
    """The vocabulary ids that have rows of their own; the same ones in both tables."""
    given = fields["trainable_token_indices"] or []
    lists = [*given.values()] if isinstance(given, dict) else [given]
    names = set(given) if isinstance(given, dict) else {"embed_tokens"} if given else set[str]()
    is_sound = all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in lists)
    if not is_sound or any(ids != lists[0] or len(set(ids)) < len(ids) for ids in lists):
        raise fields.fault(
            "trainable_token_indices", "must be different ids, the same of embed_tokens and lm_head"
        )
    if {_TABLES.get(name) for name in names} != tables:
        raise fields.fault(
            "trainable_token_indices", f"the tensors have rows of {sorted(tables) or 'no table'}"
        )
    return tuple(lists[0]) if lists else ()


def write_adapted(
    folder: AdapterFolder,
    base: str,
    workdir: str | os.PathLike[str],
    *,
    merged: bool = False,
    dtype: str | None = None,
    mesh: Any = None,
) -> tuple[int, str]:
    """Writes a workdir of the adapters beside their base, as training would have left it, or of the whole model.

    Args:
      folder: from `open_adapters`.
      base: a workdir.
      workdir: to write.
      merged: write the base's weights with the adapters added to them.
      dtype: of the merged weights; by default that of the model.
      mesh: for the weights; by default the first device alone.

    Returns:
      the number of parameters that were written, and their dtype.

    Raises:
      InterchangeError: the base is not that of the adapters.
      CheckpointError: there is no checkpoint in `base`, or a damaged one.
    """
    checkpoint = find_checkpoint(base)
    about = read_metadata(checkpoint)
    own, trained = about.load_tokenizer(), folder.trained
    wanted = folder.fit(about.config.model, own, base)
    model = dataclasses.replace(about.config.model, dtype=trained.dtype or about.config.model.dtype)
    shardings = None if mesh is None else lambda shapes: sharding.param_shardings(shapes, mesh)
    params, about = load_params(checkpoint, shardings=shardings, expected=param_shapes(model))
    adapters = folder.read(wanted, params, base, mesh)
    beside = BaseWeights(base, about.merged_fingerprint or fingerprint(params))
    data = DataConfig(
        tokenizer=about.config.data.tokenizer,
        extend_tokenizer=about.config.data.extend_tokenizer,
        chat=trained.chat,  # type: ignore[arg-type]
        positions=trained.positions,
        max_depth=trained.max_depth,
        dialect=trained.dialect,
    )
    config = Config(model=model, data=data, checkpoint=CheckpointConfig(keep=1))
    step = max(1, trained.step)  # so that nobody takes it for the published model itself
    carry(base, workdir)
    if merged:
        written = lora.merge(lora.join(params, adapters), folder.lora, dtype=dtype, donate=True)
        model = dataclasses.replace(model, dtype=dtype or model.dtype)
        config = dataclasses.replace(config, model=model)
        with Checkpoints(workdir, config, folder.tokenizer(own)) as checkpoints:
            checkpoints.save_weights(written, step=step)
    else:
        written = adapters
        config = dataclasses.replace(
            config,
            init_from=base,
            lora=folder.lora,
            param_dtype=folder.dtype,  # type: ignore[arg-type]
        )
        with Checkpoints(workdir, config, folder.tokenizer(own)) as checkpoints:
            checkpoints.save_weights(written, step=step, base=beside)
    write_run_info(os.fspath(workdir), config)
    leaves = jax.tree.leaves(written)
    return sum(leaf.size for leaf in leaves), f"{leaves[0].dtype}"
