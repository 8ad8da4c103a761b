"""The annotator that asks a language model: what it takes of a reply, what it refuses, what it asks next."""

import pathlib
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from pasta_jax.annotate import llm
from pasta_jax.annotate.annotators import AnnotatorError, Options, make_annotator
from pasta_jax.annotate.insertion import NotInserted, inserted
from pasta_jax.annotate.llm import LlmAnnotator
from pasta_jax.annotate.protocol import Declined, Item
from pasta_jax.annotate.run import Line, annotate_file, journal_of
from pasta_jax.data.records import Reader, read_records
from pasta_jax.endpoint.client import Endpoint
from pasta_jax.endpoint.post import EndpointError
from pasta_jax.files import write_jsonl
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import length_in_tens
from pasta_jax.lang.render import render
from pasta_jax.lang.topics import fits
from pasta_jax.lang.validate import validate
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import theoretical_speedup
from tests.helpers import chat_models
from tests.helpers.chat_server import KEY, Body, Rates, Status, chat_server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


ANSWER = (
    "Two rivers:\n\n"
    "- Nile: it is the longest river of Africa, and flows north through eleven countries.\n"
    "- Rhine: it is a river of Europe, and flows from the Alps to the sea near Rotterdam.\n\n"
    "Both end in a delta."
)
TOKENIZER = WordTokenizer(ANSWER, *(example["annotated"] for example in llm.prompts()["examples"]))


def annotate(
    replies: list[str], answer: str = ANSWER, *, all_independent: bool = False, **options: Any
) -> Any:
    """What the annotator makes of an answer, and the requests that it sent, if the model replies so.

    With `all_independent` the model finds every block to be so, which is not among its replies and requests.
    """
    bodies: list[Body] = []

    def model(body: Body) -> str:
        if all_independent and body["messages"][0]["content"].startswith("You check"):
            parts = re.findall(r"\[part (\d+): ", body["messages"][-1]["content"])
            return "\n".join(f"{part} true: alone" for part in parts)
        bodies.append(body)
        if len(bodies) > len(replies):
            raise Status(404, "no more replies")
        return replies[len(bodies) - 1]

    with chat_server(model) as server, Endpoint(server.url, "tiny") as endpoint:
        annotated = LlmAnnotator(endpoint, TOKENIZER, **options)("Name two rivers.", answer)
    assert assemble(annotated.program) == answer
    return annotated, bodies


def tagged(answer: str = ANSWER) -> str:
    return re.sub(r"(?m)^- ([^:\n]+): (.+)$", r'- \1: <async topic="\1">\2</async>', answer)


# ---------------------------------------------------------------------------------------- the text of a reply


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: f"\n{text}\n\n",
        lambda text: f"```\n{text}\n```",
        lambda text: f"<answer>\n{text}\n</answer>",
        lambda text: (
            text.replace('topic="', "topic = '").replace('">', "' >").replace("</async>", "</ASYNC >")
        ),
        lambda text: text.replace(": <async", ":<async").replace("</async>\n", "</async>\n\n\n"),
        lambda text: text.replace("</async>", "\n</async>"),
        lambda text: text.replace('Nile">', 'Nile">\n  '),
    ],
)
def test_what_does_not_touch_the_text_is_taken(change: Callable[[str], str]) -> None:
    nodes = inserted(change(tagged().replace("\n\nBoth", "\n\n<sync/>Both")), ANSWER)
    exact = inserted(tagged().replace("\n\nBoth", "\n\n<sync/>Both"), ANSWER)
    assert [type(node) for node in nodes] == [type(node) for node in exact]
    assert assemble(llm.Program(nodes)) == ANSWER
    assert [promise.topic for promise in llm.Program(nodes).promises()] == ["Nile", "Rhine"]
    for promise in llm.Program(nodes).promises():
        assert promise.block[0].text.strip().startswith("it is")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda text: text.replace("longest", "largest"),
            "the answer has 'longest river .*' where you wrote 'la",
        ),
        (lambda text: text.replace("of Africa", "of  Africa"), "altered"),
        (lambda text: text.replace("\n\n- Nile", "\n- Nile"), "altered"),
        (lambda text: text[:-30], "altered|cut off"),
        (lambda text: text[:60], "cut off|altered"),
        (lambda text: "", "cut off before 'Two rivers"),
        (lambda text: f"Sure! {text}", "altered"),
        (lambda text: f"{text} Anything else?", "altered"),
        (lambda text: text.replace("</async>", "", 1).replace("</async>", ""), "an <async> has no </async>"),
        (lambda text: "</async>" + text, "a </async> has no <async>"),
        (lambda text: text.replace("- Nile: ", "- "), "altered"),
    ],
)
def test_what_touches_the_text_is_not(change: Callable[[str], str], problem: str) -> None:
    with pytest.raises(NotInserted, match=problem):
        inserted(change(tagged()), ANSWER)


