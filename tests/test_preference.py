"""The second stage: samples and their traces, scores, pairs, batches of pairs, rounds that go on."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax.arrays import NO_DOC, NO_TARGET, PairedTokens, ThreadedTokens
from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.config import CheckpointConfig, Config, ConfigError, DataConfig, PreferenceConfig
from pasta_jax.data import almanac
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import as_document, document_order
from pasta_jax.files import read_jsonl
from pasta_jax.judges.protocol import JudgeError, Preference
from pasta_jax.lang.parse import parse
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.preference import rounds
from pasta_jax.preference import sample as sample_module
from pasta_jax.preference.pairs import (
    Pair,
    choose_all,
    choose_pair,
    make_pairs,
    pair_batches,
    steps_for,
)
from pasta_jax.preference.sample import Prompt, Record, record_of, sample, write_records
from pasta_jax.preference.score import EFFICIENCIES, combined, qualities, scores
from pasta_jax.tokens.layout import layout_example
from pasta_jax.train import run as train
from pasta_jax.training import loop
from pasta_jax.training.logprobs import reference_logprobs
from pasta_jax.training.losses import preference_loss
from pasta_jax.training.metrics import read_metrics
from pasta_jax.training.signals import Stopped
from tests.helpers import only_full, optimized
from tests.helpers.samples import made_up

# Small enough to train at once, long enough to answer something.
MODEL = ModelConfig(vocab_size=1408, num_layers=1, model_dim=16, head_dim=8, mlp_dim=16, num_heads=2)
LENGTH = 128
PREFERENCE = PreferenceConfig(
    prompts_per_round=3, rounds=2, samples=4, sampling_rows=8, sampling_lanes=2, lr=1e-3
)
CONFIG = Config(
    seed=3,
    steps=2,
    model=MODEL,
    data=DataConfig(rows=8, length=LENGTH),  # a row for each of the fake devices
    preference=PREFERENCE,
    checkpoint=CheckpointConfig(every_steps=0, every_minutes=0),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(init_params(MODEL, jax.random.key(1)), MODEL, almanac.load_tokenizer())


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return rounds.prompts_of(PREFERENCE, seed=5)


@pytest.fixture(scope="module")
def records(model: Model, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    return sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=str(path))


def assert_same(one: list[Record], other: list[Record]) -> None:
    """Records by all their fields; arrays have no equality of their own."""
    assert list(map(str, map(dataclasses.asdict, one))) == list(map(str, map(dataclasses.asdict, other)))


# ------------------------------------------------------------------------------------------------- sampling


@pytest.mark.slow
def test_samples_differ_and_the_baseline_promises_nothing(
    records: list[Record], prompts: list[Prompt]
) -> None:
    assert {record.prompt for record in records} == {*prompts}
    for record in records:
        assert len(record.samples) == PREFERENCE.samples
        assert len({answer.annotated for answer in record.samples}) > 1
        assert "<promise" not in record.baseline.annotated
        assert record.baseline.stats.critical_path == record.baseline.stats.output_tokens
    lengths = [record.baseline.stats.output_tokens for record in records]
    assert lengths == sorted(lengths)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_and_a_cut_file_is_completed(
    model: Model, prompts: list[Prompt], records: list[Record], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "samples.jsonl"
    first = sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=str(path))
    assert_same(first, records)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:100])  # the last line broke off
    assert_same(
        sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=str(path)), records
    )
    assert path.read_text() == "".join(lines)
    other = sample(
        model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=8, path=str(tmp_path / "other")
    )
    assert [r.samples[0].annotated for r in other] != [r.samples[0].annotated for r in records]


@pytest.mark.slow
def test_a_signal_while_sampling_leaves_what_is_done(
    model: Model,
    prompts: list[Prompt],
    records: list[Record],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "samples.jsonl"
    answers, calls = sample_module._answers, iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 1:  # the baseline's answers are the first call
            os.kill(os.getpid(), signal.SIGINT)
        return answers(*args)

    monkeypatch.setattr(sample_module, "_answers", interrupted)
    with pytest.raises(Stopped) as stopped:
        sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=str(path))
    assert stopped.value.code == 128 + signal.SIGINT
    assert 1 <= len(path.read_text().splitlines()) < len(prompts)
    again = sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=str(path))
    assert_same(again, records)


@pytest.mark.slow
@only_full
def test_samples_of_other_prompts_are_not_kept(
    model: Model, prompts: list[Prompt], records: list[Record], tmp_path: pathlib.Path
) -> None:
    path = str(tmp_path / "samples.jsonl")
    wanted = rounds.prompts_of(PREFERENCE, seed=6)
    first = sample(model, model, wanted, PREFERENCE, length=LENGTH, threads=16, seed=7, path=path)
    assert {record.prompt for record in first}.isdisjoint({record.prompt for record in records})
    assert_same(
        sample(model, model, prompts, PREFERENCE, length=LENGTH, threads=16, seed=7, path=path), records
    )


@pytest.mark.slow
def test_records_come_back_from_a_file_as_they_were(records: list[Record], tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "records.jsonl")
    write_records(path, records)
    back = read_jsonl(path, record_of)
    assert_same(back, records)
    for mine, theirs in zip(records[0].samples, back[0].samples):
        for name, array in mine.document.fields().items():
            assert array.dtype == theirs.document.fields()[name].dtype, name


# -------------------------------------------------------------------------------------------------- scoring


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


# ---------------------------------------------------------------------------------------------------- pairs


@pytest.mark.slow
def test_reference_log_probabilities_are_those_of_decoding(model: Model, prompts: list[Prompt]) -> None:
    """Law 2: what was recorded of a token when it was sampled is what the training pass finds."""
    decoder = Decoder(model, limits=Limits(2, 16, LENGTH), rows=len(prompts))
    asked = [model.tokenizer.encode_prompt(prompt.text) for prompt in prompts]
    sampling = SamplingParams(
        max_new_tokens=LENGTH, max_branch_tokens=20, temperature=1.0, open_bias=6.0, seed=5
    )
    traces, _ = decoder.decode(asked, [sampling] * len(asked))
    assert sum(len(trace.parent) - 1 for trace in traces) > 3
    found = reference_logprobs(model, [as_document(trace) for trace in traces], rows=4, length=LENGTH)
    checked = 0
    for trace, logprob in zip(traces, found, strict=True):
        document, recorded = as_document(trace), trace.logprob[document_order(trace)]
        place = {(int(t), int(o)): i for i, (t, o) in enumerate(zip(document.thread, document.order))}
        for i in np.flatnonzero(document.target != NO_TARGET):
            after = place.get((int(document.thread[i]), int(document.order[i]) + 1))
            if after is not None and recorded[after] != 0:  # 0: the interpreter wrote it
                assert logprob[i] == pytest.approx(recorded[after], abs=1e-4)
                checked += 1
    assert checked > 100


@pytest.mark.slow
def test_reference_log_probabilities_do_not_depend_on_packing(model: Model, records: list[Record]) -> None:
    documents = [answer.document for record in records for answer in record.samples]
    once = reference_logprobs(model, documents, rows=4, length=LENGTH)
    again = reference_logprobs(model, documents[::-1], rows=8, length=LENGTH)[::-1]
    for document, mine, theirs in zip(documents, once, again, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
        assert mine.shape == document.token.shape
        assert ((mine == 0) == (document.target == -1)).all()
        assert (mine <= 0).all()


def scored(records: list[Record]) -> list[list[float]]:
    found = qualities(records, almanac)
    return [scores(record, values, PREFERENCE) for record, values in zip(records, found, strict=True)]


def pairs_of(model: Model, records: list[Record], path: pathlib.Path) -> list[Pair]:
    choices = choose_all(records, scored(records), LENGTH)
    return make_pairs(records, choices, model, rows=4, length=LENGTH, path=str(path / "reference.npz"))


@pytest.mark.slow
def test_pairs_are_cached_and_too_long_ones_left_out(
    model: Model, records: list[Record], tmp_path: pathlib.Path
) -> None:
    pairs = pairs_of(model, records, tmp_path)
    broken = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    again = pairs_of(broken, records, tmp_path)  # from the file: the model is not asked
    for one, other in zip(pairs, again, strict=True):
        np.testing.assert_array_equal(one.better.reference, other.better.reference)
        assert (one.better.pair == 1).all() and (one.worse.pair == -1).all()
    assert choose_all(records, scored(records), 3) == [None] * len(records)


@pytest.mark.slow
def test_other_pairs_do_not_get_what_was_cached(
    model: Model, records: list[Record], tmp_path: pathlib.Path
) -> None:
    pairs_of(model, records, tmp_path)
    swapped = pairs_of(model, records[::-1], tmp_path)
    (tmp_path / "fresh").mkdir()
    fresh = pairs_of(model, records[::-1], tmp_path / "fresh")
    for one, other in zip(swapped, fresh, strict=True):
        np.testing.assert_allclose(one.better.reference, other.better.reference, atol=1e-4)


def test_batches_hold_whole_pairs_and_every_pair_once_an_epoch(
    model: Model, records: list[Record], tmp_path: pathlib.Path
) -> None:
    pairs = pairs_of(model, records, tmp_path) * 3
    seen, index = 0, 0
    for batch, index in pair_batches(pairs, 0, rows=4, length=LENGTH, seed=1):
        assert isinstance(batch, PairedTokens)
        numbers = set(np.unique(batch.pair)) - {0}
        count = len(numbers) // 2
        assert numbers == {*range(1, count + 1), *range(-count, 0)}
        assert ((batch.pair == 0) == (batch.doc == NO_DOC)).all()
        seen += count
        assert index == seen
        if index >= len(pairs):
            break
    steps = steps_for(pairs, 1.0, 4, LENGTH, seed=1)
    assert sum(1 for _ in zip(range(steps), pair_batches(pairs, 0, 4, LENGTH, seed=1))) == steps
    with pytest.raises(ConfigError, match=r"does not fit into 1 rows of 8.*data\.rows"):
        next(pair_batches(pairs, 0, rows=1, length=8))


# --------------------------------------------------------------------------------------------------- rounds


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Both stages in one run, from nothing: sft/, preference/round-1 and round-2."""
    workdir = tmp_path_factory.mktemp("both")
    train(dataclasses.replace(CONFIG, stage="both"), str(workdir))
    return workdir


