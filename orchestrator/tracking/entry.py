"""What the store remembers of MLflow: mlflow.json of a trial and of a sweep, records with one entry per tracker.

    trials/<key>/mlflow.json    {"store": {"run_id", "experiment_id",
                                           "offset", "step",         the cursor: how much of the journal was sent
                                           "pictures",               the step of the newest picture sent
                                           "params", "artifacts",    what was sent besides
                                           "model",                  the adapter as a model of MLflow's
                                           "sweeps": [...],          the sweeps that the run says it belongs to
                                           "closed", "size"}}        its last status, and the journal's size then
    sweeps/<name>/mlflow.json   {"store": {"run_id", "experiment_id", "opening"}}

The key of an entry is "store" for the database in the store, else the tracker's address without its password. Every
write reads the file first and changes only what it names: the launch and the trial's own forwarder (workers of a
server) change different names. Where both write in the same millisecond one change is lost, which means no more than
that something is sent twice, and MLflow keeps equal points once.

Steps up to "step" are never sent again: what a damaged journal lost is computed again with other times, and MLflow
would show it as second points beside the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.store import Damaged, read_record, sound_record, write_record


def read(path: Path, place: str) -> dict[str, Any]:
    """The entry of one tracker; empty where there is none, or none that is sound."""
    return dict(sound_record(path).get(place, {}))


def is_damaged(path: Path) -> bool:
    """Whether there is a file that is not what was written (or one from before it had a checksum)."""
    try:
        read_record(path)
    except Damaged:
        return True
    return False


def replace(path: Path, place: str, entry: Mapping[str, Any]) -> None:
    """Begin an entry anew."""
    write_record(path, sound_record(path) | {place: dict(entry)}, durable=False)


def update(path: Path, place: str, **values: Any) -> dict[str, Any]:
    """Change some names of an entry; None takes a name away. The entry as it is then."""
    content = sound_record(path)
    entry = {name: value for name, value in (content.get(place, {}) | values).items() if value is not None}
    write_record(path, content | {place: entry}, durable=False)
    return entry


def advance(path: Path, place: str, run_id: str, offset: int, step: int) -> None:
    """Move the cursor, unless the trial has another run by now."""
    if read(path, place).get("run_id") == run_id:
        update(path, place, offset=offset, step=step)


def cursor(entry: Mapping[str, Any]) -> tuple[int, int]:
    """(offset, step): the bytes of the journal that were sent, and the last step in them."""
    return int(entry.get("offset", 0)), int(entry.get("step", -1))


def size(path: Path) -> int:
    """A file's size; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


FOREVER = math.inf
"""As a moment of time.monotonic(): no limit."""
