"""PASTA-LANG: reading, writing, repairing and checking annotated text."""

from __future__ import annotations

import pathlib
import pickle
import random
import subprocess
import sys

import pytest

from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import ParseError, parse, parse_lenient
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import escape, render
from pasta_jax.lang.topics import shortened, with_short_topics
from pasta_jax.lang.validate import validate
from pasta_jax.tokens.tokenizer import check_text
from tests.helpers.data import real_responses
from tests.helpers.programs import random_program, random_text

ROUNDS = 3000
A = '<promise topic="a" tokens=1 />'
A_BLOCK = Promise("a", 1, (Text("x"),))


def test_a_worked_program_both_ways() -> None:
    text = 'Two:\n<promise topic="one" tokens=1 /><async>1</async>'
    text += '<promise topic="two" tokens=99 /><async></async><sync/>\nDone.'
    program = Program(
        (Text("Two:\n"), Promise("one", 1, (Text("1"),)), Promise("two", 99, ()), Sync(), Text("\nDone."))
    )
    assert parse(text) == program
    assert render(program) == text
    assert assemble(program) == "Two:\n1\nDone."
    assert parse("") == Program(())


def test_blocks_nest_as_deep_as_allowed() -> None:
    text = f"{A}<async>1{A}<async>2</async><sync/></async>"
    assert parse(text, max_depth=2).nodes == (
        Promise("a", 1, (Text("1"), Promise("a", 1, (Text("2"),)), Sync())),
    )
    assert assemble(parse(text)) == "12"


@pytest.mark.parametrize("max_depth", [0, 1, 3])
def test_round_trip_of_random_programs(seed: int, max_depth: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        program = random_program(rng, max_depth=max_depth, max_nodes=16)
        text = render(program)
        assert parse(text, max_depth=max_depth) == program
        assert render(parse(text)) == text


def test_random_programs_hold_everything(seed: int) -> None:
    """A generator that stopped producing something would make every test that uses it weaker in silence."""
    rng = random.Random(seed)
    programs = [random_program(rng, max_depth=2) for _ in range(1000)]
    texts = "".join(assemble(program) for program in programs)
    rendered = "".join(map(render, programs))
    for wanted in (*tags.PIECES, "\\", "\n", '"', "'", "🌍", "7"):
        assert wanted in texts
    for wanted in ("</async><promise", "<async></async>", "<sync/><sync/>", "<async><promise", "<\\\\sync/>"):
        assert wanted in rendered
    assert any(program.nodes[:1] == (Sync(),) for program in programs)
    assert max(len(list(program.promises())) for program in programs) > 3


def test_random_text_round_trips_as_text(seed: int) -> None:
    rng = random.Random(seed)
    written: dict[str, str] = {}
    for _ in range(ROUNDS):
        text = random_text(rng)
        assert parse(escape(text), max_depth=0).nodes == (Text(text),)
        assert written.setdefault(escape(text), text) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<sync/>", r"<\sync/>"),
        (r"<\sync/>", r"<\\sync/>"),
        (r"<\\\async>", r"<\\\\async>"),
        ("</async>", r"<\/async>"),
        (f"{A}!", rf"<\{A[1:]}!"),
        ("<<sync/>", r"<<\sync/>"),
        (r"\<sync/>", r"\<\sync/>"),
        ("<sync/><async>", r"<\sync/><\async>"),
        (' /> and " tokens= and <b> and <promise>', ' /> and " tokens= and <b> and <promise>'),
        (r"<\b> and \sync/> and <\sync />", r"<\b> and \sync/> and <\sync />"),
    ],
)
def test_literal_text_that_spells_a_tag(text: str, written: str) -> None:
    program = Program((Text(text),))
    assert render(program) == written
    assert parse(written) == program
    assert parse_lenient(written) == (program, [])
    assert validate(written) == []


def test_neighbouring_texts_are_written_as_one() -> None:
    """Each half is harmless; only together do they spell a tag."""
    block: tuple[Node, ...] = (Text("<"), Text(""), Text("sync/>"))
    assert parse(render(Program(block))).nodes == (Text("<sync/>"),)
    assert parse(render(Program((Promise("a", 1, block),)))).nodes == (Promise("a", 1, (Text("<sync/>"),)),)


