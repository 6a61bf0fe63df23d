"""Weights that are no part of the repository: where they lie on this machine, are they sound, how to fetch them.

    Weights                                   one entry of `weights(settings)`, which a class that loads weights offers;
                                              `pift doctor` and a launch ask for it
    find(path, revision, name)                the file in a folder or in the hub's cache; never a download. `require`
                                              raises OSError where it is not there
    fetch_command(path, revision, names)      "hf download ..."
    verify(file, sha256, again)               raises OSError for a file that is not what it should be

`path` is a folder, there or not, or a hub id (owner/name); `revision` is a hub id's commit, null for its main branch.
What a file's SHA-256 should be is known from, in this order: the setting `sha256`; the hub's cache, whose file is a
link to blobs/<SHA-256> where it is a large one; a file beside it, `<name>.sha256`, as sha256sum writes it.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workers.spec import locate
from workers.store import sha256

if TYPE_CHECKING:
    from workers.spec import TrialSpec

SHA256 = re.compile(r"[0-9a-f]{64}")


class Weights(NamedTuple):
    """One thing that has to be there before a trial can run."""

    what: str
    """What it is and where it was looked for."""
    present: bool
    fetch: str
    """The command that fetches it, or what to do."""


# ---- where they lie


def is_local(path: str) -> bool:
    """Whether `path` names a folder, there or not, and no hub id."""
    return path.startswith(("/", ".", "~")) or Path(path).is_dir()


def find(path: str, revision: str | None, name: str) -> Path | None:
    """The file `name` of a folder or of a hub id in the local cache; None where it is not there. Asks no network."""
    if is_local(path):
        file = Path(path).expanduser() / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def require(path: str, revision: str | None, name: str, fetch: str) -> Path:
    """`find`, or FileNotFoundError with the command that fetches the file."""
    file = find(path, revision, name)
    if file is None:
        raise FileNotFoundError(f"{name} is not in {place(path)}; on a machine with a network: {fetch}")
    return file


def place(path: str) -> str:
    """Where `find` looks, for people: "the folder weights/mine", "owner/name in the hub's cache"."""
    return f"the folder {Path(path).expanduser()}" if is_local(path) else f"{path} in the hub's cache"


def fetch_command(path: str, revision: str | None, names: Sequence[str], folder: str | None = None) -> str:
    """The command that puts files of a hub id into the local cache, or into `folder`, and no more."""
    pinned = f" --revision {revision}" if revision else ""
    there = f" --local-dir {shlex.quote(str(Path(folder).expanduser()))}" if folder else ""
    return f"hf download {path} {' '.join(names)}{pinned}{there}"


def fingerprint(path: str, revision: str | None, name: str) -> str:
    """What a file of weights is, for a trial's key: the pinned revision of a hub id, cached or not; else the digest of
    the file. Raises OSError where a folder lacks it."""
    local = is_local(path)
    file = find(path, revision, name)
    if local and file is None:
        raise FileNotFoundError(f"{place(path)} has no {name}")
    if file is None or (revision and not local):
        return f"revision:{revision}"
    blob = None if local else _blob(file)
    return f"sha256:{(blob or digest(file))[:16]}"


# ---- whether they are sound


def digest(file: Path) -> str:
    """Hex SHA-256 of a file, computed once in a process for as long as its size and time stay."""
    state = file.stat()
    return _digest(file.resolve(), state.st_size, state.st_mtime_ns)


@functools.lru_cache
def _digest(file: Path, size: int, time: int) -> str:
    return sha256(file)


def expected(file: Path, given: str | None) -> tuple[str, str] | None:
    """(hex SHA-256 that a file should have, who says so), None where nobody does. Raises OSError for a `.sha256` file
    that holds none."""
    if given is not None:
        return given.lower(), "the setting sha256"
    if (blob := _blob(file)) is not None:
        return blob, "the hub's cache"
    note = file.with_name(f"{file.name}.sha256")
    if not note.is_file():
        return None
    first = (note.read_text(encoding="utf-8", errors="replace").split() or [""])[0].lower()
    if not SHA256.fullmatch(first):
        raise OSError(f"{note} holds no SHA-256; write it with sha256sum, or remove it")
    return first, str(note)


def _blob(file: Path) -> str | None:
    """The SHA-256 by which the hub's cache calls a large file (small ones go by git's shorter hash)."""
    target = file.resolve()
    return target.name if target.parent.name == "blobs" and SHA256.fullmatch(target.name) else None


def verify(file: Path, given: str | None, again: str) -> None:
    """Compare a file with what is known of it (see the module); `again`: the command that fetches it. Raises OSError
    where they differ; where nothing is known, nothing is read."""
    known = expected(file, given)
    if known is None:
        return
    should, who = known
    if (found := digest(file)) != should:
        mend = "correct the setting, or " if given is not None else ""
        raise OSError(
            f"{file} is not what it should be: its SHA-256 is {found}, expected {should} ({who}); {mend}fetch it "
            f"again: {again} --force-download"
        )


# ---- the settings that say so


def places_of(spec: TrialSpec, component: type) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("reward" or "judge", its settings) wherever a trial has a component of this class."""
    for field in ("reward", "judge"):
        settings = getattr(spec, field)
        with suppress(ImportError, AttributeError, ValueError, KeyError, TypeError):  # its own check says so
            if settings is not None and locate(settings["_target_"]) is component:
                yield field, settings


def path_problems(field: str, value: Any, names: Sequence[str], example: str) -> list[str]:
    """What keeps the setting `field` from being a folder with these files or a hub id. A hub id that is not in the
    cache is no problem of a spec, whose machine may be another one."""
    if not isinstance(value, str) or not value.strip():
        return [f"{field}={value!r} is no folder and no hub id; write {field}={example} or a folder"]
    if is_local(value):
        lost = [name for name in names if find(value, None, name) is None]
        if not lost:
            return []
        there = Path(value).expanduser().is_dir()
        reason = f"is a folder without {', '.join(lost)}" if there else "is not there"
        return [f"{field}={value!r} {reason}; write {field}={example} or a folder that holds {', '.join(names)}"]
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError:
        return [f"{field}={value!r} is neither a folder nor a hub id (owner/name); write {field}={example}"]
    return []


def pin_problems(field: str, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings revision and sha256 of the component `field`."""
    found = []
    revision, digits = settings.get("revision"), settings.get("sha256")
    if revision is not None and not isinstance(revision, str):
        found.append(f"{field}.revision={revision!r} is no commit; quote it: {field}.revision=\"'{revision}'\"")
    if digits is not None and not (isinstance(digits, str) and SHA256.fullmatch(digits.lower())):
        found.append(
            f"{field}.sha256={digits!r} is no SHA-256; write the 64 hex digits that sha256sum prints, or null"
        )
    return found
