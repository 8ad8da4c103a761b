r"""The exact judge: a program, not a model.

It reads a response line by line as statements: facts ("Its capital is Paris." about the entity named last), chain
steps ("2. After Cobalt comes Nickel."), and the conclusion. Headings and introductions name the entity of the facts
that follow. Then

    score = right / (expected + wrong)

  right     expected statements in the response that are true; the conclusion counts CONCLUSION_WEIGHT
  expected  statements that the prompt asks for; the conclusion counts CONCLUSION_WEIGHT
  wrong     statements and headings that are false, repeated, not asked for, unreadable, or out of order (steps)

so a missing statement costs less than a false one, and a repetition costs as much as nonsense. Independent parts
may come in any order; the exact reference text is not required.

Examples:
  >>> from pasta_jax.data.almanac.families import list_task
  >>> task = list_task(("France", "Japan"), ("capital",))
  >>> truth(task, "- Japan: Its capital is Tokyo.\n- France: Its capital is Paris.").score
  1.0
  >>> truth(task, "- Japan: Its capital is Paris.")
  Verdict(score=0.0, right=0, expected=2, wrong=('Japan: Its capital is Paris.',))
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from pasta_jax.data.almanac import facts
from pasta_jax.data.almanac.facts import KIND_OF, KINDS, Fact
from pasta_jax.data.almanac.families import Task, say_step
from pasta_jax.data.almanac.prompts import task_of
from pasta_jax.data.judgement import Preference

CONCLUSION_WEIGHT = 2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of judging; `score` is in [0, 1], `wrong` lists the wrong statements."""

    score: float
    right: int
    expected: int
    wrong: tuple[str, ...]


def truth(task: Task | str, response: str) -> Verdict:
    """Scores a response to a task, or to its prompt (ValueError if that is no almanac prompt)."""
    task = task_of(task) if isinstance(task, str) else task
    reader = _Reader(task)
    for line in response.splitlines():
        reader.read_line(line.strip())
    expected = len(task.facts) + len(task.steps) + (CONCLUSION_WEIGHT if task.conclusion else 0)
    return Verdict(reader.right / (expected + len(reader.wrong)), reader.right, expected, tuple(reader.wrong))


def compare(task: Task | str, a: str, b: str) -> Preference:
    """Which response is better, in the protocol of an LLM judge.

    The higher truth score wins, with confidence 0.5 + 2 * |difference|, at most 1. With equal scores the
    shorter one wins, with confidence 0.5 + 0.2 * |difference of lengths|
    / longer length. With equal lengths it is a tie with confidence 0.5. Swapping a and b swaps the winner and
    nothing else.

    Examples:
      >>> from pasta_jax.data.almanac.families import single_task
      >>> compare(single_task(Fact("Peru", "capital")), "Its capital is Quito.", "Its capital is Lima.")
      Preference(winner=1, confidence=1.0)
    """
    score_a, score_b = (
        _score(task, response) if isinstance(task, str) else truth(task, response).score
        for response in (a, b)
    )
    if abs(score_a - score_b) > 1e-9:
        return Preference(int(score_b > score_a), min(1.0, 0.5 + 2 * abs(score_a - score_b)))
    if len(a) != len(b):
        return Preference(int(len(b) < len(a)), 0.5 + 0.2 * abs(len(a) - len(b)) / max(len(a), len(b)))
    return Preference(None, 0.5)


@functools.lru_cache(maxsize=4096)
def _score(prompt: str, response: str) -> float:
    """The truth score, cached: an answer is compared with several others, in both orders."""
    return truth(prompt, response).score


