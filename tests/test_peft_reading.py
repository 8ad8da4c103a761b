"""Reading adapters in PEFT's layout: ours, those of others, what is refused, and whose base is whose."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import pasta_jax
from pasta_jax.checkpoints.about import CheckpointError, find_checkpoint, read_metadata
from pasta_jax.checkpoints.load import load_params, load_parts
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.peft import CONFIG, TRAINED, WEIGHTS
from pasta_jax.interchange.peft_reading import open_adapters
from pasta_jax.loading import identity_of, place_of
from pasta_jax.model import Lora
from pasta_jax.model.forms import quantize
from pasta_jax.model.lora import join, merge
from pasta_jax.sharding import make_mesh
from pasta_jax.tokens.positions import Positions
from pasta_jax.training.loop import sft, starting_weights
from pasta_jax.training.state import TrainState
from pasta_jax.training.update import make_update
from tests.helpers import full, only_full
from tests.helpers.conversion import run
from tests.helpers.lora_folders import imported, logits_here, peft_or_skip, save, some_tokens


@dataclasses.dataclass(frozen=True)
class Written:
    """Adapters trained with schemes of their own, in a workdir L beside its base W, and in PEFT's layout in P."""

    top: pathlib.Path
    config: Config
    adapters: Any
    merged: Any

    @property
    def base(self) -> str:
        return str(self.top / "W")

    def folder(self, to: pathlib.Path) -> pathlib.Path:
        """A copy of P, to be changed."""
        return shutil.copytree(self.top / "P", to / "P")


