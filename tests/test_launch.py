"""Launching: the same store from either executor, exit codes, MLflow's states, interruptions, nothing half-written.

The trials are tests/fake_trial.py: they write what a trial writes and train nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tests.fake_trial as fake
from orchestrator import executors, ledger, tracking
from orchestrator import launch as launching
from orchestrator.errors import UserError
from orchestrator.executors import Job, Outcome
from orchestrator.executors.inline import Inline
from orchestrator.launch import launch
from orchestrator.ledger import Store
from orchestrator.tracking import mlflow_view
from workers.spec import TrialSpec
from workers.store import write_record


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.monitor.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.monitor.FORWARD_SECONDS", 0.05)


def with_mlflow(store: Path, database: Path) -> dict[str, Any]:
    store.mkdir(parents=True, exist_ok=True)
    shutil.copy(database, store / "mlflow.db")
    return {"tracking": {"name": "mlflow", "uri": None}}


def runs(store: Path) -> dict[str, Any]:
    """{label: run} of everything in the store's MLflow."""
    client = mlflow_view.MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    experiment = client.get_experiment_by_name("pift")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def attempts(store: Path, *specs: TrialSpec) -> list[int]:
    return [len(list(Store(store).trial(spec.key).attempts.iterdir())) for spec in specs]


def measured(store: Path) -> dict[str, Any]:
    """The content of a store but for clocks: {key: (state, journal)}."""
    found = {}
    for folder in sorted((store / "trials").iterdir()):
        trial = Store(store).trial(folder.name)
        lines = trial.journal.read_text().splitlines() if trial.journal.exists() else []
        records = [{k: v for k, v in json.loads(line).items() if k not in ("time", "crc32")} for line in lines]
        found[folder.name] = (ledger.state(trial), records)
    return found


