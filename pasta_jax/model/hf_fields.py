"""Checked fields of a parsed `config.json`; and the rotary fields, which have two spellings and many kinds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of a parsed file with a family's defaults; errors name `path` and field."""

    tree: Mapping[str, Any]
    defaults: Mapping[str, Any]
    path: str

    def __getitem__(self, key: str) -> Any:
        return self.tree.get(key, self.defaults.get(key))

    def fault(self, key: str, reason: str, value: Any = None) -> FamilyError:
        return FamilyError(f"{self.path}: {key}={self[key] if value is None else value!r}: {reason}.")

    def number(self, key: str, default: float | None = None) -> float:
        value = self[key]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fault(key, "must be a number above 0")
        return float(value)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not float(value).is_integer():
            raise self.fault(key, "must be a whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        if not isinstance(self[key], bool):
            raise self.fault(key, "must be true or false")
        return self[key]


def rotary_from_hf(fields: Fields, by_layer: bool) -> tuple[float, RopeScaling, float]:
    """Base and scaling of global layers, and the base of local layers, 0 if it is the same.

    Args:
      fields: of a `config.json`, 4.x (`rope_theta`, `rope_scaling`) or 5.x (`rope_parameters`).
      by_layer: whether local layers have their own base (`rope_local_base_freq`, `sliding_attention`).
    """
    key = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    rope = fields[key] or {}
    if not isinstance(rope, Mapping):
        raise fields.fault(key, "must be an object")
    named = {"full_attention", "sliding_attention"} & set(rope)
    if not by_layer:
        if named:
            raise fields.fault(key, "this architecture has the same for all layers")
        return *_scaling_from_hf(fields, key, rope, fields["rope_theta"]), 0.0
    if key == "rope_parameters" and rope and not named:
        raise fields.fault(key, "must have full_attention and sliding_attention")
    global_rope = (rope.get("full_attention") or {}) if named else rope
    local_rope = (rope.get("sliding_attention") or {}) if named else {}
    base, scaling = _scaling_from_hf(fields, key, global_rope, fields["rope_theta"])
    local_base, local_scaling = _scaling_from_hf(fields, key, local_rope, fields["rope_local_base_freq"])
    if local_scaling != RopeScaling():
        raise fields.fault(key, "local layers have no scaling here")
    return base, scaling, local_base


def _scaling_from_hf(
    fields: Fields, key: str, rope: Mapping[str, Any], base: Any
) -> tuple[float, RopeScaling]:
    """Base and scaling from one set of rotary parameters; `base` is the default."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise fields.fault(key, f"unknown rope_type {kind!r}. We have {', '.join(_ROPE_FIELDS)}")
    allowed = {"rope_type", "type", "rope_theta", *_ROPE_FIELDS[kind]}
    if rope.get("partial_rotary_factor") == 1:
        allowed.add("partial_rotary_factor")
    if unknown := {name for name, value in rope.items() if value is not None} - allowed:
        raise fields.fault(key, f"{', '.join(sorted(unknown))} not supported with rope_type {kind!r}")
    original, length = "original_max_position_embeddings", fields["max_position_embeddings"]
    above = {original: fields[original]} if fields[original] else {}  # the model's own field takes precedence
    values = Fields({**rope, **above}, {"rope_theta": base, original: length}, f"{fields.path}: {key}")
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
    if values["truncate"] is False:
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