@pytest.fixture(scope="module", params=["gemma", full("llama")])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Tied, and untied."""
    top = tmp_path_factory.mktemp(request.param)
    config, tokenizer, base, adapters = imported(request.param, top)
    data = dataclasses.replace(
        config.data, positions=Positions("const", 40), max_depth=2, dialect="apar", chat="plain"
    )
    config = dataclasses.replace(config, data=data)
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), adapters)  # nothing is lost
    save(top / "L", config, tokenizer, base, adapters)
    how = ("--dtype=bfloat16", "--base_name=org/model", "--notokenizer_files")
    assert run(f"--from={top}/L", f"--to={top}/P", *how) == 0
    return Written(top, config, adapters, merge(join(base, adapters), config.lora))


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_folder_beside_its_base_is_the_model(written: Written) -> None:
    assert sorted(path.name for path in (written.top / "P").iterdir()) == sorted(
        [CONFIG, WEIGHTS, TRAINED, "pasta_tags.json"]
    )
    stored = safetensors.numpy.load_file(written.top / "P" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"bfloat16"}
    about = json.loads((written.top / "P" / CONFIG).read_text())
    assert about["base_model_name_or_path"] == "org/model" and str(written.top) not in str(about)
    model = pasta_jax.load(written.top / "P", base=written.base)
    same(model.params, written.merged)
    assert (model.positions, model.max_depth) == (Positions("const", 40), 2)
    assert model.tokenizer.vocabulary.dialect == "apar" and model.config == written.config.model
    same(pasta_jax.load(f"peft:{written.top}/P", base=f"hf:{written.top}/hf").params, written.merged)
    wide, narrow = (pasta_jax.load(written.top / "P", base=written.base, dtype=d) for d in (None, "bfloat16"))
    same(jax.tree.map(lambda x: x.astype("bfloat16"), wide.params), narrow.params)


@only_full
def test_onto_a_mesh_and_in_int8(written: Written) -> None:
    spread = pasta_jax.load(written.top / "P", base=written.base, mesh=make_mesh(2, 2, 2))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), spread.params, written.merged)
    small = pasta_jax.load(written.top / "P", base=written.base, quantize="int8")
    same(small.params, quantize(written.merged))


def test_it_becomes_a_workdir_and_a_folder_again(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, base = f"--from={written.top}/P", f"--base={written.base}"
    assert run(given, base, f"--to={tmp_path}/L") == 0
    assert "parameters of adapters, bfloat16; the base is" in capsys.readouterr().out
    frozen, trained, about = load_parts(tmp_path / "L")
    assert about.step == 3 and {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
    same(jax.tree.map(lambda x: x.astype(jnp.float32), trained), written.adapters)
    how = ("--dtype=bfloat16", "--base_name=org/model", "--notokenizer_files")
    assert run(f"--from={tmp_path}/L", f"--to={tmp_path}/again", *how) == 0
    for path in (written.top / "P").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert run(given, base, f"--to={tmp_path}/whole", "--merge_lora") == 0
    same(pasta_jax.load(tmp_path / "whole").params, written.merged)
    loaded = [pasta_jax.load(tmp_path / name) for name in ("L", "whole")]
    assert {(model.positions, model.max_depth) for model in loaded} == {(Positions("const", 40), 2)}
    # Training goes on from the adapters themselves, not from new ones beside the merged weights.
    config = dataclasses.replace(written.config, init_from=str(tmp_path / "L"), param_dtype="float32")
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    start = starting_weights(config, loaded[0].tokenizer, make_update(config, mesh, sft), mesh)
    same(start[:2], (written.adapters, frozen))
    state = jax.eval_shape(lambda: TrainState(trained, {}, jnp.int32(3)))
    with (
        Checkpoints(tmp_path / "L", about.config, about.load_tokenizer()) as checkpoints,
        pytest.raises(CheckpointError, match="holds weights alone.*init_from="),
    ):
        checkpoints.restore(state)
    assert run(f"--from={tmp_path}/whole", f"--to={tmp_path}/hf", "--noparity") == 0
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] is not None


def test_what_the_commands_refuse(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, base, to = f"--from={written.top}/P", f"--base={written.base}", f"--to={tmp_path}/x"
    for arguments, message in (
        ([given, to], "holds adapters. Add --base=WORKDIR"),
        ([given, to, f"--base=hf:{written.top}/hf"], "is no workdir. Convert it first"),
        ([given, to, base, "--dtype=bfloat16"], "--dtype goes with --merge_lora here"),
        ([given, to, base, "--extend_tokenizer"], "--extend_tokenizer is for whole models"),
        ([given, to, base, "--base_name=a/b"], "--base_name is for exports"),
        ([f"--from=hf:{written.top}/hf", to, "--base_name=a/b"], "--base_name is for exports of adapters"),
        (
            [f"--from={written.base}", to, "--notokenizer_files"],
            "--tokenizer_files is for exports of adapters",
        ),
        ([f"--from=peft:{written.top}/hf", to, base], "it has no adapter_config.json"),
        (
            [f"--from={written.top}/L", f"--to={tmp_path}/w", "--merge_lora", "--base_name=a/b"],
            "for exports of",
        ),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="holds adapters, which need their base: add --base=WORKDIR"):
        pasta_jax.load(written.top / "P")
    with pytest.raises(ValueError, match="has its own tokenizer"):
        pasta_jax.load(written.top / "P", base=written.base, extend_tokenizer=True)
    with pytest.raises(ValueError, match="base=.* holds adapters, no whole model"):
        pasta_jax.load(written.top / "P", base=written.top / "P")
    with pytest.raises(CheckpointError, match="--from=peft:.*/P --base=WORKDIR --to=WORKDIR"):
        find_checkpoint(written.top / "P")
    place = place_of(f"peft:{written.top}/P")
    assert place == place_of(written.top / "P") and identity_of(place)["checkpoint"] == str(place)
    assert identity_of(written.base)["checkpoint"] == str(find_checkpoint(written.base))


def changed_config(**fields: Any) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        tree = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(tree | fields))

    return change


def changed_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NOT_OURS = {
    "kind": (changed_config(peft_type="IA3"), "peft_type='IA3': only LORA is read"),
    "dora": (changed_config(use_dora=True), "use_dora=True: DoRA is not known here.*merge_and_unload"),
    "whole modules": (
        changed_config(modules_to_save=["lm_head"]),
        r"modules_to_save=\['lm_head'\]: there is nothing",
    ),
    "bias": (changed_config(bias="all"), "bias='all': adapters have no biases here"),
    "changed base": (
        changed_config(init_lora_weights="pissa"),
        "init_lora_weights='pissa': with it the base's own",
    ),
    "ranks": (changed_config(rank_pattern={"q_proj": 4}), "rank_pattern=.*: there is nothing for it here"),
    "some layers": (changed_config(layers_to_transform=[0]), r"layers_to_transform=\[0\]: there is nothing"),
    "a later field": (changed_config(use_novelty=3), "use_novelty=3: there is nothing for it here"),
    "rank": (changed_config(r=4), r"q_proj.lora_A.weight is \[3, 16\], \[4, 16\] by the base"),
    "no rank": (changed_config(r=0), "r=0: must be a number above 0"),
    "rows": (
        changed_config(trainable_token_indices=[5, 5]),
        "trainable_token_indices=.*: must be different ids",
    ),
    "no rows": (
        changed_config(trainable_token_indices=None),
        "trainable_token_indices=None: the tensors have rows of",
    ),
    "magnitudes": (
        changed_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(3, np.float32)})),
        r"q_proj.lora_magnitude_vector: there is nothing for it here \(DoRA\)",
    ),
    "other modules": (
        changed_tensors(
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.ones((3, 16), np.float32)})
        ),
        r"lm_head.lora_A.weight: there is nothing for it here \(adapters go with q_proj, k_proj",
    ),
    "embedding": (
        changed_tensors(
            lambda t: t.update({f"{Q[:23]}embed_tokens.lora_embedding_A": np.ones((3, 384), np.float32)})
        ),
        r"embed_tokens.lora_embedding_A: there is nothing for it here \(adapters of the embedding\)",
    ),
    "half": (
        changed_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        r"q_proj.lora_B.weight is not there, \[24, 3\]",
    ),
    "more layers": (
        changed_tensors(
            lambda t: t.update({f"{Q.replace('.0.', '.9.')}.lora_A.weight": np.ones((3, 16), np.float32)})
        ),
        "layers.9.self_attn.q_proj.lora_A.weight is there, no such matrix by the base",
    ),
    "integers": (
        changed_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 16), np.int32)})),
        "lora_A.weight is I32; F32, BF16, F16 are taken",
    ),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}. Other files are pickles"),
    "sizes": (
        lambda folder: edited(folder / TRAINED, sizes={"num_layers": 9}),
        "num_layers is 9 by .*, 3 by the base",
    ),
    "format": (
        lambda folder: edited(folder / TRAINED, format=2),
        "format=2: this version of pasta_jax reads format 1",
    ),
    "values": (lambda folder: edited(folder / TRAINED, base="AA"), "pasta_adapter.json is damaged"),
    "tags": (
        lambda folder: edited(folder / "pasta_tags.json", **{"<sync/>": 300}),
        "the tag '<sync/>' is id 300 by",
    ),
}


def edited(file: pathlib.Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_we_have_nothing_for_is_refused_by_its_name(
    name: str, written: Written, tmp_path: pathlib.Path
) -> None:
    change, message = NOT_OURS[name]
    change(folder := written.folder(tmp_path))
    about = read_metadata(find_checkpoint(written.base))
    with pytest.raises(InterchangeError, match=message) as caught:
        open_adapters(folder).fit(about.config.model, about.load_tokenizer(), written.base)
    assert "\n" not in str(caught.value)


def test_whose_base_it_is(
    written: Written,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another dtype is the same base, fewer bits are nearly the same, and other weights are refused."""
    monkeypatch.setattr(logging.getLogger("pasta_jax"), "propagate", True)
    about = read_metadata(find_checkpoint(written.base))
    folder = open_adapters(written.top / "P")
    wanted = folder.fit(about.config.model, about.load_tokenizer(), written.base)
    base, rng = load_params(written.base)[0], np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "float16"):
        folder.read(wanted, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), base), "here")
    assert not caplog.records
    noisy = jax.tree.map(lambda x: x * (1 + 0.1 * rng.normal(size=x.shape)), base)
    folder.read(wanted, noisy, "here")
    assert "The weights in here are not quite those of org/model" in caplog.text
    others = jax.tree.map(lambda x: x[::-1] if x.ndim > 1 else x, base)
    with pytest.raises(
        InterchangeError, match="adapters for other weights than those in here.*beside org/model"
    ):
        folder.read(wanted, others, "here")
    (unknown := written.folder(tmp_path)).joinpath(TRAINED).unlink()
    read = open_adapters(unknown).read(wanted, others, "here")
    same(read, written.adapters)  # nothing is known, so nothing is refused


