"""Annotation by rule: the structure that is read, what becomes a block, topics; laws on random and real texts."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Iterator

import pytest

from pasta_jax.annotate.annotators import AnnotatorError, Options, make_annotator
from pasta_jax.annotate.apar import Apar
from pasta_jax.annotate.naming import topics
from pasta_jax.annotate.protocol import Annotated, Declined, Item, Result, annotate_all
from pasta_jax.annotate.structure import Structure
from pasta_jax.config import DataConfig
from pasta_jax.data.fitting import Fitter
from pasta_jax.data.layouts import Fault
from pasta_jax.data.records import Example
from pasta_jax.lang import markdown
from pasta_jax.lang.assemble import assemble, text_of
from pasta_jax.lang.markdown import Part
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import render
from pasta_jax.lang.tags import PIECES
from pasta_jax.lang.validate import validate
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import theoretical_speedup
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.tokenizer import Tokenizer
from tests.helpers import full
from tests.helpers.data import data_file
from tests.helpers.programs import random_program

NILE = "The river flows north through ten dry countries and has fed the fields of Egypt for ages."
ROUNDS = 60


@pytest.mark.parametrize(
    "mark", ["-", "*", "+", "•", "–", "1.", "2)", "(3)", "a.", "(b)", "iv)", "✅", "Step 3:"]
)
def test_every_mark_makes_an_item(mark: str) -> None:
    """And an indent, or a bullet below a number, nests it."""
    text = f"{mark} one\n   - inner\n{mark} two\n   more of two"
    first, second = markdown.read(text)
    assert [part.kind for part in (first, second)] == ["item", "item"] and first.marker == mark
    assert first.details(text) == " one\n   - inner" and [c.kind for c in first.children] == ["item"]
    assert second.details(text) == " two\n   more of two"


TREES = [
    (
        "## A\ntext one. Two.\n### B\n- x\n## C\nz",
        ["section ## A", "  paragraph text one.", "  section ### B", "    item -", "section ## C", "  paragraph z"],
    ),
    ("**A:**\n- x\n\n- y\n\nAfter all.", ["section **A:**", "  item -", "  item -", "paragraph After all."]),
    ("Cheap:\n- x\n\nDear:\n- y", ["section Cheap:", "  item -", "section Dear:", "  item -"]),
    ("1. **A**: x\n- y\n2. **B** (new) - z", ["item 1. **A**:", "  item -", "item 2. **B** (new) -"]),
    ("**1. A:** x\n**2. B:** y", ["item **1. A:**", "item **2. B:**"]),
    ("1. A\n\nOn A.\n\n2. B", ["item 1.", "  paragraph On A.", "item 2."]),
    ("| a | b |\n|---|---|\n| 1 | 2 |", ["row | a |", "rule ", "row | 1 |"]),
    ("Say:\n```py\n- no item\n# no head\n```\nDone.", ["section Say:", "  code ", "  paragraph Done."]),
    ("```\nnever closed\n- x", ["code "]),
    ("roses are red\nviolets are blue\nso are you", ["verse "]),
    ("- x is done.\nAll is done.", ["item -", "paragraph All is done."]),
    ("- x goes\non here.", ["item -", "  paragraph on here."]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tree"), TREES)
def test_worked_trees(text: str, tree: list[str]) -> None:
    def lines(parts: Iterable[Part], indent: str = "") -> Iterator[str]:
        for part in parts:
            yield f"{indent}{part.kind} {part.name(text)}"
            yield from lines(part.children, indent + "  ")

    assert list(lines(markdown.read(text))) == tree


_LINES = (
    "# Head", "### Lower head", "**Bold head:**", "Label:", "- item", "  - inner item of words", "1. first",
    "2. **Second**: so", "a) letter", "(ii) roman", "| a | b |", "|---|---|", "```", "    code", "", "", "\t",
    "---",
    "Both are long.", NILE, "This refers back. It does so twice, to be sure.", "Overall, it is so.",
    f"- **Nile**: {NILE} {NILE}", f"3. {NILE} {NILE}", "é東京🌍", '"Quoted," he said.',
    "<b>\\<", "* ", "**", "1.", "x\r",
)  # fmt: skip


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


def random_answer(rng: random.Random) -> str:
    return "\n".join(rng.choices(_LINES, k=rng.randint(0, 24)))


def test_parts_lie_in_order_within_their_parent(rng: random.Random) -> None:
    """Whatever the text. Outside of parts there are only blanks."""

    def check(parts: Iterable[Part], text: str, start: int, end: int) -> None:
        for part in parts:
            assert start <= part.start <= part.head <= part.end <= end
            assert not text[part.start].isspace() and not text[part.end - 1].isspace()
            check(part.children, text, part.start, part.end)
            start = part.end

    for _ in range(20 * ROUNDS):
        text = random_answer(rng)
        parts = markdown.read(text)
        check(parts, text, 0, len(text))
        ends = [0, *(place for part in parts for place in (part.start, part.end)), len(text)]
        assert all(not text[a:b].strip() for a, b in zip(ends[::2], ends[1::2]))


# ------------------------------------------------------------------------------------------------ rule:structure


def annotated(text: str, **options: object) -> str:
    """With ⟦topic⟧{block} for a promise and | for a sync."""
    program = Structure(WordTokenizer(text), **options)("Hi", text).program  # type: ignore[arg-type]
    return "".join(
        f"⟦{node.topic}⟧{{{text_of(node.block)}}}" if isinstance(node, Promise) else
        node.text if isinstance(node, Text) else "|"
        for node in program.nodes
    )  # fmt: skip


def marked(*blocks: str) -> str:
    return "Rivers:\n" + "\n".join(blocks)


N1, N2, N3 = (f" {NILE} {NILE} {tail}" for tail in ("One.", "Two.", "Three."))
WORKED = [
    # a list; what refers back stays in main, after a sync
    (
        marked(f"- **Nile**:{N1}", f"- **Rhine**:{N2}", "", "Both are long."),
        f"Rivers:\n- **Nile**:⟦Nile⟧{{{N1}}}\n- **Rhine**:⟦Rhine⟧{{{N2}}}\n\n|Both are long.",
    ),
    (
        marked(f"-{N1}", f"-{N3}", "- It is longer.", f"-{N2}{N2}", f"-{N3}{N3}"),
        f"Rivers:\n-⟦river flows north⟧{{{N1}}}\n-⟦through ten dry⟧{{{N3}}}\n|- It is longer.\n"
        f"-⟦countries fed fields⟧{{{N2}{N2}}}\n-⟦Egypt ages Three⟧{{{N3}{N3}}}",
    ),
    # topics differ
    (
        marked(f"- **Nile**:{N1}", f"- **Nile**:{N2}"),
        f"Rivers:\n- **Nile**:⟦Nile⟧{{{N1}}}\n- **Nile**:⟦Nile 2⟧{{{N2}}}",
    ),
    # a chain: steps, unnamed
    (f"Steps to do it:\n1.{N1}\n2.{N2}", f"Steps to do it:\n1.{N1}\n2.{N2}"),
    # too short
    ("- **Nile**: It is long.\n- **Rhine**: It is short.", "- **Nile**: It is long.\n- **Rhine**: It is short."),
    # a letter
    (f"Dear Ada,\n\nHello.{N1}\n\nYes.{N2}\n\nNo.{N3}", f"Dear Ada,\n\nHello.{N1}\n\nYes.{N2}\n\nNo.{N3}"),
    # a closing paragraph in the last section
    (f"## A\n{N1}\n## B\n{N2}\n\nIn summary, yes.", f"## A⟦A⟧{{\n{N1}}}\n## B⟦B⟧{{\n{N2}}}\n\n|In summary, yes."),
    # code that another block may need
    (f"## A\n```\nx\n```\n{N1}\n## B\n```\ny\n```\n{N2}", f"## A\n```\nx\n```\n{N1}\n## B\n```\ny\n```\n{N2}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), WORKED)
def test_worked_answers(text: str, wanted: str) -> None:
    assert annotated(text) == wanted


def test_where_marks_go() -> None:
    text = marked(f"- **Nile**:{N1}", f"- **Rhine**:{N2}")
    assert (
        annotated(text, marker="block") == f"Rivers:\n⟦Nile⟧{{- **Nile**:{N1}}}\n⟦Rhine⟧{{- **Rhine**:{N2}}}"
    )


def test_sections_are_split_where_that_pays() -> None:
    """One long section beside a short one would be no faster; its items are."""
    items = "\n".join(f"- **R{i}**:{N1}" for i in range(4))
    text = f"## A\n{items}\n## B\n{N3}"
    blocks = annotated(text)
    assert [blocks.count(topic) for topic in ("⟦A⟧", "⟦R0⟧", "⟦R3⟧", "⟦B⟧")] == [0, 1, 1, 1]
    assert "⟦A⟧" in annotated(text, max_branches=1), "one item alone would gain less"


def test_limits_are_kept() -> None:
    text = marked(*(f"- **R{i}**:{N1 * (1 + i % 2)}" for i in range(20)))
    tokenizer = WordTokenizer(text)
    program = Structure(tokenizer)("Hi", text).program
    wanted = [i for i in range(20) if i % 2 or i < 10]
    assert [p.topic for p in program.promises()] == [f"R{i}" for i in wanted], (
        "the longest ones, in their order"
    )
    plain = len(tokenizer.encode(text)) + len(tokenizer.encode_prompt("Hi"))
    few = Structure(tokenizer, length=plain + 30)("Hi", text)
    assert 0 < len([*few.program.promises()]) < 5 and "would not pay" in few.notes
    assert Structure(tokenizer, length=plain)("Hi", text).program.nodes == (Text(text),)
    assert Structure(tokenizer, min_speedup=99)("Hi", text).program.nodes == (Text(text),)


@pytest.mark.parametrize(
    "text", ["Write <sync/>.", "x</async>", '<promise topic="a" tokens=1 />', "< sync >"]
)
def test_text_like_tags_is_declined(text: str) -> None:
    for annotator in (Structure(WordTokenizer(text)), Apar(WordTokenizer(text), 15)):
        if annotator.__class__ is Structure or text in ("Write <sync/>.", "x</async>"):
            with pytest.raises(Declined, match="as if it had tags"):
                annotator("Hi", text)


def assert_lawful(tokenizer: Tokenizer, answer: str, out: Annotated) -> float:
    """The laws of `rule:structure`; returns the speedup."""
    assert assemble(out.program) == answer
    promises, text = [*out.program.promises()], render(out.program)
    if not promises:
        assert not any(isinstance(node, Sync) for node in out.program.nodes)
        return 1.0
    assert parse(text, max_depth=1) == out.program
    assert validate(text, tokenizer=tokenizer) == []
    assert len({promise.topic.casefold() for promise in promises}) == len(promises) <= 15
    for promise in promises:
        assert not set(promise.topic) & set('"<>\\\n\r')
        assert promise.tokens == length_in_tens(len(tokenizer.encode(text_of(promise.block))))
    speedup = theoretical_speedup(tokenizer, out.program)
    assert speedup >= 1.1
    return speedup


def test_laws_on_random_answers(rng: random.Random) -> None:
    tokenizer = WordTokenizer(" ".join(_LINES))
    some = 0
    for _ in range(ROUNDS):
        answer = random_answer(rng)
        rule = Structure(tokenizer, marker=rng.choice(("main", "block")), min_block=rng.choice((1, 16)))
        some += assert_lawful(tokenizer, answer, rule("Hi", answer)) > 1
    assert some > ROUNDS // 10


@pytest.mark.parametrize("every", [12, full(1)])
def test_laws_on_real_answers(every: int) -> None:
    """And training refuses none of them that it does not refuse without tags, as too long."""
    tokenizer = load_tokenizer(data_file("llama2_tokenizer.model"), extend=True)
    fitter = Fitter(DataConfig(length=2048), tokenizer)
    forks = Fitter(DataConfig(length=2048, dialect="apar"), tokenizer.with_dialect("apar"))
    rules = Structure(tokenizer, length=2048), Apar(tokenizer.with_dialect("apar"), 15, length=2048)
    speedups, trained = [], 0
    for name, key in (("alpaca_eval_responses.jsonl", "response"), ("instruction_seeds.jsonl", "output")):
        for line in data_file(name).read_text(encoding="utf-8").splitlines()[::every]:
            record = json.loads(line)
            prompt, answer = record["instruction"], record[key]
            structured, forked = (rule(prompt, answer) for rule in rules)
            speedups.append(assert_lawful(tokenizer, answer, structured))
            assert assemble(forked.program) == answer
            assert parse(render(forked.program), dialect="apar") == forked.program
            try:
                fitter.fit(Example(prompt, Program((Text(answer),)), 1, ""))
            except Fault:
                continue
            fitter.fit(Example(prompt, structured.program, 1, ""))
            forks.fit(Example(prompt, forked.program, 1, ""))
            trained += 1
    assert trained >= 578 // every
    if every == 1:
        assert statistics.geometric_mean(speedups) > 1.2


# ------------------------------------------------------------------------------------- topics, names, protocol


def test_topics_name_the_block() -> None:
    words = WordTokenizer("")  # one token a letter

    class Words:
        def encode(self, text: str) -> list[int]:
            return words.encode("x" * len(text.split()))

    def topic(name: str, details: str = "") -> str:
        return topics(Words(), [(name, details)])[0]

    assert topic("1. **The Nile** (Egypt):") == "Nile"
    assert topic("### Ethical Implications of CRISPR-Cas9") == "Ethical Implications CRISPR-Cas9"
    assert topic("Part 2: Rivers of Asia") == "Rivers of Asia"
    assert topic("4.", " A big river's delta") == "big river's delta"
    assert topic("Here is why:", " Rain falls.") == "Rain falls"
    assert topic("It is not the longest river.", " No.") == "longest river No"
    assert topic('**"Say \\"no\\" <b>"**') == "Say no b"
    assert topic("-", "...") == "part"


def test_annotators_have_names() -> None:
    options = Options(WordTokenizer(""), folder="", min_block=3)
    assert make_annotator("rule:structure", options) == Structure(options.tokenizer, min_block=3)
    assert isinstance(make_annotator("rule:apar", options), Apar)
    assert make_annotator("json:loads", options) is json.loads
    for name, message in {
        "rule:sot": "'rule:sot' is none of rule:structure, rule:apar, llm, self, and no module:function",
        "structure": "'structure' is none of",
        "no.such:thing": "cannot import no.such: No module named 'no'",
        "json:nothing": "json has no nothing",
    }.items():
        with pytest.raises(AnnotatorError, match=message):
            make_annotator(name, options)


def test_an_annotator_of_many_may_answer_in_any_order() -> None:
    class Backwards:
        def annotate_all(self, items: Iterable[Item]) -> Iterator[Result]:
            for item in reversed(list(items)):
                yield Result(item.key, Annotated(Program((Text(item.answer.replace("x", "y")),))))

    results = list(annotate_all(Backwards(), [Item("1", "?", "ax"), Item("2", "?", "b")]))
    assert [(r.key, r.declined) for r in results] == [
        ("2", ""),
        ("1", "the annotator altered the text at character 2"),
    ]


def test_tags_cost_what_they_are_worth() -> None:
    """Worked by hand: main has 1 word, a tag of 5 pieces and the sync; the branch 4 words and two tags."""
    text = "a b c d e"
    tokenizer = WordTokenizer(text)
    branch = Promise("a", 1, (Text(" b c d e"),))
    assert len(PIECES) == 6
    assert theoretical_speedup(tokenizer, Program((Text("a"), branch))) == 5 / (1 + 5 - 1 + 6)


def test_what_validates_is_trained_on(rng: random.Random) -> None:
    """Whatever the tokenizer: this one spells topics letter by letter, often longer than the grammar allows."""
    tokenizer = WordTokenizer("the Nile is long")
    fitter = Fitter(DataConfig(length=10_000), tokenizer)
    warned = 0
    for _ in range(10 * ROUNDS):
        text = render(random_program(rng, max_nodes=40))
        problems = [doubt.problem for doubt in validate(text, tokenizer=tokenizer)]
        example = Example("the Nile", parse(text), 1, "")
        if any("more than 15 promises" in problem for problem in problems):
            with pytest.raises(Fault, match="more than 15 branches"):
                fitter.fit(example)
        else:
            assert fitter.fit(example).answer
            warned += any("tokens, more than 8" in problem for problem in problems)
    assert warned > ROUNDS


def test_text_without_spaces_has_words_too() -> None:
    """A list in Chinese, its names with a wide colon; the tokenizer spells bytes, so topics have two letters."""
    blocks = ["尼罗河向北流过十个国家。" * 4, "莱茵河发源于瑞士。" * 5]
    text = f"- **尼罗河**：{blocks[0]}\n- **莱茵河**：{blocks[1]}"
    nodes = Structure(WordTokenizer(""))("Hi", text).program.nodes
    promises = [(node.topic, text_of(node.block)) for node in nodes if isinstance(node, Promise)]
    assert promises == [("尼罗", blocks[0]), ("莱茵", blocks[1])]
    assert nodes[0] == Text("- **尼罗河**：")


def test_forks_keep_to_their_limits() -> None:
    text = marked(*(f"- **R{i}**:{N1}" for i in range(20)))
    tokenizer = WordTokenizer(text).with_dialect("apar")
    many = Apar(tokenizer, 15)("Hi", text)
    assert len([*many.program.promises()]) == 15 and many.notes == ("more forks than an answer may have",) * 5
    plain = len(tokenizer.encode(text)) + len(tokenizer.encode_prompt("Hi"))
    assert Apar(tokenizer, 15, length=plain + 60)("Hi", text) == many
    assert Apar(tokenizer, 15, length=plain + 10)("Hi", text).program == Program((Text(text),))
