"""Run ONE trial, from its spec to DONE.json or FAILED.json. No Ray, no MLflow, no Hydra: torch, diffusers, peft.

    python -m workers.run store/trials/<key>        the trial whose spec.json lies there, under a debugger if you like

    begin an attempt (workers/lease.py), unless another process works on the trial
    evaluate at step 0
    gradient_steps times:  method.step(), journal, evaluate and checkpoint when due
    save the adapter, then DONE.json, last

A trial resumes from its newest sound checkpoint as if nothing had happened: adapter, optimiser, replay buffer, value
network, all generators, counters. Its journal is silent up to the last step it holds already.

What goes wrong has a class, and the class decides what is done (`classify`):
    out_of_memory   one more attempt with half the micro-batch, same effective batch, marked in attempt and DONE.json
    diverged        a loss, gradient or reward that is not finite, a path KL beyond limits.kl_nats: FAILED.json
    reward, loading, regulariser, bug        FAILED.json with message and traceback; `pift retry` runs it again
    storage         records wait in memory while training goes on, for limits.storage_seconds; then it can be resumed
    device          the GPU's driver failed: resumable in a new process
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from workers import checkpoint
from workers.core.divergence import NotPositive
from workers.devices import device_name, free_memory
from workers.evaluate import evaluate, fixed_noise, save_strip
from workers.generators import Generators
from workers.guard import Guard, Limits, RewardFailed, device_failed, out_of_memory
from workers.initial_law import GaussianInitialLaw
from workers.known import known_of
from workers.lease import Attempt, Attempts, Folder, Lease, LeaseLost, acquire, seconds_at_work
from workers.methods import Method, NotFinite
from workers.recorder import Journal, StorageFailed, read_journal, scan
from workers.regularise import Regulariser, calibrate, restore
from workers.remote import light
from workers.rollout import Budget, Problem, Reward, TrainedModel, beta_of
from workers.spec import TrialSpec, locate, settings
from workers.store import (
    TrialFolder,
    forgive,
    read_json,
    seal,
    sound_picture,
    sound_record,
    write_json,
    write_record,
)

WARNINGS = 20
"""As many of an attempt's warnings are kept."""
OBJECTIVE = "eval/objective"
KL_METRICS = ("eval/kl_path_nats", "train/kl_path_nats")


@dataclass(frozen=True)
class Outcome:
    """How a trial went: state "done", "failed", "diverged", "stopped" (it can be resumed) or "elsewhere" (another
    process works on it); the step it got to; what went wrong and its class (see the module)."""

    state: str
    step: int
    message: str | None = None
    kind: str | None = None


@dataclass
class Trial:
    """Everything of one trial in memory."""

    spec: TrialSpec
    folder: TrialFolder
    model: TrainedModel
    reward: Reward
    judge: Reward | None
    problem: Problem
    method: Method
    generators: Generators
    regulariser: Regulariser | None = None
    step: int = 0


def build(spec: TrialSpec, folder: TrialFolder, device: str, micro_batch: int | None = None) -> Trial:
    """Load the components a spec names and put them together; `micro_batch` where the spec's own did not fit."""
    generators = Generators(spec.seed)
    model = build_model(spec, generators, device, micro_batch)
    reward = locate(spec.reward["_target_"])(**settings(spec.reward), device=device)
    judge = None if spec.judge is None else locate(spec.judge["_target_"])(**settings(spec.judge), device=device)
    problem = Problem(
        model=model,
        reward=reward,
        prompt=spec.prompt,
        beta=beta_of(spec, model, reward),
        trajectories=spec.train.trajectories,
        micro_batch=micro_batch or spec.train.micro_batch,
        generators=generators,
        budget=Budget(),
        initial=initial_law_of(spec, model),
        offloaded=_offloaded(model, reward, judge),
        names=(f"reward={spec.reward['name']}", f"judge={(spec.judge or {}).get('name')}"),
    )
    method_class = locate(spec.method["_target_"])
    method = method_class(problem, method_class.Config(**settings(spec.method)))
    return Trial(spec, folder, model, reward, judge, problem, method, generators)


