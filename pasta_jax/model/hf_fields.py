"""The rotary fields of a `config.json`, which have two spellings and many kinds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pasta_jax.foreign import Fields
from pasta_jax.model.config import RopeScaling


class FamilyError(ValueError):
    """A model that we or the architecture cannot express; the message names file and field."""


_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def rotary_from_hf(fields: Fields, by_layer: bool) -> tuple[float, RopeScaling, float]:
    """Base and scaling of global layers, and the base of local layers, 0 if it is the same.

    Args:
      fields: of a `config.json`, 4.x (`rope_theta`, `rope_scaling`) or 5.x (`rope_parameters`).
      by_layer: whether local layers have their own base (`rope_local_base_freq`, `sliding_attention`).
    """
    key = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    rope = fields.inner(key)
    named = {"full_attention", "sliding_attention"} & set(rope.tree)
    if not by_layer:
        if named:
            raise fields.fault(key, "this architecture has the same for all layers")
        return *_scaling_from_hf(fields, rope, fields["rope_theta"]), 0.0
    if key == "rope_parameters" and rope.tree and not named:
        raise fields.fault(key, "must have full_attention and sliding_attention")
    global_rope = rope.inner("full_attention") if named else rope
    local_rope = rope.inner("sliding_attention")
    base, scaling = _scaling_from_hf(fields, global_rope, fields["rope_theta"])
    local_base, local_scaling = _scaling_from_hf(fields, local_rope, fields["rope_local_base_freq"])
    if local_scaling != RopeScaling():
        raise fields.fault(key, "local layers have no scaling here")
    return base, scaling, local_base


def _scaling_from_hf(fields: Fields, rope: Fields, base: Any) -> tuple[float, RopeScaling]:
    """Base and scaling from one set of rotary parameters; `base` is the default."""
    spelled = "rope_type" if "rope_type" in rope.tree or "type" not in rope.tree else "type"
    rope = dataclasses.replace(rope, defaults={"rope_type": "default"})
    kind = rope.choice(spelled, _ROPE_FIELDS, "unknown")
    allowed = {"rope_type", "type", "rope_theta", *_ROPE_FIELDS[kind]}
    if rope["partial_rotary_factor"] == 1:
        allowed.add("partial_rotary_factor")
    if unknown := {name for name, value in rope.tree.items() if value is not None} - allowed:
        raise rope.fault(min(unknown), f"not supported with rope_type {kind!r}")
    original, length = "original_max_position_embeddings", fields["max_position_embeddings"]
    above = {original: fields[original]} if fields[original] else {}  # the model's own field takes precedence
    values = Fields({**rope.tree, **above}, rope.path, {"rope_theta": base, original: length}, rope.error)
    theta = values.number("rope_theta")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", factor=values.number("factor"))
    shared: dict[str, Any] = {"original_length": values.size(original)}
    ratio = fields.size("max_position_embeddings") / shared["original_length"] if kind == "yarn" else None
    shared["factor"] = values.number("factor", default=ratio)
    if kind == "llama3":
        low, high = (values.number(f"{name}_freq_factor") for name in ("low", "high"))
        if low >= high:
            raise values.fault("low_freq_factor", f"must be below high_freq_factor={high}")
        return theta, RopeScaling("llama3", low_freq_factor=low, high_freq_factor=high, **shared)
    if values["truncate"] not in (None, True):
        raise values.fault("truncate", "not supported")
    return theta, RopeScaling(
        "yarn",
        beta_fast=values.number("beta_fast", default=32.0),
        beta_slow=values.number("beta_slow", default=1.0),
        attention_factor=_yarn_amplitude(values, shared["factor"]),
        **shared,
    )


def _yarn_amplitude(values: Fields, factor: float) -> float:
    """The attention factor; 0 stands for that of the paper, as in `RopeScaling`."""
    if values["attention_factor"] is not None:
        return values.number("attention_factor")
    if factor <= 1:
        return 1.0
    one, all_dim = values.number("mscale", default=0.0), values.number("mscale_all_dim", default=0.0)
    if not (one and all_dim):
        return 0.0
    return (0.1 * one * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    """The `rope_scaling` of a `config.json`; None for no scaling."""
    if scaling.kind == "none":
        return None
    values = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor or None,
    }
    kept = {name: values.get(name) for name in _ROPE_FIELDS[scaling.kind]}
    return {"rope_type": scaling.kind} | {name: value for name, value in kept.items() if value is not None}
