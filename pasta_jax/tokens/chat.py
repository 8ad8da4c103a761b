"""Chat formats: a conversation as the text and control tokens that a model family was tuned on.

A format covers the prompt; `tokens.layout` lays out the answer. The formats are those of the templates published
with the models (`tokenizer_config.json`, `chat_template.jinja`); tests compare them:

  plain     no format: the text and a newline, for base models
  turns     <user> and <model>, of the almanac's tokenizer
  gemma     Gemma 1, 2, 3: <start_of_turn>user ... <end_of_turn>, system text before the first user's
  llama3    Llama 3, 3.1, 3.2, 3.3: <|start_header_id|>user<|end_header_id|> ... <|eot_id|>
  chatml    Qwen 2.5: <|im_start|>user ... <|im_end|>
  qwen3     the same; the answer starts after an empty <think> block, as in the template without thinking
  llama2    [INST] ... [/INST] in letters, <s> before each turn of the user
  mistral   Mistral 0.1 and 0.2: the same, <s> once
  mistral3  Mistral 0.3: [INST] and [/INST] are control tokens

The text of messages stays text: control tokens that it spells are encoded as letters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from pasta_jax.tokens.tokenizer import TokenizerError

Chat: TypeAlias = Literal["auto", "plain", "gemma", "llama3", "chatml", "qwen3", "inst"]
CHATS: tuple[Chat, ...] = get_args(Chat)
"""The formats that a user can request. `inst` is llama2, mistral or mistral3, by vocabulary and template."""

_SWITCHES = "chat=FORMAT of load, --config.data.chat=FORMAT of training, --chat=FORMAT of other verbs"

USER_TURN, MODEL_TURN = "<user>", "<model>"

EMPTY = "The prompt is empty. Give the model something to answer."


@dataclasses.dataclass(frozen=True)
class Mark:
    """A control token by its name."""

    name: str


BOS, EOS = Mark("bos"), Mark("eos")
"""Control tokens by role; `EOS` ends an answer."""

Part: TypeAlias = str | Mark


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation to answer: `turns` alternate user, assistant, ..., user; `system` may be ""."""

    system: str
    turns: tuple[str, ...]

    @property
    def by_user(self) -> list[tuple[bool, str]]:
        """Every turn as (whether it is the user's, its text)."""
        return [(i % 2 == 0, text) for i, text in enumerate(self.turns)]


def dialogue(messages: Sequence[Mapping[str, str]]) -> Dialogue:
    """A list of {"role": "system" | "user" | "assistant", "content": text} as a dialogue.

    Raises:
      ValueError: there is no message, a role is out of turn, or a content is empty or missing; says which.
    """
    if not messages:
        raise ValueError("The conversation has no messages. Give the model something to answer.")
    system, turns = "", list[str]()
    for number, message in enumerate(messages, 1):
        name = f"Message {number} of the conversation"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f'{name} is {message!r:.80}; write {{"role": ..., "content": ...}}.')
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(f"{name}: its content is no text but {type(content).__name__}.")
        if not content.strip():
            raise ValueError(EMPTY if len(messages) == 1 else f"{name} is empty.")
        if role == "system" and number == 1:
            system = content
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            first = ' or "system"' if number == 1 else ""
            raise ValueError(f'{name} has the role {role!r}; "{expected}"{first} is expected there.')
        turns.append(content)
    if len(turns) % 2 == 0:
        raise ValueError("The conversation must end with a message of the user, which the model answers.")
    return Dialogue(system, tuple(turns))


@dataclasses.dataclass(frozen=True)
class Format:
    """A chat format.

    Attributes:
      needs: names of its control tokens.
      end: the one that ends the model's turn; None for the end-of-text token.
      render: the dialogue as text and control tokens. Its second argument is the template's opening, see `choose`.
    """

    needs: tuple[str, ...]
    end: str | None
    render: Callable[[Dialogue, str], list[Part]]


def _plain(d: Dialogue, opening: str) -> list[Part]:
    return [BOS, "".join(f"{text}\n" for text in (d.system, *d.turns) if text)]


def _turns(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS]
    for user, text in d.by_user:
        parts += [Mark(USER_TURN), text, Mark(MODEL_TURN)] if user else [text, EOS]
    if d.system:
        parts.insert(2, d.system + "\n\n")
    return parts


def _gemma(d: Dialogue, opening: str) -> list[Part]:
    start, end = Mark("<start_of_turn>"), Mark("<end_of_turn>")
    parts: list[Part] = [BOS]
    before = f"{d.system}\n\n" if d.system else ""
    for user, text in d.by_user:
        parts += [start, f"{'user' if user else 'model'}\n{before}{text.strip()}", end, "\n"]
        before = ""
    return [*parts, start, "model\n"]


def _llama3(d: Dialogue, opening: str) -> list[Part]:
    def header(role: str) -> list[Part]:
        return [Mark("<|start_header_id|>"), role, Mark("<|end_header_id|>")]

    end = Mark("<|eot_id|>")
    parts: list[Part] = [BOS]
    if opening or d.system:
        parts += [*header("system"), f"\n\n{opening}{d.system.strip()}", end]
    for user, text in d.by_user:
        parts += [*header("user" if user else "assistant"), f"\n\n{text.strip()}", end]
    return [*parts, *header("assistant"), "\n\n"]


