"""A store at a URL as the driver sees it: a folder of this machine, the view, that shows what is there.

    $PIFT_CACHE/stores/<hash of the URL>/view/       (PIFT_CACHE: ~/.cache/pift)
        id, sweeps/, launches/, trials/<key>/        as in a store that is a folder, but for pictures, adapters and
                                                     checkpoints, which come when they are asked for
        trials/<key>/.far.json                       the sizes of the pictures and adapters that are there
        mlflow.db, mlartifacts/                      this machine's own, never sent

Everything that reads a store reads the view. What is written goes there first, by name, and then here; only what MLflow
is told (mlflow.json) and reports are written here first and `publish`ed. All processes of a machine share one view. Its
files have the times they have there, by this machine's clock, because who is alive is judged by them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workers.afar import clock_skew, home, locked, open_remote
from workers.remote import VERDICTS, Info, Seen, hidden
from workers.store import Damaged, parse_record, record_text, sound_record, write_text, write_whole

FETCHERS = 16
"""Objects that are fetched at a time."""
HEAVY = ("pictures", "adapter", "checkpoints")
"""The folders of a trial that come when they are asked for."""
SEALED = ("pictures/", "adapter/")
"""What DONE.json names of them: the sizes are kept here."""
PUBLISHED = ("trials/*/mlflow.json", "trials/*/FAILED.json", "sweeps/*/mlflow.json", "sweeps/*/report/**/*")
WRITTEN_HERE = ("mlflow.json", "FAILED.json")
SIZES, MEMORY, LOCK = ".far.json", ".seen.json", ".lock"
LOCAL = "store"
"""The entry of mlflow.json that means the database beside it, which is another one on every machine."""


@functools.cache
def _far(url: str, view: Path) -> Far:
    return Far(url, view)


def far_of(url: str) -> Far:
    """The far side of the store at a URL; one object for the whole process. Raises RemoteError for no such URL."""
    return _far(url, home(url) / "view")


def sizes(folder: Path) -> dict[str, int]:
    """What there is of a trial's pictures and adapter, as the view's folder of that trial knows it."""
    try:
        return dict(json.loads((folder / SIZES).read_bytes()))
    except (OSError, ValueError):
        return {}


class Far:
    """What is there, and the view of it. Every method that asks for it raises RemoteError where it does not answer."""

    def __init__(self, url: str, view: Path) -> None:
        self.remote, self.view = open_remote(url), view
        self.looked: float | None = None
        """When the view was last like what is there, by this machine's clock."""
        self._wanted: dict[str, set[str]] = {}
        self._files: dict[str, Seen] = {}
        """The files of the view as they were when they were the same there."""
        self._sizes: dict[str, dict[str, int]] = {}
        self._memory: tuple[int, int] | None = None
        self._own: dict[str, tuple[int, int]] = {}
        """Files of which there is nothing to publish, or nothing any more."""
        self._lock, self._depth = threading.RLock(), 0

    def skew(self) -> float:
        """Seconds that its clock is ahead of this machine's."""
        return clock_skew(self.remote)

    # ---- there -> here

    def look(self) -> None:
        """Bring the view up to date: one listing, and what has changed since the last one."""
        with self._alone():
            began = time.time()
            self._update(self.remote.list(), "")
            self.looked = began

    def follow(self, keys: Iterable[str], folders: Iterable[str]) -> None:
        """From now on bring these folders of these trials too."""
        for key in keys:
            self._wanted.setdefault(key, set()).update(folders)

    def fetch(self, key: str, folders: Iterable[str]) -> None:
        """Bring these folders of one trial, and the rest of it."""
        self.follow([key], folders)
        with self._alone():
            self._update(self.remote.list(f"trials/{key}"), f"trials/{key}/")

    def _update(self, there: Mapping[str, Info], below: str) -> None:
        """Make the view of what lies `below` that of `there`."""
        for name in [name for name in self._files if name.startswith(below) and name not in there]:
            self._drop(name)
        due = [name for name, info in there.items() if self._is_due(name, info)]
        skew = self.skew() if any(_is_beating(name) for name in due) else 0.0
        try:
            with ThreadPoolExecutor(FETCHERS) as pool:
                for turn in range(3):
                    names = [name for name in due if _turn(name) == turn]
                    found = pool.map(lambda name: (name, self._take(name, there[name], skew)), names)
                    self._files |= {name: seen for name, seen in found if seen is not None}
            self._note_sizes(there, below)
        finally:
            if due or self._changed:
                self._save()

    def _is_due(self, name: str, info: Info) -> bool:
        """Whether it has to be fetched; what nobody asked for does not, and goes from here when it is another one."""
        seen, stat = self._files.get(name), _stat(self.view / name)
        if not self._is_shown(name):
            if seen is not None and seen.version != info.version:
                self._drop(name)
            return False
        if seen is None or seen.version != info.version or stat is None:
            return True
        return stat != (seen.size, seen.mtime_ns) and not name.endswith(WRITTEN_HERE)

    def _is_shown(self, name: str) -> bool:
        top, _, rest = name.partition("/")
        if top in ("sweeps", "launches"):
            return "/report/" not in name
        key, _, file = rest.partition("/")
        part = file.partition("/")[0]
        return name == "id" or (top == "trials" and part != "damaged" and (part not in HEAVY or self._wants(key, part)))

    def _wants(self, key: str, part: str) -> bool:
        return part in self._wanted.get(key, ())

    def _take(self, name: str, info: Info, skew: float) -> Seen | None:
        """Fetch one object; None where it has gone meanwhile."""
        path = self.view / name
        if path.name == "mlflow.json" and path.exists():
            if (theirs := self.remote.read(name)) is None:
                return None
            _merge(path, theirs)
        elif not self.remote.fetch(name, path):
            return None
        moment = info.modified - skew
        os.utime(path, (moment, moment))
        stat = _stat(path)
        return None if stat is None else Seen(*stat, info.version)

    def _drop(self, name: str) -> None:
        """Remove a file of the view that is gone there, or is another one by now, unless it was changed here."""
        seen, stat = self._files.pop(name), _stat(self.view / name)
        self._changed = True
        if stat == (seen.size, seen.mtime_ns):
            (self.view / name).unlink(missing_ok=True)
            self._tidy(name)

    def _note_sizes(self, there: Mapping[str, Info], below: str) -> None:
        found: dict[str, dict[str, int]] = {}
        for name, info in there.items():
            top, _, rest = name.partition("/")
            key, _, file = rest.partition("/")
            if top == "trials" and file.startswith(SEALED):
                found.setdefault(key, {})[file] = info.size
        for key in [key for key in {*found, *self._sizes} if f"trials/{key}/".startswith(below)]:
            path = self.view / "trials" / key / SIZES
            if key not in found:
                path.unlink(missing_ok=True)
                self._tidy(f"trials/{key}/{SIZES}")
                self._changed = self._sizes.pop(key) is not None
            elif found[key] != self._sizes.get(key):
                write_text(path, json.dumps(found[key]), durable=False)
                self._sizes[key] = found[key]
                self._changed = True

    def _tidy(self, name: str) -> None:
        """Remove the folders that a file's going has left empty."""
        for folder in list((self.view / name).relative_to(self.view).parents)[:-1]:
            with contextlib.suppress(OSError):
                (self.view / folder).rmdir()

    # ---- here -> there

    def write(self, name: str, data: bytes) -> None:
        """Put one object, and its copy into the view."""
        self.remote.write(name, data)
        self.copy(name, data)

    def create(self, name: str, data: bytes) -> bytes:
        """Put one object unless it is there; what it holds then."""
        data = data if self.remote.create(name, data) else self.remote.read(name) or data
        self.copy(name, data)
        return data

    def copy(self, name: str, data: bytes) -> None:
        """Put a file into the view alone."""
        write_whole(self.view / name, lambda temporary: temporary.write_bytes(data), durable=False)

    def remove(self, name: str) -> None:
        (self.view / name).unlink(missing_ok=True)
        self.remote.delete(name)

    def publish(self) -> None:
        """Send what was written here first (PUBLISHED) and has changed."""
        with self._alone():
            before = dict(self._files)
            try:
                for path in [path for pattern in PUBLISHED for path in self.view.glob(pattern)]:
                    self._publish(path.relative_to(self.view).as_posix())
            finally:
                if self._files != before:
                    self._save()

    def _publish(self, name: str) -> None:
        path, seen = self.view / name, self._files.get(name)
        stat = _stat(path)
        if stat is None or not path.is_file() or hidden(name):
            return
        if stat == self._own.get(name) or (seen is not None and stat == (seen.size, seen.mtime_ns)):
            return
        if path.name == "FAILED.json":
            self._publish_failure(name)
            self._own[name] = stat
        elif (data := _shared(path) if path.name == "mlflow.json" else path.read_bytes()) is not None:
            self._files[name] = Seen(*stat, self.remote.write(name, data).version)
        else:
            self._own[name] = stat

    def _publish_failure(self, name: str) -> None:
        """Unless the trial has a result there."""
        done = name.removesuffix("FAILED.json") + "DONE.json"
        if self.remote.read(done) is None:
            self.remote.create(name, (self.view / name).read_bytes())

    @contextlib.contextmanager
    def moving(self, key: str) -> Iterator[None]:
        """What appears in a trial's folder during the block appears there, then what goes from it goes there."""
        folder = self.view / "trials" / key
        before = _files(folder)
        yield
        after = _files(folder)
        for name in sorted(name for name in after if after[name] != before.get(name)):
            self.remote.write(f"trials/{key}/{name}", folder / name)
        for name in sorted(before.keys() - after.keys(), key=lambda name: name not in VERDICTS):
            self.remote.delete(f"trials/{key}/{name}")

    # ---- one process at a time

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the view against other processes and threads, and know what they know of it."""
        with self._lock, contextlib.ExitStack() as stack:
            if not self._depth:
                stack.enter_context(locked(self.view / LOCK))
                self._recall()
                self._changed = False
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _recall(self) -> None:
        stat = _stat(self.view / MEMORY)
        if stat == self._memory and stat is not None:
            return
        try:
            content = json.loads((self.view / MEMORY).read_bytes())
            self._files = {name: Seen(*values) for name, values in content["files"].items()}
            self._sizes = content["sizes"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._files, self._sizes = {}, {}
        self._memory = stat

    def _save(self) -> None:
        files = {name: (seen.size, seen.mtime_ns, seen.version) for name, seen in self._files.items()}
        write_text(self.view / MEMORY, json.dumps({"files": files, "sizes": self._sizes}), durable=False)
        self._memory, self._changed = _stat(self.view / MEMORY), False


def _is_beating(name: str) -> bool:
    return "/attempts/" in name or name.startswith("launches/")


def _turn(name: str) -> int:
    """Pictures and adapters come before what names them, verdicts last."""
    return 2 if name.endswith(VERDICTS) else 0 if name.split("/")[2:3] and name.split("/")[2] in HEAVY else 1


def _merge(path: Path, theirs: bytes) -> None:
    """Bring another machine's mlflow.json into ours: it knows better, except of our own database."""
    try:
        content: dict[str, Any] = parse_record(theirs, path)
    except Damaged:
        return
    ours = sound_record(path)
    write_text(path, record_text(ours | content | ({LOCAL: ours[LOCAL]} if LOCAL in ours else {})), durable=False)


def _shared(path: Path) -> bytes | None:
    """What of an mlflow.json concerns other machines; None where nothing does."""
    content = {place: entry for place, entry in sound_record(path).items() if place != LOCAL}
    return record_text(content).encode() if content else None


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _files(folder: Path) -> dict[str, tuple[int, int] | None]:
    """The files below a folder, temporary ones left out."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): _stat(path) for path in paths}
    return {name: stat for name, stat in named.items() if not hidden(name)}
