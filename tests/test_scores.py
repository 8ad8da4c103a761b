"""Scores of samples: what a judge is asked, once; quality and efficiency by hand; speed that may not count."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import Config, ConfigError, PreferenceConfig
from pasta_jax.data import almanac
from pasta_jax.judges.protocol import JudgeError, Preference
from pasta_jax.preference import rounds
from pasta_jax.preference.pairs import choose_pair
from pasta_jax.preference.sample import Prompt, Record
from pasta_jax.preference.score import EFFICIENCIES, combined, qualities, scores
from pasta_jax.training.loop import training_mesh
from tests.helpers.chat_server import KEY, chat_server
from tests.helpers.samples import made_up


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A judge that does not read."""

    winner: int | None
    confidence: float

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        return Preference(self.winner, self.confidence)


@dataclasses.dataclass(frozen=True)
class Likes:
    """A judge that likes one text, and counts what it is asked."""

    text: str
    asked: list[str] = dataclasses.field(default_factory=list)

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        self.asked.append(f"{prompt}: {a} or {b}")
        return Preference(0 if a == self.text else 1, 1.0)


NOTHING = ThreadedTokens(**{name: np.zeros(4, np.int32) for name in ThreadedTokens.__dataclass_fields__})


def answered(baseline: str, reference: str | None, *texts: str, prompt: str = "Why?") -> Record:
    """A record of made-up answers."""
    drawn = [made_up(text, NOTHING, critical_path=20) for text in (baseline, *texts)]
    return Record(Prompt(prompt, reference), drawn[0], tuple(drawn[1:]))


def test_quality_asks_in_both_orders() -> None:
    # A judge that always prefers what it reads first wins one of two: (1 + 0.8) / (1 + 0.8).
    assert qualities([answered("y", None, "x")], Fixed(0, 0.8)) == [[1.0]]
    assert qualities([answered("y", "z", "x")], Fixed(None, 0.5)) == [[1.0]]
    # Four wins and the one for free, over the one for free; equal answers are ties that nobody is asked about.
    judge = Likes("x")
    found = qualities([answered("y", "z", "x", "y", "z"), answered("x", "x", "y", "x", "x")], judge)
    assert found == [[5.0, 1.0, 1.0], [0.2, 1.0, 1.0]]
    assert len(judge.asked) == len(set(judge.asked)) == 6
    mixed = qualities([answered("y", "z", "y", "z")], Likes("z"))
    assert mixed == [[(1 + 0.5) / (1 + 0.5 + 2), (1 + 2 + 0.5) / (1 + 0.5)]]


def test_what_was_judged_is_not_asked_again(tmp_path: pathlib.Path) -> None:
    path, record = tmp_path / "judged.jsonl", answered("y", "z", "x", "w")
    judge, other = Likes("x"), Likes("x")
    found = qualities([record], judge, str(path))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(judge.asked) == 8
    path.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    assert qualities([record], other, str(path)) == found
    assert other.asked == judge.asked[5:] and path.read_text() == "".join(lines)
    assert qualities([record], Fixed(0, 1.0), str(path)) == found


def test_an_endpoint_judges_a_round_and_is_asked_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    record = answered("y", "z", "x", "w")
    with chat_server(lambda body: "A 80" if "x" in str(body) else "B 60") as server:
        preference = dataclasses.replace(
            PreferenceConfig(),
            judge="llm",
            judge_model="m",
            judge_url=server.url,
            judge_price_in=1.0,
            judge_concurrency=3,
        )
        config, mesh = Config(preference=preference), training_mesh(Config())
        for name in ("judged.jsonl", "again.jsonl"):  # without what was judged there are still the replies
            judge: Any = rounds.judge_of(config, mesh, str(tmp_path))
            found = qualities([record], judge, str(tmp_path / name))
            judge.endpoint.close()
            assert server.total == 8 and judge.endpoint.concurrency == 3
            assert judge.endpoint.meter.dollars > 0
        preference = dataclasses.replace(preference, judge_budget=1e-6)
        poor: Any = rounds.judge_of(
            dataclasses.replace(config, preference=preference), mesh, str(tmp_path / "x")
        )
        with poor.endpoint, pytest.raises(JudgeError, match="budget"):
            qualities([record], poor)
    assert found == [[pytest.approx(1.0), pytest.approx(1.0)]]  # it looks at the order alone
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("said", [(2, 0.9), (0, 0.4), (0, math.nan), 1, None, (0, 0.9, 1)])
def test_what_is_no_preference_is_refused(said: Any) -> None:
    class Odd:
        def compare(self, prompt: str, a: str, b: str, /) -> Any:
            return said

    with pytest.raises(JudgeError, match=r"must return \(winner, confidence\).* This one returned"):
        qualities([answered("y", None, "x")], Odd())


