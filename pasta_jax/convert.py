"""Imports and exports models.

    python -m pasta_jax.convert --from=hf:google/gemma-2b-it --to=WORKDIR
    python -m pasta_jax.convert --from=peft:DIR --base=WORKDIR --to=WORKDIR
    python -m pasta_jax.convert --from=WORKDIR --to=FOLDER

Import: a Hugging Face folder (hf:DIR), a repository on its hub (hf:org/name), a GGUF file (gguf:FILE) or an Orbax
checkpoint of Gemma (orbax:DIR) becomes a workdir to decode from (--ckpt=W) or to start training from
(--config.init_from=W), and so do PEFT's adapters (peft:DIR) beside the workdir of their base. Export: a workdir
becomes a Hugging Face folder, one of adapters a folder in PEFT's layout. Compares the logits with those of
transformers, if it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pasta_jax.files import is_full, unwritten
from pasta_jax.verbs import CHATS, begin_alone, refuse, run_main

if TYPE_CHECKING:
    from pasta_jax.interchange.importing import SourceKind

DTYPES = (None, "float32", "bfloat16", "float16")

OF_ADAPTERS = ("base_name", "tokenizer_files")
"""Flags for exports in PEFT's layout alone."""


def main(argv: Sequence[str], *, values: flags.FlagValues) -> None:
    """Runs the command. A mistake ends in one line and status 2."""
    if len(argv) > 1 or not values["from"].value or not values.to:
        refuse(
            "Add --from=hf:google/gemma-2b-it or --from=gguf:FILE and --to=WORKDIR to import, or --from=WORKDIR "
            "--to=FOLDER to export."
        )
    begin_alone()
    # These load jax; the refusal above does not wait for it.
    from pasta_jax.checkpoints.about import CheckpointError
    from pasta_jax.interchange.errors import InterchangeError
    from pasta_jax.interchange.hub import NAME
    from pasta_jax.interchange.importing import kind_of
    from pasta_jax.interchange.writing import check_destination
    from pasta_jax.tokens.tokenizer import TokenizerError

    try:
        if values.dtype not in DTYPES:
            raise ValueError(f"--dtype={values.dtype} is none of {', '.join(filter(None, DTYPES))}.")
        kind, path = kind_of(values["from"].value)
        if kind == "workdir" and NAME.fullmatch(path) and not os.path.exists(path):
            kind = "hub"  # there is no local folder of that name
        check_destination(values.to)
        if kind == "workdir":
            export_model(path, values)
        elif kind == "peft":
            import_adapters(path, values)
        else:
            import_model(kind, path, values)
    except (InterchangeError, TokenizerError, CheckpointError, ValueError, OSError) as error:
        refuse(unwritten(values.to, error) if is_full(error) else str(error))


def import_model(kind: SourceKind, path: str, values: Any) -> None:
    """Writes a published model to a workdir, whole or not at all."""
    from pasta_jax.interchange.importing import ImportOptions, open_published, write_workdir
    from pasta_jax.interchange.parity import parity_line
    from pasta_jax.interchange.writing import unfinished
    from pasta_jax.model import param_count

    if values.name_tags or values.merge_lora or values.base:
        raise ValueError("--base, --name_tags and --merge_lora are for exports.")
    _refuse(values, OF_ADAPTERS, "for exports of adapters")
    _check_computed(values.dtype)
    options = ImportOptions(
        dtype=values.dtype,
        tokenizer=values.tokenizer,
        chat=values.chat,
        extend_tokenizer=values.extend_tokenizer,
        preset=values.preset,
    )
    published = open_published(kind, path, options)
    if published.new_rows:
        print(
            f"{published.new_rows} ids are new: their rows of the embedding are the mean of the others plus a "
            "little noise. Train the model before you expect promises."
        )
    params = published.read(_mesh(values))
    with unfinished(values.to) as folder:
        write_workdir(published, params, folder, options)
    tags = published.tokenizer.vocabulary.tag_ids
    print(
        f"{published.source}: {param_count(params):,} parameters, {published.config.dtype}; tags are ids "
        f"{min(tags.values())} to {max(tags.values())}. Wrote {values.to}."
    )
    if values.parity and published.folder is not None:
        print(parity_line(params, published.config, published.folder))


