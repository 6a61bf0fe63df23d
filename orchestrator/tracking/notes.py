"""The notes on MLflow's pages: what a sweep is, how it stands, what its data say, with links to its charts.

    of_trial(spec, key, pictures)           a trial's run
    Sweep(...).plan(states, seconds)        a sweep that has begun: its cells, their states, the hours that are left
    Sweep(...).verdict(found)               one that has ended: the table of `pift compare`, over seeds with intervals
    of_experiment(note, others)             the experiment's: the newest sweep's note, and links to the other sweeps

The first line is what MLflow shows of a folded note. All names and texts in it are made safe (markdown.py), and what
does not fit is counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.ledger import FINAL
from orchestrator.tracking import saved_views
from orchestrator.tracking.markdown import link, safe, table
from workers.recorder import METRICS

if TYPE_CHECKING:
    from orchestrator.compare import frame

MOST_VIEWS = 30
"""Links to other sweeps in the experiment's note."""


@functools.cache
def metrics() -> str:
    """What each metric means."""
    lines = [f"- `{name}`: {meaning}" for name, meaning in METRICS.items()]
    return "\n".join(["**Metrics** (step = completed gradient steps)", "", *lines])


def of_trial(spec: Mapping[str, Any], key: str, pictures: Mapping[str, str] | None = None) -> str:
    """A trial's run: its prompt, how to draw from it, its pictures ({title: address})."""
    text = f"Prompt: {safe(spec.get('prompt', ''), 2000)}\n\n`pift sample {key}` draws from this adapter."
    return "\n".join([text, "", *of_pictures(pictures)]) if pictures else text


def of_pictures(pictures: Mapping[str, str]) -> list[str]:
    """The lines of a table with a picture under each title."""
    return table(list(pictures), [[f"![{title}]({address})" for title, address in pictures.items()]])


def of_experiment(note: str, others: Iterable[tuple[str, str]], room: int) -> str:
    """The newest sweep's note, and the views of the others (name, address) as far as they fit."""
    links = [link(name, target) for name, target in others]
    more = [f"and {len(links) - MOST_VIEWS} more in the menu Views"] if len(links) > MOST_VIEWS else []
    further = [f"Other sweeps: {', '.join([*links[:MOST_VIEWS], *more])}"] if links else []
    text = "\n\n".join([note, *further])
    return text if len(text) <= room else note[:room]


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs are in MLflow."""

    content: Mapping[str, Any]
    """The content of plan.json."""
    experiment_id: str
    store_id: str
    parent: str
    """The sweep's own run."""
    runs: Mapping[str, str]
    """Key -> run id of the trials."""

    @property
    def name(self) -> str:
        return str(self.content["sweep"])

    def plan(self, states: Mapping[str, str], seconds: Mapping[str, float | None], room: int) -> str:
        """How the sweep stood when it was opened; `seconds`: what a trial that is not over still takes."""
        cells = self.content["cells"]
        left = [cell["key"] for cell in cells if states.get(cell["key"], "new") not in FINAL]
        counts = Counter(states.get(cell["key"], "new") for cell in cells)
        parts = [f"**{safe(self.name)}**: {len(cells)} trials", ", ".join(f"{n} {name}" for name, n in counts.items())]
        parts += [_hours([seconds.get(key) for key in left])] if left else []
        rows = [
            [self._trial(cell["key"], cell["label"]), states.get(cell["key"], "new"), _about(seconds.get(cell["key"]))]
            for cell in cells
        ]
        head = [self._head(parts), self._axes()]
        return _fitting([*head, *self._prompts()], ["trial", "state", "left"], rows, [metrics()], room)

    def verdict(self, found: frame.Sweep, room: int) -> str:
        """What the data say, as `pift compare` has it; several seeds first as their mean with its interval."""
        from orchestrator.compare import frame, verdict

        gaps, seeds = verdict.has_gaps(found), len({cell.seed for cell in found.cells}) > 1
        lines = [self._head([f"**{safe(self.name)}**: {safe(verdict.counts(found))}"]), *self._prompts()]
        rows: list[Sequence[str]] = []
        for prompt, cells in found.prompts.items():
            if seeds:
                groups = [verdict.of_seeds(group) for group in frame.series(cells).values()]
                lines.append(f"**{safe(cells[0].prompt_text)}**")
                lines.append("\n".join(f"- **{safe(line.subject)}**: {safe(line.text, 600)}" for line in groups))
            for cell in cells:
                shown = [safe(value) for value in verdict.columns(cell, gaps)]
                rows.append([self._trial(cell.key, cell.label), safe(prompt), *shown[3:]])
        heads = ["trial", "prompt", *verdict.heads(gaps)[3:]]
        return _fitting(lines, heads, rows, [safe(verdict.seeds_note(found), 1000), metrics()], room)

    def _head(self, parts: Sequence[str]) -> str:
        """The line that a folded note shows."""
        view = saved_views.view_id(self.store_id, self.name)
        places = [link(page, saved_views.link(self.experiment_id, view, page)) for page in saved_views.PAGES]
        places.append(link("report", f"#/experiments/{self.experiment_id}/runs/{self.parent}/artifacts"))
        return " · ".join([*(part for part in parts if part), *places])

    def _axes(self) -> str:
        """The grid: "2 method: pi_ft, dpok; 3 beta: 0.01, 0.1, 1"."""
        axes = [
            f"{len(values)} {safe(name)}: {safe(', '.join(map(str, values)))}"
            for name, values in self.content["axes"].items()
            if values
        ]
        return "Grid: " + "; ".join(axes)

    def _prompts(self) -> list[str]:
        """Links to the charts of each prompt, where there are several."""
        links = [
            link(prompt, saved_views.link(self.experiment_id, saved_views.view_id(self.store_id, self.name, prompt)))
            for prompt in saved_views.prompts_of(self.content)
        ]
        return [f"Charts by prompt: {', '.join(links)}"] if links else []

    def _trial(self, key: str, label: str) -> str:
        """A trial's label, linked to its run where it has one."""
        run = self.runs.get(key)
        return safe(label) if run is None else link(label, f"#/experiments/{self.experiment_id}/runs/{run}")


def _fitting(
    head: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]], tail: Sequence[str], room: int
) -> str:
    """Paragraphs, a table of as many rows as there is room for, paragraphs; the last ones give way first."""

    def whole(count: int, tail: Sequence[str]) -> str:
        more = [f"... and {len(rows) - count} more trials"] if count < len(rows) else []
        return "\n\n".join([*head, "\n".join(table(heads, rows[:count])), *more, *tail])

    while tail and len(whole(0, tail)) > room // 2:
        tail = tail[:-1]
    lengths = [len(line) + 1 for line in table(heads, rows)[2:]]
    left, count = room - len(whole(0, tail)), 0
    while count < len(lengths) and lengths[count] <= left:
        left, count = left - lengths[count], count + 1
    return whole(count, tail)[:room]


def _hours(seconds: Sequence[float | None]) -> str:
    """ "about 1.2 trial-hours", "at least" where some are not known; empty where none is."""
    known = [value for value in seconds if value is not None]
    if not known:
        return ""
    return f"{'about' if len(known) == len(seconds) else 'at least'} {sum(known) / 3600:.2g} trial-hours left"


def _about(seconds: float | None) -> str:
    return "" if not seconds else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
