"""The annotator `llm`: a language model marks the parts that are independent, and another look judges each of them.

The model only inserts tags: what it returns is compared with the answer, and where it altered the text it is asked
once more, then the answer is declined. Then the model is shown each group of blocks that would be written at once,
and says of each whether it is independent (ASPD's idea, a judge apart from the annotator). A block that is not
becomes ordinary text; the record stays. The prompts are in llm.toml.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pasta_jax.annotate.annotators import AnnotatorError, Options
from pasta_jax.annotate.insertion import NotInserted, inserted, spells_tag
from pasta_jax.annotate.naming import topics
from pasta_jax.annotate.protocol import Annotated, Declined, Item, Messages, Result
from pasta_jax.data.records import prompt_text
from pasta_jax.endpoint.client import Endpoint, Planned
from pasta_jax.endpoint.cost import estimated_tokens
from pasta_jax.endpoint.flags import endpoint_of
from pasta_jax.endpoint.post import EndpointError, RequestError
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import joined
from pasta_jax.lang.topics import shortened
from pasta_jax.lang.validate import MAX_BRANCHES, MIN_BLOCK_WORDS, count_words
from pasta_jax.tokens.tokenizer import TextError, Tokenizer, check_text

SHORT = f"shorter than {MIN_BLOCK_WORDS} words"
SAME_TOPIC = "same topic as another block"
NO_VERDICT = "no verdict of the independence judge"
FAILED_RULES = {
    -1: "not independent",
    1: "uses what another block says",
    2: "needs another block first",
    3: "says the same as another block",
    4: "text outside of blocks relies on it",
}
"""What the independence judge finds, by the numbers of its rules in llm.toml."""

_VERDICT = re.compile(r"\W*(\d+)\W+(true|false)\b\W*([1-4])?", re.IGNORECASE)


@functools.cache
def prompts() -> Mapping[str, Any]:
    """The texts of llm.toml."""
    return tomllib.loads(pathlib.Path(__file__).with_name("llm.toml").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class LlmAnnotator:
    """Annotates answers by an endpoint.

    Attributes:
      endpoint: which is asked.
      tokenizer: of the model that will be trained; it measures blocks and topics.
      max_branches: the most promises of an answer; of more blocks the longest are kept.
    """

    endpoint: Endpoint
    tokenizer: Tokenizer
    max_branches: int = MAX_BRANCHES

    def __call__(self, prompt: str | Messages, answer: str) -> Annotated:
        """Annotates one answer.

        Raises:
          Declined: the model alters the text, or the answer itself spells tags.
          RequestError: the endpoint does not answer the request.
          EndpointError: the endpoint does not answer any more.
        """
        if spells_tag(answer):
            raise Declined("the answer itself spells a tag")
        try:
            check_text(answer)
        except TextError as error:
            raise Declined(str(error)) from None
        question = prompt_text(prompt)
        notes: list[str] = []
        nodes = _useful(self._without_doubtful(self._inserted(question, answer), notes))
        nodes = self._independent(question, nodes, notes)
        return Annotated(Program(self._measured(_useful(nodes), notes)), tuple(notes))

    def annotate_all(self, items: Iterable[Item]) -> Iterator[Result]:
        """A result for each item, as they come; those that the endpoint failed at last.

        So a run that ends because the endpoint is gone has declined none for that, and the next one asks again.
        What it refuses, while it answers others, is declined at once.

        Raises:
          EndpointError: the endpoint does not answer any more. What is done was yielded before.
        """
        unanswered: list[Result] = []

        def work(item: Item) -> tuple[Result, bool]:
            try:
                return Result(item.key, self(item.prompt, item.answer)), True
            except Declined as declined:
                return Result(item.key, None, str(declined)), True
            except RequestError as error:
                return Result(item.key, None, str(error)), error.is_refusal

        for result, is_final in self.endpoint.each(work, items):
            if is_final:
                yield result
            else:
                unanswered.append(result)
        yield from unanswered

    def estimate(self, items: Iterable[Item], *, shown: int = 0) -> str:
        """What annotating the items would take. A judge is counted for each, as if all blocks were one group."""

        def planned() -> Iterator[Planned]:
            for item in items:
                question, tokens = prompt_text(item.prompt), estimated_tokens(item.answer)
                yield Planned(_insertion(question, item.answer), int(1.2 * tokens) + 20)
                yield Planned(_judgement(question, "", item.answer), 80, follows=True)

        return self.endpoint.estimate(planned(), shown=shown)

    def status(self) -> str:
        """What was asked so far, and what that cost."""
        return str(self.endpoint.meter)

    def _inserted(self, question: str, answer: str) -> tuple[Node, ...]:
        """The answer with the model's tags. Raises Declined."""
        messages = _insertion(question, answer)
        expected = int(1.2 * len(self.tokenizer.encode(answer))) + 20
        reply = self.endpoint.ask(messages, expected=expected)
        try:
            return inserted(reply.said, answer)
        except NotInserted as error:
            again = prompts()["correction"].strip().format(problem=error)
        messages += [{"role": "assistant", "content": reply.said}, {"role": "user", "content": again}]
        reply = self.endpoint.ask(messages, expected=expected)
        try:
            return inserted(reply.said, answer)
        except NotInserted as error:
            cut = ", cut off by the endpoint" if reply.finish == "length" else ""
            raise Declined(
                f"the model did not return the answer with tags, twice: {error.kind}{cut}"
            ) from None

    def _without_doubtful(self, nodes: Sequence[Node], notes: list[str]) -> tuple[Node, ...]:
        """The nodes with topics that fit and differ; short blocks, and those of an earlier topic, become text."""
        kept: dict[int, Promise] = {}
        given: set[str] = set()
        for i, node in enumerate(nodes):
            if not isinstance(node, Promise):
                continue
            if count_words(text_of(node.block)) < MIN_BLOCK_WORDS:
                notes.append(SHORT)
            elif node.topic.lower() in given - {""}:
                notes.append(SAME_TOPIC)
            else:
                kept[i] = node
                given.add(node.topic.lower())
        names = [shortened(self.tokenizer, promise.topic) for promise in kept.values()]
        if not all(names) or len({name.casefold() for name in names}) < len(names):
            blocks = [(promise.topic, text_of(promise.block)) for promise in kept.values()]
            names = topics(self.tokenizer, blocks)
        chosen = dict(zip(kept, names, strict=True))

        def checked(i: int, node: Node) -> Node:
            if i in kept:
                return dataclasses.replace(kept[i], topic=chosen[i])
            return Text(text_of(node.block)) if isinstance(node, Promise) else node

        return tuple(checked(i, node) for i, node in enumerate(nodes))

    def _independent(self, question: str, nodes: Sequence[Node], notes: list[str]) -> tuple[Node, ...]:
        """The nodes without blocks that are not independent; what relies on a block comes after a sync."""
        kept: list[Node] = []
        for group in _groups(nodes):
            count = sum(isinstance(node, Promise) for node in group)
            verdicts = self._verdicts(question, text_of(kept), group, count) if count else {}
            number, is_open = 0, False
            for node in group:
                if isinstance(node, Promise):
                    number += 1
                    rule = verdicts.get(number)
                    if rule != 0:
                        notes.append(NO_VERDICT if rule is None else FAILED_RULES[rule])
                        if is_open and rule not in (3, 4):
                            kept.append(Sync())
                            is_open = False
                        kept += node.block
                        continue
                    is_open = True
                kept.append(node)
        return tuple(kept)

    def _measured(self, nodes: Sequence[Node], notes: list[str]) -> tuple[Node, ...]:
        """The nodes with the length of each block in its promise, and without the shortest of too many blocks."""
        lengths = {
            i: len(self.tokenizer.encode(text_of(node.block)))
            for i, node in enumerate(nodes)
            if isinstance(node, Promise)
        }
        kept = {*sorted(lengths, key=lambda i: -lengths[i])[: self.max_branches]}
        notes += [f"more than {self.max_branches} blocks"] * (len(lengths) - len(kept))

        def measured(i: int, node: Node) -> Node:
            if not isinstance(node, Promise):
                return node
            if i not in kept:
                return Text(text_of(node.block))
            return dataclasses.replace(node, tokens=length_in_tens(lengths[i]))

        return joined(measured(i, node) for i, node in enumerate(nodes))

    def _verdicts(self, question: str, before: str, group: Sequence[Node], count: int) -> dict[int, int]:
        """Of each block by its number from 1: 0 if it is independent, else a key of FAILED_RULES."""
        messages = _judgement(question, before, _passage(group))
        expected = 20 * count + 10
        reply = self.endpoint.ask(messages, expected=expected)
        verdicts = _read_verdicts(reply.said)
        if not all(number in verdicts for number in range(1, count + 1)):
            again = prompts()["independence_correction"].strip().format(count=count)
            messages += [{"role": "assistant", "content": reply.said}, {"role": "user", "content": again}]
            verdicts |= _read_verdicts(self.endpoint.ask(messages, expected=expected).said)
        return verdicts


