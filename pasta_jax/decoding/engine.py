"""`Decoder`: a model, the programs that decode with it, and a queue of requests."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

from pasta_jax.decoding.admission import Admission
from pasta_jax.decoding.compiled import Compiled, Sizes
from pasta_jax.decoding.first_run import run_once
from pasta_jax.decoding.fits import check_pool
from pasta_jax.decoding.model import Model, check_model
from pasta_jax.decoding.options import whole
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.prefixes import PROMPT_BLOCK, Prefixes
from pasta_jax.decoding.request import Conversation, SamplingParams, script_size
from pasta_jax.decoding.script import NOTHING
from pasta_jax.decoding.session import Load, Session
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      wall_s: from the prompts on the host to the finished traces on the host, without compiling.
      compile_s: compiling; 0 if everything was compiled before.
    """

    wall_s: float
    compile_s: float


class Decoder:
    """Decodes prompts, any number of them, B at once.

    Args:
      model: what to decode with.
      compiled: the programs of another decoder, if they fit the model.
      chunk: the most decode steps between two looks of the host; it also looks when a row is free for a prompt that
        waits.
      queue: the most submitted requests that may wait for a row; None is no bound.
      reuse: bytes for keys and values of the beginnings of prompts, which later prompts that begin alike need not
        feed again (`decoding.prefixes`). 0 is off: prompts are then fed at once, several together.
      admission: which threads a step feeds, of those that are ready in all rows; the others wait, which changes the
        schedule and no text. "all"; "cap:4", at most so many of a request; "cost", those that make most tokens a
        second by the measured times of steps; or "cost:0.05", the same as far as each of several requests has a
        token every 0.05 seconds (`decoding.admission`).
      sizes: without `compiled`, the keyword arguments of `Compiled`: `limits` (static sizes), `rows` (B, requests
        answered at once), `batch_invariant` and those that are seldom needed.

    Attributes:
      session: requests that are queued or have a row.

    Raises:
      ValueError: the programs are for a model that differs in more than its parameters; the pool does not fit into
        memory; a size out of range.
    """

    def __init__(
        self,
        model: Model,
        *,
        compiled: Compiled | None = None,
        chunk: int = 64,
        queue: int | None = None,
        reuse: int = 0,
        admission: str = "all",
        **sizes: Unpack[Sizes],
    ):
        check_model(model)
        described = model.params, model.config, model.tokenizer.vocabulary, model.positions
        self.reuse = whole("reuse", reuse, 0, 2**63)
        if compiled is None:
            if self.reuse:
                sizes = Sizes(prompt_block=PROMPT_BLOCK) | sizes
            compiled = Compiled(*described, **sizes)
        elif sizes or not compiled.fits(*described):
            raise ValueError("Compiled programs serve models alike in all but their parameters, in one size.")
        check_pool(compiled, self.reuse)
        self.model, self.compiled, self.chunk = model, compiled, whole("chunk", chunk, 1)
        self.queue = None if queue is None else whole("queue", queue, 0)
        self.admission = Admission(compiled, admission)
        self.prefixes = Prefixes(compiled, self.reuse) if compiled.prompt_block else None
        self.session = self._new_session()
        self._scripted: dict[tuple[int, int], Session] = {}
        self._lock = threading.Lock()

    @property
    def limits(self) -> Limits:
        """The static sizes that its programs are compiled for."""
        return self.compiled.limits

    def fits(self, model: Model) -> bool:
        """Whether another model differs in nothing but its parameters, which are in the same places."""
        return self.compiled.fits(model.params, model.config, model.tokenizer.vocabulary, model.positions)

    def for_model(self, model: Model) -> Decoder:
        """A decoder of another model that fits: it shares what is compiled. ValueError if it does not fit."""
        return Decoder(
            model,
            compiled=self.compiled,
            chunk=self.chunk,
            queue=self.queue,
            reuse=self.reuse,
            admission=self.admission.policy,
        )

    def warm_up(self, *, run: bool = False) -> float:
        """Compiles all that requests without scripts may need, in parallel, and returns the seconds that it took.

        Nothing is compiled afterwards, whatever is requested. The log tells of each program. If branches are
        admitted by cost, the times of steps are measured too, or read where an earlier start has kept them.

        Args:
          run: also run each program that a request alone may need, once: the first run takes longer than others.
        """
        start = time.perf_counter()
        params = self.model.params_as(self.compiled.form)
        self.compiled.compile_all()
        self.admission.measure(params)
        if run:
            run_once(self.compiled, params)
        return time.perf_counter() - start

    def submit(
        self,
        prompt: str | Conversation | Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        *,
        tokens: bool = False,
        wait: bool = False,
    ) -> PendingAnswer:
        """Queues a prompt. Its answer is worked on while the decoder serves, or whenever somebody waits for one.

        Any thread may submit. What an answer depends on is its prompt and sampling alone, but for rounding.

        Args:
          prompt: a text or a conversation, which are put into the model's chat format, or ids.
          sampling: how it is answered; without a script (those are for `decode`).
          tokens: events of single tokens too.
          wait: whether to wait until the queue has room.

        Raises:
          ValueError: a prompt that is none, or that the pool cannot hold (`DoesNotFit`), or a script.
          QueueFull: as many requests wait as `queue` allows.
          Closed: `close` was called.
        """
        answer = self.session.prepare(self._encoded(prompt), sampling, tokens=tokens)
        self.session.submit(answer, wait=wait)
        return answer

    def _encoded(self, prompt: Any) -> Any:
        """The ids of a text or a conversation; what is neither, as it is."""
        if isinstance(prompt, str):
            return self.model.tokenizer.encode_prompt(prompt)
        if isinstance(prompt, Sequence) and any(isinstance(message, Mapping) for message in prompt):
            return self.model.tokenizer.encode_chat(prompt)
        return prompt

    @contextlib.contextmanager
    def serving(self) -> Iterator[Decoder]:
        """A thread of its own decodes what is submitted, for as long as the block takes.

        At the end of the block the decoder is closed: whatever it took is answered first. An exception that leaves
        the block cancels what is not done: each request keeps its text so far. An error while decoding (no memory)
        ends nothing: the requests that had rows are tried once more, each by itself, and only one that fails again
        has the error as its result.

        Raises:
          RuntimeError: it is serving already.
        """
        self.session.serve()
        try:
            yield self
            self.close()
        except BaseException:
            self.close(cancel=True)
            raise

    def close(self, *, cancel: bool = False) -> None:
        """Returns when all requests that it took are done; `submit` takes no more, until it serves again.

        `decode` and `enqueue` may still be called; whoever calls them then works.

        Args:
          cancel: end them now, with the text that they have.
        """
        self.session.close(cancel=cancel)

    @property
    def load(self) -> Load:
        """How much there is to do at this moment."""
        return self.session.load

    def enqueue(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> list[PendingAnswer]:
        """Queues prompts given as ids, whatever the bound of the queue; requests may have scripts.

        Raises:
          ValueError: a prompt that the pool cannot hold; none is queued then.
        """
        if len(prompts) != len(sampling):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling)} samplings: give one for each.")
        session = self._session(script_size(sampling))
        answers = [session.prepare(*pair) for pair in zip(prompts, sampling, strict=True)]
        for answer in answers:
            session.queue(answer)
        return answers

    def decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> tuple[list[Trace], Timing]:
        """Answers prompts given as ids, each with its own parameters; traces in the same order.

        Raises:
          ValueError: a prompt that the pool cannot hold; nothing has been decoded then.
        """
        start, compiled_before = time.perf_counter(), self.compiled.compile_s
        answers = self.enqueue(prompts, sampling)
        try:
            traces = [answer.wait() for answer in answers]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        compile_s = self.compiled.compile_s - compiled_before
        return traces, Timing(time.perf_counter() - start - compile_s, compile_s)

    def _session(self, size: tuple[int, int]) -> Session:
        """The queue of requests with scripts of up to (R, C), for which those of ordinary ones have no room."""
        if size == NOTHING:
            return self.session
        with self._lock:
            if size not in self._scripted:
                self._scripted[size] = self._new_session(size)
            return self._scripted[size]

    def _new_session(self, script_size: tuple[int, int] = NOTHING) -> Session:
        return Session(
            self.model,
            self.compiled,
            self.chunk,
            script_size,
            bound=self.queue,
            prefixes=self.prefixes,
            admission=self.admission,
        )
