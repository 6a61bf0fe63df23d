"""A trial's own way to an MLflow server: a thread of its process that sends its journal while it trains.

    with forwarding(uri, folder):        uri None: nobody to send to
        run_trial(...)

It loads MLflow only once there is something to send, comes again after 2 s, and after up to a minute while the server
does not answer. Nothing waits for it but the trial's end, LAST_SECONDS at most; what is left is sent by the launch.
The run itself, its status, its pictures and files are the launch's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from orchestrator.ledger import mlflow_file
from orchestrator.tracking import entry, place_of
from workers.store import TrialFolder

FORWARD_SECONDS, DOWN_SECONDS = 2.0, 60.0
PASS_SECONDS = 10.0
LAST_SECONDS = 5.0


@contextlib.contextmanager
def forwarding(uri: str | None, folder: TrialFolder) -> Iterator[None]:
    """Send the trial's journal to the server at `uri` while the block runs."""
    if uri is None:
        yield
        return
    forwarder = Forwarder(uri, folder)
    forwarder.start()
    try:
        yield
    except Exception:
        forwarder.stop(LAST_SECONDS)
        raise
    except BaseException:  # an interrupt leaves at once
        forwarder.stop(0.0)
        raise
    forwarder.stop(LAST_SECONDS)


class Forwarder:
    """The thread. A failure is nobody's business here: the launch says what MLflow does not have."""

    def __init__(self, uri: str, folder: TrialFolder) -> None:
        self.uri, self.folder, self.place = uri, folder, place_of(uri)
        self._over = threading.Event()
        self._until = entry.FOREVER
        self._client: Any = None
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """One last try, for as long as that."""
        self._until = time.monotonic() + seconds
        self._over.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        pause = FORWARD_SECONDS
        while not self._over.wait(pause):
            pause = FORWARD_SECONDS if self._sent() else min(2 * pause, DOWN_SECONDS)
        if self._client is not None:  # loading it now would take longer than there is time
            self._sent()

    def _sent(self) -> bool:
        """Send what is new; False when the server does not take it."""
        known = entry.read(mlflow_file(self.folder), self.place)
        if "run_id" not in known or entry.size(self.folder.journal) == entry.cursor(known)[0]:
            return True
        try:
            from orchestrator.tracking.client import connect
            from orchestrator.tracking.points import send_points

            self._client = self._client or connect(self.uri)
            send_points(self._client, self.folder, self.place, min(self._until, time.monotonic() + PASS_SECONDS))
        except Exception:
            return False
        return True
