"""Models from the hub, by a stand-in for huggingface_hub: what is asked for, and what is said when it fails."""

import fnmatch
import pathlib
import sys
import types
from typing import Any

import pytest

from pasta_jax.interchange import hub
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.importing import open_published
from pasta_jax.interchange.origin import KEPT
from tests.helpers.hf_folders import CONFIGS, write_hf_folder

NAMES = (
    "GatedRepoError",
    "RepositoryNotFoundError",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
    "HFValidationError",
)


class Hub:
    """Answers with a folder, or raises the error of a name, as huggingface_hub's derive from one another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: pathlib.Path | str = ""
        http = type("HfHubHTTPError", (OSError,), {})
        missing = type("RepositoryNotFoundError", (http,), {})
        self.errors: dict[str, type[Exception]] = {
            "HfHubHTTPError": http,
            "RepositoryNotFoundError": missing,
            "GatedRepoError": type("GatedRepoError", (missing,), {}),
            "LocalEntryNotFoundError": type("LocalEntryNotFoundError", (FileNotFoundError,), {}),
            "HFValidationError": type("HFValidationError", (ValueError,), {}),
        }
        module, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
        module.snapshot_download = self.download  # type: ignore[attr-defined]
        errors.__dict__.update(self.errors)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    def download(self, name: str, **how: Any) -> str:
        self.asked.append((name, how))
        if self.answer in self.errors:
            raise self.errors[str(self.answer)]("Cannot do it.\nAnd more lines.")
        return str(self.answer)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_a_model_is_known_by_its_name_there(there: Hub, tmp_path: pathlib.Path) -> None:
    write_hf_folder(tmp_path / "snapshot", CONFIGS["gemma"])
    there.answer = tmp_path / "snapshot"
    published = open_published("hub", "google/gemma-2b-it")
    assert published.source == "google/gemma-2b-it" and published.origin is not None
    assert published.origin.source == "google/gemma-2b-it"
    ((name, how),) = there.asked
    assert name == "google/gemma-2b-it"

    def is_wanted(file: str) -> bool:
        wanted, unwanted = how["allow_patterns"], how["ignore_patterns"]
        return any(fnmatch.fnmatch(file, p) for p in wanted) and not any(
            fnmatch.fnmatch(file, p) for p in unwanted
        )

    kept = ["config.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
    kept += ["LICENSE.txt", "Notice", "merges.txt"]
    assert all(map(is_wanted, ["model-00001-of-00002.safetensors", "pasta_tags.json", *kept]))
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in KEPT) for file in kept)
    others = ["pytorch_model.bin", "original/params.json", "original/tokenizer.model", "gemma-2b.gguf"]
    assert not any(map(is_wanted, [*others, "consolidated.00.pth", "onnx/config.json"]))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "GatedRepoError",
            r"refused\. Accept the licence at https://huggingface.co/google/x, then set HF_TOKEN",
        ),
        ("RepositoryNotFoundError", "There is no google/x on the hub, or it is private"),
        ("LocalEntryNotFoundError", r"not in the cache, and the hub cannot be reached \(Cannot do it\)"),
        ("HfHubHTTPError", r"Downloading google/x failed: Cannot do it\. Try again"),
        ("HFValidationError", r"Downloading google/x failed: Cannot do it\."),
    ],
)
def test_what_goes_wrong_there(there: Hub, error: str, message: str) -> None:
    there.answer = error
    with pytest.raises(InterchangeError, match=message) as raised:
        hub.download("google/x")
    assert "more lines" not in str(raised.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InterchangeError, match=r'pip install -e "\.\[hf\]".*use a local folder: hf:DIRECTORY'
    ):
        hub.download("google/gemma-2b-it")


def test_the_errors_are_those_of_the_package() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    assert all(issubclass(getattr(errors, name), Exception) for name in NAMES)
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError), "so it is caught first"


def test_names() -> None:
    assert hub.NAME.fullmatch("google/gemma-2b-it") and hub.NAME.fullmatch("Qwen/Qwen2.5-0.5B")
    for other in ("gemma", "a/b/c", "/a/b", "../b", "~/b", "a b/c"):
        assert not hub.NAME.fullmatch(other)
