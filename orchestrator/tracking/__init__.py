"""Journals shown elsewhere. The store is the truth, a tracker is a view of it: it may be late, down, or rebuilt.

    check(config, store)               before anything is written: is somebody there?
    open_view(config, store, plan)     what a launch drives: runs, statuses, pictures, files, and the points of the
                                       journals where MLflow is a database
    server_of(config)                  where the trials send their points themselves (forwarder.py)
    link(store, sweep, place, base)    where a sweep's charts are, for a browser
    repair.rebuild(store, uri)         the whole view, from the store

Only this package imports mlflow, and only when a launch needs it.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.schedule import device
from orchestrator.tracking import entry, saved_views
from orchestrator.tracking.database import check_file, default_uri, file_of
from workers.store import sound_record

EXPERIMENT = "pift"
SERVERS = ("http", "https")
SCHEMES = (*SERVERS, "sqlite", "postgresql", "mysql", "mssql", "databricks")
FIX = "leave tracking.uri=null for a database in the store, or name a running server as in tracking.uri=http://127.0.0.1:5000"
OPEN_SECONDS = 5.0
"""As long as a launch spends on opening runs before its trials start; the others are opened while these run."""


class View(Protocol):
    """What a launch asks of a tracker; each may raise when the tracker is down, and goes on from there when called
    again. `forward` returns soon, and so does `open` with a number of seconds."""

    def open(self, seconds: float = entry.FOREVER) -> None: ...

    def forward(self) -> int: ...

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None: ...

    def log_report(self, report: Any) -> None: ...


class NoView:
    """tracking=none: the store alone."""

    def open(self, seconds: float = entry.FOREVER) -> None:
        return None

    def forward(self) -> int:
        return 0

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None:
        return None

    def log_report(self, report: Any) -> None:
        return None


# ---- settings


def settings(config: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """(uri, experiment) of the resolved config; None when tracking is off."""
    tracking = config.get("tracking")
    if tracking is None or tracking == "none" or (isinstance(tracking, Mapping) and tracking.get("name") == "none"):
        return None
    values = dict(tracking) if isinstance(tracking, Mapping) else {}
    uri = values.get("uri")
    return (None if uri is None else str(uri)), str(values.get("experiment") or EXPERIMENT)


def page_of(config: Mapping[str, Any]) -> str | None:
    """The server's address in a browser, where `tracking.page` says that it is not tracking.uri."""
    tracking = config.get("tracking")
    page = tracking.get("page") if isinstance(tracking, Mapping) else None
    return None if page is None else str(page)


def server_of(config: Mapping[str, Any]) -> str | None:
    """The address that trials send their own points to; None where the launch does it."""
    found = settings(config)
    return found[0] if found is not None and is_server(found[0]) else None


def is_server(uri: str | None) -> bool:
    return uri is not None and urlsplit(uri).scheme.lower() in SERVERS


def place_of(uri: str | None) -> str:
    """The name of a tracker in mlflow.json; that of the database in the store survives moving the store."""
    return "store" if uri is None else without_password(uri)


def without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def check_uri(uri: str | None, named: str = "tracking.uri=", fix: str = FIX) -> None:
    """Raises UserError when `uri`, which was given as `named`, is nothing that MLflow could keep runs in. Contacts
    nobody."""
    if uri is None:
        return
    kind = uri.partition(":")[0].partition("+")[0].lower()
    if kind not in SCHEMES:
        raise UserError(f"{named}{uri!r} is not an address of an MLflow server or database; {fix}")
    if kind in SERVERS and not _web_address(uri):
        raise UserError(f"{named}{uri!r} is not a valid web address; {fix}")
    if kind == "sqlite" and not re.fullmatch(r"sqlite(\+\w+)?:///.+", uri):
        raise UserError(f"{named}{uri!r} needs three slashes and a file, as in sqlite:////data/mlflow.db; {fix}")


