"""An update of training compared with transformers on torch, and with tunix: the same weights, batches and losses.

Each system runs in a process of its own, as its users run it. All take the same updates in turn: by AdamW at one
rate, without decay and clipping, in the dtype of the weights. A peer is whole: its own model, loss, gradient and
optimizer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.benchmark.measure import Quartiles, TableRow, interleaved, median_ratio
from pasta_jax.benchmark.measurements import Effort
from pasta_jax.benchmark.models import model_of
from pasta_jax.benchmark.peers import hf_model, missing_package
from pasta_jax.config import Config, DataConfig, OptimizerConfig
from pasta_jax.decoding.model import Model
from pasta_jax.memory import with_large_pages
from pasta_jax.messages import message_of
from pasta_jax.model.config import ModelConfig
from pasta_jax.training.loop import sft, training_mesh
from pasta_jax.training.update import make_update

LOG = logging.getLogger("pasta_jax")

OURS = "pasta_jax"
OPTIMIZER = OptimizerConfig(lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0)

CLOSE = 1e-3
"""Maximum relative difference of two losses that count as the same."""

Step: TypeAlias = Callable[[np.ndarray], float]
"""An update on tokens, int32 [B, L], each the target of the one before; returns the loss before the update."""


def train(model_name: str, dtype: str | None, effort: Effort, seed: int) -> list[TableRow]:
    """Seconds of an update and tokens per second, ours and those of each peer that is installed.

    Args:
      model_name, dtype: as for `models.model_of`.
      effort: rows and length of a batch, and repeats.
      seed: of the batches.
    """
    options = [model_name, dtype or "", str(effort.train_rows), str(effort.train_length), str(seed)]
    losses: dict[str, list[float]] = {}
    with contextlib.ExitStack() as running:
        workers: dict[str, Worker] = {}
        for name in SYSTEMS:
            if package := missing_package(*NEEDED.get(name, ())):
                LOG.warning("%s is not measured: %s is not installed.", name, package)
                continue
            worker = running.enter_context(Worker(name, options))
            first = worker.update()
            if "fault" in first:
                LOG.warning("%s is not measured: %s", name, first["fault"])
                continue
            LOG.info(
                "%s: the first update took %.0f s, its loss is %.5f", name, first["seconds"], first["loss"]
            )
            losses[name], workers[name] = [first["loss"]], worker
        if OURS not in workers:
            raise RuntimeError(f"The update of {model_name} fails; the log says why.")

        def timed(name: str) -> float:
            measured = workers[name].update()
            losses[name].append(measured["loss"])
            return float(measured["seconds"])

        calls = {name: functools.partial(timed, name) for name in workers}
        samples = interleaved("train", calls, effort.repeats, "s")
    return compared(samples, losses, effort.train_rows * effort.train_length)


class Worker:
    """A process that trains with one system, an update at a time, when it is asked to."""

    def __init__(self, name: str, options: Sequence[str]):
        command = [sys.executable, "-m", "pasta_jax.benchmark.training", name, *options]
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several share an accelerator
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def update(self) -> dict[str, Any]:
        """Makes an update: its "seconds", and the "loss" before it; or the "fault"."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {"fault": "its process ended"}


