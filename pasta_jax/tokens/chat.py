"""Chat formats: a conversation as the text and control tokens that a model family was tuned on.

A format covers the prompt; `tokens.layout` lays out the answer. The formats are those of the templates published
with the models (`tokenizer_config.json`, `chat_template.jinja`); tests compare them:

  plain     no format: the text and a newline, for base models
  turns     <user> and <model>, of the almanac's tokenizer
  gemma     Gemma 1, 2, 3: <start_of_turn>user ... <end_of_turn>, system text before the first user's
  llama3    Llama 3, 3.1, 3.2, 3.3: <|start_header_id|>user<|end_header_id|> ... <|eot_id|>
  chatml    Qwen 2.5: <|im_start|>user ... <|im_end|>
  qwen3     the same; the answer starts after an empty <think> block, as in the template without thinking, and
            earlier answers lose their reasoning
  llama2    [INST] ... [/INST] in letters, <s> before each turn of the user
  mistral   Mistral 0.1 and 0.2: the same, <s> once
  mistral3  Mistral 0.3: [INST] and [/INST] are control tokens, a space follows each
  ministral Ministral: the same, a space only before answers
  nemo      Mistral Nemo: the same, no spaces, and answers as they are

The text of messages stays text: control tokens that it spells are encoded as letters. What a tokenizer's file does
not call a control token, such as Qwen 3's <think>, is text and gets its id.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from pasta_jax.messages import shown
from pasta_jax.tokens.tokenizer import TokenizerError

Chat: TypeAlias = Literal["auto", "plain", "gemma", "llama3", "chatml", "qwen3", "inst"]
CHATS: tuple[Chat, ...] = get_args(Chat)
"""The formats that a user can request. `inst` is one of Llama 2's and Mistral's, by vocabulary and template."""

_SWITCHES = "chat=FORMAT of load, --config.data.chat=FORMAT of training, --chat=FORMAT of other verbs"

USER_TURN, MODEL_TURN = "<user>", "<model>"

EMPTY = "The prompt is empty. Give the model something to answer."


@dataclasses.dataclass(frozen=True)
class Mark:
    """A control token by its name."""

    name: str


BOS, EOS = Mark("bos"), Mark("eos")
"""Control tokens by role; `EOS` ends an answer."""


class Said(str):
    """Text of a message. No other text of a prompt is a person's."""


Part: TypeAlias = str | Mark


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation to answer: `turns` alternate user, assistant, ..., user; without a system message None."""

    system: str | None
    turns: tuple[str, ...]

    @property
    def by_user(self) -> list[tuple[bool, str]]:
        """Every turn as (whether it is the user's, its text)."""
        return [(i % 2 == 0, text) for i, text in enumerate(self.turns)]


def dialogue(messages: Sequence[Mapping[str, str]]) -> Dialogue:
    """A list of {"role": "system" | "user" | "assistant", "content": text} as a dialogue.

    Raises:
      ValueError: there is no message, a role is out of turn, a content is missing, or the user said nothing; says
        which. Each format has its own reading of an empty system message or earlier answer.
    """
    if not messages:
        raise ValueError("The conversation has no messages. Give the model something to answer.")
    system: str | None = None
    turns = list[str]()
    for number, message in enumerate(messages, 1):
        name = f"Message {number} of the conversation"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f'{name} is {shown(message)}; write {{"role": ..., "content": ...}}.')
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise ValueError(f"{name}: its content is no text but {type(content).__name__}.")
        if role == "user" and not content.strip():
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


def stripped(parts: Sequence[Part], lstrip: Collection[Mark], rstrip: Collection[Mark]) -> list[Part]:
    """The parts without the white space that control tokens swallow: to their left (`lstrip`), to their right.

    What people wrote keeps it, unlike in transformers.
    """
    out = list(parts)
    for strip, marks, numbers in (
        (str.lstrip, rstrip, range(len(out))),
        (str.rstrip, lstrip, reversed(range(len(out)))),
    ):
        swallows = False
        for i in numbers:
            part = out[i]
            if isinstance(part, Mark):
                swallows = part in marks
            elif swallows and part:
                out[i] = part if isinstance(part, Said) else strip(part)
                swallows = not out[i]
    return out


def _plain(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS, Said(d.system), "\n"] if d.system else [BOS]
    for text in d.turns:
        parts += [Said(text), "\n"]
    return parts


def _turns(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS]
    before: list[Part] = [Said(d.system), "\n\n"] if d.system else []
    for user, text in d.by_user:
        parts += [Mark(USER_TURN), *before, Said(text), Mark(MODEL_TURN)] if user else [Said(text), EOS]
        before = []
    return parts


def _gemma(d: Dialogue, opening: str) -> list[Part]:
    start, end = Mark("<start_of_turn>"), Mark("<end_of_turn>")
    parts: list[Part] = [BOS]
    before: list[Part] = [] if d.system is None else [Said(d.system), "\n\n"]
    for user, text in d.by_user:
        parts += [start, "user\n" if user else "model\n", *before, Said(text.strip()), end, "\n"]
        before = []
    return [*parts, start, "model\n"]


def _llama3(d: Dialogue, opening: str) -> list[Part]:
    def header(role: str) -> list[Part]:
        return [Mark("<|start_header_id|>"), role, Mark("<|end_header_id|>"), "\n\n"]

    end = Mark("<|eot_id|>")
    parts: list[Part] = [BOS]
    if opening or d.system is not None:
        parts += [*header("system"), opening, Said((d.system or "").strip()), end]
    for user, text in d.by_user:
        parts += [*header("user" if user else "assistant"), Said(text.strip()), end]
    return [*parts, *header("assistant")]


