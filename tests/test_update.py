"""One update in all its ways: in parts, with layers computed twice, with masters in float32; the same gradient."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import sharding
from pasta_jax.arrays import NO_TARGET, PairedTokens, ThreadedTokens
from pasta_jax.config import Config, ConfigError, DataConfig, OptimizerConfig, Remat
from pasta_jax.model import Lora, ModelConfig, Transformer, init_params, param_shapes
from pasta_jax.model.blocks import Matrix
from pasta_jax.model.layers import Layer
from pasta_jax.model.presets import preset
from pasta_jax.model.rotary import rotary_of
from pasta_jax.model.scan import rematerialized
from pasta_jax.preference.pairs import Pair, pair_batches
from pasta_jax.training import remat as remat_module
from pasta_jax.training import update as update_module
from pasta_jax.training.logprobs import reference_pass
from pasta_jax.training.loop import sft
from pasta_jax.training.losses import preference_loss
from pasta_jax.training.microbatches import rows_sharding
from pasta_jax.training.remat import kept_by_layer
from pasta_jax.training.update import Update, make_update
from tests.helpers import full, optimized

ROWS, LENGTH = 8, 12
CONFIG = Config(
    steps=4,
    model=ModelConfig(
        vocab_size=24, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
    ),
    data=DataConfig(rows=ROWS, length=LENGTH),
    # Without clipping, and with no mean before it, Adam's first mean is a tenth of the gradient.
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, clip_norm=0.0, b1=0.9, eps=1e-3),
)
ONE = jax.devices()[:1]


def documents(rng: np.random.Generator, lengths: list[int], pair: list[int]) -> list[PairedTokens]:
    made = []
    for length, sign in zip(lengths, pair, strict=True):
        line = np.arange(length, dtype=np.int32)
        token = rng.integers(3, 20, length, np.int32)
        made.append(
            PairedTokens(
                token=token,
                position=line,
                doc=np.ones_like(line),
                segment=np.zeros_like(line),
                order=line,
                sees=np.zeros((length, 1), np.uint32),
                thread=np.zeros_like(line),
                target=np.append(token[1:], NO_TARGET).astype(np.int32),
                pair=np.full(length, sign, np.int32),
                reference=-3 * rng.random(length, np.float32),
            )
        )
    return made


@functools.cache
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH // 2, (20, 2)).tolist()
    return [Pair(*documents(rng, both, [1, -1])) for both in lengths]


@functools.cache
def paired_batch(parts: int) -> PairedTokens:
    batch, _ = next(pair_batches(pairs(), 0, ROWS, LENGTH, parts=parts))
    return batch


@functools.cache
def random_weights() -> Any:
    update = make_update(CONFIG, sharding.make_mesh(1, 1, 1, ONE), sft)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), update.shapes.params)


def updated(
    config: Config, loss: str, fields: dict[str, Any], mesh: Any = None
) -> tuple[Any, dict[str, Any], Update]:
    """Gradients, measurements, the update."""
    loss_fn: Any = functools.partial(preference_loss, kind="ipo") if loss == "preference" else sft
    record = PairedTokens if loss == "preference" else ThreadedTokens
    names = record.__dataclass_fields__
    mesh = mesh or sharding.make_mesh(1, 1, 1, ONE)
    update = make_update(config, mesh, loss_fn, record)
    params = random_weights()
    frozen = jax.device_put(params, update.base_shardings) if config.lora.rank else {}
    trained = update.new_adapters(frozen) if frozen else jax.device_put(params, update.shardings.params)
    state = update.start(trained)
    placed = jax.device_put({name: fields[name] for name in names}, update.batch_sharding)
    state, measured = update.step(state, frozen, placed)
    gradients = jax.tree.map(lambda mean: mean / (1 - config.optimizer.b1), state.opt_state[0].mu)
    return gradients, {name: float(value) for name, value in measured.items()}, update


def assert_close(found: Any, expected: Any, rtol: float) -> None:
    """By the largest entry of each leaf."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        most = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * most, err_msg=jax.tree_util.keystr(path))