def import_adapters(path: str, values: Any) -> None:
    """Writes PEFT's adapters to a workdir, or with their base as a whole model; whole or not at all."""
    from pasta_jax.interchange.importing import kind_of
    from pasta_jax.interchange.peft_reading import open_adapters, write_adapted
    from pasta_jax.interchange.writing import unfinished

    _refuse(values, ("tokenizer", "extend_tokenizer", "chat", "preset"), "for whole models")
    _refuse(values, ("name_tags", *OF_ADAPTERS), "for exports")
    if values.dtype and not values.merge_lora:
        raise ValueError("--dtype goes with --merge_lora here: adapters keep their own.")
    _check_computed(values.dtype)
    if not values.base:
        raise ValueError(
            f"{path} holds adapters. Add --base=WORKDIR, the base that they were trained beside."
        )
    if kind_of(values.base)[0] != "workdir":
        raise ValueError(f"--base={values.base} is no workdir. Convert it first, and name that workdir.")
    adapters = open_adapters(path)
    with unfinished(values.to) as folder:
        count, dtype = write_adapted(
            adapters, values.base, folder, merged=values.merge_lora, dtype=values.dtype, mesh=_mesh(values)
        )
    what = "parameters, adapters added to them" if values.merge_lora else "parameters of adapters"
    print(f"{path}: {count:,} {what}, {dtype}; the base is {values.base}. Wrote {values.to}.")


def _refuse(values: Any, names: Sequence[str], what: str) -> None:
    """Raises ValueError if one of these flags is given, which are for something else."""
    for name in names:
        if values[name].present:
            raise ValueError(f"--{name} is {what}.")


def _check_computed(dtype: str | None) -> None:
    if dtype == "float16":
        raise ValueError("--dtype=float16 has too small a range to compute in. Use bfloat16 or float32.")


def export_model(workdir: str, values: Any) -> None:
    """Writes a workdir's model to a Hugging Face folder, whole or not at all."""
    from pasta_jax import sharding
    from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
    from pasta_jax.checkpoints.load import load_params
    from pasta_jax.interchange.origin import read_origin
    from pasta_jax.interchange.parity import parity_line
    from pasta_jax.interchange.writing import Exported, write_folder
    from pasta_jax.model import param_count, param_shapes

    _refuse(values, ("tokenizer", "extend_tokenizer", "chat", "preset"), "for imports")
    saved = read_metadata(find_checkpoint(workdir))
    if saved.base is None and values.base:
        raise ValueError(f"--base is for adapters; {workdir} holds a whole model.")
    if saved.base is None and values.merge_lora:
        raise ValueError(f"--merge_lora is for adapters; {workdir} holds a whole model.")
    if saved.base is not None and not values.merge_lora:
        export_adapters(workdir, values)
        return
    _refuse(values, OF_ADAPTERS, "for exports of adapters")
    origin, mesh = read_origin(workdir), _mesh(values)
    # Loaded in the dtype of the export, so that parity is that of the folder, not of float32 masters.
    config = dataclasses.replace(saved.config.model, dtype=values.dtype or saved.config.model.dtype)
    params, metadata = load_params(
        workdir,
        shardings=None if mesh is None else lambda shapes: sharding.param_shardings(shapes, mesh),
        expected=param_shapes(config),
        base=values.base,
    )
    model = Exported(
        params, metadata.config.model, metadata.load_tokenizer(), origin, is_trained=metadata.step > 0
    )
    write_folder(values.to, model, dtype=values.dtype, name_tags=values.name_tags)
    print(f"{metadata.path}: {param_count(params):,} parameters. Wrote {values.to}.")
    if values.parity:
        print(parity_line(params, metadata.config.model, values.to))


