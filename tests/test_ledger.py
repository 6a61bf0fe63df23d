"""The ledger: states follow from files, journals are read once, a store that cannot be written is named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.errors import UserError
from orchestrator.ledger import Store, Tail
from workers.store import write_json


def beat(**values: object) -> dict[str, object]:
    found = {"pid": os.getpid(), "host": socket.gethostname(), "beat": time.time(), "step": 3, "steps": 9}
    return found | values


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_states(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    assert ledger.state(folder) == "new"
    write_json(folder.spec, {"train": {"gradient_steps": 9}})
    assert ledger.state(folder) == "new"
    folder.journal.write_text('{"step": 2, "time": 1.0, "metrics": {}}\n{"step": 4, "ti')
    assert ledger.state(folder) == "resumable"
    assert ledger.detail(folder) == {"step": 2, "steps": 9, "class": None, "message": None}
    for values, expected in (
        ({}, "running"),
        ({"pid": dead_pid()}, "stale"),
        ({"beat": time.time() - 61}, "stale"),
        ({"host": "another", "pid": 1}, "running"),
        ({"host": "another", "beat": time.time() - 61}, "stale"),
    ):
        write_json(folder.running, beat(**values))
        assert ledger.state(folder) == expected, values
    write_json(folder.failed, {"class": "bug", "message": "m", "step": 3})
    assert ledger.state(folder) == "failed"
    write_json(folder.failed, {"class": "diverged", "message": "m", "step": 3})
    assert ledger.state(folder) == "diverged"
    assert ledger.detail(folder)["class"] == "diverged"
    write_json(folder.done, {"steps": 9})
    assert ledger.state(folder) == "done"


def test_half_written_files_of_others_do_not_break_the_state(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    folder.root.mkdir(parents=True)
    folder.running.write_text('{"pid": ')
    folder.checkpoint.write_bytes(b"x")
    assert ledger.state(folder) == "resumable"


def test_a_worker_that_died_is_written_down_once(tmp_path: Path) -> None:
    folder = Store(tmp_path).trial("k")
    write_json(folder.running, beat())
    ledger.fail(folder, "k", "worker_died", "killed")
    ledger.fail(folder, "k", "bug", "later")
    failure = json.loads(folder.failed.read_text())
    assert (failure["class"], failure["step"]) == ("worker_died", 3)
    assert not folder.running.exists()


@pytest.mark.parametrize(("kind", "keeps"), [("worker_died", True), ("bug", False)])
def test_forgiving_keeps_the_journal_and_the_failure(tmp_path: Path, kind: str, keeps: bool) -> None:
    folder = Store(tmp_path).trial("k")
    folder.root.mkdir(parents=True)
    folder.journal.write_text('{"step": 2}\n')
    folder.checkpoint.write_bytes(b"x")
    write_json(ledger.attempt_file(folder), {"attempt": 2})
    ledger.fail(folder, "k", kind, "m")
    ledger.forgive(folder)
    assert ledger.state(folder) == "resumable"
    assert folder.checkpoint.exists() == keeps
    assert (folder.root / "failures" / "attempt_2.json").exists()


def test_tail_reads_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 0}\n{"st')
    assert [record for record, _ in tail.read()] == [{"step": 0}]
    assert tail.read() == []
    with path.open("a") as stream:
        stream.write('ep": 1}\n{"step": 2}\n')
    found = tail.read()
    assert [record["step"] for record, _ in found] == [1, 2]
    assert found[-1][1] == path.stat().st_size
    again = Tail(path, offset=found[0][1])
    assert [record["step"] for record, _ in again.read(limit=4)] == [2]  # a line longer than the block
    path.write_text('{"step": 7}\n')  # begun anew
    assert [record["step"] for record, _ in tail.read()] == [7]


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
        write_json(store.sweep(name).plan, {})
        os.utime(store.sweep(name).plan, (time.time() - age,) * 2)
    assert store.sweeps() == ["b", "a"]
    assert store.id == store.id
