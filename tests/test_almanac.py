"""Almanac: the tables obey their laws, the split holds, tasks are what they say."""

import collections
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from pasta_jax.baselines import sot
from pasta_jax.data import almanac
from pasta_jax.data.almanac import facts, families, split
from pasta_jax.data.almanac.text import skeleton_document
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.grammar import OPENS
from pasta_jax.lang.program import Promise, Sync
from pasta_jax.tokens.chat import MODEL_TURN, USER_TURN

TABLES = {kind.name: kind for kind in almanac.KINDS}


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def column(kind: str, noun: str) -> list[str]:
    return [almanac.value(entity, noun) for entity in TABLES[kind].entities]


# ------------------------------------------------------------------------------------------------- tables


def test_size() -> None:
    assert len(almanac.KIND_OF) == sum(len(kind.entities) for kind in almanac.KINDS) >= 160
    assert len(set(almanac.FACTS)) == len(almanac.FACTS) >= 800


def test_values_are_short_and_can_be_read_back() -> None:
    for entity, noun in almanac.FACTS:
        value = almanac.value(entity, noun)
        assert value == value.strip() != ""
        assert value.isascii() and entity.isascii()
        assert "." not in value + entity, "the judge ends a sentence at a full stop"
        assert not set(entity) & set(tags.TOPIC_FORBIDS)
        assert len(entity.split()) <= 3, "a topic has at most three words"


def test_elements() -> None:
    assert column("element", "atomic number") == [str(z) for z in range(1, 55)]
    assert len(set(column("element", "symbol"))) == 54
    assert all(len(symbol) in (1, 2) for symbol in column("element", "symbol"))
    for period, size in enumerate([2, 8, 8, 18, 18], start=1):
        row = [e for e in TABLES["element"].entities if almanac.value(e, "period") == str(period)]
        groups = [int(almanac.value(element, "group")) for element in row]
        assert len(groups) == size
        assert groups == sorted(set(groups))
        assert (groups[0], groups[-1]) == (1, 18)
    phases = collections.Counter(column("element", "phase"))
    assert phases == {"solid": 43, "gas": 10, "liquid": 1}
    nobles = {e for e in TABLES["element"].entities if almanac.value(e, "group") == "18"}
    assert nobles == {"Helium", "Neon", "Argon", "Krypton", "Xenon"}
    assert {almanac.value(e, "phase") for e in nobles} == {"gas"}


def test_states() -> None:
    assert column("state", "state number") == [str(n) for n in range(1, 51)]
    years = [int(year) for year in column("state", "year")]
    assert years == sorted(years)
    assert (years[0], years[12], years[-1]) == (1787, 1790, 1959)
    assert len(set(column("state", "postal code"))) == len(set(column("state", "capital"))) == 50
    assert all(len(code) == 2 and code.isupper() for code in column("state", "postal code"))


def test_planets() -> None:
    order = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
    assert list(TABLES["planet"].entities) == order
    assert column("planet", "position") == [str(n) for n in range(1, 9)]
    assert [p for p in order if almanac.value(p, "ring system") == "rings"] == order[4:]


def test_countries_and_works() -> None:
    assert len(set(column("country", "capital"))) == len(TABLES["country"].entities)
    assert set(column("country", "continent")) == {
        "Africa", "Asia", "Europe", "North America", "Oceania", "South America"}  # fmt: skip
    for kind, noun in [("novel", "year"), ("opera", "year")]:
        assert all(1700 < int(year) < 2000 for year in column(kind, noun))


def test_successors_are_the_rows_in_order() -> None:
    for kind in almanac.KINDS:
        for before, after in itertools.pairwise(kind.entities):
            assert almanac.successor(before) == (after if kind.in_order else None)
        assert almanac.successor(kind.entities[-1]) is None


# -------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_a_prompt_says_all(family: str, rng: np.random.Generator) -> None:
    for _ in range(100):
        task = almanac.training_task(rng, family)
        assert task.family == family
        assert almanac.task_of(task.prompt) == task


def test_foreign_prompts_are_refused() -> None:
    for prompt in [
        "",
        "Hello.",
        "What is the capital of Iron?",
        "List the capital of France and and Japan.",
        "Name the 9 planets after Mars with the type of each.",
        "Name the 02 planets after Mars with the type of each.",
        "Continue each chain: 2 after .",
        "Compare the capital of France and Peru. Which has the highest atomic number?",
        "Which is the newest: Ulysses and Siddhartha? First give the author and year.",
        "Which is the newest: Ulysses and Dune? First give the author.",
        "Write a report.\nPeru.",
        "Write a report.\nPeru: capital.\nPeru: currency.",
        "Write a report.\nCountries Peru and Cuba: capital.\nCountries Laos and Chile: currency.",
    ]:
        with pytest.raises(ValueError, match="Not an almanac prompt"):
            almanac.task_of(prompt)


