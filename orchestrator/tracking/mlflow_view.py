"""MLflow as a view of the store: one parent run per sweep, one child run per trial for life.

The launch opens the runs, sets their statuses, sends pictures and files, and closes them. It sends the points too where
MLflow is a database, with one writer at a time for all launches (a lock beside the database); a server gets them from
the trials themselves while they run, and from the launch when they do not. What stands in the store about it: entry.py;
what a trained adapter becomes: adapters.py.

A run that somebody deleted, or whose database is gone, is made anew from the journal. A run whose mlflow.json is
damaged or lost is found by its tags. MLflow gives a run one parent: a trial that two sweeps share has the sweep that
first opened it as its parent and carries the tag `sweep.<name>` = "cell" of every sweep it belongs to. What the pages
open on (saved_views.py) and the notes on them (notes.py) are written when a sweep's runs are open, the verdict when its
report is there.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from orchestrator import ledger, schedule, tracking
from orchestrator.ledger import FINAL, Store, Tail, mlflow_file
from orchestrator.provenance import provenance
from orchestrator.tracking import adapters, entry, notes, pictures, saved_views
from orchestrator.tracking.client import (
    BATCH_PARAMS,
    EXPERIMENT_TAG_VALUE,
    NAME,
    TAG_VALUE,
    TrackerError,
    connect,
    create_database,
    cut,
    cut_values,
    params_of,
    plainly,
    search,
    usable,
)
from orchestrator.tracking.database import default_uri, file_of, lock_of
from orchestrator.tracking.points import send_points
from workers.lease import process
from workers.recorder import read_journal
from workers.store import TrialFolder, sound_picture, sound_record

if TYPE_CHECKING:
    from orchestrator.compare import Report, frame

STATUS = {"done": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}
PASS_SECONDS = 5.0
"""A call of `forward` takes about this long at most, then it is the next one's turn."""
LOCK_SECONDS = 5.0
TURN_SECONDS, GAP_SECONDS = 2.0, 0.15
"""Long work under the lock is done in turns, with gaps in which another launch gets it."""
MOST_TIMED = 2_000
"""In a store of more trials the note of a sweep says no hours: all their DONE.json would have to be read."""


NOTE, KIND = "mlflow.note.content", "mlflow.experimentKind"


class Busy(TrackerError):
    """Another launch has the lock."""


