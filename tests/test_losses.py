"""Losses against numbers worked by hand (law 7)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET
from pasta_jax.training.losses import sft_loss, token_logprobs

# Two words, logits 0 and ln 3: probabilities 1/4 and 3/4. Equal logits: 1/2 each.
SURE, EVEN = [0.0, math.log(3)], [0.0, 0.0]
LOGITS_1x4x2 = jnp.array([[SURE, SURE, EVEN, SURE]])
TARGET_1x4 = jnp.array([[1, 0, 1, NO_TARGET]])


@pytest.fixture(autouse=True)
def _no_accidental_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def test_token_logprobs() -> None:
    expected = [[math.log(3 / 4), math.log(1 / 4), math.log(1 / 2), 0.0]]
    np.testing.assert_allclose(token_logprobs(LOGITS_1x4x2, TARGET_1x4), expected, atol=1e-6)


def test_sft_loss() -> None:
    loss, measured = sft_loss(LOGITS_1x4x2, TARGET_1x4)
    # -(ln 3/4 + ln 1/4 + ln 1/2) / 3 = ln(32 / 3) / 3
    np.testing.assert_allclose(loss, math.log(32 / 3) / 3, atol=1e-6)
    assert float(measured["loss"]) == float(loss)
    assert int(measured["targets"]) == 3
    # The likeliest word is 1, 1, 0 (the first of equals): right, wrong, wrong.
    np.testing.assert_allclose(measured["accuracy"], 1 / 3, atol=1e-6)


def test_what_has_no_target_has_no_gradient() -> None:
    grad_1x4x2 = jax.grad(lambda logits: sft_loss(logits, TARGET_1x4)[0])(LOGITS_1x4x2)
    # d loss / d logits = (p - 1 at the target) / 3
    expected = np.array([[[1 / 4, -1 / 4], [-3 / 4, 3 / 4], [1 / 2, -1 / 2], [0, 0]]]) / 3
    np.testing.assert_allclose(grad_1x4x2, expected, atol=1e-6)
    assert (np.asarray(grad_1x4x2)[0, 3] == 0).all()


def test_a_batch_without_targets_is_zero_and_not_nan() -> None:
    nothing = jnp.full((1, 4), NO_TARGET)
    loss, grad = jax.value_and_grad(lambda logits: sft_loss(logits, nothing)[0])(LOGITS_1x4x2)
    assert float(loss) == 0
    assert (np.asarray(grad) == 0).all()
