"""Files of a run: replaced whole, read up to where they broke off, and stamped with what they were made from."""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from etils import epath

from pasta_jax import files
from pasta_jax.files import (
    LOCK,
    Change,
    InUse,
    Lines,
    Stamp,
    WriteError,
    locked,
    read_jsonl,
    replacing,
    write_json,
    write_jsonl,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "a", epath.Path(tmp_path) / "b", str(tmp_path / "new" / "c")):
        with replacing(path) as file:
            file.write("ä")
        with contextlib.suppress(ZeroDivisionError), replacing(path) as file:
            file.write("half")
            1 / 0  # noqa: B018
        assert pathlib.Path(path).read_text(encoding="utf-8") == "ä"


def test_a_full_disk_is_said_with_the_file(tmp_path: pathlib.Path) -> None:
    full = pathlib.Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    message = "could not be written: the disk is full. Make room, then run the same command again."
    with pytest.raises(WriteError, match=f"^/dev/full {message}$"), Lines(full) as file:
        file.write("line\n")
    (tmp_path / "a.tmp").symlink_to(full)
    with pytest.raises(WriteError, match=f"^{tmp_path / 'a'} {message}$"), replacing(tmp_path / "a") as file:
        file.write("line\n")
    assert list(tmp_path.iterdir()) == [], "what was half written makes room"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), replacing(tmp_path / "file" / "a"):
        pass


HOLDER = """
import sys, time
from pasta_jax.files import locked
with locked(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(100)
"""


def test_one_process_writes_to_a_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        message = rf"run is in use: process {holder.pid} on .* writes there\. Wait until it has ended"
        with pytest.raises(InUse, match=message), locked(folder):
            pass
        with locked(folder / "round-1"):  # folders within are others
            pass
        with monkeypatch.context() as patch:  # of several processes only the one that writes needs it
            patch.setattr(files, "is_writer", lambda: False)
            with locked(folder):
                pass
        holder.kill()
    assert [path.name for path in folder.iterdir()] == [LOCK], "of a process that was killed, which lets go"
    for _ in range(2):  # and a block that ends
        with locked(folder):
            assert (folder / LOCK).read_text().startswith(f"{os.getpid()} on ")
        assert not (folder / LOCK).exists()
    with locked("gs://bucket/run"):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as raised, locked(tmp_path / "file" / "run"):
        pass
    assert str(raised.value) == f"{tmp_path}/file/run could not be written: Not a directory."


def test_a_lock_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the file, nor a folder that was made for it; also where another one comes as it is removed."""
    folder, flock = tmp_path / "run", fcntl.flock
    with pytest.raises(ValueError, match="refused"), locked(folder):
        raise ValueError("refused")
    assert not folder.exists()
    before = contextlib.ExitStack()
    before.enter_context(locked(folder))

    def first_end_the_other(file: int, operation: int) -> None:
        before.close()  # the file was opened, and now it is gone
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", first_end_the_other)
    with locked(folder):
        assert (folder / LOCK).exists()
        with pytest.raises(InUse), locked(folder):
            pass
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_only_the_first_process_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for process, written in ((1, []), (0, ["log", "tree"])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        write_json(tmp_path / "tree", {})
        with Lines(tmp_path / "log") as file:
            file.write("line\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_lines_up_to_the_first_broken_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_jsonl(path, dict) == []
    write_jsonl(path, [{"a": 1}, {"a": 2}])
    whole = path.read_text()
    huge = b'{"a": 3, "b": %s}' % (b"1" * 5000)
    foreign = (b"[3]", b"3", b"[]", b'{"a": "\xff"}', b"\xff\xfe", b"[" * 200_000, huge)
    for broken in (b'{"a": 3', b'{"b": 3}', *foreign):
        path.write_bytes(whole.encode() + broken + b'\n{"a": 4}\n')
        assert read_jsonl(path, lambda tree: tree["a"]) == [1, 2]
        assert read_jsonl(path, lambda tree: tree["a"], skip=True) == [1, 2, 4]
    with pytest.raises(IsADirectoryError):
        read_jsonl(tmp_path, dict)


def test_a_stamp_names_what_changed(tmp_path: pathlib.Path) -> None:
    stamp = Stamp(str(tmp_path / "about.json"))
    about = {"seed": 0, "data": {"sources": (("a", 1.0),)}, "weight": float("inf")}
    assert [change.name for change in stamp.check(about)] == ["seed", "data.sources", "weight"]
    stamp.write(about)
    assert stamp.check(about) == []
    assert stamp.check(about | {"seed": 1}) == [Change("seed", 0, 1)]
    assert str(Change("seed", 0, 1)) == "seed was 0 and is 1 now"
    for broken in ("{", "[1]", "5", "[" * 200_000):
        (tmp_path / "about.json").write_text(broken)
        assert len(stamp.check(about)) == 3


def test_json_is_written_for_people(tmp_path: pathlib.Path) -> None:
    write_json(tmp_path / "tree.json", {"ä": [1]})
    text = (tmp_path / "tree.json").read_text(encoding="utf-8")
    assert text == '{\n  "ä": [\n    1\n  ]\n}\n'
    assert json.loads(text) == {"ä": [1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.json_bytes(float("nan"), allow_nan=False)
