"""MLflow as a view of the store: one parent run per sweep, one child run per trial. The only file importing mlflow.

A trial has one run for life per tracking server: its id and the byte offset up to which the journal was sent stand in
store/trials/<key>/mlflow.json. Records go in batches of at most 1000 points with their original times and steps, and
the offset is saved after each batch, so sending again (a crash between the two, a lost cursor) repeats the very same
points, which MLflow keeps once. A lost database is rebuilt by the next launch of the same sweep.

MLflow gives a run one parent. A trial that two sweeps share has the sweep that first opened it as its parent and
carries the tag `sweep.<name>` = "cell" of every sweep it belongs to; each parent's description links all its cells.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
# Calls fail after seconds, not minutes: the launch repeats them itself, and the journal loses nothing.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")

from mlflow import MlflowClient  # noqa: E402  (its environment comes first)
from mlflow.entities import Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from orchestrator import tracking  # noqa: E402
from orchestrator.errors import UserError  # noqa: E402
from orchestrator.ledger import Store, Tail, attempt_file, detail, mlflow_file, state  # noqa: E402
from orchestrator.provenance import provenance  # noqa: E402
from workers.recorder import METRICS  # noqa: E402
from workers.store import TrialFolder, read_json, write_json, write_whole  # noqa: E402

for _logger in ("mlflow", "alembic", "sqlalchemy.engine"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits per call
PARAM_VALUE, TAG_VALUE, NAME = 6000, 8000, 250  # ... and per value and name, in characters
PROBE_SECONDS = 12.0
STATUS = {"done": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}


def default_uri(store: Store) -> str:
    """The database in the store."""
    return f"sqlite:///{store.root / 'mlflow.db'}"


def probe(uri: str) -> None:
    """Raises UserError when no MLflow answers at `uri`, within PROBE_SECONDS. Writes nothing."""
    if uri.startswith("sqlite"):
        _probe_sqlite(uri)
        return
    answer: list[BaseException | None] = []

    def ask() -> None:
        try:
            with _patience(retries=0, seconds=8):
                MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    reason = answer[0] if answer else f"no answer in {PROBE_SECONDS:.0f} s"
    if reason is not None:
        shown = _without_password(uri)
        raise UserError(f"tracking.uri={shown!r} has no MLflow that answers ({_brief(reason)}); {tracking.FIX}")


def _probe_sqlite(uri: str) -> None:
    path = _database(uri)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"tracking.uri={uri!r}: cannot write {path}, or its folder does not exist; {tracking.FIX}")


def _database(uri: str) -> Path:
    """The file that an sqlite URI names."""
    return Path(re.sub(r"^sqlite(\+\w+)?:///", "", uri).partition("?")[0]).absolute()


def _create_database(uri: str) -> None:
    """Make a new database under a temporary name and move it in place.

    MLflow runs all its migrations for it, some seconds; a file that a kill leaves half-way never opens again.
    """
    if not (path := _database(uri)).exists():
        write_whole(path, _migrate)


def _migrate(path: Path) -> None:
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)


class _patience:
    """How long a call to a server may take, for the calls inside the block."""

    def __init__(self, *, retries: int, seconds: int) -> None:
        self.values = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class MlflowView:
    """The runs of one sweep. Use from one thread at a time; every method may raise when MLflow is down."""

    def __init__(
        self, uri: str | None, store: Store, plan: Mapping[str, Any], *, experiment: str = tracking.EXPERIMENT
    ) -> None:
        self.store, self.plan, self.experiment = store, plan, experiment
        self.uri = uri or default_uri(store)
        self.place = _without_password(uri) if uri else "store"  # the key in mlflow.json; survives moving the store
        self.sweep = store.sweep(plan["sweep"])
        self.local = self.uri.startswith("sqlite")
        self.client: MlflowClient | None = None
        self.trials: dict[str, _TrialRun] = {}
        self.parent = ""
        self.experiment_id = ""

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(cell["key"] for cell in self.plan["cells"]))

    def open(self) -> None:
        """Create what is missing: experiment, parent run, a child run per trial; those to come are SCHEDULED."""
        if self.client is None:
            if self.local:
                _create_database(self.uri)
            self.client = MlflowClient(tracking_uri=self.uri)
        self.experiment_id = self._open_experiment(self.client)
        self.parent = self._open_parent(self.client)
        lost = self._lost_runs(self.client)
        labels = {cell["key"]: cell["label"] for cell in self.plan["cells"]}
        for key in self.keys:
            run = _TrialRun(self.client, self.store.trial(key), key, self.place)
            tags = self._tags() | {"trial.key": key, "mlflow.parentRunId": self.parent}
            run.open(self.experiment_id, labels[key], self.plan["specs"][key], tags, lost.get(key))
            run.client.set_tag(run.run_id, f"sweep.{self.plan['sweep']}"[:NAME], "cell")
            run.status(STATUS.get(state(run.folder), "SCHEDULED"))
            self.trials[key] = run
        self.client.set_tag(self.parent, "mlflow.note.content", self._note())

    def forward(self) -> int:
        """Send what was journaled since the last call and note who started; the number of points sent."""
        return sum(run.forward() for run in self.trials.values())

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None:
        """Send the rest, the results' files, and the final status of every trial in `states` and of the sweep."""
        assert self.client is not None, "open() first"
        for key, run in self.trials.items():
            run.forward()
            run.finish(states.get(key, "new"))
        worst = "FINISHED" if all(states.get(key) == "done" for key in self.keys) else "FAILED"
        self.client.set_terminated(self.parent, "KILLED" if interrupted else worst)

    def log_report(self, folder: Path) -> None:
        """Attach the comparison to the sweep's run."""
        assert self.client is not None, "open() first"
        self.client.log_artifacts(self.parent, str(folder), "report")

    def _open_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None:
            experiment = str(found.experiment_id)
        else:
            location = (self.store.root / "mlartifacts").as_uri() if self.local else None
            experiment = str(client.create_experiment(self.experiment, artifact_location=location))
        if found is None or found.tags.get("mlflow.note.content") != metric_note():
            client.set_experiment_tag(experiment, "mlflow.note.content", metric_note())
            client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
        return experiment

    def _open_parent(self, client: MlflowClient) -> str:
        entry = _entry(self.sweep.mlflow, self.place)
        run_id = entry.get("run_id", "")
        if not _usable(client, run_id):
            run = client.create_run(self.experiment_id, run_name=self.plan["sweep"], tags=self._tags())
            run_id = run.info.run_id
            axes = {f"axis.{name}": ", ".join(map(str, values)) for name, values in self.plan["axes"].items()}
            client.log_batch(run_id, params=_params(axes))
            _save(self.sweep.mlflow, self.place, {"experiment_id": self.experiment_id, "run_id": run_id})
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _tags(self) -> dict[str, str]:
        tags = {"sweep": self.plan["sweep"], "store.id": self.store.id, "mlflow.source.name": "pift", **provenance()}
        try:
            tags["mlflow.user"] = getpass.getuser()
        except (KeyError, OSError):
            tags["mlflow.user"] = "unknown"
        return tags

    def _lost_runs(self, client: MlflowClient) -> dict[str, str]:
        """Runs of trials that have a journal but lost their mlflow.json: {key: run id}, by this store's tags.

        Without a journal the trial begins anew (its folder was removed) and so does its run: new measurements
        have new times and would stand as second points beside the old ones.
        """
        folders = {key: self.store.trial(key) for key in self.keys}
        lost = [
            key
            for key, folder in folders.items()
            if folder.journal.exists() and "run_id" not in _entry(mlflow_file(folder), self.place)
        ]
        if not lost:
            return {}
        found: dict[str, str] = {}
        token: str | None = None
        while True:
            page = client.search_runs([self.experiment_id], f"tags.`store.id` = '{self.store.id}'", page_token=token)
            for run in page:
                if run.data.tags.get("trial.key") in lost:
                    found.setdefault(run.data.tags["trial.key"], run.info.run_id)  # newest first
            token = page.token
            if not token:
                return found

    def _note(self) -> str:
        """The sweep's description: its cells with links, then what each metric means."""
        name = self.plan["sweep"]
        lines = [f"Sweep `{name}`: {len(self.keys)} trials. Filter: ``tags.`sweep.{name}` = 'cell'``", ""]
        for cell in self.plan["cells"]:
            link = f"#/experiments/{self.experiment_id}/runs/{self.trials[cell['key']].run_id}"
            lines.append(f"- [{cell['label']}]({link})")
        return _cut("\n".join([*lines, "", metric_note()]), TAG_VALUE)


