"""Launch a plan: check the places to write to, run the cells that are not done, watch, close, compare.

    launch(plan) -> 0 all done | 3 some trials failed, diverged or are not done | 130 interrupted
    raises UserError (exit 2) before anything is written: an unwritable store, an MLflow that does not answer

Done cells are never run again; interrupted ones continue from their checkpoint. A failed or diverged cell is left as
it is and reported; `retry_failed=true` runs it again. The first Ctrl-C (or SIGTERM) asks the trials to write a
checkpoint and stop; the second one leaves at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator import executors, ledger, tracking
from orchestrator.executors import RUN_TRIAL, Job
from orchestrator.ledger import Store, SweepFolder
from orchestrator.monitor import Monitor
from orchestrator.provenance import provenance
from workers.store import write_json

if TYPE_CHECKING:
    from orchestrator.grid import Plan

DONE, FAILED, INTERRUPTED = 0, 3, 130
STOPPING = "stopping: the trials write a checkpoint and stop; once more to leave at once"
CLOSE_SECONDS = 20.0
"""How long the end of a launch waits for an MLflow that does not answer."""


def launch(plan: Plan, *, json_output: bool = False, retry_failed: bool | None = None, target: str = RUN_TRIAL) -> int:
    """Run a `grid.Plan`; the exit code. `target` is the dotted path of the function that runs one trial."""
    config = plan.config
    store, content = Store(config["store"]), {**plan.row(), "created_at": time.time(), "provenance": provenance()}
    retry = bool(config.get("retry_failed", False)) if retry_failed is None else retry_failed
    # every check first: from here to _prepare nothing is written
    executors.check(config)
    store.check_writable()
    tracking.check(config)
    sweep = store.sweep(plan.sweep)
    keys = [key for key in content["specs"] if _is_to_run(ledger.state(store.trial(key)), retry)]
    executor = executors.make(config, stop=sweep.stop, target=target) if keys else executors.Idle()
    interruption = _Interruption(sweep)
    with interruption.handlers(), executor:
        jobs = _prepare(store, sweep, content, keys)
        interruption.started = True
        view = tracking.open_view(config, store, content)
        monitor = Monitor(content, store, view, slots=lambda: executor.slots)
        interruption.monitor = monitor
        try:
            with monitor, contextlib.suppress(_LeaveNow):
                executor.run(jobs, monitor.outcome)
        finally:
            stopped = sweep.stop.exists()
            sweep.stop.unlink(missing_ok=True)
            states = {key: ledger.state(store.trial(key)) for key in content["specs"]}
            _close(view, states, stopped, monitor)
    report = _compare(store, plan.sweep, view, monitor)
    _say_what_is_left(store, content, states, monitor)
    code = INTERRUPTED if stopped else DONE if set(states.values()) <= {"done"} else FAILED
    _print_result(store, content, states, report, code, json_output)
    return code


def _is_to_run(state: str, retry: bool) -> bool:
    """New, interrupted and stale cells run; failed ones when asked; done ones and those at work elsewhere never."""
    return state in ("new", "resumable", "stale") or (retry and state in ("failed", "diverged"))


def _prepare(store: Store, sweep: SweepFolder, content: Mapping[str, Any], keys: Sequence[str]) -> list[Job]:
    """Write plan.json and the specs; the jobs for the cells that are to run."""
    sweep.stop.unlink(missing_ok=True)
    for key, spec in content["specs"].items():
        folder = store.trial(key)
        if not folder.spec.exists() or key in keys:
            write_json(folder.spec, spec)
        if key in keys and folder.failed.exists():
            ledger.forgive(folder)
    write_json(sweep.plan, content)
    return [Job(key, content["specs"][key], store.trial(key).root) for key in keys]


class _LeaveNow(KeyboardInterrupt):
    """The second Ctrl-C."""


class _Interruption:
    """Turns SIGINT and SIGTERM into the sweep's stop file once trials run; before that, into KeyboardInterrupt."""

    def __init__(self, sweep: SweepFolder) -> None:
        self.sweep, self.asked, self.started = sweep, False, False
        self.monitor: Monitor | None = None

    @contextmanager
    def handlers(self) -> Iterator[None]:
        before: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._asked)
        except ValueError:  # not the main thread (a test, a notebook): signals are somebody else's
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        if not self.started:
            raise KeyboardInterrupt
        if self.asked:
            raise _LeaveNow
        self.asked = True
        self.sweep.stop.touch()
        if self.monitor is not None:
            self.monitor.note = STOPPING
        with contextlib.suppress(OSError):
            os.write(2, f"\n{STOPPING}\n".encode())


def _close(view: tracking.View, states: Mapping[str, str], stopped: bool, monitor: Monitor) -> None:
    """Send the rest to the tracker; give up after a while, the journals keep everything."""
    _retry(lambda: view.close(states, interrupted=stopped), monitor, "the runs in MLflow are not closed")


def _retry(act: Callable[[], None], monitor: Monitor, loss: str) -> None:
    deadline = time.monotonic() + CLOSE_SECONDS
    while True:
        try:
            return act()
        except Exception as error:  # whatever MLflow raises, the launch ends in order
            if time.monotonic() > deadline:
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                monitor.say(f"{loss} ({reason}); the same command, given again, sends the rest")
                return None
            time.sleep(2)


def _compare(store: Store, sweep: str, view: tracking.View, monitor: Monitor) -> Any | None:
    """The report, also attached to the sweep's run; None (and a word about it) when it cannot be made."""
    try:
        from orchestrator.compare import compare

        report = compare(store, sweep)
    except Exception as error:  # the trials are done, whatever is wrong with the report
        monitor.say(f"the comparison could not be made ({type(error).__name__}: {error}); try: pift compare {sweep}")
        return None
    _retry(lambda: view.log_report(report.html.parent), monitor, "the report is not in MLflow")
    return report


def _say_what_is_left(store: Store, content: Mapping[str, Any], states: Mapping[str, str], monitor: Monitor) -> None:
    for cell in content["cells"]:
        state = states[cell["key"]]
        if state in ("failed", "diverged"):
            found = ledger.detail(store.trial(cell["key"]))
            monitor.say(f"{state}: {cell['label']} at step {found['step']} ({found['class']}): {found['message']}")
            monitor.say(f"  see {store.trial(cell['key']).failed}; to run it again: retry_failed=true")
        elif state == "running":
            monitor.say(f"running elsewhere, left alone: {cell['label']}")


def _print_result(
    store: Store, content: Mapping[str, Any], states: Mapping[str, str], report: Any, code: int, json_output: bool
) -> None:
    """The end of a launch on stdout: a table and the next commands, or one JSON object."""
    html = str(report.html) if report else None
    if json_output:
        cells = [cell | {"state": states[cell["key"]]} for cell in content["cells"]]
        counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
        result = {"sweep": content["sweep"], "cells": cells, "counts": counts, "report": html, "exit_code": code}
        print(json.dumps(result | {"store": str(store.root)}, indent=1))
        return
    if report is not None:
        print(report.table)
        print(f"report:  {html}")
    print(f"MLflow:  pift ui --store {shlex.quote(str(store.root))}")
    sys.stdout.flush()