def test_efficiency_terms_by_hand() -> None:
    found = {name: term(3.0, 1.5) for name, term in EFFICIENCIES.items()}
    assert found == {"speedup": 3.0, "parallelism": 1.5, "harmonic": 2.0, "arithmetic": 2.25}
    assert combined(2.0, 0.5, 4.0) == 4.0
    assert combined(2.0, 0.5, math.inf) == 0.5


def test_scores_by_hand_and_what_lambda_does() -> None:
    task = almanac.task_of("What is the capital of Peru?")
    right, wrong = "Its capital is Lima.", "Its capital is Cusco."
    record = Record(
        Prompt(task.prompt, right),
        baseline=made_up(right, NOTHING, critical_path=20),
        samples=tuple(
            made_up(text, NOTHING, critical_path=path)
            for text, path in ((right, 10), (wrong, 5), (right, 20))
        ),
    )
    # Right: two ties in both orders, (1 + 4/4) / (1 + 4/4) = 1. Wrong: four losses for sure, 1 / 5.
    (found,) = qualities([record], almanac)
    assert found == [1.0, 0.2, 1.0]
    assert scores(record, found, PreferenceConfig(quality_weight=1.0)) == [2.0 + 1.0, 4.0 + 0.2, 1.0 + 1.0]
    assert scores(record, found, PreferenceConfig(quality_weight=math.inf)) == [1.0, 0.2, 1.0]
    fast, safe = (choose_pair(scores(record, found, PreferenceConfig(quality_weight=w))) for w in (1.0, 4.0))
    assert fast and safe
    assert (fast.better, fast.worse, safe.better, safe.worse) == (1, 2, 0, 1)
    # The wrong one is the fastest, whatever it says, unless speed counts for what is no worse alone.
    gated = PreferenceConfig(quality_weight=1.0, efficiency_when="not_worse")
    assert scores(record, found, gated) == [2.0 + 1.0, 0.0 + 0.2, 1.0 + 1.0]
    assert choose_pair(scores(record, found, gated)) == (0, 1)
    almost = 1 - 1e-12  # an equal, but for the order of a sum
    assert scores(record, [almost] * 3, gated) == pytest.approx([3.0, 5.0, 2.0])


def test_a_judge_that_cannot_be_made_is_refused_before_anything_is_sampled(tmp_path: pathlib.Path) -> None:
    preference = PreferenceConfig(judge="no_such_module:f")
    with pytest.raises(
        ConfigError, match=r"config.preference.judge: The judge no_such_module:f: .*cannot be imp"
    ):
        rounds.run(Config(stage="preference", init_from="W", preference=preference), str(tmp_path))
    no_key = PreferenceConfig(
        judge="llm", judge_model="m", judge_url="http://x/v1", judge_key_variable="NO_KEY"
    )
    for made, message in (
        (no_key, "NO_KEY is not set"),
        (dataclasses.replace(no_key, judge_url="x"), "base_url"),
    ):
        with pytest.raises(ConfigError, match=rf"config.preference.judge: The judge llm: .*{message}"):
            rounds.run(Config(stage="preference", init_from="W", preference=made), str(tmp_path))
    with pytest.raises(ValueError, match="judge_budget needs the prices"):
        PreferenceConfig(judge_budget=1.0)
    for judge in ("polite", ":", "a:", "llm"):
        with pytest.raises(ValueError, match="^judge"):
            PreferenceConfig(judge=judge)
