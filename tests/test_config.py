"""Configurations: strict, and every refusal says what to write instead."""

import dataclasses
import json
import pathlib

import pytest

from pasta_jax import overrides
from pasta_jax.config import Config, ConfigError, DataConfig
from pasta_jax.overrides import load_config

TINY = str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")


@pytest.mark.parametrize("variant", ["", ":base", ":baseline", ":pasta", ":apar", ":sot", ":preference"])
def test_tiny_and_its_json(variant: str) -> None:
    config = load_config(TINY + variant)
    tree = overrides.to_dict(config)
    assert overrides.from_dict(json.loads(json.dumps(tree))) == config
    assert config.stage == ("preference" if variant == ":preference" else "sft")


def test_tiny_by_itself_mixes_facts_and_annotated_answers() -> None:
    assert [name for name, _ in load_config(TINY).data.sources] == ["almanac:base", "almanac:annotated"]


def test_both_stages_begin_like_the_first_alone() -> None:
    alone = load_config(TINY + ":pasta")
    both = load_config(TINY + ":both")
    for name in ("steps", "model", "data", "optimizer"):
        assert getattr(both, name) == getattr(alone, name), name


def test_overrides_reach_fields_that_the_file_does_not_name() -> None:
    overrides = ["steps=1e3", "optimizer.lr=1", "optimizer.b2=.5", "log.tb=true", "data.sources=a.jsonl=2,b"]
    config = load_config(TINY, overrides)
    assert config.steps == 1000
    assert isinstance(config.steps, int)
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.b2 == 0.5
    assert config.log.tb is True
    assert config.data.sources == (("a.jsonl", 2.0), ("b", 1.0))


def test_a_file_of_ones_own(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from pasta_jax.config import Config\ndef get_config(variant='a'):\n  return Config(seed=len(variant))\n"
    )
    assert (load_config(str(file)).seed, load_config(f"{file}:four").seed) == (1, 4)
    for text, message in {
        "get_config = dict": "get_config returned dict",
        "steps = 3": "it defines no get_config",
        "def get_config(": "was never closed",
        'steps = 3\ndef get_config():\n  return {}["a"]': "line 3: KeyError: 'a'",
        "steps = 3\nsteps.x": "line 2: AttributeError: 'int' object",
        "def get_config(): return 1 / 0": "line 1: ZeroDivisionError",
        "from pasta_jax.config import Config\ndef get_config(): return Config(seed=-1)": "config.seed must be",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"Cannot load the configuration .*own.py: .*{message}"):
            load_config(str(file))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "learning_rate=1",
            'No config field "learning_rate". Did you mean "optimizer.lr"? Fields: stage, seed',
        ),
        (
            "optimizer.learning_rate=1",
            'field "optimizer.learning_rate". Did you mean "optimizer.lr"? Fields: lr,',
        ),
        ("data.batch_size=4", 'Did you mean "data.rows"?'),
        ("data.lenght=4", 'Did you mean "data.length"?'),
        ("qwertyuiop=4", 'No config field "qwertyuiop". Fields: '),
        ("optimizer.lr.x=1", "config.optimizer.lr is a number, it has no fields."),
        ("steps=50k", 'config.steps must be an int, got "50k".'),
        ("steps=1.5", 'config.steps must be an int, got "1.5".'),
        ("steps=inf", 'config.steps must be an int, got "inf".'),
        ("optimizer.schedule=step", 'must be one of "constant", "linear", "cosine", got "step".'),
        ("log.tb=perhaps", 'config.log.tb must be true or false, got "perhaps".'),
        ("data=3", 'config.data must be a section, got "3".'),
        ("data.rows=0", "config.data.rows must be at least 1, got 0."),
        ("data.sources=a=0", "weights must be positive"),
        ("model.num_heads=0", "config.model.num_heads must be at least 1, got 0."),
        ("model.num_layers=1000000000", "config.model.num_layers must be at most 1024, got 1000000000."),
        ("model.head_dim=7", "config.model: head_dim=7 is odd."),
        ("model.dtype=int4", "config.model: dtype='int4' is unknown. Use one of float32, bfloat16, float16."),
        ("model.rope_scaling.factor=0", "config.model.rope_scaling.factor must be above 0, got 0.0."),
        ("lora.rank=-1", "config.lora.rank must be at least 0, got -1."),
        ("data.positions.unit=-1", "config.data.positions.unit must be at least 0, got -1."),
        ("seed=99999999999999999999", "config.seed must be at most 4294967295, got 99999999999999999999."),
        ("steps=99999999999999999999", "config.steps must be at most 2147483647, got 99999999999999999999."),
        ("optimizer.lr=nan", "config.optimizer.lr must be at least 0, got nan."),
        ("optimizer.weight_decay=inf", "config.optimizer.weight_decay must be below inf, got inf."),
        ("optimizer.b2=1", "config.optimizer.b2 must be below 1, got 1.0."),
        ("checkpoint.keep=0", "config.checkpoint.keep must be at least 1, got 0."),
        ("preference.temperature=0", "config.preference.temperature must be above 0, got 0.0."),
        ("preference.samples=1", "config.preference.samples must be at least 2, got 1."),
        ("preference.alpha=1.5", "config.preference.alpha must be at most 1, got 1.5."),
        ("model.num_kv_heads=3", "config.model: num_heads=4 is not a multiple of num_kv_heads=3"),
        ("steps", "Write --config.steps=VALUE."),
        ("seed=-1", "config.seed must be at least 0, got -1."),
        ("stage=dpo", 'config.stage must be one of "sft", "preference", "both", got "dpo".'),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override])
    assert message in str(error.value)


