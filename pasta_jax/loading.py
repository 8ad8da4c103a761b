"""`pasta_jax.load`: a model ready to decode, from what `pasta_jax.train` wrote or from published weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from pasta_jax.checkpoints.about import absolute_path, checkpoint_identity, find_checkpoint, read_metadata
from pasta_jax.checkpoints.load import load_params
from pasta_jax.decoding.model import Model
from pasta_jax.interchange.importing import ImportOptions, kind_of, open_published
from pasta_jax.interchange.peft import WEIGHTS
from pasta_jax.interchange.peft_reading import open_adapters
from pasta_jax.messages import shown
from pasta_jax.model import ModelConfig, forms, lora, param_shapes
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
        into their base weights. Or a folder of adapters in PEFT's layout, with `base`. Or published weights, which
        write no promises until they are finetuned: a Hugging Face folder, "hf:org/name" of its hub (extra [hf]), a
        name such as "gemma-2b-it" (`model.presets`), "gguf:FILE" (extra [gguf]), or "orbax:DIRECTORY" with a
        checkpoint of Gemma.
      mesh: devices (`sharding.make_mesh`) over which the parameters are spread; by default one device holds all.
      dtype: of parameters and compute, "float32" or "bfloat16"; by default that of the weights.
      quantize: "int8" for matrices in int8. Each is quantized as soon as it is read.
      base: for adapters in PEFT's layout: their base, a workdir or published weights. For those of a workdir: where
        their base weights are now, if they have moved.
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
    if kind in ("peft", "workdir") and (tokenizer is not None or extend_tokenizer):
        raise ValueError(
            f"{path} has its own tokenizer; tokenizer and extend_tokenizer are for other weights."
        )
    if kind == "peft":
        return _adapted(path, base, mesh=mesh, dtype=dtype, quantize=quantize, chat=chat)
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
    config = in_dtype(read_metadata(find_checkpoint(path)).config.model, dtype)
    params, metadata = load_params(
        path,
        shardings=_shardings(mesh),
        expected=param_shapes(config),
        base=base,
        finish=functools.partial(forms.quantize, donate=True) if quantize else None,
    )
    data, own = metadata.config.data, metadata.load_tokenizer()
    own = own if chat == "auto" else own.with_chat(chat)
    return Model(params, config, own, data.positions, data.max_depth)


def _adapted(
    path: str,
    base: str | os.PathLike[str] | None,
    *,
    mesh: jax.sharding.Mesh | None,
    dtype: str | None,
    quantize: str | None,
    chat: str,
) -> Model:
    """The model of PEFT's adapters and their base. Headers and sizes are checked before the base is read."""
    if base is None:
        raise ValueError(
            f"{path} holds adapters, which need their base: add --base=WORKDIR, in Python base=WORKDIR, where "
            "`make demo` or pasta_jax.convert has put it, or published weights."
        )
    folder, (kind, place) = open_adapters(path), kind_of(base)
    trained, where = folder.trained, os.fspath(base)
    if kind == "peft":
        raise ValueError(
            f"base={where} holds adapters, no whole model. Give the one they were trained beside."
        )
    if kind == "workdir":
        about = read_metadata(find_checkpoint(place))
        config, own = in_dtype(about.config.model, trained.dtype or None), about.load_tokenizer()
        wanted = folder.fit(config, own, where)
        params, _ = load_params(place, shardings=_shardings(mesh), expected=param_shapes(config))
    else:
        published = open_published(kind, place, ImportOptions(dtype=trained.dtype or None))
        config, own = published.config, published.tokenizer
        wanted = folder.fit(config, own, where)
        params = published.read(mesh)
    both = lora.join(params, folder.read(wanted, params, where, mesh))
    config = in_dtype(config, dtype)
    params = lora.merge(both, folder.lora, dtype=config.dtype, donate=True)
    params = forms.quantize(params, donate=True) if quantize else params
    tokenizer = folder.tokenizer(own)
    tokenizer = tokenizer if chat == "auto" else tokenizer.with_chat(chat)
    return Model(params, config, tokenizer, trained.positions, trained.max_depth)


def _shardings(mesh: jax.sharding.Mesh | None) -> Callable[[forms.Params], Any] | None:
    return None if mesh is None else functools.partial(param_shardings, mesh=mesh)


def place_of(source: str | os.PathLike[str]) -> epath.Path:
    """Where the files of a trained model are: the checkpoint, or the folder of PEFT's adapters.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    kind, path = kind_of(source)
    return absolute_path(path) if kind == "peft" else find_checkpoint(source)


def identity_of(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Path and modification time (seconds) of what `place_of` returns. Raises CheckpointError."""
    if kind_of(source)[0] != "peft":
        return checkpoint_identity(source)
    place = place_of(source)
    return {"checkpoint": os.fspath(place), "written": (place / WEIGHTS).stat().mtime}


def given_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `load` that change what a model answers."""
    # The base of adapters is identified by its fingerprint, not by its path.
    return {name: v for name, v in options.items() if name != "base" and v not in (None, False, "auto")}


def in_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """The configuration of a model loaded in this dtype; None is its own. Raises ValueError for unknown ones."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={shown(dtype)} is unknown. Use {' or '.join(DTYPES)}.")
    return dataclasses.replace(config, dtype=dtype or config.dtype)
