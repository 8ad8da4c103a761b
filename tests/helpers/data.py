"""Real texts and a real tokenizer, which are not part of this repository.

The environment variable PASTA_TEST_DATA names a folder with `alpaca_eval_responses.jsonl`, which has a JSON object
with an `instruction` and a `response` on each line, `instruction_seeds.jsonl`, with `instruction`, `input` and
`output`, and `llama2_tokenizer.model` of SentencePiece. Tests that need a file which is not there are skipped.
"""

import json
import os
import pathlib

import pytest

FOLDER = pathlib.Path(
    os.environ.get("PASTA_TEST_DATA") or pathlib.Path(__file__).parents[3] / "shared" / "data"
)


def data_file(name: str) -> pathlib.Path:
    """The path of a file in the folder. Skips the test if it is not there."""
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in {FOLDER}; set PASTA_TEST_DATA to a folder that has it")
    return FOLDER / name


def real_responses() -> list[str]:
    lines = data_file("alpaca_eval_responses.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


def real_texts() -> list[str]:
    """Every text of both files that is not empty, once."""
    files = ("alpaca_eval_responses.jsonl", "instruction_seeds.jsonl")
    lines = [line for name in files for line in data_file(name).read_text(encoding="utf-8").splitlines()]
    keys = ("instruction", "input", "output", "response")
    texts = [
        record[key] for line in lines for record in [json.loads(line)] for key in keys if record.get(key)
    ]
    return [*dict.fromkeys(texts)]
