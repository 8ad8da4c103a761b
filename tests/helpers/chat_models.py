"""Models behind the endpoint of `chat_server`, as far as the tests need them."""

from __future__ import annotations

import re

from tests.helpers.chat_server import Body


def rivers(i: int) -> tuple[str, str]:
    """A prompt, and an answer that `annotator` marks; of some answers the last block is not independent."""
    items = [
        f"- River {i}.{j}: it flows past {i + j} towns and under {i * j} old stone bridges.\n"
        for j in range(3)
    ]
    delta = f"- Delta {i}: it has {i} islands, and birds too.\n" if i % 7 == 3 else ""
    return f"Name rivers of country {i}.", "Rivers:\n" + "".join(items) + delta


def annotator(body: Body) -> str:
    """Marks what follows the colon of each item of a list; as a judge it finds what says "too" to be dependent."""
    tasks = [each["content"] for each in body["messages"] if each["content"].startswith("<question>")]
    if not tasks:
        return "OK"
    if body["messages"][0]["content"].startswith("You check"):
        parts = re.findall(r"\[part (\d+): .*?\](.*?)\[end of part \1\]", tasks[-1], re.DOTALL)
        return "\n".join(f"{i} {'false 1: too' if ' too' in text else 'true: alone'}" for i, text in parts)
    answer = tasks[-1].split("<answer>\n", 1)[1].removesuffix("\n</answer>")
    return re.sub(r"(?m)^- ([^:\n]+): (.+)$", r'- \1: <async topic="\1">\2</async>', answer)
