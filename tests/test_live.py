"""Answers on a terminal while they are decoded, and a conversation as a person has it."""

from __future__ import annotations

import json
import os
import random
import types
from typing import Any

import pytest

from pasta_jax.decoding.streaming import Event
from pasta_jax.live import screen
from tests.helpers.commands import on_terminal
from tests.helpers.terminal import Terminal


@pytest.mark.parametrize("size", [(15, 4), (30, 8), (60, 30)])
def test_however_it_is_drawn_the_text_is_left_on_the_terminal(seed, monkeypatch, size):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size(size))
    for rng in (random.Random(f"{seed} {i}") for i in range(20)):
        terminal = Terminal(*size)
        terminal.write("before\n" * rng.randrange(40))
        above = len(terminal.lines) - 1
        drawn = screen.Screen(terminal, colours=rng.random() < 0.5)
        looks, text = document(rng)
        for number, events in enumerate(looks, 1):
            drawn.update([*events, *[Event("done")] * (number == len(looks))])
        expected = screen.wrapped(((0, each) for each in text), size[0] - 1)
        assert [line.rstrip() for line in terminal.lines[above:-1]] == [
            "".join(part for _, part in line).rstrip() for line in expected
        ]


def document(rng):
    """Events in looks, and the text of the document that they build."""
    parts: dict[int, list[str | int]] = {0: []}
    growing, looks = [0], []
    while growing:
        events = []
        for _ in range(rng.randrange(12)):
            if not growing:
                break
            thread = rng.choice(growing)
            what = rng.random()
            if what < 0.7:
                text = "".join(rng.choice("ab cd 東\n") for _ in range(rng.randrange(1, 9)))
                parts[thread].append(text)
                events.append(Event("text", branch=thread, text=text))
            elif what < 0.8 and len(parts) < 7:
                branch = len(parts)
                parts[thread].append(branch)
                parts[branch] = []
                growing.append(branch)
                events.append(Event("promise", branch=branch, parent=thread))
            elif thread or growing == [0]:
                growing.remove(thread)
                events.append(Event("closed", branch=thread))
        looks.append(events)

    def text_of(thread):
        return "".join(text_of(part) if isinstance(part, int) else part for part in parts[thread])

    return looks, text_of(0)


def test_a_word_that_moves_up_when_its_thread_ends(monkeypatch):
    """The mark at its end had pushed it into the next line; the line above must not have scrolled away."""
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((11, 4)))
    terminal = Terminal(11, 4)
    drawn = screen.Screen(terminal, colours=False)
    events = [
        Event("text", text="first\nx "),
        Event("promise", branch=1, parent=0),
        Event("text", branch=1, text="12345678"),
        Event("text", text="\nbelow\nbelow"),
    ]
    drawn.update(events)
    assert terminal.lines == ["first", "x ", "12345678▌", "threads: 2", ""]
    drawn.update([Event("closed", branch=1), Event("closed"), Event("done")])
    assert terminal.lines == ["first", "x 12345678", "below", "below", ""]


def test_lines_are_broken_at_blanks():
    characters = [*((0, each) for each in "aa bbb cc\n東京 "), *((1, each) for each in "d 1234567")]
    lines = screen.wrapped(characters, 6)
    assert lines == [[(0, "aa bbb")], [(0, "cc")], [(0, "東京 "), (1, "d")], [(1, "123456")], [(1, "7")]]


def test_branches_grow_side_by_side_in_their_colours(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((40, 9)))
    terminal = Terminal(40, 9)
    drawn = screen.Screen(terminal, colours=True)
    drawn.update(
        [
            Event("text", text="Two rivers:\n"),
            Event("promise", branch=1, parent=0, topic="Nile"),
            Event("text", branch=1, text="- the Nile"),
            Event("text", text="\n"),
            Event("promise", branch=2, parent=0, topic="Rhine"),
            Event("text", branch=2, text="- the"),
        ],
    )
    assert terminal.lines == ["Two rivers:", "- the Nile▌", "- the▌▌", "threads: 3", ""]
    assert "\x1b[36m- the Nile▌\x1b[0m" in terminal.written and "\x1b[33m- the▌\x1b[0m" in terminal.written
    drawn.update([*(Event("closed", branch=k) for k in (1, 2, 0)), Event("done")])
    assert terminal.lines == ["Two rivers:", "- the Nile", "- the", ""]


def test_a_stop_string_ends_the_text(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((40, 9)))
    terminal = Terminal(40, 9)
    drawn = screen.Screen(terminal, colours=False)
    result: Any = types.SimpleNamespace(text="The Nile")
    drawn.update([Event("text", text="The Nile. The"), Event("closed")])
    drawn.update([Event("done", result=result)])
    assert terminal.lines == ["The Nile", ""]


def test_controls_in_a_text_are_not_the_terminals():
    lines = screen.wrapped([(0, each) for each in "a\x1b[2J\tb\r\x0ec\x9b"], 40)
    assert lines == [[(0, "a�[2J b �c�")]]


STREAMED = """if True:
    import signal, sys
    import pasta_jax
    from pasta_jax import Event
    from pasta_jax import __main__ as verb

    def decode(model, prompt, *, stream, **options):
        stream(Event("text", text="Two rivers: "))
        stream(Event("promise", branch=1, parent=0, topic="Nile"))
        stream(Event("text", text=" Both are long."))
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    pasta_jax.decode, pasta_jax.load = decode, lambda path, **options: None
    sys.argv = ["pasta_jax", "--ckpt=W", "--stream", "Two rivers?"]
    verb.command()
"""


