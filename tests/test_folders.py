"""What is wrong with a Hugging Face folder is found before a tensor is read, and said with file and tensor."""

import dataclasses
import json
import pathlib
import shutil
import struct
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from pasta_jax import memory
from pasta_jax.interchange import tensors
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.reading import model_config, open_folder, read_params
from tests.helpers.hf_folders import CONFIGS, random_tensors, write_hf_folder

GEMMA = CONFIGS["gemma"]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sound") / "hf"
    write_hf_folder(folder, GEMMA)
    return folder


@pytest.fixture
def folder(sound: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(sound, tmp_path / "hf"))


def cut(folder: pathlib.Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


def edit_index(**changes: object) -> Callable[[pathlib.Path], None]:
    def edit(folder: pathlib.Path) -> None:
        tree = json.loads((folder / INDEX).read_text())
        tree["weight_map"] = {k: v for k, v in (tree["weight_map"] | changes).items() if v is not None}
        (folder / INDEX).write_text(json.dumps(tree))

    return edit


def edit_config(**changes: object) -> Callable[[pathlib.Path], None]:
    def edit(folder: pathlib.Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(**changes: np.ndarray | None) -> Callable[[pathlib.Path], None]:
    """In one file then, without an index."""

    def edit(folder: pathlib.Path) -> None:
        arrays = random_tensors(GEMMA) | {name.replace("__", "."): array for name, array in changes.items()}
        for path in folder.glob("model*"):
            path.unlink()
        kept = {name: array for name, array in arrays.items() if array is not None}
        safetensors.numpy.save_file(kept, folder / "model.safetensors")

    return edit


def edit_header(change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    def edit(folder: pathlib.Path) -> None:
        data = (folder / FIRST).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + length])
        change(tree)
        header = json.dumps(tree).encode()
        (folder / FIRST).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return edit


def write(name: str, content: bytes) -> Callable[[pathlib.Path], None]:
    def change(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(content)

    return change


FAULTS: dict[str, tuple[Callable[[pathlib.Path], object], list[str]]] = {
    "truncated": (cut, [SECOND, "is truncated: ", "is not whole", "Download or copy it again"]),
    "no header": (write(FIRST, b"abc"), [FIRST, "truncated or no safetensors file"]),
    "header too long": (write(FIRST, b"\xff" * 20), [FIRST, "truncated or no safetensors file"]),
    "header no JSON": (write(FIRST, struct.pack("<Q", 4) + b"[1, "), [FIRST, "its header is not JSON"]),
    "header no dict": (
        write(FIRST, struct.pack("<Q", 4) + b"[1] "),
        [FIRST, "its header holds [1], not"],
    ),
    "twice in a header": (
        write(FIRST, struct.pack("<Q", 16) + b'{"a":{}, "a":{}}'),
        [FIRST, "its header is damaged: 'a' stands twice"],
    ),
    "bytes after the end": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"0"),
        [FIRST, "has bytes after its last tensor"],
    ),
    "offsets that overlap": (
        edit_header(lambda t: t[UP].update(data_offsets=[0, 768])),
        [FIRST, "The file is damaged"],
    ),
    "negative shape": (edit_header(lambda t: t[UP].update(shape=[-24, -16])), [FIRST, UP, "damaged"]),
    "shape of infinity": (
        write(
            FIRST,
            struct.pack("<Q", 65) + b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}    ',
        ),
        [FIRST, "its header is not JSON: it has no number Infinity"],
    ),
    "shape of floats": (edit_header(lambda t: t[UP].update(shape=[24.0, 16.0])), [FIRST, UP, "damaged"]),
    "shape of huge numbers": (
        edit_header(lambda t: t[UP].update(shape=[10**4000] * 2)),
        [FIRST, UP, "damaged"],
    ),
    "shape of many dimensions": (
        edit_header(lambda t: t[UP].update(shape=[2] * 10**5)),
        [FIRST, UP, "damaged"],
    ),
    "dtype no text": (edit_header(lambda t: t[UP].update(dtype=["F32"])), [FIRST, UP, "damaged"]),
    "an entry no dict": (edit_header(lambda t: t.update({UP: 3})), [FIRST, UP, "damaged"]),
    "metadata no texts": (edit_header(lambda t: t.update(__metadata__={"a": 1})), [FIRST, "__metadata__"]),
    "unknown dtype": (edit_header(lambda t: t[UP].update(dtype="F4")), [FIRST, UP, "dtype 'F4'"]),
    "a file is missing": (lambda f: (f / SECOND).unlink(), [INDEX, f"{SECOND} is not there"]),
    "index no JSON": (write(INDEX, b"{"), [INDEX, "is not JSON"]),
    "index too deep": (write(INDEX, b"[" * 200_000), [INDEX, "is nested deeper than 64 levels"]),
    "index of numbers": (edit_index(**{NORM: 3}), [INDEX, "is no index of safetensors"]),
    "index without map": (write(INDEX, b"{}"), [INDEX, "is no index of safetensors", "weight_map"]),
    "index empty": (write(INDEX, b'{"weight_map": {}}'), [INDEX, "none at all"]),
    "index leads away": (edit_index(**{NORM: "../hf/" + FIRST}), [INDEX, f"../hf/{FIRST} is not there"]),
    "index wrong file": (edit_index(**{NORM: FIRST}), [f"{NORM} is in {SECOND}; the index says {FIRST}"]),
    "index too little": (edit_index(**{NORM: None}), [f"{NORM} is in {SECOND} and not in the index"]),
    "index too much": (edit_index(**{"model.x": SECOND}), [f"model.x is not in {SECOND}"]),
    "missing": (edit_tensors(model__norm__weight=None), [f"{NORM} [16]: missing from model.safetensors"]),
    "extra": (
        edit_tensors(model__layers__3__x=np.zeros((2, 3), np.float32)),
        ["model.safetensors: model.layers.3.x [2, 3]: there is no such tensor in this model"],
    ),
    "shape": (
        edit_tensors(model__norm__weight=np.zeros(15, np.float32)),
        [f"model.safetensors: {NORM} is [15], [16] by config.json"],
    ),
    "dtype": (
        edit_tensors(model__norm__weight=np.zeros(16, np.int32)),
        [f"model.safetensors: {NORM} is I32; only F32, BF16, F16 are taken"],
    ),
    "other sizes": (
        edit_config(intermediate_size=25),
        [f"{UP} is [24, 16], [25, 16] by config.json", "and 3 more"],
    ),
    "fewer layers": (edit_config(num_hidden_layers=2), ["model.layers.2.", "there is no such tensor"]),
    "architecture": (edit_config(model_type="mamba"), ["config.json", "'mamba'"]),
    "config no JSON": (write("config.json", b"{"), ["config.json is not JSON"]),
    "config too deep": (write("config.json", b"[" * 200_000), ["config.json is nested deeper than 64"]),
    "config no text": (write("config.json", b'{"a": "\xff"}'), ["config.json is not UTF-8: byte 0xff at 7"]),
    "config of huge numbers": (
        write("config.json", b'{"a": %s}' % (b"1" * 5000)),
        ["config.json has a number of thousands of digits"],
    ),
    "config of half a character": (
        write("config.json", b'{"a": "\\ud83d"}'),
        ["config.json holds half a character (U+D83D)"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["is not a Hugging Face folder", "config.json"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(folder: pathlib.Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, parts = FAULTS[fault]
    damage(folder)
    monkeypatch.setattr(tensors, "rows", lambda stored: pytest.fail("a tensor was read"))
    with pytest.raises(InterchangeError) as error:
        open_folder(folder)
    assert [part for part in parts if part not in str(error.value)] == []
    assert str(folder) in str(error.value)


def test_a_tied_head_that_differs(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes reading: after it is known that the model fits."""
    edit_tensors(lm_head__weight=np.zeros((384, 16), np.float32))(folder)
    opened = open_folder(folder)
    with pytest.raises(InterchangeError) as error:
        read_params(opened, model_config(opened))
    parts = [
        str(folder / "model.safetensors"),
        str(folder / "config.json"),
        "lm_head.weight differs from model.embed_tokens.weight",
        '"tie_word_embeddings": false',
    ]
    assert [part for part in parts if part not in str(error.value)] == []
    monkeypatch.setattr(tensors, "rows", lambda stored: pytest.fail("a tensor was read"))
    monkeypatch.setattr(memory, "host_memory", lambda: 100)
    with pytest.raises(InterchangeError, match="does not fit"):
        read_params(open_folder(folder), model_config(opened))


def test_adapters_are_no_model(tmp_path: pathlib.Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        InterchangeError, match="holds PEFT's adapters .adapter_config.json.*merge_and_unload"
    ):
        open_folder(tmp_path)


def test_nothing_is_wrong_with_a_sound_one(folder: pathlib.Path) -> None:
    open_folder(folder)
    edit_tensors()(folder)
    assert open_folder(folder).config.dtype == "float32"
    edit_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(3, np.float32))(folder)
    assert open_folder(folder).ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_one_tensor_in_two_files(folder: pathlib.Path) -> None:
    file = tensors.read_header(str(folder / SECOND))
    with pytest.raises(
        InterchangeError, match=rf"model.layers.2.input_layernorm.weight: twice, in .*{SECOND} and .*{SECOND}"
    ):
        tensors.match((tensors.read_header(str(folder / FIRST)), file, file), [])


def test_pickles_are_not_opened(tmp_path: pathlib.Path, sound: pathlib.Path) -> None:
    shutil.copy(sound / "config.json", tmp_path)
    with pytest.raises(InterchangeError, match="holds neither model.safetensors nor"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InterchangeError, match=r"pytorch_model.bin .* are pickles, which may run any code"):
        open_folder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(folder: pathlib.Path) -> None:
    opened = open_folder(folder)
    cut(folder)
    with pytest.raises(InterchangeError, match=f"{SECOND} ended within {NORM} while it was read"):
        read_params(opened, model_config(opened))


def test_pieces_make_the_whole(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 100)
    original = random_tensors(GEMMA)
    for name, at in open_folder(folder).stored.items():
        pieces = [*tensors.rows(at)]
        assert len(pieces) > 1 or at.nbytes <= 100
        joined = np.concatenate([piece for _, piece in pieces])
        np.testing.assert_array_equal(joined, original[name].astype(joined.dtype))


def test_half_precision_is_read_without_loss(tmp_path: pathlib.Path) -> None:
    original = write_hf_folder(tmp_path / "hf", GEMMA, dtype=np.float16)
    opened = open_folder(tmp_path / "hf")
    config = model_config(opened)
    assert (opened.config.dtype, config.dtype) == ("float16", "float32")
    params = read_params(opened, config)
    np.testing.assert_array_equal(params["embed"]["embedding"], original["model.embed_tokens.weight"])
    assert model_config(opened, dtype="bfloat16", vocab_size=400) == dataclasses.replace(
        GEMMA, dtype="bfloat16", vocab_size=400
    )


def test_a_clone_without_its_large_files(folder: pathlib.Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InterchangeError, match=f"{SECOND} is a pointer of Git LFS.*git lfs pull"):
        open_folder(str(folder))
    (folder / INDEX).unlink()
    with pytest.raises(InterchangeError, match="The index of these shards is missing"):
        open_folder(str(folder))
