"""Replay: answers through the real engine with their tokens forced, to measure speed without trained weights.

Each answer is decoded as it is annotated and again as the same tokens of text one by one, both by the same
`Decoder`, in turn:

    theoretical speedup   tokens of text / critical path: steps by steps, with unlimited lanes
    realized speedup      seconds of the sequential decode / seconds of the parallel one, prompt and host included
    efficiency            realized / theoretical; of several answers, of their geometric means (paper section 5.2)
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from pasta_jax.decoding.engine import Decoder, Sampling
from pasta_jax.decoding.script import Script, depth_of, lines_of, script_of, threads_in
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace, as_document, critical_path
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.lang.tags import MAX_TOPIC_TOKENS
from pasta_jax.tokens.reading import TOPIC_PREFIX
from pasta_jax.tokens.tokenizer import Tokenizer

PROMPT = "Go on."
"""Short, so that little time goes into it."""

UNLIMITED = 2**30
"""Tokens, of what must not be cut."""

BETWEEN = 4
"""Tokens of main's text before each promise of a random tree: the mark of an item, a word or two."""


class ReplayError(RuntimeError):
    """The engine did not say what it was made to say."""


# ------------------------------------------------------------------------------------------------- the answers


def random_tree(
    rng: random.Random,
    tokenizer: Tokenizer,
    *,
    branches: int = 8,
    tokens: int = 32,
    balanced: bool = True,
    syncs: bool = False,
    depth: int = 1,
) -> Program:
    """An answer of the shape asked for, its text random words.

    Args:
      rng: draws words and lengths.
      tokenizer: of the model; counts tokens.
      branches: promises, the nested ones included.
      tokens: mean length of a branch's own text.
      balanced: all branches are as long; else their lengths have a heavy tail, the sum being the same.
      syncs: main waits after two to four promises each, and says something of half a branch's length.
      depth: how deep promises nest, where there are enough of them: a third, rounded up, stand in main, the
        others within those.
    """
    if branches < 1 or tokens < 1 or depth < 1:
        raise ValueError(f"branches={branches}, tokens={tokens} and depth={depth} must be at least 1.")
    words = some_words(tokenizer)

    def say(count: int) -> Text:
        return Text(text_of(rng, tokenizer, words, count))

    def nodes(lengths: Sequence[int], depth: int) -> Iterator[Node]:
        here = len(lengths) if depth == 1 else math.ceil(len(lengths) / 3)
        until_sync = rng.randint(2, 4)
        for i, length in enumerate(lengths[:here]):
            yield say(BETWEEN)
            yield promise(length, lengths[here + i :: here], depth)
            until_sync -= 1
            if syncs and (until_sync == 0 or i == here - 1):
                yield Sync()
                yield say(max(1, tokens // 2))
                until_sync = rng.randint(2, 4)

    def promise(length: int, nested: Sequence[int], depth: int) -> Promise:
        block: list[Node] = [say(length)]
        if nested:
            block = [say(math.ceil(length / 2)), *nodes(nested, depth - 1), say(max(1, length // 2))]
        said = min(max(math.ceil((length + sum(nested)) / 10), MIN_TOKENS), MAX_TOKENS)
        return Promise(rng.choice(words).strip(), said, joined(block))

    return Program(joined(nodes(_lengths(rng, branches, tokens, balanced), depth)))


def _lengths(rng: random.Random, branches: int, tokens: int, balanced: bool) -> list[int]:
    if balanced:
        return [tokens] * branches
    weights = [rng.paretovariate(1.2) for _ in range(branches)]
    return [max(1, round(branches * tokens * weight / sum(weights))) for weight in weights]


def some_words(tokenizer: Tokenizer, most: int = 200) -> list[str]:
    """Words with a space before them that are one token each; a letter if the vocabulary has none."""
    found: list[str] = []
    for i, piece in enumerate(tokenizer.vocabulary.pieces):
        if re.fullmatch(rb" [a-z]{2,}", piece) and tokenizer.encode(piece.decode()) == [i]:
            found.append(piece.decode())
            if len(found) == most:
                break
    return found or ["a"]


def text_of(rng: random.Random, tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> str:
    """Words that are so many tokens together."""
    said: list[str] = []
    for _ in range(100 + 10 * tokens):
        have = len(tokenizer.encode("".join(said)))
        if have == tokens:
            return "".join(said)
        if have < tokens:
            said += rng.choices(words, k=tokens - have)
        else:
            said.pop(rng.randrange(len(said)))
    raise ValueError(f"Found no text of {tokens} tokens in words such as {words[0]!r}.")


def sequential(program: Program) -> Program:
    """The same tokens of text in the reader's order, without tags: its texts stay apart, so none merge."""

    def texts(nodes: tuple[Node, ...]) -> Iterator[Node]:
        for node in nodes:
            if isinstance(node, Text):
                yield node
            elif isinstance(node, Promise):
                yield from texts(node.block)

    return Program(tuple(texts(program.nodes)))


def with_topics(program: Program, tokenizer: Tokenizer) -> Program:
    """Bare promises, such as a rule finds (`baselines.apar`), as those of PASTA-LANG: with topic and length.

    The topic is the block's first word or two, "part" where they cannot be one.
    """

    def named(node: Node) -> Node:
        if not isinstance(node, Promise):
            return node
        block = tuple(map(named, node.block))
        if not node.is_bare:
            return dataclasses.replace(node, block=block)
        text = "".join(each.text for each in sequential(Program(block)).nodes if isinstance(each, Text))
        topic = " ".join(re.findall(r"[^\W\d_]+", text)[:2])
        if not topic or len(tokenizer.encode(TOPIC_PREFIX + topic)) > MAX_TOPIC_TOKENS:
            topic = "part"
        tens = math.ceil(len(tokenizer.encode(text)) / 10)
        return Promise(topic, min(max(tens, MIN_TOKENS), MAX_TOKENS), block)

    return Program(tuple(map(named, program.nodes)))


def limits_for(
    programs: Sequence[Program], tokenizer: Tokenizer, *, lanes: int = 8, prompt: str = PROMPT
) -> Limits:
    """Limits of a decoder that can replay all these."""
    answers = [threads_in(program, tokenizer) for program in programs]
    tokens = max(sum(map(len, answer.tokens)) for answer in answers)
    threads = max(len(answer.tokens) for answer in answers)
    pool = -(-(len(tokenizer.encode_prompt(prompt)) + tokens) // 128) * 128
    return Limits(lanes, max(threads, lanes), pool, max(1, *(depth_of(answer) for answer in answers)))


# --------------------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One answer, measured.

    Attributes:
      shape: its shape class.
      branches: threads but main.
      sequential_steps: tokens of its text, without tags.
      critical_path: decode steps with unlimited lanes.
      steps: decode steps taken.
      widths: how many steps used 1, 2, ... lanes.
      parallel_s, sequential_s: seconds of each repeat, prompt and host included, compiling not.
      start_s: likewise, of a request that ends after its first decode step.
    """

    shape: str
    branches: int
    sequential_steps: int
    critical_path: int
    steps: int
    widths: tuple[int, ...]
    parallel_s: tuple[float, ...]
    sequential_s: tuple[float, ...]
    start_s: tuple[float, ...]

    @property
    def theoretical(self) -> float:
        return self.sequential_steps / self.critical_path

    @property
    def realized(self) -> float:
        return statistics.median(self.sequential_s) / statistics.median(self.parallel_s)

    @property
    def efficiency(self) -> float:
        return self.realized / self.theoretical

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds of a decode step, without the start: of the parallel and the sequential decode."""
        start = statistics.median(self.start_s)

        def each(seconds: Sequence[float], steps: int) -> float:
            return (statistics.median(seconds) - start) / max(1, steps - 1)

        return each(self.parallel_s, self.steps), each(self.sequential_s, self.sequential_steps)

    @property
    def decode_efficiency(self) -> float:
        """As `efficiency`, of decode steps alone, without prompt and start.

        NaN where the noise is larger than the steps: the start took longer than the whole.
        """
        parallel, sequential = self.step_s
        if min(parallel, sequential) <= 0:
            return math.nan
        return self.critical_path / self.steps * sequential / parallel


def replay(
    decoder: Decoder,
    programs: Mapping[str, Sequence[Program]],
    repeats: int = 5,
    *,
    prompt: str = PROMPT,
) -> list[Replayed]:
    """Measures answers one request at a time; what compiles does so before.

    Args:
      decoder: with limits that hold them all (`limits_for`).
      programs: the answers, by shape class.
      repeats: of everything; parallel and sequential decodes of all answers take turns, so that what the machine
        does besides meets them alike.
      prompt: whose answer each is; short, so that little time goes into it.

    Raises:
      ValueError: an answer does not fit into the limits.
      ReplayError: the engine said something else.
    """
    tokenizer, limits = decoder.model.tokenizer, decoder.limits
    ids = tokenizer.encode_prompt(prompt)
    shapes = [(shape, program) for shape, several in programs.items() for program in several]
    pairs = [
        (script_of(program, tokenizer, limits), script_of(sequential(program), tokenizer, limits))
        for _, program in shapes
    ]
    every = [script for pair in pairs for script in pair]
    for script in every:
        check_room(script, limits, len(ids))
    size = max(script.size[0] for script in every), max(script.size[1] for script in every)
    runs = [[Run(decoder, ids, script.padded(size)) for script in pair] for pair in pairs]
    warm = [(parallel.start(), parallel.answer(), plain.answer()) for parallel, plain in runs]
    seconds: list[list[tuple[float, float, float]]] = [[] for _ in runs]
    for _ in tqdm(range(repeats), desc="replay", unit="repeat", disable=not sys.stderr.isatty()):
        for taken, (parallel, plain) in zip(seconds, runs):
            taken.append((parallel.start()[1], parallel.answer()[1], plain.answer()[1]))
    return [
        _measured(shape, tokenizer, parallel, plain, taken)
        for (shape, _), (_, (parallel, _), (plain, _)), taken in zip(shapes, warm, seconds)
    ]


def check_room(script: Script, limits: Limits, prompt_length: int) -> None:
    """Raises ValueError if prompt and answer do not fit into the pool."""
    tokens = int((script.tokens >= 0).sum()) - 1  # the answer's end is never fed
    if prompt_length + tokens > limits.pool:
        raise ValueError(
            f"A prompt of {prompt_length} tokens and an answer of {tokens} do not fit into the pool of "
            f"{limits.pool}. Raise Limits.pool to {prompt_length + tokens} or more."
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A request that says what a script has; each call decodes it, and gives the trace and the seconds it took."""

    decoder: Decoder
    prompt: list[int]
    script: Script

    def answer(self) -> tuple[Trace, float]:
        """The whole of it. Raises ReplayError if the engine did anything else."""
        trace, seconds = self._decode(UNLIMITED)
        found = lines_of(trace.threads, self.decoder.limits.threads)
        asked = self.script.lines
        if trace.stop != Stop.EOS or found != asked:
            differ = [path for path in asked.keys() | found.keys() if asked.get(path) != found.get(path)]
            raise ReplayError(
                f"The engine stopped with {trace.stop.reason!r} and differs from the script in threads with the "
                f"paths {differ[:8]}: this is a fault of the engine."
            )
        return trace, seconds

    def start(self) -> tuple[Trace, float]:
        """The same up to its first decode step."""
        return self._decode(1)

    def _decode(self, most: int) -> tuple[Trace, float]:
        wishes = Sampling(max_new_tokens=most, max_branch_tokens=UNLIMITED, script=self.script)
        (trace,), timing = self.decoder.decode([self.prompt], [wishes])
        return trace, timing.wall_s


def _measured(
    shape: str,
    tokenizer: Tokenizer,
    parallel: Trace,
    plain: Trace,
    seconds: Sequence[tuple[float, float, float]],
) -> Replayed:
    start_s, parallel_s, sequential_s = zip(*seconds)
    widths = np.bincount(parallel.widths)[1:]
    return Replayed(
        shape=shape,
        branches=len(parallel.parent) - 1,
        sequential_steps=plain.steps,
        critical_path=critical_path(as_document(parallel), parallel.prompt_length, tokenizer.vocabulary),
        steps=parallel.steps,
        widths=tuple(int(count) for count in widths),
        parallel_s=parallel_s,
        sequential_s=sequential_s,
        start_s=start_s,
    )


# ------------------------------------------------------------------------------------------------ shape classes


@dataclasses.dataclass(frozen=True)
class Summary:
    """A shape class, or all of them; speeds are geometric means over its answers."""

    shape: str
    answers: int
    theoretical: float
    realized: float
    decode_efficiency: float

    @property
    def efficiency(self) -> float:
        """Of the means, as the paper has it."""
        return self.realized / self.theoretical


def summaries(replayed: Sequence[Replayed]) -> list[Summary]:
    """One for each shape class in turn, and one for all of them together, called overall."""
    found = []
    for shape in (*dict.fromkeys(each.shape for each in replayed), "overall"):
        mine = [each for each in replayed if shape in (each.shape, "overall")]
        found.append(
            Summary(
                shape=shape,
                answers=len(mine),
                theoretical=statistics.geometric_mean([each.theoretical for each in mine]),
                realized=statistics.geometric_mean([each.realized for each in mine]),
                decode_efficiency=statistics.geometric_mean([each.decode_efficiency for each in mine]),
            )
        )
    return found