def _offloaded(model: TrainedModel, *rewards: Reward | None) -> list[nn.Module]:
    """The networks of a model that offloads, and those of its rewards, in main memory."""
    networks = list(getattr(model, "offloaded", ()))
    for reward in rewards if networks else ():
        networks += [] if reward is None else [part for part in vars(reward).values() if isinstance(part, nn.Module)]
    for network in networks:
        network.to("cpu")
    return networks


def initial_law_of(spec: TrialSpec, model: TrainedModel) -> GaussianInitialLaw | None:
    """The learned law of Y_0 that a spec asks for, untrained."""
    return (
        GaussianInitialLaw(model.latent_shape, model.device, model.dtype) if spec.initial_law == "gaussian" else None
    )


def build_model(spec: TrialSpec, generators: Generators, device: str, micro_batch: int | None = None) -> Any:
    """The model a spec names, its adapter drawn from the generator `lora_init`."""
    model = locate(spec.model["_target_"])(
        **settings(spec.model),
        prompt=spec.prompt,
        sampler=spec.sampler,
        lora=spec.lora,
        generators=generators,
        device=device,
    )
    if hasattr(model, "pass_rows"):
        model.pass_rows = micro_batch or spec.train.micro_batch
    return model


@dataclass(frozen=True)
class Setting:
    """How a trial is run on this machine."""

    device: str
    should_stop: Callable[[], bool]
    limits: Limits
    facts: Mapping[str, Any]
    """For the attempt's record: who asked for it."""
    attempts: Attempts


def run_trial(
    spec: Mapping[str, Any],
    folder: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    should_stop: Callable[[], bool] | None = None,
    limits: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    attempts: Attempts | None = None,
) -> Outcome:
    """Run or resume the trial in `folder` (store/trials/<key>); see the module's docstring.

    `threads`: CPU threads of torch. `should_stop` is asked after every gradient step; True checkpoints and returns
    "stopped". `limits`: see guard.Limits. `facts` (sweep, launch) go into the attempt's record; `attempts`: where those
    are kept, the trial's folder by default. A failure is written down and returned, not raised; an interrupt is raised.
    """
    where = TrialFolder(Path(folder))
    checked = TrialSpec.from_dict(spec)
    torch.set_num_threads(threads)
    setting = Setting(
        device=device,
        should_stop=should_stop or (lambda: False),
        limits=Limits(**(limits or {})),
        facts=facts or {},
        attempts=attempts or Folder(where.attempts),
    )
    while True:
        try:
            begun = _begin(checked, where, setting)
        except OSError as error:
            return Outcome("stopped", 0, f"{where.root} cannot be written: {error.strerror or error}", "storage")
        if isinstance(begun, Outcome):
            return begun
        outcome = _attempt(checked, where, setting, begun)
        if outcome.kind != "out_of_memory" or outcome.state != "stopped":
            return outcome
        free_memory()


# ---- attempts


def _begin(spec: TrialSpec, folder: TrialFolder, setting: Setting) -> Lease | Outcome:
    """The lease of a new attempt, or why there is none: done, at work elsewhere, dying again and again."""
    setting.attempts.fetch(light)
    steps, reached = spec.train.gradient_steps, scan(folder.journal).last_step
    if sound_record(folder.done) and setting.attempts.delivered():
        return Outcome("done", steps)
    deaths = _deaths(setting, reached)
    if deaths and deaths >= setting.limits.deaths:
        return Outcome(
            "stopped", max(reached, 0),
            f"its process died {deaths} times in a row without a word and without a step more than {max(reached, 0)}, "
            "often for want of memory: run fewer trials at once, or lower train.micro_batch; then launch again",
            "worker_died",
        )  # fmt: skip
    found = acquire(
        setting.attempts,
        {"step": max(reached, 0), "steps": steps, "from_step": reached, **setting.facts}
        | _micro_batch(spec, setting),
    )
    if isinstance(found, Attempt):
        who = f"pid {found.content.get('pid')} on {found.content.get('host')}"
        return Outcome("elsewhere", int(found.content.get("step", 0)), f"at work elsewhere: attempt of {who}")
    try:
        setting.attempts.fetch()
        if sound_record(folder.done):  # by another process, a moment ago; or here, by one that could not send it
            return _sent(Outcome("done", steps), setting, found)
        write_json(folder.spec, spec.to_dict())
        forgive(folder)
    except BaseException as error:
        _end(found, "storage" if isinstance(error, OSError) else "interrupted", message=str(error))
        raise
    return found


