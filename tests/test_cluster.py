"""Sweeps on a cluster from a machine that is no part of it: what is sent, what is refused, and a real head of Ray.

The head runs on this machine, with a token, under its own folder; its processes are ended with the test. What goes
wrong on the way to a head (nobody there, another server, a token it does not know, a connection that breaks) is played
by small servers and by a client that breaks.
"""

from __future__ import annotations

import http.server
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator import cli, cluster, executors
from orchestrator.errors import UserError
from orchestrator.executors import Job, Setting, ray_jobs
from orchestrator.executors.ray_jobs import Head, JobRecord, check_url
from orchestrator.grid import Plan, compose
from orchestrator.ledger import Store
from orchestrator.overrides import parse, quoted

TOKEN = "0123456789abcdef0123456789abcdef"
SMALL = ["model=lq", "reward=quadratic", "tracking=none", "sampler.steps=5"]


@pytest.fixture(autouse=True)
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without a token, and an environment that names no cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [*os.environ]:
        if name.startswith("RAY_A") or name in ("PIFT_CLUSTER", "PIFT_STORE", "PIFT_TRACKING_URI", "PIFT_EXECUTOR"):
            monkeypatch.delenv(name)


def pift(*words: str) -> int:
    return cli.main(list(words))


def planned(*overrides: str, url: str = "http://head:8265", store: str = "/shared/pift") -> Plan:
    return compose([f"cluster={url}", f"store={store}", *(overrides or ("sweep=tiny",))])