def test_numbers_that_may_be_zero() -> None:
    config = load_config(TINY, ["optimizer.lr=0", "preference.lr=0", "model.norm_eps=0"])
    assert (config.optimizer.lr, config.preference.lr, config.model.norm_eps) == (0, 0, 0)


def test_every_number_has_a_range() -> None:
    numbers = [path for path, value, _ in overrides._walk(Config()) if type(value) in (int, float)]
    assert len(numbers) > 50
    for path in numbers:
        endless = path in ("preference.quality_weight", "checkpoint.every_minutes")
        for tried in ("nan", "-inf", "-1e400", str(-(10**400)), str(10**400), *["inf"] * (not endless)):
            with pytest.raises(ConfigError, match=f"^config.{path} must be"):
                overrides.override(Config(), [f"{path}={tried}"])


def test_no_such_file_or_variant() -> None:
    with pytest.raises(ConfigError, match=r"No configuration file no/such\.py"):
        load_config("no/such.py")
    with pytest.raises(ConfigError, match="--config=mine.jsonl is no Python file. Give an experiment, as"):
        load_config("mine.jsonl")
    with pytest.raises(ConfigError, match="no variant 'huge'"):
        load_config(TINY + ":huge")


def test_remat_was_once_true_or_false() -> None:
    tree = overrides.to_dict(Config())
    for old, now in ((True, "everything"), (False, "none")):
        assert overrides.from_dict({**tree, "remat": old}).remat == now, "a checkpoint"
        assert load_config(TINY, [f"remat={str(old).lower()}"]).remat == now
        assert Config(remat=old).remat == now, "a file of one's own"  # type: ignore[arg-type]
    assert load_config(TINY, ["remat=dots"]).remat == "dots"
    with pytest.raises(
        ConfigError, match=r'config.remat must be one of "auto", "none", "dots", "everything"'
    ):
        load_config(TINY, ["remat=some"])


def test_json_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match='No config field "data.rowz". Did you mean "data.rows"'):
        overrides.from_dict({"data": {"rowz": 1}})
    with pytest.raises(ConfigError, match="config.data.rows must be an int, got true"):
        overrides.from_dict({"data": {"rows": True}})


def test_differences_and_description() -> None:
    other = dataclasses.replace(Config(), seed=1, data=DataConfig(rows=3))
    assert overrides.differences(Config(), other) == ["seed", "data.rows"]
    described = overrides.describe(other)
    assert "config.data.rows = 3 " in described
    assert "# B, rows of a batch" in described


def test_every_override_of_a_preference_has_one_name() -> None:
    for synonym in ("lambda", "weight"):
        with pytest.raises(ConfigError, match='Did you mean "preference.quality_weight"'):
            load_config(TINY, [f"preference.{synonym}=1"])


def test_print_config_documents_every_field() -> None:
    lines = overrides.describe(Config()).splitlines()
    assert [line for line in lines if "  # " not in line] == []
