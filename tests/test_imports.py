"""Law 11: imports point one way, light things stay light, and every configuration loads."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

from pasta_jax.config import Config
from pasta_jax.overrides import load_config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pasta_jax"

LEVELS = [
    {"lang", "arrays", "visibility", "files", "fields", "rounding"},
    {"tokens", "model", "sharding", "baselines"},
    {"config", "overrides", "decoding", "data"},
    {"checkpoints", "interchange", "terminal", "figures"},
    {"training", "experiment", "loading", "testing"},
    {"preference"},
    {"evaluate", "benchmark", "compile", "verbs"},
]
"""Who may import whom: a part imports its own level and those above it in this list. What is not named is a
verb, or the package's own front: they may import everything, and nothing imports them."""

VERBS = len(LEVELS)

BELOW = {"checkpoints": {"interchange", "figures", "terminal"}, "training": {"loading", "testing"}}
"""On one level, and yet the first may not import the others, which are built on it."""

APART = {"decoding", "data"}
"""On one level, and yet neither may import the other: one needs no answers, the other no training text."""


def level(part: str) -> int:
    return next((i for i, parts in enumerate(LEVELS) if part in parts), VERBS)


def imports(file: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, those for the type checker only included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: pathlib.Path) -> None:
    mine = part_of(file)
    for name in imports(file):
        assert not name.startswith("pasta_jax.testing"), "that is for tests only"
        if name.startswith("pasta_jax.") and level(mine) < VERBS:
            theirs = name.split(".")[1]
            assert level(theirs) <= level(mine), f"{mine} may not import {name}"
            assert mine == theirs or not {mine, theirs} <= APART, f"{mine} may not import {name}"
            assert theirs not in BELOW.get(mine, ()), f"{mine} may not import {name}"


def test_the_order_is_that_of_the_design() -> None:
    """docs/design.md, section 3; and every part of the package has its place, so that none escapes as a verb."""
    order = [
        ("lang", "arrays", "visibility"),
        ("tokens", "model"),
        ("decoding", "data"),
        ("checkpoints",),
        ("training",),
        ("preference",),
    ]
    levels = [{level(part) for part in parts} for parts in order]
    assert levels == [{i} for i in range(6)]
    packages = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    assert packages - {"reproduce"} <= set().union(*LEVELS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_foreign_framework(file: pathlib.Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & {"torch", "tensorflow", "gemma", "transformers"}
    if part_of(file) in ("lang", "arrays", "visibility"):
        assert not roots & {"jax", "flax", "optax", "orbax"}


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "{'jax', 'flax', 'optax', 'torch', 'tensorflow'} & set(sys.modules)"


def test_importing_the_package_is_light() -> None:
    start = time.perf_counter()
    loaded = in_a_fresh_python(f"import sys, pasta_jax; print({HEAVY} or 'light')")
    assert loaded.strip() == "light"
    assert time.perf_counter() - start < 2, "import pasta_jax must take less than 2 s"


def test_the_language_loads_no_jax() -> None:
    modules = [f"pasta_jax.lang.{f.stem}" for f in (PACKAGE / "lang").glob("*.py") if f.stem != "__init__"]
    assert modules
    code = f"import sys, {', '.join(modules)}; print({HEAVY} or 'light')"
    assert in_a_fresh_python(code).strip() == "light"


CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_every_configuration_loads(file: pathlib.Path) -> None:
    assert isinstance(load_config(str(file)), Config)
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring and f"configs/{file.name}" in docstring, "its docstring holds the exact command"
