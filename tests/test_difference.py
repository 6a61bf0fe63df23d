"""What a launch would change: symbols, orphans, sharers, hours and budget, for people and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_trial

from orchestrator import ledger
from orchestrator.difference import Difference, _total, action, difference
from orchestrator.errors import UserError
from orchestrator.grid import Plan, compose
from orchestrator.ledger import Launch, Store
from workers.store import write_record

SIX = ["beta=0.1,1", "method=pi_ft,dpok,dpok_official", "train.gradient_steps=4", "eval.every=2", "eval.pictures=2"]
MARKS = "+~!>=·↻-"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def planned(store: Store, *overrides: str) -> Plan:
    return compose([*SIX, *overrides, f"store={store.root}"])


def filled(store: Store, plan: Plan, states: Sequence[str]) -> None:
    """Give the cells of a plan these states, in order; the rest stays new."""
    for cell, state in zip(plan.cells, states, strict=False):
        if state != "new":
            fake_trial(store.trial(cell.key).root, cell.key, cell.spec.to_dict(), state, size=4)


def launched(store: Store, plan: Plan) -> None:
    """Write the plan.json that a launch would."""
    write_record(store.sweep(plan.sweep).plan, plan.row())


def shown(found: Difference, **options: Any) -> str:
    return "\n".join(found.lines(**options))


def marks(found: Difference) -> str:
    """The first letters of the lines that have one of the symbols there."""
    return "".join(line[0] for line in found.lines() if line[:1] in MARKS and line[:1])


STATES = ("done", "failed", "diverged", "resumable", "running", "new")


@pytest.mark.parametrize(
    ("state", "expected", "again"),
    [
        ("new", "run", "run"), ("resumable", "continue", "continue"), ("stale", "continue", "continue"),
        ("done", "done", "done"), ("failed", "leave", "retry"), ("diverged", "leave", "leave"),
        ("running", "running", "running"), ("scheduled", "running", "running"),
    ],
)  # fmt: skip
def test_what_a_launch_does_about_each_state(state: str, expected: str, again: str) -> None:
    """Kills: what another launch has queued is run twice, a failed cell run unasked, a done one run again."""
    assert (action(state, retry=False), action(state, retry=True)) == (expected, again)


def test_every_state_has_its_symbol(store: Store) -> None:
    """Kills: a state that is not looked up, sums that count something else than the lines."""
    plan = planned(store)
    filled(store, plan, STATES)
    found = difference(plan, store)
    assert marks(found) == "=!!~>+"
    text = shown(found)
    assert "Plan: 1 to run, 1 to continue, 1 done, 1 left failed, 1 left diverged, 1 at work elsewhere\n" in text + "\n"
    assert "(bug) RuntimeError: mat1 and mat2 shapes" in text and "(diverged) loss is not finite" in text
    (line,) = (line for line in text.splitlines() if line.startswith("~"))
    assert line.split()[-2:] == ["resumable", "2/4"]


def test_failed_cells_run_again_when_asked(store: Store) -> None:
    """From where they failed. Kills: retry_failed is not read; diverged ones run again too."""
    plan = planned(store, "method=pi_ft", "beta=1,2,3,4", "retry_failed=true")
    filled(store, plan, ("done", "failed", "diverged"))
    found = difference(plan, store)
    assert marks(found) == "=↻!+" and "Plan: 1 to run, 1 to run again, 1 done" in shown(found)
    assert [row["estimated_seconds"] for row in found.rows] == [0.0, 4.0, 0.0, 8.0]


def test_what_another_launch_has_queued_is_left_to_it(store: Store) -> None:
    """Kills: states asked without the queues."""
    plan = planned(store)
    store.root.mkdir()
    launch = Launch(store, "other")
    launch.begin()
    try:
        launch.queue([plan.cells[2].key])
        found = difference(plan, store)
    finally:
        launch.end("done")
    assert marks(found) == "++>+++" and found.rows[2]["state"] == "scheduled"


def test_cells_of_the_last_plan_that_are_gone_are_orphans(store: Store) -> None:
    """Kills: orphans in the counts, cells of both plans among them, a damaged plan.json that stops everything."""
    launched(store, planned(store))
    now = planned(store, "beta=1,2")
    filled(store, planned(store), ("done", "resumable", "new"))
    found = difference(now, store)
    assert marks(found) == "++++++---"
    assert [(row["beta"], row["state"]) for row in found.orphans] == [(0.1, "done"), (0.1, "resumable"), (0.1, "new")]
    assert "Plan: 6 to run; 3 orphans kept" in shown(found)
    store.sweep(now.sweep).plan.write_text("{")
    assert difference(now, store).orphans == []


def test_done_cells_name_the_other_sweeps_that_have_them(store: Store) -> None:
    """Kills: this sweep named too, cells that are not done."""
    plan = planned(store)
    launched(store, plan)
    launched(store, planned(store, "sweep.name=twin", "beta=0.1"))
    filled(store, plan, ("done", "new", "new", "done"))
    found = difference(plan, store)
    assert [row["shared_with"] for row in found.rows] == [["twin"], [], [], [], [], []]
    assert [line for line in found.lines() if "also in twin" in line and line.startswith("=")]
    assert "Plan: 4 to run, 2 done (1 in other sweeps too)" in shown(found)


def test_hours_come_from_what_was_measured(store: Store) -> None:
    """Kills: whole trials where half is left, done cells in the sum, an unknown speed as 0, hours of one slot."""
    plan = planned(store, "executor=ray", "executor.cpus=2", "train.gradient_steps=3600")
    filled(store, plan, ("done", "new", "new", "resumable"))  # fakes take 2 s a step; the fourth has half left
    found = difference(plan, store)
    assert [row["estimated_seconds"] for row in found.rows] == [0.0, None, None, 3600.0, None, None]
    assert found.estimate.unknown == 4
    expected = "at least 1 trial-hours, 1 h on 2 slots; measured: pi_ft 2 s/step on cpu (1 trial); dpok, dpok_official "
    assert expected + "not measured yet on cpu" in shown(found)
    assert "hours not known: pi_ft not measured yet on cuda" in shown(
        difference(planned(store, "resources=gpu", "method=pi_ft"), store)
    )
    other = difference(planned(store, "method=pi_ft", "sampler.steps=9"), store)
    assert "pi_ft 2 s/step on cpu (1 trial, some with other settings)" in shown(other)


@pytest.mark.parametrize(
    ("hours", "more", "expected"),
    [
        (0.0, False, "about 0"), (0.004, False, "under 0.01"), (0.01, False, "about 0.01"), (1.26, False, "about 1.3"),
        (1234.5, False, "about 1,234"), (0.0, True, "at least 0"), (0.004, True, "at least 0.004"),
        (12.6, True, "at least 13"),
    ],
)  # fmt: skip
def test_sums_of_hours_as_text(hours: float, more: bool, expected: str) -> None:
    """Kills: "at least under 0.01", 0.00, an upper bound where cells are missing."""
    assert _total(hours, more) == expected


def test_hours_too_few_to_count(store: Store) -> None:
    plan = planned(store, "method=pi_ft", "executor=ray", "executor.cpus=2")
    filled(store, plan, ("done",))
    assert "under 0.01 trial-hours, under 0.01 h on 2 slots; measured: pi_ft 2 s/step" in shown(difference(plan, store))
    assert [row["source"] for row in difference(plan, store).rows] == [None, "measured"]


def test_cells_beyond_the_budget_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a budget that is not used, orphans' hours forgotten, waiting cells in the hours."""
    old = planned(store, "beta=3", "method=pi_ft")
    launched(store, old)
    plan = planned(store, "method=pi_ft,dpok", "budget.trials=4", "budget.hours=5")
    filled(store, old, ("done",))
    filled(store, plan, ("done", "resumable"))
    begun = {old.cells[0].key, plan.cells[0].key}
    monkeypatch.setattr(
        ledger, "spent", lambda folder, sweep: (1800.0, True) if folder.root.name in begun else (0, False)
    )
    found = difference(planned(store, "method=pi_ft,dpok", "budget.trials=3", "budget.hours=5"), store)
    assert marks(found) == "=~··-"
    assert [row["action"] for row in found.rows] == ["done", "continue", "wait", "wait"]
    assert sum(share.cells for share in found.estimate.methods.values()) == 1
    text = shown(found)
    assert "Plan: 0 to run, 1 to continue, 1 done, 2 waiting for budget; 1 orphan kept" in text
    assert (
        "budget: 1 of 5 trial-hours used, 4 left; 2 of 3 trials started, 1 left; 2 cells wait (·); 1 of unknown" in text
    )
    assert marks(difference(plan, store)) == "=~+·-"


