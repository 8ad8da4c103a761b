"""Texts that tokenizers get wrong: code, scripts, emoji, combining marks, odd white space, long runs."""

from __future__ import annotations

import random

_CODE = [
    "def f(x):\n\treturn {'a': [1, 2.5e-3, 0xFF], \"b\": 0}  # TODO\n\n\n\nif __name__ == '__main__':\n    f(*a)\n",
    "<!DOCTYPE html>\n<table class='a'>\n  <tr><td>&nbsp;</td></tr>\n</table>\n<!-- <s>no</s> -->",
    "$ ls -la | grep '^d' && echo \"${HOME}/a\\ b\" > /dev/null 2>&1 # 100%\r\n",
    r"\begin{align} \frac{1}{2} \leq \int_0^\infty e^{-x^2}\,dx \\ \end{align} C:\temp\new",
    "std::vector<std::map<int, T*>> v{{}}; a->b[i++] <<= ~0ULL; // ???\n#define X(a, ...) #a##__VA_ARGS__",
]
_SCRIPTS = [
    "東京は日本の首都です。人口は約1400万人、「ｶﾀｶﾅ」。",
    "你好，世界！简体與繁體。㐀𠀀𪚥",
    "안녕하세요 세계. \u1112\u1161\u11ab\u1100\u1173\u11af",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣ مُحَمَّد ﷺ",
    "שָׁלוֹם עולם",
    "हिन्दी में एक वाक्य है। १२३",
    "ภาษาไทยไม่มีช่องว่าง",
    "Ελληνικά, кириллица, հայերեն, ქართული, አማርኛ",
    "a\u202eright to left\u202c b\u2066c\u2069",
]
_SIGNS = [
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷🇯🇵 ☺️ 🤷🏾‍♀️ 1️⃣ 🫠",
    "e\u0301 a\u0308\u0323 a\u0323\u0308 n\u0303 Z\u0351\u036b\u0343 q\u0307\u0323",
    "\u00e9 \u212b \ufb01 \u1e9b\u0323 \uff21\uff22\uff23 ① ½ ㎏ \u2126 \u0130ı ß ẞ",
    "“quotes” ‘and’ —dashes– … don't DON'T I'Ll we'VE ''s",
    "\U0010ffff\ue000\ufffd\ufffe\x00\x01\x02\x1f\x7f\x80\x9f",
    "\u2581",
    "\u2581\u2581a \u2581 b\u2581",
    "Ġa Ċ âĢĶ <0x0A> </w> ## [UNK] @@",
]
_SPACES = [
    " ",
    "  ",
    "\n",
    "\t",
    " a ",
    "\n a\n\n  b\n \n\n\n",
    "  \t \u00a0\u2003\u2009\u200b\u3000\ufeff\u2028\u2029\x85\x0b\x0c\r\n\r\r\n",
    "a\u00a0b \u00a0 c\u3000\u3000d",
    "\ufeffa",
]
_RUNS = [
    f"{part * times}{end}"
    for end in ("", "b")
    for part, times in (
        *(
            (" ", 517),
            ("\n", 313),
            ("\t", 100),
            ("\r\n", 70),
            ("a", 1000),
            (" a", 300),
            ("=-", 200),
            ("1", 400),
        ),
        *(("中", 300), ("🌍", 130), ("<", 200), ("\u0301", 50), ("\u2581", 40), ("\u00a0", 60)),
    )
]

TEXTS = [*_CODE, *_SCRIPTS, *_SIGNS, *_SPACES, *_RUNS]


def scattered(rng: random.Random) -> str:
    """Some characters: of ASCII, of the scripts with short codes, and of all of Unicode."""
    ranges = ((0x20, 0x7F), (0x01, 0x3000), (0xE000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))
