"""The documents agree with each other, with the code, and with what a run has written."""

import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

import pasta_jax
from tests.helpers.given import fault_of, lines_of
from tests.readme import refreshed

yaml: Any = importlib.import_module("yaml")  # flax and orbax bring it; it has no types

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in `text`, rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|:- ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def marked(page: str, name: str) -> str:
    """What stands between the markers that say: made by this command."""
    [part] = re.findall(rf"<!-- almanac: {name} -->\n(.*?)<!-- /almanac: {name} -->", TEXTS[page], re.DOTALL)
    return part


def test_the_table_of_almanac_is_that_of_the_run() -> None:
    """almanac-table.md is as `make almanac` wrote it; almanac.md shows its first table and the versions."""
    overview, families, *about = TEXTS["docs/almanac-table.md"].split("\n\n")
    shown = marked("docs/almanac.md", "table")
    assert rows(shown) == rows(overview)
    names, *models = rows(overview)
    overall = {
        row[0]: dict(zip(rows(families)[0], row, strict=True))
        for row in rows(families)
        if row[1] == "overall"
    }
    for row in models[1:]:
        assert dict(zip(names, row, strict=True)) == {name: overall[row[0]][name] for name in names}
    facts = dict(re.findall(r"^- (.*?): (.*)$", about[-1], re.MULTILINE))
    python, jax = (re.search(rf"{name} (\d+\.\d+)", facts["versions"]) for name in ("python", "jax"))
    assert python and f"Python {python[1]}" in shown
    assert jax and f"jax {jax[1]}" in shown


RUN = [ROOT / "docs" / name for name in ("demo-table.md", "demo-answers.jsonl")]


def test_the_readme_is_that_of_the_run_of_the_demo() -> None:
    table, answers = (file.read_text(encoding="utf-8") for file in RUN)
    assert refreshed(TEXTS["README.md"], table, answers) == TEXTS["README.md"], "run `make readme`"


def test_the_readme_is_refreshed_between_its_markers() -> None:
    page = "".join(
        f"{n}\n<!-- demo: {n} -->\nold\n<!-- /demo: {n} -->\n" for n in ("answer", "table", "answers")
    )
    facts = "- date: today\n- hardware: 2 cores; jax\n- versions: python 3.11.7, jax 1.2\n"
    table = f"| prompt |\n|:---|\n| A? |\n\nLegend.\n\n{facts}"
    said = {"annotated": "one<async>", "text": "- a | b\n- c\n"}
    asked = ({"prompt": prompt, "parallel": said, "chart": "main █"} for prompt in ("A?", "B?"))
    answers = "".join(json.dumps(answer) + "\n" for answer in asked)
    assert refreshed(page, table, answers) == (
        "answer\n<!-- demo: answer -->\n```\n> A?\n\none<async>\n\nmain █\n```\n<!-- /demo: answer -->\n"
        "table\n<!-- demo: table -->\n| prompt |\n|:---|\n| A? |\n\nMeasured on 2 cores, python 3.11.7, jax 1.2, "
        "today.\n<!-- /demo: table -->\nanswers\n<!-- demo: answers -->\n| prompt | answer |\n"
        "|:---|:---|\n| B? | - a \\| b<br>- c |\n<!-- /demo: answers -->\n"
    )
    with pytest.raises(ValueError, match="no lines <!-- demo: answers -->"):
        refreshed(page.partition("answers\n")[0], table, answers)


def headings(page: str) -> list[str]:
    """The titles of a page's sections, without marks of code."""
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return [title.replace("`", "") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    """To a file, and to a section of it where an anchor or the words after the link name one."""
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        there = (ROOT / page).parent / link if link else ROOT / page
        assert there.exists(), f"{page}: {link}"
        if anchor:
            titles = headings(there.resolve().relative_to(ROOT).as_posix())
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page}: {link}#{anchor}"
    for link, title in re.findall(r'\]\(([\w/.-]+\.md)\),\s"([^"]+)"', TEXTS[page]):
        there = ((ROOT / page).parent / link).resolve()
        assert " ".join(title.split()) in headings(there.relative_to(ROOT).as_posix()), (
            f"{page}: {link}, {title}"
        )


@pytest.mark.parametrize("page", TEXTS)
def test_commands_can_be_given(page: str) -> None:
    """Every one that a page shows: modules, flags, fields, files are there. tests/test_readme.py runs many."""
    faults = {line: fault for line in lines_of(TEXTS[page]) if (fault := fault_of(line))}
    assert not faults, page