def _deaths(setting: Setting, reached: int) -> int:
    """How many of the newest attempts, all of this launch, ended without a word (or with a broken device) and without
    a new journaled step."""
    count = 0
    for number in reversed(setting.attempts.numbers()):
        found = setting.attempts.read(number)
        content = {} if found is None else found.content
        silent = not content.get("ended") or content.get("how") == "device"
        ours = content.get("launch") is not None and content.get("launch") == setting.facts.get("launch")
        if not (silent and ours and content.get("from_step") == reached):
            break
        count += 1
    return count


def _micro_batch(spec: TrialSpec, setting: Setting) -> dict[str, int]:
    """{"micro_batch": n} once the spec's own did not fit: that of the newest attempt, halved where it did not fit."""
    size = spec.train.micro_batch
    for number in setting.attempts.numbers():
        found = setting.attempts.read(number)
        content = {} if found is None else found.content
        size = int(content.get("micro_batch", size))
        if content.get("how") == "out_of_memory":
            size = max(1, size // 2)
    return {} if size == spec.train.micro_batch else {"micro_batch": size}


def _may_halve(lease: Lease, setting: Setting, micro_batch: int) -> bool:
    """One retry: not when the attempt before this one ran out of memory too."""
    before = setting.attempts.read(lease.number - 1)
    return micro_batch > 1 and (before is None or before.content.get("how") != "out_of_memory")


def _attempt(spec: TrialSpec, folder: TrialFolder, setting: Setting, lease: Lease) -> Outcome:
    """One attempt, from its lease to its last words."""
    run = Run(spec, folder, setting, lease)
    with setting.attempts.sending(lease):
        try:
            outcome = run.train()
        except LeaseLost as lost:
            outcome = Outcome("elsewhere", run.step, str(lost))
        except Exception as error:
            outcome = run.failure(error)
        except BaseException:
            _end(lease, "interrupted", step=run.step)
            raise
        finally:
            run.guard.close()
        outcome = _delivered(outcome, setting)
    _end(lease, outcome.kind or outcome.state, step=outcome.step, message=outcome.message)
    return outcome


def _sent(outcome: Outcome, setting: Setting, lease: Lease) -> Outcome:
    """End an attempt that had nothing to do but to send what lies here."""
    with setting.attempts.sending(lease):
        outcome = _delivered(outcome, setting)
    _end(lease, outcome.kind or outcome.state)
    return outcome


def _delivered(outcome: Outcome, setting: Setting) -> Outcome:
    """The outcome, once the trial's files are where they are kept; they stay here for the next attempt if they cannot
    be sent."""
    if outcome.state == "elsewhere":
        return outcome
    try:
        setting.attempts.deliver(setting.limits.storage_seconds)
    except LeaseLost as lost:
        return Outcome("elsewhere", outcome.step, str(lost))
    except OSError as error:
        return Outcome("stopped", outcome.step, f"the store cannot be written: {error}", "storage")
    return outcome


def _end(lease: Lease, how: str, **facts: Any) -> None:
    with suppress(OSError):
        lease.end(how, **facts)


# ---- one attempt


@dataclass
class Run:
    """One attempt at a trial."""

    spec: TrialSpec
    folder: TrialFolder
    setting: Setting
    lease: Lease
    step: int = 0
    loading: bool = True
    started: float = field(default_factory=time.time)
    warnings: list[str] = field(default_factory=list)
    begun: tuple[int, float] = (0, 0.0)
    """The step that this attempt trains on from, and when it began to."""
    undrawn: list[tuple[torch.Tensor, Path]] = field(default_factory=list)
    """Pictures that could not be written yet."""
    unwritten: OSError | None = None
    """Why not."""

    def __post_init__(self) -> None:
        self.guard = Guard(self.setting.limits, self.warn)
        self.micro_batch = int(self.lease.content.get("micro_batch", self.spec.train.micro_batch))

    def train(self) -> Outcome:
        """To the last step, or to where it is asked to stop."""
        spec, folder = self.spec, self.folder
        trial = build(spec, folder, self.setting.device, self.micro_batch)
        trial.problem.guard = self.guard
        self.loading = False
        self.journal = Journal(
            folder.journal,
            patience=self.setting.limits.storage_seconds,
            before=self.lease.check,
            set_aside=folder.copy_aside,
        )
        if self.journal.problem:
            self.warn(f"the journal is damaged at {self.journal.problem}; what follows is computed again")
        rated = (record for record in self.journal.records if OBJECTIVE in record["metrics"])
        self.objectives = {record["step"]: record["metrics"][OBJECTIVE] for record in rated}
        self.noise = fixed_noise(spec.prompt, spec.eval.samples, trial.model.chain.T, trial.model.latent_shape)
        resumed = self._resume(trial)
        if not resumed and spec.regulariser != "kl":
            trial.regulariser = calibrate(spec, trial.problem)
        trial.problem.transform = trial.regulariser
        trial.problem.known = known_of(trial.problem)
        if not resumed or trial.step in self.objectives:
            self._measure(trial, trial.problem.budget.metrics())
        self._arrive(trial)
        self.begun = (trial.step, time.time())
        best = max((J for step, J in self.objectives.items() if 0 < step <= trial.step), default=-math.inf)

        while trial.step < spec.train.gradient_steps:
            trial.problem.lr_factor = spec.train.lr_factor(trial.step)
            metrics = trial.method.step() | trial.problem.budget.metrics()
            trial.step += 1
            last = trial.step == spec.train.gradient_steps
            self._check_kl(metrics)
            if last or trial.step % spec.eval.every == 0:
                self._measure(trial, metrics)
            else:
                self.journal.write(trial.step, metrics)
            self._arrive(trial)
            objective = self.objectives.get(trial.step)
            improved = objective is not None and objective > best
            best = max(best, -math.inf if objective is None else objective)
            stop = self.setting.should_stop()
            if last or stop:
                self._patiently(lambda: self._save(trial, objective))  # noqa: B023 (called at once)
            elif improved or trial.step % spec.train.checkpoint_every == 0:
                self._save_or_warn(trial, objective)
            if stop and not last:
                return Outcome("stopped", trial.step)

        self._patiently(lambda: self._finish(trial))
        return Outcome("done", trial.step)

    def warn(self, text: str) -> None:
        """Something worth knowing that stops nothing; it stands in the attempt's record and in DONE.json."""
        if len(self.warnings) < WARNINGS:
            self.warnings.append(f"step {self.step}: {text}")
            self.lease.note(warnings=list(self.warnings))

    def failure(self, error: Exception) -> Outcome:
        """What an exception of this attempt comes to; FAILED.json where it is final."""
        kind = classify(error, self.loading)
        message = f"{type(error).__name__}: {error}" if kind in ("bug", "loading") else str(error)
        message = message.strip() or type(error).__name__
        if kind == "out_of_memory":
            size, first = self.micro_batch, message.splitlines()[0]
            if _may_halve(self.lease, self.setting, size):
                traceback.clear_frames(error.__traceback__)
                return Outcome("stopped", self.step, f"out of memory with train.micro_batch={size}: {first}", kind)
            message = (
                f"out of memory with train.micro_batch={size} too: {first}; lower train.trajectories, sampler.steps or "
                "the number of trials on one GPU (resources.gpu), then pift retry"
            )
        if kind == "storage":
            return Outcome("stopped", self.step, f"the store cannot be written: {message}", kind)
        if kind == "device":
            return Outcome("stopped", self.step, f"the device failed: {message.splitlines()[0]}", kind)
        failure = {
            "key": self.spec.key,
            "class": kind,
            "message": message,
            "traceback": "".join(traceback.format_exception(error)),
            "signature": signature(error),
            "step": self.step,
            "attempt": self.lease.number,
            "failed_at": time.time(),
        }
        with suppress(OSError):
            write_record(self.folder.failed, failure)
        return Outcome("diverged" if kind == "diverged" else "failed", self.step, message, kind)

    def _arrive(self, trial: Trial) -> None:
        self.step = trial.step
        self.lease.note(step=trial.step)

    def _check_kl(self, metrics: Mapping[str, float]) -> None:
        limit = self.setting.limits.kl_nats
        for name in KL_METRICS:
            if limit is not None and metrics.get(name, 0.0) > limit:
                raise NotFinite(
                    f"{name} is {metrics[name]:.3g}, beyond limits.kl_nats={limit:g}: the control has left the "
                    "pre-trained model; a larger beta or a smaller method.lr holds it"
                )

    def _measure(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        """Evaluate at the present step and journal it together with the step's training metrics. At a step that is
        journaled already, only a picture that was lost is drawn again."""
        picture = self.folder.picture(trial.step)
        known = trial.step <= self.journal.last_step
        if known and (not trial.model.pictures or sound_picture(picture)):
            return
        found = evaluate(trial.problem, trial.judge, self.noise, self.micro_batch)
        strip = None
        if trial.model.pictures:
            self.undrawn.append((found.images[: self.spec.eval.pictures], picture))
            self._draw()
            strip = str(picture.relative_to(self.folder.root))
        if known:
            return
        exact = {} if trial.problem.known is None else trial.problem.known.metrics()
        if trial.regulariser is not None and trial.step == 0:
            rewards = torch.tensor(found.samples["reward"], dtype=torch.float64)
            exact |= trial.regulariser.metrics | {"regulariser/normaliser_error": trial.regulariser.error(rewards)}
        self._check_kl(found.metrics)
        self.journal.write(trial.step, {**metrics, **found.metrics, **exact}, found.samples, strip)
        self.objectives[trial.step] = found.metrics[OBJECTIVE]

    def _draw(self) -> bool:
        """Write the pictures that wait; True when none waits any more."""
        self.lease.check()
        while self.undrawn:
            try:
                save_strip(*self.undrawn[0])
            except OSError as error:
                self.unwritten = error
                self.warn(f"{self.undrawn[0][1].name} cannot be written yet: {error}")
                return False
            self.undrawn.pop(0)
        return True

    # ---- the folder

    def _resume(self, trial: Trial) -> bool:
        """Put the newest sound checkpoint back, if there is one."""
        state, problems = checkpoint.newest(self.folder, self.journal.last_step, trial.model.device)
        for problem in problems:
            self.warn(f"{problem}; moved to damaged/")
        if state is None:
            return False
        trial.model.load_state_dict(state["adapter"])
        trial.method.load_state_dict(state["method"])
        trial.generators.load_state_dict({name: value.cpu() for name, value in state["generators"].items()})
        vars(trial.problem.budget).update(state["budget"])
        if trial.problem.initial is not None:
            trial.problem.initial.trained.load_state_dict(state["initial_law"])
        if state.get("regulariser") is not None:
            trial.regulariser = restore(trial.spec, state["regulariser"])
        trial.step = state["step"]
        return True

    def _save(self, trial: Trial, objective: float | None) -> None:
        """Write a checkpoint, the journal before it. Raises OSError."""
        self._catch_up()
        self.lease.check()
        initial = trial.problem.initial
        state = {
            "step": trial.step,
            "adapter": trial.model.state_dict(),
            "method": trial.method.state_dict(),
            "generators": trial.generators.state_dict(),
            "budget": vars(trial.problem.budget),
            "initial_law": None if initial is None else initial.trained.state_dict(),
            "regulariser": None if trial.regulariser is None else trial.regulariser.state_dict(),
        }
        checkpoint.save(self.folder, trial.step, state, objective)

    def _catch_up(self) -> None:
        """Write the pictures and the records that wait. Raises OSError."""
        failed = None if self._draw() else self.unwritten
        failed = failed or (None if self.journal.flush() else self.journal.unwritten)
        if failed is not None:
            raise failed

    def _save_or_warn(self, trial: Trial, objective: float | None) -> None:
        try:
            self._save(trial, objective)
        except OSError as error:
            self.warn(f"no checkpoint: {error}; the one before it stands")

    def _patiently(self, act: Callable[[], None]) -> None:
        """Do what has to be written, again and again for limits.storage_seconds. Raises StorageFailed."""
        deadline, pause = time.monotonic() + self.setting.limits.storage_seconds, 0.5
        while True:
            try:
                return act()
            except StorageFailed:
                raise
            except (OSError, SafetensorError) as error:
                if time.monotonic() + pause > deadline:
                    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
                    place = getattr(error, "filename", None) or str(self.folder.root)
                    raise StorageFailed(number or errno.EIO, reason or str(error), place) from error
                self.warn(f"{error}; trying again")
                time.sleep(pause)
                pause = min(2 * pause, 30.0)

    def _finish(self, trial: Trial) -> None:
        """Save the adapter, then DONE.json, last: its presence means that everything it names is whole."""
        folder = self.folder
        self._catch_up()
        self.lease.check()
        trial.model.save_adapter(folder.adapter)
        if trial.problem.initial is not None:
            trial.problem.initial.trained.save(folder.adapter)
        records = [record for record in read_journal(folder.journal) if "samples" in record]
        folders = (folder.adapter, folder.root / "pictures")
        files = [folder.spec, folder.journal, *(path for place in folders for path in sorted(place.glob("[!.]*")))]
        now = time.time()
        content = {
            "key": trial.spec.key,
            "started_at": self.started,
            "finished_at": now,
            "seconds": now - self.started + self._seconds_before(),
            "steps": trial.step,
            "attempt": self.lease.number,
            "device": self.setting.device,
            "device_name": device_name(self.setting.device),
            "torch": torch.__version__,
            "warnings": self.warnings,
            "initial": records[0]["metrics"],
            "final": records[-1]["metrics"],
            "files": {str(file.relative_to(folder.root)): seal(file) for file in files},
        }
        if trial.step > self.begun[0]:
            content["seconds_per_step"] = (now - self.begun[1]) / (trial.step - self.begun[0])
        if self.micro_batch != self.spec.train.micro_batch:
            content["micro_batch"] = self.micro_batch
        write_record(folder.done, content)

    def _seconds_before(self) -> float:
        """How long the earlier attempts were at work."""
        attempts = self.setting.attempts
        found = [attempts.read(number) for number in attempts.numbers() if number < self.lease.number]
        return sum(seconds_at_work(attempt.content) for attempt in found if attempt is not None)


def classify(error: Exception, loading: bool = False) -> str:
    """The class of a failure; `loading`: it happened while the components were put together."""
    if isinstance(error, NotFinite):
        return "diverged"
    if isinstance(error, NotPositive):
        return "regulariser"
    if isinstance(error, RewardFailed):
        return "reward"
    if out_of_memory(error):
        return "out_of_memory"
    if device_failed(error):
        return "device"
    if isinstance(error, OSError):
        return "loading" if loading else "storage"
    return "bug"


def signature(error: BaseException) -> str:
    """What two failures have in common when they are one bug: the exception's type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    text = "\n".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in frames)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run or resume the trial whose spec.json lies in a folder.")
    parser.add_argument("folder", type=Path, help="store/trials/<key>")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    try:
        spec = read_json(TrialFolder(options.folder).spec)
    except ValueError as error:
        print(f"{options.folder}/spec.json is damaged ({error}); pift launch writes it anew", file=sys.stderr)
        return 2
    if spec is None:
        print(f"{options.folder} has no spec.json; plan a sweep first: pift launch ...", file=sys.stderr)
        return 2
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal(asked))
    outcome = run_trial(
        spec, options.folder, device=options.device, threads=options.threads, should_stop=lambda: bool(asked)
    )
    print(
        f"{outcome.state} at step {outcome.step}" + (f": {outcome.message}" if outcome.message else ""), file=sys.stderr
    )
    return 130 if asked and outcome.state == "stopped" else 0 if outcome.state == "done" else 3


def _on_signal(asked: list[int]) -> Callable[[int, Any], None]:
    """The first signal asks for a checkpoint and a stop, the second one leaves at once."""

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nstopping: the trial writes a checkpoint; once more to leave at once\n")

    return handle


if __name__ == "__main__":
    sys.exit(main())
