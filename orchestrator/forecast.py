"""Hours and memory of cells that never ran, from their architecture, for one GPU (workers/cost.py).

    target = target_of(config, "A100")      the GPU that is meant: named, else at hand; raises UserError
    found = forecast(target, pieces)        what each different trial takes there, or why that is not known
    found.speeds                            key -> Speed, of no trial
    found.lines(estimated) / found.row(estimated)   for people and as JSON, with everything that was assumed

An estimate fills in for what was never measured, and says that it is one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.errors import UserError
from orchestrator.schedule import Speed, cost_class, device
from orchestrator.weights import on_this_machine

if TYPE_CHECKING:
    from workers.cost import Cost
    from workers.devices import Gpu
    from workers.spec import TrialSpec

GIB = 2**30


class Target(NamedTuple):
    """What the hours are asked for."""

    device: str
    """"cuda" or "cpu": whose speeds count."""
    name: str
    """For people."""
    gpu: Gpu | None
    """A row of the table of GPUs, None where there is none: then nothing is estimated."""
    memory: float
    """Bytes that one trial may take of it."""
    share: float
    """The part of the GPU that a trial has."""
    named: bool
    """By --device: speeds of other GPUs do not count."""
    hint: str
    """What a person can do about hours that are not known, "" for nothing."""

    def counts(self, name: Any) -> bool:
        """Whether the speed of a trial on a GPU of this name does."""
        from workers.devices import gpu_named

        return not self.named or (isinstance(name, str) and gpu_named(name) == self.gpu)


def target_of(config: Mapping[str, Any], name: str | None) -> Target:
    """The device that --device names; else what a plan's trials run on, a GPU of this machine where they run here.
    Raises UserError for a name that nothing is known of."""
    where, share = device(config), min(1.0, float((config.get("resources") or {}).get("gpu") or 1))
    if name is None:
        hint = "pift plan --device A100 estimates them" if where == "cuda" else ""
        return Target(where, where, None, 0.0, share, False, hint)
    if name.lower() == "cpu":
        return Target("cpu", "cpu", None, 0.0, 1.0, False, "those of a CPU are known only once a trial has run")
    from workers.devices import GPUS, gpu_named

    gpu = gpu_named(name)
    if gpu is None:
        known = ", ".join(row.name for row in GPUS)
        raise UserError(f"--device {name} is no device that pift knows the speed of; name one of {known}, or cpu")
    return Target("cuda", gpu.name, gpu, gpu.memory * GIB * share, share, True, "")


def at_hand(target: Target, config: Mapping[str, Any]) -> Target:
    """`target`, and where it names no GPU and the trials run on this machine's: that one. Imports torch."""
    if target.device != "cuda" or target.named or not on_this_machine(config):
        return target
    from workers.devices import gpu_named, gpus

    found = gpus()
    if not found:
        return target
    name, memory = found[0]
    if (gpu := gpu_named(name)) is None:
        return target._replace(hint=f"{name} is not in pift's table, {target.hint} for one that is")
    return target._replace(name=name, gpu=gpu, memory=memory * target.share, hint="")


# ---- what is estimated


class Piece(NamedTuple):
    """A cell and the gradient steps that it has left."""

    key: str
    spec: TrialSpec
    steps: int


@dataclass(frozen=True)
class Arm:
    """Cells that cost the same."""

    spec: TrialSpec
    """Of the first of them."""
    cost: Cost
    seconds: float
    """Per gradient step."""
    pieces: Sequence[Piece]

    @property
    def method(self) -> str:
        return str(self.spec.method["name"])

    @property
    def micro_batch(self) -> int:
        return self.spec.train.micro_batch

    @property
    def hours(self) -> float:
        """Of a whole trial."""
        return self.seconds * self.spec.train.gradient_steps / 3600

    def memory(self) -> dict[str, int]:
        """Bytes by part at the worst moment."""
        return self.cost.memory.at(self.micro_batch)


