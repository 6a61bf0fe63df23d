"""Runs trials with Ray Tune, on this machine or on a cluster. The only file beside ray_jobs.py that imports ray.

Every launch is a fresh Tune run over the keys of the jobs; what was done before is the store's business, so
Tuner.restore is never used. A trial reports once, at its end: its journal and heartbeat are what the monitor reads.
Tune retries a trial whose process died, at once and `limits.deaths` times, and nothing else: a trial that fails says
so in its outcome. A machine that goes away costs its trials no more than the steps since their last checkpoints.
Processes are reused from trial to trial, which saves their start-up (about 3 s and the imports of torch).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.executors import (
    ExecutorLost,
    Job,
    OnOutcome,
    Outcome,
    Setting,
    call,
    fail,
    node,
    thread_environment,
)
from workers.afar import work_folder
from workers.store import TrialFolder, sound_record

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # not noise: a trial that asks for no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}
LONGER = {"RAY_gcs_rpc_server_reconnect_timeout_s": "180"}
"""A driver that lost its head is ended by Ray after so many seconds (its default is 60), with exit code 1: time enough
to close the launch, an MLflow that does not answer included."""
os.environ.update({name: os.environ.get(name, value) for name, value in (QUIET | LONGER).items()})

import psutil  # noqa: E402
import ray  # noqa: E402  (its environment comes first)
from ray import tune  # noqa: E402

HEAD = ("gcs_server", "raylet")
LOOK_SECONDS = 0.5
ASK_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""A head that does not answer for so long is held to be gone; Ray itself gives up later, without a word."""
SHUTDOWN_SECONDS = 15.0
STARTED_DEAD = 3
"""The exit code of a launch whose head died while it started: trials are left to run."""
OBJECT_STORE_BYTES = 128 << 20
"""Only specs travel through Ray; its default is 30 % of the machine's memory."""


class RayTune:
    """As many trials at a time as the resources allow: on a CPU one thread each, one per core."""

    slots = 1

    def __init__(self, setting: Setting, *, address: str | None = None, cpus: int | None = None) -> None:
        """`cpus`: what a Ray of our own offers to trials, None for all of the machine."""
        self.setting, self.address, self.cpus = setting, address, cpus
        self._started = False

    def __enter__(self) -> RayTune:
        """Connect, or start Ray here. Raises UserError without a cluster, or where one trial can never fit."""
        self._started = not ray.is_initialized()
        try:
            with _our_signals():
                if self._started:
                    self._init()
            self.slots = self._count_slots()
            self._head = _Head(ray.get_runtime_context().gcs_address, ours=self.address in (None, "local"))
        except SystemExit as stop:  # SIGTERM, which ray.init answers in this way
            ray.shutdown()
            raise KeyboardInterrupt from stop
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            with _our_signals():
                ray.shutdown()

    def run(self, jobs: Sequence[Job], on_outcome: OnOutcome) -> None:
        """Tune runs in a thread of its own: this one waits for it, takes the signals, and sees whether Ray still lives,
        because a driver whose head is gone blocks in its calls and is ended by Ray three minutes later, in silence."""
        storage = Path(tempfile.mkdtemp(prefix="pift-tune-"))
        fit = _Thread(lambda: self._tuner(jobs, on_outcome, storage).fit())
        try:
            # Ray prints a dead worker's obituary to stdout, whatever one tells its loggers; stdout is the launch's
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _our_signals():
                fit.start()
                while fit.is_alive():
                    fit.join(LOOK_SECONDS)
                    if (lost := self._head.lost()) is not None:
                        self._give_up()
                        raise ExecutorLost(f"{lost}: what it ran goes on from its checkpoints with the next launch")
            fit.raise_error()
        finally:
            shutil.rmtree(storage, ignore_errors=True)

    def _give_up(self) -> None:
        """Leave a Ray whose head is gone, before Ray ends this process."""
        self._started = False
        self._head.end()
        down = _Thread(ray.shutdown)  # it waits for the head
        down.start()
        down.join(SHUTDOWN_SECONDS)

    def _init(self) -> None:
        paths = [path for path in (str(Path(__file__).parents[2]), *sys.path) if path and Path(path).exists()]
        environment = thread_environment(self.setting.threads) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.CRITICAL,
            "configure_logging": False,
            "namespace": "pift",
        }
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        if self.address in (None, "local"):
            os.environ.update(environment)  # processes that Ray starts here inherit it
            _start_here(common | {"num_cpus": self.cpus})
            return
        try:
            _knock(str(self.address))
            ray.init(address=self.address, runtime_env={"env_vars": environment | QUIET}, **common)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"executor.address={self.address!r} has no Ray cluster that answers ({_first_line(error)}); "
                "start one with `ray start --head`, or leave executor.address=null to run on this machine"
            ) from error

    def _count_slots(self) -> int:
        total = ray.cluster_resources()
        wanted = {"CPU": self.setting.cpu, "GPU": self.setting.gpu}
        room = [int(total.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount > 0]
        slots = min(room) if room else len(ray.nodes())
        if slots < 1 and self.address in (None, "local"):
            raise UserError(
                f"resources.cpu={self.setting.cpu:g} resources.gpu={self.setting.gpu:g} is more than this machine has "
                f"(cpu={total.get('CPU', 0):g} gpu={total.get('GPU', 0):g}); ask for less, as in resources=cpu"
            )
        return max(1, slots)

    def _tuner(self, jobs: Sequence[Job], on_outcome: OnOutcome, storage: Path) -> tune.Tuner:
        table = {job.key: {"spec": job.spec, "folder": str(job.folder)} for job in jobs}
        setting = asdict(self.setting) | {"stop": str(self.setting.stop)}
        trainable = tune.with_parameters(train, table=table, setting=setting)
        resources = {"cpu": self.setting.cpu, "gpu": self.setting.gpu}
        return tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"key": tune.grid_search([job.key for job in jobs])},
            tune_config=tune.TuneConfig(
                trial_name_creator=_key_of, trial_dirname_creator=_key_of, reuse_actors=True, max_concurrent_trials=None
            ),
            run_config=tune.RunConfig(
                name="pift",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(
                    max_failures=int(self.setting.limits.get("deaths", 3)), fail_fast=False
                ),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[_Outcomes({job.key: job.folder for job in jobs}, on_outcome, self.setting)],
                log_to_file=False,
            ),
        )


