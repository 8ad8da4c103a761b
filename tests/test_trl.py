"""Preference losses and their gradients against TRL's own code. Skipped where TRL is not installed.

TRL needs torch, so `make test` does without. Versions this was run with: trl 1.16.0, torch 2.13.0+cpu,
transformers 5.23.0, jax 0.10.2; older ones arrange DPOTrainer differently. To run it:

    python3 -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 -r requirements-test.txt
    /tmp/trl/bin/python -m pytest tests/test_trl.py

Here log-probabilities are summed over an answer's tokens, TRL's IPO takes their mean. So for `ipo` and `bonbon`

- answers all have the same n tokens: (h - margin)^2 = n^2 (h/n - 1/(2 beta))^2 for beta = n / (2 margin); or
- answers have different lengths, and TRL is told of each as one token whose log-probability is the sum.

TRL knows no BoNBoN, but it adds losses up: its `sft` is the mean of -log p over the tokens of the better answers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET, Array, PairedTokens
from pasta_jax.training.losses import preference_loss, score

WHY = "compares with TRL, which is not among the requirements"
torch: Any = pytest.importorskip("torch", reason=WHY)
trl: Any = pytest.importorskip("trl", minversion="1.16.0", reason=WHY)

PAIRS, LENGTH, VOCAB = 5, 12, 7  # N = 2 * PAIRS answers, the better ones first, as TRL has them
ALPHA, MARGIN, BETA = 0.25, 3.0, 0.3


@dataclasses.dataclass(frozen=True)
class Answers:
    logits_NxLxV: Array
    reference_NxLxV: Array
    token_NxL: Array
    written_NxL: Array  # bool: whether the token belongs to the answer, not to the prompt or the padding

    @property
    def text_NxL(self) -> Array:
        """What is no padding: the answer and all before it."""
        return np.maximum.accumulate(self.written_NxL[:, ::-1], axis=1)[:, ::-1]

    @property
    def target_NxL(self) -> Array:
        """What each place should predict: the next token, if that is the answer's."""
        target_NxL = np.where(self.written_NxL, self.token_NxL, NO_TARGET)
        return np.pad(target_NxL[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TARGET)


def draw_answers(rng: np.random.Generator, same: int | None) -> Answers:
    """Random pairs; answers of `same` tokens, or of 1 to 8. Prompts differ in length, too."""
    N = 2 * PAIRS
    prompt_Nx1 = rng.integers(1, 5, (N, 1))
    length_Nx1 = np.full((N, 1), same) if same else rng.integers(1, 9, (N, 1))
    place_1xL = np.arange(LENGTH)[None]
    logits, reference = rng.normal(0, 2, (2, N, LENGTH, VOCAB)).astype(np.float32)
    return Answers(
        logits,
        reference,
        rng.integers(0, VOCAB, (N, LENGTH)),
        (place_1xL >= prompt_Nx1) & (place_1xL < prompt_Nx1 + length_Nx1),
    )


Outcome = tuple[float, Array, dict[str, float]]
"""Loss, gradient by logits [N, L, V], and measurements."""


# ------------------------------------------------------------------------------------------------------ ours


def ours(answers: Answers, kind: str, order_N: Array) -> Outcome:
    """Two answers a row, in any order: who belongs to whom is for `pair` to say."""

    def packed(value: Array) -> Array:
        return value[order_N].reshape(PAIRS, 2 * LENGTH, *value.shape[2:])

    number_N = np.r_[1 : PAIRS + 1, -1 : -PAIRS - 1 : -1]
    pair_BxL = packed(np.where(answers.text_NxL, number_N[:, None], 0))
    target_BxL = packed(answers.target_NxL)
    batch = PairedTokens(
        **dict.fromkeys(PairedTokens.__dataclass_fields__, packed(answers.token_NxL))
        | {
            "pair": pair_BxL,
            "target": target_BxL,
            "reference": score(jnp.asarray(packed(answers.reference_NxLxV)), target_BxL).logprob,
        }
    )

    def loss(logits_BxLxV: Array) -> tuple[Array, dict[str, Array]]:
        scores = score(logits_BxLxV, target_BxL)
        sums = preference_loss(scores, batch, kind=kind, alpha=ALPHA, margin=MARGIN, beta=BETA)
        return sums.mean()

    (value, measured), grad_BxLxV = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(packed(answers.logits_NxLxV))
    )
    assert int(measured["pairs"]) == PAIRS
    grad_NxLxV = np.empty_like(answers.logits_NxLxV)
    grad_NxLxV[order_N] = np.asarray(grad_BxLxV).reshape(grad_NxLxV.shape)
    return (
        float(value),
        grad_NxLxV,
        {name: float(measured[name]) for name in ("margin", "accuracy", "better")},
    )


# ----------------------------------------------------------------------------------------------------- TRL's


