"""Words that would do harm: they are refused with a message, or go through plan, launch, MLflow and report unharmed.

What survives is what somebody may want to ask a model for: quotes, markup, paths, formulas, right-to-left marks, emoji,
line breaks, ten thousand letters. Refused are control characters, halves of characters, and folder names that lead to
another place. The trials are tests/fake_trial.py.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

import tests.fake_trial as fake
from orchestrator import cli, tracking
from orchestrator.compare import figures, frame
from orchestrator.compare.markup import text
from orchestrator.grid import Cell, Plan, compose
from orchestrator.launch import launch
from orchestrator.ledger import Store
from orchestrator.monitor import Monitor
from orchestrator.overrides import parse, quoted
from orchestrator.tracking import mlflow_view
from orchestrator.tracking.client import NAME, TAG_VALUE
from workers.spec import SpecError, TrialSpec
from workers.text import one_line, typed, unprintable, visible

HOSTILE = {
    "quotes": "it's \"so\" `big` \\",
    "up": "../../../../etc/passwd",
    "html": "</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "markdown": "![x](http://host.invalid/x) | **a** | [b](javascript:alert(1))",
    "lines": "a dog\n\n# on the\tmoon",
    "long": "a very big dog " * 700,
    "turned": "a \u202egod\u202c \u200fdog",
    "persian": "سگ روی ماه می\u200cخواند 🐕‍🦺",
    "formula": "=HYPERLINK(\"http://host.invalid\",\"a dog\")",
    "money": "$x^{2$ and $\\frac$ for 100 %",
    "shell": "$(touch owned); `touch owned` && touch owned",
    "markup": "[red]a dog[/blue] [link=x]",
}
"""What a prompt may be."""
REFUSED = {"\x1b[2Jgone": "\\u001b", "a\x00dog": "\\u0000", "a\rdog": "\\u000d", "\x9b1m": "\\u009b"} | {
    "\udcff dog": "\\udcff"
}
LONG_NAME = "n" * 300
SWEEP = "n" * 100
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What must never reach a terminal."""


def hostile_plan(store: Path, **config: Any) -> Plan:
    """A trial for each of HOSTILE, some of whose ids are as hostile as their prompts, as a file of prompts may have."""
    ids = {name: name for name in HOSTILE} | {
        "up": "../../up", "html": "<b>id</b>", "turned": "\u202edi", "formula": "=1+1", "markup": "[/red]",
        "money": "$a$b$", "long": LONG_NAME,
    }  # fmt: skip
    specs = [
        replace(fake.spec(seed=seed), prompt=prompt, prompt_id=ids[name])
        for seed, (name, prompt) in enumerate(HOSTILE.items())
    ]
    cells = [
        Cell(one.key, one, {"prompt": one.prompt_id, "beta": one.beta, "method": "pi_ft", "seed": one.seed})
        for one in specs
    ]
    axes = {"prompt": list(ids.values()), "beta": [0.1], "method": ["pi_ft"], "seed": [one.seed for one in specs]}
    return replace(fake.plan(store, *specs, sweep=SWEEP, **config), cells=cells, axes=axes)


class Launched:
    """One launch of all of them, with MLflow, into a store whose own path is hostile."""

    def __init__(self, root: Path, database: Path) -> None:
        self.root, self.store = root, root / "a 'b' \"c\" & #d; $e\u202e é" / "store"
        self.store.mkdir(parents=True)
        shutil.copy(database, self.store / "mlflow.db")
        self.plan = hostile_plan(self.store, tracking={"name": "mlflow", "uri": None})
        self.out, self.err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("orchestrator.monitor.LOOK_SECONDS", 0.05)
            patch.setattr("orchestrator.monitor.FORWARD_SECONDS", 0.05)
            patch.setattr("sys.stdout", self.out)
            patch.setattr("sys.stderr", self.err)
            patch.chdir(root)
            self.code = launch(self.plan, target=fake.TARGET)
        self.report = Store(self.store).sweep(SWEEP).report


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Launched:
    return Launched(tmp_path_factory.mktemp("hostile"), database)


# ---- the whole way


