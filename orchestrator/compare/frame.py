"""The tidy frame of a sweep: every cell of the plan with its state, its spec and all it has journaled so far.

What: `load(store, name)` reads plan.json and the trials' folders into a `Sweep`; `write_cells` and `write_curves` are
its two CSV files. Nothing is dropped: a cell that never ran, failed or diverged is a row like any other, with empty
values (a missing value is left empty, never written as a number).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.compare.statistics import Estimate, estimate, paired
from orchestrator.errors import UserError
from orchestrator.ledger import Store, detail, state
from workers.recorder import Scan, scan
from workers.store import TrialFolder, sound_record, write_text

IDENTITY = ("key", "label", "prompt", "prompt_text", "beta", "method", "seed")
"""The columns of a cell that every plan has; what else a cell carries is a further axis of the sweep."""

FINISHED = "done"
BUDGETS = {
    "reward_queries": "budget/reward_queries",
    "transition_gradients": "budget/transition_gradients",
    "model_forwards": "budget/model_forwards",
    "seconds": "budget/seconds",
}

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that spreadsheets compute (OWASP, "CSV injection")."""


def show(value: Any) -> str:
    """A setting as people write it: 0.1, pathwise, [1, 2]; empty for a missing one."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)


@dataclass(frozen=True)
class Record:
    """All that was journaled at one step. `step` counts completed gradient steps."""

    step: int
    time: float
    metrics: Mapping[str, float]
    samples: Mapping[str, Sequence[float]]
    pictures: Path | None


@dataclass(frozen=True)
class Cell:
    """One cell of the plan with what its trial has left in the store."""

    key: str
    label: str
    prompt: str
    prompt_text: str
    beta: Any
    method: str
    seed: Any
    extras: Mapping[str, Any]
    variant: str
    """The method with the further axes that vary in a prompt, "pi_ft estimator=score": what a line style stands for."""
    title: str
    """For rows and lists: "pi_ft β 0.1", with its seed where the sweep has several."""
    state: str
    detail: Mapping[str, Any]
    spec: Mapping[str, Any]
    records: Sequence[Record]
    done: Mapping[str, Any]
    folder: TrialFolder = field(repr=False)

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    @cached_property
    def evaluations(self) -> list[Record]:
        return [record for record in self.records if "eval/reward_mean" in record.metrics]

    @property
    def step(self) -> int | None:
        """The last journaled step, None where nothing was journaled."""
        return self.records[-1].step if self.records else None

    @property
    def steps(self) -> int | None:
        """The gradient steps the spec asks for."""
        return self.spec.get("train", {}).get("gradient_steps")

    def first(self, metric: str) -> float | None:
        """The metric at the step 0 evaluation (the pre-trained model), None where there is none."""
        start = self.evaluations[0] if self.evaluations else None
        return start.metrics.get(metric) if start and start.step == 0 else None

    def last(self, metric: str) -> float | None:
        """The metric at the last evaluation."""
        return self.evaluations[-1].metrics.get(metric) if self.evaluations else None

    def newest(self, metric: str, step: int | None = None) -> float | None:
        """The newest value of any metric up to `step` (of all records by default), at an evaluation or not."""
        for record in reversed(self.records):
            if (step is None or record.step <= step) and metric in record.metrics:
                return record.metrics[metric]
        return None

    def spent(self, budget: str, step: int | None = None) -> float | None:
        """What a budget stood at after `step` gradient steps (all of them by default)."""
        found = self.newest(budget, step)
        return 0.0 if found is None and step == 0 else found

    def change(self, sample: str) -> Estimate | None:
        """The paired change of a per-picture quantity from step 0 to the last evaluation; None before there are two."""
        if len(self.evaluations) < 2 or self.evaluations[0].step != 0:
            return None
        before, after = (self.evaluations[i].samples.get(sample) for i in (0, -1))
        return paired(before, after) if before and after and len(before) == len(after) else None

    def level(self, sample: str) -> Estimate | None:
        """Mean and standard error over pictures of a per-picture quantity at the last evaluation."""
        return estimate(self.evaluations[-1].samples.get(sample) or ()) if self.evaluations else None

    @property
    def why(self) -> str:
        """What is known about a cell that is not done, in one line; empty for one that is."""
        step, steps, message = (
            self.detail.get("step"),
            self.detail.get("steps") or self.steps,
            self.detail.get("message"),
        )
        kind = self.detail.get("class")
        parts = [f"at step {step} of {steps}" if step is not None else "not started"]
        if kind and kind != self.state:
            parts.append(str(kind))
        if message:
            parts.append(str(message).strip().splitlines()[0])
        return "" if self.finished else ": ".join(parts)

    @property
    def status(self) -> str:
        """The state in words: "diverged at step 20 of 60: ...", "not started"."""
        return self.why if self.state == "new" else f"{self.state} {self.why}".strip()


@dataclass(frozen=True)
class Sweep:
    """A sweep read from the store: the plan as it was launched, and its cells in plan order."""

    name: str
    plan: Mapping[str, Any]
    cells: Sequence[Cell]
    folder: Path

    @cached_property
    def prompts(self) -> dict[str, list[Cell]]:
        """Cells by prompt id, in plan order."""
        return _grouped(self.cells, lambda cell: cell.prompt)

    @cached_property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    @cached_property
    def betas(self) -> list[Any]:
        found = list(dict.fromkeys(cell.beta for cell in self.cells))
        return sorted(
            found, key=lambda beta: (not isinstance(beta, int | float), beta if isinstance(beta, int | float) else 0)
        )

    @cached_property
    def extras(self) -> list[str]:
        return list(dict.fromkeys(name for cell in self.cells for name in cell.extras))

    @cached_property
    def counts(self) -> dict[str, int]:
        return {name: len(cells) for name, cells in _grouped(self.cells, lambda cell: cell.state).items()}


def series(cells: Iterable[Cell]) -> dict[tuple[str, Any], list[Cell]]:
    """Cells that differ in nothing but their seed, by (variant, beta), in plan order."""
    return _grouped(cells, lambda cell: (cell.variant, cell.beta))


def sampled(cells: Sequence[Cell]) -> str:
    """What the evaluations of these cells draw: "pictures", or "samples" of a model that has none to show."""
    records = [record for cell in cells for record in cell.evaluations]
    return "samples" if records and not any(record.pictures for record in records) else "pictures"


def _grouped(cells: Iterable[Cell], name: Any) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(name(cell), []).append(cell)
    return groups


# ---------------------------------------------------------------------------------------------------------- reading


def load(store: Store, name: str) -> Sweep:
    """Read a sweep. Raises UserError where the store has no such sweep, naming those it has."""
    names = store.sweeps()
    if not names:
        raise UserError(f"store={store} has no sweeps yet; run `pift launch` first, or name another store=FOLDER")
    if name not in names:
        raise UserError(f"sweep={name!r} is not in store={store}; choose one of {', '.join(names)}")
    folder = store.sweep(name)
    plan = store.plan(name)
    cells = [_cell(store, plan, entry) for entry in plan["cells"]]
    return Sweep(name=str(plan.get("sweep", name)), plan=plan, cells=cells, folder=folder.root)


def _cell(store: Store, plan: Mapping[str, Any], entry: Mapping[str, Any]) -> Cell:
    folder, extras = store.trial(entry["key"]), _extras(plan, entry)
    varying = [name for name in extras if _varies(plan, name)]
    variant = " ".join([str(entry["method"]), *(f"{name.rpartition('.')[2]}={show(extras[name])}" for name in varying)])
    seed = f" seed {show(entry['seed'])}" if len({show(other["seed"]) for other in plan["cells"]}) > 1 else ""
    journal, found, known = scan(folder.journal), state(folder), detail(folder)
    if journal.problem:  # what is sound of it is shown, and that the rest is missing
        message = f"the journal is damaged at {journal.problem}; the launch, given again, computes the rest anew"
        found, known = ("resumable" if found == "done" else found), known | {"class": "damaged", "message": message}
    return Cell(
        key=entry["key"],
        label=entry.get("label", entry["key"]),
        prompt=str(entry["prompt"]),
        prompt_text=str(entry.get("prompt_text") or entry["prompt"]),
        beta=entry["beta"],
        method=str(entry["method"]),
        seed=entry["seed"],
        extras=extras,
        variant=variant,
        title=f"{variant} β\u00a0{show(entry['beta'])}{seed}",
        state=found,
        detail=known,
        spec=plan.get("specs", {}).get(entry["key"], {}),
        records=_records(folder, journal),
        done=sound_record(folder.done),
        folder=folder,
    )


def _varies(plan: Mapping[str, Any], name: str) -> bool:
    """Does a further axis tell cells of one prompt apart? (A model that comes with its own prompt does not.)"""
    return len({(cell["prompt"], show(cell.get(name))) for cell in plan["cells"]}) > len(
        {cell["prompt"] for cell in plan["cells"]}
    )


def _extras(plan: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The cell's values on further axes: those the plan names, else whatever a cell carries beside its identity."""
    axes = [name for name in plan.get("axes", {}) if name not in IDENTITY]
    named = [name for name in entry if name not in IDENTITY and name != "state" and not isinstance(entry[name], dict)]
    return {name: entry[name] for name in dict.fromkeys(axes + named) if entry.get(name) is not None}


