"""docker/compose.yaml for real: build, up, a sweep on Ray workers with MLflow on PostgreSQL, kills, down, up.

Runs where a Docker engine answers and PIFT_DOCKER=1 asks for it: minutes, and 15 GB of disk the first time.
    PIFT_DOCKER=1 PIFT_COMPOSE_OVERRIDE=/path/to/lab.yaml pytest tests/test_docker_lab.py -s
PIFT_COMPOSE_OVERRIDE: a further compose file, for what builds on this machine need (a network, other base images).
The stack is a project of its own name, pift-test, with ports, volumes and secrets of its own, removed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = "pift-test"
PORTS = {"PIFT_MLFLOW_PORT": "5997", "PIFT_RAY_PORT": "8997"}
SETTINGS = PORTS | {"PIFT_WORKERS": "2"}
SWEEP = ["sweep=tiny", "beta=0.1,1", "train.gradient_steps=40", "train.checkpoint_every=5", "eval.every=20"]


def absent() -> str | None:
    """Why the stack cannot be run here."""
    if os.environ.get("PIFT_DOCKER") != "1":
        return "PIFT_DOCKER=1 asks for it: minutes, and 15 GB of disk the first time"
    if shutil.which("docker") is None:
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return "no Docker engine answers (docker info)"
    return None


pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(absent() is not None, reason=str(absent())),
]


class Stack:
    """The compose project of these tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "docker", folder, ignore=shutil.ignore_patterns("secrets", ".env"))
        text = (folder / "compose.yaml").read_text(encoding="utf-8")
        (folder / "compose.yaml").write_text(text.replace("context: ..", f"context: {ROOT}"), encoding="utf-8")
        subprocess.run(["bash", folder / "secrets.sh"], check=True, capture_output=True)
        files = [folder / "compose.yaml", *filter(None, [os.environ.get("PIFT_COMPOSE_OVERRIDE")])]
        self.words = ["docker", "compose", "-p", PROJECT, *(word for file in files for word in ("-f", str(file)))]

    def __call__(self, *words: str, check: bool = True, limit: float = 1800) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.words, *words], capture_output=True, text=True, timeout=limit, env=os.environ | SETTINGS
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*self.words, *words], text=True, env=os.environ | SETTINGS, **pipes)  # type: ignore[call-overload]

    def inside(self, code: str) -> str:
        """What Python says in a container that sees the store."""
        return self("exec", "-T", "ray-head", "python", "-c", code).stdout

    def trials(self) -> dict[str, dict[str, object]]:
        """{key: last journaled step, hash of the journal, attempts, done} as the store says."""
        return json.loads(self.inside(TRIALS))


