"""Files of a run: whole or absent, so that an interrupted run leaves only what the next one can use.

In a run of several processes only the first writes; the others do the same work and write nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeVar

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
LOCK = "run.lock"
BROKEN = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What a broken line makes a parser raise."""

StrPath = str | os.PathLike[str]


def is_writer() -> bool:
    """Whether this process writes the files of a run: the only process, or the first of several."""
    jax = sys.modules.get("jax")  # not loaded: there is one process
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


LOG_EVERY_S = 20.0
"""Seconds between log lines on progress where no progress bar is shown."""


def shows_progress() -> bool:
    """Whether there is somebody to look at a progress bar, and the log is not quiet."""
    is_quiet = logging.getLogger("pasta_jax").level > logging.INFO  # 0 is not set
    return is_writer() and sys.stderr.isatty() and not is_quiet


class WriteError(OSError):
    """A file could not be written; the message says which, why, and what to do."""


class InUse(OSError):
    """Another process writes to a folder; the message says which."""


@contextlib.contextmanager
def locked(folder: StrPath) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs, by a lock that ends with the process.

    FOLDER/run.lock names the holder. It is removed at the end, and the folder too if it was made here and is empty;
    a file that a kill leaves keeps nobody out. Processes that write no files, remote folders and file systems
    without locks are let through.

    Raises:
      InUse: another process has it.
      WriteError: nothing can be written there.
    """
    path = os.path.join(folder, LOCK)
    if sys.platform == "win32" or "://" in path or not is_writer():
        yield
        return
    is_new = not os.path.isdir(folder)
    file = _open_locked(path, folder)
    try:
        with contextlib.suppress(OSError):  # the disk is full
            os.truncate(file, 0)
            os.write(file, f"{os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(path, file):
                os.remove(path)  # before the lock ends: afterwards it may be another's
            if is_new:
                os.rmdir(folder)
        os.close(file)


def _open_locked(path: str, folder: StrPath) -> int:
    """A file that is open and locked. Raises InUse, WriteError."""
    for attempt in itertools.count(1):
        try:
            os.makedirs(folder, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < 100:  # its holder removed the folder
                continue
            raise WriteError(unwritten(os.fspath(folder), error)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another"
            os.close(file)
            raise InUse(
                f"{os.fspath(folder)} is in use: process {holder} writes there. "
                "Wait until it has ended, or use another folder."
            ) from None
        except OSError:  # no locks there
            return file
        # A lock on a file that its holder removed keeps nobody out. Not every file system can tell.
        if _is_at(path, file) or attempt == 100:
            return file
        os.close(file)
    raise AssertionError


def _is_at(path: str, file: int) -> bool:
    """Whether an open file is the one at this path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