@pytest.mark.slow
def test_both_stages(trained: pathlib.Path) -> None:
    for number in (1, 2):
        folder = trained / "preference" / f"round-{number}"
        names = {path.name for path in folder.iterdir()}
        assert names >= {"samples.jsonl", "pairs.jsonl", "reference.npz", "checkpoints", "round.json"}
        about = json.loads((folder / "round.json").read_text())
        assert about["pairs"] + about["without_pair"] == about["prompts"] == PREFERENCE.prompts_per_round
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(line["loss"]) and "margin" in line for line in metrics)
    assert "round-2" in str(find_checkpoint(trained / "preference"))
    policy = json.loads((trained / "preference" / "round-2" / "round.json").read_text())["policy"]
    assert policy.endswith("round-1")


@pytest.mark.slow
def test_a_finished_run_does_nothing_and_a_cut_one_goes_on(
    trained: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    config = dataclasses.replace(CONFIG, stage="preference", init_from=str(trained / "sft"))
    last = workdir / "preference" / "round-2"
    for name in ("round.json", "checkpoints", "about.json", "metrics.jsonl"):
        path = last / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = (workdir / "preference" / "round-1" / "samples.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(Decoder, "decode", None)  # nothing is sampled a second time
    assert train(config, str(workdir / "preference")) == str(last)
    assert (last / "samples.jsonl").read_text() == (
        trained / "preference" / "round-2" / "samples.jsonl"
    ).read_text()
    assert (workdir / "preference" / "round-1" / "samples.jsonl").stat().st_mtime_ns == first
    assert (last / "round.json").exists()


@pytest.mark.slow
def test_held_out_pairs_have_the_loss_of_the_stage_and_records_that_of_the_first(
    trained: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"prompt": "Rivers?", "response": "The Nile."}))
    monkeypatch.setattr(Decoder, "decode", None)  # the samples are there
    for held, names in (("0.1", {"loss", "margin", "accuracy", "better"}), (str(file), {"loss", "accuracy"})):
        workdir = tmp_path / str(len(names))
        shutil.copytree(trained / "preference" / "round-1", workdir / "round-1")
        for name in ("round.json", "checkpoints", "about.json", "metrics.jsonl"):
            path = workdir / "round-1" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        config = dataclasses.replace(
            CONFIG,
            stage="preference",
            init_from=str(trained / "sft"),
            data=dataclasses.replace(CONFIG.data, held_out=held),
            preference=dataclasses.replace(PREFERENCE, rounds=1),
        )
        assert train(config, str(workdir)) == str(workdir / "round-1")
        line = read_metrics(str(workdir / "round-1" / "metrics.jsonl"))[-1]
        assert {name for name in line if name.startswith("held_out_")} == {
            f"held_out_{name}" for name in names
        }
        assert line["held_out_loss"] > 0


