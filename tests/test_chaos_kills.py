"""kill -9 at random moments, and two launches at once: nobody can tell from the store that anything happened.

Real trials (model=lq), real processes, Ray, an MLflow server. `make chaos` kills longer: PIFT_CHAOS=full.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from orchestrator import ledger, ui
from orchestrator.ledger import Store
from orchestrator.tracking.client import create_database, reach
from workers.recorder import CLOCK_METRICS, parse_line, read_journal
from workers.store import TrialFolder, sound_record

ROOT = Path(__file__).parents[1]
FULL = os.environ.get("PIFT_CHAOS") == "full"
SWEEP = [
    "model=lq", "reward=quadratic", "method=pi_ft,dpok", "seed=0,1,2", "method.lr=1e-2", "sweep.name=killed",
    "train.gradient_steps=240", "train.trajectories=64", "train.checkpoint_every=20", "eval.every=30", "eval.samples=8",
]  # fmt: skip
"""Six trials of two seconds each, and as long as the pauses make them."""
KILLS = 60 if FULL else 20
pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1800)]


def driver(store: Path, *overrides: str, pause: float = 0.0, log: Path) -> subprocess.Popen[bytes]:
    """A launch in a process of its own."""
    command = [sys.executable, "-m", "tests.chaos_driver", str(pause), *SWEEP, f"store={store}", *overrides]
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stream)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sweep gives when nobody does anything to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = driver(folder / "store", "executor=inline", "tracking=none", log=folder / "log")
    assert process.wait(300) == 0, (folder / "log").read_text()
    return content(folder / "store")


def content(store: Path) -> dict[str, Any]:
    """{key: (state, journal without clocks, adapter)} of every trial; every step exactly once."""
    found = {}
    for folder in map(TrialFolder, sorted((store / "trials").iterdir())):
        records = [parse_line(line) for line in folder.journal.read_bytes().splitlines(keepends=True)]
        assert [record["step"] for record in records] == list(range(241)), folder
        for record in records:
            del record["time"]
            record["metrics"] = {name: v for name, v in record["metrics"].items() if name not in CLOCK_METRICS}
        adapter = {path.name: path.read_bytes() for path in folder.adapter.iterdir()}
        found[folder.root.name] = (ledger.state(folder), records, adapter)
    return found


# ---------------------------------------------------------------------------------------------------------- kills


class Launched:
    """The launch under attack: begun again whenever it has ended."""

    def __init__(self, store: Path, log: Path, *overrides: str) -> None:
        self.store, self.log, self.overrides = Store(store), log, overrides
        self.began = 0
        self.begin()

    def begin(self) -> None:
        self.process = driver(self.store.root, *self.overrides, pause=0.06, log=self.log)
        self.began += 1

    def again(self) -> None:
        """Begin anew if it has ended; its code says how honest it was."""
        if self.process.poll() is not None:
            codes = (0, 3, -signal.SIGKILL) if self.named() else (2, 3, -signal.SIGKILL)
            assert self.process.returncode in codes, self.log.read_text()[-4000:]
            self.begin()

    def named(self) -> bool:
        """Whether the launch that ended had begun to write."""
        records = (sound_record(path) for path in self.store.root.glob("launches/*.json"))
        return any(record.get("pid") == self.process.pid for record in records)

    def workers(self) -> list[int]:
        """The processes of the trials that are at work."""
        found = []
        for path in self.store.root.glob("trials/*"):
            attempt = ledger.last_attempt(TrialFolder(path))
            if attempt is not None and attempt.alive(time.time()):
                found.append(int(attempt.content["pid"]))
        return found

    def head(self) -> list[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [child.pid for child in children if child.name() in ("gcs_server", "raylet")]
        return []

    def victims(self, kind: str) -> list[int]:
        return {"worker": self.workers, "driver": lambda: [self.process.pid], "head": self.head}[kind]()


def attack(launched: Launched, kinds: list[str], rng: random.Random, extra: dict[str, Callable[[], None]]) -> list[str]:
    """Kill one of each kind in turn, at random moments while trials are at work; what was killed."""
    killed = []
    for kind in kinds:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            launched.again()
            time.sleep(rng.uniform(0.1, 1.5))
            if kind in extra:
                extra[kind]()
                killed.append(kind)
                break
            if (found := launched.victims(kind)) and (kind != "driver" or launched.workers() or rng.random() < 0.2):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    killed.append(kind)
                    break
        if kind in ("driver", "head"):
            launched.process.wait(150)  # MLflow may be starting: the end of a launch waits for it, twice
    return killed


class Server:
    """An MLflow server that is started again whenever it was killed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.uri, self.database, self.log = f"http://127.0.0.1:{self.port}", folder / "mlflow.db", folder / "mlflow.log"
        create_database(f"sqlite:///{self.database}")
        self.begin()
        self.wait()

    def begin(self) -> None:
        with self.log.open("ab") as log:
            environment = os.environ | ui.ENVIRONMENT
            self.process = subprocess.Popen(
                ui.command(self.database, self.port), env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 120
        while reach(self.uri) is not None:
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.5)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.begin()

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    found.end()


def test_killed_twenty_times(tmp_path: Path, undisturbed: dict[str, Any], server: Server) -> None:
    """Workers, drivers, Ray's head and the MLflow server. Then a relaunch finishes; each step once, bit-equal; one run
    per trial with every point, none of them RUNNING."""
    rng = random.Random(0)
    store, log = tmp_path / "store", tmp_path / "log"
    overrides = ("executor=ray", f"tracking.uri={server.uri}")
    launched = Launched(store, log, *overrides)
    kinds = [kind for kind, share in (("worker", 8), ("driver", 6), ("head", 3), ("mlflow", 3)) for _ in range(share)]
    kinds *= KILLS // 20
    rng.shuffle(kinds)
    while not launched.store.sweep("killed").mlflow.exists():  # a server that was never reached is taken for a mistake
        assert launched.process.poll() is None, log.read_text()
        time.sleep(0.1)
    assert attack(launched, kinds, rng, {"mlflow": server.kill}) == kinds
    launched.process.wait(300)
    server.wait()
    last = driver(store, *overrides, log=log)
    assert last.wait(300) == 0, log.read_text()[-4000:]
    assert content(store) == undisturbed
    assert "Traceback" not in log.read_text()
    assert_one_whole_run_per_trial(Store(store), server.uri)


