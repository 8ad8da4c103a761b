"""A model on a user's own prompts: what counts, what is asked, the reports, and folders that stay apart."""

import collections
import dataclasses
import json
import math
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pasta_jax.data.prompts import Question, questions_of
from pasta_jax.data.records import Prompt
from pasta_jax.evaluate import __main__ as command
from pasta_jax.evaluate import compare, contests, own
from pasta_jax.evaluate.answers import Answered, Batch, Respondent, key_of
from pasta_jax.evaluate.report import read_results
from pasta_jax.evaluate.summary import Contest, chances, geometric, quality_of, speed_of
from pasta_jax.files import InUse, locked
from pasta_jax.judges.protocol import NO_VERDICT, JudgeError, Preference
from pasta_jax.lang import tags
from tests.helpers import only_full
from tests.helpers.answers import WORDS

# --------------------------------------------------------------------------------------------------- numbers


def answered(prompt: str = '"?"', text: str = "yes", **fields: Any) -> Answered:
    counts: dict[str, Any] = {
        "output_tokens": 10,
        "text_tokens": 10,
        "critical_path": 10,
        "wall_s": 1.0,
        "stop_reason": "eos",
    }
    return Answered(prompt, text, text, **counts | fields)


CUT = "branch 1: stopped before its </async>."


def test_speeds_count_every_answer_that_there_is() -> None:
    baseline = [answered(output_tokens=40, wall_s=4.0), answered(output_tokens=90), answered()]
    test = [
        answered(critical_path=20, text_tokens=36, promises=2),
        answered(critical_path=5, text_tokens=20, wall_s=1.0, stop_reason="length", issues=(CUT,)),
        answered(error="too long", text="", text_tokens=0, output_tokens=0),
    ]
    speed = speed_of(baseline, test)
    assert speed.theoretical.mean == pytest.approx(6.0)  # 40 / 20 and 90 / 5
    assert speed.theoretical.error == pytest.approx(6.0 * math.log(9) / math.sqrt(2) / math.sqrt(2))
    assert (speed.realized.mean, speed.parallelism.mean) == pytest.approx((2.0, math.sqrt(1.8 * 4)))
    assert (speed.prompts, speed.cut, speed.malformed, speed.failed) == (3, 1, 0, 1)
    assert (speed.tokens, speed.baseline_tokens) == pytest.approx((56 / 3, 10.0))
    assert speed.promising.mean == pytest.approx(100 / 3)
    assert math.isnan(geometric([]).mean) and str(geometric([2.0])) == "2.00x"
    assert (
        answered(issues=("a tag",)).is_malformed
        and not answered(issues=(CUT,), stop_reason="length").is_malformed
        and answered(issues=("main: a stray tag.",), stop_reason="length").is_malformed
    )


def test_chances_of_both_orders_and_of_what_failed() -> None:
    pairs = [
        Contest("?", "a", "b"),
        Contest("?", None, "b"),
        Contest("?", "a", None),
        Contest("?", None, None),
    ]
    pairs += [Contest("?", "a", "c"), Contest("?", "a", "a")]
    assert [len(contest.comparisons) for contest in pairs] == [2, 0, 0, 0, 2, 2]
    # Two ties say nothing of the order; one does.
    ties = chances(pairs[:1] * 2, [Preference(None, 0.5)] * 3 + [Preference(0, 0.7)])
    assert (ties[0].tolist(), ties[1]) == ([0.5, pytest.approx(0.4)], [False])
    said = [Preference(0, 0.9), Preference(1, 0.7)]  # the model's answer won in both orders
    said += [Preference(0, 0.8), Preference(0, 0.8)]  # whatever came first
    said += [Preference(None, 0.5)] * 2
    found, agreed = chances(pairs, said)
    assert found == pytest.approx([0.8, 0.0, 1.0, 0.5, 0.5, 0.5])
    assert agreed == [True, False]
    assert chances(pairs[:1], [Preference(None, 0.5)] * 2) == ([0.5], []), "a tie is no verdict to agree on"
    quality = quality_of(found, agreed)
    assert (quality.won, quality.tied, quality.lost, quality.same_winner) == (2, 3, 1, 50.0)
    assert quality.win_rate.mean == pytest.approx(55.0)
    assert quality.win_rate.error == pytest.approx(100 * np.std(found, ddof=1) / math.sqrt(6))


