"""MLflow as a view: runs and their states, forwarding that may be repeated, servers that are not there."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.fake_trial as fake
from orchestrator import tracking
from orchestrator.errors import UserError
from orchestrator.grid import Cell, Plan
from orchestrator.ledger import Store, mlflow_file
from orchestrator.tracking import mlflow_view
from orchestrator.tracking.mlflow_view import MlflowView, flatten
from workers.store import read_json, write_json


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one costs seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_view._create_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(database: Path, tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "store")
    found.root.mkdir()
    shutil.copy(database, found.root / "mlflow.db")
    yield found


def content(*specs: Any, sweep: str = "tried") -> dict[str, Any]:
    cells = [Cell(one.key, one, {"seed": one.seed}) for one in specs]
    return Plan(sweep, {"seed": [one.seed for one in specs]}, cells, {}).row()


def run(store: Store, spec: Any) -> None:
    folder = store.trial(spec.key)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.spec, spec.to_dict())
    fake.run_trial(spec.to_dict(), folder.root)


def history(view: MlflowView, key: str) -> dict[str, list[tuple[int, float, int]]]:
    """Every point MLflow holds of a trial."""
    assert view.client is not None
    run_id = view.trials[key].run_id
    names = view.client.get_run(run_id).data.metrics
    points = {name: view.client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((p.step, p.value, p.timestamp) for p in found) for name, found in points.items()}


def status(view: MlflowView, key: str) -> str:
    assert view.client is not None
    return view.client.get_run(view.trials[key].run_id).info.status


def test_one_run_per_trial_for_life(store: Store) -> None:
    spec = fake.spec(steps=4)
    view = MlflowView(None, store, content(spec))
    view.open()
    assert status(view, spec.key) == "SCHEDULED"
    run(store, spec)
    assert view.forward() == 5 * 2 + 3 * 2
    assert view.forward() == 0
    view.close({spec.key: "done"})
    assert view.client is not None
    first = view.client.get_run(view.trials[spec.key].run_id)
    assert first.info.status == "FINISHED"
    assert first.data.params["train.gradient_steps"] == "4"
    assert first.data.tags["trial.key"] == spec.key
    assert first.data.tags["mlflow.parentRunId"] == view.parent
    assert first.data.tags["sweep"] == "tried"
    assert {"git.commit", "git.dirty", "lock.sha256", "mlflow.note.content"} <= set(first.data.tags)
    assert view.client.get_run(view.parent).info.status == "FINISHED"
    files = [found.path for found in view.client.list_artifacts(first.info.run_id, "images")]
    assert len(files) == 2 * 3  # three evaluations, full and small
    assert any(
        name.startswith("images/samples+step+4+timestamp+") and name.endswith("+compressed.webp") for name in files
    )
    assert [found.path for found in view.client.list_artifacts(first.info.run_id, "adapter")]

    second = MlflowView(None, store, content(spec, sweep="another"))  # a second sweep shares the cell
    second.open()
    assert second.trials[spec.key].run_id == first.info.run_id
    assert second.parent != view.parent
    tags = view.client.get_run(first.info.run_id).data.tags
    assert (tags["sweep.tried"], tags["sweep.another"]) == ("cell", "cell")
    assert first.info.run_id in view.client.get_run(second.parent).data.tags["mlflow.note.content"]
    assert status(second, spec.key) == "FINISHED"


def test_sending_again_adds_nothing(store: Store) -> None:
    spec = fake.spec(steps=4)
    run(store, spec)
    view = MlflowView(None, store, content(spec))
    view.open()
    view.forward()
    before = history(view, spec.key)
    entry = read_json(mlflow_file(store.trial(spec.key)))
    records = [json.loads(line) for line in store.trial(spec.key).journal.read_text().splitlines()]
    assert before["train/loss"] == [
        (record["step"], record["metrics"]["train/loss"], round(record["time"] * 1000)) for record in records
    ]

    entry["store"]["offset"] = 0  # a crash after the batch, before the cursor
    write_json(mlflow_file(store.trial(spec.key)), entry)
    again = MlflowView(None, store, content(spec))
    again.open()
    assert again.forward() > 0
    assert history(again, spec.key) == before

    mlflow_file(store.trial(spec.key)).unlink()  # the cursor is lost: the run is found by its tags
    found = MlflowView(None, store, content(spec))
    found.open()
    assert found.trials[spec.key].run_id == view.trials[spec.key].run_id
    found.forward()
    assert history(found, spec.key) == before
    assert found.client is not None
    assert len(found.client.list_artifacts(found.trials[spec.key].run_id, "images")) == 2 * 3


def test_a_lost_database_is_rebuilt(store: Store, database: Path) -> None:
    spec = fake.spec(steps=4)
    run(store, spec)
    view = MlflowView(None, store, content(spec))
    view.open()
    view.forward()
    before = history(view, spec.key)
    other = Store(store.root.parent / "moved")
    shutil.copytree(store.root, other.root)
    shutil.copy(database, other.root / "mlflow.db")
    rebuilt = MlflowView(None, other, content(spec))
    rebuilt.open()
    rebuilt.close({spec.key: "done"})
    assert history(rebuilt, spec.key) == before
    assert status(rebuilt, spec.key) == "FINISHED"


def test_large_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake.spec(steps=900)
    journal = store.trial(spec.key).journal
    journal.parent.mkdir(parents=True)
    names = ("train/loss", "train/grad_norm", "train/reward_mean", "train/kl_path_nats")
    records = [{"time": 1e9 + step, "step": step, "metrics": dict.fromkeys(names, step / 7)} for step in range(901)]
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    view = MlflowView(None, store, content(spec))
    view.open()
    sizes: list[int] = []
    send = view.client.log_batch  # type: ignore[union-attr]

    def counted(run_id: str, metrics: Any = (), **rest: Any) -> None:
        sizes.append(len(metrics))
        send(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(view.client, "log_batch", counted)
    began = time.perf_counter()
    points = view.forward()
    print(f"{points / (time.perf_counter() - began):.0f} points/s")
    assert points == sum(sizes) == 901 * 4
    assert sizes == [1000, 1000, 1000, 604]


def test_states_of_failures_and_interruptions(store: Store) -> None:
    failing, waiting = fake.spec(seed=1, fail_at=2), fake.spec(seed=2)
    view = MlflowView(None, store, content(failing, waiting))
    view.open()
    run(store, failing)
    view.close({failing.key: "failed", waiting.key: "new"}, interrupted=True)
    assert status(view, failing.key) == "FAILED"
    assert status(view, waiting.key) == "KILLED"
    assert view.client is not None
    assert view.client.get_run(view.parent).info.status == "KILLED"
    assert view.client.get_run(view.trials[failing.key].run_id).data.tags["failure.message"] == "asked to fail"
    again = MlflowView(None, store, content(failing, waiting))
    again.open()
    assert status(again, waiting.key) == "SCHEDULED"


def test_params_are_flat_and_within_limits() -> None:
    flat = flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "", "f": {}, "g": "x" * 7000})
    assert {name: flat[name] for name in "de"} == {"d": "null", "e": '""'}
    assert (flat["a.b"], flat["a.c"], flat["f"]) == ("1", "[1, 2]", "{}")
    params = mlflow_view._params(flat | {"odd;name": "1"})
    assert max(len(param.value) for param in params) == 6000
    assert "odd_name" in {param.key for param in params}


@pytest.mark.parametrize(
    "uri",
    [
        "nonsense",
        "mlruns",
        "file:///srv/mlruns",
        "http://",
        "http:/host",
        "http://host:port",
        "sqlite://x.db",
        "ftp://h",
    ],
)
def test_malformed_addresses(uri: str) -> None:
    with pytest.raises(UserError, match="tracking.uri=.*leave tracking.uri=null"):
        tracking.check({"tracking": {"name": "mlflow", "uri": uri}})


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=f"tracking.uri='http://127.0.0.1:{port}' has no MLflow that answers"):
        tracking.check({"tracking": {"name": "mlflow", "uri": f"http://127.0.0.1:{port}"}})
    assert time.monotonic() - began < 15


def test_somebody_listens_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_view, "PROBE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="no answer in 1 s"):
            mlflow_view.probe(f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")


def test_passwords_are_not_shown() -> None:
    assert mlflow_view._without_password("http://user:secret@host:1/x") == "http://host:1/x"


def test_a_database_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking.uri="):
        tracking.check({"tracking": {"name": "mlflow", "uri": f"sqlite:///{tmp_path}/nowhere/mlflow.db"}})


def test_tracking_off() -> None:
    assert tracking.settings({"tracking": None}) is None
    assert isinstance(tracking.open_view({"tracking": "none"}, Store("."), {}), tracking.NoView)