class Model:
    """What TRL asks of a language model, around given logits: a backbone that yields them, an identity for head.

    So the log-probabilities, and their gradient, are worked out by TRL's "fused LM head".
    """

    training = True
    is_gradient_checkpointing = False
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def __init__(self, logits_NxLxV: Array) -> None:
        self.logits_NxLxV = torch.tensor(logits_NxLxV, requires_grad=True)
        trl.trainer.utils.add_fused_lm_head(self, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)

    def forward(self, **inputs: Any) -> Any:
        raise NotImplementedError("TRL replaces this.")

    def base_model(self, **inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.logits_NxLxV)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.eye(VOCAB), bias=None)


class Summing(Model):
    """Tells TRL of each answer as one token that has the log-probability of all of them."""

    def __init__(self, logits_NxLxV: Array, target_NxL: Array) -> None:
        self.logits_NxLxV = torch.tensor(logits_NxLxV, requires_grad=True)
        self.target_NxL = torch.tensor(target_NxL)

    def forward(self, **inputs: Any) -> Any:
        has_target_NxL = self.target_NxL != NO_TARGET
        index_NxLx1 = self.target_NxL.clamp(min=0)[..., None]
        logprob_NxL = self.logits_NxLxV.log_softmax(-1).gather(-1, index_NxLx1)[..., 0]
        sum_Nx1 = (logprob_NxL * has_target_NxL).sum(1, keepdim=True)
        nothing_Nx1 = torch.zeros_like(sum_Nx1)  # for what TRL writes down besides
        return SimpleNamespace(
            log_probs=sum_Nx1, entropy=nothing_Nx1, mean_logits=nothing_Nx1, is_top1=nothing_Nx1.bool()
        )


def trls(answers: Answers, kind: str, *, tokens: int, summing: bool) -> Outcome:
    """DPOTrainer's loss, for answers of so many tokens in TRL's eyes (of no importance for dpo)."""
    model: Model
    if summing:
        model = Summing(answers.logits_NxLxV, answers.target_NxL)
        reference: Model = Summing(answers.reference_NxLxV, answers.target_NxL)
        token, written = np.zeros((2 * PAIRS, 2), np.int64), np.tile([0, 1], (2 * PAIRS, 1))
    else:
        model, reference = Model(answers.logits_NxLxV), Model(answers.reference_NxLxV)
        token, written = answers.token_NxL, answers.written_NxL.astype(np.int64)

    kinds: dict[str, dict[str, float]] = {
        "dpo": {"sigmoid": 1.0},
        "ipo": {"ipo": tokens**2},
        "bonbon": {"ipo": (1 - ALPHA) * tokens**2, "sft": ALPHA * tokens},
    }
    weights = kinds[kind]
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)  # only what the loss reads: no data, no download
    vars(trainer).update(
        model=model,
        ref_model=reference,
        loss_types=[*weights],
        loss_weights=[*weights.values()],
        beta=BETA if kind == "dpo" else tokens / (2 * MARGIN),
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=False,
        use_weighting=False,
        aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = trainer.compute_loss(
        model,
        {
            "input_ids": torch.tensor(token),
            "attention_mask": torch.ones(token.shape, dtype=torch.int64),
            "completion_mask": torch.tensor(written),
        },
    )
    loss.backward()
    assert reference.logits_NxLxV.grad is None
    (margin,), (accuracy,), (better,) = (
        trainer._metrics["train"][name] for name in ("rewards/margins", "rewards/accuracies", "logps/chosen")
    )
    measured = {"margin": margin / trainer.beta, "accuracy": accuracy, "better": better}
    return loss.item(), model.logits_NxLxV.grad.numpy(), measured


# ------------------------------------------------------------------------------------------------ comparisons


def assert_agree(one: Outcome, other: Outcome) -> None:
    (loss, grad, measured), (other_loss, other_grad, other_measured) = one, other
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5, atol=1e-5)
    assert np.abs(other_grad).max() > 1e-4
    np.testing.assert_allclose(grad, other_grad, rtol=1e-4, atol=1e-5 * np.abs(other_grad).max())
    assert measured == pytest.approx(other_measured, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "bonbon"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_answers_of_equal_length(kind: str, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = draw_answers(rng, tokens)
    expected = trls(answers, kind, tokens=tokens, summing=False)
    assert_agree(ours(answers, kind, rng.permutation(2 * PAIRS)), expected)


def test_dpo_on_answers_of_any_length(seed: int) -> None:
    """Here TRL sums, too."""
    rng = np.random.default_rng(seed)
    answers = draw_answers(rng, None)
    expected = trls(answers, "dpo", tokens=1, summing=False)
    assert_agree(ours(answers, "dpo", rng.permutation(2 * PAIRS)), expected)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "bonbon"])
def test_sums_given_to_trl(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = draw_answers(rng, None)
    expected = trls(answers, kind, tokens=1, summing=True)
    assert_agree(ours(answers, kind, rng.permutation(2 * PAIRS)), expected)