@pytest.mark.slow
def test_a_workdir_of_another_experiment_is_refused(
    trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "copy"
    shutil.copytree(trained / "preference", workdir)
    other = dataclasses.replace(
        CONFIG,
        stage="preference",
        init_from=str(trained / "sft"),
        preference=dataclasses.replace(PREFERENCE, quality_weight=1.0),
    )
    with pytest.raises(SystemExit):
        train(other, str(workdir))
    said = capsys.readouterr().err
    assert "another experiment: preference.quality_weight was" in said and "and is 1.0 now" in said


def test_configurations_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="samples must be at least 2"):
        Config(preference=PreferenceConfig(samples=1))
    with pytest.raises(ConfigError, match=r"init_from is empty.*finetuned"):
        Config(stage="preference")
    for name, value in (
        ("quality_weight", math.nan),
        ("temperature", 0.0),
        ("alpha", 2.0),
        ("margin", -1.0),
        ("beta", 0.0),
        ("epochs_per_round", 0.0),
        ("lr", -1.0),
    ):
        changed: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}"):
            Config(preference=dataclasses.replace(PREFERENCE, **changed))


def test_prompts_from_a_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prompts.jsonl"
    line = {"prompt": "What is the capital of Peru?", "response": "Its capital is Lima."}
    path.write_text(json.dumps(line) + "\n")
    config = dataclasses.replace(PREFERENCE, prompts=str(path))
    assert rounds.prompts_of(config, 0) == [Prompt(line["prompt"], line["response"])]
    path.write_text(json.dumps(line | {"prompt": "Why?"}) + "\n")
    with pytest.raises(ConfigError, match=r"almanac judges its own prompts only.*'Why\?'.*judge=likelihood"):
        rounds.prompts_of(config, 0)
    free = dataclasses.replace(config, judge="likelihood")
    path.write_text('{"prompt": "Why?"}\n{"instruction": "And", "input": "why?"}\n{"prompt": "Why?"}\n')
    assert {*rounds.prompts_of(free, 0)} == {Prompt("Why?", None), Prompt("And\n\nwhy?", None)}
    path.write_text('{"prompt": "Why?"}\n{"question": "Why?"}\n')
    with pytest.raises(ConfigError, match=r"preference\.prompts: .*1 of 2 records cannot be used \(50.0%\)"):
        rounds.prompts_of(free, 0, most=0.1)
    assert len(rounds.prompts_of(free, 0, most=0.5)) == 1
    with pytest.raises(ConfigError, match=r"preference\.prompts: Cannot read"):
        rounds.prompts_of(dataclasses.replace(PREFERENCE, prompts=str(tmp_path / "none.jsonl")), 0)