def test_plans(rng: np.random.Generator) -> None:
    for family in almanac.FAMILIES:
        for _ in range(50):
            task = almanac.training_task(rng, family)
            promises = [node for node in task.plan.nodes if isinstance(node, Promise)]
            syncs = [node for node in task.plan.nodes if isinstance(node, Sync)]
            assert bool(promises) == (family in almanac.PARALLEL_FAMILIES)
            assert len(promises) == len({promise.topic for promise in promises}) <= 6
            assert len(list(task.plan.promises())) == len(promises), "promises do not nest"
            assert len(syncs) == (family == "compare")
            assert all(promise.topic in task.prompt for promise in promises)
            assert ("\n- " in "\n" + almanac.plain(task)) == (family in ("list", "compare", "report"))


def test_points_are_the_plain_answer_in_parts(rng: np.random.Generator) -> None:
    for family in almanac.FAMILIES:
        for _ in range(50):
            task = almanac.training_task(rng, family)
            names, texts = zip(*families.points(task))
            assert "".join(texts) == almanac.plain(task)
            assert len(set(names)) == len(names)
            assert sot.read_points(sot.skeleton(names)) == list(names)
            assert len(names) == len(task.steps) if family == "chain" else True


def test_skeleton_documents_ask_as_skeleton_of_thought_does(rng: np.random.Generator) -> None:
    asked = collections.Counter[str]()
    for _ in range(100):
        prompt, answer = skeleton_document(rng)
        assert prompt is not None
        question, _, rest = prompt.partition("\nGive only")
        if rest:
            asked["skeleton"] += 1
            named = [name for name, _ in families.points(almanac.task_of(question))]
            assert sot.read_points(answer) == named
        else:
            asked["point"] += 1
            match = re.fullmatch(r"(.*?)\n1\. .*Write only \d+\. ([^\n]+)", prompt, re.DOTALL)
            assert match is not None
            question, point = match.groups()
            assert (point, answer) in families.points(almanac.task_of(question))
    assert min(asked.values()) > 20


def test_comparisons_have_one_winner(rng: np.random.Generator) -> None:
    for _ in range(200):
        task = almanac.training_task(rng, "compare")
        kind = almanac.KIND_OF[task.facts[0].entity]
        (s,) = (s for s in kind.superlatives if task.conclusion.startswith(f"Which {s.phrase}?"))
        values = {fact.entity: int(almanac.value(*fact)) for fact in task.facts if fact.noun == s.noun}
        assert len(set(values.values())) == len(values) >= 2
        best = max(values.values())
        (first,) = (entity for entity, value in values.items() if value == best)
        assert task.conclusion == f"Which {s.phrase}? {first}."


def test_worked_report() -> None:
    task = almanac.report_task(
        [almanac.Section(("Peru",), ("capital",)), almanac.Section(("Iron", "Tin"), ("symbol", "group"))]
    )
    assert task.prompt == "Write a report.\n- Peru: capital.\n- Elements Iron and Tin: symbol and group."
    assert almanac.plain(task) == (
        "## Peru\nIts capital is Lima.\n"
        "## Elements\n- Iron: Its symbol is Fe. Its group is 8.\n- Tin: Its symbol is Sn. Its group is 14.\n"
    )
    assert [promise.topic for promise in task.plan.promises()] == ["Peru", "Elements"]


# -------------------------------------------------------------------------------------------------- split


def test_evaluation_never_occurs_in_training(rng: np.random.Generator) -> None:
    tasks = almanac.evaluation_tasks(500)
    assert len({task.prompt for task in tasks}) == 500
    counts = collections.Counter(task.family for task in tasks)
    assert set(counts.values()) == {71, 72}
    combinations = {task.combination for task in tasks}
    prompts = {task.prompt for task in tasks}
    for _ in range(5000):
        task = almanac.training_task(rng)
        assert task.combination not in combinations
        assert not almanac.held_out(task.combination)
        assert task.prompt not in prompts
    for (prompt, _), _ in zip(almanac.base_documents(rng), range(3000)):
        if prompt is not None:
            question = re.split(r"\n(?:Give only|1\. )", prompt)[0]  # without what a skeleton adds
            assert not almanac.held_out(almanac.task_of(question).combination)


def test_the_split_ignores_order_family_and_wording() -> None:
    nouns = ("capital", "currency")
    same = [
        almanac.list_task(("Peru", "Cuba", "Laos"), nouns),
        almanac.list_task(("Laos", "Cuba", "Peru"), nouns, 1),
        almanac.prose_task(("Cuba", "Laos", "Peru"), ("continent", "capital")),
        almanac.report_task([almanac.Section((e,), nouns) for e in ("Laos", "Peru", "Cuba")]),
    ]
    assert len({task.combination for task in same}) == 1


def test_the_split_is_stable_and_of_its_size() -> None:
    pairs = list(itertools.combinations(almanac.KIND_OF, 2))
    held = [pair for pair in pairs if almanac.held_out(split.entities(pair))]
    assert abs(len(held) / len(pairs) - 1 / split.ONE_IN) < 0.01
    # Whoever changes these has made a new benchmark: trained models may have seen its evaluation prompts.
    assert almanac.held_out(split.fact("France", "capital")) is False
    assert held[:3] == HELD


HELD = [("France", "Spain"), ("France", "Latvia"), ("France", "Hungary")]