def assert_one_whole_run_per_trial(store: Store, uri: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("pift")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    of_trials = {run.data.tags["trial.key"]: run for run in runs if "trial.key" in run.data.tags}
    assert len(runs) == len(of_trials) + 1 == 7
    for key, run in of_trials.items():
        journaled: dict[str, list[int]] = {}
        for record in read_journal(store.trial(key).journal):
            for name in record["metrics"]:
                journaled.setdefault(name, []).append(record["step"])
        sent = {name: [p.step for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(steps) for name, steps in sent.items()} == journaled


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_head_that_dies_while_it_starts(tmp_path: Path, part: str) -> None:
    """Said at once, exit code 3. Kills: leaving it to Ray, which ends the process after minutes with exit code 1."""
    launched = Launched(tmp_path / "store", tmp_path / "log", "executor=ray", "tracking=none")
    found: list[psutil.Process] = []
    while not found:
        assert launched.process.poll() is None, launched.log.read_text()
        with contextlib.suppress(psutil.Error):
            found = [child for child in psutil.Process(launched.process.pid).children() if child.name() == part]
    time.sleep(0.3)
    found[0].kill()
    assert launched.process.wait(60) == 3
    said = launched.log.read_text()
    assert f"{part} died" in said and "give the same command again" in said and "Traceback" not in said


# --------------------------------------------------------------------------------------------------- two at a time


def pair(folder: Path, count: int, *overrides: str) -> list[list[int]]:
    """The exit codes of two processes that launch one sweep into the same stores at the same time."""
    command = [sys.executable, "-m", "tests.chaos_driver", "twice", str(folder), str(count), *SWEEP, *overrides]
    with (folder / "log").open("ab") as log:
        both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log) for _ in range(2)]
        while any(process.poll() is None for process in both) and not any(process.returncode for process in both):
            time.sleep(0.2)
        for process in both:  # where one failed, the other waits for it
            process.kill()
        said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], (folder / "log").read_text()[-4000:]
    return [json.loads(text.decode()) for text in said]


def assert_nothing_twice(store: Path, undisturbed: dict[str, Any] | None) -> None:
    for folder in map(TrialFolder, (store / "trials").iterdir()):
        assert [path.name for path in folder.attempts.iterdir()] == ["0001.json"], folder
    if undisturbed is not None:
        assert content(store) == undisturbed


def test_two_launches_at_the_same_time(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Ten times: eight in their own processes, one with MLflow's database between them, one with Ray. No trial is
    trained twice, both end in exit code 0. Kills: looking before creating the attempt; not waiting for the other."""
    short = ("train.gradient_steps=10", "executor=inline")
    (tmp_path / "eight").mkdir()
    assert pair(tmp_path / "eight", 8 * KILLS // 20, *short, "tracking=none") == [[0] * (8 * KILLS // 20)] * 2
    for store in (tmp_path / "eight").glob("[0-9]*"):
        assert_nothing_twice(store, None)

    (tmp_path / "view").mkdir()
    assert pair(tmp_path / "view", 1, *short) == [[0], [0]]
    assert_nothing_twice(tmp_path / "view" / "0", None)
    runs = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/view/0/mlflow.db").search_runs(["1"])
    assert len(runs) == 7 and {run.info.status for run in runs} == {"FINISHED"}

    (tmp_path / "ray").mkdir()
    assert pair(tmp_path / "ray", 1, "executor=ray", "tracking=none") == [[0], [0]]
    assert_nothing_twice(tmp_path / "ray" / "0", undisturbed)


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_signals(tmp_path: Path, undisturbed: dict[str, Any], executor: str) -> None:
    """SIGTERM: a checkpoint at the step that was reached, exit code 130. SIGINT twice: at once, 130, nothing lost but
    the steps since the last checkpoint. Then to the end, bit-equal. Kills: stopping without a checkpoint; a second
    signal that waits; states that say running."""
    store, log = Store(tmp_path / "store"), tmp_path / "log"

    def begun(steps: int, pause: float) -> subprocess.Popen[bytes]:
        before = reached()
        process = driver(store.root, f"executor={executor}", "tracking=none", pause=pause, log=log)
        while reached() < before + steps:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        return process

    def reached() -> int:
        """Gradient steps of all trials that are at work or were."""
        return sum(ledger.last_step(TrialFolder(path).journal) or 0 for path in store.root.glob("trials/*"))

    process = begun(3, pause=0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert set(states(store)) <= {"resumable"}
    for folder in map(TrialFolder, store.root.glob("trials/*")):
        steps = [int(path.stem.removeprefix("step_")) for path in folder.checkpoints.glob("*.json")]
        assert max(steps) == ledger.last_step(folder.journal)

    process = begun(1, pause=120.0)  # in the middle of a very long step
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert set(states(store)) <= {"resumable", "stale"} and store.launches() == {}
    assert driver(store.root, "executor=inline", "tracking=none", log=log).wait(300) == 0
    assert content(store.root) == undisturbed and "Traceback" not in log.read_text()


def states(store: Store) -> list[str]:
    return [ledger.state(TrialFolder(path)) for path in store.root.glob("trials/*")]
