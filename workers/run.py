"""Run ONE trial, from its spec to DONE.json or FAILED.json. No Ray, no MLflow, no Hydra: torch, diffusers, peft.

    python -m workers.run store/trials/<key>        the trial whose spec.json lies there, under a debugger if you like

    evaluate at step 0
    gradient_steps times:  method.step(), journal, evaluate and checkpoint when due
    save the adapter, then DONE.json, last

A trial resumes from checkpoint.pt as if nothing had happened: adapter, optimiser, replay buffer, value network, all
generators, counters. Its journal is silent up to the last step it holds already.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.core.divergence import NotPositive
from workers.evaluate import evaluate, fixed_noise, save_strip
from workers.generators import Generators
from workers.initial_law import GaussianInitialLaw
from workers.known import known_of
from workers.methods import Method, NotFinite
from workers.recorder import Journal, read_journal
from workers.regularise import Regulariser, calibrate, restore
from workers.rollout import Budget, Problem, Reward, TrainedModel, beta_of
from workers.spec import TrialSpec, locate, settings
from workers.store import TrialFolder, read_json, sha256, write_json, write_whole


@dataclass(frozen=True)
class Outcome:
    """How a trial went: state "done", "failed", "diverged" or "stopped"; the step it got to; what went wrong."""

    state: str
    step: int
    message: str | None = None


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


def build(spec: TrialSpec, folder: TrialFolder, device: str) -> Trial:
    """Load the components a spec names and put them together."""
    generators = Generators(spec.seed)
    model = build_model(spec, generators, device)
    reward = locate(spec.reward["_target_"])(**settings(spec.reward), device=device)
    judge = None if spec.judge is None else locate(spec.judge["_target_"])(**settings(spec.judge), device=device)
    problem = Problem(
        model=model,
        reward=reward,
        prompt=spec.prompt,
        beta=beta_of(spec, model, reward),
        trajectories=spec.train.trajectories,
        micro_batch=spec.train.micro_batch,
        generators=generators,
        budget=Budget(),
        initial=initial_law_of(spec, model),
    )
    method_class = locate(spec.method["_target_"])
    method = method_class(problem, method_class.Config(**settings(spec.method)))
    return Trial(spec, folder, model, reward, judge, problem, method, generators)


def initial_law_of(spec: TrialSpec, model: TrainedModel) -> GaussianInitialLaw | None:
    """The learned law of Y_0 that a spec asks for, untrained."""
    return (
        GaussianInitialLaw(model.latent_shape, model.device, model.dtype) if spec.initial_law == "gaussian" else None
    )


def build_model(spec: TrialSpec, generators: Generators, device: str) -> Any:
    """The model a spec names, its adapter drawn from the generator `lora_init`."""
    return locate(spec.model["_target_"])(
        **settings(spec.model),
        prompt=spec.prompt,
        sampler=spec.sampler,
        lora=spec.lora,
        generators=generators,
        device=device,
    )


def run_trial(
    spec: Mapping[str, Any],
    folder: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    should_stop: Callable[[], bool] | None = None,
    attempt: int = 1,
) -> Outcome:
    """Run or resume the trial in `folder` (store/trials/<key>); see the module's docstring.

    `threads`: CPU threads of torch. `should_stop` is asked after every gradient step; True checkpoints and returns
    "stopped". A failure of training writes FAILED.json and is returned, not raised; an interrupt is raised.
    """
    where = TrialFolder(Path(folder))
    checked = TrialSpec.from_dict(spec)
    write_json(where.spec, checked.to_dict())
    where.failed.unlink(missing_ok=True)
    torch.set_num_threads(threads)
    started = time.time()
    progress = Heartbeat(where, checked.train.gradient_steps, attempt)
    try:
        with progress:
            return _train(checked, where, device, should_stop, progress, started)
    except Exception as error:
        return _failure(where, checked, progress.step, error)


def limit_gpu_memory(share: float) -> None:
    """Keep this process to a share (0..1) of the GPU's memory; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def _train(
    spec: TrialSpec,
    folder: TrialFolder,
    device: str,
    should_stop: Callable[[], bool] | None,
    progress: Heartbeat,
    started: float,
) -> Outcome:
    trial = build(spec, folder, device)
    journal = Journal(folder.journal)
    noise = fixed_noise(spec.prompt, spec.eval.samples, trial.model.chain.T, trial.model.latent_shape)

    def measure(metrics: Mapping[str, float]) -> None:
        """Evaluate at the present step and journal it together with the step's training metrics."""
        if trial.step <= journal.last_step:
            return
        found = evaluate(trial.problem, trial.judge, noise, spec.train.micro_batch)
        exact = {} if trial.problem.known is None else trial.problem.known.metrics()
        if trial.regulariser is not None and trial.step == 0:
            rewards = torch.tensor(found.samples["reward"], dtype=torch.float64)
            exact |= trial.regulariser.metrics | {"regulariser/normaliser_error": trial.regulariser.error(rewards)}
        strip = None
        if trial.model.pictures:
            picture = folder.picture(trial.step)
            save_strip(found.images[: spec.eval.pictures], picture)
            strip = str(picture.relative_to(folder.root))
        journal.write(trial.step, {**metrics, **found.metrics, **exact}, found.samples, strip)

    resumed = _load_checkpoint(trial)
    if not resumed and spec.regulariser != "kl":
        trial.regulariser = calibrate(spec, trial.problem)
    trial.problem.transform = trial.regulariser
    trial.problem.known = known_of(trial.problem)
    if not resumed:
        measure(trial.problem.budget.metrics())
    progress.step = trial.step

    while trial.step < spec.train.gradient_steps:
        trial.problem.lr_factor = spec.train.lr_factor(trial.step)
        metrics = trial.method.step() | trial.problem.budget.metrics()
        trial.step = progress.step = trial.step + 1
        last = trial.step == spec.train.gradient_steps
        if last or trial.step % spec.eval.every == 0:
            measure(metrics)
        else:
            journal.write(trial.step, metrics)
        stop = should_stop is not None and should_stop()
        if last or stop or trial.step % spec.train.checkpoint_every == 0:
            _save_checkpoint(trial)
        if stop and not last:
            return Outcome("stopped", trial.step)

    _finish(trial, started, device, progress.attempt)
    return Outcome("done", trial.step)


