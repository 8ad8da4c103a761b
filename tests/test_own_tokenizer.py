"""A tokenizer for one's own text: the same for the same text, of a sample if there is much, without its tags."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
import types
from typing import Any

import pytest

from pasta_jax import tokenizer
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.lang import tags
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.pieces import LONGEST, sentences_of
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers.commands import ROOT, python

WORDS = (
    "amber",
    "bracket",
    "cobalt",
    "dowel",
    "ember",
    "flange",
    "gasket",
    "hinge",
    "ingot",
    "jigsaw",
    "mallet",
)


def records(path: pathlib.Path, count: int = 300) -> pathlib.Path:
    """Annotated answers about a workshop."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            a, b = rng.sample(WORDS, 2)
            tag = f'<promise topic="{a}" tokens=1 /><async>The {a} weighs {i} grams.</async><sync/>'
            file.write(
                json.dumps({"prompt": f"Compare {a} and {b}!", "response": f"{tag} So does the {b}."}) + "\n"
            )
    return path


def test_it_has_what_training_needs_and_not_the_tags_of_the_text(tmp_path: pathlib.Path) -> None:
    files = [str(records(tmp_path / "shop.jsonl")), str(ROOT / "LICENSE")]
    made = tokenizer.train(files, 600)
    assert made.model == tokenizer.train(files, 600).model, "the same text gives the same model"
    assert made.pieces == 600 and made.texts > 600
    measured = made.measured
    assert measured.bytes > 2 * measured.tokens
    assert 0.99 * measured.characters < measured.covered < measured.characters, (
        "rare ones are spelled by bytes"
    )
    (tmp_path / "shop.model").write_bytes(made.model)
    loaded = load_tokenizer(tmp_path / "shop.model")
    pieces = loaded.vocabulary.pieces
    assert loaded.usage.chat == "turns" and set(loaded.vocabulary.tag_ids) == set(tags.PIECES)
    assert b"mallet" in b"".join(pieces) and not any(
        b"promise" in piece for piece in pieces if piece[:1] != b"<"
    )
    assert not any(piece.strip(b" ").isdigit() and len(piece.strip(b" ")) > 1 for piece in pieces), (
        "single digits"
    )
    text = "  The mallet <sync/> weighs 12 g,\n\n\u00fc \u6771\u4eac 5."
    assert loaded.vocabulary.text(loaded.encode(text)) == text
    assert f"{len(pieces)} pieces, trained on" in made.report("shop.model")


def test_columns_conversations_and_plain_text(tmp_path: pathlib.Path) -> None:
    asked = {"q": "What is zinc?", "a": "A metal."}
    (tmp_path / "a.jsonl").write_text(json.dumps(asked))
    columns = DataConfig(columns=(("prompt", "q"), ("response", "a")))
    assert [*tokenizer._all([str(tmp_path / "a.jsonl")], columns)] == ["What is zinc?", "A metal."]
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "b.jsonl").write_text(json.dumps(messages))
    assert [*tokenizer._all([str(tmp_path / "b.jsonl")], DataConfig())] == [text for _, text in turns], (
        "each once"
    )
    text = "\ufeffOne.\r\nTwo.\n\nThree." + "x" * 2**21
    (tmp_path / "c.txt").write_text(text, newline="")
    read = [*tokenizer._all([str(tmp_path / "c.txt")], DataConfig())]
    assert "".join(read) == text[1:] and read[0] == "One.\r\nTwo.\n\n" and max(map(len, read)) <= 2**20
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(asked).encode()))
    assert [*tokenizer._all([str(tmp_path / "a.jsonl.gz")], columns)] == ["What is zinc?", "A metal."]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "<promise/><async>Ho</async>"}))
    forks = DataConfig(dialect="apar")
    assert [*tokenizer._all([str(tmp_path / "d.jsonl")], forks)] == ["Hi", "Ho"]
    long = " ".join(WORDS * 100) + "\u6771" * 3000
    cut = sentences_of(f"{long}\n{long}")
    assert "".join(cut) == long * 2 and max(len(each.encode()) for each in cut) <= LONGEST


