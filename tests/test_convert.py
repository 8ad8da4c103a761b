"""In and out again: bit for bit, on a mesh, with a larger vocabulary, after training; and what is refused."""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pasta_jax import sharding
from pasta_jax.checkpoints.about import BaseWeights, CheckpointError, read_metadata
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config, ConfigError
from pasta_jax.experiment import resolve
from pasta_jax.files import LOCK, locked
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.importing import ImportOptions, kind_of, open_published
from pasta_jax.interchange.origin import carry, read_origin
from pasta_jax.interchange.reading import open_folder
from pasta_jax.interchange.tensors import rows
from pasta_jax.interchange.writing import Exported, plan, unfinished
from pasta_jax.lang import tags
from pasta_jax.model import Lora, init_params
from pasta_jax.model.forms import quantize
from pasta_jax.model.lora import split
from pasta_jax.model.weights import hf_tensors
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from pasta_jax.training.state import TrainState
from tests.helpers import family_tokenizers
from tests.helpers.conversion import bring_in, bring_out, load_tokenizer_rows, run, trained
from tests.helpers.hf_folders import CONFIGS, small_tokenizer, write_hf_folder

GEMMA = CONFIGS["gemma"]


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = open_folder(folder).stored
    return {name: np.concatenate([piece for _, piece in rows(t)]) for name, t in tensors.items()}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_comes_back_byte_for_byte(family: str, tmp_path: pathlib.Path) -> None:
    dtype = ml_dtypes.bfloat16 if family != "gemma2" else np.float32
    original = write_hf_folder(
        tmp_path / "hf",
        CONFIGS[family],
        dtype=dtype,
        shards=1 + (family != "qwen3"),
        head_again=family == "gemma3",
    )
    model, params = bring_in(tmp_path / "hf", tmp_path / "W", dtype="float32")
    for tensor in hf_tensors(model.config):
        np.testing.assert_array_equal(tensor.to_hf(flatten_dict(params)[tensor.path]), original[tensor.name])
    bring_out(tmp_path / "W", tmp_path / "out")
    before, after = contents(tmp_path / "hf"), contents(tmp_path / "out")
    assert json.loads(after.pop("pasta_tags.json")) == model.tokenizer.vocabulary.tag_ids
    assert after == before


