"""The rule and its numbering: the docstring's matrix, NumPy == JAX, and what any fork/join tree satisfies."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import visibility
from pasta_jax.arrays import NO_DOC, Tokens
from pasta_jax.visibility import contains, max_segments, reach, singleton, visible, words_for
from tests.helpers.trees import Writer, random_tree, tokens_of


def test_the_worked_matrix_of_the_docstring() -> None:
    writer = Writer()
    main = writer.main
    main.write(2)  # a P
    block = main.fork()
    block.write(3)  # [ b ]
    main.write(1)  # c
    main.join(block)
    main.write(2)  # S d
    tokens = writer.tokens()

    lines = visibility.__doc__.splitlines()
    head = next(i for i, line in enumerate(lines) if "key: a P [ b ] c S d" in line)
    matrix = np.array([[x == "1" for x in line.split()[1:]] for line in lines[head + 1 : head + 9]])
    segments = next(line for line in lines if line.strip().startswith("segment  "))
    assert tokens.segment.tolist() == [int(x) for x in segments.split()[1:]]
    assert matrix.shape == (8, 8) and matrix.sum() == 4 * 8 - 1 + 2  # as written there, not something empty
    np.testing.assert_array_equal(visible(tokens, tokens), matrix)


def test_a_random_tree_sees_its_past_and_what_it_joined(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        writer, expected = random_tree(rng, threads=rng.choice([1, 3, 8, 40]))
        if expected.size:
            tokens = writer.tokens()
            np.testing.assert_array_equal(visible(tokens, tokens), expected)


def test_a_token_sees_itself_and_visibility_is_transitive(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        writer, expected = random_tree(rng, threads=12)
        if not expected.size:
            continue
        tokens = writer.tokens()
        sees = visible(tokens, tokens)
        assert sees.diagonal().all()
        assert not ((sees.astype(int) @ sees.astype(int) > 0) & ~sees).any()  # the leak law rests on this


def test_numpy_and_jax_agree_in_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, Q, P, W = 3, 5, 9, 3

    def draw(count: int) -> Tokens:
        doc, segment, order = (rng.integers(0, high, (B, count), np.int32) for high in (3, 32 * W, 4))
        return tokens_of(doc, segment, order, rng.integers(0, 2**32, (B, count, W), np.uint32))

    query, key = draw(Q), draw(P)
    in_numpy = visible(query, key)
    in_jax = jax.jit(lambda q, k: visible(Tokens(**q), Tokens(**k)))(query.fields(), key.fields())
    assert in_numpy.shape == (B, Q, P) and in_numpy.any()
    np.testing.assert_array_equal(in_numpy, in_jax)


def test_documents_and_padding_are_apart() -> None:
    sees_all = np.full((4, 1), 2**32 - 1, np.uint32)
    doc = np.array([1, 2, NO_DOC, NO_DOC], np.int32)
    tokens = tokens_of(doc, np.zeros(4, np.int32), np.zeros(4, np.int32), sees_all)
    np.testing.assert_array_equal(visible(tokens, tokens), np.diag([True, True, False, False]))


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_sets_of_segments(xp) -> None:  # type: ignore[no-untyped-def]
    for segment in (0, 31, 32, 63, 64, 95):
        one = singleton(xp.int32(segment), 3)
        assert one.dtype == xp.uint32 and one.shape == (3,)
        members = contains(one, xp.arange(96, dtype=xp.int32))
        assert np.flatnonzero(members).tolist() == [segment]
        both = reach(one, xp.int32(7))
        assert np.flatnonzero(contains(both, xp.arange(96, dtype=xp.int32))).tolist() == sorted({7, segment})


def test_the_bound_on_segments_is_reached() -> None:
    threads = 5
    writer = Writer()
    for _ in range(threads - 1):
        writer.main.join(writer.main.fork())
    assert writer.segments == max_segments(threads)
    assert words_for(32) == 1 and words_for(33) == 2
