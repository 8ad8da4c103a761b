"""Drawing: which tokens may be drawn, against a plain specification, and how often each is."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.decoding import sampling
from pasta_jax.decoding.sampling import Draw

SIZES = (7, 512, 1_000)
"""V: searched in blocks of 1, of 256 and of 8."""

NARROWING = [
    # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (10_000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.1),
    (0, 1.0, 1.0),
    (6, 0.7, 0.0),
    (0, 0.95, 0.05),
    (40, 0.95, 0.02),
]


def specification(p: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [V] narrowed; and the tokens for which rounding decides, as they stand at the edge of top-p."""
    likeliest_first = np.argsort(-p)
    if top_k:
        p = p * np.isin(np.arange(len(p)), likeliest_first[:top_k])
    p = p / p.sum()
    before = np.empty(len(p))
    before[likeliest_first] = np.cumsum(p[likeliest_first]) - p[likeliest_first]
    at_the_edge = (top_p < 1) & (p > 0) & (abs(before - top_p) < 1e-5)
    if top_p < 1:
        p = p * (before < top_p)
    p = p * (p >= min_p * p.max())
    return p / p.sum(), at_the_edge


def draw(
    temperature: Sequence[float], top_k: Sequence[float], top_p: Sequence[float], min_p: Sequence[float]
) -> Draw:
    """The options of each row."""
    return Draw(
        np.array(temperature, np.float32),
        np.array(top_k, np.int32),
        np.array(top_p, np.float32),
        np.array(min_p, np.float32),
    )


@pytest.mark.parametrize("V", SIZES)
def test_top_k_then_top_p_then_min_p(V, seed):
    """Every row by options of its own, all of them in one call."""
    rng = np.random.default_rng(seed)
    n = 20 * len(NARROWING)
    logits = rng.normal(scale=rng.choice([0.5, 2.0, 5.0], (n, 1)), size=(n, V)).astype(np.float32)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    kept = np.asarray(jax.jit(sampling.keep_likely)(weight, draw([1.0] * n, *zip(*(NARROWING * 20)))))
    for i in range(n):
        p = np.exp(logits[i].astype(np.float64))
        options = NARROWING[i % len(NARROWING)]
        expected, at_the_edge = specification(p, *options)
        same = (kept[i] > 0) == (expected > 0)
        assert np.all(same | at_the_edge) and at_the_edge.sum() <= 2, (i, options)
        np.testing.assert_array_equal(kept[i][kept[i] > 0], weight[i][kept[i] > 0])


def test_what_is_as_likely_as_the_last_one_kept_stays():
    weight = np.array([[0.5, 1.0, 0.25, 0.5, 0.25]] * 4, np.float32)
    k, p, m = [2, 4, 0, 0], [1.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.5]
    kept = jax.jit(sampling.keep_likely)(weight, draw([1.0] * 4, k, p, m))
    np.testing.assert_array_equal(
        np.asarray(kept) > 0, np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 0, 1, 0]])
    )


@pytest.mark.parametrize("V", SIZES[:2])
def test_draws_follow_the_distribution(V, seed):
    """Each token as often as it is likely, within what chance allows; a forbidden one never."""
    rng = np.random.default_rng([seed, V])
    n = 10_000
    logits = rng.normal(scale=2.0, size=V).astype(np.float32)
    forbidden = rng.random(V) < 0.2
    forbidden[0] = False
    logits[forbidden] = sampling.NEVER
    key = sampling.branch_key(sampling.main_key(jnp.array([0, seed], jnp.uint32)), jnp.int32(3))
    keys = jax.vmap(sampling.draw_key, (None, 0))(key, jnp.arange(n))
    sample = jax.jit(lambda logits, keys, how: sampling.sample(logits, lambda: keys, how))
    rows = np.broadcast_to(logits, (n, V))
    cases = [(0.7, (0, 1.0, 0.0)), (0.7, (5, 0.9, 0.05)), (1e30, (0, 1.0, 0.0))]
    for temperature, narrowing in cases:
        how = draw([temperature] * (n - 1) + [0.0], *([option] * n for option in narrowing))
        *drawn, greedy = sample(rows, keys, how)
        assert greedy == np.argmax(logits)
        p = np.where(forbidden, 0.0, np.exp((logits.astype(np.float64) - logits.max()) / temperature))
        expected, at_the_edge = specification(p, *narrowing)
        found = np.bincount(drawn, minlength=V) / (n - 1)
        assert not found[forbidden].any()
        if at_the_edge[expected > 0].any():
            continue
        assert not found[expected == 0].any()
        assert np.all(abs(found - expected) <= 5.5 * np.sqrt(expected / n) + 5 / n)


@pytest.mark.parametrize("V", SIZES)
def test_the_first_of_the_greatest(V, seed):
    x = np.random.default_rng(seed).integers(-3, 3, (50, V)).astype(np.float32)
    x[0] = sampling.NEVER
    np.testing.assert_array_equal(jax.jit(sampling.argmax)(x), np.argmax(x, axis=1))


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_draws_are_the_same_with_any_default_generator(generator):
    def drawn() -> np.ndarray:
        key = sampling.branch_key(sampling.main_key(jnp.array([0, 7], jnp.uint32)), jnp.int32(3))
        return np.asarray(jax.random.bits(sampling.draw_key(key, jnp.int32(5))))

    expected = drawn()
    with jax.default_prng_impl(generator):
        assert drawn() == expected
        assert jax.random.key(0).dtype != sampling.main_key(jnp.zeros(2, jnp.uint32)).dtype


def test_draws_and_branches_have_different_keys():
    """A branch that the first token starts, and the draw of any token: no two keys of a thread are the same."""
    key = sampling.main_key(jnp.array([0, 7], jnp.uint32))
    index = jnp.arange(50)
    keys = [jax.vmap(of, (None, 0))(key, index) for of in (sampling.branch_key, sampling.draw_key)]
    data = np.concatenate([jax.random.key_data(some) for some in keys])
    assert len(np.unique(data, axis=0)) == 100
