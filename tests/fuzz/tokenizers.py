"""Tokenizers: a text comes back byte for byte, and nothing that it spells becomes a tag or a control token."""

from __future__ import annotations

import collections
import functools
import random
from typing import Any

from pasta_jax.data import almanac
from pasta_jax.tokens.base import TextTokenizer
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome
from tests.helpers import family_folders

NAMES = ("almanac", *family_folders.ALL)
ROLES = ("system", "user", "assistant")


@functools.cache
def tokenizer(name: str) -> TextTokenizer:
    return almanac.load_tokenizer() if name == "almanac" else family_folders.tokenizer(name)


def draw(rng: random.Random) -> Any:
    case = {"tokenizer": rng.choice(NAMES), "text": hostile.text(rng), "role": rng.choice(ROLES)}
    return case | {"dialect": rng.choice(("pasta", "pasta", "apar"))}


def check(case: Any) -> None:
    text, made = hostile.expand(case["text"]), tokenizer(case["tokenizer"]).with_dialect(case["dialect"])
    vocabulary = made.vocabulary
    never = {*vocabulary.tag_ids.values(), *vocabulary.control, *vocabulary.stops}
    broken = any("\ud800" <= character <= "\udfff" for character in text)
    ids, error = outcome(ValueError, made.encode, text)
    if error:
        assert broken and "U+D" in str(error), error
        return
    assert not broken and vocabulary.text(ids) == text
    assert never.isdisjoint(ids), "ordinary text became a control token"
    said, error = outcome(ValueError, made.encode_chat, conversation(case["role"], text))
    if error:
        assert not text.strip(), error
        return
    plain = made.encode_chat(conversation(case["role"], "x"))
    found, marks = (collections.Counter(i for i in ids if i in never) for ids in (said, plain))
    assert found == marks or not text.strip(), "a text changed the marks of a conversation"


def conversation(role: str, text: str) -> list[dict[str, str]]:
    said = {"system": "Be brief.", "user": "Hi.", "assistant": "Hello."} | {role: text}
    return [*({"role": name, "content": said[name]} for name in ROLES), {"role": "user", "content": "Go on."}]


TARGET = Target(draw, check)
