"""The journal and whole-file writing under torn tails, resumed attempts, non-finite numbers and failing writes."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import pytest

from workers import store
from workers.recorder import CLOCK_METRICS, METRICS, Journal, journal_line, read_journal
from workers.store import TrialFolder, read_json, sha256, write_json, write_text, write_whole

GOOD = {"train/loss": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial" / "journal.jsonl"


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path)]


def test_a_record_comes_back_as_it_was_written(path: Path) -> None:
    journal = Journal(path)
    assert journal.last_step == -1 and list(read_journal(path)) == []
    journal.write(
        0, {"eval/reward_mean": 1 / 3}, {"reward": [0.1, 1e-300], "judge": (1.0, 2.0)}, "pictures/step_000000.png"
    )
    journal.write(1, GOOD)
    first, second = read_journal(path)
    assert first["metrics"] == {"eval/reward_mean": 1 / 3} and first["samples"] == {
        "reward": [0.1, 1e-300],
        "judge": [1.0, 2.0],
    }
    assert first["pictures"] == "pictures/step_000000.png" and 0 < first["time"] <= second["time"]
    assert set(second) == {"time", "step", "metrics"}  # the checksum is the line's, not the record's
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_left_out_and_then_cut(path: Path, cut: int) -> None:
    journal = Journal(path)
    for step in range(3):
        journal.write(step, GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert steps(path) == [0, 1]
    resumed = Journal(path)
    assert resumed.last_step == 1 and path.read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]
    resumed.write(2, GOOD)
    assert steps(path) == [0, 1, 2]


def test_a_journal_that_is_one_torn_line_is_empty(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"time": 1.0, "st')
    assert Journal(path).last_step == -1 and path.read_bytes() == b""


def test_a_resumed_journal_is_silent_up_to_where_it_was(path: Path) -> None:
    first = Journal(path)
    for step in range(4):
        first.write(step, GOOD)
    before = path.read_bytes()
    resumed = Journal(path)
    for step in (2, 3):
        resumed.write(step, {"train/loss": 99.0})
    assert path.read_bytes() == before and resumed.last_step == 3
    resumed.write(4, GOOD)
    assert steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(path: Path, value: float) -> None:
    journal = Journal(path)
    journal.write(0, GOOD)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="step 1: train/grad_norm"):
        journal.write(1, GOOD | {"train/grad_norm": value})
    with pytest.raises(ValueError):
        journal.write(1, GOOD, {"reward": [0.0, value]})
    assert path.read_bytes() == before


def test_unknown_names_pass_and_known_names_are_documented(path: Path) -> None:
    """A method may add its own metrics; a reader takes records that hold more keys than it knows."""
    journal = Journal(path)
    journal.write(0, {"dpok/clip_fraction": 0.25})
    with path.open("a") as stream:
        stream.write(journal_line({"time": 1.0, "step": 1, "metrics": {}, "from_the_future": [1]}).decode())
    assert [record["metrics"] for record in read_journal(path)] == [{"dpok/clip_fraction": 0.25}, {}]
    assert Journal(path).last_step == 1
    assert set(METRICS) > CLOCK_METRICS and all(METRICS.values())


def test_write_whole_leaves_the_old_file_and_nothing_else_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.json"
    write_text(target, "old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("the disk went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_whole(target, fails)
    assert target.read_text() == "old" and os.listdir(target.parent) == ["file.json"]
    with pytest.raises(ValueError):
        write_json(target, {"value": math.nan})
    assert target.read_text() == "old" and os.listdir(target.parent) == ["file.json"]


def test_an_interrupt_or_a_failing_move_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", interrupted)

    def no_move(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", no_move)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == []


def test_a_written_file_is_readable_by_others_and_reads_back(tmp_path: Path) -> None:
    where = TrialFolder(tmp_path)
    assert read_json(where.done) is None
    write_json(where.done, {"b": [1.5], "a": "ü"})
    assert read_json(where.done) == {"a": "ü", "b": [1.5]}
    assert where.done.stat().st_mode & 0o777 == 0o644
    assert sha256(where.done) == hashlib.sha256(where.done.read_bytes()).hexdigest()
