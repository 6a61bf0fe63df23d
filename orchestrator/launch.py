"""Launch a plan: check the places to write to, run the cells that are not done, watch, close, compare.

    launch(plan) -> 0 all done | 3 some trials failed, diverged or are not done | 4 budget reached | 130 interrupted
    raises UserError (exit 2) before anything is written: an unwritable store, an MLflow that never answered, weights
    that are not on this machine when it is to run the trials

The store says what is left to do (`reconcile`): done cells are never run again, interrupted ones continue from their
newest sound checkpoint, failed ones are left unless retry_failed=true, diverged ones are a result. A cell that another
launch is working on is waited for, and taken over should that launch die. So any number of launches of one sweep may be
started, at any time and one after another's death, and each ends when the sweep is done.

The first Ctrl-C (or SIGTERM, or SIGHUP) asks the trials to write a checkpoint and stop; the second one leaves at once.
The sweep stops by itself when its budget is reached, when the store cannot be written, and when the first two trials to
end fail at the same place with the same exception: that is a bug, and the others would only repeat it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator import executors, ledger, schedule, tracking, weights
from orchestrator.errors import UserError
from orchestrator.executors import RUN_TRIAL, Job, Outcome
from orchestrator.ledger import Store
from orchestrator.monitor import Monitor
from orchestrator.provenance import provenance
from workers.store import Damaged
from workers.text import typed, visible

if TYPE_CHECKING:
    from orchestrator.grid import Plan

DONE, FAILED, BUDGET, INTERRUPTED = 0, 3, 4, 130
STOPPING = "stopping: the trials write a checkpoint and stop; once more to leave at once"
CLOSE_SECONDS = 20.0
"""How long the end of a launch waits for an MLflow that does not answer."""
WAIT_SECONDS = 1.0
"""Between two looks at trials that another launch works on."""
WATCH_SECONDS = 5.0
"""Between two looks at what the budget has left."""
VERIFY_BYTES = 1 << 30
"""Finished trials are read whole and compared with their checksums up to this many bytes a launch (about three
seconds); beyond it their sizes have to do, and `pift doctor` reads all."""
GIVEN_UP = ("worker_died", "device", "storage")
"""What a trial is not tried again for in the same launch."""
SAME_BUG = 2
SHOWN = 20
"""Failed trials listed at the end of a launch."""


def launch(plan: Plan, *, json_output: bool = False, retry_failed: bool | None = None, target: str = RUN_TRIAL) -> int:
    """Run a `grid.Plan`; the exit code. `target` is the dotted path of the function that runs one trial."""
    return _Session(plan, retry_failed, target).run(json_output)


class _Session:
    """One launch from its checks to its exit code."""

    def __init__(self, plan: Plan, retry_failed: bool | None, target: str) -> None:
        self.config, self.target = plan.config, target
        self.store = Store(plan.config["store"])
        self.retry = bool(plan.config.get("retry_failed", False)) if retry_failed is None else retry_failed
        self.content = {**plan.row(), "created_at": time.time(), "provenance": provenance()}
        cells = {cell["key"]: cell for cell in schedule.order(self.content["cells"])}
        self.keys, self.cells = list(cells), cells
        self.record = ledger.Launch(self.store, plan.sweep)
        self.reason: str | None = None
        """Why it stops before all is done: asked, budget, storage, executor, bug."""
        self.outcomes: dict[str, Outcome] = {}
        self._from: dict[str, int] = {}
        """The step each trial was last begun at."""
        self.monitor: Monitor | None = None
        self._ended: list[str | None] = []
        """Of the first trials to end: where they failed, None for one that did not."""
        self._broken: list[tuple[str, Damaged]] = []
        """(trial, what was found damaged of it)."""
        self._withheld = False
        """Whether the budget kept a trial from being begun."""
        self._watched = 0.0
        self._speeds: schedule.Speeds | None = None

    def run(self, json_output: bool) -> int:
        """See the module."""
        # every check first: from here to _prepare nothing is written
        executors.check(self.config)
        self.store.check_writable()
        tracking.check(self.config, self.store)
        self._mind_the_view()
        self.budget = schedule.Budget.of(self.config.get("budget") or {})
        self.budget.check_deadline(time.time())
        self.store.refresh()
        states, broken = reconcile(self.store, self.keys)
        jobs = self._jobs(states)
        for warning in weights.refuse([job.spec for job in jobs], self.config):
            print(f"pift: {warning}", file=sys.stderr)
        interruption = _Interruption(self)
        with interruption.handlers(), contextlib.ExitStack() as stack:
            executor = self._enter(stack) if jobs else executors.Idle()
            how = "died"
            try:
                self._prepare(states, broken)
                interruption.started = True
                code, report, states = self._work(stack, executor, jobs)
                how = f"exit code {code}"
            finally:
                self.record.end(how)
        _print_result(self.store, self.config, self.content, states, report, code, json_output)
        return code

    # ---- before

    def _mind_the_view(self) -> None:
        """Of a store at a URL: what MLflow is shown has to come here too."""
        found = tracking.settings(self.config)
        if self.store.far is None or found is None:
            return
        self.store.follow(self.keys, "pictures", "adapter")
        if found[0] is None and not (self.store.root / "mlflow.db").exists():
            place = f"lies in {self.store.root}, on this machine only"
            print(f"MLflow's database of {self.store} {place}; pift doctor --fix builds it anywhere", file=sys.stderr)

    def _prepare(self, states: dict[str, str], broken: Mapping[str, Sequence[Damaged]]) -> None:
        """Write the plan, say that this launch is at work, open damaged finished trials again, and failed ones where
        that was asked for. Raises UserError where it cannot be written."""
        try:
            self._write(states, broken)
        except OSError as error:
            raise UserError(
                f"store={self.store} cannot be written: {error}; free some space, or name another: store=results"
            ) from error

    def _write(self, states: Mapping[str, str], broken: Mapping[str, Sequence[Damaged]]) -> None:
        self.content["store_id"] = self.store.id
        self.record.begin()
        with ledger.explained():
            self.store.write(self.store.sweep(self.content["sweep"]).plan, self.content)
        self._broken = [(key, problem) for key, found in broken.items() for problem in found]
        for key, found in broken.items():
            self.store.reopen(key, found)
        for key, state in states.items():
            if self.retry and state == "failed":
                self.store.forgive(key)

    def _jobs(self, states: Mapping[str, str]) -> list[Job]:
        """What to run now, in the order that keeps methods and betas level, as far as the budget goes."""
        keys = [key for key in self.keys if _is_to_run(states[key], self.retry) and not self._given_up(key)]
        admitted = self._admitted(keys)
        self._withheld, keys = len(admitted) < len(keys), admitted
        self._from |= {key: ledger.last_step(self.store.trial(key).journal) or 0 for key in keys}
        return [Job(key, self.content["specs"][key], self.store.trial(key).root) for key in keys]

    def _given_up(self, key: str) -> bool:
        """Whether this launch has run a trial and will not do so again: only one that another launch had, or whose
        process died after it got further than the time before, is begun once more."""
        found = self.outcomes.get(key)
        if found is None or found.state == "elsewhere":
            return False
        return found.kind != "worker_died" or found.step <= self._from.get(key, 0)

    def _enter(self, stack: contextlib.ExitStack) -> executors.Executor:
        facts = {"sweep": self.content["sweep"], "launch": self.record.name}
        made = executors.make(self.config, stop=self.record.stop, target=self.target, facts=facts)
        return stack.enter_context(made)

    # ---- at work

    def _work(
        self, stack: contextlib.ExitStack, executor: executors.Executor, jobs: Sequence[Job]
    ) -> tuple[int, Any, dict[str, str]]:
        """(exit code, report, states at the end)."""
        view = tracking.open_view(self.config, self.store, self.content)
        self.monitor = monitor = Monitor(
            self.content, self.store, view, slots=lambda: executor.slots, each=self._watch
        )
        for key, problem in self._broken:
            monitor.say(f"{problem}; {self.cells[key]['label']} is finished again from its newest sound checkpoint")
        try:
            with monitor, contextlib.suppress(_LeaveNow):
                self._rounds(stack, executor, jobs)
        finally:
            if self.record.stop.exists() and self.reason is None:
                self.reason = "asked"
            self.store.refresh()
            states = ledger.survey(self.store, self.keys)
            interrupted = self.reason == "asked"
            closed = _retry(
                lambda: view.close(states, interrupted=interrupted), monitor, "the runs in MLflow are not closed"
            )
        report = _compare(self.store, self.content["sweep"], view if closed else tracking.NoView(), monitor)
        _retry(self.store.publish, monitor, f"the report is not in {self.store}")
        self._say_what_is_left(states)
        return self._exit_code(states), report, states

    def _rounds(self, stack: contextlib.ExitStack, executor: executors.Executor, jobs: Sequence[Job]) -> None:
        """Run what is to run, wait for what others run, until nothing is left or somebody says stop."""
        while not self.record.stop.exists() and self.reason is None:
            if jobs:
                if isinstance(executor, executors.Idle):
                    executor = self._enter(stack)
                self._run(executor, jobs)
            states = ledger.survey(self.store, self.keys)
            jobs = self._jobs(states)
            if not jobs:
                if not any(state in ("running", "scheduled") for state in states.values()):
                    return
                self._wait()

    def _run(self, executor: executors.Executor, jobs: Sequence[Job]) -> None:
        self.record.queue(job.key for job in jobs)
        for job in jobs:
            self.outcomes.pop(job.key, None)
        try:
            executor.run(jobs, self._outcome)
        except executors.ExecutorLost as lost:
            self.stop("executor", str(lost))
        for job in jobs:
            self.outcomes.setdefault(job.key, Outcome("stopped", 0, "not begun"))
        self.record.queue([])
        self.store.refresh()

    def _wait(self) -> None:
        assert self.monitor is not None
        self.monitor.note = "waiting for trials that another launch works on (Ctrl-C leaves them to it)"
        time.sleep(WAIT_SECONDS)

    def _outcome(self, key: str, outcome: Outcome) -> None:
        """What the executor reports: a trial ended. Its files say how; this decides whether the sweep goes on."""
        self.outcomes[key] = outcome
        if outcome.kind == "storage":
            self.stop("storage", str(outcome.message))
        if outcome.state in ("done", "failed") and len(self._ended) < SAME_BUG:
            self.store.refresh()
            failure = ledger.failure_of(self.store.trial(key)) if outcome.state == "failed" else {}
            self._ended.append(failure.get("signature"))
            if len(self._ended) == SAME_BUG and self._ended[0] is not None and len(set(self._ended)) == 1:
                message = str(outcome.message).splitlines()[0]
                self.stop("bug", f"the first {SAME_BUG} trials failed at the same place ({message})")

    def stop(self, reason: str, text: str = "") -> None:
        """Ask the trials to write a checkpoint and stop."""
        if self.reason is not None:
            return
        self.reason = reason
        with contextlib.suppress(OSError):  # a full disk: what is at work goes on, nothing more is begun
            self.record.ask_to_stop()
        if self.monitor is not None and text:
            self.monitor.say(f"{text}; the sweep stops, every trial is kept as it is")

    # ---- the budget

    def _admitted(self, keys: list[str]) -> list[str]:
        """Those of these that the budget lets begin."""
        if not self.budget or not keys:
            return keys
        seconds, begun = ledger.spent_by(self.store, self.content["sweep"])
        if self._speeds is None:
            self._speeds = schedule.Speeds.measured(self.store, self.content["specs"])
        work = [self._work_left(key, key in begun) for key in keys]
        fitting = self.budget.admits(work, seconds, len(begun), time.time())
        return [key for key in keys if key in fitting]

    def _work_left(self, key: str, begun: bool) -> schedule.Work:
        assert self._speeds is not None
        spec = self.content["specs"][key]
        steps = spec["train"]["gradient_steps"] - max(ledger.last_step(self.store.trial(key).journal) or 0, 0)
        speed = self._speeds.of(spec, schedule.device(self.config))
        return schedule.Work(key, spec["method"]["name"], steps, speed, begun)

    def _watch(self) -> None:
        """Tell the trials' machines which runs they have in MLflow, and stop when the budget is used up."""
        if time.monotonic() - self._watched < WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        if tracking.server_of(self.config) is not None:
            with contextlib.suppress(UserError):
                self.store.publish()
        if not self.budget:
            return
        seconds, _ = ledger.spent_by(self.store, self.content["sweep"])
        if (used := self.budget.reached(seconds, time.time())) is not None:
            self.stop("budget", f"the budget is reached: {used}")

    # ---- after

    def _exit_code(self, states: Mapping[str, str]) -> int:
        if set(states.values()) <= {"done"}:
            return DONE
        if self.reason == "asked":
            return INTERRUPTED
        return BUDGET if self.reason == "budget" or self._withheld else FAILED

    def _say_what_is_left(self, states: Mapping[str, str]) -> None:
        assert self.monitor is not None
        say, sweep = self.monitor.say, self.content["sweep"]
        failed = [key for key, state in states.items() if state in ("failed", "diverged")]
        for key in failed[:SHOWN]:
            found = ledger.detail(self.store.trial(key))
            label = self.cells[key]["label"]
            say(f"{states[key]}: {label} at step {found['step']} ({found['class']}): {found['message']}")
            say(f"  see {self.store.trial(key).failed}")
        if len(failed) > SHOWN:
            say(f"... and {len(failed) - SHOWN} more; pift status {sweep} lists them")
        if any(states[key] == "failed" for key in failed):
            say(f"to run what failed again: pift retry {sweep}, or retry_failed=true with the same command")
        if any(states[key] == "diverged" for key in failed):
            say("what diverged would diverge again: another method.lr or beta is a new trial")
        for key, outcome in self.outcomes.items():
            if states[key] not in ledger.FINAL and outcome.kind in GIVEN_UP:
                say(f"not finished: {self.cells[key]['label']} at step {outcome.step}: {outcome.message}")
        self._say_warnings(states)

    def _say_warnings(self, states: Mapping[str, str]) -> None:
        """What the trials of this launch noticed."""
        assert self.monitor is not None
        for key in self.outcomes:
            attempt = ledger.last_attempt(self.store.trial(key))
            warnings = [] if attempt is None else attempt.content.get("warnings", [])
            if warnings:
                more = f" (and {len(warnings) - 1} more in {self.store.trial(key).attempts})" if warnings[1:] else ""
                self.monitor.say(f"note: {self.cells[key]['label']}, {warnings[0]}{more}")


