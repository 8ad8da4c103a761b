"""Workdirs: damaged files are the same model, an older whole state, or one error that names the way out."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import CheckpointConfig, Config
from pasta_jax.files import write_jsonl
from pasta_jax.loading import load
from pasta_jax.model import ModelConfig
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.training.metrics import MetricsWriter, read_metrics
from pasta_jax.training.state import TrainState, new_state
from tests.fuzz import hostile
from tests.fuzz.hostile import hurt as hurt
from tests.fuzz.runner import Target, outcome
from tests.helpers.hf_folders import small_tokenizer
from tests.helpers.models import random_params

CONFIG = Config(
    steps=30,
    model=ModelConfig(
        vocab_size=320, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
    ),
    checkpoint=CheckpointConfig(keep=2),
)
STEPS = (20, 30)
NEWEST = f"checkpoints/{STEPS[-1]}"
ABOUT = f"{NEWEST}/pasta/pasta.json"
JSONS = (
    ABOUT,
    f"{NEWEST}/_CHECKPOINT_METADATA",
    f"{NEWEST}/params/_METADATA",
    f"{NEWEST}/optimizer/_METADATA",
)
METRICS = "metrics.jsonl"


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(small_tokenizer())


@functools.cache
def state(step: int) -> TrainState:
    params = random_params(CONFIG.model, np.random.default_rng(step))
    fresh = new_state(params, optax.adamw(1e-3))
    return TrainState(fresh.params, fresh.opt_state, jnp.int32(step))


@functools.cache
def written() -> pathlib.Path:
    """A workdir with two checkpoints."""
    workdir = pathlib.Path(_temporary().name, "written")
    with Checkpoints(workdir, CONFIG, tokenizer()) as run:
        for step in STEPS:
            run.save(state(step), data_index=step)
    write_jsonl(workdir / METRICS, [{"step": step, "loss": 1.0} for step in range(1, STEPS[-1] + 1)])
    return workdir


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pasta_jax_fuzz_")


@functools.cache
def files() -> tuple[str, ...]:
    """The workdir's files. Those of data have names at random: numbers stand for them, the smallest is 0."""
    found = [path for path in written().rglob("*") if path.is_file()]
    found.sort(key=lambda path: (path.stat().st_size, path.name))
    data = [path for path in found if path.parent.name == "d"]
    names = {path: path.with_name(str(data.index(path))) if path in data else path for path in found}
    return tuple(sorted(name.relative_to(written()).as_posix() for name in names.values()))


def place(name: str) -> pathlib.PurePosixPath:
    """Where a file of `files` is."""
    path = pathlib.PurePosixPath(name)
    if path.parent.name != "d":
        return path
    found = [other for other in written().rglob("*") if other.is_file() and other.parent.name == "d"]
    found.sort(key=lambda other: (other.stat().st_size, other.name))
    return pathlib.PurePosixPath(found[int(path.name)].relative_to(written()).as_posix())


def draw(rng: random.Random) -> Any:
    newest = [name for name in files() if name.startswith(NEWEST)]
    if rng.random() < 0.4:
        name = rng.choice((ABOUT, *JSONS))
        tree = json.loads((written() / name).read_bytes())
        keys = ("step", "data_index", "config", "base", "tag_ids", "tokenizer", "format", "format_version")
        return {
            "edits": {name: hostile.edits(rng, tree, keys * (name == ABOUT), rng.randint(1, 2))},
            "damage": {},
        }
    damage = {}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((*newest, *newest, *files(), METRICS, f"checkpoints/{rng.choice((7, 40))}"))
        damage[name] = hostile.damage(rng)
    return {"edits": {}, "damage": damage}


def check(case: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(temporary, "run")
        shutil.copytree(written(), workdir)
        for name, edits in case["edits"].items():
            tree = json.loads((workdir / name).read_bytes())
            (workdir / name).write_text(json.dumps(hostile.edited(tree, edits)))
        for name, damage in case["damage"].items():
            hurt(workdir / place(name), damage)
        check_load(workdir, exact=not case["edits"])
        check_resume(workdir, exact=not case["edits"])
        check_metrics(workdir)


def check_load(workdir: pathlib.Path, exact: bool) -> None:
    model, error = outcome(CheckpointError, load, workdir)
    if error:
        return
    expected = [state(step).params for step in STEPS]
    assert not exact or any(same(model.params, params) for params in expected), (
        "other weights, without a word"
    )


def check_resume(workdir: pathlib.Path, exact: bool) -> None:
    found, _ = outcome(CheckpointError, resumed, workdir)
    assert found is None or not exact or any(same(found, state(step)) for step in STEPS), (
        "another state, without a word"
    )


def resumed(workdir: pathlib.Path) -> TrainState | None:
    with Checkpoints(workdir, CONFIG, tokenizer()) as run:
        if run.latest() is None:
            return None
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))
        return run.restore(target)[0]


def check_metrics(workdir: pathlib.Path) -> None:
    """What is read before a resume, and written again."""
    if not (workdir / METRICS).is_file():
        return
    with MetricsWriter(str(workdir), first_step=STEPS[0], config=CONFIG):
        pass
    assert all(line["step"] <= STEPS[0] for line in read_metrics(str(workdir / METRICS)))


def same(a: Any, b: Any) -> bool:
    ours, theirs = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    return len(ours) == len(theirs) and all(
        path == other and np.array_equal(x, y) for (path, x), (other, y) in zip(ours, theirs)
    )


TARGET = Target(draw, check, share=2.0, cases=8)