@pytest.mark.parametrize(
    ("topic", "tokens"), [("", 1), ('a"b', 1), ("a<b", 1), ("a\\b", 1), ("a\n", 1), ("a", 0), ("a", 100)]
)
def test_render_refuses_what_could_not_be_read_back(topic: str, tokens: int) -> None:
    with pytest.raises(ValueError, match="cannot render the promise"):
        render(Program((Promise(topic, tokens, ()),)))


ERRORS = [
    # text, line, column, start of the problem
    ("one\ntwo </async>", 2, 5, "</async> without <async>"),
    (f"{A}<async>x</async></async>", 1, 47, "</async> without <async>"),
    ("\n\n <async>x</async>", 3, 2, "<async> without a promise"),
    (f"{A}<async>1\n<async>2</async></async>", 2, 1, "<async> without a promise"),
    (f"one\n{A}<async>x<sync/>", 2, 31, "<async> is never closed"),
    (f"{A}<async>x</async>{A}<async>x", 1, 77, "<async> is never closed"),
    (f"one\r\n{A} <async>x</async>", 2, 31, "space between a promise and its block"),
    (f"{A}<async >x</async>", 1, 31, "'<async >' is not the canonical spelling"),
    (f"one\r\n{A}x<async>x</async>", 2, 1, "a promise without its block"),
    (f"{A}", 1, 1, "a promise without its block"),
    (f"{A}{A}<async>x</async>", 1, 1, "a promise without its block"),
    (f"{A}<\\async>x</async>", 1, 1, "a promise without its block"),
    (f"{A}<async>{A}<async>x</async></async>", 1, 38, "a promise nested deeper than max_depth=1"),
    ('é<promise topic="" tokens=2 /><async>x</async>', 1, 2, "the topic is empty"),
    ('<promise topic="a<b" tokens=2 /><async>x</async>', 1, 1, "the topic holds '<'"),
    ('<promise topic="a>b" tokens=2 /><async>x</async>', 1, 1, "the topic holds '>'"),
    ('<promise topic="a\nb" tokens=2 /><async>x</async>', 1, 1, "the topic holds '\\n'"),
    ('<promise topic="a\rb" tokens=2 /><async>x</async>', 1, 1, "the topic holds '\\r'"),
    ('<promise topic="a\\b" tokens=2 /><async>x</async>', 1, 1, "the topic holds '\\\\'"),
    ('<promise topic="a"b" tokens=2 /><async>x</async>', 1, 1, "the promise is not finished"),
    ('<promise topic="a tokens=2 /><async>x</async>', 1, 1, "the topic has no closing quote"),
    ('<promise topic="a" tokens=', 1, 1, "the promise is not finished"),
    ('<promise topic="a" tokens=0 /><async>x</async>', 1, 1, "tokens=0 is not between 1 and 99"),
    ('<promise topic="a" tokens=100 /><async>x</async>', 1, 1, "tokens=100 is not between 1 and 99"),
    ('<promise topic="a" tokens=-1 /><async>x</async>', 1, 1, "tokens=-1 is not between 1 and 99"),
    *(
        (
            f'<promise topic="a" tokens={number} /><async>x</async>',
            1,
            1,
            f"tokens={said} is not between 1 and 99",
        )
        for number, said in {
            "9" * 11: "9" * 11,
            "-" + "8" * 20: "-" + "8" * 20,
            "7" * 5000: "7" * 20 + "…",
        }.items()
    ),
    ('<promise topic="a" tokens=x /><async>x</async>', 1, 1, "tokens is not a whole number"),
    ('<promise topic="a" /><async>x</async>', 1, 1, "the promise has no tokens"),
    ('<promise topic="a" tokens=02 /><async>x</async>', 1, 1, "not the canonical spelling"),
    ('<promise topic="a" tokens="2" /><async>x</async>', 1, 1, "not the canonical spelling"),
    ('<promise topic="a" tokens=2/><async>x</async>', 1, 1, "not the canonical spelling"),
    ("<promise topic='a' tokens=2 /><async>x</async>", 1, 1, "not the canonical spelling"),
    ("ab <promise tokens=2 /><async>x</async>", 1, 4, "the promise has no topic"),
]


