"""Every verb refuses what it cannot do in one line and with status 2, and passes on what it is asked for."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest

import pasta_jax
from pasta_jax import console, kept, verbs
from pasta_jax.tokens import chat
from tests.helpers import ONE_DEVICE, full, only_full
from tests.helpers.commands import ROOT, python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pasta_jax"], "Add --ckpt=WORKDIR. Answers"),
        (["pasta_jax", "--ckpt=W"], "Add a prompt, in quotes or on stdin."),
        (["pasta_jax", "Rivers?"], "Add --ckpt=WORKDIR. Answers"),
        (
            ["pasta_jax", "--ckpt=W", "Which", "rivers?"],
            "2 prompts were given, 'Which rivers?'. Put the prompt in",
        ),
        (["pasta_jax.train", "--workdir=README.md"], "--workdir=README.md is a file. Give a folder."),
        (["pasta_jax.almanac", "--workdir=README.md/runs"], "--workdir=README.md/runs: README.md is a file."),
        (["pasta_jax.benchmark", "--out=README.md"], "--out=README.md is a file. Give a folder."),
        (
            ["pasta_jax.benchmark", "--model=300"],
            "--model=300 is neither tiny, 300m, gemma25m, gemma7b nor a path.",
        ),
        (["pasta_jax", "--ckpt=no/such", "Rivers?"], "No checkpoint at "),
        (["pasta_jax", "--ckpt=W", "--stream", "--annotated", "Rivers?"], "--stream prints the text as it"),
        (["pasta_jax.train"], "Which experiment?"),
        (["pasta_jax.compile"], "Which experiment?"),
        (
            ["pasta_jax.benchmark", "--what=widht"],
            "--what must be all, or a comma-separated list of startup, train, width,",
        ),
        (["pasta_jax.benchmark", "--responses=no/such"], "--responses=no/such: there is no such file."),
        (
            ["pasta_jax.convert"],
            "Add --from=hf:google/gemma-2b-it or --from=gguf:FILE and --to=WORKDIR to import",
        ),
        (["pasta_jax.prepare"], "Add --sources=FILE.jsonl --tokenizer=FILE.model --to=FOLDER."),
        (["pasta_jax.almanac", "it"], "'it' is no flag. --help shows them."),
        (
            ["pasta_jax.tokenizer", "--text=/x", "--vocab_size=9", "--to=t.model"],
            "Cannot use /x: No such file",
        ),
        (["pasta_jax.tokenizer"], "Add --text=FILE,FILE --vocab_size=8000 --to=FILE.model."),
        (["pasta_jax.evaluate"], "Name both models: --ckpt=runs/pasta --baseline=runs/baseline."),
        (["pasta_jax.evaluate", "--ckpt=W", "--baseline=B", "--judge=llm"], "--judge and --opponent are for"),
        (["pasta_jax.evaluate", "--annotations=no/such"], "Cannot read no/such: No such file"),
        (["pasta_jax.train", "--workdri=W"], "Unknown command line flag 'workdri'. Did you mean: workdir ?"),
        (
            ["pasta_jax", "--lanes=many", "Rivers?"],
            "flag --lanes=many: invalid literal for int() with base 10: 'many'. --help shows the flags.",
        ),
        (["pasta_jax.evaluate", "--ckpt=no/such", "--baseline=no/such"], "No checkpoint at "),
        (
            ["pasta_jax.simulate", "--share=nan"],
            "flag --share=nan: nan is not a number in the range [0.0, 1.0].",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = python("-m", *arguments, real=arguments[0] == "pasta_jax")
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_folder_that_cannot_be_looked_at_is_left_to_those_who_write() -> None:
    verbs._check_folder("workdir", "x" * 300)


VERBS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for file in (ROOT / "pasta_jax").rglob("*.py")
    if "run_main(" in file.read_text(encoding="utf-8") and file.name != "verbs.py"
)
"""What can be run by `python -m`, but for lm-eval's own command (adapters/lm_eval.py)."""


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_no_failure(verb: str) -> None:
    """It shows an example, and the flags that all have."""
    done = python("-m", verb, "--help", real=verb in ("pasta_jax", "pasta_jax.train"))
    assert done.returncode == 0, done.stderr
    assert "--helpfull" in done.stdout and done.stderr == ""
    assert re.search(rf"python -m {re.escape(verb)}(?![.\w])", done.stdout.partition("\nflags:")[0])
    assert "--verbosity" in done.stdout and "--compilation_cache" in done.stdout


