"""The store as the driver sees it: folders of trials, sweeps and launches, and the state of each trial.

    store/
        id                  a random name of this store (tells two stores apart on one MLflow server)
        trials/<key>/       see workers/store.py; the driver adds mlflow.json
        sweeps/<name>/      plan.json, mlflow.json, report/
        launches/<id>.json  one per launch: who launched what, beating while it works; <id>.queue.json: what it will
                            run; <id>.stop: while it exists, the launch's trials write a checkpoint and stop
        mlflow.db, mlartifacts/   the default MLflow store: a view of the journals, which can be rebuilt

A store at a URL is read from a folder here that shows what is there (far.py): `refresh` it before a look that must be
exact, `fetch` pictures and adapters, `publish` what was written into the folder.

A state is derived from the files and never written down, so it cannot disagree with them:

    done       DONE.json is there and sound
    diverged   FAILED.json of class "diverged"
    failed     FAILED.json of any other class
    running    the newest attempt belongs to a process that lives (workers/lease.py)
    stale      the newest attempt belongs to a process that died without a word; a launch continues the trial
    scheduled  none of these, and in the queue of a launch that is at work
    resumable  stopped in order: a checkpoint or a journal, and nobody at work
    new        none of these
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.far import HEAVY, Far, far_of, sizes
from workers.lease import Attempt, Beating, Folder, clock_skew, lives, newest, process, seconds_at_work
from workers.recorder import lines_of, parse_line, scan
from workers.remote import RemoteError, is_url
from workers.store import (
    Damaged,
    TrialFolder,
    create_whole,
    forgive,
    parse_record,
    read_json,
    read_record,
    record_text,
    sha256,
    sound_record,
    try_to_write,
    write_record,
)

FINAL = ("done", "failed", "diverged")
"""The states that a launch leaves alone."""
LAUNCH_BEAT_SECONDS, FAR_BEAT_SECONDS = 2.0, 15.0
LOOK_SECONDS = 5.0
"""A view of a store at a URL that is younger than this is not brought up to date by a look at the states."""


@dataclass(frozen=True)
class SweepFolder:
    """The paths of one sweep; `root` is store/sweeps/<name>."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow.json"


