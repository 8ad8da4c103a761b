"""The second stage: samples and their traces, scores, pairs, batches of pairs, rounds that go on."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax.arrays import NO_DOC, NO_TARGET, PairedTokens, ThreadedTokens
from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.config import CheckpointConfig, Config, ConfigError, DataConfig, PreferenceConfig
from pasta_jax.data import almanac
from pasta_jax.data.records import encode_prompt
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import as_document, document_order
from pasta_jax.files import read_jsonl
from pasta_jax.lang.parse import parse
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.preference import rounds
from pasta_jax.preference import sample as sample_module
from pasta_jax.preference.pairs import (
    Pair,
    choose_all,
    make_pairs,
    pair_batches,
    steps_for,
)
from pasta_jax.preference.sample import Prompt, Record, record_of, sample, write_records
from pasta_jax.preference.score import qualities, scores
from pasta_jax.tokens.layout import layout_example
from pasta_jax.train import run as train
from pasta_jax.training import loop
from pasta_jax.training.logprobs import reference_logprobs
from pasta_jax.training.losses import preference_loss
from pasta_jax.training.metrics import read_metrics
from pasta_jax.training.signals import Stopped
from tests.helpers import only_full, optimized, programs_kept

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


@pytest.fixture(autouse=True, scope="module")
def programs_are_kept() -> Iterator[None]:
    with programs_kept():
        yield


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
    path.write_text('{"question": "Why?"}\n')
    assert rounds.prompts_of(free, 0, columns=(("prompt", "question"),)) == [Prompt("Why?", None)]
    with pytest.raises(ConfigError, match=r"preference\.prompts: Cannot read"):
        rounds.prompts_of(dataclasses.replace(PREFERENCE, prompts=str(tmp_path / "none.jsonl")), 0)


def test_prompts_that_cannot_be_asked_are_left_out_and_counted(
    model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rounds, "sample", lambda policy, baseline, prompts, *rest, **more: prompts)

    def encode(tokenizer: Any, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError("The format has no system message.")
        return encode_prompt(tokenizer, prompt)

    monkeypatch.setattr(rounds, "encode_prompt", encode)
    path = tmp_path / "prompts.jsonl"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    asked = [{"prompt": "Which?"}, {"prompt": "Why? " * LENGTH}, {"prompt": "Who?"}, {"messages": said}]
    path.write_text("\n".join(map(json.dumps, asked)))
    preference = dataclasses.replace(PREFERENCE, prompts=str(path), judge="likelihood")
    config = dataclasses.replace(CONFIG, preference=preference)
    with pytest.raises(ConfigError, match=r"2 of 4 records cannot be used \(50.0%\)"):
        rounds.draw(config, 1, model, model, str(tmp_path))
    lenient = dataclasses.replace(config, data=dataclasses.replace(config.data, max_unusable=0.5))
    with caplog.at_level("WARNING", logger="pasta_jax"):
        drawn: Any = rounds.draw(lenient, 1, model, model, str(tmp_path))
    assert {prompt.text for prompt in drawn} == {"Which?", "Who?"}
    assert (
        "record 2: " in caplog.text and "a row holds" in caplog.text and "record 4: The format" in caplog.text
    )


def test_the_reference_of_likelihood_is_not_the_opponent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rounds, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(rounds, "load_to_decode", lambda path, mesh: f"loaded {path}")
    monkeypatch.setattr(rounds, "make_judge", lambda name, **options: options["model"])
    mesh: Any = None

    def judge(baseline: str = "", judge_model: str = "") -> Any:
        preference = PreferenceConfig(baseline=baseline, judge="likelihood", judge_model=judge_model)
        loaded: Any = {"sft": "policy", "slow": "baseline"}
        return rounds.judge_of(Config(init_from="sft", preference=preference), mesh, "", loaded)

    with caplog.at_level("WARNING", logger="pasta_jax"):
        assert (judge("slow"), judge("slow", "other")) == ("policy", "loaded other") and not caplog.messages
        assert (judge("slow", "slow"), judge()) == ("baseline", "policy")
    assert len(caplog.messages) == 2 and "most others lose to what a model says itself" in caplog.text


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
    patient = dataclasses.replace(config.preference, judge_timeout=900.0, judge_concurrency=1)
    rounds._check_stamp(str(folder), dataclasses.replace(config, preference=patient), "W")
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
    # What was judged is not that of a judge whose source changed.
    (folder / "samples.jsonl").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "polite_judges.py"
    source.write_text("def judge(prompt, a, b):\n    return 0, 0.9\n")
    polite = dataclasses.replace(config.preference, judge="polite_judges:judge")
    rounds._check_stamp(str(folder), dataclasses.replace(config, preference=polite), "W")
    (folder / "samples.jsonl").touch()
    rounds._check_stamp(str(folder), dataclasses.replace(config, preference=polite), "W")
    source.write_text("def judge(prompt, a, b):\n    return 1, 0.9\n")
    with pytest.raises(ConfigError, match=r"another experiment: judge.source was"):
        rounds._check_stamp(str(folder), dataclasses.replace(config, preference=polite), "W")
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
