"""Which weights a component needs, for `pift doctor`: a class that loads some offers `weights(settings)`."""

from __future__ import annotations

from typing import NamedTuple


class Weights(NamedTuple):
    """One thing that has to be there before a trial can run."""

    what: str
    """What it is and where it was looked for."""
    present: bool
    fetch: str
    """The command that fetches it, or what to do."""
