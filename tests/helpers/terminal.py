"""A terminal that is only a list of lines."""

from __future__ import annotations

import io
import re
import unicodedata


class Terminal(io.StringIO):
    """Understands what `live.screen` writes. What a terminal would show otherwise (a line too long) is an error.

    Attributes:
      lines: those that scrolled away, then those of the window; the cursor is at the end of one.
      written: all that was written, with the controls.
    """

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.lines, self.written = [""], ""
        self._columns, self._rows = columns, rows
        self._line, self._text = 0, ""  # of the cursor, and what is before it

    def write(self, text: str) -> int:
        self.written += text
        for number, control, character in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])", text, re.DOTALL):
            if character == "\n":
                self._line, self._text = self._line + 1, ""
                self.lines += [""] * (self._line == len(self.lines))
            elif character:
                self._text += character
                self.lines[self._line] = self._text + self.lines[self._line][len(self._text) :]
                wide = sum(unicodedata.east_asian_width(each) in "WF" for each in self._text)
                assert len(self._text) + wide < self._columns, "it would go on in the next line"
            elif control == "F":
                self._line, self._text = self._line - int(number), ""
                assert self._line >= len(self.lines) - self._rows, "above the window"
            elif control in "KJ":
                self.lines[self._line] = self._text
                del self.lines[self._line + 1 if control == "J" else len(self.lines) :]
            else:
                assert control in "mhl"
        return len(text)
