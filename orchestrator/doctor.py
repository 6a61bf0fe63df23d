"""`pift doctor`: is everything there that a sweep needs, and is everything in the store what was written?

    examine(store, ...) -> findings, each with what to do about it; with fix=True what can be set right is set right:
        a finished trial with a damaged file    is opened again: the next launch finishes it from its newest checkpoint
        a lost or damaged MLflow database       is made anew from the store
        runs that say RUNNING and are not       get the status of their trial
        leftovers of killed processes           are removed once they are an hour old
Nothing that is sound is removed, and what is damaged is kept in damaged/.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import ledger
from orchestrator.control import where
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.provenance import lock_file
from workers.recorder import scan
from workers.store import Damaged, TrialFolder, read_record

OK, NOTE, PROBLEM, FIXED = "ok", "note", "problem", "fixed"
PACKAGES = ("torch", "diffusers", "peft", "transformers", "ray", "mlflow", "hydra-core", "image-reward")
SKEW_SECONDS = 5.0
LEFTOVER_SECONDS = 3600.0
SPARE_BYTES = 1 << 30
"""Less free space than this is worth a word."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    level: str
    """ok, note (good to know), problem, or fixed."""
    topic: str
    text: str
    fix: str = ""
    """What to do about it."""


def examine(
    store: str | Path,
    *,
    uri: str | None = None,
    address: str | None = None,
    conf: Sequence[Path] = (),
    fix: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Finding]:
    """Everything, in the order in which a launch would stumble over it. `uri`: an MLflow server to be looked at besides
    those the store knows; `address`: a Ray cluster; `say` is told what takes long."""
    yield from versions()
    yield from gpus()
    yield from weights(conf)
    yield from ray_cluster(address)
    if isinstance(store, Path) and not store.is_dir():
        yield Finding(NOTE, "store", f"there is no store in {store} yet", "pift launch makes one; another: --store DIR")
        return
    try:
        place = Store(store)
        place.refresh()
    except UserError as error:  # a URL that does not answer
        yield Finding(PROBLEM, "store", str(error))
        return
    yield from writable(place)
    yield from launches(place)
    yield from trials(place, fix, say)
    yield from plans(place)
    yield from leftovers(place, fix)
    yield from tracker(place, uri, fix, say)


# ---- the machine


