"""Says what this machine and this installation lack.

    python -m pasta_jax.doctor

Versions, devices and who holds them, memory, disk, the cache of compiled programs, tokens (never their values) and
extras: a line each, `ok`, `warning` or `problem`, with what to do. It reaches no network, and needs no jax. The
status is 1 if there is a problem, else 0.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pasta_jax import accelerators, kept
from pasta_jax.memory import GIB, gib, host_memory, host_size
from pasta_jax.processes.launchers import ProcessError, announced

PYTHONS = ((3, 11), (3, 14))
"""From the first on, and before the second."""

LITTLE_DISK, LITTLE_MEMORY = 5 * GIB, 4 * GIB
"""Less is a warning: a checkpoint, and `make almanac`, hardly fit."""

PROBE_S = 60.0
"""How long jax may take to name its devices."""

PROBE = """
import json, jax
found = jax.local_devices()
limits = [(device.memory_stats() or {}).get("bytes_limit") for device in found]
print(json.dumps({"backend": jax.default_backend(), "kind": found[0].device_kind, "limits": limits}))
"""

TOKENS = {
    "HF_TOKEN": "models and data sets of the Hugging Face hub that need a login",
    "OPENAI_API_KEY": "annotators and judges behind an endpoint",
    "WANDB_API_KEY": "Weights & Biases",
}
"""Environment variables, and what needs them."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do, and "" is nothing."""

    level: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text}" + (f"\n{'':8} {self.advice}" if self.advice else "")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that is needed, or that an extra has ("" is none), and its lowest version."""

    package: str
    least: str
    extra: str = ""

    @property
    def installed(self) -> str | None:
        """The version that is installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def is_old(self) -> bool:
        """Whether an installed version is too low."""
        return self.installed is not None and _numbers(self.installed) < _numbers(self.least)


def examine(root: str = "/", env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """All findings, each as soon as it is known.

    Args:
      root: the folder that has /sys, /dev and /proc; another one in tests.
      env: environment variables.
    """
    needed = requirements()
    yield python(sys.version_info[:3])
    yield from packages([each for each in needed if not each.extra])
    if Requirement("jax", "0").installed:
        yield from devices(*probe(env), root=root, env=env)
    yield from processes(root, env)
    yield memory(host_memory(root), host_size(root))
    yield from disk({"this folder": os.getcwd(), "temporary files": tempfile.gettempdir()})
    yield cache(env.get("JAX_COMPILATION_CACHE_DIR") or kept.users_folder())
    yield from tokens(env)
    yield from extras([each for each in needed if each.extra])


def python(version: Sequence[int]) -> Finding:
    """Whether this Python can be used."""
    name = f"Python {'.'.join(map(str, version))} on {platform.system()} {platform.machine()}, "
    name += f"{os.cpu_count()} cores"
    if not PYTHONS[0] <= tuple(version[:2]) < PYTHONS[1]:
        least, most = (f"{major}.{minor}" for major, minor in (PYTHONS[0], (3, PYTHONS[1][1] - 1)))
        return Finding(
            "problem", name, f"Use Python {least} to {most}: make PYTHON=python{most} test, for one."
        )
    if platform.system() not in ("Linux", "Darwin"):
        return Finding("problem", name, "Use Linux or macOS; on Windows, WSL.")
    return Finding("ok", name)


def packages(needed: Sequence[Requirement]) -> Iterator[Finding]:
    """Whether all that is needed is installed."""
    for each in needed:
        if each.installed is None or each.is_old:
            is_there = (
                f"{each.installed}, and pasta_jax needs {each.least} or later"
                if each.installed
                else "missing"
            )
            yield Finding(
                "problem", f"{each.package} is {is_there}", f'pip install "{each.package}>={each.least}"'
            )
    there = [Requirement("jaxlib", "0"), *needed]
    yield Finding("ok", "packages: " + ", ".join(f"{p.package} {p.installed}" for p in there if p.installed))


def devices(
    found: Mapping[str, Any] | None, fault: str, *, root: str = "/", env: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """What jax computes on, and whether there is something better.

    Args:
      found: backend, kind and limits, as `probe` returns them.
      fault: why jax named none, if it did not.
      root, env: as in `examine`.
    """
    chosen = env.get("JAX_PLATFORMS", "")
    backend = found["backend"] if found else None
    for name, count in (("tpu", accelerators.tpu_chips(root)), ("gpu", accelerators.gpus(root))):
        platforms = {"tpu": ("tpu",), "gpu": ("cuda", "gpu")}[name]
        if not count or backend == name:
            continue
        several = "s" * (count > 1)
        if chosen and not any(each in chosen for each in platforms):
            text = (
                f"JAX_PLATFORMS={chosen} keeps jax from the {count} {name.upper()}{several} of this machine"
            )
            yield Finding("warning", text, "If that is not meant: unset JAX_PLATFORMS.")
        elif name == "gpu":
            text = f"This machine has {count} NVIDIA GPU{several}, and jax uses none"
            yield Finding("problem", text, f'pip install "jax[cuda12]=={Requirement("jax", "0").installed}"')
        elif message := accelerators.unused_tpu(backend, fault, root):
            text, _, advice = message.partition(". ")
            yield Finding("problem", text, advice)
    if found is None:
        advice = "Match jax and jaxlib: pip install -r requirements.txt in a clone, or pip install -U jax."
        yield Finding("problem", f"jax names no device: {fault}", advice)
    else:
        sizes = sorted({gib(limit) for limit in found["limits"] if limit})
        each = f", {' or '.join(sizes)} GiB each" if sizes else ""
        yield Finding("ok", f"devices: {len(found['limits'])} x {found['kind']} ({backend}){each}")


def probe(env: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """What jax says of its devices, in a process of its own, which may crash or hang; or why it says nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env=dict(env), capture_output=True, text=True, timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        return None, (
            f"no answer in {PROBE_S:.0f} s. Of a slice with several hosts, all must run the command at once"
        )
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1]), ""
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
    return None, (said or [f"it ended with status {done.returncode}"])[-1][:300].rstrip(".")