def _read_verdicts(reply: str) -> dict[int, int]:
    r"""The lines of the independence judge.

    >>> _read_verdicts("Here they are:\n1 true: alone\n2. **False** 1: the sum of 1\n3: false, because")
    {1: 0, 2: 1, 3: -1}
    """
    found = filter(None, map(_VERDICT.match, reply.splitlines()))
    return {int(match[1][:9]): 0 if match[2].lower() == "true" else int(match[3] or -1) for match in found}


def _insertion(question: str, answer: str) -> list[dict[str, str]]:
    """The request for tags. What all requests have in common stands first, so that providers can cache it."""
    texts = prompts()
    messages = [{"role": "system", "content": texts["rules"].strip()}]
    for example in texts["examples"]:
        annotated = example["annotated"].removesuffix("\n")
        messages.append({"role": "user", "content": _task(example["question"], _stripped(annotated))})
        messages.append({"role": "assistant", "content": annotated})
    return [*messages, {"role": "user", "content": _task(question, answer)}]


def _task(question: str, answer: str) -> str:
    before, after = prompts()["task"].strip().split("{answer}")
    return before.format(question=question) + answer + after


def _stripped(annotated: str) -> str:
    """An answer of the examples without its tags."""
    return re.sub(r'<async topic="[^"]*">|</async>|<sync/>', "", annotated)


