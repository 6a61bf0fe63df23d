"""A store at a URL: the same sweep, the same bits, from any machine; whatever goes away, nothing is lost or done twice.

Machines are folders PIFT_CACHE of their own. The store is moto's S3, or memory:// where one process is enough.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import workers.afar
from orchestrator import control, executors, far, ledger
from orchestrator import launch as launching
from orchestrator.cli import main
from orchestrator.compare import compare
from orchestrator.far import Far
from orchestrator.launch import launch, reconcile
from orchestrator.ledger import Store
from orchestrator.sample import find_trial
from orchestrator.tracking import entry
from tests import quick_trial as quick
from tests.moto_s3 import Server, moto_s3
from workers.afar import RemoteAttempts
from workers.lease import Lease, LeaseLost, acquire
from workers.remote import Info, Remote, RemoteError
from workers.run import run_trial
from workers.spec import TrialSpec
from workers.store import Damaged, record_text, write_record

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with moto_s3() as found:
        yield found


@pytest.fixture
def s3(server: Server) -> str:
    """An empty store."""
    return f"s3://bucket/{secrets.token_hex(4)}"


@pytest.fixture
def memory() -> str:
    return f"memory://{secrets.token_hex(4)}"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything that happens every few seconds happens more often."""
    for name, seconds in {
        "workers.afar.LOOK_SECONDS": 0.1, "workers.afar.PUSH_SECONDS": 0.2, "workers.afar.BEAT_SECONDS": 0.2,
        "workers.afar.RETRY_SECONDS": 0.2,
        "orchestrator.ledger.LOOK_SECONDS": 0.1, "orchestrator.ledger.FAR_BEAT_SECONDS": 0.2,
        "orchestrator.monitor.LOOK_SECONDS": 0.05,
    }.items():  # fmt: skip
        monkeypatch.setattr(name, seconds)
    monkeypatch.setenv("PIFT_CACHE", str(tmp_path / "one"))
    quick.behave()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compare", lambda *_: None)


def key(spec: dict[str, Any]) -> str:
    return TrialSpec.from_dict(spec).key


def names(url: str) -> set[str]:
    """What lies there, without launches and reports."""
    return {name for name in Remote(url).list() if not name.startswith("launches/") and "/report/" not in name}


def records(url: str, name: str) -> list[dict[str, Any]]:
    """The attempts' records of a trial, the first one first."""
    remote = Remote(url)
    found = sorted(remote.list(f"trials/{name}/attempts"))
    return [json.loads(remote.read(path) or b"") for path in found]


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, machine: str = "two") -> Store:
    """The store as another machine sees it."""
    monkeypatch.setenv("PIFT_CACHE", str(tmp_path / machine))
    store = Store(url)
    store.refresh()
    return store


def slow(seconds: float) -> Callable[[int, Tensor], Tensor]:
    def act(call: int, values: Tensor) -> Tensor:
        time.sleep(seconds)
        return values

    return act


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ---- the same as in a folder


