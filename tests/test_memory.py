"""Does it fit: the arithmetic, where the numbers come from, and what importing really takes."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest

from pasta_jax import Decoder, Limits, SamplingParams, decode, memory
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.interchange import reading, tensors
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.placing import check_fits, target_shapes
from pasta_jax.model import ModelConfig
from pasta_jax.model.presets import preset
from pasta_jax.model.weights import hf_tensors
from pasta_jax.sharding import make_mesh
from tests.helpers.answers import PROMPT, model
from tests.helpers.hf_folders import CONFIGS, write_hf_folder

pytestmark = pytest.mark.slow

GIB = 2**30


def machine(root: pathlib.Path, **files: str) -> str:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(root)


def test_the_machine(tmp_path: pathlib.Path) -> None:
    assert memory.host_memory(str(tmp_path)) is None is memory.host_size(str(tmp_path))
    root = machine(tmp_path, proc__meminfo="MemTotal: 99 kB\nMemAvailable:   2048 kB\n")
    assert memory.host_memory(root) == 2048 * 1024
    assert memory.host_size(root) == 99 * 1024
    machine(tmp_path, proc__self__cgroup="0::/job/one\n")
    assert memory.host_memory(root) == 2048 * 1024
    (tmp_path / "sys/fs/cgroup/job/one").mkdir(parents=True)
    one = tmp_path / "sys/fs/cgroup/job/one"
    (one / "memory.max").write_text("max\n")
    (one / "memory.current").write_text("500\n")
    assert memory.host_memory(root) == 2048 * 1024, "max is no limit"
    (one / "memory.max").write_text("1500\n")
    assert memory.host_memory(root) == 1000
    assert memory.host_size(root) == 1500
    (one / "memory.stat").write_text("anon 4\ninactive_file 300\n")
    assert memory.host_memory(root) == 1300, "files kept in memory are given back"
    (one.parent / "memory.max").write_text("700\n")
    (one.parent / "memory.current").write_text("600\n")
    assert memory.host_memory(root) == 100, "a limit around it holds too"


def test_control_groups_version_1(tmp_path: pathlib.Path) -> None:
    root = machine(tmp_path, proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/x\n")
    group = tmp_path / "sys/fs/cgroup/memory"  # in a container its own group is the root
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (group / "memory.usage_in_bytes").write_text("10\n")
    assert memory.host_memory(root) is None
    (group / "memory.limit_in_bytes").write_text("1000\n")
    assert memory.host_memory(root) == 990


def test_this_machine() -> None:
    free = memory.host_memory()
    assert sys.platform != "linux" or (free is not None and 0 < free < 2**50)


def test_seven_billion_parameters_and_the_arithmetic() -> None:
    config = preset("gemma-7b").config
    shapes = target_shapes(config)
    check_fits(shapes, staging=0, what="gemma-7b", host_free=17 * GIB)
    with pytest.raises(InterchangeError) as error:
        check_fits(shapes, staging=GIB, what="gemma-7b", host_free=8 * GIB)
    assert str(error.value) == (
        "gemma-7b does not fit: 8,537,680,896 parameters x 2 (bfloat16) bytes = 15.9 GiB over 1 device; 16.9 "
        "GiB are needed in this machine's memory, what reading takes included, and 8.0 GiB are free. Nothing was "
        'read. Try more devices (a mesh with fsdp), int8 weights to decode (quantize="int8"), or a smaller model.'
    )
    wide = target_shapes(dataclasses.replace(config, dtype="float32"))
    with pytest.raises(InterchangeError, match=r"31.8 GiB .* Try dtype bfloat16, more devices"):
        check_fits(wide, staging=0, what="gemma-7b", host_free=8 * GIB)


def test_each_device_counts_what_lies_on_it() -> None:
    shapes = target_shapes(preset("gemma-2b").config, make_mesh(1, 8, 1))
    by_device = memory.bytes_by_device(shapes.values())
    assert len(by_device) == 8 and len(set(by_device.values())) == 1
    total = sum(leaf.size * 2 for leaf in shapes.values())
    assert sum(by_device.values()) == pytest.approx(total, rel=0.01)


def test_an_accelerators_own_memory() -> None:
    stats = {"bytes_limit": 16 * GIB, "bytes_in_use": 4 * GIB}

    class Chip:
        platform = "tpu"

        def memory_stats(self) -> dict[str, int]:
            return stats

    device = Chip()
    leaf = types.SimpleNamespace(
        shape=(7, GIB),
        dtype=jax.numpy.dtype("bfloat16"),
        sharding=types.SimpleNamespace(
            shard_shape=lambda shape: shape, addressable_devices={device}, device_set={device}
        ),
    )
    with pytest.raises(InterchangeError, match=r"14.0 GiB are needed on .*, and 12.0 GiB are free"):
        check_fits({"w": leaf}, staging=0, what="a model", host_free=64 * GIB)
    leaf.shape = (5, GIB)
    check_fits({"w": leaf}, staging=GIB, what="a model", host_free=2 * GIB)


def test_what_does_not_fit_is_refused_before_a_tensor_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf_folder(tmp_path / "hf", CONFIGS["gemma"])
    folder = reading.open_folder(tmp_path / "hf")
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    monkeypatch.setattr(tensors, "rows", lambda stored: pytest.fail("a tensor was read"))
    with pytest.raises(InterchangeError, match=f"{tmp_path}/hf does not fit: .* Nothing was read"):
        reading.read_params(folder, reading.model_config(folder))


def test_a_decode_that_does_not_fit_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool, rows, threads, a prompt; said to each caller in the words that it has."""
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * GIB)
    monkeypatch.setattr(Compiled, "_run", lambda *args: pytest.fail("a program was run"))
    per_token = 2 * 8 * 4 + 4 * (8 + 2)  # keys and values; fields of an entry, with two words of `sees`
    need = memory.gib(2**30 * per_token)
    message = (
        f"The pool does not fit: 1 row x 1,073,741,824 tokens x {per_token} bytes with 16 threads = {need} GiB; "
        f"{need} GiB are needed in this machine's memory, and 8.0 GiB are free. Nothing was allocated. Lower "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(model(), PROMPT, max_new_tokens=2**31 - 1)
    with pytest.raises(
        ValueError, match=r"does not fit: 8 rows x 1,024 tokens .* with 10,000,001 threads = .*branches"
    ):
        decode(model(), [PROMPT] * 5, cache_len=1024, max_branches=10**7)
    with pytest.raises(
        ValueError, match=r"does not fit: 4 rows x 100,000,000 tokens .* smaller Limits.pool or Limits"
    ):
        Decoder(model(), limits=Limits(pool=10**8), rows=4)
    with pytest.raises(ValueError, match=r"its 250,002 tokens .* 2 heads x .* = .* or lower cache_len\.$"):
        decode(model(), "word " * 50_000)
    # Eight together would take 0.14 GiB; they are fed one by one where that is not free.
    monkeypatch.setattr(memory, "host_memory", lambda: 10**8)
    Decoder(model(), limits=Limits(pool=2048), rows=8).session.prepare([5] * 2000, SamplingParams())


def test_where_memory_is_unknown_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    Decoder(model(), limits=Limits(pool=2**30), rows=8)

    class Chip:
        platform = "gpu"

        def memory_stats(self) -> None:
            return None

    place = types.SimpleNamespace(shard_shape=lambda shape: shape, addressable_devices={Chip()})
    leaf = types.SimpleNamespace(shape=(2**50,), dtype=np.dtype("int8"), sharding=place)
    monkeypatch.setattr(memory, "host_memory", lambda: 10)
    assert memory.shortage([leaf]) is None


MEASURE = """
import sys, jax
from pasta_jax.interchange.importing import open_published, write_workdir
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
jax.numpy.zeros(3).block_until_ready()
published = open_published("folder", sys.argv[1])
before = peak()
params = published.read(None)
write_workdir(published, params, sys.argv[2])
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_importing_takes_little_more_than_the_model(tmp_path: pathlib.Path) -> None:
    """At most 1.2 times the model, its checkpoint included. Half of this one is its embedding, the hardest case."""
    sizes = dict(model_dim=1024, num_heads=8, num_kv_heads=4, head_dim=128, mlp_dim=4096)
    config = ModelConfig(vocab_size=100_000, num_layers=6, **sizes)  # type: ignore[arg-type]
    bits = np.random.default_rng(0)  # as weights, they do not compress, so that compressing shows

    def weights(shape: tuple[int, ...]) -> np.ndarray:
        return bits.integers(2**16, size=shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    arrays = {tensor.name: weights(tensor.shape) for tensor in hf_tensors(config)}
    write_hf_folder(tmp_path / "hf", config, tensors=arrays)
    line = [sys.executable, "-c", MEASURE, str(tmp_path / "hf"), str(tmp_path / "W")]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, timeout=300, cwd=pathlib.Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    taken, model = map(int, done.stdout.split())
    print(f"{taken / model:.2f} times {model / 2**20:.0f} MiB")
    assert model > 300 * 2**20 and taken < 1.2 * model


def test_training_asks_for_large_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is replaced by one of the same command line; that one, or one with options, stays."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: calls.append([path, *words]))
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.sys, "orig_argv", ["python", "-m", "pasta_jax.train", "--workdir=W"])
    monkeypatch.setattr(memory.sys, "executable", "/bin/python3")
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back
    monkeypatch.delenv("GLIBC_TUNABLES")
    memory.with_large_pages()
    memory.with_large_pages()
    assert calls == [["/bin/python3", "/bin/python3", "-m", "pasta_jax.train", "--workdir=W"]]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_returning_free_memory_is_only_a_wish(monkeypatch):
    """glibc does it; another C library has no such function."""
    memory.return_freed()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.return_freed()
