"""Where a trial's files lie, and how they are written: whole or not at all, with a checksum, damage told apart.

    store/trials/<key>/
        spec.json                     the resolved TrialSpec
        journal.jsonl                 append-only records, see workers/recorder.py
        attempts/0001.json            one per attempt: who worked here, since when, how it ended (workers/lease.py)
        checkpoints/step_000050.pt    everything a resumed run needs (torch, weights_only)
        checkpoints/step_000050.json  its checksum, written after it (workers/checkpoint.py)
        pictures/step_000040.png      the evaluation pictures on the fixed noise, one strip
        adapter/                      pytorch_lora_weights.safetensors, diffusers' LoRA format
        DONE.json                     written last on success: final metrics, duration, checksums
        FAILED.json                   written last on failure: class, message, traceback, step
        damaged/                      what was found damaged, moved out of the way and kept

One class owns every path; every file goes through a temporary name and os.replace. A *record* is a JSON file that holds
its own checksum, so that a torn or altered one is never taken for a sound one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRC = "crc32"
"""The name of a record's checksum."""


class Damaged(ValueError):
    """A file is there and is not what was written: torn, altered, or from another program."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path} is damaged: {problem}")


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step; `durable`: on the disk first.

    Raises OSError when the folder cannot be written; the temporary file is removed then.
    """
    handle, name = _temporary(path)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _temporary(path: Path) -> tuple[int, str]:
    """A file beside `path`, open, and its name; the folder is made where it is missing, again if it goes meanwhile (a
    launch that only tried whether it may write takes away the folder that it made for that)."""
    for last in (False, False, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        except FileNotFoundError:
            if last:
                raise
    raise AssertionError("the last try raises")


def try_to_write(folder: Path) -> None:
    """Raises OSError where no file of a block can be written; leaves nothing but the folder behind."""
    handle, name = _temporary(folder / "try")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(bytes(4096))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def create_whole(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless it is there already: of any number of writers, on any machines that share the
    folder, exactly one is told True. The file appears with its content."""
    handle, name = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        _to_disk(Path(name))
        _link(Path(name), path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    return True


def _link(source: Path, target: Path) -> None:
    """Give a file a second name that must be free. Where the file system has no second names, the target is created
    empty and then filled: a reader in between finds it damaged."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with target.open("xb") as stream:
            stream.write(source.read_bytes())


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), durable=durable)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in `path`, or None where there is no such file. Raises ValueError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def record_text(content: Mapping[str, Any]) -> str:
    """A record as text: JSON with its checksum as the last entry."""
    plain = {name: value for name, value in content.items() if name != CRC}
    return json.dumps(plain | {CRC: _crc(plain)}, indent=1, allow_nan=False) + "\n"


def parse_record(text: bytes | str, path: Path) -> dict[str, Any]:
    """The content of a record. Raises Damaged; `path` is for the message."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Damaged(path, "it is not whole JSON") from error
    if not isinstance(content, dict) or content.pop(CRC, None) != _crc(content):
        raise Damaged(path, "its checksum does not fit its content")
    return content


def write_record(path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a mapping as a record, whole or not at all."""
    write_text(path, record_text(content), durable=durable)


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a record, None where there is no such file. Raises Damaged."""
    try:
        return parse_record(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def sound_record(path: Path) -> dict[str, Any]:
    """The content of a record; empty where there is none, or none that is sound."""
    try:
        return read_record(path) or {}
    except (Damaged, OSError):
        return {}


def _crc(content: Mapping[str, Any]) -> str:
    """Of what is said, not of how it is laid out."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file, as DONE.json and the checkpoints' manifests keep it."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


@dataclass(frozen=True)
class TrialFolder:
    """The paths of one trial; `root` is store/trials/<key>."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}.pt"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def done(self) -> Path:
        return self.root / "DONE.json"

    @property
    def failed(self) -> Path:
        return self.root / "FAILED.json"

    def picture(self, step: int) -> Path:
        return self.root / "pictures" / f"step_{step:06d}.png"

    def set_aside(self, path: Path) -> Path | None:
        """Move a damaged file to damaged/, under a name that is free; None where it is gone already."""
        return _aside(path, self.root / "damaged", os.replace)

    def copy_aside(self, path: Path) -> Path | None:
        """Keep a copy of a damaged file in damaged/, for what is about to be cut back to its sound part."""
        return _aside(path, self.root / "damaged", lambda source, target: target.write_bytes(source.read_bytes()))


def _aside(path: Path, folder: Path, put: Callable[[Path, Path], object]) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        target = folder / f"{path.name}.{number}"
        if not target.exists():
            try:
                put(path, target)
            except FileNotFoundError:
                return None
            except OSError:  # a full disk: half a copy is none
                target.unlink(missing_ok=True)
                raise
            return target
    return None


def forgive(folder: TrialFolder) -> None:
    """Let a failed trial run again: FAILED.json moves to failures/. It continues from its newest checkpoint."""
    if not folder.failed.exists():
        return
    (folder.root / "failures").mkdir(exist_ok=True)
    number = len(list((folder.root / "failures").iterdir())) + 1
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder.failed, folder.root / "failures" / f"{number:04d}.json")


def sound_picture(path: Path) -> bool:
    """Whether a picture is there and whole: a PNG holds the checksums of its parts."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
