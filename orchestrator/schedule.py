"""In which order trials start, how long they take, and what a budget admits. Pure functions; `Speeds.measured` reads.

    order(cells)                          block by block: after any prefix of it every arm has as many blocks, within 1
    Speeds.measured(store, specs)         seconds per gradient step of what has finished, by what decides its cost
    estimate(work, slots)                 hours left, per method and in total
    Budget.of(config["budget"])           hours at work, trials, and a deadline; left, reached, admits

An arm is all that is compared: a cell's values on every axis but prompt and seed. A block is one (seed, prompt).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

from orchestrator.errors import UserError
from orchestrator.ledger import Store
from workers.spec import integer, number
from workers.store import read_json, sound_record

NO_ARM = frozenset({"key", "label", "prompt", "prompt_text", "seed"})
"""What a plan's row holds beside its arm."""

# ---- the order


def order(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A plan's rows in the order in which they start: the arms take turns, each going through its own blocks seed by
    seed (all prompts of the first seed, then the next). Give it every cell, done ones too: they keep their place."""
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(cell["seed"] for cell in cells))}
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(cell["prompt"] for cell in cells))}
    arms: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        arms[arm(cell)].append(cell)
    for blocks in arms.values():
        blocks.sort(key=lambda cell: (seeds[cell["seed"]], prompts[cell["prompt"]]))
    turns = max((len(blocks) for blocks in arms.values()), default=0)
    return [blocks[turn] for turn in range(turns) for blocks in arms.values() if turn < len(blocks)]


def arm(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """The cell's values on all axes but prompt and seed, as texts: 1 and True are two values."""
    return tuple(f"{name}={cell[name]!r}" for name in cell if name not in NO_ARM)


# ---- how long a step takes

COSTLESS = frozenset(
    {"_target_", "fingerprint", "lr", "weight_decay", "max_grad_norm", "reward_weight", "clip_nats", "value_lr"}
)
"""The settings of a method that change what is computed, not how long it takes."""
MODEL = ("name", "path", "dtype", "gradient_checkpointing", "channels_last", "offload")
"""The settings of a model that do."""
MOST_SPECS = 2_000
"""How many spec.json of trials outside the plan are read at most."""


@dataclass(frozen=True)
class Speed:
    """Seconds per gradient step, the median over finished trials."""

    seconds: float
    trials: int
    """0: nothing was measured, the speed is an estimate (orchestrator/forecast.py)."""
    exact: bool
    """False where no trial of the same cost has finished and others of the method and the model stand in."""


def cost_class(spec: Mapping[str, Any]) -> str:
    """All that decides how long a gradient step of a spec (as in spec.json) takes on a given device."""
    method = {name: value for name, value in spec["method"].items() if name not in COSTLESS}
    parts = [
        method,
        [spec["model"].get(name) for name in MODEL],
        [(spec[name] or {}).get(setting) for name in ("reward", "judge") for setting in ("name", "dtype")],
        [spec["sampler"], spec["lora"]],
        [spec["train"][name] for name in ("trajectories", "micro_batch")],
        [spec["eval"][name] for name in ("every", "samples")],
        [spec.get("regulariser", "kl"), spec.get("initial_law", "fixed")],
    ]
    return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class Speeds:
    """What a step has cost so far. What was never measured is None: nothing is made up."""

    same: Mapping[tuple[str, str], Speed] = field(default_factory=dict)
    """(cost class, device) -> speed."""
    like: Mapping[tuple[str, str, str], Speed] = field(default_factory=dict)
    """(method, model, device) -> speed, where the class was not measured."""

    @classmethod
    def measured(
        cls, store: Store, specs: Mapping[str, Mapping[str, Any]], counts: Callable[[Any], bool] = lambda name: True
    ) -> Speeds:
        """The speeds of a store's finished trials. `specs` (key -> spec) are those at hand; of other trials only the
        newest 2,000 count, whose spec.json are read. `counts` is asked about each device's name."""
        finished = _finished(store, counts)
        others = sorted((key for key in finished if key not in specs), key=lambda key: -finished[key][2])
        same: dict[tuple[str, str], list[float]] = defaultdict(list)
        like: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for key in [*(key for key in finished if key in specs), *others[:MOST_SPECS]]:
            seconds, device, _ = finished[key]
            with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, OSError):  # another version's
                spec: Any = specs[key] if key in specs else read_json(store.trial(key).spec)
                same[cost_class(spec), device].append(seconds)
                like[spec["method"]["name"], spec["model"]["name"], device].append(seconds)
        return cls(
            {name: Speed(median(found), len(found), True) for name, found in same.items()},
            {name: Speed(median(found), len(found), False) for name, found in like.items()},
        )

    def of(self, spec: Mapping[str, Any], device: str) -> Speed | None:
        """The speed of a spec on a device ("cpu" or "cuda"): of its cost class, else of its method and model."""
        like = self.like.get((spec["method"]["name"], spec["model"]["name"], device))
        return like and self.same.get((cost_class(spec), device), like)


