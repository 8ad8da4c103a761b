"""Checkpoints: alone they suffice, and what is wrong with one is said in words."""

import json
import pathlib
import resource
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from pasta_jax.checkpoints import reading, save
from pasta_jax.checkpoints.about import CheckpointError, DamagedCheckpoint
from pasta_jax.checkpoints.fingerprint import _sum_there, checksums
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.reading import is_transient
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
        "layer_0": {"mlp": jnp.arange(1536.0).reshape(3, 512) / 7 + step},
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
    """What `make almanac` writes: a model named pasta is not the item of a checkpoint that has this name."""
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


TARGET = jax.eval_shape(lambda: state_at(0))


def resumed(workdir: pathlib.Path, data: Any = None) -> TrainState:
    with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data), data) as run:
        return run.restore(TARGET)[0]


def flip(checkpoint: pathlib.Path) -> None:
    """Changes the lowest bit of one value of a layer."""
    value = np.asarray(load_params(checkpoint)[0]["layer_0"]["mlp"])[2, 1].tobytes()
    files = [file for file in (checkpoint / "params").rglob("d/*") if value in file.read_bytes()]
    (data,) = [bytearray(file.read_bytes()) for file in files]
    data[data.index(value)] ^= 1
    files[0].write_bytes(data)


def test_going_on_from_half_a_checkpoint(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is set aside with a word, and the one before is used; if there is none, that is an error."""
    steps = workdir / "checkpoints"
    shutil.rmtree(steps / "30" / "optimizer")
    (steps / "31").mkdir()
    (steps / "30.damaged").mkdir()  # of an earlier time
    with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run:
        state, about = run.restore(TARGET)
        assert (int(state.step), about.step, run.latest()) == (20, 20, 20)
        run.save(state_at(30), data_index=0)
    assert int(resumed(workdir).step) == 30
    assert f"{steps / '30'} is damaged, and renamed to 30.damaged2. (optimizer: not there; " in caplog.text
    assert "31 is damaged, and renamed to 31.damaged. (it has no pasta/pasta.json)" in caplog.text
    assert caplog.text.count("Going back to step 20.") == 1
    names = ["20", "30", "30.damaged", "30.damaged2", "31.damaged"]
    assert sorted(path.name for path in steps.iterdir()) == names
    assert load_params(steps / "30.damaged2")[1].step == 30

    for step in (20, 30):
        shutil.rmtree(steps / str(step) / "optimizer")
    message = (
        r"30 is damaged\. There is no whole one beside it: start again in a new --workdir\. "
        r"\(optimizer: not there; --config\.init_from"
    )
    with pytest.raises(CheckpointError, match=message):
        resumed(workdir)
    assert sorted(path.name for path in steps.iterdir()) == names, "nothing is renamed in vain"


def test_a_changed_bit_is_found(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = workdir / "checkpoints" / "30"
    flip(newest)
    message = r"30 is damaged\. Delete it and step 20 is used\. \(params: layer_0/mlp: not what was saved"
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), TARGET.params)
    for expected in (None, other):
        with pytest.raises(CheckpointError, match=message):
            load_params(workdir, expected=expected)
    about = newest / "pasta" / "pasta.json"
    text = about.read_text()
    about.write_text(json.dumps({**json.loads(text), "checksums": {}}))  # as older versions wrote it
    assert load_params(workdir)[1].step == 30
    about.write_text(text)
    assert int(resumed(workdir).step) == 20
    assert "renamed to 30.damaged. (params: layer_0/mlp: not what was saved, by its checksum)" in caplog.text


@pytest.mark.parametrize("method", ["restore", "metadata"])
def test_what_cannot_be_read_now_is_not_called_damaged(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fails(*_: object, **options: object) -> None:
        raise ValueError("UNAVAILABLE: 503.")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, method, fails)
    message = (
        r"could not be read: ValueError: UNAVAILABLE: 503\. It may be in order: run the same command again\.$"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        resumed(workdir)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "30"]


# An event loop that gets no files is never whole: it cannot be closed, and what should run in it does not.
@pytest.mark.filterwarnings("ignore:(?s).*has no attribute '_ssock':pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    ("where", "method", "part"),
    [
        (save, "read_metadata", "pasta/pasta.json"),
        (ocp.PyTreeCheckpointHandler, "metadata", "params"),
        (ocp.PyTreeCheckpointHandler, "restore", "params"),
    ],
)
def test_too_many_open_files_damage_nothing(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, where: Any, method: str, part: str
) -> None:
    limits, read = resource.getrlimit(resource.RLIMIT_NOFILE), getattr(where, method)

    def without_files(*args: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
        try:
            return read(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(where, method, without_files)
        message = f"30/{part} could not be read: .*Too many open files.* It may be in order: run the same"
        with pytest.raises(CheckpointError, match=message):
            resumed(workdir)
    assert int(resumed(workdir).step) == 30


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ValueError('NOT_FOUND: Error opening "d/x" [OS error 2: ENOENT No such file or directory]'), False),
        (ValueError('INTERNAL: Error reading "d/x" [OS error 116: ESTALE Stale file handle]'), True),
        (ValueError("DATA_LOSS: Error decoding manifest [source locations='...']"), False),
        (OSError(116, "Stale file handle"), True),
        (FileNotFoundError(2, "No such file or directory"), False),
        (ExceptionGroup("", [KeyError("head"), MemoryError()]), True),
        (KeyError("head"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes
    wrapped = RuntimeError("as Orbax says it")
    wrapped.__cause__ = error
    assert is_transient(wrapped) == passes


def test_what_one_process_cannot_read_no_process_uses(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here it is another one that fails, at the third question: the optimizer of step 30."""
    questions = iter([0, 0, 1])
    monkeypatch.setattr(reading, "agreed", lambda mine: (max(mine, next(questions, 0)),))
    read = save.restore_arrays

    def as_if_spread(path: Any, *others: Any) -> Any:
        return reading.together(path, lambda: read(path, *others))

    monkeypatch.setattr(save, "restore_arrays", as_if_spread)
    assert int(resumed(workdir).step) == 20
    assert "30 is damaged, and renamed to 30.damaged. (another process cannot read it)" in caplog.text


def test_checksums_do_not_depend_on_where_arrays_lie() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_):
        values = np.asarray(jnp.asarray(rng.integers(-50, 50, (300, 500)).clip(0)).astype(dtype))
        (here,) = checksums({"a": values}).values()
        there = _sum_there(jax.device_put(values, place))  # as on an accelerator
        assert checksums({"a": jnp.asarray(values)}) == {"a": here} == {"a": f"{int(there):08x}"}
        swapped = values.copy()
        swapped[[0, 1]] = values[[1, 0]]
        assert checksums({"a": swapped}) != {"a": here}
        swapped[[0, 1]] = values[[0, 1]]
        swapped.reshape(-1)[[0, 1 << 16]] = values.reshape(-1)[[1 << 16, 0]]
        assert (checksums({"a": swapped}) == {"a": here}) == np.array_equal(swapped, values)
    flipped = np.zeros((33, 4), np.float32)
    flipped.view(np.uint32)[range(32), 2] = np.uint32(1) << np.arange(32, dtype=np.uint32)
    assert len({tuple(checksums({"a": row}).values()) for row in flipped}) == 33, "one bit each, and none"
    assert checksums({"a": [jnp.int32(3), np.zeros((0, 2))]}).keys() == {"a/0", "a/1"}


