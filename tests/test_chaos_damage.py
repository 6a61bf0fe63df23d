"""Each kind of file in a store, cut off or altered at every 64th byte: the next launch repairs what can be repaired,
to the same bits, and deletes nothing that is sound.

A real sweep of three trials (tests/quick_trial.py): one is done, one was stopped in the middle, one has failed. Every
case damages a copy of its store, looks at it (`pift status`, at times `pift compare`) and launches it again, all in
this process. One launch takes a damaged file of each trial at once: they have nothing to do with one another.

PIFT_CHAOS=full tries all offsets of the large files, elsewhere a fixed choice of 24 has to do, and 4 of the blanks
that fill the record of an attempt.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ledger
from orchestrator.cli import main
from orchestrator.launch import launch
from orchestrator.ledger import Store
from tests import quick_trial as quick
from workers.spec import TrialSpec
from workers.store import TrialFolder, read_record

pytestmark = pytest.mark.chaos
FULL = os.environ.get("PIFT_CHAOS") == "full"
EVERY, LARGE, FEW = 64, 8192, 24

SPECS = [
    quick.spec(model="PictureModel", seed=0),
    quick.spec(model="PictureModel", seed=1, reward="Broken"),
    quick.spec(model="PictureModel", seed=2),
]
DONE, FAILED, STOPPED = (TrialSpec.from_dict(spec).key for spec in SPECS)
LIMITS = {"reward_retries": 0}


def sweep(store: Path) -> Any:
    return quick.plan(store, *SPECS, limits=LIMITS)


def folder(store: Path, key: str) -> TrialFolder:
    return Store(store).trial(key)


@dataclass(frozen=True)
class Stores:
    broken_off: Path
    """Stopped in the middle of the third trial."""
    finished: Path
    """Never disturbed."""


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """No report at the end of each launch (half a second; compare is called by itself here), no waiting for disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.launch._compare", lambda *_: None)
        patch.setattr("workers.lease.WRITING_SECONDS", 0.0)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, quickly: None) -> Stores:
    found = Stores(*(tmp_path_factory.mktemp("stores") / name for name in ("broken_off", "finished")))
    quick.behave()
    assert launch(sweep(found.finished)) == 3

    def stop(call: int, values: Any) -> Any:
        if call == 11 + 4:  # in the third step of the third trial; the second one's reward is not this one
            (record,) = Store(found.broken_off).launches()
            Store(found.broken_off).stop(record).touch()
        return values

    quick.behave(stop)
    assert launch(sweep(found.broken_off)) == 130
    quick.behave()
    states = ledger.survey(Store(found.broken_off), (DONE, FAILED, STOPPED))
    assert list(states.values()) == ["done", "failed", "resumable"]
    assert sorted(path.name for path in folder(found.broken_off, STOPPED).checkpoints.iterdir()) == [
        f"step_00000{step}.{kind}" for step in (2, 3) for kind in ("json", "pt")
    ]
    return found


# ---- damage


def cut(content: bytes, offset: int) -> bytes:
    return content[:offset]


