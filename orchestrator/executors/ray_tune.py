"""Runs trials with Ray Tune, on this machine or on a cluster. The only file that imports ray.

Every launch is a fresh Tune run over the keys of the jobs; what was done before is the store's business, so
Tuner.restore is never used. A trial reports once, at its end: its journal and heartbeat are what the monitor reads.
Tune retries nothing. A worker process that dies without a word becomes FAILED.json of class "worker_died".
Processes are reused from trial to trial, which saves their start-up (about 3 s and the imports of torch).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.executors import Job, OnOutcome, Outcome, Setting, call, thread_environment
from workers.store import TrialFolder, read_json

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
os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})

import ray  # noqa: E402  (its environment comes first)
from ray import tune  # noqa: E402

OBJECT_STORE_BYTES = 128 << 20
"""Only specs travel through Ray; its default is 30 % of the machine's memory."""


class RayTune:
    """As many trials at a time as the resources allow: on a CPU one thread each, one per core."""

    slots = 1

    def __init__(self, setting: Setting, *, address: str | None = None) -> None:
        self.setting, self.address = setting, address
        self._started = False

    def __enter__(self) -> RayTune:
        """Connect, or start Ray here. Raises UserError without a cluster, or where one trial can never fit."""
        self._started = not ray.is_initialized()
        try:
            with _our_signals():
                if self._started:
                    self._init()
            self.slots = self._count_slots()
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
        storage = Path(tempfile.mkdtemp(prefix="pift-tune-"))
        try:
            # Ray prints a dead worker's obituary to stdout, whatever one tells its loggers; stdout is the launch's
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _our_signals():
                self._tuner(jobs, on_outcome, storage).fit()
        finally:
            shutil.rmtree(storage, ignore_errors=True)

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
            _start_here(common)
            return
        try:
            ray.init(address=self.address, runtime_env={"env_vars": environment | QUIET}, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
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
                failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                callbacks=[_Outcomes({job.key: job.folder for job in jobs}, on_outcome)],
                log_to_file=False,
            ),
        )


def _start_here(common: Mapping[str, Any]) -> None:
    """Start Ray on this machine. It gives its own processes 30 s, too little on a busy one: try three times."""
    for attempt in (1, 2, 3):
        try:
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
    outcome = call(Setting(**{**setting, "stop": Path(setting["stop"])}), job)
    final = (read_json(TrialFolder(job.folder).done) or {}).get("final", {})
    tune.report({"state": outcome.state, "step": outcome.step, "message": outcome.message, **final})


class _Outcomes(tune.Callback):
    """Tells the launch how each trial ended; a trial whose process died is written down as failed first."""

    def __init__(self, folders: Mapping[str, Path], on_outcome: OnOutcome) -> None:
        self.folders, self.on_outcome = folders, on_outcome

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune saves its callbacks beside its state, which nobody restores: this one is saved as nothing."""
        return tune.Callback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        outcome = Outcome(result.get("state", "failed"), result.get("step", 0), result.get("message"))
        self.on_outcome(_key_of(trial), outcome)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        key = _key_of(trial)
        folder = TrialFolder(Path(self.folders[key]))
        message = f"the trial's process died: {_reason(trial)}"
        ledger.fail(folder, key, "worker_died", message)
        self.on_outcome(key, Outcome(ledger.state(folder), ledger.detail(folder)["step"] or 0, message))


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