def test_data_that_changed(workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = {"a.jsonl": {"examples": 30, "sha256": "x"}}
    assert int(resumed(workdir, data).step) == 30
    assert "Whether the data changed is not known: an older version wrote" in caplog.text
    with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data), data) as run:
        run.save(state_at(40), data_index=0)
    assert int(resumed(workdir, data).step) == 40
    for new, numbers in {
        (60, "y"): "30 usable examples then, 60 now",
        (30, "y"): "30 usable examples then and now, but not the same",
    }.items():
        changed = {"a.jsonl": {"examples": new[0], "sha256": new[1]}}
        message = f"a.jsonl has changed since step 40 of .*: {numbers}. .* Put the file back, or use a new"
        with pytest.raises(CheckpointError, match=message):
            resumed(workdir, changed)


def fails(*_: object, **__: object) -> None:
    raise ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device [os_error_code=28]\n...'
    )


@pytest.mark.parametrize("method", ["save", "wait_until_finished", "close"])
def test_a_save_that_fails_is_one_line(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def saved() -> None:
        with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run:
            monkeypatch.setattr(run._manager, method, fails)
            run.save(state_at(40), data_index=0)
            run.check()
            if method == "wait_until_finished":
                run.save(state_at(41), data_index=0)

    message = (
        r"checkpoints could not be written: the disk is full\. Make room, then run the same command again\. "
        r"Step \d+ is whole and kept\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        saved()


def test_a_save_that_fails_hides_no_other_error(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run,
    ):
        monkeypatch.setattr(run._manager, "close", fails)
        1 / 0  # noqa: B018
    assert "could not be written: the disk is full" in caplog.text


def test_half_written_and_half_deleted_checkpoints_are_removed(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = workdir / "checkpoints"
    (steps / "25.orbax-checkpoint-tmp").mkdir()
    (steps / "removed" / "20").mkdir(parents=True)
    with Checkpoints(workdir, CONFIG, make_tokenizer(CONFIG.data)) as run:
        with monkeypatch.context() as patch:
            patch.setattr(run, "_remove_old", lambda: None)  # as if it were killed
            run.save(state_at(40), data_index=0)
            run._wait()
            assert (steps / "removed" / "20" / "params").exists(), "whole until it is out of the way"
        run.save(state_at(50), data_index=0)
    assert sorted(path.name for path in steps.iterdir()) == ["40", "50"]


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
        json.dumps(tree | {"step": 2**31}),
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
