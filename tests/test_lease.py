"""Leases: of any number of processes one works on a trial, a dead one is told from a living one, and one that was
taken for dead leaves without a word in the journal."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from tests import quick_trial as quick
from workers import lease as leases
from workers import store
from workers.lease import Attempt, Folder, Lease, LeaseLost, acquire, born, clock_skew, lives, newest, process
from workers.recorder import Journal
from workers.run import run_trial
from workers.store import TrialFolder, read_record, write_json, write_record

ROOT = Path(__file__).parents[1]
ROUNDS = 50
ELSEWHERE = {"boot": "another", "namespace": "another", "pid": 1, "born": "1", "host": "another"}
"""A process that cannot be looked up from here."""


def until(true, seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    """A living process of ours that does nothing."""
    running = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield running
    running.kill()
    running.wait()


def owner(pid: int, **changes: object) -> dict[str, object]:
    """The record of a process of this machine."""
    return process() | {"pid": pid, "born": born(pid), "attempt": 1, "started": 0.0, "beat": 0.0} | changes


# ------------------------------------------------------------------------------------------------- who gets it


def test_one_of_many_threads_gets_it(tmp_path: Path) -> None:
    """Fifty rounds of eight. Kills: a look whether the name is free, then a write; a name written over; losers that
    begin the attempt after."""
    for number in range(ROUNDS):
        attempts, barrier = Folder(tmp_path / str(number)), threading.Barrier(8)
        found: list[Lease | Attempt] = []

        def one(attempts: Folder = attempts, barrier: threading.Barrier = barrier, found: list = found) -> None:
            barrier.wait()
            found.append(acquire(attempts, {}, seconds=60.0))

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (won,) = [each for each in found if isinstance(each, Lease)]
        assert len(found) == 8 and attempts.numbers() == [won.number] == [1]
        assert all(each.number == 1 and each.content["pid"] == os.getpid() for each in found if each is not won)
        won.end("stopped")


RACE = f"""
import sys, time
from pathlib import Path
from workers.lease import Folder, Lease, acquire
held, won = [], []
print("ready", flush=True)
start = float(sys.stdin.readline())
for number in range({ROUNDS}):
    time.sleep(max(0.0, start + 0.02 * number - time.time()))
    found = acquire(Folder(Path(sys.argv[1]) / str(number)), {{}}, seconds=60.0)
    held.append(found)
    if isinstance(found, Lease):
        won.append(number)
print(*won, flush=True)
sys.stdin.read()
"""


def test_one_of_many_processes_gets_it(tmp_path: Path) -> None:
    """Fifty rounds of four. Kills: what a lock of one process would do as well; a dead file taken for a free name."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    start = time.time() + 0.2
    for racer in racers:
        racer.stdin.write(f"{start}\n")
        racer.stdin.flush()
    won = [racer.stdout.readline().split() for racer in racers]
    for racer in racers:
        racer.communicate()
    assert sorted(int(number) for numbers in won for number in numbers) == list(range(ROUNDS))
    assert all(Folder(tmp_path / str(number)).numbers() == [1] for number in range(ROUNDS))
    assert sum(bool(numbers) for numbers in won) > 1, "no race took place"