def test_a_workdir_says_all_that_was_known(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    about = read_metadata(tmp_path / "W" / "checkpoints" / "0")
    assert (about.step, about.config.model) == (0, dataclasses.replace(GEMMA, dtype="bfloat16"))
    assert about.load_tokenizer().vocabulary == load_tokenizer(tmp_path / "hf").vocabulary
    origin = read_origin(tmp_path / "W")
    assert origin is not None and origin.source == str(tmp_path / "hf") and not origin.ignored
    carry(tmp_path / "W", tmp_path / "W2")  # as training from it does
    assert contents(tmp_path / "W" / "origin" / "headers") == contents(tmp_path / "W2" / "origin" / "headers")


def test_what_another_start_left_does_not_stay(tmp_path: pathlib.Path) -> None:
    """Else adapters, and exports, would name a base that is not theirs."""
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    carry(tmp_path / "W", tmp_path / "T")
    _, about = load_params(tmp_path / "W")
    with Checkpoints(tmp_path / "own", about.config, about.load_tokenizer()) as run:
        run.save_weights({"a": np.ones(2)})
    assert read_origin(tmp_path / "W") is not None
    carry(tmp_path / "own", tmp_path / "T")
    assert not (tmp_path / "T" / "origin").exists()


def test_training_takes_model_and_tokenizer_of_the_start(tmp_path: pathlib.Path) -> None:
    """Those of what it starts from, in another dtype or chat format if asked; of its own checkpoint later."""
    write_hf_folder(tmp_path / "hf", GEMMA, tokenizer=family_tokenizers.gemma())
    bring_in(tmp_path / "hf", tmp_path / "W")
    about = read_metadata(tmp_path / "W" / "checkpoints" / "0")
    assert about.load_tokenizer().usage.chat == "plain"
    config = Config(init_from=str(tmp_path / "W"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, chat="gemma"))
    resolved, tokenizer = resolve(config, workdir=str(tmp_path / "T"))
    assert resolved.model == GEMMA and about.config.model.dtype == "bfloat16"
    assert tokenizer.vocabulary.eos != about.load_tokenizer().vocabulary.eos
    assert about.matches_tokenizer(tokenizer), "its ids mean the same"
    with Checkpoints(tmp_path / "T", resolved, tokenizer) as run:
        run.save_weights({"a": np.ones(2)})
    again = dataclasses.replace(config, init_from=str(tmp_path / "gone"))
    assert resolve(again, workdir=str(tmp_path / "T"))[1].vocabulary == tokenizer.vocabulary


def test_training_does_not_go_on_in_an_imported_workdir(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    params, about = load_params(tmp_path / "W")
    with Checkpoints(tmp_path / "W", about.config, about.load_tokenizer()) as run:
        state = TrainState(params, (), jax.numpy.int32(0))
        with pytest.raises(CheckpointError, match=r"holds weights alone.*--config.init_from="):
            run.restore(state)


def test_what_was_trained_keeps_its_digits_and_ends_its_answers(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W", dtype="float32")
    params = trained(tmp_path / "W", tmp_path / "T")
    bring_out(tmp_path / "T", tmp_path / "out")
    written = stored(tmp_path / "out")
    for tensor in hf_tensors(GEMMA):
        np.testing.assert_array_equal(
            written[tensor.name], tensor.to_hf(np.asarray(flatten_dict(params)[tensor.path]))
        )
    before, after = contents(tmp_path / "hf"), contents(tmp_path / "out")
    same = {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    assert {name for name in before if after[name] == before[name]} == same
    config = json.loads(after["config.json"])
    assert config == json.loads(before["config.json"]) | {"torch_dtype": "float32"}
    bring_out(tmp_path / "T", tmp_path / "small", dtype="bfloat16")
    assert stored(tmp_path / "small")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert contents(tmp_path / "small")["config.json"] == before["config.json"]


def test_ends_and_chat_of_a_trained_model(tmp_path: pathlib.Path) -> None:
    """In transformers its answers end where they ended in training, and prompts look as they did."""
    write_hf_folder(tmp_path / "hf", GEMMA)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 9, "top_k": 64}')
    bring_in(tmp_path / "hf", tmp_path / "W")
    trained(tmp_path / "W", tmp_path / "T")
    bring_out(tmp_path / "T", tmp_path / "out")
    written_json = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    stops = load_tokenizer(tmp_path / "hf").vocabulary.stops
    assert written_json["top_k"] == 64 and set(written_json["eos_token_id"]) == {9} | stops
    assert not (tmp_path / "out" / "chat_template.jinja").exists()  # plain


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_vocabulary_without_room_is_extended_when_asked(family: str, tmp_path: pathlib.Path) -> None:
    tokenizer = small_tokenizer(free_ids=0)
    old = load_tokenizer_rows(tokenizer, tmp_path)
    config = dataclasses.replace(CONFIGS[family], vocab_size=old)
    original = write_hf_folder(tmp_path / "hf", config, tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"--extend_tokenizer"):
        open_published("folder", str(tmp_path / "hf"))
    model, params = bring_in(tmp_path / "hf", tmp_path / "W", dtype="float32", extend_tokenizer=True)
    new = len(tags.PIECES)
    assert (model.new_rows, model.config.vocab_size) == (new, old + new)
    assert sorted(model.tokenizer.vocabulary.tag_ids.values()) == [*range(old, old + new)]
    embedding = np.asarray(params["embed"]["embedding"])
    was = original["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(embedding[:old], was)
    np.testing.assert_allclose(embedding[old:], np.tile(was.mean(0), (new, 1)), atol=0.1 * was.std())
    assert len(np.unique(embedding[old:], axis=0)) == new, "the tags can be told apart"
    bring_out(tmp_path / "W", tmp_path / "out")
    written = stored(tmp_path / "out")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"].astype(np.float32), embedding)
    if family == "llama":
        head = np.asarray(params["head"]).T
        np.testing.assert_array_equal(written["lm_head.weight"].astype(np.float32), head)
        assert not np.array_equal(head[:old], embedding[:old])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == old + new
    again, _ = bring_in(tmp_path / "out", tmp_path / "W2")  # by pasta_tags.json
    assert again.tokenizer.vocabulary.tag_ids == model.tokenizer.vocabulary.tag_ids and again.new_rows == 0


def test_onto_a_mesh_of_eight(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIGS["llama"], model_dim=32)
    write_hf_folder(tmp_path / "hf", config)
    model = open_published("folder", str(tmp_path / "hf"))
    one, eight = model.read(None), model.read(sharding.make_mesh(1, 4, 2))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    q_proj = eight["layer_1"]["attn"]["q_proj"]
    assert q_proj.addressable_shards[0].data.shape == (32 // 4, 4 // 2, 6)
    with pytest.raises(InterchangeError, match="mesh: tensor=8 does not divide num_heads N=4"):
        model.read(sharding.make_mesh(1, 1, 8))


def test_int8_on_the_way_in_is_int8_of_the_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pasta_jax.interchange.importing.CHUNK", 1000)  # so that large ones go by parts
    write_hf_folder(tmp_path / "hf", CONFIGS["llama"])
    model = open_published("folder", str(tmp_path / "hf"), ImportOptions(quantize=True))
    plain = open_published("folder", str(tmp_path / "hf")).read(None)
    expected = quantize(jax.tree.map(np.asarray, plain))
    assert model.config == dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.read(None), expected)
    with pytest.raises(InterchangeError, match="weights are int8. Export the one that it was quantised from"):
        plan(Exported(expected, model.config, tokenizer=None))  # type: ignore[arg-type]


def test_vision_models_are_left_out(tmp_path: pathlib.Path) -> None:
    config, prefix = CONFIGS["gemma3"], "language_model.model."
    write_hf_folder(tmp_path / "text", config)
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    tree = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
    }
    from tests.helpers.hf_folders import random_tensors

    tensors = random_tensors(config, prefix)
    tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(3, np.float32)
    write_hf_folder(tmp_path / "hf", config, prefix=prefix, tensors=tensors, tree=tree)
    model, params = bring_in(tmp_path / "hf", tmp_path / "W")
    assert model.origin is not None and model.origin.is_text is False
    left_out = dataclasses.replace(model.origin, ignored=("model.layers.0.self_attn.rotary_emb.inv_freq",))
    assert left_out.is_text
    bring_out(tmp_path / "W", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    assert stored(tmp_path / "out").keys() == {tensor.name for tensor in hf_tensors(config)}
    _, again = bring_in(tmp_path / "out", tmp_path / "W2")
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_model_that_never_was_a_folder(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    shutil.rmtree(tmp_path / "W" / "origin")
    bring_out(tmp_path / "W", tmp_path / "out", shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"], config["eos_token_id"]) == ("gemma", "bfloat16", 1)
    before, after = stored(tmp_path / "hf"), stored(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_tags_get_their_names_when_asked(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    bring_out(tmp_path / "W", tmp_path / "out", name_tags=True)
    named = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    assert named.vocabulary.tag_ids == load_tokenizer(tmp_path / "hf").vocabulary.tag_ids
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() != small_tokenizer()


def test_nothing_is_left_of_what_failed(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        with unfinished(tmp_path / "very" / "deep" / "W") as folder:
            pathlib.Path(folder, "half").touch()
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        fail()
    assert [*tmp_path.iterdir()] == [], "the folders above it neither"
    (tmp_path / "empty").mkdir()
    with unfinished(tmp_path / "empty") as folder:
        pathlib.Path(folder, "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] and (tmp_path / "empty" / "whole").exists()


def test_what_from_means(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf_folder(tmp_path / "hf", GEMMA)
    (tmp_path / "org" / "run").mkdir(parents=True)
    assert kind_of("hf:hf") == kind_of("hf") == ("folder", "hf")
    assert kind_of("hf:google/gemma-2b-it") == kind_of("gemma-2b-it") == ("hub", "google/gemma-2b-it")
    assert kind_of("org/run") == ("workdir", "org/run")
    assert kind_of("orbax:org/run") == ("orbax", "org/run")
    for name in ("config.json", "pytorch_model.bin"):  # which gets its own refusal
        (tmp_path / "old" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text('{"model_type": "gemma"}')
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").touch()
    assert kind_of("old") == ("folder", "old")
    assert kind_of("peft") == kind_of("peft:peft") == ("peft", "peft")
    assert kind_of("hf:peft") == ("folder", "peft"), "which gets its own refusal"
    for content in ('{"model": {"num_layers": 2}}', "[]", "{"):
        (tmp_path / "org" / "run" / "config.json").write_text(content)
        assert kind_of("org/run") == ("workdir", "org/run")
    with pytest.raises(InterchangeError, match="there is no folder no/such/folder"):
        kind_of("hf:no/such/folder")


def test_the_verb_takes_a_name_on_the_hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf_folder(tmp_path / "snapshot", GEMMA)
    asked = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("pasta_jax.interchange.hub.download", download)
    assert run("--from=google/gemma-2b-it", f"--to={tmp_path}/W", "--noparity") == 0
    origin = read_origin(tmp_path / "W")
    assert asked == ["google/gemma-2b-it"] and origin is not None and origin.source == asked[0]


def test_the_verb(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    assert run(f"--from=hf:{tmp_path}/hf", f"--to={tmp_path}/W", "--noparity") == 0
    output = capsys.readouterr().out
    assert output.endswith(f"Wrote {tmp_path}/W.\n") and "bfloat16" in output
    assert run(f"--from={tmp_path}/W", f"--to={tmp_path}/out", "--noparity") == 0
    assert contents(tmp_path / "hf").items() <= contents(tmp_path / "out").items()
    capsys.readouterr()
    assert run(f"--from={tmp_path}/W", f"--to={tmp_path}/out") == 2
    message = f"{tmp_path}/out exists and is not empty. Choose another --to.\n"
    assert capsys.readouterr().err == message
    assert run(f"--from={tmp_path}/W", f"--to={tmp_path}/W2", "--extend_tokenizer") == 2
    assert capsys.readouterr().err == "--extend_tokenizer is for imports.\n"
    assert run(f"--from=hf:{tmp_path}/hf", f"--to={tmp_path}/W2", "--dtype=float16") == 2
    assert run(f"--from=hf:{tmp_path}/hf", f"--to={tmp_path}/W2", "--dtype=int4") == 2
    float16, int4 = capsys.readouterr().err.splitlines()
    assert "too small a range" in float16 and "none of float32, bfloat16, float16" in int4
    (tmp_path / "used").mkdir()
    with locked(tmp_path / "used"):
        assert run(f"--from={tmp_path}/W", f"--to={tmp_path}/used") == 2
        assert f"{tmp_path}/used is in use: process {os.getpid()} on " in capsys.readouterr().err
    (tmp_path / "used" / LOCK).touch()  # of a run that was killed
    assert run(f"--from={tmp_path}/W", f"--to={tmp_path}/used", "--noparity") == 0
    assert contents(tmp_path / "used") == contents(tmp_path / "out")
    capsys.readouterr()
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").write_bytes(b"short")
    assert run(f"--from=hf:{tmp_path}/hf", f"--to={tmp_path}/W2") == 2
    assert "model-00002-of-00002.safetensors is truncated" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["W", "hf", "out", "used"]


def test_parity_is_of_what_was_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters are float32, and the folder is in the model's dtype or in the one that is asked for."""
    given: list[Any] = []

    def parity_line(*handed: Any) -> str:
        given.append(handed)
        return ""

    monkeypatch.setattr("pasta_jax.interchange.parity.parity_line", parity_line)
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    assert trained(tmp_path / "W", tmp_path / "T")["final_norm"]["scale"].dtype == np.float32
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        flag = [] if dtype == "bfloat16" else [f"--dtype={dtype}"]
        assert run(f"--from={tmp_path}/T", f"--to={out}", *flag) == 0
        params, config, folder = given.pop()
        assert (config, folder) == (dataclasses.replace(GEMMA, dtype="bfloat16"), str(out))
        written = stored(out)
        for tensor in hf_tensors(GEMMA):
            ours = tensor.to_hf(np.asarray(flatten_dict(params)[tensor.path]))
            assert ours.dtype == written[tensor.name].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(ours, written[tensor.name])


def test_the_chat_of_training_goes_out(tmp_path: pathlib.Path) -> None:
    """Where the origin's own files would choose another; else they stay as they are."""
    for number, (template, chat, same) in enumerate(
        [
            ("{{ '[INST]' }}", "auto", True),
            ("{{ '[INST]' }}", "plain", False),
            ("{{ 'Human: ' }}", "inst", False),  # of no format that is known
        ]
    ):
        top = tmp_path / str(number)
        write_hf_folder(top / "hf", GEMMA)
        written_json = json.dumps({"tokenizer_class": "GemmaTokenizer", "chat_template": template})
        (top / "hf" / "tokenizer_config.json").write_text(written_json)
        model, _ = bring_in(top / "hf", top / "W", chat=chat)
        bring_out(top / "W", top / "same")  # never trained
        assert contents(top / "hf").items() <= contents(top / "same").items()
        trained(top / "W", top / "T")
        bring_out(top / "T", top / "out")
        assert ((top / "out" / "tokenizer_config.json").read_text() == written_json) == same
        usage = load_tokenizer(top / "out").usage
        assert isinstance(model.tokenizer, TextTokenizer)
        assert (usage.chat, usage.opening) == (model.tokenizer.usage.chat, model.tokenizer.usage.opening)
        assert (top / "out" / "chat_template.jinja").exists() == (number == 2)


def test_what_would_be_ignored_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    folder, workdir, to = f"--from=hf:{tmp_path}/hf", f"--from={tmp_path}/W", f"--to={tmp_path}/new"
    for arguments, message in (
        ([workdir, to, "--chat=plain"], "--chat is for imports."),
        ([workdir, to, "--base=B"], "--base is for adapters; "),
        ([workdir, to, "--merge_lora"], "--merge_lora is for adapters; "),
        ([folder, to, "--base=B"], "--base, --name_tags and --merge_lora are for exports."),
        ([folder, to, "--preset=gemma-2b"], "preset=gemma-2b is for Orbax checkpoints; "),
        ([folder, "--to=gs://bucket/W"], "Cannot write to gs://bucket/W: "),
    ):
        assert run(*arguments) == 2
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "new").exists()


def test_the_base_of_adapters_that_was_moved(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    _, about = load_params(tmp_path / "W")
    config = dataclasses.replace(about.config, lora=Lora(rank=2), init_from="gone")
    with Checkpoints(tmp_path / "L", config, about.load_tokenizer()) as adapters:
        shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0), config.lora))
        leaves = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), split(shapes)[1])
        base_fingerprint = fingerprint(load_params(tmp_path / "W")[0])
        adapters.save(
            TrainState(leaves, {"a": jax.numpy.ones(2)}, jax.numpy.int32(3)),
            0,
            BaseWeights("gone", base_fingerprint),
        )
    carry(tmp_path / "W", tmp_path / "L")
    for also in ([], ["--merge_lora"]):
        there = f"--to={tmp_path}/out{len(also)}"
        assert run(f"--from={tmp_path}/L", there, "--noparity", *also) == 2
        assert (
            "base=DIRECTORY of load, --base=DIRECTORY of pasta_jax, evaluate and convert; or put a link"
            in (capsys.readouterr().err)
        )
        assert run(f"--from={tmp_path}/L", there, "--noparity", f"--base={tmp_path}/W", *also) == 0
    assert (tmp_path / "out0" / "adapter_config.json").exists() and (
        tmp_path / "out1" / "config.json"
    ).exists()


def test_config_of_an_import_is_a_config(tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "hf", GEMMA)
    bring_in(tmp_path / "hf", tmp_path / "W")
    assert isinstance(load_params(tmp_path / "W")[1].config, Config)
