"""Where trials run: one small interface, `inline` (this process) and `ray` (Ray Tune, one machine or a cluster).

An executor takes jobs and reports each outcome as it comes; it decides neither what runs nor what a failure means.
Both call the trial the same way (`call`): same threads, same environment, same stop file, so they give the same bits.
To stop, somebody creates the sweep's stop file: running trials write a checkpoint and return "stopped", waiting
ones do not start. A new executor is one file with a class like inline.Inline and one line in `make`.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator import ledger
from orchestrator.errors import UserError
from workers.store import TrialFolder, read_json, write_json

RUN_TRIAL = "workers.run.run_trial"
NAMES = ("inline", "ray")


@dataclass(frozen=True)
class Job:
    """One trial to run: its key, its resolved spec as a plain mapping, and its folder in the store."""

    key: str
    spec: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: state is done, failed, diverged or stopped (the same fields as workers.run.Outcome)."""

    state: str
    step: int
    message: str | None = None


OnOutcome = Callable[[str, Outcome], None]


class Executor(Protocol):
    """A context manager: entering it reaches the machines (UserError if they are not there) and writes nothing."""

    slots: int
    """Trials at a time."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, jobs: Sequence[Job], on_outcome: OnOutcome) -> None:
        """Run the jobs; calls `on_outcome(key, outcome)` in this thread for each that was started."""
        ...


class Idle:
    """Nothing to run: starts nothing, imports nothing."""

    slots = 1

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def run(self, jobs: Sequence[Job], on_outcome: OnOutcome) -> None:
        assert not jobs


@dataclass(frozen=True)
class Setting:
    """How a trial is called, on whichever machine."""

    target: str
    stop: Path
    cpu: float
    gpu: float
    threads: int = 1

    @property
    def device(self) -> str:
        return "cuda" if self.gpu > 0 else "cpu"


def make(config: Mapping[str, Any], *, stop: Path, target: str = RUN_TRIAL) -> Executor:
    """The executor that the resolved config names. Raises UserError for settings that cannot work."""
    settings = check(config)
    setting = Setting(target=target, stop=stop, **_resources(config.get("resources") or {}))
    if settings["name"] == "inline":
        from orchestrator.executors.inline import Inline

        return Inline(setting)
    from orchestrator.executors.ray_tune import RayTune

    return RayTune(setting, address=settings.get("address"))


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The executor's settings. Raises UserError for those that cannot work; imports and starts nothing."""
    settings = config.get("executor") or {}
    settings = {"name": settings} if isinstance(settings, str) else dict(settings)
    if settings.get("name") not in NAMES:
        raise UserError(f"executor={settings.get('name')!r} is not known; choose one of {', '.join(NAMES)}")
    _resources(config.get("resources") or {})
    return settings


def _resources(resources: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, low in (("cpu", 0.0), ("gpu", 0.0)):
        value = resources.get(name, 1 if name == "cpu" else 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < float("inf"):
            raise UserError(f"resources.{name}={value!r} is not a number of {name}s; write as in resources.{name}=1")
        if name == "gpu" and value > 1 and value != int(value):
            raise UserError(f"resources.gpu={value} mixes whole and part GPUs; write a whole number or a part below 1")
        found[name] = float(value)
    threads = resources.get("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"resources.threads={threads!r} is not a number of threads; write as in resources.threads=1")
    return found | {"threads": threads}


def thread_environment(threads: int) -> dict[str, str]:
    """The environment that holds the numerical libraries to `threads` threads, the same for every executor."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {name: str(threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}


def call(setting: Setting, job: Job) -> Outcome:
    """Run one trial in this process. Whatever goes wrong ends in FAILED.json and an outcome, never in an exception."""
    folder = TrialFolder(Path(job.folder))
    if setting.stop.exists():
        return Outcome("stopped", 0, "not started")
    try:
        os.environ.update(thread_environment(setting.threads))
        _limit_gpu_memory(setting.gpu)
        attempt = int((read_json(ledger.attempt_file(folder)) or {}).get("attempt", 0)) + 1
        write_json(ledger.attempt_file(folder), {"attempt": attempt})
        module, _, name = setting.target.rpartition(".")
        run_trial = getattr(importlib.import_module(module), name)
        outcome = run_trial(
            job.spec,
            folder.root,
            device=setting.device,
            threads=setting.threads,
            should_stop=setting.stop.exists,
            attempt=attempt,
        )
        return Outcome(outcome.state, outcome.step, outcome.message)
    except Exception as error:  # run_trial records its own failures; this is an import that fails, or a full disk
        message = f"{type(error).__name__}: {error}"
        ledger.fail(folder, job.key, "bug", message, traceback.format_exc())
        return Outcome("failed", 0, message)


def _limit_gpu_memory(gpu: float) -> None:
    """Fractions of a GPU are Ray's bookkeeping only; this makes a trial keep to its share of the memory."""
    if not 0 < gpu < 1:
        return
    from workers.run import limit_gpu_memory

    limit_gpu_memory(gpu)
