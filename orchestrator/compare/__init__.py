"""`pift compare`: a sweep's store in, one page and two CSV files out.

What: `compare(store, sweep)` reads the plan and the journals (never MLflow), and writes report.html, cells.csv,
curves.csv and figures/<prompt>.png. It may be called at any time, also while the sweep runs; what is missing is listed
first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.ledger import Store

if TYPE_CHECKING:
    from orchestrator.compare import frame


@dataclass(frozen=True)
class Report:
    """Where the files lie, the same in short for the terminal (`table`, plain text), and the cells it was made of."""

    html: Path
    csv: Path
    curves: Path
    figures: tuple[Path, ...]
    table: str
    found: frame.Sweep


def compare(store: Store, sweep: str, out: Path | None = None) -> Report:
    """Compare all cells of a sweep as they stand; into `out`, store/sweeps/<sweep>/report by default.

    Raises UserError where the store has no such sweep.
    """
    from orchestrator.compare import figures, frame, report, verdict
    from workers.store import write_text

    if sweep in store.sweeps():
        store.follow([cell["key"] for cell in store.plan(sweep)["cells"]], "pictures")
        store.refresh()
    found = frame.load(store, sweep)
    folder = Path(out) if out is not None else store.sweep(sweep).report
    drawn = {prompt: figures.panels(found, prompt) for prompt in found.prompts}
    pages, csv, curves = folder / "report.html", folder / "cells.csv", folder / "curves.csv"
    frame.write_cells(found, csv)
    frame.write_curves(found, curves)
    sheets = []
    for number, (prompt, panels) in enumerate(drawn.items()):
        if panels:
            path = folder / "figures" / f"{number:02d}_{re.sub(r'[^A-Za-z0-9]+', '_', prompt).strip('_')[:60]}.png"
            cells = found.prompts[prompt]
            heading, note = f"{cells[0].prompt_text}  ({found.name})", figures.bars_note(cells)
            figures.sheet(panels, path, found, cells, heading=heading, note=note)
            sheets.append(path)
    write_text(pages, report.page(found, drawn))
    return Report(html=pages, csv=csv, curves=curves, figures=tuple(sheets), table=verdict.table(found), found=found)