class _TrialRun:
    """One trial's run: what it is called, how much of the journal it has, and its status."""

    def __init__(self, client: MlflowClient, folder: TrialFolder, key: str, place: str) -> None:
        self.client, self.folder, self.key, self.place = client, folder, key, place
        self.entry = _entry(mlflow_file(folder), place)
        self.shown: str | None = None

    @property
    def run_id(self) -> str:
        return str(self.entry["run_id"])

    def open(
        self, experiment: str, label: str, spec: Mapping[str, Any], tags: Mapping[str, str], lost: str | None
    ) -> None:
        """Find this trial's run, or create it. The cursor of a run that is gone starts again at zero."""
        known = self.entry.get("run_id") or lost or ""
        if not _usable(self.client, known):
            note = f"Prompt: {spec.get('prompt', '')}\n\n`pift sample {self.key}` draws from this adapter."
            tags = _cut_values({**tags, "mlflow.note.content": note})
            run = self.client.create_run(experiment, run_name=label, tags=tags)
            known = run.info.run_id
        if known != self.entry.get("run_id"):
            self.entry = {"experiment_id": experiment, "run_id": known, "offset": 0}
            self._save()
        if not self.entry.get("params"):
            self._log_params(spec)
            self.entry["params"] = True
            self._save()

    def forward(self) -> int:
        """Send the journal's new records in batches; the cursor follows each batch."""
        beat, points = read_json(self.folder.running), 0
        if beat is not None and state(self.folder) == "running":
            self.status("RUNNING")
        tail = Tail(self.folder.journal, int(self.entry.get("offset", 0)))
        for records, offset in _batches(tail):
            metrics = [metric for record in records for metric in _metrics(record)]
            for start in range(0, len(metrics), BATCH_METRICS):
                self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH_METRICS])
            for record in records:
                self._log_pictures(record)
            self.entry["offset"] = offset
            self._save()
            points += len(metrics)
        return points

    def status(self, status: str) -> None:
        """Set the run's status where it differs from what was set last."""
        if status == self.shown:
            return
        if status in ("FINISHED", "FAILED", "KILLED"):
            self.client.set_terminated(self.run_id, status)
        else:
            self.client.update_run(self.run_id, status=status)
        self.shown = status

    def finish(self, state_now: str) -> None:
        """The files of a finished trial, the reason of a failed one, and the last status."""
        if state_now == "running":  # at work in another launch, which will close it
            return
        if state_now == "done" and not self.entry.get("artifacts"):
            self._log_files()
        if state_now in ("failed", "diverged"):
            found = detail(self.folder)
            for name in ("class", "message"):
                self.client.set_tag(self.run_id, f"failure.{name}", _cut(str(found[name]), TAG_VALUE))
        attempt = (read_json(attempt_file(self.folder)) or {}).get("attempt")
        if attempt and attempt != self.entry.get("attempt"):
            self.client.set_tag(self.run_id, "trial.attempt", str(attempt))
            self.entry["attempt"] = attempt
        self.status(STATUS.get(state_now, "KILLED"))
        self._save()

    def _log_files(self) -> None:
        if self.folder.adapter.is_dir():
            self.client.log_artifacts(self.run_id, str(self.folder.adapter), "adapter")
        for path in (self.folder.spec, self.folder.done):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        self.entry["artifacts"] = True

    def _log_pictures(self, record: Mapping[str, Any]) -> None:
        """The evaluation strip, under the name that the UI's image grid looks for (see MlflowClient.log_image).

        That call names each file at random and may be asynchronous; here the name follows from trial and step,
        so that sending again replaces the file.
        """
        if not record.get("pictures") or not (source := self.folder.root / record["pictures"]).exists():
            return
        from PIL import Image

        name = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.key}/{record['step']}")
        stem = f"samples+step+{record['step']}+timestamp+{_milliseconds(record)}+{name}"
        with tempfile.TemporaryDirectory() as temporary, Image.open(source) as picture:
            picture.save(Path(temporary) / f"{stem}.png")
            small = picture.copy()
            small.thumbnail((1024, 1024))
            small.save(Path(temporary) / f"{stem}+compressed.webp", quality=90)
            self.client.log_artifacts(self.run_id, temporary, "images")
        if not self.entry.get("images"):
            self.client.set_tag(self.run_id, "mlflow.loggedImages", "True")
            self.entry["images"] = True

    def _log_params(self, spec: Mapping[str, Any]) -> None:
        params = _params(flatten(spec))
        for start in range(0, len(params), BATCH_PARAMS):
            try:
                self.client.log_batch(self.run_id, params=params[start : start + BATCH_PARAMS])
            except MlflowException as error:
                # a run found again keeps its first values of what is not part of the identity (eval.every, ...)
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise

    def _save(self) -> None:
        _save(mlflow_file(self.folder), self.place, self.entry)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as {"train.gradient_steps": "60"}; lists and null as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) and value else json.dumps(value)
    return flat