def test_random_spaces_beside_tags_are_repaired_and_others_are_not() -> None:
    """Every place of the tagged text gets a space, one at a time; where it is beside a tag it does no harm."""
    text = tagged()
    tags = [place for match in re.finditer(r"<[^>]*>", text) for place in (match.start(), match.end())]
    inside = [i for match in re.finditer(r"<[^>]*>", text) for i in range(match.start() + 1, match.end())]
    blank = [i for i in range(len(text)) if text[i].isspace() or text[i - 1].isspace()]
    beside = {i for i in blank if any(not text[min(i, tag) : max(i, tag)].strip() for tag in tags)}
    for place in {*range(1, len(text))} - {*inside}:
        spaced = f"{text[:place]} {text[place:]}"
        if place in tags or place in beside:
            assert assemble(llm.Program(inserted(spaced, ANSWER))) == ANSWER
        else:
            with pytest.raises(NotInserted):
                inserted(spaced, ANSWER)


# ------------------------------------------------------------------------------------------------ the requests


def test_seven_examples_of_the_prompt_keep_its_rules() -> None:
    """Each is what an annotator of these rules returns for its answer, and would train without a doubt."""
    texts = llm.prompts()
    assert len(texts["examples"]) == 7
    annotated = 0
    for example in texts["examples"]:
        reply = example["annotated"].removesuffix("\n")
        program, bodies = annotate([reply], llm._stripped(reply), all_independent=True)
        assert len(bodies) == 1 and not program.notes, "no block is dropped"
        assert len([*program.program.promises()]) == reply.count("<async")
        assert render(program.program).count("<sync/>") == reply.count("<sync/>")
        annotated += "<async" in reply
        if "<async" in reply:
            assert theoretical_speedup(TOKENIZER, program.program) > 1.25
        assert all(len(promise.topic.split()) <= 3 for promise in program.program.promises())
    assert annotated == 5, "and two in which nothing is independent"
    assert tomllib.loads((llm.pathlib.Path(llm.__file__).parent / "llm.toml").read_text()) == texts


def test_an_annotated_answer_is_measured_and_judged() -> None:
    answer = tagged().replace("\n\nBoth", "\n\n<sync/>Both")
    thought = "<think>\nThe <sync/> goes\n</think>\n\n"
    annotated, (first, second) = annotate([thought + answer, thought + "1 true: alone\n2 true: alone"])
    assert annotated.notes == () and render(annotated.program).count("<sync/>") == 1
    for promise in annotated.program.promises():
        assert promise.tokens == length_in_tens(len(TOKENIZER.encode(promise.block[0].text)))
        assert fits(TOKENIZER, promise.topic)
    assert not validate(render(annotated.program), tokenizer=TOKENIZER)
    assert first["messages"][-1]["content"].endswith(f"<answer>\n{ANSWER}\n</answer>")
    shown = second["messages"][-1]["content"]
    assert "<question>\nName two rivers.\n</question>" in shown
    assert "[part 1: Nile]it is" in shown and "[end of part 2]\n\n" in shown and "Both end" not in shown


