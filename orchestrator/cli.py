"""`pift`: plan, launch, status, logs, stop, retry, compare, sample, promote, ui, doctor.

Exit codes: 0 all done, 1 a fault of pift's own, 2 bad input or plan, 3 some trials failed, 4 budget reached,
130 interrupted.
With --json stdout holds the JSON and nothing else; messages and progress go to stderr.

Everything heavy (hydra, torch, ray, mlflow) is imported by the subcommand that needs it, so `pift --help` is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from workers.text import one_line, typed, visible

if TYPE_CHECKING:
    from orchestrator.grid import Plan
    from orchestrator.ledger import Store

STORE = "store"
"""The folder of results where neither --store nor PIFT_STORE is given; conf/config.yaml says the same."""

CLUSTER = "PIFT_CLUSTER"
"""The variable with the cluster that launch, plan, status, logs and stop talk to where they are told no other; the last
three not where --store is given."""

AXES = ("prompt", "beta", "method", "seed")
"""The columns that come first in tables."""

OVERRIDES = """\
OVERRIDES are settings of conf/, in Hydra's grammar; the command line wins over the files:
  beta=0.1                     one value
  beta=0.01,0.1,1              several: an axis of the grid; range(0,5) and choice(a,b) work too
  method=pi_ft,dpok            the files of conf/method/; model= reward= likewise
  "prompt='a dog, on the moon'"  a free text instead of an id of the prompt set (quote it if it has a comma)
  sweep=quickstart             a file of conf/sweep/: axes, exclusions, settings per method
  executor=ray store=/data/me  how it runs, and where the results lie (a folder, or s3://bucket/prefix)
  budget.hours=8 budget.trials=20 budget.deadline=2026-12-01T08:00     stop there with exit code 4; launch again goes on
  limits.kl_nats=1000 limits.reward_seconds=60      what a trial puts up with; retry_failed=true runs failed cells again
  regulariser=chi_square       another divergence than KL; initial_law=gaussian learns the law of Y_0 too
  beta.schedule=contraction beta.rate=0.5     beta_t for a guaranteed rate (model=lq, mixture)
  train.gradient_steps=100 sampler.steps=20 lora.rank=8 method.lr=1e-3 eval.every=5 ...
All settings with their defaults and sources: {conf}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code and never raises."""
    debug = os.environ.get("PIFT_DEBUG", "") not in ("", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without the letters of a prompt shows numbers
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("pift: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_users(error):
            return _report(str(error))
        message = str(error).strip().splitlines()
        first = visible(message[0]) if message else "no message"
        print(f"pift: {type(error).__name__}: {first}", file=sys.stderr)
        print("pift: this is a fault of pift, not of your input; PIFT_DEBUG=1 shows where it happened", file=sys.stderr)
        return 1


def _is_users(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    spec = sys.modules.get("workers.spec")
    return spec is not None and isinstance(error, spec.SpecError)


def _report(message: str) -> int:
    """Problems on stderr, one a line; exit code 2."""
    lines = message.splitlines() or ["no message"]
    if len(lines) == 1:
        print(f"pift: {visible(lines[0])}", file=sys.stderr)
    else:
        print(f"pift: {len(lines)} problems", *(f"  - {visible(line)}" for line in lines), sep="\n", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
        if unknown:
            parser.error(
                f"unknown argument {' '.join(unknown)}; see pift {options.command or ''} --help".replace("  ", " ")
            )
    except SystemExit as stop:  # argparse has printed its message, or the help
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if rest:
        options.overrides += rest
    return options.run(options)


# ---- the subcommands


def plan(options: argparse.Namespace) -> int:
    """Print what a launch would change, cell by cell; nothing is written."""
    with _stdout_kept():
        grid = _compose(options)
    if grid.config["cluster"]:
        from orchestrator import cluster

        return cluster.plan(grid, _folders(options), _plan_words(options))
    from orchestrator.difference import difference
    from orchestrator.ledger import Store

    with _stdout_kept():
        store = Store(grid.config["store"])
        store.refresh()
        found = difference(grid, store, options.device)
    if options.json:
        print(visible(found.text()))
    else:
        print(*map(visible, found.lines(everything=options.all)), sep="\n")
        print(f"store {visible(str(store))}; executor {grid.config['executor']['name']}")
        print(f"run them: pift launch {_shell(grid.overrides, options)}".rstrip())
    return 0


def launch(options: argparse.Namespace) -> int:
    """Run every cell that is not done."""
    if options.dry_run:
        return plan(options)
    grid = _compose(options)
    if options.expect is not None:
        from orchestrator.cluster import refuse_others

        refuse_others(grid, options.expect)
    if grid.config["cluster"]:
        from orchestrator import cluster

        return cluster.launch(grid, _folders(options), detach=options.detach, json_output=options.json)
    if options.detach:
        raise UserError("--detach goes with cluster=http://head:8265, where a job goes on by itself; here: nohup")
    from orchestrator.launch import launch as run

    return run(grid, json_output=options.json)


def status(options: argparse.Namespace) -> int:
    """Print the states of a launched sweep, once or for as long as somebody works on it."""
    if (url := _cluster(options)) is not None:
        from orchestrator import cluster

        if options.watch:
            raise UserError(f"--watch looks at a store from here; of a cluster: pift logs --follow --cluster {url}")
        return cluster.status(url, options.sweep, _named(options), ["--json"] if options.json else [])
    from orchestrator import control

    store, sweep = _sweep(options)
    stored = store.plan(sweep)
    if options.watch and options.json:
        control.watch_json(store, sweep)
        return 0
    if options.watch:
        control.watch(store, sweep)
    rows = control.rows(store, stored)
    if options.json:
        launches = control.at_work(store, sweep)
        _print_json(sweep, rows, launches=list(launches.values()))
        return 0
    axes = sorted(stored["axes"], key=lambda name: AXES.index(name) if name in AXES else len(AXES))
    _show(_table(f"sweep {sweep}", axes, rows))
    print(f"{_counts_text(rows)}; store {visible(str(store))}")
    for name, record in control.at_work(store, sweep).items():
        print(f"  at work: launch {name} ({control.where(record)})")
    for row in rows:
        if row["message"]:
            kind = f" ({row['class']})" if row["class"] else ""
            print(f"  {row['key']} {row['state']}{kind}: {one_line(str(row['message']).splitlines()[0])}")
        elif row["warnings"]:
            more = f" (and {len(row['warnings']) - 1} more)" if row["warnings"][1:] else ""
            print(f"  {row['key']} {row['state']}, {row['warnings'][0]}{more}")
    return 0


def stop(options: argparse.Namespace) -> int:
    """Let the launches of a sweep stop in order."""
    if (url := _cluster(options)) is not None:
        from orchestrator import cluster

        return cluster.stop(url, options.sweep, _named(options), wait=not options.no_wait)
    from orchestrator import control

    store, sweep = _sweep(options)
    print(control.stop(store, sweep, wait=not options.no_wait))
    return 0


def logs(options: argparse.Namespace) -> int:
    """Print what a launch on a cluster printed."""
    if (url := _cluster(options)) is None:
        raise UserError(
            "a launch on this machine prints to its own terminal and keeps no log; how its trials are doing: pift "
            f"status (why one failed: its FAILED.json). Of a cluster: --cluster http://head:8265, or {CLUSTER}"
        )
    from orchestrator import cluster

    return cluster.logs(url, options.sweep, follow=options.follow)


def retry(options: argparse.Namespace) -> int:
    """Let failed trials run again with the next launch."""
    from orchestrator import control

    store, sweep = _sweep(options)
    labels, command = control.retry(store, sweep, keys=options.key or (), diverged=options.diverged)
    for label in labels:
        print(f"may run again: {visible(label)}")
    if not labels:
        print(f"no trial of {sweep} has failed" + ("" if options.diverged else " (diverged ones: --diverged)"))
    else:
        print(f"they continue from their newest checkpoints with: {command}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Look at everything a sweep needs and at every file of the store."""
    from orchestrator.doctor import OK, PROBLEM, examine

    out = sys.stdout
    with _stdout_kept():
        findings = []
        for finding in examine(
            options.store,
            uri=options.uri,
            address=options.address,
            conf=[*(options.conf_before or []), *(options.conf or [])],
            fix=options.fix,
            say=lambda text: print(text, file=sys.stderr),
        ):
            findings.append(finding)
            if not options.json:
                mark = {"ok": "  ok    ", "note": "  note  ", "problem": "PROBLEM ", "fixed": "  fixed "}[finding.level]
                print(f"{mark}{finding.topic}: {visible(finding.text)}", file=out)
                if finding.fix and finding.level != OK:
                    print(f"          -> {finding.fix}", file=out, flush=True)
    problems = sum(finding.level == PROBLEM for finding in findings)
    if options.json:
        print(json.dumps({"findings": [vars(finding) for finding in findings], "problems": problems}, indent=1))
    else:
        print("all is well" if not problems else f"{problems} problem{'s' * (problems != 1)}")
    return 3 if problems else 0


def compare(options: argparse.Namespace) -> int:
    """Write the report of a sweep and print its table."""
    store, sweep = _sweep(options)
    store.plan(sweep)
    from orchestrator.compare import compare as make

    with _stdout_kept():
        report = make(store, sweep, options.out)
    _show(report.table)
    print(f"report {visible(str(report.html))}")
    print(f"numbers {visible(str(report.csv))}")
    return 0


def sample(options: argparse.Namespace) -> int:
    """Draw pictures from a trained adapter beside the pre-trained model."""
    store = _store(options)
    from orchestrator.sample import sample as draw

    for path in draw(store, options.key, options.n, options.out, at=options.at):
        print(path)
    return 0


def promote(options: argparse.Namespace) -> int:
    """Register a trained adapter in MLflow."""
    store = _store(options)
    from orchestrator.promote import promote as register

    with _stdout_kept():
        found = register(store, options.key, name=options.name, alias=options.alias, uri=options.uri)
    if options.json:
        print(json.dumps(found.row(), indent=1))
    else:
        print(*map(visible, found.lines()), sep="\n")
    return 0


def ui(options: argparse.Namespace) -> int:
    """Open the MLflow server on the store, or say where its runs are."""
    from orchestrator.ui import serve

    store = _store(options) if options.sweep is None else _sweep(options)[0]
    return serve(store, options.port, options.sweep)


# ---- what they share


def _compose(options: argparse.Namespace) -> Plan:
    from orchestrator.grid import compose

    return compose(options.overrides, _folders(options))


def _folders(options: argparse.Namespace) -> list[Path]:
    """The conf folders of the user's own."""
    return [*(options.conf_before or []), *(options.conf or [])]


def _cluster(options: argparse.Namespace) -> str | None:
    """The cluster that is asked; None where it is a store that this machine sees."""
    if options.cluster is not None:
        return str(options.cluster)
    found = os.environ.get(CLUSTER, "").strip()
    if not found or options.store is not None:
        return None
    print(f"asking the cluster {found} ({CLUSTER}); --store DIR looks at a store from here", file=sys.stderr)
    return found


def _named(options: argparse.Namespace) -> str | None:
    """The store that --store names, None where it does not."""
    return None if options.store is None else str(options.store)


def _plan_words(options: argparse.Namespace) -> list[str]:
    """The options of `pift plan` as they would be typed again."""
    words = ["--json"] if options.json else []
    return words + (["--all"] if options.all else []) + (["--device", options.device] if options.device else [])


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Whatever a library prints goes to stderr: stdout is for the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _store(options: argparse.Namespace) -> Store:
    from orchestrator.ledger import Store

    place = _default_store() if options.store is None else options.store
    if isinstance(place, Path) and not os.path.isdir(place):
        raise UserError(f"--store {place} is not a folder; name the one that a launch wrote to (its store=...)")
    store = Store(place)
    store.refresh()
    return store


def _sweep(options: argparse.Namespace) -> tuple[Store, str]:
    """The store and the sweep that is meant: the one named, else the newest."""
    store = _store(options)
    known = store.sweeps()
    if not known:
        raise UserError(f"--store {store} holds no sweep; launch one first, as in pift launch sweep=quickstart")
    if options.sweep is None:
        return store, known[-1]
    if options.sweep not in known:
        from orchestrator.overrides import close

        raise UserError(
            f"sweep {options.sweep} is not in {store}; it holds {', '.join(known)}{close(options.sweep, known)}"
        )
    return store, options.sweep


def _print_json(sweep: str, rows: Sequence[Mapping[str, Any]], **further: Any) -> None:
    counts = dict(Counter(row["state"] for row in rows))
    content = {"sweep": sweep, "cells": rows, "counts": counts, **further}
    print(visible(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)))