@functools.cache
def whole(loss: str, parts: int) -> Any:
    """In one piece, of the batch that was packed for so many parts."""
    batch = paired_batch(parts)
    fields = batch.fields()
    if loss == "preference":  # numbered through, as if it had been packed in one
        pair = fields["pair"].reshape(parts, -1)
        before = np.concatenate([[0], np.cumsum(pair.max(1))[:-1]])[:, None]
        fields = fields | {"pair": (pair + np.sign(pair) * before).reshape(ROWS, LENGTH)}
    return updated(CONFIG, loss, fields)


@pytest.mark.parametrize("loss", [full("sft"), "preference"])
@optimized()  # jaxlib 0.12 rounds a little more coarsely with less care
def test_the_gradient_of_parts_is_that_of_the_whole(loss: str) -> None:
    """Though parts have different numbers of targets and of pairs; and with the rows of a part on devices."""
    fields = paired_batch(2).fields()
    counts = (fields["target"] != NO_TARGET).reshape(2, -1).sum(1), fields["pair"].reshape(2, -1).max(1)
    assert counts[0][0] != counts[0][1]
    expected, measured, _ = whole(loss, 2)
    config = dataclasses.replace(CONFIG, microbatches=2)
    found, also, _ = updated(config, loss, fields)
    assert_close(found, expected, 1e-6)
    assert also == pytest.approx(measured, rel=1e-5)
    if loss == "preference":
        assert measured["pairs"] == counts[1].sum()
        mesh = sharding.make_mesh(2, 2, 2)
        spread, also, update = updated(config, loss, fields, mesh)
        assert_close(spread, expected, 1e-5)
        assert also == pytest.approx(measured, rel=1e-5)
        assert update.batch_sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)


def test_pairs_stay_within_a_part() -> None:
    seen = 0
    for batch, after in pair_batches(pairs(), 0, ROWS, LENGTH, seed=2, parts=4):
        for part in batch.pair.reshape(4, -1):
            most = part.max()
            assert most >= 1
            assert {*np.unique(part)} - {0} == {*range(1, most + 1), *range(-most, 0)}
            seen += most
        assert after == seen
        if after >= len(pairs()):
            break
    with pytest.raises(ConfigError, match=r"does not fit into 1 rows of 6, one of 8 microbatches\."):
        next(pair_batches(pairs(), 0, ROWS, 6, parts=8))


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2)])
def test_each_device_computes_its_own_rows_and_its_own_ids(fsdp: int, tensor: int) -> None:
    """All by itself XLA would compute every layer for all rows on each, and exchange whole hidden states for it."""
    mesh = sharding.make_mesh(1, fsdp, tensor)
    model = dataclasses.replace(CONFIG.model, mlp_dim=88, num_layers=2)
    update = make_update(dataclasses.replace(CONFIG, model=model), mesh, sft)
    fields = sharding.abstract(paired_batch(2).fields(), update.batch_sharding)
    fields = {name: fields[name] for name in ThreadedTokens.__dataclass_fields__}
    state = sharding.abstract(update.shapes, update.shardings)
    text = update.step.lower(state, {}, fields).compile().as_text()
    rows, mlp, ids = ROWS // fsdp, 88 // tensor, 24 // 8
    assert f"f32[{rows * LENGTH},{mlp}]" in text, "the MLP of its own rows"
    assert f"f32[{ROWS * LENGTH},{mlp}]" not in text
    assert f"f32[{ROWS},{LENGTH},{ids}]" in text, "logits of its own ids"
    assert not re.search(rf"f32\[\d+,{LENGTH},24\]", text)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "everything"])
