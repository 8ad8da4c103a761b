"""`pasta_jax.load`: a model ready to decode, from what `pasta_jax.train` wrote or from published weights."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax

from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
from pasta_jax.checkpoints.load import load_params
from pasta_jax.decoding.model import Model
from pasta_jax.interchange.importing import ImportOptions, kind_of, open_published
from pasta_jax.messages import shown
from pasta_jax.model import ModelConfig, forms, param_shapes
from pasta_jax.sharding import param_shardings

DTYPES = ("float32", "bfloat16")


def load(
    source: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    base: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    extend_tokenizer: bool = False,
    chat: str = "auto",
) -> Model:
    """A model ready to decode.

    Args:
      source: a workdir of `pasta_jax.train` or `pasta_jax.convert`, or one checkpoint within it, adapters merged
        into their base weights. Or published weights, which write no promises until they are finetuned: a Hugging
        Face folder, "hf:org/name" of its hub (extra [hf]), a name such as "gemma-2b-it" (`model.presets`),
        "gguf:FILE" (extra [gguf]), or "orbax:DIRECTORY" with a checkpoint of Gemma.
      mesh: devices (`sharding.make_mesh`) over which the parameters are spread; by default one device holds all.
      dtype: of parameters and compute, "float32" or "bfloat16"; by default that of the weights.
      quantize: "int8" for matrices in int8. Each is quantized as soon as it is read.
      base: for adapters: where their base weights are now, if they have moved.
      tokenizer, extend_tokenizer, chat: of published weights: a file or folder if not their own; new ids and
        embedding rows for the tags if none are free; the format of prompts (`tokens.chat`).

    Raises:
      CheckpointError: no checkpoint there, a foreign or a damaged one.
      InterchangeError, TokenizerError: published weights that cannot be used, or do not fit into memory.
      ValueError: an unknown option, or sizes that the mesh does not divide.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={shown(quantize)} is unknown. Use int8, or leave it out.")
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source={shown(source)} is neither a path nor the name of a model.")
    in_dtype(ModelConfig(), dtype)  # mistakes are reported before anything is read
    kind, path = kind_of(source)
    if kind != "workdir":
        if base is not None:
            raise ValueError(f"base={os.fspath(base)} is for adapters; {source} are weights.")
        options = ImportOptions(
            dtype=dtype,
            tokenizer=tokenizer,
            chat=chat,
            extend_tokenizer=extend_tokenizer,
            quantize=quantize is not None,
        )
        published = open_published(kind, path, options)
        return Model(published.read(mesh), published.config, published.tokenizer)
    if tokenizer is not None or extend_tokenizer:
        raise ValueError(
            f"{path} has its own tokenizer; tokenizer and extend_tokenizer are for other weights."
        )
    config = in_dtype(read_metadata(find_checkpoint(path)).config.model, dtype)
    params, metadata = load_params(
        path,
        shardings=None if mesh is None else functools.partial(param_shardings, mesh=mesh),
        expected=param_shapes(config),
        base=base,
        finish=functools.partial(forms.quantize, donate=True) if quantize else None,
    )
    data, own = metadata.config.data, metadata.load_tokenizer()
    own = own if chat == "auto" else own.with_chat(chat)
    return Model(params, config, own, data.positions, data.max_depth)


def in_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """The configuration of a model loaded in this dtype; None is its own. Raises ValueError for unknown ones."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={shown(dtype)} is unknown. Use {' or '.join(DTYPES)}.")
    return dataclasses.replace(config, dtype=dtype or config.dtype)
