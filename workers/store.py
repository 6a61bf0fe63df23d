"""Where a trial's files lie, and how they are written: whole or not at all.

    store/trials/<key>/
        spec.json         the resolved TrialSpec
        journal.jsonl     append-only records: {"time", "step", "metrics", "samples"?, "pictures"?}
        running.json      heartbeat of the process at work: {"pid", "host", "started", "beat", "step", "attempt"}
        checkpoint.pt     everything a resumed run needs (torch, weights_only)
        pictures/         step_000040.png: the evaluation pictures on the fixed noise, one strip
        adapter/          pytorch_lora_weights.safetensors, diffusers' LoRA format
        DONE.json         written last on success: final metrics, duration, checksums
        FAILED.json       written last on failure: class, message, traceback, step

One class owns every path; every file goes through a temporary name and os.replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Raises OSError when the folder cannot be written; the temporary file is removed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    def running(self) -> Path:
        return self.root / "running.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pt"

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
