"""Prepared data: the documents that training would make of the same records, whole whatever happened on the way."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import pathlib
import random
import shutil
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data import almanac, sources
from pasta_jax.data.batches import Mixture
from pasta_jax.data.prepared import grain_source, open_prepared
from pasta_jax.data.reading import RecordError
from pasta_jax.files import Change
from pasta_jax.lang.render import render
from pasta_jax.prepare import __main__ as command
from pasta_jax.prepare import encoding, folder
from pasta_jax.prepare.__main__ import prepare
from pasta_jax.tokens.positions import Positions
from tests.helpers import only_full
from tests.helpers.programs import random_program
from tests.helpers.started import fork, wait

pytest.importorskip("array_record", reason="array_record is not installed")

RECORDS, ANSWERS = 300, 326
TOKENIZER = almanac.load_tokenizer()
CONFIG = DataConfig(length=160, threads=12, max_depth=2, max_unusable=1.0, too_long="sentence")


def write_records(path: pathlib.Path) -> None:
    """Annotated answers, conversations with several, and lines that are of no use."""
    rng = random.Random(0)
    lines: list[str] = []
    for i in range(RECORDS):
        answer = render(random_program(rng, max_depth=2)) + f" The end of {i}. " * rng.randint(1, 12)
        record: dict[str, Any] = {"prompt": f"Say {i % 150}.", "response": answer}
        if i % 5 == 0:
            turns = [
                ("user", f"Say {i}."),
                ("assistant", answer),
                ("user", "More?"),
                ("assistant", f"Yes, {i}."),
            ]
            record = {"messages": [{"role": role, "content": text} for role, text in turns]}
        lines.append("{" if i % 50 == 7 else json.dumps(record))
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoding, "BATCH", 40)
        yield


@pytest.fixture(scope="module")
def data(small_batches: None, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file of records, and the folder prepared from it in several shards."""
    place = tmp_path_factory.mktemp("data")
    write_records(place / "mine.jsonl")
    said = prepare(of(place / "mine.jsonl"), TOKENIZER, str(place / "mine"), shard=120)
    assert f"of {RECORDS} records" in said and "config.data.sources=prepared:" in said
    return place


def of(*names: pathlib.Path | str, config: DataConfig = CONFIG, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, sources=tuple((str(name), 1.0) for name in names), **changes)


def same(a: Any, b: Any) -> None:
    for (name, one), other in zip(a.fields().items(), b.fields().values(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"held_out": "0.1", "positions": Positions("oracle")},
        {"positions": Positions("const", 40), "threads": 14, "length": 300, "too_long": "drop"},
    ],
    ids=str,
)
def test_documents_are_those_of_the_records(data: pathlib.Path, changes: dict[str, Any]) -> None:
    """In the same order, with the same ones held out, whatever positions and larger limits training takes."""
    records = dict(changes, length=CONFIG.length, too_long=CONFIG.too_long)
    config = of("prepared:" + str(data / "mine"), **changes)
    stream, held = sources.make_sources(of(data / "mine.jsonl", **records), TOKENIZER, seed=3)
    again, held_again = sources.make_sources(config, TOKENIZER, seed=3)
    assert len(stream) == len(again) == ANSWERS - len(held)  # type: ignore[arg-type]
    assert len(held) == len(held_again) and (25 < len(held) < 50) == ("held_out" in changes)
    for i in range(0, 2 * len(stream), 3):  # type: ignore[arg-type]
        same(stream[i], again[i])
    for one, other in zip(held, held_again, strict=True):
        same(one, other)
    expected = sources.steps_of_epochs(of(data / "mine.jsonl", **changes), stream, 2.5)
    assert sources.steps_of_epochs(config, again, 2.5) == expected > 5


def test_what_is_prepared_is_not_held_out_of_its_records(data: pathlib.Path) -> None:
    mine, folder = str(data / "mine.jsonl"), str(data / "mine")
    for held, source in ((f"prepared:{folder}", folder), (f"prepared:{folder}", mine), (mine, folder)):
        with pytest.raises(ConfigError, match="is trained on too: config.data.sources names it"):
            sources.make_sources(of(source, held_out=held), TOKENIZER, seed=0)


