"""Real trials that take milliseconds (a linear-quadratic problem in two dimensions), and a disk that can be full.

`spec` names the model and the reward of this file: an LQ model that takes any reward, and a reward that the test at
hand makes misbehave by setting `Reward.act`.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from orchestrator.grid import Cell, Plan
from tests import tiny
from workers.lease import Folder
from workers.models.lq import LinearQuadraticModel
from workers.recorder import CLOCK_METRICS, read_journal
from workers.rewards.analytic import Quadratic
from workers.spec import TrialSpec
from workers.store import TrialFolder, read_record

ADAPTER = "adapter/policy.safetensors"


class Model(LinearQuadraticModel):
    """The LQ model without its demand for a reward with a formula."""

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        return []


class PictureModel(Model):
    """The same, painting its final state: pictures (B, 3, 8, 8) that begin with it."""

    pictures = True

    def decode(self, y: Tensor) -> Tensor:
        return y.sigmoid().repeat(1, 3 * 8 * 8 // y.shape[1]).view(-1, 3, 8, 8)


class Reward(Quadratic):
    """r(y) = -y'y/4 + sum(y)/2 (of a picture: of what it begins with), handed to `act` with the number of the call
    (from 1) before it is returned."""

    calls = 0
    act: Callable[[int, Tensor], Any] | None = None

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(Q=-0.5, q=0.5, c=0.0)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        return []

    def __call__(self, images: Tensor, prompts: list[str]) -> Any:
        Reward.calls += 1
        values = super().__call__(images.flatten(1)[:, :2], prompts)
        return values if Reward.act is None else Reward.act(Reward.calls, values)


class Broken(Reward):
    """A reward that never works."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Any:
        raise ConnectionError("the reward server is gone")


def behave(act: Callable[[int, Tensor], Any] | None = None) -> None:
    """What the reward does from now on; its calls are counted from here."""
    Reward.calls, Reward.act = 0, act


def spec(steps: int = 8, model: str = "Model", reward: str = "Reward", **changes: Any) -> dict[str, Any]:
    """A TrialSpec as a plain mapping; `changes` are dotted keys with __ for the dot."""
    values: dict[str, Any] = {
        "prompt": "none", "prompt_id": "none", "beta": 0.7, "beta_schedule": "constant", "seed": 0,
        "model": {"_target_": f"{__name__}.{model}", "name": "lq",
                  "d": 2, "data_mean": [0.5, -0.3], "data_cov": 0.8},
        "reward": {"_target_": f"{__name__}.{reward}", "name": "quick"},
        "judge": None,
        "method": {"_target_": "workers.methods.pi_ft.PIFT", "name": "pi_ft", "lr": 0.05, "estimator": "pathwise",
                   "inner_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "sampler": {"steps": 3, "eta": 1.0, "guidance_scale": 1.0},
        "lora": {"rank": 2, "alpha": 2, "targets": "attention"},
        "train": {"gradient_steps": steps, "trajectories": 8, "micro_batch": 8, "checkpoint_every": 2},
        "eval": {"every": 4, "samples": 4, "pictures": 1},
    }  # fmt: skip
    return tiny.changed(values, changes)


def plan(store: Path, *specs: dict[str, Any], **config: Any) -> Plan:
    """A sweep of these trials, in this process and without MLflow."""
    resolved = [TrialSpec.from_dict(one) for one in specs]
    fixed = {"prompt": "none", "beta": 0.7, "method": "pi_ft"}
    cells = [Cell(one.key, one, fixed | {"seed": one.seed}) for one in resolved]
    axes = {name: [value] for name, value in fixed.items()} | {"seed": [one.seed for one in resolved]}
    settings = {
        "executor": {"name": "inline"},
        "tracking": {"name": "none", "uri": None, "required": None},
        "resources": {"cpu": 1, "gpu": 0, "threads": 1},
        "store": str(store),
    }
    return Plan("quick", axes, cells, settings | config)


def timeless(journal: Path) -> list[dict[str, Any]]:
    """The records of a journal without what the clock decides."""
    records = list(read_journal(journal))
    for record in records:
        del record["time"]
        for name in CLOCK_METRICS:
            del record["metrics"][name]
    return records


def assert_same(one: TrialFolder, two: TrialFolder) -> None:
    """Two finished trials hold the same bits, each step exactly once."""
    first, second = timeless(one.journal), timeless(two.journal)
    assert first == second
    steps = [record["step"] for record in second]
    assert steps == list(range(read_record(two.done)["steps"] + 1))
    assert (one.root / ADAPTER).read_bytes() == (two.root / ADAPTER).read_bytes()


def records_of(folder: TrialFolder) -> list[dict[str, Any]]:
    """The records of a trial's attempts, the first one first; empty for a damaged one."""
    attempts = Folder(folder.attempts)
    return [dict(attempts.read(number).content) for number in attempts.numbers()]


# ---- a disk that can be full


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size, mounted on a new folder; the test is skipped where that is not permitted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here, so no small disk to fill")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the disk but for `leave` pages of 4096 bytes; the file that does it."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as stream, contextlib.suppress(_Full):
        while True:
            try:
                stream.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                raise _Full from None
    with ballast.open("r+b") as stream:
        stream.truncate(max(0, ballast.stat().st_size // 4096 - leave) * 4096)
    return ballast


class _Full(Exception):
    pass