def export_adapters(workdir: str, values: Any) -> None:
    """Writes a workdir's adapters in PEFT's layout, whole or not at all. The base is read to describe it."""
    from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
    from pasta_jax.checkpoints.load import find_base, load_parts
    from pasta_jax.interchange.origin import read_origin
    from pasta_jax.interchange.peft import CONFIG, TRAINED, WEIGHTS, trained_with, write_adapters
    from pasta_jax.model import param_count

    if values.name_tags:
        raise ValueError(f"--name_tags is for whole models; {workdir} holds adapters. Add --merge_lora.")
    checkpoint = find_checkpoint(workdir)
    about = read_metadata(checkpoint)
    assert about.base is not None
    place = values.base or find_base(checkpoint, about.base.path)
    base_step = read_metadata(find_checkpoint(place)).step
    base, adapters, metadata = load_parts(checkpoint, base=place)
    origin = read_origin(workdir)
    write_adapters(
        values.to,
        adapters,
        metadata.config,
        metadata.load_tokenizer(),
        origin,
        base_step=base_step,
        trained=trained_with(metadata.config, metadata.step, base),
        dtype=values.dtype or "float32",
        base_name=values.base_name or "",
        tokenizer_files=values.tokenizer_files,
    )
    size = sum(os.path.getsize(os.path.join(values.to, name)) for name in (CONFIG, TRAINED, WEIGHTS))
    print(
        f"{metadata.path}: {param_count(adapters):,} parameters of adapters, for "
        f"{values.base_name or (origin and origin.source)}. Wrote {values.to}, in PEFT's layout, {size:,} bytes."
    )


def _mesh(values: Any) -> Any:
    """A mesh of all devices if a flag asks for it; None is the first device alone."""
    from pasta_jax import sharding

    if (values.fsdp, values.tensor) == (1, 1):
        return None
    return sharding.make_mesh(1, values.fsdp, values.tensor)


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""

    def text(name: str, help: str, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, help, flag_values=values)

    def switch(name: str, default: bool, help: str) -> None:
        flags.DEFINE_bool(name, default, help, flag_values=values)

    text("from", "hf:DIR, hf:org/name, gguf:FILE, orbax:DIR or peft:DIR to import; a workdir to export.")
    text("to", "Workdir or folder to write; it must not exist or be empty.")
    text(
        "dtype", "float32, bfloat16 or float16, of the parameters; by default unchanged, of adapters float32."
    )
    text("tokenizer", "Import: tokenizer.model, tokenizer.json or a folder of one.")
    switch("extend_tokenizer", False, "Import: tags without a free id get new ids and rows.")
    text("chat", f"Import: format of prompts: {', '.join(CHATS)}; auto as the model's template.", "auto")
    text("preset", "Import, orbax: the published model that has its sizes.")
    text("base", "Adapters: their base; to import them, or to export them if it was moved.")
    text(
        "base_name", "Export of adapters: the base's published name, org/name; by default that of its import."
    )
    switch(
        "tokenizer_files", True, "Export of adapters: the base's tokenizer too, of which they use the ids."
    )
    switch("name_tags", False, "Export: the tokenizer's files call the tags by their names.")
    switch("merge_lora", False, "Adapters: add them to the weights.")
    flags.DEFINE_integer("fsdp", 1, "Devices over which D is sharded; -1 is all.", flag_values=values)
    flags.DEFINE_integer("tensor", 1, "Devices over which heads and F are sharded.", flag_values=values)
    switch("parity", True, "Compare with transformers afterwards, if it is installed.")


def command() -> None:
    """Parses the command line and runs `main`."""
    define(flags.FLAGS)
    run_main(functools.partial(main, values=flags.FLAGS))


if __name__ == "__main__":
    command()
