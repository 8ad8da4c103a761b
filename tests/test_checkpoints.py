"""Checkpoints: alone they suffice, and what is wrong with one is said in words."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pasta_jax.checkpoints import save
from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.model.lora import Params
from pasta_jax.training.state import TrainState, new_state

CONFIG = Config(data=DataConfig(rows=3), checkpoint=CheckpointConfig(keep=2))
OPTIMIZER = optax.adamw(1e-3)


def state_at(step: int) -> TrainState:
    params = {
        "embed": {"embedding": jnp.arange(12.0).reshape(4, 3) + step},
        "final_norm": {"scale": jnp.ones(3)},
    }
    state = new_state(params, OPTIMIZER)
    return TrainState(state.params, state.opt_state, jnp.int32(step))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("written")
    with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run:
        for step in (10, 20, 30):
            run.save(state_at(step), data_index=step * 7)
            run.save(state_at(step), data_index=0)  # saved already: nothing happens
        assert run.latest() == 30
    return workdir


@pytest.fixture
def workdir(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def test_only_the_newest_are_kept(written: pathlib.Path) -> None:
    assert sorted(path.name for path in (written / "checkpoints").iterdir()) == ["20", "30"]


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/30"])
def test_a_checkpoint_suffices(written: pathlib.Path, path: str) -> None:
    params, about = load_params(written / path)
    jax.tree.map(np.testing.assert_array_equal, params, state_at(30).params)
    assert (about.step, about.data_index, about.config) == (30, 210, CONFIG)
    assert about.versions["jax"] == jax.__version__
    tokenizer = make_tokenizer(CONFIG.data)
    assert about.matches_tokenizer(tokenizer)
    assert about.load_tokenizer().encode("Paris is the capital.") == tokenizer.encode("Paris is the capital.")


def test_an_older_one_and_where_it_lies(written: pathlib.Path) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def shardings(shapes: Params) -> Params:
        spec = {4: jax.sharding.PartitionSpec("x"), 3: jax.sharding.PartitionSpec()}
        return jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, spec[x.shape[0]]), shapes)

    params, _ = load_params(written / "checkpoints" / "20", shardings=shardings)
    embedding = params["embed"]["embedding"]
    assert len(embedding.sharding.device_set) == 4
    assert embedding.addressable_shards[0].data.shape == (1, 3)
    np.testing.assert_array_equal(embedding, state_at(20).params["embed"]["embedding"])


def test_relative_paths(written: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.parent)
    assert load_params(written.name)[1].step == 30


def test_nothing_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"has no complete checkpoint of pasta_jax \(it contains: nothing\)"
    ):
        load_params(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"published weights.* Convert them first: .*convert --from=hf:"
    ):
        load_params(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_params(tmp_path / "model.safetensors")


def test_a_folder_of_models_is_no_checkpoint(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What the demo writes: a model named pasta is not the item of a checkpoint that has this name."""
    for name in ("base", "pasta"):
        (tmp_path / name).symlink_to(written)
    (tmp_path / "bon").mkdir()
    (tmp_path / "bon" / "round-1").symlink_to(written)
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(
        CheckpointError, match=r"these directories in it have. Give one of them: .*/base, .*/bon, .*/pasta\.$"
    ):
        load_params(tmp_path)
    assert load_params(tmp_path / "pasta")[1].step == 30


