"""Checkpoints: everything a resumed trial needs, with a checksum, the last two and the best kept.

    checkpoints/step_000050.pt      torch.save of plain tensors and numbers (read with weights_only)
    checkpoints/step_000050.json    a record {"step", "sha256", "bytes", "objective"}, written after it

A checkpoint without its manifest, or with another content than its manifest says, does not count; the one before it is
taken instead. Nor does one that is ahead of the journal: what the journal lost is computed again. "Best" is the largest
eval/objective (J on the evaluation noise) among the checkpoints that were written at an evaluation.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.store import Damaged, TrialFolder, read_record, sha256, write_record, write_whole

KEEP_LAST = 2


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has a readable manifest."""

    path: Path
    step: int
    sha256: str
    bytes: int
    objective: float | None

    def check(self) -> None:
        """Raises Damaged when the file is not what was written."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise Damaged(self.path, "it is gone, its manifest is not") from None
        if size != self.bytes:
            raise Damaged(self.path, f"it has {size} bytes, {self.bytes} were written")
        if sha256(self.path) != self.sha256:
            raise Damaged(self.path, "its checksum is not that of its manifest")

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state that was saved. Raises Damaged."""
        self.check()
        try:
            return torch.load(self.path, map_location=device, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # its checksum fits, and it is not one of ours
            raise Damaged(self.path, f"torch cannot read it ({type(error).__name__})") from error


def save(folder: TrialFolder, step: int, state: dict[str, Any], objective: float | None) -> None:
    """Write the checkpoint of a step, then let those go that are neither among the last two nor the best."""
    path, content = folder.checkpoint(step), io.BytesIO()
    torch.save(state, content)  # to memory: what a full disk makes torch raise is no OSError
    data = content.getvalue()
    write_whole(path, lambda temporary: temporary.write_bytes(data))
    sealed = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_record(manifest(path), {"step": step, **sealed, "objective": objective})
    _prune(folder, step)


def manifest(path: Path) -> Path:
    return path.with_suffix(".json")


def listed(folder: TrialFolder) -> list[Checkpoint]:
    """The checkpoints with a sound manifest, newest first."""
    found = []
    for path in folder.checkpoints.glob("step_*.json"):
        try:
            content = read_record(path) or {}
            found.append(Checkpoint(path.with_suffix(".pt"), **content))
        except (Damaged, TypeError):
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def best(folder: TrialFolder) -> Checkpoint | None:
    """The checkpoint with the largest J."""
    rated = [checkpoint for checkpoint in listed(folder) if checkpoint.objective is not None]
    return max(rated, key=lambda checkpoint: (checkpoint.objective, checkpoint.step), default=None)


def damaged(folder: TrialFolder) -> Iterator[Damaged]:
    """What is wrong with a trial's checkpoints, each file read whole."""
    found = {checkpoint.path: checkpoint for checkpoint in listed(folder)}
    for path in sorted(folder.checkpoints.glob("step_*.pt")):
        if path not in found:
            yield Damaged(path, "it has no sound manifest beside it")
    for checkpoint in found.values():
        try:
            checkpoint.check()
        except Damaged as error:
            yield error


def newest(folder: TrialFolder, last_step: int, device: torch.device | str) -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest sound checkpoint that the journal (up to `last_step`) covers, None where there is none,
    and what was found damaged on the way to it; that is moved out of the way."""
    problems = []
    for leftover in folder.checkpoints.glob(".*"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    for error in list(damaged(folder)):
        problems.append(_set_aside(folder, error))
    for checkpoint in listed(folder):
        if checkpoint.step > last_step:
            continue
        try:
            return checkpoint.load(device), problems
        except Damaged as error:
            problems.append(_set_aside(folder, error))
    return None, problems


def _set_aside(folder: TrialFolder, error: Damaged) -> str:
    """Move a damaged checkpoint and its manifest out of the way; what was wrong with it."""
    for path in (error.path, manifest(error.path)):
        if path.exists():
            folder.set_aside(path)
    return str(error)


def _prune(folder: TrialFolder, step: int) -> None:
    """Those ahead of `step` are an earlier attempt's, whose journal was lost: they are left until they are passed."""
    found = [checkpoint for checkpoint in listed(folder) if checkpoint.step <= step]
    top = best(folder)
    for checkpoint in found[KEEP_LAST:]:
        if top is None or checkpoint.step != top.step:
            manifest(checkpoint.path).unlink(missing_ok=True)
            checkpoint.path.unlink(missing_ok=True)
