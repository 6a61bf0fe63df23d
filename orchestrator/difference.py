"""What a launch would change in the store, cell by cell, with the hours it takes: what `pift plan` prints.

    +  new: it runs                          >  running, or in the queue of a launch at work: left to that one
    ~  resumable or stale: it continues      =  done, by whichever sweep
    !  failed or diverged: left alone        ↻  failed, and to be run again (retry_failed=true)
    ·  it would run, and the budget is too small
    -  orphan: a cell of the sweep's last plan that the grid no longer has; its trial stays in the store

Hours are those of this store's finished trials; for cells that none of these stands for, those of
orchestrator/forecast.py, where a GPU is named or at hand, and marked as estimated. A budget counts measured hours
alone, as a launch does. Nothing is written.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.forecast import Forecast, Piece, Target, at_hand, digits, forecast, possible, target_of
from orchestrator.grid import Cell, Plan
from orchestrator.ledger import Store
from orchestrator.schedule import Budget, Estimate, Left, Share, Speed, Speeds, Work, device, estimate, order, slots
from orchestrator.weights import missing
from workers.text import one_line

if TYPE_CHECKING:
    from workers.spec import TrialSpec
    from workers.weights import Weights

SYMBOLS = {
    "run": "+", "continue": "~", "retry": "↻", "wait": "·", "running": ">", "done": "=", "leave": "!", "orphan": "-",
}  # fmt: skip
WORKING = ("run", "continue", "retry")
"""The actions that cost hours."""
MOST_ROWS = 60
"""Cells beyond this are counted by arm, for people."""


@dataclass(frozen=True)
class Account:
    """A budget, what the sweep has used of it, and how many cells it keeps waiting."""

    budget: Budget
    used_seconds: float
    started: int
    left: Left
    waiting: int

    def row(self) -> dict[str, Any]:
        deadline = self.budget.deadline
        return {
            "hours": self.budget.hours,
            "trials": self.budget.trials,
            "deadline": None if deadline is None else deadline.isoformat(),
            "used_hours": self.used_seconds / 3600,
            "started": self.started,
            "left_hours": None if self.left.seconds is None else self.left.seconds / 3600,
            "left_trials": self.left.trials,
            "waiting": self.waiting,
        }


@dataclass(frozen=True)
class Difference:
    """The cells of a plan beside what the store has. `rows` and `orphans` are a plan's rows and, in each, state, step,
    steps, class, message, action (SYMBOLS), shared_with (other sweeps), estimated_seconds (None: not known) and
    source: "measured" (by finished trials), "estimated" (from the architecture) or None."""

    sweep: str
    axes: list[str]
    rows: list[dict[str, Any]]
    orphans: list[dict[str, Any]]
    estimate: Estimate
    target: Target
    """What the hours are asked for."""
    account: Account | None
    """None without a budget."""
    forecast: Forecast | None = None
    """None where nothing was to be estimated, or there is no GPU that it could be estimated for."""
    absent: Sequence[Weights] = ()
    """What the cells that are to run need and this machine lacks."""

    def text(self) -> str:
        """The one JSON object of --json, a cell a line."""
        head = {"sweep": self.sweep, "counts": dict(Counter(row["state"] for row in self.rows))}
        tail: dict[str, Any] = {"estimate": self._estimate_row()}
        tail["budget"] = self.account.row() if self.account else None
        parts = [f'"{name}": {_json(value)}' for name, value in head.items()]
        for name, rows in (("cells", self.rows), ("orphans", self.orphans)):
            parts.append(f'"{name}": [' + ",".join(f"\n {_json(row)}" for row in rows) + "]")
        tail["absent_weights"] = [{"what": entry.what, "fetch": entry.fetch} for entry in self.absent]
        parts += [f'"{name}": {_json(value)}' for name, value in tail.items()]
        return "{" + ",\n".join(parts) + "}"

    def _estimate_row(self) -> dict[str, Any]:
        shares = {name: _share_row(share) for name, share in self.estimate.methods.items()}
        total = {"trial_hours": self.estimate.hours, "unknown_cells": self.estimate.unknown, "device": self.target.name}
        total |= {"slots": self.estimate.slots, "wall_hours": self.estimate.wall_hours, "methods": shares}
        return total | {"forecast": self.forecast.row(self._estimated) if self.forecast else None}

    @property
    def _estimated(self) -> set[str]:
        return {row["key"] for row in self.rows if row["source"] == "estimated"}

    def lines(self, everything: bool = False) -> Iterator[str]:
        """For people: the cells (with more than 60, their numbers by arm), then the sums."""
        grouped = len(self.rows) > MOST_ROWS and not everything
        yield f"sweep {self.sweep}"
        if grouped:
            yield from _table(*_groups(self.axes, self.rows))
            yield f"{len(self.rows)} cells, counted by arm; --all prints each, --json lists them"
        if not grouped or len(self.orphans) <= MOST_ROWS:
            names = ["", "key", *self.axes, "state", "step", ""]
            rows = [*([] if grouped else self.rows), *self.orphans]
            yield from _table(names, [_row(row, self.axes) for row in rows]) if rows else ()
        yield self.summary
        if any(self.estimate.methods):
            yield _hours_text(self.estimate, self.target)
            yield from self.forecast.lines(self._estimated) if self.forecast else ()
        if self.account:
            yield _budget_text(self.account, self.estimate.unknown)
        for entry in self.absent:
            yield f"not on this machine: {entry.what}; fetch it: {entry.fetch}"

    @property
    def summary(self) -> str:
        """ "Plan: 12 to run, 3 to continue, 6 done (2 in other sweeps too), 1 left failed; 2 orphans kept"."""
        counts = Counter(row["action"] for row in self.rows)
        shared = sum(bool(row["shared_with"]) for row in self.rows)
        done = f"done ({shared} in other sweeps too)" if shared else "done"
        left = Counter(row["state"] for row in self.rows if row["action"] == "leave")
        parts = [f"{counts['run']} to run"]
        for action, words in (("continue", "to continue"), ("retry", "to run again"), ("done", done)):
            parts += [f"{counts[action]} {words}"] if counts[action] else []
        parts += [f"{number} left {state}" for state, number in left.items()]
        parts += [f"{counts['running']} at work elsewhere"] if counts["running"] else []
        parts += [f"{counts['wait']} waiting for budget"] if counts["wait"] else []
        kept = f"; {len(self.orphans)} orphan{'s' * (len(self.orphans) != 1)} kept" if self.orphans else ""
        return f"Plan: {', '.join(parts)}{kept}"


def difference(plan: Plan, store: Store, device_named: str | None = None) -> Difference:
    """Compare a plan with the store; hours for the device that is named, else for what the plan's trials run on.
    Raises UserError for a device that nothing is known of."""
    target = target_of(plan.config, device_named)
    rows = [cell.row() for cell in plan.cells]
    turns = [row["key"] for row in order(rows)]
    orphans = _orphans(store, plan.sweep, {cell.key for cell in plan.cells})
    states = ledger.survey(store, [row["key"] for row in (*rows, *orphans)])
    retry = bool(plan.config["retry_failed"])
    for cell, row in zip(plan.cells, rows, strict=True):
        state = states[cell.key]
        row |= {"state": state} | _detail(store, cell, state) | {"action": action(state, retry), "shared_with": []}
        row |= {"estimated_seconds": 0.0, "source": None}
    for row in orphans:
        row |= {"state": states[row["key"]]} | ledger.detail(store.trial(row["key"])) | {"action": "orphan"}
        row |= {"shared_with": [], "estimated_seconds": 0.0, "source": None}
    _name_sharers(store, plan.sweep, rows)
    specs = {cell.key: cell.spec for cell in plan.cells}
    budget = Budget.of(plan.config["budget"])
    used, begun = ledger.spent_by(store, plan.sweep) if budget else (0.0, set[str]())
    work = _work(rows, turns, specs, begun)
    done = {row["key"]: specs[row["key"]].to_dict() for row in rows if row["action"] == "done"}
    measured = _timed(work, specs, Speeds.measured(store, done), device(plan.config))
    account = _admit(budget, used, begun, measured, rows, store.now()) if budget else None
    if target.named:
        measured = _timed(work, specs, Speeds.measured(store, done, target.counts), target.device)
    waiting = {row["key"] for row in rows if row["action"] == "wait"}
    left = [piece for piece in measured if piece.key not in waiting]
    target, found = _forecast(plan, target, left, specs)
    left = _filled(left, found)
    _time(rows, [piece for piece in measured if piece.key in waiting] + left)
    absent = missing(specs[piece.key].to_dict() for piece in measured)
    return Difference(
        plan.sweep, list(plan.axes), rows, orphans, estimate(left, slots(plan.config)), target, account, found, absent
    )


def action(state: str, retry: bool) -> str:
    """What a launch does about a cell in a state."""
    if state in ("failed", "diverged"):
        return "retry" if retry and state == "failed" else "leave"
    return {"new": "run", "resumable": "continue", "stale": "continue", "done": "done"}.get(state, "running")


# ---- what the store says


def _detail(store: Store, cell: Cell, state: str) -> dict[str, Any]:
    """Step, steps, class and message; those of new and done cells are known without their files."""
    if state not in ("new", "done"):
        return ledger.detail(store.trial(cell.key))
    steps = cell.spec.train.gradient_steps if state == "done" else None
    return {"step": steps, "steps": steps, "class": None, "message": None}


def _orphans(store: Store, sweep: str, keys: set[str]) -> list[dict[str, Any]]:
    """The rows of the sweep's last plan that are not in the grid."""
    return [dict(row) for row in _planned(store, sweep) if row["key"] not in keys]


