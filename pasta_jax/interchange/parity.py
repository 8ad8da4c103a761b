"""Compares logits with those of transformers on the same folder, if transformers is installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.memory import gib, host_memory
from pasta_jax.model import ModelConfig, Transformer, forward, logits, param_count
from pasta_jax.model.forms import is_plain

ROWS, PROMPT, GREEDY = 2, 24, 8
"""Rows of random tokens, their length, and the number of tokens then decoded greedily."""


def parity_line(params: Any, config: ModelConfig, folder: str | os.PathLike[str]) -> str:
    """One line of text: the largest difference of logits, in float32, or why it was not measured.

    Args:
      params: ours.
      config: of our model.
      folder: a Hugging Face folder of the same model, or a GGUF file; its vocabulary may be smaller or larger.
    """
    if importlib.util.find_spec("transformers") is None:
        return "Parity not measured: transformers is not installed."
    if importlib.util.find_spec("torch") is None:
        return "Parity not measured: torch is not installed."
    if not is_plain(params):
        return "Parity not measured: int8 weights are not the folder's."
    count, free = param_count(params), host_memory()
    need = count * 4 * (1 if config.dtype == "float32" else 2)
    if free is not None and need * 1.2 > free:
        return (
            f"Parity not measured: a second copy of {count:,} parameters, in float32, needs {gib(need * 1.2)} GiB; "
            f"{gib(free)} GiB are free."
        )
    try:
        return _measured(params, config, os.fspath(folder))
    except Exception as error:  # of any kind, from transformers; the conversion itself succeeded
        reason = (str(error).strip() or "no message").splitlines()[0][:200]
        return f"Parity not measured: {type(error).__name__}: {reason}"


def _measured(params: Any, config: ModelConfig, folder: str) -> str:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    where: dict[str, str] = {}
    if is_file := os.path.isfile(folder):
        folder, where["gguf_file"] = os.path.split(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **where
    )
    model = model.to("cpu").eval()
    if is_file:  # which is dequantised in float32; ours was rounded since
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, config.dtype)).float()
    hf_V = int(model.get_output_embeddings().weight.shape[0])
    V = min(hf_V, config.vocab_size)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, V, (ROWS, PROMPT)))
    with torch.no_grad():
        for _ in range(GREEDY):
            last = model(tokens, use_cache=False).logits[:, -1, :V]
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], dim=1)
        hf_BxLxV = model(tokens, use_cache=False).logits[..., :V].float().numpy()
    del model
    ours_BxLxV = _logits(params, config, tokens.numpy())[..., :V]
    difference = float(np.abs(ours_BxLxV - hf_BxLxV).max())
    greedy = np.s_[:, PROMPT - 1 : PROMPT - 1 + GREEDY]
    agree = int((ours_BxLxV[greedy].argmax(-1) == hf_BxLxV[greedy].argmax(-1)).sum())
    return (
        f"Parity with transformers {transformers.__version__}: largest logit difference {difference:.1e} over "
        f"{tokens.numel()} positions; {agree} of {ROWS * GREEDY} greedy tokens agree."
    )


def _logits(params: Any, config: ModelConfig, tokens_BxL: np.ndarray) -> np.ndarray:
    """Logits of our model, computed in float32: [B, L, V]."""
    B, L = tokens_BxL.shape
    model = Transformer(dataclasses.replace(config, dtype="float32"))
    positions_BxL = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    may_attend_BxLxL = np.broadcast_to(np.tril(np.ones((L, L), bool)), (B, L, L))

    @jax.jit
    def run(params: Any, tokens: Any) -> Any:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        hidden, _ = forward(model, wide, tokens, positions_BxL, may_attend_BxLxL)
        return logits(model, wide, hidden)

    return np.asarray(run(params, jnp.asarray(tokens_BxL, jnp.int32)))
