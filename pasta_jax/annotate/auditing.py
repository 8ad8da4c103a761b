"""The flags of `--audit` and of `--annotator=self`, and what `--audit` does. Needs no jax until it begins."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, get_args

from absl import flags

from pasta_jax.annotate.annotators import MAX_LOSS
from pasta_jax.data.records import read
from pasta_jax.lang import tags

LOG = logging.getLogger("pasta_jax")


def audit(values: flags.FlagValues, columns: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """Audits --input, writes the report to --output, and returns its most important lines.

    Args:
      values: of the command's flags.
      columns: as in `data.records.Reader`.
      about: identifies the input, as JSON can hold it.
    """
    from pasta_jax.annotate.audited import audit_file, write_report
    from pasta_jax.annotate.itself import auditor_of

    model = model_of(values)
    del model["max_loss"], model["candidates"]  # the losses do not depend on them
    reading: dict[str, Any] = {"columns": dict(columns), "turns": values.turns, "max_depth": values.max_depth}
    reading["dialect"] = values.dialect
    about = {**about, **reading, "length": values.length, **model}
    auditor = auditor_of(values.flag_values_dict(), values.length)
    examples = read(values.input, **reading)
    audited = audit_file(auditor, examples, values.output, about)
    title = f"{os.path.basename(values.input)} read by {values.ckpt}"
    report = write_report(audited, values.output, values.max_loss, title)
    if not any(each.parts for each in audited):
        other = "apar" if values.dialect == "pasta" else "pasta"
        LOG.warning(
            "No answer of %s has promises that can be audited. If they are of %s: --dialect=%s.",
            *(values.input, other, other),
        )
    return f"{report.splitlines()[2]}\n{os.path.join(values.output, 'audit.md')} has what they lose."


def model_of(values: flags.FlagValues) -> dict[str, Any]:
    """What identifies the model that reads and the options of `self`, as JSON can hold it."""
    from pasta_jax.loading import identity_of

    options = {name: values[name].value for name in ("ckpt", "dtype", "max_loss", "candidates")}
    if values.ckpt and os.path.isdir(values.ckpt):
        options |= identity_of(values.ckpt)
    return options


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    whole: Any = functools.partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
    about = "Audit the annotated answers of --input; --output is a folder then."
    flags.DEFINE_bool("audit", False, about, flag_values=values)
    text("ckpt", None, "self and --audit: the model that reads, a workdir or hf:FOLDER.")
    text("base", None, "Of adapters in --ckpt: their base weights, in PEFT's layout or if these have moved.")
    about = "Of that model's weights; by default as they are."
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], about, flag_values=values)
    whole("rows", 4, "self and --audit: rows of a batch.")
    about = "self and --audit: nats per token that a block may lose without its siblings."
    flags.DEFINE_float("max_loss", MAX_LOSS, about, flag_values=values)
    text("candidates", "rule:structure", "self: the annotator that proposes promises.")
    whole("max_depth", 1, "--audit, --measure, --plain: how deep promises may nest.")
    about = "--audit, --measure, --plain: what the answers are annotated in; apar is what rule:apar writes."
    flags.DEFINE_enum("dialect", "pasta", [*get_args(tags.Dialect)], about, flag_values=values)