def _web_address(uri: str) -> bool:
    """True for scheme://host[:port][/path] without spaces."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", uri)
    except ValueError:  # a port that is no number
        return False


# ---- before a launch


def check(config: Mapping[str, Any], store: Store) -> None:
    """Raises UserError when the tracker cannot be used, within about 15 s and before anything is written.

    A server that does not answer is no reason to refuse where this store has reached it before, unless
    tracking.required says so: then a warning on stderr says what becomes of the journals.
    """
    found = settings(config)
    if found is None:
        return
    check_uri(uri := found[0])
    if (page := page_of(config)) is not None and not (is_server(page) and _web_address(page)):
        raise UserError(f"tracking.page={page!r} is no web address; write for example tracking.page=http://127.0.0.1:5000")
    path = file_of(uri or default_uri(store))
    if uri is not None and path is None:
        _check_answers(uri, config["tracking"].get("required"), store)
        return
    if uri is None:
        check_name(store)
    if path is not None and (uri is not None or path.exists()):  # the one in the store is made when it is needed
        check_file(uri or default_uri(store), path, FIX)


def check_name(store: Store) -> None:
    """Raises UserError for a store that MLflow could not find its database in: of `?` and `%` in an address SQLAlchemy
    makes something else, and the file would lie elsewhere."""
    if marks := sorted({"?", "%"} & set(str(store.root))):
        raise UserError(
            f"store={store.root} has {' and '.join(marks)} in its name, where no address leads to MLflow's database; "
            "name another folder, as in store=results, or do without MLflow: tracking=none"
        )


def _check_answers(uri: str, required: bool | None, store: Store) -> None:
    from orchestrator.tracking.client import reach

    if (problem := reach(uri)) is None:
        return
    shown = without_password(uri)
    if required is None:
        required = not was_reached(store, place_of(uri))
    if required:
        raise UserError(
            f"tracking.uri={shown!r} has no MLflow that answers ({problem}); {FIX}, or train without it for now: "
            "tracking.required=false"
        )
    print(
        f"warning: tracking.uri={shown!r} does not answer ({problem}). Training goes on; the journals are sent when it "
        "answers: by this launch, by the same command given later, or by pift doctor --fix",
        file=sys.stderr,
    )


def was_reached(store: Store, place: str) -> bool:
    """Whether any sweep of the store has a run there."""
    return any(entry.read(path, place).get("run_id") for path in store.root.glob("sweeps/*/mlflow.json"))


def open_view(config: Mapping[str, Any], store: Store, plan: Mapping[str, Any]) -> View:
    """The view of a sweep that the config asks for; `plan` is the content of plan.json. A tracker that went away since
    the check is tried again by whoever drives the view."""
    found = settings(config)
    if found is None:
        return NoView()
    from orchestrator.tracking.client import patience
    from orchestrator.tracking.mlflow_view import MlflowView

    uri, experiment = found
    view = MlflowView(uri, store, plan, experiment=experiment, page=page_of(config), device=device(config))
    with contextlib.suppress(Exception), patience(seconds=5):
        view.open(OPEN_SECONDS)
    return view


# ---- for a browser


def servers(store: Store, sweep: str) -> list[str]:
    """The servers that have a sweep's run, as mlflow.json names them."""
    return [place for place, found in sound_record(store.sweep(sweep).mlflow).items()
            if is_server(place) and found.get("run_id")]  # fmt: skip


def link(store: Store, sweep: str | None, place: str, base: str | None = None, page: str = "charts") -> str:
    """The address of a sweep's charts or table in the MLflow that mlflow.json calls `place`; of its first page where
    the sweep has no run there. `base`: where a browser finds that MLflow, by default the page that the launch was told
    of, else the place itself."""
    found = {} if sweep is None else entry.read(store.sweep(sweep).mlflow, place)
    address = (base or found.get("page") or place).rstrip("/") + "/"
    if sweep is None or "experiment_id" not in found:
        return address
    return address + saved_views.link(str(found["experiment_id"]), saved_views.view_id(store.id, sweep), page)
