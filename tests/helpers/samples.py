"""Samples of the second stage that no model drew."""

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.decoding.results import Stats
from pasta_jax.preference.sample import Sample


def made_up(text: str, document: ThreadedTokens, *, critical_path: int, tokens: int = 20) -> Sample:
    stats = Stats(
        prompt_tokens=1,
        output_tokens=tokens,
        decode_steps=critical_path,
        text_tokens=tokens,
        critical_path=critical_path,
        step_speedup=tokens / critical_path,
        wall_s=0.0,
        compile_s=0.0,
        tokens_per_s=0.0,
        max_width=1,
        mean_width=1.0,
    )
    return Sample(text, text, stats, document, np.zeros(len(document), np.int32))
