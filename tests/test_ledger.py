"""The ledger: states follow from files, journals are read once, a store that cannot be written is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.ledger import Store, Tail
from workers.lease import process
from workers.recorder import journal_line
from workers.store import TrialFolder, forgive, write_json, write_record


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def attempt(folder: TrialFolder, age: float = 0.0, **values: object) -> None:
    """The newest attempt: of this process, `age` seconds after its last beat, unless said otherwise."""
    content = {**process(), "attempt": 1, "started": 0.0, "beat": 0.0, "step": 3, "steps": 9} | values
    write_record(folder.attempts / "0001.json", content)
    os.utime(folder.attempts / "0001.json", (time.time() - age,) * 2)


def lines(*records: dict[str, object]) -> bytes:
    return b"".join(journal_line(record) for record in records)


def test_states(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    assert ledger.state(folder) == "new"
    assert ledger.state(folder, queued={"k"}) == "scheduled"
    write_json(folder.spec, {"train": {"gradient_steps": 9}})
    assert ledger.state(folder) == "new"
    folder.journal.write_bytes(lines({"step": 2, "time": 1.0, "metrics": {}}) + b'{"step": 4, "ti')
    assert ledger.state(folder) == "resumable"
    assert ledger.state(folder, queued={"k"}) == "scheduled"
    assert ledger.detail(folder) == {"step": 2, "steps": 9, "class": None, "message": None}
    for age, values, expected in (
        (0, {}, "running"),
        (3600, {}, "running"),  # a process that can be looked up needs no beat
        (0, {"pid": dead_pid()}, "stale"),
        (0, {"born": "1"}, "stale"),  # its number belongs to another process by now
        (0, {"boot": "another", "pid": 1}, "running"),
        (0, {"namespace": "another", "pid": 1}, "running"),
        (61, {"boot": "another"}, "stale"),
        (0, {"ended": 1.0, "how": "stopped"}, "resumable"),
    ):
        attempt(folder, age, **values)
        assert ledger.state(folder) == expected, values
    write_record(folder.failed, {"class": "bug", "message": "m", "step": 3})
    assert ledger.state(folder) == "failed"
    write_record(folder.failed, {"class": "diverged", "message": "m", "step": 3})
    assert ledger.state(folder) == "diverged"
    assert ledger.detail(folder)["class"] == "diverged"
    write_record(folder.done, {"steps": 9, "files": {"adapter/weights": {"bytes": 4, "sha256": "?"}}})
    assert ledger.state(folder) == "diverged"  # what DONE.json names is not there
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_text("four")
    assert ledger.state(folder) == "done"
    assert [problem.problem for problem in ledger.problems(folder)] == ["its checksum is not the one in DONE.json"]


def test_a_survey_agrees_with_each_state(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert ledger.survey(store, ["a"]) == {"a": "new"}
    attempt(store.trial("a"), ended=1.0)
    attempt(store.trial("b"))
    launch = ledger.Launch(store, "s")
    launch.begin()
    launch.queue(["b", "c"])
    assert ledger.survey(store, ["a", "b", "c", "d"]) == {"a": "new", "b": "running", "c": "scheduled", "d": "new"}
    assert list(store.launches()) == [launch.name]
    launch.end("exit code 0")
    assert store.launches() == {} and ledger.survey(store, ["c"]) == {"c": "new"}


def test_damaged_records_do_not_break_the_state(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    attempt(folder)
    (folder.attempts / "0001.json").write_text('{"pid": ')
    assert ledger.state(folder) == "stale"
    folder.failed.write_text("{")
    assert ledger.state(folder) == "failed"
    found = ledger.detail(folder)
    assert found["class"] == "unknown"
    assert "FAILED.json is damaged" in found["message"] and "pift retry" in found["message"]


def test_a_trial_that_could_not_say_so_is_written_down_once(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    ledger.fail(folder, "k", "bug", "no such module")
    ledger.fail(folder, "k", "storage", "later")
    assert ledger.failure_of(folder)["class"] == "bug"
    forgive(folder)
    ledger.fail(folder, "k", "bug", "again")
    forgive(folder)
    assert ledger.state(folder) == "new"
    assert [path.name for path in sorted((folder.root / "failures").iterdir())] == ["0001.json", "0002.json"]


def test_what_a_sweep_has_spent(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    assert ledger.spent(folder, "mine") == (0.0, False)
    for number, (sweep, started, last) in enumerate(
        (("mine", 10.0, {"ended": 15.0}), ("other", 20.0, {"ended": 90.0}), ("mine", 100.0, {"beat": 102.5})), 1
    ):
        content = {"sweep": sweep, "started": started, "beat": 0.0} | last
        write_record(folder.attempts / f"{number:04d}.json", content)
    assert ledger.spent(folder, "mine") == (7.5, True)
    write_record(Store(tmp_path).trial("gone").attempts / "0001.json", {"sweep": "mine", "started": 0.0, "ended": 2.5})
    write_record(Store(tmp_path).trial("else").attempts / "0001.json", {"sweep": "other", "started": 0.0, "ended": 9.0})
    assert ledger.spent_by(Store(tmp_path), "mine") == (10.0, {"k", "gone"})


def test_the_store_keeps_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.id
    assert store.id == first and len(first) == 16
    write_record(store.sweep("s").plan, {"store_id": first})
    for damage in (b"", b"{", (tmp_path / "id").read_bytes().replace(first[:4].encode(), b"0000")):
        (tmp_path / "id").write_bytes(damage)
        assert store.id == first


def test_tail_reads_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    zero, one, two = ({"step": step, "pad": "x" * 50} for step in range(3))
    path.write_bytes(lines(zero, one)[:-9])
    assert [record for record, _ in tail.read()] == [zero]
    assert tail.read() == []
    path.write_bytes(lines(zero, one, two))
    found = tail.read()
    assert [record["step"] for record, _ in found] == [1, 2]
    assert found[-1][1] == path.stat().st_size
    again = Tail(path, offset=found[0][1])
    assert [record["step"] for record, _ in again.read(limit=4)] == [2]  # a line longer than the block
    path.write_bytes(lines(zero, one))  # cut back to what was sound ...
    assert tail.read() == []
    path.write_bytes(lines(zero, one, two, {"step": 3}))  # ... and gone on from there
    assert [record["step"] for record, _ in tail.read()] == [3]


def test_tail_finds_its_place_in_a_journal_that_was_written_anew(tmp_path: Path) -> None:
    """The same steps with lines of other lengths: nothing twice, nothing left out. Kills: trusting the offset."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(lines(*({"step": step, "pad": "x" * 50} for step in range(4))))
    tail = Tail(path)
    tail.read()
    path.write_bytes(lines(*({"step": step, "pad": "y" * 70} for step in range(9))))
    seen: list[int] = []
    while found := tail.read(limit=100):
        seen += [record["step"] for record, _ in found]
    assert seen == [4, 5, 6, 7, 8]
    path.write_bytes(path.read_bytes() + b"{damaged}\n" + lines({"step": 9}))
    assert tail.read() == [] and tail.read() == []


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/pift/store", "FILE/store"])
def test_an_unwritable_store_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    path = where.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="store=.*cannot be written.*store=results"):
        Store(path).check_writable()


def test_sweeps_newest_last(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.sweeps() == []
    for age, name in ((20, "b"), (10, "a")):
        write_record(store.sweep(name).plan, {})
        os.utime(store.sweep(name).plan, (time.time() - age,) * 2)
    assert store.sweeps() == ["b", "a"]
    assert store.id == store.id