def _finished(store: Store, counts: Callable[[Any], bool]) -> dict[str, tuple[float, str, float]]:
    """Key -> (seconds per step, device, when it finished) of the trials whose DONE.json says so."""
    found = {}
    for key in store.trial_keys():
        done = sound_record(store.trial(key).done)
        device = done.get("device")
        if _positive(done.get("seconds_per_step")) and isinstance(device, str) and counts(done.get("device_name")):
            found[key] = done["seconds_per_step"], device, float(done.get("finished_at") or 0)
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# ---- hours


@dataclass(frozen=True)
class Work:
    """What one cell has left."""

    key: str
    method: str
    steps: int
    speed: Speed | None
    begun: bool = False
    """Whether this sweep has started the trial before."""

    @property
    def seconds(self) -> float | None:
        """None where no speed was measured."""
        return None if self.speed is None else self.steps * self.speed.seconds


@dataclass(frozen=True)
class Share:
    """The hours of one method; `unknown` of its `cells` have no measured speed and are not in them."""

    cells: int
    unknown: int
    hours: float
    speeds: tuple[Speed, ...]
    """Each different speed once, fastest first."""


@dataclass(frozen=True)
class Estimate:
    """Hours of work, summed over trials, and hours on the clock with `slots` trials at a time (None: not known)."""

    methods: dict[str, Share]
    slots: int | None
    wall_hours: float | None

    @property
    def hours(self) -> float:
        return math.fsum(share.hours for share in self.methods.values())

    @property
    def unknown(self) -> int:
        return sum(share.unknown for share in self.methods.values())


def estimate(work: Sequence[Work], slots: int | None) -> Estimate:
    """The hours of cells given in the order in which they start. A cell that was never measured adds nothing."""
    methods: dict[str, list[Work]] = defaultdict(list)
    for piece in work:
        methods[piece.method].append(piece)
    wall = None if slots is None else _makespan([piece.seconds or 0.0 for piece in work], slots) / 3600
    return Estimate({name: _share(pieces) for name, pieces in methods.items()}, slots, wall)


def _share(pieces: Sequence[Work]) -> Share:
    known = [piece.seconds for piece in pieces if piece.seconds is not None]
    speeds = {piece.speed for piece in pieces if piece.speed is not None}
    ranked = tuple(sorted(speeds, key=lambda speed: speed.seconds))
    return Share(len(pieces), len(pieces) - len(known), math.fsum(known) / 3600, ranked)


def _makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of some trials ends, each starting in turn on the first free slot."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def device(config: Mapping[str, Any]) -> str:
    """What the trials of a plan run on: "cuda" where they get a GPU or a part of one, else "cpu"."""
    return "cuda" if (config.get("resources") or {}).get("gpu") else "cpu"