def _planned(store: Store, sweep: str) -> list[Mapping[str, Any]]:
    """The rows of a sweep's plan.json; none where there is no sound one."""
    if not store.sweep(sweep).plan.exists():
        return []
    with contextlib.suppress(UserError):
        return store.plan(sweep)["cells"]
    return []


def _name_sharers(store: Store, sweep: str, rows: Sequence[dict[str, Any]]) -> None:
    """Say of each done cell which other sweeps have it."""
    done = {row["key"]: row for row in rows if row["action"] == "done"}
    others = [name for name in store.sweeps() if name != sweep] if done else []
    for name in others:
        for key in done.keys() & {row["key"] for row in _planned(store, name)}:
            done[key]["shared_with"].append(name)


def _work(
    rows: Sequence[dict[str, Any]], turns: Sequence[str], specs: Mapping[str, TrialSpec], begun: set[str]
) -> list[Work]:
    """What is left of each cell that is to run, in the order in which they start; no speeds yet."""
    by_key = {row["key"]: row for row in rows if row["action"] in WORKING}
    found = []
    for key in turns:
        if key in by_key:
            left = max(specs[key].train.gradient_steps - max(by_key[key]["step"] or 0, 0), 0)
            found.append(Work(key, specs[key].method["name"], left, None, key in begun))
    return found


