"""Hours and memory of cells that never ran: the text and the JSON of `pift plan --device`, and who wins over whom."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_trial

from orchestrator import cli
from orchestrator.difference import Difference, difference
from orchestrator.errors import UserError
from orchestrator.forecast import at_hand, digits, target_of
from orchestrator.grid import Plan, compose
from orchestrator.ledger import Store
from workers import cost, devices
from workers.cost import Cost, Memory, Phase
from workers.meter import Line
from workers.methods import Passes
from workers.store import sound_record, write_record

SD15 = ["model=sd15", "reward=image_reward", "resources=gpu", "executor=ray", "sampler.steps=4"]
SD15 += ["eval.samples=4", "eval.pictures=2", "train.micro_batch=5", "method=pi_ft,dpok", "method.inner_steps=1"]
SD15 += ["train.gradient_steps=1000"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def planned(store: Store, *overrides: str) -> Plan:
    return compose([*SD15, *overrides, f"store={store.root}"])


def shown(found: Difference) -> str:
    return "\n".join(found.lines())


def line(found: Difference, start: str) -> str:
    (only,) = (text for text in found.lines() if text.startswith(start))
    return only


FEW = {"every": 1, "samples": 2, "pictures": 1}


def finished(store: Store, plan: Plan, index: int, seconds: float, gpu: str) -> None:
    """Give a cell of the plan the end of a trial on a GPU of this name."""
    cell, folder = plan.cells[index], store.trial(plan.cells[index].key)
    short = cell.spec.to_dict() | {"train": {"gradient_steps": 2}, "eval": FEW}
    fake_trial(folder.root, cell.key, short, "done", size=4)
    known = {"device": "cuda", "device_name": gpu, "seconds_per_step": seconds}
    write_record(folder.done, {**sound_record(folder.done), **known})
    folder.spec.write_text(json.dumps(cell.spec.to_dict()))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Trials cost as told here, by their method; how often that was asked."""
    asked = []

    def cost_of(spec: Any) -> Cost:
        cost.check_known(spec)
        asked.append(spec)
        phase = Phase(Line(0.0, 4 * 2**30), float("inf"), rewarding=False)
        resident = {"UNet": 2 * 2**30, "CUDA": 2**30}
        flops = {"fp16": (3600 if spec.method["name"] == "pi_ft" else 360) * 0.35 * 312e12 / 1000}
        memory = Memory(resident, {}, (phase,), False)
        return Cost(flops, Passes(gradients=5.0), memory, 0.8e12, 4.7e12, 512, ("mine",))

    monkeypatch.setattr(cost, "cost_of", cost_of)
    return lambda: len(asked)


# ---- the true numbers


def test_a_plan_of_sd15_for_a_gpu(store: Store) -> None:
    """The whole way, nothing told: the FLOPs and the memory of the true sizes, without a weight or a network. Kills:
    a line forgotten, the hours of a step as those of a trial, seconds for hours."""
    found = difference(planned(store, "method=pi_ft", "method.estimator=score"), store, "A100-80GB")
    (arm,) = found.forecast.arms if found.forecast else ()
    assert "Plan: 1 to run\nabout " in shown(found) and "not known" not in shown(found)
    text = line(found, "estimated for one A100 80GB: ")
    assert f"{digits(arm.hours)} GPU-hours (pi_ft {digits(arm.hours)} h a trial); peak memory " in text
    assert " of 80 GiB at train.micro_batch=5 (" in text and "rewards 3.3" in text and "UNet 1.6" in text
    T, N = 4, 10
    once = 1.607e12 * 2 * T * N + 4.73e12 * T * N + 2.51e12 * N  # rollouts, pre-trained, gradients, pictures
    assert 1.0 < arm.cost.flops["fp16"] / once < 1.01  # the rest: 21 evaluations in 1000 steps
    assert 1.0 < arm.hours / (1000 * once / 312e12 / 0.35 / 3600) < 1.1  # and the adapter's and the reward's float32
    text = line(found, "assumed: 0.8 TFLOP a UNet pass at 512 px, two passes with guidance; ")
    assert "; 4.7 TFLOP a transition's gradient, with the recomputation of checkpointing; " in text
    assert "312 TFLOP/s peak in fp16 (NVIDIA's A100 datasheet), of which 35 % are reached (ours, not measured)" in text
    assert "not counted" not in text and "warning" not in shown(found)


