"""Ray Jobs: commands that run on the head of a cluster, sent over HTTP from a machine that is no part of it.

    head = Head("http://head:8265")             is a head there, and does it take our token?
    head.submit("name", "echo yes", {...})      False where a job of that name exists or existed
    for text in head.follow("name"): ...        what it prints, to its end

Ray's own client does the work; here are its errors in our words, and what it leaves out: a limit to waiting, the token
of a cluster that asks for one, and a log that is followed across a connection that breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import UserError

DASHBOARD_PORT, GCS_PORT, CLIENT_PORT = 8265, 6379, 10001
"""Ray's default ports: only the first one takes jobs."""
KNOCK_SECONDS = 10.0
LOST_SECONDS = 60.0
"""How long a head that does not answer is asked again while a log is followed."""
POLL_SECONDS = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ELSEWHERE = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that win over the address that Ray's client is given."""


@dataclass(frozen=True)
class JobRecord:
    """A job as the head knows it."""

    name: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    message: str
    began: float
    """Seconds since the epoch; 0 where it has not begun."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def check_url(url: Any, named: str = "cluster=") -> str:
    """The address without a final slash. Raises UserError for what is none of a Ray dashboard; contacts nobody."""
    text = str(url).strip().rstrip("/")
    example = f"as in {named}http://head:{DASHBOARD_PORT}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        raise UserError(f"{named}{text} is no web address; write the one of Ray's dashboard, {example}") from None
    if parts.scheme == "ray":
        raise UserError(
            f"{named}{text} is the address of Ray Client, over which no job can be sent; write the one of Ray's "
            f"dashboard on the same host: {named}http://{host or 'head'}:{DASHBOARD_PORT}"
        )
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", text):
        raise UserError(f"{named}{text or repr('')} is not the address of Ray's dashboard; write it {example}")
    if parts.username is not None:
        raise UserError(f"{named} holds a user or password, which would be printed: give Ray's token instead")
    if port in (GCS_PORT, CLIENT_PORT):
        raise UserError(
            f"{named}{text}: {port} is a port of Ray's own protocol; jobs are sent to its dashboard: "
            f"{named}{parts.scheme}://{host}:{DASHBOARD_PORT}"
        )
    return text


class Head:
    """The jobs of one cluster."""

    def __init__(self, url: str, named: str = "cluster=") -> None:
        """Raises UserError where no head answers, or it does not let us in."""
        self.url, self.named = check_url(url, named), named
        self._token: str | None = None
        self._knock()
        with self._explained(), _nowhere_else():
            from ray.job_submission import JobSubmissionClient

            for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "dashboard.utils"):
                logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)
            headers = None if self._token is None else {"Authorization": f"Bearer {self._token}"}
            self._client = JobSubmissionClient(self.url, headers=headers)

    def page(self, name: str) -> str:
        """Where a browser shows the job."""
        return f"{self.url}/#/jobs/{name}"

    def submit(
        self,
        name: str,
        command: str,
        metadata: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> bool:
        """Run a shell command on the head, in a copy of `folder` where one is given; False where the name is taken."""
        surroundings: dict[str, Any] = {"env_vars": dict(environment or {})}
        if folder is not None:
            surroundings["working_dir"] = str(folder)
        try:
            with self._explained():
                self._client.submit_job(
                    entrypoint=command, submission_id=name, metadata=dict(metadata or {}), runtime_env=surroundings
                )
        except _Refused as refused:
            if "already exists" in refused.text:
                return False
            raise UserError(refused.message) from refused
        return True

    def jobs(self) -> list[JobRecord]:
        """Every job that was submitted, as far as the head remembers, the oldest first."""
        with self._explained():
            found = [_record(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.began or float("inf"))

    def job(self, name: str) -> JobRecord:
        with self._explained():
            return _record(self._client.get_job_info(name))

    def log(self, name: str) -> str:
        """All that a job has printed until now, stdout and stderr as they came."""
        with self._explained():
            return str(self._client.get_job_logs(name))

    def stop(self, name: str) -> None:
        """SIGTERM to all processes of the job."""
        with self._explained():
            self._client.stop_job(name)

    def forget(self, name: str) -> None:
        """Take an ended job out of the list."""
        with self._explained():
            self._client.delete_job(name)

    def follow(self, name: str) -> Iterator[str]:
        """What a job prints, as it comes, until it has ended. Raises UserError where the head is lost for a minute."""
        seen, lost_at = 0, None
        while True:
            try:
                for text in self._tail(name, seen):
                    seen, lost_at = seen + len(text), None
                    yield text
                if self.job(name).ended:
                    return
            except UserError:
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > LOST_SECONDS:
                    raise
            time.sleep(POLL_SECONDS)

    def _tail(self, name: str, skip: int) -> Iterator[str]:
        """The log from character `skip` on, while the connection holds."""
        items = self._client.tail_job_logs(name)
        with asyncio.Runner() as runner, contextlib.closing(_Source(runner, items)) as source:
            while True:
                with self._explained():
                    text = source.next()
                if text is None:
                    return
                fresh, skip = text[skip:], max(0, skip - len(text))
                if fresh:
                    yield fresh

    # ---- who answers there

    def _knock(self) -> None:
        """Ask for the version, within KNOCK_SECONDS; with the token of this machine where the head wants one."""
        status, body = self._ask_version(None)
        if status == 401 and os.environ.get("RAY_AUTH_MODE", "token").lower() != "disabled":
            self._token = _token()
            if self._token is not None:
                status, body = self._ask_version(self._token)
        if status in (401, 403):
            raise UserError(self._locked(status))
        try:
            known = status == 200 and "ray_version" in json.loads(body)
        except ValueError:
            known = False
        if not known:
            raise UserError(
                f"{self.named}{self.url} answers, but not as the dashboard of Ray (status {status} for /api/version): "
                "another server listens there, or Ray was installed on the head without its dashboard: "
                "pip install 'ray[default]'"
            )

    def _ask_version(self, token: str | None) -> tuple[int, bytes]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{self.url}/api/version", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=KNOCK_SECONDS) as answer:
                return int(answer.status), answer.read(1 << 16)
        except urllib.error.HTTPError as error:
            return error.code, b""
        except Exception as error:  # whatever the network, a proxy or a server of another kind comes up with
            raise UserError(self._silent(getattr(error, "reason", error))) from error

    def _silent(self, reason: object) -> str:
        return (
            f"{self.named}{self.url} does not answer ({reason}). On the head: ray status says whether Ray runs; its "
            "dashboard listens on 127.0.0.1 unless ray start has --dashboard-host=0.0.0.0, and not at all without "
            f"ray[default]. From outside, a tunnel: ssh -L {DASHBOARD_PORT}:127.0.0.1:{DASHBOARD_PORT} HEAD (with "
            f"Kubernetes: kubectl port-forward service/NAME-head-svc {DASHBOARD_PORT}), then "
            f"{self.named}http://127.0.0.1:{DASHBOARD_PORT}"
        )

    def _locked(self, status: int) -> str:
        found = "takes no job without its token" if self._token is None else "does not know the token of this machine"
        if status == 403 and self._token is None:
            found = "does not let us in"
        return (
            f"{self.named}{self.url} {found}: put the cluster's token (on its head: ray get-auth-token) into "
            "~/.ray/auth_token, or into RAY_AUTH_TOKEN, and see that RAY_AUTH_MODE is not disabled"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of Ray's client as UserError."""
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            name, text = type(error).__name__, str(error)
            if name == "AuthenticationError":
                raise UserError(self._locked(403 if "Forbidden" in text else 401)) from error
            if isinstance(error, ConnectionError | OSError) or name in ("ClientError", "ServerDisconnectedError"):
                raise UserError(self._silent(_last_line(text))) from error
            raise _Refused(text, f"{self.named}{self.url} refused: {_last_line(text)}") from error


class _Refused(UserError):
    """The head answered with an error; `text` is all it said."""

    def __init__(self, text: str, message: str) -> None:
        super().__init__(message)
        self.text, self.message = text, message


class _Source:
    """An asynchronous iterator, one item at a time; Ctrl-C between or within them leaves nothing running."""

    def __init__(self, runner: asyncio.Runner, items: Any) -> None:
        self._runner, self._items = runner, items

    def next(self) -> str | None:
        """None at the end."""

        async def one() -> str | None:
            return await anext(self._items, None)

        return self._runner.run(one())

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._runner.run(self._items.aclose())


def _record(job: Any) -> JobRecord:
    return JobRecord(
        name=str(job.submission_id),
        state=str(getattr(job.status, "value", job.status)),
        exit_code=job.driver_exit_code,
        message=str(job.message or ""),
        began=(job.start_time or 0) / 1000,
        metadata=dict(job.metadata or {}),
    )


def _token() -> str | None:
    """The token of this machine, from the places where Ray looks for it, in its order."""
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


@contextlib.contextmanager
def _nowhere_else() -> Iterator[None]:
    """Without the variables that would send Ray's client to another address than the one it is given."""
    hidden = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip(" .\"'")]
    return (lines or ["no reason given"])[-1][:300]
