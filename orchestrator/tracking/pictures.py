"""An evaluation's pictures as MLflow's image grid wants them: nearly square, and named as it looks them up.

    write(strip, record, place, key, name)     the picture and its small copy, in the folder `place`
    address(run_id, record, key, name)         where MLflow's own pages find the small one, for a note

The grid shows every image in a square, so a strip of eight in a row would be an eighth as high as it is wide.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.tracking.points import milliseconds
from orchestrator.tracking.saved_views import END, SAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 320
"""Pixels of the small copy's longer side: the grid shows it at its own size, and the whole one behind a click."""
LEAST = 96
"""Pixels of a picture's side; a smaller one is enlarged by a whole factor, pixel by pixel."""
GAP = 2
"""Pixels between two pictures."""
END_STEP = 0
"""The step of a picture that stands for the end of training, whatever its own was."""
FOLDER, COPY = "images", "+compressed.webp"


def write(strip: Path, record: Mapping[str, Any], place: Path, key: str, name: str = SAMPLES) -> None:
    """Write the picture of a journal's record under the names that MlflowClient.log_image would give it.

    That call names each file at random and may be asynchronous; here the name follows from trial, name and step, so
    that sending again replaces the file.
    """
    from PIL import Image

    stem = _stem(record, key, name)
    with Image.open(strip) as picture:
        whole = squared(picture)
    whole.save(place / f"{stem}.png")
    whole.thumbnail((SMALL, SMALL))
    whole.save(place / f"{stem}{COPY}", quality=90)


def address(run_id: str, record: Mapping[str, Any], key: str, name: str = SAMPLES) -> str:
    """The small copy's address, behind the server's."""
    path = quote(f"{FOLDER}/{_stem(record, key, name)}{COPY}", safe="")
    return f"get-artifact?path={path}&run_uuid={run_id}"


def _stem(record: Mapping[str, Any], key: str, name: str) -> str:
    step = END_STEP if name == END else record["step"]
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{key}/{name if name == END else step}")
    return f"{name}+step+{step}+timestamp+{milliseconds(record)}+{identity}"


def squared(strip: Image) -> Image:
    """A row of square pictures as about as many rows as columns, a hair apart, small ones enlarged."""
    from PIL import Image

    if strip.width % strip.height:  # no row of squares
        return strip.copy()
    factor = math.ceil(LEAST / strip.height)
    strip = strip.resize((strip.width * factor, strip.height * factor), Image.Resampling.NEAREST)
    size, count = strip.height, strip.width // strip.height
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (size + GAP) - GAP, rows * (size + GAP) - GAP), "white")
    for number in range(count):
        piece = strip.crop((number * size, 0, (number + 1) * size, size))
        sheet.paste(piece, (number % columns * (size + GAP), number // columns * (size + GAP)))
    return sheet
