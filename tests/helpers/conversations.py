"""Conversations of many kinds, with which prompts are compared with those of the published templates."""

from __future__ import annotations

Messages = list[dict[str, str]]


def talk(*texts: str, system: str | None = None) -> Messages:
    """Messages of user and assistant in turn."""
    before = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*before, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


LONG = " ".join(f"River {n} is {n * 37} km long, and its source lies at {n * 11} m." for n in range(1, 30))

KINDS: dict[str, Messages] = {
    "a question": talk("What is the capital of France?"),
    "white space around": talk("  Name a city. \n"),
    "a newline first": talk("\nName a city."),
    "a tab first": talk("\tName a city.\t"),
    "digits first": talk("1803 was a year. Name 2 more."),
    "code": talk("def f(x):\n    if x:\n\n\n        return  x\n"),
    "unicode": talk("São Paulo, 北京 and Åre: naïve? 🌍\u200d!"),
    "decomposed unicode": talk("Sa\u0303o Paulo and A\u030are"),
    "a system message": talk("Name a city.", system="You are brief."),
    "white space around a system message": talk("Name a city.", system="\n  You are brief. \n"),
    "an empty system message": talk("Name a city.", system=""),
    "a blank system message": talk("Name a city.", system=" \n"),
    "several turns": talk("Of France?", "Paris", "And of Peru?"),
    "a system message and several turns": talk(
        "Of France?", "Paris.", "And?", "Lima.", "1 more", system="Hi"
    ),
    "white space around all": talk(" Of France?\n", "\n Paris. \n", "\n\nAnd of Peru? ", system=" Hi "),
    "digits first in all": talk("1 city", "2 cities", "3 cities", system="4 cities"),
    "an empty answer": talk("Of France?", "", "And of Peru?"),
    "a blank answer": talk("Of France?", " \n", "And of Peru?"),
    "an empty system message and answer": talk("Of France?", "", "And of Peru?", "Lima", "?", system=""),
    "reasoning": talk("Hi.", "<think>\nHm.\n</think>\n\nHello!", "Name a city."),
    "empty reasoning": talk("Hi.", "<think>\n\n</think>\n\nHello!", "Name a city."),
    "reasoning without a start": talk("Hi.", "Hm.\n</think>\n\nHello!", "Name a city."),
    "reasoning without an end": talk("Hi.", "<think>\nHm.", "Name a city."),
    "reasoning before a tool's answer": talk(
        *(
            "Hi.",
            "<think>\nHm.\n</think>\n\nHello!",
            "And of Peru?",
            "<think>\n\nTo look up.\n\n</think>\n\nWait.",
        ),
        *(
            "<tool_response>\nLima\n</tool_response>",
            "<think>So.</think> Lima",
            "<tool_response></tool_response>",
        ),
    ),
    "a tool's answer alone": talk(
        "<tool_response>a</tool_response>", "<think>b</think>c", "<tool_response>d</tool_response>"
    ),
    "markup": talk(
        "Why <think> and </think> and <tool_call>?", "Since <b>.", "<table>\n\n</table> <|x|> </INST>"
    ),
    "tags": talk('<promise topic="rivers" tokens=4 /><async>a</async><sync/>', "<promise/> </async>", " />"),
    "control tokens": talk(
        "<bos><s>[/INST] <end_of_turn>\n<|im_end|>\n<|eot_id|></s><eos><|endoftext|><unused0> b",
        "<|im_start|>user\n[INST]<start_of_turn>",
        "<|start_header_id|>system<|end_header_id|>",
        system="<|im_end|><end_of_turn><|eot_id|></s>",
    ),
    "long": talk(LONG, f"{LONG}\n\n{LONG}", *("Go on.", LONG) * 3, "And?", system=LONG),
}
