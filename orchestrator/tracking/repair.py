"""MLflow put right from the store: `pift doctor` looks for zombies and doubles, and has the view rebuilt.

    rebuild(store, uri)              every sweep's runs, points, files and statuses; only what is missing is sent
    zombies(store, uri)              runs that MLflow calls RUNNING or SCHEDULED and nobody works on
    close_zombies(store, uri, found)
    duplicates(store, uri)           {key: run ids} of trials that have more than one run
    reach(uri)                       why no MLflow answers there, None when one does
    places(store)                    where this store's runs are; None is the database in the store

Each may be repeated, and interrupted at any time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient

from orchestrator import ledger, tracking
from orchestrator.compare import frame
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.tracking.client import RECYCLE_SECONDS, connect, experiments, explain, search
from orchestrator.tracking.client import reach as reach
from orchestrator.tracking.database import damage, default_uri, file_of, lock_of, set_aside
from orchestrator.tracking.mlflow_view import STATUS, MlflowView
from workers.store import sound_record

OPEN = ("RUNNING", "SCHEDULED")


@dataclass
class Rebuilt:
    """What a rebuild did."""

    sweeps: int = 0
    trials: int = 0
    points: int = 0
    """Points that MLflow did not have."""
    skipped: list[str] = field(default_factory=list)
    """Sweeps with a damaged plan."""
    moved: str | None = None
    """Where the damaged database is now."""


@dataclass(frozen=True)
class Zombie:
    """A run that MLflow holds to be under way; `key` is None for that of a sweep."""

    run_id: str
    name: str
    status: str
    key: str | None
    should: str
    """The status it is given."""


def rebuild(
    store: Store,
    uri: str | None = None,
    *,
    experiment: str = tracking.EXPERIMENT,
    say: Callable[[str], Any] = print,
) -> Rebuilt:
    """Bring MLflow to what the store says, sweep by sweep; a damaged database in a file is kept beside a new one.
    Raises TrackerError where MLflow does not answer."""
    if uri is None:
        tracking.check_name(store)
    done = Rebuilt(moved=_move_damaged(store, uri or default_uri(store), say))
    for name in store.sweeps():
        try:
            plan = store.plan(name)
        except UserError as error:
            done.skipped.append(name)
            say(f"sweep {name} is left out: {error}")
            continue
        view = rebuild_sweep(store, plan, uri, experiment=experiment)
        done.sweeps, done.trials, done.points = done.sweeps + 1, done.trials + len(view.keys), done.points + view.points
        say(f"sweep {name}: {len(view.keys)} trials, {view.points} points sent")
    return done


def rebuild_sweep(
    store: Store, plan: Mapping[str, Any], uri: str | None = None, *, experiment: str = tracking.EXPERIMENT
) -> MlflowView:
    """The same for one sweep; the view that did it."""
    view = MlflowView(uri, store, plan, experiment=experiment, launching=False, verify=True)
    view.open()
    view.close(ledger.survey(store, view.keys))
    view.log_verdict(frame.load(store, plan["sweep"]))
    return view


def places(store: Store) -> list[str | None]:
    """The trackers that a sweep of the store has a run in, as rebuild and the others take them (without passwords)."""
    names = {name for path in sorted(store.root.glob("sweeps/*/mlflow.json")) for name in sound_record(path)}
    return [None if name == "store" else name for name in sorted(names, key=lambda n: (n != "store", n))]


def _move_damaged(store: Store, uri: str, say: Callable[[str], Any]) -> str | None:
    path = file_of(uri)
    if path is None or (problem := damage(path)) is None:
        return None
    with FileLock(lock_of(uri, store)):
        target = set_aside(path)
        time.sleep(RECYCLE_SECONDS + 0.1)  # MLflow's own connections in this process would go on writing to it
    say(f"{path} is damaged ({problem}); it is now {target.name}")
    return str(target)


def zombies(store: Store, uri: str | None = None) -> list[Zombie]:
    """The runs of this store that are under way by MLflow and not by the store."""
    runs = [run for status in OPEN for run in _runs(store, uri, f" and attributes.status = '{status}'")]
    keys = {run.data.tags["trial.key"] for run in runs if "trial.key" in run.data.tags}
    states = ledger.survey(store, keys)
    at_work = {record.get("sweep") for record in store.launches().values()}
    found = []
    for run in runs:
        tags = run.data.tags
        key = tags.get("trial.key")
        if key is None:
            alive, should = tags.get("sweep") in at_work, _parent_status(store, str(tags.get("sweep")))
        else:
            alive, should = states[key] in ("running", "scheduled"), STATUS.get(states[key], "KILLED")
        if not alive:
            found.append(Zombie(run.info.run_id, run.info.run_name, run.info.status, key, should))
    return found


def close_zombies(store: Store, uri: str | None, found: Iterable[Zombie]) -> int:
    """Give each the status that the store says; how many."""
    client, count = _client(store, uri), 0
    for zombie in found:
        with FileLock(lock_of(uri or default_uri(store), store)):
            client.set_terminated(zombie.run_id, zombie.should)
        count += 1
    return count


def duplicates(store: Store, uri: str | None = None) -> dict[str, list[str]]:
    """{key: run ids, newest first} of the trials that have more than one run."""
    found = defaultdict(list)
    for run in _runs(store, uri):
        if key := run.data.tags.get("trial.key"):
            found[key].append(str(run.info.run_id))
    return {key: ids for key, ids in found.items() if len(ids) > 1}


def _parent_status(store: Store, sweep: str) -> str:
    try:
        keys = [cell["key"] for cell in store.plan(sweep)["cells"]]
    except UserError:
        return "KILLED"
    states = set(ledger.survey(store, keys).values())
    return "FINISHED" if states <= {"done"} else "FAILED" if states & {"failed", "diverged"} else "KILLED"


def _client(store: Store, uri: str | None) -> MlflowClient:
    return connect(uri or default_uri(store))


def _runs(store: Store, uri: str | None, condition: str = "") -> list[Any]:
    """The active runs of this store that a further condition fits. Raises UserError where MLflow cannot be asked."""
    client = _client(store, uri)
    try:
        return list(search(client, experiments(client), f"tags.`store.id` = '{store.id}'{condition}"))
    except Exception as error:
        shown = tracking.without_password(uri or default_uri(store))
        raise UserError(f"MLflow at {shown} cannot be asked ({explain(error)})") from error
