"""Downloads a model from the Hugging Face hub: `org/name` to a local folder."""

from __future__ import annotations

import re

from pasta_jax.extras import optional
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import KEPT
from pasta_jax.interchange.reading import ADAPTERS
from pasta_jax.tokens.load import TAGS_FILE

WANTED = (*KEPT, "model*.safetensors", TAGS_FILE, ADAPTERS)
"""What is downloaded; never a pickle."""

UNWANTED = ("original/*", "*.bin", "*.pt", "*.pth", "*.gguf", "onnx/*")

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""A repository on the hub: org/name."""


def download(name: str) -> str:
    """Downloads a repository, or finds it in the cache, and returns its folder.

    Args:
      name: org/name; the newest commit of its main branch is used.

    Raises:
      InterchangeError: the package is not installed, access is refused, the repository does not exist, or there is
        neither a network nor a cached copy. The message says what to do.
    """
    try:
        hub = optional("huggingface_hub", "hf", f"Downloading {name}")
        errors = optional("huggingface_hub.errors", "hf", f"Downloading {name}")
    except ImportError as error:
        raise InterchangeError(f"{error} Or use a local folder: hf:DIRECTORY.") from error
    url = f"https://huggingface.co/{name}"
    try:
        return str(hub.snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except errors.GatedRepoError as error:
        raise InterchangeError(
            f"Access to {name} refused. Accept the licence at {url}, then set HF_TOKEN to your token "
            "(https://huggingface.co/settings/tokens)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InterchangeError(
            f"There is no {name} on the hub, or it is private. See {url}; for a private repository set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InterchangeError(
            f"{name} is not in the cache, and the hub cannot be reached ({_first_line(error)}). Connect, unset "
            "HF_HUB_OFFLINE, or use a local folder: hf:DIRECTORY."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InterchangeError(
            f"Downloading {name} failed: {_first_line(error)}. Try again; see {url}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
