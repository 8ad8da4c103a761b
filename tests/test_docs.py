"""The documents agree with each other, with the code, and with what a run has written."""

import json
import pathlib
import re

import pytest

from tests.readme import refreshed

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


def test_the_table_of_the_readme_is_that_of_the_run() -> None:
    """docs/almanac-table.md is as `make almanac` wrote it; README.md shows its first table and the versions."""
    overview, families, *about = TEXTS["docs/almanac-table.md"].split("\n\n")
    shown = marked("README.md", "table")
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


@pytest.mark.skipif(not RUN[0].exists(), reason="docs has no run of the demo")
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


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


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


@pytest.mark.parametrize("page", TEXTS)
def test_prose_is_wrapped(page: str) -> None:
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL).splitlines()
    long = [line for line in prose if len(line) > 116 and not line.startswith("|") and " " in line.strip("`")]
    assert not [line for line in long if not re.fullmatch(r"`[^`]*`\S*.{0,40}", line)], page
    assert len(TEXTS["README.md"].splitlines()) <= 160, "the README is one page; the rest is in docs/"
