"""tokamax's kernel of attention: where it is chosen, that it gives what blocks of queries give, what is compiled.

What needs tokamax (Python 3.12 or later, `pip install -e ".[kernels]"`) is skipped without it.
"""

import dataclasses
import functools
import importlib.metadata
import random
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pasta_jax import sharding
from pasta_jax.arrays import ThreadedTokens
from pasta_jax.compile import hlo
from pasta_jax.compile import programs as ahead
from pasta_jax.compile.cost import cost_of
from pasta_jax.data.packing import Packer
from pasta_jax.model import Transformer, init_params, kernels, scan
from pasta_jax.model.blocks import attend_to_earlier
from pasta_jax.model.config import ModelConfig
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.layout import layout
from pasta_jax.tokens.positions import Positions
from pasta_jax.training.update import Documents
from tests.helpers import optimized, slow
from tests.helpers.models import GEMMA, random_params
from tests.helpers.programs import random_program

WORDS = WordTokenizer(" The rivers two words moons tokens and it's é 東京 the Nile is long a b c d e f")

CONFIG = ModelConfig(
    vocab_size=256, num_layers=2, model_dim=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256
)

# ---------------------------------------------------------------------------------------------------- the choice


def slice_of(kind: str) -> Any:
    """As much of a mesh as the choice looks at."""
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tokamax were there."""
    monkeypatch.setattr(kernels, "optional", lambda *args: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: kernels.TESTED)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "changes", "length", "reason"),
    [
        ("TPU v5 lite", {}, 2048, ""),
        ("TPU v6 lite", {"head_dim": 256, "dtype": "bfloat16", "attn_softcap": 50.0}, 8192, ""),
        ("TPU7x", {}, 128, ""),
        ("TPU v4", {}, 2048, "the kernel is for TPUs from v5 on"),
        ("TPU v9", {}, 2048, "the kernel is for TPUs from v5 on"),
        ("cpu", {}, 2048, "the kernel is for TPUs from v5 on"),
        ("TPU v5", {"head_dim": 80}, 2048, "takes heads of 64 or a multiple of it, and these are of 80"),
        ("TPU v5", {}, 2000, "takes a multiple of 128 tokens up to 8,192, and a row has 2,000"),
        ("TPU v5", {}, 16_384, "takes a multiple of 128 tokens up to 8,192, and a row has 16,384"),
    ],
)
def test_the_kernel_is_chosen_where_it_takes_the_case(
    kind: str, changes: dict[str, Any], length: int, reason: str
) -> None:
    config, mesh = dataclasses.replace(CONFIG, **changes), slice_of(kind)
    found, words = kernels.why_not(config, length, mesh), kernels.words_for(config, length, mesh)
    assert (reason in found) if reason else not found
    assert (kernels.attention_of(config, length, mesh) is attend_to_earlier) == bool(reason)
    assert words == (
        f"Attention: by blocks of queries ({found})." if reason else "Attention: by tokamax's kernel."
    )


def test_it_is_not_chosen_without_what_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for devices of which nothing is known, nor looked for where it would not be used."""
    mesh = slice_of("TPU v5 lite")
    abstract = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    monkeypatch.setattr(kernels, "SPLASH", "no_such_tokamax.kernel")
    assert kernels.why_not(CONFIG, 256, mesh) == (
        "the kernel needs no_such_tokamax: pip install no_such_tokamax, or in a clone: "
        'pip install -e ".[kernels]"'
    )
    monkeypatch.setattr(kernels, "optional", lambda *args: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    expected = f"the kernel is that of tokamax {kernels.TESTED}, and 9.9 is installed"
    assert kernels.why_not(CONFIG, 256, mesh) == expected
    monkeypatch.setattr(kernels, "optional", lambda *args: pytest.fail("it was looked for"))
    for other in (None, sharding.make_mesh(), abstract):
        assert kernels.attention_of(CONFIG, 256, other) is attend_to_earlier


# ---------------------------------------------------------------------------------------------------- the values


@pytest.fixture
def tokamax() -> None:
    if kernels.why_not(CONFIG, 256, slice_of("TPU v5 lite")):
        pytest.skip('tokamax is not installed: pip install -e ".[kernels]" in Python 3.12 or later')


def packed(seed: int, rows: int, length: int) -> ThreadedTokens:
    """Random programs, with padding at the end of each row; of the last row more than half."""
    rng, packer = random.Random(seed), Packer(rows, length - 60)
    failed = 0
    while failed < 20:
        document = layout(WORDS, [2], random_program(rng, max_depth=3), Positions(), threads=16)
        failed += not packer.add(document)
    fields = packer.pack().fields()
    fields = {name: np.pad(x, ((0, 0), (0, 60)) + ((0, 0),) * (x.ndim - 2)) for name, x in fields.items()}
    fields["doc"][-1, length // 3 :] = 0
    return ThreadedTokens(**{name: jnp.asarray(x) for name, x in fields.items()})


def documents(tokens: ThreadedTokens) -> Documents:
    return Documents(tokens.doc, tokens.segment, tokens.order, tokens.sees)


def both(attend: Any, q: Any, k: Any, v: Any, sees: Any, **options: Any) -> list[Any]:
    """What the queries get, and the gradients of a sum of it, as [output, of q, of k, of v]."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), q.dtype)

    @jax.jit
    def run(q: Any, k: Any, v: Any, sees: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, sees, **options), q, k, v)
        return out, *pull(weights)

    return [np.asarray(x, np.float32) for x in run(q, k, v, sees)]


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize(
    ("length", "heads", "softcap", "dtype"),
    [(256, (4, 2), 0.0, "float32"), (384, (4, 1), 3.0, "float32"), slow(384, (2, 2), 0.0, "bfloat16")],
)
def test_the_kernel_gives_what_blocks_of_queries_give(
    length: int,
    heads: tuple[int, int],
    softcap: float,
    dtype: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On random programs; two blocks of keys and three go different ways in the kernel's backward pass."""
    monkeypatch.setattr(kernels, "BLOCKS", (128,))
    rng, (N, K) = np.random.default_rng(seed), heads
    shapes = (2, length, N, 64), (2, K, length, 64), (2, K, length, 64)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    sees = documents(packed(seed, 2, length))
    is_alone = np.logical_not(np.asarray(sees.block(0, length, length)).any(-1, keepdims=True))[..., 0]
    assert is_alone[:, -128:].all(0).any() and is_alone[-1, -128:].all()  # a whole block of padding
    options = dict(query_scale=20.0, softcap=softcap)
    kernel = functools.partial(kernels.attend_by_kernel, None, interpret=True)
    expected = both(attend_to_earlier, q, k, v, sees, **options)
    found = both(kernel, q, k, v, sees, **options)
    assert not found[0][is_alone].any() and not found[1][is_alone].any()
    tolerance = 1e-5 if dtype == "float32" else 0.02
    for name, x, y in zip(("out", "q", "k", "v"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), err_msg=name)


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize("remat", ["none", slow("dots")])
def test_a_pass_by_the_kernel_on_a_mesh_is_that_by_blocks(
    remat: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows over four devices and heads over two; local layers too; fewer kv heads than devices."""
    monkeypatch.setattr(scan, "UNROLLED", 0)
    config = dataclasses.replace(
        GEMMA, vocab_size=256, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64
    )
    mesh = sharding.make_mesh(2, 2, 2)
    params = random_params(config, np.random.default_rng(seed))
    fields = jax.device_put(packed(seed, 4, 128).fields(), sharding.batch_sharding(mesh))

    def loss(params: Any, fields: Any) -> Any:
        tokens = ThreadedTokens(**fields)
        position, sees = tokens.position, documents(tokens)
        hidden = scan.hidden_states(
            Transformer(config), params, tokens.token % 256, position, sees, remat, mesh
        )
        return (jnp.where(tokens.doc[..., None] > 0, hidden, 0) ** 2).sum(), hidden

    def run() -> Any:
        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, fields)
        return hidden, *jax.tree.leaves(gradient)

    expected = run()
    kernel = functools.partial(kernels.attend_by_kernel, mesh, interpret=True)
    monkeypatch.setattr(scan, "attention_of", lambda *args: kernel)
    for x, y in zip(run(), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize("remat", scan.POLICIES)
def test_no_loop_over_layers_keeps_the_matrix(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the copies of it in blocks."""
    monkeypatch.setattr(scan, "UNROLLED", 0)
    monkeypatch.setattr(scan, "attention_of", lambda *_: functools.partial(kernels.attend_by_kernel, None))
    L, params = 256, jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    line = jnp.arange(L, dtype=jnp.int32)[None]
    sees = Documents(line + 1, line, line, jnp.zeros((1, L, 1), jnp.uint32))

    def loss(params: Any) -> Any:
        return scan.hidden_states(Transformer(CONFIG), params, line, line, sees, remat).sum()

    outside = [v.aval for eqn in jax.make_jaxpr(jax.grad(loss))(params).eqns for v in eqn.outvars]
    assert not [aval for aval in outside if aval.dtype.itemsize == 1 and aval.size >= L * L]


# ------------------------------------------------------------------------------------------------ ahead of time


@pytest.mark.tpu
@pytest.mark.usefixtures("tokamax")
def test_a_layer_compiles_for_a_slice_with_the_kernel_in_it() -> None:
    """Forward and backward, on a mesh; what it costs is in the report."""
    if not sys.platform.startswith("linux"):
        pytest.skip("libtpu is for Linux")
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(2, 2, 2, devices=ahead.topology_devices("v5e:2x4"))
    config = dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=1, num_kv_heads=1, attn_softcap=50.0)
    L = 512
    shape = jax.ShapeDtypeStruct((4, L), jnp.int32, sharding=sharding.batch_sharding(mesh))
    words = jax.ShapeDtypeStruct((4, L, 2), jnp.uint32, sharding=sharding.batch_sharding(mesh))
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = sharding.abstract(params, sharding.param_shardings(params, mesh))

    def loss(params: Any, token: Any, position: Any, sees: Any) -> Any:
        model = Transformer(config)
        return scan.hidden_states(model, params, token, position, sees, "dots", mesh).astype("float32").sum()

    sees = Documents(shape, shape, shape, words)
    with optimized():
        compiled = jax.jit(jax.grad(loss)).lower(params, shape, shape, sees).compile()
    program = hlo.read(compiled)
    calls = [i for body in program.reached.values() for i in body.values() if i.op == "custom-call"]
    calls = [i for i in calls if "tpu_custom_call" in i.text]
    assert sorted(i.name[:10] for i in calls) == ["splash_mha", "splash_mha"]
    assert not ahead.host_calls(compiled.as_text() or "")
    forward, backward = kernels._costs(L, config.num_heads // 2, config.head_dim, kernels.BLOCKS[-1], 2)
    others = {
        name: {key: i for key, i in body.items() if i not in calls}
        for name, body in program.computations.items()
    }
    without = dataclasses.replace(program, computations=others)
    assert cost_of(program).flops - cost_of(without).flops == forward.flops + backward.flops
