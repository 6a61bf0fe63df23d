"""MLflow's client: how long its calls may take, what its errors mean, whether anybody answers, what it accepts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line for every run of a server's
# Calls fail after seconds, not minutes: whoever calls comes again, and the journal loses nothing.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient  # noqa: E402  (its environment comes first)
from mlflow.entities import Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from orchestrator.tracking.database import damage, file_of  # noqa: E402
from workers.store import write_whole  # noqa: E402

for _logger in ("mlflow", "alembic", "sqlalchemy.engine"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits per call
PARAM_VALUE, TAG_VALUE, NAME = 6000, 8000, 250  # ... and per value and name, in characters
EXPERIMENT_TAG_VALUE = (20_000, 5000)  # ... of an experiment: since 3.6 or so, and before
DESCRIPTION = 5000  # ... of a registered model and its versions, where the registry is PostgreSQL or MySQL
PROBE_SECONDS = 12.0
RECYCLE_SECONDS = 1
"""A connection to a database in a file that is older is opened anew, by its name."""
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class TrackerError(Exception):
    """MLflow did not do what was asked, in words short enough for a line on the terminal."""


def connect(uri: str) -> MlflowClient:
    """A client. A database in a file is created where there is none, and opened anew after a second: one that was moved
    away (pift doctor --fix) is not written to any more."""
    if file_of(uri) is not None:
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOL_RECYCLE", str(RECYCLE_SECONDS))
        create_database(uri)
    return MlflowClient(tracking_uri=uri)


def create_database(uri: str) -> None:
    """Make a new database under a temporary name and move it in place.

    MLflow runs all its migrations for it, some seconds; a file that a kill leaves half-way never opens again.
    """
    path = file_of(uri)
    if path is not None and not path.exists():
        write_whole(path, lambda new: MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1))


@contextlib.contextmanager
def patience(*, seconds: int) -> Iterator[None]:
    """Each call to a server takes no longer than that inside the block (in this whole process)."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(min(seconds, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Errors inside the block become a TrackerError with a short reason."""
    try:
        yield
    except TrackerError:
        raise
    except Exception as error:  # MLflow's own, SQLAlchemy's, requests', a full disk's
        raise TrackerError(explain(error)) from error


def reach(uri: str) -> str | None:
    """Why no MLflow answers at `uri`, and what to do about it; None when one does, asked through its real API.

    Takes at most PROBE_SECONDS and writes nothing. Of a database in a file: what is wrong with it.
    """
    if (path := file_of(uri)) is not None:
        return damage(path)
    answer: list[str | None] = []

    def ask() -> None:
        try:
            with patience(seconds=8):
                MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
            answer.append(None)
        except Exception as error:
            answer.append(explain(error, uri))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answer[0] if answer else f"no answer in {PROBE_SECONDS:.0f} s"


def explain(error: BaseException, uri: str = "") -> str:
    """An error of MLflow's in a few words, with the remedy where there is one."""
    text = str(error)
    host = urlsplit(uri).hostname or "its name"
    known = {
        "Invalid Host header": f"403, it does not accept to be called {host}: start `mlflow server` with "
        f'--allowed-hosts "{host}:*,localhost:*,127.0.0.1:*"',
        "code 401": "401, it wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        "code 403": "403, it refuses: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to somebody's who may",
        "Connection refused": "connection refused, no server listens there",
        "Failed to resolve": "its name is not known to this machine",
        "timed out": "it accepts the connection and does not answer",
        "timeout exception": "it accepts the connection and does not answer",
        "code 404": "404, what answers there is no MLflow",
        "not in a valid JSON format": "what answers there is no MLflow",
    }
    for mark, meaning in known.items():
        if mark in text:
            return meaning
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) < 200 else line[:197] + "..."


def usable(client: MlflowClient, run_id: str | None) -> bool:
    """True for a run that exists and is not deleted. Raises when MLflow does not answer."""
    if not run_id:
        return False
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise


def experiments(client: MlflowClient) -> list[str]:
    """The ids of all experiments."""
    found, token = [], None
    while True:
        page = client.search_experiments(page_token=token)
        found += [str(experiment.experiment_id) for experiment in page]
        token = page.token
        if not token:
            return found


def search(client: MlflowClient, experiment_ids: list[str], condition: str) -> Iterator[Any]:
    """The active runs that a condition fits, newest first."""
    token: str | None = None
    while True:
        page = client.search_runs(experiment_ids, condition, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


# ---- what it accepts


def params_of(flat: Mapping[str, str]) -> list[Param]:
    return [Param(clean_name(name), cut(value, PARAM_VALUE)) for name, value in flat.items()]


def clean_name(name: str) -> str:
    """A name MLflow accepts: letters, digits, _ - . space : and /."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:NAME]


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def cut_values(tags: Mapping[str, str]) -> dict[str, str]:
    return {name[:NAME]: cut(value, TAG_VALUE) for name, value in tags.items()}