def test_what_the_judge_did_not_say_is_left_out() -> None:
    """Not a tie: neither of the win rate nor of the agreement."""
    pairs = [Contest("?", "a", "b")] * 3
    said = [Preference(0, 0.9), NO_VERDICT, NO_VERDICT, NO_VERDICT, Preference(0, 1.0), Preference(1, 1.0)]
    found, agreed = chances(pairs, said)
    assert np.array_equal(found, [np.nan, np.nan, 1.0], equal_nan=True) and agreed == [True]
    quality = quality_of(found, agreed)
    assert (quality.won, quality.tied, quality.lost, quality.unjudged) == (1, 0, 0, 2)
    assert quality.win_rate.mean == 100.0


# ---------------------------------------------------------------------------------------------- the whole way

PROMPTS = ["Name a river.", "Name a city.", "What is long?"]


class Fake:
    """In place of `Respondent`: answers by the name of its model, without decoding."""

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        *,
        sequential: bool = False,
        like: Any = None,
        rows: int = 1,
        drawing: Any = None,
    ):
        self.model, self.sequential = model, sequential

    def together(self, questions: Sequence[Question]) -> Batch:
        answers = tuple(dataclasses.replace(self(question), wall_s=0.0) for question in questions)
        return Batch(answers, 3.0 if self.sequential else 2.0)

    def __call__(self, question: Question) -> Answered:
        prompt = key_of(question.prompt)
        if question.prompt == PROMPTS[2] and not self.sequential:
            return Answered(prompt, error="The prompt is too long.")
        return answered(
            prompt,
            f"{self.model} says {question.prompt}",
            critical_path=10 if self.sequential else 5,
            wall_s=1.0 if self.sequential else 0.5,
            promises=0 if self.sequential else 2,
        )


class Named(str):
    """In place of a model: its name, with a tokenizer."""

    tokenizer = WORDS


class Prefers:
    """A judge that prefers what a model says, and keeps what it was asked."""

    def __init__(self, model: str):
        self.model, self.asked = model, list[Sequence[Any]]()

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        self.asked.append((prompt, a, b))
        return Preference(0 if a.startswith(self.model) else 1, 0.9)


class Says:
    """A judge that says these, one after another."""

    def __init__(self, said: Sequence[Preference]):
        self.said = iter(said)

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        return next(self.said)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(path: Any) -> pathlib.Path:
        return pathlib.Path(path) / "checkpoints" / "7"

    monkeypatch.setattr(own, "Respondent", Fake)
    monkeypatch.setattr(own, "place_of", find)
    monkeypatch.setattr(own, "load", lambda path, **options: Named(path.parent.parent.name))
    monkeypatch.setattr(own, "identity_of", lambda path: {"checkpoint": str(path), "written": 1.0})


def settings_of(folder: pathlib.Path, ckpt: str = "runs/fast", baseline: str = "runs/slow") -> own.Settings:
    path = folder / "prompts.json"
    rows = [
        {"instruction": text, "output": "It is so.", "generator": "gpt4", "dataset": "own"}
        for text in PROMPTS
    ]
    path.write_text(json.dumps(rows))
    return own.Settings(ckpt, baseline, str(path), {}, str(folder / "out"), 32, {})