@pytest.mark.parametrize(
    "line",
    [
        "python -m pasta_jax.trian --config=configs/tiny.py",
        "python -m pasta_jax --lnaes=2",
        "env A=b python -m pasta_jax.train --config.learning_rate=1",
        "launch/tpu_run.sh my-tpu us-west4-a -- python -m pasta_jax.train --config=configs/tiny.py:no",
        "make almanach",
        'pip install -e ".[plto]"',
        "pip install -r requirement.txt",
    ],
)
def test_commands_that_could_not_be_given_are_found(line: str) -> None:
    assert fault_of(line), line


def test_what_the_code_cites_exists() -> None:
    """Sections and laws of docs/design.md are headings and a list; decisions are the list of section 4."""
    design = TEXTS["docs/design.md"]
    sections = {int(number) for number in re.findall(r"^## (\d+)\.", design, re.MULTILINE)}
    assert sections == set(range(1, 14))
    for number, least in ((4, 14), (12, 11)):
        part = design.split(f"\n## {number}.")[1].split("\n## ")[0]
        items = [int(number) for number in re.findall(r"^(\d+)\. \*\*", part, re.MULTILINE)]
        assert items == list(range(1, least + 1))
    for file in [*(ROOT / "pasta_jax").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        cited = re.findall(r"docs/(\w[\w-]*\.md)", source)
        assert all(f"docs/{name}" in TEXTS for name in cited), f"{file.name} cites {cited}"
        for kind, number in re.findall(r"docs/design\.md,? (section|decision)s? (\d+)", source):
            assert int(number) <= {"section": 13, "decision": 10}[kind], f"{file.name}: {kind} {number}"


def site() -> tuple[Any, dict[str, str]]:
    """docs/hooks.py, and all pages of the site by name."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec and spec.loader
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    own = {page.removeprefix("docs/"): text for page, text in TEXTS.items() if page.startswith("docs/")}
    return hooks, own | hooks.made_pages()


def named(nav: Any) -> list[str]:
    """The pages of a part of the site's navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in named(part)]


def test_the_site_has_every_page_once_and_no_link_out_of_it() -> None:
    hooks, pages = site()
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named(settings["nav"])) == sorted(pages), "mkdocs.yml, nav: each page of docs/ once"
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", hooks.inside(text, set(pages), None)):
            assert link in pages or link.startswith("http"), f"{page}: {link}"
    url = "https://host/owner/name"
    assert (
        hooks.inside("[a `b`](../configs/tiny.py)", set(), url) == f"[a `b`]({url}/blob/main/configs/tiny.py)"
    )
    assert (
        hooks.inside("[a](../README.md#x), [b](usage.md)", {"usage.md"}, None)
        == "[a](index.md#x), [b](usage.md)"
    )


def test_badges_open_the_notebooks() -> None:
    """Each in README.md and docs/notebooks.md, and in the notebook itself, at one address; the site has words."""
    notebooks = [file.name for file in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    address = (
        r"https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/notebooks/(\w+\.ipynb)\)"
    )
    shown = {page: re.findall(address, TEXTS[page]) for page in ("README.md", "docs/notebooks.md")}
    assert all([name for _, name in badges] == notebooks for badges in shown.values())
    texts = [(ROOT / "notebooks" / name).read_text(encoding="utf-8") for name in notebooks]
    own = [re.findall(address, text) for text in texts]
    assert [[name for _, name in badges] for badges in own] == [[name] for name in notebooks]
    repositories = {repository for badges in [*shown.values(), *own] for repository, _ in badges}
    repositories |= {name for text in texts for name in re.findall(r"github\.com/([\w-]+/[\w-]+)", text)}
    assert len(repositories) == 1
    hooks, pages = site()
    for page in ("index.md", "notebooks.md"):
        assert "![" not in hooks.inside(pages[page], set(pages), None), (
            f"{page} loads an image of another host"
        )


def test_the_glossary_and_the_reference_have_everything() -> None:
    _, pages = site()
    terms = rows(TEXTS["docs/design.md"].split("\n## 2.")[1].split("\n## ")[0])
    assert rows(pages["glossary.md"]) == [terms[0], *sorted(terms[1:], key=lambda row: row[0].lower())]
    names = [name for name in pasta_jax.__all__ if name != "__version__"]
    shown = re.findall(r"^::: (pasta_jax\.[\w.]+)$", pages["reference.md"], re.MULTILINE)
    assert [name.rpartition(".")[2] for name in shown] == names
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), f"{name} has no docstring"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs`")
def test_the_site_is_built(tmp_path: pathlib.Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pj.decode" in (tmp_path / "reference/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", TEXTS)
def test_prose_is_wrapped(page: str) -> None:
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL).splitlines()
    long = [line for line in prose if len(line) > 116 and not line.startswith("|") and " " in line.strip("`")]
    assert not [line for line in long if not re.fullmatch(r"`[^`]*`\S*.{0,40}", line)], page
    assert len(TEXTS["README.md"].splitlines()) <= 160, "the README is one page; the rest is in docs/"
