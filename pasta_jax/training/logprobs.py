"""Log-probabilities of whole documents under a model, in packed batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import NO_TARGET, Array, ThreadedTokens
from pasta_jax.data.packing import Packer
from pasta_jax.decoding.model import Model
from pasta_jax.model import ModelConfig, Transformer
from pasta_jax.rounding import next_power_of_two
from pasta_jax.sharding import from_host, replicated
from pasta_jax.tokens.layout import layout_ids
from pasta_jax.training.losses import Scores
from pasta_jax.training.microbatches import map_parts, rows_sharding
from pasta_jax.training.update import hidden_of, scores_at, scores_of


def reference_pass(config: ModelConfig, mesh: Any, parts: int = 1) -> Any:
    """A jitted function of parameters and a batch's fields: the log-probability of each target, float32 [B, L].

    Args:
      config: of the model.
      mesh: of its parameters; None is one device.
      parts: microbatches, so that the logits of one are held at a time.
    """
    transformer = Transformer(config)

    def of_batch(params: Any, batch: ThreadedTokens) -> Array:
        return scores_of(transformer, params, batch, mesh=mesh).logprob

    return _compiled(of_batch, mesh, parts)


def scores_pass(config: ModelConfig, mesh: Any, parts: int = 1) -> Any:
    """As `reference_pass`, all that is known of each target: `Scores`."""
    transformer = Transformer(config)

    def of_batch(params: Any, batch: ThreadedTokens) -> Scores:
        return scores_of(transformer, params, batch, mesh=mesh)

    return _compiled(of_batch, mesh, parts)


def ending_pass(config: ModelConfig, end: int, mesh: Any, parts: int = 1) -> Any:
    """As `reference_pass`, and beside it the log-probability of the token `end` where a target is: a pair."""
    transformer = Transformer(config)

    def of_batch(params: Any, batch: ThreadedTokens) -> tuple[Array, Array]:
        hidden_BxLxD = hidden_of(transformer, params, batch, mesh=mesh)
        ends_BxL = jnp.where(batch.target == NO_TARGET, NO_TARGET, end)
        return (
            scores_at(transformer, params, hidden_BxLxD, batch.target, mesh).logprob,
            scores_at(transformer, params, hidden_BxLxD, ends_BxL, mesh).logprob,
        )

    return _compiled(of_batch, mesh, parts)


def _compiled(of_batch: Callable[[Any, ThreadedTokens], Any], mesh: Any, parts: int) -> Any:
    def forward(params: Any, fields: dict[str, Array]) -> Any:
        return map_parts(lambda part: of_batch(params, ThreadedTokens(**part)), fields, parts, mesh)

    return jax.jit(forward, out_shardings=None if mesh is None else replicated(mesh))


def by_document(
    forward: Any, model: Model, documents: Sequence[ThreadedTokens], rows: int, length: int, parts: int = 1
) -> Iterator[Any]:
    """What a pass (`reference_pass`, ...) finds of each document: its arrays [B, L] cut to [n], in order.

    Args:
      forward: the pass of this model, for its mesh and number of parts.
      model: the model.
      documents: [n] fields each, none longer than a row.
      rows, length, parts: of the batches, which all have this shape.

    Raises:
      ValueError: the model's mesh does not divide the rows of a microbatch, or a document is too long.
    """
    batch_sharding = rows_sharding(model.mesh, rows, parts) if model.mesh else None
    start = 0
    while start < len(documents):
        packer, end = Packer(rows, length), start
        while end < len(documents) and packer.add(documents[end]):
            end += 1
        if end == start:
            raise ValueError(f"A document has {len(documents[start])} tokens; a row holds {length}.")
        found = jax.device_get(forward(model.params, from_host(packer.pack().fields(), batch_sharding)))
        for row, span in packer.spans():
            yield jax.tree.map(lambda array, row=row, span=span: np.asarray(array)[row, span], found)
        start = end


def of_any_length(
    forward: Any, model: Model, documents: Sequence[ThreadedTokens], rows: int, length: int, parts: int = 1
) -> list[Any]:
    """As `by_document`; documents longer than a row are read in rows of the next power of two that holds them."""
    sizes = [len(document) for document in documents]
    lengths = [length if size <= length else next_power_of_two(size) for size in sizes]
    found: dict[int, Any] = {}
    for each in sorted({*lengths}):
        members = [i for i, needed in enumerate(lengths) if needed == each]
        passed = by_document(forward, model, [documents[i] for i in members], rows, each, parts)
        found.update(zip(members, passed, strict=True))
    return [found[i] for i in range(len(documents))]


def continuation_scores(
    forward: Any, model: Model, pairs: Sequence[tuple[list[int], list[int]]], rows: int, length: int
) -> list[tuple[float, bool]]:
    """How a model rates ids that follow others in one thread, none of them a tag.

    Args:
      forward: `scores_pass` of the model, for its mesh.
      model: the model.
      pairs: [n] ids before, one at least, and the ids that are rated.
      rows, length: of the batches, as of `of_any_length`.

    Returns:
      [n] the log-probability in nats, and whether no token of the ids is less likely than another.
    """
    vocabulary = model.tokenizer.vocabulary
    documents = [layout_ids(vocabulary, before, ids, model.positions, threads=1) for before, ids in pairs]
    return [
        (float(scores.logprob.sum()), bool(scores.is_likeliest[document.target != NO_TARGET].all()))
        for document, scores in zip(
            documents, of_any_length(forward, model, documents, rows, length), strict=True
        )
    ]


def reference_logprobs(
    model: Model, documents: Sequence[ThreadedTokens], rows: int, length: int, parts: int = 1
) -> list[np.ndarray]:
    """The log-probability of each token's target, 0 without one: float32 [n] for each document.

    Raises:
      ValueError: as `by_document`.
    """
    forward = reference_pass(model.config, model.mesh, parts)
    return [*by_document(forward, model, documents, rows, length, parts)]