@dataclass(frozen=True)
class Store:
    """The folder that holds all trials and sweeps; of a store at a URL, the folder here that shows what is there.
    Raises UserError for a URL that can be none."""

    root: Path
    far: Far | None = field(default=None, compare=False, repr=False)

    def __init__(self, root: str | Path) -> None:
        with explained():
            far = far_of(str(root)) if is_url(root) else None
        object.__setattr__(self, "far", far)
        object.__setattr__(self, "root", far.view if far else Path(root).expanduser().absolute())

    def __str__(self) -> str:
        """As a person names it."""
        return self.url or str(self.root)

    @property
    def url(self) -> str | None:
        return self.far.remote.url if self.far else None

    # ---- there and here, where they differ

    def refresh(self, seconds: float = 0.0) -> None:
        """Bring the view up to date, unless it is younger than `seconds`. Raises UserError where it cannot be reached;
        once it has been, a view that cannot be brought up to date stays as it is."""
        if self.far is None or (self.far.looked is not None and time.time() - self.far.looked < seconds):
            return
        with contextlib.suppress(UserError) if self.far.looked is not None else contextlib.nullcontext(), explained():
            self.far.look()

    def follow(self, keys: Iterable[str], *folders: str) -> None:
        """From now on bring these folders of these trials with every refresh."""
        if self.far is not None:
            self.far.follow(keys, folders)

    def fetch(self, key: str, *folders: str) -> None:
        """Bring these folders of a trial, or all there is of it. Raises UserError where it cannot be reached."""
        if self.far is not None:
            with explained():
                self.far.fetch(key, folders or HEAVY)

    def publish(self) -> None:
        """Send what was written into the view: reports, and what MLflow was told. Raises UserError."""
        if self.far is not None:
            with explained():
                self.far.publish()

    def write(self, path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
        """Write a record, there and here. Raises OSError."""
        if self.far is None:
            write_record(path, content, durable=durable)
        else:
            self.far.write(self._name(path), record_text(content).encode())

    def remove(self, path: Path) -> None:
        """Remove a file that may be there. Raises OSError."""
        if self.far is None:
            path.unlink(missing_ok=True)
        else:
            self.far.remove(self._name(path))

    def ask_to_stop(self, launch: str) -> None:
        """Make the stop file of a launch. Raises OSError."""
        path = self.stop(launch)
        if self.far is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            self.far.write(self._name(path), b"")

    def forgive(self, key: str) -> None:
        """Let a failed trial run again. Raises UserError where that cannot be said there."""
        with self._moving(key):
            forgive(self.trial(key))

    def reopen(self, key: str, found: Iterable[Damaged]) -> None:
        """Let a finished trial with damaged files be finished again, see `reopen` below."""
        with self._moving(key):
            reopen(self.trial(key), found)

    @contextlib.contextmanager
    def _moving(self, key: str) -> Iterator[None]:
        if self.far is None:
            yield
            return
        with explained(), self.far.moving(key):
            yield

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # ---- what is where

    def trial(self, key: str) -> TrialFolder:
        return TrialFolder(self.root / "trials" / key)

    def trial_keys(self) -> list[str]:
        """The keys of all trials that have a folder, whichever sweep they belong to."""
        try:
            return sorted(entry.name for entry in os.scandir(self.root / "trials") if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.root / "sweeps" / name)

    def sweeps(self) -> list[str]:
        """The names of the planned sweeps, newest plan last."""
        plans = sorted(self.root.glob("sweeps/*/plan.json"), key=lambda path: path.stat().st_mtime)
        return [plan.parent.name for plan in plans]

    def plan(self, sweep: str) -> dict[str, Any]:
        """The content of a sweep's plan.json. Raises UserError where it is damaged or absent."""
        path = self.sweep(sweep).plan
        try:
            found = read_record(path)
        except Damaged as error:
            raise UserError(f"{error}; the launch that made it, given again, writes it anew") from None
        if found is None:
            raise UserError(f"sweep {sweep} has no plan in {self}; launch it first")
        return found

    def now(self) -> float:
        """The time by the clock of the store's file system; for a view, when it was like what is there."""
        return time.time() + self.skew() if self.far is None else self.far.looked or time.time()

    def skew(self) -> float:
        """Seconds that the store's clock is ahead of this machine's."""
        return clock_skew(self.root) if self.far is None else self.far.skew()

    def check_writable(self) -> None:
        """Raises UserError when a file cannot be written here. Leaves nothing behind, not even the folder."""
        if self.far is not None:
            self._check_far()
            return
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            try_to_write(self.root)
        except OSError as error:
            raise UserError(
                f"store={self.root} cannot be written: {error.strerror or error}; "
                "name a folder you may write to, as in store=results, or free some space"
            ) from error
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _check_far(self) -> None:
        assert self.far is not None
        with explained():
            self.far.remote.check()
        try:
            try_to_write(self.root)
        except OSError as error:
            raise UserError(
                f"store={self} needs a folder on this machine, and {self.root} cannot be written: "
                f"{error.strerror or error}; set PIFT_CACHE to a folder you may write to"
            ) from error

    @property
    def id(self) -> str:
        """This store's name, drawn on first use; a lost or damaged one is read from a sweep's plan."""
        path = self.root / "id"
        found = sound_record(path).get("id") or self._old_id(path)
        if found is None:
            plans = (sound_record(plan).get("store_id") for plan in self.root.glob("sweeps/*/plan.json"))
            found = next((name for name in plans if name), None) or secrets.token_hex(8)
            found = self._first(path, {"id": found})["id"]
        return str(found)

    def _first(self, path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write a record; of several processes that write it, the first one's is it. What lies there damaged gives
        way."""
        if self.far is None:
            create_whole(path, record_text(content).encode())
            if not (found := sound_record(path)):
                write_record(path, found := dict(content))
            return found
        with explained():
            return parse_record(self.far.create(self._name(path), record_text(content).encode()), path)

    def _old_id(self, path: Path) -> str | None:
        """As it was written before it had a checksum: 16 hex digits and nothing else."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{16}\n", text := path.read_text(encoding="utf-8")):
                return text.strip()
        return None

    # ---- launches

    def launch_record(self, name: str) -> Path:
        return self.root / "launches" / f"{name}.json"

    def queue(self, name: str) -> Path:
        return self.root / "launches" / f"{name}.queue.json"

    def stop(self, name: str) -> Path:
        """While this file exists, the trials of a launch write a checkpoint and stop, on whichever machine."""
        return self.root / "launches" / f"{name}.stop"

    def launches(self, *, queued: bool = False) -> dict[str, dict[str, Any]]:
        """The launches that are at work: {id: record}; with `queued` those of them that have a queue. (The records of
        those that ended stay: what is asked every second does not read them.)"""
        self.refresh(LOOK_SECONDS)
        now, found = self.now(), {}
        for name in self.launch_names(queued):
            path = self.launch_record(name)
            content = sound_record(path)
            with contextlib.suppress(OSError):
                if content and lives(content, now - path.stat().st_mtime):
                    found[name] = content
        return found

    def launch_names(self, queued: bool = False) -> list[str]:
        """All launches that left a record (with `queued`: a queue), oldest first."""
        names = {path.name.removesuffix(".json") for path in self.root.glob("launches/*.json")}
        queues = {name.removesuffix(".queue") for name in names if name.endswith(".queue")}
        return sorted(queues if queued else (name for name in names if not name.endswith(".queue")))

    def queued(self) -> set[str]:
        """The keys that a launch at work is going to run."""
        return {key for name in self.launches(queued=True) for key in sound_record(self.queue(name)).get("keys", [])}


class Launch:
    """This launch's own record: begun, beating, ended."""

    def __init__(self, store: Store, sweep: str) -> None:
        self.store = store
        self.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.stop = store.stop(self.name)
        content = {"launch": self.name, "sweep": sweep, **process(), "started": time.time(), "beat": time.time()}
        path, seconds = store.launch_record(self.name), FAR_BEAT_SECONDS if store.far else LAUNCH_BEAT_SECONDS
        self._beating = Beating(lambda record: store.write(path, record, durable=False), content, seconds)

    def begin(self) -> None:
        """Raises OSError; UserError where a store at a URL cannot be written."""
        with explained():
            self.store.write(self.store.launch_record(self.name), self._beating.content)
        self._beating.start()

    def queue(self, keys: Iterable[str]) -> None:
        """Say what is going to run, as far as it can be written: others only show it."""
        path, names = self.store.queue(self.name), list(keys)
        with contextlib.suppress(OSError):
            self.store.remove(path)
            if names:
                self.store.write(path, {"keys": names})

    def ask_to_stop(self) -> None:
        """Make the stop file; a URL has it a moment later, since signals call this and must not wait for anybody."""
        if self.store.far is None:
            self.store.ask_to_stop(self.name)
            return
        self.store.far.copy(f"launches/{self.stop.name}", b"")
        threading.Thread(target=self._tell_to_stop, name="stop", daemon=True).start()

    def _tell_to_stop(self) -> None:
        while self.stop.exists():
            with contextlib.suppress(OSError):
                return self.store.ask_to_stop(self.name)
            time.sleep(LOOK_SECONDS)

    def end(self, how: str) -> None:
        """Say how it ended; where that cannot be written any more (a full disk) its record goes, so that nobody takes
        it to be at work."""
        over = [self.stop, self.store.queue(self.name)]
        try:
            self._beating.stop(ended=time.time(), how=how)
        except OSError:
            over.append(self.store.launch_record(self.name))
        for path in over:
            with contextlib.suppress(OSError):
                self.store.remove(path)


def mlflow_file(folder: TrialFolder) -> Path:
    """{tracking: {"experiment_id", "run_id", "offset", ...}}: the trial's run and how much of the journal it has."""
    return folder.root / "mlflow.json"


# ---- states


def state(folder: TrialFolder, now: float | None = None, queued: frozenset[str] | set[str] = frozenset()) -> str:
    """The state of a trial, from its files (see the top of this file); `now` by the store's clock."""
    if is_done(folder):
        return "done"
    if folder.failed.exists():
        return "diverged" if sound_record(folder.failed).get("class") == "diverged" else "failed"
    attempt = last_attempt(folder)
    if attempt is not None and not attempt.content.get("ended"):
        return "running" if attempt.alive(Folder(folder.attempts).now() if now is None else now) else "stale"
    if folder.root.name in queued:
        return "scheduled"
    if any(folder.checkpoints.glob("step_*.json")) or _size(folder.journal) > 0:
        return "resumable"
    return "new"


def survey(store: Store, keys: Iterable[str]) -> dict[str, str]:
    """The state of each trial; what has no folder is not looked at any closer."""
    store.refresh(LOOK_SECONDS)
    there = set(store.trial_keys())
    now, queued = store.now(), store.queued()
    absent = {key: "scheduled" if key in queued else "new" for key in keys if key not in there}
    return {key: absent.get(key) or state(store.trial(key), now, queued) for key in keys}


def is_done(folder: TrialFolder) -> bool:
    """Whether DONE.json is sound and what it names is there, at the size it had."""
    done = sound_record(folder.done)
    return bool(done) and all(_size_of(folder, name) == entry["bytes"] for name, entry in _files(done).items())


def last_attempt(folder: TrialFolder) -> Attempt | None:
    """The newest attempt at a trial."""
    return newest(Folder(folder.attempts))


def detail(folder: TrialFolder) -> dict[str, Any]:
    """{"step", "steps", "class", "message"} of a trial; step is None where nothing was measured."""
    if is_done(folder):
        steps = sound_record(folder.done).get("steps")
        return {"step": steps, "steps": steps, "class": None, "message": None}
    attempt = last_attempt(folder)
    last = {} if attempt is None else attempt.content
    steps = last.get("steps") or _quietly(folder.spec).get("train", {}).get("gradient_steps")
    if folder.failed.exists():
        failure = failure_of(folder)
        return {"step": failure.get("step"), "steps": steps} | {n: failure[n] for n in ("class", "message")}
    step = last.get("step") if last and not last.get("ended") else last_step(folder.journal)
    stopped = {"class": last.get("how"), "message": last["message"]} if last.get("message") else {}
    return {"step": last_step(folder.journal) if step is None else step, "steps": steps} | {
        "class": stopped.get("class"),
        "message": stopped.get("message"),
    }


def failure_of(folder: TrialFolder) -> dict[str, Any]:
    """FAILED.json; where it is damaged, a failure of a class unknown that says so."""
    try:
        found = read_record(folder.failed) or {}
    except Damaged as error:
        found = {"message": f"{error}; to run the trial again: pift retry"}
    return {"class": "unknown", "message": ""} | found


def last_step(journal: Path) -> int | None:
    """The step of a journal's last sound record, read from the file's end."""
    try:
        with journal.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - (1 << 16)))
            lines = stream.read().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError):
            return int(parse_line(line)["step"])
    return None


