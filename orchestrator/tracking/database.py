"""An MLflow database: one in a file is looked at, moved out of the way and locked here, without loading MLflow."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

from orchestrator.errors import UserError
from orchestrator.ledger import Store

CHECK_SECONDS = 5.0
"""A database that is not read through by then counts as sound."""
BESIDE = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database."""


def default_uri(store: Store) -> str:
    """The database in the store."""
    return f"sqlite:///{store.root / 'mlflow.db'}"


def file_of(uri: str) -> Path | None:
    """The file that an sqlite URI names; None for anything else."""
    if not uri.startswith("sqlite"):
        return None
    return Path(re.sub(r"^sqlite(\+\w+)?:///", "", uri).partition("?")[0]).absolute()


def lock_of(uri: str, store: Store) -> Path:
    """The lock file of those who write there: beside the database that is a file, else in the store."""
    path = file_of(uri)
    return store.root / ".mlflow.lock" if path is None else path.with_name(f".{path.name}.lock")


def damage(path: Path) -> str | None:
    """What is wrong with a database; None for a sound one, and where there is none."""
    if not path.exists():
        return None
    deadline = time.monotonic() + CHECK_SECONDS
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=1)) as connection:
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            found = [str(row[0]) for row in connection.execute("pragma quick_check(1)")]
    except sqlite3.OperationalError:  # out of time, or somebody is writing: no damage
        return None
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == ["ok"] else " ".join(found).replace("\n", " ")[:200]


def set_aside(path: Path) -> Path:
    """Move a damaged database to <name>.damaged.N, with what SQLite keeps beside it."""
    number = next(n for n in range(1, 100_000) if not path.with_name(f"{path.name}.damaged.{n}").exists())
    target = path.with_name(f"{path.name}.damaged.{number}")
    for end in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{end}", f"{target}{end}")
    os.replace(path, target)
    return target


def check_file(uri: str, path: Path, fix: str, named: str = "tracking.uri=") -> None:
    """Raises UserError when the database at `path` cannot be written or is damaged. `uri` was given as `named`."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{named}{uri!r}: cannot write {path}, or its folder does not exist; {fix}")
    if (found := damage(path)) is not None:
        raise UserError(
            f"the MLflow database {path} is damaged ({found}); nothing is lost, the journals hold every point: "
            "`pift doctor --fix` moves it out of the way and builds it anew from the store"
        )
