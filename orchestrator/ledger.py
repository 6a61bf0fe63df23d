"""The store as the driver sees it: folders of trials and sweeps, and the state of each trial.

    store/
        id                  a random name of this store (tells two stores apart on one MLflow server)
        trials/<key>/       see workers/store.py; the driver adds attempt.json, mlflow.json and failures/
        sweeps/<name>/      plan.json, mlflow.json, report/, and `stop` while a stop is asked for
        mlflow.db, mlartifacts/   the default MLflow store: a view of the journals, which can be rebuilt

A state is derived from the files and never written down, so it cannot disagree with them:

    done       DONE.json is there
    diverged   FAILED.json of class "diverged"
    failed     FAILED.json of any other class
    running    running.json beat less than 60 s ago and, on this host, its process lives
    stale      running.json of a process that died without a word; a launch continues the trial
    resumable  stopped in order: a checkpoint or a journal, and nobody at work
    new        none of these
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from workers.store import TrialFolder, read_json, write_json, write_text

FRESH_SECONDS = 60.0
"""A heartbeat older than this belongs to a process that is no more (it beats every second)."""

FINAL = ("done", "failed", "diverged")
"""The states that a launch leaves alone."""


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

    @property
    def stop(self) -> Path:
        """While this file exists, every trial of the sweep writes a checkpoint and stops, on whichever machine."""
        return self.root / "stop"


@dataclass(frozen=True)
class Store:
    """The folder that holds all trials and sweeps."""

    root: Path

    def __init__(self, root: str | Path) -> None:
        object.__setattr__(self, "root", Path(root).expanduser().absolute())

    def trial(self, key: str) -> TrialFolder:
        return TrialFolder(self.root / "trials" / key)

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.root / "sweeps" / name)

    def sweeps(self) -> list[str]:
        """The names of the planned sweeps, newest plan last."""
        plans = sorted(self.root.glob("sweeps/*/plan.json"), key=lambda path: path.stat().st_mtime)
        return [plan.parent.name for plan in plans]

    def check_writable(self) -> None:
        """Raises UserError when a file cannot be written here. Leaves nothing behind, not even the folder."""
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as stream:
                stream.write(b"x")
                stream.flush()
        except OSError as error:
            raise UserError(
                f"store={self.root} cannot be written: {error.strerror or error}; "
                "name a folder you may write to, as in store=results"
            ) from error
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @property
    def id(self) -> str:
        """This store's name, drawn on first use."""
        path = self.root / "id"
        if not path.exists():
            write_text(path, secrets.token_hex(8) + "\n")
        return path.read_text(encoding="utf-8").strip()


def attempt_file(folder: TrialFolder) -> Path:
    """{"attempt": n}: how often the trial has been started."""
    return folder.root / "attempt.json"


def mlflow_file(folder: TrialFolder) -> Path:
    """{tracking: {"experiment_id", "run_id", "offset", ...}}: the trial's run and how much of the journal it has."""
    return folder.root / "mlflow.json"


def state(folder: TrialFolder) -> str:
    """The state of a trial, from its files (see the top of this file)."""
    if folder.done.exists():
        return "done"
    if folder.failed.exists():
        failure = _read(folder.failed)
        return "diverged" if failure.get("class") == "diverged" else "failed"
    beat = _read(folder.running)
    if beat:
        return "running" if alive(beat) else "stale"
    if folder.checkpoint.exists() or (folder.journal.exists() and folder.journal.stat().st_size):
        return "resumable"
    return "new"


def detail(folder: TrialFolder) -> dict[str, Any]:
    """{"step", "steps", "class", "message"} of a trial; step is None where nothing was measured."""
    spec, beat = _read(folder.spec), _read(folder.running)
    done, failure = _read(folder.done), _read(folder.failed)
    steps = done.get("steps") or beat.get("steps") or spec.get("train", {}).get("gradient_steps")
    step = steps if done else failure.get("step", beat.get("step"))
    if step is None:
        step = last_step(folder.journal)
    return {"step": step, "steps": steps, "class": failure.get("class"), "message": failure.get("message")}


def alive(beat: Mapping[str, Any], now: float | None = None) -> bool:
    """True when the process that wrote this running.json is still at work, as far as one can tell from here."""
    if (time.time() if now is None else now) - float(beat.get("beat", 0)) > FRESH_SECONDS:
        return False
    if beat.get("host") != socket.gethostname():
        return True
    return _lives(int(beat.get("pid", 0)))


def last_step(journal: Path) -> int | None:
    """The step of a journal's last whole record, read from the file's end."""
    try:
        with journal.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - (1 << 16)))
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError):
            return int(json.loads(line)["step"])
    return None


def fail(folder: TrialFolder, key: str, kind: str, message: str, traceback: str = "") -> None:
    """Write FAILED.json for a trial that could not do so itself, unless it has a result already."""
    if folder.done.exists() or folder.failed.exists():
        return
    step = detail(folder)["step"] or 0
    failure = {"key": key, "class": kind, "message": message, "traceback": traceback, "step": step}
    write_json(folder.failed, failure | {"failed_at": time.time()})
    folder.running.unlink(missing_ok=True)


def forgive(folder: TrialFolder) -> None:
    """Let a failed trial run again: FAILED.json moves to failures/. It continues from its checkpoint, except after
    a bug or a storage failure, which may be in the checkpoint: then it starts over and recomputes silently up to
    the last journaled step."""
    failure = _read(folder.failed)
    attempt = int(_read(attempt_file(folder)).get("attempt", 1))
    (folder.root / "failures").mkdir(exist_ok=True)
    os.replace(folder.failed, folder.root / "failures" / f"attempt_{attempt}.json")
    if failure.get("class") in ("bug", "storage"):
        folder.checkpoint.unlink(missing_ok=True)


class Tail:
    """Reads what was appended to a journal since the last call; whole lines only, each byte once."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def read(self, limit: int = 1 << 20) -> list[tuple[dict[str, Any], int]]:
        """New records, each with the offset just behind it; at most about `limit` bytes, so call until empty.

        A journal shorter than the offset was begun anew and is read from its start.
        """
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self.offset:
                    self.offset = 0
                stream.seek(self.offset)
                block = stream.read(limit)
                if len(block) == limit and b"\n" not in block:
                    block += stream.readline()
        except FileNotFoundError:
            return []
        records = []
        for line in block.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self.offset += len(line)
            records.append((json.loads(line), self.offset))
        return records


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty when the file is absent or half a file from another program."""
    try:
        value = read_json(path)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _lives(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie is a process that died
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
