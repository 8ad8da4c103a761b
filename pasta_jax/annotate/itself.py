"""`self`: the promises of a rule, filtered by a model that reads the answers, without any endpoint.

Another annotator proposes. The model then measures what each block loses by not seeing its siblings (`audit`). A
block that loses more than a set number of nats per token becomes text of main again, after a sync, so that main has
read what it needs; longer text of main that loses as much gets a sync before it. That changes what others see, so
the answer is audited again until nothing more is taken back. Last, promises that no longer make the answer faster
go too.

Every round takes a promise back or adds a sync where branches were open, so there is an end; most answers need one
or two rounds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pasta_jax.annotate.annotators import MAX_LOSS, AnnotatorError, Options, make_annotator
from pasta_jax.annotate.audit import Auditor, Part
from pasta_jax.annotate.protocol import (
    Annotated,
    Annotator,
    Estimating,
    Item,
    ManyAnnotator,
    Result,
    annotate_all,
)
from pasta_jax.annotate.sequential import taken_back, that_pay
from pasta_jax.lang.topics import with_short_topics
from pasta_jax.tokens.tokenizer import Tokenizer

LOADING = ("dtype", "base")
"""Flags that `loading.load` takes."""

MIN_TEXT = 12
"""Tokens. Shorter text of main beside its branches is marks and names of items, which main plans by itself."""

NEEDS = "needs its siblings"
WAITS = "a sync before what needs the blocks"
DOES_NOT_PAY = "would not pay"


@dataclasses.dataclass(frozen=True)
class SelfAudit:
    """The annotator (`protocol.ManyAnnotator`).

    Attributes:
      candidates: proposes promises.
      auditor: the model that reads.
      tokenizer: of the model to train; it counts what promises cost.
      max_loss: nats per token; a block that loses more stays sequential.
      min_speedup: an answer that is not this much faster stays plain, by theoretical speedup.
      chunk: answers audited together.
    """

    candidates: Annotator | ManyAnnotator
    auditor: Auditor
    tokenizer: Tokenizer
    max_loss: float = MAX_LOSS
    min_speedup: float = 1.1
    chunk: int = 64

    def annotate_all(self, items: Iterable[Item]) -> Iterator[Result]:
        """One result for each item, in the order of the candidates."""
        prompts = dict[str, Item]()

        def noted() -> Iterator[Item]:
            for item in items:
                prompts[item.key] = item
                yield item

        proposed = annotate_all(self.candidates, noted())
        while some := [*itertools.islice(proposed, self.chunk)]:
            yield from self._filtered([(prompts.pop(result.key), result) for result in some])

    def _filtered(self, proposed: list[tuple[Item, Result]]) -> Iterator[Result]:
        results = {item.key: result for item, result in proposed}
        waiting = [
            (item, self._with_short_topics(result.annotated))
            for item, result in proposed
            if result.annotated is not None
        ]
        while waiting:
            documents = []
            for item, annotated in waiting:
                if any(True for _ in annotated.program.promises()):
                    try:
                        document = self.auditor.document(item.prompt, annotated.program)
                        documents.append((item, annotated, document))
                    except ValueError as error:
                        results[item.key] = Result(item.key, None, f"cannot be audited: {error}")
                    continue
                results[item.key] = Result(item.key, annotated)
            audited = self.auditor.audit(
                [(document, annotated.program) for _, annotated, document in documents]
            )
            waiting = []
            for (item, annotated, _), parts in zip(documents, audited, strict=True):
                changed = self._without_needy(annotated, parts)
                if changed.program == annotated.program:
                    results[item.key] = Result(item.key, self._that_pay(annotated))
                else:
                    waiting.append((item, changed))
        yield from results.values()

    def _without_needy(self, annotated: Annotated, parts: list[Part]) -> Annotated:
        blocks = [part.branch for part in parts if part.is_block and self.is_needy(part)]
        waits = [part.branch for part in parts if not part.is_block and self.is_needy(part)]
        if not blocks and not waits:
            return annotated
        notes = (*annotated.notes, *[NEEDS] * len(blocks), *[WAITS] * len(waits))
        return Annotated(taken_back(annotated.program, blocks, waits), notes)

    def is_needy(self, part: Part) -> bool:
        """Whether a part loses more than is allowed."""
        return part.per_token > self.max_loss and (part.is_block or part.tokens >= MIN_TEXT)

    def _with_short_topics(self, annotated: Annotated) -> Annotated:
        program = with_short_topics(self.tokenizer, annotated.program)
        return dataclasses.replace(annotated, program=program)

    def _that_pay(self, annotated: Annotated) -> Annotated:
        program, fewer = that_pay(self.tokenizer, annotated.program, self.min_speedup)
        return Annotated(program, (*annotated.notes, *[DOES_NOT_PAY] * fewer))


@dataclasses.dataclass(frozen=True)
class AskingAudit(SelfAudit):
    """The annotator if others are asked for its candidates (`protocol.Estimating`)."""

    def estimate(self, items: Iterable[Item], *, shown: int) -> str:
        """What the candidates would take."""
        return self._asked.estimate(items, shown=shown)

    def status(self) -> str:
        """What was asked for candidates so far, and what that cost."""
        return self._asked.status()

    @property
    def _asked(self) -> Estimating:
        assert isinstance(self.candidates, Estimating)
        return self.candidates


def auditor_of(flags: Mapping[str, Any], length: int = 0) -> Auditor:
    """The model of --ckpt as an auditor. Raises what `loading.load` raises."""
    from pasta_jax.interchange.importing import kind_of
    from pasta_jax.loading import load

    options: dict[str, Any] = {name: flags.get(name) for name in LOADING if flags.get(name)}
    if kind_of(flags["ckpt"])[0] not in ("peft", "workdir"):
        options["extend_tokenizer"] = True  # the tags are out of view: any ids will do
    model = load(flags["ckpt"], **options)
    sizes = {"rows": flags.get("rows"), "length": length}
    return Auditor(model, **{name: size for name, size in sizes.items() if size})


def make(options: Options) -> SelfAudit:
    """The annotator of these options. Raises AnnotatorError without a model."""
    flags = options.flags
    if not flags.get("ckpt"):
        raise AnnotatorError(
            "--annotator=self needs a model that reads the answers: add --ckpt=WORKDIR, or hf:FOLDER."
        )
    candidates = flags.get("candidates") or "rule:structure"
    if candidates in ("self", "rule:apar"):
        why = (
            "proposes nothing"
            if candidates == "self"
            else "has no syncs, which what needs its siblings waits at"
        )
        raise AnnotatorError(f"--candidates={candidates} {why}. Use rule:structure, llm or MODULE:FUNCTION.")
    proposing = make_annotator(candidates, options)
    kind = AskingAudit if isinstance(proposing, Estimating) else SelfAudit
    return kind(
        proposing,
        auditor_of(flags, options.length),
        options.tokenizer,
        flags.get("max_loss", MAX_LOSS),
        options.min_speedup,
    )
