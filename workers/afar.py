"""A trial whose store is at a URL: it works in a folder of its own machine, and what it writes goes there.

    $PIFT_CACHE/stores/<hash of the URL>      this machine's folder for the store (PIFT_CACHE: ~/.cache/pift)
        work/trials/<key>                     the folder it works in

The attempts (workers/lease.py) are objects there: begun by a conditional put, beating by overwriting. Files travel by a
mirror (workers/remote.py), in the background: a gradient step asks nobody and waits for nothing, so a store that is
away for a while costs no training. Three looks at the far side go on in threads: every 5 s whether another attempt has
begun and whether the launch is to stop, every 15 s a beat. Each upload asks once more, right before it, whether the
trial is still ours: whoever slept through the end of its lease sends nothing any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.lease import NAME, Attempt, Lease, LeaseLost
from workers.remote import S3, Info, Mirror, Pusher, Remote, RemoteError
from workers.store import Damaged, parse_record, record_text, write_text

BEAT_SECONDS = 15.0
LOOK_SECONDS = 5.0
"""Between two looks at whether another attempt has begun, or the launch is to stop."""
PUSH_SECONDS = 30.0
"""Between two uploads of what is new."""
RETRY_SECONDS = 5.0
"""Between two tries of the last upload, for which the trial waits."""
CLOCK_SECONDS = 60.0
"""A clock that was compared is not compared again for so long."""
CLOCK_TICK = 1.5
"""Stores round times to whole seconds: a difference below this is none."""
STAYS = ("attempts/", "damaged/")
"""What is not brought here."""


def open_remote(url: str) -> Remote:
    """The objects at a URL; one that does not answer is given up within minutes rather than half an hour."""
    scheme = url.partition("://")[0].lower()
    return Remote(url, **({"config_kwargs": _impatient()} if scheme in S3 else {}))


def _impatient() -> dict[str, Any]:
    """botocore's settings: what FSSPEC_S3 says, and shorter waits for a connection where it says nothing of them."""
    with contextlib.suppress(ImportError):
        from fsspec.config import conf

        return {"connect_timeout": 10, "retries": {"max_attempts": 1}} | conf.get("s3", {}).get("config_kwargs", {})
    return {}


def home(url: str) -> Path:
    """This machine's folder for the store at a URL."""
    cache = Path(os.environ.get("PIFT_CACHE") or "~/.cache/pift").expanduser().absolute()
    return cache / "stores" / hashlib.sha256(Remote(url).url.encode()).hexdigest()[:16]


def work_folder(url: str, key: str) -> Path:
    """Where a trial of the store at a URL works on this machine."""
    return home(url) / "work" / "trials" / key


@contextlib.contextmanager
def at_work(url: str, key: str) -> Iterator[RemoteAttempts]:
    """The attempts of a trial, with a folder to work in that no other process uses: work_folder, or one beside it."""
    place, number = work_folder(url, key), 1
    while True:
        folder = place if number == 1 else place.with_name(f"{key}~{number}")
        with locked(folder / ".lock", wait=False) as ours:
            if ours:
                yield RemoteAttempts(open_remote(url), f"trials/{key}", folder)
                return
        number += 1


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; False where another process holds it and one does not `wait`. It ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


_SKEW: dict[str, tuple[float, float]] = {}


def clock_skew(remote: Remote) -> float:
    """Seconds that the store's clock is ahead of this machine's; measured at most once a minute, by writing an object.
    What it was before, else 0, where nothing can be written."""
    measured, skew = _SKEW.get(remote.url, (-1e9, 0.0))
    if time.monotonic() - measured < CLOCK_SECONDS:
        return skew
    name, began = f".clock-{secrets.token_hex(4)}", time.time()
    with contextlib.suppress(RemoteError):
        skew = remote.write(name, b"").modified - (began + time.time()) / 2
        skew = 0.0 if abs(skew) < CLOCK_TICK + (time.time() - began) / 2 else skew
        remote.delete(name)
    _SKEW[remote.url] = (time.monotonic(), skew)
    return skew


