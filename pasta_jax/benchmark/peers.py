"""Sequential decode and prefill compared with Hugging Face transformers, on the same weights, in one process.

The peers are `generate` with its defaults (eager, a growing cache) and with a static cache and a compiled forward
pass (`cache_implementation="static"`, torch.compile). Decoding is greedy; the tokens must be the same.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from flax.traverse_util import flatten_dict

from pasta_jax.benchmark.measure import Quartiles, TableRow, interleaved, median_ratio
from pasta_jax.benchmark.measurements import SEQUENTIAL, Effort
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.state import Limits
from pasta_jax.model.families import config_to_hf
from pasta_jax.model.weights import hf_tensors
from pasta_jax.rounding import round_up

LOG = logging.getLogger("pasta_jax")

BATCHES = (1, 8)

Generate: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
"""Prompts int32 [B, L] and a number n to the next n greedy tokens, [B, n]."""


def missing() -> str | None:
    """Why peers cannot be measured; None if they can."""
    package = missing_package("transformers", "torch")
    return f"Peers not measured: {package} is not installed." if package else None


def missing_package(*packages: str) -> str | None:
    """The first of these that is not installed."""
    return next((package for package in packages if importlib.util.find_spec(package) is None), None)


def peers(
    model: Model, effort: Effort, rng: random.Random, batches: tuple[int, ...] = BATCHES
) -> list[TableRow]:
    """Seconds to prefill and milliseconds of a decode step, of our decoder and of transformers, by batch size.

    A step is the slope between a call for one token and a call for `effort.steps` tokens. Prefill is the time of a
    call for one token; for ours less one step, because our decoder feeds the token that it returns.

    Raises:
      FamilyError: no architecture of transformers has this configuration.
    """
    peers, words = _hf_generates(model), _words(model)
    points: list[TableRow] = []
    for rows in batches:
        prompts = np.array([rng.choices(words, k=effort.prompt_tokens) for _ in range(rows)], np.int32)
        generates = {"pasta_jax": _ours(model, effort, rows), **peers}
        tokens: dict[str, np.ndarray] = {}
        calls: dict[str, Callable[[], float]] = {}
        for name, generate in list(generates.items()):
            started = time.monotonic()
            try:
                tokens[name] = generate(prompts, effort.steps)
            except Exception as error:  # a peer that fails on this machine is left out
                if name == "pasta_jax":
                    raise
                reason = (str(error).strip() or "no message").splitlines()[0][:200]
                LOG.warning("%s left out: %s: %s", name, type(error).__name__, reason)
                del peers[name]
                continue
            LOG.info("batch %d, %s: first call took %.0f s", rows, name, time.monotonic() - started)
            calls[f"{name}, 1"] = _seconds(generate, prompts, 1)
            calls[f"{name}, n"] = _seconds(generate, prompts, effort.steps)
        samples = interleaved(f"peers, batch {rows}", calls, effort.repeats, "s")
        points += compared(rows, effort, samples, tokens)
    return points


def compared(
    rows: int, effort: Effort, samples: dict[str, list[float]], tokens: dict[str, np.ndarray]
) -> list[TableRow]:
    timed = {}
    for name in tokens:
        one, many = samples[f"{name}, 1"], samples[f"{name}, n"]
        step = [(after - before) / (effort.steps - 1) for before, after in zip(one, many)]
        own = 1 if name == "pasta_jax" else 0
        timed[name] = [before - own * s for before, s in zip(one, step)], step, many
    ours = timed["pasta_jax"]
    points: list[TableRow] = []
    for name, (prefill, step, whole) in timed.items():
        agree = tokens[name] == tokens["pasta_jax"]
        points.append(
            {
                "batch": rows,
                "who": name,
                "prefill, s": Quartiles.of(prefill),
                "step, ms": Quartiles.of([1000 * s for s in step]),
                "whole, s": Quartiles.of(whole),
                "prefill, ours is x as fast": median_ratio(prefill, ours[0]),
                "step, ours is x as fast": median_ratio(step, ours[1]),
                "same tokens": f"{int(agree.sum())} of {agree.size}",
            }
        )
    return points


def _seconds(generate: Generate, prompts: np.ndarray, tokens: int) -> Callable[[], float]:
    def seconds() -> float:
        started = time.perf_counter()
        generate(prompts, tokens)
        return time.perf_counter() - started

    return seconds


def _words(model: Model) -> list[int]:
    """All ids but those of tags and control symbols."""
    vocabulary = model.tokenizer.vocabulary
    special = {*vocabulary.tag_ids.values(), *vocabulary.stops, *vocabulary.control}
    return [i for i in range(len(vocabulary)) if i not in special]


def _ours(model: Model, effort: Effort, rows: int) -> Generate:
    """Our decoder, with promises forbidden."""
    lanes = min(8, effort.lanes)
    pool = round_up(effort.prompt_tokens + effort.steps + lanes, 128) - lanes
    limits = Limits(lanes, 16, pool)
    decoder = Decoder(model, limits=limits, rows=rows, prompt_buckets=(effort.prompt_tokens,))

    def generate(prompts: np.ndarray, tokens: int) -> np.ndarray:
        sampling = dataclasses.replace(SEQUENTIAL, max_new_tokens=tokens)
        traces, _ = decoder.decode(prompts.tolist(), [sampling] * rows)
        return np.stack([trace.tokens.token[trace.prompt_length :][:tokens] for trace in traces])

    return generate


def _hf_generates(model: Model) -> dict[str, Generate]:
    """The variants of `generate` in transformers, on our weights."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    hf, device = hf_model(model)
    hf = hf.eval()

    def generate(prompts: np.ndarray, tokens: int, **options: Any) -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64)).to(device)
        settings = transformers.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, **options
        )
        with torch.inference_mode():
            ids = hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return ids[:, prompts.shape[1] :].cpu().numpy()

    def compiled(prompts: np.ndarray, tokens: int) -> np.ndarray:
        settings = transformers.CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
        settings._compile_all_devices = True  # otherwise a CPU does not compile
        return generate(prompts, tokens, cache_implementation="static", compile_config=settings)

    version = transformers.__version__
    return {f"transformers {version}, eager": generate, f"transformers {version}, compiled": compiled}


def hf_model(model: Model, **options: Any) -> tuple[Any, str]:
    """A model of transformers with our weights, and the device that it is on; `options` of `from_config`."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(**config_to_hf(model.config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        dtype = getattr(torch, model.config.dtype)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    _copy_weights(torch, hf, model)
    return hf.to(device), device


def _copy_weights(torch: Any, hf: Any, model: Model) -> None:
    """Copies our parameters into a model of transformers, one tensor at a time."""
    named, params = dict(hf.named_parameters()), flatten_dict(model.params)
    with torch.no_grad():
        for tensor in hf_tensors(model.config):
            array = tensor.to_hf(np.asarray(params[tensor.path]))
            wide = torch.from_numpy(np.array(array, np.float32))
            named.pop(tensor.name).copy_(wide)
    if named and not (model.config.tie_embeddings and set(named) == {"lm_head.weight"}):
        raise ValueError(f"transformers' model has parameters that ours lacks: {', '.join(named)}.")
