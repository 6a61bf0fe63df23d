"""What a launch would change in the store, cell by cell, with the hours it takes: what `pift plan` prints.

    +  new: it runs                          >  running, or in the queue of a launch at work: left to that one
    ~  resumable or stale: it continues      =  done, by whichever sweep
    !  failed or diverged: left alone        ↻  failed, and to be run again (retry_failed=true)
    ·  it would run, and the budget is too small
    -  orphan: a cell of the sweep's last plan that the grid no longer has; its trial stays in the store

Nothing is written.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.grid import Cell, Plan
from orchestrator.ledger import Store
from orchestrator.schedule import Budget, Estimate, Left, Share, Speeds, Work, device, estimate, order, slots

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
    steps, class, message, action (SYMBOLS), shared_with (other sweeps) and estimated_seconds (None: not measured)."""

    sweep: str
    axes: list[str]
    rows: list[dict[str, Any]]
    orphans: list[dict[str, Any]]
    estimate: Estimate
    device: str
    account: Account | None
    """None without a budget."""

    def text(self) -> str:
        """The one JSON object of --json, a cell a line."""
        head = {"sweep": self.sweep, "counts": dict(Counter(row["state"] for row in self.rows))}
        tail = {"estimate": self._estimate_row(), "budget": self.account.row() if self.account else None}
        parts = [f'"{name}": {_json(value)}' for name, value in head.items()]
        for name, rows in (("cells", self.rows), ("orphans", self.orphans)):
            parts.append(f'"{name}": [' + ",".join(f"\n {_json(row)}" for row in rows) + "]")
        parts += [f'"{name}": {_json(value)}' for name, value in tail.items()]
        return "{" + ",\n".join(parts) + "}"

    def _estimate_row(self) -> dict[str, Any]:
        shares = {name: _share_row(share) for name, share in self.estimate.methods.items()}
        total = {"trial_hours": self.estimate.hours, "unknown_cells": self.estimate.unknown, "device": self.device}
        return total | {"slots": self.estimate.slots, "wall_hours": self.estimate.wall_hours, "methods": shares}

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
            yield _hours_text(self.estimate, self.device)
        if self.account:
            yield _budget_text(self.account, self.estimate.unknown)

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


def difference(plan: Plan, store: Store) -> Difference:
    """Compare a plan with the store."""
    rows = [cell.row() for cell in plan.cells]
    turns = [row["key"] for row in order(rows)]
    orphans = _orphans(store, plan.sweep, {cell.key for cell in plan.cells})
    states = ledger.survey(store, [row["key"] for row in (*rows, *orphans)])
    retry = bool(plan.config["retry_failed"])
    for cell, row in zip(plan.cells, rows, strict=True):
        state = states[cell.key]
        row |= {"state": state} | _detail(store, cell, state) | {"action": action(state, retry), "shared_with": []}
    for row in orphans:
        row |= {"state": states[row["key"]]} | ledger.detail(store.trial(row["key"])) | {"action": "orphan"}
        row |= {"shared_with": [], "estimated_seconds": 0.0}
    _name_sharers(store, plan.sweep, rows)
    where = device(plan.config)
    budget = Budget.of(plan.config["budget"])
    used, begun = ledger.spent_by(store, plan.sweep) if budget else (0.0, set[str]())
    found = _work(plan, store, rows, where, begun)
    work = {key: found[key] for key in turns if key in found}
    account = _admit(budget, used, begun, work, rows, store.now()) if budget else None
    waiting = {row["key"] for row in rows if row["action"] == "wait"}
    hours = estimate([piece for piece in work.values() if piece.key not in waiting], slots(plan.config))
    return Difference(plan.sweep, list(plan.axes), rows, orphans, hours, where, account)


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


def _work(plan: Plan, store: Store, rows: Sequence[dict[str, Any]], where: str, begun: set[str]) -> dict[str, Work]:
    """What is left of each cell that is to run; adds estimated_seconds to the rows."""
    pairs = list(zip(plan.cells, rows, strict=True))
    done = {cell.key: cell.spec.to_dict() for cell, row in pairs if row["action"] == "done"}
    speeds, found = Speeds.measured(store, done), {}
    for cell, row in pairs:
        row["estimated_seconds"] = 0.0
        if row["action"] in WORKING:
            left = max(cell.spec.train.gradient_steps - max(row["step"] or 0, 0), 0)
            speed = speeds.of(cell.spec.to_dict(), where) if speeds.like else None
            found[cell.key] = Work(cell.key, cell.spec.method["name"], left, speed, cell.key in begun)
            row["estimated_seconds"] = found[cell.key].seconds
    return found


def _admit(
    budget: Budget, used: float, begun: set[str], work: Mapping[str, Work], rows: Sequence[dict[str, Any]], now: float
) -> Account:
    """Let the cells wait that do not fit."""
    fitting = budget.admits(list(work.values()), used, len(begun), now)
    waiting = [row for row in rows if row["key"] in work and row["key"] not in fitting]
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
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _hours_text(found: Estimate, device: str) -> str:
    """ "about 1.2 trial-hours, 0.6 h on 2 slots; measured: pi_ft 0.8 s/step on cpu (6 trials); dpok not measured yet
    on cpu"."""
    known = [_speed_text(name, share, device) for name, share in found.methods.items() if share.speeds]
    unknown = ", ".join(name for name, share in found.methods.items() if not share.speeds)
    rest = [f"{unknown} not measured yet on {device}"] if unknown else []
    if not known:
        return f"hours not known: {rest[0]}"
    about = "at least" if found.unknown else "about"
    total = f"{about} {_hours(found.hours)} trial-hours".replace("about <", "under ")
    if found.wall_hours is not None:
        slots_ = f"{found.slots} slot{'s' * (found.slots != 1)}"
        total += f", {_hours(found.wall_hours).replace('<', 'under ')} h on {slots_}"
    return "; ".join([total, f"measured: {', '.join(known)}", *rest])


def _speed_text(name: str, share: Share, device: str) -> str:
    """One method's: "pi_ft 0.8 to 1.2 s/step on cpu (6 trials)"."""
    several = " to ".join(dict.fromkeys(f"{speed.seconds:.2g}" for speed in (share.speeds[0], share.speeds[-1])))
    trials = sum(speed.trials for speed in share.speeds)
    like = "" if all(speed.exact for speed in share.speeds) else ", some with other settings"
    rest = f", {share.unknown} cells not measured" if share.unknown else ""
    return f"{name} {several} s/step on {device} ({trials} trial{'s' * (trials != 1)}{like}{rest})"


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
        {"seconds_per_step": speed.seconds, "trials": speed.trials, "exact": speed.exact} for speed in share.speeds
    ]
    return {"cells": share.cells, "unknown_cells": share.unknown, "trial_hours": share.hours, "speeds": speeds}


def _hours(hours: float) -> str:
    """Two digits, enough for an estimate."""
    if hours < 0.01:
        return "<0.01" if hours else "0"
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