@dataclass(frozen=True)
class Forecast:
    """What some cells take on one GPU."""

    target: Target
    arms: Sequence[Arm]
    unknown: Mapping[str, int]
    """Why nothing is known of a cell -> how many cells."""

    @property
    def speeds(self) -> dict[str, Speed]:
        """By key; of no trial."""
        return {piece.key: Speed(arm.seconds, 0, True) for arm in self.arms for piece in arm.pieces}

    def gpu_hours(self, estimated: Collection[str]) -> float:
        """Of the cells whose hours are not measured."""
        seconds = (arm.seconds * piece.steps for arm in self.arms for piece in arm.pieces if piece.key in estimated)
        return math.fsum(seconds) * self.target.share / 3600

    def lines(self, estimated: Collection[str]) -> Iterator[str]:
        """For people; `estimated`: the keys of the cells that have no measured speed."""
        if self.arms:
            yield f"estimated for one {self.target.name}: {self._hours_text(estimated)}{self._memory_text()}"
            yield f"assumed: {'; '.join(self._assumptions())}"
            yield from self._warnings()
        for reason, cells in self.unknown.items():
            yield f"{cells} cell{'s' * (cells != 1)} not estimated: {reason}"

    def row(self, estimated: Collection[str]) -> dict[str, Any]:
        """The same as a JSON object."""
        from workers.cost import CONTEXT, FRACTION

        gpu = self.target.gpu
        assert gpu is not None
        return {
            "device": self.target.name,
            "gpu_hours": self.gpu_hours(estimated),
            "gpu_memory_bytes": self.target.memory,
            "assumed": {
                "peak_tflops": {name: gpu.peak(name) for name in ("fp16", "bf16", "tf32", "fp32")},
                "source": gpu.source,
                "fraction_of_peak": FRACTION,
                "cuda_bytes": CONTEXT,
                "gpu_per_trial": self.target.share,
            },
            "arms": [_arm_row(arm, self.target, estimated) for arm in self.arms],
            "unknown": dict(self.unknown),
        }

    def _hours_text(self, estimated: Collection[str]) -> str:
        """ "3,600 GPU-hours (pi_ft 10.9 h a trial, dpok 1.5 h a trial); "."""
        arms = [arm for arm in self.arms if any(piece.key in estimated for piece in arm.pieces)]
        hours = _by_method(arms, lambda arm: arm.hours)
        each = ", ".join(f"{method} {text} h a trial" for method, text in hours.items())
        return f"{digits(self.gpu_hours(estimated))} GPU-hours ({each}); " if arms else ""

    def _memory_text(self) -> str:
        """ "peak memory 9.1 of 80 GiB at train.micro_batch=5 (activations 2.4, ...)" of the arm that takes most."""
        arm = max(self.arms, key=lambda arm: sum(arm.memory().values()))
        parts = sorted(arm.memory().items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size >= 0.05 * GIB)
        whose = f" ({arm.method})" if len({arm.method for arm in self.arms}) > 1 else ""
        total = sum(size for _, size in parts) / GIB
        room = f"{total:.1f} of {self.target.memory / GIB:.3g} GiB"
        return f"peak memory{whose} {room} at train.micro_batch={arm.micro_batch} ({shown})"

    def _assumptions(self) -> Iterator[str]:
        from workers.cost import CONTEXT, FRACTION

        gpu, first = self.target.gpu, self.arms[0]
        assert gpu is not None
        guided = any(arm.spec.sampler.guidance_scale > 1 for arm in self.arms)
        sizes = dict.fromkeys((arm.cost.forward / 1e12, arm.cost.pixels) for arm in self.arms)
        unet = ", ".join(f"{tflop:.2g} TFLOP a UNet pass at {pixels} px" for tflop, pixels in sizes)
        yield unet + (", two passes with guidance" if guided else "")
        gradients = _by_method(self.arms, lambda arm: arm.cost.gradient / 1e12)
        again = any(arm.spec.model.get("gradient_checkpointing") for arm in self.arms)
        each = ", ".join(f"{text} ({method})" for method, text in gradients.items())
        each = each if len(set(gradients.values())) > 1 else next(iter(gradients.values()))
        yield f"{each} TFLOP a transition's gradient" + (", with the recomputation of checkpointing" if again else "")
        dtypes = dict.fromkeys(str(arm.spec.model.get("dtype", "fp32")) for arm in self.arms)
        names = [name for dtype in dtypes for name in (("tf32", "fp32") if dtype == "fp32" else (dtype,))]
        peaks = ", ".join(f"{gpu.peak(name):g} TFLOP/s peak in {name}" for name in names)
        yield f"{peaks} ({gpu.source}), of which {100 * FRACTION:.0f} % are reached (ours, not measured)"
        if self.target.share < 1:
            yield f"a trial has {self.target.share:g} of the GPU"
        yield f"{CONTEXT / GIB:.2g} GiB for CUDA (ours), none for fragmentation"
        yield f"evaluations every {first.spec.eval.every} steps included"
        uncounted = dict.fromkeys(name for arm in self.arms for name in arm.cost.uncounted)
        if uncounted:
            yield f"not counted: what {' and '.join(uncounted)} takes"

    def _warnings(self) -> Iterator[str]:
        """A line per different need that the GPU does not meet."""
        lines = dict.fromkeys(_warning(arm, self.target) for arm in self.arms)
        yield from (line for line in lines if line)


