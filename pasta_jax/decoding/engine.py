"""The engine: prompts in, traces out. Rows by lanes in one compiled program; the host only starts and reads.

`Decoder` keeps the compiled functions, one for each shape (rows, prompt bucket); everything a caller may vary
from call to call (temperature, seed, limits on tokens, bias) is traced and compiles nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pasta_jax import sharding
from pasta_jax.decoding import loop
from pasta_jax.decoding.interpreter import Rules, rules_for
from pasta_jax.decoding.script import NOTHING, Script, no_script
from pasta_jax.decoding.state import Limits, Request, Stop
from pasta_jax.decoding.trace import Trace, read_trace
from pasta_jax.model import ModelConfig, Pool, Transformer, empty_pool
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model that can decode.

    Attributes:
      params: nested dict of arrays, as `Transformer` names them.
      config: sizes and choices.
      tokenizer: with an id for each tag piece.
      positions: the scheme that the model was trained with.
      max_depth: how deep its promises may nest.
      decoders: compiled decoders by their static sizes, which `pasta_jax.decode` keeps here.
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    positions: Positions = Positions()
    max_depth: int = 1
    decoders: dict[Any, Decoder] = dataclasses.field(init=False, repr=False, default_factory=dict)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """On which its parameters lie; None if that is one device."""
        return sharding.mesh_of(self.params)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a caller may ask of each request; none of it recompiles.

    Attributes:
      max_new_tokens: tokens of the answer, over all threads, tags included.
      max_branch_tokens: content tokens of one branch; then its end is forced.
      temperature: 0 is greedy.
      top_k, top_p: draw among the most likely only; 0 and 1 switch them off.
      seed: the same seed gives the same text, whatever else is decoded beside it.
      open_bias: added to the logit that opens a promise: above 0 more parallel, below 0 more careful,
        -inf sequential.
      script: what threads are made to say (`decoding.script`); only its size, rounded up, compiles anew.
    """

    max_new_tokens: int = 512
    max_branch_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    open_bias: float = 0.0
    script: Script | None = None

    def __post_init__(self) -> None:
        for name, good in (
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("max_branch_tokens", self.max_branch_tokens >= 1),
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
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
            key=np.array([0, self.seed % 2**32], np.uint32),
            script_paths=script.paths,
            script=script.tokens,
        )