def test_unusable_records_are_counted(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = records(tmp_path / "shop.jsonl", 8)
    with path.open("a") as file:
        file.write('{"text": 1}\n?\n')
    with pytest.raises(
        ConfigError,
        match=r"2 of 10 records cannot be used \(20.0%\): 1 no known layout, 1 not JSON\. Fix them",
    ):
        [*tokenizer._all([str(path)], DataConfig())]
    assert len([*tokenizer._all([str(path)], DataConfig(max_unusable=0.2))]) == 16
    assert "2 of 10 records cannot be used (20.0%): 1 no known layout, 1 not JSON" in caplog.text


def test_of_much_text_a_sample_is_kept() -> None:
    """Within its bytes, from all over, the same again; of little text all."""

    def sample(count: int, seed: int = 0) -> tokenizer.Sample:
        kept = tokenizer.Sample(10_000, seed)
        for i in range(count):
            kept.add(f"{i:06d} \u00fc")
            assert kept.bytes <= 10_000
        return kept

    assert sample(1000).texts == [f"{i:06d} \u00fc" for i in range(1000)]
    kept = sample(20_000)
    assert kept.bytes == sum(len(text.encode()) for text in kept.texts) > 4_000
    halves = [sum(text < "010000" for text in kept.texts), len(kept.texts)]
    assert 0.4 < halves[0] / halves[1] < 0.6
    assert kept.texts == sample(20_000).texts != sample(20_000, seed=1).texts


def test_impossible_vocabularies_are_refused_with_those_that_are_possible(tmp_path: pathlib.Path) -> None:
    data = [str(records(tmp_path / "shop.jsonl", 60))]
    with pytest.raises(
        TokenizerError, match=r"gives at most (\d+) pieces, not 9,000. Take .* at most \1"
    ) as fault:
        tokenizer.train(data, 9000)
    most = int(str(fault.value).split("at most ")[1].split()[0])
    assert tokenizer.train(data, most).pieces == most
    with pytest.raises(TokenizerError, match=r"needs at least (\d+) pieces.* not 99. Take .* at least \1"):
        tokenizer.train(data, 99)


def test_the_command(tmp_path: pathlib.Path) -> None:
    data, to = records(tmp_path / "shop.jsonl", 60), tmp_path / "shop.model"
    done = python("-m", "pasta_jax.tokenizer", f"--text={data},LICENSE", "--vocab_size=600", f"--to={to}")
    assert done.returncode == 0 and f"{to} has 600 pieces" in done.stdout, done.stderr
    assert "--config.model.vocab_size=600" in done.stdout and load_tokenizer(to)


def test_mistakes_are_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizer, "begin_alone", lambda: None)
    data, empty, to = (
        str(records(tmp_path / "shop.jsonl", 60)),
        str(tmp_path / "empty.jsonl"),
        tmp_path / "to.model",
    )
    pathlib.Path(empty).write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    def said(*overrides: str, **changes: Any) -> str:
        given = dict(
            text=[data], vocab_size=600, to=str(to), sample_mb=1.0, held_out=0.1, coverage=1.0, seed=0
        )
        values: Any = types.SimpleNamespace(**given | changes)
        with pytest.raises(SystemExit, match="^2$"):
            tokenizer.main(["tokenizer"], values=values, overrides=overrides)
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        return err

    assert said(to="").startswith(
        "Add --text=FILE,FILE --vocab_size=8000 --to=FILE.model. Trains a tokenizer"
    )
    assert said(to="x.json") == "--to=x.json must end in .model, by which a SentencePiece model is known.\n"
    assert said(to=str(ROOT / "LICENSE")).startswith("--to=")
    assert said(text=["no/such.jsonl"]).startswith("Cannot read no/such.jsonl")
    assert said(text=["no/such.txt"]).startswith("Cannot use no/such.txt: No such file or directory.")
    assert said(text=[str(tmp_path / "latin.txt")]).startswith(
        f"{tmp_path}/latin.txt is not text in UTF-8. Save"
    )
    assert said(text=[empty]) == f"{empty} has no text.\n"
    assert said("data.colums=a=b").startswith('No config field "data.colums". Did you mean')
    assert said(vocab_size=9000).startswith("This text gives at most ")
    assert not to.exists()
    to.write_bytes(b"")
    assert said() == f"--to={to} exists. Remove it, or give another name.\n"
