"""Where trials run: one small interface, `inline` (this process) and `ray` (Ray Tune, one machine or a cluster).

An executor takes jobs and reports each outcome as it comes; it decides neither what runs nor what a failure means.
Both call the trial the same way (`call`): same threads, same environment, same stop file, so they give the same bits.
To stop, somebody creates the sweep's stop file: running trials write a checkpoint and return "stopped", waiting
ones do not start. A new executor is one file with a class like inline.Inline and one line in `make`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator import ledger, tracking
from orchestrator.errors import UserError
from orchestrator.executors import node
from orchestrator.tracking.forwarder import forwarding
from workers.afar import Watch, at_work
from workers.remote import is_url
from workers.store import TrialFolder

RUN_TRIAL = "workers.run.run_trial"
NAMES = ("inline", "ray")
PREDECESSOR_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One trial to run: its key, its resolved spec as a plain mapping, and its folder in the store."""

    key: str
    spec: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: done, failed, diverged, stopped or elsewhere (the same fields as workers.run.Outcome)."""

    state: str
    step: int
    message: str | None = None
    kind: str | None = None


class ExecutorLost(Exception):
    """The machines are gone; the message says what is known about it."""


OnOutcome = Callable[[str, Outcome], None]


class Executor(Protocol):
    """A context manager: entering it reaches the machines (UserError if they are not there) and writes nothing."""

    slots: int
    """Trials at a time."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, jobs: Sequence[Job], on_outcome: OnOutcome) -> None:
        """Run the jobs; calls `on_outcome(key, outcome)` for each that was started. Raises ExecutorLost."""
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
    limits: Mapping[str, Any] = field(default_factory=dict)
    """What a trial puts up with, see workers.guard.Limits."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Who asks for it: {"sweep", "launch"}."""
    server: str | None = None
    """The MLflow server that a trial sends its journal to; None where the launch does it."""
    url: str | None = None
    """The store, where it is at a URL: the job's folder is the launch's view of it, and the trial works elsewhere."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpu > 0 else "cpu"


def make(
    config: Mapping[str, Any], *, stop: Path, target: str = RUN_TRIAL, facts: Mapping[str, Any] | None = None
) -> Executor:
    """The executor that the resolved config names. Raises UserError for settings that cannot work."""
    settings = check(config)
    setting = Setting(
        target=target,
        stop=stop,
        limits=dict(config.get("limits") or {}),
        facts=dict(facts or {}),
        server=tracking.server_of(config),
        url=str(config["store"]) if is_url(config.get("store", "")) else None,
        **_resources(config.get("resources") or {}),
    )
    if settings["name"] == "inline":
        from orchestrator.executors.inline import Inline

        return Inline(setting)
    from orchestrator.executors.ray_tune import RayTune

    return RayTune(setting, address=settings.get("address"), cpus=settings.get("cpus"))


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The executor's settings. Raises UserError for those that cannot work; imports and starts nothing."""
    settings = config.get("executor") or {}
    settings = {"name": settings} if isinstance(settings, str) else dict(settings)
    if settings.get("name") not in NAMES:
        raise UserError(f"executor={settings.get('name')!r} is not known; choose one of {', '.join(NAMES)}")
    cpus = settings.get("cpus")
    if cpus is not None and (isinstance(cpus, bool) or not isinstance(cpus, int) or cpus < 1):
        raise UserError(f"executor.cpus={cpus!r} is not a number of CPUs; write as in executor.cpus=8, or null for all")
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
    """Run one trial in this process. Whatever goes wrong ends in FAILED.json and an outcome, never in an exception.

    An attempt of the same launch that is still held to be at work is this trial's own, whose process is gone (on a
    machine whose process table is not ours): it is waited for until its last beat is old enough.
    """
    try:
        if setting.url is None and not setting.stop.parent.is_dir():  # which the launch has made
            return Outcome("stopped", 0, _unseen(job), "storage")
        os.environ.update(thread_environment(setting.threads))
        _limit_gpu_memory(setting.gpu)
        module, _, name = setting.target.rpartition(".")
        run_trial = getattr(importlib.import_module(module), name)
        with node.at_work(), _place(setting, job) as place, forwarding(setting.server, place.folder):
            while not place.stopped():
                outcome = run_trial(
                    job.spec,
                    place.folder.root,
                    device=setting.device,
                    threads=setting.threads,
                    should_stop=place.stopped,
                    limits=setting.limits,
                    facts=setting.facts,
                    **place.options,
                )
                if outcome.state != "elsewhere" or not _is_ours(place.folder, setting):
                    return Outcome(outcome.state, outcome.step, outcome.message, outcome.kind)
                time.sleep(PREDECESSOR_SECONDS)
        return Outcome("stopped", 0, "not started")
    except Exception as error:  # run_trial records its own failures; this is an import that fails
        message = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, UserError):
            fail(setting, job.key, Path(job.folder), message, traceback.format_exc())
        return Outcome("failed", 0, message, "bug")


def _unseen(job: Job) -> str:
    return (
        f"the store of {job.folder} is not there on {socket.gethostname()}: on a cluster, store= is a folder that "
        "every node sees under the same path, or a URL as in s3://bucket/pift"
    )


def fail(setting: Setting, key: str, folder: Path, message: str, text: str = "") -> None:
    """Write FAILED.json for a trial that could not do so itself. Raises OSError or UserError."""
    if setting.url is None:
        ledger.fail(TrialFolder(folder), key, "bug", message, text)
        return
    store = ledger.Store(setting.url)  # this machine's view, which is not the launch's on another one
    ledger.fail(store.trial(key), key, "bug", message, text)
    store.publish()


@dataclass(frozen=True)
class _Place:
    """Where a trial works on this machine, whether its launch is to stop, and what it has to know besides."""

    folder: TrialFolder
    stopped: Callable[[], bool]
    options: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def _place(setting: Setting, job: Job) -> Iterator[_Place]:
    """The job's folder; for a store at a URL a folder of this machine, and a thread that looks for the stop file."""
    if setting.url is None:
        yield _Place(TrialFolder(Path(job.folder)), lambda: setting.stop.exists() or node.leaving())
        return
    with at_work(setting.url, job.key) as attempts:
        remote, name = attempts.remote, f"launches/{setting.stop.name}"
        with Watch(lambda: remote.read(name) is not None) as watch:
            stopped = lambda: watch.yes or setting.stop.exists() or node.leaving()  # noqa: E731
            yield _Place(TrialFolder(attempts.folder), stopped, {"attempts": attempts})


def _is_ours(folder: TrialFolder, setting: Setting) -> bool:
    attempt = ledger.last_attempt(folder)
    launch = setting.facts.get("launch")
    return attempt is not None and launch is not None and attempt.content.get("launch") == launch


def _limit_gpu_memory(gpu: float) -> None:
    """Fractions of a GPU are Ray's bookkeeping only; this makes a trial keep to its share of the memory."""
    if not 0 < gpu < 1:
        return
    from workers.devices import limit_gpu_memory

    limit_gpu_memory(gpu)
