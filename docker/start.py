"""What a container of docker/compose.yaml does before its program starts: secrets from their files into the
environment, a look at what the program needs, and a plain word about what is not there.

    start.py mlflow | head | worker | pift SUBCOMMAND ... | any other program

It ends with exec, so that signals reach the program itself; only a worker stays between, to let its trials write a
checkpoint before Ray ends. Exit code 2: something is missing; the message says what to do about it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

SECRETS = Path("/run/secrets")
DATABASE_SECONDS = 60.0
OBJECT_STORE_BYTES = 128 << 20
"""Only specs travel through Ray; its default is 30 % of the machine's memory."""
LEAVE_SECONDS = 90.0
"""How long a worker that is stopped waits for its trials; compose's stop_grace_period is longer."""
USER, BUCKET, OBJECTS = "pift", "pift", "http://objects:7070"
HEAD_PORT, DASHBOARD_PORT, MLFLOW_PORT = 6379, 8265, 5000


class Missing(Exception):
    """Something that whoever runs the stack can set right; the message says how."""


def main(words: Sequence[str]) -> int:
    """Never returns where the program starts."""
    try:
        program = ROLES[words[0]](list(words[1:])) if words and words[0] in ROLES else list(words)
        if not program:
            raise Missing("no program is named; for example: docker compose run --rm sweep status")
        sys.stdout.flush()
        if words[0] == "worker":
            return supervise(program)
        os.execvp(program[0], program)
    except Missing as error:
        print(*(f"pift: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    except OSError as error:
        print(f"pift: {words[0]} cannot be started: {error}", file=sys.stderr)
    return 2


# ---- the programs


def mlflow(words: Sequence[str]) -> list[str]:
    """The MLflow server on PostgreSQL. Its database's address holds the password: it goes by the environment, where
    no list of processes shows it."""
    password = secret("postgres_password")
    address = f"postgresql+psycopg2://mlflow:{quote(password, safe='')}@postgres:5432/mlflow"
    knock_at_database(password)
    place = "/artifacts"
    if profile("s3"):
        place = f"s3://{BUCKET}/artifacts"
        make_bucket()
    else:
        check_folder(Path(place), "artifacts")
    os.environ.update(
        MLFLOW_BACKEND_STORE_URI=address, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        PGCLIENTENCODING="UTF8",  # also on a database that was made in a C locale: notes hold more than ASCII
    )  # fmt: skip
    return [
        *("mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT), "--workers", "1"),
        *("--serve-artifacts", "--artifacts-destination", place),
        *("--allowed-hosts", "mlflow:*,localhost:*,127.0.0.1:*"),
        *("--uvicorn-opts", "--log-level warning"),
        *(login_pages(address) if profile("auth") else ()),
        *words,
    ]


def login_pages(database: str) -> list[str]:
    """MLflow's login: the user `pift`, who may do everything, and whoever that user adds."""
    settings = {
        "default_permission": "READ",
        "database_uri": database,
        "admin_username": USER,
        "admin_password": secret("mlflow_password"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path = Path.home() / "basic_auth.ini"
    path.touch(mode=0o600)
    lines = [f"{name} = {value}".replace("%", "%%") for name, value in settings.items()]
    path.write_text("\n".join(["[mlflow]", *lines, ""]), encoding="utf-8")
    os.environ.update(MLFLOW_AUTH_CONFIG_PATH=str(path), MLFLOW_FLASK_SERVER_SECRET_KEY=secret("mlflow_key"))
    return ["--app-name", "basic-auth"]


def head(words: Sequence[str]) -> list[str]:
    """Ray's head, which runs no trials."""
    secret("ray_token")
    client_environment()
    ports = [f"--port={HEAD_PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
    return [*ray_start(0, 0), "--head", *ports, "--block", *words]


def worker(words: Sequence[str]) -> list[str]:
    """A node that runs trials."""
    secret("ray_token")
    client_environment()
    check_store()
    cpus, gpus = (os.environ[name] for name in ("PIFT_WORKER_CPUS", "PIFT_WORKER_GPUS"))
    return [*ray_start(cpus, gpus), f"--address={os.environ['PIFT_RAY_ADDRESS']}", "--block", *words]


def pift(words: Sequence[str]) -> list[str]:
    """Any pift command; a launch joins the cluster as a node without CPUs first, as Ray wants of every driver."""
    client_environment()
    if words[:1] == ["launch"] and not {"--dry-run", "--help", "-h", "executor=inline"} & set(words):
        secret("ray_token")
        check_store()
        join()
    return ["pift", *words]


def login(words: Sequence[str]) -> list[str]:
    """Says how to log in; fails where the other services do not know of the profile."""
    check_profile("auth")
    secret("mlflow_password")
    return ["echo", f"MLflow asks for a login: user {USER}, password in docker/secrets/mlflow_password"]


def objects(words: Sequence[str]) -> list[str]:
    """Makes sure that the object store's volume can be written; fails as `login` does."""
    check_profile("s3")
    check_folder(Path("/objects"), "objects")
    return ["echo", "artifacts and store lie in the object store"]


ROLES: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "mlflow": mlflow, "head": head, "worker": worker, "pift": pift, "login": login, "objects": objects,
}  # fmt: skip


def supervise(program: Sequence[str]) -> int:
    """Run a worker's Ray until it ends; asked to stop, let the trials stop first (orchestrator/executors/node.py)."""
    folder = Path(os.environ["PIFT_NODE"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    child = subprocess.Popen(program)

    def leave(*_: object) -> None:
        threading.Thread(target=end, args=(child, folder), daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return child.wait()


def end(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until no trial is at work here, LEAVE_SECONDS at most, then end Ray."""
    (folder / "leaving").touch()
    deadline = time.monotonic() + LEAVE_SECONDS
    print("pift: leaving; the trials of this node write a checkpoint", flush=True)
    while any(at_work(mark) for mark in folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.2)
    child.terminate()


def at_work(mark: Path) -> bool:
    """Whether a process that has left its number lives."""
    return mark.name.isdigit() and Path("/proc", mark.name).exists()


# ---- what they need


def profile(name: str) -> bool:
    """Whether a profile of the compose file is on."""
    return name in os.environ.get("PIFT_PROFILES", "").split(",")


def check_profile(name: str) -> None:
    """Raises Missing where a profile was switched on in a way that only Docker itself hears of."""
    if not profile(name):
        raise Missing(
            f"--profile {name} does not reach the containers; write it into docker/.env, which every command reads: "
            f"echo COMPOSE_PROFILES={name} >> .env"
        )


def client_environment() -> None:
    """What pift needs to reach MLflow and the store, for this process and those that Ray starts."""
    if profile("auth"):
        os.environ.update(MLFLOW_TRACKING_USERNAME=USER, MLFLOW_TRACKING_PASSWORD=secret("mlflow_password"))
    if profile("s3"):
        os.environ["PIFT_STORE"] = f"s3://{BUCKET}/store"
        object_store_environment()


def object_store_environment() -> None:
    os.environ.update(
        AWS_ACCESS_KEY_ID=secret("s3_key"), AWS_SECRET_ACCESS_KEY=secret("s3_secret"), AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=OBJECTS, MLFLOW_S3_ENDPOINT_URL=OBJECTS,
    )  # fmt: skip


def make_bucket() -> None:
    """The bucket for artifacts and store, where there is none yet. Raises Missing."""
    object_store_environment()
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3")
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise Missing(f"the object store at {OBJECTS} refuses ({error}); docker compose logs objects") from None


def ray_start(cpus: int | str, gpus: int | str) -> list[str]:
    """`all` GPUs: Ray counts them."""
    return [
        *("ray", "start", f"--num-cpus={cpus}", *([] if gpus == "all" else [f"--num-gpus={gpus}"])),
        *("--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}"),
    ]


def join() -> None:
    """Make this container a node of the cluster. Raises Missing."""
    address = os.environ["PIFT_RAY_ADDRESS"]
    done = subprocess.run([*ray_start(0, 0), f"--address={address}"], capture_output=True, text=True)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Missing(
            f"this container cannot join Ray at {address} ({said[-1] if said else 'no reason given'}); "
            "is it up? docker compose ps ray-head; docker compose logs ray-head"
        )


def secret(name: str) -> str:
    """The content of a secret. Raises Missing."""
    path = SECRETS / name
    try:
        found = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Missing(
            f"the secret {name} cannot be read ({error.strerror}); docker/secrets.sh makes docker/secrets/{name}, "
            "which every user of the container must be able to read (chmod 444)"
        ) from None
    if not found:
        raise Missing(f"docker/secrets/{name} is empty; remove it and run docker/secrets.sh")
    return found


def check_store() -> None:
    """Raises Missing where the store is a volume that cannot be written; one at a URL is looked at by the launch."""
    if not profile("s3"):
        check_folder(Path(os.environ["PIFT_STORE"]), "store")


def check_folder(folder: Path, volume: str) -> None:
    """Raises Missing where nothing can be written to a volume."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if os.access(folder, os.W_OK) else None
        raise Missing(
            f"nothing can be written to {folder}, the volume {volume}: {error.strerror}; "
            "free some space on its disk (docker system df), or make it writable for user 10001"
        ) from None


def knock_at_database(password: str) -> None:
    """Wait until PostgreSQL lets us in. Raises Missing with what it says, where it does not."""
    import psycopg2

    deadline = time.monotonic() + DATABASE_SECONDS
    while True:
        try:
            psycopg2.connect(host="postgres", user="mlflow", dbname="mlflow", password=password).close()
            return
        except psycopg2.OperationalError as error:
            said = " ".join(str(error).split())
            if "password authentication failed" in said:
                raise Missing(WRONG_PASSWORD) from None
            if time.monotonic() > deadline:
                raise Missing(f"PostgreSQL does not answer ({said}); docker compose logs postgres") from None
            time.sleep(1)


WRONG_PASSWORD = """\
PostgreSQL refuses the password in docker/secrets/postgres_password: its volume was made with another one.
Put the old file back; or make the database anew, which loses no result, for MLflow only shows what the store holds:
  docker compose down && docker volume rm pift_postgres && docker compose up -d --wait
  docker compose run --rm sweep doctor --fix"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