def test_prompts_that_changed_are_refused_before_anything_is_sampled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "checkpoint_identity", lambda path: {"checkpoint": path})
    path, folder = tmp_path / "prompts.jsonl", tmp_path / "round-1"
    folder.mkdir()
    line = json.dumps({"prompt": "What is the capital of Peru?", "response": "Its capital is Lima."})
    config = dataclasses.replace(
        CONFIG, init_from="W", preference=dataclasses.replace(PREFERENCE, prompts=str(path))
    )
    path.write_text(line)
    for _ in range(2):
        rounds._check_stamp(str(folder), config, "W")
        (folder / "samples.jsonl").touch()
    about = json.loads((folder / "about.json").read_text())
    path.write_text(f"{line}\n{line}")
    with pytest.raises(ConfigError, match="another experiment: prompts.examples was 1 and is 2 now"):
        rounds._check_stamp(str(folder), config, "W")
    older = {name: tree for name, tree in about.items() if name != "prompts"}
    older["data"] = {name: value for name, value in about["data"].items() if name != "held_out"}
    (folder / "about.json").write_text(json.dumps(older))
    rounds._check_stamp(str(folder), config, "W")  # as older versions stamped it
    (folder / "about.json").write_text(json.dumps(older))
    held_out = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out="0.1"))
    with pytest.raises(ConfigError, match="another experiment: data.held_out was None and is '0.1' now"):
        rounds._check_stamp(str(folder), held_out, "W")
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=str(path)))
    with pytest.raises(
        ConfigError, match=r"prompts.jsonl is trained on too: config.preference.prompts names it"
    ):
        rounds.run(same, str(tmp_path))


