"""Hosts on one machine: network namespaces joined by a bridge, each with its own processes, host name, /dev/shm and
Ray session; the file system is shared, as by NFS. A host can be cut off from the others and joined again.

    with hosts(2) as (first, second):
        first.start(["ray", "start", "--head", f"--node-ip-address={first.ip}", "--block"], log=path)
        second.cut()

Needs root, `ip`, `unshare` and `nsenter` (Linux); `missing()` says what is not there. The network is reachable from
nowhere else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK = "10.99.77"
BOOT = 'mount -t tmpfs none /dev/shm && mount -t tmpfs none "$1" && hostname "$0" && echo up && exec sleep infinity'


def missing() -> str | None:
    """Why no hosts can be made here, None where they can."""
    absent = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if absent or os.geteuid() != 0:
        return f"network namespaces need root{' and ' if absent else ''}{' and '.join(absent)}"
    probe = f"pift-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return made.stderr.strip() or None if made.returncode else None


@dataclass
class Host:
    """One of them: its name, its address, and what runs there."""

    name: str
    ip: str
    namespace: str
    hub: str
    port: str
    environment: dict[str, str] = field(default_factory=dict)
    """What every command that is started there gets besides the test's own."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    first: int = 0
    """The process whose end ends every other one there, by its number here."""

    def boot(self) -> None:
        sessions = Path(tempfile.gettempdir(), "ray")
        sessions.mkdir(exist_ok=True)
        apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-c", BOOT]
        command = ["ip", "netns", "exec", self.namespace, *apart, self.name, str(sessions)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        self.first = psutil.Process(process.pid).children()[0].pid

    def start(self, command: Sequence[str], *, log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Run a command there, with both its streams in `log`."""
        enter = ["nsenter", f"--target={self.first}", "--net", "--mount", "--pid", "--uts", f"--wd={cwd or Path.cwd()}"]
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [*enter, "--", *command], stdout=stream, stderr=stream, env=os.environ | self.environment
            )
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Nothing reaches it and it reaches nothing; its processes hang, as where their files are behind the network
        too."""
        _ip("-n", self.hub, "link", "set", self.port, "down")
        self._signal(signal.SIGSTOP)

    def join(self) -> None:
        """The opposite of cut: its processes go on where they hung."""
        _ip("-n", self.hub, "link", "set", self.port, "up")
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for root in self.started[1:]:
            with suppress(psutil.Error):
                for process in psutil.Process(root.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        process.send_signal(number)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts; what still runs there when the block ends is killed."""
    mark = os.getpid()
    hub = f"pift-hub-{mark}"
    made: list[Host] = []
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            host = Host(f"node-{number}", f"{NETWORK}.{number}", f"pift-{number}-{mark}", hub, f"port{number}")
            _ip("netns", "add", host.namespace)
            made.append(host)
            _ip("-n", hub, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", hub, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.ip}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            # leads nowhere; a host without one does not find out its own address
            _ip("-n", host.namespace, "route", "add", "default", "dev", "eth0")
            host.boot()
        yield made
    finally:
        for host in made:
            for process in host.started:  # the first one takes the others along
                process.kill()
            for process in host.started:
                process.wait()
        for host in made:
            _ip("netns", "del", host.namespace)
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", hub)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
