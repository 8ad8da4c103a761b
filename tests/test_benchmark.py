"""The benchmark: what it measures is what it says, and what it writes can be read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import random
import re
import types
from typing import Any

import numpy as np
import pytest

from pasta_jax.benchmark import __main__ as benchmark
from pasta_jax.benchmark import measure, measurements, models, peers, startup, training
from pasta_jax.benchmark.figures import FIGURES, draw
from pasta_jax.benchmark.measure import Quartiles
from pasta_jax.benchmark.models import NAMED, silent
from pasta_jax.decoding.script import threads_in
from pasta_jax.lang.assemble import assemble
from pasta_jax.model import ModelConfig
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.layout import layout_example
from tests.helpers import compilations, only_full

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"
ANSWER = """Two rivers are long:
- Nile: it flows through eleven countries to the sea.
- Amazon: it flows through rather few of them, 7 or 8."""

SMALL = ModelConfig(vocab_size=512, num_layers=1, model_dim=16, num_heads=2, head_dim=8, mlp_dim=16)
EFFORT = dataclasses.replace(measurements.QUICK, branches_at_once=(1, 2), lanes=2, repeats=2, steps=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model."""
    monkeypatch.setitem(NAMED, "tiny", SMALL)


def test_a_run_writes_what_it_measured(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replayed shapes, real ones among them, through the verb; and peers are left out where they are missing."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text(
        json.dumps({"response": ANSWER}) + "\n" + json.dumps({"response": "No list."}) + "\n"
    )
    out = tmp_path / "out"
    benchmark.benchmark(("replay",), "tiny", str(out), EFFORT, responses_file=str(responses), seed=3)
    written = json.loads((out / "results.json").read_text())
    points = written["parts"]["replay"]["points"]
    assert [p["kind"] for p in points] == [
        *("4 branches", "4 unbalanced", "4 with syncs", "4 nested", "real", "overall")
    ]
    for p in points:
        efficiency = p["efficiency"]
        assert efficiency["median"] == pytest.approx(p["realized, x"] / p["theoretical, x"])
        assert 0 < efficiency["low"] <= efficiency["median"] <= efficiency["high"]
        assert len(efficiency["samples"]) == EFFORT.repeats
        assert sum(p["steps of width 1, 2, ..."]) == pytest.approx(p["steps"] * p["answers"])
    assert (out / "replay.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert shown.startswith("replay\n| kind") and "| overall" in shown
    assert benchmark.for_json(
        {"a": math.nan, "b": 1.0, "c": Quartiles(1.0, 1.0, 2.0, (math.inf, math.nan))}
    ) == {
        "a": None,
        "b": 1.0,
        "c": {"median": 1.0, "low": 1.0, "high": 2.0, "samples": [None, None]},
    }
    assert written["model"]["parameters"] > 512 * 16 and written["effort"]["seed"] == 3
    machine = written["machine"]
    assert (
        machine["cpu"]
        and machine["cores"] >= 1
        and machine["platform"] == "cpu"
        and not machine["accelerator"]
    )
    assert machine["packages"]["jax"] and re.match(r"3\.\d+", machine["python"])
    assert len(machine["load_average"]) == 3 if hasattr(os, "getloadavg") else True


def test_what_was_lost_in_noise_is_no_number(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a step is a difference, and may come out negative."""
    lost, found = [-0.6, -0.5, 0.1, 0.2], [1.0, 2.0, 3.0, 4.0]
    points = [
        {
            "width": width,
            "step, ms": Quartiles.of(times),
            "relative to the first row": measure.median_ratio(times, found),
        }
        for width, times in ((1, found), (4, lost))
    ]
    monkeypatch.setattr(measurements, "measure_width", lambda *_: points)
    monkeypatch.setattr(models, "model_of", lambda *_: types.SimpleNamespace(params={}, config=SMALL))
    benchmark.benchmark(("width",), "tiny", str(tmp_path), EFFORT)
    shown = capsys.readouterr().out
    assert re.search(r"\| 4 +\| +noise \| +noise \|$", shown, re.MULTILINE)
    assert shown.count("-0.") == 0 and measure.NOISE_MEANS in shown
    first, second = json.loads((tmp_path / "results.json").read_text())["parts"]["width"]["points"]
    assert first["step, ms"]["median"] == 2.5 and first["relative to the first row"] == 1.0
    assert second["step, ms"] == {"median": None, "low": None, "high": None, "samples": lost}
    assert second["relative to the first row"] is None
    assert (tmp_path / "width.png").read_bytes().startswith(PNG)


@only_full
def test_what_is_compared_goes_through_one_program(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts of different sizes compile nothing anew; the first figures are logged before the table is there."""
    monkeypatch.setattr(measure.LOG, "propagate", True)
    with compilations() as names, caplog.at_level("INFO", measure.LOG.name):
        benchmark.benchmark(("width", "pool"), "tiny", str(tmp_path), EFFORT)
    decoders, buckets = 2, 2  # of the pool's length, or the prompts'
    assert sum("decode_chunk" in name for name in names) <= decoders * buckets
    first = re.findall(r"(width|pool), (\d+): \S+ ms a step \(first of 2\)", caplog.text)
    assert [part for part, _ in first] == ["width"] * 2 + ["pool"] * len(first[2:]) and len(first) > 3


def test_without_peers_it_says_so(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "model_of", lambda *_: types.SimpleNamespace(params={}, config=SMALL))
    assert peers.missing() == "Peers not measured: transformers is not installed."
    results = benchmark.benchmark(("peers",), "tiny", str(tmp_path), EFFORT)
    assert results["parts"]["peers"] == {"skipped": peers.missing()}
    assert str(peers.missing()) in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


@only_full
def test_updates_are_made_in_turn_and_peers_that_are_not_there_are_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure.LOG, "propagate", True)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    effort = dataclasses.replace(EFFORT, train_rows=8, train_length=16)
    with caplog.at_level("INFO", measure.LOG.name):
        results = benchmark.benchmark(("train",), "tiny", str(tmp_path), effort)
    (ours,) = results["parts"]["train"]["points"]
    assert ours["who"] == "pasta_jax" and ours["ours is x as fast"] == 1 and ours["same losses"]
    assert len(ours["update, s"]["samples"]) == 2
    assert ours["tokens/s"]["median"] == pytest.approx(
        np.median([128 / s for s in ours["update, s"]["samples"]])
    )
    assert "transformers, eager is not measured: transformers is not installed." in caplog.text
    assert "tunix is not measured: tunix is not installed." in caplog.text


def test_systems_are_compared_by_their_updates_and_losses() -> None:
    samples = {"pasta_jax": [2.0, 4.0, 3.0], "a": [6.0, 6.0, 9.0], "b": [1.5, 1.5, 1.5]}
    losses = {"pasta_jax": [9.0, 8.0], "a": [9.001, 8.0], "b": [9.0, 8.1]}
    ours, a, b = training.compared(samples, losses, 12)
    assert [row["ours is x as fast"] for row in (ours, a, b)] == [1, 2, 0.5]
    assert [row["same losses"] for row in (ours, a, b)] == [True, True, False]
    assert a["tokens/s"] == Quartiles.of([2.0, 2.0, 12 / 9])


def answered(*widths: int) -> Any:
    """As a run gives it."""
    trace = types.SimpleNamespace(widths=np.array(widths), tokens=range(sum(widths)))
    return types.SimpleNamespace(answer=lambda: (trace, 0.001 * len(widths)))


def test_impossible_plans_name_the_flag() -> None:
    with pytest.raises(ValueError, match="--steps=1 must be at least 2"):
        dataclasses.replace(EFFORT, steps=1)
    with pytest.raises(ValueError, match="--pool=2 must be more than the 2 lanes"):
        dataclasses.replace(EFFORT, entries=2)
    with pytest.raises(ValueError, match="8 branches at once need as many lanes, but lanes=2"):
        dataclasses.replace(EFFORT, branches_at_once=(8,))


def test_only_steps_of_the_width_asked_for_are_measured() -> None:
    short, long = answered(1, 2, 3, 1), answered(1, 2, 3, 3, 3, 1)
    assert measurements.checked_pool_use(3, 2, short, long) == 10
    assert measurements.step_timer(short, long, 2)() == pytest.approx(1.0)
    for wrong in (answered(1, 2, 3, 3, 1), answered(1, 2, 2, 3, 3, 3, 1), answered(1, 2, 3, 3, 4, 1)):
        with pytest.raises(
            measurements.ReplayError, match="Expected 2 additional steps of width 3, but by width"
        ):
            measurements.checked_pool_use(3, 2, short, wrong)


def test_branches_beside_each_other_differ_in_nothing_but_their_length() -> None:
    tokenizer = WordTokenizer(vocab_size=512)
    for length in (9, 31):
        threads = threads_in(
            measurements.concurrent_branches(random.Random(0), tokenizer, 3, length), tokenizer
        )
        assert [len(line) - 2 for line in threads.tokens[1:]] == [length] * 3
        assert len(threads.tokens[0]) == 3 * 5 + 1


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_write_no_tag_and_end_no_answer(tied: bool) -> None:
    vocabulary = WordTokenizer(vocab_size=512).vocabulary
    params = {"embed": {"embedding": np.ones((512, 4))}, "head": np.ones((4, 512))}
    quiet = silent(params, dataclasses.replace(SMALL, tie_embeddings=tied), vocabulary)
    used, other = quiet["embed"]["embedding"], quiet["head"].T
    head, embedding = (used, other) if tied else (other, used)
    assert embedding.all()
    dead = {*vocabulary.tag_ids.values(), vocabulary.eos, vocabulary.bos, vocabulary.pad}
    assert {*np.flatnonzero(~np.asarray(head).any(axis=1))} == dead


def test_the_tokenizer_spells_all_texts_with_all_ids(seed: int) -> None:
    tokenizer = WordTokenizer(ANSWER, ANSWER, "rare words", vocab_size=700)
    for text in (ANSWER, "Zürich\n\n東京 <sync/> 🌍", " xyzzyx qqqqqqqqq"):
        assert tokenizer.vocabulary.text(tokenizer.encode(text)) == text
    assert (
        len(tokenizer.vocabulary) == 700 and len({*tokenizer.vocabulary.pieces}) == 698
    )  # three say nothing
    assert len(tokenizer.encode(" rivers")) == 1 and len(tokenizer.encode(ANSWER)) < len(ANSWER) / 3
    ids = random.Random(seed).choices(range(300, 700), k=50)
    assert max(tokenizer.encode(tokenizer.vocabulary.text([2, *ids]))) < 700


def test_real_responses_become_programs() -> None:
    tokenizer = WordTokenizer(ANSWER, vocab_size=600)
    (program,) = measurements.real_programs(tokenizer, [ANSWER, "No list."], 5, random.Random(0))
    assert assemble(program) == ANSWER
    assert [promise.topic for promise in program.promises()] == ["it flows", "it flows"]
    layout_example(tokenizer, "Rivers?", program)
    with pytest.raises(ValueError, match="None of 1 responses"):
        measurements.real_programs(tokenizer, ["No list."], 5, random.Random(0))
    long = ANSWER + " a" * measurements.MAX_REAL_TOKENS
    with pytest.raises(ValueError, match="1 of 2 responses .* all of those have more than 640 tokens"):
        measurements.real_programs(tokenizer, [long, "No list."], 5, random.Random(0))


def test_responses_without_a_response(tmp_path: pathlib.Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"response": "a"}\n{"answer": "b"}\n')
    with pytest.raises(ValueError, match="r.jsonl, line 2: no JSON object with a response"):
        measurements.read_responses(tmp_path / "r.jsonl")


def test_all_that_is_compared_is_measured_in_turn() -> None:
    called: list[str] = []

    def call(name: str) -> float:
        called.append(name)
        return float(len(called))

    samples = measure.interleaved("", {"a": lambda: call("a"), "b": lambda: call("b")}, 2, "s")
    assert called == ["a", "b"] * 3 and samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_peers_are_compared_by_what_a_token_and_a_prompt_take() -> None:
    """Ours feeds the token that it returns: one step more than theirs in a call for one token."""
    effort = dataclasses.replace(EFFORT, steps=11)
    samples = {"pasta_jax, 1": [3.0], "pasta_jax, n": [13.0], "them, 1": [4.0], "them, n": [24.0]}
    tokens_of = {"pasta_jax": np.arange(11)[None], "them": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]])}
    ours, peer = peers.compared(1, effort, samples, tokens_of)
    assert (ours["prefill, s"], peer["prefill, s"]) == (Quartiles.of([2.0]), Quartiles.of([4.0]))
    assert (ours["step, ms"], peer["step, ms"]) == (Quartiles.of([1000.0]), Quartiles.of([2000.0]))
    assert peer["step, ours is x as fast"] == 2 == peer["prefill, ours is x as fast"]
    assert peer["same tokens"] == "10 of 11"