# --------------------------------------------------------------------------------------------- golden (law 7)

GOLDEN = {
    "loss": 633.8917846679688,
    "grad_norm": 2210.114501953125,
    "better": -243.2581329345703,
    "params": 4742.630981026217,
}


@pytest.mark.slow
def test_golden_step(tmp_path: pathlib.Path) -> None:
    """One step of preference optimization from made-up pairs: law 7 for the second stage."""
    tokenizer = almanac.load_tokenizer()

    def document(prompt: str, annotated: str, sign: int) -> PairedTokens:
        tokens = layout_example(tokenizer, prompt, parse(annotated))
        reference = np.where(tokens.target == NO_TARGET, 0.0, -7.0).astype(np.float32)
        return PairedTokens(**tokens.fields(), pair=np.full(len(tokens), sign, np.int32), reference=reference)

    prompt = "List the capital of Peru and Cuba."
    good = (
        '<promise topic="Peru" tokens=1 /><async>- Peru: Its capital is Lima.\n</async>'
        '<promise topic="Cuba" tokens=1 /><async>- Cuba: Its capital is Havana.\n</async>'
    )
    pair = Pair(document(prompt, good, +1), document(prompt, "- Peru: Its capital is Lima.\n", -1))
    names = ThreadedTokens.__dataclass_fields__
    plain = [ThreadedTokens(**{n: getattr(d, n) for n in names}) for d in (pair.better, pair.worse)]
    fresh = Model(init_params(MODEL, jax.random.key(CONFIG.seed)), MODEL, tokenizer)
    better, worse = (x.sum() for x in reference_logprobs(fresh, plain, 2, LENGTH))
    h = (better - worse) - (pair.better.reference.sum() - pair.worse.reference.sum())
    assert GOLDEN["loss"] == pytest.approx(0.1 * -better + 0.9 * (h - 4.0) ** 2, rel=1e-4)

    config = dataclasses.replace(CONFIG, steps=1)
    loss = functools.partial(preference_loss, kind="bonbon", alpha=0.1, margin=4.0)
    stage = loop.Stage(PairedTokens, loss, pair_batches)
    with optimized():  # as users run it
        state = loop.train(config, source=[pair], tokenizer=tokenizer, workdir=tmp_path, stage=stage)
    (line,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    found = {name: line[name] for name in ("loss", "grad_norm", "better")}
    found["params"] = sum(float(jax.numpy.abs(x).sum()) for x in jax.tree.leaves(state.params))
    assert found == pytest.approx(GOLDEN, rel=1e-4), (
        f"One preference step gives other numbers than before. If you meant this, update GOLDEN to {found}."
    )