TRIALS = """
import hashlib, json, pathlib
found = {}
for folder in pathlib.Path('/store/trials').glob('*'):
    journal = folder / 'journal.jsonl'
    content = journal.read_bytes() if journal.exists() else b''
    found[folder.name] = {'lines': content.count(b'\\n'), 'hash': hashlib.sha256(content).hexdigest(),
        'attempts': len(list((folder / 'attempts').glob('*.json'))), 'done': (folder / 'DONE.json').exists()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("compose") / "docker")
    remove_drivers()
    made("down", "--volumes", check=False)
    made("build")
    begun = time.monotonic()
    made("up", "--detach", "--wait")
    assert made.trials() == {}, "volumes of an earlier run are left: docker compose -p pift-test down --volumes"
    print(f"\nup to healthy: {time.monotonic() - begun:.0f} s")
    yield made
    remove_drivers()
    made("down", "--volumes", check=False)


def remove_drivers() -> None:
    """Containers of `compose run`, which `down` leaves alone."""
    labels = (f"com.docker.compose.project={PROJECT}", "com.docker.compose.oneoff=True")
    ask = ["docker", "ps", "-aq", *(word for label in labels for word in ("--filter", f"label={label}"))]
    for name in subprocess.run(ask, capture_output=True, text=True).stdout.split():
        subprocess.run(["docker", "rm", "--force", name], capture_output=True)


def wait_for(what: str, ready: object, limit: float = 300) -> None:
    deadline = time.monotonic() + limit
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}"
        time.sleep(1)


def test_nothing_runs_as_root_and_nothing_listens_beyond_this_machine(stack: Stack) -> None:
    names = stack("ps", "--quiet").stdout.split()
    assert len(names) == 5
    for name in names:
        users = subprocess.run(["docker", "top", name, "-eo", "pid,uid,comm"], capture_output=True, text=True).stdout
        processes = [line.split(maxsplit=2) for line in users.splitlines()[1:]]
        assert processes and not [one for one in processes if one[1] == "0"], users
    ports = re.findall(r"(\S+)->", stack("ps", "--format", "{{.Ports}}").stdout)
    assert sorted(ports) == sorted(f"127.0.0.1:{port}" for port in PORTS.values())


def test_a_sweep_survives_kills_and_is_not_run_again(stack: Stack) -> None:
    """A worker and MLflow are killed while trials run; then the stack goes down and up, and a launch does nothing."""
    driver = stack.start("run", "--rm", "-T", "sweep", "launch", *SWEEP)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(driver.stdout or ()), daemon=True)
    reader.start()
    wait_for("trials at work", lambda: sum(int(one["lines"]) for one in stack.trials().values()) > 8)
    subprocess.run(["docker", "kill", f"{PROJECT}-ray-worker-2"], check=True, capture_output=True)
    subprocess.run(["docker", "kill", f"{PROJECT}-mlflow-1"], check=True, capture_output=True)
    time.sleep(60)
    stack("start", "mlflow")
    code = driver.wait(timeout=900)
    reader.join(timeout=10)
    print("".join(said)[-3000:])
    assert code == 0, "".join(said)[-4000:]
    before = stack.trials()
    assert len(before) == 4 and all(one["done"] for one in before.values())
    assert sum(int(str(one["attempts"])) for one in before.values()) > 4, "no trial was killed: the test shows nothing"
    assert "report.html" in "".join(said)
    assert sent(stack) == 4, "MLflow has every trial, the minute it was away included"

    stack("down")
    stack("up", "--detach", "--wait")
    again = stack("run", "--rm", "-T", "sweep", "launch", *SWEEP)
    assert again.returncode == 0
    assert stack.trials() == before, "something was run again"
    assert sent(stack) == 4, "the database outlives down"


def sent(stack: Stack) -> int:
    """The finished runs of trials in MLflow, asked from this machine."""
    address = f"http://127.0.0.1:{PORTS['PIFT_MLFLOW_PORT']}/api/2.0/mlflow"
    with urllib.request.urlopen(f"{address}/experiments/get-by-name?experiment_name=pift", timeout=30) as answer:
        experiment = json.load(answer)["experiment"]["experiment_id"]
    question = {"experiment_ids": [experiment], "filter": "attributes.status = 'FINISHED'", "max_results": 100}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/runs/search", json.dumps(question).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs = json.load(answer).get("runs", [])
    return sum(any(tag["key"] == "mlflow.parentRunId" for tag in run["data"]["tags"]) for run in runs)


def test_a_stopped_worker_lets_its_trials_write_a_checkpoint(stack: Stack) -> None:
    """`docker compose stop`: every trial leaves a checkpoint of its last step; the same launch goes on from there."""
    words = [*SWEEP, "seed=7", "beta=0.1", "method=pi_ft", "train.gradient_steps=400", "train.checkpoint_every=1000"]
    driver = stack.start("run", "--rm", "-T", "sweep", "launch", *words)
    known = set(stack.trials())
    wait_for("a trial at work", lambda: any(
        int(str(one["lines"])) > 3 for key, one in stack.trials().items() if key not in known
    ))  # fmt: skip
    [key] = set(stack.trials()) - known
    stack("stop", "ray-worker")
    names = stack.inside(f"import os; print(os.listdir('/store/trials/{key}/checkpoints'))")
    assert "step_" in names, "no checkpoint was written at the stop"
    driver.kill()
    driver.wait(timeout=60)


def test_a_wrong_password_says_what_to_do(stack: Stack) -> None:
    secret = stack.folder / "secrets" / "postgres_password"
    secret.unlink()
    secret.write_text(hashlib.sha256(b"another").hexdigest())
    secret.chmod(0o444)
    stack("up", "--detach", "--force-recreate", "--no-deps", "mlflow", check=False)
    wait_for("the message", lambda: "docker/secrets/postgres_password" in stack("logs", "mlflow").stdout, 90)