def _save_checkpoint(trial: Trial) -> None:
    state = {
        "step": trial.step,
        "adapter": trial.model.state_dict(),
        "method": trial.method.state_dict(),
        "generators": trial.generators.state_dict(),
        "budget": vars(trial.problem.budget),
        "initial_law": None if trial.problem.initial is None else trial.problem.initial.trained.state_dict(),
        "regulariser": None if trial.regulariser is None else trial.regulariser.state_dict(),
    }
    write_whole(trial.folder.checkpoint, lambda temporary: torch.save(state, temporary))


def _load_checkpoint(trial: Trial) -> bool:
    """Put a checkpoint back, if there is one."""
    if not trial.folder.checkpoint.exists():
        return False
    state = torch.load(trial.folder.checkpoint, map_location=trial.model.device, weights_only=True)
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


def _finish(trial: Trial, started: float, device: str, attempt: int) -> None:
    """Save the adapter, then DONE.json, last: its presence means that everything it names is whole."""
    folder = trial.folder
    trial.model.save_adapter(folder.adapter)
    if trial.problem.initial is not None:
        trial.problem.initial.trained.save(folder.adapter)
    records = [record for record in read_journal(folder.journal) if "samples" in record]
    files = [folder.spec, folder.journal, *sorted(folder.adapter.glob("*"))]
    write_json(
        folder.done,
        {
            "key": trial.spec.key,
            "started_at": started,
            "finished_at": time.time(),
            "seconds": time.time() - started,
            "steps": trial.step,
            "attempt": attempt,
            "device": device,
            "torch": torch.__version__,
            "initial": records[0]["metrics"],
            "final": records[-1]["metrics"],
            "files": {str(file.relative_to(folder.root)): sha256(file) for file in files},
        },
    )


def _failure(folder: TrialFolder, spec: TrialSpec, step: int, error: Exception) -> Outcome:
    """Write FAILED.json and say what class of failure it was."""
    kind, state = "bug", "failed"
    if isinstance(error, NotFinite):
        kind, state = "diverged", "diverged"
    elif isinstance(error, NotPositive):
        kind = "regulariser"
    elif isinstance(error, torch.OutOfMemoryError):
        kind = "out_of_memory"
    elif isinstance(error, OSError):
        kind = "storage"
    message = f"{type(error).__name__}: {error}" if kind == "bug" else str(error)
    text = "".join(traceback.format_exception(error))
    content = {
        "key": spec.key,
        "class": kind,
        "message": message,
        "traceback": text,
        "step": step,
        "failed_at": time.time(),
    }
    with suppress(OSError):
        write_json(folder.failed, content)
    return Outcome(state, step, message)


class Heartbeat:
    """Writes running.json every second while a trial is at work, and removes it at the end."""

    def __init__(self, folder: TrialFolder, steps: int, attempt: int) -> None:
        self.folder, self.steps, self.attempt = folder, steps, attempt
        self.step, self.started = 0, time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._write()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self.folder.running.unlink()

    def _beat(self) -> None:
        while not self._over.wait(1.0):
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": self.started, "beat": time.time()}
        write_json(self.folder.running, content | {"step": self.step, "steps": self.steps, "attempt": self.attempt})


def main() -> int:
    parser = argparse.ArgumentParser(description="Run or resume the trial whose spec.json lies in a folder.")
    parser.add_argument("folder", type=Path, help="store/trials/<key>")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    spec = read_json(TrialFolder(options.folder).spec)
    if spec is None:
        print(f"{options.folder} has no spec.json; plan a sweep first: pift launch ...", file=sys.stderr)
        return 2
    outcome = run_trial(spec, options.folder, device=options.device, threads=options.threads)
    print(
        f"{outcome.state} at step {outcome.step}" + (f": {outcome.message}" if outcome.message else ""), file=sys.stderr
    )
    return 0 if outcome.state == "done" else 3


if __name__ == "__main__":
    sys.exit(main())
