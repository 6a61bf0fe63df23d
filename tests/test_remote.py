"""A store at a URL: objects, conditional puts, mirrors and the background pusher (workers/remote.py).

Every test of objects and mirrors runs on memory://, on file:// and on s3:// (moto's server in this process). The main
property: a push that breaks off after any of its operations leaves a far side that one can resume from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

import workers.remote
from tests.moto_s3 import moto_s3
from workers.remote import JOURNAL, VERDICTS, Mirror, Pusher, Remote, RemoteError, is_url, light

PREFIX = "trials/abc"

# ---- stores


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a bucket on moto's server, with the environment that leads to it."""
    with moto_s3():
        yield "s3://bucket"


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty place in each kind of store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{secrets.token_hex(4)}"
    return (
        f"memory://{secrets.token_hex(4)}"
        if request.param == "memory"
        else (tmp_path_factory.mktemp("far") / "store").as_uri()
    )


@pytest.fixture
def remote(url: str) -> Remote:
    return Remote(url)


def memory() -> Remote:
    return Remote(f"memory://{secrets.token_hex(4)}")


# ---- objects


def test_urls_and_paths() -> None:
    assert all(map(is_url, ("s3://bucket/x", "gs://b", "memory://", "file:///x/y")))
    assert not any(map(is_url, ("store", "./store", "C:/store", "a:b", Path("s3:") / "x")))


def test_an_object_is_written_read_listed_and_deleted(remote: Remote, tmp_path: Path) -> None:
    assert remote.read("a/x") is None and remote.info("a/x") is None and remote.list() == {}
    info = remote.write("a/x", b"one")
    assert (remote.read("a/x"), info.size) == (b"one", 3)
    assert info == remote.info("a/x") and remote.list("a") == remote.list() == {"a/x": info}
    assert abs(info.modified - time.time()) < 60
    file = tmp_path / "x"
    file.write_bytes(b"two")
    assert remote.write("a/x", file).version != info.version and remote.read("a/x") == b"two"
    assert remote.exists("a/x") and not remote.exists("a")
    remote.delete("a/x")
    remote.delete("a/x")
    assert not remote.exists("a/x") and not remote.fetch("a/x", tmp_path / "y") and not (tmp_path / "y").exists()