def processes(root: str, env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a launcher says that this is one of several processes."""
    if not accelerators.tpu_chips(root):
        env = {**env, "JAX_PLATFORMS": "cpu"}  # nobody is asked about a slice
    try:
        group = announced(env, address="none:0")
    except ProcessError as error:
        yield Finding("problem", "The launcher's processes cannot meet", str(error))
        return
    if group:
        yield Finding("ok", f"process {group.index} of {group.count}. {group.advice}")


def memory(free: int | None, size: int | None) -> Finding:
    """Whether there is memory to speak of; sizes in bytes, None is unknown."""
    if free is None or size is None:
        return Finding("ok", "memory: unknown on this system")
    text = f"memory: {gib(free)} of {gib(size)} GiB are free"
    if free < LITTLE_MEMORY:
        return Finding("warning", text, f"make almanac takes {gib(LITTLE_MEMORY)} GiB. End other programs.")
    return Finding("ok", text)


def disk(folders: Mapping[str, str]) -> Iterator[Finding]:
    """Whether there is room in folders, and whether they can be written."""
    for name, folder in folders.items():
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding(
                "problem", f"disk: {name} ({folder}): {error.strerror}", "Run it in another folder."
            )
            continue
        text = f"disk: {gib(free)} GiB are free for {name} ({folder})"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(
                "warning", f"{text}, which cannot be written", "Give --workdir a folder of your own."
            )
        elif free < LITTLE_DISK:
            yield Finding(
                "warning", text, "Make room: a full disk ends a training. --workdir may be elsewhere."
            )
        else:
            yield Finding("ok", text)


def cache(folder: str) -> Finding:
    """Whether programs that are compiled now will be there for the next start."""
    if not folder:
        return Finding("warning", "compiled programs: no home folder keeps them", "Set XDG_CACHE_HOME.")
    if not kept.is_local(folder):
        return Finding("ok", f"compiled programs: {folder}")
    there = Path(folder)
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "Each start compiles anew. Name another folder: --compilation_cache=FOLDER."
        return Finding("warning", f"compiled programs: {folder} cannot be written", advice)
    sizes = []
    for entry in os.scandir(folder) if there == Path(folder) else ():
        with contextlib.suppress(OSError):  # another process removed it
            sizes.append(entry.stat().st_size)
    return Finding("ok", f"compiled programs: {gib(sum(sizes))} GiB in {folder}")


def tokens(env: Mapping[str, str]) -> Iterator[Finding]:
    """Which tokens there are; nothing of their values is shown."""
    values = {name: env.get(name, "") for name in TOKENS}
    for name, value in values.items():
        if value != value.strip():
            advice = f"Set it again, as in export {name}=$(cat FILE)."
            yield Finding("warning", f"{name} has white space around it, which servers refuse", advice)
    home = env.get("HF_HOME") or os.path.join(env.get("HOME", ""), ".cache/huggingface")
    logged_in = not values["HF_TOKEN"] and os.path.isfile(os.path.join(home, "token"))
    states = {name: "set" if value else "not set" for name, value in values.items()}
    if logged_in:
        states["HF_TOKEN"] = "not set, but hf auth login has left one"
    yield Finding("ok", "tokens: " + "; ".join(f"{name} ({TOKENS[name]}) {states[name]}" for name in TOKENS))


def extras(offered: Sequence[Requirement]) -> Iterator[Finding]:
    """Which extras are complete; those for a kind of device belong to `devices`."""
    names = dict.fromkeys(each.extra for each in offered if each.extra not in ("tpu", "cuda"))
    lacking = {each.extra for each in offered if each.installed is None}
    for each in offered:
        if each.is_old:
            text = f"{each.package} {each.installed} is too old for the extra [{each.extra}]"
            yield Finding("warning", text, f'pip install "{each.package}>={each.least}"')
    there = ", ".join(name for name in names if name not in lacking) or "none"
    missing = ", ".join(name for name in names if name in lacking)
    more = f'; not installed: {missing}. To add one, in a clone: pip install -e ".[NAME]"' if missing else ""
    yield Finding("ok", f"extras: {there}{more}")


def requirements() -> list[Requirement]:
    """What setup.py declares: of the clone that runs, or as it was installed."""
    pairs: list[tuple[str, str]] = []
    setup = Path(__file__).parents[1] / "setup.py"
    if setup.is_file():
        calls = (
            each
            for each in ast.walk(ast.parse(setup.read_text(encoding="utf-8")))
            if isinstance(each, ast.Call)
        )
        [call] = [each for each in calls if getattr(each.func, "id", "") == "setup"]
        given = {word.arg: word.value for word in call.keywords}
        pairs += [("", line) for line in ast.literal_eval(given["install_requires"])]
        extra = ast.literal_eval(given["extras_require"])
        pairs += [(name, line) for name, lines in extra.items() for line in lines]
    else:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for line in importlib.metadata.requires("pasta_jax") or ():
                of = re.search(r"extra == ['\"]([\w-]+)", line)
                pairs.append((of[1] if of else "", line))
    found = ((name, re.match(r"([\w-]+)(?:\[[\w,]+\])?[>=]=([\w.]+)", line)) for name, line in pairs)
    return [Requirement(match[1], match[2], name) for name, match in found if match]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "0.12.0.1rc2" is (0, 12, 0, 1)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def report(findings: Iterator[Finding]) -> int:
    """Prints the findings and how many ask for something. Returns the status: 1 if there is a problem."""
    counts = dict(problem=0, warning=0, ok=0)
    for finding in findings:
        counts[finding.level] += 1
        print(finding, flush=True)
    told = [
        f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count and level != "ok"
    ]
    print(f"{' and '.join(told)}." if told else "Everything is in order.")
    return int(counts["problem"] > 0)


def command() -> None:
    """Runs the command; where a package is missing that all commands need, without their flags."""
    try:
        from pasta_jax import verbs
    except ImportError:
        sys.exit(report(examine()))

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            verbs.refuse(
                f"Cannot make sense of {' '.join(argv[1:])!r}. Run python -m pasta_jax.doctor alone."
            )
        sys.exit(report(examine()))

    verbs.run_main(main)


if __name__ == "__main__":
    command()
