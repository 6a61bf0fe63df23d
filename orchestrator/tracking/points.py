"""A journal's points to their run: in batches, with the original times, and a cursor that follows each batch.

The launch sends them where MLflow is a database, the trial's own process where it is a server (forwarder.py). A crash
between a batch and its cursor repeats the very same points, which MLflow keeps once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from orchestrator.ledger import Tail, mlflow_file
from orchestrator.tracking import entry
from orchestrator.tracking.client import BATCH_METRICS, clean_name
from workers.store import TrialFolder


def send_points(client: MlflowClient, folder: TrialFolder, place: str, until: float = entry.FOREVER) -> int:
    """Send what the trial's run does not have yet, until a moment of time.monotonic(); the number of points sent.

    The cursor is read from the disk: another launch may have moved it.
    """
    path = mlflow_file(folder)
    known = entry.read(path, place)
    if "run_id" not in known:
        return 0
    run_id, (offset, step) = known["run_id"], entry.cursor(known)
    tail, points = Tail(folder.journal, offset, step), 0
    for records, offset in batches(tail):
        metrics = [metric for record in records for metric in _metrics(record)]
        for start in range(0, len(metrics), BATCH_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])
        step = int(records[-1]["step"])
        entry.advance(path, place, run_id, offset, step)
        points += len(metrics)
        if time.monotonic() > until:
            return points
    if tail.offset != offset:  # the rest was sent before, and is written anew
        entry.advance(path, place, run_id, tail.offset, step)
    return points


def batches(tail: Tail) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Groups of whole records, at most BATCH_METRICS points (a record alone may have more), and the offset behind."""
    group: list[dict[str, Any]] = []
    size = behind = 0
    while found := tail.read():
        for record, offset in found:
            count = len(record.get("metrics", {}))
            if group and size + count > BATCH_METRICS:
                yield group, behind
                group, size = [], 0
            group.append(record)
            size, behind = size + count, offset
    if group:
        yield group, behind


def milliseconds(record: Mapping[str, Any]) -> int:
    return round(float(record["time"]) * 1000)


def _metrics(record: Mapping[str, Any]) -> list[Metric]:
    return [
        Metric(clean_name(name), float(value), milliseconds(record), int(record["step"]))
        for name, value in record.get("metrics", {}).items()
    ]
