"""The fifteen likeliest mistakes: each ends in one line that says what is wrong, why, and what to do.

Messages are raised before anything is compiled. That commands end with them and status 2 is in tests/test_verbs.py.
"""

from __future__ import annotations

import json
import pathlib
import re
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import AbstractMesh

from pasta_jax import accelerators, memory, sharding, train, verbs
from pasta_jax.checkpoints.load import check_shapes
from pasta_jax.checkpoints.save import check_config
from pasta_jax.config import Config
from pasta_jax.data.fitting import Account
from pasta_jax.data.records import Problem, read
from pasta_jax.decoding.fits import check_pool, check_prompt
from pasta_jax.endpoint.client import Endpoint
from pasta_jax.evaluate.report import NO_LC
from pasta_jax.interchange import hub
from pasta_jax.overrides import override
from pasta_jax.processes import launchers, meeting
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.training import loop
from tests.helpers.chat_server import chat_server
from tests.test_hub import Hub
from tests.test_tokenizer import trained

Provoke = Callable[[pathlib.Path, pytest.MonkeyPatch], Any]


def machine_with_tpus(root: pathlib.Path, chips: int = 4, held_by: str = "") -> pathlib.Path:
    """A folder with the /sys and /proc of a machine with TPU chips, and perhaps of a process that holds them."""
    for i in range(chips):
        device = root / f"sys/bus/pci/devices/0000:00:0{i}.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "device").write_text("0x0063\n")
    other = root / "sys/bus/pci/devices/0000:00:09.0"  # Google's network card
    other.mkdir(parents=True)
    (other / "vendor").write_text("0x1ae0\n")
    (other / "device").write_text("0x0042\n")
    if held_by:
        (root / "proc/1234/fd").mkdir(parents=True)
        (root / "proc/1234/cmdline").write_text("\0".join(held_by.split()) + "\0")
        (root / "proc/1234/fd/3").symlink_to("/dev/null")
        (root / "proc/1234/fd/7").symlink_to("/dev/vfio/0")
    return root


def said(call: Callable[[], Any]) -> str:
    """What an error says."""
    with pytest.raises((ValueError, RuntimeError)) as fault:
        call()
    return str(fault.value)