@pytest.mark.slow
def test_ctrl_c_leaves_the_settled_text_of_one_answer():
    with on_terminal("-c", STREAMED) as person:
        assert person.status() == 130
        assert person.shown.endswith(" Both are long.\x1b[0m\x1b8\x1b[K\r\nInterrupted.\r\n"), person.shown


# ---------------------------------------------------------------------------------------------- conversations


CHATTY = """if True:
    import json, os, sys, time
    import pasta_jax
    from pasta_jax import __main__ as verb
    from pasta_jax.decoding.compiled import Compiled
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.testing import WordTokenizer
    from tests.helpers.chatty import chatty_model

    encode, warm_up, decode_chunk = WordTokenizer.encode_chat, Decoder.warm_up, Compiled.decode_chunk
    slow = False

    def note(what):
        with open(os.environ["ASKED"], "a") as file:
            print(json.dumps(what), file=file)

    def encoded(self, messages):
        global slow
        slow = "slow" in messages[-1]["content"]
        note(messages)
        return encode(self, messages)

    def ready(self):
        warm_up(self)
        Compiled.lower = None  # what is compiled later fails
        note("all is compiled")

    def slowly(self, *arguments):
        time.sleep(1.0 * slow)
        return decode_chunk(self, *arguments)

    WordTokenizer.encode_chat, Decoder.warm_up, Compiled.decode_chunk = encoded, ready, slowly
    pasta_jax.load = lambda path, **options: chatty_model()
    sys.argv = ["pasta_jax", "--ckpt=W", *sys.argv[1:]]
    verb.command()
"""
"""The command with a small random model. It notes what it is asked in the file $ASKED."""

OPTIONS = (
    *("--lanes=4", "--max_branches=7", "--cache_len=120", "--max_new_tokens=60", "--verbosity=-1"),
    *("--temperature=1", "--open_bias=3.5", "--seed=3"),
)
ACCOUNT = r"\x1b\[2m\[branches: [1-9]\d*, steps: [1-9]\d*, seconds: [\d.]+(.*)\]\x1b\[0m\s+(\S*)> "


@pytest.mark.slow
def test_a_conversation(tmp_path):
    file = tmp_path / "asked"
    with on_terminal("-c", CHATTY, *OPTIONS, env={"ASKED": str(file)}) as person:
        person.until("/help (.|\n)*> ")
        person.type("rivers\n")
        answer = person.until(ACCOUNT)
        assert answer[1] == "" and "\x1b[36m" in answer.string, "a branch has its colour"
        person.type("slow rivers\n")
        person.until("threads: [2-9]")
        person.type("\x03")
        broken_off = person.until(ACCOUNT)
        assert broken_off[1] == "; broken off"
        assert broken_off.string.rfind("\x1b[?25h") > broken_off.string.rfind("\x1b[?25l"), (
            "the cursor is back"
        )
        for command, told in {
            "/help": "/reset  begins",
            "/what": "There is no /what.",
            "the " * 130: r"has \d+ tokens, and",  # how many hangs on when the answer was broken off
        }.items():
            person.type(f"{command}\n")
            person.until(f"{told}(.|\n)*> ")
        person.type("world\n")
        person.until(ACCOUNT)
        person.type("/reset\n")
        person.until("A new conversation.(.|\n)*> ")
        person.type("world\n")
        person.until(ACCOUNT)
        person.type("\x04")
        assert person.status() == 0
    start, first, second, too_long, third, after_reset = map(json.loads, file.read_text().splitlines())
    assert start == "all is compiled"
    assert [each["content"] for each in first] == ["rivers"]
    assert second == [*first, second[1], {"role": "user", "content": "slow rivers"}]
    partial = third[3]
    assert third[:3] == second == too_long[:3] and partial["role"] == "assistant"
    assert partial["content"]
    assert [each["content"] for each in third[4:]] == [each["content"] for each in after_reset] == ["world"]


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["\x03", "/quit\n"])
def test_a_conversation_ends(keys):
    """Before anything was asked: no model is needed."""
    code = """if True:
        import types
        from pasta_jax.live import conversation
        conversation.Decoder = lambda *_, **options: types.SimpleNamespace(warm_up=lambda: None)
        options = dict(mode="parallel", max_branches=7, lanes=4, grammar=True, cache_len=None)
        conversation.converse(types.SimpleNamespace(max_depth=1), **options, batch_invariant=False)
    """
    with on_terminal("-c", code) as person:
        person.until("/help (.|\n)*> ")
        for _ in range(10):  # Python misses a Ctrl-C that comes right before it waits for a key
            person.type(keys)
            if person.status(seconds=2) is not None:
                break
        assert person.status() == 0
        assert person.shown.endswith("\n") and "Traceback" not in person.shown


@pytest.mark.slow
def test_what_a_conversation_has_not():
    for flag in ("--mode=both", "--annotated", "--timeline", "--trace=t.html"):
        with on_terminal("-m", "pasta_jax", "--ckpt=W", flag) as person:
            assert person.status() == 2
            name = flag.partition("=t.")[0]
            message = f"{name} is for a single answer, not for a conversation. Add a prompt."
            assert person.shown == f"{message}\r\n"