def test_other_scales_and_rows_of_one_table(written: Written, tmp_path: pathlib.Path) -> None:
    """Rank-stabilised adapters; and of untied tables only the embedding's rows, as PEFT's list means."""
    folder = written.folder(tmp_path)
    rows = list(written.config.lora.rows)
    changed_config(use_rslora=True, trainable_token_indices=rows)(folder)
    head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    changed_tensors(lambda t: t.pop(head, None))(folder)
    adapters = open_adapters(folder)
    assert adapters.lora == dataclasses.replace(written.config.lora, alpha=adapters.lora.alpha)
    assert adapters.lora.alpha == pytest.approx(12 * 3**0.5)
    found = pasta_jax.load(folder, base=written.base).params
    base = load_params(written.base)[0]
    if "head" in base:
        np.testing.assert_array_equal(found["head"], base["head"])
    same(found["embed"], written.merged["embed"])
    q = written.adapters["layer_1"]["attn"]
    delta = np.einsum("dr,rnh->dnh", q["q_proj_lora_a"], q["q_proj_lora_b"]) * 12 / 3**0.5
    expected = np.asarray(base["layer_1"]["attn"]["q_proj"]) + delta
    np.testing.assert_allclose(found["layer_1"]["attn"]["q_proj"], expected, atol=1e-5)


