"""Checkpoints: the last two and the best are kept, a damaged or a premature one is never resumed from, and what was
found damaged is kept aside. Small states where the rules are the point, real trials where the bits are."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import quick_trial as quick
from workers import checkpoint
from workers.checkpoint import best, listed, manifest, newest, save
from workers.run import run_trial
from workers.store import Damaged, TrialFolder, read_record, seal, write_record


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    return TrialFolder(tmp_path / "trial")


def state(step: int) -> dict[str, Any]:
    return {"step": step, "values": torch.arange(4.0) + step}


def steps(folder: TrialFolder) -> list[int]:
    return [found.step for found in listed(folder)]


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("objectives", "kept"),
    [
        ([None] * 5, [[1], [2, 1], [3, 2], [4, 3], [5, 4]]),
        ([9.0, None, 1.0, None, 2.0], [[1], [2, 1], [3, 2, 1], [4, 3, 1], [5, 4, 1]]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [[1], [2, 1], [3, 2], [4, 3], [5, 4]]),
        ([-3.0, -1.0, -2.0, -4.0, -5.0], [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2]]),
        ([2.0, 2.0, 1.0, 1.0, 1.0], [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2]]),
        ([0.0, -1.0, None, None, None], [[1], [2, 1], [3, 2, 1], [4, 3, 1], [5, 4, 1]]),
    ],
)
def test_the_last_two_and_the_best_are_kept(
    folder: TrialFolder, objectives: list[float | None], kept: list[list[int]]
) -> None:
    """Best is the largest J, negative or zero ones too, the newest among equals. Kills: the smallest J; a J of 0 taken
    for none; an unrated one taken for the best; one half of a checkpoint that stays without the other."""
    for step, (objective, expected) in enumerate(zip(objectives, kept, strict=True), 1):
        save(folder, step, state(step), objective)
        assert steps(folder) == expected
        files = [f"step_{n:06d}.{kind}" for n in expected for kind in ("json", "pt")]
        assert names(folder.checkpoints) == sorted(files)
    rated = [found for found in listed(folder) if found.objective is not None]
    assert best(folder) == max(rated, key=lambda found: (found.objective, found.step), default=None)
    for found in listed(folder):
        assert found.load()["step"] == found.step and torch.equal(found.load()["values"], state(found.step)["values"])
        assert read_record(manifest(found.path)) == {"step": found.step, **seal(found.path)} | {
            "objective": found.objective
        }


def test_a_checkpoint_is_there_before_the_older_ones_go(folder: TrialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment, a trial has one to resume from. Kills: making room first; the manifest before the file."""
    for step in (1, 2):
        save(folder, step, state(step), None)
    for name in ("write_whole", "write_record"):

        def die(*_: object, **__: object) -> None:
            raise OSError("the disk went away")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, die)
            with pytest.raises(OSError, match="went away"):
                save(folder, 3, state(3), None)
        assert steps(folder) == [2, 1] and [found.load()["step"] for found in listed(folder)] == [2, 1]
    found, problems = newest(folder, 3, "cpu")
    assert found["step"] == 2 and problems == [f"{folder.checkpoint(3)} is damaged: it has no sound manifest beside it"]


# ---------------------------------------------------------------------------------------------- which one is taken