def slots(config: Mapping[str, Any]) -> int | None:
    """How many trials run at a time with a plan's executor and resources; None where only a launch finds that out
    (a cluster, GPUs)."""
    executor, resources = config["executor"], config["resources"]
    if executor["name"] == "inline":
        return 1
    if executor.get("address") not in (None, "local") or resources["gpu"] or not resources["cpu"]:
        return None
    return max(1, int((executor.get("cpus") or os.cpu_count() or 1) / resources["cpu"]))


# ---- the budget


@dataclass(frozen=True)
class Left:
    """What is left of a budget; None where it sets no bound."""

    seconds: float | None
    trials: int | None
    wall_seconds: float | None


@dataclass(frozen=True)
class Budget:
    """The bounds of a sweep, over all its launches together. Times are seconds since 1970 by the store's clock."""

    hours: float | None = None
    """Hours that its trials may be at work, summed over trials: GPU-hours where each has one."""
    trials: int | None = None
    """How many different trials it may start."""
    deadline: datetime | None = None
    """When its trials write a checkpoint and stop."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Budget:
        """The budget of a config. Raises UserError with everything wrong with it."""
        hours, trials, deadline = (settings.get(name) for name in ("hours", "trials", "deadline"))
        problems = []
        if hours is not None:
            why = "hours that the sweep's trials may be at work"
            problems += number("budget.hours", hours, 0, why, open_low=True, example=8)
        if trials is not None:
            problems += integer("budget.trials", trials, 1, "how many trials the sweep may start")
        time = None if deadline is None else _time(deadline)
        if deadline is not None and time is None:
            problems.append(
                f"budget.deadline={deadline!r} is no time; write for example budget.deadline=2026-12-01T08:00 "
                "(local time where it names no zone)"
            )
        if problems:
            raise UserError(*problems)
        return cls(hours, trials, time)

    def __bool__(self) -> bool:
        """Whether it bounds anything."""
        return self != Budget()

    def check_deadline(self, now: float) -> None:
        """For the start of a launch: raises UserError when the deadline has passed."""
        if self.deadline is not None and self.deadline.timestamp() <= now:
            raise UserError(
                f"budget.deadline={self.deadline:%Y-%m-%dT%H:%M} has passed; write a later one, or null for none"
            )

    def left(self, used_seconds: float, started: int, now: float) -> Left:
        """What is left after `used_seconds` at work of `started` different trials."""
        return Left(
            None if self.hours is None else max(0.0, self.hours * 3600 - used_seconds),
            None if self.trials is None else max(0, self.trials - started),
            None if self.deadline is None else max(0.0, self.deadline.timestamp() - now),
        )

    def reached(self, used_seconds: float, now: float) -> str | None:
        """Why trials at work must stop now: the hours are used up, or the deadline is here. (That no further trial
        may start stops nobody.)"""
        left = self.left(used_seconds, 0, now)
        if left.seconds == 0:
            return f"budget.hours={self.hours:g} are used up; for more: budget.hours={2 * (self.hours or 0):g}"
        if left.wall_seconds == 0:
            return f"budget.deadline={self.deadline:%Y-%m-%dT%H:%M} is here; for more time write a later one"
        return None

    def admits(self, work: Sequence[Work], used_seconds: float, started: int, now: float) -> set[str]:
        """The keys of the cells that fit, of cells given in the order in which they start.

        Hours: a cell fits when its whole estimate does; the first one that does not closes the door, so that the arms
        stay level. A cell of unknown length counts as 0 hours. Trials: those begun before need no new place.
        """
        if self.reached(used_seconds, now):
            return set()
        left = self.left(used_seconds, started, now)
        most = math.inf if left.seconds is None else left.seconds
        places = math.inf if left.trials is None else left.trials
        fitting, seconds = set(), 0.0
        for piece in work:
            if not piece.begun and not places:
                continue
            seconds += piece.seconds or 0.0
            if seconds > most:
                break
            places -= not piece.begun
            fitting.add(piece.key)
        return fitting


def _time(text: Any) -> datetime | None:
    """An ISO 8601 time, local where it names no zone; None for what is none."""
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except (AttributeError, ValueError, OverflowError):
        return None
