"""Points on their way to an MLflow server: sent by the trials themselves, late when it is down, and never waited for.

One real server, started and killed as `pift ui` starts it; the other tests need none.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tests.fake_trial as fake
from orchestrator import executors, tracking, ui
from orchestrator import launch as launching
from orchestrator.executors import Job
from orchestrator.grid import Cell, Plan
from orchestrator.launch import launch
from orchestrator.ledger import Store, mlflow_file
from orchestrator.tracking import client, entry, forwarder, mlflow_view, repair
from orchestrator.tracking.forwarder import Forwarder, forwarding
from orchestrator.tracking.mlflow_view import MlflowView
from workers.recorder import Journal, read_journal
from workers.spec import TrialSpec
from workers.store import write_record


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds where there are minutes."""
    monkeypatch.setattr("orchestrator.monitor.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.monitor.FORWARD_SECONDS", 0.2)
    monkeypatch.setattr(forwarder, "FORWARD_SECONDS", 0.2)
    monkeypatch.setattr(forwarder, "DOWN_SECONDS", 1.0)
    monkeypatch.setattr(forwarder, "LAST_SECONDS", 1.0)
    monkeypatch.setattr(launching, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(client, "PROBE_SECONDS", 1.0)


def plan(store: Path, uri: str, *specs: TrialSpec, sweep: str = "tried", required: bool | None = False) -> Plan:
    return fake.plan(store, *specs, sweep=sweep, tracking={"name": "mlflow", "uri": uri, "required": required})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def journaled(store: Store, key: str) -> dict[str, list[tuple[int, int]]]:
    """{metric: [(step, time in ms)]} of a journal."""
    found: dict[str, list[tuple[int, int]]] = {}
    for record in read_journal(store.trial(key).journal):
        for name in record["metrics"]:
            found.setdefault(name, []).append((record["step"], round(record["time"] * 1000)))
    return found


def in_mlflow(uri: str, run_id: str) -> dict[str, list[tuple[int, int]]]:
    """The same of a run."""
    asked = client.MlflowClient(tracking_uri=uri)
    names = asked.get_run(run_id).data.metrics
    points = {name: asked.get_metric_history(run_id, name) for name in names}
    return {name: sorted((point.step, point.timestamp) for point in found) for name, found in points.items()}


# ---- the trial's own thread, with a database in the server's place


@pytest.fixture
def tracked(database: Path, tmp_path: Path) -> tuple[Store, str, TrialSpec, MlflowView]:
    """A store, a tracker, and a trial whose run is open."""
    store, spec = Store(tmp_path / "store"), fake.spec(steps=6, seconds=0.1)
    store.root.mkdir()
    shutil.copy(database, tmp_path / "other.db")
    uri = f"sqlite:///{tmp_path}/other.db"
    view = MlflowView(uri, store, Plan("tried", {"seed": [0]}, [Cell(spec.key, spec, {"seed": 0})], {}).row())
    view.open()
    view.server = True  # as far as the launch can see
    return store, uri, spec, view


@pytest.mark.usefixtures("quick")
def test_a_trial_sends_its_own_points(tracked: tuple[Store, str, TrialSpec, MlflowView]) -> None:
    """While it runs the launch sends none; at its end all are there, each once."""
    store, uri, spec, view = tracked
    folder, sent, seen = store.trial(spec.key), [], []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            sent.append(view.forward())
            seen.append(entry.cursor(entry.read(mlflow_file(folder), uri))[1])

    thread = threading.Thread(target=watch)
    thread.start()
    with forwarding(uri, folder):
        fake.run_trial(spec.to_dict(), folder.root)
        over.set()
        thread.join()
        assert sum(sent) == 0 and view.points == 0
        assert max(seen) >= 1
    assert in_mlflow(uri, view.trials[spec.key].run_id) == journaled(store, spec.key)
    view.close({spec.key: "done"})
    assert view.points == 0
    assert client.MlflowClient(tracking_uri=uri).get_run(view.trials[spec.key].run_id).info.status == "FINISHED"


@pytest.mark.usefixtures("quick")
def test_what_the_trial_did_not_send_the_launch_does(tracked: tuple[Store, str, TrialSpec, MlflowView]) -> None:
    store, uri, spec, view = tracked
    fake.run_trial(spec.to_dict(), store.trial(spec.key).root)
    view.forward()
    assert view.points == 7 * 2 + 4 * 2
    assert in_mlflow(uri, view.trials[spec.key].run_id) == journaled(store, spec.key)


@pytest.mark.usefixtures("quick")
def test_a_failing_tracker_is_asked_ever_less(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, uri, spec, view = tracked
    times: list[float] = []

    def refuse(uri: str) -> None:
        times.append(time.monotonic())
        raise ConnectionError

    monkeypatch.setattr(client, "connect", refuse)
    Journal(store.trial(spec.key).journal).write(0, {"train/loss": 1.0})
    with forwarding(uri, store.trial(spec.key)):
        time.sleep(2.5)
    waits = [later - before for before, later in zip(times, times[1:], strict=False)]
    assert len(waits) >= 2 and waits[0] > 0.35 and waits[1] > 0.7


@pytest.mark.usefixtures("quick")
def test_nothing_is_loaded_before_there_is_something_to_send(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the first record, when the trial's own imports are done, nor at the end of a short trial."""
    store, uri, spec, view = tracked
    asked: list[str] = []
    monkeypatch.setattr(client, "connect", asked.append)
    with forwarding(uri, store.trial(spec.key)):
        time.sleep(0.5)
    assert asked == []
    monkeypatch.setattr(forwarder, "FORWARD_SECONDS", 60.0)
    Journal(store.trial(spec.key).journal).write(0, {"train/loss": 1.0})
    with forwarding(uri, store.trial(spec.key)):
        pass
    assert asked == []


def test_an_interrupt_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Forwarder, "stop", lambda self, seconds: asked.append(seconds))
    with pytest.raises(KeyboardInterrupt), forwarding("http://host", Store(tmp_path).trial("a")):
        raise KeyboardInterrupt
    with forwarding("http://host", Store(tmp_path).trial("a")):
        pass
    assert asked == [0.0, 5.0]


@pytest.mark.parametrize(
    ("uri", "server"),
    [("http://host:1", "http://host:1"), ("https://h", "https://h"), ("sqlite:////x.db", None), (None, None),
     ("postgresql://h/d", None)],
)  # fmt: skip
def test_who_sends(tmp_path: Path, uri: str | None, server: str | None) -> None:
    config = {"executor": {"name": "inline"}, "tracking": {"name": "mlflow", "uri": uri}}
    made: Any = executors.make(config, stop=tmp_path / "stop")
    assert made.setting.server == server


# ---- a server that accepts and never answers


@contextmanager
def silent_server() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.usefixtures("quick")
def test_nobody_waits_for_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """No step waits for a call (3 s here), the trial's end for LAST_SECONDS, the launch's for a call or two."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    store, spec = Store(tmp_path / "store"), fake.spec(steps=20, seconds=0.1)
    with silent_server() as uri:
        place = tracking.place_of(uri)
        write_record(mlflow_file(store.trial(spec.key)), {place: {"run_id": "0" * 32, "offset": 0}})
        job = Job(spec.key, spec.to_dict(), store.trial(spec.key).root)
        setting = executors.Setting(fake.TARGET, tmp_path / "stop", 1, 0, server=uri)
        assert executors.call(setting, job).state == "done"
        times = [record["time"] for record in read_journal(store.trial(spec.key).journal)]
        assert max(later - before for before, later in zip(times, times[1:], strict=False)) < 2.5
        assert time.time() - times[-1] < 2.5

        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        write_record(store.sweep("before").mlflow, {place: {"run_id": "1"}})  # it was reached once
        began = time.monotonic()
        assert launch(plan(store.root, uri, fake.spec(seed=1), required=None), target=fake.TARGET) == 0
        # the probe, opening, the trial and its end, a call under way, closing: a second each; two cores shared
        assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert "Training goes on" in said and "the runs in MLflow are not closed" in said


# ---- a real one


class Server:
    """`mlflow server` on a database, as `pift ui` starts it."""

    def __init__(self, database: Path) -> None:
        self.database, self.port = database, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """It is some ten seconds until it listens."""
        self.process = subprocess.Popen(
            ui.command(self.database, self.port),
            env=os.environ | ui.ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> None:
        assert self.process is not None and ui._wait_until_up(self.process, self.port)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(database: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copy(database, tmp_path / "server.db")
    found = Server(tmp_path / "server.db")
    yield found
    found.kill()


def assert_complete(server: Server, store: Store, keys: list[str]) -> None:
    """MLflow has what the journals have: one run per trial, every point once, all closed."""
    runs = repair._runs(store, server.uri)
    trials = {run.data.tags["trial.key"]: run for run in runs if "trial.key" in run.data.tags}
    assert set(trials) == set(keys) and not repair.duplicates(store, server.uri)
    for key in keys:
        assert in_mlflow(server.uri, trials[key].info.run_id) == journaled(store, key)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not repair.zombies(store, server.uri)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.usefixtures("quick")
def test_a_server_that_comes_late_and_is_killed(server: Server, tmp_path: Path, capsys: Any) -> None:
    """Down for a whole sweep, then rebuilt from the store; killed while a second one runs, then launched again."""
    store = Store(tmp_path / "store")
    early = [fake.spec(seed=seed) for seed in range(2)]
    server.begin()
    assert launch(plan(store.root, server.uri, *early), target=fake.TARGET) == 0
    assert "Training goes on" in capsys.readouterr().err
    server.wait()
    assert client.reach(server.uri) is None
    rebuilt = repair.rebuild(store, server.uri, say=lambda text: None)
    assert (rebuilt.trials, rebuilt.points) == (2, 2 * (5 * 2 + 3 * 2))
    assert_complete(server, store, [spec.key for spec in early])

    late = [fake.spec(seed=7, steps=40, seconds=0.15), fake.spec(seed=8)]
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(launch(plan(store.root, server.uri, *late, sweep="late"), target=fake.TARGET))
    )
    thread.start()
    path, deadline = mlflow_file(store.trial(late[0].key)), time.monotonic() + 60
    while entry.cursor(entry.read(path, server.uri))[1] < 3:  # the trial sends while it runs
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    run_id = entry.read(path, server.uri)["run_id"]
    assert len(in_mlflow(server.uri, run_id)["train/loss"]) >= 4
    assert client.MlflowClient(tracking_uri=server.uri).get_run(run_id).info.status == "RUNNING"
    server.kill()
    server.begin()
    thread.join()
    assert codes == [0]
    server.wait()
    assert launch(plan(store.root, server.uri, *late, sweep="late", required=True), target=fake.TARGET) == 0
    assert entry.read(path, server.uri)["run_id"] == run_id
    assert_complete(server, store, [spec.key for spec in early + late])


def test_the_packages_door_loads_no_mlflow() -> None:
    """Executors and workers pass through it: MLflow is loaded by what needs it."""
    code = "import sys, orchestrator.executors, orchestrator.tracking.forwarder; print('mlflow' in sys.modules)"
    root = Path(mlflow_view.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