def test_all_done(tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, specs = tmp_path / "store", [fake.spec(seed=seed) for seed in range(2)]
    config = with_mlflow(store, database)
    assert launch(fake.plan(store, *specs, **config), target=fake.TARGET) == 0
    said = capsys.readouterr()
    assert f"pift ui tried --store={store}" in said.out
    assert "report.html" in said.out
    assert ": done" in said.err
    found = runs(store)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert set(found) == {"tried", *(spec.label for spec in specs)}
    parent = found["tried"].info.run_id
    assert all(found[spec.label].data.tags["mlflow.parentRunId"] == parent for spec in specs)
    written = Store(store).plan("tried")
    assert [cell["key"] for cell in written["cells"]] == [spec.key for spec in specs]
    assert set(written["specs"]) == {spec.key for spec in specs}

    journals = measured(store)
    assert launch(fake.plan(store, *specs, executor="ray", **config), target=fake.TARGET, json_output=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["counts"], result["exit_code"]) == ({"done": 2}, 0)
    assert measured(store) == journals  # nothing ran again, and Ray was not started for it
    assert {name: run.info.run_id for name, run in runs(store).items()} == {
        name: run.info.run_id for name, run in found.items()
    }


def test_scheduled_is_seen_before_the_first_trial(tmp_path: Path, database: Path, monkeypatch: Any) -> None:
    store, seen = tmp_path / "store", []

    def looked(self: Inline, jobs: Any, on_outcome: Any) -> None:
        seen.extend(run.info.status for run in runs(store).values())

    monkeypatch.setattr(Inline, "run", looked)
    config = with_mlflow(store, database)
    assert launch(fake.plan(store, fake.spec(), fake.spec(seed=1), **config), target=fake.TARGET) == 3
    assert sorted(seen) == ["RUNNING", "SCHEDULED", "SCHEDULED"]  # the sweep's own run is the one at work


def test_failures_are_left_and_retried_when_asked(tmp_path: Path, database: Path, capsys: Any) -> None:
    store = tmp_path / "store"
    specs = [fake.spec(seed=0, fail_at=2), fake.spec(seed=1, diverge_at=1), fake.spec(seed=2)]
    config = with_mlflow(store, database)
    assert launch(fake.plan(store, *specs, **config), target=fake.TARGET) == 3
    said = capsys.readouterr().err
    assert "failed: " in said and "diverged: " in said and "retry_failed=true" in said
    statuses = {name: run.info.status for name, run in runs(store).items()}
    assert sorted(statuses.values()) == ["FAILED", "FAILED", "FAILED", "FINISHED"]
    assert statuses["tried"] == "FAILED"

    assert launch(fake.plan(store, *specs, **config), target=fake.TARGET) == 3
    assert attempts(store, *specs) == [1, 1, 1]
    assert launch(fake.plan(store, *specs, **config, retry_failed=True), target=fake.TARGET) == 3
    assert attempts(store, *specs) == [2, 1, 1]  # what diverged would diverge again
    assert (Store(store).trial(specs[0].key).root / "failures" / "0001.json").exists()


def test_a_target_that_cannot_be_imported_is_a_failed_trial(tmp_path: Path) -> None:
    spec = fake.spec()
    assert launch(fake.plan(tmp_path, spec), target="tests.nowhere.run_trial") == 3
    assert "nowhere" in ledger.failure_of(Store(tmp_path).trial(spec.key))["message"]


def test_interrupted_and_continued(tmp_path: Path, database: Path) -> None:
    store, specs = tmp_path / "store", [fake.spec(seed=0, steps=60, seconds=0.05), fake.spec(seed=1)]
    config = with_mlflow(store, database)
    trial = Store(store).trial(specs[0].key)

    def interrupt() -> None:
        while (ledger.last_step(trial.journal) or 0) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert launch(fake.plan(store, *specs, **config), target=fake.TARGET) == 130
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ledger.state(trial) == "resumable"
    assert not list((store / "launches").glob("*.stop")) and Store(store).launches() == {}
    assert {run.info.status for run in runs(store).values()} == {"KILLED"}

    assert launch(fake.plan(store, *specs, **config), target=fake.TARGET) == 0
    assert [record["step"] for record in measured(store)[specs[0].key][1]] == list(range(61))
    assert attempts(store, specs[0]) == [2]
    assert {run.info.status for run in runs(store).values()} == {"FINISHED"}


def test_a_trial_at_work_elsewhere_is_waited_for(tmp_path: Path, capsys: Any) -> None:
    """Its process is on a machine that cannot be looked at. Kills: running it all the same; giving up on it."""
    spec = fake.spec()
    folder = Store(tmp_path).trial(spec.key)
    there = {"pid": 1, "host": "another", "boot": "another", "attempt": 1, "started": 0.0, "beat": 0.0}
    write_record(folder.attempts / "0001.json", there)

    def ends() -> None:
        time.sleep(1.5)
        assert not folder.journal.exists()
        write_record(folder.attempts / "0001.json", there | {"ended": 1.0, "how": "stopped"})

    thread = threading.Thread(target=ends)
    thread.start()
    assert launch(fake.plan(tmp_path, spec), target=fake.TARGET) == 0
    thread.join()
    assert attempts(tmp_path, spec) == [2]


def test_the_first_two_trials_fail_alike(tmp_path: Path, capsys: Any) -> None:
    """... and the third is not begun. Kills: going on; stopping after any two failures."""
    specs = [fake.spec(seed=seed, fail_at=1, bug="same") for seed in range(3)]
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 3
    assert [ledger.state(Store(tmp_path).trial(spec.key)) for spec in specs] == ["failed", "failed", "new"]
    assert "the first 2 trials failed at the same place (asked to fail); the sweep stops" in capsys.readouterr().err
    specs = [fake.spec(seed=seed, fail_at=1) for seed in range(3)]  # each at a place of its own
    assert launch(fake.plan(tmp_path / "other", *specs), target=fake.TARGET) == 3
    assert attempts(tmp_path / "other", *specs) == [1, 1, 1]
    specs = [fake.spec(), *(fake.spec(seed=seed, fail_at=1, bug="same") for seed in (1, 2, 3))]  # one works: no bug
    assert launch(fake.plan(tmp_path / "third", *specs), target=fake.TARGET) == 3
    assert attempts(tmp_path / "third", *specs) == [1, 1, 1, 1]


def test_budgets(tmp_path: Path, capsys: Any) -> None:
    """Trials: in all launches together. Hours: at work, then a checkpoint. Exit code 4 until the budget is raised."""
    specs = [fake.spec(seed=seed) for seed in range(3)]
    for _ in range(2):
        assert launch(fake.plan(tmp_path, *specs, budget={"trials": 2}), target=fake.TARGET) == 4
        assert [len(found) for found in measured(tmp_path)] and len(measured(tmp_path)) == 2
    assert launch(fake.plan(tmp_path, *specs, budget={"trials": 3}), target=fake.TARGET) == 0

    slow = fake.spec(steps=400, seconds=0.02)
    assert launch(fake.plan(tmp_path / "hours", slow, budget={"hours": 1 / 3600}), target=fake.TARGET) == 4
    assert "budget.hours=0.000277778 are used up" in capsys.readouterr().err
    assert ledger.state(Store(tmp_path / "hours").trial(slow.key)) == "resumable"
    assert launch(fake.plan(tmp_path / "hours", slow, budget={"hours": 1 / 3600}), target=fake.TARGET) == 4
    assert attempts(tmp_path / "hours", slow) == [1]
    assert launch(fake.plan(tmp_path / "hours", slow, budget={"hours": 1}), target=fake.TARGET) == 0
    with pytest.raises(UserError, match="budget.deadline=2020-01-01T00:00 has passed"):
        launch(fake.plan(tmp_path / "past", slow, budget={"deadline": "2020-01-01T00:00"}), target=fake.TARGET)


def test_only_new_cells_run(tmp_path: Path) -> None:
    """One beta added, one removed, and the same trial in another sweep. Kills: running shared or finished cells again,
    removing what the new plan no longer has."""
    low, mid, high = (fake.spec(beta=beta) for beta in (0.1, 0.2, 0.3))
    assert launch(fake.plan(tmp_path, low, mid), target=fake.TARGET) == 0
    before = (Store(tmp_path).trial(mid.key).done).read_bytes()
    assert launch(fake.plan(tmp_path, mid, high), target=fake.TARGET) == 0
    assert launch(fake.plan(tmp_path, low, high, sweep="another"), target=fake.TARGET) == 0
    assert attempts(tmp_path, low, mid, high) == [1, 1, 1]
    assert Store(tmp_path).trial(mid.key).done.read_bytes() == before


def test_a_finished_trial_with_a_damaged_file_is_finished_again(tmp_path: Path) -> None:
    spec = fake.spec()
    folder = Store(tmp_path).trial(spec.key)
    assert launch(fake.plan(tmp_path, spec), target=fake.TARGET) == 0
    weights = folder.adapter / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"weighty")
    assert launch(fake.plan(tmp_path, spec), target=fake.TARGET) == 0
    assert weights.read_bytes() == b"weights" and attempts(tmp_path, spec) == [2]
    assert sorted(path.name for path in (folder.root / "damaged").iterdir()) == [
        "DONE.json.1", "pytorch_lora_weights.safetensors.1"
    ]  # fmt: skip


