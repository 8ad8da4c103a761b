"""What the site of docs/ has besides its pages, for `mkdocs.yml`: other files are its home, glossary and reference.

Everything is read from the sources, so nothing is said twice.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
"""An image of another host, of which the site shows the words alone."""

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
"""A link of Markdown: its text, its target, and its anchor."""


def made_pages() -> dict[str, str]:
    """Pages that are no files of docs/, by name."""
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    package = (ROOT / "pasta_jax/__init__.py").read_text(encoding="utf-8")
    return {
        "index.md": moved((ROOT / "README.md").read_text(encoding="utf-8"), "", "docs"),
        "glossary.md": glossary(design),
        "reference.md": reference(package),
        "contributing.md": moved((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "", "docs"),
        "changelog.md": moved((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), "", "docs"),
    }


def glossary(design: str) -> str:
    """The terms of docs/design.md, section 2, from A to Z."""
    table = design.split("\n## 2. Terms\n")[1].split("\n## ")[0]
    head, rule, *terms = [line for line in table.splitlines() if line.startswith("|")]
    text = "\n".join([head, rule, *sorted(terms, key=lambda line: line.strip("| ").lower())])
    return f"# Glossary\n\nThe terms of [design.md](design.md), section 2, from A to Z.\n\n{text}\n"


def reference(package: str) -> str:
    """A page of the public names, by their docstrings.

    Args:
      package: the source of pasta_jax/__init__.py, whose `_HOMES` says in which module each name is.
    """
    assigned = {
        target.id: node.value
        for node in ast.parse(package).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    homes = ast.literal_eval(assigned["_HOMES"])
    names = "\n\n".join(f"::: {home}.{name}" for name, home in homes.items())
    return (
        "# Reference\n\nThe public names of `import pasta_jax as pj`: `pj.decode`, `pj.load` and so on. Commands "
        f"describe themselves: `python -m pasta_jax.train --help`.\n\n{names}\n"
    )


def moved(text: str, source: str, target: str) -> str:
    """A page whose relative links lead to the same files from another folder."""

    def link(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        if "://" in path:
            return match[0]
        there = posixpath.relpath(posixpath.normpath(posixpath.join(source, path)), target)
        return f"[{words}]({there}{anchor})"

    return LINK.sub(link, text)


def inside(text: str, pages: set[str], repo_url: str | None) -> str:
    """A page whose links to files that are not on the site lead into the repository; without its address, nowhere.

    Args:
      text: of a page in docs/.
      pages: the names of all pages.
      repo_url: of the repository.
    """
    also = {
        "../README.md": "index.md",
        "../CONTRIBUTING.md": "contributing.md",
        "../CHANGELOG.md": "changelog.md",
    }

    def link(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        if "://" in path or path in pages:
            return match[0]
        if path in also:
            return f"[{words}]({also[path]}{anchor})"
        if repo_url:
            where = posixpath.normpath(posixpath.join("docs", path))
            return f"[{words}]({repo_url.rstrip('/')}/blob/main/{where}{anchor})"
        return words

    return LINK.sub(link, IMAGE.sub(r"\1", text))


# ---------------------------------------------------------------------------------------- called by mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Has links lead to pages of the site."""
    pages = {file.src_uri for file in files.documentation_pages()}
    return inside(markdown, pages, config.repo_url)
