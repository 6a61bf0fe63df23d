"""`pift ui`: MLflow's own server on the store's database, for this machine only, in the foreground until Ctrl-C.

    pift ui                              the newest sweep's charts: their address is printed
    pift ui quickstart --store store --port 5000

A store whose sweeps were recorded in a server has nothing to serve: then the address there is printed, and that is all.
One worker and no job executor: half a gigabyte of memory instead of two. The server reads pictures and reports
straight from <store>/mlartifacts, where the launches put them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.tracking import link, place_of, servers

HOST = "127.0.0.1"
START_SECONDS = 120.0
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}
BLOCKED = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080}
)
"""Ports above 1023 that no browser opens (the fetch standard, "bad port")."""


def serve(store: Store, port: int = 5000, sweep: str | None = None) -> int:
    """Run the server until Ctrl-C; the exit code. Raises UserError where nothing of the sweep is in any MLflow, or
    where the port cannot be used."""
    known = store.sweeps()
    sweep = sweep if sweep is not None else known[-1] if known else None
    elsewhere = [] if sweep is None else servers(store, sweep)
    database = store.root / "mlflow.db"
    for place in elsewhere:
        print(f"sweep {sweep} in the MLflow at {place}:", *_places(store, sweep, place), sep="\n  ", flush=True)
    if not database.is_file():
        if elsewhere:
            return 0
        here = "" if store.far is None else " on this machine (pift doctor --fix makes it from the store)"
        raise UserError(
            f"--store {store} has no mlflow.db{here}: launch a sweep first, as in pift launch sweep=quickstart "
            "(one that was launched with tracking=none: pift doctor --fix makes it from the store)"
        )
    check_port(port)
    environment = os.environ | ENVIRONMENT
    server = subprocess.Popen(command(database, port), env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        with _signals_as_interrupt():
            if not _wait_until_up(server, port):
                return server.wait()
            charts, *further = _places(store, sweep, place_of(None), f"http://{HOST}:{port}")
            print(f"MLflow on {store}: {charts}", *further, sep="\n  ", flush=True)
            print("Ctrl-C ends it", file=sys.stderr, flush=True)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def _places(store: Store, sweep: str | None, place: str, base: str | None = None) -> list[str]:
    """The sweep's charts and its table in an MLflow; one address where that has no run of it."""
    charts, table = (link(store, sweep, place, base, page) for page in ("charts", "table"))
    return [charts] if charts == table else [charts, f"as a table: {table}"]


def command(database: Path, port: int) -> list[str]:
    """The server's command line."""
    artifacts = (database.parent / "mlartifacts").as_uri()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{database}"),
        *("--default-artifact-root", artifacts, "--artifacts-destination", artifacts, "--serve-artifacts"),
        *("--allowed-hosts", "localhost:*,127.0.0.1:*"),
        *("--uvicorn-opts", "--log-level warning"),
    ]


def check_port(port: int) -> None:
    """Raises UserError when nobody may listen there."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port} is not a port; write for example --port 5000")
    if port in BLOCKED:
        raise UserError(f"--port {port} is one that browsers refuse to open; write for example --port 5000")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            other = port + 1 if port < 65535 else 5001
            raise UserError(f"--port {port} cannot be used: {error.strerror}; try --port {other}") from error


def _wait_until_up(server: subprocess.Popen[bytes], port: int) -> bool:
    """True when the server answers; False when it ended instead."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return server.poll() is None


class _signals_as_interrupt:
    """Inside the block SIGINT and SIGTERM raise KeyboardInterrupt, also where a shell script started us."""

    def __enter__(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Stop the server with its workers, which are in a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is not None:
            return
        try:
            os.killpg(server.pid, number)
            server.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
