"""The engine: what is compiled. Rows by lanes in one program; `session.py` gives it prompts and reads it.

`Decoder` keeps the compiled functions, one for each shape (new rows and prompt bucket, used part of the pool);
everything a caller may vary from call to call (temperature, seed, limits on tokens, bias) is traced and compiles
nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from pasta_jax import sharding
from pasta_jax.decoding import loop
from pasta_jax.decoding.interpreter import Rules, rules_for
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.script import NOTHING, Script, no_script
from pasta_jax.decoding.session import PendingAnswer, Session
from pasta_jax.decoding.state import Limits, Request, RowState
from pasta_jax.decoding.stops import check_stops
from pasta_jax.decoding.trace import Trace
from pasta_jax.model import ModelConfig, Transformer
from pasta_jax.model.fuse import fuse
from pasta_jax.model.transpose import transpose
from pasta_jax.rounding import next_power_of_two
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer

CACHED_BYTES = 8 * 2**20
"""What a processor's cache keeps of the weights from step to step, at the least."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model that can decode.

    Attributes:
      params: nested dict of arrays, as `Transformer` names them.
      config: sizes and choices.
      tokenizer: with an id for each tag piece.
      positions: the scheme that the model was trained with.
      max_depth: how deep its promises may nest.
      decoders: what `decoder` has made, by sizes.
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    positions: Positions = Positions()
    max_depth: int = 1
    decoders: dict[Any, Decoder] = dataclasses.field(init=False, repr=False, default_factory=dict)
    _lock: Any = dataclasses.field(init=False, repr=False, default_factory=threading.Lock)

    def decoder(self, limits: Limits, rows: int) -> Decoder:
        """The one for these sizes, made when it is first asked for."""
        with self._lock:
            if (limits, rows) not in self.decoders:
                self.decoders[limits, rows] = Decoder(self, limits=limits, rows=rows)
            return self.decoders[limits, rows]

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """On which its parameters lie; None if that is one device."""
        return sharding.mesh_of(self.params)

    @functools.cached_property
    def for_steps(self) -> tuple[Any, ModelConfig]:
        """Parameters and configuration as steps on a single device use them (docs/lab-log.md).

        On a CPU a transposed copy of weights that no cache holds; elsewhere q, k and v as one matrix.
        """
        if not _on_cpu(self.params):
            return fuse(self.params, self.config)
        if self.is_small or self.config.weights != "plain":
            return self.params, self.config
        return transpose(self.params, self.config)

    @property
    def is_small(self) -> bool:
        """Whether the weights stay in a processor's cache from step to step."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) <= CACHED_BYTES

    def lies_like(self, other: Model) -> bool:
        """Whether its parameters lie where the other's do, which a compiled program takes for granted."""
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        pairs = zip(jax.tree.leaves(self.params), jax.tree.leaves(other.params), strict=True)
        return all(
            getattr(mine, "sharding", host).is_equivalent_to(getattr(theirs, "sharding", host), mine.ndim)
            for mine, theirs in pairs
        )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of each request; none of it recompiles.

    Attributes:
      max_new_tokens: tokens of the answer, over all threads, tags included.
      max_branch_tokens: content tokens of one branch; then its end is forced.
      temperature: 0 is greedy.
      top_k, top_p, min_p: draw among the most likely only, see `sampling.sample`; 0, 1 and 0 switch them off.
      seed: the same seed gives the same text, whatever else is decoded beside it.
      open_bias: added to the logit that opens a promise: above 0 more parallel, below 0 more careful,
        -inf sequential.
      stop: texts; the answer ends before the first of them (`decoding.stops`).
      script: what threads are made to say (`decoding.script`); only its size, rounded up, compiles anew.
    """

    max_new_tokens: int = 512
    max_branch_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    open_bias: float = 0.0
    stop: tuple[str, ...] = ()
    script: Script | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", check_stops(self.stop))
        for name, good in (
            ("max_new_tokens", 1 <= self.max_new_tokens < 2**31),
            ("max_branch_tokens", 1 <= self.max_branch_tokens < 2**31),
            ("temperature", self.temperature >= 0),
            ("top_k", 0 <= self.top_k < 2**31),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p <= 1),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} is out of range.")

    def request(self, script_size: tuple[int, int] = NOTHING) -> Request:
        """For a row of a batch whose scripts have the size (R, C)."""
        script = (self.script or no_script()).padded(script_size)
        return Request(
            max_new_tokens=np.int32(self.max_new_tokens),
            max_branch_tokens=np.int32(self.max_branch_tokens),
            open_bias=np.float32(self.open_bias),
            temperature=np.float32(self.temperature),
            top_k=np.int32(self.top_k),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            key=np.array([0, self.seed % 2**32], np.uint32),
            script_paths=script.paths,
            script=script.tokens,
        )


def script_size(sampling: Sequence[SamplingParams]) -> tuple[int, int]:
    """(R, C) for the scripts of all these requests: powers of two, so that others find the program compiled."""
    sizes = [each.script.size for each in sampling if each.script is not None]
    if not sizes:
        return NOTHING
    R, C = (max(size[i] for size in sizes) for i in range(2))
    return next_power_of_two(R), next_power_of_two(C)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      wall_s: from the prompts on the host to the finished traces on the host, without compiling.
      compile_s: compiling, 0 when everything was compiled before.
    """

    wall_s: float
    compile_s: float