def test_what_a_run_knows_of_its_data(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A folder is known by its name; one that was prepared from other records has another digest."""
    mine = data / "mine"
    stream, _ = sources.make_sources(of(mine), TOKENIZER, seed=0)
    both, _ = sources.make_sources(of(mine, "almanac:plain"), TOKENIZER, seed=0)
    assert isinstance(both, Mixture) and len({len(both[i]) for i in range(9)}) > 3
    [(name, about)] = sources.contents(both).items()
    assert {name: about} == sources.contents(stream) and name == str(mine) and about["examples"] > RECORDS
    fewer, _ = sources.make_sources(of(mine, held_out="0.1"), TOKENIZER, seed=0)
    assert sources.contents(fewer)[name] != about
    text = (data / "mine.jsonl").read_text().replace("Say 76.", "Say 77.", 1)
    (tmp_path / "mine.jsonl").write_text(text)
    prepare(of(tmp_path / "mine.jsonl"), TOKENIZER, str(tmp_path / "mine"), shard=100)
    other, _ = sources.make_sources(of(tmp_path / "mine"), TOKENIZER, seed=0)
    [changed] = sources.contents(other).values()
    assert changed["examples"] == about["examples"] and changed["sha256"] != about["sha256"]
    held, held_out = sources.make_sources(
        of(mine, held_out=f"prepared:{tmp_path / 'mine'}"), TOKENIZER, seed=0
    )
    same(held[0], stream[0])
    assert len(held_out) == about["examples"] and len(held_out[0]) > 1


def contents(place: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(place.iterdir()) if file.is_file()}


def test_stopped_anywhere_it_goes_on_to_the_same_folder(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shard, before its line of progress, and after the last one: nothing is lost, and nothing comes twice."""
    to = tmp_path / "mine"

    class Stop(Exception):
        pass

    def go(stop_in: str, after: int) -> None:
        """Stops in the nth call of a function."""
        calls = collections.Counter[str]()
        original = getattr(folder, stop_in)

        def stopping(*args: Any, **kwargs: Any) -> Any:
            calls[stop_in] += 1
            if calls[stop_in] > after:
                raise Stop
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            for module in (folder, command):
                if hasattr(module, stop_in):
                    patched.setattr(module, stop_in, stopping)
            with pytest.raises(Stop):
                prepare(of(data / "mine.jsonl"), TOKENIZER, str(to), shard=120)

    go("write_shard", after=1)
    go("writing", after=0)
    (to / "dropped.jsonl").open("a").write('{"file": "cut o')
    (to / "progress.jsonl").open("a").write('{"batches": 3, "sha')
    go("shard_name", after=1)  # the second shard is written, and nothing says so yet
    monkeypatch.setattr(folder.State, "line", lambda self: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        prepare(of(data / "mine.jsonl"), TOKENIZER, str(to), shard=120)
    monkeypatch.undo()
    go("finish", after=0)
    with pytest.raises(
        RecordError, match=r"has no prepared.json: nothing was prepared there, or not to the end"
    ):
        open_prepared(str(to))
    prepare(of(data / "mine.jsonl"), TOKENIZER, str(to), shard=120)
    assert contents(to) == contents(data / "mine")
    assert "is prepared already" in prepare(of(data / "mine.jsonl"), TOKENIZER, str(to), shard=120)
    assert contents(to) == contents(data / "mine")
    with pytest.raises(
        ConfigError, match="begun with something else: made.length was 160 and is 161 now. Give"
    ):
        prepare(of(data / "mine.jsonl", length=161), TOKENIZER, str(to), shard=120)
    (changed := tmp_path / "changed.jsonl").write_bytes((data / "mine.jsonl").read_bytes())
    with pytest.raises(
        ConfigError, match=r"else: sources was '.*mine.jsonl' and is '.*changed.jsonl' now. Give"
    ):
        prepare(of(changed), TOKENIZER, str(to), shard=120)


def test_a_file_that_changed_is_named_alone() -> None:
    then, now = (
        [{"name": name, "bytes": size}, {"name": "b", "bytes": 3}] for name, size in (("a", 1), ("a", 2))
    )
    assert folder._shown(Change("sources", then, now)) == "a has changed"
    assert folder._shown(Change("sources", then, then[::-1])) == "the files are in another order"


@only_full
def test_several_workers_do_the_same(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FEW", 2)
    prepare(of(data / "mine.jsonl"), TOKENIZER, str(tmp_path / "mine"), shard=120, workers=2)
    assert contents(tmp_path / "mine") == contents(data / "mine")


@only_full
def test_killed_at_random_it_goes_on_and_leaves_no_worker(tmp_path: pathlib.Path) -> None:
    """The command with two workers, killed three times, or less often if it is done before that."""
    with (tmp_path / "mine.jsonl").open("w") as file:
        for i in range(12_000):
            file.write(json.dumps({"prompt": f"Say {i}.", "response": f"It is {i}. " * (i % 9 + 1)}) + "\n")
    to, rng = tmp_path / "mine", random.Random(0)
    words = [
        f"--sources={tmp_path / 'mine.jsonl'}",
        f"--to={to}",
        "--tokenizer=almanac",
        "--shard_examples=1000",
    ]
    killed = 0
    for _ in range(3):
        process = fork(["-m", "pasta_jax.prepare", *words, "--workers=2"], tmp_path / "log")
        until, shards = time.monotonic() + 60, len([*to.glob("*.array_record-*")])
        while process.poll() is None and len([*to.glob("*.array_record-*")]) <= shards:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        try:
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        except FileNotFoundError:
            break
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        while any(pathlib.Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < until, "a worker is left"
            time.sleep(0.05)
    assert killed
    assert wait([fork(["-m", "pasta_jax.prepare", *words], tmp_path / "log")], 60) == [0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoding, "BATCH", 256)  # as in the command
        prepare(
            of(tmp_path / "mine.jsonl", config=DataConfig()), TOKENIZER, str(tmp_path / "other"), shard=1000
        )
    assert contents(to) == contents(tmp_path / "other")
    assert len(open_prepared(str(to))) == 12_000


def test_records_are_dropped_as_in_training(
    data: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same report, and kept in the same form; too many stop it, and more may be allowed later."""
    with gzip.open(tmp_path / "mine.jsonl.gz", "wb") as file:
        file.write((data / "mine.jsonl").read_bytes())
    config = of(tmp_path / "mine.jsonl.gz", length=40, too_long="drop")
    sources.make_sources(config, TOKENIZER, 0, invalid=tmp_path / "invalid.jsonl")
    expected = [record.message for record in caplog.records if "cannot be used (" in record.message]
    caplog.clear()
    strict = dataclasses.replace(config, max_unusable=0.1)
    with pytest.raises(ConfigError, match=r"by --config.data.max_unusable=0.\d+\. The first: .* All are in "):
        prepare(strict, TOKENIZER, str(tmp_path / "mine"))
    assert "6 not JSON" in expected[0]
    prepare(config, TOKENIZER, str(tmp_path / "mine"))
    assert [record.message for record in caplog.records if "cannot be used (" in record.message] == expected
    assert (tmp_path / "mine/dropped.jsonl").read_text() == (tmp_path / "invalid.jsonl").read_text()
    about = json.loads((tmp_path / "mine/prepared.json").read_text())
    assert about["unusable"]["not JSON"] == 6 and about["records"] == RECORDS


def test_another_run_is_refused_with_what_differs(data: pathlib.Path) -> None:
    def fault(tokenizer: Any = TOKENIZER, **changes: Any) -> str:
        with pytest.raises(ConfigError, match="was prepared for something else: ") as error:
            sources.make_sources(of("prepared:" + str(data / "mine"), **changes), tokenizer, 0)
        return str(error.value).split("something else: ")[1]

    assert fault(length=100).startswith(
        "its longest example has 160 tokens, and config.data.length is 100. Change"
    )
    assert "threads in an answer, and config.data.threads is 2" in fault(threads=2)
    assert "its tags are those of pasta, and config.data.dialect is apar" in fault(
        TOKENIZER.with_dialect("apar"), dialect="apar"
    )
    assert "config.data.max_depth was 2 and is 3" in fault(max_depth=3)
    assert "config.data.turns was 'all' and is 'last'" in fault(turns="last")
    plain = TOKENIZER.with_chat("plain")
    assert plain.vocabulary.tag_ids == TOKENIZER.vocabulary.tag_ids
    assert "its tokenizer is almanac (" in fault(plain)


def test_damage_is_told_in_one_line(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, change, message in (
        ("pasta-train.array_record-00001", None, "is missing or not whole. Copy the folder again"),
        ("index.npy", b"", "index.npy is damaged: .*Prepare the data again"),
        ("prepared.json", b"{", "prepared.json is damaged: JSONDecodeError.*Prepare the data again"),
        ("prepared.json", b'{"format": 1}', "prepared.json is damaged: its checksum differs"),
        ("prepared.json", b'{"format": 2}', "has the format 2; this version reads 1"),
        ("prepared.json", None, "has no prepared.json"),
    ):
        to = tmp_path / "mine"
        shutil.copytree(data / "mine", to)
        (to / name).unlink()
        if change is not None:
            (to / name).write_bytes(change)
        with pytest.raises(ConfigError, match=message) as error:
            sources.make_sources(of("prepared:" + str(to)), TOKENIZER, 0)
        assert "\n" not in str(error.value)
        shutil.rmtree(to)
    shutil.copytree(data / "mine", to)
    shard = to / "pasta-train.array_record-00001"
    whole = bytearray(shard.read_bytes())
    whole[1000:30_000] = bytes(29_000)
    shard.write_bytes(whole)
    documents = open_prepared(str(to))
    with pytest.raises(RecordError, match="array_record-00001 is damaged: .*Prepare the data again"):
        [len(document) for document in documents]


def test_tensorflow_datasets_reads_it_without_tensorflow(data: pathlib.Path) -> None:
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(str(data / "mine"))
    examples = builder.as_data_source("train")
    assert str(builder.version) == "1.0.0" and "tensorflow" not in sys.modules
    documents = open_prepared(str(data / "mine"))
    assert len(examples) == len(documents) and list(builder.info.splits) == ["train"]
    for i in range(0, len(documents), 37):
        ids = [*examples[i]["prompt"], *examples[i]["answer"]]
        assert ids == documents[i].token.tolist()
        assert f"Say {(examples[i]['record'] - 1) % 150}." in TOKENIZER.vocabulary.text(ids) or ids


def test_grain_reads_it(data: pathlib.Path) -> None:
    grain: Any = pytest.importorskip("grain")
    source = grain_source(str(data / "mine"), positions=Positions("shared"))
    loaded = grain.MapDataset.source(source).seed(0).shuffle()
    assert len(loaded) == len(source)
    assert sorted(len(document["token"]) for document in loaded) == sorted(
        len(each["token"]) for each in source
    )
    one = open_prepared(str(data / "mine"), positions=Positions("shared"))[5]
    same(one, types.SimpleNamespace(fields=lambda: source[5]))


def test_mistakes_of_the_command_are_one_line(
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "begin_alone", lambda: None)

    def said(*overrides: str, status: int = 2, **changes: Any) -> str:
        mine = str(data / "mine.jsonl")
        given = dict(sources=mine, tokenizer="almanac", to=str(tmp_path / "to"), config=None, workers=1)
        given |= dict(shard_examples=500, data_version="1.0.0")
        values: Any = types.SimpleNamespace(**given | changes)
        if status:
            with pytest.raises(SystemExit, match="^2$"):
                command.main(["prepare"], values=values, overrides=overrides)
        else:
            command.main(["prepare"], values=values, overrides=overrides)
        out, err = capsys.readouterr()
        assert bool(out) == (status == 0) and err.count("\n") == (status != 0)
        return out + err

    assert said(to=None).startswith("Add --sources=FILE.jsonl --tokenizer=FILE.model --to=FOLDER. Tokenizes")
    assert said(tokenizer=None).startswith(
        "Which tokenizer? Add --tokenizer=FILE, that of the model to train, or"
    )
    assert said(data_version="1").startswith("--data_version=1 must be three numbers, as 1.0.0.")
    assert said(sources=None).startswith("config.data.sources: 'almanac:annotated' is not a file of records")
    assert said(sources="a.jsonl=1,b.jsonl=2").startswith(
        "Weights do not go into prepared data. Prepare each file"
    )
    assert said(sources="no/such.jsonl").startswith("Cannot read no/such.jsonl")
    assert said("data.colums=a=b").startswith('No config field "data.colums"')
    assert said("data.columns=promt=a").startswith("columns maps 'promt'; only prompt")
    assert said(to=str(data)).startswith(f"{data} has other files, as mine. Give a folder of its own.")
    assert said("data.max_depth=2", "data.max_unusable=1", status=0).startswith(f"{tmp_path / 'to'}: ")
