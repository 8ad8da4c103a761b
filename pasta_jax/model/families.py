"""Hugging Face's `config.json` to a `ModelConfig` and back: which choices make which published architecture.

One decoder serves all families; a `Family` has what its architecture fixes, and the values that its configuration
files may leave out (transformers' own defaults, in 4.4x and 5.x alike). Both spellings are read: `rope_theta`,
`rope_scaling`, `torch_dtype` (4.x) and `rope_parameters`, `layer_types`, `dtype` (5.x).

A field that would change the result and that we do not support is an error. Fields that transformers does not read
for an architecture are ignored here too.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pasta_jax.foreign import Fields
from pasta_jax.messages import shown
from pasta_jax.model.config import DTYPES, MOST_LAYERS, LayerKind, ModelConfig
from pasta_jax.model.hf_fields import FamilyError, rotary_from_hf, scaling_to_hf
from pasta_jax.model.presets import published_length


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
      architecture: its class.
      fixed: the fields of a `ModelConfig` that it fixes.
      defaults: values of fields that a `config.json` may leave out; None means that they follow from others.
      layers: which layers may be local: "none"; "all" (all or none); "any", by `layer_types`.
      caps: the soft caps that can be set; if there are any, the scale of queries can be set too.
      local_base: whether local layers have their own rotary base, and no scaling.
    """

    architecture: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    layers: Literal["none", "all", "any"] = "none"
    caps: tuple[str, ...] = ()
    local_base: bool = False


def _fixed(offset: float, embed_scale: bool, *switched_on: str) -> dict[str, Any]:
    switches = {name: name in switched_on for name in ("post_norms", "qk_norm", "qkv_bias")}
    return {"norm_offset": offset, "embed_scale": embed_scale} | switches


_COMMON = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}

