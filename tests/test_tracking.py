"""MLflow as a view: runs and their states, forwarding that may be repeated, servers that are not there."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.fake_trial as fake
from orchestrator import tracking
from orchestrator.errors import UserError
from orchestrator.grid import Cell, Plan
from orchestrator.ledger import Store, mlflow_file
from orchestrator.tracking import client as mlflow_client
from orchestrator.tracking import database as databases
from orchestrator.tracking import entry, mlflow_view, repair
from orchestrator.tracking.mlflow_view import MlflowView, flatten
from workers.lease import born, process
from workers.recorder import journal_line, read_journal
from workers.store import read_record, sound_record, write_json, write_record


@pytest.fixture
def store(database: Path, tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "store")
    found.root.mkdir()
    shutil.copy(database, found.root / "mlflow.db")
    yield found


def content(*specs: Any, sweep: str = "tried") -> dict[str, Any]:
    fixed = {"prompt": "colour", "beta": 0.1, "method": "pi_ft"}
    cells = [Cell(one.key, one, fixed | {"seed": one.seed}) for one in specs]
    return Plan(sweep, {"seed": [one.seed for one in specs]}, cells, {}).row()


def run(store: Store, spec: Any) -> None:
    folder = store.trial(spec.key)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.spec, spec.to_dict())
    fake.run_trial(spec.to_dict(), folder.root)


def opened(store: Store, *specs: Any, sweep: str = "tried", **options: Any) -> MlflowView:
    view = MlflowView(None, store, content(*specs, sweep=sweep), **options)
    view.open()
    return view


def calls(view: MlflowView, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of MLflow from now on, through any client."""
    found: list[str] = []
    for name in ("create_run", "log_batch", "update_run", "set_terminated", "get_run", "search_runs", "set_tag"):
        whole = getattr(mlflow_client.MlflowClient, name)

        def noted(self: Any, *args: Any, name: str = name, whole: Any = whole, **options: Any) -> Any:
            found.append(name)
            return whole(self, *args, **options)

        monkeypatch.setattr(mlflow_client.MlflowClient, name, noted)
    return found


def history(view: MlflowView, key: str) -> dict[str, list[tuple[int, float, int]]]:
    """Every point MLflow holds of a trial."""
    assert view.client is not None
    run_id = view.trials[key].run_id
    names = view.client.get_run(run_id).data.metrics
    points = {name: view.client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((p.step, p.value, p.timestamp) for p in found) for name, found in points.items()}


def status(view: MlflowView, key: str) -> str:
    assert view.client is not None
    return view.client.get_run(view.trials[key].run_id).info.status


def test_one_run_per_trial_for_life(store: Store) -> None:
    spec = fake.spec(steps=4)
    view = MlflowView(None, store, content(spec))
    view.open()
    assert status(view, spec.key) == "SCHEDULED"
    run(store, spec)
    assert view.forward() == 5 * 2 + 3 * 2
    assert view.forward() == 0
    view.close({spec.key: "done"})
    assert view.client is not None
    first = view.client.get_run(view.trials[spec.key].run_id)
    assert first.info.status == "FINISHED"
    assert first.data.params["train.gradient_steps"] == "4"
    assert first.data.tags["trial.key"] == spec.key
    assert first.data.tags["mlflow.parentRunId"] == view.parent
    assert first.data.tags["sweep"] == "tried"
    assert {"git.commit", "git.dirty", "lock.sha256", "mlflow.note.content"} <= set(first.data.tags)
    assert view.client.get_run(view.parent).info.status == "FINISHED"
    files = [found.path for found in view.client.list_artifacts(first.info.run_id, "images")]
    assert len(files) == 2 * 4  # three evaluations and the last once more as "end", full and small
    assert any(
        name.startswith("images/samples+step+4+timestamp+") and name.endswith("+compressed.webp") for name in files
    )
    assert [found.path for found in view.client.list_artifacts(first.info.run_id, "adapter")]

    second = MlflowView(None, store, content(spec, sweep="another"))  # a second sweep shares the cell
    second.open()
    assert second.trials[spec.key].run_id == first.info.run_id
    assert second.parent != view.parent
    tags = view.client.get_run(first.info.run_id).data.tags
    assert (tags["sweep.tried"], tags["sweep.another"]) == ("cell", "cell")
    assert first.info.run_id in view.client.get_run(second.parent).data.tags["mlflow.note.content"]
    assert status(second, spec.key) == "FINISHED"