def _on_cpu(params: Any) -> bool:
    """Whether that is where arrays lie; those on the host go to the default device."""
    leaf = jax.tree.leaves(params)[0]
    devices = leaf.devices() if isinstance(leaf, jax.Array) else {jax.devices()[0]}
    return all(device.platform == "cpu" for device in devices)


def batch_shardings(batch: Batch, mesh: Any) -> Batch:
    """Where B requests lie that are being answered: as they go into a call, so they come out.

    Args:
      batch: shapes or arrays.
      mesh: of devices or of a topology.
    """
    by_row: Any = sharding.batch_sharding(mesh, batch.rows.stop.shape[0])
    return Batch(by_row, by_row, sharding.pool_shardings(batch.pool, mesh))


class Decoder:
    """Decodes prompts with compiled functions that it keeps: any number of them, B at once.

    Args:
      model: what to decode with.
      limits: static sizes.
      rows: B, requests being answered at once; others wait for a row to become free. On a mesh the next multiple
        of those devices that divide rows.
      chunk: decode steps between two looks of the host, at most; it looks when a row is free for a prompt that
        waits.
      prompt_buckets: lengths that prompts are padded to; one compiled prefill each.
      widths: lanes that steps have where fewer than S threads are ready, each a loop of its own. By default one is
        chosen on CPUs alone: elsewhere eight lanes cost what one does, and XLA copies the pool on its way into
        loops in a loop.
      pool_buckets: how much of the pool steps read while it fills, as far as that is a third of it or less; one
        compiled loop each.
      mesh: where the model's parameters lie, if they do not say so themselves; rows go over data and fsdp, heads
        over tensor.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits = Limits(),
        rows: int = 1,
        chunk: int = 64,
        prompt_buckets: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048),
        pool_buckets: Sequence[int] = (512, 2048, 8192),
        widths: Sequence[int] | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.mesh = mesh or model.mesh
        self.model, self.limits, self.chunk = model, limits, chunk
        self.rows = rows if self.mesh is None else sharding.round_up_rows(rows, self.mesh)
        if widths is None:
            finely = model.is_small and self.rows == 1
            widths = widths_for(limits.lanes, finely=finely) if _on_cpu(model.params) else ()
        self.widths = _up_to(limits.lanes, widths)
        self.prompt_buckets = _up_to(limits.pool, prompt_buckets)
        entries = limits.pool + limits.lanes
        # On a CPU the part that is read is copied first: it has to be a small one.
        self.pool_buckets = _up_to(entries, [bucket for bucket in pool_buckets if 3 * bucket <= entries])
        self.rules: Rules = rules_for(
            model.tokenizer.vocabulary, limits, model.positions, model.config.vocab_size
        )
        config = self._weights[1]
        transformer = Transformer(config)
        new_batch = functools.partial(loop.empty_batch, config, limits, self.rows)
        shapes = jax.eval_shape(new_batch, SamplingParams().request())
        lies = None if self.mesh is None else batch_shardings(shapes, self.mesh)
        one_row = None if self.mesh is None else sharding.replicated(self.mesh)
        self._new_batch = jax.jit(new_batch, out_shardings=lies)
        self._admit = jax.jit(
            functools.partial(loop.admit, transformer), donate_argnums=2, out_shardings=lies
        )
        self._decode_chunk = jax.jit(
            functools.partial(loop.decode_chunk, transformer, widths=self.widths),
            static_argnames="used",
            donate_argnums=2,
            out_shardings=lies,
        )
        self._release = jax.jit(loop.release, donate_argnums=0, out_shardings=lies)
        self._take = jax.jit(loop.take, out_shardings=one_row)
        self.programs = Programs()
        self._script_size = NOTHING
        self._scripted: dict[tuple[int, int], Decoder] = {}
        self.session = Session(self)

    @property
    def _weights(self) -> tuple[Any, ModelConfig]:
        """Parameters and configuration as steps use them, where they are to be used."""
        model = self.model
        return model.for_steps if self.mesh is None else (model.params, model.config)

    def fits(self, model: Model) -> bool:
        """Whether another model differs in nothing but its parameters, which lie in the same places."""
        mine, theirs = (
            (m.config, m.positions, m.max_depth, m.tokenizer.vocabulary) for m in (self.model, model)
        )
        return bool(mine == theirs) and self.model.lies_like(model)

    def for_model(self, model: Model) -> Decoder:
        """The same for another model that fits: it shares what is compiled.

        Raises:
          ValueError: the models differ in more than their parameters.
        """
        if not self.fits(model):
            raise ValueError("Only models alike in all but their parameters share compiled programs.")
        other = copy.copy(self)
        other.model, other.session, other._scripted = model, Session(other), {}
        return other

    def for_scripts(self, size: tuple[int, int]) -> Decoder:
        """The same for requests with scripts of up to (R, C), for which ordinary ones have no room."""
        if size == self._script_size:
            return self
        if size not in self._scripted:
            other = copy.copy(self)
            other._script_size, other.session, other._scripted = size, Session(other), {}
            self._scripted.setdefault(size, other)  # of several threads' the first one's
        return self._scripted[size]

    # ------------------------------------------------------------------------------------------- requests

    def submit(self, prompt: Sequence[int], sampling: SamplingParams = SamplingParams()) -> PendingAnswer:
        """Queue a prompt given as ids. The answer is worked on whenever somebody waits for one of this decoder's.

        Raises:
          ValueError: a prompt that the pool cannot hold, or a script (those are for `decode`).
        """
        return self.session.submit(prompt, sampling)

    def decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> tuple[list[Trace], Timing]:
        """PendingAnswer prompts given as ids, each with its own wishes; traces in the same order.

        Raises:
          ValueError: a prompt that the pool cannot hold; nothing has been decoded then.
        """
        if len(prompts) != len(sampling):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling)} samplings: give one for each.")
        for prompt in prompts:
            self.check(prompt)
        size = script_size(sampling)
        if size != NOTHING and size != self._script_size:
            return self.for_scripts(size).decode(prompts, sampling)
        begun, compiled_before = time.perf_counter(), self.programs.compile_s
        answers: list[PendingAnswer] = []
        try:
            for each in zip(prompts, sampling, strict=True):
                answers.append(self.submit(*each))
            traces = [answer.wait() for answer in answers]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        compile_s = self.programs.compile_s - compiled_before
        return traces, Timing(time.perf_counter() - begun - compile_s, compile_s)

    def check(self, prompt: Sequence[int]) -> None:
        """Raises ValueError where a prompt cannot be answered."""
        if isinstance(prompt, str):
            raise ValueError("A decoder takes ids. Give it model.tokenizer.encode_prompt(text).")
        if not prompt:
            raise ValueError("The prompt is empty. Give the model something to answer.")
        if len(prompt) >= self.limits.pool:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens, and the pool holds {self.limits.pool} for prompt and answer "
                f"together. Shorten the prompt, or set cache_len to more than {len(prompt)}."
            )
        V = self.model.config.vocab_size
        if not all(0 <= token < V for token in prompt):
            raise ValueError(
                f"The prompt has ids that are none of the model's {V}: encode it with its tokenizer."
            )

    def request(self, prompt: Sequence[int], sampling: SamplingParams) -> Request:
        """What a row is given. ValueError for what cannot be answered."""
        self.check(prompt)
        return sampling.request(self._script_size)

    # ------------------------------------------------------------------------------------ compiled functions

    def empty_batch(self) -> Batch:
        """B idle rows and an empty pool."""
        request = SamplingParams().request(self._script_size)
        return self.programs.run(("new", self._script_size), self._new_batch, (request,))

    def admit(
        self,
        batch: Batch,
        slots: Sequence[int],
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Request],
    ) -> Batch:
        """Prompts into rows: one by one, or all in one call where most rows are new or a mesh divides them."""
        n, B = len(prompts), self.rows
        if n > 1 and 2 * n < B and self.mesh is None:
            for slot, prompt, each in zip(slots, prompts, asked, strict=True):
                batch = self.admit(batch, [slot], [prompt], [each])
            return batch
        size = 1 if n == 1 and self.mesh is None else B
        places = [0] if size == 1 else slots
        bucket = next(b for b in self.prompt_buckets if b >= max(map(len, prompts)))
        tokens, lengths = np.zeros((size, bucket), np.int32), np.zeros(size, np.int32)
        asks = [SamplingParams().request(self._script_size)] * size
        for place, prompt, each in zip(places, prompts, asked, strict=True):
            tokens[place, : len(prompt)], lengths[place], asks[place] = prompt, len(prompt), each
        requests = jax.tree.map(lambda *leaves: np.stack(leaves), *asks)
        at = np.asarray(slots if size == 1 else range(B), np.int32)
        args = (self._weights[0], self.rules, batch, at, requests, tokens, lengths)
        return self.programs.run(("admit", size, bucket, self._script_size), self._admit, args)

    def decode_chunk(self, batch: Batch, steps: int, refill: bool, cursor: int) -> Batch:
        """Steps, over the smallest bucket of the pool that holds `cursor` entries and a few steps more."""
        room = min(cursor + 4 * self.limits.lanes, self.pool_buckets[-1])
        used = next(b for b in self.pool_buckets if b >= room)
        args = (self._weights[0], self.rules, batch, np.int32(steps), np.bool_(refill))
        return self.programs.run(("decode", used, self._script_size), self._decode_chunk, args, used=used)

    def release(self, batch: Batch, stop: np.ndarray) -> Batch:
        """Stops rows: int32 [B], a `Stop` each, RUNNING for those that it leaves alone."""
        return self.programs.run(("release", self._script_size), self._release, (batch, stop))

    def read(self, batch: Batch, row: int) -> RowState:
        """One row, on the host."""
        return jax.device_get(self.programs.run("take", self._take, (batch.rows, np.int32(row))))


class Programs:
    """Compiled functions by key, and how long compiling them took.

    Attributes:
      options: XLA's, for what is compiled from now on.
    """

    options: dict[str, Any] | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.compiled: dict[Any, Any] = {}
        self.compile_s = 0.0

    def run(self, key: Any, function: Any, args: tuple[Any, ...], **static: Any) -> Any:
        """Calls the function, compiled for arguments of these shapes under this key."""
        with self._lock:
            if key not in self.compiled:
                begun = time.perf_counter()
                self.compiled[key] = function.lower(*args, **static).compile(self.options)
                self.compile_s += time.perf_counter() - begun
        return self.compiled[key](*args)


def widths_for(lanes: int, *, finely: bool) -> tuple[int, ...]:
    """How many lanes a compiled step may have on a CPU, up to S = `lanes`.

    Each takes its time to compile. Where the weights have to be fetched, two lanes cost little less than four;
    where they are at hand, each lane costs (docs/lab-log.md).

    >>> widths_for(16, finely=False), widths_for(16, finely=True)
    ((1, 4, 8, 16), (1, 2, 3, 4, 6, 8, 12, 16))
    """
    powers = [1 << i for i in range(lanes.bit_length())]
    some = {*powers, *(3 * power for power in powers)} if finely else {*powers} - {2}
    return _up_to(lanes, some)


def _up_to(most: int, buckets: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({bucket for bucket in buckets if bucket < most} | {most}))