def test_foreign(workdir: pathlib.Path) -> None:
    about = workdir / "checkpoints" / "30" / "pasta" / "pasta.json"
    tree = json.loads(about.read_text())
    about.write_text(json.dumps(tree | {"format": "other"}))
    with pytest.raises(CheckpointError, match="not a checkpoint of pasta_jax but of 'other'"):
        load_params(workdir)
    about.write_text(json.dumps(tree | {"format_version": 99}))
    with pytest.raises(
        CheckpointError, match="has format 99, this version of pasta_jax reads format 3. Upgrade"
    ):
        load_params(workdir)
    about.write_text(json.dumps(tree | {"format_version": 1}))
    with pytest.raises(CheckpointError, match="has format 1, .* Use the older version that wrote it"):
        load_params(workdir)
    about.write_text(json.dumps(tree | {"config": {"stage": "sft", "colour": 1}}))
    with pytest.raises(CheckpointError, match='No config field "colour"'):
        load_params(workdir)
    about.unlink()
    way_out = r"it has no pasta/pasta\.json\. Delete it and step 20 is used\."
    with pytest.raises(CheckpointError, match=f"not a checkpoint of pasta_jax: {way_out}"):
        load_params(workdir)
    (workdir / "checkpoints" / "31").mkdir()
    way_out = r"it has no pasta/pasta\.json\. Delete steps 30, 31 and step 20 is used\."
    with pytest.raises(CheckpointError, match=f"31 is not a checkpoint of pasta_jax: {way_out}"):
        load_params(workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    with pytest.raises(CheckpointError, match=r"has no pasta/pasta\.json\.$"):
        load_params(workdir)


def test_going_on_from_half_a_checkpoint_says_which_one_is_whole(workdir: pathlib.Path) -> None:
    steps = workdir / "checkpoints"
    shutil.rmtree(steps / "30" / "optimizer")
    target = jax.eval_shape(lambda: state_at(0))
    message = (
        r"30 is damaged\. Delete it and step 20 is used\. \(optimizer: not there; a new --workdir with "
        r"--config\.init_from=.*30 starts from its weights\)"
    )
    with (
        Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run,
        pytest.raises(CheckpointError, match=message),
    ):
        run.restore(target)
    shutil.rmtree(steps / "20" / "optimizer")
    with (
        Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run,
        pytest.raises(CheckpointError, match=r"There is no whole one beside it\. \(optimizer"),
    ):
        run.restore(target)
    (steps / "31").mkdir()
    with (
        Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run,
        pytest.raises(CheckpointError, match=r"31 is not a checkpoint .* Delete it and step 30 is used"),
    ):
        run.restore(target)
    assert load_params(steps / "30")[1].step == 30


def test_damaged_description(workdir: pathlib.Path) -> None:
    about = workdir / "checkpoints" / "30" / "pasta" / "pasta.json"
    text = about.read_text()
    tree = json.loads(text)
    without_step = {key: value for key, value in tree.items() if key != "step"}
    bad = [
        text[: len(text) // 2],
        "[1]",
        "",
        json.dumps(without_step),
        json.dumps(tree | {"step": "x"}),
        json.dumps(tree | {"step": float("inf")}),
        json.dumps(tree | {"window": {"loss": []}}),
        json.dumps(tree | {"window": [1]}),
        "[" * 200_000,
        '{"format": "pasta_jax", "step": %s}' % ("1" * 5000),
        json.dumps(tree | {"tokenizer": "%"}),
    ]
    for content in bad:
        about.write_text(content)
        with pytest.raises(CheckpointError, match=r"30 is damaged\. Delete it and step 20 is used\."):
            load_params(workdir)
    about.write_text(json.dumps(tree | {"tokenizer": "AAAA"}))
    with pytest.raises(CheckpointError, match="is damaged: its tokenizer"):
        load_params(workdir)[1].load_tokenizer()


def test_what_cannot_be_read_is_not_called_damaged(workdir: pathlib.Path) -> None:
    about = workdir / "checkpoints" / "30" / "pasta" / "pasta.json"
    about.unlink()
    about.mkdir()
    with pytest.raises(CheckpointError, match=r"pasta\.json could not be read: .*directory"):
        load_params(workdir)


def test_a_damaged_checkpoint_is_not_replaced_by_a_newer_one(workdir: pathlib.Path) -> None:
    (workdir / "checkpoints" / "20" / "pasta" / "pasta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"20 is damaged\. Use another step: 30\."):
        load_params(workdir / "checkpoints" / "20")


def test_damaged_arrays(workdir: pathlib.Path) -> None:
    for file in (workdir / "checkpoints" / "30" / "params").rglob("*"):
        if file.is_file() and "d/" in str(file.relative_to(workdir)):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"30 is damaged\. Delete it and step 20 is used\. \(params: "):
        load_params(workdir)
    shutil.rmtree(workdir / "checkpoints" / "30" / "params")
    with pytest.raises(CheckpointError, match="30 is damaged"):
        load_params(workdir)
    shutil.rmtree(workdir / "checkpoints" / "30")
    assert load_params(workdir)[1].step == 20


def test_another_model_is_told_by_its_first_difference(written: pathlib.Path) -> None:
    expected = jax.eval_shape(lambda: state_at(0).params)
    load_params(written, expected=expected)
    larger = expected | {"embed": {"embedding": jax.ShapeDtypeStruct((5, 3), jnp.float32)}}
    message = r"First difference: embed/embedding is \(4, 3\) in the checkpoint, \(5, 3\) by the config"
    with pytest.raises(CheckpointError, match=message):
        load_params(written, expected=larger)
    more = expected | {"head": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    with pytest.raises(CheckpointError, match="head is not there in the checkpoint"):
        load_params(written, expected=more)


def test_what_orbax_cannot_open_is_told_with_its_cause(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TypeError("no such option\nmore")

    monkeypatch.setattr(save.ocp, "CheckpointManager", fails)
    message = (
        r"^Orbax cannot open .*checkpoints: TypeError: no such option; if a step's _CHECKPOINT_METADATA is "
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, Config(), make_tokenizer(DataConfig()))