def test_writing_a_file_that_is_gone(remote: Remote, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remote.write("x", tmp_path / "gone")
    assert remote.list() == {}


def test_a_listing_is_of_one_folder_and_new_each_time(remote: Remote) -> None:
    for name in ("a/x", "a/b/y", "ab/z", "a/.hidden/y", "a/.x.tmp"):
        remote.write(name, b"1")
    assert set(remote.list("a")) == {"a/x", "a/b/y"} and set(remote.list()) == {"a/x", "a/b/y", "ab/z"}
    before, other = remote.info("a/x"), Remote(remote.url, skip_instance_cache=True)
    other.write("a/new", b"1")
    other.write("a/x", b"2")
    assert remote.info("a/x") != before and "a/new" in remote.list("a")


def test_create_is_for_the_first_one_only(remote: Remote) -> None:
    assert remote.create("a/1", b"one") and not remote.create("a/1", b"two")
    assert remote.read("a/1") == b"one"
    remote.write("a/1", b"heartbeat")
    assert not remote.create("a/1", b"three")
    remote.delete("a/1")
    assert remote.create("a/1", b"one")


def test_of_two_machines_with_fifty_threads_each_one_creates(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = MemoryFileSystem.exists

    def slowly(*args: Any) -> bool:  # memory:// looks first and writes then
        found = exists(*args)
        time.sleep(0.001)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", slowly)
    machines = [remote, Remote(remote.url, skip_instance_cache=True)]
    start, won = threading.Barrier(100), []

    def race(machine: int, thread: int) -> None:
        data = f"{machine} {thread}".encode()
        start.wait()
        if machines[machine].create("attempts/0001.json", data):
            won.append(data)

    threads = [threading.Thread(target=race, args=(number % 2, number)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [remote.read("attempts/0001.json")]


def test_a_store_that_works_passes_its_check(remote: Remote) -> None:
    remote.check()
    assert remote.list() == {} and not [path for path in remote._fs.find(remote._path("")) if "check" in path]


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """file:// has no whole puts of its own."""
    remote = Remote(tmp_path.as_uri())
    remote.write("x", b"old")

    def torn(source: Path, target: Path) -> None:
        target.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers.remote.shutil, "copyfile", torn)
    (tmp_path / "new").write_bytes(b"new")
    with pytest.raises(RemoteError, match="No space left"):
        remote.write("x", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "x"] and remote.read("x") == b"old"


# ---- conditional puts that go wrong


class Answer(Exception):
    """An error as botocore raises it."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}}


def test_a_lost_answer_does_not_lose_the_lease(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sends the put again when no answer came; the second try meets the first one's object."""
    remote = Remote(f"{s3}/{secrets.token_hex(4)}", skip_instance_cache=True)
    put = remote._fs.pipe_file

    def twice(*args: Any, **options: Any) -> None:
        put(*args, **options)
        put(*args, **options)

    monkeypatch.setattr(remote._fs, "pipe_file", twice)
    assert remote.create("1", b"same")
    assert not remote.create("1", b"same"), "the same bytes of another caller are not ours"


def test_a_conflict_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(f"{s3}/{secrets.token_hex(4)}", skip_instance_cache=True)
    put, answers = remote._fs.pipe_file, ["ConditionalRequestConflict"] * 3

    def busy(*args: Any, **options: Any) -> None:
        if answers:
            raise Answer(answers.pop())
        put(*args, **options)

    monkeypatch.setattr(workers.remote, "CONFLICT_WAITS", (0, 0, 0))
    monkeypatch.setattr(remote._fs, "pipe_file", busy)
    assert remote.create("1", b"x") and remote.read("1") == b"x"
    answers += ["ConditionalRequestConflict"] * 4
    with pytest.raises(RemoteError, match="ConditionalRequestConflict"):
        remote.create("2", b"x")


def test_a_precondition_that_failed_under_another_name(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers other than Amazon's do not say which condition failed, and s3fs then raises a plain OSError."""
    remote = Remote(f"{s3}/{secrets.token_hex(4)}", skip_instance_cache=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(22, "no") from Answer("PreconditionFailed")

    monkeypatch.setattr(remote._fs, "pipe_file", refuse)
    assert not remote.create("1", b"x")


def test_a_server_that_ignores_the_condition_is_found_out(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(f"{s3}/{secrets.token_hex(4)}", skip_instance_cache=True)
    put = remote._fs.pipe_file
    monkeypatch.setattr(remote._fs, "pipe_file", lambda path, data, mode="", **options: put(path, data, **options))
    with pytest.raises(RemoteError, match="ignores If-None-Match.*bring the server up to date"):
        remote.check()
    assert remote._fs.find(remote._path("")) == []


def test_a_filesystem_without_conditional_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own pipe_file takes mode="create" and looks before it writes: not what is asked for."""
    remote = memory()
    monkeypatch.setattr(type(remote._fs), "pipe_file", fsspec.AbstractFileSystem.pipe_file)
    with pytest.raises(RemoteError, match="MemoryFileSystem as installed has no conditional put.*newer version"):
        remote.create("x", b"1")
    with pytest.raises(RemoteError, match="no conditional put"):
        remote.check()


# ---- what a user did wrong


@pytest.mark.parametrize("bad", ["sftp://host/x", "store", "https://host/x"])
def test_a_url_of_another_kind(bad: str) -> None:
    with pytest.raises(RemoteError, match=f"store={bad}: not a URL of s3, .* or a folder"):
        Remote(bad)


def test_a_url_without_a_bucket() -> None:
    with pytest.raises(RemoteError, match="store=s3:// names no bucket; name one"):
        Remote("s3://")


METHODS: dict[str, Callable[[Remote, Path], object]] = {
    "check": lambda remote, path: remote.check(),
    "read": lambda remote, path: remote.read("x"),
    "fetch": lambda remote, path: remote.fetch("x", path / "x"),
    "write": lambda remote, path: remote.write("x", b"1"),
    "create": lambda remote, path: remote.create("x", b"1"),
    "list": lambda remote, path: remote.list(),
    "info": lambda remote, path: remote.info("x"),
    "delete": lambda remote, path: remote.delete("x"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_bucket_that_is_not_there(s3: str, method: str, tmp_path: Path) -> None:
    """None of them may take it for an object that is not there."""
    with pytest.raises(RemoteError, match="store=s3://nowhere/x: there is no bucket nowhere; create it, or correct"):
        METHODS[method](Remote("s3://nowhere/x"), tmp_path)


@pytest.mark.parametrize("method", ["check", "read", "list"])
def test_no_credentials(s3: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="no credentials .*set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        METHODS[method](Remote(s3, skip_instance_cache=True), tmp_path)


def test_access_denied(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.errors import translate_boto_error

    remote = Remote(s3, skip_instance_cache=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise translate_boto_error(Answer("AccessDenied"))

    monkeypatch.setattr(remote._fs, "pipe_file", refuse)
    with pytest.raises(RemoteError, match="access denied .*let these credentials list, read, write and delete"):
        remote.check()


def test_a_server_that_does_not_answer(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot be reached .*check the network, and AWS_ENDPOINT_URL"):
        Remote(s3, skip_instance_cache=True).check()


@pytest.mark.parametrize(
    ("scheme", "module", "fix"), [("s3", "s3fs", r'pip install "pift\[s3\]"'), ("gs", "gcsfs", "gcsfs")]
)
def test_the_library_is_missing(scheme: str, module: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RemoteError, match=f"the library for {scheme}:// is not installed; .*{fix}"):
        Remote(f"{scheme}://bucket").check()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RemoteError, match="store=file://.*NotADirectory|FileExists"):
        Remote((tmp_path / "file" / "store").as_uri()).check()


# ---- mirrors


class Trial:
    """A trial at work in a folder: a journal line a step; at every second step a picture and then a checkpoint, of
    which the newest `keep` stay."""

    def __init__(self, folder: Path, branch: str = "a", keep: int = 2) -> None:
        self.folder, self.branch, self.keep, self.step = folder, branch, keep, 0
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        (folder / "attempts" / "0001.json").write_text("{}")
        (folder / "spec.json").write_text("{}")

    def run(self, steps: int) -> Trial:
        for _ in range(steps):
            self.step += 1
            if self.step % 2 == 0:
                self._put(f"pictures/step_{self.step:06d}.png", b"picture")
            self.journal(f'{{"step": {self.step}}}\n')
            if self.step % 2 == 0:
                self._checkpoint()
        return self

    def journal(self, text: str) -> None:
        """Append, silently up to the last step it holds."""
        path = self.folder / JOURNAL
        if text not in (path.read_text() if path.exists() else ""):
            with path.open("a") as stream:
                stream.write(text)

    def finish(self) -> Trial:
        self._put("adapter/weights", f"{self.branch} {self.step}".encode() * 100)
        named = ("spec.json", JOURNAL, "adapter/weights")
        files = {name: sha((self.folder / name).read_bytes()) for name in named}
        self._put("DONE.json", json.dumps({"files": files}).encode())
        return self

    def fail(self) -> Trial:
        self._put("FAILED.json", b"{}")
        return self

    def forget(self) -> Trial:
        """Start over, on another branch."""
        for path in [*self.folder.glob("checkpoints/*.json"), *self.folder.glob("checkpoints/*.pt")]:
            path.unlink()
        return Trial(self.folder, self.branch + "'")

    def _checkpoint(self) -> None:
        name = f"checkpoints/step_{self.step:06d}"
        weights = f"{self.branch} {self.step}".encode() * 1000
        self._put(f"{name}.pt", weights)
        self._put(f"{name}.json", json.dumps({"step": self.step, "sha256": sha(weights)}).encode())
        for manifest in sorted(self.folder.glob("checkpoints/*.json"))[: -self.keep]:
            manifest.unlink()
            manifest.with_suffix(".pt").unlink()

    def _put(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Broken(Exception):
    """The connection, or the process, broke off."""


class Shaky:
    """A Remote that breaks off at its n-th change: before it, or, with `late`, after it and before the answer."""

    def __init__(self, remote: Remote, changes: int, late: bool, before: Callable[[], object] = lambda: None) -> None:
        self._remote, self._left, self._late, self._before = remote, changes, late, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def _change(self, call: Callable[[], Any]) -> Any:
        self._before()
        self._left -= 1
        if self._left < 0 and not self._late:
            raise Broken
        result = call()
        if self._left < 0:
            raise Broken
        return result

    def write(self, name: str, data: Any) -> Any:
        return self._change(lambda: self._remote.write(name, data))

    def delete(self, name: str) -> None:
        self._change(lambda: self._remote.delete(name))


def check_sound(remote: Remote, prefix: str = PREFIX) -> None:
    """One can resume from what is there, and believe what it says."""
    there = {name.removeprefix(f"{prefix}/"): remote.read(name) or b"" for name in remote.list(prefix)}
    lines = there.get(JOURNAL, b"").splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)), "a gap in the journal"
    for name, content in there.items():
        if name.startswith("checkpoints/") and name.endswith(".json"):
            manifest = json.loads(content)
            assert sha(there[name.replace(".json", ".pt")]) == manifest["sha256"], name
        if name.startswith("checkpoints/"):
            assert int(Path(name).stem.removeprefix("step_")) <= max(steps, default=0), "the journal lags behind"
    for name, digest in json.loads(there.get("DONE.json", b'{"files": {}}'))["files"].items():
        assert sha(there[name]) == digest, name
    assert all(f"pictures/step_{step:06d}.png" in there for step in steps if step % 2 == 0)


def contents(folder: Path) -> dict[str, bytes]:
    """What a push is to bring across."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in paths.items()
        if not name.startswith("attempts/") and not path.name.startswith(".")
    }


def far(remote: Remote, prefix: str = PREFIX) -> dict[str, bytes | None]:
    return {name.removeprefix(f"{prefix}/"): remote.read(name) for name in remote.list(prefix)}


LIVES: dict[str, tuple[Callable[[Trial], Trial], Callable[[Trial], Trial]]] = {
    "begins": (lambda trial: trial, lambda trial: trial.run(5)),
    "goes on, old checkpoints fall away": (lambda trial: trial.run(4), lambda trial: trial.run(5)),
    "is done": (lambda trial: trial.run(4), lambda trial: trial.run(2).finish()),
    "all at once": (lambda trial: trial, lambda trial: trial.run(6).finish()),
    "starts over": (lambda trial: trial.run(6), lambda trial: trial.forget().run(6)),
    "starts over after its end": (lambda trial: trial.run(4).finish(), lambda trial: trial.forget().run(4).finish()),
    "fails": (lambda trial: trial.run(4), lambda trial: trial.run(1).fail()),
}
"""What a trial does before the last push that went well, and after it."""


def live(life: str, remote: Remote, folder: Path) -> None:
    """A trial's life up to the push that is going to break."""
    before, after = LIVES[life]
    trial = before(Trial(folder))
    Mirror(remote, PREFIX, folder).push(delete=True)
    after(trial)


def break_after(changes: int, life: str, late: bool, remote: Remote, folder: Path) -> bool:
    """Push, breaking off after some changes; is the far side sound, and does the next process mend it? False once
    the push came to its end."""
    live(life, remote, folder)
    broke = False
    try:
        Mirror(Shaky(remote, changes, late), PREFIX, folder).push(delete=True)  # type: ignore[arg-type]
    except Broken:
        broke = True
    check_sound(remote)
    Mirror(remote, PREFIX, folder).push(delete=True)
    check_sound(remote)
    assert contents(folder).items() <= far(remote).items()
    assert Mirror(remote, PREFIX, folder).push(delete=True) == []
    return broke


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("life", LIVES)
def test_a_push_may_break_off_anywhere(life: str, late: bool, tmp_path: Path) -> None:
    changes = 0
    while break_after(changes, life, late, memory(), tmp_path / str(changes)):
        changes += 1
    assert changes >= 2, "no push broke off"


def test_a_push_to_any_store_may_break_off(remote: Remote, tmp_path: Path) -> None:
    assert break_after(6, "goes on, old checkpoints fall away", False, remote, tmp_path / "trial")


@pytest.mark.parametrize("keep", [2, 100])
def test_training_goes_on_during_a_push(keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, with pictures, checkpoints and clearing away, between any two operations of the push, and round about
    each look at the folder."""
    remote, trial = memory(), Trial(tmp_path, keep=keep).run(5)
    look = Mirror._here

    def look_around(mirror: Mirror) -> dict[str, tuple[int, int]]:
        trial.run(2)
        found = look(mirror)
        trial.run(2)
        return found

    def between() -> None:
        check_sound(remote)
        trial.run(1)

    monkeypatch.setattr(Mirror, "_here", look_around)
    mirror = Mirror(Shaky(remote, 10**6, False, between), PREFIX, tmp_path)  # type: ignore[arg-type]
    for _ in range(3):
        assert mirror.push(delete=True)
        check_sound(remote)
    monkeypatch.undo()
    Mirror(remote, PREFIX, tmp_path).push(delete=True)
    assert contents(tmp_path).items() <= far(remote).items()


@pytest.mark.parametrize("moment", range(7))
@pytest.mark.parametrize("kind", [".pt", ".json", ".pt .json"])
def test_a_checkpoint_replaced_during_a_push_waits(kind: str, moment: int, tmp_path: Path) -> None:
    """Same step, other bytes: a manifest there must never speak of bytes that are not there."""
    remote, trial = memory(), Trial(tmp_path / "a").run(2)
    other = Trial(tmp_path / "b", "b").run(2)
    changes = iter(range(100))

    def between() -> None:
        check_sound(remote)
        if next(changes) == moment:
            for suffix in kind.split():
                name = f"checkpoints/step_000002{suffix}"
                (other.folder / name).replace(trial.folder / name)

    Mirror(Shaky(remote, 100, False, between), PREFIX, trial.folder).push(delete=True)  # type: ignore[arg-type]
    check_sound(remote)


def test_a_manifest_taken_back_comes_again(tmp_path: Path) -> None:
    """The .pt was written anew with the same bytes: its manifest makes way for it, and must return."""
    remote, trial = memory(), Trial(tmp_path).run(2)
    mirror = Mirror(remote, PREFIX, trial.folder)
    mirror.push()
    os.utime(tmp_path / "checkpoints" / "step_000002.pt")
    assert mirror.push() == ["checkpoints/step_000002.pt", "checkpoints/step_000002.json"]


def test_a_push_sends_what_changed(remote: Remote, tmp_path: Path) -> None:
    mirror, trial = Mirror(remote, PREFIX, tmp_path), Trial(tmp_path).run(2)
    weights, manifest = "checkpoints/step_000002.pt", "checkpoints/step_000002.json"
    assert mirror.push() == ["pictures/step_000002.png", JOURNAL, weights, manifest, "spec.json"]
    assert mirror.push() == [] == Mirror(remote, PREFIX, tmp_path).push(), "also after a restart"
    trial.run(1)
    assert mirror.push() == [JOURNAL]
    trial.finish()
    assert mirror.push() == ["adapter/weights", "DONE.json"]


def test_leases_and_temporary_files_stay_here(tmp_path: Path) -> None:
    remote, trial = memory(), Trial(tmp_path).run(2)
    (tmp_path / ".secret").write_text("x")
    (tmp_path / "adapter" / ".weights.x").parent.mkdir()
    (tmp_path / "adapter" / ".weights.x").write_text("x")
    trial.journal('{"step": 3, "half')
    Mirror(remote, PREFIX, tmp_path).push()
    assert not [name for name in remote.list() if "attempts" in name or "/." in name]
    assert far(remote)[JOURNAL] == b'{"step": 1}\n{"step": 2}\n', "only whole lines"


def test_old_checkpoints_fall_away_there_only_when_asked(tmp_path: Path) -> None:
    remote, trial = memory(), Trial(tmp_path).run(4)
    mirror = Mirror(remote, PREFIX, tmp_path)
    mirror.push()
    trial.run(4)
    mirror.push()
    assert sum(name.endswith(".pt") for name in far(remote)) == 4
    mirror.push(delete=True)
    assert {name for name in far(remote) if name.endswith(".pt")} == {
        "checkpoints/step_000006.pt",
        "checkpoints/step_000008.pt",
    }


def test_a_folder_without_checkpoints_deletes_none_there(tmp_path: Path) -> None:
    """A new machine that has not trained yet, or starts over, must not take away what one can resume from."""
    remote = memory()
    Trial(tmp_path / "a").run(6)
    Mirror(remote, PREFIX, tmp_path / "a").push()
    (tmp_path / "b").mkdir()
    Mirror(remote, PREFIX, tmp_path / "b").push(delete=True)
    Trial(tmp_path / "b").run(2)
    Mirror(remote, PREFIX, tmp_path / "b").push(delete=True)
    assert {"checkpoints/step_000004.json", "checkpoints/step_000006.json"} <= set(far(remote))


def test_a_verdict_withdrawn_here_is_withdrawn_there(tmp_path: Path) -> None:
    remote, trial = memory(), Trial(tmp_path).run(2).fail()
    mirror = Mirror(remote, PREFIX, tmp_path)
    mirror.push()
    (tmp_path / "FAILED.json").unlink()
    trial.run(2)
    mirror.push()
    (tmp_path / "elsewhere").mkdir()
    Mirror(remote, PREFIX, tmp_path / "elsewhere").push(delete=True)
    assert "FAILED.json" in far(remote), "only who had it and is asked to"
    mirror.push(delete=True)
    assert "FAILED.json" not in far(remote)


def test_a_pull_brings_the_same_bytes(remote: Remote, tmp_path: Path) -> None:
    Trial(tmp_path / "a").run(5).finish()
    Mirror(remote, PREFIX, tmp_path / "a").push()
    remote.write(f"{PREFIX}/attempts/0001.json", b"a lease")
    mirror = Mirror(remote, PREFIX, tmp_path / "b")
    fetched = mirror.pull()
    assert fetched[0].startswith("pictures/") and fetched[-1] == "DONE.json", "what names a file comes after it"
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert (tmp_path / "b" / "attempts" / "0001.json").read_bytes() == b"a lease"
    assert mirror.pull() == [] == Mirror(remote, PREFIX, tmp_path / "b").pull()
    assert mirror.push(delete=True) == []


def test_a_pull_takes_what_is_new_and_what_is_wanted(remote: Remote, tmp_path: Path) -> None:
    trial, sender = Trial(tmp_path / "a").run(4), Mirror(remote, PREFIX, tmp_path / "a")
    sender.push()
    onlooker = Mirror(remote, PREFIX, tmp_path / "b")
    assert onlooker.pull(light) == [JOURNAL, "spec.json"]
    trial.run(1)
    sender.push()
    assert onlooker.pull(light, listing=remote.list("trials")) == [JOURNAL]
    assert (tmp_path / "b" / JOURNAL).read_bytes() == (tmp_path / "a" / JOURNAL).read_bytes()


def test_a_pull_leaves_what_was_pushed_from_here(tmp_path: Path) -> None:
    """The process died between two pushes and starts again: what it wrote since is newer than what is there."""
    remote, trial = memory(), Trial(tmp_path).run(4)
    Mirror(remote, PREFIX, tmp_path).push()
    trial.run(3)
    (tmp_path / "spec.json").write_text("newer")
    before = contents(tmp_path)
    fetched = Mirror(remote, PREFIX, tmp_path).pull()
    assert set(fetched) == {"checkpoints/step_000002.json", "checkpoints/step_000002.pt"}, "absent here: cleared away"
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("lost", ["memory", "nothing"])
def test_a_journal_that_continues_stays(lost: str, tmp_path: Path) -> None:
    """Killed before .mirror.json was written: the journal here still wins, for it begins with the one there."""
    remote, trial = memory(), Trial(tmp_path).run(4)
    Mirror(remote, PREFIX, tmp_path).push()
    trial.run(2)
    trial.journal('{"step": 7, "half')
    if lost == "memory":
        (tmp_path / ".mirror.json").write_text("{torn")
    mirror = Mirror(remote, PREFIX, tmp_path)
    mirror.pull()
    assert (tmp_path / JOURNAL).read_text().endswith('6}\n{"step": 7, "half')
    mirror.push()
    check_sound(remote)
    assert far(remote)[JOURNAL].count(b"\n") == 6


def test_a_branch_that_lost_gives_way(tmp_path: Path) -> None:
    """Another machine took the trial over from the last push; what this one made since must not be resumed from."""
    remote, here = memory(), Trial(tmp_path / "a").run(4)
    Mirror(remote, PREFIX, tmp_path / "a").push()
    Mirror(remote, PREFIX, tmp_path / "b").pull()
    other = Trial(tmp_path / "b", "b")
    other.step = 4
    other.journal('{"step": 5, "by": "b"}\n')
    here.run(4)
    Mirror(remote, PREFIX, tmp_path / "b").push()
    Mirror(remote, PREFIX, tmp_path / "a").pull()
    assert contents(tmp_path / "b").items() <= contents(tmp_path / "a").items()
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoints/*.pt")) == [
        "step_000002.pt",
        "step_000004.pt",
    ]


def test_what_is_gone_there_goes_here_when_asked(tmp_path: Path) -> None:
    remote = memory()
    Trial(tmp_path / "a").run(2).fail()
    Mirror(remote, PREFIX, tmp_path / "a").push()
    onlooker = Mirror(remote, PREFIX, tmp_path / "b")
    onlooker.pull()
    (tmp_path / "b" / "mine.txt").write_text("never sent")
    remote.delete(f"{PREFIX}/FAILED.json")
    remote.delete(f"{PREFIX}/spec.json")
    (tmp_path / "b" / "spec.json").write_text("changed here")
    onlooker.pull()
    assert (tmp_path / "b" / "FAILED.json").exists()
    onlooker.pull(delete=True)
    assert not (tmp_path / "b" / "FAILED.json").exists()
    assert (tmp_path / "b" / "mine.txt").exists() and (tmp_path / "b" / "spec.json").exists()
    assert onlooker.push() == ["mine.txt", "spec.json"]


def test_a_pull_that_breaks_off_tears_no_file(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, sender = Trial(tmp_path / "a").run(2), Mirror(remote, PREFIX, tmp_path / "a")
    sender.push()
    mirror = Mirror(remote, PREFIX, tmp_path / "b")
    mirror.pull()
    before = contents(tmp_path / "b")
    trial.forget().run(2)
    sender.push()

    def torn(source: str, target: str) -> None:
        Path(target).write_bytes(b"a' 2a")
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(remote._fs, "get_file", torn)
        with pytest.raises(RemoteError, match="cannot be reached"):
            mirror.pull()
    assert contents(tmp_path / "b") == before and not list((tmp_path / "b").rglob(".step*"))
    fetched = [name for name in mirror.pull() if name.startswith("checkpoints/")]
    assert fetched == ["checkpoints/step_000002.pt", "checkpoints/step_000002.json"]
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_folder_that_mirrored_another_store_starts_anew(tmp_path: Path) -> None:
    Trial(tmp_path).run(2)
    Mirror(memory(), PREFIX, tmp_path).push()
    other = memory()
    assert len(Mirror(other, PREFIX, tmp_path).push()) == 5
    assert far(other) == contents(tmp_path)


# ---- the pusher


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def test_the_pusher_pushes_by_itself_and_when_asked(tmp_path: Path) -> None:
    remote, trial = memory(), Trial(tmp_path).run(2)
    with Pusher(Mirror(remote, PREFIX, tmp_path), seconds=0.02) as pusher:
        wait_for(lambda: far(remote) == contents(tmp_path))
    with Pusher(Mirror(remote, PREFIX, tmp_path), seconds=1000) as pusher:
        trial.run(4).finish()
        pusher.flush(timeout=5)
        assert pusher.error is None and contents(tmp_path).items() <= far(remote).items()


class Blocked:
    """Stands in for a Mirror: every push takes a `ticket`, waiting for one, and fails until `failures` is 0."""

    def __init__(self, tmp_path: Path, failures: int = 0) -> None:
        self.remote, self.folder, self.failures = memory(), tmp_path, failures
        self.pushes, self.tickets = 0, threading.Semaphore(0)

    def push(self, *, delete: bool) -> list[str]:
        self.pushes += 1
        self.tickets.acquire(timeout=10)
        if self.failures:
            self.failures -= 1
            raise RemoteError("no luck")
        return []


def test_a_flush_is_of_what_is_there_when_it_is_called(tmp_path: Path) -> None:
    """A push under way when it is called may have listed the folder already: another one must follow."""
    mirror = Blocked(tmp_path)
    with Pusher(mirror, seconds=0.01) as pusher:  # type: ignore[arg-type]
        wait_for(lambda: mirror.pushes == 1)
        pusher.seconds = 1000
        threading.Timer(0.05, mirror.tickets.release).start()
        with pytest.raises(RemoteError, match="still under way"):
            pusher.flush(timeout=0.2)
        assert mirror.pushes == 2
        mirror.tickets.release(2)
        pusher.flush(timeout=5)


def test_a_flush_does_not_sit_out_a_long_wait(tmp_path: Path) -> None:
    mirror = Blocked(tmp_path, failures=1)
    mirror.tickets.release(1000)
    with Pusher(mirror, seconds=1000) as pusher:  # type: ignore[arg-type]
        pusher._failures = 9
        pusher.flush(timeout=5)
        assert mirror.pushes == 2


def test_failures_are_tried_again_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pusher, "LONGEST_WAIT", 0.02)
    mirror = Blocked(tmp_path, failures=3)
    mirror.tickets.release(1000)
    with Pusher(mirror, seconds=0.3) as pusher:  # type: ignore[arg-type]
        wait_for(lambda: pusher.error is not None)
        assert str(pusher.error) == "no luck"
        pusher.flush(timeout=5)
        assert mirror.pushes >= 4 and pusher.error is None


def test_the_waits_grow_to_a_minute(tmp_path: Path) -> None:
    pusher, waits = Pusher(Blocked(tmp_path), seconds=30), []  # type: ignore[arg-type]
    for pusher._failures in range(9):
        waits.append(pusher._pause())
    assert waits == [30, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_flush_that_fails_says_why(tmp_path: Path) -> None:
    mirror = Blocked(tmp_path, failures=100)
    mirror.tickets.release(1000)
    with (
        Pusher(mirror, seconds=1000) as pusher,  # type: ignore[arg-type]
        pytest.raises(RemoteError, match=r"did not get there in 0.2 s; what is missing is in .*: no luck"),
    ):
        pusher.flush(timeout=0.2)
    with contextlib.suppress(RemoteError):
        pusher.flush(timeout=100)  # over: nothing will push any more, so it does not wait
    assert mirror.pushes == 1


def test_nobody_waits_for_an_upload_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pusher, "PATIENCE", 0.05)
    mirror = Blocked(tmp_path)
    start = time.monotonic()
    with Pusher(mirror, seconds=0.01) as pusher:  # type: ignore[arg-type]
        wait_for(lambda: mirror.pushes == 1)
        with pytest.raises(RemoteError, match="the upload is still under way"):
            pusher.flush(timeout=0.05)
    assert time.monotonic() - start < 3
    mirror.tickets.release(1000)


def test_verdicts_are_last_and_known() -> None:
    """The two names that workers/store.py gives to verdicts."""
    from workers.store import TrialFolder

    folder = TrialFolder(Path("x"))
    assert (folder.done.name, folder.failed.name, folder.journal.name) == (*VERDICTS, JOURNAL)
