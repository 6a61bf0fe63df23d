"""Who may work on a trial: numbered attempts, each owned by one process, each beating while it works.

    attempts/0001.json    {"attempt": 1, "pid", "host", ..., "started", "beat", "ended": 1764.., "how": "stopped"}
    attempts/0002.json    the newest attempt decides: it works, it ended with a word, or it died without one

An attempt begins by creating the file of the next number, which succeeds for exactly one of any number of processes on
any machines that share the folder. Its owner rewrites its own file every second and nobody else ever writes it. A
process that slept through its own funeral (a suspended laptop, a network that was gone) finds the file of a higher
number and leaves without writing: so a lease needs no lock that could be left behind.

Whether a silent owner lives is asked of the process table where that is possible (same boot, same process namespace),
else of the age of its last beat by the clock of the file server, which is the only one that all share.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from workers.store import Damaged, create_whole, parse_record, record_text, write_text

BEAT_SECONDS = 1.0
FRESH_SECONDS = 60.0
"""A beat older than this belongs to a process that is no more, where its process cannot be looked up."""
WRITING_SECONDS = 0.1
"""A record that is found damaged is looked at again after this time: where a full disk or a file system without links
lets no record be replaced as a whole, it may be in the middle of being written."""
NAME = re.compile(r"(\d{4,})\.json")


class LeaseLost(Exception):
    """Another process took this trial over; the one that is told so leaves without writing anything more."""


@functools.cache
def process() -> dict[str, Any]:
    """What tells this process from every other one: pid, when it was born, on which boot, in which namespace."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "born": born(os.getpid()),
    }


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.cache_clear)


