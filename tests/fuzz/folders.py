"""Published models: whatever a folder holds, it is a model or one error of ours, in little time and memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import tempfile
from typing import Any

import jax

from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.loading import load
from pasta_jax.model import param_shapes
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome
from tests.helpers import family_folders, hf_folders

ERRORS = (InterchangeError, TokenizerError)

JSON_TOKENIZERS = {"llama": "llama 3.1", "qwen2": "qwen 2.5", "qwen3": "qwen 3"}
"""Families whose tokenizer is a tokenizer.json."""

BASES = (*hf_folders.CONFIGS, *(f"{family} json" for family in JSON_TOKENIZERS))

HEADER = " header"
"""After a file's name: the JSON at the start of a safetensors file."""

NAMES: dict[str, tuple[str, ...]] = {
    "config.json": (
        *(
            "rope_scaling",
            "rope_parameters",
            "layer_types",
            "quantization_config",
            "text_config",
            "sliding_window",
        ),
        *(
            "num_hidden_layers",
            "head_dim",
            "hidden_act",
            "hidden_activation",
            "model_type",
            "architectures",
            "dtype",
        ),
        *(
            "attn_logit_softcapping",
            "max_window_layers",
            "sliding_window_pattern",
            "eos_token_id",
            "mlp_bias",
        ),
        *(
            "use_sliding_window",
            "query_pre_attn_scalar",
            "max_position_embeddings",
            "num_experts",
            "vocab_size",
        ),
    ),
    "tokenizer_config.json": (
        *("chat_template", "added_tokens_decoder", "add_bos_token", "bos_token", "eos_token", "pad_token"),
    ),
    "generation_config.json": ("eos_token_id",),
    "special_tokens_map.json": ("bos_token", "eos_token"),
    "added_tokens.json": ("<new>", "<unused1>", "<|im_end|>"),
    "chat_template.json": ("chat_template",),
    "pasta_tags.json": ("<sync/>", "<async>", " />"),
    "model.safetensors.index.json": ("weight_map", "metadata"),
    "tokenizer.json": ("added_tokens", "model", "normalizer", "pre_tokenizer", "decoder", "post_processor"),
    f"model.safetensors{HEADER}": ("__metadata__", "model.norm.weight", "lm_head.weight"),
}
"""JSON of a folder, with keys that may be in it."""

RAW = (
    "tokenizer.model",
    "tokenizer.json",
    "model.safetensors",
    "config.json",
    "chat_template.jinja",
    "readme",
)


@functools.cache
def base(name: str) -> dict[str, bytes]:
    """The files of a good folder."""
    family, _, kind = name.partition(" ")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary, "hf")
        config, shards = hf_folders.CONFIGS[family], 2 if family.startswith("gemma") else 1
        if kind:
            beside = family_folders.FOLDERS[JSON_TOKENIZERS[family]]()
            rows = family_folders.rows(beside["tokenizer.json"])
            config = dataclasses.replace(config, vocab_size=rows)
        hf_folders.write_hf_folder(folder, config, shards=shards)
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    if kind:
        del files["tokenizer.model"]
        files |= {name: data for name, data in beside.items() if name != "config.json"}
    return files


def draw(rng: random.Random) -> Any:
    name = rng.choice(BASES)
    files = base(name)
    edits: dict[str, Any] = {}
    for _ in range(rng.choice((0, 1, 1, 2))):
        file = rng.choice(("config.json", "config.json", *NAMES))
        edits[file] = hostile.edits(rng, parsed(files, file), NAMES[file], rng.randint(1, 2))
    damage: dict[str, Any] = {}
    if not edits or rng.random() < 0.1:
        file = rng.choice((*files, *RAW))
        damage[file] = hostile.damage(rng, flips=not file.endswith(".safetensors"))
    return {"base": name, "edits": edits, "damage": damage, "extend": rng.random() < 0.2}


def parsed(files: dict[str, bytes], name: str) -> Any:
    """A JSON file, or the header of a safetensors file; {} if there is none."""
    file = name.removesuffix(HEADER)
    data = files.get(file, b"")
    if name.endswith(HEADER) and data:
        data = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return json.loads(data or b"{}")


def written(files: dict[str, bytes], name: str, tree: Any) -> tuple[str, bytes]:
    """The file with this JSON in it."""
    data = json.dumps(tree).encode()
    if not name.endswith(HEADER):
        return name, data
    file = name.removesuffix(HEADER)
    old = files.get(file, bytes(8))
    rest = old[8 + int.from_bytes(old[:8], "little") :]
    return file, len(data).to_bytes(8, "little") + data + rest


def check(case: Any) -> None:
    files: dict[str, bytes | None] = {**base(case["base"])}
    for name, edits in case["edits"].items():
        good: Any = files
        file, data = written(good, name, hostile.edited(parsed(good, name), edits))
        files[file] = data
    for name, damage in case["damage"].items():
        files[name] = hostile.damaged(files.get(name) or b"", damage)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            if content is not None:
                pathlib.Path(folder, name).write_bytes(content)
            elif case["damage"][name] == ["folder"]:
                pathlib.Path(folder, name).mkdir()
        model, error = outcome(ERRORS, load, f"hf:{folder}", extend_tokenizer=case["extend"])
    if error:
        return
    shapes, want = (
        {path: (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (model.params, param_shapes(model.config))
    )
    assert shapes == want
    ids = model.tokenizer.encode_prompt("the Nile is long <sync/>")
    assert all(0 <= i < model.config.vocab_size for i in ids)


TARGET = Target(draw, check, share=3.0)