def forecast(target: Target, pieces: Sequence[Piece]) -> Forecast:
    """What each different trial among these cells takes, each looked at once."""
    from workers.cost import Unknown, cost_of

    assert target.gpu is not None
    classes: dict[tuple[str, int], list[Piece]] = {}
    for piece in pieces:
        name = cost_class(piece.spec.to_dict()), piece.spec.train.gradient_steps
        classes.setdefault(name, []).append(piece)
    arms, unknown = [], Counter[str]()
    for alike in classes.values():
        spec = alike[0].spec
        try:
            cost = cost_of(spec)
        except Unknown as reason:
            unknown[str(reason)] += len(alike)
            continue
        arms.append(Arm(spec, cost, cost.seconds(target.gpu) / target.share, alike))
    return Forecast(target, arms, unknown)


def possible(pieces: Sequence[Piece]) -> bool:
    """Whether any of these cells can be estimated."""
    from workers.cost import Unknown, check_known

    seen = set()
    for piece in pieces:
        name = str(piece.spec.model.get("path")), str(piece.spec.method["_target_"])
        if name in seen:
            continue
        seen.add(name)
        try:
            check_known(piece.spec)
        except Unknown:
            continue
        return True
    return False


# ---- as text


def digits(value: float) -> str:
    """Two digits, enough for an estimate, and all of a whole number's, with commas."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _by_method(arms: Sequence[Arm], value: Any) -> dict[str, str]:
    """ "10.9", or "5.2 to 10.9" where a method's arms differ, by method."""
    found: dict[str, list[float]] = {}
    for arm in arms:
        found.setdefault(arm.method, []).append(value(arm))
    return {
        method: " to ".join(dict.fromkeys(digits(end) for end in (min(values), max(values))))
        for method, values in found.items()
    }


def _warning(arm: Arm, target: Target) -> str:
    """What does not fit, and what would; "" where it fits."""
    needed = sum(arm.memory().values())
    if needed <= target.memory:
        return ""
    model, largest = arm.spec.model, arm.cost.memory.largest(target.memory)
    settings = [f"train.micro_batch={largest}"] if largest else []
    further = [] if model.get("gradient_checkpointing") else ["model.gradient_checkpointing=true"]
    further += ["model.dtype=fp16"] if model.get("dtype") == "fp32" else []
    further += [] if model.get("offload") else ["model.offload=true"]
    fits = f"{settings[0]} fits" if settings else "no train.micro_batch fits"
    less = f"; {', '.join(further)} take{'s' * (len(further) == 1)} less" if further else ""
    return (
        f"warning: {arm.method} needs {needed / GIB:.1f} GiB at train.micro_batch={arm.micro_batch} and "
        f"{target.name} gives it {target.memory / GIB:.3g}: {fits}{less}"
    )


def _arm_row(arm: Arm, target: Target, estimated: Collection[str]) -> dict[str, Any]:
    memory = arm.memory()
    return {
        "method": arm.method,
        "cells": len(arm.pieces),
        "estimated_cells": sum(piece.key in estimated for piece in arm.pieces),
        "seconds_per_step": arm.seconds,
        "trial_hours": arm.hours,
        "tflop_per_step": {name: count / 1e12 for name, count in arm.cost.flops.items()},
        "rows_per_step": arm.cost.passes._asdict(),
        "tflop_unet_forward": arm.cost.forward / 1e12,
        "tflop_transition_gradient": arm.cost.gradient / 1e12,
        "pixels": arm.cost.pixels,
        "micro_batch": arm.micro_batch,
        "memory_bytes": memory,
        "peak_bytes": sum(memory.values()),
        "largest_micro_batch": arm.cost.memory.largest(target.memory),
        "not_counted": list(arm.cost.uncounted),
    }