class _Thread(threading.Thread):
    """A thread whose exception is kept."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _Head:
    """Ray's own processes: does the head answer, and, where this process started them, do they live?"""

    def __init__(self, address: str, ours: bool) -> None:
        self.address = address
        self.processes = _head_processes() if ours else []
        self._answered = self._asked = time.monotonic()

    def lost(self) -> str | None:
        """What is gone, None while all is well."""
        if (dead := _dead(self.processes)) is not None:
            return dead
        now = time.monotonic()
        if now - self._asked > ASK_SECONDS:
            self._asked = now
            host, _, port = self.address.rpartition(":")
            with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=ASK_SECONDS):
                self._answered = time.monotonic()
        silent = self._asked - self._answered
        return f"Ray's head at {self.address} has not answered for {silent:.0f} s" if silent > SILENT_SECONDS else None

    def end(self) -> None:
        """End what is left of our own processes, so that no trial works on beside the next launch's."""
        with suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True) if self.processes else ():
                with suppress(psutil.Error):
                    process.kill()


def _head_processes() -> list[psutil.Process]:
    """Those of Ray that this process has started."""
    return [child for child in psutil.Process().children() if child.name() in HEAD]


def _dead(processes: Sequence[psutil.Process]) -> str | None:
    """Which of these is not alive, in words."""
    for process in processes:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return f"Ray's {process.name() if process.is_running() else 'head'} died (pid {process.pid})"
    return None