def script_size(sampling: Sequence[Sampling]) -> tuple[int, int]:
    """(R, C) for the scripts of all these requests: powers of two, so that others find the program compiled."""
    sizes = [each.script.size for each in sampling if each.script is not None]
    if not sizes:
        return NOTHING
    R, C = (max(size[i] for size in sizes) for i in range(2))
    return 1 << (R - 1).bit_length(), 1 << (C - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      wall_s: from the prompts on the host to the finished traces on the host, without compiling.
      compile_s: compiling, 0 when everything was compiled before.
    """

    wall_s: float
    compile_s: float


def batch_shardings(pool: Pool, rows: int, mesh: Any) -> loop.Batch:
    """Where B requests lie that are being answered: as they go into a call, so they come out.

    Args:
      pool: shapes or arrays.
      rows: B.
      mesh: of devices or of a topology.
    """
    by_row: Any = sharding.batch_sharding(mesh, rows)
    return loop.Batch(by_row, by_row, sharding.pool_shardings(pool, mesh))


class Decoder:
    """Decodes batches of prompts with compiled functions that it keeps.

    Args:
      model: what to decode with.
      limits: static sizes.
      rows: B, prompts decoded at once; more prompts are decoded in turns. On a mesh the next multiple of those
        devices that divide rows.
      chunk: decode steps between two looks of the host.
      prompt_buckets: lengths that prompts are padded to; one compiled prefill each.
      mesh: where the model's parameters lie, if they do not say so themselves; rows go over data and fsdp, heads
        over tensor.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits = Limits(),
        rows: int = 1,
        chunk: int = 512,
        prompt_buckets: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.mesh = mesh or model.mesh
        self.model, self.limits, self.chunk = model, limits, chunk
        self.rows = rows if self.mesh is None else sharding.round_up_rows(rows, self.mesh)
        fitting = {bucket for bucket in prompt_buckets if bucket < limits.pool}
        self.prompt_buckets = tuple(sorted(fitting | {limits.pool}))
        self.rules: Rules = rules_for(
            model.tokenizer.vocabulary, limits, model.positions, model.config.vocab_size
        )
        transformer = Transformer(model.config)
        self._new_pool: Callable[[], Pool] = functools.partial(
            empty_pool, model.config, self.rows, limits.pool + limits.lanes
        )
        out = (
            None
            if self.mesh is None
            else batch_shardings(jax.eval_shape(self._new_pool), self.rows, self.mesh)
        )
        if out is not None:
            self._new_pool = jax.jit(self._new_pool, out_shardings=out.pool)
        prefill, decode_chunk = (
            functools.partial(function, transformer) for function in (loop.prefill, loop.decode_chunk)
        )
        self._prefill = jax.jit(prefill, donate_argnums=2, out_shardings=out)
        self._decode_chunk = jax.jit(decode_chunk, donate_argnums=2, out_shardings=out)
        self._compiled: dict[Any, Any] = {}

    def fits(self, model: Model) -> bool:
        """Whether another model differs in nothing but its parameters."""
        mine, theirs = (
            (m.config, m.positions, m.max_depth, m.tokenizer.vocabulary) for m in (self.model, model)
        )
        return bool(mine == theirs)

    def for_model(self, model: Model) -> Decoder:
        """The same for another model that fits: it shares what is compiled.

        Raises:
          ValueError: the models differ in more than their parameters.
        """
        if not self.fits(model):
            raise ValueError("Only models alike in all but their parameters share compiled programs.")
        other = copy.copy(self)
        other.model = model
        return other

    def decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]
    ) -> tuple[list[Trace], Timing]:
        """Answer prompts given as ids, each with its own wishes; traces in the same order.

        Raises:
          ValueError: a prompt that the pool cannot hold; nothing has been decoded then.
        """
        if len(prompts) != len(sampling):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling)} samplings: give one for each.")
        for prompt in prompts:
            self._check(prompt)
        traces: list[Trace] = []
        wall = compiling = 0.0
        for start in range(0, len(prompts), self.rows):
            group = slice(start, start + self.rows)
            done, timing = self._decode_rows(prompts[group], sampling[group])
            traces += done
            wall, compiling = wall + timing.wall_s, compiling + timing.compile_s
        return traces, Timing(wall, compiling)

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("The prompt is empty. Give the model something to answer.")
        if len(prompt) >= self.limits.pool:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens, and the pool holds {self.limits.pool} for prompt and answer "
                f"together. Shorten the prompt, or set cache_len to more than {len(prompt)}."
            )

    def _decode_rows(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]
    ) -> tuple[list[Trace], Timing]:
        """At most B prompts; rows without one stand idle."""
        B = self.rows
        bucket = next(b for b in self.prompt_buckets if b >= max(map(len, prompts)))
        tokens = np.zeros((B, bucket), np.int32)
        lengths = np.zeros(B, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        size = script_size(sampling)
        asks = [each.request(size) for each in sampling] + [Sampling().request(size)] * (B - len(prompts))
        requests = jax.tree.map(lambda *leaves: np.stack(leaves), *asks)
        params, rules, steps = self.model.params, self.rules, np.int32(self.chunk)

        def first() -> tuple[Any, ...]:
            return params, rules, self.empty_pool(), requests, tokens, lengths

        prefill, t_prefill = self._compile(("prefill", bucket, size), self._prefill, first)
        decode_chunk, t_decode = self._compile(
            ("decode", size), self._decode_chunk, lambda: (params, rules, prefill(*first()), steps)
        )

        begun = time.perf_counter()
        batch = prefill(*first())
        while True:
            batch = decode_chunk(params, rules, batch, steps)
            if np.all(np.asarray(batch.rows.stop) != Stop.RUNNING):
                break
        rows = jax.device_get(batch.rows)
        traces = [read_trace(jax.tree.map(lambda leaf, i=i: leaf[i], rows)) for i in range(len(prompts))]
        return traces, Timing(time.perf_counter() - begun, t_prefill + t_decode)

    def empty_pool(self) -> Pool:
        """[B, P + S, K, H] a layer: a step writes S entries, those of idle lanes after the real ones."""
        return self._new_pool()

    def _compile(self, key: Any, function: Any, args: Callable[[], tuple[Any, ...]]) -> tuple[Any, float]:
        """The compiled function, and the seconds that compiling took now; `args` are asked for only then."""
        if key in self._compiled:
            return self._compiled[key], 0.0
        begun = time.perf_counter()
        self._compiled[key] = function.lower(*args()).compile()
        return self._compiled[key], time.perf_counter() - begun
