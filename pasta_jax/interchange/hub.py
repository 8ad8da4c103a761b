"""A model's files from the Hugging Face hub, by huggingface_hub: `org/name` to a folder on this machine."""

from __future__ import annotations

import importlib
import re
from typing import Any

from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import KEPT
from pasta_jax.interchange.reading import ADAPTERS
from pasta_jax.tokens.load import TAGS_FILE

WANTED = (*KEPT, "model*.safetensors", TAGS_FILE, ADAPTERS)
"""What is downloaded; never a pickle."""

UNWANTED = ("original/*", "*.bin", "*.pt", "*.pth", "*.gguf", "onnx/*")

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Of a repository there: org/name."""


def download(name: str) -> str:
    """The folder with a repository's files, from the cache where they are there already.

    Args:
      name: org/name; the newest of its main branch is taken.

    Raises:
      InterchangeError: the package is not installed, access is refused, there is no such repository, or no network
        and nothing in the cache; each with what to do.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        errors: Any = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise InterchangeError(
            f'Downloading {name} needs huggingface_hub: pip install -e ".[hf]". '
            "Or give a folder that you have: hf:DIRECTORY."
        ) from error
    url = f"https://huggingface.co/{name}"
    try:
        return str(hub.snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except errors.GatedRepoError as error:
        raise InterchangeError(
            f"Access to {name} refused. Accept the licence at {url}, then set HF_TOKEN to a token of yours "
            "(https://huggingface.co/settings/tokens)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InterchangeError(
            f"There is no {name} on the hub, or it is private. Look at {url}; for a private one set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InterchangeError(
            f"{name} is not in the cache, and the hub cannot be reached ({_first_line(error)}). Connect, unset "
            "HF_HUB_OFFLINE, or give a folder that you have: hf:DIRECTORY."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InterchangeError(
            f"Downloading {name} failed: {_first_line(error)}. Try again; see {url}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
