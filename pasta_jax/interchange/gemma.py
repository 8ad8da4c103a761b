"""Reads the Orbax checkpoints that google-deepmind/gemma publishes for JAX.

    transformer/embedder/input_embedding                      [V, D]
    transformer/layer_<z>/attn/q_einsum/w                     [N, D, H]
                              kv_einsum/w                     [2, K, D, H]
                              qkv_einsum/w                    [3, N, D, H], instead of both where N = K
                              attn_vec_einsum/w               [N, H, D]
                              _query_norm/scale _key_norm/scale [H], Gemma 3
                         mlp/gating_einsum                    [2, D, F] or [2, F, D]: gate, up
                             linear                           [F, D]
                         pre_attention_norm/scale pre_ffw_norm/scale   [D]
                         post_attention_norm/scale post_ffw_norm/scale [D], Gemma 2 and 3
    transformer/final_norm/scale                              [D]

Some are nested dicts, some have keys with slashes in them, some lack the first level, and some have a `w` below
`gating_einsum` and `linear`. A checkpoint has no soft caps, windows and rotary bases: the published model
with the same sizes gives them. The vision model is not read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh

from pasta_jax.checkpoints.about import absolute_path
from pasta_jax.interchange.errors import InterchangeError, listed
from pasta_jax.interchange.placing import Path, Transform, place_params
from pasta_jax.model import ModelConfig
from pasta_jax.model.presets import preset, presets

_IGNORED = re.compile(r"vision_encoder|SigLiP|mm_input|mm_output|mm_soft|audio")
_TOP = re.compile(r"^(params/)?(transformer/)?")

Take = Callable[[np.ndarray], np.ndarray]
"""Takes one of our parameters from one of the checkpoint's arrays."""


@dataclasses.dataclass(frozen=True)
class GemmaCheckpoint:
    """A checkpoint in Gemma's layout, checked against `config`.

    Attributes:
      path: of the checkpoint.
      config: of the model.
      keys: path of each array in the checkpoint's tree, by its name in the layout above.
      shapes: of the arrays, by the same names.
    """

    path: str
    config: ModelConfig
    keys: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]


def open_gemma(path: str | os.PathLike[str], config: ModelConfig | str | None = None) -> GemmaCheckpoint:
    """Opens a checkpoint and reports every fault. Reads no array.

    Args:
      path: the directory that Orbax wrote.
      config: of the model, or the name of a preset; by default the preset that has its sizes.

    Raises:
      InterchangeError: it is not such a checkpoint, no preset has its sizes, or an array is missing, extra or of
        another shape.
    """
    root = absolute_path(path)
    if not root.is_dir():
        raise InterchangeError(f"No checkpoint at {root}: no such directory.")
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(root)
        tree = metadata.tree if hasattr(metadata, "tree") else metadata
    except Exception as error:  # Orbax raises many kinds for foreign directories
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InterchangeError(f"{root} is not a checkpoint that Orbax can read ({reason}).") from error
    keys: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, leaf in (traverse_util.flatten_dict(tree) if isinstance(tree, Mapping) else {}).items():
        name = _TOP.sub("", "/".join(map(str, key)))
        if not _IGNORED.search(name) and getattr(leaf, "shape", None) is not None:
            keys[name], shapes[name] = key, tuple(leaf.shape)
    if len(shapes.get("embedder/input_embedding", ())) != 2:
        names = ", ".join(sorted(shapes)[:4]) or "nothing"
        raise InterchangeError(f"{root} has no transformer/embedder/input_embedding [V, D] (found: {names}).")
    if config is None:
        config = _by_sizes(shapes, os.fspath(root))
    elif isinstance(config, str):
        try:
            config = preset(config).config
        except ValueError as error:
            raise InterchangeError(str(error)) from error
    config = dataclasses.replace(config, vocab_size=shapes["embedder/input_embedding"][0])
    checkpoint = GemmaCheckpoint(os.fspath(root), config, keys, shapes)
    _check(checkpoint)
    return checkpoint


def read_gemma(
    checkpoint: GemmaCheckpoint,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    transform: Transform | None = None,
) -> dict[str, Any]:
    """Reads the parameters onto a mesh.

    Args:
      checkpoint: from `open_gemma`.
      config: the checkpoint's, in whatever dtype is wanted.
      mesh, transform: as in `placing.place_params`.

    Raises:
      InterchangeError: it does not fit, before anything is read.
    """
    dtype = np.dtype(config.dtype)

    def read(name: str, take: Take) -> np.ndarray:
        return np.ascontiguousarray(take(_restore(checkpoint, name)).astype(dtype, copy=False))

    readers = {path: functools.partial(read, *source) for path, source in _sources(checkpoint).items()}
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values()) * 4
    return place_params(
        readers, config, what=checkpoint.path, piece=2 * largest, mesh=mesh, transform=transform
    )