# Sentences are read with the patterns that write them; a value is anything without a full stop.
_FACT_PATTERNS = {
    kind.name: [
        (attribute.noun, re.compile(re.escape(attribute.sentence).replace(r"\{\}", r"([^.]+)")))
        for attribute in kind.attributes
    ]
    for kind in KINDS
}
_ITEM = re.compile(r"- ([^:]+):(?: |$)")
_HEADING = re.compile(r"## (.+)")
_FROM = re.compile(r"From ([^:]+):")
_NUMBERED = re.compile(r"(\d+)\. (After [^.]+ comes ([^.]+)\.)(?: |$)")
_INTRODUCTION = re.compile(rf"Consider ([^.]+), (?:{'|'.join(kind.article for kind in KINDS)})\.")
_SENTENCE = re.compile(r"[^.]*\.?\s*")


class _Reader:
    """Reads a response line by line; keeps the current entity and the statements so far."""

    def __init__(self, task: Task):
        self.task = task
        self.right = 0
        self.wrong: list[str] = []
        self._open = {*task.facts}  # asked for and not yet stated
        self._steps = {(step.start, step.number): step for step in task.steps}
        self._conclusion = task.conclusion
        self._named: set[str] = set()  # entities and headings introduced so far
        self._entity = task.facts[0].entity if task.family == "single" else ""
        self._start = task.steps[0].start if task.family == "chain" else ""
        self._number = 0  # of the last item of this chain
        self._groups = {KIND_OF[fact.entity].plural.capitalize() for fact in task.facts}
        self._entities = {fact.entity for fact in task.facts}

    def read_line(self, line: str) -> None:
        if not line:
            return
        if match := _HEADING.fullmatch(line):
            self._name(match[1], line, allowed=self.task.family == "report")
        elif match := _FROM.fullmatch(line):
            self._start_chain(match[1], line)
        elif match := _ITEM.match(line):
            self._name(match[1], match[0], allowed=match[1] in self._entities)
            self._read_sentences(line[match.end() :])
        elif match := _NUMBERED.match(line):
            self._step(int(match[1]), match[2], match[3])
            self._read_sentences(line[match.end() :])
        else:
            self._read_sentences(line)

    def _read_sentences(self, text: str) -> None:
        for sentence in _sentences(text):
            if sentence == self._conclusion:
                self._conclusion = ""
                self.right += CONCLUSION_WEIGHT
            elif match := _INTRODUCTION.fullmatch(sentence):
                # A false introduction names no entity, and the facts after it are wrong.
                known = match[1] in self._entities and facts.introduce(match[1]) == sentence
                self._name(match[1] if known else "", sentence, allowed=known)
            else:
                self._fact(sentence)

    def _name(self, name: str, text: str, *, allowed: bool) -> None:
        """The following facts are about `name`, an entity or the heading of a group."""
        self._entity = name if name in KIND_OF else ""
        if not allowed or name in self._named or name not in self._entities | self._groups:
            self.wrong.append(text)
        self._named.add(name)

    def _fact(self, sentence: str) -> None:
        kind = KIND_OF.get(self._entity)
        for noun, pattern in _FACT_PATTERNS[kind.name] if kind else ():
            match = pattern.fullmatch(sentence)
            if match is None:
                continue
            fact = Fact(self._entity, noun)
            if fact in self._open and facts.value(*fact) == match[1]:
                self._open.remove(fact)
                self.right += 1
                return
        self.wrong.append(f"{self._entity}: {sentence}" if self._entity else sentence)

    def _start_chain(self, start: str, text: str) -> None:
        if start in self._named or (start, 1) not in self._steps:
            self.wrong.append(text)
        self._named.add(start)
        self._start, self._number, self._entity = start, 0, ""

    def _step(self, number: int, text: str, after: str) -> None:
        """A step is right if it is true, has the right number, and no later step came before it."""
        step = self._steps.get((self._start, number))
        if step and number > self._number and text == say_step(step.before, step.after):
            del self._steps[self._start, number]
            self.right += 1
        else:
            self.wrong.append(f"{number}. {text}")
        self._number = max(self._number, number)
        self._entity = after


def _sentences(text: str) -> Iterator[str]:
    yield from filter(None, (sentence.strip() for sentence in _SENTENCE.findall(text)))
