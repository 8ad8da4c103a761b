r"""Which text needs the text before it: words that refer back or sum up.

Lists of English words, no more. They err on the side of main: what may refer back is not promised, and main waits
before it. (`self` asks a model instead.)
"""

from __future__ import annotations

import re


def _phrases(*alternatives: str, start: bool = True) -> re.Pattern[str]:
    """Any of these phrases, whatever their case: where a text starts, or anywhere. A space is any run of blanks."""
    phrases = "|".join(alternatives).replace(" ", r"\s+")
    return re.compile(rf"\W*(?:{phrases})\b" if start else rf"\b(?:{phrases})\b", re.IGNORECASE)


_STARTS = _phrases(
    "(?:in|to|as)(?: a)? (?:summary|conclusion|short|essence|brief|total|conclude|summarize|sum up|recap|result)",
    "overall|ultimately|altogether|all in all|on the whole|in the end|tl;?dr|finally,? (?:it|the|in|this|all)",
    "therefore|thus|hence|so|consequently|accordingly|then|afterwards?|after (?:that|this|these)|once|now|next",
    "however|nevertheless|nonetheless|instead|otherwise|conversely|in contrast|by contrast|on the other hand",
    "similarly|likewise|despite|although (?:this|these|both)|again|repeat|compared|combined|(?:taken )?together",
    "this|these|those|that|such|both|neither|either|whether|(?:each|all|any|none|some) of|all (?:these|the)",
    r"by \w+ing|with (?:this|these|all|both|that)|given (?:this|these|that)|based on|following (?:this|these)",
    "the (?:above|same|rest|others?|remaining|result|answer|final|key|main)",
    "as (?:you can see|shown|noted|mentioned|discussed|described)",
)
"""How text in main begins that builds on what was said."""

_LEANS = _phrases(
    "this|these|those|that|such|both|it|they|he|she|its|their|his|her|then|therefore|thus|hence|so|however|instead",
    "otherwise|also|again|repeat|continue|similarly|likewise|consequently|as a result|after (?:that|this)|finally",
    "next|now|once (?:the|it|you|they|this|your)|the (?:above|same|rest|others?|remaining)",
)
"""How an item without a name begins that builds on the one before."""

_FOLLOWS = _phrases(
    "once|after|now|then|next|finally|when (?:the|it|this)|with (?:the|this|your) \\w+ (?:ready|done|set|in place)",
    "this|these|using (?:the|this|these)|from (?:the|this|these)|repeat|continue",
)
"""How a step begins that follows the one before."""

_STEPS = _phrases(
    "instructions?|directions?|steps?|methods?|procedure|recipe|how to|to do (?:this|so)", start=False
)

_USES = _phrases(
    "(?:with|using|from|given|by|based on|combining|adding|applying) (?:these|this|those|the above|both|that)"
)
"""How a block with a name begins that builds on the one before."""

_POINTS = _phrases(
    "as above|the above|above-mentioned|aforementioned|preceding|the previous",
    "(?:listed|described|shown|mentioned|discussed|noted|outlined) (?:above|earlier|before|previously)",
    "the (?:former|latter)(?= (?:is|was|are|were|has|have|can|will|would|may|one)\\b|[,.;)])",
    "(?:in|from|of|see|repeat) (?:steps?|points?|parts?|items?|equations?) \\d+|steps? \\d+ (?:and|to) \\d+",
    "the (?:first|second|third|last) (?:one|option|step|point|method|term)|the (?:mixture|remaining|resulting)",
    "these (?:values|steps|results|two|three|equations)|both of (?:them|these)|substitut\\w+ (?:the|these|this)",
    start=False,
)
"""Pointers to other parts of the answer."""

_TOTALS = _phrases("these|those|both|(?:all|each|any) of|above|in this (?:way|order)", start=False)

_CLOSES = _phrases(
    "(?:\\d+\\W+)?(?:in |key |final |main |the |example )?(?:conclusions?|summary|takeaways?|thoughts?|answer",
    "verdict",
    "results?|recommendations?|instructions?|directions?|methods?|steps|preparation|procedure|output|usage|analysis",
    "discussion|explanation|comparison|solution|reasoning|notes?|overall|bottom line|how (?:it|this) works",
    "calculations?|totals?)",
)
"""Names of parts that need those before them."""

_LETTER = re.compile(
    r"^(?:Subject:|Dear\b|To:|(?:Hi|Hello|Hey)\b[^\n.!?]{0,40},[ \t]*$)|\bonce upon a time\b", re.M | re.I
)
_PERSONAL = re.compile(
    r"\b(?:I|me|my|mine|we|us|our|he|him|his|she|her|hers)\b|[\"\u201c][^\"\u201d\n]+[,.!?][\"\u201d]"
)
"""Words of stories, letters and speeches; talk in quotes."""


def builds_on(name: str, details: str) -> bool:
    """Whether a block needs the blocks before it. Its name is in main, so "it" after a name is no reference.

    >>> builds_on("-", "It flows through Egypt."), builds_on("- **Nile**:", "It flows through Egypt.")
    (True, False)
    >>> builds_on("3. **Solve**:", "Substitute these values into the formula.")
    True
    """
    is_named = any(character.isalpha() for character in name)
    leans = (_CLOSES.match(name) or _USES.match(details)) if is_named else _LEANS.match(details)
    return bool(leans or _POINTS.search(details))


def gives_steps(heading: str) -> bool:
    """Whether what stands above a numbered list says that its items are steps.

    >>> gives_steps("**Instructions:**"), gives_steps("Here are five rivers:")
    (True, False)
    """
    return bool(_STEPS.search(heading))


def follows(details: str) -> bool:
    """Whether a step of a numbered list may need the one before, whatever its name.

    >>> follows(" Once the scan is complete, you see a report."), follows(" Go to bed early.")
    (True, False)
    """
    return bool(_FOLLOWS.match(details))


def refers_back(name: str, text: str) -> bool:
    """Whether main should have read the blocks before it writes this text, which `name` heads.

    >>> refers_back("", "Overall, both rivers are long."), refers_back("", "Here are two rivers:")
    (True, False)
    """
    first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return bool(_CLOSES.match(name) or _STARTS.match(text) or _POINTS.search(text) or _TOTALS.search(first))


def is_told_in_order(text: str) -> bool:
    r"""Whether a text is a story, a letter or a speech, whose paragraphs follow one another.

    >>> is_told_in_order("Dear Ms Roe,\n\nThank you."), is_told_in_order("The Nile is long.\n\nIt floods.")
    (True, False)
    """
    return bool(_LETTER.search(text)) or 25 * len(_PERSONAL.findall(text)) > len(text.split())