def test_two_launches_at_once(tmp_path: Path) -> None:
    """In one process here, with real processes in test_chaos_kills.py: no trial twice, both end well."""
    specs = [fake.spec(seed=seed, steps=20, seconds=0.01) for seed in range(4)]
    codes: list[int] = []

    def one() -> None:
        codes.append(launch(fake.plan(tmp_path, *specs), target=fake.TARGET))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and attempts(tmp_path, *specs) == [1, 1, 1, 1]
    assert all(state == "done" for state, _ in measured(tmp_path).values())


class Flaky(tracking.NoView):
    """A tracker that dies while the trials run, and is back at the end."""

    def __init__(self) -> None:
        self.calls, self.closed = 0, False

    def forward(self) -> int:
        self.calls += 1
        raise ConnectionError("server gone")

    def close(self, states: Any, *, interrupted: bool = False) -> None:
        self.closed = True


def test_a_dying_tracker_stops_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    view = Flaky()
    monkeypatch.setattr(tracking, "open_view", lambda *_: view)
    assert launch(fake.plan(tmp_path, fake.spec(steps=20, seconds=0.02)), target=fake.TARGET) == 0
    assert view.closed and view.calls >= 1
    assert capsys.readouterr().err.count("MLflow does not answer (server gone)") == 1