# ---- what is refused before anything is sent


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ray://head:10001", "http://head:8265"),
        ("head:8265", "as in cluster=http://head:8265"),
        ("auto", "as in cluster=http://head:8265"),
        ("http://head:6379", "http://head:8265"),
        ("http://head:10001", "http://head:8265"),
        ("http://head:port", "no web address"),
        ("http://me:secret@head:8265", "token"),
        ("http://", "as in cluster=http://head:8265"),
        ("true", "as in cluster=http://head:8265"),
    ],
)
def test_an_address_that_is_none(url: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pift("launch", "sweep=tiny", "store=/shared/pift", f"cluster={url}") == 2
    message = capsys.readouterr().err
    assert said in message and "secret" not in message


def test_addresses_that_are_some() -> None:
    assert check_url("http://head:8265/") == "http://head:8265"
    assert check_url(" https://ray.example.org/team ") == "https://ray.example.org/team"


REFUSED = {
    "store=results": "store=/shared/pift",
    "store=./x": "all its nodes see",
    "executor=inline": "leave it out",
    "executor.address=auto": "leave it out",
    "beta=-1": "beta=-1.0",
    "betta=1": "did you mean beta?",
    "resources.threads=0": "resources.threads=0",
    "tracking.uri=mlflow:5000": "tracking.uri='mlflow:5000'",
}


@pytest.mark.parametrize("override", REFUSED)
@pytest.mark.parametrize("command", ["launch", "plan"])
def test_bad_input_reaches_no_cluster(command: str, override: str, capsys: Any, monkeypatch: Any) -> None:
    """Kills: the head is asked before the grid is resolved and checked."""
    monkeypatch.setattr(cluster, "Head", lambda *_: pytest.fail("the head was asked"))
    kind = ["executor=ray"] if override.startswith("executor.") else []
    assert pift(command, "sweep=tiny", "cluster=http://head:8265", "store=/shared/pift", *kind, override) == 2
    assert REFUSED[override] in capsys.readouterr().err


def test_a_conf_folder_of_ones_own_is_refused(tmp_path: Path, capsys: Any) -> None:
    words = ["--conf", str(tmp_path), "cluster=http://head:8265", "store=/shared/pift"]
    assert pift("launch", *words) == 2
    assert f"--conf {tmp_path}" in capsys.readouterr().err


def test_flags_that_need_a_cluster(capsys: Any) -> None:
    assert pift("launch", "sweep=tiny", "--detach") == 2
    assert pift("logs") == 2
    assert pift("status", "--watch", "--cluster", "http://head:8265") == 2
    said = capsys.readouterr().err
    assert "cluster=http://head:8265" in said and "pift logs --follow" in said


# ---- what is sent


def test_the_cluster_decides_nothing_of_a_trial() -> None:
    keys = [[cell.key for cell in compose(["sweep=tiny", *more]).cells] for more in ([], ["cluster=http://head:8265"])]
    assert keys[0] == keys[1]


def test_the_command_is_the_same_sweep_there(monkeypatch: Any) -> None:
    """What the environment here decides is written out, and read there as it was here, whatever characters it holds.
    Kills: an environment's store is left behind; the job is sent on to the cluster; another plan passes --expect."""
    place = "/shared/a 'quoted', $(dir)\u202e/ü"
    monkeypatch.setenv("PIFT_STORE", place)
    monkeypatch.setenv("PIFT_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("PIFT_CLUSTER", "http://head:8265")
    plan = compose(["sweep=tiny", "beta=0.1,1", "seed=3", "sweep.name=mine"])
    assert cluster.check(plan) == "http://head:8265"
    text = shlex.join(cluster.launch_words(plan))
    monkeypatch.delenv("PIFT_STORE")
    monkeypatch.delenv("PIFT_TRACKING_URI")
    typed = subprocess.run(["sh", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True).stdout
    words = typed.decode().rstrip("\0").split("\0")
    options = cli._parser().parse_args(words[1:])
    there = compose(options.overrides)
    assert (there.sweep, there.config["store"], there.config["cluster"]) == ("mine", place, None)
    assert there.config["executor"] | {"cpus": 0} == {"name": "ray", "address": "auto", "cpus": 0}
    assert there.config["tracking"]["uri"] == "http://mlflow:5000"
    assert [cell.key for cell in there.cells] == [cell.key for cell in plan.cells]
    cluster.refuse_others(there, options.expect)
    with pytest.raises(UserError, match="other trials"):
        cluster.refuse_others(compose(["sweep=tiny"]), options.expect)


def test_other_trials_than_those_submitted_do_not_run(tmp_path: Path, capsys: Any) -> None:
    store = tmp_path / "store"
    assert pift("launch", "sweep=tiny", f"store={store}", "--expect", "0000000000000000") == 2
    assert "the same pift on both" in capsys.readouterr().err and not store.exists()


@pytest.mark.parametrize("text", ["plain", "/a/b", "null", "1", "a b", "it's", "\\", "a\\'b\\", "${x}", "\n", "a=b,c"])
def test_a_quoted_text_is_read_as_itself(text: str) -> None:
    assert parse([f"store={quoted(text)}"])["store"].values == (text,)


def test_an_answer_is_kept_apart_from_what_else_is_said() -> None:
    """stdout behind the mark, stderr before it, and the exit code. Kills: the shell's own exit code."""
    words = [sys.executable, "-c", "import sys; print('{}'); print('note', file=sys.stderr); sys.exit(3)"]
    done = subprocess.run(["sh", "-c", cluster._answered(words)], stdout=-1, stderr=-2, text=True)
    assert done.returncode == 3
    said, _, answer = done.stdout.partition(f"\n{cluster.ANSWER}\n")
    assert (said.strip(), answer) == ("note", "{}\n")


# ---- one job at a time


class FakeHead:
    """A head that keeps a list; `rival` is a job that somebody else submits just before ours."""

    url, page = "http://head:8265", staticmethod(lambda name: f"http://head:8265/#/jobs/{name}")

    def __init__(self, **states: str) -> None:
        self.states, self.rival = dict(states), ""

    def jobs(self) -> list[JobRecord]:
        return [JobRecord(name, state, None, "", 1.0, {}) for name, state in self.states.items()]

    def submit(self, name: str, *_: Any) -> bool:
        if self.rival:
            self.states[name], self.rival = self.rival, ""
        if name in self.states:
            return False
        self.states[name] = "PENDING"
        return True


def test_a_job_is_named_by_its_content() -> None:
    plan = planned("beta=0.1,1")
    assert cluster.job_name(plan) == cluster.job_name(planned("beta=1,0.1", "budget.hours=2"))
    others = [planned("beta=0.1,2"), planned("beta=0.1,1", store="/other"), planned("beta=0.1,1", "sweep.name=b")]
    assert len({cluster.job_name(other) for other in [plan, *others]}) == 4


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_sweep_at_work_is_not_submitted_again(state: str) -> None:
    plan = planned()
    head = FakeHead(**{f"{cluster.job_name(plan)}-4": state, f"{cluster.job_name(plan)}-3": "FAILED"})
    with pytest.raises(UserError, match=rf"jobs/{cluster.job_name(plan)}-4 .*pift status\|logs\|stop tiny"):
        cluster._submit(head, plan, "pift")  # type: ignore[arg-type]
    assert len(head.states) == 2


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_sweep_that_ended_is_submitted_under_the_next_number(state: str) -> None:
    plan = planned()
    name = cluster.job_name(plan)
    head = FakeHead(**{f"{name}-1": "FAILED", f"{name}-9": state, f"{name}-10": state, f"{name}-x": "RUNNING"})
    assert cluster._submit(head, plan, "pift") == f"{name}-11"  # type: ignore[arg-type]
    assert cluster._submit(FakeHead(), plan, "pift") == f"{name}-1"  # type: ignore[arg-type]


def test_of_two_submissions_at_the_same_time_one_is_refused() -> None:
    """Ray takes a name once. Kills: a name that is taken is tried again under the next number without a look."""
    plan, head = planned(), FakeHead()
    head.rival = "PENDING"
    with pytest.raises(UserError, match="at work on http://head:8265 already"):
        cluster._submit(head, plan, "pift")  # type: ignore[arg-type]
    assert len(head.states) == 1
    head = FakeHead()
    head.rival = "FAILED"  # it ended at once: the next number is ours
    assert cluster._submit(head, plan, "pift").endswith("-2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 4, 4), ("FAILED", 130, 130), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_the_launchs(state: str, code: int | None, expected: int) -> None:
    assert cluster._exit_code(JobRecord("a", state, code, "", 0.0)) == expected


def test_a_job_without_a_pift_or_without_an_end(capsys: Any) -> None:
    with pytest.raises(UserError, match="install pift"):
        cluster._exit_code(JobRecord("a", "FAILED", 127, "", 0.0))
    assert cluster._exit_code(JobRecord("a", "FAILED", None, "the node died", 0.0)) == 3
    assert "the node died" in capsys.readouterr().err


# ---- who answers there


@contextmanager
def server(status: int = 200, body: bytes = b"{}", token: str | None = None, wait: float = 0.0) -> Iterator[str]:
    """A web server that says the same to everybody, or 401 and 403 to those without the token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(wait)
            given = self.headers.get("Authorization")
            locked = 401 if token and not given else 403 if token and given != f"Bearer {token}" else status
            self.send_response(locked)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


VERSION = b'{"version": "4", "ray_version": "2.60.0"}'


def test_nobody_is_there(capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        assert pift("launch", "sweep=tiny", "store=/shared/pift", f"cluster={url}") == 2
        assert pift("status", "--cluster", url) == 2
    said = capsys.readouterr().err
    assert f"cluster={url} does not answer" in said and "refused" in said and "--dashboard-host" in said
    assert f"--cluster {url} does not answer" in said


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError, match="no-such-host.invalid:8265 does not answer"):
        Head("http://no-such-host.invalid:8265")


@pytest.mark.parametrize(("status", "body"), [(404, b""), (200, b"<html>"), (200, b"{}"), (200, b"[]"), (500, b"")])
def test_another_server_is_there(status: int, body: bytes) -> None:
    with server(status, body) as url, pytest.raises(UserError, match=r"not as the dashboard of Ray.*ray\[default\]"):
        Head(url)


def test_a_server_that_speaks_something_else_or_nothing(monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answers() -> None:
            connection = listener.accept()[0]
            connection.sendall(b"\x00\x00\x04\x00\x00\x00")
            connection.close()

        threading.Thread(target=answers, daemon=True).start()
        with pytest.raises(UserError, match="does not answer"):
            Head(url)
    monkeypatch.setattr(ray_jobs, "KNOCK_SECONDS", 0.3)
    with server(200, VERSION, wait=1.0) as url, pytest.raises(UserError, match="does not answer .*timed out"):
        Head(url)


def test_the_token_of_this_machine_is_shown_to_a_head_that_asks(tmp_path: Path, monkeypatch: Any) -> None:
    """From the variable, the variable with a path, or the file, in Ray's order; to nobody who does not ask."""
    with server(200, VERSION, TOKEN) as url:
        with pytest.raises(UserError, match="takes no job without its token: .*ray get-auth-token"):
            Head(url)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
        assert Head(url)._token == TOKEN
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        with pytest.raises(UserError, match="does not know the token of this machine: .*RAY_AUTH_TOKEN"):
            Head(url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "")
        (tmp_path / "token").write_text(TOKEN)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        assert Head(url)._token == TOKEN
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(UserError, match="RAY_AUTH_MODE is not disabled"):
            Head(url)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with server(200, VERSION) as url:
        assert Head(url)._token is None


def test_rays_own_variables_do_not_send_a_job_elsewhere(monkeypatch: Any) -> None:
    """Ray's client prefers RAY_API_SERVER_ADDRESS to the address it is given. Kills: it is left in the environment."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with server(200, VERSION) as url:
        assert Head(url)._client.get_address() == url
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"


class BrokenTail:
    """A client whose log breaks off after the first part, twice, and which is asked in between."""

    def __init__(self, parts: list[str], breaks: int) -> None:
        self.parts, self.breaks = parts, breaks

    async def tail_job_logs(self, name: str) -> Any:
        for number, part in enumerate(self.parts):
            if number == 1 and self.breaks > 0:
                self.breaks -= 1
                raise ConnectionResetError("the line broke")
            yield part

    def get_job_info(self, name: str) -> Any:
        if self.breaks > 0:
            raise ConnectionError("still broken")
        record = {"submission_id": name, "status": "FAILED", "driver_exit_code": 3, "message": "", "start_time": 1}
        return type("Info", (), record | {"metadata": {}})


def broken(parts: list[str], breaks: int) -> Head:
    head = object.__new__(Head)
    head.url, head.named, head._token, head._client = "http://head:8265", "cluster=", None, BrokenTail(parts, breaks)
    return head


def test_a_log_is_followed_across_a_broken_connection(monkeypatch: Any) -> None:
    """Every character once. Kills: the log begins again; it ends where the connection did."""
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)
    assert "".join(broken(["one\n", "two\n", "three\n"], 2).follow("job")) == "one\ntwo\nthree\n"


def test_a_head_that_is_lost_while_a_log_is_followed(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray_jobs, "LOST_SECONDS", 0.1)
    with pytest.raises(UserError, match="does not answer .the line broke."):
        list(broken(["", "two\n"], 10**9).follow("job"))


def test_ctrl_c_while_a_log_is_followed(monkeypatch: Any, capsys: Any) -> None:
    head = FakeHead()
    head.follow = lambda name: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert cluster._followed(head, "job", "tiny", False) == 130  # type: ignore[arg-type]
    assert "job goes on; from here: pift status|logs|stop tiny" in capsys.readouterr().err


# ---- a node that does not see the store


def test_a_store_that_a_node_does_not_see(tmp_path: Path) -> None:
    """Kills: the trial trains into a folder of its own node, which nobody finds."""
    folder = tmp_path / "shared" / "trials" / "a"
    setting = Setting(target="nowhere.run", stop=tmp_path / "shared" / "launches" / "x.stop", cpu=1, gpu=0)
    outcome = executors.call(setting, Job("a", {}, folder))
    assert (outcome.state, outcome.kind) == ("stopped", "storage") and "every node sees" in str(outcome.message)
    assert not (tmp_path / "shared").exists()


# ---- a real head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head with two CPUs and a token, on ports that were free."""
    with contextmanager(_ports)() as (gcs, dashboard, client, agent), tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": folder, "RAY_TMPDIR": folder,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        options = {
            "port": gcs, "dashboard-host": "127.0.0.1", "dashboard-port": dashboard, "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent, "min-worker-port": 0, "max-worker-port": 0, "num-cpus": 2,
            "object-store-memory": 100_000_000, "temp-dir": folder,
        }  # fmt: skip
        command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        log = tmp_path_factory.mktemp("head") / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        try:
            yield _answering(f"http://127.0.0.1:{dashboard}", process, log)
        finally:
            _end(process, folder)


def _ports() -> Iterator[list[int]]:
    with socket.socket() as a, socket.socket() as b, socket.socket() as c, socket.socket() as d:
        found = (a, b, c, d)
        for one in found:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in found]
    yield ports


def _answering(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """The address, once jobs are taken there."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            host, port = url.removeprefix("http://").split(":")
            socket.create_connection((host, int(port)), timeout=1).close()
            return url
        time.sleep(0.5)
    raise AssertionError(f"Ray did not start: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """End a head and whatever it started, those that left its process group included."""
    ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if any(folder in word for word in one.cmdline()) or one.environ().get("RAY_TMPDIR") == folder:
                ours.append(one)
    process.kill()
    for one in ours:
        with suppress(psutil.Error):
            one.kill()
    process.wait()
    psutil.wait_procs(ours, timeout=10)


def waited(what: Any, seconds: float = 180.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)
    return found


@pytest.mark.ray
def test_a_sweep_from_a_laptop(head: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Submitted, refused while it is at work, looked at, stopped with a checkpoint, continued to its end, read."""
    store = tmp_path / "store"
    sweep = [*SMALL, "beta=1", "train.gradient_steps=400", "sweep.name=far", f"store={store}"]
    launch = ["launch", *sweep, f"cluster={head}"]
    assert pift(*launch, "--detach") == 2
    assert "takes no job without its token" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert pift(*launch, "--detach", "--json") == 0
    job = json.loads(capsys.readouterr().out)["job"]
    assert pift(*launch) == 2
    assert f"{head}/#/jobs/{job}" in capsys.readouterr().err

    [key] = [cell.key for cell in compose(sweep).cells]
    trial = Store(store).trial(key)
    waited(lambda: trial.journal.exists() and trial.journal.read_text().count("\n") > 3)
    assert pift("stop", "--cluster", head) == 0
    assert f"stopped: {job}" in capsys.readouterr().out
    [*_, newest] = trial.checkpoints.glob("*.json")
    assert not trial.done.exists() and newest.exists()

    monkeypatch.setenv("PIFT_CLUSTER", head)
    assert pift("status", "--json") == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert cell["state"] == "resumable" and 0 < cell["step"] < 400

    assert pift(*launch, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["counts"] == {"done": 1} and f"submitted {job[:-1]}2" in err
    assert pift("logs", "far") == 0
    assert "done (step 400/400" in capsys.readouterr().out
    assert pift("plan", *sweep) == 0
    out = capsys.readouterr().out
    assert "0 to run, 1 done" in out and "cluster=null" not in out
    assert pift("stop", "far") == 0
    assert "nothing to stop" in capsys.readouterr().out


# ---- the files to start a cluster from

FILES = Path(__file__).parents[1] / "docker" / "cluster"


def containers(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod, container) of a RayJob."""
    cluster_spec = job["spec"]["rayClusterSpec"]
    groups = [cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]]
    for pod in [*(group["template"]["spec"] for group in groups), job["spec"]["submitterPodTemplate"]["spec"]]:
        yield from ((pod, container) for container in pod["containers"])


def test_the_rayjob() -> None:
    """Nobody is root, the head runs no trials, the store is there on every node, and the command is one of ours."""
    claim, job = yaml.safe_load_all((FILES / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    grid = compose(cli._parser().parse_args(words[1:]).overrides)
    assert grid.cells and grid.config["executor"]["address"] == "auto" and grid.config["cluster"] is None
    user = int(re.search(r"^USER (\d+)", (FILES.parent / "Dockerfile").read_text(), re.M)[1])  # type: ignore[index]
    for pod, container in containers(job):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == user
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        if "volumes" in pod:
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
            store = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["store"]
            assert store == grid.config["store"]
    spec = job["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == importlib.metadata.version("ray")
    [gpus] = [group["template"]["spec"]["containers"][0] for group in spec["workerGroupSpecs"]]
    assert gpus["resources"]["limits"]["nvidia.com/gpu"] >= grid.config["resources"]["gpu"]
    assert gpus["resources"]["limits"]["cpu"] >= str(grid.config["resources"]["cpu"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_ray_up_file() -> None:
    """What `ray up` itself checks before it starts anything."""
    util = importlib.import_module("ray.autoscaler._private.util")
    ready = util.prepare_config(yaml.safe_load((FILES / "ray-up.yaml").read_text()))
    util.validate_config(ready)
    assert ready["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert not [line for line in ready["head_start_ray_commands"] if "dashboard-host=0.0.0.0" in line]


def test_the_slurm_script(tmp_path: Path) -> None:
    """It reads as a script, names what is missing, and gives the launch to the first node. Kills: no store, no word."""
    script = FILES / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = subprocess.run(["bash", str(script), "launch", "sweep=tiny"], capture_output=True, text=True)
    assert done.returncode == 2 and "store=/shared/pift" in done.stderr
    for name, text in (("scontrol", "echo 127.0.0.1; echo 127.0.0.2"), ("srun", 'printf "%s\\n" "$@"; exit 3')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4"}
    environment = os.environ | slurm | {"PIFT_BIN": str(tmp_path)}
    words = ["launch", "prompt='a, b'", "store=/x"]
    done = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, env=environment)
    said = done.stdout.splitlines()
    assert done.returncode == 3 and said[said.index("--address") + 1] == "127.0.0.1:6379"
    assert said[said.index("--") + 1 :] == ["pift", *words, "executor=ray", "executor.address=auto"]