def _timed(work: Sequence[Work], specs: Mapping[str, TrialSpec], speeds: Speeds, where: str) -> list[Work]:
    """The work at the speeds that were measured on a device."""
    if not speeds.like:
        return list(work)
    return [replace(piece, speed=speeds.of(specs[piece.key].to_dict(), where)) for piece in work]


def _forecast(
    plan: Plan, target: Target, work: Sequence[Work], specs: Mapping[str, TrialSpec]
) -> tuple[Target, Forecast | None]:
    """What is estimated, where a GPU is named or hours are missing and a GPU is at hand; and the target, completed."""
    if not target.named and all(piece.speed for piece in work):
        return target, None
    target = at_hand(target, plan.config)
    pieces = [Piece(piece.key, specs[piece.key], piece.steps) for piece in work]
    if target.gpu is not None:
        return target, forecast(target, pieces)
    hopeless = target.device == "cuda" and not possible(pieces)
    return (target._replace(hint="") if hopeless else target), None


def _filled(work: Sequence[Work], found: Forecast | None) -> list[Work]:
    """The work, at estimated speeds where nothing was measured."""
    speeds = found.speeds if found else {}
    return [piece if piece.speed else replace(piece, speed=speeds.get(piece.key)) for piece in work]


def _time(rows: Sequence[dict[str, Any]], work: Sequence[Work]) -> None:
    """Put the hours into the rows."""
    by_key = {piece.key: piece for piece in work}
    for row in rows:
        if (piece := by_key.get(row["key"])) is not None:
            row["estimated_seconds"] = piece.seconds
            row["source"] = None if piece.speed is None else "measured" if piece.speed.trials else "estimated"


def _admit(
    budget: Budget, used: float, begun: set[str], work: Sequence[Work], rows: Sequence[dict[str, Any]], now: float
) -> Account:
    """Let the cells wait that do not fit."""
    refused = {piece.key for piece in work} - budget.admits(work, used, len(begun), now)
    waiting = [row for row in rows if row["key"] in refused]
    for row in waiting:
        row["action"] = "wait"
    return Account(budget, used, len(begun), budget.left(used, len(begun), now), len(waiting))


# ---- as text


