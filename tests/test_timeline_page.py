"""The timeline as a page, a figure and a chart of a notebook: true to the trace, and readable by all."""

from __future__ import annotations

import collections
import dataclasses
import html
import json
import math
import pathlib
import re
import warnings
from collections.abc import Sequence

import pytest

from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.timeline import COLOURS, FED, HELD, QUEUED, Timeline, check_path
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import critical_tokens
from tests.helpers.contrast import contrast
from tests.helpers.replayed import replayed

PROMPT = "Two rivers <b>, and </script> which is long?"
ANSWER = """Here: <promise topic="the Nile" tokens=2 /><async>The Nile flows north through dry countries .</async>
<promise topic="the Rhine" tokens=2 /><async>The Rhine rises in the Alps & ships use it .</async>
<promise topic="both" tokens=1 /><async>Both are old .</async><sync/>Both are long ."""
TOKENIZER = WordTokenizer(f"{PROMPT} {ANSWER} 2")


def decoded(answer: str = ANSWER, lanes: int = 8, stop: Sequence[str] = ()) -> DecodeResult:
    trace = replayed(answer, PROMPT, TOKENIZER, Limits(lanes=lanes))
    return result(TOKENIZER, trace, wall_s=0.5, stop=stop)


@pytest.fixture(scope="module")
def page() -> str:
    return decoded().timeline().html()


def test_it_agrees_with_the_trace() -> None:
    found = decoded()
    shown = found.timeline()
    assert (shown.steps, shown.critical_path) == (found.stats.decode_steps, found.stats.critical_path)
    assert shown.text_tokens == found.stats.text_tokens and shown.wall_s == 0.5
    assert "".join(token.text for token in shown.tokens) == found.text
    assert [line.name for line in shown.lines] == ["main", "1 the Nile", "2 the Rhine", "3 both"]
    assert [line.first for line in shown.lines[1:]] == [branch.start_step for branch in found.branches]
    assert [line.last for line in shown.lines[1:]] == [branch.end_step for branch in found.branches]
    assert any(run.what == HELD for run in shown.lines[0].runs), "main waits at the sync"


def test_the_answer_ends_at_a_stop_string() -> None:
    """What was decoded beyond is on the charts, and no part of the text."""
    whole, stopped = decoded(), decoded(stop=("dry",))
    shown = stopped.timeline()
    assert (
        "".join(token.text for token in shown.tokens) == stopped.text == "Here: The Nile flows north through "
    )
    assert shown.text_tokens == stopped.stats.text_tokens < whole.stats.text_tokens
    assert (shown.stop_reason, shown.steps) == ("stop", whole.stats.decode_steps)
    assert len(shown.tokens) == len(whole.timeline().tokens)


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_each_step_feeds_as_many_threads_as_it_has_lanes(lanes: int) -> None:
    shown = decoded(lanes=lanes).timeline()
    fed = collections.defaultdict[int, list[int]](list)
    for token in shown.tokens:
        if token.lane:
            fed[token.step].append(token.lane)
    assert {*fed} == {*range(1, shown.steps + 1)}
    assert all(sorted(each) == [*range(1, len(each) + 1)] for each in fed.values())
    assert max(map(len, fed.values())) == shown.lanes <= lanes
    for line in shown.lines:
        covered = [step for run in line.runs for step in range(run.first, run.last + 1)]
        assert covered == sorted({*covered}), "a thread does one thing in a step"
        steps = {token.step for token in shown.tokens if token.thread == line.id and token.lane}
        assert steps == {s for run in line.runs if run.what == FED for s in range(run.first, run.last + 1)}
    assert any(run.what == QUEUED for line in shown.lines for run in line.runs) == (lanes < 4)