def test_a_dead_tracker_does_not_hide_the_result(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    view = Flaky()
    view.close = view.log_report = lambda *_, **__: view.forward()  # type: ignore[assignment, method-assign]
    monkeypatch.setattr(tracking, "open_view", lambda *_: view)
    monkeypatch.setattr(launching, "CLOSE_SECONDS", 0.0)
    assert launch(fake.plan(tmp_path, fake.spec()), target=fake.TARGET) == 0
    assert "the runs in MLflow are not closed (server gone)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "/proc/pift"}, "store=/proc/pift cannot be written"),
        ({"tracking": {"name": "mlflow", "uri": "http://127.0.0.1:9"}}, "tracking.uri='http://127.0.0.1:9'"),
        ({"tracking": {"name": "mlflow", "uri": "nonsense"}}, "tracking.uri='nonsense'"),
        ({"executor": {"name": "slurm"}}, "executor='slurm'"),
        ({"executor": {"name": "ray", "cpus": 0}}, "executor.cpus=0"),
        ({"executor": {"name": "ray", "cpus": 1}, "resources": {"cpu": 2}}, "is more than this machine has .cpu=1 "),
        ({"resources": {"cpu": -1}}, "resources.cpu=-1"),
        ({"resources": {"gpu": 1.5}}, "resources.gpu=1.5"),
        ({"resources": {"threads": 0}}, "resources.threads=0"),
    ],
)
def test_bad_places_are_refused_before_anything_is_written(tmp_path: Path, changes: Any, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        grid = fake.plan(tmp_path / "store", fake.spec())
        grid.config.update(changes)
        launch(grid, target=fake.TARGET)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 60


@pytest.mark.ray
def test_ray_gives_the_same_store(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """One Ray session for all: equal journals, a failing trial, a killed process, code in a folder of the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "user_trial.py").write_text("from tests.fake_trial import run_trial\n")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    specs = [fake.spec(seed=seed, seconds=0.02) for seed in range(3)]
    specs += [fake.spec(seed=3, fail_at=2), fake.spec(seed=4, die_at=2), fake.spec(seed=5, die_at=2, die_once=True)]
    assert launch(fake.plan(tmp_path / "ray", *specs, executor="ray"), target="user_trial.run_trial") == 3
    said = capfd.readouterr()
    assert "raylet" not in said.out + said.err and "Traceback" not in said.err
    died = Store(tmp_path / "ray").trial(specs[4].key)
    assert ledger.state(died) == "stale" and attempts(tmp_path / "ray", *specs[4:]) == [4, 2]  # tried again, 3 times
    assert f"not finished: {specs[4].label}" in said.err

    assert launch(fake.plan(tmp_path / "inline", *specs[:4]), target=fake.TARGET) == 3
    by_ray, inline = measured(tmp_path / "ray"), measured(tmp_path / "inline")
    assert by_ray.pop(specs[4].key)[0] == "stale" and by_ray.pop(specs[5].key)[0] == "done"
    assert by_ray == inline
    assert "user_trial" not in sys.modules


def test_inline_stops_between_trials(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    executor = executors.make({"executor": "inline"}, stop=stop, target=fake.TARGET)
    seen: list[tuple[str, Outcome]] = []

    def stop_now(key: str, outcome: Outcome) -> None:
        seen.append((key, outcome))
        stop.touch()

    jobs = [Job(spec.key, spec.to_dict(), tmp_path / spec.key) for spec in (fake.spec(), fake.spec(seed=1))]
    for job in jobs:
        job.folder.mkdir()
    with executor:
        executor.run(jobs, stop_now)
    assert seen == [(jobs[0].key, Outcome("done", 4))]
