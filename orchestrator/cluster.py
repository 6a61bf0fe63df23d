"""A sweep on a Ray cluster, from a machine that is no part of it: `pift launch cluster=http://head:8265 ...`.

The grid is resolved and checked here first, so bad input costs nothing. Then the same command goes to the cluster's
head as a Ray Job: there it is an ordinary `pift launch executor=ray executor.address=auto`, which resolves the grid
again and refuses to run other trials than those that were submitted (`--expect`). Its store is one that all nodes see.

A job is named by its content, pift-<sweep>-<digest of trials and store>-<number>: Ray Jobs takes a name once, so of
two submissions of one sweep at the same time one is refused. A number is used when the jobs before it have ended.

plan, status, stop and logs ask the head. What they want to know lies in the cluster's store, which this machine need
not see: `pift status` runs there, as a small job (`ask`), and what it prints is printed here.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import executors, tracking
from orchestrator.errors import UserError
from orchestrator.executors.ray_jobs import Head, JobRecord, check_url
from orchestrator.overrides import parse, quoted
from orchestrator.provenance import UNKNOWN, provenance
from workers.remote import is_url

if TYPE_CHECKING:
    from orchestrator.grid import Plan

FAILED, INTERRUPTED = 3, 130
STOP_SECONDS = 300
"""How long Ray waits for a stopped launch, whose trials finish a step and write a checkpoint, before it kills it (its
default is 3 s, which is too little)."""
LONGEST_COMMAND = 120_000
"""Bytes; Linux takes 128 KiB for one argument of a shell."""
TRIES = 5
"""Other submissions that may take the next number before this one gives up."""
NOT_FOUND = 127
SWEEP, STORE, VERSION, SENDER = "pift.sweep", "pift.store", "pift.version", "pift.sender"
"""What a launch's job carries as metadata."""
ANSWER = "---- the answer of pift ----"


# ---- launch


def launch(plan: Plan, conf: Sequence[Path] = (), *, detach: bool = False, json_output: bool = False) -> int:
    """Submit the launch of a plan and follow it to its end; its exit code. Raises UserError before anything is sent
    where it cannot work there, and where the sweep is at work already."""
    url = check(plan, conf)
    head = Head(url)
    words = launch_words(plan, json_output)
    command = _answered(words) if json_output else f"exec {shlex.join(words)}"
    job = _submit(head, plan, command)
    _say(f"submitted {job} to {url}: {len(plan.cells)} cells, store {plan.config['store']}")
    _say(f"in a browser: {head.page(job)}")
    _say(_commands(url, plan.sweep))
    if detach:
        if json_output:
            print(json.dumps({"job": job, "sweep": plan.sweep, "store": plan.config["store"], "page": head.page(job)}))
        return 0
    _say("what it prints follows; Ctrl-C ends this looking on, not the job")
    return _followed(head, job, plan.sweep, json_output)


def plan(grid: Plan, conf: Sequence[Path] = (), words: Sequence[str] = ()) -> int:
    """`pift plan` on the cluster, with further `words`: what is done is known to its store."""
    url = check(grid, conf)
    again = shlex.join(["pift", "launch", *grid.overrides])

    def told(answer: str) -> str:
        return re.sub(r"(?m)^run them: .*$", lambda _: f"run them: {again}", answer)

    return ask(Head(url), ["pift", "plan", *_overrides(grid), *words], told)


def check(plan: Plan, conf: Sequence[Path] = ()) -> str:
    """The cluster's address. Raises UserError for what cannot work on a cluster; contacts nobody."""
    config, asked = plan.config, parse(plan.overrides)
    url = check_url(config["cluster"])
    problems = []
    if conf:
        problems.append(
            f"--conf {conf[0]} lies on this machine only; install it on the cluster and launch there, or put the files "
            "into conf/ of the image"
        )
    executor = asked.get("executor")
    if executor is not None and executor.values != ("ray",):
        problems.append(f"{executor.text} does not go with cluster=, whose trials run with executor=ray; leave it out")
    problems += [
        f"{asked[key].text} does not go with cluster=: the job finds its own cluster; leave it out"
        for key in ("executor.address", "executor.cpus")
        if key in asked
    ]
    store = str(config["store"])
    if not is_url(store) and not Path(store).is_absolute():
        problems.append(
            f"store={store} is a folder of this machine; on a cluster name one that all its nodes see, as in "
            "store=/shared/pift, or store=s3://bucket/pift"
        )
    if problems:
        raise UserError(*problems)
    executors.check(config | {"executor": {"name": "ray"}})
    if (found := tracking.settings(config)) is not None:
        tracking.check_uri(found[0])
        if re.match(r"https?://(localhost|127\.|\[::1\])", found[0] or ""):
            _say(f"note: tracking.uri={found[0]} means the cluster's own machines there, each its own; name the server")
    return url


