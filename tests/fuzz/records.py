"""JSONL of records: every line is a record or a listed fault, and no line costs another."""

from __future__ import annotations

import json
import pathlib
import random
import tempfile
from typing import Any

from pasta_jax.config import DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.records import read_records
from pasta_jax.data.sources import make_source
from tests.fuzz import hostile
from tests.fuzz.runner import Target, check_message

GOOD = (
    {
        "prompt": "Name two rivers.",
        "response": 'One: <promise topic="river" tokens=1 /><async>Nile.</async><sync/>',
    },
    {"response": "Paris.", "prompt": "France?", "id": 7},
    {"prompt": "東京 🌍?", "response": "Über\n\u2028 <\\sync/>"},
)


def draw(rng: random.Random) -> Any:
    lines: list[Any] = [rng.randrange(len(GOOD)) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.randint(1, 4)):
        lines.insert(rng.randint(0, len(lines)), _line(rng))
    return {"lines": lines, "ends": rng.choice(("\n", "\n", "\r\n")), "bom": rng.random() < 0.2}


def _line(rng: random.Random) -> Any:
    """A hostile line, as the text that stands for its bytes, or as parts of one."""
    kind = rng.random()
    if kind < 0.5:
        record = hostile.edited(
            GOOD[0], hostile.edits(rng, GOOD[0], ("prompt", "response", "n"), rng.randint(1, 2))
        )
        try:
            line = json.dumps(record, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, RecursionError):
            return "{"
        return line.replace(b"\n", b" ").decode("latin-1")[:20_000]
    if kind < 0.6:
        digits: Any = {"$repeat": ["9", rng.choice((20, 5_000))]}
        return ['{"prompt": "a", "response": "b", "n": ', digits, rng.choice(("}", ".5}", "e5}", ""))]
    if kind < 0.7:
        opening = rng.choice(("[", '{"a":', "(", "\\"))
        return ['{"prompt": "a", "response": ', {"$repeat": [opening, rng.choice((9, 2_000, 100_000))]}]
    if kind < 0.8:
        return [
            '{"prompt": "a", "response": "',
            {"$repeat": [rng.choice(("long ", "<", "\\ud83d")), 20_000]},
            '"}',
        ]
    good = json.dumps(rng.choice(GOOD), ensure_ascii=False).encode()
    hit = hostile.damaged(good, hostile.damage(rng)) or b""
    return hit.replace(b"\n", b" ").decode("latin-1")[:20_000]


def check(case: Any) -> None:
    parts = [
        json.dumps(GOOD[line], ensure_ascii=False).encode()
        if isinstance(line, int)
        else b"".join(map(hostile.latin, line if isinstance(line, list) else [line]))
        for line in case["lines"]
    ]
    ends = case["ends"].encode()
    whole = b"\xef\xbb\xbf" * case["bom"] + ends.join(parts)
    with tempfile.TemporaryDirectory() as folder:
        file, invalid = pathlib.Path(folder, "records.jsonl"), pathlib.Path(folder, "invalid.jsonl")
        file.write_bytes(whole)
        examples, problems = read_records(file)
        for problem in problems:
            check_message(str(problem))
        read_lines = whole.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        there = [i for i, line in enumerate(read_lines, 1) if line.strip()]
        good = {i: GOOD[line] for i, line in enumerate(case["lines"], 1) if isinstance(line, int)}
        assert sorted([*(e.line for e in examples), *(p.line for p in problems)]) == there
        read = {example.line: example for example in examples}
        for i, record in good.items():
            assert read[i].prompt == record["prompt"] and json.loads(read[i].raw) == record
        line: Any
        for line in (*examples, *problems):
            raw = line.raw.encode("utf-8", "surrogateescape")
            assert raw.strip() and raw.strip() in parts[line.line - 1], "the line is not kept as it was"
        config = DataConfig(sources=((str(file), 1.0),), length=256)
        source: Any = make_source(config, almanac.load_tokenizer(), 0, invalid=invalid)
        kept = [json.loads(line) for line in invalid.read_text().splitlines()] if invalid.exists() else []
        assert len(source) + len(kept) == len(there) and not good.keys() & {each["line"] for each in kept}
        assert all(len(source[i]) <= config.length for i in range(len(source)))


TARGET = Target(draw, check)