_GEMMA_2 = _COMMON | {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip

_LLAMA = _COMMON | {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "head_dim": None, "act": "silu", "max_position_embeddings": 2048,
}  # fmt: skip

_QWEN = _LLAMA | {
    "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32,
    "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gemma": Family(
        "GemmaForCausalLM",
        _fixed(1.0, True),
        _COMMON | {
            "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True, "max_position_embeddings": 8192,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _fixed(1.0, True, "post_norms"),
        _GEMMA_2,
        layers="any",
        caps=("attn_softcap", "final_softcap"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _fixed(1.0, True, "post_norms", "qk_norm"),
        _GEMMA_2 | {
            "vocab_size": 262_208, "max_position_embeddings": 131_072, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        layers="any",
        caps=("final_softcap",),  # transformers has a field for attn_softcap and does not apply it
        local_base=True,
    ),
    "llama": Family("LlamaForCausalLM", _fixed(0.0, False), _LLAMA),
    "mistral": Family(
        "MistralForCausalLM",
        _fixed(0.0, False),
        _LLAMA | {
            "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        layers="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _fixed(0.0, False, "qkv_bias"), _QWEN, layers="any"),
    "qwen3": Family("Qwen3ForCausalLM", _fixed(0.0, False, "qk_norm"), _QWEN | {"head_dim": 128}, layers="any"),
}  # fmt: skip
"""By `model_type`. If several can express a model, the first is chosen."""

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu"}

_CAPS = {"attn_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}

_MUST_BE: dict[str, tuple[Any, str]] = {
    "mlp_bias": (False, "the MLP has no biases here"),
    "use_bidirectional_attention": (False, "here every token attends to earlier ones only"),
    "is_causal": (True, "here every token attends to earlier ones only"),
    "partial_rotary_factor": (1.0, "rotary positions rotate the whole head here"),
    "use_mrope": (False, "a position is one number per token here"),
    "per_layer_config": (None, "all layers here have the same sizes"),
    "quantization_config": (None, "its tensors are packed; take the repository that it was made from"),
    "num_experts": (0, "mixtures of experts are not supported"),
    "num_local_experts": (0, "mixtures of experts are not supported"),
}
"""Fields that must have this value, be null or be absent; and why."""


def config_from_hf(tree: Mapping[str, Any], path: str = "config.json") -> ModelConfig:
    """The model that a parsed `config.json` describes.

    Args:
      tree: of one of `FAMILIES`, or of the multi-modal Gemma 3, whose `text_config` is used.
      path: of the file, for error messages.

    Raises:
      FamilyError: an architecture or a value that this decoder does not support, or that is invalid.
    """
    tree = _text_part(tree, path)
    name = _family_name(tree, path)
    family, fields = FAMILIES[name], Fields(tree, path, FAMILIES[name].defaults, FamilyError)
    _check_supported(name, tree, fields)
    D, N = (fields.size(key) for key in ("hidden_size", "num_attention_heads"))
    Z = fields.size("num_hidden_layers", most=MOST_LAYERS)  # before there are lists of layers
    if (head_dim := fields.size("head_dim", default=0)) == 0:
        if D % N:
            raise fields.fault(
                "hidden_size", f"is no multiple of num_attention_heads={N}, and there is no head_dim"
            )
        head_dim = D // N
    if head_dim % 2:
        raise fields.fault("head_dim", "rotary positions need an even one", head_dim)
    base, scaling, local_base = rotary_from_hf(fields, family.local_base)
    kinds, window = _layers_from_hf(name, fields, Z)
    query_scale = fields.number("query_pre_attn_scalar") if family.caps else 0.0
    caps: dict[str, Any] = {cap: fields.number(_CAPS[cap], default=0.0) for cap in family.caps}
    try:
        return ModelConfig(
            vocab_size=fields.size("vocab_size"),
            num_layers=Z,
            model_dim=D,
            num_heads=N,
            num_kv_heads=fields.size("num_key_value_heads", default=N),
            head_dim=head_dim,
            mlp_dim=fields.size("intermediate_size"),
            rope_base=base,
            rope_scaling=scaling,
            norm_eps=fields.number("rms_norm_eps"),
            activation=_activation(name, fields),
            query_scale=0.0 if query_scale == head_dim else query_scale,
            **caps,
            sliding_window=window,
            layer_kinds=_shortest(kinds),
            local_rope_base=local_base if window else 0.0,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            dtype=_dtype(fields),
            **family.fixed,
        )
    except FamilyError:
        raise
    except ValueError as error:
        raise FamilyError(f"{path}: {error}") from error


def config_to_hf(config: ModelConfig, *, family: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model, for transformers 4.4x and 5.x; without the ids of special tokens.

    Args:
      config: of the model.
      family: one of `FAMILIES`, if several can express the model (a Mistral 0.3 is a Llama, too).

    Returns:
      its fields. The longest text it was trained for, in tokens, is that of the published model with this
      configuration, else transformers' own or the reach of scaled positions.

    Raises:
      FamilyError: the family, or any, cannot express the model.
    """
    name = family_of(config) if family is None else family
    if different := _differences(config, name):
        raise FamilyError(f"{FAMILIES[name].architecture} cannot express {_listed(config, different)}.")
    chosen = FAMILIES[name]
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation]
    length = published_length(config)
    if length is None:
        scaling = config.rope_scaling
        reach = int(scaling.factor * scaling.original_length) if scaling.kind in ("llama3", "yarn") else 0
        length = max(reach, chosen.defaults["max_position_embeddings"])
    return {
        "architectures": [chosen.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        **({"hidden_activation": activation} if name.startswith("gemma") else {}),
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling_to_hf(config.rope_scaling),
        **({"rope_local_base_freq": config.local_rope_base or config.rope_base} if chosen.local_base else {}),
        **(_caps_to_hf(config) if chosen.caps else {}),
        **_layers_to_hf(config, name),
        **({} if name in ("mistral", "qwen2") else {"attention_bias": False}),
        **({"mlp_bias": False} if name == "llama" else {}),
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": config.dtype,
    }


def family_of(config: ModelConfig) -> str:
    """The first of `FAMILIES` that can express a model.

    Raises:
      FamilyError: none can; the message names the nearest and what it lacks.
    """
    differences = {name: _differences(config, name) for name in FAMILIES}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise FamilyError(
            "No Hugging Face architecture that we know expresses this model; the nearest, "
            f"{FAMILIES[nearest].architecture}, has no {_listed(config, differences[nearest])}."
        )
    return nearest


def _differences(config: ModelConfig, name: str) -> list[str]:
    """Fields whose values the family cannot express."""
    if name not in FAMILIES:
        raise FamilyError(f"family={name!r} is unknown. Use one of {', '.join(FAMILIES)}.")
    family, kinds = FAMILIES[name], set(config.kinds)
    different = [field for field, value in family.fixed.items() if getattr(config, field) != value]
    different += [cap for cap in _CAPS if cap not in family.caps and getattr(config, cap)]
    if not family.caps:
        different += ["query_scale"] if config.query_scale not in (0, config.head_dim) else []
    elif not float(config.query_scale).is_integer():  # transformers needs an int
        different.append("query_scale")
    if (family.layers == "none" and "local" in kinds) or (family.layers == "all" and len(kinds) > 1):
        different.append("layer_kinds")
    if "local" in kinds:
        plain = config.rope_scaling.kind == "none"
        same = config.local_rope_base == 0 or (config.local_rope_base == config.rope_base and plain)
        if family.local_base and config.local_rope_base == 0 and not plain:
            different.append("rope_scaling")  # of local layers
        if not family.local_base and not same:
            different.append("local_rope_base")
    return different


def _listed(config: ModelConfig, fields: list[str]) -> str:
    return ", ".join(f"{field}={getattr(config, field)!r}" for field in fields)


def _text_part(tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The language model of a multi-modal Gemma 3; other trees unchanged."""
    if not isinstance(tree, Mapping):
        raise FamilyError(f"{path}: holds {type(tree).__name__}, not the fields of a model.")
    if tree.get("model_type") != "gemma3":
        return tree
    text = tree.get("text_config")
    if not isinstance(text, Mapping):
        raise FamilyError(f"{path}: text_config: a multi-modal Gemma 3 must have one.")
    shared = ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
    outer = {key: tree[key] for key in shared if tree.get(key) is not None}
    return {"model_type": "gemma3_text"} | dict(text) | outer


def _family_name(tree: Mapping[str, Any], path: str) -> str:
    name = tree.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        close = difflib.get_close_matches(shown(name).strip("'"), [*FAMILIES, "gemma3"], 1)
        hint = f" The nearest is {close[0]}." if close else ""
        if "moe" in shown(name) or "mixtral" in shown(name):
            hint = " Mixtures of experts are not supported."
        raise FamilyError(
            f"{path}: model_type={shown(name)}: unknown architecture. We have "
            f"{', '.join([*FAMILIES, 'gemma3'])}.{hint}"
        )
    architectures = tree.get("architectures")
    known = (FAMILIES[name].architecture, "Gemma3ForConditionalGeneration")
    if architectures and not (isinstance(architectures, list) and architectures[0] in known):
        raise FamilyError(
            f"{path}: architectures={shown(architectures)}: model_type {name!r} goes with "
            f"{FAMILIES[name].architecture}; models of other tasks have no head over the vocabulary."
        )
    return name


def _check_supported(name: str, tree: Mapping[str, Any], fields: Fields) -> None:
    for key, (value, reason) in _MUST_BE.items():
        if tree.get(key) is not None and tree[key] != value:
            raise fields.fault(key, reason)
    if name == "gemma3_text" and tree.get("attn_logit_softcapping") is not None:
        raise fields.fault(
            "attn_logit_softcapping", "transformers does not apply it in Gemma 3; set it to null"
        )
    bias = tree.get("attention_bias")
    if name == "qwen2" and bias is False:
        raise fields.fault("attention_bias", "Qwen2ForCausalLM always has biases of queries, keys and values")
    if name != "qwen2" and bias:
        raise fields.fault(
            "attention_bias", "the output of attention would have one too; only Qwen 2's is supported"
        )


def _activation(name: str, fields: Fields) -> Any:
    """Gemma 1's "gelu" means the tanh approximation; Gemma 2 and 3 read only `hidden_activation`."""
    key = "hidden_act"
    if name.startswith("gemma") and (name != "gemma" or fields["hidden_activation"] is not None):
        key = "hidden_activation"
    if key not in fields.tree:
        return _ACTIVATIONS[fields.defaults["act"]]
    if (name, key, fields[key]) == ("gemma", "hidden_act", "gelu"):
        return "gelu_tanh"
    return _ACTIVATIONS[fields.choice(key, _ACTIVATIONS, "unknown activation")]


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields["dtype"] is not None else "torch_dtype"
    return "float32" if fields[key] is None else fields.choice(key, DTYPES, "unknown")


def _layers_from_hf(name: str, fields: Fields, Z: int) -> tuple[tuple[LayerKind, ...], int]:
    """The kind of each layer, and the window of local layers, 0 if there are none."""
    has_window = name not in ("gemma", "llama")
    has_window &= not name.startswith("qwen") or fields.flag("use_sliding_window")
    window = fields.size("sliding_window", default=0) if has_window else 0
    local = [False] * Z
    if name == "mistral":
        local = [window > 0] * Z
    elif name == "gemma2":
        local = [z % 2 == 0 for z in range(Z)]
    elif name == "gemma3_text":
        pattern = fields.size("sliding_window_pattern")
        local = [(z + 1) % pattern > 0 for z in range(Z)]
    elif window:
        first = fields["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int):
            raise fields.fault("max_window_layers", "must be a whole number")
        local = [z >= first for z in range(Z)]
    listed = fields["layer_types"]
    if listed is not None:
        names = {"sliding_attention": True, "full_attention": False}
        if not isinstance(listed, list) or len(listed) != Z or not all(layer in [*names] for layer in listed):
            raise fields.fault("layer_types", f"name each of {Z} layers one of {', '.join(names)}")
        if FAMILIES[name].layers == "any":
            local = [names[layer] for layer in listed]
        elif local != [names[layer] for layer in listed]:
            raise fields.fault(
                "layer_types", f"{FAMILIES[name].architecture} does not read it, and differs from it"
            )
    if any(local) and not window:
        raise fields.fault(
            "sliding_window", "layers with sliding attention need one (use_sliding_window too)"
        )
    return tuple("local" if is_local else "global" for is_local in local), window if any(local) else 0


def _shortest(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """The shortest prefix that gives all kinds when repeated."""
    Z = len(kinds)
    return next(kinds[:n] for n in range(1, Z + 1) if all(kinds[z] == kinds[z % n] for z in range(Z)))


def _layers_to_hf(config: ModelConfig, name: str) -> dict[str, Any]:
    """`layer_types`, and the fields by which older versions express the same, if they can."""
    family, local = FAMILIES[name], [kind == "local" for kind in config.kinds]
    if family.layers == "none":
        return {}
    window = config.sliding_window if any(local) else None
    if family.layers == "all":
        return {"sliding_window": window}
    fields: dict[str, Any] = {"sliding_window": window or family.defaults["sliding_window"]}
    fields["layer_types"] = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    if name == "gemma3_text":
        pattern = local.index(False) + 1 if False in local else len(local) + 1
        if local == [(z + 1) % pattern > 0 for z in range(len(local))]:
            fields["sliding_window_pattern"] = pattern
    elif name.startswith("qwen"):
        fields["use_sliding_window"] = any(local)
        fields["max_window_layers"] = local.index(True) if any(local) else len(local)
    return fields


def _caps_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": int(config.query_scale or config.head_dim),
        **{theirs: getattr(config, ours) or None for ours, theirs in _CAPS.items()},
    }
