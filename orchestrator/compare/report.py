"""The report of a sweep: one HTML page that needs nothing but itself, no script, font or picture from elsewhere.

Order of the page: what there is and what is missing, what the data say, then per prompt curves and pictures, the table
of all cells, settings, provenance, and the definition of every metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from orchestrator.compare import figures, pictures, tables, verdict
from orchestrator.compare.assets import CSS, JS
from orchestrator.compare.frame import Cell, Sweep, series, show
from orchestrator.compare.markup import folded, tag, text

GLYPHS = {
    "done": "✓",
    "failed": "✕ failed",
    "diverged": "✕ diverged",
    "running": "… running",
    "stale": "… stale",
    "resumable": "‖ stopped",
    "new": "○ not run",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser's own guard of "needs nothing but itself"."""


def page(sweep: Sweep, drawn: Mapping[str, Sequence[figures.Panel]]) -> str:
    """The whole page. `drawn`: the panels of each prompt."""
    budget = pictures.PAGE_BYTES // max(1, len(sweep.prompts))
    body = [_head(sweep), _coverage(sweep), _verdicts(sweep)]
    for number, (prompt, cells) in enumerate(sweep.prompts.items()):
        body.append(_prompt(sweep, number, cells, drawn[prompt], pictures.sheet(cells, budget)))
    body += [tables.cells(sweep), tables.settings(sweep), tables.origin(sweep), tables.metrics()]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{text(sweep.name)} · pift compare</title><style>{CSS}{_beta_colours(len(sweep.betas))}</style>"
    )
    script = tag("script", JS)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}{script}</body></html>\n'


def _beta_colours(count: int) -> str:
    """The ramp as variables, for a light and for a dark page."""

    def variables(dark: bool) -> str:
        return ":root { " + " ".join(f"--b{i}: {colour};" for i, colour in enumerate(figures.ramp(count, dark))) + " }"

    return f"{variables(False)}\n@media screen and (prefers-color-scheme: dark) {{ {variables(True)} }}"


# ---------------------------------------------------------------------------------------------- coverage and verdicts