class MlflowView:
    """The runs of one sweep. Use from one thread at a time; every method may raise when MLflow is down, and goes on
    where it stopped when it is called again."""

    def __init__(
        self,
        uri: str | None,
        store: Store,
        plan: Mapping[str, Any],
        *,
        experiment: str = tracking.EXPERIMENT,
        page: str | None = None,
        device: str = "cpu",
        launching: bool = True,
        verify: bool = False,
    ) -> None:
        """`page`: the server's address in a browser, where that is another. `device`: what the trials run on.
        `launching`: trials that are not done are about to run. `verify`: ask MLflow for every run that the store
        remembers, instead of only where the sweep's own is gone."""
        self.page, self.device = page, device
        self.store, self.plan, self.experiment, self.launching = store, plan, experiment, launching
        self.uri, self.place = uri or default_uri(store), tracking.place_of(uri)
        self.sweep = store.sweep(plan["sweep"])
        self.server = tracking.is_server(self.uri)
        self.client: MlflowClient | None = None
        self.trials: dict[str, TrialRun] = {}
        self.parent = ""
        self.experiment_id = ""
        self.points = 0
        """As many were sent by this view."""
        self._lock_file = FileLock(lock_of(self.uri, store))
        self._verify = verify
        self._opening = 0
        self._since: int | None = None
        """Runs created since then may be there without an entry in the store: they are searched for."""
        self._cells = {cell["key"]: cell["label"] for cell in plan["cells"]}
        self._states: dict[str, str] = {}
        self._unopened: deque[str] = deque()
        self._active: deque[str] = deque()
        """The trials that MLflow does not have whole."""

    @property
    def keys(self) -> list[str]:
        return list(self._cells)

    def open(self, seconds: float = entry.FOREVER) -> None:
        """Create what is missing: experiment, parent run, a child run per trial; those to come are SCHEDULED. Returns
        after about `seconds`; called again, it goes on."""
        with plainly():
            if not self.parent:
                with self._lock():
                    self._begin()
            if self._unopened:
                self._open_trials(time.monotonic() + seconds)

    def forward(self) -> int:
        """Send what was journaled since the last call, note who started, close who ended; the number of points sent.
        Nothing when another launch is writing to the database: there is a next time."""
        before = self.points
        with plainly(), contextlib.suppress(Busy):
            self.open(PASS_SECONDS)
            until = time.monotonic() + PASS_SECONDS
            with self._writing():
                for key in tuple(self._active):
                    self._forward_trial(key, until)
                    if time.monotonic() > until:
                        self._active.rotate(-1)
                        break
        return self.points - before

    def close(self, states: Mapping[str, str], *, interrupted: bool = False) -> None:
        """Send the rest, the results' files, and the final status of every trial in `states` and of the sweep."""
        self.open()
        others = _others(self.store)
        with plainly():
            self._in_turns(
                deque(key for key, run in self.trials.items() if not run.is_whole(states.get(key, "new"))),
                lambda key: self._close_trial(key, states.get(key, "new"), others),
                entry.FOREVER,
                self._writing,
            )
            with self._writing():
                self._close_parent(states, interrupted, others)

    def log_report(self, report: Report) -> None:
        """Attach the comparison to the sweep's run, and say in the notes what it found."""
        self.log_verdict(report.found)
        assert self.client is not None
        with plainly(), self._writing():
            self.client.log_artifacts(self.parent, str(report.html.parent), "report")

    def log_verdict(self, found: frame.Sweep) -> None:
        """Say in the notes of the sweep and of the experiment how the sweep stands by its journals."""
        self.open()
        with plainly(), self._writing():
            self._describe(lambda room: self._sweep.verdict(found, room))

    # ---- one writer

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self._lock_file.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise Busy("another launch is writing to it") from None
        try:
            create_database(self.uri)
            yield
        finally:
            self._lock_file.release()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """A server has many writers, a database one."""
        return contextlib.nullcontext() if self.server else self._lock()

    @staticmethod
    def _in_turns(
        todo: deque[str],
        act: Callable[[str], None],
        until: float,
        lock: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Act on the keys under the lock, at least one a turn, and let others have it in between."""
        while todo:
            with lock():
                turn = min(until, time.monotonic() + TURN_SECONDS)
                while todo:
                    act(todo[0])
                    todo.popleft()
                    if time.monotonic() > turn:
                        break
            if time.monotonic() > until:
                return
            if todo:
                time.sleep(GAP_SECONDS)

    # ---- opening

    def _begin(self) -> None:
        self.client = connect(self.uri)
        self.experiment_id = self._open_experiment(self.client)
        self.parent = self._open_parent(self.client)
        self._states = ledger.survey(self.store, self.keys)
        self._unopened, self._active = deque(self.keys), deque()

    def _open_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None:
            experiment = str(found.experiment_id)
        else:
            location = None if file_of(self.uri) is None else (self.store.root / "mlartifacts").as_uri()
            experiment = str(client.create_experiment(self.experiment, artifact_location=location))
        self._experiment_tags = dict(found.tags) if found is not None else {}
        if self._experiment_tags.get(KIND) is None:  # else the page asks what it is, and opens on chat traces
            client.set_experiment_tag(experiment, KIND, "custom_model_development")
        return experiment

    def _open_parent(self, client: MlflowClient) -> str:
        """The sweep's run, and since when its trials' runs are being created: whoever dies while they are leaves
        "opening" behind, and then each of them is searched for before it is created."""
        path, known = self.sweep.mlflow, entry.read(self.sweep.mlflow, self.place)
        self._since = known.get("opening")
        self._opening = self._since or _now()
        run_id = known.get("run_id")
        if not usable(client, run_id):
            self._verify = True
            run_id = self._search_parent(client) if self._since or entry.is_damaged(path) else None
            entry.replace(path, self.place, {"opening": self._opening})
        if run_id is None:
            run = client.create_run(self.experiment_id, run_name=self.plan["sweep"], tags=self._tags)
            run_id = run.info.run_id
            axes = {f"axis.{name}": ", ".join(map(str, values)) for name, values in self.plan["axes"].items()}
            client.log_batch(run_id, params=params_of(axes))
        facts = {"experiment_id": self.experiment_id, "run_id": run_id, "opening": self._opening, "page": self.page}
        entry.update(path, self.place, **facts)
        client.update_run(run_id, status="RUNNING")
        return str(run_id)

    def _search_parent(self, client: MlflowClient) -> str | None:
        name = self.plan["sweep"].replace("'", "")
        condition = f"tags.sweep = '{name}' and attributes.run_name = '{name}' and {self._ours}"
        runs = (run for run in search(client, [self.experiment_id], condition) if "trial.key" not in run.data.tags)
        return next((str(run.info.run_id) for run in runs), None)

    @functools.cached_property
    def _ours(self) -> str:
        return f"tags.`store.id` = '{self.store.id}'"

    @functools.cached_property
    def _tags(self) -> dict[str, str]:
        tags = {"sweep": self.plan["sweep"], "store.id": self.store.id, "mlflow.source.name": "pift", **provenance()}
        try:
            return tags | {"mlflow.user": getpass.getuser()}
        except (KeyError, OSError):
            return tags | {"mlflow.user": "unknown"}

    def _open_trials(self, until: float = entry.FOREVER) -> None:
        """Open those that are not open yet; when all are, say so and link them."""
        assert self.client is not None
        try:
            self._in_turns(self._unopened, self._open_trial, until, self._lock)
        except Exception:
            self._since = self._opening  # a call that failed here may have been done there
            raise
        if not self._unopened:
            entry.update(self.sweep.mlflow, self.place, opening=None)
            with self._writing():
                self._offer_views()
                self._describe(lambda room: self._sweep.plan(self._states, self._seconds, room))

    def _open_trial(self, key: str) -> None:
        """Find or create the run of a trial; no call at all where MLflow has the whole of it."""
        assert self.client is not None
        state, sweep = self._states[key], self.plan["sweep"]
        run = self.trials[key] = TrialRun(self.client, self.store.trial(key), key, self.place, self._lock)
        if run.is_whole(state) and sweep in run.entry.get("sweeps", []) and not self._verify:
            return
        if not usable(self.client, run.entry.get("run_id")):
            found = self._search_trial(run)
            run.adopt(self.experiment_id, found or self._create(run), sweeps=[] if found else [sweep])
        run.describe(self.plan["specs"][key], sweep)
        if state in ("running", "scheduled") or (self.launching and state not in FINAL):
            run.status("RUNNING" if state == "running" else "SCHEDULED")
        if not run.is_whole(state):
            self._active.append(key)

    def _create(self, run: TrialRun) -> str:
        assert self.client is not None
        note, sweep = notes.of_trial(self.plan["specs"][run.key], run.key), self.plan["sweep"]
        tags = self._tags | {"trial.key": run.key, "mlflow.parentRunId": self.parent, NOTE: note}
        tags |= {f"sweep.{sweep}": "cell", "mlflow.runColor": self._colours[run.key]}
        name = cut(self._cells[run.key], NAME)
        created = self.client.create_run(self.experiment_id, run_name=name, tags=cut_values(tags))
        return str(created.info.run_id)

    def _search_trial(self, run: TrialRun) -> str | None:
        """The run of a trial that the store does not remember, by its tags.

        A trial that has neither mlflow.json nor a journal begins anew (its folder was removed) and so does its run: new
        measurements have new times and would stand as second points beside the old ones. Unless the run is as new, of
        a launch that died before it could note it.
        """
        assert self.client is not None
        forgot = run.journal_size > 0 or entry.is_damaged(mlflow_file(run.folder))
        if not forgot and self._since is None:
            return None
        condition = f"tags.`trial.key` = '{run.key}' and {self._ours}"
        for found in search(self.client, [self.experiment_id], condition):
            if forgot or found.info.start_time >= self._since:
                return str(found.info.run_id)
        return None

    # ---- what the pages show

    @functools.cached_property
    def _colours(self) -> dict[str, str]:
        return saved_views.colours(self.plan["cells"])

    @functools.cached_property
    def _seconds(self) -> dict[str, float | None]:
        """What the trials that are not over still take, by what others of this store took."""
        left = [key for key in self.keys if self._states[key] not in FINAL]
        if not left or len(self.store.trial_keys()) > MOST_TIMED:
            return {}
        speeds, found = schedule.Speeds.measured(self.store, self.plan["specs"]), {}
        for key in left:
            spec = self.plan["specs"][key]
            steps = spec["train"]["gradient_steps"] - max(ledger.last_step(self.store.trial(key).journal) or 0, 0)
            speed = speeds.of(spec, self.device)
            found[key] = None if speed is None else speed.seconds * steps
        return found

    @property
    def _sweep(self) -> notes.Sweep:
        runs = {key: run.run_id for key, run in self.trials.items() if run.entry.get("run_id")}
        return notes.Sweep(self.plan, self.experiment_id, self.store.id, self.parent, runs)

    def _offer_views(self) -> None:
        """The sweep's entries in the menu "Views"; those of prompts that it has no more go."""
        assert self.client is not None
        known, ours = self._experiment_tags, saved_views.tags(self.plan, self.store.id)
        for name, value in ours.items():
            if not saved_views.same(known.get(name), value):
                self.client.set_experiment_tag(self.experiment_id, name, value)
        for name in known:
            if name not in ours and saved_views.is_ours(name, self.store.id, self.plan["sweep"]):
                self.client.delete_experiment_tag(self.experiment_id, name)
        self._experiment_tags |= ours

    def _describe(self, note: Callable[[int], str]) -> None:
        """Write the notes of the sweep's run and of the experiment; `note` makes the former for a number of
        characters."""
        assert self.client is not None
        self.client.set_tag(self.parent, NOTE, note(TAG_VALUE))
        others = saved_views.others(self._experiment_tags, self.experiment_id, self.store.id, self.plan["sweep"])
        for room in EXPERIMENT_TAG_VALUE:
            text = notes.of_experiment(note(room // 2), others, room)
            try:
                self.client.set_experiment_tag(self.experiment_id, NOTE, text)
                return
            except MlflowException as error:  # an older server has less room
                if error.error_code != "INVALID_PARAMETER_VALUE" or room == EXPERIMENT_TAG_VALUE[-1]:
                    raise

    # ---- at work

    def _forward_trial(self, key: str, until: float) -> None:
        run = self.trials[key]
        if run.has_begun():
            self._healing(key, lambda run: self._advance(run, ledger.state(run.folder), until))

    def _advance(self, run: TrialRun, state: str, until: float) -> None:
        if state == "running":
            run.status("RUNNING")
        if not (self.server and state == "running"):  # a trial at work sends to a server itself
            self.points += run.send(until)
        run.send_pictures(until)
        if state in FINAL and time.monotonic() <= until:
            run.finish(state, self.plan["specs"][run.key])
            self._drop(run.key)

    def _drop(self, key: str) -> None:
        with contextlib.suppress(ValueError):
            self._active.remove(key)

    def _healing(self, key: str, act: Callable[[TrialRun], None]) -> None:
        """Act on a trial's run; where it is gone (deleted, or the database was), make it anew first."""
        assert self.client is not None
        try:
            act(self.trials[key])
        except MlflowException:
            if usable(self.client, self.trials[key].run_id):
                raise
            if not usable(self.client, self.parent):
                with self._lock():
                    self._begin()
                self._open_trials()
            else:
                self._drop(key)
                with self._lock():
                    self._open_trial(key)
            act(self.trials[key])

    # ---- closing

    def _close_trial(self, key: str, state: str, others: Mapping[str, Any]) -> None:
        if state in ("running", "scheduled") and self._is_elsewhere(key, state, others):
            return
        self._healing(key, lambda run: self._finish(run, state))

    def _finish(self, run: TrialRun, state: str) -> None:
        self.points += run.send()
        run.send_pictures()
        run.finish(state, self.plan["specs"][run.key])

    def _is_elsewhere(self, key: str, state: str, others: Mapping[str, Any]) -> bool:
        """Whether another launch (or a person, by hand) runs this trial, and will close it."""
        if state == "scheduled":
            return any(key in sound_record(self.store.queue(name)).get("keys", []) for name in others)
        attempt = ledger.last_attempt(self.store.trial(key))
        launch = None if attempt is None else attempt.content.get("launch")
        return launch is None or launch in others

    def _close_parent(self, states: Mapping[str, str], interrupted: bool, others: Mapping[str, Any]) -> None:
        assert self.client is not None
        if not usable(self.client, self.parent):
            self.parent = self._open_parent(self.client)
        found = [states.get(key, "new") for key in self.keys]
        if set(found) <= {"done"}:
            status = "FINISHED"
        elif any(record.get("sweep") == self.plan["sweep"] for record in others.values()):
            return
        else:
            status = "FAILED" if set(found) & {"failed", "diverged"} and not interrupted else "KILLED"
        self.client.set_terminated(self.parent, status)


class TrialRun:
    """One trial's run: how much MLflow has of it, and its status."""

    def __init__(
        self,
        client: MlflowClient,
        folder: TrialFolder,
        key: str,
        place: str,
        alone: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """`alone`: within it no other launch creates anything."""
        self.client, self.folder, self.key, self.place, self.alone = client, folder, key, place, alone
        self.entry = entry.read(mlflow_file(folder), place)
        self.shown: str | None = self.entry.get("closed")
        self._pictures: Tail | None = None

    @property
    def run_id(self) -> str:
        return str(self.entry["run_id"])

    @property
    def journal_size(self) -> int:
        return entry.size(self.folder.journal)

    def is_whole(self, state: str) -> bool:
        """Whether MLflow has all of a finished trial."""
        return (
            state in FINAL
            and self.entry.get("closed") == STATUS[state]
            and self.entry.get("size") == self.journal_size
            and bool(self.entry.get("params"))
        )

    def has_begun(self) -> bool:
        """Whether there may be anything to say of it."""
        return self.journal_size > 0 or self.folder.attempts.exists() or self.folder.failed.exists()

    def adopt(self, experiment: str, run_id: str, sweeps: Sequence[str]) -> None:
        """Take a run as this trial's, which says that it belongs to these sweeps; it is sent everything."""
        self.entry = {"experiment_id": experiment, "run_id": run_id, "offset": 0, "sweeps": list(sweeps)}
        self.shown = self._pictures = None
        entry.replace(mlflow_file(self.folder), self.place, self.entry)

    def describe(self, spec: Mapping[str, Any], sweep: str) -> None:
        """Its parameters, and that it belongs to a sweep; what it said before is not said again."""
        sweeps = list(self.entry.get("sweeps", []))
        tags = [] if sweep in sweeps else [RunTag(f"sweep.{sweep}"[:NAME], "cell")]
        params = [] if self.entry.get("params") else params_of(flatten(spec))
        if not tags and not params:
            return
        try:
            self.client.log_batch(self.run_id, tags=tags, params=params[:BATCH_PARAMS])
            for start in range(BATCH_PARAMS, len(params), BATCH_PARAMS):
                self.client.log_batch(self.run_id, params=params[start : start + BATCH_PARAMS])
        except MlflowException as error:
            # a run found again keeps its first values of what is not part of the identity (eval.every, ...)
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self.client.log_batch(self.run_id, tags=tags)
        self._note(params=True, sweeps=sorted({*sweeps, sweep}))

    def status(self, status: str) -> None:
        """Set the run's status where it differs from what was set last."""
        if status == self.shown:
            return
        if status in ("FINISHED", "FAILED", "KILLED"):
            self.client.set_terminated(self.run_id, status)
        else:
            self.client.update_run(self.run_id, status=status)
            if self.entry.get("closed"):
                self._note(closed=None)
        self.shown = status

    def send(self, until: float = entry.FOREVER) -> int:
        """The journal's points that MLflow does not have."""
        if self.journal_size == entry.cursor(self.entry)[0]:
            return 0
        points = send_points(self.client, self.folder, self.place, until)
        self.entry = entry.read(mlflow_file(self.folder), self.place) or self.entry
        return points

    def send_pictures(self, until: float = entry.FOREVER) -> None:
        """The evaluation strips that MLflow does not have; one that is lost or damaged holds nothing up."""
        if self._pictures is None:
            self._pictures = Tail(self.folder.journal, step=int(self.entry.get("pictures", -1)))
        if self.journal_size == self._pictures.offset:
            return
        while time.monotonic() <= until and (found := self._pictures.read()):
            for record, _ in found:
                if record.get("pictures") and sound_picture(self.folder.root / record["pictures"]):
                    self._send_picture(record)
                    self._note(pictures=int(record["step"]))

    def _send_picture(self, record: Mapping[str, Any], name: str = saved_views.SAMPLES) -> None:
        """One strip, under the name that the UI's image grid looks for; sending again replaces the file."""
        with tempfile.TemporaryDirectory() as temporary:
            pictures.write(self.folder.root / record["pictures"], record, Path(temporary), self.key, name)
            self.client.log_artifacts(self.run_id, temporary, pictures.FOLDER)
        if "pictures" not in self.entry:
            self.client.set_tag(self.run_id, "mlflow.loggedImages", "True")

    def _send_end(self) -> None:
        """The last strip once more, under a name and step that all trials share: the page compares pictures of one
        step, and methods end at different ones."""
        drawn = self._drawn()
        if drawn:
            self._send_picture(drawn[-1], saved_views.END)

    def _drawn(self) -> list[dict[str, Any]]:
        """The journal's records with a sound picture."""
        drawn = [record for record in read_journal(self.folder.journal) if record.get("pictures")]
        return [record for record in drawn if sound_picture(self.folder.root / record["pictures"])]

    def pictures(self) -> dict[str, str]:
        """{"before": address, "after": address} of the first and last evaluations, for a note on MLflow's pages."""
        drawn = self._drawn()
        ends = {"before": drawn[0], "after": drawn[-1]} if len(drawn) > 1 else {}
        return {title: pictures.address(self.run_id, record, self.key) for title, record in ends.items()}

    def finish(self, state: str, spec: Mapping[str, Any]) -> None:
        """The files of a finished trial, the reason of a failed one, how it went, and the last status."""
        if self.is_whole(state):
            return
        if state == "done" and not self.entry.get("artifacts"):
            self._send_files(spec)
        tags = self._summary(state, spec)
        if tags != self.entry.get("tags", {}):
            for name in set(self.entry.get("tags", {})) - set(tags):
                self.client.delete_tag(self.run_id, name)
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        self.status(STATUS.get(state, "KILLED"))
        self._note(tags=tags, closed=self.shown, size=self.journal_size)

    def _summary(self, state: str, spec: Mapping[str, Any]) -> dict[str, str]:
        """The tags that say how a trial went."""
        attempt = ledger.last_attempt(self.folder)
        content = {} if attempt is None else attempt.content
        done = sound_record(self.folder.done) if state == "done" else content
        tags = {NOTE: notes.of_trial(spec, self.key, self.pictures() if state == "done" else None)}
        if number := content.get("attempt"):
            tags["trial.attempt"] = str(number)
        if size := done.get("micro_batch"):
            tags["trial.micro_batch"] = f"{size} ({spec.get('train', {}).get('micro_batch')} did not fit)"
        if warnings := done.get("warnings"):
            tags["trial.warnings"] = str(len(warnings))
        if state in ("failed", "diverged"):
            failure = ledger.failure_of(self.folder)
            tags |= {f"failure.{name}": str(failure[name]) for name in ("class", "message")}
        return cut_values(tags)

    def _send_files(self, spec: Mapping[str, Any]) -> None:
        if adapters.is_lora(self.folder, spec):
            self.send_model(spec)
        elif self.folder.adapter.is_dir():
            self.client.log_artifacts(self.run_id, str(self.folder.adapter), adapters.NAME)
        for path in (self.folder.spec, self.folder.done):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        self._send_end()
        self._note(artifacts=True)

    def send_model(self, spec: Mapping[str, Any]) -> str | None:
        """The adapter as a model of mlflow.diffusers; its id. A server from before MLflow 3 gets the model's folder
        as files of the run: None."""
        try:
            model = adapters.log_adapter(
                self.client, self.entry["experiment_id"], self.run_id, self.folder, spec,
                {param.key: param.value for param in params_of(flatten(spec))}, self.alone,
            )  # fmt: skip
        except adapters.NoModels:
            with tempfile.TemporaryDirectory() as temporary:
                place = Path(temporary) / adapters.NAME
                adapters.write_model(self.folder, spec, place, run_id=self.run_id, artifact_path=adapters.NAME)
                self.client.log_artifacts(self.run_id, str(place), adapters.NAME)
            return None
        self._note(model=model)
        return model

    def _note(self, **values: Any) -> None:
        self.entry = entry.update(mlflow_file(self.folder), self.place, **values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as {"train.gradient_steps": "60"}; lists and null as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) and value else json.dumps(value)
    return flat


def _others(store: Store) -> dict[str, dict[str, Any]]:
    """The launches at work in other processes."""
    me = process()
    same = ("pid", "host", "boot", "born")
    return {
        name: record for name, record in store.launches().items() if any(record.get(fact) != me[fact] for fact in same)
    }


def _now() -> int:
    """As MLflow counts: milliseconds."""
    return time.time_ns() // 1_000_000
