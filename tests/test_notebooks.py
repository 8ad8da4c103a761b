"""Law 11: the notebooks run from top to bottom, and what they show is made by the cells that they have."""

from __future__ import annotations

import ast
import base64
import importlib.util
import os
import pathlib
import re
from typing import Any

import pytest

import pasta_jax
from tests.helpers.commands import ROOT, python
from tests.helpers.given import fault_of
from tests.helpers.notebooks import as_python, escapes
from tests.notebooks import NOTEBOOKS, code_cells, digest, read, source_of

STARTS = {"01_decode", "02_annotate_and_sft", "03_preference", "04_evaluate"}
ELSEWHERE = {"IPython", "google", "planets"}
"""What notebooks import that the tests' environment has not: of Jupyter, of Colab, and beside them."""


def executed(notebook: pathlib.Path) -> Any:
    """The notebook, if it has outputs; skips the test if it has none, for then nobody has seen it run."""
    tree = read(notebook)
    if not any(cell["outputs"] for cell in code_cells(tree)):
        pytest.skip("it was not executed yet: run `make notebooks`")
    return tree


each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four() -> None:
    assert {notebook.stem for notebook in NOTEBOOKS} == STARTS


@each_notebook
def test_it_is_made_by_its_cells(notebook: pathlib.Path) -> None:
    """Executed once, in order, without an error; `make notebooks` does that, and notes the code."""
    tree = executed(notebook)
    assert tree["metadata"]["pasta_jax"]["made_by"] == digest(tree), "run `make notebooks`"
    cells = code_cells(tree)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    shown = [
        text
        for output in outputs
        for text in (*output.get("text", []), *map(str, output.get("data", {}).values()))
    ]
    assert not re.search(r"/(work|home|root|Users|tmp/\w)|Traceback", "\n".join(shown))
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert figures, "it shows nothing"
    assert all(len(base64.b64decode(figure)) < 100_000 for figure in figures)


@each_notebook
def test_its_code_could_run(notebook: pathlib.Path) -> None:
    """It is Python; what it imports, and the commands and flags that it gives, are there."""
    for cell in code_cells(read(notebook)):
        tree = ast.parse(as_python(source_of(cell)))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in ELSEWHERE or importlib.util.find_spec(name), name
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pj":
                assert node.attr in pasta_jax.__all__
            if isinstance(node, ast.Constant) and str(node.value).startswith(("python -m", "--")):
                command = str(node.value)
                whole = command if command.startswith("python") else f"python -m pasta_jax.train {command}"
                assert not fault_of(whole), command
        for line in escapes(source_of(cell)):
            assert not fault_of(line[1:]), line


def test_the_first_cell_leaves_jax_alone() -> None:
    """It is the same in all; what it installs is the package, with the versions of jax that are there."""
    first = {source_of(code_cells(read(notebook))[0]) for notebook in NOTEBOOKS}
    assert len(first) == 1
    installs = [line for line in escapes(first.pop()) if "install" in line]
    assert installs == ['!pip install --quiet --constraint=held.txt ".[plot,tfds]"']
    others = [
        line
        for notebook in NOTEBOOKS
        for cell in code_cells(read(notebook))[1:]
        for line in escapes(source_of(cell))
    ]
    assert not [line for line in others if "install" in line or line.startswith("%")]


@each_notebook
def test_no_key_is_in_a_cell(notebook: pathlib.Path) -> None:
    assert not re.search(r"\bsk-\w|api_key *=", notebook.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif("PASTA_NOTEBOOKS" not in os.environ, reason="takes minutes: PASTA_NOTEBOOKS=1 runs them")
def test_they_run(tmp_path: pathlib.Path) -> None:
    """One after the other, as for a reader: what the first ones train, the later ones use."""
    for part in ("configs", "notebooks"):
        (tmp_path / part).symlink_to(ROOT / part)
    for notebook in NOTEBOOKS:
        executed(notebook)
        code = f"from tests.helpers.notebooks import execute; execute({str(notebook)!r})"
        # Programs are compiled as a reader's, not with the tests' haste: here they run for longer.
        env = {
            "PASTA_TINY": "1",
            "MPLBACKEND": "agg",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": None,
            "XLA_FLAGS": None,
        }
        done = python("-c", code, cwd=tmp_path, env=env, seconds=900, real=True)
        assert done.returncode == 0, f"{notebook.name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        took = re.findall(r"^cell \d+: .*$", done.stdout, re.MULTILINE)
        print(notebook.name, *took, sep="\n  ")  # with pytest -rP
