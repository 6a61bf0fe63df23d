"""What every test process is: one thread, no network, nobody's MLflow server, nobody's Ray cluster.

Set before torch, mlflow or ray are imported, so that the processes that a test starts are the same.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",  # torch takes its number of threads from it: two cores run two test processes
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES=os.environ.get("PIFT_TEST_GPUS", ""),
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    MPLBACKEND="Agg",
    NO_COLOR="1",
)
for name in [*os.environ]:
    if name in ("RAY_ADDRESS", "PYTHONPATH", "FORCE_COLOR", "HYDRA_FULL_ERROR") or (
        name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY"
    ):
        del os.environ[name]


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A TCP connection that would leave this machine's networks fails, and says so."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type & socket.SOCK_STREAM:
            host = address[0]  # type: ignore[index]
            try:
                outside = ipaddress.ip_address(host).is_global
            except ValueError:
                outside = host != "localhost"
            if outside:
                raise OSError(f"a test tried to reach {host}: tests have no network")
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one costs seconds, copying it nothing."""
    from orchestrator.tracking.client import create_database

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    create_database(f"sqlite:///{path}")
    return path
