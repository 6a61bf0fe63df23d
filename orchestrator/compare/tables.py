"""The lower half of the report: the table of all cells, the settings, the provenance, the meaning of every metric."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.compare import theory, verdict
from orchestrator.compare.frame import BUDGETS, Cell, Sweep, row, show
from orchestrator.compare.markup import facts, folded, table, tag, text
from orchestrator.provenance import UNKNOWN, provenance
from workers.recorder import METRICS

COLUMNS = (
    ("prompt", ""),
    ("method", ""),
    ("β", ""),
    ("seed", ""),
    ("state", ""),
    ("reward", "step 0"),
    ("reward", "last"),
    ("reward change", "± paired se"),
    ("judge", "step 0"),
    ("judge", "last"),
    ("judge change", "± paired se"),
    ("path KL", "nats"),
    ("KL of Y_0", "nats"),
    ("J", "objective"),
    ("gap to J*", "reward units"),
    ("κ max", "of eq. 18"),
    ("diversity", "step 0"),
    ("diversity", "last"),
    ("gradient", "steps"),
    ("reward", "queries"),
    ("transition", "gradients"),
    ("model", "forwards"),
    ("seconds", "training"),
)
WORDS = ("prompt", "method", "state")
"""The columns that hold words."""
OPTIONAL = ("judge", "judge change", "KL of Y_0", "gap to J*", "κ max", "diversity")
"""The columns of what not every model or setting has: left out where no cell has a value."""


def cells(sweep: Sweep) -> str:
    """All cells, one row each; a click on a column's title sorts."""
    rows = [_row(cell) for cell in sweep.cells]
    kept = [i for i, (name, _) in enumerate(COLUMNS) if name not in OPTIONAL or any(r[i][0] is not None for r in rows)]
    heads = [_head(*COLUMNS[i]) for i in kept]
    note = "A title sorts. The same with every metric: <code>cells.csv</code>; every point: <code>curves.csv</code>."
    body = table(heads, ([_entry(COLUMNS[i][0], *row[i]) for i in kept] for row in rows), cls="sortable")
    return tag("section", "<h2>All cells</h2>", tag("p", note, cls="quiet"), body, id="cells")


def _head(name: str, unit: str) -> str:
    small = tag("small", unit or "&nbsp;", cls="quiet")
    return tag("th", tag("button", name), small, cls="sort" + " text" * (name in WORDS), scope="col")


def _entry(column: str, value: Any, shown: str) -> str:
    return tag("td", text(shown), cls="text") if column in WORDS else _number(value, shown)


def _row(cell: Cell) -> list[tuple[Any, str]]:
    """The full value and how it is shown, column by column."""
    values = row(cell)
    at = "" if cell.finished or cell.step is None else f" at {cell.step}"
    words = (cell.prompt, cell.variant, cell.beta, cell.seed, cell.state + at)
    out: list[tuple[Any, str]] = [(value, show(value)) for value in words]
    for name in ("reward", "judge"):
        out += [(values[f"{name}_{end}"], verdict.plain(values[f"{name}_{end}"])) for end in ("first", "last")]
        out.append((values[f"{name}_change"], verdict.with_error(cell.change(name))))
    out += [(value, verdict.nats(value)) for value in (values["kl_path_nats"], cell.newest(theory.INITIAL_KL))]
    out.append((values["objective"], verdict.plain(values["objective"])))
    out.append((cell.newest(theory.GAP), verdict.tiny(cell.newest(theory.GAP))))
    out.append((cell.newest(theory.KAPPA), verdict.nats(cell.newest(theory.KAPPA))))
    out += [(values[f"diversity_{end}"], verdict.plain(values[f"diversity_{end}"], 3)) for end in ("first", "last")]
    out.append((cell.steps, show(cell.steps)))
    return out + [(values[name], "" if values[name] is None else f"{values[name]:,.0f}") for name in BUDGETS]


def _number(value: Any, shown: str) -> str:
    """A cell that sorts by its full value."""
    return tag("td", text(shown or "–"), data_v="" if value is None else value)


# ----------------------------------------------------------------------------------------------------------- settings