def test_every_trial_is_done_and_the_terminal_obeys_nothing(launched: Launched) -> None:
    assert launched.code == 0, launched.err.getvalue()
    assert not OBEYED.search(launched.out.getvalue()) and not OBEYED.search(launched.err.getvalue())
    assert "could not be made" not in launched.err.getvalue()
    assert max(map(len, launched.out.getvalue().splitlines())) < 1000


def test_files_lie_in_the_store_alone_under_plain_names(launched: Launched) -> None:
    assert [path.name for path in launched.root.iterdir()] == [launched.store.parent.name]
    assert [path.name for path in launched.store.parent.iterdir()] == ["store"]
    for path in launched.store.rglob("*"):  # MLflow's names of pictures hold a +
        assert re.fullmatch(r"[\w.+-]{1,200}", path.name, re.ASCII), path


def test_the_store_holds_each_prompt_to_the_letter(launched: Launched) -> None:
    specs = Store(launched.store).plan(SWEEP)["specs"]
    assert [TrialSpec(**{**vars(cell.spec)}).prompt for cell in launched.plan.cells] == list(HOSTILE.values())
    assert [specs[cell.key]["prompt"] for cell in launched.plan.cells] == list(HOSTILE.values())


def test_mlflow_has_a_run_of_each_with_its_prompt(launched: Launched) -> None:
    client = mlflow_view.MlflowClient(tracking_uri=f"sqlite:///{launched.store}/mlflow.db")
    experiment = client.get_experiment_by_name("pift")
    runs = {run.data.tags.get("trial.key"): run for run in client.search_runs([experiment.experiment_id])}
    for cell in launched.plan.cells:
        run = runs[cell.key]
        assert run.info.status == "FINISHED"
        assert run.info.run_name == cell.label[:NAME] or run.info.run_name == cell.label[: NAME - 1] + "…"
        assert run.data.params["prompt"][:1000] == cell.spec.prompt[:1000]
        note = run.data.tags["mlflow.note.content"]
        assert len(note) <= TAG_VALUE and not OBEYED.search(note)
        assert note.startswith("Prompt: ") and not {"<", "[", "*", "|"} & set(note.partition("\n")[0])
    note = runs[None].data.tags["mlflow.note.content"]
    assert len(note) <= TAG_VALUE and "<script" not in note and "host.invalid/" not in note and not OBEYED.search(note)


def test_the_report_shows_each_prompt_and_runs_none(launched: Launched) -> None:
    page = (launched.report / "report.html").read_text()
    assert page.count("<script>") == page.count("</script>") == 1, "the page's own"
    assert "<img src=x" not in page and "<b>id</b>" not in page
    assert not OBEYED.search(page)
    for prompt in HOSTILE.values():
        assert html.escape(visible(prompt), quote=False) in page


