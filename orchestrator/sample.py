"""`pift sample`: pictures from a trained adapter beside the pre-trained model, on the same noise.

What: `sample(store, key, n, out)` finds the trial by a unique beginning of its key, and lets workers/sample.py draw:
out/base.png, out/tuned.png (strips of n pictures) and out/side_by_side.png.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.ledger import Store, state
from workers.store import TrialFolder, read_json


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
        raise UserError(f"store={store.root} has no trials yet; run `pift launch` first, or name another store=FOLDER")
    raise UserError(f"key={key!r} is no trial in store={store.root}; `pift status` lists the keys, the first digits do")


def sample(store: Store, key: str, n: int, out: Path, device: str = "cpu") -> list[Path]:
    """Draw `n` pictures before and after training on the same noise; returns the files written into `out`.

    Raises UserError for a key that names no or several trials, a trial without an adapter, or n < 1.
    """
    if n < 1:
        raise UserError(f"n={n} is not a number of pictures; write for example --n 8")
    folder = find_trial(store, key)
    if not any(folder.adapter.glob("*.safetensors")):
        raise UserError(
            f"key={folder.root.name} has no adapter yet (state: {state(folder)}); "
            "it is written when the trial is done: launch its sweep again"
        )
    from workers.sample import write
    from workers.spec import locate

    spec = read_json(folder.spec) or {}
    if not locate(spec["model"]["_target_"]).pictures:
        raise UserError(f"key={folder.root.name} is a trial of model={spec['model']['name']}, which draws no pictures")
    return write(spec, folder.adapter, n, Path(out), device)
