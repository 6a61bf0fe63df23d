"""Journals shown elsewhere. The store is the truth, a tracker is a view of it: it may be late, down, or rebuilt.

`check` looks at the setting before anything is written, `open_view` gives the view that a launch drives. Only
mlflow_view.py imports mlflow, and only when a launch needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from orchestrator.errors import UserError
from orchestrator.ledger import Store

EXPERIMENT = "pift"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
FIX = "leave tracking.uri=null for a database in the store, or name a running server as in tracking.uri=http://127.0.0.1:5000"


class View(Protocol):
    """What a launch asks of a tracker. `forward` raises when the tracker is down; what was sent stays sent."""

    def open(self) -> None: ...

    def forward(self) -> int: ...

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None: ...

    def log_report(self, folder: Any) -> None: ...


class NoView:
    """tracking=none: the store alone."""

    def open(self) -> None:
        return None

    def forward(self) -> int:
        return 0

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None:
        return None

    def log_report(self, folder: Any) -> None:
        return None


def settings(config: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """(uri, experiment) of the resolved config; None when tracking is off."""
    tracking = config.get("tracking")
    if tracking is None or tracking == "none" or (isinstance(tracking, Mapping) and tracking.get("name") == "none"):
        return None
    values = dict(tracking) if isinstance(tracking, Mapping) else {}
    uri = values.get("uri")
    return (None if uri is None else str(uri)), str(values.get("experiment") or EXPERIMENT)


def check_uri(uri: str | None) -> None:
    """Raises UserError when `uri` is nothing that MLflow could keep runs in. Contacts nobody."""
    if uri is None:
        return
    kind = uri.partition(":")[0].partition("+")[0].lower()
    if kind not in SCHEMES:
        raise UserError(f"tracking.uri={uri!r} is not an address of an MLflow server or database; {FIX}")
    if kind in ("http", "https") and not _web_address(uri):
        raise UserError(f"tracking.uri={uri!r} is not a valid web address; {FIX}")
    if kind == "sqlite" and not re.fullmatch(r"sqlite(\+\w+)?:///.+", uri):
        raise UserError(f"tracking.uri={uri!r} needs three slashes and a file, as in sqlite:////data/mlflow.db; {FIX}")


def _web_address(uri: str) -> bool:
    """True for scheme://host[:port][/path] without spaces."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", uri)
    except ValueError:  # a port that is no number
        return False


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError when the tracker cannot be used, within about 15 s and before anything is written."""
    found = settings(config)
    if found is None:
        return
    check_uri(found[0])
    if found[0] is not None:
        from orchestrator.tracking.mlflow_view import probe

        probe(found[0])


def open_view(config: Mapping[str, Any], store: Store, plan: Mapping[str, Any]) -> View:
    """The view of a sweep that the config asks for; `plan` is the content of plan.json."""
    found = settings(config)
    if found is None:
        return NoView()
    from orchestrator.tracking.mlflow_view import MlflowView

    view = MlflowView(found[0], store, plan, experiment=found[1])
    view.open()
    return view
