"""Puts conf/ and requirements.lock into the wheel, beside the code that reads them.

Only into a real wheel: an editable install reads both from the repository, and a second copy would grow stale.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfInWheel(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= {
                "conf": "orchestrator/conf",
                "requirements.lock": "orchestrator/requirements.lock",
            }