def test_an_altered_text_is_asked_for_once_more() -> None:
    annotated, bodies = annotate([tagged().replace("Alps", "alps"), tagged(), "1 true: a\n2 true: b"])
    assert len([*annotated.program.promises()]) == 2
    roles = [message["role"] for message in bodies[1]["messages"]]
    assert roles == [*(message["role"] for message in bodies[0]["messages"]), "assistant", "user"]
    assert "has 'Alps to the sea near" in bodies[1]["messages"][-1]["content"]
    with pytest.raises(Declined, match="did not return the answer with tags, twice: the text is altered$"):
        annotate([tagged().replace("Alps", "alps")] * 2)


@pytest.mark.parametrize(
    "answer", ["Write <async topic='x'> here.", "It uses <sync/> a lot.", "half \ud83d of it"]
)
def test_an_answer_that_cannot_be_told_from_tags_is_declined_unasked(answer: str) -> None:
    with pytest.raises(Declined, match="spells a tag|half a character"):
        annotate([], answer)


VERDICTS = [
    ("1 true: a\n2 true: b", "pp s", ()),
    ("1 false 4: both\n2 true: b", "", ("text outside of blocks relies on it",)),
    ("1 true: a\n2 false 1: the sum", "p s", ("uses what another block says",)),
    ("1. **True**: a\n2) False, as", "p s", ("not independent",)),
    ("1 false 3: a\n2 false 3: b", "", ("says the same as another block",) * 2),
]


@pytest.mark.parametrize(("verdicts", "kept", "notes"), VERDICTS)
def test_blocks_that_are_not_independent_become_text(
    verdicts: str, kept: str, notes: tuple[str, ...]
) -> None:
    """A single block that is left, with nothing beside it, becomes text too; one that main writes beside stays."""
    reply = tagged().replace("\n\nBoth", "\n\n<sync/>Both")
    annotated, bodies = annotate([reply, verdicts])
    assert len([*annotated.program.promises()]) == kept.count("p"), bodies
    assert annotated.notes == notes
    assert render(annotated.program).count("<sync/>") == kept.count("s")


def test_text_that_relies_on_a_block_comes_after_a_sync() -> None:
    """Of four items the third uses the first: the third is written once the first two are."""
    names = ("Nile", "Rhine", "Congo", "Volga")
    answer = "".join(f"- {name}: it is a river with many towns along its banks.\n" for name in names)
    annotated, _ = annotate([tagged(answer), "1 true: a\n2 true: b\n3 false 2: c\n4 true: d"], answer)
    text = re.sub(r" tokens=\d+ />", "", render(annotated.program))
    order = re.findall(r'<promise topic="(\w+)"|(<sync/>)|(Congo)', text)
    assert [next(filter(None, found)) for found in order] == ["Nile", "Rhine", "Congo", "<sync/>"]
    assert annotated.notes == ("needs another block first",)


def test_a_verdict_that_is_missing_is_asked_for_once_more() -> None:
    for last, promises, notes in (("1 true: a\n2 true: b", 2, ()), ("I cannot.", 0, (llm.NO_VERDICT,) * 2)):
        annotated, bodies = annotate([tagged(), "They are fine.", last])
        assert len([*annotated.program.promises()]) == promises and annotated.notes == notes
        assert "one line for each of the 2 parts" in bodies[2]["messages"][-1]["content"]


def test_blocks_that_are_short_or_have_an_earlier_topic_are_not_judged() -> None:
    answer = (
        "- Nile: it is long.\n- Nile: it flows through many countries of Africa, the longest of all.\n"
        "- Nile: it flows north from Africa, and then to the sea near the delta."
    )
    annotated, bodies = annotate([tagged(answer), "1 true: alone"], answer)
    assert (
        annotated.notes == (llm.SHORT, llm.SAME_TOPIC)
        and "[part 2" not in bodies[1]["messages"][-1]["content"]
    )
    assert len([*annotated.program.promises()]) == 1