@pytest.mark.usefixtures("fakes")
def test_an_evaluation_and_what_it_leaves(tmp_path: pathlib.Path) -> None:
    settings = settings_of(tmp_path)
    questions = questions_of(settings.prompts, {})
    found = own.answer_all([settings], questions)[0]
    folder = pathlib.Path(found.folder)
    assert (found.name, found.baseline_name) == ("fast-7", "slow-7")
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == PROMPTS
    assert outputs[0] == {
        "instruction": PROMPTS[0], "output": "fast says Name a river.", "generator": "fast-7", "dataset": "own",
    }  # fmt: skip
    markdown = contests.write_report(settings, found, None, "", None)
    assert "| fast-7" in markdown and "2.00x" in markdown and "win rate" not in markdown
    # Against the baseline: two prompts are won, the one that failed is lost without a word of the judge.
    judge = Prefers("fast")
    asked = contests.contests_of(found, contests.baseline_as_opponent(found), "tests:Prefers", "source")
    # Verdicts of another judge of the same name, or of one whose source changed, are not these.
    assert contests.contests_of(found, asked.opponent, "tests:Prefers", "other source").folder != asked.folder
    with locked(asked.folder), pytest.raises(InUse):
        contests.judge_contests(found, asked, judge, "tests:Prefers")
    quality = contests.judge_contests(found, asked, judge, "tests:Prefers")
    assert (quality.won, quality.tied, quality.lost) == (2, 0, 1)
    assert quality.win_rate.mean == pytest.approx(100 * (0.9 + 0.9 + 0) / 3)
    assert len(judge.asked) == 4
    rows = json.loads((pathlib.Path(asked.folder) / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == pytest.approx([1.9, 1.9, 1.0])
    assert (rows[0]["generator_1"], rows[0]["generator_2"]) == ("slow-7", "fast-7")
    assert (rows[0]["output_1"], rows[2]["output_2"]) == ("slow says Name a river.", "")
    markdown = contests.write_report(settings, found, quality, "tests:Prefers", asked, "It judges itself.")
    assert "- It judges itself.\n" in markdown
    assert "60.0 +- 30.0 %" in markdown and "same verdict in both orders for 100.0 % of" in markdown
    assert (
        "LC win rate not computed: df_gamed.csv is missing" in markdown
        and "Raw win rate 60.0 +- 30.0." in markdown
    )
    page = (pathlib.Path(asked.folder) / "report.html").read_text()
    assert "<td>fast-7</td>" in page and 'src="data:image/png;base64,' in page
    # The same again asks nobody: not the models, not the judge.
    before = (folder / "model.jsonl").read_text()
    again = own.answer_all([settings], questions)[0]
    contests.judge_contests(again, asked, judge, "tests:Prefers")
    assert (folder / "model.jsonl").read_text() == before and len(judge.asked) == 4
    # A judge that does not answer everything.
    asked = contests.contests_of(found, contests.baseline_as_opponent(found), "tests:silent")
    silent: list[Preference] = [Preference(0, 0.9), NO_VERDICT, Preference(0, 0.9), Preference(1, 0.9)]
    quality = contests.judge_contests(found, asked, Says(silent), "tests:silent")
    assert (quality.won, quality.tied, quality.lost, quality.unjudged) == (1, 0, 1, 1)
    rows = json.loads((pathlib.Path(asked.folder) / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [None, pytest.approx(1.9), 1.0]
    markdown = contests.write_report(settings, found, quality, "tests:silent", asked)
    assert "The judge gave no verdict on 1 of 3 prompts" in markdown
    asked = contests.contests_of(found, contests.baseline_as_opponent(found), "tests:mute")
    with pytest.raises(JudgeError, match="gave no verdict on any"):
        contests.judge_contests(found, asked, Says([NO_VERDICT] * 4), "tests:mute")


@pytest.mark.usefixtures("fakes")
def test_two_checkpoints_in_one_workdir_stay_apart_and_share_a_table(tmp_path: pathlib.Path) -> None:
    folders = []
    for ckpt in ("runs/fast", "runs/faster"):
        settings = settings_of(tmp_path, ckpt)
        found = own.answer_all([settings], questions_of(settings.prompts, {}))[0]
        asked = contests.contests_of(found, contests.baseline_as_opponent(found), "tests:Prefers")
        quality = contests.judge_contests(found, asked, Prefers("slow"), "tests:Prefers")
        markdown = contests.write_report(settings, found, quality, "tests:Prefers", asked)
        folders.append(pathlib.Path(found.folder))
    assert folders[0] != folders[1]
    for folder, name in zip(folders, ("fast", "faster")):
        assert json.loads((folder / "model_outputs.json").read_text())[0]["output"].startswith(f"{name} says")
    assert "| fast-7" in markdown and "| faster-7" in markdown
    assert [result.name for result in read_results(settings.workdir)] == ["fast-7", "faster-7"]
    # Another baseline of the same name is another table, and so is the same one in int8.
    for settings in (
        settings_of(tmp_path, baseline="others/slow"),
        dataclasses.replace(settings_of(tmp_path), loading={"quantize": "int8"}),
    ):
        found = own.answer_all([settings], questions_of(settings.prompts, {}))[0]
        asked = contests.contests_of(found, contests.baseline_as_opponent(found), "tests:Prefers")
        markdown = contests.write_report(settings, found, quality, "tests:Prefers", asked)
        assert markdown.count("| fast-7") == 1 and "| faster-7" not in markdown
    assert "| fast-7-int8 " in markdown


@pytest.mark.usefixtures("fakes")
def test_given_answers_are_opponents_and_must_be_of_the_same_prompts(tmp_path: pathlib.Path) -> None:
    settings = settings_of(tmp_path, baseline="")
    questions = questions_of(settings.prompts, {})
    given = contests.opponent_of(questions, settings.prompts, {})
    assert (given.name, given.answers) == ("gpt4", ["It is so."] * 3)
    found = own.answer_all([settings], questions)[0]
    assert found.baseline_name == "fast-7, sequential"
    asked = contests.contests_of(found, given, "tests:Prefers")
    assert contests.judge_contests(found, asked, Prefers("fast"), "j").lost == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": text, "output": text[:0]} for text in PROMPTS[:3]]))
    failed = contests.contests_of(found, contests.opponent_of(questions, str(other), {}), "tests:Prefers")
    assert contests.judge_contests(found, failed, Prefers("fast"), "j").win_rate.mean == pytest.approx(
        250 / 3
    )
    rows = json.loads(pathlib.Path(settings.prompts).read_text())
    for changed, message in (
        (rows[:2], r"has 2 records, and there are 3 prompts"),
        (
            [rows[1], rows[0], rows[2]],
            r"record 1: the prompt is 'Name a city.', where 'Name a river.' is asked",
        ),
        ([*rows[:2], {"instruction": PROMPTS[2]}], r"record 3 has no answer. --opponent needs"),
        ([*rows[:2], {"nothing": 1}], r"record 3: no known layout.* Every prompt counts"),
    ):
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            contests.opponent_of(questions, str(other), {})


def test_a_prompt_that_cannot_be_asked_is_an_answer_that_failed() -> None:
    class Model:
        class tokenizer:
            @staticmethod
            def encode_prompt(prompt: Prompt) -> list[int]:
                raise ValueError("The prompt is empty.")

    model: Any = Model()
    found = Respondent(model, 8)(Question(" ", None, 1, ""))
    assert (found.text, found.error, found.stop_reason) == ("", "The prompt is empty.", "")


def test_how_answers_are_drawn() -> None:
    """As the flag says, in both models alike; greedily without it."""
    assert command.drawing_of([]) == {}
    drawing = command.drawing_of(["temperature=0.7", "min_p=0.05", "seed=3"])
    model: Any = object()
    for sequential in (True, False):
        sampling = Respondent(model, 8, sequential=sequential, drawing=drawing).sampling
        assert (sampling.temperature, sampling.min_p, sampling.seed) == (0.7, 0.05, 3)
        assert sampling.open_bias == (-math.inf if sequential else 0.0)
    # Each prompt is drawn by a seed of its own, the same for all models.
    rivers, cities = (Question(text, None, 1, "") for text in ("rivers", "cities"))
    one, other = (Respondent(model, 8, sequential=each, drawing=drawing) for each in (False, True))
    assert one.sampling_of(rivers).seed == other.sampling_of(rivers).seed != one.sampling_of(cities).seed
    assert Respondent(model, 8).sampling.temperature == 0
    for word, message in (
        ("heat=1", "--sampling=heat=1: give NAME=NUMBER; the names are temperature, "),
        ("seed=0.5", "--sampling=seed=0.5: give NAME=NUMBER"),
        ("temperature=-1", "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            command.drawing_of([word])


@pytest.mark.slow
@only_full
def test_a_real_model_answers_and_its_sequential_self_is_the_baseline() -> None:
    from tests.helpers.answers import model

    head = np.array(model().params["head"])
    ids = WORDS.vocabulary.tag_ids
    head[:, ids[tags.PROMISE_OPEN]] = 1.1 * head[:, ids[tags.SYNC]]  # which it likes to write
    promising = dataclasses.replace(model(), params={**model().params, "head": head})
    sequential = Respondent(promising, 24, sequential=True)
    parallel = Respondent(promising, 24, like=sequential)
    for prompt in ("rivers", "rivers and cities"):
        alone, found = (each(Question(prompt, None, 1, "")) for each in (sequential, parallel))
        assert (alone.promises, alone.critical_path) == (0, max(1, alone.decode_steps))
        assert found.wall_s > 0 and found.promises > 0 and not found.error
    assert parallel._decoders[32].compiled is sequential._decoders[32].compiled
    # Together they are answered as they are alone; one that cannot be asked has failed.
    together = Respondent(promising, 24, rows=3).together(
        [Question(prompt, None, 1, "") for prompt in ("rivers and cities", " ", "rivers")]
    )
    assert [each.error != "" for each in together.answers] == [False, True, False] and together.wall_s > 0
    assert together.answers[0].annotated == found.annotated and together.answers[0].wall_s == 0


def test_who_never_saw_almanac_is_told_so_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pasta_jax.checkpoints import about
    from pasta_jax.config import Config, DataConfig, PreferenceConfig

    @dataclasses.dataclass
    class Metadata:
        config: Config
        step: int = 3

    foreign = DataConfig(sources=(("own.jsonl", 1.0),))
    preference = Config(stage="preference", init_from="own", preference=PreferenceConfig(prompts="own.jsonl"))
    runs = {
        "almanac": Metadata(Config()),
        "imported": Metadata(Config(), step=0),
        "own": Metadata(Config(data=foreign, init_from="imported")),
        "later": Metadata(Config(data=foreign, init_from="almanac")),
        "bon": Metadata(preference),
    }
    monkeypatch.setattr(about, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(about, "has_checkpoint", lambda path: path in runs)
    monkeypatch.setattr(about, "read_metadata", runs.__getitem__)
    assert {name: compare.saw_almanac(name) for name in runs} == {
        "almanac": True, "imported": False, "own": False, "later": True, "bon": False,
    }  # fmt: skip
    with caplog.at_level("WARNING", logger="pasta_jax"):
        compare.warn_of_strangers("own", "almanac")
    (line,) = caplog.messages
    assert line.startswith("own was not trained on Almanac") and "--prompts=FILE" in line


# ------------------------------------------------------------------------------------------------ the command


def test_what_cannot_work_is_refused_before_anything_is_decoded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("it decodes")

    monkeypatch.setattr(own, "answer_all", never)
    monkeypatch.setattr(command, "begin_first", lambda: None)
    gamed = tmp_path / "df_gamed.csv"
    gamed.write_text(
        "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,0.5,0,0,False\n"
    )
    llm = {"judge": "llm", "model": "m", "base_url": "http://localhost:1/v1"}
    for given, message in (
        ({"dry_run": 1}, "--dry_run shows what an endpoint would be asked: add --judge=llm."),
        ({"dry_run": 1, "judge": "json:loads"}, "--dry_run shows what an endpoint would be asked"),
        ({"judge": "json:loads", "df_gamed": str(gamed)}, "There are 3 prompts and difficulties of 1"),
        ({**llm, "budget_dollars": 1.0}, "--budget_dollars needs the prices"),
        ({**llm, "base_url": "localhost"}, "localhost"),
    ):
        monkeypatch.setattr(command.flags, "FLAGS", values_of(settings_of(tmp_path), given))
        with pytest.raises(SystemExit):
            command.main(["evaluate"])
        assert message in capsys.readouterr().err, message


def test_a_judge_is_known_by_what_its_verdicts_depend_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pasta_jax import loading

    monkeypatch.setattr(loading, "place_of", lambda path: path)
    monkeypatch.setattr(loading, "identity_of", lambda path: {"checkpoint": path})
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "some_judges.py"
    source.write_text("def judge(prompt, a, b):\n    return 0, 0.9\n")
    settings = settings_of(tmp_path)

    def identity(**given: Any) -> Any:
        return command._judge_identity(values_of(settings, given))

    def caution(**given: Any) -> str:
        return command._caution(values_of(settings, {"judge": "likelihood", **given}), settings.ckpt)

    llm = {"judge": "llm", "model": "m", "base_url": "a"}
    assert identity(**llm) == identity(**llm)
    found = [identity(**llm), identity(**llm | {"base_url": "b"}), identity(**llm, temperature=1.0)]
    found += [identity(judge="likelihood"), identity(judge="likelihood", judge_model="other")]
    found += [identity(judge="likelihood", quantize="int8"), identity(judge="some_judges:judge")]
    source.write_text("def judge(prompt, a, b):\n    return 1, 0.9\n")
    found.append(identity(judge="some_judges:judge"))
    assert len({json.dumps(each) for each in found}) == len(found)
    assert "gave the opponent's answers itself" in caution()
    assert "gave the model's answers itself" in caution(judge_model="runs/fast")
    assert caution(judge_model="other") == caution(opponent="outputs.json") == ""


class Values:
    """The command's flags, without absl's global ones."""

    def __init__(self, **given: Any):
        self.__dict__.update(given)

    def __getitem__(self, name: str) -> Any:
        return types.SimpleNamespace(value=getattr(self, name))

    def __getattr__(self, name: str) -> Any:
        return None

    def flag_values_dict(self) -> Any:
        return collections.defaultdict(lambda: None, {**vars(self), "concurrency": 8, "timeout": 1.0})


def values_of(settings: own.Settings, given: dict[str, Any]) -> Any:
    flags: dict[str, Any] = {
        "ckpt": [settings.ckpt],
        "baseline": settings.baseline,
        "prompts": settings.prompts,
        "workdir": "W",
        "columns": [],
        "plain_kinds": [],
        "sampling": [],
        "rows": 1,
    }
    flags |= {
        "price_in": 0.0,
        "price_out": 0.0,
        "temperature": 0.0,
        "key_variable": "HOME",
        "max_new_tokens": 8,
    }
    return Values(**flags | given)