def _sources(checkpoint: GemmaCheckpoint) -> dict[Path, tuple[str, Take]]:
    """The array that each of our parameters comes from, and the function that takes it from there."""
    c, shapes = checkpoint.config, checkpoint.shapes

    def either(name: str) -> str:
        return f"{name}/w" if f"{name}/w" in shapes else name

    def same(x: np.ndarray) -> np.ndarray:
        return x

    sources: dict[Path, tuple[str, Take]] = {
        ("embed", "embedding"): ("embedder/input_embedding", same),
        ("final_norm", "scale"): ("final_norm/scale", same),
    }
    norms = {"attn_norm": "pre_attention_norm", "mlp_norm": "pre_ffw_norm"}
    if c.post_norms:
        norms |= {"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
    for z in range(c.num_layers):
        layer = f"layer_{z}"
        for name, gemma_name in norms.items():
            sources[layer, name, "scale"] = (f"{layer}/{gemma_name}/scale", same)
        attn = f"{layer}/attn"
        if f"{attn}/qkv_einsum/w" in shapes:
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                sources[layer, "attn", name] = (f"{attn}/qkv_einsum/w", functools.partial(_heads, i))
        else:
            sources[layer, "attn", "q_proj"] = (f"{attn}/q_einsum/w", functools.partial(_heads, None))
            for i, name in enumerate(("k_proj", "v_proj")):
                sources[layer, "attn", name] = (f"{attn}/kv_einsum/w", functools.partial(_heads, i))
        sources[layer, "attn", "o_proj"] = (f"{attn}/attn_vec_einsum/w", same)
        if c.qk_norm:
            sources[layer, "attn", "q_norm"] = (f"{attn}/_query_norm/scale", same)
            sources[layer, "attn", "k_norm"] = (f"{attn}/_key_norm/scale", same)
        for i, name in enumerate(("gate_proj", "up_proj")):
            gating = either(f"{layer}/mlp/gating_einsum")
            sources[layer, "mlp", name] = (gating, functools.partial(_gate, i, c.model_dim))
        sources[layer, "mlp", "down_proj"] = (either(f"{layer}/mlp/linear"), same)
    return sources


def _heads(which: int | None, x: np.ndarray) -> np.ndarray:
    """[N, D, H], or entry `which` of [2 or 3, N, D, H], to [D, N, H]."""
    return (x if which is None else x[which]).transpose(1, 0, 2)


def _gate(which: int, D: int, x: np.ndarray) -> np.ndarray:
    """Entry `which` of [2, D, F] or of [2, F, D], as [D, F]."""
    return x[which] if x.shape[1] == D else x[which].T


def _check(checkpoint: GemmaCheckpoint) -> None:
    c, shapes = checkpoint.config, checkpoint.shapes
    D, N, K, H, F = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    wanted: dict[str, list[tuple[int, ...]]] = {
        "embedding": [(c.vocab_size, D)], "scale": [(D,)], "q_norm": [(H,)], "k_norm": [(H,)],
        "q_proj": [(N, D, H)], "k_proj": [(2, K, D, H)], "v_proj": [(2, K, D, H)], "o_proj": [(N, H, D)],
        "gate_proj": [(2, D, F), (2, F, D)], "down_proj": [(F, D)],
    }  # fmt: skip
    wanted |= {"up_proj": wanted["gate_proj"]}
    faults, used = [], set()
    for path, (name, _) in _sources(checkpoint).items():
        used.add(name)
        expected = [(3, N, D, H)] if name.endswith("qkv_einsum/w") else wanted[path[-1]]
        if name not in shapes:
            faults.append(f"{name} {list(expected[0])} is missing")
        elif shapes[name] not in expected:
            faults.append(
                f"{name} is {list(shapes[name])}, {' or '.join(str(list(e)) for e in expected)} by the model"
            )
    faults += [
        f"{name} {list(shapes[name])}: there is no such array in this model"
        for name in shapes
        if name not in used
    ]
    if c.tie_embeddings is False or c.qkv_bias:
        faults.append("the model has a head or biases of its own, which no Gemma has")
    if faults:
        unique = list(dict.fromkeys(faults))
        raise InterchangeError(f"The arrays in {checkpoint.path} are not those of the model:{listed(unique)}")


def _by_sizes(shapes: Mapping[str, tuple[int, ...]], path: str) -> ModelConfig:
    """The configuration of the published model with the same layers and the same sizes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        """Of an array of the first layer; zeros if it is not there, or has another rank."""
        found = shapes.get(f"layer_0/{name}", shapes.get(f"layer_0/{name}/w", ()))
        return found if len(found) == rank else (0,) * rank

    layers = {m.group(1) for name in shapes if (m := re.match(r"layer_(\d+)/", name))}
    D = shapes["embedder/input_embedding"][1]
    N, H, _ = shape("attn/attn_vec_einsum", 3)
    F, K = shape("mlp/linear", 2)[0], shape("attn/kv_einsum", 4)[1] or N
    norms = ("layer_0/post_attention_norm/scale" in shapes, "layer_0/attn/_query_norm/scale" in shapes)
    sizes = (len(layers), D, N, K, H, F, *norms)
    same = {
        name: known.config
        for name, known in presets().items()
        if name.startswith("gemma") and sizes == _sizes(known.config)
    }
    if not same:
        raise InterchangeError(
            f"{path} has {len(layers)} layers of D={D}, N={N}, K={K}, H={H}, F={F}, which no published Gemma has. "
            "Name one with --preset of convert: "
            f"{', '.join(name for name in presets() if name.startswith('gemma'))}."
        )
    if len(set(same.values())) > 1:
        raise InterchangeError(f"{path} may be {' or '.join(same)}. Choose one with --preset of convert.")
    return next(iter(same.values()))


def _sizes(c: ModelConfig) -> tuple[Any, ...]:
    D, N, K, H, F = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
    return c.num_layers, D, N, K, H, F, c.post_norms, c.qk_norm


def _restore(checkpoint: GemmaCheckpoint, name: str) -> np.ndarray:
    """Reads a single array."""
    tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    item: Any = 0
    for key in reversed(checkpoint.keys[name]):
        tree, item = {key: tree}, {key: item}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                absolute_path(checkpoint.path),
                args=ocp.args.PyTreeRestore(item=item, restore_args=tree, transforms={}),
            )
    except Exception as error:  # Orbax raises many kinds for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InterchangeError(f"{checkpoint.path} is damaged at {name} ({reason}).") from error
    for key in checkpoint.keys[name]:
        restored = restored[key]
    return np.asarray(restored)
