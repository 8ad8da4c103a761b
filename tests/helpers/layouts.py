"""The same two examples in files of every layout and kind."""

import contextlib
import gzip
import importlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

ASKED = "Name a river."
ANSWER = 'One: <promise topic="river" tokens=1 /><async>The Nile.</async>'

EXAMPLES = ((ASKED, ANSWER), ("And lakes?", "Baikal."))


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


LAYOUTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prompt/response": lambda a, b: {"prompt": a, "response": b},
    "Alpaca": lambda a, b: {"instruction": a, "input": "", "output": b},
    "Dolly": lambda a, b: {"instruction": a, "context": "", "response": b, "category": "qa"},
    "prompt/completion": lambda a, b: {"prompt": a, "completion": b},
    "prompt/completion, messages": lambda a, b: {
        "prompt": [_message("user", a)],
        "completion": [_message("assistant", b)],
    },
    "messages": lambda a, b: {"messages": [_message("user", a), _message("assistant", b)]},
    "ShareGPT": lambda a, b: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
}
"""A record of a question and its answer in each layout, by the layout's name."""


def write_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The examples in a file of each layout, and of each kind whose package is installed; by name."""
    files: dict[str, bytes] = {}
    for name, record in LAYOUTS.items():
        text = "\n".join(json.dumps(record(*example)) for example in EXAMPLES)
        files[name.replace("/", "-").replace(", ", "-").lower() + ".jsonl"] = text.encode()
    lines = files["messages.jsonl"]
    files["array.json"] = json.dumps(
        [LAYOUTS["ShareGPT"](*example) for example in EXAMPLES], indent=2
    ).encode()
    files["packed.jsonl.gz"] = gzip.compress(lines)
    files["array.json.gz"] = gzip.compress(files["array.json"])
    with contextlib.suppress(ImportError):
        files["packed.jsonl.zst"] = importlib.import_module("zstandard").ZstdCompressor().compress(lines)
    paths = {name: folder / name for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    with contextlib.suppress(ImportError):
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        paths["columns.parquet"] = folder / "columns.parquet"
        rows = [LAYOUTS["messages"](*example) for example in EXAMPLES]
        parquet.write_table(pyarrow.Table.from_pylist(rows), paths["columns.parquet"])
    return paths