def test_every_part_has_a_figure(tmp_path: pathlib.Path) -> None:
    assert {*FIGURES} == {*benchmark.PARTS}
    spread = dataclasses.asdict(Quartiles.of([1.0, 2.0, 4.0]))
    points: dict[str, list[dict[str, Any]]] = {
        "width": [{"width": n, "step, ms": spread} for n in (1, 8)],
        "pool": [{"pool used": n, "pool": 99, "step, ms": spread} for n in (1, 8)],
        "batch": [{"answers": kind, "rows": n, "tokens/s": spread} for kind in "ab" for n in (1, 8)],
        "replay": [{"kind": "4", "theoretical, x": 3.0, "realized, x": 2.0, "efficiency": spread}],
        "peers": [
            {"batch": n, "who": who, "prefill, s": spread, "step, ms": spread} for n in (1, 8) for who in "ab"
        ],
        "prefix": [{"system prompt": way, "first token, s": spread} for way in "ab"],
        "admission": [
            {"requests": n, "admission": policy, "goodput, tokens/s": 2.0}
            for n in (1, 8)
            for policy in "abcde"
        ],
        "train": [{"who": who, "tokens/s": spread} for who in "ab"],
        "startup": [{"cache": c, **dict.fromkeys(startup.PHASES, spread)} for c in ("empty", "full")],
    }
    for part, part_points in points.items():
        draw(part, part_points, tmp_path / f"{part}.png", "of nothing")
        assert (tmp_path / f"{part}.png").read_bytes().startswith(PNG)
