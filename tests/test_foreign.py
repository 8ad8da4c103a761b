"""Files of others: each becomes an object with values of the right type, or one line that names it."""

import json
import pathlib

import numpy as np
import pytest

from pasta_jax import foreign
from pasta_jax.config import Config, ConfigError
from pasta_jax.foreign import Fields, parse_object
from pasta_jax.messages import shown


class Refused(ValueError):
    """The error of a caller."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0)."),
        (b"[1]", "holds [1], not an object."),
        (b"null", "holds None, not an object."),
        (b"[" * 900 + b"]" * 900, "holds [[[[[[[...]]]]]]], not an object."),
        (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at 7."),
        (b'{"a": Infinity}', "is not JSON: it has no number Infinity."),
        (b'{"a": NaN}', "is not JSON: it has no number NaN."),
        (b'{"a": %s}' % (b"1" * 5000), "has a number of thousands of digits."),
        (b"[" * 200_000, "is nested deeper than 64 levels."),
        (b'{"a": ' * 64 + b"{}" + b"}" * 64, "is nested deeper than 64 levels."),
        (b'{"a": {"b": ["\\ud83d"]}}', "holds half a character (U+D83D)."),
        (b'{"\\udc00": 1}', "holds half a character (U+DC00)."),
        (b'{"a": {"b": 1, "b": 2}}', "is damaged: 'b' stands twice in it."),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(data: bytes, message: str) -> None:
    for kind in (Refused, ValueError):
        with pytest.raises(kind) as error:
            parse_object(data, "config.json", kind, unique=True)
        assert str(error.value) == f"config.json {message}"


def test_what_is_one_is_read() -> None:
    tree = {"a": [1, 2.5, None, {"b": "é 🌍 " + "🌍" * 3}], "big": 10**4000}
    for escaped in (True, False):
        assert parse_object(b"\xef\xbb\xbf" + json.dumps(tree, ensure_ascii=escaped).encode(), "x") == tree
    assert parse_object(b'{"a": 1, "a": Infinity}', "x", allow_nan=True) == {"a": float("inf")}
    parse_object(b'{"a": ' * 63 + b"{}" + b"}" * 63, "x")


def test_any_value_is_shown_in_a_short_line() -> None:
    """Also an int with more digits than Python writes."""
    assert shown(10**5000) == "<int of 16610 bits>"
    assert shown([1, {"a": -(10**5000)}]) == "[1, {'a': <int of 16610 bits>}]"
    assert shown(np.ones((2, 1))) == "array([[1.],        [1.]])"
    wide: object = "x" * 99
    for _ in range(5):
        wide = [wide] * 9
    assert len(shown(wide)) == 160
    with pytest.raises(
        ConfigError, match=r"^config.seed must be at most 4294967295, got <int of 16610 bits>\.$"
    ):
        Config(seed=10**5000)


def test_fields_have_types_or_are_named() -> None:
    tree = {
        "two": 2, "half": 0.5, "huge": 10**400, "inf": float("inf"), "true": True, "none": None, "text": "2",
        "list": [1] * 10**6, "inner": {"a": 1},
    }  # fmt: skip
    fields = Fields(tree, "x.json", {"three": 3}, Refused)
    assert (fields.size("two"), fields.size("three"), fields.number("half")) == (2, 3, 0.5)
    assert (fields.size("none", default=0), fields.flag("true")) == (0, True)
    assert fields.choice("text", ["2"], "unknown") == "2"
    assert (fields.inner("inner").size("a"), dict(fields.inner("none").tree)) == (1, {})
    for read, names in (
        (fields.size, ("half", "huge", "inf", "true", "none", "text", "list", "inner")),
        (fields.number, ("huge", "inf", "true", "none", "text", "list", "inner")),
        (fields.flag, ("two", "none", "text", "list", "inner")),
        (fields.inner, ("two", "true", "text", "list")),
        (lambda name: fields.choice(name, {"a": 1}, "unknown"), ("two", "none", "text", "list", "inner")),
    ):
        for name in names:
            with pytest.raises(Refused, match=rf"^x\.json: {name}=") as error:
                read(name)
            assert len(str(error.value)) < 200
    with pytest.raises(Refused, match=r"^x\.json: inner: b=None"):
        fields.inner("inner").size("b")
    with pytest.raises(Refused, match="two=2: must be a whole number, at most 1"):
        fields.size("two", most=1)


def test_files_have_a_limit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_BYTES", 10)
    (tmp_path / "a").write_bytes(b"0123456789")
    assert foreign.read_bytes(tmp_path / "a") == b"0123456789"
    (tmp_path / "a").write_bytes(b"0123456789a")
    with pytest.raises(Refused, match="has more than 10 bytes, more than such a file should have"):
        foreign.read_bytes(tmp_path / "a", Refused)
    for name in ("none", "."):
        with pytest.raises(Refused, match="Cannot read"):
            foreign.read_bytes(tmp_path / name, Refused)