def test_in_bfloat16_peft_says_the_same(written: Written) -> None:
    """The tensors are in bfloat16 and both compute in float32; of all ids but those that promise."""
    torch, transformers, peft = peft_or_skip()
    tokens = some_tokens(written.config.model, written.config.lora.rows)
    base = transformers.AutoModelForCausalLM.from_pretrained(written.top / "hf", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(written.top / "P")).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
    model = pasta_jax.load(written.top / "P", base=written.base)
    found = logits_here(model.config, Lora(), model.params, tokens)
    allowed = np.ones(found.shape[-1], bool)
    allowed[list(model.tokenizer.vocabulary.tag_ids.values())] = False
    np.testing.assert_allclose(found[..., allowed], expected[..., allowed], atol=1e-3)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("stable", [False, True])
def test_what_peft_made_is_read(stable: bool, written: Written, tmp_path: pathlib.Path) -> None:
    """Of some matrices, with both scales, and with rows of the embedding."""
    torch, transformers, peft = peft_or_skip()
    rows = [7, 300, 9]
    base = transformers.AutoModelForCausalLM.from_pretrained(written.top / "hf", dtype=torch.float32)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=stable,
        target_modules=["down_proj", "q_proj", "o_proj"],
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
            weight += 0.1 * torch.randn_like(weight)
        tokens = some_tokens(written.config.model, rows * 2)
        expected = adapted(torch.tensor(tokens)).logits.numpy()
    adapted.save_pretrained(tmp_path / "P")
    model = pasta_jax.load(tmp_path / "P", base=written.base)
    found = logits_here(model.config, Lora(), model.params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    plain = pasta_jax.load(written.base)
    assert np.abs(found - logits_here(plain.config, Lora(), plain.params, tokens)).max() > 0.1
    assert run(f"--from={tmp_path}/P", f"--base={written.base}", f"--to={tmp_path}/L") == 0
    same(pasta_jax.load(tmp_path / "L").params, model.params)