def _records(folder: TrialFolder, journal: Scan) -> list[Record]:
    """The journal, one record a step."""
    return [
        Record(
            step=int(line["step"]),
            time=float(line.get("time", 0.0)),
            metrics=line.get("metrics", {}),
            samples=line.get("samples", {}),
            pictures=folder.root / line["pictures"] if line.get("pictures") else None,
        )
        for line in journal.records
    ]


# ---------------------------------------------------------------------------------------------------------- writing


def row(cell: Cell) -> dict[str, Any]:
    """One cell as a flat row: identity, state, first, last, change with its paired standard error, budgets, and then
    every metric of the last record and the last evaluation under its own name."""
    values: dict[str, Any] = {
        "key": cell.key,
        "prompt": cell.prompt,
        "prompt_text": cell.prompt_text,
        "method": cell.method,
        "beta": show(cell.beta),
        "seed": show(cell.seed),
        **{name: show(value) for name, value in cell.extras.items()},
        "state": cell.state,
        "step": cell.step,
        "gradient_steps": cell.steps,
    }
    for name in ("reward", "judge"):
        change = cell.change(name)
        values |= {
            f"{name}_first": cell.first(f"eval/{name}_mean"),
            f"{name}_last": cell.last(f"eval/{name}_mean"),
            f"{name}_change": change.mean if change else None,
            f"{name}_change_se": change.se if change else None,
        }
    change = cell.change("reward")
    values["pictures"] = change.n if change else None
    values |= {"kl_path_nats": cell.last("eval/kl_path_nats"), "objective": cell.last("eval/objective")}
    values |= {"diversity_first": cell.first("eval/diversity"), "diversity_last": cell.last("eval/diversity")}
    values |= {name: cell.spent(budget) for name, budget in BUDGETS.items()}
    values |= {"seconds_wall": cell.done.get("seconds"), "message": cell.why}
    newest = {**(cell.records[-1].metrics if cell.records else {})}
    newest |= dict(cell.evaluations[-1].metrics) if cell.evaluations else {}
    return values | {name: newest[name] for name in sorted(newest) if not name.startswith("budget/")}


def write_cells(sweep: Sweep, path: Path) -> None:
    """One row per cell of the plan."""
    rows = [row(cell) for cell in sweep.cells]
    _write(path, list(dict.fromkeys(name for values in rows for name in values)), rows)


def write_curves(sweep: Sweep, path: Path) -> None:
    """The long table: one row per cell, step and metric."""
    extras = sweep.extras
    columns = ["key", "prompt", "method", "beta", "seed", *extras, "state", "step", "time", "metric", "value"]
    rows = []
    for cell in sweep.cells:
        names = (
            cell.key,
            cell.prompt,
            cell.method,
            show(cell.beta),
            show(cell.seed),
            *(show(cell.extras.get(n)) for n in extras),
        )
        for record in cell.records:
            head = (*names, cell.state, record.step, record.time)
            rows += [
                dict(zip(columns, (*head, name, value), strict=True)) for name, value in sorted(record.metrics.items())
            ]
    _write(path, columns, rows)


def _write(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(value) for name, value in values.items()} for values in rows)
    write_text(path, stream.getvalue())


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a text that begins like one, and is no number, behind a '."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