@pytest.mark.parametrize(("text", "line", "column", "problem"), ERRORS)
def test_errors_say_where_and_what(text: str, line: int, column: int, problem: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse(text, max_depth=1)
    error = caught.value
    assert (error.line, error.column) == (line, column)
    assert error.problem == problem
    assert str(error) == f"line {line}, column {column}: {problem}. {error.advice}."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert ("error", line, column, problem) in [
        (doubt.severity, doubt.line, doubt.column, doubt.problem) for doubt in validate(text)
    ]


READ_TWO = 'Read as <promise topic="a" tokens=2 />'
ESTIMATED = "Took its tokens from the length of its block"
UNWRAPPED = "Made its content part of the text around it"
REPAIRS: list[tuple[str, tuple[Node, ...], list[str]]] = [
    # text, what is read, what is repaired
    ("<promise topic='a' tokens='2' /><async>x</async>", (Promise("a", 2, (Text("x"),)),), [READ_TWO]),
    ('<promise  tokens = "2"\ntopic = "a"/><async>x</async>', (Promise("a", 2, (Text("x"),)),), [READ_TWO]),
    ("< promise topic=a tokens=02 ><async>x</async>", (Promise("a", 2, (Text("x"),)),), [READ_TWO]),
    (
        '<promise topic="it\'s > 1" tokens=2 /><async></async>',
        (Promise("it's 1", 2, ()),),
        ['Read as <promise topic="it\'s 1" tokens=2 />'],
    ),
    (
        "<promise topic='the \"b\\c\"' tokens=2 /><async></async>",
        (Promise("the b c", 2, ()),),
        ['Read as <promise topic="the b c" tokens=2 />'],
    ),
    ('<promise topic="a" tokens=0 /><async>x</async>', (A_BLOCK,), [f"Read as {A}"]),
    ('<promise topic="a" tokens=-7 /><async>x</async>', (A_BLOCK,), [f"Read as {A}"]),
    (
        f'<promise topic="a" tokens={"9" * 5000} /><async>x</async>',
        (Promise("a", 99, (Text("x"),)),),
        ['Read as <promise topic="a" tokens=99 />'],
    ),
    ('<promise topic="a" /><async>x</async>', (A_BLOCK,), [ESTIMATED]),
    (
        f'<promise topic="a" tokens=few /><async>{"word " * 20}</async>',
        (Promise("a", 3, (Text("word " * 20),)),),
        [ESTIMATED],
    ),
    (
        f'<promise topic="a" /><async>{"word " * 5000}</async>',
        (Promise("a", 99, (Text("word " * 5000),)),),
        [ESTIMATED],
    ),
    ("1<sync />2< sync/>", (Text("1"), Sync(), Text("2"), Sync()), ["Read as <sync/>"] * 2),
    ("<sync>", (Sync(),), ["Read as <sync/>"]),
    (f"{A}< async >x</ async>", (A_BLOCK,), ["Read as <async>", "Read as </async>"]),
    (f"1{A} \n<async>x</async>2", (Text("1 \n"), A_BLOCK, Text("2")), ["Moved it before the promise"]),
    (f"{A}<async>x", (A_BLOCK,), ["Closed it at the end"]),
    (f"1{A}2", (Text("12"),), ["Dropped the promise"]),
    (f"1<async>2{A}<async>x</async>3</async>4", (Text("12"), A_BLOCK, Text("34")), [UNWRAPPED]),
    ("1</async>2", (Text("12"),), ["Dropped it"]),
    (
        f"{A}<async>1{A}<async>2{A}<async>3</async><sync/></async>4</async><sync/>",
        (Promise("a", 1, (Text("1234"),)), Sync()),
        ["Put its block in place as text"] * 2,
    ),
    ('1<promise topic="a" tok', (Text('1<promise topic="a" tok'),), ["Kept it as text"]),
    ('<promise topic="" tokens=1 />', (Text('<promise topic="" tokens=1 />'),), ["Kept it as text"]),
    (
        "<promise tokens=1 /><async>x</async>",
        (Text("<promise tokens=1 />x"),),
        ["Kept it as text", UNWRAPPED],
    ),
]


@pytest.mark.parametrize(("text", "nodes", "repairs"), REPAIRS)
def test_lenient_reading_repairs_and_says_so(text: str, nodes: tuple[Node, ...], repairs: list[str]) -> None:
    program, done = parse_lenient(text, max_depth=1)
    assert program.nodes == nodes
    assert [repair.repair for repair in done] == repairs
    assert parse(text, lenient=True, max_depth=1) == program


def test_a_repair_says_where() -> None:
    (repair,) = parse_lenient("1\n2 <sync />")[1]
    assert str(repair) == "line 2, column 3: '<sync />' is not the canonical spelling. Read as <sync/>."


def test_near_misses_that_claim_nothing_are_text_when_read_strictly() -> None:
    for text in ("<sync />", "a < async > b", "<promise tokens=2 />", "<promise topic='a' tokens=1 />"):
        assert parse(text).nodes == (Text(text),)
        assert {problem.severity for problem in validate(text)} == {"warning"}


FUZZ_PIECES = (
    *(tags.PIECES * 2),
    *(A, A, A + "<async>", "<promise ", "topic='a'", "tokens='3'", "<sync />", "</ async>", "< async>"),
    *("promise", "async", "sync", "topic", "tokens"),
    *("<", ">", "/", "\\", '"', "'", "=", " ", "\n", "a", "7", "-1", "²", "\ud800"),
)


@pytest.mark.parametrize("max_depth", [None, 0, 1, 2])
def test_lenient_reads_anything(seed: int, max_depth: int | None) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        text = "".join(rng.choices(FUZZ_PIECES, k=rng.randint(0, 25)))
        program, repairs = parse_lenient(text, max_depth=max_depth)
        rendered = render(program)
        assert parse(rendered, max_depth=max_depth) == program
        assert assemble(program) == assemble(parse(rendered))
        if not repairs:
            assert parse(text, max_depth=max_depth) == program
            assert rendered == text
        if max_depth is not None:
            assert_validate_agrees_with_parse(text, max_depth)


def assert_validate_agrees_with_parse(text: str, max_depth: int) -> None:
    problems = validate(text, max_depth=max_depth)
    errors = [problem for problem in problems if problem.severity == "error"]
    places = [(problem.line, problem.column) for problem in problems]
    assert places == sorted(places)
    try:
        parse(text, max_depth=max_depth)
    except ParseError:
        assert errors
    else:
        assert not errors


def test_deep_and_long_texts_are_read() -> None:
    """Deeper than Python recurses; and long runs on which a careless expression would take minutes."""
    deep = (A + "<async>") * 3000 + "x" + "</async>" * 3000
    assert render(parse(deep)) == deep
    assert assemble(parse(deep)) == "x"
    for piece in ("<", "< ", "<\\", "<promise ", '<promise topic="', "<promise a a=", "</ ", "<sync ", "\n"):
        text = piece * 20000
        assert assemble(parse(text, lenient=True)).startswith(piece)
    for run in ("a" * 100000, " " * 100000, "a=" * 50000, "'\"" * 50000):
        parse_lenient(f"<promise {run}>")
        parse_lenient(f"<promise {run}")


BLOCK = "<async>The Nile is a river.</async>"
DOUBTS = [
    # text, column, start of the problem
    ("<sync/>x", 1, "<sync/> with no branch open"),
    (f"{A}{BLOCK}<sync/>x<sync/>y", 74, "<sync/> with no branch open"),
    (f"{A}<async>one two three four<sync/> five</async><sync/>.", 56, "<sync/> with no branch open"),
    (f'<promise topic="a b c d" tokens=1 />{BLOCK}', 1, "the topic has more than 3 words"),
    (f'<promise topic=" " tokens=1 />{BLOCK}', 1, "the topic is blank"),
    (f"{A}<async>one two three four</async>", 1, "the block has fewer than 5 words"),
    (f"{A}{BLOCK}<sync/>\n", 66, "<sync/> with nothing after it"),
]


@pytest.mark.parametrize(("text", "column", "problem"), DOUBTS)
def test_validate_warns_of_what_is_doubtful(text: str, column: int, problem: str) -> None:
    (doubt,) = validate(text)
    assert (doubt.severity, doubt.line, doubt.column) == ("warning", 1, column)
    assert doubt.problem.startswith(problem)


def test_validate_accepts_what_is_good() -> None:
    promise = '<promise topic="a b c" tokens=1 />'
    assert validate(f"So: {promise}{BLOCK}{A}{BLOCK}<sync/>{A}{BLOCK}<sync/> Done.") == []
    assert validate(f"{A}{BLOCK}<sync/>{A}{BLOCK}") == []
    nested = f"{A}<async>One {A}{BLOCK}<sync/> two.</async>"
    assert validate(nested, max_depth=2) == []
    assert validate(nested)[0].severity == "error"


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str) -> list[int]:
        check_text(text)
        return [ord(letter) for letter in text]


