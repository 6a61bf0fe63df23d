"""`pift sample`: pictures from a trained adapter beside the pre-trained model, on the same noise.

What: `sample(store, key, n, out)` finds the trial by a unique beginning of its key, and lets workers/sample.py draw:
out/base.png, out/tuned.png (strips of n pictures) and out/side_by_side.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.ledger import Store, problems, state
from workers.store import Damaged, TrialFolder, read_json


def find_trial(store: Store, key: str) -> TrialFolder:
    """The trial whose key begins with `key`. Raises UserError where there is none, or more than one."""
    names = sorted(path.parent.name for path in (store.root / "trials").glob("*/spec.json"))
    found = [name for name in names if key and name.startswith(key)]
    if key in found:
        found = [key]
    if len(found) == 1:
        return store.trial(found[0])
    if found:
        some = ", ".join(found[:6]) + (" ..." if len(found) > 6 else "")
        raise UserError(f"key={key} begins {len(found)} trials ({some}); write more of it")
    if not names:
        raise UserError(f"store={store} has no trials yet; run `pift launch` first, or name another store=FOLDER")
    raise UserError(f"key={key!r} is no trial in store={store}; `pift status` lists the keys, the first digits do")


def sample(store: Store, key: str, n: int, out: Path, device: str = "cpu", at: str = "end") -> list[Path]:
    """Draw `n` pictures before and after training on the same noise; returns the files written into `out`.

    `at`: "end" (the saved adapter), "best" (the checkpoint with the largest J) or the step of a kept checkpoint.
    Raises UserError for a key that names no or several trials, nothing to draw from, a damaged file, or n < 1.
    """
    if n < 1:
        raise UserError(f"n={n} is not a number of pictures; write for example --n 8")
    folder = find_trial(store, key)
    store.fetch(folder.root.name, "adapter" if at == "end" else "checkpoints")
    tuned_by = _saved(folder) if at == "end" else _checkpoint(folder, at)
    from workers.sample import write
    from workers.spec import locate

    spec = _spec(folder)
    if not locate(spec["model"]["_target_"]).pictures:
        raise UserError(f"key={folder.root.name} is a trial of model={spec['model']['name']}, which draws no pictures")
    try:
        return write(spec, tuned_by, n, Path(out), device)
    except Damaged as error:
        raise UserError(f"{error}; the launch of its sweep, given again, sets it right") from None


def _spec(folder: TrialFolder) -> dict[str, Any]:
    try:
        return read_json(folder.spec) or {}
    except ValueError:
        raise UserError(f"{folder.spec} is damaged; the launch of its sweep, given again, writes it anew") from None


def _saved(folder: TrialFolder) -> Path:
    """The adapter folder of a finished trial, compared with its checksums."""
    if not any(folder.adapter.glob("*.safetensors")):
        raise UserError(
            f"key={folder.root.name} has no adapter yet (state: {state(folder)}); "
            "it is written when the trial is done: launch its sweep again, or draw from a checkpoint: --at best"
        )
    for problem in problems(folder):
        if problem.path.parent == folder.adapter:
            raise UserError(f"{problem}; the launch of its sweep, given again, writes it anew from its checkpoint")
    return folder.adapter


def _checkpoint(folder: TrialFolder, at: str) -> Any:
    """One of the kept checkpoints."""
    from workers import checkpoint

    kept = checkpoint.listed(folder)
    steps = ", ".join(str(found.step) for found in reversed(kept)) or "none"
    if at == "best":
        if (best := checkpoint.best(folder)) is None:
            raise UserError(f"--at best: key={folder.root.name} has no checkpoint of an evaluation yet; kept: {steps}")
        return best
    found = [one for one in kept if str(one.step) == at]
    if not found:
        raise UserError(f"--at {at}: key={folder.root.name} keeps checkpoints at {steps}; also: --at end, --at best")
    return found[0]
