"""`pift ui`: refusals before anything starts, and the flags of the server."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from orchestrator import ui
from orchestrator.errors import UserError
from orchestrator.ledger import Store


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no mlflow.db"):
        ui.serve(Store(tmp_path))
    with pytest.raises(UserError, match="--port 0 is not a port"):
        ui.check_port(0)
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used.*try --port"):
            ui.check_port(taken.getsockname()[1])


def test_the_server_stays_on_this_machine(tmp_path: Path) -> None:
    words = ui.command(tmp_path / "mlflow.db", 5001)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--allowed-hosts") + 1] == "localhost:*,127.0.0.1:*"
    assert words[words.index("--workers") + 1] == "1"
    assert words[words.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/mlflow.db"
