"""Folders of prepared data with a damaged file: the documents as they were, or a refusal in one line."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.prepared import ABOUT, DROPPED, INDEX, TOKENIZER, open_prepared
from pasta_jax.data.reading import RecordError
from pasta_jax.data.shards import shard_name
from pasta_jax.data.sources import make_source
from pasta_jax.prepare.__main__ import prepare
from tests.fuzz import hostile
from tests.fuzz.hostile import hurt
from tests.fuzz.runner import Target, check_message

RECORDS = 90
ANSWER = 'One: <promise topic="river" tokens=1 /><async>Nile.</async><sync/> It is long.'
FILES = (ABOUT, INDEX, TOKENIZER, DROPPED, shard_name(0), shard_name(0), shard_name(1), "dataset_info.json")


@functools.cache
def written() -> pathlib.Path:
    place = pathlib.Path(tempfile.mkdtemp(prefix="prepared-"))
    records = [{"prompt": f"Name river {i}.", "response": ANSWER * (i % 7)} for i in range(RECORDS)]
    (place / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = DataConfig(sources=((str(place / "a.jsonl"), 1.0),), max_unusable=1.0)
    prepare(config, almanac.load_tokenizer(), str(place / "a"), shard=40)
    return place


@functools.cache
def documents() -> list[ThreadedTokens]:
    return [*open_prepared(str(written() / "a"))]


def draw(rng: random.Random) -> Any:
    name = rng.choice(FILES)
    changes = hostile.edits(rng, json.loads((written() / "a" / ABOUT).read_text()), ("made", "x", "bytes"), 2)
    edits = name == ABOUT and rng.random() < 0.6
    return {"file": name, "damage": hostile.damage(rng), "edits": changes if edits else []}


def check(case: Any) -> None:
    expected = documents()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary, "a")
        shutil.copytree(written() / "a", folder)
        if case["edits"]:
            about = hostile.edited(json.loads((folder / ABOUT).read_text()), case["edits"])
            (folder / ABOUT).write_text(json.dumps(about))
        else:
            hurt(folder / case["file"], case["damage"])
        for reads in (_own, _trained):
            try:
                found = reads(folder)
            except (RecordError, ConfigError) as error:
                check_message(str(error))
                continue
            if not case["edits"]:
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one.token, other.token)


def _own(folder: pathlib.Path) -> list[ThreadedTokens]:
    return [*open_prepared(str(folder))]


def _trained(folder: pathlib.Path) -> list[ThreadedTokens]:
    config = DataConfig(sources=((f"prepared:{folder}", 1.0),))
    stream: Any = make_source(config, almanac.load_tokenizer(), seed=0)
    return [*stream.source]


TARGET = Target(draw, check, share=0.5)