def test_the_tables_are_no_formulas(launched: Launched) -> None:
    with (launched.report / "cells.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt_text"].removeprefix("'") for row in rows] == list(HOSTILE.values())
    assert next(row for row in rows if "HYPERLINK" in row["prompt_text"])["prompt"] == "'=1+1"
    with (launched.report / "curves.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert not any(row["prompt"].startswith(("=", "+", "-", "@")) for row in found)


def test_a_figure_of_each_prompt(launched: Launched) -> None:
    sheets = sorted((launched.report / "figures").iterdir())
    assert len(sheets) == len(HOSTILE)
    for sheet in sheets:
        with Image.open(sheet) as picture:
            assert max(picture.size) < 4000


def test_status_and_compare_again(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status"], ["compare", "--out", str(launched.store / "again")]):
        assert cli.main([*words, "--store", str(launched.store)]) == 0
        said = capsys.readouterr()
        assert not OBEYED.search(said.out + said.err)
    assert cli.main(["status", "--json", "--store", str(launched.store)]) == 0
    printed = capsys.readouterr().out
    assert not OBEYED.search(printed)
    assert [cell["prompt_text"] for cell in json.loads(printed)["cells"]] == list(HOSTILE.values())


def test_a_terminal_without_the_letters(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert cli.main(["compare", "--out", str(launched.store / "again"), "--store", str(launched.store)]) == 0
    stream.flush()
    assert r"\u0633\u06af" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_the_live_table(launched: Launched) -> None:
    stream = io.StringIO()
    monitor = Monitor(Store(launched.store).plan(SWEEP), Store(launched.store), tracking.NoView(), stream=stream)
    Console(file=stream, width=200).print(monitor.table())
    assert "[/red]" in stream.getvalue() and not OBEYED.search(stream.getvalue())


# ---- the command line


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plan_and_the_command_that_it_prints(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    override = f"prompt={quoted(HOSTILE[name])}"
    assert compose(["model=mixture", "reward=quadratic", override]).cells[0].spec.prompt == HOSTILE[name].strip()
    assert cli.main(["plan", "model=mixture", "reward=quadratic", override]) == 0
    said = capsys.readouterr()
    assert not OBEYED.search(said.out + said.err)
    command = said.out.rpartition("run them: ")[2].rstrip("\n")
    assert "\n" not in command
    shell = f"pift() {{ printf '%s\\0' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == ["launch", "model=mixture", "reward=quadratic", override]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", REFUSED)
def test_control_characters_are_refused(prompt: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for override in (f"prompt={quoted(prompt)}", f"store={quoted(prompt)}"):
        assert cli.main(["launch", "model=mixture", "reward=quadratic", override]) == 2
        out, err = capsys.readouterr()
        assert out == "" and not OBEYED.search(err)
        assert override.partition("=")[0] in err and REFUSED[prompt] in err and "take it out" in err
        assert list(tmp_path.iterdir()) == []


def test_an_id_has_no_line_breaks() -> None:
    with pytest.raises(SpecError, match=r"prompt_id=.*holds the control character .u000a; take it out"):
        TrialSpec.from_dict({**fake.spec().to_dict(), "prompt_id": "a\nb"})


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", "a\n", "\u202eab", "n" * 101, "", ".", "-x", "'"])
def test_a_sweep_name_is_a_folder_name(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", f"sweep.name={quoted(name)}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "sweep.name=" in err and "my_sweep" in err and not OBEYED.search(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a?b", "c%20d"])
def test_a_store_that_mlflow_would_not_find(name: str, tmp_path: Path, capsys: Any) -> None:
    store = tmp_path / name
    assert cli.main(["launch", "sweep=tiny", f"store={quoted(str(store))}"]) == 2
    err = capsys.readouterr().err
    assert str(store) in err and "tracking=none" in err
    assert list(tmp_path.iterdir()) == []
    assert launch(fake.plan(store, fake.spec()), target=fake.TARGET) == 0


def test_a_store_with_a_very_long_name(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["launch", "sweep=tiny", f"store={tmp_path}/{'s' * 10_000}"]) == 2
    err = capsys.readouterr().err
    assert "store=" in err and "longer than a path may be" in err and len(err) < 300
    assert cli.main(["status", "--store", "s" * 10_000]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- the pure parts


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text(words: str) -> None:
    assert not OBEYED.search(visible(words)) and visible(visible(words)) == visible(words)
    line = one_line(words, 20)
    assert len(line) <= 20 and len(line.splitlines()) <= 1
    assert json.loads(visible(json.dumps(words, ensure_ascii=False))) == words
    assert "<" not in text(words)
    assert (unprintable(words, "\n\t") is None) == (not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", words))
    drawn = Text(0, 0, figures._letters(words), figure=Figure())
    assert drawn._preprocess_math(drawn.get_text())[1] is not True, "no formula"
    if words.strip() and unprintable(words, "\n\t") is None:
        assert parse([f"prompt={quoted(words)}"])["prompt"].values == (words,)
        assert not OBEYED.search(typed([words]))


@pytest.mark.parametrize("value", ["-0.5", "+1e-3", -1, 0.5, None, "", "a=b", "-inf"])
def test_numbers_stay_numbers(value: Any) -> None:
    assert frame._inert(value) == value


@pytest.mark.parametrize("value", ["=1", "+a", "-a", "@a", "\tx", "-1+cmd|x"])
def test_formulas_do_not(value: str) -> None:
    assert frame._inert(value) == f"'{value}"