def _chatml(d: Dialogue, opening: str) -> list[Part]:
    start, end = Mark("<|im_start|>"), Mark("<|im_end|>")
    parts: list[Part] = []
    if d.system or opening:
        parts += [start, f"system\n{d.system or opening}", end, "\n"]
    for user, text in d.by_user:
        parts += [start, f"{'user' if user else 'assistant'}\n{text}", end, "\n"]
    return [*parts, start, "assistant\n"]


def _qwen3(d: Dialogue, opening: str) -> list[Part]:
    return [*_chatml(d, opening), Mark("<think>"), "\n\n", Mark("</think>"), "\n\n"]


def _llama2(d: Dialogue, opening: str) -> list[Part]:
    # Llama's own tokenizer puts the space before [INST] by itself; ours does not.
    parts: list[Part] = []
    before = f"<<SYS>>\n{d.system}\n<</SYS>>\n\n" if d.system else ""
    for user, text in d.by_user:
        turn = (before + text).strip()
        parts += [BOS, f" [INST] {turn} [/INST]"] if user else [f" {turn} ", EOS]
        before = ""
    return parts


def _mistral(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS]
    before = f"{d.system}\n\n" if d.system else ""
    for user, text in d.by_user:
        parts += [f" [INST] {before}{text} [/INST]"] if user else [f" {text.strip()}", EOS]
        before = ""
    return parts


def _mistral3(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS]
    for number, (user, text) in enumerate(d.by_user):
        if user:
            before = f"{d.system}\n\n" if d.system and number == len(d.turns) - 1 else ""
            parts += [Mark("[INST]"), f" {before}{text}", Mark("[/INST]")]
        else:
            parts += [f" {text.strip()}", EOS]
    return parts


FORMATS: Mapping[str, Format] = {
    "plain": Format((), None, _plain),
    "turns": Format((USER_TURN, MODEL_TURN), None, _turns),
    "gemma": Format(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", _gemma),
    "llama3": Format(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", _llama3),
    "chatml": Format(("<|im_start|>", "<|im_end|>"), "<|im_end|>", _chatml),
    "qwen3": Format(("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>", _qwen3),
    "llama2": Format((), None, _llama2),
    "mistral": Format((), None, _mistral),
    "mistral3": Format(("[INST]", "[/INST]"), None, _mistral3),
}


def choose(requested: str, names: Collection[str], template: str | None) -> tuple[str, str]:
    """The format for a vocabulary.

    Args:
      requested: one of CHATS, or a name in FORMATS.
      names: of the tokens in the vocabulary.
      template: the model's chat template; "" if it has none, None if unknown.

    Returns:
      A name in FORMATS, and the opening, text that the template adds by itself: Qwen 2.5's system message, or the
      dates that start the system message since Llama 3.1.

    Raises:
      TokenizerError: the vocabulary lacks tokens of the format, or the template is of no known format.
    """
    if requested not in CHATS and requested not in FORMATS:
        raise TokenizerError(f"chat={requested!r} is unknown. Use one of {', '.join(CHATS)}.")
    name = _detect(names, template) if requested == "auto" else requested
    if name == "inst":
        by_letters = "llama2" if template is None or "<<SYS>>" in template else "mistral"
        name = "mistral3" if set(FORMATS["mistral3"].needs) <= set(names) else by_letters
    if missing := [need for need in FORMATS[name].needs if need not in names]:
        raise TokenizerError(
            f"The chat format {name} needs {', '.join(missing)}, which this tokenizer lacks. "
            f"Choose plain, or the format that the model was tuned on, with {_SWITCHES}."
        )
    return name, _opening(name, template or "")


def _detect(names: Collection[str], template: str | None) -> str:
    if all(need in names for need in FORMATS["turns"].needs):
        return "turns"
    if template is None:
        families = ("gemma", "llama3", "qwen3", "chatml", "mistral3")
        return next((f for f in families if all(need in names for need in FORMATS[f].needs)), "plain")
    if not template.strip():
        return "plain"
    if "<|im_start|>" in template:
        return "qwen3" if "enable_thinking" in template else "chatml"
    signs = {"<start_of_turn>": "gemma", "<|start_header_id|>": "llama3", "[INST]": "inst"}
    for sign, family in signs.items():
        if sign in template:
            return family
    raise TokenizerError(
        "The model's chat template is of no format known here "
        f"({', '.join(CHATS[2:])}). Choose the nearest of them, or plain, with {_SWITCHES}."
    )


def _opening(name: str, template: str) -> str:
    if name in ("chatml", "qwen3"):
        # A literal between the markers, in whatever way the template's file writes a newline.
        message = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<>\\]+)<\|im_end\|>", template)
        return message.group(1) if message else ""
    if name == "llama3" and (cut := re.search(r"Cutting Knowledge Date: \w+ \d{4}", template)):
        # The template's own day, never today's.
        day = re.search(r'(?:date_string = "|Today Date: )(\d+ \w+ \d{4})', template)
        return f"{cut.group()}\nToday Date: {day.group(1) if day else '26 Jul 2024'}\n\n"
    return ""
