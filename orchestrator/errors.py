"""What goes wrong for a reason the user can fix: shown as a plain message on stderr, exit code 2, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad place to work in. `str(error)` is the whole message: the field, the value and the fix."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))