def _head(sweep: Sweep) -> str:
    links = [
        tag("a", text(cells[0].prompt_text), href=f"#prompt-{i}") for i, cells in enumerate(sweep.prompts.values())
    ]
    for name, target in (
        ("All cells", "cells"),
        ("Settings", "settings"),
        ("Provenance", "provenance"),
        ("Metrics", "metrics"),
    ):
        links.append(tag("a", name, href=f"#{target}"))
    axes = " × ".join(f"{len(values)} {name}" for name, values in sweep.plan.get("axes", {}).items() if len(values) > 1)
    facts = [verdict.counts(sweep), axes, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"]
    line = tag("p", text(" · ".join(fact for fact in facts if fact)), cls="quiet")
    return tag("header", tag("h1", text(sweep.name)), line, tag("nav", *links))


def _coverage(sweep: Sweep) -> str:
    """Every cell of the plan with its state, and why the others have no result."""
    rows = []
    for cells in sweep.prompts.values():
        chips = [_chip(group) for group in series(cells).values()]
        rows += [tag("div", text(cells[0].prompt_text)), tag("div", *chips, cls="chips")]
    gaps = [cell for cell in sweep.cells if not cell.finished]
    note = tag("p", "Every cell of the plan has finished.")
    if gaps:
        many = f"{len(gaps)} of {len(sweep.cells)} cells have no final result. Nothing below counts them as finished."
        note = tag("p", many) + tag("ul", *map(_gap, gaps), cls="gaps")
    return tag("section", "<h2>Coverage</h2>", note, tag("div", *rows, cls="coverage"))


def _gap(cell: Cell) -> str:
    words = text(f"{cell.prompt} · {cell.title}: ") + text(f"{cell.status} ")
    return tag("li", words, tag("code", text(cell.key)))


def _chip(group: Sequence[Cell]) -> str:
    """One (method, beta) with the state of each of its seeds; its frame says whether one is missing."""
    worst = next((cell.state for cell in group if not cell.finished), "done")
    states = [tag("b", text(GLYPHS.get(cell.state, cell.state)), cls=cell.state) for cell in group]
    if len(group) > 1:
        seeds = [f" <small>seed {text(show(cell.seed))}</small>" for cell in group]
        states = [seed + state for seed, state in zip(seeds, states, strict=True)]
    return tag("span", text(f"{group[0].variant} β\u00a0{show(group[0].beta)}"), *states, cls=f"chip {worst}")


def _verdicts(sweep: Sweep) -> str:
    note = verdict.seeds_note(sweep).replace(verdict.ONE_SEED, tag("b", verdict.ONE_SEED))
    parts = [tag("p", note, " ▲ ▼: beyond two standard errors, or zero outside the interval.")]
    for cells in sweep.prompts.values():
        parts.append(tag("h3", text(cells[0].prompt_text)))
        single, groups = [verdict.of_cell(cell) for cell in cells], list(series(cells).values())
        if any(len(group) > 1 for group in groups):
            parts += [_lines(map(verdict.of_seeds, groups)), folded("Each seed", _lines(single))]
        else:
            parts.append(_lines(single))
        if pairs := verdict.of_methods(cells):
            parts.append(folded("Between methods at the same β (at unequal KL: read it with the front)", _lines(pairs)))
    return tag("section", "<h2>What the data say</h2>", *parts)


def _lines(lines: Iterable[verdict.Line]) -> str:
    items = [tag("li", tag("b", text(line.subject)), _whole(f": {line.text}"), cls=line.tone) for line in lines]
    return tag("ul", *items, cls="verdict")


def _whole(words: str) -> str:
    """A sentence as HTML; its gap is not broken over two lines, as browsers like to do behind the hyphen of 1.2e-05."""
    return re.sub(r"gap \S+ → [^\s,]+\b", lambda found: tag("span", found[0], cls="whole"), text(words))


# ------------------------------------------------------------------------------------------------------------- curves


def _prompt(
    sweep: Sweep, number: int, cells: Sequence[Cell], panels: Sequence[figures.Panel], sheet: pictures.Sheet | None
) -> str:
    prompt, words = cells[0].prompt, cells[0].prompt_text
    heading = text(words) + (f" <small>{text(prompt)}</small>" if prompt != words else "")
    parts = [tag("h2", heading)]
    if panels:
        plots = [_plot(panel, len(sweep.betas), f"p{number}") for panel in panels]
        parts += [_legend(sweep, cells), tag("div", *plots, cls="plots")]
    else:
        parts.append(tag("p", "No evaluation has been journaled for this prompt yet."))
    if sheet:
        parts.append(_sheet(cells, sheet))
    return tag("section", *parts, id=f"prompt-{number}")


def _plot(panel: figures.Panel, betas: int, identity: str) -> str:
    caption = tag("figcaption", text(panel.title), tag("small", text(panel.y_label), cls="quiet"))
    note = tag("small", text(panel.note), cls="quiet") if panel.note else ""
    return tag("figure", caption, figures.svg(panel, betas, f"{identity}-{panel.name}"), note)


def _legend(sweep: Sweep, cells: Sequence[Cell]) -> str:
    """Methods by line and marker, beta by colour: once for all panels of a prompt."""
    variants, betas = figures.shown(sweep, cells)
    items = [tag("li", _sample(i), text(name)) for i, name in variants.items()]
    items += [tag("li", tag("i", style=f"background:var(--b{i})"), text(name)) for i, name in betas.items()]
    return tag("ul", *items, tag("li", figures.bars_note(cells), cls="quiet"), cls="legend")


SHAPES = {
    "o": "M22 3a4 4 0 1 0 .01 0Z",
    "s": "M18.2 3.2h7.6v7.6h-7.6Z",
    "^": "M22 2.5 26.5 11 17.5 11Z",
    "D": "M22 2 27 7 22 12 17 7Z",
    "v": "M22 11.5 26.5 3 17.5 3Z",
    "P": "M20.5 2.5h3v3h3v3h-3v3h-3v-3h-3v-3h3Z",
}
"""The markers of figures.MARKERS as paths."""


def _sample(variant: int) -> str:
    """A piece of line with its marker, as the figures draw them."""
    dash = figures.DASHES[variant % len(figures.DASHES)]
    pattern = None if dash == "solid" else " ".join(str(2 * part) for part in dash[1])
    line = tag("path", d="M0 7H44", stroke="var(--ink)", stroke_width=1.8, stroke_dasharray=pattern)
    fill = "var(--ink)" if variant % 2 == 0 else "var(--paper)"
    shape = SHAPES[figures.MARKERS[variant % len(figures.MARKERS)]]
    marker = tag("path", d=shape, fill=fill, stroke="var(--ink)", stroke_width=1.4)
    return tag("svg", line, marker, viewBox="0 0 44 14", aria_hidden="true")


# ----------------------------------------------------------------------------------------------------------- pictures


def _sheet(cells: Sequence[Cell], sheet: pictures.Sheet) -> str:
    """Base and cells on the same noise, with a slider over the steps where there is script."""
    strips = [strip for row in sheet.rows for strip in row.strips]
    steps = sorted({strip.step for strip in strips})
    note = "Rows: cells. Columns: the same starting noise."
    note += " Under each picture: its reward." if any(strip.rewards for strip in strips) else ""
    parts = []
    if len(steps) > 1:
        last = len(steps) - 1
        slider = tag(
            "input", type="range", min=0, max=last, value=last, data_steps=json.dumps(steps), aria_label="training step"
        )
        parts.append(
            tag("label", "Training ", slider.removesuffix("</input>"), tag("output", f"step {steps[-1]}"), cls="slider")
        )
    if sheet.common:
        parts.append(_strip("pre-trained model", "step 0", sheet.rows[0].strips[:1], "strip base"))
    for row in sheet.rows:
        if not sheet.common and row.strips[0].step == 0:
            parts.append(_strip(f"pre-trained, of {row.cell.title}", "step 0", row.strips[:1], "strip base"))
        at = f"step {row.strips[-1].step}" + ("" if row.cell.finished else f" ({row.cell.state})")
        parts.append(_strip(row.cell.title, at, row.strips))
    shown = {row.cell.key for row in sheet.rows}
    if missing := [cell.title for cell in cells if cell.key not in shown]:
        parts.append(tag("p", text(f"No pictures yet: {'; '.join(missing)}."), cls="quiet"))
    heading = "<h3>The same noise before and after</h3>" + tag("p", note, cls="quiet")
    style = f"--columns:{sheet.columns}"
    return heading + tag("div", *parts, cls="sheet pixels" if sheet.pixels else "sheet", style=style)


def _strip(name: str, at: str, strips: Sequence[pictures.Strip], cls: str = "strip") -> str:
    """One row: its newest strip, and the others for the slider."""
    strip = strips[-1]
    every = [{"step": s.step, "uri": s.uri, "rewards": [verdict.plain(value) for value in s.rewards]} for s in strips]
    title = tag("div", text(name) + " ", tag("small", text(at), cls="at quiet"), cls="name")
    picture = tag("img", src=strip.uri, alt=f"pictures of {name}, {at}").removesuffix("</img>")
    rewards = (
        tag("div", *(tag("span", verdict.plain(value)) for value in strip.rewards), cls="rewards")
        if strip.rewards
        else ""
    )
    return tag("div", title, picture, rewards, cls=cls, data_strips=json.dumps(every) if len(every) > 1 else None)
