"""Losses against numbers worked by hand (law 7)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET, PairedTokens
from pasta_jax.model.transformer import softcapped
from pasta_jax.training.losses import Sums, bonbon_margin, preference_loss, score, sft_loss
from pasta_jax.training.scores import score_hidden

# Two words, logits 0 and ln 3: probabilities 1/4 and 3/4. Equal logits: 1/2 each.
SURE, EVEN = [0.0, math.log(3)], [0.0, 0.0]
LOGITS_1x4x2 = jnp.array([[SURE, SURE, EVEN, SURE]])
TARGET_1x4 = jnp.array([[1, 0, 1, NO_TARGET]])


@pytest.fixture(autouse=True)
def _no_accidental_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def of_plain(logits: Any, target: Any) -> Sums:
    return sft_loss(score(logits, target), target)


def of_pairs(logits: Any, batch: PairedTokens, **options: Any) -> Sums:
    return preference_loss(score(logits, batch.target), batch, **options)


def test_scores() -> None:
    expected = [[math.log(3 / 4), math.log(1 / 4), math.log(1 / 2), 0.0]]
    scores = score(LOGITS_1x4x2, TARGET_1x4)
    np.testing.assert_allclose(scores.logprob, expected, atol=1e-6)
    # No word is likelier than the target: true, false, true (of equals, each will do).
    assert np.asarray(scores.is_likeliest).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_scores_of_hidden_states_and_their_gradient_are_those_of_the_logits(
    softcap: float, parts: int
) -> None:
    """At once, and in parts one after another; a target that is not there has no gradient."""
    rng = np.random.default_rng(parts)
    B, S, D, V = 2, 4, 5, 7
    shape = (B, S) if parts == 1 else (parts, B, S)
    hidden, table = jnp.asarray(rng.normal(size=(*shape, D))), jnp.asarray(rng.normal(size=(V, D)))
    target = jnp.asarray(rng.integers(0, V, shape)).at[..., -1].set(NO_TARGET)
    weight = jnp.asarray(rng.normal(size=shape))

    def product(tables: Any, hidden: Any) -> Any:
        return jnp.einsum("...D,VD->...V", hidden, tables["embed"])

    def by_hand(tables: Any, hidden: Any) -> Any:
        logits = softcapped(product(tables, hidden.reshape(-1, S, D)), softcap)
        scores = jax.tree.map(lambda x: x.reshape(shape), score(logits, target.reshape(-1, S)))
        return jnp.sum(weight * scores.logprob), scores.is_likeliest

    def fused(tables: Any, hidden: Any) -> Any:
        scores = score_hidden(product, softcap, tables, hidden, target)
        return jnp.sum(weight * scores.logprob), scores.is_likeliest

    arguments = {"embed": table}, hidden
    expected, found = (jax.value_and_grad(f, (0, 1), has_aux=True)(*arguments) for f in (by_hand, fused))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    assert np.abs(found[1][1]).max() > 0.1 and not np.asarray(found[1][1])[..., -1, :].any()


def test_sft_loss() -> None:
    loss, measured = of_plain(LOGITS_1x4x2, TARGET_1x4).mean()
    # -(ln 3/4 + ln 1/4 + ln 1/2) / 3 = ln(32 / 3) / 3
    np.testing.assert_allclose(loss, math.log(32 / 3) / 3, atol=1e-6)
    assert float(measured["loss"]) == float(loss)
    assert int(measured["targets"]) == 3
    # No word is likelier than the target: true, false, true (of equals, each will do).
    np.testing.assert_allclose(measured["accuracy"], 2 / 3, atol=1e-6)


def test_what_has_no_target_has_no_gradient() -> None:
    grad_1x4x2 = jax.grad(lambda logits: of_plain(logits, TARGET_1x4).mean()[0])(LOGITS_1x4x2)
    # d loss / d logits = (p - 1 at the target) / 3
    expected = np.array([[[1 / 4, -1 / 4], [-3 / 4, 3 / 4], [1 / 2, -1 / 2], [0, 0]]]) / 3
    np.testing.assert_allclose(grad_1x4x2, expected, atol=1e-6)
    assert (np.asarray(grad_1x4x2)[0, 3] == 0).all()


def test_a_batch_without_targets_is_zero_and_not_nan() -> None:
    nothing = jnp.full((1, 4), NO_TARGET)
    loss, grad = jax.value_and_grad(lambda logits: of_plain(logits, nothing).mean()[0])(LOGITS_1x4x2)
    assert float(loss) == 0
    assert (np.asarray(grad) == 0).all()


# ---------------------------------------------------------------------------------------------- preference

# Pair 1: better says a SURE likely word and an EVEN one, worse an unlikely one. Pair 2: the other way round.
# ln p:    better 1 = ln 3/4 + ln 1/2 = ln 3/8,  worse 1 = ln 1/4;  better 2 = ln 1/4,  worse 2 = ln 3/4
PAIR_2x4 = np.array([[1, 1, -1, 0], [2, -2, 0, 0]])
PAIRED_LOGITS_2x4x2 = jnp.array([[SURE, EVEN, SURE, SURE], [SURE, SURE, SURE, SURE]])
PAIRED_TARGET_2x4 = np.array([[1, 0, 0, NO_TARGET], [0, 1, NO_TARGET, NO_TARGET]])


def paired(reference_2x4: object) -> PairedTokens:
    fields = dict.fromkeys(PairedTokens.__dataclass_fields__, PAIR_2x4)
    reference = np.asarray(reference_2x4, np.float32)
    return PairedTokens(**fields | {"pair": PAIR_2x4, "target": PAIRED_TARGET_2x4, "reference": reference})


# The reference: better 1 = ln 1/4 (in two parts), worse 1 = ln 1/2; better 2 = ln 1/2, worse 2 = ln 1/2
REFERENCE = np.log([[1 / 2, 1 / 2, 1 / 2, 1], [1 / 2, 1 / 2, 1, 1]])
# h = ln(3/8 / 1/4) - ln(1/4 / 1/2) = ln 3 and ln(1/4 / 3/4) - ln 1 = -ln 3
H = [math.log(3), -math.log(3)]
BETTER = [math.log(3 / 8), math.log(1 / 4)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ipo", [(h - 2.0) ** 2 for h in H]),
        ("bonbon", [0.25 * -b + 0.75 * (h - 2.0) ** 2 for b, h in zip(BETTER, H)]),
        ("dpo", [math.log(1 + 1 / math.sqrt(3)), math.log(1 + math.sqrt(3))]),  # beta h = +-ln(3) / 2
    ],
)
def test_preference_loss(kind: str, expected: list[float]) -> None:
    batch = paired(REFERENCE)
    loss, measured = of_pairs(PAIRED_LOGITS_2x4x2, batch, kind=kind, alpha=0.25, margin=2.0, beta=0.5).mean()
    np.testing.assert_allclose(loss, sum(expected) / 2, atol=1e-5)
    assert int(measured["pairs"]) == 2
    np.testing.assert_allclose(measured["margin"], 0.0, atol=1e-6)
    np.testing.assert_allclose(measured["accuracy"], 1 / 2)
    np.testing.assert_allclose(measured["better"], sum(BETTER) / 2, atol=1e-6)


def test_log_probabilities_are_summed_not_averaged() -> None:
    """A trap of the field: twice the tokens, twice the h (BoNBoN, arXiv 2406.00832)."""
    nothing = np.zeros((2, 4))
    _, measured = of_pairs(PAIRED_LOGITS_2x4x2, paired(nothing), kind="ipo").mean()
    np.testing.assert_allclose(measured["margin"], (math.log(3 / 2) - math.log(3)) / 2, atol=1e-6)


def test_bonbon_is_not_dpo() -> None:
    """A trap of the released code: beyond the margin the gradient pulls back, where dpo pushes on."""

    def slope(kind: str, margin: float) -> float:
        grad = jax.grad(
            lambda logits: of_pairs(logits, paired(REFERENCE), kind=kind, alpha=0.0, margin=margin).mean()[0]
        )(PAIRED_LOGITS_2x4x2)
        return float(grad[0, 0, 1])  # of the likely word of the better answer of pair 1

    assert slope("bonbon", margin=2.0) < 0 < slope("bonbon", margin=0.5)
    assert slope("dpo", margin=0.5) < 0


def test_padding_and_absent_pairs_weigh_nothing() -> None:
    batch = paired(REFERENCE)
    only_first = PairedTokens(**batch.fields() | {"pair": np.where(np.abs(PAIR_2x4) == 1, PAIR_2x4, 0)})
    loss, measured = of_pairs(PAIRED_LOGITS_2x4x2, only_first, kind="ipo", margin=0.0).mean()
    np.testing.assert_allclose(loss, math.log(3) ** 2, atol=1e-5)
    assert int(measured["pairs"]) == 1
    grad = jax.grad(lambda logits: of_pairs(logits, only_first, kind="ipo").mean()[0])(PAIRED_LOGITS_2x4x2)
    assert (np.asarray(grad)[1] == 0).all()
    assert (np.asarray(grad)[0, 3] == 0).all()


def test_margin_is_what_best_of_n_implies(seed: int) -> None:
    """E log(density ratio) of best against worst: log U^(n-1) of the largest and the smallest of n uniforms."""
    n = 4
    draws = np.random.default_rng(seed).random((200_000, n))
    mean = (n - 1) * (np.log(draws.max(1)) - np.log(draws.min(1))).mean()
    assert mean == pytest.approx(bonbon_margin(n), abs=0.05)
    assert [round(bonbon_margin(n), 2) for n in (4, 8, 10, 16)] == [5.50, 18.15, 25.46, 49.77]
