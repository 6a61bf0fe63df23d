"""Runs trials one after another in this process: a debugger stops in them, an exception is one stack away."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.executors import Job, OnOutcome, Setting, call


class Inline:
    """One trial at a time, in the order of the plan."""

    slots = 1

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def run(self, jobs: Sequence[Job], on_outcome: OnOutcome) -> None:
        for job in jobs:
            if self.setting.stop.exists():
                return
            on_outcome(job.key, call(self.setting, job))
