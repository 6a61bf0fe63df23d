"""Two nodes with nothing but the store between them and the head's; one of them is cut off in the middle of its trials.

Network namespaces stand for the machines (tests/hosts.py), real trials and Ray.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ledger
from orchestrator.ledger import Store
from tests import hosts
from tests.chaos_driver import PAUSE
from tests.test_chaos_kills import SWEEP, content, undisturbed  # noqa: F401  (a fixture)
from workers.store import TrialFolder, sound_record

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SECONDS = 0.15
"""What a step takes: 240 of them are longer than it takes to find out that a node is gone."""
MEMORY = "--object-store-memory=80000000"
SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
}
"""Ray finds out within seconds that a node is gone, and the node that it is cut off, instead of within a minute."""
absent = hosts.missing()
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(absent is not None, reason=str(absent)),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[hosts.Host]]:
    """A head without CPUs, and two nodes of two CPUs."""
    environment = SOON | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), PAUSE: str(SECONDS)}
    with hosts.hosts(3) as made:
        head, *nodes = made
        for host in made:
            host.environment = environment
        address = f"{head.ip}:6379"
        say = ["start", "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        head.start([*RAY, *say, f"--node-ip-address={head.ip}", MEMORY, "--block"], log=tmp_path / "head")
        for node in nodes:
            say = ["start", f"--address={address}", f"--node-ip-address={node.ip}", "--num-cpus=2"]
            asked = f"{' '.join(RAY)} health-check --address {address}"
            once_up = f'until {asked}; do sleep 1; done 2>/dev/null; exec "$@"'
            node.start(["sh", "-c", once_up, "sh", *RAY, *say, MEMORY, "--block"], log=tmp_path / node.name)
        deadline = time.monotonic() + 240
        while head.start([*RAY, "health-check", "--address", address], log=tmp_path / "health").wait() != 0:
            assert time.monotonic() < deadline, (tmp_path / "head").read_text()[-2000:]
        yield made


def launch(host: hosts.Host, store: Store, address: str, log: Path) -> Any:
    command = [sys.executable, "-m", "tests.chaos_driver", str(SECONDS), *SWEEP, "tracking=none"]
    where = [f"store={store.root}", "executor=ray", f"executor.address={address}"]
    return host.start([*command, *where], log=log, cwd=ROOT)


def until(true: Callable[[], bool], process: Any, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def test_a_node_is_cut_off(tmp_path: Path, cluster: list[hosts.Host], undisturbed: dict[str, Any]) -> None:  # noqa: F811
    """The trials spread over the nodes; those of the one that is cut off are taken over by the other; when it is back,
    its processes wake up in the middle of trials that are another's by now. Every step once, bit-equal to an
    undisturbed sweep; exit code 0. Kills: a lease that the process table of another machine decides; writing on after
    being given up; a lost node that counts as a failure."""
    head, first, second = cluster
    nodes = (first.name, second.name)
    store, log = Store(tmp_path / "store"), tmp_path / "log"
    process = launch(head, store, f"{head.ip}:6379", log)

    def at_work() -> dict[str, list[str]]:
        """{host: trials}, of the attempts that are at work and have made steps."""
        found: dict[str, list[str]] = {}
        for folder in map(TrialFolder, store.root.glob("trials/*")):
            attempt = ledger.last_attempt(folder)
            if attempt is not None and not attempt.content.get("ended") and (ledger.last_step(folder.journal) or 0) > 5:
                found.setdefault(attempt.content["host"], []).append(folder.root.name)
        return found

    until(lambda: {host: len(keys) for host, keys in at_work().items()} == dict.fromkeys(nodes, 2), process, log)
    moved = at_work()[second.name]
    second.cut()
    until(lambda: all((store.trial(key).attempts / "0002.json").exists() for key in moved), process, log)
    second.join()
    assert process.wait(600) == 0, log.read_text()[-4000:]
    assert "Traceback" not in log.read_text()
    assert content(store.root) == undisturbed
    for key in moved:
        attempts = [sound_record(path) for path in sorted(store.trial(key).attempts.iterdir())]
        assert [attempt["host"] for attempt in attempts] == [second.name, first.name]
