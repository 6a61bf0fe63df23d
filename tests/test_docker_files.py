"""docker/ without an engine: what compose.yaml and the Dockerfile promise, and what runs inside the containers.

tests/test_docker_lab.py builds the image and runs the stack for real.
"""

from __future__ import annotations

import http.server
import importlib.util
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from orchestrator.cli import _parser
from orchestrator.errors import UserError
from orchestrator.grid import compose

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
OURS = "pift:"


def stack() -> dict[str, Any]:
    """compose.yaml with its anchors followed."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


def services() -> dict[str, dict[str, Any]]:
    return stack()["services"]


def load(name: str) -> ModuleType:
    """One of the scripts of the image, which are no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- breaches: each a function of a stack, so that the tests can break one


def open_ports(found: dict[str, Any]) -> list[str]:
    """Ports that other machines reach, and services that share the machine's network."""
    ports = [f"{name}: {port}" for name, service in found.items() for port in service.get("ports", ())]
    shared = [f"{name}: {service['network_mode']}" for name, service in found.items() if "network_mode" in service]
    return [port for port in ports if not port.partition(": ")[2].startswith("127.0.0.1:")] + shared


def rights(found: dict[str, Any]) -> list[str]:
    """Services that run as root or with more rights than a plain process needs."""
    bad = []
    for name, service in found.items():
        user = str(service.get("user", image_user() if service["image"].startswith(OURS) else "root"))
        if user.partition(":")[0] in ("root", "0", ""):
            bad.append(f"{name} runs as root")
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get("security_opt", ()):
            bad.append(f"{name} keeps rights it does not need")
        if service.get("privileged") or service.get("pid") or service.get("cap_add") or "docker.sock" in str(service):
            bad.append(f"{name} reaches into the machine")
    return bad


def literal_secrets(text: str, found: dict[str, Any]) -> list[str]:
    """Values of variables that are called like secrets, and long random words anywhere."""
    bad = re.findall(r"\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20,}\b", text)
    for name, service in found.items():
        for variable, value in dict(service.get("environment") or {}).items():
            called = re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", variable)
            if called and not str(value).startswith("/run/secrets/"):
                bad.append(f"{name}: {variable}={value}")
    return bad


def image_user() -> str:
    return re.findall(r"^USER (\S+)", dockerfile(), flags=re.M)[-1]


def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def unpinned(images: list[str]) -> list[str]:
    return [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image)]


def test_nothing_listens_beyond_this_machine() -> None:
    assert services() and not open_ports(services())
    assert open_ports({"a": {"ports": ["5000:5000"]}}) and open_ports({"a": {"network_mode": "host"}})
    assert open_ports({"a": {"ports": ["0.0.0.0:5000:5000"]}})