def test_remat_changes_nothing(remat: Remat) -> None:
    fields = paired_batch(2).fields()
    expected, measured, plain = whole("sft", 2)
    assert plain.remat.remat == "none"
    found, also, update = updated(dataclasses.replace(CONFIG, remat=remat), "sft", fields)
    assert update.remat.remat == remat
    assert_close(found, expected, 1e-5)
    assert also == pytest.approx(measured, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-2-2b", "llama-3.1-8b", "qwen3-8b"])
def test_what_the_forward_pass_keeps_of_a_layer(name: str) -> None:
    """The estimate is that of the traced program, to which XLA may add nothing; without remat it merges copies."""
    c, L = preset(name).config, 512
    model = dataclasses.replace(c, num_layers=1, layer_kinds=("global",))
    weights = param_shapes(model)["layer_0"]
    x = jax.ShapeDtypeStruct((1, L, c.model_dim), c.dtype)
    matrix = Matrix(jax.ShapeDtypeStruct((1, L, L), bool))

    def backward(remat: str, weights: Any, x: Any, matrix: Any) -> Any:
        rotary = rotary_of(model, jnp.zeros((1, L), jnp.int32))["global"]

        def run(x: Any, weights: Any) -> Any:
            return Layer(model, Lora()).apply({"params": weights}, x, rotary, matrix, None, None)[0]

        return jax.vjp(rematerialized(run, remat), x, weights)[1]

    for remat, most in (("none", 1.3), ("dots", 1.05), ("everything", 1.05)):
        leaves = jax.tree.leaves(jax.eval_shape(functools.partial(backward, remat), weights, x, matrix))
        floats = [leaf for leaf in leaves if L in leaf.shape and jnp.issubdtype(leaf.dtype, jnp.floating)]
        kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in floats)
        angles = 2 * 4 * L * c.head_dim // 2  # not of a layer: all have them
        assert 0.8 < (kept - angles) / (L * kept_by_layer(c, remat)) <= most, remat


@pytest.mark.slow
def test_remat_is_chosen_by_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(capacity: int | None, **changes: Any) -> Any:
        monkeypatch.setattr(remat_module, "device_memory", lambda mesh: capacity)
        mesh = sharding.make_mesh(1, 1, 1, ONE)
        config = dataclasses.replace(CONFIG, model=model, data=DataConfig(rows=1, length=2048), **changes)
        return make_update(config, mesh, sft).remat

    model = dataclasses.replace(CONFIG.model, num_layers=8, model_dim=256, mlp_dim=1024)
    needs = {name: chosen(None, remat=name).needs for name in ("none", "dots", "everything")}
    assert needs["none"].activations > 2 * needs["dots"].activations > 4 * needs["everything"].activations
    assert chosen(None).remat == "none"
    for name in needs:
        enough = int(needs[name].total / 0.9) + 1
        assert chosen(enough).remat == name, "the first that fits"
    tight = chosen(2**27)
    assert tight.remat == "everything", "what there is, if nothing fits"
    assert str(tight) == (
        "Remat: everything, chosen by memory. An update takes about 0.22 GiB of a device's 0.12 GiB: it may not "
        "fit, and python -m pasta_jax.compile finds what does."
    )
    assert chosen(1000, remat="none").remat == "none", "what the configuration says, it gets"
    assert "chosen" not in str(chosen(1000, remat="none"))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [5, 4, 1])
