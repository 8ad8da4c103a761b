"""The form of answers in numbers, worked by hand, and the intervals of measures."""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from pasta_jax.annotate.measuring import forms_of, report
from pasta_jax.data.records import read
from pasta_jax.intervals import Values
from pasta_jax.lang.form import Form, ends_in_loop, form_of
from pasta_jax.lang.parse import parse


def block(text: str, topic: str = "one", tokens: int = 1) -> str:
    return f'<promise topic="{topic}" tokens={tokens} /><async>{text}</async>'


def form(text: str) -> Form:
    return form_of(parse(text), lambda block: len(block.split()))


def lists(text: str) -> tuple[int, ...]:
    found = form(text)
    return (
        *(found.lists, found.one_marker, found.numbered, found.in_order),
        *(found.branched_lists, found.neat_branched),
    )


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("No list. - But a dash.", (0, 0, 0, 0, 0, 0)),
        ("- One only", (0, 0, 0, 0, 0, 0)),
        ("- Nile\n- Rhine\n\nTwo more:\n* Don\n* Ob", (2, 2, 0, 0, 0, 0)),
        ("- Nile\n* Rhine", (1, 0, 0, 0, 0, 0)),
        ("1. Nile\n2. Rhine\n4. Don", (1, 1, 1, 0, 0, 0)),
        ("1. Nile\n1) Rhine", (1, 0, 1, 0, 0, 0)),
        ("7. Nile\n8. Rhine", (1, 1, 1, 1, 0, 0)),
        # One thread: a bullet right below a number is a detail of it. Branches: it is the next item.
        ("1. Nile\n- Long\n- Old\n2. Rhine\n- Short\n- New", (3, 3, 1, 1, 0, 0)),
        (
            f"Three:\n{block('1. Nile')}\n{block('- Rhine')}\n{block('2. Don')}",
            (1, 0, 0, 0, 1, 0),
        ),
        (f"{block('1. Nile')}\n{block('3. Don')}", (1, 1, 1, 0, 1, 0)),
        # The details of each item are a block, and the lists in them lists of one branch.
        (
            f"1. **Nile**:{block(chr(10) + '- Long' + chr(10) + '- Old')}\n"
            f"2. **Rhine**:{block(chr(10) + '* Short' + chr(10) + '* New')}",
            (3, 3, 1, 1, 1, 1),
        ),
        # Newlines may be a branch's own, before or after its item.
        (f"Two:{block(chr(10) + '- Nile')}{block(chr(10) + '* Rhine' + chr(10))}", (1, 0, 0, 0, 1, 0)),
        # Main wrote the second item itself.
        (f"- {block('Nile')}\n- Rhine", (1, 1, 0, 0, 0, 0)),
    ],
)
def test_lists(text: str, counted: tuple[int, ...]) -> None:
    assert lists(text) == counted


def test_doubled_parts_topics_and_lengths() -> None:
    found = form(
        "Rivers of Asia are long and wide:\n"
        f"- {block('The Ob flows north to the cold sea', 'Ob', 1)}\n"  # 8 tokens
        f"- {block('The Ob flows north to the icy cold sea', 'the Don', 2)}\n"  # 9, 8 of 9 words the same
        f"- {block('The Don flows south', 'The  don', 3)}\n"  # 4
        "\nRivers of Asia are long and wide."
    )
    # The last paragraph is the first once more; punctuation is no word.
    assert (found.parts, found.doubled) == (5, 2)
    assert (found.promises, found.topics, found.repeated_topics) == (3, 3, 1)
    assert (found.block_tokens, found.length_error, found.length_bias) == (21, 2 + 11 + 26, 2 + 11 + 26)
    assert found.length_rounding == 2 + 1 + 6
    # "the Ob flows north", "Ob flows north to", "flows north to the", and the four of "Rivers of Asia ...".
    assert (found.ngrams, found.repeated_ngrams, found.loops) == (35 - 3, 3 + 4, 0)
    bare = form_of(parse("- <promise/><async>Nile</async>\n- Don", dialect="apar"), len)
    assert (bare.promises, bare.topics, bare.block_tokens) == (1, 0, 0)


def test_names_of_items() -> None:
    found = form(
        "- **Nile**: Long.\n- **The Don**: Old.\n- the don: Still old.\n- A long one.\n\nTwo:\n* Nile: Long.\n* Ob"
    )
    assert (found.lists, found.named, found.repeated_names) == (2, 4, 1), "of the same list"


def test_an_item_does_not_double_what_it_holds() -> None:
    text = "1. Nile:\n\nIt is a long and a very old river.\n\n2. Rhine:\n\nIt carries more ships than others."
    assert (form(text).parts, form(text).doubled) == (4, 0)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("Yes. " * 12, True),
        ("Yes. " * 11, False),
        ("Rest a day. Then walk on. " * 3 + "Rest a", True),
        ("It rains in the hills of the north " * 2, False),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14", False),
        ("", False),
    ],
)
def test_loops(text: str, loops: bool) -> None:
    assert ends_in_loop(text) == loops


def test_intervals() -> None:
    def values(above: Any, below: Any) -> Values:
        return Values(np.array(above, np.float64), np.array(below, np.float64))

    none = values([0] * 50, [1] * 50).share
    assert (none.mean, none.low) == (0, 0) and none.high == pytest.approx(
        3.8415 / 53.8415, abs=1e-4
    )  # Wilson
    numbers = values([1.0, 2.0, 6.0], [1, 1, 1]).interval
    half = 4.302653 * math.sqrt(7 / 3)  # Student's t with two degrees of freedom
    assert numbers == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-4)
    # A prompt without a list counts in no mean and no interval; the difference is taken prompt by prompt.
    a, b = values([3, 0, 5], [4, 0, 5]), values([1, 0, 3], [4, 0, 5])
    assert a.interval.mean == pytest.approx(8 / 9) and (a.interval.high > 1, a.share.high) == (True, 1)
    pairs = np.array([3 - 32 / 9, 5 - 40 / 9]) / 4.5 - np.array([1 - 16 / 9, 3 - 20 / 9]) / 4.5
    half = 12.706205 * pairs.std(ddof=1) / math.sqrt(2)
    assert a.less(b) == pytest.approx((4 / 9, 4 / 9 - half, 4 / 9 + half), abs=1e-4)
    assert a.less(a)[0] == 0 and math.isnan(a.less(a).low), "no two prompts differ"
    assert not values([0], [0]).interval.is_known and not values([0], [0]).share.is_known
    assert values([0, 0.5], [1, 1]).share.low == 0
    assert values([3, 1], [3, 1]).share.low == pytest.approx(2 / (2 + 3.8415), abs=1e-4), "Wilson's, of two"
    assert not a.less(values([0] * 3, [0] * 3)).is_known
    assert math.isnan(values([2], [1]).interval.low)


def test_measures_of_a_file(tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": "?", "response": f"{block('- Nile', 'Nile')}\n{block('- Don', 'Nile')}"},
        {"prompt": "?", "response": "- Nile\n* Don"},
        {"prompt": "?"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms, problems = forms_of(read(tmp_path / "data.jsonl"), lambda text: len(text.split()))
    text = " ".join(report(forms, problems, str(tmp_path / "measures.json")).split())
    assert text.startswith("2 answers, 1 with promises, 2 in all. 1 records cannot be read. ")
    assert "| lists with one marker style | 50.0 % |" in text and "| 2 topics" in text
    assert "numbered" not in text, "there are none to measure"
    found = json.loads((tmp_path / "measures.json").read_text())["measures"]
    assert (found["repeated_topics"]["mean"], found["length_error"]["mean"]) == (0.5, 16 / 4)
