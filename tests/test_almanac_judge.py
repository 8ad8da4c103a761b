"""Almanac: the judge finds every fault, and the annotator errs exactly as often as it says."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from pasta_jax.data import almanac
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, length_in_tens


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


COUNTRIES = almanac.list_task(("France", "Japan"), ("capital", "currency"))
FRANCE = "- France: Its capital is Paris. Its currency is the euro.\n"
JAPAN = "- Japan: Its capital is Tokyo. Its currency is the yen.\n"
ELEMENTS = almanac.compare_task(
    ("Iron", "Tin"), ("symbol", "atomic number"), almanac.KIND_OF["Tin"].superlatives[0]
)
CHAIN = almanac.chain_task("Iron", 3, "symbol")
MIXED = almanac.mixed_task(("Iron", "Ohio"), (2, 2))
PERU = almanac.single_task(almanac.Fact("Peru", "capital"))
REPORT = almanac.report_task(
    [almanac.Section(("Peru",), ("capital",)), almanac.Section(("Iron", "Tin"), ("symbol",))]
)


def swap(text: str, a: str, b: str) -> str:
    assert a in text
    return text.replace(a, b)


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_gold_answers_are_true(family: str, rng: np.random.Generator) -> None:
    for _ in range(200):
        task = almanac.training_task(rng, family)
        verdict = almanac.truth(task, almanac.plain(task))
        assert (verdict.score, verdict.wrong) == (1.0, ())
        assert almanac.truth(task.prompt, almanac.plain(task)).score == 1.0


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        # COUNTRIES expects four facts.
        (COUNTRIES, JAPAN + FRANCE, 1),
        (COUNTRIES, "Consider France, a country. " + FRANCE[10:].strip() + " " + JAPAN[2:], 2 / 6),
        (COUNTRIES, FRANCE, 2 / 4),
        (COUNTRIES, "", 0),
        (COUNTRIES, FRANCE + swap(JAPAN, "Tokyo", "Kyoto"), 3 / 5),
        (COUNTRIES, FRANCE + swap(JAPAN, "Tokyo", "Paris"), 3 / 5),
        (COUNTRIES, FRANCE + swap(JAPAN, "- Japan", "- France"), 2 / 7),  # repeated, and twice false
        (COUNTRIES, FRANCE + JAPAN + JAPAN, 4 / 7),  # the name and two facts again
        (COUNTRIES, FRANCE + JAPAN + "And so on.\n", 4 / 5),
        (COUNTRIES, FRANCE + JAPAN + "- Peru: Its capital is Lima.\n", 4 / 6),  # true, but not asked for
        (COUNTRIES, FRANCE + swap(JAPAN, "currency is the yen", "continent is Asia"), 3 / 5),
        (COUNTRIES, FRANCE + JAPAN[:-6], 3 / 5),  # cut short
        (COUNTRIES, "Its capital is Paris.", 0),  # whose?
        # ELEMENTS expects four facts and a conclusion that counts two.
        (ELEMENTS, swap(almanac.plain(ELEMENTS), "? Tin", "? Iron"), 4 / 7),
        (ELEMENTS, swap(almanac.plain(ELEMENTS), "highest", "lowest"), 4 / 7),
        (ELEMENTS, swap(almanac.plain(ELEMENTS), "Which has the highest atomic number? Tin.", ""), 4 / 6),
        (ELEMENTS, almanac.plain(ELEMENTS) + " Which has the highest atomic number? Tin.", 6 / 7),
        (ELEMENTS, "Which has the highest atomic number? Tin.", 2 / 6),
        # CHAIN expects three steps and three facts.
        (CHAIN, "".join(reversed(almanac.plain(CHAIN).splitlines(True))), 4 / 8),  # only step 3 is in order
        (CHAIN, swap(almanac.plain(CHAIN), "3. ", "4. "), 5 / 7),
        (CHAIN, swap(almanac.plain(CHAIN), "comes Nickel", "comes Zinc"), 4 / 8),  # nor is it Zinc's symbol
        (CHAIN, "".join(almanac.plain(CHAIN).splitlines(True)[:2]), 4 / 6),
        (CHAIN, re.sub(r"\d\. ", "", almanac.plain(CHAIN)), 0),
        # MIXED expects four steps.
        (MIXED, "".join(almanac.plain(MIXED).splitlines(True)[i] for i in (3, 4, 5, 0, 1, 2)), 1),
        (MIXED, "".join(almanac.plain(MIXED).splitlines(True)[i] for i in (0, 2, 1, 3, 4, 5)), 3 / 5),
        (MIXED, swap(almanac.plain(MIXED), "From Ohio:\n", ""), 2 / 6),
        (MIXED, almanac.plain(MIXED) + "From Iron:\n", 4 / 5),
        # PERU expects one fact.
        (PERU, "Its capital is Lima. Its capital is Lima.", 1 / 2),
        (PERU, "Its capital is Quito.", 0),
        (PERU, "Consider Peru, a country. Its capital is Lima.", 1),
        (PERU, "Consider Peru, a planet. Its capital is Lima.", 0),
        # REPORT expects three facts.
        (REPORT, almanac.plain(REPORT) + "## Peru\n", 3 / 4),
        (REPORT, almanac.plain(REPORT) + "## Planets\n", 3 / 4),
        (REPORT, swap(almanac.plain(REPORT), "- Tin", "- Lead"), 2 / 5),
    ],
)  # fmt: skip
def test_faults_cost_what_the_formula_says(task: almanac.Task, answer: str, score: float) -> None:
    verdict = almanac.truth(task, answer)
    assert verdict.score == pytest.approx(score), verdict


def test_random_corruptions_cost(rng: np.random.Generator) -> None:
    for _ in range(300):
        task = almanac.training_task(rng)
        text = almanac.plain(task)
        sentences = re.findall(r"[^.]+\.", text)
        i = int(rng.integers(len(sentences)))
        worse = {
            "repeated": text.rstrip("\n") + "\n" + text,
            "junk": text + " Quite so.",
            "half": "".join(sentences[: len(sentences) // 2]),
            "value": "".join([*sentences[:i], re.sub(r"\S+\.$", "Mu.", sentences[i]), *sentences[i + 1 :]]),
        }
        for what, answer in worse.items():
            assert almanac.truth(task, answer).score < 1, (what, answer)
            assert almanac.compare(task, text, answer).winner == 0
        assert almanac.truth(task, worse["repeated"]).score <= 0.75, task


def test_noise_never_breaks_the_judge(rng: np.random.Generator) -> None:
    pieces = [
        *"\n.:-# 1",
        "After ",
        " comes ",
        "Its capital is ",
        "Peru",
        "## ",
        "From ",
        "- ",
        "Consider ",
    ]
    for _ in range(500):
        task = almanac.training_task(rng)
        noise = "".join(pieces[i] for i in rng.integers(len(pieces), size=30))
        assert 0 <= almanac.truth(task, noise).score <= 1
        assert 0 <= almanac.truth(task, almanac.plain(task) + noise).score <= 1


def test_compare_is_symmetric(rng: np.random.Generator) -> None:
    for _ in range(200):
        task = almanac.training_task(rng)
        lines = almanac.plain(task).splitlines(True)
        a, b = ("".join(rng.permutation(lines)[: rng.integers(len(lines) + 1)]) for _ in range(2))
        ab, ba = almanac.compare(task, a, b), almanac.compare(task, b, a)
        assert 0.5 <= ab.confidence == ba.confidence <= 1
        assert ba.winner == (None if ab.winner is None else 1 - ab.winner)
        assert (ab.winner is None) == (ab.confidence == 0.5)


def test_compare_worked() -> None:
    good, bad = FRANCE + JAPAN, FRANCE + swap(JAPAN, "Tokyo", "Kyoto")
    assert almanac.compare(COUNTRIES, good, good) == (None, 0.5)
    assert almanac.compare(COUNTRIES, bad, good) == (1, 1.0)
    almost = almanac.compare(COUNTRIES.prompt, FRANCE + JAPAN + "So.", FRANCE + JAPAN)
    assert almost.winner == 1
    assert almost.confidence == pytest.approx(0.5 + 2 * (1 - 4 / 5))
    padded = almanac.compare(COUNTRIES, good, "\n" * len(good) + good)
    assert padded.winner == 0
    assert padded.confidence == pytest.approx(0.5 + 0.2 / 2)


# ---------------------------------------------------------------------------------------------- annotator


def annotated(rng: np.random.Generator, family: str, rates: almanac.Rates, n: int = 1) -> list[Program]:
    return [almanac.annotate(almanac.training_task(rng, family), rng, len, rates) for _ in range(n)]


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_the_text_is_never_altered(family: str, rng: np.random.Generator) -> None:
    rates = almanac.Rates(*[0.5] * len(dataclasses.fields(almanac.Rates)))
    for _ in range(200):
        task = almanac.training_task(rng, family)
        program = almanac.annotate(task, rng, len, rates)
        assert text_of(program.nodes) == almanac.plain(task)
        for promise in program.promises():
            assert 1 <= promise.tokens <= 99
            assert not any(isinstance(node, Promise) for node in promise.block), "depth 1"
        texts = [isinstance(node, Text) for node in program.nodes]
        assert not any(a and b for a, b in itertools.pairwise(texts)), "neighbouring texts are merged"


def test_a_perfect_annotator_gives_the_plan(rng: np.random.Generator) -> None:
    for family in almanac.FAMILIES:
        task = almanac.training_task(rng, family)
        program = almanac.annotate_exactly(task, len)
        exact = [length_in_tens(len(text_of(promise.block))) for promise in task.plan.promises()]
        assert [promise.tokens for promise in program.promises()] == exact
        assert [p.topic for p in program.promises()] == [p.topic for p in task.plan.promises()]
        assert (Sync() in program.nodes) == (family == "compare")


def test_lengths_in_tens() -> None:
    assert [length_in_tens(n) for n in (1, 14, 16, 24, 26, 5000)] == [1, 1, 2, 2, 3, 99]


def test_seeded() -> None:
    first, second = (annotated(np.random.default_rng(5), "list", almanac.Rates(), 20) for _ in range(2))
    assert first == second


N = 1500
"""Answers per measurement: a rate's standard error is then at most 1.3 points."""


