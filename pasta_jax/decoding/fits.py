"""Does it fit: a decoder's pool, and a prompt. Both are checked before anything is allocated."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set

import jax

from pasta_jax.decoding.compiled import SMALL_PREFILL, Compiled
from pasta_jax.memory import gib, shortage

POOL_NAMES = "Limits.pool", "cache_len"
"""The same size, as a `Decoder` and as `decode` has it."""


class DoesNotFit(ValueError):
    """A pool or a prompt that is too large.

    Attributes:
      problem: what is too large.
      for_decode: the same, and what those who called `decode` can do.
    """

    def __init__(self, problem: str, advice: str, for_decode: str):
        super().__init__(f"{problem} {advice}")
        self.problem, self.for_decode = problem, f"{problem} {for_decode}"


def check_pool(compiled: Compiled, kept: int = 0) -> None:
    """Raises DoesNotFit if the rows of these programs, and `kept` bytes besides, take more memory than is free."""
    leaves = jax.tree.leaves(compiled.batch_shapes())
    others = [jax.ShapeDtypeStruct((kept,), "int8", sharding=leaves[0].sharding)] if kept else []
    if lack := shortage([*leaves, *others]):
        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        rows, pool, threads = compiled.rows, compiled.limits.pool, compiled.limits.threads
        raise DoesNotFit(
            f"The pool does not fit: {rows} row{'s' * (rows > 1)} x {pool:,} tokens x "
            f"{total / rows / pool:,.0f} bytes with {threads:,} threads = {gib(total)} GiB"
            f"{f', and reuse = {gib(kept)} GiB' * bool(kept)}; {lack}. Nothing was allocated.",
            "Use fewer rows, or smaller Limits.pool or Limits.threads.",
            "Lower max_new_tokens (or cache_len) or max_branches, or give fewer prompts at once.",
        )


def check_prompt(prompt: Iterable[int], compiled: Compiled, *, has_pool: bool) -> list[int]:
    """The ids of a prompt. Raises ValueError for one that cannot be answered: DoesNotFit if it is too long.

    Args:
      prompt: ids.
      compiled: what it is decoded with.
      has_pool: whether the pool is allocated.
    """
    try:
        is_other = isinstance(prompt, str | bytes | bytearray | Set | Mapping)
        ids = None if is_other else [operator.index(token) for token in prompt]
    except TypeError:
        ids = None
    if ids is None:
        raise ValueError(
            "The prompt is neither a text nor a conversation nor ids. Give a text, or "
            '[{"role": "user", "content": "..."}].'
        )
    if not ids:
        raise ValueError("The prompt is empty. Give the model something to answer.")
    pool, vocab_size = compiled.limits.pool, compiled.config.vocab_size
    if len(ids) >= pool:
        more = f"to more than {len(ids)}."
        raise DoesNotFit(
            f"The prompt has {len(ids)} tokens, and the pool holds {pool} for prompt and answer together.",
            f"Shorten the prompt, or set Limits.pool {more}",
            f"Shorten the prompt, or set cache_len {more}",
        )
    _check_prefill(len(ids), compiled, has_pool)
    if not all(0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"The prompt has ids that are none of the model's {vocab_size}: encode it with its tokenizer."
        )
    return ids


def _check_prefill(tokens: int, compiled: Compiled, has_pool: bool) -> None:
    """Raises DoesNotFit if feeding a prompt alone (on a mesh, all rows) takes more memory than is free."""
    bucket = compiled.bucket(tokens)
    rows = 1 if compiled.mesh is None else compiled.rows
    scores = compiled.scores(rows, bucket)
    _, heads, queries, _ = scores.shape
    size = 4 * math.prod(scores.shape)
    if size > SMALL_PREFILL and (
        lack := shortage([scores, *([] if has_pool else jax.tree.leaves(compiled.batch_shapes()))])
    ):
        many = f"{rows} rows x " * (rows > 1)
        ways = [f"Shorten it{f' or lower {pool}' * (bucket == compiled.limits.pool)}." for pool in POOL_NAMES]
        raise DoesNotFit(
            f"The prompt does not fit: its {tokens:,} tokens are fed at once, padded to {bucket:,}; {many}{heads} "
            f"heads x {queries:,} x {bucket:,} scores x 4 bytes = {gib(size)} GiB; with the pool, {lack}.",
            *ways,
        )