def test_of_too_many_blocks_the_longest_are_kept() -> None:
    answer = "".join(
        f"- Town {i}: it has a river, {'many ' * (9 - i)}bridges and a harbour.\n" for i in range(8)
    )
    annotated, _ = annotate([tagged(answer)], answer, all_independent=True, max_branches=3)
    assert [promise.topic for promise in annotated.program.promises()] == [f"Town {i}" for i in range(3)]
    assert annotated.notes == ("more than 3 blocks",) * 5


def test_topics_fit_and_differ() -> None:
    """A model's topic is kept where it can be; one that it did not give is taken from the text."""
    reply = tagged().replace('"Nile"', '"the very long river of Egypt"').replace('"Rhine"', '" "')
    annotated, _ = annotate([reply], all_independent=True)
    long, missing = [promise.topic for promise in annotated.program.promises()]
    assert "river" in long and missing and fits(TOKENIZER, long) and fits(TOKENIZER, missing)
    answer = "".join(f"- {i * 'a'}: the town number {i} has a river and a harbour.\n" for i in (20, 30, 40))
    annotated, _ = annotate([tagged(answer)], answer, all_independent=True)
    names = [promise.topic for promise in annotated.program.promises()]
    assert len({*names}) == 3 and all(fits(TOKENIZER, name) for name in names), "they begin alike"


# ------------------------------------------------------------------------------------------------- many records


def items(count: int) -> list[Item]:
    return [Item(str(i), *chat_models.rivers(i)) for i in range(count)]


def test_every_record_is_annotated_or_listed_once_whatever_goes_wrong(tmp_path: pathlib.Path) -> None:
    """Through the command's own run: ended by the budget, gone on with, and complete."""
    data, output, todo = tmp_path / "data.jsonl", tmp_path / "out.jsonl", items(60)
    write_jsonl(data, ({"prompt": item.prompt, "response": item.answer} for item in todo))
    replies = tmp_path / "out.jsonl.run" / "replies"

    def run(**budget: Any) -> list[Line]:
        options = {"backoff": 0.001, "timeout": 1.0, "concurrency": 16, **budget}
        with Endpoint(server.url, "m", cache=replies, **options) as endpoint:
            annotator = LlmAnnotator(endpoint, TOKENIZER)
            annotate_file(
                str(data), str(output), annotator, TOKENIZER, Reader({}), {"model": "m"}, max_branches=15
            )
        return sorted(journal_of(str(output)), key=lambda line: line.number)

    with chat_server(chat_models.annotator, Rates(hang=0.02, altered=0.1)) as server:
        kept = r"^The budget is used up: 70 requests are sent\. \d+ of 60 are done and kept; run the same command"
        with pytest.raises(EndpointError, match=kept):
            run(budget_requests=70)
        assert not output.exists() and server.total == 70
        lines = run()
        sent = server.total
        assert len(run()) == len(lines) and server.total == sent and server.repeated() == {}
    assert [line.number for line in lines] == [*range(1, 61)] and all(
        len(line.outcomes) == 1 for line in lines
    )
    outcomes = [line.outcomes[0] for line in lines]
    assert sum(not outcome.reason for outcome in outcomes) > 45
    assert all("twice" in each.reason for each in outcomes if each.reason and not each.notes)
    assert sum("uses what another block says" in outcome.notes for outcome in outcomes) >= 3
    examples, problems = read_records(output)
    assert not problems and [assemble(each.program) for each in examples] == [item.answer for item in todo]
    annotated = [any(True for _ in each.program.promises()) for each in examples]
    assert annotated == [not outcome.reason for outcome in outcomes]
    text = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"[key]" in text and KEY.encode() not in text, "altered replies hold the key"


