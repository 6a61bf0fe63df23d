"""The command line's OVERRIDES, in Hydra's own grammar, and our words for what is wrong with them.

    beta=0.1                one value
    beta=0.01,0.1,1         several: an axis; so are beta=choice(0.01,0.1), seed=range(0,3)
    prompt='a dog, on it'   quotes where a text holds one of  , = ( ) [ ] { } or a letter outside ASCII

beta.schedule, beta.rate, regulariser.order and regulariser.samples stand for the settings with _ in place of the dot.
`add key` (+key=1) and `delete key` (~key) of Hydra do not exist here: every setting stands in conf/.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.errors import UserError

HELP = (
    "an override is key=value, several values are key=a,b, a text with a comma is \"key='a, b'\"; see pift plan --help"
)
PLAIN = re.compile(r"[\w.@/-]+")
GRAMMAR = set(",()[]{}$'\"")
WORDS = ("null", "true", "false", "nan", "inf")
"""Letters that are no text."""
LARGEST_AXIS = 10_000
ALIASES = {
    "beta.schedule": "beta_schedule",
    "beta.rate": "beta_rate",
    "regulariser.order": "regulariser_order",
    "regulariser.samples": "regulariser_samples",
}
"""beta is a number, so that what goes with it stands beside it in conf/; a dot reads better on the command line."""


@dataclass(frozen=True)
class Override:
    """One argument: `values` has one element unless `swept`."""

    key: str
    values: tuple[Any, ...]
    swept: bool
    text: str


def parse(arguments: Iterable[str]) -> dict[str, Override]:
    """The overrides by key; of two with the same key the later counts. Raises UserError with every problem found."""
    found: dict[str, Override] = {}
    problems = []
    for argument in arguments:
        try:
            override = _parse_one(argument)
            override = replace(override, key=canonical(override.key))
            found.pop(override.key, None)
            found[override.key] = override
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _parse_one(argument: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType, RangeSweep
    from hydra.errors import HydraException

    key, equals, text = argument.partition("=")
    if not equals:
        raise UserError(f"{argument!r} is not an override: {HELP}")
    if not PLAIN.fullmatch(key):
        marks = "; settings are changed, not added (+) or deleted (~)" if key[:1] in "+~" else ""
        raise UserError(f"{argument!r} is not an override{marks}: {HELP}")
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_override(argument)
    except HydraException:
        if not text or GRAMMAR & set(text):
            raise UserError(f"{argument!r} cannot be read: {HELP}") from None
        parsed = parser.parse_override(f'{key}="{text}"')
    if parsed.type is not OverrideType.CHANGE or parsed.package is not None:
        raise UserError(f"{argument!r} is not an override: {HELP}")
    if not parsed.is_sweep_override():
        return Override(key, (_plain(parsed.value()),), False, argument)
    if key == "prompt" and ", " in text and not set("'\"(") & set(text):
        raise UserError(
            f"{argument!r} may be one text or several; the shell takes one pair of quotes away: write "
            f'"prompt=\'{text}\'" for one text, "{key}={text.replace(", ", ",")}" for several'
        )
    swept = parsed._value
    if isinstance(swept, RangeSweep) and not _countable(swept):
        raise UserError(
            f"{argument!r} has no or too many values (at most {LARGEST_AXIS}); write range(start, stop, step)"
        )
    try:
        return Override(key, tuple(_plain(value) for value in parsed.sweep_iterator()), True, argument)
    except HydraException:
        raise UserError(
            f"{argument!r} cannot be listed; write the values out, as in {key}=a,b or {key}=range(0,3)"
        ) from None


def _countable(swept: Any) -> bool:
    """Whether a range has between one and LARGEST_AXIS values."""
    if not swept.step:
        return False
    return 0 < (swept.stop - swept.start) / swept.step <= LARGEST_AXIS


def canonical(key: str) -> str:
    """The key in conf/ that an alias stands for, or the key itself."""
    return ALIASES.get(key, key)


def _plain(value: Any) -> Any:
    """Hydra's quoted strings as str, everything else as it is, containers included."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def quoted(text: str) -> str:
    """A text as a value that reads as this text, whatever it holds."""
    if re.fullmatch(r"[A-Za-z/][\w./@:+-]*", text, re.ASCII) and text.lower() not in WORDS:
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + re.search(r"\\*\Z", text)[0] + "'"  # type: ignore[index]


def close(word: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" for the names nearest to `word`, or nothing. A key's last part counts for a key."""
    names = sorted(set(known))
    near = [name for name in names if name.rpartition(".")[2] == word.rpartition(".")[2]]
    near += [name for name in difflib.get_close_matches(word, names, n=3, cutoff=0.7) if name not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""