def test_the_console_script_has_all_verbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for those that are steps of another."""
    verbs_of_packages = {"pasta_jax.demo.base", "pasta_jax.real_model.prompts"}
    assert {console.module_of(verb) for verb in console.VERBS} == {*VERBS} - verbs_of_packages
    monkeypatch.setattr("sys.argv", ["pasta"])
    console.command()
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +[A-Z].*[^.:]$", listed, re.MULTILINE) for verb in console.VERBS)
    done = python("-m", "pasta_jax.console", "train", "--workdir=README.md")
    assert (done.returncode, done.stderr) == (2, "--workdir=README.md is a file. Give a folder.\n")
    done = python("-m", "pasta_jax.console", "trian")
    assert (done.returncode, done.stderr) == (2, "pasta has no verb trian. Did you mean train?\n")


def test_threads_of_orbax_do_not_bury_the_line() -> None:
    code = """
from pasta_jax import kept, verbs

class Late:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)

late = Late("Event loop is closed")

class Wait:
    def __await__(self):
        yield

async def reading():
    try:
        await Wait()
    finally:
        raise OSError("a file is missing")

def main(argv):
    Late("something else")
    Late("Event loop is closed")
    reading().send(None)
    verbs.refuse("The checkpoint is damaged.")

verbs.run_main(main)
"""
    done = python("-c", code, real=True)
    assert done.returncode == 2
    assert done.stderr.endswith("RuntimeError: something else\nThe checkpoint is damaged.\n")
    assert "Event loop" not in done.stderr and "a file is missing" not in done.stderr


def test_a_thread_that_is_stuck_does_not_keep_a_failed_command_alive() -> None:
    code = """
import threading
from pasta_jax import verbs

verbs.LAST_SECONDS = 0.2

def main(argv):
    threading.Thread(target=threading.Event().wait).start()
    verbs.refuse("It failed.")

verbs.run_main(main)
"""
    done = python("-c", code, real=True)
    assert (done.returncode, done.stderr) == (2, "It failed.\n")


def test_a_full_disk_and_a_folder_in_use_are_one_line() -> None:
    code = """
import sys
from pasta_jax import verbs
from pasta_jax.files import InUse, WriteError

def main(argv):
    raise {"w": WriteError, "u": InUse}[argv[1]](28, "No room.")

