"""Which code a run came from: git commit, uncommitted changes, and the hash of the locked versions."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from workers.store import sha256

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


@functools.cache
def provenance() -> dict[str, str]:
    """{"git.commit", "git.dirty", "lock.sha256"}; "unknown" in a wheel, which lies in no checkout."""
    return {**_git(ROOT), "lock.sha256": _lock()}


def _git(root: Path) -> dict[str, str]:
    top = _ask(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # an environment inside somebody's checkout is not this code
        return {"git.commit": UNKNOWN, "git.dirty": UNKNOWN}
    changes = _ask(root, "status", "--porcelain")
    return {
        "git.commit": _ask(root, "rev-parse", "--verify", "HEAD") or UNKNOWN,
        "git.dirty": UNKNOWN if changes is None else str(bool(changes)).lower(),
    }


def _ask(root: Path, *words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def lock_file() -> Path | None:
    """requirements.lock: in the checkout, or shipped inside the package."""
    places = (folder / "requirements.lock" for folder in (ROOT, ROOT / "orchestrator", ROOT / "conf"))
    return next((path for path in places if path.is_file()), None)


def _lock() -> str:
    path = lock_file()
    return UNKNOWN if path is None else sha256(path)
