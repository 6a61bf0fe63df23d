"""A `run_trial` that trains nothing but writes everything the contract asks for: the tests of the driver run it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.grid import Cell, Plan
from workers.lease import Attempt, Folder, Lease, acquire
from workers.recorder import Journal
from workers.spec import Evaluation, Lora, Sampler, Train, TrialSpec
from workers.store import TrialFolder, forgive, seal, write_json, write_record, write_whole

TARGET = f"{__name__}.run_trial"


@dataclass(frozen=True)
class Outcome:
    state: str
    step: int
    message: str | None = None
    kind: str | None = None


def spec(seed: int = 0, beta: float = 0.1, steps: int = 4, **method: Any) -> TrialSpec:
    """A spec whose method settings tell the fake trial what to do: fail_at, diverge_at, die_at,
    die_once, bug (the failure's signature), seconds (per step)."""
    component = {"_target_": "nowhere.Nothing", "name": "fake"}
    return TrialSpec(
        prompt="a green rabbit",
        prompt_id="colour",
        beta=beta,
        beta_schedule="constant",
        seed=seed,
        model=component,
        reward=component,
        judge=None,
        method={"_target_": "nowhere.Method", "name": "pi_ft", **method},
        sampler=Sampler(steps=8, eta=1.0, guidance_scale=1.0),
        lora=Lora(rank=2, alpha=2.0, targets="attention"),
        train=Train(gradient_steps=steps, trajectories=2, micro_batch=2, checkpoint_every=2),
        eval=Evaluation(every=2, samples=2, pictures=1),
    )


def plan(store: Path, *specs: TrialSpec, executor: str = "inline", sweep: str = "tried", **config: Any) -> Plan:
    """A sweep of these trials, without MLflow unless `config` says otherwise."""
    fixed = {"prompt": "colour", "beta": 0.1, "method": "pi_ft"}
    cells = [Cell(one.key, one, fixed | {"seed": one.seed}) for one in specs]
    axes = {name: [value] for name, value in fixed.items()} | {"seed": [one.seed for one in specs]}
    settings = {
        "executor": {"name": executor},
        "tracking": None,
        "resources": {"cpu": 1, "gpu": 0, "threads": 1},
        "store": str(store),
    }
    return Plan(sweep, axes, cells, settings | config)


def run_trial(
    spec: Mapping[str, Any],
    folder: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    should_stop: Callable[[], bool] | None = None,
    limits: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    """Journal one record per step, resume from the checkpoint's step, end as the method's settings say."""
    where, method, total = TrialFolder(Path(folder)), spec["method"], spec["train"]["gradient_steps"]
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    if where.done.exists():
        return Outcome("done", total)
    lease = acquire(Folder(where.attempts), {"step": 0, "steps": total, **(facts or {})})
    if isinstance(lease, Attempt):
        return Outcome("elsewhere", 0)
    forgive(where)
    write_json(where.spec, spec)
    journal = Journal(where.journal)
    reached = [int(path.stem.removeprefix("step_")) for path in where.checkpoints.glob("*.json")]
    for step in range(max(reached, default=0), total + 1):
        lease.note(step=step)
        if method.get("die_at") == step and (not method.get("die_once") or lease.number == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        for kind, when in (("bug", "fail_at"), ("diverged", "diverge_at")):
            if method.get(when) == step:
                return _failed(where, kind, step, lease, method.get("bug", where.root.name))
        journal.write(step, _metrics(spec, step), pictures=_picture(where, step) if step % 2 == 0 else None)
        if should_stop is not None and should_stop():
            write_record(where.checkpoint(step).with_suffix(".json"), {"step": step})
            lease.end("stopped", step=step)
            return Outcome("stopped", step)
        time.sleep(method.get("seconds", 0))
    where.adapter.mkdir(exist_ok=True)
    weights = where.adapter / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"weights")
    names = (where.spec, where.journal, weights)
    files = {str(path.relative_to(where.root)): seal(path) for path in names}
    final = {"key": where.root.name, "steps": total, "attempt": lease.number, "final": _metrics(spec, total)}
    write_record(where.done, final | {"files": files})
    lease.end("done", step=total)
    return Outcome("done", total)


def _metrics(spec: Mapping[str, Any], step: int) -> dict[str, float]:
    found = {"train/loss": spec["beta"] / (step + 1), "train/reward_mean": 0.1 * step + spec["seed"]}
    return found | ({"eval/reward_mean": 0.2 * step, "eval/kl_path_nats": 1.0 * step} if step % 2 == 0 else {})


def _picture(where: TrialFolder, step: int) -> str:
    from PIL import Image

    path = where.picture(step)
    write_whole(path, lambda temporary: Image.new("RGB", (64, 32), (step, 0, 0)).save(temporary, format="PNG"))
    return str(path.relative_to(where.root))


def _failed(where: TrialFolder, kind: str, step: int, lease: Lease, signature: str) -> Outcome:
    failure = {"key": where.root.name, "class": kind, "message": "asked to fail", "traceback": "", "step": step}
    write_record(where.failed, failure | {"signature": signature, "failed_at": time.time()})
    lease.end(kind, step=step)
    return Outcome("diverged" if kind == "diverged" else "failed", step, "asked to fail", kind)