def test_sending_again_adds_nothing(store: Store) -> None:
    spec = fake.spec(steps=4)
    run(store, spec)
    view = MlflowView(None, store, content(spec))
    view.open()
    view.forward()
    before = history(view, spec.key)
    path = mlflow_file(store.trial(spec.key))
    records = list(read_journal(store.trial(spec.key).journal))
    assert before["train/loss"] == [
        (record["step"], record["metrics"]["train/loss"], round(record["time"] * 1000)) for record in records
    ]

    entry.update(path, "store", offset=0, step=-1, closed=None)  # a crash after the batch, before the cursor
    again = MlflowView(None, store, content(spec))
    again.open()
    assert again.forward() > 0
    assert history(again, spec.key) == before

    mlflow_file(store.trial(spec.key)).unlink()  # the cursor is lost: the run is found by its tags
    found = MlflowView(None, store, content(spec))
    found.open()
    assert found.trials[spec.key].run_id == view.trials[spec.key].run_id
    found.forward()
    assert history(found, spec.key) == before
    assert found.client is not None
    assert len(found.client.list_artifacts(found.trials[spec.key].run_id, "images")) == 2 * 4


def test_a_lost_database_is_rebuilt(store: Store, database: Path) -> None:
    spec = fake.spec(steps=4)
    run(store, spec)
    view = MlflowView(None, store, content(spec))
    view.open()
    view.forward()
    before = history(view, spec.key)
    other = Store(store.root.parent / "moved")
    shutil.copytree(store.root, other.root)
    shutil.copy(database, other.root / "mlflow.db")
    rebuilt = MlflowView(None, other, content(spec))
    rebuilt.open()
    rebuilt.close({spec.key: "done"})
    assert history(rebuilt, spec.key) == before
    assert status(rebuilt, spec.key) == "FINISHED"


def test_large_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake.spec(steps=900)
    journal = store.trial(spec.key).journal
    journal.parent.mkdir(parents=True)
    names = ("train/loss", "train/grad_norm", "train/reward_mean", "train/kl_path_nats")
    records = [{"time": 1e9 + step, "step": step, "metrics": dict.fromkeys(names, step / 7)} for step in range(901)]
    journal.write_bytes(b"".join(map(journal_line, records)))
    view = MlflowView(None, store, content(spec))
    view.open()
    sizes: list[int] = []
    send = view.client.log_batch  # type: ignore[union-attr]

    def counted(run_id: str, metrics: Any = (), **rest: Any) -> None:
        sizes.append(len(metrics))
        send(run_id, metrics=metrics, **rest)

    monkeypatch.setattr(view.client, "log_batch", counted)
    began = time.perf_counter()
    points = view.forward()
    print(f"{points / (time.perf_counter() - began):.0f} points/s")
    assert points == sum(sizes) == 901 * 4
    assert sizes == [1000, 1000, 1000, 604]


def test_states_of_failures_and_interruptions(store: Store) -> None:
    failing, waiting = fake.spec(seed=1, fail_at=2), fake.spec(seed=2)
    view = MlflowView(None, store, content(failing, waiting))
    view.open()
    run(store, failing)
    view.close({failing.key: "failed", waiting.key: "new"}, interrupted=True)
    assert status(view, failing.key) == "FAILED"
    assert status(view, waiting.key) == "KILLED"
    assert view.client is not None
    assert view.client.get_run(view.parent).info.status == "KILLED"
    assert view.client.get_run(view.trials[failing.key].run_id).data.tags["failure.message"] == "asked to fail"
    again = MlflowView(None, store, content(failing, waiting))
    again.open()
    assert status(again, waiting.key) == "SCHEDULED"


def test_params_are_flat_and_within_limits() -> None:
    flat = flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "", "f": {}, "g": "x" * 7000})
    assert {name: flat[name] for name in "de"} == {"d": "null", "e": '""'}
    assert (flat["a.b"], flat["a.c"], flat["f"]) == ("1", "[1, 2]", "{}")
    params = mlflow_client.params_of(flat | {"odd;name": "1"})
    assert max(len(param.value) for param in params) == 6000
    assert "odd_name" in {param.key for param in params}