def spent(folder: TrialFolder, sweep: str) -> tuple[float, bool]:
    """(seconds at work, whether it was begun) of a trial, for one sweep: another sweep's attempts are not counted."""
    attempts = Folder(folder.attempts)
    found = (attempts.read(number) for number in attempts.numbers())
    ours = [attempt.content for attempt in found if attempt is not None and attempt.content.get("sweep") == sweep]
    return sum(seconds_at_work(content) for content in ours), bool(ours)


def spent_by(store: Store, sweep: str) -> tuple[float, set[str]]:
    """(seconds at work, the trials begun) of a sweep in all its launches, trials that left its plan included."""
    found = {key: spent(store.trial(key), sweep) for key in store.trial_keys()}
    return sum(seconds for seconds, _ in found.values()), {key for key, (_, begun) in found.items() if begun}


def fail(folder: TrialFolder, key: str, kind: str, message: str, traceback: str = "") -> None:
    """Write FAILED.json for a trial that could not do so itself, unless it has a result already."""
    if folder.done.exists() or folder.failed.exists():
        return
    step = max(last_step(folder.journal) or 0, 0)
    failure = {"key": key, "class": kind, "message": message, "traceback": traceback, "step": step}
    write_record(folder.failed, failure | {"signature": message, "failed_at": time.time()})


