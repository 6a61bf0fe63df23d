"""The subcommands that read a store, on fake stores: what is printed, for people and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_store, fake_trial

from orchestrator import cli
from orchestrator.grid import compose

Output = pytest.CaptureFixture[str]


def run(capsys: Output, *arguments: str, code: int = 0) -> str:
    assert cli.main(list(arguments)) == code
    return capsys.readouterr().out


@pytest.fixture
def store(tmp_path: Path) -> str:
    states = {("counting", "dpok", 0.1, 0): "failed", ("counting", "pi_ft", 1.0, 0): "resumable"}
    fake_store(tmp_path / "store", states=states, steps=4, every=2, samples=4, pictures=2, size=8)
    return str(tmp_path / "store")


def test_status_shows_states_steps_and_reasons(store: str, capsys: Output) -> None:
    out = run(capsys, "status", "--store", store)
    assert out.splitlines()[1].split() == ["key", "prompt", "beta", "method", "seed", "state", "step"]
    assert "4 cells: 2 done, 1 resumable, 1 failed" in out or "1 failed" in out and "2 done" in out
    assert "failed (bug): RuntimeError: mat1 and mat2 shapes" in out


def test_status_as_json(store: str, capsys: Output) -> None:
    content = json.loads(run(capsys, "status", "demo", "--store", store, "--json"))
    assert set(content) == {"sweep", "cells", "counts", "launches"} and content["sweep"] == "demo"
    assert content["counts"] == {"done": 2, "failed": 1, "resumable": 1}
    assert {"key", "prompt", "beta", "method", "seed", "state", "step", "steps"} <= set(content["cells"][0])


def test_the_newest_sweep_is_meant_where_none_is_named(store: str, capsys: Output) -> None:
    fake_store(
        Path(store), sweep="newer", betas=[2.0], methods=["pi_ft"], steps=2, every=1, samples=4, pictures=2, size=8
    )
    os.utime(Path(store) / "sweeps" / "demo" / "plan.json", (1, 1))
    assert json.loads(run(capsys, "status", "--store", store, "--json"))["sweep"] == "newer"
    os.utime(Path(store) / "sweeps" / "newer" / "plan.json", (0, 0))
    assert json.loads(run(capsys, "status", "--store", store, "--json"))["sweep"] == "demo"


def test_compare_writes_where_it_says(store: str, capsys: Output, tmp_path: Path) -> None:
    out = run(capsys, "compare", "--store", store, "--out", str(tmp_path / "report"))
    for line in out.splitlines()[-2:]:
        assert Path(line.split(maxsplit=1)[1]).is_file()
        assert str(tmp_path / "report") in line


def test_plan_shows_what_the_store_knows(tmp_path: Path, capsys: Output) -> None:
    """A cell with results is done; what was cut off can go on; planning writes nothing."""
    arguments = ["plan", "sweep=tiny", f"store={tmp_path / 'store'}", "--json"]
    (one, two) = json.loads(run(capsys, *arguments))["cells"]
    assert not (tmp_path / "store").exists()
    for cell, spec, state in zip((one, two), compose(["sweep=tiny"]).cells, ("done", "resumable"), strict=True):
        fake_trial(tmp_path / "store" / "trials" / cell["key"], cell["key"], spec.spec.to_dict(), state, size=8)
    before = sorted(tmp_path.rglob("*"))
    content = json.loads(run(capsys, *arguments))
    assert [(cell["state"], cell["action"]) for cell in content["cells"]] == [
        ("done", "done"),
        ("resumable", "continue"),
    ]
    assert content["counts"] == {"done": 1, "resumable": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_for_people_names_the_command_that_runs_it(capsys: Output, tmp_path: Path) -> None:
    out = run(capsys, "plan", "sweep=tiny", "prompt='a dog, on the moon'", f"store={tmp_path}/my store")
    assert "Plan: 2 to run\n" in out and "a-dog-on-the-moon" in out
    assert f"""pift launch sweep=tiny 'prompt='"'"'a dog, on the moon'"'"'' 'store={tmp_path}/my store'""" in out


def test_a_long_plan_is_printed_whole_when_asked(capsys: Output, tmp_path: Path) -> None:
    """Kills: --all that is not handed on; a dry run that knows no --all."""
    grid = ["seed=range(0,61)", f"store={tmp_path}/store"]
    counted, whole = run(capsys, "plan", *grid), run(capsys, "plan", *grid, "--all")
    assert counted == run(capsys, "launch", "--dry-run", *grid)
    assert counted.count("\n+ ") == 0 and whole.count("\n+ ") == 61
    assert "Plan: 61 to run" in counted and "Plan: 61 to run" in whole


def test_launch_hands_the_plan_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from orchestrator import launch

    seen: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda plan, **options: seen.append((plan, options)) or 3)
    assert cli.main(["launch", "sweep=tiny", f"store={tmp_path}", "--json"]) == 3
    assert [cell.spec.train.gradient_steps for cell in seen[0][0].cells] == [3, 3]
    assert seen[0][1] == {"json_output": True}