def _judgement(question: str, before: str, passage: str) -> list[dict[str, str]]:
    """The request for verdicts on the blocks of a passage."""
    texts = prompts()
    task = texts["independence_task"].strip().format(question=question, before=before, passage=passage)
    return [
        {"role": "system", "content": texts["independence"].strip()},
        {"role": "user", "content": task},
    ]


def _passage(group: Sequence[Node]) -> str:
    """A group with its blocks numbered, for the judge."""
    pieces, number = [], 0
    for node in group:
        if isinstance(node, Promise):
            number += 1
            pieces.append(f"[part {number}: {node.topic}]{text_of(node.block)}[end of part {number}]")
        else:
            pieces.append(text_of([node]))
    return "".join(pieces)


def _groups(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """The nodes up to each sync, which ends its group."""
    group: list[Node] = []
    for node in nodes:
        group.append(node)
        if isinstance(node, Sync):
            yield group
            group = []
    yield group


def _useful(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes without syncs that wait for nothing or end the answer, and blocks that have nothing beside them."""
    kept: list[Node] = []
    for group in _groups(nodes):
        promised = [i for i, node in enumerate(group) if isinstance(node, Promise)]
        if len(promised) == 1:
            [place] = promised
            if not text_of(group[place + 1 :]).strip():
                group[place] = Text(text_of([group[place]]))
        kept += group
    useful: list[Node] = []
    is_open = False
    for i, node in enumerate(kept):
        if isinstance(node, Sync):
            if not is_open or not text_of(kept[i + 1 :]).strip():
                continue
            is_open = False
        is_open |= isinstance(node, Promise)
        useful.append(node)
    return joined(useful)


def make(options: Options) -> LlmAnnotator:
    """The annotator that the flags of the command describe; the folder of the run keeps the replies.

    Raises:
      AnnotatorError: the endpoint's flags cannot be used.
      InUse: another process uses the replies.
    """
    try:
        endpoint = endpoint_of(options.flags, cache=os.path.join(options.folder, "replies"))
    except EndpointError as error:
        raise AnnotatorError(str(error)) from None
    return LlmAnnotator(endpoint, options.tokenizer, options.max_branches)
