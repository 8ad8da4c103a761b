"""Shared by the commands: usage errors, logging, flags for all of them and for loading a model."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from pasta_jax.accelerators import tpu_chips, unused_tpu
from pasta_jax.files import InUse, WriteError, is_writer
from pasta_jax.kept import keep_compiled
from pasta_jax.messages import message_of
from pasta_jax.processes import launchers, meeting

LOG = logging.getLogger("pasta_jax")

BAD_USAGE = 2

LAST_SECONDS = 10.0
"""For threads to end after a command has failed."""

CHATS = ("auto", "plain", "gemma", "llama3", "chatml", "qwen3", "inst")
"""Those of `tokens.chat`, for --help."""


def refuse(message: str) -> NoReturn:
    """Prints the message on stderr and exits with status 2."""
    meeting.report(message)
    sys.exit(BAD_USAGE)


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[None]:
    """Ends the command without a word when nobody reads its output any more, as with `| head`."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise  # of another pipe, or a socket
        # At its end Python flushes stdout again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more; a flush that finds nothing to write would not notice."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def run_main(main: Callable[[Sequence[str]], Any], argv: list[str] | None = None) -> None:
    """Parses a verb's flags and the one of all verbs, and calls `main` with the other words of the command line.

    `--help` ends with status 0, a flag that is unknown or of the wrong type in one line and status 2; with absl
    alone both would end with status 1. Threads of Orbax do not bury the line that says what is damaged. A reader of
    the output who leaves ends the command, and so does Ctrl-C, without a traceback. A full disk, and a folder in
    use, are one line and status 2. Once a command has failed, no thread that is stuck keeps the process alive.
    """

    def parse(words: list[str]) -> Sequence[str]:
        try:
            rest = flags.FLAGS(words)
        except flags.Error as error:
            text = " ".join(str(error).split())
            refuse(f"{text}{'' if text.endswith(('.', '?')) else '.'} --help shows the flags.")
        except SystemExit:  # help was shown
            sys.exit(0)
        for name in flags.FLAGS:
            flag: Any = flags.FLAGS[name]
            if isinstance(flag.value, float) and math.isnan(flag.value) and _has_bounds(flag.parser):
                refuse(f"flag --{name}=nan: nan is not {flag.parser.syntactic_help}. --help shows the flags.")
        for name in {"workdir", "out"} & {*flags.FLAGS}:
            _check_folder(name, flags.FLAGS[name].value or "")
        return rest

    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder in which compiled programs are kept for the next start; empty: nowhere. By default "
        "$JAX_COMPILATION_CACHE_DIR, or pasta_jax/xla in $XDG_CACHE_HOME or ~/.cache.",
        module_name=sys.argv[0],  # so that --help shows it
    )
    verbosity = flags.FLAGS["verbosity"]  # absl's
    verbosity.help = "-1: only warnings, and no progress; 0: news too; 1: also those of other libraries."
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], verbosity)
    flags.FLAGS.set_default("verbosity", 0)
    set_unraisable_hook()
    with _ending(), meeting.ending_together(), _quiet_pipe():
        try:
            app.run(main, argv=argv, flags_parser=parse)
        except KeyboardInterrupt:
            meeting.report("Interrupted.")
            sys.exit(128 + signal.SIGINT)
        except (WriteError, InUse) as error:
            refuse(str(error))


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Ends the process some seconds after a failure, even if threads of libraries never end."""
    try:
        yield
    except BaseException as error:
        if status := error.code if isinstance(error, SystemExit) else 1:
            code = status if isinstance(status, int) else 1
            end = threading.Timer(LAST_SECONDS, os._exit, [code])
            end.daemon = True
            end.start()
        raise


def define_processes() -> None:
    """Defines the flags for a run of several processes, one on each host."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "Of several processes: HOST:PORT of the first. TPU slices, GKE, SLURM and Open MPI tell by themselves.",
    )
    flags.DEFINE_integer("processes", None, "How many there are; 1: this one alone.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)


def set_unraisable_hook() -> None:
    """Has errors that Python cannot raise reported as before, with two exceptions.

    Those of Orbax, whose threads outlive a failed read, are dropped. Ctrl-C that comes while Python frees objects
    comes once more, a moment later.
    """
    report, main = sys.unraisablehook, threading.main_thread().ident

    def quieter(fault: Any) -> None:
        if isinstance(fault.exc_value, KeyboardInterrupt):
            with contextlib.suppress(RuntimeError):  # Python is ending
                threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()
            return
        if str(fault.exc_value) != "Event loop is closed" and not inspect.iscoroutine(fault.object):
            report(fault)

    sys.unraisablehook = quieter


def _has_bounds(parser: Any) -> bool:
    """Of a flag's number. absl finds nan within any."""
    return any(getattr(parser, name, None) is not None for name in ("lower_bound", "upper_bound"))


def _check_folder(flag: str, folder: str) -> None:
    """Refuses a folder to write to that is a file, or would lie in one."""
    for path in (Path(folder), *Path(folder).parents):
        if os.path.isfile(path):  # false where it may not look, or the name is too long
            where = "" if path == Path(folder) else f": {path}"
            refuse(f"--{flag}={folder}{where} is a file. Give a folder.")


def config_file(name: str) -> str:
    """The path of a file in configs/: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).exists():
            return str(folder / name)
    refuse(f"configs/{name} is missing. Clone the repository, and run this there.")


def begin(*, uses_tpu: bool = True) -> None:
    """Begins the work of a command, whose arguments are in order.

    Meets the other processes, if there are any, of which only the first prints; refuses an installation of jax that
    does not work, or leaves a TPU unused (unless not `uses_tpu`); shows the log; keeps compiled programs.
    """
    values = flags.FLAGS
    verbosity = values.verbosity if "verbosity" in values and values["verbosity"].present else 0
    _check_jax()
    absl_logging.set_verbosity(absl_logging.WARNING)  # of what jax says while they meet
    if "coordinator" in values:
        try:
            group = launchers.asked(values.coordinator, values.processes, values.process_id)
            meeting.start(group)
        except meeting.SaidElsewhere:
            sys.exit(BAD_USAGE)
        except launchers.ProcessError as error:
            refuse(str(error))
    if not is_writer():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if uses_tpu:
        _check_tpu()
    show_log(verbosity)
    if "compilation_cache" in values:
        keep_compiled(values.compilation_cache)


def _check_jax() -> None:
    """Refuses a jax that cannot be imported: it is missing, or does not go with this jaxlib."""
    try:
        importlib.import_module("jax")
    except (ImportError, RuntimeError) as error:
        refuse(
            f"jax cannot be imported ({message_of(error)}). In a clone: pip install -r requirements.txt. "
            "python -m pasta_jax.doctor says what else is missing."
        )


def _check_tpu() -> None:
    """Refuses to compute on the CPU of a machine with a TPU, unless that was asked for: jax would only warn."""
    import jax

    asked = jax.config.values["jax_platforms"] or ""
    if not tpu_chips() or (asked and "tpu" not in asked):
        return
    try:
        message = unused_tpu(jax.default_backend())
    except RuntimeError as error:
        message = unused_tpu(None, message_of(error))
    if message:
        refuse(message)


def say(what: str, started: float) -> None:
    """Prints a line on stderr with the time since the start, by `time.monotonic`, unless the log is quiet."""
    if LOG.level > logging.INFO:
        return
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"[{minutes:02}:{seconds:02}] {what}", file=sys.stderr, flush=True)


def begin_first() -> None:
    """`begin` for a command that the first process does, on a device of its own: the others wait here, and end."""
    begin()
    meeting.wait_for_first()


def begin_alone() -> None:
    """`begin` for a command that one process does, on its CPU: on the other hosts of a pod it does nothing."""
    # It meets nobody, so no address is needed, and it uses no GPU.
    env = {name: value for name, value in os.environ.items() if name not in launchers.GPUS}
    if (group := launchers.announced(env, address="none:0")) is not None:
        if group.index:
            sys.exit(0)
        import jax

        jax.config.update("jax_platforms", "cpu")
    begin(uses_tpu=False)


def show_log(verbosity: int = 0) -> None:
    """Shows the library's log on stderr, and only warnings of other libraries; errors alone of other processes.

    Args:
      verbosity: below 0 only warnings of both are shown, above 0 all news of both.
    """
    absl_logging.set_verbosity(absl_logging.INFO if verbosity > 0 else absl_logging.WARNING)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_is_news)
    if not LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
    level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity > 0 else logging.INFO
    LOG.setLevel(level if is_writer() else logging.ERROR)
    LOG.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    """False for what each thread of Orbax logs about an error, with its traceback: who called Orbax has it too."""
    of_orbax = record.name == "asyncio" or f"{os.sep}orbax{os.sep}" in record.pathname
    return not (record.exc_info and of_orbax)


def define_loading(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags for loading a model to decode: the arguments of `pasta_jax.load`."""
    own: Any = {"flag_values": values}
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Of the weights; by default as in training.", **own
    )
    flags.DEFINE_enum("quantize", None, ["int8"], "Load matrices in int8.", **own)
    flags.DEFINE_string(
        "base",
        None,
        "For adapters in PEFT's layout: their base. For others: where it is, if it has moved.",
        **own,
    )
    flags.DEFINE_string("tokenizer", None, "Of published weights: a file or folder, if not their own.", **own)
    flags.DEFINE_bool(
        "extend_tokenizer", False, "For published weights: new ids and rows for the tags.", **own
    )
    flags.DEFINE_string(
        "chat", "auto", f"Format of prompts: {', '.join(CHATS)}; auto as the model's template.", **own
    )


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """The words of --columns=prompt=question,response=answer, by our names."""
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (name, equals, _) in zip(words, pairs) if not (name and equals)]:
        refuse(f"--columns={bad[0]} is not a NAME=COLUMN, as in --columns=prompt=question,response=answer.")
    return {name: own_name for name, _, own_name in pairs}


def loading_options(values: flags.FlagValues) -> dict[str, Any]:
    """The values of these flags, as arguments of `load`."""
    names = ("dtype", "quantize", "base", "tokenizer", "extend_tokenizer", "chat")
    return {name: values[name].value for name in names}
