"""The picture sheet: strips of the evaluation pictures, one row per cell, the same noise in every column.

Pixel art (up to 64 pixels a side) is kept to the pixel and enlarged by the browser; larger pictures are shrunk. The
page carries as many steps as fit into a budget, the first and the last always among them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from orchestrator.compare.frame import Cell
from workers.store import sound_picture

PIXEL_ART = 64
THUMBNAIL = 128
PAGE_BYTES = 1_500_000
"""What all strips of a page may weigh together, as data URIs."""


@dataclass(frozen=True)
class Frame:
    """A strip that lies in the store: its step, its file, and the reward of each picture."""

    step: int
    path: Path
    rewards: Sequence[float]


@dataclass(frozen=True)
class Strip:
    """The pictures of one cell at one step: a data URI, and the reward of each picture as far as it is known."""

    step: int
    uri: str
    rewards: Sequence[float]


@dataclass(frozen=True)
class Row:
    """A cell of the sheet with its strips by step, oldest first (the first is the pre-trained model)."""

    cell: Cell
    strips: Sequence[Strip]


@dataclass(frozen=True)
class Sheet:
    """The rows of a prompt, `columns` pictures across. `common`: all rows start from the same pictures; `pixels`:
    enlarge without smoothing."""

    rows: Sequence[Row]
    columns: int
    common: bool
    pixels: bool


def sheet(cells: Sequence[Cell], budget: int) -> Sheet | None:
    """The sheet of a prompt in at most about `budget` bytes; None where no cell has pictures."""
    kept = {cell.key: _pictured(cell) for cell in cells}
    shown = [cell for cell in cells if kept[cell.key]]
    if not shown:
        return None
    sizes = [Image.open(frames[0].path).size for frames in kept.values() if frames]
    columns = min(max(1, width // height) for width, height in sizes)
    steps = sorted({frame.step for frames in kept.values() for frame in frames})
    weight: int = sum(_weight(kept[cell.key][-1].path, columns) for cell in shown)
    if 3 * weight > budget:  # not even three steps of each fit: fewer pictures of each
        columns = max(min(columns, 3), int(columns * budget / (3 * weight)))
    chosen = set(_spread(steps, max(2, int(budget / max(weight, 1)))))
    rows = [Row(cell, [_strip(frame, columns) for frame in _chosen(kept[cell.key], chosen)]) for cell in shown]
    common = len({row.strips[0].uri for row in rows}) == 1 and all(row.strips[0].step == 0 for row in rows)
    return Sheet(rows, columns, common, max(height for _, height in sizes) <= PIXEL_ART)


def _pictured(cell: Cell) -> list[Frame]:
    """The steps of a cell whose pictures are in the store, and whole."""
    frames = [(record, record.pictures) for record in cell.records if record.pictures]
    frames = [(record, path) for record, path in frames if sound_picture(path)]
    return [Frame(record.step, path, record.samples.get("reward", ())) for record, path in frames]


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, both ends included."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _chosen(frames: Sequence[Frame], steps: set[int]) -> list[Frame]:
    """The frames at the chosen steps, and always the cell's own first and last."""
    return [frame for i, frame in enumerate(frames) if frame.step in steps or i in (0, len(frames) - 1)]


def _strip(frame: Frame, columns: int) -> Strip:
    return Strip(frame.step, _uri(frame.path, columns), list(frame.rewards)[:columns])


def _weight(path: Path, columns: int) -> int:
    """About the bytes of a strip's data URI."""
    with Image.open(path) as image:
        return path.stat().st_size if image.height <= PIXEL_ART else columns * 6000


def _uri(path: Path, columns: int) -> str:
    """The first `columns` pictures of a strip, a gap after each: lossless for pixel art, else shrunk and lossy."""
    with Image.open(path) as image:
        strip, side = image.convert("RGB"), image.height
    shown = side if side <= PIXEL_ART else THUMBNAIL
    gap = max(1, shown // 32)
    spaced = Image.new("RGBA", (columns * (shown + gap), shown))
    for i in range(columns):
        picture = strip.crop((i * side, 0, (i + 1) * side, side))
        if shown != side:
            picture = picture.resize((shown, shown), Image.Resampling.LANCZOS)
        spaced.paste(picture, (i * (shown + gap), 0))
    stream = io.BytesIO()
    if shown == side:
        spaced.save(stream, "WEBP", lossless=True, quality=60, method=4)
    else:
        spaced.save(stream, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