def settings(sweep: Sweep) -> str:
    """What differs between the cells, by method; what is common, folded away."""
    flats = {cell.key: _flat(cell.spec) for cell in sweep.cells if cell.spec}
    names = sorted({name for flat in flats.values() for name in flat})
    common = [name for name in names if len({repr(flat.get(name)) for flat in flats.values()}) == 1]
    columns = {
        variant: [flats[cell.key] for cell in sweep.cells if cell.variant == variant and cell.key in flats]
        for variant in sweep.variants
    }
    heads = [tag("th", text(name), cls="text", scope="col") for name in ("setting", *columns)]
    rows = [
        [
            tag("td", tag("code", text(name)), cls="text"),
            *(tag("td", text(_distinct(c, name)), cls="wrap") for c in columns.values()),
        ]
        for name in names
        if name not in common
    ]
    shared = facts((tag("code", text(name)), text(show(next(iter(flats.values()))[name]))) for name in common)
    differing = (
        "<h3>That differ between cells</h3>" + table(heads, rows)
        if rows
        else "<p>All cells have the same settings.</p>"
    )
    return tag("section", "<h2>Settings</h2>", differing, folded("Common to all cells", shared), id="settings")


def _flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method.lr": 0.0003, ...}: the leaves of a spec under dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in spec.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _distinct(flats: Sequence[Mapping[str, Any]], name: str) -> str:
    return " | ".join(dict.fromkeys(show(flat[name]) for flat in flats if name in flat)) or "–"


# --------------------------------------------------------------------------------------------------------- provenance


def origin(sweep: Sweep) -> str:
    """Where the numbers come from: when, on what, with which code, from which trial folders."""
    rows = [
        [
            tag("td", tag("code", text(cell.key)), cls="text"),
            *(tag("td", text(value), cls="text") for value in (cell.prompt, cell.title, cell.state)),
            tag("td", text(cell.done.get("attempt", "–"))),
            tag("td", text(verdict.plain(cell.done.get("seconds"), 0))),
            tag("td", text(when(cell.done.get("finished_at")) or "–"), cls="text"),
        ]
        for cell in sweep.cells
    ]
    heads = [
        tag("th", name, cls="text")
        for name in ("trial key", "prompt", "cell", "state", "attempt", "seconds", "finished")
    ]
    listed = facts(
        (tag("span", text(name), cls="quiet"), text(value)) for name, value in _facts(sweep).items() if value
    )
    trials = folded("Trials: <code>store/trials/&lt;key&gt;/</code>", table(heads, rows))
    return tag("section", "<h2>Provenance</h2>", listed, trials, id="provenance")


def _facts(sweep: Sweep) -> dict[str, str]:
    done = [cell.done for cell in sweep.cells if cell.done]
    code = {name: value for source in (sweep.plan, *done) for name, value in source.get("provenance", {}).items()}
    return {
        "store": str(sweep.folder.parent.parent),
        "plan written": when(sweep.plan.get("created_at")),
        "overrides": " ".join(map(str, sweep.plan.get("overrides", []))),
        "first trial started": when(min((d["started_at"] for d in done if "started_at" in d), default=None, key=str)),
        "last trial finished": when(max((d["finished_at"] for d in done if "finished_at" in d), default=None, key=str)),
        "trial seconds, summed": f"{sum(d.get('seconds') or 0 for d in done):,.0f}" if done else "",
        "device": _all(done, "device"),
        "torch": _all(done, "torch"),
        **{f"{name}, of the launch": str(value) for name, value in code.items()},
        **{f"{name}, of this report": value for name, value in provenance().items() if value != UNKNOWN},
    }


def _all(sources: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(source[name]) for source in sources if source.get(name)))


def when(value: Any) -> str:
    """A time stamp (seconds, or text such as ISO 8601) for people."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return re.sub(r"(\d)T(\d)", r"\1 \2", str(value)).replace("+00:00", " UTC") if value else ""


# ------------------------------------------------------------------------------------------------------------ metrics


def metrics() -> str:
    """The definitions, from the one place that has them."""
    listed = facts((tag("code", text(name)), text(meaning)) for name, meaning in METRICS.items())
    errors = (
        "<b>Paired standard error.</b> All cells of a prompt are evaluated on the same fixed noise, before and after. "
        "The change is taken picture by picture; its standard error is sd(after − before)/√n over the n pictures. It "
        "says how sure we are of this one adapter, not of the method. <b>Interval over seeds.</b> Mean over the "
        "training seeds ± t·sd/√n, 95 %, two-sided, the evaluation noise held fixed."
    )
    return tag("section", "<h2>What is measured</h2>", listed, tag("p", errors), id="metrics")