def _show(table: Any) -> None:
    """Print a table or a text on stdout; not cut to a terminal's width where there is none."""
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


def _table(title: str, axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("key", *axes, "state", "step"):
        table.add_column(name, justify="right" if name == "step" else "left", no_wrap=name in ("key", "state", "step"))
    for row in rows:
        cells = [row["key"], *(_shown(row.get(name)) for name in axes), row["state"]]
        step = "" if row["step"] is None else f"{row['step']}" + (f"/{row['steps']}" if row["steps"] else "")
        table.add_row(*(Text(text) for text in (*cells, step)))
    return table


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else one_line(str(value))


def _counts_text(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} cell{'s' if len(rows) != 1 else ''}: " + ", ".join(
        f"{number} {name}" for name, number in counts.items()
    )


def _shell(overrides: Sequence[str], options: argparse.Namespace) -> str:
    """The arguments as they would be typed again."""
    folders = [*(options.conf_before or []), *(options.conf or [])]
    return typed([word for folder in folders for word in ("--conf", str(folder))] + list(overrides))


# ---- the parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("pift")
        except PackageNotFoundError:
            number = "(not installed: run from its folder)"
        print(f"pift {number}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pift",
        description="Fine-tune diffusion models by reward: a grid of prompts, betas, methods, seeds; run and compared.",
        epilog="""\
first steps:
  pift plan sweep=quickstart       what would run (writes nothing)
  pift launch sweep=quickstart     run it: minutes on two cores; launch again and only what is missing runs
  pift compare                     curves, pictures and a table of the newest sweep
  pift ui                          the same runs in MLflow
Each subcommand explains itself: pift launch --help
exit codes: 0 all done, 1 a fault of pift, 2 bad input, 3 some trials failed, 4 budget reached, 130 interrupted
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("--conf", dest="conf_before", metavar="DIR", type=Path, action="append", help=_CONF)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="subcommands")
    _add_plan(commands)
    _add_launch(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_stop(commands)
    _add_retry(commands)
    _add_compare(commands)
    _add_sample(commands)
    _add_promote(commands)
    _add_ui(commands)
    _add_doctor(commands)
    return parser


_CONF = "a conf folder of your own, searched before the shipped one: a method, reward or prompt set is one YAML there"


def _add(commands: Any, name: str, run: Any, summary: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A subcommand whose help has a text and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _conf_text() -> str:
    from orchestrator.conf_tree import conf_dir

    try:
        return str(conf_dir())
    except UserError:
        return "conf/"


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{parser.epilog}\n{OVERRIDES.format(conf=_conf_text())}"
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDES", help="settings, key=value or key=a,b (see below)")
    parser.add_argument("--conf", metavar="DIR", type=Path, action="append", help=_CONF)


def _add_store(parser: argparse.ArgumentParser, sweep: bool) -> None:
    if sweep:
        parser.add_argument(
            "sweep", nargs="?", metavar="SWEEP", help="a sweep of the store; the newest where none is named"
        )
    parser.add_argument(
        "--store", metavar="DIR", type=_folder_or_url, default=_default_store(),
        help="the folder of results, or its URL, as in s3://bucket/pift (default: PIFT_STORE, else store)",
    )  # fmt: skip


def _default_store() -> str | Path:
    return _folder_or_url(os.environ.get("PIFT_STORE", STORE))


def _folder_or_url(text: str) -> str | Path:
    from workers.remote import is_url

    return text if is_url(text) else Path(text)


def _add_plan(commands: Any) -> None:
    parser = _add(
        commands, "plan", plan, "what a launch would run, cell by cell, and for how long; writes nothing",
        "Resolve the grid, check every cell, and print what a launch would do about each:\n"
        "  +  new: it runs                      >  running or scheduled by another launch\n"
        "  ~  resumable or stale: it continues  =  done\n"
        "  !  failed or diverged: left alone    ↻  failed: runs again (retry_failed=true)\n"
        "  ·  waits: the budget is too small    -  orphan: no longer in the grid; its trial stays in the store\n"
        "Hours are those of the trials that have finished in this store. For trials that never ran, hours and memory\n"
        "are estimated from the networks' architecture, for the GPU at hand or the one that --device names.",
        "  pift plan sweep=quickstart\n  pift plan method=pi_ft,dpok beta=0.01,0.1,1\n"
        "  pift plan sweep=four_prompts seed=range(0,5) budget.hours=8      what fits into eight trial-hours\n"
        "  pift plan --conf my_conf method=mine prompts=my_set prompt=first\n"
        "  pift plan sweep=paper --device A100                              GPU-hours and memory, nothing is loaded\n"
        "  pift plan sweep=quickstart --json | jq .counts\n",
    )  # fmt: skip
    _add_overrides(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="a GPU (A100, A100-40GB, H100, RTX 4090, ...; a wrong name lists all) or cpu: whose hours are printed",
    )
    parser.add_argument("--all", action="store_true", help="every cell, where more than 60 would be counted by arm")
    parser.add_argument(
        "--json",
        action="store_true",
        help='{"sweep", "cells": [...], "counts", "orphans", "estimate", "budget", "absent_weights"} and nothing else',
    )


def _add_launch(commands: Any) -> None:
    parser = _add(
        commands, "launch", launch, "run every cell that is not done, then compare",
        "Run the grid. A trial is named by its content: what is done stays done, what was cut off continues, and only\n"
        "cells you changed or added run. Ctrl-C stops in order: trials write a checkpoint, the same command goes on;\n"
        "so it does after a kill, a full disk or a lost machine. Cells that another launch works on are waited for.",
        "  pift launch sweep=quickstart                 minutes on two cores\n"
        "  pift launch sweep=four_prompts seed=0,1      the sweep's cells, with two seeds\n"
        "  pift launch beta=0.1 executor=inline         one trial in this process, for a debugger\n"
        "  pift launch cluster=http://head:8265 sweep=quickstart store=/shared/pift tracking.uri=http://host:5000\n"
        "                                               on a Ray cluster, as a job (docs/cluster.md)\n",
    )  # fmt: skip
    _add_overrides(parser)
    parser.set_defaults(all=False, device=None)
    parser.add_argument("--detach", action="store_true", help="with cluster=: submit, and do not follow what it prints")
    parser.add_argument(
        "--expect", metavar="DIGEST", help="refuse other trials than these; what a submission to a cluster adds"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same as pift plan")
    parser.add_argument("--json", action="store_true", help="the end states as JSON on stdout and nothing else")


def _add_status(commands: Any) -> None:
    parser = _add(
        commands, "status", status, "how the trials of a launched sweep are doing",
        "The state and step of every cell of a sweep in the store, with the reason where one failed:\n"
        "  new, scheduled (in the queue of a launch), running, stale (its process died; a launch continues it),\n"
        "  resumable (stopped in order), done, failed (FAILED.json says why), diverged.",
        "  pift status\n  pift status quickstart --watch        until nobody works on it any more\n"
        "  pift status quickstart --json | jq .counts\n"
        "  pift status --watch --json | jq -c .counts      one line at every change\n"
        "  pift status --cluster http://head:8265          of a sweep launched there with cluster=\n",
    )  # fmt: skip
    _add_store(parser, sweep=True)
    _add_cluster(parser)
    parser.add_argument("--watch", action="store_true", help="go on looking while a launch or a trial is at work")
    parser.add_argument("--json", action="store_true", help="as for plan; with --watch an object a line")


def _add_logs(commands: Any) -> None:
    parser = _add(
        commands, "logs", logs, "what a launch on a cluster prints, from any machine",
        "What the newest job of a sweep that was launched with cluster= has printed, to the moment or to its end.",
        "  pift logs --cluster http://head:8265\n  pift logs quickstart --follow --cluster http://head:8265\n"
        f"  export {CLUSTER}=http://head:8265; pift logs --follow\n",
    )  # fmt: skip
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="the newest where none is named")
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended; its exit code is ours")
    _add_cluster(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(store=None)  # whether one was named decides where PIFT_CLUSTER counts
    parser.add_argument(
        "--cluster", metavar="URL",
        help=f"ask a Ray cluster, as in http://head:8265 (default: {CLUSTER}, unless --store is given)",
    )  # fmt: skip


def _add_stop(commands: Any) -> None:
    parser = _add(
        commands, "stop", stop, "let a sweep's launches stop in order, from any machine",
        "Every trial at work writes a checkpoint and stops; the launches end with exit code 130, as after Ctrl-C in\n"
        "their own terminals. The same launch, given again, goes on.",
        "  pift stop\n  pift stop quickstart --store /shared/store\n  pift stop quickstart --cluster http://head:8265\n",
    )  # fmt: skip
    _add_store(parser, sweep=True)
    _add_cluster(parser)
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait until they have stopped")


def _add_retry(commands: Any) -> None:
    parser = _add(
        commands, "retry", retry, "let failed trials run again with the next launch",
        "A launch leaves failed trials alone, so that what is broken is not paid for twice. This lets them run again:\n"
        "their FAILED.json moves to failures/, and the next launch continues them from their newest checkpoints.",
        "  pift retry\n  pift retry quickstart --key 3f0c91\n  pift retry quickstart --diverged\n",
    )  # fmt: skip
    _add_store(parser, sweep=True)
    parser.add_argument("--key", metavar="KEY", action="append", help="this trial only (first digits do); repeatable")
    parser.add_argument("--diverged", action="store_true", help="diverged ones too, which a same machine repeats")


def _add_doctor(commands: Any) -> None:
    parser = _add(
        commands, "doctor", doctor, "is everything there, and is everything in the store what was written?",
        "Versions, GPU, weights in the cache (with the command that fetches them), Ray, the store (room, clock, every\n"
        "file against its checksum, launches and trials that died, orphans), MLflow (does it answer, its Host check,\n"
        "runs that say RUNNING and are not, two runs of one trial, points that are missing). Exit code 3 if a problem\n"
        "is left.",
        "  pift doctor\n  pift doctor --fix                      sets right what can be: see each line\n"
        "  pift doctor --uri http://mlflow:5000 --address head:6379\n",
    )  # fmt: skip
    _add_store(parser, sweep=False)
    parser.add_argument("--fix", action="store_true", help="set right what can be set right; nothing sound is removed")
    parser.add_argument("--uri", metavar="URI", help="an MLflow server to look at besides those the store knows")
    parser.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster to try (default: RAY_ADDRESS)")
    parser.add_argument("--conf", metavar="DIR", type=Path, action="append", help=_CONF)
    parser.add_argument("--json", action="store_true", help='{"findings", "problems"} on stdout and nothing else')


def _add_compare(commands: Any) -> None:
    parser = _add(
        commands, "compare", compare, "reward and KL curves, pictures and a table of a sweep, as one HTML file",
        "Compare the finished cells of a sweep: one self-contained HTML file and a CSV, and the table here.",
        "  pift compare\n  pift compare four_prompts --out report\n",
    )  # fmt: skip
    _add_store(parser, sweep=True)
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: the sweep's folder)")


def _add_sample(commands: Any) -> None:
    parser = _add(
        commands, "sample", sample, "pictures from a trained adapter beside the pre-trained model",
        "Draw pictures from the adapter of a trial and from the pre-trained model, on the same noise.",
        "  pift sample 3f0c91 --n 8 --out pictures      the first digits of a key do (pift status lists the keys)\n",
    )  # fmt: skip
    parser.add_argument("key", metavar="KEY", help="the trial's key, or its first digits")
    parser.add_argument(
        "--at", metavar="STEP", default="end", help="end (default), best (largest J kept), or a kept checkpoint's step"
    )
    parser.add_argument("--n", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("samples"), help="folder (default: samples)")
    _add_store(parser, sweep=False)


def _add_promote(commands: Any) -> None:
    parser = _add(
        commands, "promote", promote, "register a trained adapter in MLflow, for others to load",
        "Make the adapter of a finished trial a version of a registered model in MLflow. The version's tags and page\n"
        "say what it was trained for, its reward, path KL and J, and how to load it: in plain diffusers, or with\n"
        "mlflow.diffusers. The same trial under the same name stays one version; an --alias moves to it.\n"
        "Where MLflow has not seen the trial (tracking=none), its sweep is sent first.",
        "  pift promote 3f0c91                             as a version of pift-<model>-<prompt id>\n"
        "  pift promote 3f0c91 --alias champion            others load models:/pift-toyland-counting@champion\n"
        "  pift promote 3f0c91 --name wolves --uri http://mlflow:5000\n"
        "  pift promote 3f0c91 --json | jq -r .model_uri\n",
    )  # fmt: skip
    parser.add_argument("key", metavar="KEY", help="the trial's key, or its first digits (pift status lists the keys)")
    parser.add_argument("--name", help="the registered model (default: pift-<model>-<prompt id>)")
    parser.add_argument("--alias", help="a name for this version, taken from the version that had it (default: none)")
    parser.add_argument(
        "--uri", metavar="URI", help="the MLflow to register in (default: where the trial's run is, else the store's)"
    )
    _add_store(parser, sweep=False)
    parser.add_argument(
        "--json", action="store_true", help='{"name", "version", "created", "model_uri", "tags", ...} and nothing else'
    )


def _add_ui(commands: Any) -> None:
    parser = _add(
        commands, "ui", ui, "look at the store in MLflow's web page",
        "Start the MLflow server on the store's own database, on this machine only, until Ctrl-C, and print where the\n"
        "sweep's charts are. Of a sweep that was recorded in a server: print where they are there.",
        "  pift ui\n  pift ui quickstart\n  pift ui --port 5001 --store /data/me\n",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=5000, help="default: 5000")
    _add_store(parser, sweep=True)


if __name__ == "__main__":
    sys.exit(main())
