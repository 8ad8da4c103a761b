"""What two processes of four devices do, and one of eight.

`python -m tests.helpers.several INDEX PORT FOLDER PART...` is one of the two. Each part leaves files in the folder
that say what came out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

import jax
import numpy as np

from pasta_jax import sharding, verbs
from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.config import CheckpointConfig, Config, DataConfig, MeshConfig, PreferenceConfig
from pasta_jax.decoding import api
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.evaluate import __main__ as evaluating
from pasta_jax.evaluate import compare as comparing
from pasta_jax.files import replacing, write_json
from pasta_jax.loading import load
from pasta_jax.model import Lora, ModelConfig
from pasta_jax.processes import agreement, meeting
from pasta_jax.processes.launchers import Group
from pasta_jax.training.loop import SFT
from pasta_jax.training.metrics import MetricsWriter
from pasta_jax.training.signals import Stopped
from tests.helpers import FULL, chatty, training

MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}
"""Sizes of fsdp and tensor, by name."""

WIDE = dataclasses.replace(training.CONFIG.model, num_heads=8, head_dim=4)


def config_of(mesh: str) -> Config:
    """Four steps; the first step's gradient is a tenth of the first mean."""
    fsdp, tensor = MESHES[mesh]
    return dataclasses.replace(
        training.CONFIG,
        steps=4,
        model=WIDE,
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
        checkpoint=CheckpointConfig(every_steps=2, every_minutes=0),
    )


ROUND = Config(
    stage="both",
    seed=3,
    steps=2,
    model=ModelConfig(vocab_size=1408, num_layers=1, model_dim=16, head_dim=8, mlp_dim=16, num_heads=2),
    data=DataConfig(rows=8, length=128),
    preference=PreferenceConfig(
        prompts_per_round=2, rounds=1, samples=4, sampling_rows=8, sampling_lanes=2, lr=1e-3
    ),
    mesh=MeshConfig(fsdp=4, tensor=2),
    checkpoint=CheckpointConfig(every_steps=0, every_minutes=0),
)


def train(folder: pathlib.Path, mesh: str, stop_after: int | None = None, workdir: str = "") -> None:
    """Trains on a mesh, and writes the state after the last step."""
    name = workdir or mesh
    write_state(folder / f"{name}.npz", training.train(folder / name, config_of(mesh), stop_after=stop_after))


def write_state(path: pathlib.Path, state: Any) -> None:
    """Leaf by leaf."""
    leaves = jax.tree.leaves(sharding.on_host(state))
    with replacing(path, "wb") as file:
        np.savez(file, *leaves)


def train_until_signal(folder: pathlib.Path, mesh: str) -> None:
    """Trains in `stopped` until the second process alone gets SIGTERM, in its first step.

    Each writes the status of its end.
    """
    progress = MetricsWriter.progress

    def and_signal(self: MetricsWriter, step: int) -> None:
        progress(self, step)
        if step == 1 and jax.process_index() == 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(MetricsWriter, "progress", and_signal):
        try:
            train(folder, mesh, workdir="stopped")
        except Stopped as stopped:
            (folder.parent / f"stopped-{jax.process_index()}").write_text(str(stopped.code))


def train_adapters(folder: pathlib.Path) -> None:
    """Adapters beside the weights that were trained on 8x1, and the loss of examples that are held out."""
    config = config_of("4x2")
    config = dataclasses.replace(config, steps=2, init_from=os.fspath(folder / "8x1"), lora=Lora(rank=2))
    documents = training.Counting()
    held_out = SFT, [documents[1000 + i] for i in range(40)]
    write_state(folder / "lora.npz", training.train(folder / "lora", config, held_out=held_out))


def train_on_from_damage(folder: pathlib.Path) -> None:
    """Goes on from a copy of 4x2, of whose newest checkpoint the second process cannot read its part."""
    if jax.process_index() == 0:
        shutil.copytree(folder / "4x2", folder / "damaged")
    agreement.agreed(0)
    if jax.process_index() == 1:
        for file in (find_checkpoint(folder / "damaged") / "params").glob("ocdbt.process_1/d/*"):
            file.write_bytes(b"")
    agreement.agreed(0)
    train(folder, "4x2", workdir="damaged")