def reconcile(store: Store, keys: Sequence[str]) -> tuple[dict[str, str], dict[str, list[Damaged]]]:
    """({key: state}, {key: what is damaged}): finished trials whose files are not what was written count as resumable.
    Reads only."""
    states, broken, size = ledger.survey(store, keys), {}, 0
    for key, state in states.items():
        folder = store.trial(key)
        found: list[Damaged] = []
        if state == "done" and size < VERIFY_BYTES and store.far is None:  # at a URL the sizes have to do
            files = ledger.sealed(folder)
            size += sum(entry["bytes"] for entry in files.values())
            found = ledger.altered(folder, files)
        elif state != "done" and folder.done.exists():
            store.fetch(key)
            found = ledger.problems(folder)
        if found:
            broken[key], states[key] = found, "resumable"
    return states, broken


def _is_to_run(state: str, retry: bool) -> bool:
    """New, interrupted and stale cells run; failed ones when asked; done ones and those at work elsewhere never."""
    return state in ("new", "resumable", "stale") or (retry and state == "failed")


class _LeaveNow(KeyboardInterrupt):
    """The second Ctrl-C."""


class _Interruption:
    """Turns SIGINT, SIGTERM and SIGHUP into the launch's stop file once trials run; before that, into
    KeyboardInterrupt."""

    def __init__(self, session: _Session) -> None:
        self.session, self.asked, self.started = session, False, False

    @contextmanager
    def handlers(self) -> Iterator[None]:
        before: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup keeps its meaning
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
        with contextlib.suppress(OSError):
            self.session.stop("asked")
        if self.session.monitor is not None:
            self.session.monitor.note = STOPPING
        with contextlib.suppress(OSError):
            os.write(2, f"\n{STOPPING}\n".encode())


