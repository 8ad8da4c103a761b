"""The page of the server, and that of a timeline, in a real browser: wide and light, narrow and dark."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.helpers.browser import CHROMIUM, Page, browser
from tests.helpers.served import MODEL, alone, asked, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

LOOKS = [(1200, False), (320, True)]

MANY_BRANCHES = """window.reach = window.fetch;
window.fetch = (url, options) => window.reach(url, options && options.body && options.body.includes('"parallel"')
  ? {...options, body: options.body.replace("{", '{"open_bias": 3.5, ')} : options)"""
"""The random model opens few by itself."""

NO_SEQUENTIAL = """window.before = window.fetch;
window.fetch = (url, options) => options && options.body && options.body.includes('"sequential"')
  ? Promise.reject(new TypeError("no network")) : window.before(url, options)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def close_together(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_the_page_of_the_server(page: Page) -> None:
    expected = alone("rivers", asked(0))
    assert len(expected.branches) > 1
    with served() as server:
        for width, dark in LOOKS:
            page.open(server.url, width=width, dark=dark)
            page.until(f"$('model').textContent == '{MODEL}'")
            page.js(MANY_BRANCHES)
            for field, value in {
                "prompt": "rivers",
                "temperature": "1",
                "min-p": "0",
                "tokens": "60",
            }.items():
                page.js(f"$('{field}').value = '{value}'")
            page.js("$('answer').focus()")
            page.press("Enter", control=True)
            page.until("document.activeElement.id == 'stop' || !$('cost').hidden")
            page.until("!$('cost').hidden || !$('error').hidden")
            page.until("document.activeElement.id == 'answer'")
            assert page.js("$('error').textContent") == ""
            assert page.js("$('status').textContent").startswith(f"Done: {len(expected.branches)} branches; ")
            assert page.js("$('lanes').children.length") == 1 + len(expected.branches) + 1
            written = close_together(page.js("$('parallel').textContent"))
            assert all(close_together(branch.text) in written for branch in expected.branches)
            plain = alone("rivers", asked(0, open_bias=-float("inf")))
            assert close_together(page.js("$('sequential').textContent")) == close_together(plain.text)
            assert page.js("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
            assert focusable(page) == ["prompt", "tokens", "temperature", "min-p", "answer", "play", "step"]
            whole = page.js("$('step').max")
            page.js("$('step').value = 0; $('step').dispatchEvent(new Event('input'))")
            assert page.js("$('at').textContent") == f"0 of {whole}"
            page.js(
                "for (const key of ['Enter', 'Escape'])"
                "dispatchEvent(new KeyboardEvent('keydown', {key, ctrlKey: key == 'Enter'}))"
            )
            page.until("$('status').textContent == 'Stopped.' && !$('answer').disabled")
            assert page.faults == []
        page.js(NO_SEQUENTIAL)
        page.js("$('answer').click()")
        page.until("$('error').textContent == 'The server cannot be reached.'")
        assert page.js("$('status').textContent") == "Only the parallel answer is complete."
        assert page.js("$('parallel').textContent")
    page.js("$('answer').click()")
    page.until("$('status').textContent == 'No answer.'")
    assert page.js("$('error').textContent") == "The server cannot be reached."


def focusable(page: Page) -> list[str]:
    """What the Tab key comes to, in order; each shows that it has the focus."""
    page.js("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    found = list[str]()
    while True:
        page.press("Tab")
        name = page.js("document.activeElement.id")
        if name in found or not name:
            return found
        found.append(name)
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") != "none", name


def test_the_page_of_a_timeline(page: Page, tmp_path: pathlib.Path) -> None:
    alone("rivers", asked(0)).timeline().save(tmp_path / "t.html")
    for width, dark in LOOKS:
        page.open((tmp_path / "t.html").as_uri(), width=width, dark=dark)
        assert page.js("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        for control in focusable(page):
            named = f"(each => each.labels.length || each.textContent)(document.getElementById('{control}'))"
            assert page.js(named), f"{control} has no name"
        before = page.js("document.querySelector('output').textContent")
        page.js("document.getElementById('step').value = 0")
        page.js("document.getElementById('step').dispatchEvent(new Event('input', {bubbles: true}))")
        assert page.js("document.querySelector('output').textContent") != before
        assert page.faults == []