# ---- the text


def test_hours_by_method_and_the_assumptions(store: Store, counted: Callable[[], int]) -> None:
    """Kills: trials looked at one by one, the memory of the smaller, one method's hours for both, a reward that was not
    counted and is not named."""
    found = difference(planned(store, "seed=0,1,2", "beta=0.1,1"), store, "a100")
    assert counted() == 2  # seed and beta cost nothing
    assert line(found, "about") == "about 6.6 trial-hours; estimated: pi_ft 3.6 s/step, dpok 0.36 s/step on A100 80GB"
    text = line(found, "estimated")
    assert text.startswith("estimated for one A100 80GB: 6.6 GPU-hours (pi_ft 1 h a trial, dpok 0.1 h a trial); ")
    assert "peak memory (pi_ft) 23.0 of 80 GiB at train.micro_batch=5 (activations 20.0, UNet 2.0, CUDA 1.0)" in text
    assert "not counted: what mine takes" in line(found, "assumed")
    assert [row["source"] for row in found.rows] == ["estimated"] * 12
    assert {round(row["estimated_seconds"], 6) for row in found.rows} == {3600.0, 360.0}


def test_what_is_left_counts(store: Store, counted: Callable[[], int]) -> None:
    """Kills: whole trials where half is done."""
    plan = planned(store, "method=pi_ft", "train.gradient_steps=4", "eval.every=2")
    cell = plan.cells[0]
    fake_trial(store.trial(cell.key).root, cell.key, cell.spec.to_dict(), "resumable", size=4)
    found = difference(plan, store, "a100")
    assert found.rows[0]["estimated_seconds"] == pytest.approx(2 * 3.6)
    assert found.forecast is not None and found.forecast.gpu_hours({cell.key}) == pytest.approx(2 * 3.6 / 3600)


def test_a_half_gpu_takes_twice_as_long(store: Store, counted: Callable[[], int]) -> None:
    """Kills: the speed of a whole GPU for a half, its whole memory, GPU-hours that double."""
    found = difference(planned(store, "method=pi_ft", "resources.gpu=0.5", "train.micro_batch=10"), store, "a100")
    text = shown(found)
    assert "about 2 trial-hours; estimated: pi_ft 7.2 s/step" in text and "A100 80GB: 1 GPU-hours (pi_ft 2 h" in text
    assert "43.0 of 40 GiB" in text and "a trial has 0.5 of the GPU" in text
    assert "train.micro_batch=9 fits" in text


def test_what_does_not_fit_is_warned_of(store: Store, counted: Callable[[], int]) -> None:
    """Kills: the warning, a micro-batch one too large, settings that are set already."""
    found = difference(planned(store, "train.micro_batch=8"), store, "4090")
    warnings = [text for text in found.lines() if text.startswith("warning")]
    assert warnings == [
        f"warning: {method} needs 35.0 GiB at train.micro_batch=8 and RTX 4090 gives it 24: train.micro_batch=5 fits; "
        "model.offload=true takes less"
        for method in ("pi_ft", "dpok")
    ]
    plain = ["method=pi_ft", "model.gradient_checkpointing=false", "model.dtype=fp32", "model.offload=true"]
    (text,) = (
        text for text in difference(planned(store, "resources.gpu=0.25", *plain), store, "T4").lines() if "warn" in text
    )
    assert text.endswith(
        "T4 gives it 4: no train.micro_batch fits; model.gradient_checkpointing=true, model.dtype=fp16 take less"
    )


def test_json_says_all_of_it(store: Store, counted: Callable[[], int]) -> None:
    plan = planned(store, "seed=0,1")
    content = json.loads(difference(plan, store, "h100").text())
    found = content["estimate"]["forecast"]
    assert found["device"] == content["estimate"]["device"] == "H100 SXM"
    assert found["gpu_hours"] == pytest.approx(content["estimate"]["trial_hours"])
    assert found["assumed"]["fraction_of_peak"] == 0.35 and found["assumed"]["peak_tflops"]["bf16"] == 989
    arm = found["arms"][0]
    assert (arm["method"], arm["cells"], arm["estimated_cells"], arm["micro_batch"]) == ("pi_ft", 2, 2, 5)
    assert arm["memory_bytes"]["activations"] == 20 * 2**30 and arm["peak_bytes"] == 23 * 2**30
    assert arm["largest_micro_batch"] == 19 and arm["rows_per_step"]["gradients"] == 5.0
    assert arm["trial_hours"] == pytest.approx(312 / 989)
    speeds = content["estimate"]["methods"]["pi_ft"]["speeds"]
    assert [(speed["source"], speed["trials"]) for speed in speeds] == [("estimated", 0)]
    assert json.loads(difference(plan, store).text())["estimate"]["forecast"] is None