@pytest.mark.parametrize(
    "uri",
    [
        "nonsense",
        "mlruns",
        "file:///srv/mlruns",
        "http://",
        "http:/host",
        "http://host:port",
        "sqlite://x.db",
        "ftp://h",
    ],
)
def test_malformed_addresses(uri: str) -> None:
    with pytest.raises(UserError, match="tracking.uri=.*leave tracking.uri=null"):
        tracking.check({"tracking": {"name": "mlflow", "uri": uri}}, Store("nowhere"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_nobody_listens(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"tracking.uri='{uri}' has no MLflow that answers .connection refused"):
        tracking.check({"tracking": {"name": "mlflow", "uri": uri}}, Store(tmp_path))
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("required", "reached", "refused"),
    [(None, False, True), (None, True, False), (True, True, True), (False, False, False)],
)
def test_a_server_that_is_away(
    tmp_path: Path, capsys: Any, monkeypatch: Any, required: bool | None, reached: bool, refused: bool
) -> None:
    """Refused where it was never reached, or where that is asked for; else a warning that says what happens."""
    monkeypatch.setattr(mlflow_client, "reach", lambda uri: "connection refused")
    uri, place = "http://user:secret@host:5000", Store(tmp_path)
    if reached:
        write_record(place.sweep("before").mlflow, {"http://host:5000": {"run_id": "1"}})
    config = {"tracking": {"name": "mlflow", "uri": uri, "required": required}}
    if refused:
        with pytest.raises(UserError, match="tracking.uri='http://host:5000'.*tracking.required=false"):
            tracking.check(config, place)
        return
    tracking.check(config, place)
    said = capsys.readouterr().err
    assert "Training goes on" in said and "pift doctor --fix" in said and "secret" not in said


def test_somebody_listens_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "PROBE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert mlflow_client.reach(f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}") == "no answer in 1 s"


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ((403, b"Invalid Host header - possible DNS rebinding attack detected"), '--allowed-hosts "127.0.0.1:'),
        ((401, b"You are not authenticated"), "MLFLOW_TRACKING_USERNAME"),
        ((404, b"<html>"), "no MLflow"),
        ((200, b"<html>welcome to nginx</html>"), "no MLflow"),
    ],
)
def test_what_a_server_says(answer: tuple[int, bytes], meaning: str) -> None:
    class Says(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert meaning in (mlflow_client.reach(f"http://127.0.0.1:{server.server_port}") or "")
    finally:
        server.shutdown()
        server.server_close()


def test_passwords_are_not_shown() -> None:
    assert tracking.without_password("http://user:secret@host:1/x") == "http://host:1/x"


def test_a_database_in_no_folder(tmp_path: Path) -> None:
    config = {"tracking": {"name": "mlflow", "uri": f"sqlite:///{tmp_path}/nowhere/mlflow.db"}}
    with pytest.raises(UserError, match="tracking.uri="):
        tracking.check(config, Store(tmp_path))


def test_tracking_off() -> None:
    assert tracking.settings({"tracking": None}) is None
    assert isinstance(tracking.open_view({"tracking": "none"}, Store("."), {}), tracking.NoView)


# ---- one run for life


def test_a_damaged_mlflow_json_is_no_second_run(store: Store) -> None:
    """Found by its tags, with a journal or without; the sweep's own run too. A folder that was removed begins anew."""
    begun, waiting = fake.spec(seed=1), fake.spec(seed=2)
    run(store, begun)
    view = opened(store, begun, waiting)
    view.forward()
    before = {key: one.run_id for key, one in view.trials.items()}
    for path in (store.sweep("tried").mlflow, *(mlflow_file(store.trial(key)) for key in before)):
        path.write_text(path.read_text()[:-20])
    again = opened(store, begun, waiting)
    assert {key: one.run_id for key, one in again.trials.items()} == before
    assert again.parent == view.parent
    assert not repair.duplicates(store)

    shutil.rmtree(store.trial(begun.key).root)
    assert opened(store, begun, waiting).trials[begun.key].run_id != before[begun.key]
    assert list(repair.duplicates(store)) == [begun.key]


@pytest.mark.parametrize("same", [True, False])
def test_a_call_that_failed_here_and_was_done_there(store: Store, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """create_run timed out, the run is there: it is found, by this process and by the next one."""
    create = mlflow_client.MlflowClient.create_run

    def late(self: Any, *args: Any, **options: Any) -> Any:
        create(self, *args, **options)
        raise TimeoutError("no answer")

    plan = content(fake.spec(seed=1), fake.spec(seed=2))
    first = MlflowView(None, store, plan)
    monkeypatch.setattr(mlflow_client.MlflowClient, "create_run", late)
    with pytest.raises(mlflow_client.TrackerError, match="no answer"):
        first.open()  # the sweep's run
    monkeypatch.setattr(mlflow_client.MlflowClient, "create_run", create)
    view = MlflowView(None, store, plan)
    view._begin()
    view._since = None  # as of an opening that nobody interrupted
    monkeypatch.setattr(mlflow_client.MlflowClient, "create_run", late)
    with pytest.raises(mlflow_client.TrackerError, match="no answer"):
        view.open()  # the first trial's
    monkeypatch.setattr(mlflow_client.MlflowClient, "create_run", create)
    (view if same else MlflowView(None, store, plan)).open()
    assert not repair.duplicates(store)
    runs = repair._runs(store, None)
    assert len(runs) == 3 and sum("trial.key" not in run.data.tags for run in runs) == 1


def test_a_journal_cut_back_sends_no_step_twice(store: Store) -> None:
    """What is computed again after damage has other times: a second point at the same step."""
    spec = fake.spec(steps=4)
    run(store, spec)
    view = opened(store, spec)
    view.forward()
    before = history(view, spec.key)
    records = list(read_journal(store.trial(spec.key).journal))
    late = [record | {"time": record["time"] + 60, "samples": {"reward": [0.5]}} for record in records[2:]]
    late.append({"time": records[-1]["time"] + 90, "step": 5, "metrics": {"train/loss": 5.0}})
    store.trial(spec.key).journal.write_bytes(b"".join(map(journal_line, records[:2] + late)))
    again = opened(store, spec)
    assert again.forward() == 1
    assert [point for point in history(again, spec.key)["train/loss"] if point[0] < 5] == before["train/loss"]


def test_the_cursor_is_the_disks(store: Store) -> None:
    """Another launch sent it meanwhile: nothing is sent again."""
    spec = fake.spec(steps=4)
    first, second = opened(store, spec), opened(store, spec)
    run(store, spec)
    assert first.forward() > 0
    assert second.forward() == 0


def test_a_run_deleted_by_hand_is_made_anew(store: Store) -> None:
    one, two = fake.spec(seed=1), fake.spec(seed=2)
    run(store, one)
    run(store, two)
    view = opened(store, one, two)
    assert view.client is not None
    view.client.delete_run(deleted := view.trials[one.key].run_id)
    view.forward()
    assert view.trials[one.key].run_id != deleted
    assert {status(view, key) for key in (one.key, two.key)} == {"FINISHED"}
    assert len(history(view, one.key)["train/loss"]) == 5


def test_a_database_lost_while_trials_run(store: Store) -> None:
    spec = fake.spec()
    view = opened(store, spec)
    run(store, spec)
    (store.root / "mlflow.db").unlink()
    time.sleep(1.1)  # connections are as old as that
    view.close({spec.key: "done"})
    assert view.client is not None
    assert (status(view, spec.key), view.client.get_run(view.parent).info.status) == ("FINISHED", "FINISHED")
    assert len(history(view, spec.key)["train/loss"]) == 5


# ---- what it costs


def test_finished_trials_cost_no_call(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [fake.spec(seed=seed) for seed in range(3)]
    for spec in specs:
        run(store, spec)
    view = opened(store, *specs)
    view.forward()
    view.close(dict.fromkeys(view.keys, "done"))
    asked = calls(view, monkeypatch)
    again = opened(store, *specs)
    assert asked == ["get_run", "update_run", "set_tag"]  # all of the sweep's own run
    asked.clear()
    again.forward()
    assert asked == []
    again.close(dict.fromkeys(again.keys, "done"))
    assert asked == ["get_run", "set_terminated"]


def test_a_new_trial_costs_three_calls(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = calls(opened(store, fake.spec(seed=9)), monkeypatch)
    opened(store, *(fake.spec(seed=seed) for seed in range(4)))
    of_the_sweep = ["get_run", "update_run", "set_tag"]
    assert sorted(asked) == sorted(["create_run", "log_batch", "update_run"] * 4 + of_the_sweep)


def test_opening_in_pieces(store: Store) -> None:
    """A launch does not wait for thousands of runs: the rest is opened by the calls that follow."""
    specs = [fake.spec(seed=seed) for seed in range(3)]
    view = MlflowView(None, store, content(*specs))
    view.open(0.0)
    assert len(view.trials) == 1
    run(store, specs[2])
    assert view.forward() > 0
    assert len(view.trials) == 3
    assert view.client is not None
    assert "opening" not in sound_record(store.sweep("tried").mlflow)["store"]
    assert view.trials[specs[2].key].run_id in view.client.get_run(view.parent).data.tags["mlflow.note.content"]


# ---- one writer


def test_another_launch_is_writing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwarding has a next time, opening and closing say so; a server takes many at a time."""
    monkeypatch.setattr(mlflow_view, "LOCK_SECONDS", 0.1)
    spec = fake.spec()
    view = opened(store, spec)
    run(store, spec)
    with mlflow_view.FileLock(databases.lock_of(view.uri, store)):
        assert view.forward() == 0
        with pytest.raises(mlflow_view.Busy):
            view.close({spec.key: "done"})
        with pytest.raises(mlflow_view.Busy):
            opened(store, spec)
        view.server = True
        assert view.forward() > 0


def test_long_work_lets_others_in(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_view, "TURN_SECONDS", 0.0)
    view, taken = opened(store), 0
    todo = mlflow_view.deque(map(str, range(3)))
    over = threading.Event()
    lock = mlflow_view.FileLock(databases.lock_of(view.uri, store), timeout=0.02, poll_interval=0.01)

    def other() -> None:
        nonlocal taken
        while not over.is_set():
            with contextlib.suppress(mlflow_view.Timeout), lock:
                taken += 1
            time.sleep(0.01)

    thread = threading.Thread(target=other)
    thread.start()
    view._in_turns(todo, lambda key: time.sleep(0.1), entry.FOREVER, view._lock)
    over.set()
    thread.join()
    assert taken >= 2


# ---- statuses and words


def test_how_a_trial_went(store: Store) -> None:
    spec = fake.spec(steps=4)
    run(store, spec)
    folder = store.trial(spec.key)
    write_record(folder.done, (read_record(folder.done) or {}) | {"micro_batch": 1, "warnings": ["a", "b"]})
    view = opened(store, spec)
    view.forward()
    assert view.client is not None
    tags = view.client.get_run(view.trials[spec.key].run_id).data.tags
    assert tags["trial.micro_batch"] == "1 (2 did not fit)"
    assert (tags["trial.attempt"], tags["trial.warnings"]) == ("1", "2")


def test_a_failure_that_was_put_right_says_so_no_more(store: Store) -> None:
    failing = fake.spec(fail_at=2)
    view = opened(store, failing)
    run(store, failing)
    view.forward()
    assert view.client is not None
    assert status(view, failing.key) == "FAILED"
    assert view.client.get_run(view.trials[failing.key].run_id).data.tags["failure.class"] == "bug"
    folder = store.trial(failing.key)
    again = opened(store, failing)
    fake.run_trial(fake.spec().to_dict(), folder.root)  # the bug is mended
    again.close({failing.key: "done"})
    assert "failure.class" not in view.client.get_run(view.trials[failing.key].run_id).data.tags
    assert status(again, failing.key) == "FINISHED"


def test_a_failed_trial_that_went_on_unseen(store: Store) -> None:
    """Retried where nothing was sent, failed again: what it measured is sent by the next launch that looks."""
    failing = fake.spec(fail_at=2)
    run(store, failing)
    opened(store, failing).forward()
    with store.trial(failing.key).journal.open("ab") as journal:
        journal.write(journal_line({"time": time.time(), "step": 2, "metrics": {"train/loss": 1.0}}))
    again = opened(store, failing)
    assert again.forward() == 1
    assert status(again, failing.key) == "FAILED"


def test_at_work_elsewhere_and_here(store: Store) -> None:
    """A trial of another launch that lives is left to it; our own that we leave behind is KILLED."""
    theirs, ours = fake.spec(seed=1), fake.spec(seed=2)
    view = opened(store, theirs, ours)
    me = dict(process())
    other = me | {"pid": 1, "born": born(1)}
    write_record(store.launch_record("other"), {"launch": "other", "sweep": "tried", **other})
    for spec, launch in ((theirs, "other"), (ours, "mine")):
        write_record(store.trial(spec.key).attempts / "0001.json", {"attempt": 1, "launch": launch, **me, "started": 1})
    view.forward()
    assert {status(view, key) for key in view.keys} == {"RUNNING"}
    view.close(dict.fromkeys(view.keys, "running"), interrupted=True)
    assert (status(view, theirs.key), status(view, ours.key)) == ("RUNNING", "KILLED")
    assert view.client is not None
    assert view.client.get_run(view.parent).info.status == "RUNNING"  # the other launch closes it
    assert status(opened(store, theirs, ours), ours.key) == "RUNNING"  # the same run, at work again


# ---- repair


def test_zombies(store: Store) -> None:
    done, waiting, failing = fake.spec(seed=1), fake.spec(seed=2), fake.spec(seed=3, fail_at=1)
    view = opened(store, done, waiting, failing)
    run(store, done)
    run(store, failing)
    store.sweep("tried").root.mkdir(exist_ok=True, parents=True)
    write_record(store.sweep("tried").plan, content(done, waiting, failing))
    found = repair.zombies(store)
    assert {zombie.key: (zombie.status, zombie.should) for zombie in found} == {
        None: ("RUNNING", "FAILED"),
        done.key: ("SCHEDULED", "FINISHED"),
        waiting.key: ("SCHEDULED", "KILLED"),
        failing.key: ("SCHEDULED", "FAILED"),
    }
    assert repair.close_zombies(store, None, found) == 4
    assert repair.zombies(store) == []
    assert [status(view, key) for key in view.keys] == ["FINISHED", "KILLED", "FAILED"]


def test_what_is_at_work_is_no_zombie(store: Store) -> None:
    spec = fake.spec()
    opened(store, spec)
    write_record(store.launch_record("living"), {"launch": "living", "sweep": "tried", **process()})
    write_record(store.queue("living"), {"keys": [spec.key]})
    assert repair.zombies(store) == []


def test_a_damaged_database_is_refused_and_rebuilt(store: Store) -> None:
    spec = fake.spec()
    run(store, spec)
    write_record(store.sweep("tried").plan, content(spec))
    (store.root / "sweeps" / "torn").mkdir()
    (store.root / "sweeps" / "torn" / "plan.json").write_text("{")
    view = opened(store, spec)
    view.close({spec.key: "done"})
    before = history(view, spec.key)
    path = store.root / "mlflow.db"
    config = {"tracking": {"name": "mlflow", "uri": None}}
    tracking.check(config, store)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 4))
    with pytest.raises(UserError, match="mlflow.db is damaged.*pift doctor --fix"):
        tracking.check(config, store)
    said: list[str] = []
    rebuilt = repair.rebuild(store, say=said.append)
    assert (rebuilt.sweeps, rebuilt.trials, rebuilt.skipped) == (1, 1, ["torn"])
    assert rebuilt.points == 5 * 2 + 3 * 2
    assert rebuilt.moved == f"{path}.damaged.1" and Path(rebuilt.moved).exists()
    assert any("torn" in line for line in said)
    tracking.check(config, store)
    again = opened(store, spec)
    assert history(again, spec.key) == before
    assert status(again, spec.key) == "FINISHED"
    assert repair.rebuild(store, say=said.append).points == 0  # and once more costs nothing
    assert not repair.zombies(store)


def test_a_damaged_picture_holds_nothing_up(store: Store) -> None:
    """Points, the other pictures and the status arrive. Kills: opening whatever is there."""
    spec = fake.spec()
    run(store, spec)
    path = store.trial(spec.key).picture(2)
    path.write_bytes(path.read_bytes()[:64])
    view = opened(store, spec)
    view.close({spec.key: "done"})
    assert status(view, spec.key) == "FINISHED" and history(view, spec.key)["train/loss"]
    assert view.client is not None
    files = [found.path for found in view.client.list_artifacts(view.trials[spec.key].run_id, "images")]
    assert len(files) == 2 * 3 and not any("+step+2+" in name for name in files)


def test_places(store: Store) -> None:
    opened(store, fake.spec())
    write_record(store.sweep("other").mlflow, {"http://host:5000": {"run_id": "1"}})
    assert repair.places(store) == [None, "http://host:5000"]