@contextlib.contextmanager
def _writing(path: StrPath) -> Iterator[None]:
    """Errors that do not say which file could not be written say so."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.filename is not None and not is_full(error):
            raise
        raise WriteError(unwritten(os.fspath(path), error)) from error


def unwritten(what: str, error: BaseException) -> str:
    """The message about something that could not be written."""
    if is_full(error):
        return f"{what} could not be written: the disk is full. Make room, then run the same command again."
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return f"{what} could not be written: {' '.join(reason.split())[:300]}."


def is_full(error: BaseException) -> bool:
    """Whether the disk is full, or full for this user, by what a library raised."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def replacing(path: StrPath, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write that replaces `path` once the block has ended without an error, and never before.

    Its folder is made if there is none.

    Args:
      path: of the file, local, or an `epath.Path` such as gs://bucket/file.
      mode: "w" for text (UTF-8), "wb" for bytes.
    """
    encoding = None if "b" in mode else "utf-8"
    if not is_writer():
        # /dev/null is at no position, which zip asks for.
        with io.StringIO() if encoding else io.BytesIO() as nowhere:
            yield nowhere
        return
    target: Any = pathlib.Path(path) if isinstance(path, str) else path
    unfinished = target.with_name(target.name + ".tmp")
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open(mode, encoding=encoding) as file:
                yield file
            unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


class Lines:
    """A text file to append to, line by line. Raises WriteError."""

    def __init__(self, path: StrPath):
        self._path = path
        self._file = open(path if is_writer() else os.devnull, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: str) -> None:
        """Writes at once a line that ends with a newline."""
        with _writing(self._path):
            self._file.write(line)

    def close(self) -> None:
        """Closes the file."""
        with _writing(self._path):
            self._file.close()


# ----------------------------------------------------------------------------------------------------- JSON


def json_bytes(tree: Any, *, allow_nan: bool = True) -> bytes:
    """JSON for people: two spaces of indent, UTF-8, a newline at the end."""
    return (json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n").encode()


def write_json(path: StrPath, tree: Any, *, allow_nan: bool = True) -> None:
    """Replaces a file by `json_bytes`."""
    with replacing(path, "wb") as file:
        file.write(json_bytes(tree, allow_nan=allow_nan))


def json_line(tree: Any) -> str:
    """JSON on one line, with its newline; arrays become lists."""
    return json.dumps(tree, ensure_ascii=False, default=lambda array: array.tolist()) + "\n"


def write_jsonl(path: StrPath, trees: Iterable[Any]) -> None:
    """Replaces a file by one `json_line` for each."""
    with replacing(path) as file:
        file.writelines(map(json_line, trees))


def read_jsonl(path: StrPath, make: Callable[[dict[str, Any]], T], *, skip: bool = False) -> list[T]:
    """The records of `stream_jsonl`, collected."""
    return [*stream_jsonl(path, make, skip=skip)]


def stream_jsonl(path: StrPath, make: Callable[[dict[str, Any]], T], *, skip: bool = False) -> Iterator[T]:
    """The records of a JSONL file up to the first broken line, such as an interrupted run leaves at the end.

    Args:
      path: of the file; a missing file has no records.
      make: from a line's dict to a record. A line that is no object in UTF-8 is broken, and one for which it raises
        one of BROKEN.
      skip: leave broken lines out, wherever they are.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                fields = json.loads(line.decode())
                if not isinstance(fields, dict):
                    raise TypeError("no object")
                record = make(fields)
            except BROKEN:
                if skip:
                    continue
                return
            yield record


# --------------------------------------------------------------------------------- what a folder was made from


class Change(NamedTuple):
    """A field that differs between two nested dicts; `None` on the side that lacks it."""

    name: str  # dotted path
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.old!r} and is {self.new!r} now"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The fields in which two nested dicts of plain data differ.

    >>> changes({"lr": 1, "data": {"rows": 8}}, {"lr": 1, "data": {"rows": 6}, "seed": 0})
    [Change(name='data.rows', old=8, new=6), Change(name='seed', old=None, new=0)]
    """
    a, b = dict(_leaves(old)), dict(_leaves(new))
    return [Change(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


@dataclasses.dataclass(frozen=True)
class Stamp:
    """A JSON file that says what the files beside it were made from: configurations, checkpoints, options.

    stamp = Stamp(os.path.join(folder, "about.json"))
    if stamp.check(about):  # made from something else, or not stamped at all
        ...                 # refuse, or delete what is there
    stamp.write(about)
    """

    path: str

    def check(self, about: Mapping[str, Any], absent: Mapping[str, Any] | None = None) -> list[Change]:
        """The fields in which `about` differs from what was written: all if the file is missing or broken.

        Args:
          about: what the files would be made from now.
          absent: the values of fields that the stamp does not have, since an older version wrote it.
        """
        written: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, *BROKEN), open(self.path, encoding="utf-8") as file:
            written = dict(json.load(file))
        now, assumed = json.loads(json.dumps([about, absent or {}]))
        known = dict(_leaves(assumed))
        found = changes(written, now)
        return [each for each in found if each.old is not None or each.new != known.get(each.name)]

    def write(self, about: Mapping[str, Any]) -> None:
        """Stamps the folder."""
        write_json(self.path, about)