def near(count: int, total: int, rate: float) -> bool:
    """Within five standard errors: a false alarm in two million."""
    assert total > 300
    return abs(count / total - rate) < 5 * max(rate * (1 - rate) / total, 1e-9) ** 0.5 + 1e-9


def promises_in(nodes: tuple[Node, ...]) -> int:
    return sum(isinstance(node, Promise) for node in nodes)


def test_rates_of_misses(rng: np.random.Generator) -> None:
    rates = almanac.Rates()
    programs = annotated(rng, "list", dataclasses.replace(rates, miss_part=0), N)
    assert near(sum(not promises_in(p.nodes) for p in programs), N, rates.miss_answer)
    kept = parts = 0
    for _ in range(N):
        task = almanac.training_task(rng, "prose")
        kept += promises_in(almanac.annotate(task, rng, len, dataclasses.replace(rates, miss_answer=0)).nodes)
        parts += promises_in(task.plan.nodes)
    assert near(parts - kept, parts, rates.miss_part)


def test_rates_of_false_promises(rng: np.random.Generator) -> None:
    rates = almanac.Rates()
    chains = annotated(rng, "chain", rates, N)
    assert near(sum(promises_in(p.nodes) > 0 for p in chains), N, rates.false_chain)
    singles = annotated(rng, "single", rates, N)
    assert near(sum(promises_in(p.nodes) > 0 for p in singles), N, rates.false_single)
    for program in annotated(rng, "chain", dataclasses.replace(rates, false_chain=1), 50):
        assert isinstance(program.nodes[0], Text), "the first item is never promised"
        assert promises_in(program.nodes) >= 1


def test_rates_of_careless_sync(rng: np.random.Generator) -> None:
    never = dataclasses.replace(almanac.PERFECT, missing_sync=almanac.Rates.missing_sync)
    programs = annotated(rng, "compare", never, N)
    assert near(sum(Sync() not in p.nodes for p in programs), N, almanac.Rates.missing_sync)
    stray = dataclasses.replace(almanac.PERFECT, stray_sync=almanac.Rates.stray_sync)
    programs = annotated(rng, "list", stray, N)
    assert near(sum(Sync() in p.nodes for p in programs), N, almanac.Rates.stray_sync)


def test_rate_of_wrong_lengths(rng: np.random.Generator) -> None:
    rates = dataclasses.replace(almanac.PERFECT, wrong_length=almanac.Rates.wrong_length)
    wrong = total = 0
    for _ in range(N // 3):
        task = almanac.training_task(rng, "list")
        true = almanac.annotate_exactly(task, len).promises()
        for written, meant in zip(almanac.annotate(task, rng, len, rates).promises(), true, strict=True):
            assert abs(written.tokens - meant.tokens) <= 1
            wrong, total = wrong + (written.tokens != meant.tokens), total + 1
    assert near(wrong, total, rates.wrong_length)
