"""Files of records in every layout: each line is used or a listed fault, and no line costs another."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
import tempfile
from typing import Any

from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.layouts import conversation, replaced
from pasta_jax.data.reading import RecordError
from pasta_jax.data.records import read_records
from pasta_jax.data.sources import make_source
from tests.fuzz import hostile
from tests.fuzz.runner import Target, check_message, outcome

GOOD = (
    {
        "prompt": "Name two rivers.",
        "response": 'One: <promise topic="river" tokens=1 /><async>Nile.</async><sync/>',
    },
    {"response": "Paris.", "prompt": "France?", "id": 7},
    {"prompt": "東京 🌍?", "response": "Über\n\u2028 <\\sync/>"},
    {"instruction": "Name a river.", "input": "In Egypt.", "output": "The Nile."},
    {"instruction": "Name a river.", "context": "", "response": "The Nile.", "category": "qa"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "France?"},
            {
                "role": "assistant",
                "content": 'So: <promise topic="a" tokens=1 /><async>Paris. A city.</async>',
            },
            {"role": "user", "content": "Peru?"},
            {"role": "assistant", "content": "Lima. A city. " * 60},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b", "weight": 0},
            {"from": "human", "value": "c"},
            {"from": "gpt", "value": "d"},
        ],
        "system": "Be brief.",
    },
)
KEYS = (
    "prompt",
    "response",
    "n",
    "messages",
    "conversations",
    "completion",
    "input",
    "output",
    "system",
    "weight",
)


def draw(rng: random.Random) -> Any:
    lines: list[Any] = [rng.randrange(len(GOOD)) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.randint(1, 4)):
        lines.insert(rng.randint(0, len(lines)), _line(rng))
    return {
        "lines": lines,
        "ends": rng.choice(("\n", "\n", "\r\n")),
        "bom": rng.random() < 0.2,
        "name": rng.choice(("a.jsonl", "a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz")),
        "is_array": rng.random() < 0.2,
        "turns": rng.choice(("all", "last")),
        "too_long": rng.choice(("drop", "turn", "sentence")),
    }


def _line(rng: random.Random) -> Any:
    """A hostile line, as the text that stands for its bytes, or as parts of one."""
    kind = rng.random()
    if kind < 0.5:
        good: Any = rng.choice(GOOD)
        record = hostile.edited(good, hostile.edits(rng, good, KEYS, rng.randint(1, 2)))
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
    whole = json.dumps(rng.choice(GOOD), ensure_ascii=False).encode()
    hit = hostile.damaged(whole, hostile.damage(rng)) or b""
    return hit.replace(b"\n", b" ").decode("latin-1")[:20_000]


def check(case: Any) -> None:
    parts = [
        json.dumps(GOOD[line], ensure_ascii=False).encode()
        if isinstance(line, int)
        else b"".join(map(hostile.latin, line if isinstance(line, list) else [line]))
        for line in case["lines"]
    ]
    ends, name = case["ends"].encode(), case.get("name", "a.jsonl")
    whole = b"\xef\xbb\xbf" * case["bom"]
    if case.get("is_array"):
        _check_array(whole + b"[" + b",\n".join(parts) + b"]", name.replace("jsonl", "json"))
        return
    whole += ends.join(parts)
    if name.startswith("a.json.") or name == "a.json":  # a list in the first line is not taken for an array
        whole = ends + json.dumps(GOOD[1]).encode() + ends + whole.removeprefix(b"\xef\xbb\xbf")
        parts = [b"", json.dumps(GOOD[1]).encode(), *parts]
        case = case | {"lines": [None, 1, *case["lines"]]}
    with tempfile.TemporaryDirectory() as folder:
        file, invalid = pathlib.Path(folder, name), pathlib.Path(folder, "invalid.jsonl")
        file.write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
        examples, problems = read_records(file)
        for problem in problems:
            check_message(str(problem))
            assert problem.reason and len(problem.reason) < 40
        read_lines = whole.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        there = {i for i, line in enumerate(read_lines, 1) if line.strip()}
        good = {i: GOOD[line] for i, line in enumerate(case["lines"], 1) if isinstance(line, int)}
        used, unused = {e.line for e in examples}, [p.line for p in problems]
        assert used | {*unused} == there and not used & {*unused} and len({*unused}) == len(unused)
        assert good.keys() <= used
        for example in examples:
            record = json.loads(example.raw)
            assert example.line not in good or record == good[example.line]
            changed = conversation(replaced(record, example.turn, "New."))
            answers = [turn.text for turn in changed.turns if turn.role == "assistant"]
            assert answers[example.turn] == "New."
        line: Any
        for line in (*examples, *problems):
            raw = line.raw.encode("utf-8", "surrogateescape")
            assert raw.strip() and raw.strip() in parts[line.line - 1], "the line is not kept as it was"
        config = DataConfig(
            sources=((str(file), 1.0),),
            length=256,
            max_unusable=1.0,
            turns=case.get("turns", "all"),
            too_long=case.get("too_long", "drop"),
        )
        source, _ = outcome(ConfigError, make_source, config, almanac.load_tokenizer(), 0, invalid=invalid)
        text = invalid.read_text() if invalid.exists() else ""
        kept = {json.loads(line)["line"] for line in text.splitlines()}
        numbers = {int(number) for number in source.source.places[:, 3]} if source else set()
        assert numbers | kept == there and not numbers & kept
        fits = {i for i, record in good.items() if "messages" not in record or config.too_long == "sentence"}
        assert fits <= numbers
        assert all(len(source[i]) <= config.length for i in range(len(source) if source else 0))


def _check_array(whole: bytes, name: str) -> None:
    """Elements may hide where others end, but nothing is read that is not said."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, name)
        file.write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
        found, _ = outcome(RecordError, read_records, file)
        if found is not None:
            numbers = sorted({each.line for each in (*found[0], *found[1])})
            assert numbers == [*range(1, len(numbers) + 1)]
            for problem in found[1]:
                check_message(str(problem))


TARGET = Target(draw, check)