def work(name: str, model_name: str, dtype: str, rows: str, length: str, seed: str) -> None:
    """The process of a `Worker`: an update for each line on stdin."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    rng = np.random.default_rng(int(seed))
    step: Step | None = None
    for _ in sys.stdin:
        started = time.perf_counter()
        try:
            if step is None:
                model = model_of(model_name, dtype or None)
                step = SYSTEMS[name](model, int(rows), int(length))
            tokens = rng.integers(3, model.config.vocab_size, (int(rows), int(length)), np.int32)
            loss = step(tokens)
        except Exception as error:  # a peer that fails on this machine is left out
            LOG.exception("%s", name)
            replies.write(json.dumps({"fault": message_of(error)}) + "\n")
            return
        replies.write(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}) + "\n")


def compared(samples: dict[str, list[float]], losses: dict[str, list[float]], tokens: int) -> list[TableRow]:
    """A table row for each system, from the seconds and losses of its updates, and the tokens of one."""
    points: list[TableRow] = []
    for name, seconds in samples.items():
        apart = max(abs(a / b - 1) for a, b in zip(losses[name], losses[OURS], strict=True))
        points.append(
            {
                "who": name,
                "update, s": Quartiles.of(seconds),
                "tokens/s": Quartiles.of([tokens / s for s in seconds]),
                "ours is x as fast": median_ratio(seconds, samples[OURS]),
                "last loss": losses[name][-1],
                "same losses": apart < CLOSE,
            }
        )
    return points


def ours(model: Model, rows: int, length: int) -> Step:
    """The update of `python -m pasta_jax.train`."""
    data = DataConfig(rows=rows, length=length)
    config = Config(model=model.config, data=data, optimizer=OPTIMIZER)
    update = make_update(config, training_mesh(config), sft)
    state = update.start(jax.device_put(model.params, update.shardings.params))
    state = jax.tree.map(lambda x: x.copy(), state)  # it is donated
    line = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        target = np.full_like(tokens, NO_TARGET)
        target[:, :-1] = tokens[:, 1:]
        zero = np.zeros_like(tokens)
        batch = ThreadedTokens(
            token=tokens, position=line, doc=zero + 1, segment=zero, order=line,
            sees=zero[..., None].astype(np.uint32),
            thread=zero, target=target,
        )  # fmt: skip
        state, measured = update.step(state, {}, jax.device_put(batch.fields(), update.batch_sharding))
        jax.block_until_ready(state)
        return float(measured["loss"])

    return step


# --------------------------------------------------------------------------------------------------- torch


def torch_eager(model: Model, rows: int, length: int) -> Step:
    """The model of transformers, as it is."""
    return _torch(model, lambda torch, hf: hf)


def torch_compiled(model: Model, rows: int, length: int) -> Step:
    """The model of transformers under torch.compile."""
    return _torch(model, lambda torch, hf: torch.compile(hf))


def _torch(model: Model, prepare: Callable[[Any, Any], Any]) -> Step:
    torch: Any = importlib.import_module("torch")
    # Only the eager attention of transformers has a softcap.
    hf, device = hf_model(model, **({"attn_implementation": "eager"} if model.config.attn_softcap else {}))
    hf = hf.train()
    hf.config.use_cache = False
    rates = dict(lr=OPTIMIZER.lr, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps, weight_decay=0.0)
    optimizer = torch.optim.AdamW(hf.parameters(), fused=True, **rates)
    prepared = prepare(torch, hf)

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        loss = prepared(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


# --------------------------------------------------------------------------------------------------- tunix


def tunix(model: Model, rows: int, length: int) -> Step:
    """The trainer of tunix with its Gemma 2."""
    gemma: Any = importlib.import_module("tunix.models.gemma.model")
    trainers: Any = importlib.import_module("tunix.sft.peft_trainer")
    nnx: Any = importlib.import_module("flax.nnx")
    optax: Any = importlib.import_module("optax")
    c = model.config
    net = gemma.Gemma(_tunix_config(gemma, c), rngs=nnx.Rngs(0))
    _copy_to_tunix(net, jax.tree.map(np.asarray, model.params), c)
    adamw = optax.adamw(OPTIMIZER.lr, OPTIMIZER.b1, OPTIMIZER.b2, OPTIMIZER.eps, weight_decay=0.0)
    trainer = trainers.PeftTrainer(net, adamw, trainers.TrainingConfig(eval_every_n_steps=2**30))
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    shape = rows, length
    causal = np.broadcast_to(np.tri(shape[1], dtype=bool), (shape[0], shape[1], shape[1]))
    fixed = {
        "input_mask": np.ones(shape, bool),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "attention_mask": causal,
    }

    def step(tokens: np.ndarray) -> float:
        loss, _, norm = train_step(jax.device_put({"input_tokens": tokens, **fixed}))
        jax.block_until_ready((norm, nnx.state(trainer.optimizer), nnx.state(net)))
        return float(loss)

    return step


def _tunix_config(gemma: Any, c: ModelConfig) -> Any:
    kinds = {"local": gemma.AttentionType.LOCAL_SLIDING, "global": gemma.AttentionType.GLOBAL}
    config = gemma.ModelConfig(
        num_layers=c.num_layers,
        num_embed=c.vocab_size,
        embed_dim=c.model_dim,
        hidden_dim=c.mlp_dim,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        final_logit_softcap=c.final_softcap or None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=tuple(kinds[kind] for kind in c.kinds),
        attn_logits_soft_cap=c.attn_softcap or None,
        sliding_window_size=c.sliding_window,
    )
    if not c.post_norms or not c.tie_embeddings or c.query_scale not in (0, c.head_dim):
        raise ValueError("its Gemma 2 has another form than this model")
    return config


def _copy_to_tunix(net: Any, params: Any, c: ModelConfig) -> None:
    def put(variable: Any, array: np.ndarray) -> None:
        if variable.value.shape != array.shape:
            raise ValueError(f"tunix has {variable.value.shape} where we have {array.shape}")
        variable.value = jax.numpy.asarray(array)

    put(net.embedder.input_embedding, params["embed"]["embedding"])
    put(net.final_norm.scale, params["final_norm"]["scale"])
    for z, layer in enumerate(net.layers):
        own = params[f"layer_{z}"]
        attn, mlp = own["attn"], own["mlp"]
        heads = {name: attn[f"{name}_proj"].swapaxes(0, 1) for name in "qkv"}  # [N or K, D, H]
        if c.num_heads == c.num_kv_heads:
            put(layer.attn.qkv_einsum.w, np.stack([*heads.values()]))
        else:
            put(layer.attn.q_einsum.w, heads["q"])
            put(layer.attn.kv_einsum.w, np.stack([heads["k"], heads["v"]]))
        put(layer.attn.attn_vec_einsum.w, attn["o_proj"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, name).kernel, mlp[name])
        norms = {
            "pre_attention_norm": "attn_norm", "post_attn_norm": "attn_post_norm", "pre_ffw_norm": "mlp_norm",
            "post_ffw_norm": "mlp_post_norm",
        }  # fmt: skip
        for theirs, name in norms.items():
            put(getattr(layer, theirs).scale, own[name]["scale"])


SYSTEMS: dict[str, Callable[[Model, int, int], Step]] = {
    OURS: ours,
    "transformers, eager": torch_eager,
    "transformers, torch.compile": torch_compiled,
    "tunix": tunix,
}
"""By name: from a model, rows and length to an update."""

NEEDED = {
    "transformers, eager": ("transformers", "torch"),
    "transformers, torch.compile": ("transformers", "torch"),
    "tunix": ("tunix",),
}
"""The packages of a peer, by its name."""


if __name__ == "__main__":
    if sys.argv[1] == OURS:
        with_large_pages()  # as `pasta_jax.train` does
    work(*sys.argv[1:])