def test_what_the_endpoint_did_not_answer_is_declined_last_or_not_at_all() -> None:
    """What it refuses is declined at once, what it fails at after all others, and once it is gone nothing more."""
    gone = False

    def model(body: Body) -> str:
        if gone or "country 2." in body["messages"][-1]["content"]:
            raise Status(503, "crashed")
        if re.search(r"country 1?[5-9]\.", body["messages"][-1]["content"]):
            raise Status(400, "content filter")
        return chat_models.annotator(body)

    options: dict[str, Any] = {"concurrency": 1, "attempts": 2, "backoff": 0.001}
    with chat_server(model) as server, Endpoint(server.url, "m", **options) as endpoint:
        results = [*LlmAnnotator(endpoint, TOKENIZER).annotate_all(items(12))]
        assert [int(result.key) for result in results] == [0, 1, *range(3, 12), 2]
        refused = [result.key for result in results if "400 (content filter)" in result.declined]
        assert refused == ["5", "6", "7", "8", "9"] and "503 (crashed), 2 times" in results[-1].declined
        done: list[str] = []

        def run() -> None:
            nonlocal gone
            for result in LlmAnnotator(endpoint, TOKENIZER).annotate_all(items(40)):
                done.append(result.key)
                gone = len(done) > 10

        with pytest.raises(EndpointError, match="so failed 5 requests"):
            run()
        assert "2" not in done and len(done) < 30


def test_runs_come_to_an_end_however_many_requests_are_refused(tmp_path: pathlib.Path) -> None:
    """Each run goes on where the one before was ended, and asks nothing again that was refused."""
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    write_jsonl(data, ({"prompt": item.prompt, "response": item.answer} for item in items(16)))
    refused: list[str] = []

    def model(body: Body) -> str:
        if found := re.search(r"country \d?[02468]\.", body["messages"][-1]["content"]):
            refused.append(found[0])
            raise Status(400, "content filter")
        return chat_models.annotator(body)

    def run(**budget: Any) -> list[Line]:
        replies = tmp_path / "out.jsonl.run" / "replies"
        with Endpoint(server.url, "m", cache=replies, concurrency=1, **budget) as endpoint:
            annotator = LlmAnnotator(endpoint, TOKENIZER)
            annotate_file(
                str(data), str(output), annotator, TOKENIZER, Reader({}), {"model": "m"}, max_branches=15
            )
        return sorted(journal_of(str(output)), key=lambda line: line.number)

    with chat_server(model) as server:
        with pytest.raises(EndpointError, match="The budget is used up.* are done and kept"):
            run(budget_requests=26)
        assert 5 <= len(refused) < 8
        lines = run()
    assert [line.number for line in lines if line.outcomes[0].reason] == [*range(1, 16, 2)]
    assert sorted(refused) == sorted({*refused}) and len(refused) == 8


def test_the_flags_make_an_annotator(tmp_path: pathlib.Path) -> None:
    flags = {
        "base_url": "http://127.0.0.1:9/v1",
        "model": "m",
        "key_variable": "OPENAI_API_KEY",
        "concurrency": 3,
    }
    flags |= {"timeout": 1.0, "temperature": 0.0, "price_in": 0.0, "price_out": 0.0, "cache": None}
    flags |= {"budget_requests": 5, "budget_dollars": None, "dry_run": None}
    made = make_annotator("llm", Options(TOKENIZER, str(tmp_path), max_branches=4, flags=flags))
    assert isinstance(made, LlmAnnotator) and (made.max_branches, made.endpoint.concurrency) == (4, 3)
    assert (tmp_path / "replies").is_dir()
    made.endpoint.close()
    for change, message in (({"model": None}, "--model=NAME"), ({"budget_dollars": 1.0}, "--price_in and")):
        with pytest.raises(AnnotatorError, match=message):
            make_annotator("llm", Options(TOKENIZER, str(tmp_path), flags=flags | change))


def test_an_estimate_covers_both_requests() -> None:
    with Endpoint("http://127.0.0.1:9/v1", "m") as endpoint:
        shown = LlmAnnotator(endpoint, TOKENIZER).estimate(items(10), shown=1)
    assert "About 20 requests would be sent" in shown and "Name rivers of country 0." in shown
    assert "Name rivers of country 1." not in shown and "used bicycle" in shown