def tpu_is_held(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str | None:
    return accelerators.unused_tpu("cpu", root=str(machine_with_tpus(folder, held_by="python train.py")))


def tpu_without_libtpu(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str | None:
    return accelerators.unused_tpu(None, "no libtpu", root=str(machine_with_tpus(folder, chips=1)))


def one_host_of_a_pod(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    with socket.create_server(("", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    group = launchers.Group(0, 4, address, advice=launchers._EVERY_WORKER)
    return said(lambda: meeting.meet(group, timeout_s=0.01))


def jax_without_its_jaxlib(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    (folder / "jax.py").write_text(
        "raise RuntimeError('jaxlib version 0.9.0 is newer than and incompatible with jax version 0.8.1.')"
    )
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, "jax")
    patch.setattr(verbs, "refuse", refused)
    return said(verbs._check_jax)


def refused(message: str) -> None:
    raise ValueError(message)


def mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def gated(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    Hub(patch).answer = "GatedRepoError"
    return said(lambda: hub.download("google/gemma-2-2b-it"))


def other_model(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    saved, expected = ({"layers": {"attn": {"q": np.zeros((layers, 4))}}} for layers in (26, 42))
    return said(lambda: check_shapes(epath.Path("W/checkpoints/9"), saved, expected))


def foreign_workdir(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    metadata: Any = types.SimpleNamespace(config=Config(), step=1200, base=None)
    changed = override(Config(), ["optimizer.lr=1e-5", "seed=3"])
    return said(lambda: check_config(epath.Path("W"), metadata, changed))


def problem_in(folder: pathlib.Path, *records: dict[str, Any]) -> Problem:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    [problem] = [each for each in read(folder / "data.jsonl") if isinstance(each, Problem)]
    return problem


def bad_jsonl(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    return problem_in(folder, {"question": "?", "reply": "!"}).in_file


def bad_annotations(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    account = Account("data.jsonl", records=200)
    for _ in range(118):
        account.add(problem_in(folder, {"prompt": "?", "response": "Oslo.</async> Lima."}))
    return said(lambda: account.check(0.1, "W/invalid.jsonl"))


def no_tags(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    return said(lambda: SentencePieceTokenizer(trained()))


def no_memory_to_train(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nMore.")

    patch.setattr(loop, "train", exhausted)
    patch.setattr(train, "refuse", refused)
    return said(lambda: train.run(override(Config(), ["steps=1"]), str(folder / "W")))


def compiled(pool: int) -> Any:
    """What the checks of sizes ask of compiled programs."""
    limits = types.SimpleNamespace(pool=pool, threads=16)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"k": jax.ShapeDtypeStruct((8, pool, 2**30), np.int8, sharding=first)}
    return types.SimpleNamespace(
        rows=8, limits=limits, config=types.SimpleNamespace(vocab_size=9), batch_shapes=lambda: shapes
    )


def no_memory_to_decode(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(memory, "host_memory", lambda: 2**30)
    return said(lambda: check_pool(compiled(2**20)))


def too_long(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    return said(lambda: check_prompt([1] * 900, compiled(640), has_pool=True))


def no_key(folder: pathlib.Path, patch: pytest.MonkeyPatch) -> str:
    patch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server(lambda body: "never") as server:
        asked = Endpoint(server.url, "tiny")
        return said(lambda: asked.ask([{"role": "user", "content": "Hi"}]))


def setting(*overrides: str) -> Provoke:
    return lambda folder, patch: said(lambda: override(Config(), overrides))


MISTAKES: list[tuple[str, Provoke, str]] = [  # ... is any text
    (
        "1 a TPU that another process holds",
        tpu_is_held,
        "This machine has 4 TPU chips, but jax uses the CPU: pid 1234 (python train.py) holds it. Wait for "
        "it or stop it; JAX_PLATFORMS=cpu uses the CPU.",
    ),
    (
        "1 a TPU without libtpu",
        tpu_without_libtpu,
        "This machine has 1 TPU chip, but jax cannot use it (no libtpu). If libtpu is not installed: pip "
        'install -e ".[tpu]" in a clone. ... JAX_PLATFORMS=cpu uses the CPU.',
    ),
    (
        "2 one host of a pod",
        one_host_of_a_pod,
        "1 of 4 processes came within 0 s; missing: 1, 2, 3. Start the command on every worker of the "
        "slice: launch/tpu_run.sh does so, ...",
    ),
    (
        "3 versions that do not go together",
        jax_without_its_jaxlib,
        "jax cannot be imported (RuntimeError: jaxlib version 0.9.0 is newer ...). In a clone: pip install "
        "-r requirements.txt. python -m pasta_jax.doctor says what else is missing.",
    ),
    (
        "4 an unknown field",
        setting("learning_rate=1e-5"),
        'No config field "learning_rate". Did you mean "optimizer.lr"? Fields: ... (--print_config shows '
        "all).",
    ),
    (
        "5 a wrong type",
        setting("steps=50k"),
        'config.steps must be an int, got "50k".',
    ),
    (
        "6 rows that the devices do not divide",
        lambda folder, patch: said(lambda: sharding.batch_sharding(mesh(1, 8, 1), 30)),
        "data*fsdp=8 does not divide rows B=30. Use 1, 2, 3, 5, 6, 10, 15 or 30, or a multiple of 8 rows.",
    ),
    (
        "6 heads that a mesh does not divide",
        lambda folder, patch: said(lambda: sharding.sharding("DKH", (16, 8, 4), mesh(1, 1, 3))),
        "tensor=3 does not divide ...K=8. Use 1, 2, 4 or 8.",
    ),
    (
        "7 a gated model",
        gated,
        "Access to google/gemma-2-2b-it refused. Accept the licence at "
        "https://huggingface.co/google/gemma-2-2b-it, then set HF_TOKEN to your token "
        "(https://huggingface.co/settings/tokens).",
    ),
    (
        "8 a checkpoint of another model",
        other_model,
        "W/checkpoints/9 is of another model. First difference: layers/attn/q is (26, 4) in the "
        "checkpoint, (42, 4) by the config. Use the configuration that it was trained with, or a new "
        "--workdir.",
    ),
    (
        "9 a workdir of another experiment",
        foreign_workdir,
        "W already has step 1200 of a different config (seed, optimizer.lr). Use a new --workdir; "
        "--config.init_from starts from its weights.",
    ),
    (
        "10 a record of no known layout",
        bad_jsonl,
        "line 1: no known layout (found: question, reply). ...columns=prompt=question...",
    ),
    (
        "11 annotations that cannot be parsed",
        bad_annotations,
        "data.jsonl: 118 of 200 records cannot be used (59.0%): 118 tags. Fix them, or go on with the "
        'others by --config.data.max_unusable=0.59. The first: line 1: in "response", line 1, column 6: '
        "</async> without <async>... All are in W/invalid.jsonl.",
    ),
    (
        "12 a tokenizer without the tags",
        no_tags,
        "This tokenizer has no id for 6 of the 6 tag pieces; it splits '<promise topic=\"' into "
        "...--config.data.extend_tokenizer=true...",
    ),
    (
        "13 no memory to train",
        no_memory_to_train,
        "Out of memory. Lower --config.data.rows or ... python -m pasta_jax.compile --config=FILE says "
        "what fits. JaxRuntimeError: RESOURCE_EXHAUSTED: ...",
    ),
    (
        "13 no memory to decode",
        no_memory_to_decode,
        "The pool does not fit: 8 rows x 1,048,576 tokens x ... GiB are free. Nothing was allocated. Use "
        "fewer rows, or smaller Limits.pool or Limits.threads.",
    ),
    (
        "14 a prompt that is too long",
        too_long,
        "The prompt has 900 tokens, and the pool holds 640 for prompt and answer together. Shorten the "
        "prompt, or set Limits.pool to more than 900.",
    ),
    (
        "15 an endpoint without a key",
        no_key,
        "POST http://.../chat/completions: 401 (Incorrect API key provided: nothing) ($OPENAI_API_KEY is "
        "not set).",
    ),
    (
        "15 no difficulties for the length-controlled win rate",
        lambda folder, patch: NO_LC,
        "LC win rate not computed: df_gamed.csv is missing. Download it from ... and add --df_gamed=FILE.",
    ),
]


@pytest.mark.parametrize(
    ("provoke", "message"), [each[1:] for each in MISTAKES], ids=[each[0] for each in MISTAKES]
)
def test_a_mistake_is_one_line(
    provoke: Provoke, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = provoke(tmp_path, monkeypatch)
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, found), found


def test_all_fifteen_are_here() -> None:
    assert {int(name.split()[0]) for name, _, _ in MISTAKES} == set(range(1, 16))


def test_machines_in_order_are_left_alone(tmp_path: pathlib.Path) -> None:
    assert accelerators.unused_tpu("cpu", root=str(tmp_path)) is None
    assert accelerators.unused_tpu("tpu", root=str(machine_with_tpus(tmp_path))) is None


@pytest.mark.parametrize(("platforms", "is_refused"), [(None, True), ("tpu,cpu", True), ("cpu", False)])
def test_a_command_that_computes_refuses_the_cpu_of_a_tpu_machine(
    platforms: str | None, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was asked for."""
    monkeypatch.setattr(verbs, "tpu_chips", lambda: 4)
    monkeypatch.setattr(verbs, "unused_tpu", lambda backend, why="": f"jax uses {backend}")
    monkeypatch.setattr(verbs, "refuse", refused)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(values={"jax_platforms": platforms}))
    if is_refused:
        assert said(verbs._check_tpu) == "jax uses cpu"
    else:
        verbs._check_tpu()