# ---- what is damaged


def problems(folder: TrialFolder) -> list[Damaged]:
    """What is wrong with a finished trial's files, each read whole; empty for one that is sound or not finished."""
    if not folder.done.exists():
        return []
    try:
        return altered(folder, _files(read_record(folder.done) or {}))
    except Damaged as error:
        return [error]


def altered(folder: TrialFolder, files: Mapping[str, Any]) -> list[Damaged]:
    """What of `sealed` files is not what was written, each read whole."""
    found = []
    for name, entry in files.items():
        path = folder.root / name
        if (size := _size(path)) != entry["bytes"]:
            found.append(Damaged(path, "it is gone" if size < 0 else f"{size} of {entry['bytes']} bytes"))
        elif sha256(path) != entry["sha256"]:
            found.append(Damaged(path, "its checksum is not the one in DONE.json"))
    return found


def reopen(folder: TrialFolder, found: Iterable[Damaged]) -> None:
    """Let a finished trial with damaged files be finished again, from its newest sound checkpoint: DONE.json and what
    is damaged move to damaged/, but for the journal, whose sound part its next attempt keeps."""
    for problem in found:
        if problem.path not in (folder.journal, folder.done):
            folder.set_aside(problem.path)
    folder.set_aside(folder.done)


def sealed(folder: TrialFolder) -> dict[str, Any]:
    """{name: {"sha256", "bytes"}} of what DONE.json names."""
    return _files(sound_record(folder.done))