def test_the_critical_tokens_are_as_many_steps_as_the_critical_path() -> None:
    """With a lane for each thread they are fed one a step, but `<async>` with its promise."""
    for answer in (ANSWER, "Nothing here .", ANSWER.replace("<sync/>", "")):
        shown = decoded(answer).timeline()
        path = [token for token in shown.tokens if token.critical and token.lane]
        assert sorted({token.step for token in path}) == [*range(1, shown.critical_path + 1)]
        threads = decoded(answer).trace.threads
        chain = critical_tokens(threads, TOKENIZER.vocabulary)
        assert chain[0] == (0, 0) and len({*chain}) == len(chain)


def test_an_answer_that_a_limit_cut_off_is_shown_as_far_as_it_is() -> None:
    whole = decoded()
    cut = dataclasses.replace(whole.trace, step=whole.trace.step.copy())
    cut.step[-4:] = -1
    shown = Timeline.of(cut, TOKENIZER.vocabulary)
    unfed = [token for token in shown.tokens if token.lane == 0]
    assert len(unfed) == 4
    drawn = re.findall(r'<i class="c\d" data-i="(\d+)"', shown.html())
    assert len(drawn) == len(shown.tokens) - 4, "the pool has none that was never fed"
    assert not {str(token.entry) for token in unfed} & {*drawn}


def test_the_page_has_the_title_that_it_is_given() -> None:
    """A prompt may begin with what the model's makers say to it, which is the same in all."""
    named = dataclasses.replace(decoded().timeline(), title="Four tips & more")
    assert "<title>Four tips &amp; more" in named.html() and html.escape(PROMPT) in named.html()


def test_the_page_loads_nothing_and_says_nothing_that_is_not_escaped(page: str) -> None:
    assert not re.search(r"""(?:src|href|url|import|fetch)\s*[=(]\s*["']?(?:https?:)?//""", page)
    assert page.count("<script") == page.count("</script>") and "<b>, and" not in page
    assert html.escape(PROMPT) in page and "{{" not in page


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_the_page_reads_any_log_probability(logprob: float) -> None:
    """JSON of browsers has neither infinity nor NaN."""
    first, *others = decoded().timeline().tokens
    shown = dataclasses.replace(decoded().timeline(), tokens=(first._replace(logprob=logprob), *others))
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', shown.html())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(data, parse_constant=refuse)["tokens"][0][5] is None


def test_the_page_can_be_read_without_colours_and_with_a_keyboard(page: str) -> None:
    assert '<html lang="en">' in page and "prefers-color-scheme: dark" in page and ":focus-visible" in page
    controls = re.findall(r"<(?:input|select)[^>]*>", page)
    labelled = re.findall(r"<label[^>]*>.*?</label>", page, re.DOTALL)
    assert controls and all(any(each in label for label in labelled) for each in controls)
    assert '<th scope="row">' in page, "the chart is a table too"
    outputs = re.findall("<output[^>]*>", page)
    assert outputs and all('aria-live="off"' in each for each in outputs), "the slider says it already"


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_on_light_and_dark(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 3 and contrast(colour, "#000000") >= 6


def test_files(tmp_path: pathlib.Path) -> None:
    shown = decoded().timeline()
    shown.save(tmp_path / "t.html")
    assert (tmp_path / "t.html").read_text(encoding="utf-8") == shown.html()
    shown.save(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    main, branch, *_ = shown.lines
    priced = dataclasses.replace(shown, lines=(main, dataclasses.replace(branch, topic="$1_2_3$")), tokens=())
    priced.save(tmp_path / "priced.png")  # no formula
    japanese = dataclasses.replace(
        shown, lines=(main, dataclasses.replace(branch, topic="川と山")), tokens=()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        japanese.save(tmp_path / "japanese.png")
    with pytest.raises(ValueError, match=r"t\.svg: a timeline is a page or a figure\. Give a name that ends"):
        check_path("t.svg")


def test_in_a_notebook() -> None:
    found = decoded()
    chart = found._repr_html_()
    assert html.escape(found.text) in chart and "<script" not in chart
    for line in found.timeline().lines:
        assert html.escape(line.name) in chart
