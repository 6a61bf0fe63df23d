"""What one does to a sweep from outside: look at it (`pift status`), stop it (`pift stop`), rerun it (`pift retry`).

All of it through the store, so it works from any machine that sees the store, whatever runs the trials.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from workers.text import typed

LOOK_SECONDS = 1.0


def rows(store: Store, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a plan with state, step, steps, class, message and the attempt's warnings."""
    states = ledger.survey(store, [cell["key"] for cell in plan["cells"]])
    return [dict(cell) | {"state": states[cell["key"]]} | _detail(store, cell["key"], states) for cell in plan["cells"]]


def _detail(store: Store, key: str, states: Mapping[str, str]) -> dict[str, Any]:
    if states[key] in ("new", "scheduled") and not store.trial(key).root.exists():
        return {"step": None, "steps": None, "class": None, "message": None, "attempt": None, "warnings": []}
    attempt = ledger.last_attempt(store.trial(key))
    content = {} if attempt is None else attempt.content
    found = {"attempt": content.get("attempt"), "warnings": content.get("warnings", [])}
    return ledger.detail(store.trial(key)) | found


def at_work(store: Store, sweep: str) -> dict[str, dict[str, Any]]:
    """The launches of a sweep that are at work: {id: record}."""
    return {name: record for name, record in store.launches().items() if record.get("sweep") == sweep}


def where(record: Mapping[str, Any]) -> str:
    """ "pid 4711 on host"."""
    return f"pid {record.get('pid')} on {record.get('host')}"


# ---- watching


def watch(store: Store, sweep: str) -> None:
    """The live table of a launch, from anywhere; returns when nobody is at work on the sweep any more."""
    from orchestrator.monitor import Monitor
    from orchestrator.tracking import NoView

    plan = store.plan(sweep)
    with Monitor(plan, store, NoView(), slots=lambda: None, stream=sys.stdout):
        for _ in _while_busy(store, sweep, plan):
            pass


def watch_json(store: Store, sweep: str) -> None:
    """One JSON object a line at every change: {"time", "counts", "cells": [those that changed]}."""
    plan = store.plan(sweep)
    before: dict[str, Any] = {}
    for _ in _while_busy(store, sweep, plan):
        now = {row["key"]: row for row in rows(store, plan)}
        changed = [row for key, row in now.items() if row != before.get(key)]
        if changed:
            print(json.dumps({"time": time.time(), "counts": counts(now.values()), "cells": changed}), flush=True)
        before = now


def _while_busy(store: Store, sweep: str, plan: Mapping[str, Any]) -> Iterator[None]:
    """Once a second while a launch or a trial of the sweep is at work, and once more at the end."""
    keys = [cell["key"] for cell in plan["cells"]]
    while at_work(store, sweep) or "running" in ledger.survey(store, keys).values():
        yield
        time.sleep(LOOK_SECONDS)
    yield


def counts(found: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many cells are in each state."""
    return dict(Counter(row["state"] for row in found))


# ---- stopping


def stop(store: Store, sweep: str, wait: bool = True) -> str:
    """Ask every launch of a sweep to let its trials write a checkpoint and stop; what came of it, in words."""
    found = at_work(store, sweep)
    if not found:
        return f"no launch of {sweep} is at work; nothing to stop"
    for name in found:
        try:
            store.ask_to_stop(name)
        except OSError as error:
            raise UserError(f"{name} cannot be asked to stop: {error}") from error
    names = ", ".join(f"{name} ({where(record)})" for name, record in found.items())
    if not wait:
        return f"asked to stop: {names}"
    print(f"stopping {names}: the trials write a checkpoint; Ctrl-C only ends this waiting", file=sys.stderr)
    while set(found) & set(at_work(store, sweep)):
        time.sleep(LOOK_SECONDS)
    return f"stopped: {names}; the same launch, given again, goes on"


# ---- letting it run again


def retry(store: Store, sweep: str, *, keys: Sequence[str] = (), diverged: bool = False) -> tuple[list[str], str]:
    """Move FAILED.json of failed trials (with `diverged` of diverged ones too) out of the way, so that the next launch
    continues them; (the labels of these trials, the command to give)."""
    plan = store.plan(sweep)
    states = ledger.survey(store, [cell["key"] for cell in plan["cells"]])
    wanted = ("failed", "diverged") if diverged else ("failed",)
    chosen = [
        cell
        for cell in plan["cells"]
        if states[cell["key"]] in wanted and (not keys or any(cell["key"].startswith(key) for key in keys))
    ]
    for cell in chosen:
        store.forgive(cell["key"])
    return [cell["label"] for cell in chosen], typed(["pift", "launch", *plan.get("overrides", [])])