def test_deterministic(seed: int) -> None:
    def draw() -> list[families.Task]:
        rng = np.random.default_rng(seed)
        return [almanac.training_task(rng) for _ in range(50)]

    assert draw() == draw()
    assert almanac.evaluation_tasks(70, seed=3) == almanac.evaluation_tasks(70, seed=3)
    assert almanac.evaluation_tasks(70, seed=3) != almanac.evaluation_tasks(70, seed=4)


def test_too_many_evaluation_prompts() -> None:
    with pytest.raises(ValueError, match="no 5000 distinct held-out prompts"):
        almanac.evaluation_tasks(5000)


# -------------------------------------------------------------------------- text, tokenizer and sources


def test_plain_text_states_every_fact(rng: np.random.Generator) -> None:
    text_of: dict[str, str] = collections.defaultdict(str)
    for (prompt, text), _ in zip(almanac.base_documents(rng, plain_text=1.0), range(6000)):
        assert prompt is None
        text_of[re.split(", an? ", text)[0].removeprefix("Consider ")] += text
    assert [fact for fact in almanac.FACTS if almanac.say(*fact) not in text_of[fact.entity]] == []


def test_tokenizer(rng: np.random.Generator) -> None:
    tokenizer = almanac.load_tokenizer()
    assert tokenizer.model == almanac.train_tokenizer(), "training is deterministic"
    vocabulary = tokenizer.vocabulary
    assert 1024 <= len(vocabulary) <= 1536
    assert set(vocabulary.tag_ids) == set(tags.PIECES)
    for turn in (USER_TURN, MODEL_TURN):
        assert turn.encode() not in vocabulary.pieces, "turn markers are control symbols"
    for entity in almanac.KIND_OF:
        assert len(tokenizer.encode(entity)) <= 4 and len(tokenizer.encode(f" {entity}")) <= 4
        assert len(tokenizer.encode(entity)) <= tags.MAX_TOPIC_TOKENS
    assert len(tokenizer.encode("item 6")) <= tags.MAX_TOPIC_TOKENS
    texts = [almanac.plain(almanac.training_task(rng)) for _ in range(100)]
    for text in ["a\nb\n\n  c ", "<sync/><user>", "naïve 北京 1803", *texts]:
        ids = tokenizer.encode(text)
        assert vocabulary.text(ids) == text
        assert not set(ids) & {*vocabulary.tag_ids.values(), *vocabulary.control, vocabulary.eos}
    assert [vocabulary.pieces[i] for i in tokenizer.encode("1803")] == [b"1", b"8", b"0", b"3"]
    newline = tokenizer.encode("\n")
    assert len(newline) == 1 and tokenizer.encode("a\nb").count(newline[0]) == 1


def test_reports_vary(rng: np.random.Generator) -> None:
    plans = [list(almanac.training_task(rng, "report").plan.promises()) for _ in range(200)]
    groups = {kind.plural.capitalize() for kind in almanac.KINDS}
    where = [[promise.topic in groups for promise in plan] for plan in plans]
    assert all(any(row) for row in where)
    assert {row[0] for row in where} == {row[-1] for row in where} == {True, False}
    assert {len(plan) for plan in plans} == {2, 3, 4}


def test_blocks_are_worth_a_promise(rng: np.random.Generator) -> None:
    tokenizer = almanac.load_tokenizer()
    for family in ("list", "prose", "compare", "mixed"):
        tasks = [almanac.training_task(rng, family) for _ in range(200)]
        texts = [text_of(promise.block) for task in tasks for promise in task.plan.promises()]
        blocks = [len(tokenizer.encode(text)) for text in texts]
        assert 20 <= np.mean(blocks) <= 35
        answers = [len(tokenizer.encode(almanac.plain(task))) for task in tasks]
        assert 60 <= np.median(answers) <= 220


@pytest.mark.parametrize("which", almanac.SOURCES)
def test_sources(which: str, seed: int) -> None:
    tokenizer = almanac.load_tokenizer().with_dialect("apar" if which == "apar" else "pasta")
    source = almanac.source(which, tokenizer, seed=seed, length=200)
    documents = [source[i] for i in range(50)]
    assert all(len(document) <= 200 for document in documents)
    again = almanac.source(which, tokenizer, seed=seed, length=200)
    assert all(np.array_equal(again[i].token, documents[i].token) for i in (49, 7))
    assert len({document.token.tobytes() for document in documents}) > 25
    begins = np.isin(tokenizer.vocabulary.kinds, OPENS)
    assert any(begins[document.token].any() for document in documents) == (which in ("annotated", "apar"))


def test_sources_refuse() -> None:
    tokenizer = almanac.load_tokenizer()
    with pytest.raises(ValueError, match="no 'nothing'; it has base, plain, annotated, apar"):
        almanac.source("nothing", tokenizer)
    with pytest.raises(ValueError, match="more than the 3 tokens"):
        almanac.source("plain", tokenizer, length=3)[0]


def test_no_jax() -> None:
    heavy = "[m for m in ('jax', 'tensorflow', 'torch') if m in sys.modules]"
    code = f"import sys, pasta_jax.data.almanac; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert facts.__doc__
