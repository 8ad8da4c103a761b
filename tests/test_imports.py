"""Law 11: imports point one way, light things stay light, and every configuration loads."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

from pasta_jax.config import Config
from pasta_jax.overrides import load_config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pasta_jax"

LEVELS = [
    {"lang", "arrays", "files", "messages", "rounding", "extras", "memory", "intervals"},
    {
        "fields",
        "foreign",
        "gguf",
        "visibility",
        "sharding",
        "baselines",
        "figures",
        "kept",
        "chips",
        "accelerators",
        "processes",
        "endpoint",
    },
    {"tokens", "model", "verbs"},
    {"config"},
    {"decoding", "data", "overrides", "testing"},
    {"checkpoints", "terminal"},
    {"training", "experiment", "interchange", "live"},
    {"loading"},
    {"judges"},
    {"preference"},
    {"annotate"},
    {
        "train",
        "convert",
        "answer",
        "tokenizer",
        "prepare",
        "evaluate",
        "benchmark",
        "compile",
        "doctor",
        "serve",
        "simulate",
        "adapters",
    },
    {"almanac", "demo", "real_model", "reproduce"},
    {"__init__"},
    {"__main__", "console"},
]
"""The architecture, bottom first. A part imports parts of lower levels only: those of one level do not know each
other. docs/design.md section 3 has the same list."""


def level(part: str) -> int:
    found = [i for i, parts in enumerate(LEVELS) if part in parts]
    assert len(found) == 1, f"{part} has no level, or several"
    return found[0]


@functools.cache
def imports(file: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, including those for the type checker only."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = {part_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: pathlib.Path) -> None:
    part = part_of(file)
    for name in imports(file):
        assert not name.startswith("pasta_jax.testing") or part == "benchmark", (
            "that is for tests and benchmarks"
        )
        other = name.split(".")[1] if name.startswith("pasta_jax.") else part
        other = other if other in PARTS else "__init__"  # `from pasta_jax import decode`
        assert other == part or level(other) < level(part), f"{part} may not import {name}"


def circle(files: dict[str, pathlib.Path]) -> list[str]:
    """Modules that import each other in a circle, if there are any; imports inside functions count."""

    def targets(name: str) -> set[str]:
        """The module that an imported name is, or is in."""
        return {name if name in files else name.rpartition(".")[0]} & files.keys()

    graph = {
        module: set().union(*map(targets, imports(file))) - {module, "pasta_jax"}
        for module, file in files.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_in_a_circle(tmp_path: pathlib.Path) -> None:
    def module(file: pathlib.Path) -> str:
        return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    assert circle({module(file): file for file in FILES}) == []
    for name, code in {"a": "from b import x", "b": "def f():\n    import c", "c": "from a import y"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    assert set(circle({name: tmp_path / f"{name}.py" for name in "abc"})) == set("abc")


def test_the_levels_are_those_of_the_design() -> None:
    """And every part of the package has its level."""
    section = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("\n## 3.")[1].split("\n## ")[0]
    items = re.findall(r"^\d+\. (.*?)(?=\n\d+\. |\n\n)", section, re.MULTILINE | re.DOTALL)
    assert [set(re.findall(r"`(\w+?)(?:/|\.py)`", item)) for item in items] == LEVELS
    assert set().union(*LEVELS) == PARTS


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
    """How long it takes is measured by `python -m pasta_jax.benchmark --what=startup`."""
    code = "import sys, pasta_jax; print({name for name in sys.modules if name.startswith('pasta_jax')})"
    assert in_a_fresh_python(code).strip() == "{'pasta_jax'}", "nothing is loaded before it is used"
    assert in_a_fresh_python(f"import sys, pasta_jax; print({HEAVY} or 'light')").strip() == "light"


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
