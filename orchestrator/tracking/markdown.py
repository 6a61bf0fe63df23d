"""Markdown for MLflow's pages out of words that anybody may have written: a prompt, a sweep's name, an exception.

    safe(text)                      the text as one line that is nothing but text: no markup, link, picture or HTML
    link(text, target)              [text](target)
    table(heads, rows)              cells are markdown themselves
    fence(code, language)           a block of code that its content cannot end
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from workers.text import one_line, visible

LONGEST = 300
"""Characters of a text that a note shows."""
_MARKUP = re.compile(r"[\\`*_{}\[\]()<>#+|~&\"'!:/@=$^]|(?<=\w)\.(?=\w)|^\s*[-.\d]|-(?=-)")
"""What could begin markup, a link (the dot of www.example.org too) or HTML."""


def safe(text: object, limit: int = LONGEST) -> str:
    """The text on one line, every character that could mean something to markdown as a character reference."""
    words = one_line(visible(str(text)), limit)
    return _MARKUP.sub(lambda found: "".join(f"&#{ord(character)};" for character in found[0]), words)


def link(text: object, target: str) -> str:
    """A link to a place in MLflow's own pages; `target` has no blanks and no parentheses."""
    return f"[{safe(text)}]({target})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; its cells hold no line breaks and no bare |."""
    lines = [" &nbsp; | ".join(cells) for cells in (heads, *rows)]  # MLflow's tables have no room between columns
    return [f"| {lines[0]} |", "|---" * len(heads) + "|", *(f"| {line} |" for line in lines[1:])]


def fence(code: Iterable[str], language: str = "") -> list[str]:
    """The lines of a block of code, fenced by more backticks than it has in a row."""
    lines = list(code)
    longest = max((len(found) for line in lines for found in re.findall("`+", line)), default=0)
    ticks = "`" * max(3, longest + 1)
    return [f"{ticks}{language}", *lines, ticks]
