"""A machine that is told to leave lets its trials write a checkpoint first.

    $PIFT_NODE           a folder of this machine, for its processes alone; without it nothing here does anything
    $PIFT_NODE/leaving   while it is there, trials stop in order; they go on elsewhere when this machine is gone
    $PIFT_NODE/<pid>     this process has a trial at work

Whoever takes the machine down creates `leaving`, waits until no trial is at work, and then ends Ray: docker/start.py
does so when a worker's container is stopped. A kill without a word costs the steps since the last checkpoints, no more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

LEAVING = "leaving"
WAIT_SECONDS = 1.0


def leaving() -> bool:
    """Whether this machine is about to leave."""
    folder = _folder()
    return folder is not None and (folder / LEAVING).exists()


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Say that this process has a trial at work, for as long as the block lasts."""
    folder = _folder()
    mark = None if folder is None else folder / str(os.getpid())
    try:
        if mark is not None:
            with contextlib.suppress(OSError):  # a full disk: the machine leaves without waiting for this trial
                mark.touch()
        yield
    finally:
        if mark is not None:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)


def wait_for_the_end() -> None:
    """Hold this process until the machine takes it along, so that its trial counts as one whose machine was lost and
    begins again on another. Returns when the machine stays after all."""
    while leaving():
        time.sleep(WAIT_SECONDS)


def _folder() -> Path | None:
    name = os.environ.get("PIFT_NODE")
    return Path(name) if name else None