def launch_words(plan: Plan, json_output: bool = False) -> list[str]:
    """The command that runs on the head."""
    words = ["pift", "launch", *_overrides(plan), "--expect", digest_of(plan)] + (["--json"] if json_output else [])
    if (size := len(shlex.join(words).encode())) > LONGEST_COMMAND:
        raise UserError(f"the overrides have {size} bytes, at most {LONGEST_COMMAND}; put the axes into a sweep file")
    return words


def _overrides(plan: Plan) -> list[str]:
    """The overrides for the head: what the environment of this machine decided is written out, and `cluster=null` keeps
    a sweep file or an environment from sending them on."""
    asked = parse(plan.overrides)
    kept = [override.text for key, override in asked.items() if key not in ("cluster", "executor")]
    own = [] if "store" in asked else [f"store={quoted(str(plan.config['store']))}"]
    found = tracking.settings(plan.config)
    if found is not None and found[0] is not None and "tracking.uri" not in asked:
        own.append(f"tracking.uri={quoted(found[0])}")
    return [*kept, *own, "cluster=null", "executor=ray", "executor.address=auto"]


def digest_of(plan: Plan) -> str:
    """What the trials of a plan are, whatever their order."""
    return sha256("\n".join(sorted(cell.key for cell in plan.cells)).encode()).hexdigest()[:16]


def refuse_others(plan: Plan, expected: str) -> None:
    """Raises UserError where a grid resolves to other trials than it did where it was submitted."""
    if digest_of(plan) != expected:
        raise UserError(
            f"--expect {expected}: the same overrides are other trials on this machine ({_version()} on "
            f"{socket.gethostname()}), {digest_of(plan)}: code, conf/ or weights differ from those of the machine that "
            "submitted them; install the same pift on both"
        )


def job_name(plan: Plan) -> str:
    """The name of the plan's jobs, without its number."""
    content = json.dumps([plan.sweep, str(plan.config["store"]), digest_of(plan)])
    return f"pift-{re.sub(r'[^A-Za-z0-9_.-]', '-', plan.sweep)[:40]}-{sha256(content.encode()).hexdigest()[:10]}"


def _submit(head: Head, plan: Plan, command: str) -> str:
    """Submit under the first number that is free, unless a job of that name is at work."""
    name = job_name(plan)
    metadata = {
        SWEEP: plan.sweep,
        STORE: str(plan.config["store"]),
        VERSION: _version(),
        SENDER: f"{_user()}@{socket.gethostname()}",
    }
    for _ in range(TRIES):
        numbered = {number: job for job in head.jobs() if (number := _number(job.name, name)) is not None}
        for job in numbered.values():
            if not job.ended:
                raise UserError(_at_work(head, job, plan))
        wanted = f"{name}-{max(numbered, default=0) + 1}"
        if head.submit(wanted, command, metadata, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}):
            return wanted
    raise UserError(f"others submit {plan.sweep} to {head.url} at the same time and end at once; look at {head.url}")


def _number(job: str, name: str) -> int | None:
    found = re.fullmatch(re.escape(name) + r"-(\d+)", job)
    return int(found[1]) if found else None


def _at_work(head: Head, job: JobRecord, plan: Plan) -> str:
    return (
        f"sweep {plan.sweep} is at work on {head.url} already, with the same trials and store: {head.page(job.name)} "
        f"({_described(job)}); {_commands(head.url, plan.sweep)}"
    )


def _followed(head: Head, job: str, sweep: str, json_output: bool) -> int:
    """Print what a job prints until it ends; its exit code."""
    try:
        stream = sys.stderr if json_output else sys.stdout
        for text in head.follow(job):
            print(text.partition(f"\n{ANSWER}\n")[0] if json_output else text, end="", file=stream, flush=True)
        record = head.job(job)
    except KeyboardInterrupt:
        _say(f"\n{job} goes on; {_commands(head.url, sweep)}")
        return INTERRUPTED
    if json_output and (answer := _answer(head.log(job))) is not None:
        print(answer, end="")
    return _exit_code(record)


def _exit_code(job: JobRecord) -> int:
    """The launch's own, where it got that far."""
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        _say(f"{job.name} was stopped; the same launch, given again, goes on")
        return INTERRUPTED
    if job.exit_code == NOT_FOUND:
        raise UserError(
            "the head has no command `pift`: install pift in the environment that Ray runs in on every node, and start "
            "Ray with its bin/ folder on PATH"
        )
    if job.exit_code is None:
        _say(f"{job.name} ended without an exit code: {job.message.strip()[:500] or 'no reason given'}")
        return FAILED
    return job.exit_code


# ---- status, stop, logs


def status(url: str, sweep: str | None, store: str | None, words: Sequence[str]) -> int:
    """`pift status` on the cluster, with further `words`."""
    head, (name, place, job) = _found(url, sweep, store)
    if job is not None:
        _say(_described(job))
    return ask(head, ["pift", "status", *([name] if name else []), "--store", place, *words])


