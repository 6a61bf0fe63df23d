"""What a launch shows while it runs: a live table on stderr, or plain lines where stderr is no terminal.

The figures come from the attempts' records and from what was appended to the journals since the last look, so a trial
is watched in the same way wherever it runs. A second thread drives the tracker: a slow or dead MLflow delays nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.executors import Outcome
from orchestrator.tracking import View
from workers.store import TrialFolder
from workers.text import one_line, visible

LOOK_SECONDS = 1.0
FORWARD_SECONDS = 2.0
FORWARD_SECONDS_DOWN = 30.0
LINE_SECONDS = 10.0
SPEED_WINDOW = 20
ROWS = 40
"""Rows shown live; a larger sweep shows the trials at work first."""
STYLE = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "stale": "yellow"}


class Progress:
    """One trial as seen so far: state, step, newest metrics, speed."""

    def __init__(self, folder: TrialFolder, label: str, method: str, steps: int) -> None:
        self.folder, self.label, self.method, self.steps = folder, label, method, steps
        self.tail = ledger.Tail(folder.journal)
        self.newest: dict[str, float] = {}
        self.times: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW)
        self.state, self.step = "new", 0
        self.started: float | None = None

    def look(self, state: str) -> None:
        """Read what is new."""
        self.state = state
        if state in ("new", "scheduled"):
            return
        attempt = ledger.last_attempt(self.folder)
        beat = {} if attempt is None else attempt.content
        while records := self.tail.read():
            for record, _ in records:
                self.newest |= record.get("metrics", {})
                self.times.append((int(record["step"]), float(record["time"])))
        self.step = max(self.times[-1][0] if self.times else 0, int(beat.get("step", 0)))
        if self.state == "running" and beat.get("started") != self.started:
            self.started = beat.get("started")
        if self.state == "done":
            self.step = self.steps

    @property
    def seconds_per_step(self) -> float | None:
        """Over the newest steps of this attempt; None before there are two."""
        times = [point for point in self.times if self.started is None or point[1] >= self.started]
        if len(times) < 2 or times[-1][0] <= times[0][0]:
            return None
        return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])

    @property
    def steps_left(self) -> int:
        return 0 if self.state in ledger.FINAL else max(0, self.steps - self.step)


class Monitor:
    """Watches the trials of a plan and drives its view; use as a context manager around the executor's run."""

    def __init__(
        self,
        plan: Mapping[str, Any],
        store: ledger.Store,
        view: View,
        *,
        slots: Callable[[], int | None] = lambda: 1,
        each: Callable[[], None] = lambda: None,
        stream: TextIO | None = None,
    ) -> None:
        cells = {cell["key"]: cell for cell in plan["cells"]}
        self.rows = {
            key: Progress(store.trial(key), cell["label"], str(cell.get("method", "")), _steps(plan["specs"][key]))
            for key, cell in cells.items()
        }
        self.sweep, self.store, self.view, self.slots = plan["sweep"], store, view, slots
        self._each = each
        self.console = Console(file=stream or sys.stderr)
        self.warning = ""
        self.note = ""
        self.outcomes: dict[str, Outcome] = {}
        self._stop = threading.Event()
        self._shown: dict[str, str] = {}
        self._next_line = 0.0
        self._took = 0.0
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._show, self._forward)]

    def __enter__(self) -> Monitor:
        self._look()
        self._shown = {key: row.state for key, row in self.rows.items()}
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def outcome(self, key: str, outcome: Outcome) -> None:
        """What the executor reports: a trial ended. Its files say how; what only the outcome knows is kept."""
        self.outcomes[key] = outcome

    def say(self, text: str) -> None:
        """One line for the person at the terminal, above the table."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def table(self) -> Table:
        """The trials as a rich table; those at work first when there are more than fit."""
        table = Table(title=Text(f"sweep {self.sweep}: {self.summary()}"), title_justify="left", expand=False)
        for name, justify in (("trial", "left"), ("state", "left"), *((name, "right") for name in COLUMNS)):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self._visible():
            table.add_row(Text(one_line(row.label)), Text(row.state, STYLE.get(row.state, "")), *_figures(row))
        if len(self.rows) > ROWS:
            table.caption = f"{ROWS} of {len(self.rows)} trials; all of them: pift status {self.sweep}"
        return table

    def summary(self) -> str:
        """ "4 of 6 done, 2 running, about 3 min left"."""
        counts: dict[str, int] = {}
        for row in self.rows.values():
            counts[row.state] = counts.get(row.state, 0) + 1
        text = f"{counts.pop('done', 0)} of {len(self.rows)} done"
        text += "".join(f", {counts[state]} {state}" for state in sorted(counts))
        left = self.seconds_left()
        return text + (f", about {duration(left)} left" if left else "")

    def seconds_left(self) -> float | None:
        """Remaining steps at the measured speeds, shared among the slots; None while nothing was measured."""
        rows = list(self.rows.values())
        speeds: dict[str, list[float]] = {}
        for row in rows:
            if row.seconds_per_step is not None:
                speeds.setdefault(row.method, []).append(row.seconds_per_step)
        every = [speed for found in speeds.values() for speed in found]
        if not every:
            return None
        left = []
        for row in rows:
            known = speeds.get(row.method, every)
            left.append(row.steps_left * (row.seconds_per_step or sum(known) / len(known)))
        busy = sum(row.state == "running" for row in rows)
        return max(sum(left) / max(1, self.slots() or busy), max(left, default=0.0))

    def _visible(self) -> Sequence[Progress]:
        rows = list(self.rows.values())
        if len(rows) <= ROWS:
            return rows
        order = {"running": 0, "failed": 1, "diverged": 1, "stale": 2, "resumable": 2, "done": 4}
        return sorted(rows, key=lambda row: order.get(row.state, 3))[:ROWS]

    def _look(self) -> None:
        left = [key for key, row in self.rows.items() if row.state not in ledger.FINAL]
        for key, state in ledger.survey(self.store, left).items():
            self.rows[key].look(state)
        self._each()

    def _pause(self) -> bool:
        """Wait for the next look; True when it is over. Looks at a very large sweep take long, and so do pauses."""
        return self._stop.wait(max(LOOK_SECONDS, 4 * self._took))

    def _timed_look(self) -> None:
        """A store that is away for a moment is looked at again."""
        began = time.monotonic()
        with suppress(OSError, UserError):
            self._look()
        self._took = time.monotonic() - began

    def _show(self) -> None:
        if not self.console.is_terminal:
            while not self._pause():
                self._timed_look()
                self._print_events()
            self._timed_look()
            self._print_events()
            return
        with Live(self._picture(), console=self.console, auto_refresh=False, transient=True) as live:
            while not self._pause():
                self._timed_look()
                live.update(self._picture(), refresh=True)
        self._timed_look()
        self.console.print(self.table())

    def _picture(self) -> Group:
        lines = [Text(visible(line), "yellow") for line in (self.note, self.warning) if line]
        return Group(self.table(), *lines)

    def _print_events(self) -> None:
        """A line where a state changed, and one about the trials at work every LINE_SECONDS."""
        for key, row in self.rows.items():
            if row.state != self._shown.get(key):
                self._shown[key] = row.state
                self.say(f"{row.label}: {row.state}" + (f" ({_said(row)})" if row.times else ""))
        if time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_SECONDS
        for row in self.rows.values():
            if row.state == "running" and row.times:
                self.say(f"{row.label}: {_said(row)}")
        if any(row.state == "running" for row in self.rows.values()):
            self.say(self.summary())

    def _forward(self) -> None:
        pause = FORWARD_SECONDS
        while not self._stop.wait(pause):
            try:
                self.view.forward()
                self.warning, pause = "", FORWARD_SECONDS
            except Exception as error:  # whatever MLflow raises, training goes on
                if not self.warning:
                    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                    self.warning = f"MLflow does not answer ({reason}); training goes on, the journals are sent later"
                    if not self.console.is_terminal:
                        self.say(self.warning)
                pause = min(pause * 2, FORWARD_SECONDS_DOWN)


COLUMNS = ("step", "reward (eval)", "reward (train)", "KL", "s/step", "left")


def _figures(row: Progress) -> list[str]:
    speed = row.seconds_per_step
    kl = row.newest.get("eval/kl_path_nats", row.newest.get("train/kl_path_nats"))
    left = duration(row.steps_left * speed) if speed and row.state == "running" else ""
    return [
        f"{row.step}/{row.steps}",
        _number(row.newest.get("eval/reward_mean"), "+.3f"),
        _number(row.newest.get("train/reward_mean"), "+.3f"),
        _number(kl, ".3g"),
        _number(speed, ".3g"),
        left,
    ]


def _said(row: Progress) -> str:
    """The figures as words, for plain lines."""
    values = dict(zip(COLUMNS, _figures(row), strict=True))
    return ", ".join(f"{name} {value}" for name, value in values.items() if value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _steps(spec: Mapping[str, Any]) -> int:
    return int(spec.get("train", {}).get("gradient_steps", 0))