def _files(done: Mapping[str, Any]) -> dict[str, Any]:
    return dict(done.get("files", {}))


def _size(path: Path) -> int:
    """A file's size, -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _size_of(folder: TrialFolder, name: str) -> int:
    """The size of a trial's file, here or at the URL that the folder is a view of; -1 where there is none."""
    size = _size(folder.root / name)
    return size if size >= 0 else sizes(folder.root).get(name, -1)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What a store at a URL says is for the user."""
    try:
        yield
    except RemoteError as error:
        raise UserError(str(error)) from error


class Tail:
    """Reads what was appended to a journal since the last call; whole lines only, each step once."""

    def __init__(self, path: Path, offset: int = 0, step: int = -1) -> None:
        self.path, self.offset, self.step = path, offset, step

    def read(self, limit: int = 1 << 20) -> list[tuple[dict[str, Any], int]]:
        """New records, each with the offset just behind it; at most about `limit` bytes, so call until empty.

        A journal that was cut back (to what is sound of it) or begun anew is read from its start; steps that were read
        before are left out.
        """
        while True:
            start, records = self.offset, self._read(limit)
            if records or self.offset == start:
                return records

    def _read(self, limit: int) -> list[tuple[dict[str, Any], int]]:
        records: list[tuple[dict[str, Any], int]] = []
        for line in lines_of(self._block(limit)):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse_line(line)
            except ValueError:
                if self.offset and not records and self.offset not in _ends(self.path):
                    self.offset = 0
                break
            self.offset += len(line)
            if record["step"] > self.step:
                self.step = int(record["step"])
                records.append((record, self.offset))
        return records

    def _block(self, limit: int) -> bytes:
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self.offset:
                    self.offset = 0
                stream.seek(self.offset)
                block = stream.read(limit)
                return block + stream.readline() if len(block) == limit and b"\n" not in block else block
        except (FileNotFoundError, NotADirectoryError):
            return b""


def _ends(path: Path) -> set[int]:
    """Where the lines of a journal's sound part end."""
    content, found, end = path.read_bytes()[: scan(path).sound], {0}, 0
    for line in lines_of(content):
        end += len(line)
        found.add(end)
    return found


def _quietly(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty when the file is absent or no such thing."""
    try:
        value = read_json(path)
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}
