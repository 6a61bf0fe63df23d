"""HTML from nested calls: `tag("p", text("a < b"), cls="quiet")`. Text is escaped by `text`, attributes always."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from workers.text import visible


def text(value: Any) -> str:
    """A value as HTML text; what would turn the line round is shown by its number."""
    return html.escape(visible(str(value)), quote=False)


def tag(name: str, *content: str, cls: str = "", **attributes: Any) -> str:
    """<name ...>content</name>; `content` is HTML. Underscores in an attribute's name become hyphens; None omits it."""
    given = {"class": cls or None} | {key.replace("_", "-"): value for key, value in attributes.items()}
    shown = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items() if value is not None)
    return f"<{name}{shown}>{''.join(content)}</{name}>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], cls: str = "") -> str:
    """A table that scrolls sideways on a narrow page. `heads` are <th>, `rows` hold <td>."""
    body = "".join(tag("tr", *cells) for cells in rows)
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), tag("tbody", body), cls=cls), cls="scroll")


def facts(pairs: Iterable[tuple[str, str]], cls: str = "") -> str:
    """A list of terms and what they are; both are HTML."""
    return tag("dl", *(tag("dt", name) + tag("dd", value) for name, value in pairs), cls=cls)


def folded(summary: str, *content: str) -> str:
    """Content that a click opens; `summary` is HTML."""
    return tag("details", tag("summary", summary), *content)
