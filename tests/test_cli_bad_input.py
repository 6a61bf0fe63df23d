"""Bad input ends with exit code 2, one clear message on stderr and nothing written: no traceback, no half a store."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_grid import BASE, FILES, write

from orchestrator import cli

REFUSED = {
    "beta=-1": ("beta=-1.0", "above 0", "beta=0.1"),
    "beta=0": ("beta=0.0", "above 0", "beta=0.1"),
    "beta=nan": ("beta=nan", "finite", "beta=0.1"),
    "beta=inf": ("beta=inf", "finite", "beta=0.1"),
    "beta=abc": ("beta='abc'", "number", "beta=0.1"),
    "beta=": ("beta=''", "number", "beta=0.1"),
    "beta=[]": ("the axis beta is empty", "beta=a,b"),
    "beta=[0.1,1]": ("is a list", "beta=0.1,1"),
    "beta=0.1,": ("'beta=0.1,' cannot be read", "key=a,b"),
    "beta=1,1.0": ("axis beta", "twice"),
    "beta=0.1,-1": ("beta=-1.0", "above 0"),
    "seed=range(0,0)": ("'seed=range(0,0)'", "range(start, stop, step)"),
    "seed=range(0,1e9)": ("too many",),
    "seed=1.5": ("seed=1.5", "whole number", "seed=0"),
    "seed=-1": ("seed=-1", "between 0", "seed=0"),
    "method=pi_fit": ("method=pi_fit is not known", "did you mean pi_ft?"),
    "method=": ("method=''", "choose one of"),
    "method=[pi_ft,dpok]": ("method=pi_ft,dpok",),
    "sweep=nope": ("sweep=nope is not known", "quickstart"),
    "sweep=tiny,single": ("one sweep",),
    "model=sd16": ("model=sd16 is not known", "toyland"),
    "model.path=/nowhere": ("model.path='/nowhere'", "model.path=toyland"),
    "model.dtype=fp8": ("model.dtype='fp8'", "fp32"),
    "prompt=": ("prompt=''", "empty", "prompt='a dog on the moon'"),
    "prompt=countng": ("prompt=countng", "did you mean counting?"),
    "prompt='A purple dinosaur'": ("purple", "dinosaur", "rabbit"),
    "betta=1": ("betta is not a setting", "did you mean beta?"),
    "lr=1e-3": ("lr is not a setting", "did you mean method.lr?"),
    "method.lrr=1": ("method.lrr is not a setting", "did you mean method.lr"),
    "method.lr=abc": ("method.lr='abc'", "number"),
    "method.kl=nats": ("method.kl is not a setting of method=pi_ft", "dpok"),
    "method._target_=os.system": ("method._target_", "--conf DIR"),
    "sampler=3": ("sampler.steps",),
    "sampler.steps=one": ("sampler.steps='one'", "whole number"),
    "eval.samples=true": ("eval.samples=True", "whole number"),
    "prompts.counting=x": ("conf/prompts/",),
    "executor=ray,inline": ("executor cannot be an axis", "executor=ray"),
    "store=": ("store=''", "store=store"),
    "resources.gpu=half": ("resources.gpu=half", "number"),
    "retry_failed=perhaps": ("neither true nor false",),
    "beta=${betta}": ("refers to nothing", "betta"),
    "train.checkpoint_every=1,2": ("two cells are the same trial", "axis train.checkpoint_every decides nothing"),
    "prompt=counting,'Four wolves in the park'": ("prompt=counting and prompt=Four", "two cells"),
    "+x=1": ("not added",),
    "foo": ("key=value",),
    "a b=1": ("key=value",),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test stands in an empty folder; what it leaves there it has written."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The message of a refusal, after the checks that every refusal must pass."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err and 'File "' not in err
    assert err.startswith(("pift: ", "usage: "))
    assert list(Path.cwd().iterdir()) == []
    return err


@pytest.mark.parametrize("override", REFUSED)
def test_refused(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["launch", override], capsys)
    for words in REFUSED[override]:
        assert words in message
    assert len(message.splitlines()) == 1, "one problem, one message"
    for foreign in ("hydra", "omegaconf", "antlr", "LexerNoViableAlt", "mismatched", "Exception"):
        assert foreign not in message.lower().replace("hydra's", ""), "in our words"


def test_plan_and_dry_run_refuse_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["plan", "beta=0", "--json"], capsys) == refused(["launch", "--dry-run", "beta=0"], capsys)


def test_problems_are_shown_all_at_once_and_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["plan", "beta=-1,-2", "seed=0,1,1.5", "method=pi_ft,dpok", "lora.rank=0"], capsys)
    assert message.startswith("pift: 4 problems\n")
    assert (
        message.count("beta=-1.0")
        == message.count("beta=-2.0")
        == message.count("seed=1.5")
        == message.count("lora.rank=0 ")
        == 1
    )


def test_grammar_and_names_are_collected_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 problems" in refused(["plan", "beta=(", "foo", "seed=0"], capsys)
    assert "2 problems" in refused(["plan", "betta=1", "sead=0"], capsys)
    assert "2 problems" in refused(["plan", "method=pi_fit", "reward=toylan"], capsys)


def test_an_unwritable_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(["launch", "sweep=tiny", f"store={tmp_path}/file/store"], capsys)
    assert f"store={tmp_path}/file/store" in message and "cannot be written" in message


def test_an_mlflow_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        message = refused(["launch", "sweep=tiny", f"tracking.uri={uri}"], capsys)
    assert f"tracking.uri={uri!r}" in message or f"tracking.uri={uri}" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plam"], "plam"),
        (["plan", "--jsn"], "unknown argument --jsn"),
        (["plan", "--conf", "/nowhere"], "--conf /nowhere is not a folder"),
        (["status"], "--store store is not a folder"),
        (["compare", "--store", "/nowhere"], "--store /nowhere is not a folder"),
        (["compare", "--store", ".."], "holds no sweep"),
        (["status", "nope", "--store", ".."], "holds no sweep"),
        (["sample", "abc", "--store", ".."], "no trials"),
        (["ui", "--store", ".."], "no mlflow.db"),
        (["sample"], "KEY"),
        (["ui", "--port", "abc"], "abc"),
        (["compare", "a", "b"], "unknown argument b"),
        (["--nope"], "--nope"),
    ],
)
def test_other_subcommands_refuse(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(arguments, capsys)


def test_a_sweep_that_the_store_does_not_hold(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path / "store" / "sweeps" / "demo" / "plan.json", '{"axes": {}, "cells": []}')
    assert "did you mean demo?" in refused(["status", "dmo", "--store", str(tmp_path / "store")], capsys)
    write(tmp_path / "store" / "sweeps" / "demo" / "plan.json", "{")
    said = refused(["status", "--store", str(tmp_path / "store")], capsys)
    assert "plan.json is damaged" in said and "given again, writes it anew" in said


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path / "store" / "mlflow.db", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(["ui", "--store", str(tmp_path / "store"), "--port", str(port)], capsys)
    assert f"--port {port}" in message and f"--port {port + 1}" in message


def test_a_fault_of_our_own_is_short_and_says_how_to_see_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in FILES.items():
        write(tmp_path / "conf" / name, content)
    write(tmp_path / "conf" / "method" / "broken.yaml", "_target_: grid_parts.Broken\nname: broken\n")
    arguments = ["plan", "--conf", str(tmp_path / "conf"), *BASE, "method=broken"]
    monkeypatch.delenv("PIFT_DEBUG", raising=False)
    capsys.readouterr()
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "RuntimeError: a fault in somebody's check" in err and "PIFT_DEBUG=1" in err and "Traceback" not in err
    monkeypatch.setenv("PIFT_DEBUG", "1")
    assert cli.main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["plan"]) == 130


@pytest.mark.parametrize("command", ["", "plan", "launch", "status", "compare", "sample", "ui"])
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"pift {command}" in out.partition("options:")[2]


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator import cli\n"
        "assert cli.main(['launch', '--help']) == cli.main(['--version']) == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'ray', 'mlflow', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(cli.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr


def test_nothing_said_is_help_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "first steps" in refused([], capsys)