verbs.run_main(main)
"""
    for which in "wu":
        done = python("-c", code, which)
        assert done.returncode == 2 and "No room." in done.stderr and "Traceback" not in done.stderr


def test_compiling_for_a_tpu_says_what_it_lacks() -> None:
    code = """if True:
        import os, sys
        from pasta_jax.compile import __main__ as verb
        sys.modules["libtpu"] = None
        os.environ.pop("TPU_LIBRARY_PATH", None)
        sys.argv = ["compile", "--config=configs/tiny.py"]
        verb.command()
    """
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "libtpu is not installed: pip install libtpu (Linux; needs no TPU).\n"


def test_the_version_and_the_chat_formats() -> None:
    done = python("-m", "pasta_jax", "--version", real=True)
    assert (done.returncode, done.stdout) == (0, f"{pasta_jax.__version__}\n")
    assert verbs.CHATS == chat.CHATS


def test_configurations_that_a_command_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    """In a clone they lie beside the package, in a wheel inside it; without them it ends in one line."""
    package = tmp_path / "pasta_jax"
    monkeypatch.setattr(verbs, "__file__", str(package / "verbs.py"))
    with pytest.raises(SystemExit) as leaving:
        verbs.config_file("tiny.py")
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("configs/tiny.py is missing.") and message.count("\n") == 1
    for folder in (tmp_path / "configs", package / "configs"):
        folder.mkdir(parents=True)
        (folder / "tiny.py").touch()
        assert verbs.config_file("tiny.py") == str(folder / "tiny.py")


LOADED = {
    "dtype": "bfloat16",
    "quantize": "int8",
    "base": "B",
    "tokenizer": "t.model",
    "extend_tokenizer": True,
    "chat": "inst",
}
"""What `load` takes."""


def test_options_reach_load_of_both_models() -> None:
    """In a process of its own, since flags are global."""
    flags = [f"--{name}={value}" for name, value in LOADED.items()]
    code = f"""if True:
        import sys
        from pasta_jax.evaluate import __main__ as evaluate
        from pasta_jax import loading
        from pasta_jax.evaluate import compare
        seen = []
        def load(path, **options):
            assert options == {LOADED}, options
            seen.append(path)
            if len(seen) == 2:
                raise ValueError(f"loaded {{seen}}")
        loading.load, loading.place_of = load, lambda path: path
        loading.identity_of = lambda path: {{}}
        compare.warn_of_strangers = compare.folder_of = lambda *about: "folder"
        sys.argv = ["evaluate", "--ckpt=W", "--baseline=B", *{flags}]
        evaluate.command()
    """
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (2, "loaded ['B', 'W']\n")


def with_decode(body: str, *flags: str) -> list[str]:
    """A command line: `python -m pasta_jax` with another `decode`."""
    code = f"""if True:
        import sys, jax, pasta_jax
        from pasta_jax import __main__ as verb
        from pasta_jax.decoding.streaming import Event
        from tests.helpers.answers import model
        real = pasta_jax.decode
        def decode(model, prompt, stream, **options):
            {body}
        pasta_jax.load, pasta_jax.decode = (lambda path, **options: model()), decode
        sys.argv = ["pasta_jax", "--ckpt=W", *{[*flags]}, *sys.argv[1:]]
        verb.command()
    """
    return ["-c", code]


def test_prompts_and_sizes_that_cannot_be_end_in_one_line() -> None:
    really = with_decode("return real(model, prompt, stream=stream, **options)")
    broken = with_decode(
        "raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.')"
    )
    for line, message in {
        (
            *really,
            "caf\udce9",
        ): r"The text holds half a character, U\+DCE9 \(the byte 0xE9, which is not UTF-8\)",
        (
            *really,
            "Hi",
            "--max_new_tokens=2000000000",
        ): r"The pool does not fit: 1 row x 1,073,741,824 tokens x ",
        (
            *really,
            "Hi",
            "--seed=-1",
        ): "seed=-1 is out of range. Give a whole number from 0 to 18446744073709551615.",
        (*really, "Hi", "--open_bias=nan"): "open_bias=nan is out of range.",
        (*broken, "Hi"): "Out of memory. Lower --max_new_tokens, or shorten the prompt. RESOURCE_EXHAUSTED: ",
    }.items():
        done = python(*line)
        assert done.returncode == 2 and re.match(message, done.stderr) and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_what_comes_on_stdin_is_the_prompt() -> None:
    """All of it, if no other is given."""
    line = with_decode("raise ValueError(ascii(prompt))")
    for words, stdin, prompt in (
        ([], "Rivers:\n\n- the Nile\n", "Rivers:\n\n- the Nile"),
        (["Hi"], "Rivers:", "Hi"),
    ):
        done = python(*line, *words, stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{prompt!a}\n")
    done = python("-m", "pasta_jax.console", "chat", "--ckpt=no/such", stdin="Hi\n")
    assert done.returncode == 2 and done.stderr.startswith("No checkpoint at ")


def test_quiet_and_verbose() -> None:
    """--verbosity: with -1 only warnings, and no word on progress; with 1 also news of other libraries."""
    code = """if True:
        import logging, sys, time
        from pasta_jax import files, verbs
        def main(argv):
            verbs.begin()
            for name in ("pasta_jax", "another"):
                logging.getLogger(name).info("news of %s", name)
                logging.getLogger(name).warning("warning of %s", name)
            verbs.say("progress", time.monotonic())
            sys.stderr.isatty = lambda: True
            print(files.shows_progress())
        verbs.run_main(main)
    """
    news, progress = "news of pasta_jax", "progress"
    warnings = {"warning of pasta_jax", "warning of another"}
    for flag, told in {
        "--verbosity=-1": warnings,
        "--verbosity=0": {*warnings, news, progress},
        "--verbosity=1": {*warnings, news, progress, "news of another"},
    }.items():
        done = python("-c", code, flag)
        assert {*re.findall(r"(?:news of|warning of) \w+|progress", done.stderr)} == told, done.stderr
        assert done.stdout == f"{flag != '--verbosity=-1'}\n"


def test_a_command_does_not_begin_on_the_cpu_of_a_tpu_machine() -> None:
    """Unless it needs no TPU; what is said is in tests/test_errors.py."""
    code = """if True:
        import sys
        from pasta_jax import verbs
        verbs._check_tpu = lambda: verbs.refuse("There is a TPU.")
        verbs.run_main(lambda argv: {"any": verbs.begin_alone, "tpu": verbs.begin_first}[argv[1]]())
    """
    assert [python("-c", code, which).returncode for which in ("any", "tpu")] == [0, 2]


def test_ctrl_c_ends_a_command_in_one_line() -> None:
    code = "from pasta_jax.verbs import run_main\ndef main(argv): raise KeyboardInterrupt\nrun_main(main)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGINT, "Interrupted.\n")


@pytest.mark.parametrize("flag", ["--stream", full("--nostream")])
def test_a_reader_that_has_read_enough_ends_the_command(flag: str) -> None:
    """`| head`: no traceback, and the status of a command that a closed pipe ends."""
    line = with_decode(
        "[stream(Event('text', text='word ' * 9999)) for _ in range(99)] if stream else None;"
        "return real(model, prompt, max_new_tokens=2) if stream else type('', (), dict(text='word ' * 99999))",
        flag,
    )
    env = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    with subprocess.Popen(
        [sys.executable, *line, "Hi"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout and started.stdout.read(3) == "wor"
        started.stdout.close()
        assert started.stderr and started.stderr.read() == ""
    assert started.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("lines", ["", "sys.stdout = None"])
def test_another_pipe_that_breaks_is_no_quiet_end(lines: str) -> None:
    """That of a subprocess, or a socket: a training must not end as if all were well."""
    code = f"""if True:
        import sys
        from pasta_jax import verbs
        {lines}
        def main(argv):
            raise BrokenPipeError("a socket")
        verbs.run_main(main)
    """
    done = python("-c", code)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: a socket\n")


def test_options_reach_decode() -> None:
    """In a process of its own, since flags are global."""
    given: dict[str, object] = {
        "mode": "sequential",
        "max_new_tokens": 7,
        "max_branches": 3,
        "lanes": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.75,
        "min_p": 0.125,
        "seed": 9,
        "open_bias": -1.5,
        "grammar": False,
        "cache_len": 64,
        "batch_invariant": True,
    }
    flags = [f"--{name}={str(value).lower()}" for name, value in given.items()]
    flags += [f"--{name}={value}" for name, value in LOADED.items()]
    flags += ["--stream", "--stop=###", "--stop=The end"]
    given["stop"] = ["###", "The end"]
    code = f"""if True:
        import sys, pasta_jax
        from pasta_jax import __main__ as verb
        def decode(model, prompt, **options):
            assert (model, prompt) == ("W", "Rivers?") and callable(options.pop("stream"))
            assert options == {given}, options
            raise ValueError("decoded")
        def load(path, **options):
            assert options == {LOADED}, options
            return path
        pasta_jax.load, pasta_jax.decode = load, decode
        sys.argv = ["pasta_jax", "--ckpt=W", *{flags}, "Rivers?"]
        verb.command()
    """
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (2, "decoded\n")


def test_options_reach_the_decoder_of_a_server() -> None:
    pytest.importorskip("starlette")
    flags = ["--rows=3", "--queue=5", "--reuse=1000", "--admission=cap:4", "--cache_len=256", "--lanes=2"]
    code = """if True:
        import types
        from pasta_jax import loading
        from pasta_jax.decoding import engine
        from pasta_jax.serve import __main__ as verb
        def decoder(model, limits, **options):
            raise ValueError(f"{limits.pool} {limits.lanes} {sorted(options.items())}")
        loading.load, engine.Decoder = lambda path, **options: types.SimpleNamespace(max_depth=1), decoder
        verb.command()
    """
    done = python("-c", code, "--ckpt=W", "--port=0", *flags)
    options = {"rows": 3, "queue": 5, "reuse": 1000, "admission": "cap:4", "batch_invariant": False}
    assert (done.returncode, done.stderr) == (2, f"256 2 {sorted(options.items())}\n")
    done = python("-c", code, "--ckpt=W", "--port=0", "--reuse=1000", "--cache_len=200")
    message = "--cache_len=200: with --reuse it must be a multiple of 128. Give 256.\n"
    assert (done.returncode, done.stderr) == (2, message)


SQUARE = """if True:
    import sys
    import pasta_jax
    from pasta_jax import verbs
    def main(argv):
        assert "jax" not in sys.modules
        verbs.begin()
        import jax
        print(jax.jit(lambda x: x * x)(3.0), jax.config.jax_compilation_cache_dir)
    verbs.run_main(main)