def alter(content: bytes, offset: int) -> bytes:
    """Another byte, of a kind that depends on the place: a bit turned over, a zero, an end of a line, a quote ..."""
    other = (content[offset] ^ 1, 0, 0x0D, 0x0A, 0x22, 0xFF)[offset // EVERY % 6]
    other = other if other != content[offset] else content[offset] ^ 1
    return content[:offset] + bytes([other]) + content[offset + 1 :]


def says_the_same(one: bytes, two: bytes) -> bool:
    """Whether two records differ in nothing but their layout: a blank that became an end of a line harms nobody."""
    with contextlib.suppress(ValueError):
        return json.loads(one) == json.loads(two)
    return False


def offsets(content: bytes) -> list[int]:
    every = list(range(0, len(content), EVERY))
    if FULL:
        return every
    if len(content) > LARGE:
        return every[:: -(-len(every) // FEW)]
    written = len(content.rstrip())
    blank = [offset for offset in every if offset > written]
    return [offset for offset in every if offset <= written] + blank[:: max(1, -(-len(blank) // 4))]


Case = tuple[str, Callable[[bytes, int], bytes], int]
"""(the file's path in the store, how, where)."""


def cases(store: Path, *patterns: str) -> list[Case]:
    """All damage to the files that match."""
    paths = [path for pattern in patterns for path in sorted(store.glob(pattern))]
    assert paths
    return [
        (str(path.relative_to(store)), how, offset)
        for path in paths
        for offset in offsets(path.read_bytes())
        for how in (cut, alter)
    ]


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


# ---- what must hold after each launch


def assert_repaired(store: Path, stores: Stores, before: dict[str, bytes], damaged: dict[str, bytes]) -> None:
    """`before`: the contents of the store that was damaged, `damaged`: {path: content} of what was."""
    states = ledger.survey(Store(store), (DONE, FAILED, STOPPED))
    assert list(states.values()) == ["done", "failed", "done"], states
    for key in (DONE, STOPPED):
        quick.assert_same(folder(stores.finished, key), folder(store, key))
        assert ledger.problems(folder(store, key)) == []
    after = contents(store)
    for path in sorted(before.keys() - damaged.keys()):
        assert kept(path, before[path], after), f"{path} was sound and is not what it was"
    for path, content in damaged.items():
        assert content in (after.get(path), *aside(path, after)) or made_anew(path, content, after), path
    assert not [path for path in after if "/." in path], "temporary files are left"


def kept(path: str, content: bytes, after: dict[str, bytes]) -> bool:
    """Whether a sound file is where it was, or has the successor that a launch without damage gives it."""
    name = Path(path).name
    if after.get(path) == content or content in aside(path, after):
        return True
    if name in ("plan.json", "DONE.json"):  # written anew, with a time in it
        return path in after
    if name == "journal.jsonl":
        return after[path].startswith(content)
    return "checkpoints/" in path and (STOPPED in path or path in after)  # passed by newer ones, or by equal ones


def aside(path: str, after: dict[str, bytes]) -> list[bytes]:
    """What was moved aside under that file's name."""
    trial, name = "/".join(path.split("/")[:2]), Path(path).name
    return [content for kept, content in sorted(after.items()) if kept.startswith(f"{trial}/damaged/{name}.")]


def made_anew(path: str, damaged: bytes, after: dict[str, bytes]) -> bool:
    """Files whose content is known from elsewhere are written over; of a journal only half a last line is lost."""
    name = Path(path).name
    if name == "journal.jsonl":
        return after[path].startswith(damaged[: damaged.rfind(b"\n") + 1])
    return name in ("plan.json", "id", "spec.json") and path in after


def looked_at(store: Path, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says about a damaged store; it never breaks, and names the file when it can do nothing."""
    code = main([*command, "--store", str(store)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "fault of pift" not in said.err, said.err
    assert code in (0, 2), said
    if code == 2:
        assert str(store) in said.err and "damaged" in said.err, said.err
    return said.out + said.err


def launched(store: Path, capsys: pytest.CaptureFixture[str]) -> str:
    quick.behave()
    code = launch(sweep(store))
    said = capsys.readouterr()
    assert code == 3 and "Traceback" not in said.err + said.out, said.err
    return said.err


def run(stores: Stores, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *columns: list[Case]) -> None:
    """Each row of cases (one of each column) on a store that is as `base`."""
    before, store = contents(base), tmp_path / base.name
    shutil.copytree(base, store)
    for row in itertools.zip_longest(*columns):
        chosen = [case for case in row if case is not None]
        damaged = {path: how(before[path], offset) for path, how, offset in chosen}
        try:
            for path, content in damaged.items():
                (store / path).write_bytes(content)
            said = looked_at(store, capsys, "status")
            failed = folder(store, FAILED).failed
            done = f"trials/{DONE}/DONE.json"
            harmed = not says_the_same((store / done).read_bytes(), before[done])
            assert not harmed or ledger.state(folder(store, DONE)) == "resumable"
            unharmed = says_the_same(failed.read_bytes(), before[f"trials/{FAILED}/FAILED.json"])
            assert unharmed or "plan.json" in said or f"{failed} is damaged" in said
            launched(store, capsys)
            assert_repaired(store, stores, before, damaged)
        except BaseException:
            print("damaged:", *((path, how.__name__, offset) for path, how, offset in chosen))
            raise
        for path, content in contents(store).items():
            if path not in before:
                (store / path).unlink()
            elif before[path] != content:
                (store / path).write_bytes(before[path])
        for path in before:
            if not (store / path).exists():
                (store / path).write_bytes(before[path])
        assert contents(store) == before


# ---- the tests


def test_the_copy_without_damage_is_finished(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """What the other tests compare with holds for the sound store too. Kills: a check that cannot fail."""
    run(stores, stores.broken_off, tmp_path, capsys, [(f"trials/{DONE}/spec.json", lambda content, _: content, 0)])
    store = tmp_path / "store"
    shutil.copytree(stores.broken_off, store)
    with pytest.raises(AssertionError):
        assert_repaired(store, stores, contents(store), {})


def test_records_of_trials(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """spec.json, DONE.json, FAILED.json, attempts. Kills: JSON read without its checksum; a KeyError for a key that
    was cut off; a finished trial that counts as never begun; a failure forgotten."""
    base = stores.broken_off
    run(
        stores, base, tmp_path, capsys,
        cases(base, f"trials/{DONE}/DONE.json", f"trials/{DONE}/spec.json"),
        cases(base, f"trials/{FAILED}/FAILED.json"),
        cases(base, f"trials/{STOPPED}/attempts/*.json", f"trials/{STOPPED}/spec.json"),
    )  # fmt: skip


def test_journals(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """Kills: a line with a changed digit taken for a measurement; a carriage return taken for the end of one; a hole
    in the steps; sound lines behind the damage thrown away without a copy."""
    base = stores.broken_off
    run(
        stores, base, tmp_path, capsys,
        cases(base, f"trials/{DONE}/journal.jsonl"),
        cases(base, f"trials/{FAILED}/attempts/*.json", f"trials/{FAILED}/spec.json"),
        cases(base, f"trials/{STOPPED}/journal.jsonl"),
    )  # fmt: skip


def test_checkpoints_adapters_and_pictures(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """Kills: a state loaded that is not what was saved; a DONE.json that vouches for an adapter it has not read."""
    base = stores.broken_off
    run(
        stores, base, tmp_path, capsys,
        cases(base, f"trials/{DONE}/adapter/*", f"trials/{DONE}/checkpoints/*.json", f"trials/{DONE}/attempts/*"),
        cases(base, f"trials/{STOPPED}/checkpoints/*", f"trials/{STOPPED}/pictures/*"),
    )  # fmt: skip


def test_files_of_the_store(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """id, plan.json, launches. Kills: a store that takes another name while its plan knows the old one; a plan that is
    read half; a launch that is at work for ever."""
    base, name = stores.finished, Store(stores.finished).id
    run(stores, base, tmp_path, capsys, cases(base, "sweeps/*/plan.json"))
    base = stores.broken_off
    run(stores, base, tmp_path / "2", capsys, cases(base, "id", "launches/*.json"))
    base, store = stores.finished, tmp_path / "store"
    shutil.copytree(base, store)
    (store / "id").write_bytes(b"")
    assert Store(store).id == name
    plan = store / "sweeps" / "quick" / "plan.json"
    plan.write_bytes(cut(plan.read_bytes(), 128))
    said = looked_at(store, capsys, "status")
    assert f"{plan} is damaged" in said and "launch" in said
    launched(store, capsys)
    assert read_record(plan)["store_id"] == name


def test_pictures_of_a_finished_trial(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """The last one is drawn again, from the last checkpoint; an older one is kept aside, since its step is over. Kills:
    a finished trial trained anew for a picture; DONE.json with a picture's checksum that is none."""
    before, reference = contents(stores.broken_off), folder(stores.finished, DONE)
    for step, how in itertools.product((0, 4, 8), (cut, alter)):
        store = tmp_path / f"{step}{how.__name__}"
        shutil.copytree(stores.broken_off, store)
        trial = folder(store, DONE)
        path = str(trial.picture(step).relative_to(store))
        damaged = {path: how(before[path], 64)}
        trial.picture(step).write_bytes(damaged[path])
        looked_at(store, capsys, "status")
        launched(store, capsys)
        assert_repaired(store, stores, before, damaged)
        sealed = ledger.sealed(trial)
        for each in (0, 4, 8):
            sound = each != step or step == 8
            assert (f"pictures/step_00000{each}.png" in sealed) is sound
            if sound:
                assert trial.picture(each).read_bytes() == reference.picture(each).read_bytes()
        looked_at(store, capsys, "compare")


def test_the_comparison_of_a_damaged_store(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """`pift compare` before anything is repaired: it shows what is sound, or names the file. Kills: a report that
    breaks for one bad file, or shows numbers of a line that is damaged."""
    before = contents(stores.broken_off)
    for path in (
        *(f"trials/{DONE}/{name}" for name in ("spec.json", "DONE.json", "journal.jsonl", "pictures/step_000008.png")),
        f"trials/{DONE}/{quick.ADAPTER}",
        f"trials/{FAILED}/FAILED.json",
        f"trials/{STOPPED}/journal.jsonl",
        f"trials/{STOPPED}/attempts/0001.json",
        "sweeps/quick/plan.json",
        "id",
    ):
        store = tmp_path / path.replace("/", "_")
        shutil.copytree(stores.broken_off, store)
        (store / path).write_bytes(alter(before[path], len(before[path]) // 2 // 64 * 64))
        looked_at(store, capsys, "compare")
        json.loads(looked_at(store, capsys, "status", "--json")) if "plan" not in path else None


def test_damaged_twice(stores: Stores, tmp_path: Path, capsys: Any) -> None:
    """The same files again after they were repaired, and both checkpoints at once. Kills: the second original written
    over the first one in damaged/; a trial that has no checkpoint left and gives up."""
    before, store = contents(stores.broken_off), tmp_path / "store"
    shutil.copytree(stores.broken_off, store)
    done, stopped = folder(store, DONE), folder(store, STOPPED)
    twice = [str(path.relative_to(store)) for path in (done.root / quick.ADAPTER, done.journal)]
    lost = [str(path.relative_to(store)) for path in sorted(stopped.checkpoints.glob("*.pt"))]
    first = {path: alter(before[path], 128) for path in (*twice, *lost)}
    for path, content in first.items():
        (store / path).write_bytes(content)
    launched(store, capsys)
    assert_repaired(store, stores, before, first)
    again, second = contents(store), {}
    for path in (*twice, *(str(path.relative_to(store)) for path in (stopped.done, stopped.journal))):
        second[path] = alter(again[path], 192)
        (store / path).write_bytes(second[path])
    launched(store, capsys)
    assert_repaired(store, stores, again, second)
    for path in twice:
        assert aside(path, contents(store)) == [first[path], second[path]]