def test_logits_of_a_few_tokens_at_a_time_change_nothing(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve tokens a row: 5, 5 and 2; three times 4; one by one."""
    fields = paired_batch(2).fields()
    expected, measured, _ = whole("sft", 2)
    monkeypatch.setattr(update_module, "LOGITS", tokens * CONFIG.model.vocab_size)
    found, also, _ = updated(CONFIG, "sft", fields)
    assert_close(found, expected, 1e-5)
    assert also == pytest.approx(measured, rel=1e-5)
    if tokens == 5:
        spread, _, _ = updated(CONFIG, "sft", fields, sharding.make_mesh(2, 2, 2))
        assert_close(spread, expected, 1e-5)


@pytest.mark.slow
def test_gradients_of_tokens_taken_apart_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four sums in bfloat16 would be off by a hundredth of the whole (measured: 0.9 %, and 0.2 % so)."""
    L, config = 256, dataclasses.replace(CONFIG.model, dtype="bfloat16", tie_embeddings=False)
    document = documents(np.random.default_rng(3), [L], [1])[0]
    batch = ThreadedTokens(**{n: getattr(document, n)[None] for n in ThreadedTokens.__dataclass_fields__})
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))

    def gradient(tokens: int) -> np.ndarray:
        monkeypatch.setattr(update_module, "LOGITS", tokens * config.vocab_size)
        model = Transformer(config)
        loss = jax.grad(lambda p: update_module.scores_of(model, p, batch).logprob.sum())
        return np.asarray(jax.jit(loss)(params)["head"], np.float32)

    whole_head = gradient(L)
    off = np.linalg.norm(gradient(4) - whole_head) / np.linalg.norm(whole_head)
    assert off < 0.005, off


def test_masters_in_float32_take_steps_that_bfloat16_cannot() -> None:
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dtype="bfloat16"),
        optimizer=dataclasses.replace(CONFIG.optimizer, lr=1e-5),
        param_dtype="float32",
        microbatches=2,
    )
    fields = paired_batch(2).fields()
    expected, measured, _ = whole("sft", 2)
    found, also, update = updated(config, "sft", fields)
    assert {x.dtype for x in jax.tree.leaves(update.shapes.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert also["loss"] == pytest.approx(measured["loss"], rel=0.02)
    assert also["loss"] != measured["loss"]
    assert_close(found, expected, 0.1)


@pytest.mark.slow
def test_the_reference_pass_in_parts_and_on_a_mesh_is_the_whole() -> None:
    batch = paired_batch(2)
    names = ThreadedTokens.__dataclass_fields__
    fields = {name: value for name, value in batch.fields().items() if name in names}
    params, mesh = random_weights(), sharding.make_mesh(2, 2, 2)
    expected = reference_pass(CONFIG.model, None)(params, fields)
    assert ((np.asarray(expected) < 0) == (batch.target != NO_TARGET)).all()
    forward = reference_pass(CONFIG.model, mesh, parts=2)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    found = forward(placed, jax.device_put(fields, rows_sharding(mesh, ROWS, 2)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_of_a_part_that_devices_do_not_divide_are_refused() -> None:
    config = dataclasses.replace(CONFIG, microbatches=4)
    message = (
        r"each of 4 microbatches has 2 of 8 rows, over all devices: data\*fsdp=8 does not divide rows B=2"
    )
    with pytest.raises(ValueError, match=message):
        make_update(config, sharding.make_mesh(1, 8, 1), sft)
    with pytest.raises(ConfigError, match=r"microbatches=3 does not divide config.data.rows=8"):
        dataclasses.replace(CONFIG, microbatches=3)


@pytest.mark.slow
def test_adapters_on_a_mesh_have_the_gradient_of_one_device() -> None:
    config = dataclasses.replace(CONFIG, init_from="base", lora=Lora(rank=2, rows=(3, 7)))
    fields = paired_batch(2).fields()
    expected, measured, _ = updated(config, "sft", fields)
    found, also, update = updated(config, "sft", fields, sharding.make_mesh(1, 4, 2))
    assert_close(found, expected, 1e-5)
    assert also == pytest.approx(measured, rel=1e-5)
    assert jax.tree.structure(update.base_shapes) == jax.tree.structure(random_weights())  # type: ignore[operator]
    full, _, _ = whole("sft", 2)
    rows = full["embed"]["embedding"][jnp.array(config.lora.rows)]
    np.testing.assert_allclose(found["embed"]["embedding_rows"], rows, atol=1e-5)