CITY = "Timbuktu is a city in Mali."
COUNTED = [
    # topic, tokens, block, problem, advice
    (
        "Timbuktu",
        3,
        CITY,
        "the topic takes 9 tokens, more than 8",
        "takes 'Timbukt'",
    ),
    (
        "Mali",
        9,
        CITY,
        "tokens=9 promises about 90 tokens, and the block has 27",
        "tokens=3",
    ),
    (
        "Mali",
        1,
        CITY,
        "tokens=1 promises about 10 tokens, and the block has 27",
        "tokens=3",
    ),
    (
        "Mali",
        3,
        "Timbuktu is \ud83d in Mali.",
        "no tokenizer can read it: The text holds half a character",
        "drops",
    ),
]


@pytest.mark.parametrize(("topic", "tokens", "block", "problem", "advice"), COUNTED)
def test_validate_counts_with_a_tokenizer(
    topic: str, tokens: int, block: str, problem: str, advice: str
) -> None:
    text = f'<promise topic="{topic}" tokens={tokens} /><async>{block}</async>'
    assert validate(text) == []
    (doubt,) = validate(text, tokenizer=Letters())
    assert doubt.severity == "warning" and doubt.problem.startswith(problem) and advice in doubt.advice
    right = '<promise topic="Mali" tokens=2 /><async>Timbuktu is a city in Mali.</async>'
    assert validate(right, tokenizer=Letters()) == [], "20 is near enough to 27"


