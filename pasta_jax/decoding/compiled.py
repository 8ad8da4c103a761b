"""The programs that decode, described once: what they are compiled for, and their functions.

`Compiled` holds no weights and no requests. A `Decoder` runs its programs, `pasta_jax.compile` lowers them for TPUs
that are not there, and tests read what XLA made of them. All three get them from `Compiled.lower`: a program is
never compiled for the arguments of a call, but for the shapes that `lower` describes.

Whatever a caller may vary from call to call (temperature, seed, limits on tokens, bias) is traced.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from pasta_jax import kept, sharding
from pasta_jax.decoding import cpu, loop
from pasta_jax.decoding.interpreter import rules_for
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.options import switch, whole
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import NOTHING
from pasta_jax.decoding.state import Limits, Request, RowState
from pasta_jax.memory import shortage
from pasta_jax.model import ModelConfig, Pool, Transformer, empty_pool
from pasta_jax.model.forms import fuse, is_plain, outputs_first
from pasta_jax.rounding import ceil_div, round_up
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary

LOG = logging.getLogger("pasta_jax")

Form: TypeAlias = Literal["plain", "fused", "outputs_first"]
"""How decode steps read the weights: as they are; q, k and v as one matrix, on an accelerator, and on a CPU whose
cache holds them; with outputs first, on a CPU whose cache does not (docs/lab-log.md says why)."""

PROMPT_BUCKETS = tuple(2**n for n in range(4, 16))
"""Lengths that prompts are padded to: 16 to 32,768 tokens."""

POOL_BUCKETS = (512, 2048, 8192)
"""Entries of the pool that steps read while it fills."""

LARGE_PREFILL = 2**30
"""Bytes of attention scores. Prompts that take more together are fed one by one."""

SMALL_PREFILL = 2**26
"""Bytes of attention scores for which it is not worth asking how much memory is free."""

CHANGES: dict[Form, Callable[[Any], Any]] = {"fused": fuse, "outputs_first": outputs_first}
"""Plain or int8 parameters to another form."""


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """Which program: a verb, and the sizes that differ from one program of a `Compiled` to another.

    Attributes:
      verb: "new" makes an empty batch, "admit" puts prompts into rows, "feed" a part of one prompt, "decode" runs
        steps, "release" stops rows, "read" takes a row out; "keep" takes a block out of the pool, and "reuse" puts
        it back.
      rows: of admit, prompts in one call: 1 or B.
      size: of feed, tokens in one call.
      length: of admit, the bucket that prompts are padded to; of feed and decode, the pool entries that they read.
      script: (R, C), the size of the requests' scripts.
    """

    verb: Literal["new", "admit", "feed", "decode", "release", "read", "keep", "reuse"]
    rows: int = 0
    size: int = 0
    length: int = 0
    script: tuple[int, int] = NOTHING

    def __str__(self) -> str:
        match self.verb:
            case "admit":
                return f"admit {self.rows} x {self.length} tokens"
            case "feed":
                return f"feed {self.size} of {self.length} tokens"
            case "decode":
                return f"decode over {self.length} entries"
        return self.verb


class Sizes(TypedDict, total=False):
    """The keyword arguments of `Compiled`."""

    limits: Limits
    rows: int
    prompt_buckets: Sequence[int]
    prompt_block: int | None
    pool_buckets: Sequence[int] | None
    widths: Sequence[int] | None
    batch_invariant: bool
    platform: str | None
    cached_bytes: int
    xla_options: Mapping[str, Any] | None


class Compiled:
    """The programs that decode with weights of given shapes, each compiled when it is first run.

    Args:
      params: parameters, or their shapes (`jax.ShapeDtypeStruct`, with the sharding of each). Only shapes, types
        and shardings are kept. Where they are spread over a mesh, rows go over its axes data and fsdp, and heads
        over tensor.
      config: of the parameters.
      vocabulary: of the tokenizer.
      positions: the scheme that the model was trained with.
      limits: static sizes.
      rows: B, requests answered at once. On a mesh it is rounded up to a multiple of the devices that share rows.
      prompt_buckets: lengths that prompts are padded to, each with a prefill of its own.
      prompt_block: C, tokens that prompts are fed by, one prompt after the other, so that their beginnings can be
        reused (`decoding.prefixes`). None feeds a prompt at once.
      pool_buckets: how many entries of the pool steps read while it fills, each with a loop of its own. Those above
        a third of the pool are left out. By default 512, 2,048 and 8,192; 128 too for several rows on a CPU whose
        cache does not hold the weights.
      widths: lanes that a step may have if fewer than S threads are ready, each with a loop of its own. By default
        there are several on CPUs only: elsewhere eight lanes cost what one does, and XLA copies the pool on its way
        into nested loops.
      batch_invariant: an answer depends on its request alone, bit for bit, also in bfloat16. Each prompt is fed by
        itself, padded to its own bucket, and every step has S lanes and reads the whole pool: `pool_buckets` and
        `widths` are not used.
      platform: "cpu", "gpu" or "tpu"; by default that of the parameters' devices.
      cached_bytes: weights up to this size stay in a CPU's cache between steps.
      xla_options: compiler options by name.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        vocabulary: Vocabulary,
        positions: Positions = Positions(),
        *,
        limits: Limits = Limits(),
        rows: int = 1,
        prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
        prompt_block: int | None = None,
        pool_buckets: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        batch_invariant: bool = False,
        platform: str | None = None,
        cached_bytes: int = cpu.CACHED_BYTES,
        xla_options: Mapping[str, Any] | None = None,
    ):
        self.config, self.vocabulary, self.positions, self.limits = config, vocabulary, positions, limits
        self.shapes = _shapes(params)
        self.mesh = sharding.mesh_of(self.shapes)
        rows = whole("rows", rows, 1)
        self.rows = rows if self.mesh is None else sharding.round_up_rows(rows, self.mesh)
        self.xla_options = dict(xla_options or {})
        place = jax.tree.leaves(self.shapes)[0].sharding
        device = min(place.device_set, key=lambda device: device.id)
        self._devices = [device] if self.mesh is None else [*self.mesh.devices.flat]
        self.on_cpu = on_cpu = (platform or device.platform) == "cpu"
        cached = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params)) <= cached_bytes
        self._on_host = device.platform == "cpu" and self.mesh is None  # whatever `platform` says
        self.form = self._form(on_cpu, cached)
        self.batch_invariant = switch("batch_invariant", batch_invariant)
        if self.batch_invariant:
            pool_buckets, widths = (), ()
        if widths is None:
            widths = cpu.widths_for(limits.lanes, cached=cached and self.rows == 1) if on_cpu else ()
        if pool_buckets is None:
            small = on_cpu and not cached and self.rows > 1
            pool_buckets = (*POOL_BUCKETS, cpu.SMALL_BUCKET) if small else POOL_BUCKETS
        self.widths = _up_to(limits.lanes, widths)
        self.entries = limits.pool + limits.lanes  # a step writes S entries, wherever it begins
        self.prompt_block = None if prompt_block is None else whole("prompt_block", prompt_block, 1)
        if self.prompt_block:
            prompt_buckets = [length for length in prompt_buckets if length % self.prompt_block == 0]
            self._check_block(self.prompt_block)
        self.prompt_buckets = _up_to(limits.pool, prompt_buckets)
        # A larger part saves less than its program costs to compile; and a CPU copies the part that it reads.
        self.pool_buckets = _up_to(self.entries, [size for size in pool_buckets if 3 * size <= self.entries])
        self._everywhere: Any = sharding.replicated(self.mesh) if self.mesh else SingleDeviceSharding(device)
        self._by_row: Any = sharding.batch_sharding(self.mesh, self.rows) if self.mesh else self._everywhere
        self._rules = rules_for(vocabulary, limits, positions, config.vocab_size)
        self.compile_s = 0.0
        self._batch_shapes: dict[tuple[int, int], Batch] = {}
        self._executables: dict[ProgramKey, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    def _form(self, on_cpu: bool, cached: bool) -> Form:
        if self.mesh is not None or (on_cpu and not is_plain(self.shapes)):
            return "plain"
        return "outputs_first" if on_cpu and not cached else "fused"

    def _check_block(self, block: int) -> None:
        if self.mesh is not None:
            raise ValueError("Beginnings of prompts are reused on one device only: this model is on a mesh.")
        if self.limits.pool % block:
            raise ValueError(
                f"Limits.pool={self.limits.pool} is no multiple of prompt_block={block}, by which prompts are fed. "
                f"Give {round_up(self.limits.pool, block)}."
            )

    def fits(self, params: Any, config: ModelConfig, vocabulary: Vocabulary, positions: Positions) -> bool:
        """Whether these parameters have the same shapes in the same places, and all else is equal."""
        if (config, vocabulary, positions) != (self.config, self.vocabulary, self.positions):
            return False
        structure: Any = jax.tree.structure(params)
        if structure != jax.tree.structure(self.shapes):
            return False
        return all(
            (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, len(x.shape))
            for x, y in zip(jax.tree.leaves(self.shapes), jax.tree.leaves(_shapes(params)), strict=True)
        )

    # ------------------------------------------------------------------------------------------- description

    def bucket(self, tokens: int) -> int:
        """The length that a prompt of so many tokens is padded to."""
        return next(bucket for bucket in self.prompt_buckets if bucket >= tokens)

    def rows_together(self, length: int) -> int:
        """Prompts padded to this length that the largest program feeds: B, or 1 if B take much memory.

        With `batch_invariant` it is 1 too, but a mesh needs B.
        """
        is_large = 4 * math.prod(self.scores(self.rows, length).shape) > LARGE_PREFILL
        return 1 if self.mesh is None and (self.batch_invariant or is_large) else self.rows

    def scores(self, rows: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape of the attention scores by which feeding prompts of this length is judged: float32 [n, N, Q, L].

        `attend_to_earlier` goes by eight spans of queries. On a CPU XLA computes them side by side, elsewhere the
        last one counts. Above 1,024 tokens that is more than is in memory: a span then goes block by block.
        """
        queries = self.prompt_block or (ceil_div(9 * length, 16) if self.on_cpu else ceil_div(length, 8))
        shape = (rows, self.config.num_heads, queries, length)
        place: Any = sharding.sharding("BNQP", shape, self.mesh) if self.mesh else self._everywhere
        return jax.ShapeDtypeStruct(shape, "float32", sharding=place)

    @property
    def programs(self) -> tuple[ProgramKey, ...]:
        """All that a decoder of requests without scripts may run."""
        sizes = sorted({self.rows} if self.mesh else {1, self.rows})
        return (
            ProgramKey("new"),
            *(
                ProgramKey("admit", rows, length=length)
                for rows in sizes
                for length in self.prompt_buckets
                if rows <= self.rows_together(length) and not self.prompt_block
            ),
            *(
                ProgramKey("feed", size=size, length=length)
                for size in self.part_sizes
                for length in self.prompt_buckets
            ),
            *((ProgramKey("keep"), ProgramKey("reuse")) if self.prompt_block else ()),
            *(ProgramKey("decode", length=length) for length in self.pool_buckets),
            ProgramKey("release"),
            *(() if self._on_host else (ProgramKey("read"),)),
        )

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Tokens that a part of a prompt is padded to: C, and less for what follows the last block."""
        return _up_to(self.prompt_block, PROMPT_BUCKETS) if self.prompt_block else ()

    def lower(self, program: ProgramKey, *, to_keep: bool = False) -> jax.stages.Lowered:
        """One of the programs, lowered; `to_keep` for the next start, jax does not look for it in its cache."""
        everywhere, by_row = self._everywhere, self._by_row
        request = SamplingParams().request(program.script)
        batch = self.batch_shapes(program.script)
        places = jax.tree.map(lambda leaf: leaf.sharding, batch)
        model = Transformer(self.config)
        params, rules = self._step_shapes, sharding.abstract(self._rules, everywhere)

        def array(dtype: Any, *shape: int, place: Any = everywhere) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        def jit(function: Callable[..., Any], places: Any = places, **options: Any) -> Any:
            if to_keep:
                function = kept.unique_name(function, program.verb)
            return jax.jit(function, out_shardings=places, **options)

        number = array("int32")
        match program.verb:
            case "new":
                return jit(self._new_batch).lower(sharding.abstract(request, everywhere))
            case "admit":
                n, place = program.rows, by_row if program.rows == self.rows else everywhere
                rows = functools.partial(array, place=place)
                requests = jax.tree.map(lambda x: rows(x.dtype, n, *x.shape[1:]), batch.requests)
                prompts, lengths = rows("int32", n, program.length), rows("int32", n)
                slot = () if n == self.rows else (number,)
                admit = jit(functools.partial(loop.admit, model), donate_argnums=2)
                return admit.lower(params, rules, batch, requests, prompts, lengths, *slot)
            case "feed":
                requests = jax.tree.map(lambda x: array(x.dtype, 1, *x.shape[1:]), batch.requests)
                feed = jit(functools.partial(loop.feed_part, model, size=program.size), donate_argnums=2)
                prompt, length = array("int32", 1, program.length), array("int32", 1)
                return feed.lower(params, rules, batch, requests, prompt, length, number, number)
            case "keep":
                assert self.prompt_block
                keep = jit(functools.partial(loop.take_part, size=self.prompt_block), everywhere)
                return keep.lower(batch.pool, number, number)
            case "reuse":
                part = jax.eval_shape(lambda: empty_pool(self.config, 1, self.prompt_block or 0))
                part = sharding.abstract(part, everywhere)
                reuse = jit(loop.put_part, places.pool, donate_argnums=0)
                return reuse.lower(batch.pool, part, number, number)
            case "decode":
                chunk = functools.partial(loop.decode_chunk, model, used=program.length, widths=self.widths)
                until = number, array("bool"), array("float32", len(self.widths))
                return jit(chunk, donate_argnums=2).lower(params, rules, batch, *until)
            case "release":
                stop = array("int32", self.rows, place=by_row)
                return jit(loop.release, donate_argnums=0).lower(batch, stop)
            case "read":
                return jit(loop.take, everywhere).lower(batch.rows, number)

    def batch_shapes(self, script_size: tuple[int, int] = NOTHING) -> Batch:
        """Shapes of `empty_batch`, with the sharding of each."""
        if script_size not in self._batch_shapes:  # traced once: each `decode` asks
            request = SamplingParams().request(script_size)
            batch = jax.eval_shape(functools.partial(self._new_batch, request))
            pool: Any = sharding.pool_shardings(batch.pool, self.mesh) if self.mesh else self._everywhere
            shapes = sharding.abstract(batch, Batch(self._by_row, self._by_row, pool))
            self._batch_shapes[script_size] = shapes
        return self._batch_shapes[script_size]

    def _new_batch(self, request: Request) -> Batch:
        return loop.empty_batch(self.config, self.limits, self.rows, request)

    @functools.cached_property
    def _step_shapes(self) -> Any:
        """Shapes of the parameters in their form."""
        if self.form == "plain":
            return self.shapes
        return sharding.abstract(jax.eval_shape(CHANGES[self.form], self.shapes), self._everywhere)

    # ------------------------------------------------------------------------------------------------ running

    def empty_batch(self, script_size: tuple[int, int] = NOTHING) -> Batch:
        """B idle rows and an empty pool, for requests with scripts of this size."""
        request = SamplingParams().request(script_size)
        return self._run(ProgramKey("new", script=script_size), request)

    def admit(self, params: Any, batch: Batch, new: Mapping[int, tuple[Sequence[int], Request]]) -> Batch:
        """Prompts into rows: one by one, or all in one call if a mesh divides them or most rows are new.

        Where memory is short they go one by one, and with `batch_invariant`, on a mesh too; with a `prompt_block`
        they go block by block.

        Args:
          params: in the form of these programs.
          batch: donated, as everywhere here.
          new: prompt and request by row.
        """
        if self.prompt_block:
            for row, (prompt, request) in new.items():
                for start in range(0, len(prompt), self.prompt_block):
                    batch = self.feed(params, batch, row, prompt, request, start)
            return batch
        bucket = self.bucket(max(len(prompt) for prompt, _ in new.values()))
        few = self.rows > 1 and (len(new) == 1 or 2 * len(new) < self.rows)
        one_by_one = self.batch_invariant or (self.mesh is None and (few or self._is_too_large(bucket)))
        if not one_by_one:
            return self._admit(params, batch, new, self.rows)
        for slot, prompt_and_request in new.items():
            batch = self._admit(
                params, batch, {slot: prompt_and_request}, 1 if self.mesh is None else self.rows
            )
        return batch

    def _is_too_large(self, length: int) -> bool:
        """Whether B prompts padded to this length take too much memory together, at all or at present."""
        scores = self.scores(self.rows, length)
        is_small = 4 * math.prod(scores.shape) <= SMALL_PREFILL
        return self.rows_together(length) < self.rows or not (is_small or shortage([scores]) is None)

    def _admit(
        self,
        params: Any,
        batch: Batch,
        new: Mapping[int, tuple[Sequence[int], Request]],
        n: int,
    ) -> Batch:
        """`n` is B, or 1 for a single prompt."""
        script = _script_size(batch)
        bucket = self.bucket(max(len(prompt) for prompt, _ in new.values()))
        prompts, lengths = np.zeros((n, bucket), np.int32), np.zeros(n, np.int32)
        requests = [SamplingParams().request(script)] * n
        for row, (prompt, request) in new.items() if n == self.rows else enumerate(new.values()):
            prompts[row, : len(prompt)], lengths[row], requests[row] = prompt, len(prompt), request
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *requests)
        program = ProgramKey("admit", n, length=bucket, script=script)
        slot = () if n == self.rows else (np.int32(*new),)
        return self._run(program, params, self._placed_rules, batch, stacked, prompts, lengths, *slot)

    def feed(
        self, params: Any, batch: Batch, row: int, prompt: Sequence[int], request: Request, start: int
    ) -> Batch:
        """The block of a prompt that begins at `start`, or what there is of it; all before is in the row's pool.

        Its place decides by which program: it has the same keys and values, bit for bit, in every prompt that
        begins alike.
        """
        assert self.prompt_block
        end, script = min(start + self.prompt_block, len(prompt)), _script_size(batch)
        size = next(size for size in self.part_sizes if size >= end - start)
        padded = np.zeros((1, self.bucket(start + self.prompt_block)), np.int32)
        padded[0, :end] = prompt[:end]
        program = ProgramKey("feed", size=size, length=padded.shape[1], script=script)
        requests = jax.tree.map(lambda leaf: np.asarray(leaf)[None], request)
        where = np.array([end], np.int32), np.int32(row), np.int32(start)
        return self._run(program, params, self._placed_rules, batch, requests, padded, *where)

    def keep(self, batch: Batch, row: int, start: int) -> Pool:
        """The keys and values of a block in a row's pool, copied."""
        return self._run(ProgramKey("keep"), batch.pool, np.int32(row), np.int32(start))

    def reuse(self, batch: Batch, row: int, start: int, block: Pool) -> Batch:
        """A block that was kept, in a row's pool."""
        pool = self._run(ProgramKey("reuse"), batch.pool, block, np.int32(row), np.int32(start))
        return dataclasses.replace(batch, pool=pool)

    def pool_bucket(self, cursor: int) -> int:
        """The entries that steps read where the fullest row has used so many: the fewest with room for more."""
        room = min(cursor + 4 * self.limits.lanes, self.entries)
        return next(bucket for bucket in self.pool_buckets if bucket >= room)

    def decode_chunk(
        self,
        params: Any,
        batch: Batch,
        steps: int,
        refill: bool,
        used: int,
        costs: np.ndarray | None = None,
    ) -> Batch:
        """At most `steps` steps, which read `used` entries of the pool; `costs` as for `loop.decode_chunk`."""
        program = ProgramKey("decode", length=used, script=_script_size(batch))
        costs = np.ones(len(self.widths), np.float32) if costs is None else costs
        until = np.int32(steps), np.bool_(refill), costs
        return self._run(program, params, self._placed_rules, batch, *until)

    def only(self, index: int) -> np.ndarray:
        """Costs with which every step has one width, that of this index: float32 [number of widths]."""
        return np.where(np.arange(len(self.widths)) == index, 1, np.inf).astype(np.float32)

    def release(self, batch: Batch, stop: np.ndarray) -> Batch:
        """Stops rows: `stop` is int32 [B], a `Stop` each, RUNNING for rows that go on."""
        return self._run(ProgramKey("release", script=_script_size(batch)), batch, stop)

    def read(self, batch: Batch, row: int) -> RowState:
        """One row, on the host."""
        if self._on_host:
            return cpu.read_row(batch.rows, row)
        return jax.device_get(self._run(ProgramKey("read"), batch.rows, np.int32(row)))

    def executable(self, program: ProgramKey) -> jax.stages.Compiled:
        """The program, compiled now or before."""
        with self._lock:
            if program not in self._executables:
                start = time.perf_counter()
                self._executables[program] = self._load_or_compile(program, self._file_of(program))
                self.compile_s += time.perf_counter() - start
            return self._executables[program]

    def compile_all(self, programs: Iterable[ProgramKey] | None = None) -> None:
        """Compiles those of these programs that are not, as many at once as there are cores; the log tells of each.

        By default they are all that requests without scripts may need. Tracing is Python's and takes turns, while
        XLA compiles what was traced before; what is kept of an earlier start is not traced. A request that comes
        meanwhile uses what is done, and compiles what it needs besides by itself.
        """
        start = time.perf_counter()
        todo = [program for program in programs or self.programs if program not in self._executables]
        todo.sort(key=lambda program: program.verb != "decode")  # loops take longest
        done = list[ProgramKey]()
        one_at_a_time = threading.Lock()

        def load_or_compile(program: ProgramKey, *made: Any) -> None:
            executable = self._load_or_compile(program, *made)
            with one_at_a_time:
                self._executables.setdefault(program, executable)
                done.append(program)
                seconds = time.perf_counter() - start
                LOG.info("compiled %d of %d after %.1f s: %s", len(done), len(todo), seconds, program)

        threads = concurrent.futures.ThreadPoolExecutor(cpu.cores())
        try:
            jobs = []
            for key in todo:
                file = self._file_of(key)
                lowered = None if file and file.exists() else self.lower(key, to_keep=file is not None)
                jobs.append(threads.submit(load_or_compile, key, file, lowered))
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        finally:
            threads.shutdown(cancel_futures=True)

    def _load_or_compile(
        self, program: ProgramKey, file: Path | None, lowered: jax.stages.Lowered | None = None
    ) -> jax.stages.Compiled:
        """The program that was kept in a file, or else one compiled now, and kept there."""
        executable = kept.read(file, self._devices) if file else None
        if executable is None:
            lowered = lowered or self.lower(program, to_keep=file is not None)
            executable = lowered.compile(self.xla_options)
            if file:
                kept.keep(file, executable)
        return executable

    def _file_of(self, program: ProgramKey) -> Path | None:
        """Where the program is kept for the next start: named by all that `lower` reads."""
        return kept.file_of(
            self._devices, dataclasses.astuple(program), self.config, self.rows, self.form, self.widths,
            self.on_cpu, self.xla_options, self._by_row, self.prompt_block,
            *jax.tree.flatten((self.shapes, jax.eval_shape(lambda: self._rules))),
        )  # fmt: skip

    def file_of_times(self) -> Path | None:
        """Where times that were measured of these programs are kept, or None."""
        return kept.file_of(
            self._devices, self.config, self.rows, self.form, self.widths, self.pool_buckets, self.entries,
            cpu.cores(), self.xla_options, *jax.tree.flatten(self.shapes), ending=kept.TIMES,
        )  # fmt: skip

    def _run(self, program: ProgramKey, *args: Any) -> Any:
        executable = self.executable(program)
        if not self._everywhere.is_fully_addressable:  # what the host gives is in each process
            args = sharding.from_host(args, executable.input_shardings[0])
        return executable(*args)

    @functools.cached_property
    def _placed_rules(self) -> Any:
        return sharding.from_host(self._rules, self._everywhere)


def _script_size(batch: Batch) -> tuple[int, int]:
    _, R, C = batch.requests.script.shape
    return R, C


def _shapes(params: Any) -> Any:
    """Shapes with shardings; arrays of the host count as on the default device, where they are used."""
    host = SingleDeviceSharding(jax.local_devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, "sharding", None) or host
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, params)


def _up_to(largest: int, sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({size for size in sizes if size < largest} | {largest}))