class Watch:
    """Asks a question again and again from a thread of its own, until the answer is yes or the block ends; one that
    could not be answered is asked again."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self.yes = False
        self._ask, self._over = ask, threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self.yes and not self._over.is_set():
            with contextlib.suppress(OSError):
                self.yes = self._ask()
            self._over.wait(LOOK_SECONDS)


class RemoteAttempts:
    """A trial's attempts (workers.lease.Attempts) at a URL, and the way of its files between there and `folder`.

    Every record that is read or written has a copy in folder/attempts, for whoever looks there.
    """

    def __init__(self, remote: Remote, prefix: str, folder: Path) -> None:
        self.remote, self.prefix, self.folder = remote, prefix, folder
        self.beat_seconds = BEAT_SECONDS
        self.mirror = Mirror(_Fenced(remote, self._may_send), prefix, folder)
        self._lease: Lease | None = None
        self._watch: Watch | None = None
        self._pusher: Pusher | None = None
        self._known: dict[int, tuple[str, Mapping[str, Any]]] = {}
        """The records read so far, each with its version."""

    # ---- the records

    def now(self) -> float:
        return time.time() + clock_skew(self.remote)

    def numbers(self) -> list[int]:
        names = (name.rpartition("/")[2] for name in self.remote.list(f"{self.prefix}/attempts"))
        return sorted(int(found[1]) for name in names if (found := NAME.fullmatch(name)))

    def read(self, number: int) -> Attempt | None:
        info = self.remote.info(self._name(number))
        return None if info is None else Attempt(number, self._content(number, info), info.modified)

    def create(self, number: int, content: Mapping[str, Any]) -> bool:
        made = self.remote.create(self._name(number), record_text(content).encode())
        if made:
            self._copy(number, record_text(content))
        return made

    def write(self, number: int, content: Mapping[str, Any]) -> None:
        self.remote.write(self._name(number), record_text(content).encode())
        self._copy(number, record_text(content))

    def taken(self, number: int) -> bool:
        return self._watch is not None and self._watch.yes

    def _content(self, number: int, info: Info) -> Mapping[str, Any]:
        version, content = self._known.get(number, ("", {}))
        if version == info.version:
            return content
        text = self.remote.read(self._name(number)) or b""
        try:
            content = parse_record(text, Path(self._name(number)))
        except Damaged:
            return {}
        self._known[number] = info.version, content
        self._copy(number, text.decode())
        return content

    def _copy(self, number: int, text: str) -> None:
        write_text(self.folder / "attempts" / f"{number:04d}.json", text, durable=False)

    def _name(self, number: int) -> str:
        return f"{self.prefix}/attempts/{number:04d}.json"

    # ---- the files

    def fetch(self, want: Callable[[str], bool] = lambda name: True) -> None:
        self.mirror.pull(lambda name: not name.startswith(STAYS) and want(name), delete=True)

    @contextlib.contextmanager
    def sending(self, lease: Lease) -> Iterator[None]:
        self._lease = lease
        try:
            with Watch(self._is_taken) as self._watch, Pusher(self.mirror, PUSH_SECONDS) as self._pusher:
                yield
        finally:
            self._lease = self._watch = self._pusher = None

    def deliver(self, seconds: float) -> None:
        assert self._pusher is not None
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            try:
                return self._pusher.flush(max(0.0, min(RETRY_SECONDS, left)))
            except RemoteError:
                if isinstance(self._pusher.error, LeaseLost):
                    raise self._pusher.error from None
                if left <= RETRY_SECONDS:
                    raise

    def delivered(self) -> bool:
        return self.mirror.is_sent()

    def _is_taken(self) -> bool:
        lease = self._lease
        return lease is not None and self.remote.read(self._name(lease.number + 1)) is not None

    def _may_send(self) -> None:
        """Raises LeaseLost unless the trial is ours at this moment."""
        lease = self._lease
        if lease is not None and not lease.lost and self._is_taken():
            lease.lost = True
        if lease is None or lease.lost:
            raise LeaseLost(f"{self.prefix} is another process's by now; nothing more of it is sent from here")


class _Fenced(Remote):
    """Objects that may be changed only while `check` does not raise."""

    def __init__(self, remote: Remote, check: Callable[[], None]) -> None:
        super().__init__(remote.url, **remote.options)
        self._check = check

    def write(self, name: str, data: bytes | Path) -> Info:
        self._check()
        return super().write(name, data)

    def delete(self, name: str) -> None:
        self._check()
        super().delete(name)