def test_validate_counts_the_promises() -> None:
    text = f"{A}{BLOCK}" * 16
    assert [(doubt.column, doubt.advice) for doubt in validate(text)] == [
        (15 * len(f"{A}{BLOCK}") + 1, "Promise less, or train with --config.data.threads=17 or more")
    ]
    assert validate(text, max_branches=16) == []


def test_a_topic_is_shortened_to_whole_words() -> None:
    wanted = {
        "Nile": "Nile",
        " a  b c ": " a  b c ",  # what fits stays as it is
        "one of the many": "one",
        "a b c d": "a b c",
        "map of Mali": "map",
        "Timbuktu": "Timbukt",
        "the the the the": "the",
        " " * 20: " ",
    }
    assert {topic: shortened(Letters(), topic) for topic in wanted} == wanted
    program = parse(f'<promise topic="a b c d" tokens=1 /><async>x {A}{BLOCK}</async>', max_depth=2)
    assert [p.topic for p in with_short_topics(Letters(), program).promises()] == ["a b c", "a"]


def test_validate_lists_every_problem() -> None:
    assert [problem.line for problem in validate(f"</async>\n<async>x\n{A}")] == [1, 2, 2, 3]
    unclosed = validate(f"{A}<async>one two three four five\n{A}<async>one two three four five", max_depth=2)
    assert [(problem.line, problem.column) for problem in unclosed] == [(1, 31), (2, 31)]


def test_reading_needs_no_numerical_library() -> None:
    code = """
import sys
import pasta_jax.lang.parse, pasta_jax.lang.validate
print([name for name in ("jax", "jaxlib", "numpy", "tensorflow", "torch") if name in sys.modules])
"""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_answers_are_text() -> None:
    responses = real_responses()
    assert responses
    for response in responses:
        assert parse(response).nodes == ((Text(response),) if response else ())
        assert render(parse(response)) == response
        assert parse_lenient(response) == (parse(response), [])