def test_nothing_runs_as_root() -> None:
    assert not rights(services())
    assert image_user().partition(":")[0].isdigit(), "a number: Kubernetes' runAsNonRoot reads no names"
    plain = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    assert rights({"a": {"image": "postgres:16", **plain}})
    assert rights({"a": {"image": "postgres:16", "user": "0:0", **plain}})
    assert rights({"a": {"image": f"{OURS}1", "user": "1", **plain, "cap_drop": []}})
    assert rights({"a": {"image": f"{OURS}1", **plain, "volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}})


def test_no_password_in_the_files() -> None:
    for path in sorted(path for path in DOCKER.glob("*") if path.is_file()):
        assert not literal_secrets(path.read_text(encoding="utf-8"), {}), path
    assert not literal_secrets("", services())
    assert literal_secrets("", {"a": {"environment": {"POSTGRES_PASSWORD": "hunter2"}}})
    assert literal_secrets("token: 7f3a9c0d1e2b4a5968778695a4b3c2d1", {})


def test_every_image_is_pinned() -> None:
    bases = re.findall(r"^FROM (\S+:\S+)", dockerfile(), flags=re.M)
    assert bases and not unpinned([*bases, *(service["image"] for service in services().values())])
    assert unpinned(["postgres", "postgres:latest", "python:slim"]) == ["postgres", "postgres:latest", "python:slim"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    ours = {service["image"] for service in services().values() if service["image"].startswith(OURS)}
    assert ours == {f"{OURS}{version}"}


def test_the_image_is_built_once() -> None:
    """By one service, and nobody asks a registry: the classic builder would build it for each service, side by side."""
    ours = {name: service for name, service in services().items() if service["image"].startswith(OURS)}
    assert [name for name, service in ours.items() if "build" in service] == ["sweep"]
    assert {service["pull_policy"] for service in ours.values()} == {"never"}


def test_what_starts_by_default_and_what_a_profile_adds() -> None:
    added = {name: service["profiles"] for name, service in services().items() if "profiles" in service}
    assert added == {"ray-worker-gpu": ["gpu"], "login": ["auth"], "objects-folder": ["s3"], "objects": ["s3"]}
    assert set(services()) - set(added) == {"postgres", "mlflow", "ray-head", "ray-worker", "sweep"}
    assert services()["sweep"]["scale"] == 0, "`up` starts servers only"
    for name, service in services().items():
        for other, how in service.get("depends_on", {}).items():
            if other in added and name not in added:
                assert how.get("required") is False, f"{name} cannot start without profile {added[other]}"


def test_gpus_are_asked_for_in_their_profile_alone() -> None:
    asking = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services().items()
        if "deploy" in service
    }
    assert list(asking) == ["ray-worker-gpu"] and asking["ray-worker-gpu"][0]["capabilities"] == ["gpu"]


def test_ray_has_the_shared_memory_it_is_told_to_use() -> None:
    units = {"mb": 1 << 20, "gb": 1 << 30}
    asked = load("start").OBJECT_STORE_BYTES
    for name in ("ray-head", "ray-worker", "ray-worker-gpu", "sweep"):
        size = str(services()[name]["shm_size"])
        assert int(size[:-2]) * units[size[-2:]] >= 2 * asked, name


def test_a_stop_leaves_time_for_checkpoints() -> None:
    """The driver hears Ctrl-C's signal, and Docker's patience is longer than a worker's."""
    assert services()["sweep"]["stop_signal"] == services()["postgres"]["stop_signal"] == "SIGINT"
    for name in ("ray-worker", "ray-worker-gpu", "sweep"):
        assert seconds(services()[name]["stop_grace_period"]) > load("start").LEAVE_SECONDS + 10, name
    assert all(service.get("init") for service in services().values()), "signals reach programs, no zombies stay"


def seconds(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_logs_do_not_fill_the_disk() -> None:
    assert all("max-size" in service["logging"]["options"] for service in services().values())


# ---- secrets.sh


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A copy of docker/secrets.sh in a folder of its own."""
    return Path(shutil.copy2(DOCKER / "secrets.sh", tmp_path))


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, **options)


def test_secrets_are_made_once(secrets: Path) -> None:
    assert run("bash", secrets).returncode == 0
    folder = secrets.parent / "secrets"
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(before) == set(stack()["secrets"]) == {Path(entry["file"]).name for entry in stack()["secrets"].values()}
    assert len(set(before.values())) == len(before), "one word for two locks"
    assert all(re.fullmatch(r"[0-9a-f]{32,}", word) for word in before.values())
    (folder / "ray_token").unlink()
    (folder / "mlflow_key").chmod(0o600)
    (folder / "mlflow_key").write_text("")
    assert run("bash", secrets).returncode == 0
    after = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"ray_token", "mlflow_key"}
    assert all(after.values())


def test_secrets_are_nobody_elses(secrets: Path) -> None:
    """Others cannot enter the folder; a container's user can read the file that is mounted from it."""
    assert run("bash", secrets, umask=0o022).returncode == 0
    folder = secrets.parent / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}


def test_git_and_the_image_know_no_secret() -> None:
    assert run("git", "check-ignore", "docker/secrets/ray_token", "docker/.env", cwd=ROOT).stdout.count("\n") == 2
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*" or "*" in lines, "nothing but what is named"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert not [line for line in allowed if "secrets" in line or ".env" in line or line in ("docker", "store")]


def test_the_image_is_built_of_what_docker_may_see() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copied = [
        word
        for words in re.findall(r"^COPY (?!--from)(.+)$", dockerfile(), flags=re.M)
        for word in words.split()[:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(name == pattern or Path(name).match(pattern) for pattern in allowed), f"{name} is not let in"


def test_our_code_is_the_last_and_smallest_layer() -> None:
    """The packages are installed in a stage that no change of our code touches."""
    stages = re.split(r"^FROM ", dockerfile(), flags=re.M)[1:]
    [packages] = [stage for stage in stages if stage.partition("\n")[0].endswith("AS packages")]
    assert "uv pip install" in packages and not re.search(r"orchestrator|workers|pyproject", packages)
    last = [line for line in stages[-1].splitlines() if line.startswith("COPY")]
    order = [re.search(r"/layers/(\w+)", line) for line in last]
    assert [found[1] for found in order if found] == ["cuda", "torch", "rest", "project"]


# ---- the environment that compose sets


NAMES = ("PIFT_STORE", "PIFT_EXECUTOR", "PIFT_RAY_ADDRESS", "PIFT_TRACKING_URI")


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of the service `sweep`."""
    found = {name: str(services()["sweep"]["environment"][name]) for name in NAMES}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


def test_a_launch_in_compose_needs_no_more_words(inside: dict[str, str]) -> None:
    config = compose(["sweep=tiny"]).config
    assert config["executor"]["name"] == "ray" and config["executor"]["address"] == inside["PIFT_RAY_ADDRESS"]
    assert config["tracking"]["uri"] == inside["PIFT_TRACKING_URI"] and config["store"] == inside["PIFT_STORE"]
    assert str(_parser().parse_args(["compare"]).store or inside["PIFT_STORE"]) == inside["PIFT_STORE"]


def test_the_command_line_wins_over_the_environment(inside: dict[str, str]) -> None:
    words = ["executor=inline", "store=here", "tracking.uri=null"]
    config = compose(words).config
    assert config["executor"]["name"] == "inline" and config["store"] == "here" and config["tracking"]["uri"] is None
    assert compose(["executor.address=null"]).config["executor"]["address"] is None
    assert compose(["executor.address=auto"]).config["executor"]["address"] == "auto"
    assert str(_parser().parse_args(["compare", "--store", "here"]).store) == "here"


def test_the_environment_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    outside = compose(["sweep=tiny"])
    assert outside.config["executor"]["name"] == "inline" and outside.config["store"] == "store"
    assert outside.config["tracking"]["uri"] is None
    for name in NAMES:
        monkeypatch.setenv(name, str(services()["sweep"]["environment"][name]))
    assert [cell.key for cell in compose(["sweep=tiny"]).cells] == [cell.key for cell in outside.cells]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PIFT_STORE", "", "PIFT_STORE: store='' is not a folder"),
        ("PIFT_STORE", "s3://", "PIFT_STORE: "),
        ("PIFT_EXECUTOR", "rya", "PIFT_EXECUTOR: executor=rya is not known"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        compose([])
    assert said in str(error.value)
    assert compose(["store=here", "executor=inline"]).cells, "what is said on the command line is what counts"


# ---- start.py


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """start.py with secrets, a store and a home in `tmp_path`; the environment is put back afterwards."""
    before = dict(os.environ)
    module = load("start")
    monkeypatch.setattr(module, "SECRETS", tmp_path / "secrets")
    (tmp_path / "secrets").mkdir()
    for name in stack()["secrets"]:
        (tmp_path / "secrets" / name).write_text(f"{name} p@ss/%word\n")
    for name in ("store", "artifacts", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIFT_STORE", str(tmp_path / "store"))
    for name in ("PIFT_RAY_ADDRESS", "PIFT_WORKER_CPUS", "PIFT_WORKER_GPUS"):
        monkeypatch.setenv(name, {"PIFT_WORKER_CPUS": "3", "PIFT_WORKER_GPUS": "all"}.get(name, "ray-head:6379"))
    monkeypatch.setenv("PIFT_PROFILES", "")
    yield module
    os.environ.clear()
    os.environ.update(before)


def test_the_database_password_is_in_no_list_of_processes(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "knock_at_database", lambda password: None)
    monkeypatch.setattr(start, "check_folder", lambda folder, volume: None)
    monkeypatch.setenv("PIFT_PROFILES", "gpu,auth")
    words = start.mlflow([])
    assert "p@ss" not in " ".join(words)
    assert os.environ["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://mlflow:")
    assert "p%40ss%2F%25word@postgres:5432/" in os.environ["MLFLOW_BACKEND_STORE_URI"], "quoted: it may hold @ and /"
    settings = Path(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    from configparser import ConfigParser

    found = ConfigParser()
    found.read(settings)
    assert found["mlflow"]["admin_password"] == "mlflow_password p@ss/%word"
    assert found["mlflow"]["database_uri"] == os.environ["MLFLOW_BACKEND_STORE_URI"]


def test_mlflow_accepts_the_names_it_is_called_by(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's name and this machine's two: any other Host is refused."""
    monkeypatch.setattr(start, "knock_at_database", lambda password: None)
    monkeypatch.setattr(start, "check_folder", lambda folder, volume: None)
    words = start.mlflow([])
    assert words[words.index("--allowed-hosts") + 1].split(",") == ["mlflow:*", "localhost:*", "127.0.0.1:*"]
    assert services()["sweep"]["environment"]["PIFT_TRACKING_URI"] == f"http://mlflow:{start.MLFLOW_PORT}"
    assert "--serve-artifacts" in words


def test_the_options_of_the_servers_exist(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option that start.py passes is one that the locked versions know."""
    import click
    from mlflow.cli import server as mlflow_server
    from ray.scripts.scripts import start as ray_start

    monkeypatch.setattr(start, "knock_at_database", lambda password: None)
    monkeypatch.setattr(start, "check_folder", lambda folder, volume: None)
    for command, words in (
        (mlflow_server, start.mlflow([])[2:]),
        (ray_start, start.head([])[2:]),
        (ray_start, start.worker([])[2:]),
    ):
        assert isinstance(command, click.Command)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--log-level warning"}
        assert asked and asked <= known, asked - known


def test_a_head_offers_no_cpu_and_a_worker_what_it_is_told(start: ModuleType) -> None:
    assert {"--num-cpus=0", "--num-gpus=0", "--head"} <= set(start.head([]))
    words = start.worker([])
    assert "--num-cpus=3" in words and "--address=ray-head:6379" in words
    assert not [word for word in words if word.startswith("--num-gpus")], "all: Ray counts them"


def test_only_a_launch_joins_the_cluster(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[bool] = []
    monkeypatch.setattr(start, "join", lambda: joined.append(True))
    for words in (["status"], ["plan", "sweep=tiny"], ["launch", "--dry-run"], ["launch", "executor=inline"]):
        assert start.pift(words) == ["pift", *words] and not joined
    assert start.pift(["launch", "sweep=tiny"]) == ["pift", "launch", "sweep=tiny"] and joined


def test_profiles_reach_the_clients(start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIFT_PROFILES", "auth,s3")
    start.client_environment()
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "mlflow_password p@ss/%word"
    assert os.environ["PIFT_STORE"] == "s3://pift/store" and os.environ["AWS_ACCESS_KEY_ID"] == "s3_key p@ss/%word"
    assert start.login([])[0] == "echo"


def said(start: ModuleType, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What start.py prints for what somebody can set right, which ends with exit code 2 and no traceback."""
    assert start.main(words) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and all(line.startswith("pift: ") for line in text.splitlines())
    return text


def test_what_is_missing_is_said(
    start: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "write it into docker/.env" in said(start, capsys, "login")
    (start.SECRETS / "ray_token").unlink()
    assert "docker/secrets.sh makes docker/secrets/ray_token" in said(start, capsys, "head")
    (start.SECRETS / "ray_token").write_text("\n")
    assert "ray_token is empty" in said(start, capsys, "worker")
    assert "no program is named" in said(start, capsys)
    assert "nosuchprogram cannot be started" in said(start, capsys, "nosuchprogram")


def test_a_full_volume_is_said(
    start: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    text = said(start, capsys, "worker")
    assert "the volume store: No space left on device" in text and "free some space" in text


def test_a_wrong_password_is_said(
    start: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OperationalError(Exception):
        pass

    def connect(**address: str) -> None:
        raise OperationalError('FATAL:  password authentication failed for user "mlflow"')

    fake = ModuleType("psycopg2")
    fake.OperationalError, fake.connect = OperationalError, connect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "psycopg2", fake)
    text = said(start, capsys, "mlflow")
    assert "docker/secrets/postgres_password" in text and "docker volume rm pift_postgres" in text
    assert f"{stack()['name']}_postgres" in text and "postgres" in stack()["volumes"]


@pytest.mark.slow
def test_a_worker_waits_for_its_trials(tmp_path: Path) -> None:
    """SIGTERM: `leaving` appears, Ray (here: sleep) lives on until no trial is at work, and ends then.

    Mutant: end() that does not wait ends Ray at once."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import start; sys.exit(start.supervise(['sleep', '60']))"
    node = tmp_path / "node"
    environment = os.environ | {"PIFT_NODE": str(node)}
    worker = subprocess.Popen([sys.executable, "-c", code, str(DOCKER)], env=environment)
    trial = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(node.is_dir)
        time.sleep(0.3)
        (node / str(trial.pid)).touch()
        worker.send_signal(signal.SIGTERM)
        wait_for((node / "leaving").exists)
        time.sleep(1)
        assert worker.poll() is None, "Ray ended while a trial wrote its checkpoint"
        (node / str(trial.pid)).unlink()
        assert worker.wait(timeout=20) != 0
    finally:
        for process in (worker, trial):
            process.kill()
            process.wait()


def wait_for(ready: Callable[[], bool], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- health.py


@pytest.fixture
def server() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server that answers 403 to any Host but mlflow:5000, and the headers it got."""
    seen: list[dict[str, str]] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200 if self.headers["Host"] == "mlflow:5000" else 403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found.server_port, seen
        found.shutdown()


def test_health_asks_as_other_containers_do(
    server: tuple[int, list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, (port, seen) = load("health"), server
    monkeypatch.setattr(health, "SECRETS", tmp_path)
    (tmp_path / "mlflow_password").write_text("word\n")
    (tmp_path / "ray_token").write_text("token\n")
    monkeypatch.setenv("PIFT_PROFILES", "auth")
    asked = health.asked("mlflow")
    assert asked.full_url.startswith("http://127.0.0.1:5000/api/2.0/mlflow/") and asked.headers["Host"] == "mlflow:5000"
    monkeypatch.setattr(health, "asked", lambda role: request_to(health, asked, port))
    assert health.main() == 0 and seen[0]["Authorization"].startswith("Basic ")
    asked.headers["Host"] = "elsewhere:5000"
    assert health.main() == 1, "a server that refuses other containers is not well"
    assert health.main.__module__ and load("health").asked("sweep") is None


def request_to(health: ModuleType, asked: Any, port: int) -> Any:
    address = asked.full_url.replace(":5000", f":{port}")
    return health.urllib.request.Request(address, headers=dict(asked.headers))


def test_health_of_ray_shows_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health = load("health")
    monkeypatch.setattr(health, "SECRETS", tmp_path)
    (tmp_path / "ray_token").write_text("token\n")
    for role in ("head", "worker"):
        assert health.asked(role).headers["Authorization"] == "Bearer token"


# ---- docs/compose.md


def documented() -> list[list[str]]:
    """The pift commands that docs/compose.md and docker/ give, as words."""
    texts = [(ROOT / "docs" / "compose.md").read_text(encoding="utf-8"), (DOCKER / "compose.yaml").read_text()]
    texts += [(DOCKER / "start.py").read_text(), (DOCKER / "up.sh").read_text()]
    lines = [line for text in texts for line in re.findall(r"docker compose run.*? sweep ([^\n`|\"]+)", text)]
    return [shlex.split(line, comments=True) for line in lines if not line.startswith((".", "is", "SUB"))]


def test_the_documented_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    found = documented()
    assert {"launch", "status", "compare", "doctor"} <= {words[0] for words in found}
    for words in found:
        options, rest = _parser().parse_known_args([word.rstrip(";") for word in words])
        assert not [word for word in rest if word.startswith("-")], words
        if words[0] in ("launch", "plan"):
            assert compose([*options.overrides, *rest]).cells


def test_the_documented_settings_are_those_of_the_file() -> None:
    text = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text(encoding="utf-8")))
    assert asked and asked == set(re.findall(r"^\| `([A-Z_]+)` ", text, flags=re.M))


# ---- a machine that leaves (orchestrator/executors/node.py)


def marks(spec: Any, folder: Path, **options: Any) -> Any:
    """A trial that returns what its machine's folder holds while it is at work, and whether it is to stop."""
    from orchestrator.executors import Outcome

    names = sorted(path.name for path in Path(os.environ["PIFT_NODE"]).iterdir())
    (Path(os.environ["PIFT_NODE"]) / "leaving").touch()
    return Outcome("done", int(options["should_stop"]()), " ".join(names))


def test_a_trial_says_that_it_is_at_work_and_stops_when_its_machine_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants: a stop that asks the launch's file alone; a mark that stays behind."""
    from orchestrator.executors import Job, Setting, call

    monkeypatch.setenv("PIFT_NODE", str(tmp_path / "node"))
    monkeypatch.setattr(sys.modules[__name__], "marks", marks)
    monkeypatch.setitem(sys.modules, "marks_of_a_trial", sys.modules[__name__])
    (tmp_path / "node").mkdir()
    setting = Setting(target="marks_of_a_trial.marks", stop=tmp_path / "stop", cpu=1, gpu=0)
    job = Job("key", {}, tmp_path / "trial")
    outcome = call(setting, job)
    assert (outcome.state, outcome.step, outcome.message) == ("done", 1, str(os.getpid()))
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["leaving"]
    assert call(setting, job).state == "stopped", "a trial that arrives late is not begun"
