r"""Where sentences end, in scripts with and without spaces.

>>> text = 'He said "No." Version 1.2 is out. \u5b83\u5f88\u957f\u3002\u5b83\u5411\u5317\u3002'
>>> [match.end() for match in SENTENCE_END.finditer(text)]
[13, 33, 38, 42]
"""

import re

SENTENCE_END = re.compile(
    "[.!?][\"'\u201d\u2019)\\]*_]*(?=\\s)|[\u3002\uff01\uff1f][\"'\u201d\u2019\u300d\u300f\uff09)\\]*_]*"
)
"""The end of a sentence that something follows: white space, unless the mark is one of a script without spaces."""
