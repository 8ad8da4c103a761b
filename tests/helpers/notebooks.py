"""Notebooks without Jupyter: their cells, and a plain execution of them in one namespace.

Of IPython the cells use lines that start with `!` or `%`, with `{...}` in them, and of its display Image and
Markdown. Everything else is Python.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

from tests.notebooks import code_cells, read, source_of

_ESCAPE = re.compile(r"^( *)([!%])((?:.*\\\n)*.*)$", re.MULTILINE)
"""A line for the shell or IPython, with those that it goes on in."""


def escapes(source: str) -> list[str]:
    """The lines for the shell or IPython, each on one line, with its `!` or `%`."""
    found = _ESCAPE.findall(source)
    return [kind + re.sub(r"\\\n\s*", "", line) for _, kind, line in found]


def as_python(source: str) -> str:
    """A cell as Python: what is for the shell or IPython becomes a call of `escape`."""

    def call(match: re.Match[str]) -> str:
        return f"{match[1]}escape({match[2] + match[3]!r})"

    return _ESCAPE.sub(call, source)


def execute(path: str) -> None:
    """Executes the cells in this folder, as IPython would; prints what each took, and what it showed.

    Raises:
      CalledProcessError: a command failed, which IPython would only show.
      Exception: that of a cell.
    """
    import time

    def escape(line: str) -> None:
        assert line.startswith("!"), (
            f"{line}: of IPython's own commands only the first cell has one, for Colab"
        )
        command = re.sub(r"\{([^{}]+)\}", lambda match: str(eval(match[1], names)), line[1:])
        subprocess.run(command, shell=True, check=True)

    names: dict[str, Any] = {"__name__": "__main__", "escape": escape}
    parent: Any = types.ModuleType("IPython")
    parent.get_ipython, parent.version_info = (lambda: None), (9, 0)  # matplotlib asks
    sys.modules |= {"IPython": parent, "IPython.display": _display()}
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number, cell in enumerate(code_cells(read(pathlib.Path(path))), start=1):
        started = time.monotonic()
        tree = ast.parse(as_python(source_of(cell)))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"<cell {number}>", "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
            for form in ("_repr_html_", "_repr_png_", "_repr_markdown_"):
                if hasattr(shown, form):
                    getattr(shown, form)()
        print(f"cell {number}: {time.monotonic() - started:.1f} s", flush=True)


def _display() -> types.ModuleType:
    """What stands in for IPython.display: it reads what it is given."""
    module: Any = types.ModuleType("IPython.display")
    module.Markdown = str
    module.Image = lambda path, width=0: pathlib.Path(path).read_bytes()
    return module