"""
"""A command that compiles one program, and says where it would be kept."""


def squared(*arguments: str, **env: str) -> tuple[str, str, str]:
    """The square, the folder and what is on stderr; without settings of this test's own cache."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    line, env = [sys.executable, "-c", SQUARE, *arguments], kept | {"XLA_FLAGS": ONE_DEVICE} | env
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=300)
    square, _, folder = done.stdout.strip().partition(" ")
    return square, folder, done.stderr


@only_full
def test_compiled_programs_are_kept(tmp_path: pathlib.Path) -> None:
    """In the user's cache, where a flag or jax's own setting says, or nowhere."""

    def entries(folder: pathlib.Path) -> list[str]:
        return sorted(file.name for file in folder.glob("*-cache"))  # jax names them by the folder too

    home, own, other = tmp_path / "home", tmp_path / "own", tmp_path / "other"
    default = home / "pasta_jax/xla" / kept.processor()
    assert squared(XDG_CACHE_HOME=str(home)) == ("9.0", str(default), "")
    assert len(first := entries(default)) == 1
    assert squared(XDG_CACHE_HOME=str(home)) == ("9.0", str(default), "") and entries(default) == first
    assert squared("--compilation_cache=", XDG_CACHE_HOME=str(home / "no")) == ("9.0", "None", "")
    assert not (home / "no").exists()
    jax_dir = {"JAX_COMPILATION_CACHE_DIR": str(own), "XDG_CACHE_HOME": str(home / "no")}
    assert squared(**jax_dir) == ("9.0", str(own), "") and len(entries(own)) == 1
    assert squared(f"--compilation_cache={other}", **jax_dir) == ("9.0", str(other), "")
    assert len(entries(other)) == 1 and not (home / "no").exists()


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    square, folder, stderr = squared(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (square, folder) == ("9.0", "None")
    assert "Compiled programs are not kept for the next start: [Errno 20]" in stderr
    assert stderr.count("\n") == 1


def test_processors_that_differ_share_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home on several machines: XLA for CPUs would run code that the processor does not know."""
    names = {kept.processor()}
    monkeypatch.setattr(kept.platform, "machine", lambda: "another")
    assert len(names | {kept.processor()}) == 2 == len(names | {kept.processor(), kept.processor()})


def test_the_cache_keeps_what_was_used_last(tmp_path: pathlib.Path) -> None:
    for age, name in enumerate(["new-cache", "middle-cache", "old-cache", "older.txt"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "folder-cache").mkdir()
    (tmp_path / "gone-cache").symlink_to(tmp_path / "gone")
    kept.trim(str(tmp_path), 250)
    left = {"new-cache", "middle-cache", "older.txt", "folder-cache", "gone-cache"}
    assert {file.name for file in tmp_path.iterdir()} == left
    kept.trim(str(tmp_path), 250)
    assert {file.name for file in tmp_path.iterdir()} == left


def asked_of_jax(monkeypatch: pytest.MonkeyPatch, folder: str | None) -> object:
    """Where jax is told to keep programs; in place of jax stands what writes that down."""
    told: dict[str, object] = {}
    config = types.SimpleNamespace(values={"jax_compilation_cache_dir": None}, update=told.__setitem__)
    jax = types.SimpleNamespace(config=config, __version_info__=(0, 10, 2))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax", jax)
        kept.keep_compiled(folder)
    return told["jax_compilation_cache_dir"]


def test_only_the_folder_of_the_commands_is_trimmed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And only a user's own is trusted; what is no folder of this machine is left to jax."""
    monkeypatch.setattr(kept, "CACHE_BYTES", 0)
    monkeypatch.setattr(kept.LOG, "propagate", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "pasta_jax/xla" / kept.processor()
    for folder, given in ((default, None), (tmp_path / "named", str(tmp_path / "named"))):
        folder.mkdir(parents=True)
        (folder / "1-cache").write_text("1")
        assert asked_of_jax(monkeypatch, given) == str(folder)
        assert [*folder.iterdir()] == ([] if given is None else [folder / "1-cache"])
    assert asked_of_jax(monkeypatch, "gs://bucket/xla") == "gs://bucket/xla"
    monkeypatch.setattr(os, "getuid", lambda: default.stat().st_uid + 1)
    assert asked_of_jax(monkeypatch, None) is None
    assert caplog.messages[-1].endswith(f"{default} belongs to another user.")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user whom nobody knows
    assert asked_of_jax(monkeypatch, None) is None
    assert {path.name for path in tmp_path.iterdir()} == {"pasta_jax", "named"}


LOST = """
import signal, sys
from pasta_jax.verbs import set_unraisable_hook

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

set_unraisable_hook()
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
Freed()
try:
    signal.pause()
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_while_an_object_is_freed_is_heard_after_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("heard\n", "", 0)