def evaluate(folder: pathlib.Path) -> None:
    """The command. A process that does the work leaves its number; the work itself is one of the full counts."""

    def compare(*arguments: Any, **options: Any) -> Any:
        with open(folder.parent / "evaluated", "a", encoding="utf-8") as file:
            file.write(f"{jax.process_index()}\n")
        return work(*arguments, **options) if FULL else {}

    work, (model, baseline) = evaluating.compare, (folder / "round" / name for name in ("preference", "sft"))
    line = [f"--ckpt={model}", f"--baseline={baseline}", f"--workdir={folder}/evaluation", "--prompts=2"]
    with (
        mock.patch.object(evaluating, "compare", compare),
        mock.patch.object(comparing, "folder_of", return_value=""),
        mock.patch.object(comparing, "warn_of_strangers"),
        mock.patch.object(sys, "argv", ["evaluate", *line]),
    ):
        evaluating.command()


def decode(folder: pathlib.Path) -> None:
    """Decodes more prompts than there are rows, which are spread over all devices, and writes the answers."""
    mesh = sharding.make_mesh(2, 2, 2)
    plain = chatty.chatty_model()
    params = sharding.from_host(plain.params, sharding.param_shardings(plain.params, mesh))
    model = dataclasses.replace(plain, params=params)
    decoder = Decoder(model, limits=chatty.LIMITS, rows=4, chunk=16, prompt_buckets=(16,), widths=())
    sampling = [
        SamplingParams(max_new_tokens=60, max_branch_tokens=12, temperature=1.0, open_bias=3.5, seed=seed)
        for seed in range(len(chatty.PROMPTS))
    ]
    traces, _ = decoder.decode([chatty.ids(prompt) for prompt in chatty.PROMPTS], sampling)
    write_json(folder / "texts.json", [result(model.tokenizer, trace).annotated for trace in traces])


def tell(folder: pathlib.Path) -> None:
    """Each process writes what the first one computed."""
    first = agreement.from_first(lambda: np.array([jax.process_index(), -1 / 3]), np.zeros(2))
    (folder.parent / f"told-{jax.process_index()}").write_text(str(first.tolist()))


def load_alone(folder: pathlib.Path) -> None:
    """Each process loads the model of the round onto its first device, and decodes with it."""
    model = load(folder / "round" / "preference")
    answer = api.decode(model, "What is the capital of Peru?", max_new_tokens=8, lanes=1, max_branches=0)
    (folder.parent / f"alone-{jax.process_index()}").write_text(answer.annotated)


def do(folder: pathlib.Path, parts: Iterable[str]) -> None:
    """Parts: a mesh, MESH:signal (stopped there), adapters, damage, decode, tell, round, load; and fail, refuse."""
    from pasta_jax.train import run

    for part in parts:
        mesh, _, signalled = part.partition(":")
        if mesh in MESHES:
            (train_until_signal if signalled else train)(folder, mesh)
        elif part == "adapters":
            train_adapters(folder)
        elif part == "damage":
            train_on_from_damage(folder)
        elif part == "decode":
            decode(folder)
        elif part == "tell":
            tell(folder)
        elif part == "load":
            load_alone(folder)
        elif part in ("fail", "refuse"):
            if jax.process_index() == 1:
                if part == "refuse":
                    verbs.refuse("The data is not here.")
                raise RuntimeError("a bug")
            agreement.agreed(1)
        else:
            run(ROUND, os.fspath(folder / "round"))


def writes_below(folder: pathlib.Path) -> list[str]:
    """What Python writes below the folder from now on, a line for each file opened to write, renamed or removed."""
    seen: list[str] = []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str | bytes) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in ("os.rename", "os.remove"):
            return
        path = os.fsdecode(args[0])
        if path.startswith(f"{folder}{os.sep}"):
            seen.append(f"{event} {os.path.relpath(path, folder)}")

    sys.addaudithook(listen)
    return seen


def main(index: int, port: int, folder: pathlib.Path, parts: list[str]) -> None:
    meeting.start(Group(index, 2, f"127.0.0.1:{port}"))
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    verbs.show_log()
    verbs.set_unraisable_hook()
    with meeting.ending_together():
        seen = writes_below(folder)
        do(folder, [part for part in parts if part != "evaluate"])
        (folder.parent / f"writes-{index}.json").write_text(json.dumps(seen))
        if "evaluate" in parts:
            evaluate(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:])
