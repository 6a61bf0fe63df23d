"""A store at a URL: objects that appear whole or not at all, and folders here that mirror folders there.

    remote = Remote("s3://bucket/pift")             any URL of s3, gs, memory or file
    remote.check()                                  writable? conditional put? says what to do when not
    remote.create("trials/<key>/attempts/0001.json", lease)     True on exactly one of two machines

    mirror = Mirror(remote, "trials/<key>", folder)
    mirror.pull()                                   what is newer there comes here
    with Pusher(mirror, seconds=30) as pusher:      what is new here goes there, in the background
        ...                                         training never waits
        pusher.flush(timeout=600)                   except here

Credentials, region and endpoint come from the environment, as the store's own library reads it. For s3 (s3fs on
botocore): AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL for MinIO
and its like, AWS_REQUEST_CHECKSUM_CALCULATION=when_required where these know no CRC. FSSPEC_S3='{"anon": true}' sets
any option of s3fs. A gs:// store needs gcsfs.

One process works on a mirror's folder at a time. A process that only looks on has a mirror in a folder of its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from workers.store import create_whole, write_text, write_whole

S3, LOCAL, MEMORY = ("s3", "s3a"), ("file", "local"), "memory"
SCHEMES = (*S3, "gs", "gcs", MEMORY, *LOCAL)
"""Where a put is whole by nature, or is made so here (file)."""

CONFLICT_WAITS = (0.1, 0.3, 1.0)
"""Seconds before a conditional put is tried again that met another one under way (s3's answer 409)."""

_memory_lock = threading.RLock()  # the memory filesystem looks first and writes then; its readers share one cursor


class RemoteError(OSError):
    """The far side cannot do what was asked; the message names the store and what to do about it."""


def is_url(text: str | Path) -> bool:
    """True for "s3://bucket/x" and its like, False for a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(text)) is not None


@dataclass(frozen=True)
class Info:
    """One object: `version` differs whenever the content does (an ETag, where the store has them)."""

    size: int
    modified: float
    version: str


class Remote:
    """Objects below a URL, named by relative paths; every object appears whole or not at all.

    `storage_options` go to fsspec. Every method raises RemoteError where the store cannot be worked with.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        scheme, _, rest = str(url).partition("://")
        self.scheme, self.options = scheme.lower(), storage_options
        self.url = f"{self.scheme}://{rest.rstrip('/')}"
        if not is_url(url) or self.scheme not in SCHEMES:
            raise RemoteError(f"store={url}: not a URL of {', '.join(SCHEMES)}; name one of these, or a folder")
        if self.scheme not in (MEMORY, *LOCAL) and not rest.strip("/"):
            raise RemoteError(f"store={url} names no bucket; name one, as in {self.scheme}://bucket/pift")

    @functools.cached_property
    def _fs(self) -> Any:
        with self._explained():
            import fsspec

            return fsspec.filesystem(self.scheme, use_listings_cache=False, **self.options)

    def read(self, name: str) -> bytes | None:
        """The content of an object, or None where there is none."""
        with contextlib.suppress(FileNotFoundError), self._explained():
            return self._fs.cat_file(self._path(name))
        return None

    def fetch(self, name: str, path: Path) -> bool:
        """Bring an object into the local file `path`, whole or not at all; False where there is none."""
        lock = _memory_lock if self.scheme == MEMORY else contextlib.nullcontext()
        with contextlib.suppress(FileNotFoundError), self._explained(), lock:
            write_whole(path, lambda there: self._fs.get_file(self._path(name), str(there)), durable=False)
            return True
        return False

    def write(self, name: str, data: bytes | Path) -> Info:
        """Put an object, over an older one if need be. FileNotFoundError where `data` is the path of no file."""
        path = self._path(name)
        if isinstance(data, Path):
            data.stat()
        with self._explained():
            if self.scheme in LOCAL:
                write_whole(Path(path), functools.partial(_fill, data=data), durable=False)
            elif isinstance(data, Path) and self.scheme != MEMORY:
                self._fs.put_file(str(data), path)
            else:
                self._fs.pipe_file(path, data.read_bytes() if isinstance(data, Path) else data)
        info = self.info(name)
        if info is None:
            raise RemoteError(f"store={self.url}: {name} was written and is not there; is another program deleting?")
        return info

    def create(self, name: str, data: bytes) -> bool:
        """Put an object unless there is one of that name: of any number of callers at once, exactly one sees True.

        On s3 it is a put with If-None-Match: "*". When its answer gets lost, the library's second try finds the
        first one's object; a random mark in the object's metadata tells it from another machine's.
        """
        self._check_creates()
        if self.scheme in LOCAL:
            with self._explained():
                return create_whole(Path(self._path(name)), data)
        mark = {"Metadata": {"mark": secrets.token_hex(8)}} if self.scheme in S3 else {}
        for wait in (*CONFLICT_WAITS, None):
            try:
                with _memory_lock if self.scheme == MEMORY else contextlib.nullcontext():
                    self._fs.pipe_file(self._path(name), data, mode="create", **mark)
                return True
            except Exception as error:
                code = _code(error)
                if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                    return bool(mark) and self._mark(name) == mark["Metadata"]["mark"]
                if code not in ("ConditionalRequestConflict", "409") or wait is None:
                    raise self._error(error) from error
                time.sleep(wait)
        raise AssertionError("the last wait is None")

    def list(self, prefix: str = "") -> dict[str, Info]:
        """Every object in the folder `prefix` and below, by name from the URL on; asked anew each time.

        Names with a part that begins with a dot are temporary files of someone's and are left out.
        """
        root = self._path("").rstrip("/") + "/"
        with self._explained():
            found = self._fs.find(self._path(prefix).rstrip("/"), detail=True)
        names = {path.removeprefix(root): entry for path, entry in found.items() if entry["type"] == "file"}
        return {name: _info(entry) for name, entry in names.items() if not hidden(name)}

    def info(self, name: str) -> Info | None:
        """Size, time and version of one object, or None where there is none."""
        with contextlib.suppress(FileNotFoundError), self._explained():
            entry = self._fs.info(self._path(name))
            return _info(entry) if entry["type"] == "file" else None
        return None

    def exists(self, name: str) -> bool:
        return self.info(name) is not None

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError), self._explained():
            self._fs.rm_file(self._path(name))

    def check(self) -> None:
        """Raises RemoteError, which says what to do, unless one can write, read, list, delete and create here.
        Leaves nothing behind, except the folder of a file:// store."""
        probe = f".check-{secrets.token_hex(8)}"
        created = self.create(probe, b"first")
        try:
            if not created or self.create(probe, b"second") or self.read(probe) != b"first":
                raise RemoteError(
                    f"store={self.url} ignores If-None-Match: two machines could take one trial; "
                    "bring the server up to date, or use a store with conditional puts"
                )
            self.list(probe)
        finally:
            self.delete(probe)

    def _path(self, name: str) -> str:
        return f"{self._fs._strip_protocol(self.url).rstrip('/')}/{name}"

    def _mark(self, name: str) -> str | None:
        with contextlib.suppress(FileNotFoundError), self._explained():
            return self._fs.metadata(self._path(name)).get("mark")
        return None

    def _check_creates(self) -> None:
        """fsspec's own pipe_file looks first and writes then; a filesystem that can do better brings its own."""
        kind = type(self._fs)
        put = getattr(kind, "_pipe_file", kind.pipe_file)
        own = put.__module__ not in ("fsspec.spec", "fsspec.asyn") and "mode" in inspect.signature(put).parameters
        if self.scheme not in LOCAL and not own:
            raise RemoteError(
                f"store={self.url}: {kind.__name__} as installed has no conditional put, so two machines could take "
                "one trial; install a newer version of its package, or use another store"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the store's library raises into RemoteError; FileNotFoundError of an object passes."""
        try:
            yield
        except RemoteError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
                raise
            raise self._error(error) from error

    def _error(self, error: Exception) -> RemoteError:
        return RemoteError(f"store={self.url}: {_advice(error, self.url)}")


@dataclass(frozen=True)
class Seen:
    """A file when it was last the same here and there: its size and mtime here, its version there."""

    size: int
    mtime_ns: int
    version: str


AHEAD = (-1, -1)
"""Size and mtime of a file here that goes beyond what is there: the next push sends it."""

JOURNAL = "journal.jsonl"
VERDICTS = ("DONE.json", "FAILED.json")
ORDER = ("pictures/*", JOURNAL, "checkpoints/*.pt", "checkpoints/*.json", "adapter/*", "*")
"""A file's place in a push or pull; verdicts come last. What names a file comes after the file."""


def light(name: str) -> bool:
    """A filter for Mirror.pull: what a status or a table needs. No pictures, no adapter, no checkpoints."""
    return not name.startswith(("pictures/", "adapter/", "checkpoints/"))


class Mirror:
    """One folder here, the same folder there. A file that was the same on both sides is remembered in .mirror.json.

    After a crash between any two operations of a push the far side is sound: a manifest there has its checkpoint, the
    journal there covers every checkpoint there, DONE.json has what it names.
    """

    def __init__(self, remote: Remote, prefix: str, folder: Path) -> None:
        self.remote, self.prefix, self.folder = remote, prefix.strip("/"), folder
        self.memory = folder / ".mirror.json"
        self._lock = threading.Lock()
        self._seen = self._recall()

    def pull(
        self,
        want: Callable[[str], bool] = lambda name: True,
        *,
        delete: bool = False,
        listing: Mapping[str, Info] | None = None,
    ) -> list[str]:
        """Fetch what is absent here or has changed there since it was last the same; the names fetched.

        A file that changed only here stays. A journal here that continues the one there stays too; one that went
        another way gives way, and checkpoints here that were never sent go with it. `want` picks files by name.
        `delete`: what was the same on both sides, is gone there and unchanged here goes here. `listing`: what
        remote.list() said just now, to save asking for each of many mirrors.
        """
        with self._lock:
            there = self._there(listing)
            fetched = [name for name in sorted(filter(want, there), key=_rank) if self._take(name, there)]
            if delete:
                self._drop([name for name in self._seen if name not in there and want(name)])
            return fetched

    def push(self, *, delete: bool = False) -> list[str]:
        """Send what changed here since it was last the same; the names sent.

        The folder is listed first, and the journal read after that: a checkpoint written meanwhile waits for the
        next push, so the journal covers those that go. attempts/ and names with a dot in front stay here. `delete`:
        checkpoints that are gone here and older than the newest here go there, as does a verdict that is gone here.
        """
        with self._lock:
            here = self._here()
            journal = _whole_lines(self.folder / JOURNAL)
            here |= {name: stat for name, stat in self._here().items() if name.startswith("pictures/")}
            asks = delete or any(name in VERDICTS or _is_weights(name) for name in self._due(here))
            there = self._there() if asks else {}
            self._retract(here, there, delete)
            sent = [name for name in self._due(here) if self._send(name, here, journal)]
            if delete:
                self._prune(here, there)
            return sent

    def is_sent(self) -> bool:
        """Whether nothing here has changed since it was last the same there."""
        with self._lock:
            return not self._due(self._here())

    # -- there -> here

    def _take(self, name: str, there: Mapping[str, Info]) -> bool:
        """Fetch one file unless it is here at this version; False also where it has gone meanwhile."""
        path, version = self.folder / name, there[name].version
        seen = self._seen.get(name)
        if seen and seen.version == version and path.exists():
            return False
        if name == JOURNAL and path.exists():
            return self._take_journal(path, version, there)
        if not self.remote.fetch(self._far(name), path):
            return False
        self._remember(name, _stat(path), version)
        return True

    def _take_journal(self, path: Path, version: str, there: Mapping[str, Info]) -> bool:
        theirs, ours = self.remote.read(self._far(JOURNAL)), _whole_lines(path)
        if theirs is None:
            return False
        if ours.startswith(theirs):
            self._remember(JOURNAL, _stat(path) if path.stat().st_size == len(theirs) else AHEAD, version)
            return False
        if not theirs.startswith(ours):
            self._drop([name for name in self._here() if _is_checkpoint(name) and name not in there], always=True)
        write_whole(path, lambda temporary: temporary.write_bytes(theirs), durable=False)
        self._remember(JOURNAL, _stat(path), version)
        return True

    def _drop(self, names: Iterable[str], always: bool = False) -> None:
        """Remove files here, what names a file before the file, unless they changed since they were remembered."""
        for name in sorted(names, key=_rank, reverse=True):
            path, seen = self.folder / name, self._seen.pop(name, None)
            if always or (seen and path.exists() and _stat(path) == (seen.size, seen.mtime_ns)):
                path.unlink(missing_ok=True)
        self._save()

    # -- here -> there

    def _due(self, here: Mapping[str, tuple[int, int]]) -> list[str]:
        """The files that changed since they were remembered, in the order to send them."""
        same = {name: (seen.size, seen.mtime_ns) for name, seen in self._seen.items()}
        return sorted((name for name, stat in here.items() if same.get(name) != stat), key=_rank)

    def _retract(self, here: Mapping[str, tuple[int, int]], there: Mapping[str, Info], delete: bool) -> None:
        """Remove there what would be untrue while this push is under way: an old verdict, and the manifest of a
        checkpoint that is about to be replaced. What is here comes back in its turn."""
        due = self._due(here)
        untrue = [name for name in VERDICTS if name in due or (delete and name in self._seen and name not in here)]
        untrue += [name.removesuffix(".pt") + ".json" for name in due if _is_weights(name)]
        self._remove(name for name in untrue if name in there)

    def _send(self, name: str, here: Mapping[str, tuple[int, int]], journal: bytes) -> bool:
        """Send one file; False where it has gone, or is a checkpoint whose turn is the next push."""
        path = self.folder / name
        try:
            data = journal if name == JOURNAL else path.read_bytes() if _is_manifest(name) else path
            if _is_checkpoint(name) and not self._ready(name, here):
                return False
            info = self.remote.write(self._far(name), data)
            if _is_weights(name) and not self._ready(name, here):  # replaced while it was sent
                return False
        except FileNotFoundError:
            return False
        self._remember(name, here[name], info.version)
        return True

    def _ready(self, name: str, here: Mapping[str, tuple[int, int]]) -> bool:
        """A checkpoint file goes as it was listed, and a manifest only after the .pt that was listed with it."""
        if _stat(self.folder / name) != here[name]:
            return False
        weights = name.removesuffix(".json") + ".pt"
        seen = self._seen.get(weights)
        return _is_weights(name) or (seen is not None and (seen.size, seen.mtime_ns) == here.get(weights))

    def _prune(self, here: Mapping[str, tuple[int, int]], there: Mapping[str, Info]) -> None:
        """Remove there the checkpoints that are gone here, where a newer one is here and up: manifest, then .pt."""
        kept = {_step(name) for name in here if _is_checkpoint(name)}
        newest = max((_step(name) for name in self._seen if name in here and _is_manifest(name)), default=(0, ""))
        gone = [name for name in there if _is_checkpoint(name) and _step(name) not in kept and _step(name) < newest]
        self._remove(sorted(gone, key=_rank, reverse=True))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.remote.delete(self._far(name))
            if self._seen.pop(name, None):
                self._save()

    # -- what is where

    def _far(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _there(self, listing: Mapping[str, Info] | None = None) -> dict[str, Info]:
        found = self.remote.list(self.prefix) if listing is None else listing
        start = self._far("")
        return {name.removeprefix(start): info for name, info in found.items() if name.startswith(start)}

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and mtime of every file here that is ours to send."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not hidden(name) and not name.startswith("attempts/"):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        found[name] = _stat(path)
        return found

    def _remember(self, name: str, stat: tuple[int, int], version: str) -> None:
        self._seen[name] = Seen(*stat, version)
        self._save()

    def _save(self) -> None:
        content = {"of": self._of, "files": {name: astuple(seen) for name, seen in self._seen.items()}}
        write_text(self.memory, json.dumps(content), durable=False)

    def _recall(self) -> dict[str, Seen]:
        """What .mirror.json says; nothing where it is absent, broken or of another store."""
        try:
            content = json.loads(self.memory.read_text(encoding="utf-8"))
            files = content["files"] if content["of"] == self._of else {}
            return {name: Seen(*values) for name, values in files.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    @property
    def _of(self) -> str:
        return f"{self.remote.url}/{self.prefix}"


class Pusher:
    """Pushes a mirror every `seconds` from a thread of its own, until the end of the `with` block.

    After a failure it tries again after 1, 2, 4 ... 60 s and never gives up; `error` is the last failure, None after
    a success. Leaving the block pushes nothing: `flush` first.
    """

    LONGEST_WAIT = 60.0
    PATIENCE = 5.0
    """Seconds that the end of the block waits for an upload under way."""

    def __init__(self, mirror: Mirror, seconds: float = 30.0, *, delete: bool = True) -> None:
        self.mirror, self.seconds, self.delete = mirror, seconds, delete
        self.error: Exception | None = None
        self._news = threading.Condition()
        self._asked = self._begun = self._done = self._failures = 0  # flushes asked for, seen by a push, pushed
        self._over = False
        self._thread = threading.Thread(target=self._work, name="pusher", daemon=True)

    def __enter__(self) -> Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._news:
            self._over = True
            self._news.notify_all()
        self._thread.join(self.PATIENCE)

    def flush(self, timeout: float) -> None:
        """Return when all that is here now is there too. Raises RemoteError when it is not after `timeout` seconds;
        failures until then are tried again."""
        with self._news:
            self._asked += 1
            ticket, self._failures = self._asked, 0
            self._news.notify_all()
            if not self._news.wait_for(lambda: self._done >= ticket or self._over, timeout) or self._done < ticket:
                raise RemoteError(
                    f"store={self.mirror.remote.url}: {self.mirror.folder.name} did not get there in {timeout:g} s; "
                    f"what is missing is in {self.mirror.folder}: {self.error or 'the upload is still under way'}"
                ) from self.error

    def _work(self) -> None:
        while self._wait():
            error: Exception | None = None
            try:
                self.mirror.push(delete=self.delete)
            except Exception as problem:  # whatever it is, training goes on and the next push may do better
                error = problem
            with self._news:
                self.error = error
                self._failures = self._failures + 1 if error else 0
                if not error:
                    self._done = self._begun
                self._news.notify_all()

    def _pause(self) -> float:
        """Seconds until the next push, if nobody asks for one."""
        return min(2.0 ** (self._failures - 1), self.LONGEST_WAIT) if self._failures else self.seconds

    def _wait(self) -> bool:
        """Sleep until the next push is due or asked for; False when it is all over."""
        with self._news:
            self._news.wait_for(lambda: self._over or self._asked > self._begun, self._pause())
            self._begun = self._asked
            return not self._over


# ---- files here


def _fill(temporary: Path, data: bytes | Path) -> None:
    if isinstance(data, Path):
        shutil.copyfile(data, temporary)
    else:
        temporary.write_bytes(data)


def _whole_lines(path: Path) -> bytes:
    """A file up to its last newline; empty where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# ---- names


def _rank(name: str) -> tuple[int, str]:
    """Where a file stands in ORDER, then by name."""
    if name in VERDICTS:
        return len(ORDER), name
    return next(place for place, pattern in enumerate(ORDER) if fnmatchcase(name, pattern)), name


def _is_weights(name: str) -> bool:
    return fnmatchcase(name, "checkpoints/*.pt")


def _is_manifest(name: str) -> bool:
    return fnmatchcase(name, "checkpoints/*.json")


def _is_checkpoint(name: str) -> bool:
    return _is_weights(name) or _is_manifest(name)


def _step(name: str) -> tuple[int, str]:
    """Orders checkpoints/step_000050.* by step, whatever the number of digits."""
    stem = Path(name).stem
    return len(stem), stem


def hidden(name: str) -> bool:
    """Whether a part of a name begins with a dot: somebody's temporary file."""
    return any(part.startswith(".") for part in name.split("/"))


# ---- what fsspec says


def _info(entry: Mapping[str, Any]) -> Info:
    """Info of fsspec's description of an object, which differs from filesystem to filesystem."""
    times = (entry.get(key) for key in ("LastModified", "mtime", "created"))
    moment = next((time for time in times if time is not None), 0.0)
    modified = float(moment.timestamp() if hasattr(moment, "timestamp") else moment)
    tag = entry.get("ETag") or entry.get("etag") or f"{entry.get('ino', '')}:{modified!r}:{entry['size']}"
    return Info(int(entry["size"]), modified, str(tag).strip('"'))


def _code(error: BaseException | None) -> str | None:
    """The store's own code of an error, as in "NoSuchBucket": botocore keeps it in the error or in its cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code")
        error = error.__cause__
    return None


def _advice(error: Exception, url: str) -> str:
    """What went wrong and what to do."""
    scheme, _, rest = url.partition("://")
    kind, code = type(error).__name__, _code(error)
    if isinstance(error, ImportError):
        fix = 'pip install "pift[s3]"' if scheme in S3 else f"pip install gcsfs ({error})"
        return f"the library for {scheme}:// is not installed; {fix}"
    if code == "NoSuchBucket":
        return f"there is no bucket {rest.split('/')[0]}; create it, or correct the name"
    if "Credentials" in kind or kind in ("ProfileNotFound", "TokenRetrievalError"):
        return f"no credentials ({error}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, PermissionError):
        return f"access denied ({error}); let these credentials list, read, write and delete there, or use others"
    if "Connect" in kind:
        return f"cannot be reached ({error}); check the network, and AWS_ENDPOINT_URL if it is set"
    if code in ("NotImplemented", "501"):
        return f"the server knows no such operation ({error}); bring it up to date, or use another store"
    return f"{kind}: {error}"