def _retry(act: Callable[[], None], monitor: Monitor, loss: str) -> bool:
    """Ask MLflow for CLOSE_SECONDS; False, and a word about it, when it does not do it."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while True:
        try:
            act()
            return True
        except Exception as error:  # whatever MLflow raises, the launch ends in order
            if time.monotonic() > deadline:
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                monitor.say(f"{loss} ({reason}); the same command, given again, sends the rest")
                return False
            time.sleep(2)


def _compare(store: Store, sweep: str, view: tracking.View, monitor: Monitor) -> Any | None:
    """The report, also attached to the sweep's run; None (and a word about it) when it cannot be made."""
    try:
        from orchestrator.compare import compare

        report = compare(store, sweep)
    except Exception as error:  # the trials are done, whatever is wrong with the report
        monitor.say(f"the comparison could not be made ({type(error).__name__}: {error}); try: pift compare {sweep}")
        return None
    _retry(lambda: view.log_report(report), monitor, "the report is not in MLflow")
    return report


def _print_result(
    store: Store,
    config: Mapping[str, Any],
    content: Mapping[str, Any],
    states: Mapping[str, str],
    report: Any,
    code: int,
    json_output: bool,
) -> None:
    """The end of a launch on stdout: a table and the next commands, or one JSON object."""
    html = str(report.html) if report else None
    if json_output:
        cells = [cell | {"state": states[cell["key"]]} for cell in content["cells"]]
        counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
        result = {"sweep": content["sweep"], "cells": cells, "counts": counts, "report": html, "exit_code": code}
        print(json.dumps(result | {"store": str(store)}, indent=1))
        return
    if report is not None:
        print(report.table)
        print(f"report:  {visible(str(html))}")
    if (server := tracking.server_of(config)) is not None:
        print(f"MLflow:  {tracking.link(store, content['sweep'], tracking.place_of(server))}")
    elif tracking.settings(config) is not None:
        print(f"MLflow:  {typed(['pift', 'ui', content['sweep'], f'--store={store}'])}")
    sys.stdout.flush()