def _im_turns(system: str | None, opening: str, turns: Sequence[Sequence[Part]]) -> list[Part]:
    start, end = Mark("<|im_start|>"), Mark("<|im_end|>")
    parts: list[Part] = []
    if system is not None or opening:
        parts += [start, "system\n", opening if system is None else Said(system), end, "\n"]
    for i, turn in enumerate(turns):
        parts += [start, "assistant\n" if i % 2 else "user\n", *turn, end, "\n"]
    return [*parts, start, "assistant\n"]


def _chatml(d: Dialogue, opening: str) -> list[Part]:
    return _im_turns(d.system, opening, [[Said(text)] for text in d.turns])


def _qwen3(d: Dialogue, opening: str) -> list[Part]:
    think, thought = Mark("<think>"), Mark("</think>")
    turns: list[list[Part]] = [[Said(text)] for text in d.turns]
    # Reasoning is kept only since the user's last question. What tools answered comes in the user's turns.
    of_tools = [text.startswith("<tool_response>") and text.endswith("</tool_response>") for text in d.turns]
    question = max((i for i in range(0, len(turns), 2) if not of_tools[i]), default=len(turns))
    for i, text in enumerate(d.turns):
        if i % 2 and "</think>" in text:
            before, answer = text.split("</think>")[0], text.split("</think>")[-1].lstrip("\n")
            turns[i] = [Said(answer)]
            if i > question and (reasoning := before.rstrip("\n").split("<think>")[-1].lstrip("\n")):
                turns[i] = [think, "\n", Said(reasoning), "\n", thought, "\n\n", Said(answer)]
    return [*_im_turns(d.system, opening, turns), think, "\n\n", thought, "\n\n"]


def _llama2(d: Dialogue, opening: str) -> list[Part]:
    # Llama's own tokenizer puts the space before [INST] by itself; ours does not.
    parts: list[Part] = []
    before = "" if d.system is None else f"<<SYS>>\n{d.system}\n<</SYS>>\n\n"
    for user, text in d.by_user:
        turn = Said((before + text).strip())
        parts += [BOS, " [INST] ", turn, " [/INST]"] if user else [" ", turn, " ", EOS]
        before = ""
    return parts


def _mistral(d: Dialogue, opening: str) -> list[Part]:
    parts: list[Part] = [BOS]
    before: list[Part] = [] if d.system is None else [Said(d.system), "\n\n"]
    for user, text in d.by_user:
        parts += [" [INST] ", *before, Said(text), " [/INST]"] if user else [" ", Said(text.strip()), EOS]
        before = []
    return parts


def _mistral3(d: Dialogue, opening: str, user_space: str = " ", answer_space: str = " ") -> list[Part]:
    parts: list[Part] = [BOS]
    for number, (user, text) in enumerate(d.by_user):
        if user:
            is_last = number == len(d.turns) - 1
            before: list[Part] = [] if d.system is None or not is_last else [Said(d.system), "\n\n"]
            parts += [Mark("[INST]"), user_space, *before, Said(text), Mark("[/INST]")]
        else:
            parts += [answer_space, Said(text.strip() if answer_space else text), EOS]
    return parts


def _ministral(d: Dialogue, opening: str) -> list[Part]:
    return _mistral3(d, opening, user_space="")


def _nemo(d: Dialogue, opening: str) -> list[Part]:
    return _mistral3(d, opening, user_space="", answer_space="")


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
    "ministral": Format(("[INST]", "[/INST]"), None, _ministral),
    "nemo": Format(("[INST]", "[/INST]"), None, _nemo),
}


_SIGNS = {
    "<|im_start|>": "chatml",
    "<start_of_turn>": "gemma",
    "<|start_header_id|>": "llama3",
    "[INST]": "inst",
}
_BARE_ANSWER = r"""\{\{-?\s*message\[['"]content['"]\]\s*\+\s*eos_token"""
_OTHERS = {
    "chatml": r"bos_token|\|\s*trim|\.strip\(\)|assistant\n<think>",
    "qwen3": r"(?s)\A(?!.*<think>\n\n</think>\n\n)",
    "inst": rf"(?s)\[SYSTEM_PROMPT\]|\[INST\] .*{_BARE_ANSWER}",
}
"""What templates have that look like a family's and write something else."""


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
        name = _inst(names, template)
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
        found = next((f for f in families if all(need in names for need in FORMATS[f].needs)), "plain")
        return "inst" if found == "mistral3" else found
    if not template.strip():
        return "plain"
    written = template.replace("\\n", "\n")  # files have newlines in both ways
    family = next((family for sign, family in _SIGNS.items() if sign in written), "")
    family = "qwen3" if family == "chatml" and "enable_thinking" in written else family
    if family and not re.search(_OTHERS.get(family, "(?!)"), written):
        return family
    raise TokenizerError(
        "The model's chat template is of no format known here "
        f"({', '.join(CHATS[2:])}). Choose the nearest of them, or plain, with {_SWITCHES}."
    )


def _inst(names: Collection[str], template: str | None) -> str:
    if not set(FORMATS["mistral3"].needs) <= set(names):
        return "llama2" if template is None or "<<SYS>>" in template else "mistral"
    if not template and "[SYSTEM_PROMPT]" in names:
        raise TokenizerError(
            "This tokenizer has [SYSTEM_PROMPT], so it is of a later Mistral than Nemo and Ministral, whose format "
            f"is not known here. Choose plain with {_SWITCHES}."
        )
    if not template:  # Nemo is known by the names of its free ids
        return "nemo" if any(name.startswith("<SPECIAL_") for name in names) else "mistral3"
    if "[INST] " in template:
        return "mistral3"
    return "nemo" if re.search(_BARE_ANSWER, template) else "ministral"


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
