"""A store whose disk is full in the middle of a launch: a clear error, honest states, and the same launch finishes once
there is space, to the same bits. Real trials (tests/quick_trial.py) on a small disk in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ledger
from orchestrator.cli import main
from orchestrator.errors import UserError
from orchestrator.launch import launch
from orchestrator.ledger import Store
from tests import quick_trial as quick
from workers.recorder import scan
from workers.spec import TrialSpec
from workers.store import TrialFolder, read_record

pytestmark = pytest.mark.chaos
SPECS = [quick.spec(steps=40, seed=seed) for seed in range(3)]
KEYS = [TrialSpec.from_dict(spec).key for spec in SPECS]
CALLS = 51
"""Of the reward in one trial: 40 steps and 11 evaluations."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("orchestrator.launch._compare", lambda *_: None)
    monkeypatch.setattr("orchestrator.monitor.LOOK_SECONDS", 0.05)
    quick.behave()
    yield
    quick.behave()


def sweep(store: Path, seconds: float = 0.3) -> Any:
    return quick.plan(store, *SPECS, limits={"storage_seconds": seconds, "reward_seconds": 60.0})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    quick.behave()
    assert launch(sweep(store)) == 0
    return store


def folders(store: Path) -> list[TrialFolder]:
    return [Store(store).trial(key) for key in KEYS]


def status(store: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What `pift status` says, on the full disk."""
    capsys.readouterr()
    assert main(["status", "--store", str(store), "--json"]) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return json.loads(said.out)["cells"]


def assert_finished(store: Path, undisturbed: Path) -> None:
    assert set(ledger.survey(Store(store), KEYS).values()) == {"done"}
    for one, two in zip(folders(undisturbed), folders(store), strict=True):
        quick.assert_same(one, two)
    assert Store(store).launches() == {} and not list(store.glob("launches/*.queue.json"))
    assert not [path for path in store.rglob(".*") if path.is_file()], "temporary files are left"


@pytest.mark.parametrize("call", [9, 2 * CALLS - 1], ids=["in the first trial", "at the end of the second"])
def test_a_disk_that_is_full_in_a_launch(tmp_path: Path, undisturbed: Path, capsys: Any, call: int) -> None:
    """Kills: trial after trial tried on the same full disk; a trial called failed or running; exit 0; a traceback for
    an error; a launch that cannot say that it has ended and is at work for ever."""

    def act(number: int, values: Any) -> Any:
        if number >= call:
            quick.fill(disk)
        return values

    with quick.small_disk(tmp_path / "disk", 1024) as disk:
        store = disk / "store"
        quick.behave(act)
        assert launch(sweep(store)) == 3
        said = capsys.readouterr().err
        assert "the store cannot be written: " in said and "No space left on device" in said
        assert str(store) in said and "Traceback" not in said and "the sweep stops" in said
        begun = 1 if call < CALLS else 2
        cells = {cell["key"]: cell for cell in status(store, capsys)}
        states = [cells[folder.root.name]["state"] for folder in folders(store)]
        order = sorted(states, key=["done", "resumable", "new"].index)
        assert order == ["done"] * (begun - 1) + ["resumable"] + ["new"] * (3 - begun)
        (stopped,) = [cell for cell in cells.values() if cell["state"] == "resumable"]
        assert stopped["class"] == "storage" and "No space left on device" in stopped["message"]
        trial = Store(store).trial(stopped["key"])
        assert scan(trial.journal).problem is None and not trial.done.exists() and not trial.failed.exists()
        assert quick.records_of(trial)[-1]["how"] == "storage"
        assert Store(store).launches() == {}

        quick.behave()
        quick.fill(disk)
        with pytest.raises(UserError, match=f"store={store} cannot be written: No space left on device.*free some"):
            launch(sweep(store))
        assert [cell["state"] for cell in status(store, capsys)] == [cells[key]["state"] for key in KEYS]

        (disk / "ballast").unlink()
        assert launch(sweep(store)) == 0
        assert_finished(store, undisturbed)
        assert read_record(trial.done)["attempt"] == 2


def test_a_disk_that_has_space_again_in_time(tmp_path: Path, undisturbed: Path, capsys: Any) -> None:
    """Full for a while in each trial, and nobody has to do anything. Kills: a launch that stops at the first error; a
    record written twice or not at all."""

    def act(number: int, values: Any) -> Any:
        within = (number - 1) % CALLS
        if 8 < within < 30:
            quick.fill(disk)
        elif within == 30:
            (disk / "ballast").unlink()
        return values

    with quick.small_disk(tmp_path / "disk", 1024) as disk:
        quick.behave(act)
        assert launch(sweep(disk / "store", seconds=60.0)) == 0
        said = capsys.readouterr().err
        assert "Traceback" not in said and "no checkpoint: [Errno 28] No space left on device" in said
        assert_finished(disk / "store", undisturbed)


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_disk_with_room_for_a_few_files(tmp_path: Path, undisturbed: Path, capsys: Any, pages: int) -> None:
    """Full after the check that the store can be written: at the plan, the launch's record, the queue, the attempt, the
    spec ... Kills: a traceback or a lease that stays, at whichever of them."""
    with quick.small_disk(tmp_path / "disk", 1024) as disk:
        store = disk / "store"
        quick.fill(disk, leave=pages)
        try:
            code: int | None = launch(sweep(store))
            told = capsys.readouterr().err
        except UserError as error:
            code, told = None, str(error)
        assert code in (None, 3) and "No space left on device" in told and str(store) in told, told
        assert "Traceback" not in told
        assert Store(store).launches() == {}
        assert set(ledger.survey(Store(store), KEYS).values()) <= {"new", "resumable"}
        (disk / "ballast").unlink()
        assert launch(sweep(store)) == 0
        assert_finished(store, undisturbed)