def versions() -> Iterator[Finding]:
    """The installed packages against the tested set."""
    tested = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", _lock_text(), re.MULTILINE))
    yield Finding(OK, "versions", f"Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(PROBLEM, "versions", f"{name} is not installed", f"pip install {name}=={tested.get(name)}")
            continue
        if name in tested and version.partition("+")[0] != tested[name]:
            yield Finding(NOTE, "versions", f"{name} {version}; tested with {tested[name]}", "see requirements.lock")
        else:
            yield Finding(OK, "versions", f"{name} {version}")


def _lock_text() -> str:
    path = lock_file()
    return "" if path is None else path.read_text(encoding="utf-8")


def gpus() -> Iterator[Finding]:
    """The GPUs that torch sees."""
    from workers.devices import gpus as seen

    found = seen()
    for name, size in found:
        yield Finding(OK, "gpu", f"{name}, {size / 2**30:.0f} GiB")
    if not found:
        yield Finding(NOTE, "gpu", "torch sees no GPU", "resources=cpu is what fits; Stable Diffusion needs one")


def weights(conf: Sequence[Path]) -> Iterator[Finding]:
    """The weights of every model, reward and judge of conf/, without loading them. Absent ones are a problem of the
    defaults and of a conf folder of one's own; what else is shipped is needed by whoever chooses it."""
    from orchestrator.conf_tree import ConfTree

    tree, seen = ConfTree(list(conf)), set()
    for group in ("model", "reward"):
        for choice in tree.choices(group):
            path = tree.find(f"{group}/{choice}")
            content, own = tree.read(path), any(path.is_relative_to(folder) for folder in conf)
            for name in ("model", "reward", "judge"):
                component = content.get(name)
                level = PROBLEM if own or choice == tree.defaults[group] else NOTE
                values = component if isinstance(component, Mapping) else {}
                for finding in _weights_of(f"{group}={choice}", values, level):
                    if finding.text not in seen:
                        seen.add(finding.text)
                        yield finding


def _weights_of(who: str, component: Mapping[str, Any], level: str) -> Iterator[Finding]:
    from orchestrator.weights import needed

    if "_target_" not in component:
        return
    try:
        found = needed(component)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        text = f"{who}: {component['_target_']} cannot be looked at: {error}"
        yield Finding(PROBLEM, "weights", text, "see its file in conf/")
        return
    for entry in found:
        if entry.present:
            yield Finding(OK, "weights", f"{who}: {entry.what}")
        else:
            yield Finding(level, "weights", f"{who}: {entry.what} is not there", entry.fetch)


def ray_cluster(address: str | None) -> Iterator[Finding]:
    """A cluster that was named, by --address or RAY_ADDRESS; without one a launch starts Ray on this machine."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        text = "executor=ray starts Ray on this machine; to look at a cluster: pift doctor --address HOST:6379"
        yield Finding(OK, "ray", text)
        return
    from orchestrator.executors.ray_tune import reach

    try:
        yield Finding(OK, "ray", f"{address}: {reach(address)}")
    except UserError as error:
        yield Finding(PROBLEM, "ray", str(error), "ray start --head on the head node")


# ---- the store


def writable(store: Store) -> Iterator[Finding]:
    """Can it be written, is there room, do its clock and ours agree?"""
    try:
        store.check_writable()
        free = shutil.disk_usage(store.root).free
        here = "" if store.far is None else f", shown in {store.root}"
        room = f"{store}{here}, {free / 2**30:.1f} GiB free"
        level = OK if free > SPARE_BYTES else NOTE
        yield Finding(level, "store", room, "" if level == OK else "free some: trials write checkpoints and pictures")
    except UserError as error:
        yield Finding(PROBLEM, "store", str(error))
    skew = store.skew()
    if abs(skew) > SKEW_SECONDS:
        text = f"the store's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        yield Finding(NOTE, "clock", text, "leases go by the store's clock; set this machine's (NTP) for the curves")
    else:
        yield Finding(OK, "clock", "the store's clock is this machine's")


def launches(store: Store) -> Iterator[Finding]:
    """Who is at work, and who died."""
    alive = store.launches()
    for name, record in alive.items():
        yield Finding(OK, "launches", f"at work: {name}, sweep {record.get('sweep')} ({where(record)})")
    for name in store.launch_names():
        if name in alive:
            continue
        try:
            record = read_record(store.launch_record(name)) or {}
        except Damaged as error:
            yield Finding(NOTE, "launches", str(error), "it only says who launched what; nothing hangs on it")
            continue
        if not record.get("ended"):
            text = f"{name} of sweep {record.get('sweep')} died without a word"
            yield Finding(NOTE, "launches", text, "the same launch, given again, goes on where it was")


def trials(store: Store, fix: bool, say: Callable[[str], None]) -> Iterator[Finding]:
    """Every file of every trial against its checksum."""
    names, sound, told = store.trial_keys(), 0, time.monotonic()
    for number, name in enumerate(names):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"{number} of {len(names)} trials read")
        store.fetch(name)
        found = list(_trial(store, store.trial(name), fix))
        sound += not found
        yield from found
    yield Finding(OK, "trials", f"{sound} of {len(names)} trials are sound")


def _trial(store: Store, folder: TrialFolder, fix: bool) -> Iterator[Finding]:
    from workers import checkpoint

    again = "the next launch goes on from the newest sound checkpoint"
    if folder.done.exists():
        found = ledger.problems(folder)
        if found and fix:
            store.reopen(folder.root.name, found)
        for problem in found:
            yield Finding(FIXED if fix else PROBLEM, "trials", str(problem), again)
        return
    journal = scan(folder.journal)
    if journal.problem:
        text = f"{folder.journal} is damaged: {journal.problem}"
        yield Finding(NOTE, "trials", text, f"its sound part reaches step {journal.last_step}; {again}")
    for error in checkpoint.damaged(folder):
        yield Finding(NOTE, "trials", str(error), again)
    for path in [folder.failed, *sorted(folder.attempts.glob("*.json"))]:
        try:
            read_record(path)
        except Damaged as error:
            fixes = "pift retry runs the trial again" if path == folder.failed else again
            yield Finding(NOTE, "trials", str(error), fixes)
    if ledger.state(folder) == "stale":
        text = f"{folder.root.name} died without a word at step {ledger.detail(folder)['step']}"
        yield Finding(NOTE, "trials", text, again)


def plans(store: Store) -> Iterator[Finding]:
    """Plans that cannot be read, and trials that no plan has."""
    planned: set[str] = set()
    for name in store.sweeps():
        try:
            planned |= {cell["key"] for cell in store.plan(name)["cells"]}
        except (UserError, KeyError) as error:
            yield Finding(PROBLEM, "plans", str(error), "launch the sweep again: the plan is written anew")
    orphans = [name for name in store.trial_keys() if name not in planned]
    if orphans:
        text = f"{len(orphans)} trials belong to no sweep's last plan ({_some(orphans)})"
        yield Finding(NOTE, "plans", text, "they are kept: a sweep that asks for them finds them done")


def leftovers(store: Store, fix: bool) -> Iterator[Finding]:
    """Temporary files of processes that were killed while they wrote."""
    old = time.time() - LEFTOVER_SECONDS
    found = [path for path in store.root.rglob(".*.????????") if path.is_file() and path.stat().st_mtime < old]
    if not found:
        return
    size = sum(path.stat().st_size for path in found)
    for path in found if fix else ():
        path.unlink(missing_ok=True)
    text = f"{len(found)} leftovers of killed processes, {size / 2**20:.1f} MiB, as {found[0].relative_to(store.root)}"
    yield Finding(FIXED if fix else NOTE, "leftovers", text, "" if fix else "pift doctor --fix removes them")


def _some(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")


# ---- MLflow


def tracker(store: Store, uri: str | None, fix: bool, say: Callable[[str], None]) -> Iterator[Finding]:
    """The database in the store, and every server that the store's runs were sent to."""
    from orchestrator import tracking
    from orchestrator.tracking import repair

    places = {tracking.place_of(place): place for place in repair.places(store)}
    if uri is not None:
        tracking.check_uri(uri)
        places[tracking.place_of(uri)] = uri  # with its password, if it has one
    if not places and fix and store.far is not None and store.sweeps():
        places["store"] = None  # the database of this machine, which another one's launches know nothing of
    if not places:
        yield Finding(OK, "mlflow", "no sweep of this store was shown in MLflow")
    for name, place in places.items():
        yield from _tracker(store, name, place, fix, say)


def _tracker(store: Store, name: str, uri: str | None, fix: bool, say: Callable[[str], None]) -> Iterator[Finding]:
    from orchestrator.tracking import repair

    shown = f"the database in {store.root}" if uri is None else name
    problem = _no_answer(store, uri)
    behind = _behind(store, name)
    if problem is None and not (fix and behind):
        yield Finding(OK, "mlflow", f"{shown} answers")
    elif not fix or (problem is not None and uri is not None):
        advice = "pift doctor --fix makes it anew" if uri is None else UP
        yield Finding(PROBLEM, "mlflow", f"{shown}: {problem}", advice)
        return
    else:
        done = repair.rebuild(store, uri, say=say)
        text = f"{shown}: {done.sweeps} sweeps, {done.trials} trials, {done.points} points sent"
        yield Finding(FIXED, "mlflow", text)
        behind = []
    if behind:
        text = f"{shown}: {len(behind)} trials have points that were not sent ({_some(behind)})"
        yield Finding(PROBLEM, "mlflow", text, "the next launch sends them, or pift doctor --fix")
    found = repair.zombies(store, uri)
    if fix:
        repair.close_zombies(store, uri, found)
    for zombie in found:
        text = f"{shown}: run {zombie.name} says {zombie.status} and nobody works on it"
        yield Finding(FIXED if fix else PROBLEM, "mlflow", text, f"pift doctor --fix sets {zombie.should}")
    for key, runs in repair.duplicates(store, uri).items():
        text = f"{shown}: trial {key} has {len(runs)} runs, newest first: {', '.join(runs)}"
        yield Finding(PROBLEM, "mlflow", text, "delete the one without the points in MLflow's page")


UP = "start it (pift ui, or mlflow server); for a 403 name its host: mlflow server --allowed-hosts HOST:*"


def _no_answer(store: Store, uri: str | None) -> str | None:
    """Why runs cannot be written there, None where they can."""
    from orchestrator.tracking.database import default_uri, file_of
    from orchestrator.tracking.repair import reach

    path = file_of(address := uri or default_uri(store))
    return reach(address) if path is None or path.exists() else f"{path.name} is gone"


def _behind(store: Store, place: str) -> list[str]:
    """The trials with a run there whose journal goes on beyond what was sent, and that nobody works on."""
    from orchestrator.tracking import entry

    found = []
    for key in store.trial_keys():
        folder = store.trial(key)
        known = entry.read(ledger.mlflow_file(folder), place)
        if known.get("run_id") and entry.cursor(known)[0] < entry.size(folder.journal):
            found.append(key)
    at_work = ("running", "scheduled")
    return [key for key, state in ledger.survey(store, found).items() if state not in at_work]
