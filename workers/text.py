"""Words from anywhere, shown so that a terminal obeys none of them and a reader misses none.

    visible(text)        what a terminal takes for a command, or what turns the line round, as in \\u001b and \\u202e
    one_line(text)       the same without line breaks, and not longer than a line has room for
    unprintable(text)    the first character that no prompt, name or path may hold, None where there is none
    typed(words)         words as a shell reads them, each as it was, in characters that can be seen

Joiners and emoji are text like any other. The escapes are those of JSON.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

_SHOWN_BY_NUMBER = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LONGEST = 300
"""Characters of a text that a line shows."""


def visible(text: str) -> str:
    """The text with control characters (but line breaks and tabs), marks of direction and halves of characters as
    \\uXXXX."""
    return _SHOWN_BY_NUMBER.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, limit: int = LONGEST) -> str:
    """`visible`, every run of blanks and line breaks as one blank, cut to `limit` characters."""
    words = visible(" ".join(text.split()))
    return words if len(words) <= limit else words[: limit - 1] + "…"


def unprintable(text: str, allowed: str = "") -> str | None:
    """The first control character (not those of `allowed`: "\\n\\t") or half of a character, as \\uXXXX; None where
    there is none. No tokeniser has them, and no file could hold the halves."""
    found = next((found[0] for found in _UNPRINTABLE.finditer(text) if found[0] not in allowed), None)
    return None if found is None else f"\\u{ord(found):04x}"


def typed(words: Iterable[str]) -> str:
    """`shlex.join`; a word with line breaks or with what `visible` shows by number as bash's and zsh's $'...'."""
    return " ".join(map(_typed, words))


def _typed(word: str) -> str:
    if visible(word) == word and not re.search(r"[\n\t]", word):
        return shlex.quote(word)
    marked = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{visible(marked)}'"
