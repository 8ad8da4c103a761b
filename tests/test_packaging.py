"""What a stranger gets: bounds that are tested, extras that are read, files that are shipped."""

import ast
import importlib
import pathlib
import re
from typing import Any

import pytest

import pasta_jax
from pasta_jax.extras import optional
from pasta_jax.model import kernels

ROOT = pathlib.Path(__file__).parents[1]
yaml: Any = importlib.import_module("yaml")  # flax and orbax bring it; it has no types


def setup_arguments() -> dict:
    """What the tests need of the arguments of `setup(...)`, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    names = ("version", "license", "license_files", "install_requires", "extras_require")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in names}


def pins(file: str, separator: str) -> dict[str, str]:
    """Versions by package name, of lines such as `etils[epath]>=1.9`."""
    lines = file.splitlines()
    found = (re.match(rf"([\w-]+)(?:\[\w+\])?{separator}([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


SETUP = setup_arguments()


def test_floors_are_the_lower_bounds_of_setup() -> None:
    extras = [
        line
        for name, lines in SETUP["extras_require"].items()
        if name not in ("tpu", "cuda", "kernels")
        for line in lines
    ]
    bounds = pins("\n".join([*SETUP["install_requires"], *extras]), ">=")
    assert len(bounds) >= len({*SETUP["install_requires"], *extras}), "every package has a lower bound"
    assert pins((ROOT / "requirements-floors.txt").read_text(encoding="utf-8"), "==") == bounds


def test_the_kernels_are_those_that_were_tested() -> None:
    """Not a lower bound: they are inner functions of tokamax, which may change with each version."""
    assert SETUP["extras_require"]["kernels"] == [f"tokamax=={kernels.TESTED}; python_version >= '3.12'"]


def test_every_requirement_has_a_tested_version() -> None:
    tested = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"), "==")
    assert set(pins("\n".join(SETUP["install_requires"]), ">=")) <= set(tested)


IMPORTED_AS = {"absl-py": "absl", "orbax-checkpoint": "orbax", "protobuf": "sentencepiece_model_pb2"}
"""Packages whose modules have another name. sentencepiece's protocol buffers need protobuf."""


@pytest.mark.parametrize("package", sorted(pins("\n".join(SETUP["install_requires"]), ">=")))
def test_every_requirement_is_imported(package: str) -> None:
    name = IMPORTED_AS.get(package, package)
    sources = (file.read_text(encoding="utf-8") for file in (ROOT / "pasta_jax").rglob("*.py"))
    assert any(re.search(rf"(import|from) {name}\b", source) for source in sources), f"nothing imports {name}"


def test_versions_and_licence_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == SETUP["version"] == pasta_jax.__version__
    assert citation["license"] == SETUP["license"] == "Apache-2.0"
    assert SETUP["license_files"] == ["LICENSE"]
    assert (ROOT / "pasta_jax/py.typed").read_bytes() == b"", "type checkers look for it"


def test_continuous_integration_names_what_exists() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {entry["python"] for entry in matrix} == {"3.11", "3.12", "3.13"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(
        r"(?m)(?:^|`)make ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"CONTRIBUTING.md: make {target}"


def test_a_package_that_does_not_work_is_not_called_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    cause = "^A figure needs broken_package, whose import fails: No module named 'no_such_part'$"
    with pytest.raises(ImportError, match=cause):
        optional("broken_package", "plot", "A figure")
    with pytest.raises(ImportError, match="^A figure needs no_such_part: pip install no_such_part, or in"):
        optional("no_such_part.inner", "plot", "A figure")