@contextmanager
def _leaving_a_dead_head() -> Iterator[None]:
    """While Ray starts: a head that dies leaves `ray.init` waiting until Ray ends this process minutes later, or makes
    it fail and end the process later still, because of a connection that nothing closes. So this process ends itself,
    at once and with a word; what a launch has written stays good, as after any kill."""
    over = threading.Event()
    seen: dict[int, psutil.Process] = {}

    def look() -> None:
        while not over.wait(LOOK_SECONDS / 5):
            with suppress(psutil.Error):
                seen.update({process.pid: process for process in _head_processes()})
                if (dead := _dead(list(seen.values()))) is not None and not over.is_set():
                    _leave(dead)

    watch = _Thread(look)
    watch.start()
    try:
        yield
    except Exception as error:
        if seen and not any(_dead([process]) is None and process.name() == HEAD[0] for process in _head_processes()):
            _leave(f"Ray's {HEAD[0]} died ({_first_line(error)})")
        raise
    finally:
        over.set()
        watch.join()


def _leave(dead: str) -> None:
    os.write(2, f"pift: {dead} while Ray started; nothing is lost: give the same command again\n".encode())
    os._exit(STARTED_DEAD)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would wait for minutes, deaf to Ctrl-C."""
    if found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=ASK_SECONDS).close()


def reach(address: str) -> str:
    """What a running cluster offers, in words. Raises UserError where none answers."""
    with RayTune(Setting(target="", stop=Path(), cpu=1, gpu=0), address=address):
        total = ray.cluster_resources()
        return f"{len(ray.nodes())} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"


def _start_here(common: Mapping[str, Any]) -> None:
    """Start Ray on this machine. It gives its own processes 30 s, too little on a busy one: try three times."""
    for attempt in (1, 2, 3):
        try:
            with _leaving_a_dead_head():
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if attempt == 3:
                raise UserError(
                    f"executor=ray cannot start Ray on this machine ({_first_line(error)}); "
                    "try again when it is less busy, or run with executor=inline"
                ) from error


def train(config: dict[str, Any], *, table: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    """What a Ray worker does: run the trial named by `config["key"]` and report how it ended, once."""
    key = config["key"]
    job = Job(key, dict(table[key]["spec"]), Path(table[key]["folder"]))
    made = Setting(**{**setting, "stop": Path(setting["stop"])})
    outcome = call(made, job)
    if outcome.state == "stopped" and node.leaving() and not made.stop.exists():
        node.wait_for_the_end()
        outcome = call(made, job)
    if outcome.kind == "device":  # this process's GPU context is broken for good; Tune starts another one
        os._exit(1)
    folder = job.folder if setting["url"] is None else work_folder(setting["url"], key)
    final = sound_record(TrialFolder(folder).done).get("final", {})
    tune.report(asdict(outcome) | final)


class _Outcomes(tune.Callback):
    """Tells the launch how each trial ended; one whose process never began is written down as failed first."""

    def __init__(self, folders: Mapping[str, Path], on_outcome: OnOutcome, setting: Setting) -> None:
        self.folders, self.on_outcome, self.setting = folders, on_outcome, setting

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune saves its callbacks beside its state, which nobody restores: this one is saved as nothing."""
        return tune.Callback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        said = (result.get("message"), result.get("kind"))
        self.on_outcome(_key_of(trial), Outcome(result.get("state", "failed"), result.get("step", 0), *said))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key = _key_of(trial)
        folder = TrialFolder(Path(self.folders[key]))
        message = f"the trial's process died: {_reason(trial)}"
        if self.setting.url is not None:
            ledger.Store(self.setting.url).refresh()
        attempt = ledger.last_attempt(folder)
        if attempt is None or attempt.content.get("launch") != self.setting.facts.get("launch"):
            with suppress(UserError):
                fail(self.setting, key, folder.root, message)
            self.on_outcome(key, Outcome("failed", 0, message, "bug"))
            return
        self.on_outcome(key, Outcome("stopped", ledger.detail(folder)["step"] or 0, message, "worker_died"))


def _key_of(trial: Any) -> str:
    return str(trial.config["key"])


def _reason(trial: Any) -> str:
    """What Tune knows about the death: the last words of the error file it keeps for the trial."""
    try:
        text = Path(trial.local_path, trial.run_metadata.error_filename).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return "no reason given"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "exit detail" in line or line.startswith("ray.exceptions.")]
    return (said or lines or ["no reason given"])[-1][:400]


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@contextmanager
def _our_signals() -> Iterator[None]:
    """Ray and Tune set signal handlers of their own: put the launch's back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