# ---- measured and estimated


def test_what_was_measured_wins(store: Store, counted: Callable[[], int]) -> None:
    """Kills: an estimate over a measurement, estimated hours among the measured ones, GPU-hours of both."""
    plan = planned(store, "seed=0,1")
    finished(store, plan, 0, 36.0, "NVIDIA A100-SXM4-80GB")
    found = difference(plan, store, "a100")
    rows = {(row["method"], row["seed"]): row for row in found.rows}
    assert rows["pi_ft", 1]["estimated_seconds"] == 36_000 and rows["pi_ft", 1]["source"] == "measured"
    assert rows["dpok", 1]["estimated_seconds"] == pytest.approx(360) and rows["dpok", 1]["source"] == "estimated"
    assert rows["pi_ft", 0]["source"] is None
    assert line(found, "about 10 trial-hours; ").endswith(
        "; measured: pi_ft 36 s/step on A100 80GB (1 trial); estimated: dpok 0.36 s/step on A100 80GB"
    )
    assert "A100 80GB: 0.2 GPU-hours (dpok 0.1 h a trial); peak memory" in line(found, "estimated")


def test_another_gpus_speed_is_not_this_ones(store: Store, counted: Callable[[], int]) -> None:
    """With --device; without it any GPU's counts, as always. Kills: an RTX 3090's hours for an H100."""
    plan = planned(store, "seed=0,1", "method=pi_ft")
    finished(store, plan, 0, 36.0, "NVIDIA GeForce RTX 3090")
    assert "estimated: pi_ft" in line(difference(plan, store, "a100"), "about")
    assert "measured: pi_ft 36 s/step on cuda (1 trial)" in line(difference(plan, store), "about")
    assert "measured: pi_ft 36 s/step on RTX 3090" in line(difference(plan, store, "rtx 3090"), "about")


def test_a_budget_counts_what_a_launch_counts(store: Store, counted: Callable[[], int]) -> None:
    """A launch knows no estimates. Kills: cells that wait in the plan and run in the launch."""
    found = difference(planned(store, "budget.hours=0.5"), store, "a100")
    assert [row["action"] for row in found.rows] == ["run", "run"]
    assert "about 1.1 trial-hours" in shown(found)
    waiting = difference(planned(store, "budget.trials=1"), store, "a100")
    assert [row["source"] for row in waiting.rows] == ["estimated", None]
    assert "about 1 trial-hours" in shown(waiting)


# ---- without a name