def test_the_same_bits_and_tables(s3: str, tmp_path: Path, monkeypatch: Any, capsys: Any, no_report: None) -> None:
    """Kills: a file that is not pushed; DONE.json before what it names; a view that calls a trial done whose adapter is
    not there, or not done because the adapter is not here; pictures that do not come for the report."""
    specs = [quick.spec(model="PictureModel", seed=seed) for seed in (0, 1)]
    assert launch(quick.plan(tmp_path / "plain", *specs)) == 0
    capsys.readouterr()
    assert launch(quick.plan(s3, *specs), json_output=True) == 0
    plain, said = Store(tmp_path / "plain"), json.loads(capsys.readouterr().out)
    assert said["store"] == s3 and said["counts"] == {"done": 2}

    store = elsewhere(monkeypatch, tmp_path, s3)
    assert set(ledger.survey(store, [key(spec) for spec in specs]).values()) == {"done"}
    assert not list(store.root.rglob("adapter")) and not list(store.root.rglob("*.png"))
    assert control.rows(store, store.plan("quick")) == control.rows(plain, plain.plan("quick"))
    capsys.readouterr()
    assert main(["compare", "--store", s3, "--out", str(tmp_path / "here")]) == 0
    there, here = compare(plain, "quick", tmp_path / "there"), (tmp_path / "here" / "report.html").read_text()
    table = capsys.readouterr().out.partition("report ")[0]
    assert table.split() == there.table.split() and here.count("<img") == there.html.read_text().count("<img") > 0
    for spec in specs:
        store.fetch(find_trial(store, key(spec)[:8]).root.name)
        quick.assert_same(plain.trial(key(spec)), store.trial(key(spec)))
        assert ledger.problems(store.trial(key(spec))) == []
        folder = plain.root / "trials" / key(spec)
        files = {path.relative_to(plain.root).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert files == {name for name in names(s3) if name.startswith(f"trials/{key(spec)}/")}


def test_a_folder_asks_nobody(tmp_path: Path, monkeypatch: Any, no_report: None) -> None:
    """Kills: a folder that goes the way of a URL."""

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("a folder is no URL")

    monkeypatch.setattr(Remote, "__init__", asked)
    assert launch(quick.plan(tmp_path / "store", quick.spec(steps=2))) == 0
    assert not (tmp_path / "one").exists()


# ---- a trial and its far side


def attempts(url: str, name: str, folder: Path) -> RemoteAttempts:
    return RemoteAttempts(Remote(url), f"trials/{name}", folder)


class Calls:
    """Who called the far side for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str, str]] = []
        for method in ("read", "fetch", "write", "create", "list", "info", "delete"):
            monkeypatch.setattr(Remote, method, self._noting(method, getattr(Remote, method)))

    def _noting(self, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(remote: Remote, name: str = "", *args: Any) -> Any:
            self.made.append((threading.current_thread().name, method, name))
            return call(remote, name, *args)

        return noted

    def of(self, thread: str) -> list[tuple[str, str, str]]:
        return [call for call in self.made if call[0] == thread]


def test_a_step_asks_nobody(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: looking at the store in the training thread, for the lease, the stop file or a checkpoint."""
    calls, counts = Calls(monkeypatch), []
    for steps in (4, 24):
        spec = quick.spec(steps=steps)
        calls.made.clear()
        quick.behave(slow(0.01))
        folder = tmp_path / key(spec)
        assert run_trial(spec, folder, attempts=attempts(memory, key(spec), folder)).state == "done"
        counts.append(len(calls.of("MainThread")))
    assert counts[0] == counts[1] <= 12


def test_a_store_that_is_away_costs_no_step(server: Server, s3: str, no_report: None, capsys: Any) -> None:
    """Kills: training that waits or fails; a view without news that calls the running trial dead; a flush that gives up
    at the first failure."""
    spec = quick.spec(steps=40)

    def act(call: int, values: Tensor) -> Tensor:
        if call == 20:
            wait_for(lambda: f"trials/{key(spec)}/spec.json" in names(s3))
            server.go_away()
            threading.Timer(1.5, server.come_back).start()
        time.sleep(0.01)
        return values

    quick.behave(act)
    assert launch(quick.plan(s3, spec, limits={"storage_seconds": 30})) == 0
    assert len(records(s3, key(spec))) == 1
    assert f"trials/{key(spec)}/DONE.json" in names(s3)
    assert "stale" not in capsys.readouterr().err


def test_what_could_not_be_sent_is_sent_by_the_next_attempt(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: DONE.json here taken for done; a flush that fails and is not said; training again what is done here."""
    spec, folder = quick.spec(), tmp_path / "work"
    write = Remote.write

    def broken(self: Remote, name: str, data: Any) -> Info:
        if name.endswith("DONE.json"):
            raise RemoteError("store: away")
        return write(self, name, data)

    monkeypatch.setattr(Remote, "write", broken)
    found = run_trial(spec, folder, attempts=attempts(memory, key(spec), folder), limits={"storage_seconds": 0.5})
    assert (found.state, found.kind, found.step) == ("stopped", "storage", 8) and "away" in (found.message or "")
    assert (folder / "DONE.json").exists() and f"trials/{key(spec)}/DONE.json" not in names(memory)
    assert records(memory, key(spec))[0]["how"] == "storage"

    monkeypatch.setattr(Remote, "write", write)
    before = quick.Reward.calls
    assert run_trial(spec, folder, attempts=attempts(memory, key(spec), folder)).state == "done"
    assert f"trials/{key(spec)}/DONE.json" in names(memory) and quick.Reward.calls == before
    assert run_trial(spec, folder, attempts=attempts(memory, key(spec), folder)).state == "done"
    assert len(records(memory, key(spec))) == 2


def taken_over(url: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """Another machine takes the trial, which holds its owner to be dead."""
    with monkeypatch.context() as patch:
        patch.setattr("workers.lease.lives", lambda *_: False)
        lease = acquire(attempts(url, name, folder), {}, seconds=60.0)
    assert isinstance(lease, Lease) and lease.number == 2
    return lease


def test_an_owner_that_slept_sends_nothing_more(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: no look before an upload; one look before the first upload of several; a lease only looked at once a
    while; a flush that waits for its whole time."""
    monkeypatch.setattr("workers.afar.LOOK_SECONDS", 60.0)
    one = attempts(memory, "k", tmp_path / "one")
    lease = acquire(one, {}, seconds=60.0)
    assert isinstance(lease, Lease)
    write, sent = Remote.write, []

    def after_the_first(self: Remote, name: str, data: Any) -> Info:
        info = write(self, name, data)
        if name.startswith("trials/k/") and "/attempts/" not in name:
            sent.append(name)
            if len(sent) == 1:
                taken_over(memory, "k", tmp_path / "two", monkeypatch)
        return info

    monkeypatch.setattr(Remote, "write", after_the_first)
    for name in ("pictures/a", "pictures/b", "journal.jsonl", "DONE.json"):
        (one.folder / name).parent.mkdir(exist_ok=True)
        (one.folder / name).write_text("{}\n")
    began = time.monotonic()
    with one.sending(lease):
        with pytest.raises(LeaseLost):
            one.deliver(30.0)
        with pytest.raises(LeaseLost):
            one.deliver(30.0)
    assert sent == ["trials/k/pictures/a"] and time.monotonic() - began < 10
    with pytest.raises(LeaseLost):
        lease.check()
    with pytest.raises(LeaseLost):  # nobody has a lease by now
        one.mirror.push()


def test_a_trial_that_is_taken_over_leaves(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: a look in the background that nobody heeds; last words, results or verdicts of a trial that was lost."""
    monkeypatch.setattr("workers.afar.PUSH_SECONDS", 60.0)  # no upload tells it
    spec = quick.spec(steps=400)

    def act(call: int, values: Tensor) -> Tensor:
        if call == 30:
            taken_over(memory, key(spec), tmp_path / "two", monkeypatch)
            act.then = names(memory)  # type: ignore[attr-defined]
        time.sleep(0.01)
        return values

    quick.behave(act)
    found = run_trial(spec, tmp_path / "one", attempts=attempts(memory, key(spec), tmp_path / "one"))
    assert found.state == "elsewhere" and found.step < 399
    assert [record.get("how") for record in records(memory, key(spec))] == [None, None]
    assert names(memory) == act.then  # type: ignore[attr-defined]


def test_an_owner_lives_by_the_clock_of_the_store(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: an age by this machine's clock; local times of view files; a beat that is not written there."""
    remote = Remote(memory)
    record = {"attempt": 1, "pid": 1, "host": "h", "boot": "other", "started": 1.0, "beat": 1.0}
    remote.write("trials/k/attempts/0001.json", record_text(record).encode())
    late = Remote.info, Remote.list

    def shifted(info: Info | None) -> Info | None:
        return info and Info(info.size, info.modified + 1000, info.version)

    monkeypatch.setattr(Remote, "info", lambda self, name: shifted(late[0](self, name)))
    monkeypatch.setattr(Remote, "list", lambda *args: {n: shifted(i) for n, i in late[1](*args).items()})
    there = attempts(memory, "k", tmp_path / "work")
    found = there.read(1)
    assert found is not None and found.alive(there.now())
    store = Store(memory)
    assert ledger.survey(store, ["k"]) == {"k": "running"} and ledger.state(store.trial("k")) == "running"
    monkeypatch.setattr("workers.lease.FRESH_SECONDS", -1.0)
    assert not found.alive(there.now()) and ledger.survey(store, ["k"]) == {"k": "stale"}


def test_of_two_that_begin_at_once_one_does(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: an attempt that is begun by a put without a condition."""
    both_looked, numbers, found = threading.Barrier(2), RemoteAttempts.numbers, []

    def together(self: RemoteAttempts) -> list[int]:
        if not (before := numbers(self)):
            both_looked.wait(10)
        return before

    monkeypatch.setattr(RemoteAttempts, "numbers", together)
    begin = [lambda name=name: found.append(acquire(attempts(s3, "k", tmp_path / name), {})) for name in ("a", "b")]
    threads = [threading.Thread(target=one) for one in begin]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = [one for one in found if isinstance(one, Lease)]
    assert len(found) == 2 and lease.number == 1
    lease.end("done")


def test_two_processes_of_a_machine_have_two_folders(memory: str) -> None:
    """Kills: two that write one folder; a folder that is not found again."""
    with workers.afar.at_work(memory, "k") as one, workers.afar.at_work(memory, "k") as two:
        assert one.folder != two.folder
    with workers.afar.at_work(memory, "k") as again:
        assert again.folder == one.folder == workers.afar.work_folder(memory, "k")


def test_a_trial_on_another_machine_than_its_launch(memory: str, tmp_path: Path) -> None:
    """... stops when the store says so, and says there why it did not begin. Kills: a stop file that is looked for in
    the launch's folder only; a failure that is written into it."""
    stop = tmp_path / "nowhere" / "launches" / "mine.stop"
    setting = executors.Setting(target=executors.RUN_TRIAL, stop=stop, cpu=1, gpu=0, url=memory)
    spec = quick.spec(steps=400)
    job = executors.Job(key(spec), spec, tmp_path / "nowhere" / "trials" / key(spec))

    def act(call: int, values: Tensor) -> Tensor:
        if call == 10:
            Remote(memory).write("launches/mine.stop", b"")
        time.sleep(0.01)
        return values

    quick.behave(act)
    found = executors.call(setting, job)
    assert found.state == "stopped" and 5 < found.step < 399
    assert executors.call(setting, job).state == "stopped"
    Remote(memory).delete("launches/mine.stop")
    assert executors.call(replace(setting, target="tests.nowhere.run_trial"), job).state == "failed"
    assert b"nowhere" in (Remote(memory).read(f"trials/{key(spec)}/FAILED.json") or b"")
    assert not (tmp_path / "nowhere").exists()


# ---- launches


def test_stopped_and_continued_elsewhere(s3: str, tmp_path: Path, monkeypatch: Any, no_report: None) -> None:
    """Kills: a stop file that is looked for here only; a checkpoint that is not pushed before the lease ends, or not
    fetched; a stop file that outlives its launch."""
    spec = quick.spec(steps=60)
    assert launch(quick.plan(tmp_path / "plain", spec)) == 0
    quick.behave(slow(0.02))
    remote = Remote(s3)

    def ask() -> None:
        wait_for(lambda: f"trials/{key(spec)}/journal.jsonl" in names(s3))
        (record,) = [name for name in remote.list("launches") if name.count(".") == 1]
        remote.write(record.replace(".json", ".stop"), b"")

    thread = threading.Thread(target=ask)
    thread.start()
    assert launch(quick.plan(s3, spec)) == 130
    thread.join()
    assert not [name for name in remote.list("launches") if not name.endswith(".json")]
    shutil.rmtree(tmp_path / "one")

    quick.behave()
    elsewhere(monkeypatch, tmp_path, s3)
    assert ledger.survey(Store(s3), [key(spec)]) == {key(spec): "resumable"}
    assert launch(quick.plan(s3, spec)) == 0
    first, second = records(s3, key(spec))
    assert (first["how"], second["how"]) == ("stopped", "done") and 0 < first["step"] == second["from_step"] < 60
    assert quick.Reward.calls <= 1.25 * (60 - first["step"]) + 2
    store = Store(s3)
    store.fetch(key(spec))
    quick.assert_same(Store(tmp_path / "plain").trial(key(spec)), store.trial(key(spec)))


def test_a_signal_stops_a_launch(s3: str, tmp_path: Path, no_report: None) -> None:
    """... here at once, and the store is told. Kills: a stop that only this machine sees."""
    spec = quick.spec(steps=400)
    remote, seen = Remote(s3), []

    def act(call: int, values: Tensor) -> Tensor:
        if call == 10:
            os.kill(os.getpid(), 15)
            wait_for(lambda: seen.extend(n for n in remote.list("launches") if n.endswith(".stop")) or seen)
        return values

    quick.behave(act)
    assert launch(quick.plan(s3, spec)) == 130
    assert seen and records(s3, key(spec))[0]["step"] < 50


def both(url: str) -> int:
    """What each of two machines does: says that it is ready, waits for the other one, launches, says what it did."""
    remote, machine = Remote(url), os.environ["PIFT_CACHE"][-3:]
    remote.write(f"ready/{machine}", b"")
    wait_for(lambda: len(remote.list("ready")) == 2, 100)
    quick.behave(slow(0.01))
    code = launch(quick.plan(url, *[quick.spec(steps=10, seed=seed) for seed in range(4)]))
    remote.write(f"calls/{machine}", str(quick.Reward.calls).encode())
    return code


SECOND = """
import sys
from orchestrator import launch
from tests import test_url_store
launch._compare = lambda *_: None
sys.exit(test_url_store.both(sys.argv[1]))
"""


def test_two_machines_at_once(s3: str, tmp_path: Path, no_report: None) -> None:
    """Kills: a trial that both train; a launch that does not wait for the other one's trials."""
    environment = os.environ | {"PIFT_CACHE": str(tmp_path / "two"), "PYTHONPATH": os.pathsep.join([".", "tests"])}
    with subprocess.Popen([sys.executable, "-c", SECOND, s3], cwd=ROOT, env=environment) as second:
        assert both(s3) == 0
        assert second.wait(60) == 0
    calls = [int(Remote(s3).read(name) or b"") for name in Remote(s3).list("calls")]
    assert len(calls) == 2 and sum(calls) == 4 * (10 + 4)  # steps and evaluations of four trials
    for seed in range(4):
        name = key(quick.spec(steps=10, seed=seed))
        assert [record["how"] for record in records(s3, name)] == ["done"]
        journal = Remote(s3).read(f"trials/{name}/journal.jsonl") or b""
        assert [json.loads(line)["step"] for line in journal.splitlines()] == list(range(11))


def test_a_launch_beats_there(memory: str) -> None:
    """Kills: a record that only this machine has; one that never changes; one that stays "at work"."""
    store = Store(memory)
    mine = ledger.Launch(store, "s")
    mine.begin()
    mine.queue(["k"])

    def beat() -> float:
        return json.loads(Remote(memory).read(f"launches/{mine.name}.json") or b"{}")["beat"]

    first = beat()
    wait_for(lambda: beat() > first, 5)
    assert Far(memory, store.root.with_name("other")).remote.exists(f"launches/{mine.name}.queue.json")
    mine.end("exit code 0")
    store.refresh()
    assert store.launches() == {} and Remote(memory).list("launches").keys() == {f"launches/{mine.name}.json"}


# ---- the view


def test_the_view_follows(memory: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Kills: fetching what is here; missing what changed; keeping what is gone, in the listing of its sizes too."""
    remote, view = Remote(memory), tmp_path / "view"
    for name in ("trials/k/journal.jsonl", "trials/k/adapter/a", "trials/k/damaged/x", "sweeps/s/report/r", "id"):
        remote.write(name, name.encode())
    one, two, calls = Far(memory, view), Far(memory, view), Calls(monkeypatch)
    one.look()
    here = {path.relative_to(view).as_posix() for path in view.rglob("[!.]*") if path.is_file()}
    assert here == {"id", "trials/k/journal.jsonl"}
    assert far.sizes(view / "trials/k") == {"adapter/a": 18}
    calls.made.clear()
    two.look()
    one.look()
    assert [call[1] for call in calls.made] == ["list", "list"]
    two.fetch("k", ["adapter"])
    assert (view / "trials/k/adapter/a").read_text() == "trials/k/adapter/a"
    remote.write("trials/k/adapter/a", b"other")
    one.look()
    assert not (view / "trials/k/adapter/a").exists() and far.sizes(view / "trials/k") == {"adapter/a": 5}
    two.look()
    assert (view / "trials/k/adapter/a").read_text() == "other"
    (view / "id").write_text("broken here")
    one.look()
    assert (view / "id").read_text() == "id"
    for name in ("trials/k/journal.jsonl", "trials/k/adapter/a"):
        remote.delete(name)
    one.look()
    assert not (view / "trials/k").exists()


def test_a_view_without_news_stays_as_it_is(memory: str, monkeypatch: Any) -> None:
    """Kills: a look that raises into a launch; time that goes on without news, so that all seem dead."""
    record = {"attempt": 1, "pid": 1, "host": "h", "boot": "other", "started": 1.0, "beat": 1.0}
    Remote(memory).write("trials/k/attempts/0001.json", record_text(record).encode())
    store = Store(memory)
    assert ledger.survey(store, ["k"]) == {"k": "running"}

    def away(*_: Any) -> None:
        raise RemoteError("away")

    monkeypatch.setattr(Remote, "list", away)
    monkeypatch.setattr("workers.lease.FRESH_SECONDS", 1.0)
    looked = store.now()
    time.sleep(1.2)
    assert ledger.survey(store, ["k"]) == {"k": "running"} and store.now() == looked


def test_what_mlflow_is_told_of_a_database_here_stays_here(memory: str, tmp_path: Path) -> None:
    """Kills: the runs of another machine's database taken for ours; a server's run that the others do not hear of."""
    one, two = Far(memory, tmp_path / "a"), Far(memory, tmp_path / "b")
    path = "trials/k/mlflow.json"
    write_record(one.view / path, {"store": {"run_id": "1"}})
    one.publish()
    assert one.remote.list() == {}
    write_record(two.view / path, {"store": {"run_id": "2"}, "http://h": {"run_id": "3"}})
    two.publish()
    one.look()
    assert entry.read(one.view / path, "store") == {"run_id": "1"}
    assert entry.read(one.view / path, "http://h") == {"run_id": "3"}
    assert b'"2"' not in (one.remote.read(path) or b"")
    one.remote.write(path, record_text({"store": {"run_id": "4"}}).encode())  # a store that was copied to its URL
    one.look()
    assert entry.read(one.view / path, "store") == {"run_id": "1"}


def test_a_failure_written_for_a_trial_leaves_its_result(memory: str) -> None:
    """Kills: publishing over DONE.json or over the trial's own FAILED.json; not publishing at all; sending again."""
    store, remote = Store(memory), Remote(memory)
    write_record(store.sweep("s").report / "figures" / "one", {})
    for name in ("a", "b", "c"):
        ledger.fail(store.trial(name), name, "bug", "it died")
    remote.write("trials/a/DONE.json", b"{}")
    remote.write("trials/b/FAILED.json", b"its own")
    store.publish()
    assert "trials/a/FAILED.json" not in names(memory) and remote.read("trials/b/FAILED.json") == b"its own"
    assert b"it died" in (remote.read("trials/c/FAILED.json") or b"")
    there = remote.list()
    store.publish()
    assert remote.list() == there and "sweeps/s/report/figures/one" in there


def test_a_damaged_trial_is_opened_again(memory: str, tmp_path: Path, no_report: None, monkeypatch: Any) -> None:
    """... and finished from its checkpoint, though every machine had it as done. Kills: DONE.json that stays there or
    in the folder of work; an adapter that is trusted for being named."""
    spec = quick.spec()
    assert launch(quick.plan(memory, spec)) == 0
    adapter = f"trials/{key(spec)}/{quick.ADAPTER}"
    sound = Remote(memory).read(adapter)
    Remote(memory).write(adapter, b"short")
    store = elsewhere(monkeypatch, tmp_path, memory)
    states, broken = reconcile(store, [key(spec)])
    assert states == {key(spec): "resumable"} and isinstance(broken[key(spec)][0], Damaged)
    store.reopen(key(spec), broken[key(spec)])
    assert f"trials/{key(spec)}/DONE.json" not in names(memory) and adapter not in names(memory)
    monkeypatch.setenv("PIFT_CACHE", str(tmp_path / "one"))
    assert launch(quick.plan(memory, spec)) == 0
    assert Remote(memory).read(adapter) == sound and len(records(memory, key(spec))) == 2


# ---- the commands


def test_the_commands(s3: str, tmp_path: Path, monkeypatch: Any, capsys: Any, no_report: None) -> None:
    """Kills: --store that takes folders only; a retry or stop that changes the view alone."""
    spec, remote = quick.spec(steps=4), Remote(s3)

    def broken(call: int, values: Tensor) -> Tensor:
        raise ValueError("a bug")

    quick.behave(broken)
    assert launch(quick.plan(s3, spec, limits={"reward_retries": 0})) == 3
    capsys.readouterr()
    elsewhere(monkeypatch, tmp_path, s3)
    assert main(["status", "--store", s3, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"failed": 1}
    assert main(["stop", "quick", "--store", s3]) == 0 and "nothing to stop" in capsys.readouterr().out
    assert main(["retry", "--store", s3]) == 0 and "may run again" in capsys.readouterr().out
    assert f"trials/{key(spec)}/FAILED.json" not in names(s3) and f"trials/{key(spec)}/failures/0001.json" in names(s3)
    monkeypatch.setenv("PIFT_CACHE", str(tmp_path / "one"))
    quick.behave()
    assert launch(quick.plan(s3, spec)) == 0
    sweep = ["model=lq", "reward=quadratic", "tracking=none", f"store={s3}"]
    before = remote.list()
    assert main(["plan", *sweep]) == 0 and f"store {s3}" in capsys.readouterr().out
    assert main(["sample", "nothing", "--store", s3]) == 2 and s3 in capsys.readouterr().err
    assert remote.list() == before

    mine = ledger.Launch(Store(s3), "quick")
    mine.begin()
    assert main(["stop", "--store", s3, "--no-wait"]) == 0 and "asked to stop" in capsys.readouterr().out
    assert remote.exists(f"launches/{mine.name}.stop")
    mine.end("exit code 130")


def test_what_is_wrong_with_a_url(s3: str, capsys: Any, monkeypatch: Any) -> None:
    """Exit code 2 and one line. Kills: a traceback, and a launch that begins all the same."""
    sweep = ["model=lq", "reward=quadratic", "tracking=none"]
    for words in (["launch", *sweep, "store=s3://nobody/x"], ["status", "--store", "s3://nobody/x"]):
        assert main(words) == 2 and "there is no bucket nobody" in capsys.readouterr().err
    for words in (["plan", *sweep, "store=ftp://host/x"], ["status", "--store", "ftp://host/x"]):
        assert main(words) == 2 and "not a URL of s3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(["status", "--store", "gs://bucket/x"]) == 2 and "gcsfs" in capsys.readouterr().err
    monkeypatch.setenv("PIFT_CACHE", "/dev/null/x")
    assert main(["launch", *sweep, f"store={s3}"]) == 2 and "PIFT_CACHE" in capsys.readouterr().err