def test_a_budget_is_spent_in_launch_order(store: Store) -> None:
    """Kills: the order of the grid, which gives both trials to the first method."""
    plan = compose(["method=pi_ft,dpok", "seed=0,1", "budget.trials=2", f"store={store.root}"])
    rows = difference(plan, store).rows
    assert [(row["method"], row["seed"]) for row in rows if row["action"] == "run"] == [("pi_ft", 0), ("dpok", 0)]


def test_json_is_one_object_with_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a field forgotten, text that is no JSON, numbers that are none."""
    plan = planned(store, "budget.deadline=2100-01-01T00:00")
    filled(store, plan, STATES)
    content = json.loads(difference(plan, store).text())
    assert set(content) == {"sweep", "cells", "counts", "orphans", "estimate", "budget", "absent_weights"}
    assert content["absent_weights"] == []
    assert content["counts"] == {state: 1 for state in STATES} and content["orphans"] == []
    fields = {"key", "label", "prompt", "prompt_text", "beta", "method", "seed", "state", "step", "steps", "class"}
    fields |= {"message", "action", "shared_with", "estimated_seconds", "source"}
    assert all(set(cell) == fields for cell in content["cells"])
    known = {"trial_hours", "unknown_cells", "device", "slots", "wall_hours", "methods", "forecast"}
    assert set(content["estimate"]) == known and content["estimate"]["forecast"] is None
    assert content["estimate"]["methods"]["dpok_official"]["unknown_cells"] == 1
    assert content["budget"]["deadline"].startswith("2100-01-01T00:00") and content["budget"]["hours"] is None
    assert json.loads(difference(planned(store), store).text())["budget"] is None


def test_a_large_grid_is_counted_by_arm(store: Store) -> None:
    """Kills: cells lost in the counts, prompts or seeds as arms, states added up, --all that is not all."""
    plan = compose(["seed=range(0,16)", "beta=0.1,1", "method=pi_ft,dpok", f"store={store.root}"])
    filled(store, plan, ("done", "done", "failed"))
    found = difference(plan, store)
    lines = list(found.lines())
    assert lines[1:6] == [
        "beta  method  cells  = done  ! failed  + new",
        "0.1   pi_ft   16     1                 15",
        "0.1   dpok    16     1                 15",
        "1     pi_ft   16             1         15",
        "1     dpok    16                       16",
    ]
    assert lines[6] == "64 cells, counted by arm; --all prints each, --json lists them"
    assert len(list(found.lines(everything=True))) == 64 + 4 and len(json.loads(found.text())["cells"]) == 64


def test_a_grid_of_many_arms_is_counted_over_its_longest_axis(store: Store) -> None:
    """Kills: a table as long as the grid, the short axis dropped for the long one."""
    plan = compose(["beta=range(1,71)", "method=pi_ft,dpok", f"store={store.root}"])
    lines = list(difference(plan, store).lines())
    assert [line.split() for line in lines[1:4]] == [
        ["method", "cells", "+", "new"], ["pi_ft", "70", "70"], ["dpok", "70", "70"],
    ]  # fmt: skip


CODE = """\
import resource, sys
from orchestrator import cli
grid = ["seed=range(0,1250)", "prompt=counting,color", "beta=0.01,0.1", "method=pi_ft,dpok"]
code = cli.main(["plan", *grid, *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_SELF)
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]  # ru_maxrss may be the parent's
print(code, used.ru_utime + used.ru_stime, peak, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--all", "--json"])
def test_ten_thousand_cells_are_planned_in_seconds(option: str, tmp_path: Path) -> None:
    """Kills: work per cell that belongs to a component (5 s of CPU and 0.7 GB on the machine it was written on)."""
    command = [sys.executable, "-c", CODE, option, f"store={tmp_path / 'store'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    code, seconds, kilobytes = done.stderr.splitlines()[-1].split()
    assert code == "0" and float(seconds) < 20 and float(kilobytes) < 1e6
    assert done.stdout.count("counting") >= 5000 and not (tmp_path / "store").exists()


def test_absent_weights_are_named_and_stop_a_launch_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan needs no weights: it names them, in JSON too. A launch here stops before it writes; on a cluster it warns.
    Kills: the trials' machine taken for this one, or the other way round."""
    from orchestrator import weights
    from orchestrator.cli import main

    asked = ["model=sd15", "reward=compressibility", "method.estimator=score", "tracking=none"]
    asked.append(f"store={tmp_path}/store")
    assert main(["plan", *asked, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["absent_weights"]
    assert entry["fetch"].startswith("hf download stable-diffusion-v1-5/stable-diffusion-v1-5 model_index.json")
    assert main(["plan", *asked]) == 0
    assert f"not on this machine: {entry['what']}; fetch it: {entry['fetch']}" in capsys.readouterr().out
    assert main(["launch", *asked]) == 2
    assert f"{entry['what']} is not there: {entry['fetch']}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists() or not any((tmp_path / "store").rglob("spec.json"))
    (cell,) = compose(asked).cells
    (warning,) = weights.refuse([cell.spec.to_dict()], {"executor": {"name": "ray", "address": "auto"}})
    assert warning.startswith(entry["what"]) and "every machine of the cluster" in warning
    for local in ({"name": "inline"}, {"name": "ray", "address": None}, {"name": "ray", "address": "local"}):
        with pytest.raises(UserError, match="is not there: hf download"):
            weights.refuse([cell.spec.to_dict()], {"executor": local})