def test_without_second_names_for_files_one_gets_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a fallback that overwrites; a record that is being filled taken for a damaged one."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    attempts = Folder(tmp_path)
    assert attempts.create(1, {"pid": 1}) and not attempts.create(1, {"pid": 2})
    assert attempts.read(1).content == {"pid": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["0001.json"]

    other = Folder(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0001.json").write_bytes(b"")  # somebody's, opened a moment ago
    filling = threading.Timer(0.03, lambda: other.write(1, owner(os.getpid())))
    filling.start()
    found = acquire(other, {}, seconds=60.0)
    filling.join()
    assert isinstance(found, Attempt) and other.numbers() == [1]


def test_attempts_are_numbered_by_their_numbers(tmp_path: Path) -> None:
    """Kills: sorting names as words (10000 before 9999); a file of another kind taken for an attempt."""
    attempts = Folder(tmp_path)
    for number in (1, 2, 3):
        found = acquire(attempts, {"sweep": "s"})
        assert isinstance(found, Lease) and found.number == number and found.content["attempt"] == number
        found.end("stopped", step=number)
    assert [attempts.read(number).content["step"] for number in attempts.numbers()] == [1, 2, 3]
    for name in (".0004.json.x", "0004.json.1", "notes.txt", "4.json"):
        (tmp_path / name).write_text("")
    write_record(tmp_path / "9999.json", {"ended": 1.0})
    write_record(tmp_path / "10000.json", {"ended": 1.0})
    assert newest(attempts).number == 10000
    found = acquire(attempts, {})
    assert found.number == 10001 and attempts.numbers() == [1, 2, 3, 9999, 10000, 10001]
    found.end("stopped")
    assert Folder(tmp_path / "nowhere").numbers() == [] and newest(Folder(tmp_path / "nowhere")) is None


# --------------------------------------------------------------------------------------------------- heartbeats


def test_an_owner_rewrites_its_record(tmp_path: Path) -> None:
    """Kills: a beat that keeps the old time, loses a note, goes on after the end, or leaves a temporary file."""
    attempts = Folder(tmp_path)
    lease = acquire(attempts, {"step": 0}, seconds=0.02)
    first = attempts.read(1)
    lease.note(step=5)
    until(lambda: attempts.read(1).content["step"] == 5 and attempts.read(1).content["beat"] > first.content["beat"])
    second = attempts.read(1)
    assert second.modified > first.modified and second.content["started"] == first.content["started"]
    until(lambda: attempts.read(1).content["beat"] > second.content["beat"])
    assert isinstance(acquire(attempts, {}), Attempt)
    lease.end("done", step=6)
    last = attempts.read(1)
    assert (last.content["how"], last.content["step"]) == ("done", 6)
    assert last.content["ended"] >= second.content["beat"] and not last.alive(attempts.now())
    time.sleep(0.1)
    assert attempts.read(1) == last and [path.name for path in tmp_path.iterdir()] == ["0001.json"]


def test_a_beat_notices_the_next_attempt(tmp_path: Path) -> None:
    """Without being asked: a process that waits for a reward finds out too. Kills: looking at one's own number."""
    attempts = Folder(tmp_path)
    lease = acquire(attempts, {}, seconds=0.02)
    lease.check()
    assert attempts.create(2, owner(os.getpid()))
    until(lambda: lease.lost)
    with pytest.raises(LeaseLost, match="attempt 2"):
        lease.check()


# -------------------------------------------------------------------------------------------------- dead or alive


def test_a_process_of_this_machine_is_looked_up(tmp_path: Path, child: subprocess.Popen) -> None:
    """By number and birth, whatever the age of its beat. Kills: the number alone (given to another process by now);
    the age of the beat where the process can be asked."""
    attempts = Folder(tmp_path)
    for record, alive in (
        (owner(child.pid), True),
        (owner(child.pid, born="1"), False),
        (owner(child.pid, born=None), False),
        (owner(child.pid, ended=1.0), False),
        (owner(child.pid) | {"pid": 2**22 - 1}, False),
    ):
        write_record(tmp_path / "0001.json", record)
        os.utime(tmp_path / "0001.json", (1.0, 1.0))  # silent since 1970
        (tmp_path / "0002.json").unlink(missing_ok=True)
        assert newest(attempts).alive(attempts.now()) is alive, record
        found = acquire(attempts, {}, seconds=60.0)
        assert isinstance(found, Attempt) is alive
        if isinstance(found, Lease):
            found.end("stopped")


def test_a_zombie_is_dead(tmp_path: Path, child: subprocess.Popen) -> None:
    """A worker that was killed and whose parent has not asked yet. Kills: `kill -0`, /proc/<pid> is there."""
    record = owner(child.pid)
    assert lives(record, 0.0)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    os.kill(child.pid, 0)  # it has a number still
    assert born(child.pid) is None and not lives(record, 0.0)


def test_a_process_elsewhere_is_judged_by_its_files_age(tmp_path: Path) -> None:
    """By the time the file server stamped, not by what the owner's clock wrote. Kills: the age of "beat"."""
    attempts, now, path = Folder(tmp_path), time.time(), tmp_path / "0001.json"
    for beat, age, alive in ((now + 1e6, 61, False), (now - 1e6, 1, True), (now, 58, True), (now, 1e6, False)):
        write_record(path, ELSEWHERE | {"attempt": 1, "started": 0.0, "beat": beat})
        os.utime(path, (now - age,) * 2)
        (tmp_path / "0002.json").unlink(missing_ok=True)
        assert newest(attempts).alive(attempts.now()) is alive, (beat, age)
        found = acquire(attempts, {}, seconds=60.0)
        assert isinstance(found, Attempt) is alive
        if isinstance(found, Lease):
            found.end("stopped")


@pytest.mark.parametrize("ahead", [100.0, -100.0])
def test_a_wrong_clock_of_this_machine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """A clock 100 s ahead would find every beat too old, one behind none. Kills: now() = time.time(); the sign;
    a probe for every look; a probe left behind."""
    attempts, path = Folder(tmp_path), tmp_path / "0001.json"
    clock = SimpleNamespace(time=lambda: time.time() + ahead, monotonic=time.monotonic)
    monkeypatch.setattr(leases, "time", clock)
    monkeypatch.setattr(leases, "_SKEW", {})
    assert clock_skew(tmp_path) == pytest.approx(-ahead, abs=1.0)
    assert attempts.now() == pytest.approx(time.time(), abs=1.0)
    for age, alive in ((1, True), (59, True), (62, False)):
        write_record(path, ELSEWHERE | {"attempt": 1})
        os.utime(path, (time.time() - age,) * 2)
        assert newest(attempts).alive(attempts.now()) is alive, age
    path.unlink()
    before = tmp_path.stat().st_mtime_ns
    clock_skew(tmp_path)
    assert tmp_path.stat().st_mtime_ns == before and list(tmp_path.iterdir()) == []


def test_equal_clocks_have_no_skew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grain of a file system's stamps is none; where nothing can be written there is no telling."""
    monkeypatch.setattr(leases, "_SKEW", {})
    assert clock_skew(tmp_path) == 0.0
    assert clock_skew(Path("/proc/self")) == 0.0 and clock_skew(tmp_path / "nowhere") == 0.0


# -------------------------------------------------------------------------------------------------------- fencing


def slowly(call: int, values: Tensor) -> Tensor:
    """For the trial in a process of its own: a tenth of a second a call."""
    time.sleep(0.1)
    return values


SLEEPER = """
import sys
from tests import quick_trial, test_lease
from workers import run
quick_trial.behave(test_lease.slowly)
sys.argv[1:] = [sys.argv[1]]
sys.exit(run.main())
"""


@pytest.mark.slow
def test_an_owner_that_slept_leaves_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real trial in a process that is suspended, taken for dead, outlived and woken. Kills: no look at the lease
    before the journal, the checkpoint or DONE.json; last words of the loser that end the winner's attempt."""
    quick.behave()
    spec = quick.spec(steps=40, train__checkpoint_every=5)
    folder, reference = TrialFolder(tmp_path / "trial"), TrialFolder(tmp_path / "reference")
    assert run_trial(spec, reference.root).state == "done"
    write_json(folder.spec, spec)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(folder.root)], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    try:
        until(lambda: folder.journal.exists() and folder.journal.read_bytes().count(b"\n") >= 4, 60)
        os.kill(sleeper.pid, signal.SIGSTOP)
        attempts = Folder(folder.attempts)
        assert run_trial(spec, folder.root).state == "elsewhere"  # suspended is not dead
        real = leases.lives
        monkeypatch.setattr(leases, "lives", lambda owner, age: owner.get("pid") != sleeper.pid and real(owner, age))
        assert run_trial(spec, folder.root).state == "done"
        assert attempts.numbers() == [1, 2] and attempts.read(2).content["how"] == "done"
        before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
        os.kill(sleeper.pid, signal.SIGCONT)
        said = sleeper.communicate(timeout=60)[1]
    finally:
        sleeper.kill()
        sleeper.wait()
    assert sleeper.returncode == 3 and "another process took this trial over with attempt 2" in said
    assert "Traceback" not in said
    own = folder.attempts / "0001.json"  # what the sleeper may still write, and nobody reads any more
    after = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    assert after.keys() == before.keys() and all(after[path] == before[path] for path in before if path != own)
    assert "ended" not in read_record(own)
    quick.assert_same(reference, folder)


def test_a_journal_of_a_lost_lease_takes_nothing(tmp_path: Path) -> None:
    """Neither a record nor the cut of a torn line, which may be the new owner's, half written. Kills: opening the
    journal before looking; a write before looking."""
    attempts, path = Folder(tmp_path / "attempts"), tmp_path / "journal.jsonl"
    lease = acquire(attempts, {}, seconds=60.0)
    journal = Journal(path, before=lease.check)
    journal.write(0, {"x": 1.0})
    torn = path.read_bytes() + b'{"time": 1.0, "st'
    path.write_bytes(torn)
    assert attempts.create(2, owner(os.getpid()))
    with pytest.raises(LeaseLost):
        journal.write(1, {"x": 2.0})
    with pytest.raises(LeaseLost):
        Journal(path, before=lease.check)
    assert path.read_bytes() == torn
    lease.end("stopped")


def test_a_damaged_record_has_no_owner(tmp_path: Path) -> None:
    """Whoever comes next takes over, and the owner that lives all the same leaves. Kills: a damaged record that
    blocks the trial for ever; an owner that repairs it and works on beside the other; last words of the loser."""
    attempts = Folder(tmp_path)
    for damage in (b"", b'{"attempt": 1,', b"\0" * 4096, None):
        folder = tmp_path / repr(damage)[:6]
        attempts = Folder(folder)
        living = acquire(attempts, {}, seconds=60.0)
        path = folder / "0001.json"
        content = path.read_bytes().replace(b'"attempt": 1', b'"attempt": 7') if damage is None else damage
        path.write_bytes(content)
        assert newest(attempts).content == {}
        taker = acquire(attempts, {}, seconds=60.0)
        assert isinstance(taker, Lease) and taker.number == 2
        with pytest.raises(LeaseLost):
            living.check()
        living.end("done")
        assert path.read_bytes() == content
        taker.check()
        taker.end("stopped")
        assert attempts.read(2).content["how"] == "stopped"


# ------------------------------------------------------------------------------------------------------ full disks


def test_last_words_on_a_full_disk(tmp_path: Path) -> None:
    """The record's own block is large enough. Kills: last words that need a new file; a beat that fails for want of
    space and leaves half a record."""
    with quick.small_disk(tmp_path / "disk", 64) as disk:
        attempts = Folder(disk / "attempts")
        lease = acquire(attempts, {"step": 0}, seconds=0.02)
        quick.fill(disk)
        with pytest.raises(OSError, match="No space left"):
            store.write_text(disk / "another", "x" * 5000)
        lease.note(step=3, warnings=["the journal waits"])
        until(lambda: attempts.read(1).content.get("step") == 3)
        assert isinstance(acquire(attempts, {}), Attempt)
        lease.end("storage", step=4, message="the store cannot be written")
        found = attempts.read(1).content
        assert (found["how"], found["step"], found["message"]) == ("storage", 4, "the store cannot be written")
        assert found["ended"] and found["warnings"] == ["the journal waits"]
        assert sorted(path.name for path in (disk / "attempts").iterdir()) == ["0001.json"]
        with pytest.raises(OSError, match="No space left"):
            acquire(attempts, {})
        assert attempts.numbers() == [1]


def test_last_words_too_long_for_the_block(tmp_path: Path) -> None:
    """Twenty warnings about a full disk do not fit into a block, and no block is free: the record stays a sound one,
    and says how it ended. Kills: writing over the end of the block (a torn record has no owner: the trial would be
    taken over while it is at work)."""
    with quick.small_disk(tmp_path / "disk", 64) as disk:
        attempts = Folder(disk / "attempts")
        lease = acquire(attempts, {"step": 0}, seconds=0.02)
        quick.fill(disk)
        beat = attempts.read(1).content["beat"]
        lease.note(step=3, warnings=["no checkpoint: [Errno 28] No space left on device: " + "x" * 200] * 20)
        until(lambda: attempts.read(1).content.get("beat", beat) > beat)
        assert isinstance(acquire(attempts, {}), Attempt)
        lease.end("storage", step=4, message="y" * 9000)
        found = attempts.read(1).content
        assert (found["how"], found["step"]) == ("storage", 4) and found["ended"]
        assert found["message"].startswith("yyyy")


def test_a_shorter_record_in_the_place_of_a_longer_one(tmp_path: Path) -> None:
    """Kills: the end of the longer one left behind it."""
    with quick.small_disk(tmp_path / "disk", 64) as disk:
        attempts = Folder(disk / "attempts")
        assert attempts.create(1, {"text": "x" * 9000})
        quick.fill(disk)
        attempts.write(1, {"text": "short"})
        assert attempts.read(1).content == {"text": "short"}
