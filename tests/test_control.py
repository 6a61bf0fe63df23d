"""status --watch, stop, retry and doctor: what one does to a sweep from outside, through the store."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import tests.fake_trial as fake
from orchestrator import control, doctor, ledger
from orchestrator.cli import main
from orchestrator.doctor import FIXED, NOTE, OK, PROBLEM, Finding
from orchestrator.launch import launch
from orchestrator.ledger import Store
from tests.test_launch import attempts
from workers.store import write_record


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.monitor.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.control.LOOK_SECONDS", 0.05)


class Launching:
    """A launch in a thread."""

    def __init__(self, store: Path, *specs: Any) -> None:
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(store, *specs))
        self._thread.start()
        while not any(state == "running" for state in ledger.survey(Store(store), [s.key for s in specs]).values()):
            time.sleep(0.01)

    def _run(self, store: Path, *specs: Any) -> None:
        self.code = launch(fake.plan(store, *specs), target=fake.TARGET)

    def end(self) -> int | None:
        self._thread.join()
        return self.code


def test_stop_from_outside_and_go_on(tmp_path: Path, capsys: Any) -> None:
    """A checkpoint, exit code 130, and nothing left that would stop the next launch."""
    specs = [fake.spec(seed=seed, steps=200, seconds=0.02) for seed in range(2)]
    at_work = Launching(tmp_path, *specs)
    rows = control.rows(Store(tmp_path), Store(tmp_path).plan("tried"))
    assert [row["state"] for row in rows] == ["running", "scheduled"]
    assert main(["stop", "--store", str(tmp_path)]) == 0
    assert at_work.end() == 130
    said = capsys.readouterr()
    assert "stopped: " in said.out and f"pid {os.getpid()}" in said.out
    assert list(ledger.survey(Store(tmp_path), [spec.key for spec in specs]).values()) == ["resumable", "new"]
    assert main(["stop", "--store", str(tmp_path)]) == 0
    assert "nothing to stop" in capsys.readouterr().out
    specs = [fake.spec(seed=seed, steps=200) for seed in range(2)]
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 0


def test_watch_until_nobody_is_at_work(tmp_path: Path, capsys: Any) -> None:
    """Plain lines where there is no terminal, an object a line with --json; the last one has them all done."""
    at_work = Launching(tmp_path, fake.spec(steps=30, seconds=0.02), fake.spec(seed=1))
    capsys.readouterr()
    assert main(["status", "--watch", "--json", "--store", str(tmp_path)]) == 0
    assert at_work.end() == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"time"')]
    assert len(said) >= 2 and said[-1]["counts"] == {"done": 2}
    assert all(row["key"] for line in said for row in line["cells"])
    assert main(["status", "--watch", "--store", str(tmp_path)]) == 0
    assert "2 cells: 2 done" in capsys.readouterr().out


def test_retry_runs_what_failed_again(tmp_path: Path, capsys: Any) -> None:
    """Kills: forgetting the failure, touching what diverged or another trial than the one that was named."""
    specs = [fake.spec(fail_at=1), fake.spec(seed=1, fail_at=1), fake.spec(seed=2, diverge_at=1), fake.spec(seed=3)]
    store = ["--store", str(tmp_path)]
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 3
    assert main(["retry", *store, "--key", specs[0].key[:6]]) == 0
    assert capsys.readouterr().out.count("may run again") == 1
    assert main(["retry", *store]) == 0
    assert main(["retry", *store]) == 0
    assert "no trial of tried has failed (diverged ones: --diverged)" in capsys.readouterr().out
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 3
    assert attempts(tmp_path, *specs) == [2, 2, 1, 1]
    assert main(["retry", *store, "--diverged"]) == 0
    assert capsys.readouterr().out.count("may run again") == 3


def found(store: Path, fix: bool = False) -> list[Finding]:
    """What doctor says of the store, beyond that all is well."""
    machine = ("versions", "gpu", "weights", "ray")
    return [f for f in doctor.examine(store, fix=fix) if f.level != OK and f.topic not in machine]


def test_doctor_finds_and_mends(tmp_path: Path, capsys: Any) -> None:
    """A finished trial with an altered adapter, a launch and a trial that died, an orphan, a leftover."""
    specs = [fake.spec(), fake.spec(seed=1)]
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 0
    assert found(tmp_path) == []
    store = Store(tmp_path)
    weights = store.trial(specs[0].key).adapter / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"weighty")
    write_record(store.launch_record("dead"), {"sweep": "tried", "pid": 1, "boot": "another", "host": "gone"})
    os.utime(store.launch_record("dead"), (1, 1))
    write_record(store.trial("orphan").attempts / "0001.json", {"attempt": 1, "pid": 1, "born": "?", "steps": 9})
    os.utime(store.trial("orphan").attempts / "0001.json", (1, 1))
    leftover = store.trial(specs[1].key).root / ".journal.jsonl.abcd1234"
    leftover.write_bytes(b"half")
    os.utime(leftover, (1, 1))

    said = {(f.topic, f.level): f.text for f in found(tmp_path)}
    assert "its checksum is not the one in DONE.json" in said["trials", PROBLEM]
    assert "died without a word" in said["launches", NOTE] and "1 trials belong to no sweep" in said["plans", NOTE]
    assert "orphan died without a word" in said["trials", NOTE] and "1 leftovers" in said["leftovers", NOTE]
    assert weights.read_bytes() == b"weighty" and leftover.exists()  # looking changes nothing
    capsys.readouterr()
    assert main(["doctor", "--store", str(tmp_path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["problems"] == 1

    assert {f.topic for f in found(tmp_path, fix=True) if f.level == FIXED} == {"trials", "leftovers"}
    assert not leftover.exists() and main(["doctor", "--store", str(tmp_path)]) == 0
    assert "all is well" in capsys.readouterr().out
    assert launch(fake.plan(tmp_path, *specs), target=fake.TARGET) == 0
    assert weights.read_bytes() == b"weights"


def test_doctor_without_a_store(tmp_path: Path) -> None:
    assert [f.text for f in found(tmp_path / "none")] == [f"there is no store in {tmp_path / 'none'} yet"]


def test_doctor_says_which_weights_are_missing_and_how_to_fetch_them(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# @package _global_\nmodel:\n  _target_: workers.models.diffusion.DiffusionModel\n  name: mine\n"
        "  path: somebody/their-model\n  revision: abc\n  dtype: fp32\n"
    )
    missing = [f for f in doctor.weights([tmp_path]) if f.level == PROBLEM]
    assert [f.text for f in missing] == ["model=mine: somebody/their-model in the hub's cache is not there"]
    assert missing[0].fix.startswith("hf download somebody/their-model model_index.json unet/config.json")
    assert missing[0].fix.endswith("--revision abc    # or model.path=FOLDER")
    others = [f for f in doctor.weights([]) if f.level != OK]
    assert {f.level for f in others} == {NOTE}
    assert any(f.text.startswith("model=sd15: stable-diffusion-v1-5/stable-diffusion-v1-5") for f in others)


def test_doctor_names_a_cluster_that_does_not_answer() -> None:
    assert "no Ray cluster" in next(doctor.ray_cluster("127.0.0.1:1")).text


def test_an_edited_sweep_file(tmp_path: Path, capsys: Any) -> None:
    """One beta added, one removed, real trials through the command line: the new cells run, the removed ones are
    orphans that are kept, and a sweep that asks for them again finds them done."""
    sweep = tmp_path / "conf" / "sweep" / "mine.yaml"
    sweep.parent.mkdir(parents=True)

    def written(*betas: float) -> list[str]:
        sweep.write_text(f"name: mine\naxes:\n  beta: {list(betas)}\n  method: [pi_ft, dpok]\n")
        small = ["model=lq", "reward=quadratic", "train.gradient_steps=2", "train.trajectories=8", "tracking=none"]
        return ["--conf", str(tmp_path / "conf"), "sweep=mine", f"store={tmp_path}/store", *small]

    assert main(["launch", *written(0.5, 1.0)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "store" / "trials").glob("*/DONE.json")}
    capsys.readouterr()
    assert main(["plan", *written(1.0, 2.0), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(cell["beta"], cell["action"]) for cell in planned["cells"]] == [(1.0, "done")] * 2 + [(2.0, "run")] * 2
    assert [cell["beta"] for cell in planned["orphans"]] == [0.5, 0.5]
    assert main(["launch", *written(1.0, 2.0)]) == 0
    trials = Store(tmp_path / "store").root / "trials"
    assert len(before) == 4 and len(list(trials.glob("*/DONE.json"))) == 6
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main(["launch", *written(0.5, 1.0, 2.0)]) == 0
    assert all(len(list(path.iterdir())) == 1 for path in trials.glob("*/attempts"))


def test_doctor_rebuilds_a_deleted_mlflow_database(tmp_path: Path, capsys: Any) -> None:
    """Runs, params, metrics with their times, tags, statuses and pictures are what they were."""
    specs = [fake.spec(), fake.spec(seed=1, fail_at=2)]
    store = tmp_path / "store"
    assert launch(fake.plan(store, *specs, tracking={"name": "mlflow", "uri": None}), target=fake.TARGET) == 3
    before = shown(store)
    assert len(before) == 3 and all(run["metrics"] for name, run in before.items() if name != "tried")
    assert any("images/" in path for path in before[specs[0].label]["files"])
    (store / "mlflow.db").unlink()
    shutil.rmtree(store / "mlartifacts")
    assert main(["doctor", "--store", str(store)]) == 3
    assert "mlflow.db is gone" in capsys.readouterr().out
    assert main(["doctor", "--store", str(store), "--fix"]) == 0
    assert shown(store) == before


def shown(store: Path) -> dict[str, Any]:
    """{run: params, points, tags, status, files} of a store's database; what is drawn anew with each run left out."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("pift").experiment_id]):
        names, run_id = run.data.metrics, run.info.run_id
        history = {name: client.get_metric_history(run_id, name) for name in names}
        points = {name: [(p.step, p.value, p.timestamp) for p in values] for name, values in history.items()}
        found[run.info.run_name] = {
            "params": run.data.params,
            "metrics": {name: sorted(values) for name, values in points.items()},
            "tags": {n: v for n, v in run.data.tags.items() if n not in ("mlflow.parentRunId", "mlflow.note.content")},
            "status": run.info.status,
            "files": sorted(p.path for d in ("images", "adapter") for p in client.list_artifacts(run_id, d)),
        }
    return found