def test_one_ahead_of_the_journal_is_neither_used_nor_deleted(folder: TrialFolder) -> None:
    """What the journal lost is computed again, up to it; then the rules hold for it too. Kills: the newest whatever the
    journal says; pruning by number of files."""
    for step in (2, 4, 6):
        save(folder, step, state(step), None)
    assert steps(folder) == [6, 4]
    assert newest(folder, 5, "cpu")[0]["step"] == 4
    assert newest(folder, 4, "cpu")[0]["step"] == 4
    assert newest(folder, 3, "cpu") == (None, []) and newest(folder, -1, "cpu") == (None, [])
    assert steps(folder) == [6, 4] and names(folder.root) == ["checkpoints"]
    for step in (1, 2, 3):
        save(folder, step, state(step), None)
    assert steps(folder) == [6, 4, 3, 2]
    save(folder, 6, state(6), None)
    assert steps(folder) == [6, 4]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut": (".pt", cut, "were written"),
    "flipped": (".pt", flip, "its checksum is not that of its manifest"),
    "empty": (".pt", empty, "it has 0 bytes"),
    "gone": (".pt", Path.unlink, "it is gone, its manifest is not"),
    "manifest cut": (".json", cut, "it has no sound manifest beside it"),
    "manifest flipped": (".json", flip, "it has no sound manifest beside it"),
    "manifest gone": (".json", Path.unlink, "it has no sound manifest beside it"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_moved_aside_and_the_one_before_it_taken(folder: TrialFolder, case: str) -> None:
    """Kills: loading without the checksum; deleting what is damaged; giving up; a second look that tells it again."""
    suffix, damage, problem = DAMAGE[case]
    for step in (1, 2, 3):
        save(folder, step, state(step), 9.0 if step == 1 else None)
    path = folder.checkpoint(3)
    before = {name: (folder.checkpoints / name).read_bytes() for name in names(folder.checkpoints)}
    damage(path.with_suffix(suffix))
    contents = {file.name: file.read_bytes() for file in (path, manifest(path)) if file.exists()}
    found, problems = newest(folder, 9, "cpu")
    assert found["step"] == 2
    (told,) = problems
    assert told.startswith(f"{path} is damaged: ") and problem in told
    aside = {name: (folder.root / "damaged" / name).read_bytes() for name in names(folder.root / "damaged")}
    assert aside == {f"{name}.1": content for name, content in contents.items()}
    assert {name: (folder.checkpoints / name).read_bytes() for name in names(folder.checkpoints)} == {
        name: content for name, content in before.items() if "3" not in name
    }
    assert newest(folder, 9, "cpu")[1] == []


def test_the_same_damage_twice_is_kept_twice(folder: TrialFolder) -> None:
    """Kills: the second one written over the first."""
    for content in (b"first", b"second"):
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        folder.checkpoint(3).write_bytes(content)
        assert newest(folder, 9, "cpu")[0] is None
    aside = folder.root / "damaged"
    assert [(aside / name).read_bytes() for name in names(aside)] == [b"first", b"second"]


def test_all_damaged_means_from_the_start(folder: TrialFolder) -> None:
    for step in (1, 2):
        save(folder, step, state(step), None)
        flip(folder.checkpoint(step))
    found, problems = newest(folder, 9, "cpu")
    assert found is None and len(problems) == 2
    assert len(names(folder.root / "damaged")) == 4 and names(folder.checkpoints) == []


def test_leftovers_of_a_killed_process_go(folder: TrialFolder) -> None:
    """Kills: a temporary file taken for a checkpoint; leftovers that pile up until the disk is full."""
    save(folder, 1, state(1), None)
    for name in (".step_000002.pt.x1y2", ".step_000002.json.abcd"):
        (folder.checkpoints / name).write_bytes(b"half")
    assert newest(folder, 9, "cpu")[0]["step"] == 1
    assert names(folder.checkpoints) == ["step_000001.json", "step_000001.pt"]


# --------------------------------------------------------------------------------------------- nothing is executed


class Bomb:
    """A pickle that would leave a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("saved_with", ["torch", "pickle"])
def test_code_in_the_place_of_a_checkpoint_is_not_run(folder: TrialFolder, tmp_path: Path, saved_with: str) -> None:
    """Its checksum does not fit; and with a manifest forged to fit torch refuses it, and the one before it is taken.
    Kills: weights_only=False; loading before the checksum is known."""
    mark = tmp_path / "mark"
    for step in (1, 2):
        save(folder, step, state(step), None)
    path = folder.checkpoint(2)

    def plant() -> None:
        if saved_with == "torch":
            torch.save({"step": 2, "adapter": Bomb(mark)}, path)
        else:
            path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))

    plant()
    forged = checkpoint.Checkpoint(path, 2, seal(path)["sha256"], seal(path)["bytes"], None)
    with pytest.raises(Damaged, match="torch cannot read it"):
        forged.load()
    with pytest.raises(Damaged):
        next(found for found in listed(folder) if found.step == 2).load()
    assert newest(folder, 9, "cpu")[0]["step"] == 1
    plant()
    write_record(manifest(path), {"step": 2, **seal(path), "objective": None})
    found, problems = newest(folder, 9, "cpu")
    assert found is not None and found["step"] == 1 and "torch cannot read it" in problems[0]
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is none"


# -------------------------------------------------------------------------------------------------------- real trials


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrialFolder:
    quick.behave()
    folder = TrialFolder(tmp_path_factory.mktemp("undisturbed"))
    assert run_trial(quick.spec(), folder.root).state == "done"
    return folder


def stopped_at(folder: TrialFolder, step: int) -> None:
    calls = iter(range(1, 100))
    quick.behave()
    outcome = run_trial(quick.spec(), folder.root, should_stop=lambda: next(calls) == step)
    assert (outcome.state, outcome.step) == ("stopped", step)


@pytest.mark.parametrize("damaged_at", [(), (5,), (5, 4), (5, 4, 2)])
def test_a_trial_goes_on_from_the_newest_sound_one(
    folder: TrialFolder, undisturbed: TrialFolder, damaged_at: tuple[int, ...]
) -> None:
    """Checkpoints at 2, 4 (evaluated) and at the stop, 5. Kills: a journal that repeats what it holds; warnings that
    name no file; anything of a state that is not put back."""
    stopped_at(folder, 5)
    assert steps(folder) == [5, 4]
    for step in set(damaged_at) & set(steps(folder)):
        flip(folder.checkpoint(step))
    assert run_trial(quick.spec(), folder.root).state == "done"
    quick.assert_same(undisturbed, folder)
    warnings = read_record(folder.done)["warnings"]
    assert len(warnings) == len(set(damaged_at) & {4, 5}) and all("moved to damaged/" in text for text in warnings)


def test_a_journal_that_lost_its_end_is_filled_again(folder: TrialFolder, undisturbed: TrialFolder) -> None:
    """The checkpoint at 5 is ahead of a journal cut back to 4: the one at 4 it is. Kills: resuming ahead, which would
    leave a hole in the journal."""
    stopped_at(folder, 5)
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    for keep, taken in ((5, 4), (3, 0)):
        folder.journal.write_bytes(b"".join(lines[:keep]))
        ahead = [found.path for found in listed(folder) if found.step > keep - 1]
        state, problems = newest(folder, keep - 1, "cpu")
        assert (0 if state is None else state["step"]) == taken and problems == []
        assert ahead and all(path.exists() for path in ahead)
    assert run_trial(quick.spec(), folder.root).state == "done"
    quick.assert_same(undisturbed, folder)
    assert read_record(folder.done)["warnings"] == [] and not (folder.root / "damaged").exists()


def test_a_trial_that_only_gets_worse_keeps_its_first_evaluation(folder: TrialFolder) -> None:
    """J at steps 4 and 8 decides, step 0 is no checkpoint. Kills: rating by the training reward; a best that is
    forgotten at a resume."""
    quick.behave(lambda call, values: values - 0.01 * call)
    spec = quick.spec(train__gradient_steps=16, method__lr=1e-6)
    for _ in range(3):
        run_trial(spec, folder.root, should_stop=lambda: steps(folder)[:1] in ([6], [10]))
    assert read_record(folder.done)["steps"] == 16
    assert steps(folder) == [16, 14, 4] and best(folder).step == 4
    rated = {r["step"]: r["metrics"]["eval/objective"] for r in quick.timeless(folder.journal) if "samples" in r}
    assert best(folder).objective == rated[4] and rated[4] > rated[8] > rated[12] > rated[16]