def _text(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return None


def _link(path: str) -> str | None:
    with suppress(OSError):
        return os.readlink(path)
    return None


def born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks since boot; None for one that is no more (or a zombie)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def lives(owner: Mapping[str, Any], age: float) -> bool:
    """True when the process that wrote this record is at work, as far as one can tell from here; `age` is that of its
    last beat, in seconds."""
    if owner.get("ended"):
        return False
    me = process()
    if me["boot"] and owner.get("boot") == me["boot"] and owner.get("namespace") == me["namespace"]:
        return owner.get("born") is not None and born(int(owner.get("pid", 0))) == owner["born"]
    return age <= FRESH_SECONDS


@dataclass(frozen=True)
class Attempt:
    """One attempt as found: its number, its record (empty when damaged) and when it was last written."""

    number: int
    content: Mapping[str, Any]
    modified: float

    def alive(self, now: float) -> bool:
        """A damaged record has no owner: whoever comes next takes over, and fences out one that should live."""
        return bool(self.content) and lives(self.content, now - self.modified)


class Attempts(Protocol):
    """Where the attempts of a trial are kept, and its files, where that is not the folder it works in."""

    @property
    def beat_seconds(self) -> float:
        """Between two beats."""
        ...

    def now(self) -> float:
        """The time by the clock that stamps the records."""
        ...

    def numbers(self) -> list[int]: ...
    def read(self, number: int) -> Attempt | None: ...
    def create(self, number: int, content: Mapping[str, Any]) -> bool: ...
    def write(self, number: int, content: Mapping[str, Any]) -> None: ...

    def taken(self, number: int) -> bool:
        """Whether the attempt after this one has begun; asked at every step, so it waits for nobody."""
        ...

    def fetch(self, want: Callable[[str], bool] = lambda name: True) -> None:
        """Bring the trial's files here, those whose names are wanted. Raises OSError."""
        ...

    def sending(self, lease: Lease) -> AbstractContextManager[None]:
        """While the block runs, what is new here is sent to where it is kept, in the background, as long as the lease
        is not lost."""
        ...

    def deliver(self, seconds: float) -> None:
        """In that block: return when all that is here is there. Raises OSError after so long, and LeaseLost."""
        ...

    def delivered(self) -> bool:
        """Whether all that is here was sent."""
        ...


@dataclass(frozen=True)
class Folder:
    """Attempts in the trial's own folder, on this machine or shared: its files are where they are kept."""

    root: Path
    beat_seconds: ClassVar[float] = BEAT_SECONDS

    def now(self) -> float:
        return time.time() + clock_skew(self.root)

    def numbers(self) -> list[int]:
        try:
            names = os.listdir(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(found[1]) for name in names if (found := NAME.fullmatch(name)))

    def read(self, number: int) -> Attempt | None:
        path = self._path(number)
        try:
            text, modified = path.read_bytes(), path.stat().st_mtime
        except FileNotFoundError:
            return None
        try:
            return Attempt(number, parse_record(text, path), modified)
        except Damaged:
            return Attempt(number, {}, modified)

    def create(self, number: int, content: Mapping[str, Any]) -> bool:
        return create_whole(self._path(number), _padded(content).encode())

    def write(self, number: int, content: Mapping[str, Any]) -> None:
        try:
            write_text(self._path(number), _padded(content), durable=False)
        except OSError:  # a full disk: the old file's own block is large enough, so the last words can still be said
            with self._path(number).open("r+b") as stream:
                room = stream.seek(0, os.SEEK_END)
                texts = (_padded(part).encode() for part in _shorter(content))
                fitting = next((text for text in texts if len(text) <= room), None)
                if fitting is None:
                    raise
                stream.seek(0)
                stream.write(fitting)
                stream.truncate()

    def taken(self, number: int) -> bool:
        return self.read(number + 1) is not None

    def fetch(self, want: Callable[[str], bool] = lambda name: True) -> None:
        return None

    def sending(self, lease: Lease) -> AbstractContextManager[None]:
        return nullcontext()

    def deliver(self, seconds: float) -> None:
        return None

    def delivered(self) -> bool:
        return True

    def _path(self, number: int) -> Path:
        return self.root / f"{number:04d}.json"


def _padded(content: Mapping[str, Any]) -> str:
    """A record that fills a block of the disk, so that a longer one fits in its place."""
    return record_text(content).ljust(4095) + "\n"


def _shorter(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A record, then with less and less of what only people read."""
    yield content
    brief = {name: value for name, value in content.items() if name != "warnings"}
    yield brief
    for length in (1000, 200):
        yield brief | {"message": str(brief.get("message") or "")[:length]}


def newest(attempts: Attempts) -> Attempt | None:
    """The attempt that decides."""
    numbers = attempts.numbers()
    return attempts.read(numbers[-1]) if numbers else None


def seconds_at_work(attempt: Mapping[str, Any]) -> float:
    """How long an attempt was at work, until its end or its last beat."""
    return max(0.0, float(attempt.get("ended") or attempt.get("beat", 0.0)) - float(attempt.get("started", 0.0)))


_SKEW: dict[int, tuple[float, float]] = {}


def clock_skew(folder: Path) -> float:
    """Seconds that the clock of the folder's file system is ahead of this machine's; measured at most once a minute
    and device, by writing a file. 0 where nothing can be written."""
    with suppress(OSError):
        device = folder.stat().st_dev
        measured, skew = _SKEW.get(device, (-1e9, 0.0))
        if time.monotonic() - measured < 60:
            return skew
        probe = folder / f".clock.{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"")
            skew = probe.stat().st_mtime - time.time()
        finally:
            with suppress(OSError):
                probe.unlink()
        skew = 0.0 if abs(skew) < 0.5 else skew
        _SKEW[device] = (time.monotonic(), skew)
        return skew
    return 0.0


@dataclass
class Beating:
    """Rewrites a record of one's own in the background, so that others see that its owner lives."""

    write: Callable[[Mapping[str, Any]], None]
    content: dict[str, Any]
    seconds: float = BEAT_SECONDS
    each: Callable[[], None] | None = None
    """Called at every beat, after the record was written."""
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, **last: Any) -> None:
        """Write the last words; OSError where that cannot be done."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self.content |= last
            self.write(self.content | {"beat": time.time()})

    def cease(self) -> None:
        """Stop without a word."""
        self._over.set()

    def note(self, **values: Any) -> None:
        """Change the record; it is written with the next beat."""
        with self._lock:
            self.content |= values

    def _run(self) -> None:
        while not self._over.wait(self.seconds):
            with suppress(OSError):
                with self._lock:
                    content = self.content | {"beat": time.time()}
                self.write(content)
            if self.each is not None:
                with suppress(OSError):
                    self.each()


class Lease:
    """The right to work on one trial, from `acquire` until `end`."""

    def __init__(self, attempts: Attempts, number: int, content: dict[str, Any], seconds: float) -> None:
        self.attempts, self.number = attempts, number
        self.lost = False
        self._beating = Beating(lambda c: attempts.write(number, c), content, seconds, self._look)
        self._beating.start()

    def check(self) -> None:
        """Raises LeaseLost when another attempt has begun; called before anything is written."""
        if not self.lost:
            self._look()
        if self.lost:
            raise LeaseLost(f"another process took this trial over with attempt {self.number + 1}")

    def note(self, **values: Any) -> None:
        """Facts for others to see: step, warnings."""
        self._beating.note(**values)

    @property
    def content(self) -> Mapping[str, Any]:
        return self._beating.content

    def end(self, how: str, **facts: Any) -> None:
        """Say how the attempt ended; without effect when the trial is another's by now. May raise OSError."""
        if self.lost:
            self._beating.cease()
            return
        self._beating.stop(ended=time.time(), how=how, **facts)

    def _look(self) -> None:
        if self.attempts.taken(self.number):
            self.lost = True


def acquire(attempts: Attempts, facts: Mapping[str, Any], seconds: float | None = None) -> Lease | Attempt:
    """Begin the next attempt, or the attempt that is at work (of another process, or begun a moment before ours).
    `seconds`: between two beats, where they are not to be those of `attempts`."""
    while True:
        before = newest(attempts)
        if before is not None and not before.content:  # damaged, or being written at this moment
            time.sleep(WRITING_SECONDS)
            before = newest(attempts)
        if before is not None and before.alive(attempts.now()):
            return before
        number = 1 if before is None else before.number + 1
        started = time.time()
        content = {"attempt": number, **process(), "started": started, "beat": started, **facts}
        if attempts.create(number, content):
            return Lease(attempts, number, content, attempts.beat_seconds if seconds is None else seconds)