def stop(url: str, sweep: str | None, store: str | None, *, wait: bool = True) -> int:
    """Stop the jobs of a sweep in order; where the head knows none, ask the store's launches."""
    head, (name, place, job) = _found(url, sweep, store)
    if job is None:
        words = ["pift", "stop", *([name] if name else []), "--store", place]
        return ask(head, words if wait else [*words, "--no-wait"])
    running = [other for other in _launches(head) if not other.ended and _is_of(other, name, place)]
    if not running:
        print(f"no job of {name} is at work; nothing to stop ({_described(job)})")
        return 0
    for one in running:
        head.stop(one.name)
    if not wait:
        print("\n".join(f"asked to stop: {one.name}" for one in running))
        return 0
    for one in running:
        _say(f"stopping {one.name}: the trials write a checkpoint; Ctrl-C only ends this waiting")
        while not head.job(one.name).ended:
            time.sleep(1.0)
        print(f"stopped: {one.name}; the same launch, given again, goes on")
    return 0


def logs(url: str, sweep: str | None, *, follow: bool = False) -> int:
    """What the newest job of a sweep printed."""
    head, (name, _, job) = _found(url, sweep, None)
    assert job is not None and name is not None
    _say(_described(job))
    if not follow:
        print(head.log(job.name), end="")
        return 0
    return _followed(head, job.name, name, json_output=False)


def ask(head: Head, words: Sequence[str], told: Callable[[str], str] = str) -> int:
    """Run a short command on the head and print what it prints, stdout (as `told` puts it) and stderr apart; its exit
    code."""
    job, command = f"pift-ask-{secrets.token_hex(6)}", _answered(words)
    head.submit(job, command)
    try:
        log = "".join(head.follow(job))
        record = head.job(job)
    except KeyboardInterrupt:
        head.stop(job)
        raise
    rays, begun, said = log.partition(f"{command}\n")  # what Ray says before
    said, mark, answer = (said if begun else rays).partition(f"\n{ANSWER}\n")
    if said.strip():
        _say(said.strip("\n"))
    if mark:
        print(told(answer), end="")
    with contextlib.suppress(UserError):
        head.forget(job)
    return _exit_code(record)


def _answered(words: Sequence[str]) -> str:
    """A shell command that keeps stdout back and prints it last, behind a line that is ANSWER: a job has one log."""
    return (
        f'answer=$(mktemp) && {{ {shlex.join(words)} >"$answer"; code=$?; printf "\\n%s\\n" "{ANSWER}"; '
        'cat "$answer"; rm -f "$answer"; exit $code; }'
    )


def _answer(log: str) -> str | None:
    _, mark, answer = log.partition(f"\n{ANSWER}\n")
    return answer if mark else None


# ---- jobs that are launches


def _found(url: str, sweep: str | None, store: str | None) -> tuple[Head, tuple[str | None, str, JobRecord | None]]:
    """The head, and of the launch that is meant: sweep, store, newest job (None: the store is named, and no job)."""
    head = Head(url, "--cluster ")
    launches = _launches(head)
    fitting = [job for job in launches if _is_of(job, sweep, store)]
    if fitting:
        job = fitting[-1]
        return head, (job.metadata[SWEEP], store or job.metadata[STORE], job)
    if store is not None:
        return head, (sweep, store, None)
    known = ", ".join(dict.fromkeys(job.metadata[SWEEP] for job in launches))
    raise UserError(
        f"{head.url} remembers no launch" + (f" of {sweep}; it knows {known}" if known and sweep else "")
        + ": a head that was restarted forgets its jobs, the store does not: --store /shared/pift (or its URL) names it"
    )  # fmt: skip


def _launches(head: Head) -> list[JobRecord]:
    return [job for job in head.jobs() if SWEEP in job.metadata and STORE in job.metadata]


def _is_of(job: JobRecord, sweep: str | None, store: str | None) -> bool:
    return sweep in (None, job.metadata[SWEEP]) and store in (None, job.metadata[STORE])


def _described(job: JobRecord) -> str:
    """ "job pift-tiny-0a1b2c3d4e-1: RUNNING since 2026-11-25 10:53, sent by me@laptop"."""
    since = f" since {datetime.fromtimestamp(job.began):%Y-%m-%d %H:%M}" if job.began and not job.ended else ""
    return f"job {job.name}: {job.state}{since}, sent by {job.metadata.get(SENDER, 'somebody')}"


def _commands(url: str, sweep: str) -> str:
    return f"from here: pift status|logs|stop {sweep} --cluster {url}"


def _version() -> str:
    """ "pift 0.1.0, commit 3f0c91a"."""
    try:
        number = importlib.metadata.version("pift")
    except importlib.metadata.PackageNotFoundError:
        number = "(not installed)"
    commit = provenance()["git.commit"]
    return f"pift {number}" + ("" if commit == UNKNOWN else f", commit {commit[:7]}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