def test_without_a_gpu_the_plan_says_how_to_ask(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a hint that leads nowhere, an estimate nobody asked for, a network built for it."""
    monkeypatch.setattr(devices, "gpus", list)
    monkeypatch.setattr(cost, "cost_of", None)
    assert line(difference(planned(store), store), "hours") == (
        "hours not known: pi_ft, dpok not measured yet on cuda; pift plan --device A100 estimates them"
    )
    toyland = compose(["resources=gpu", f"store={store.root}"])
    assert line(difference(toyland, store), "hours") == "hours not known: pi_ft not measured yet on cuda"


def test_the_gpu_at_hand_is_estimated(
    store: Store, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the trials run on this machine. Kills: this machine's GPU for a cluster's, the memory of the datasheet
    for the true one, an estimate where all is measured."""
    monkeypatch.setattr(devices, "gpus", lambda: [("NVIDIA A100-SXM4-40GB", 39 * 2**30)])
    plan = planned(store, "method=pi_ft", "seed=0,1")
    text = shown(difference(plan, store))
    assert "estimated for one NVIDIA A100-SXM4-40GB: 2 GPU-hours" in text and "23.0 of 39 GiB" in text
    far = planned(store, "method=pi_ft", "executor.address=head:6379")
    assert "not measured yet on cuda; pift plan --device A100" in shown(difference(far, store))
    monkeypatch.setattr(devices, "gpus", lambda: [("NVIDIA Mystery", 2**35)])
    assert "NVIDIA Mystery is not in pift's table, pift plan --device A100 estimates" in shown(difference(plan, store))
    monkeypatch.setattr(devices, "gpus", lambda: [("NVIDIA A100-SXM4-40GB", 39 * 2**30)])
    before = counted()
    finished(store, plan, 0, 2.0, "NVIDIA A100-SXM4-40GB")
    assert "estimated" not in shown(difference(plan, store)) and counted() == before


def test_a_cpu_plan_asks_for_no_gpu(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: torch asked for GPUs by a plan that uses none."""
    monkeypatch.setattr(devices, "gpus", None)
    monkeypatch.setattr(cost, "check_known", None)
    plan = compose(["model=toyland", f"store={store.root}"])
    assert line(difference(plan, store), "hours") == "hours not known: pi_ft not measured yet on cpu"


def test_a_cpu_by_name(store: Store) -> None:
    found = difference(planned(store, "method=pi_ft"), store, "CPU")
    assert line(found, "hours") == (
        "hours not known: pi_ft not measured yet on cpu; those of a CPU are known only once a trial has run"
    )


def test_what_cannot_be_estimated_says_why(store: Store) -> None:
    """Kills: hours of nothing, a traceback, cells left out of the count."""
    found = difference(compose(["model=toyland", "seed=0,1", f"store={store.root}"]), store, "t4")
    assert line(found, "hours") == "hours not known: pi_ft not measured yet on T4"
    assert line(found, "2 cells not estimated: model=toyland has latents of width 8")
    content = json.loads(found.text())
    assert content["estimate"]["forecast"]["arms"] == [] and content["estimate"]["unknown_cells"] == 2
    assert content["cells"][0]["estimated_seconds"] is None and content["cells"][0]["source"] is None


# ---- the command line


def test_an_unknown_device_is_named_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--device", "A1000", f"store={tmp_path / 'store'}"]) == 2
    assert "--device A1000 is no device that pift knows" in (said := capsys.readouterr().err)
    assert "H100 SXM, A100 40GB, A100 80GB" in said and "or cpu" in said


def test_the_command_line_asks_for_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: Callable[[], int]
) -> None:
    """Kills: an option that is parsed and not used; `launch --dry-run`, which shares the code, broken by it."""
    where = f"store={tmp_path / 'store'}"
    assert cli.main(["plan", *SD15, "--device", "rtx 4090", where]) == 0
    assert "estimated for one RTX 4090" in capsys.readouterr().out
    assert cli.main(["launch", "--dry-run", *SD15, where]) == 0
    assert "hours not known" in capsys.readouterr().out


# ---- pieces


def test_targets() -> None:
    gpu, whole = {"resources": {"gpu": 1}}, {"resources": {"cpu": 1, "gpu": 0}}
    named = target_of(whole, "NVIDIA L4")
    assert (named.device, named.name, named.memory, named.share) == ("cuda", "L4", 24 * 2**30, 1.0)
    assert target_of({"resources": {"gpu": 4}}, "l4").share == 1.0
    assert (target_of(gpu, None).device, target_of(whole, None).device) == ("cuda", "cpu")
    assert target_of(whole, None).hint == "" != target_of(gpu, None).hint
    assert named.counts("NVIDIA L4") and not named.counts("NVIDIA L40S") and not named.counts(None)
    assert target_of(gpu, None).counts(None)
    assert at_hand(named, gpu | {"executor": {}}) is named
    with pytest.raises(UserError, match="--device nonsense"):
        target_of(gpu, "nonsense")


def test_arms_of_one_method_give_a_range(store: Store, counted: Callable[[], int]) -> None:
    """Kills: the first arm's hours for all."""
    plan = planned(store, "method=pi_ft", "train.gradient_steps=1000,2000")
    assert "3 GPU-hours (pi_ft 1 to 2 h a trial)" in line(difference(plan, store, "a100"), "estimated")
    assert counted() == 2


def test_digits() -> None:
    assert [digits(value) for value in (0.0, 0.0123, 1.26, 9.94, 12.6, 390.4, 12_345.6)] == [
        "0", "0.012", "1.3", "9.9", "13", "390", "12,346",
    ]  # fmt: skip


def test_nothing_is_imported_before_it_is_needed() -> None:
    """Kills: torch behind every `pift plan`."""
    code = "import sys, orchestrator.difference; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and not {"torch", "diffusers", "peft"} & set(done.stdout.split())
