"""Programs kept whole: the next start runs them without tracing, and never one made from something else."""

import hashlib
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pasta_jax import kept, sharding
from pasta_jax.config import Config
from pasta_jax.decoding.compiled import Compiled, ProgramKey
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.testing import WordTokenizer
from tests.helpers import full

pytestmark = pytest.mark.slow

WORDS = WordTokenizer("the river", vocab_size=320)
CONFIG = Config(
    model=ModelConfig(
        vocab_size=320, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8
    )
)
SIZES: dict[str, Any] = dict(
    limits=Limits(lanes=2, threads=4, pool=62), rows=3, prompt_buckets=(), pool_buckets=(), widths=()
)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Where jax and decoders keep their programs, as a command would have it."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: jax.config.values[name] for name in settings}
    monkeypatch.setattr(kept, "programs", str(tmp_path))
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def new_decoder(*, spread: bool = False) -> Decoder:
    params = init_params(CONFIG.model, jax.random.key(0))
    if spread:
        mesh = sharding.make_mesh(2, 2, 2)
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
    return Decoder(Model(params, CONFIG.model, WORDS, CONFIG.data.positions), chunk=8, **SIZES)


def answers(decoder: Decoder) -> list[tuple[list[int], np.ndarray]]:
    prompts = [WORDS.encode_prompt(text) for text in ("Iron", "Peru", "Ohio")]
    sampling = SamplingParams(max_new_tokens=20, temperature=1.0, open_bias=4.0)
    traces, _ = decoder.decode(prompts, [sampling] * 3)
    return [(trace.tokens.token.tolist(), trace.logprob) for trace in traces]


def same(some: list[tuple[list[int], np.ndarray]], others: list[tuple[list[int], np.ndarray]]) -> bool:
    return all(a == b and np.array_equal(p, q) for (a, p), (b, q) in zip(some, others, strict=True))


@pytest.mark.parametrize("spread", [full(False), True])
def test_the_next_start_traces_no_program(
    spread: bool, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answers(new_decoder(spread=spread))
    files = {file.name: file.read_bytes() for file in folder.glob("*-program")}
    assert len(files) >= 3

    lower, lowered = Compiled.lower, list[ProgramKey]()

    def record(self: Compiled, program: ProgramKey, **options: Any) -> Any:
        lowered.append(program)
        return lower(self, program, **options)

    monkeypatch.setattr(Compiled, "lower", record)
    assert same(answers(new_decoder(spread=spread)), first) and lowered == []

    # One that a full disk cut off is made anew. One that the backend cannot read is left to jax's cache.
    cut, unreadable = list(files)[:2]
    (folder / cut).write_bytes(files[cut][:-1])
    (folder / unreadable).write_bytes(hashlib.sha256(b"").digest())
    assert same(answers(new_decoder(spread=spread)), first) and len(lowered) == 2
    sizes = {file.name: file.stat().st_size for file in folder.glob("*-program")}
    assert sizes.keys() == files.keys() and [name for name in sizes if not sizes[name]] == [unreadable]
    lowered.clear()
    assert same(answers(new_decoder(spread=spread)), first) and len(lowered) == 1, "what was made anew runs"

    if not spread:
        lowered.clear()
        new_decoder().warm_up()
        rest = len(new_decoder().compiled.programs) - len(files)
        assert len(lowered) == rest + 1, "the warm up loads what is kept"


def test_a_program_is_named_by_all_that_it_is_made_from(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()[:1]
    decoder, program = new_decoder(), ProgramKey("release")

    def file() -> pathlib.Path | None:
        return decoder.compiled._file_of(program)

    files = {file(), new_decoder().compiled._file_of(program)}
    assert len(files) == 1 and None not in files, "the same every time"
    with jax.default_matmul_precision("float32"):
        files.add(file())
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        files.add(file())
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_sources", lambda: "another version of the package")
        files.add(file())
    files.add(kept.file_of(devices, "something else"))
    files.add(kept.file_of(jax.devices()[1:2], "something else"))
    assert len(files) == 6
    monkeypatch.setattr(kept, "programs", None)
    assert file() is None, "only commands keep them"


def test_entries_of_jax_that_were_cut_off_are_removed(tmp_path: pathlib.Path) -> None:
    """Once: those that were there at an earlier check are not read again."""
    zstandard = pytest.importorskip("zstandard")
    text = np.random.default_rng(0).bytes(300_000) + bytes(300_000)  # blocks of all kinds
    whole = {
        "zlib": zlib.compress(text),
        "zstd": zstandard.ZstdCompressor().compress(text),
        "checksum": zstandard.ZstdCompressor(write_checksum=True).compress(text[:1000]),
        "streamed": zstandard.ZstdCompressor(write_content_size=False).compress(text),
    }
    for name, data in whole.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
        for i, end in enumerate((0, 3, 5, 200, len(data) // 2, len(data) - 1)):
            (tmp_path / f"{name}{i}-cache").write_bytes(data[:end])
    (tmp_path / "other.txt").write_bytes(b"")
    kept.remove_cut(str(tmp_path))
    left = {f"{name}-cache" for name in whole} | {"other.txt", kept.CHECKED}
    assert {file.name for file in tmp_path.iterdir()} == left
    old = tmp_path / "old-cache"
    old.write_bytes(b"")
    os.utime(old, (1e9, 1e9))
    (tmp_path / "new-cache").write_bytes(b"")
    kept.remove_cut(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == left | {"old-cache"}