def _row(row: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
    step = "" if row["step"] is None else f"{row['step']}" + (f"/{row['steps']}" if row["steps"] else "")
    values = (_shown(row.get(name)) for name in axes)
    return [SYMBOLS[row["action"]], row["key"], *values, row["state"], step, _note(row)]


def _note(row: Mapping[str, Any]) -> str:
    if row["shared_with"]:
        return f"also in {', '.join(row['shared_with'])}"
    if row["action"] == "wait":
        return "waits for budget"
    first = next(iter(str(row["message"] or "").splitlines()), "")
    return f"({row['class']}) {first[:90]}" if row["class"] else "kept" if row["action"] == "orphan" else first[:90]


def _groups(axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the counts by arm; where there are more than 60 arms, over their longest axes too."""
    names = [name for name in axes if name not in ("prompt", "seed")]
    while len(names) > 1 and len({_point(row, names) for row in rows}) > MOST_ROWS:
        names.remove(max(names, key=lambda name: len({_point(row, [name]) for row in rows})))
    kinds = list(dict.fromkeys((SYMBOLS[row["action"]], row["state"]) for row in rows))
    counts: dict[tuple[str, ...], Counter[tuple[str, str]]] = {}
    for row in rows:
        counts.setdefault(_point(row, names), Counter())[SYMBOLS[row["action"]], row["state"]] += 1
    header = [*names, "cells", *(" ".join(kind) for kind in kinds)]
    body = [
        [*point, str(found.total()), *(str(found[kind] or "") for kind in kinds)] for point, found in counts.items()
    ]
    return header, body


def _point(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(_shown(row.get(name)) for name in names)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in (header, *rows):
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else one_line(str(value))


def _hours_text(found: Estimate, target: Target) -> str:
    """ "about 1.2 trial-hours, 0.6 h on 2 slots; measured: pi_ft 0.8 s/step on cpu (6 trials); dpok not measured yet
    on cpu"."""
    shares = found.methods.items()
    measured = [_speed_text(name, share, target.name) for name, share in shares if _speeds(share, measured=True)]
    guessed = [f"{name} {_range(_speeds(share, measured=False))} s/step" for name, share in shares
               if _speeds(share, measured=False)]  # fmt: skip
    unknown = ", ".join(name for name, share in shares if not share.speeds)
    rest = [f"{unknown} not measured yet on {target.name}"] if unknown else []
    rest += [target.hint] if unknown and target.hint else []
    if not measured and not guessed:
        return f"hours not known: {'; '.join(rest)}"
    total = f"{_total(found.hours, found.unknown > 0)} trial-hours"
    if found.wall_hours is not None:
        total += f", {_hours(found.wall_hours)} h on {found.slots} slot{'s' * (found.slots != 1)}"
    rest = [f"estimated: {', '.join(guessed)} on {target.name}"] * bool(guessed) + rest
    return "; ".join([total, *[f"measured: {', '.join(measured)}"] * bool(measured), *rest])


def _speeds(share: Share, measured: bool) -> list[Speed]:
    """The measured speeds of a method, or the estimated ones."""
    return [speed for speed in share.speeds if bool(speed.trials) == measured]


def _range(speeds: Sequence[Speed]) -> str:
    """ "0.8", or "0.8 to 1.2" from the fastest to the slowest."""
    return " to ".join(dict.fromkeys(digits(speed.seconds) for speed in (speeds[0], speeds[-1])))


def _speed_text(name: str, share: Share, device: str) -> str:
    """One method's measured speeds: "pi_ft 0.8 to 1.2 s/step on cpu (6 trials)"."""
    speeds = _speeds(share, measured=True)
    trials = sum(speed.trials for speed in speeds)
    like = "" if all(speed.exact for speed in speeds) else ", some with other settings"
    rest = f", {share.unknown} cells not measured" if share.unknown else ""
    return f"{name} {_range(speeds)} s/step on {device} ({trials} trial{'s' * (trials != 1)}{like}{rest})"


def _budget_text(account: Account, unknown: int) -> str:
    budget, left, parts = account.budget, account.left, []
    if budget.hours is not None and left.seconds is not None:
        used, rest = _hours(account.used_seconds / 3600), _hours(left.seconds / 3600)
        parts.append(f"{used} of {budget.hours:g} trial-hours used, {rest} left")
    if budget.trials is not None:
        parts.append(f"{account.started} of {budget.trials} trials started, {left.trials} left")
    if budget.deadline is not None and left.wall_seconds is not None:
        when = f"in {_hours(left.wall_seconds / 3600)} h" if left.wall_seconds else "which has passed"
        parts.append(f"deadline {budget.deadline:%Y-%m-%d %H:%M}, {when}")
    if account.waiting:
        parts.append(f"{account.waiting} cell{'s wait' if account.waiting != 1 else ' waits'} (·)")
    if budget.hours is not None and unknown:
        parts.append(f"{unknown} of unknown length count as 0 h")
    return f"budget: {'; '.join(parts)}"


def _share_row(share: Share) -> dict[str, Any]:
    speeds = [
        {
            "seconds_per_step": speed.seconds, "trials": speed.trials, "exact": speed.exact,
            "source": "measured" if speed.trials else "estimated",
        }
        for speed in share.speeds
    ]  # fmt: skip
    return {"cells": share.cells, "unknown_cells": share.unknown, "trial_hours": share.hours, "speeds": speeds}


def _hours(hours: float) -> str:
    """Two digits, enough for an estimate."""
    return "under 0.01" if 0 < hours < 0.01 else digits(hours)


def _total(hours: float, more: bool) -> str:
    """ "about 1.2" or "under 0.01"; where there is more than that, "at least 1.2"."""
    if more:
        return f"at least {digits(hours)}"
    return _hours(hours) if 0 < hours < 0.01 else f"about {digits(hours)}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
