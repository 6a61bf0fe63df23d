"""A trial's adapter as a version of a registered model: the MLflow side of `pift promote` (orchestrator/promote.py).

    register(store, folder, spec, plan, offer, uri)    the version, found or made
    uri_of(store, folder, uri)                         the tracker that has the trial's run

A version is looked for by the trial's key and the adapter's checksum before it is made, with the lock held under which
launches create runs: promoting again, or from two terminals, makes no second one. Its source is the model that the
trial's run has since it finished (adapters.py); a run or a model that is missing is sent first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from orchestrator import tracking
from orchestrator.errors import UserError
from orchestrator.ledger import Store, mlflow_file
from orchestrator.tracking import adapters, entry
from orchestrator.tracking.client import (
    DESCRIPTION,
    GONE,
    TrackerError,
    connect,
    cut,
    cut_values,
    plainly,
    reach,
    usable,
)
from orchestrator.tracking.database import check_file, default_uri, file_of, lock_of
from orchestrator.tracking.mlflow_view import TrialRun
from orchestrator.tracking.repair import rebuild_sweep
from workers.store import TrialFolder, sound_record

LOCK_SECONDS = 60.0
"""As long as that for launches that are writing, which take turns of two seconds."""
FIX = "name a running server, as in --uri http://127.0.0.1:5000, or leave --uri away for the database in the store"


@dataclass(frozen=True)
class Offer:
    """What is to be registered, and under which name."""

    name: str
    alias: str | None
    purpose: str
    """The registered model's description."""
    describe: Callable[[Mapping[str, str], str], str]
    """The version's description; it is given addresses of pictures by their titles, and that of the trial's run."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """What stands in the registry."""

    name: str
    version: str
    created: bool
    """False where it was there before."""
    run_id: str
    model_id: str | None
    """None on a server from before MLflow 3."""
    aliases: tuple[str, ...]
    uri: str
    """The tracker, without its password."""
    experiment_id: str


def uri_of(store: Store, folder: TrialFolder, uri: str | None) -> str | None:
    """Where to register: `uri`, else the only tracker that has the trial's run, else (None) the database in the store.
    Raises UserError where two have it, or for what is no address."""
    if uri is not None:
        tracking.check_uri(uri, "--uri ", FIX)
        return uri
    known = [place for place, content in sound_record(mlflow_file(folder)).items() if content.get("run_id")]
    if len(known) > 1:
        names = ", ".join(default_uri(store) if place == "store" else place for place in sorted(known))
        raise UserError(f"key={folder.root.name} has a run in several trackers ({names}); name one of them: --uri URI")
    return known[0] if known and known[0] != "store" else None


def register(
    store: Store,
    folder: TrialFolder,
    spec: Mapping[str, Any],
    plan: Mapping[str, Any] | None,
    offer: Offer,
    uri: str | None = None,
    *,
    say: Callable[[str], Any] = lambda text: None,
) -> Version:
    """Make a trial's adapter a version of the registered model `offer.name`, unless it is one; `plan`: of a sweep that
    has the trial. Raises UserError where MLflow does not answer, does not take it, or others write to it for a minute.
    """
    address = uri or default_uri(store)
    shown = tracking.without_password(address)
    _check_answers(store, uri)
    try:
        with plainly():
            connect(address)
            client = MlflowClient(tracking_uri=address, registry_uri=address)
            run = _run(store, folder, plan, client, uri, say)
            with _lock(store, address):
                model = run.send_model(spec)
                version, created = _version(client, run, model, offer)
                if offer.alias is not None and offer.alias not in version.aliases:
                    client.set_registered_model_alias(offer.name, offer.alias, version.version)
                aliases = client.get_model_version(offer.name, version.version).aliases
    except TrackerError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"MLflow at {shown} did not register the adapter ({error}); give the command again") from error
    return Version(
        offer.name, str(version.version), created, run.run_id, model, tuple(aliases), shown, run.entry["experiment_id"]
    )


def _check_answers(store: Store, uri: str | None) -> None:
    address = uri or default_uri(store)
    if (path := file_of(address)) is not None:
        check_file(address, path, FIX, "--uri ")
    elif (problem := reach(address)) is not None:
        raise UserError(f"--uri {tracking.without_password(address)}: no MLflow answers there ({problem}); {FIX}")


@contextmanager
def _lock(store: Store, uri: str) -> Iterator[None]:
    try:
        with FileLock(lock_of(uri, store), timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise UserError(f"a launch has been writing to MLflow for {LOCK_SECONDS:.0f} s; try again later") from None


def _run(
    store: Store,
    folder: TrialFolder,
    plan: Mapping[str, Any] | None,
    client: MlflowClient,
    uri: str | None,
    say: Callable[[str], Any],
) -> TrialRun:
    """The trial's run. Where MLflow has none (tracking was off, or the database is gone) the sweep is sent first."""
    key, place = folder.root.name, tracking.place_of(uri)
    if not usable(client, entry.read(mlflow_file(folder), place).get("run_id")):
        if plan is None:
            raise UserError(
                f"key={key} has no run in MLflow, and no sweep of store={store} has it as a cell any more; "
                "launch a grid that has it (nothing is trained again), then promote it"
            )
        say(f"MLflow has no run of {key} yet: sending the sweep {plan['sweep']}")
        rebuild_sweep(store, plan, uri)
    return TrialRun(client, folder, key, place, nullcontext)


def _check_model(client: MlflowClient, name: str) -> None:
    """Raises UserError for a name that is a prompt's: MLflow keeps both under the same names, and would add to it."""
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
        raise UserError(f"--name {name} is a prompt in MLflow, and no model; choose another") from None


@contextmanager
def _as_default(uri: str) -> Iterator[None]:
    """The registry in a database asks MLflow's default tracker, not its client's, where a model's files are."""
    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)
    os.environ[name] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _version(client: MlflowClient, run: TrialRun, model: str | None, offer: Offer) -> tuple[ModelVersion, bool]:
    """(the version that is this adapter, whether it was made now)."""
    sha256 = adapters.digest(run.folder)
    condition = f"name = '{offer.name}' AND tags.`trial.key` = '{run.key}'"
    for found in client.search_model_versions(condition, order_by=["version_number ASC"]):
        if found.tags.get("adapter.sha256") == sha256:
            return client.get_model_version(offer.name, found.version), False
    try:
        client.create_registered_model(offer.name, description=offer.purpose)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
        _check_model(client, offer.name)
    source = f"models:/{model}" if model else f"{client.get_run(run.run_id).info.artifact_uri}/{adapters.NAME}"
    tags = cut_values({"trial.key": run.key, "adapter.sha256": sha256, **offer.tags})
    place = f"#/experiments/{run.entry['experiment_id']}/runs/{run.run_id}"
    description = cut(offer.describe(run.pictures(), place), DESCRIPTION)
    with _as_default(client.tracking_uri):
        made = client.create_model_version(
            offer.name, source, run.run_id, tags=tags, description=description, model_id=model
        )
    if model:
        adapters.set_versions(client, model, offer.name, made.version)
    return made, True
