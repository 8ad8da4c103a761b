"""Executes the notebooks in Jupyter and keeps what they show: `make notebooks`, or `python -m tests.notebooks`.

In a fresh folder, so that nothing is there already, and as on a machine without an accelerator. What they show of
this machine's folders is left out; tests/test_notebooks.py says what else is asked of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(notebook: pathlib.Path) -> Any:
    return json.loads(notebook.read_text(encoding="utf-8"))


def code_cells(tree: Any) -> list[Any]:
    return [cell for cell in tree["cells"] if cell["cell_type"] == "code"]


def source_of(cell: Any) -> str:
    return "".join(cell["source"])


def digest(tree: Any) -> str:
    """Of all code, which outputs are made by."""
    return hashlib.sha256("\n\n".join(map(source_of, code_cells(tree))).encode()).hexdigest()


def executed(tree: Any, folder: pathlib.Path) -> Any:
    """The notebook with its outputs.

    Args:
      tree: of the notebook.
      folder: in which it runs.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(tree), as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    made = json.loads(nbformat.writes(notebook))
    for cell in code_cells(made):
        cell["outputs"] = [_without_folders(output, folder) for output in cell["outputs"]]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {
        "kernelspec": kernel,
        "language_info": {"name": "python"},
        "pasta_jax": {"made_by": digest(made)},
    }
    return made | {"metadata": about}


def _without_folders(output: Any, folder: pathlib.Path) -> Any:
    """An output without names of folders of this machine, and without colours."""
    text = json.dumps(output)
    for path, name in {str(folder): ".", str(ROOT): ".", tempfile.gettempdir(): "/tmp"}.items():
        text = text.replace(path, name)
    text = text.replace(os.path.expanduser("~/"), "~/")
    return json.loads(re.sub(r"\\u001b\[[\d;]*m", "", text))


def main(names: list[str]) -> None:
    """Executes those that are named, or all, in order: later ones find the models of earlier ones."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "PASTA_TINY": "1", "PYTHONPATH": str(ROOT)}
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("configs", "notebooks"):
            (folder / part).symlink_to(ROOT / part)
        for notebook in NOTEBOOKS:
            if names and notebook.stem not in names:
                continue
            made = executed(read(notebook), folder)
            text = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True)
            notebook.write_text(f"{text}\n", encoding="utf-8")
            print(f"{notebook.name}: {notebook.stat().st_size // 1024} KiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