@functools.cache
def metric_note() -> str:
    """What each metric means, as the description of the experiment."""
    lines = [f"- `{name}`: {meaning}" for name, meaning in METRICS.items()]
    return "\n".join(["**Metrics** (step = completed gradient steps)", "", *lines])


def _batches(tail: Tail) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Groups of whole records, at most BATCH_METRICS points (a record alone may have more), and the offset behind."""
    group: list[dict[str, Any]] = []
    size = behind = 0
    while found := tail.read():
        for record, offset in found:
            count = len(record.get("metrics", {}))
            if group and size + count > BATCH_METRICS:
                yield group, behind
                group, size = [], 0
            group.append(record)
            size, behind = size + count, offset
    if group:
        yield group, behind


def _metrics(record: Mapping[str, Any]) -> list[Metric]:
    return [
        Metric(_name(name), float(value), _milliseconds(record), int(record["step"]))
        for name, value in record.get("metrics", {}).items()
    ]


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(float(record["time"]) * 1000)


def _params(flat: Mapping[str, str]) -> list[Param]:
    return [Param(_name(name), _cut(value, PARAM_VALUE)) for name, value in flat.items()]


def _name(name: str) -> str:
    """A name MLflow accepts: letters, digits, _ - . space : and /."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:NAME]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _cut_values(tags: Mapping[str, str]) -> dict[str, str]:
    return {name[:NAME]: _cut(value, TAG_VALUE) for name, value in tags.items()}


def _usable(client: MlflowClient, run_id: str) -> bool:
    """True for a run that exists and is not deleted. Raises when MLflow does not answer."""
    if not run_id:
        return False
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _entry(path: Path, place: str) -> dict[str, Any]:
    try:
        return dict((read_json(path) or {}).get(place, {}))
    except ValueError:
        return {}


def _save(path: Path, place: str, entry: Mapping[str, Any]) -> None:
    try:
        content = read_json(path) or {}
    except ValueError:
        content = {}
    write_json(path, content | {place: dict(entry)})


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _brief(error: object) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) < 200 else text[:197] + "..."
