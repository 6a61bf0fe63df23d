"""The command itself, on toyland, from an empty folder to finished runs: `pift launch`, in this process.

the same spec in two empty stores, once inline and once with Ray: equal journals but for the clock, equal adapters
what MLflow holds afterwards
a third method, a new reward and a new prompt set: one file and one YAML each, trained for real
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.ledger import Store
from orchestrator.tracking import mlflow_view
from workers.recorder import CLOCK_METRICS, read_journal
from workers.store import read_json

TINY = ["launch", "sweep=tiny", "prompt=counting,location"]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which `sweep=tiny` ran in this process, two prompts, both methods."""
    store = tmp_path_factory.mktemp("inline") / "store"
    assert main([*TINY, f"store={store}", "executor=inline"]) == 0
    return store


def contents(store: Path) -> dict[str, Any]:
    """{key: (journal without the clock, adapter's bytes)}."""
    found = {}
    for folder in sorted((store / "trials").iterdir()):
        trial = Store(store).trial(folder.name)
        records = [
            {**record, "time": None, "metrics": {k: v for k, v in record["metrics"].items() if k not in CLOCK_METRICS}}
            for record in read_journal(trial.journal)
        ]
        found[folder.name] = (records, (trial.adapter / "pytorch_lora_weights.safetensors").read_bytes())
    return found


@pytest.mark.ray
def test_inline_and_ray_give_the_same_bits(inline: Path, tmp_path: Path) -> None:
    """Kills: a draw from torch's global generator; another number of threads; a key with the executor in it."""
    assert main([*TINY, f"store={tmp_path / 'store'}", "executor=ray"]) == 0
    once, again = contents(inline), contents(tmp_path / "store")
    assert len(once) == 4
    assert once == again


def test_a_second_launch_trains_nothing(inline: Path) -> None:
    """Kills: done cells sent to the executor again (they would find nothing to do, and write their result anew)."""
    before = contents(inline)
    results = [*inline.glob("trials/*/journal.jsonl"), *inline.glob("trials/*/DONE.json")]
    times = {path: path.stat().st_mtime_ns for path in results}
    assert main([*TINY, f"store={inline}", "executor=inline"]) == 0
    assert contents(inline) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_every_cell_of_a_prompt_starts_from_the_same_pictures(inline: Path) -> None:
    starts: dict[str, set[str]] = {}
    for folder in (inline / "trials").iterdir():
        first = next(read_journal(folder / "journal.jsonl"))
        assert first["metrics"]["eval/kl_path_nats"] == 0.0
        starts.setdefault(read_json(folder / "spec.json")["prompt"], set()).add(json.dumps(first["samples"]))
    assert len(starts) == 2
    assert all(len(samples) == 1 for samples in starts.values())


def test_mlflow_holds_the_sweep(inline: Path) -> None:
    client = mlflow_view.MlflowClient(tracking_uri=f"sqlite:///{inline}/mlflow.db")
    experiment = client.get_experiment_by_name("pift")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert {run.data.tags["trial.key"] for run in trials} == {path.name for path in (inline / "trials").iterdir()}
    for run in trials:
        assert {"sweep", "git.commit", "git.dirty", "lock.sha256"} <= set(run.data.tags)
        assert {"beta", "prompt", "method.lr", "sampler.steps"} <= set(run.data.params)
        journal = list(read_journal(inline / "trials" / run.data.tags["trial.key"] / "journal.jsonl"))
        history = client.get_metric_history(run.info.run_id, "eval/reward_mean")
        assert [(point.step, point.value) for point in history] == [
            (record["step"], record["metrics"]["eval/reward_mean"]) for record in journal if "samples" in record
        ]
        assert client.list_artifacts(run.info.run_id)


def test_a_sample_of_a_trial(inline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = next((inline / "trials").iterdir()).name
    assert main(["sample", key[:8], "--n", "3", "--out", str(tmp_path), "--store", str(inline)]) == 0
    named = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert {path.name for path in named} >= {"base.png", "tuned.png", "side_by_side.png"}
    assert all(path.is_file() for path in named)
    for at in ("3", "best"):  # the checkpoint of the last step is the adapter that was saved
        out = tmp_path / at
        assert main(["sample", key, "--n", "3", "--out", str(out), "--store", str(inline), "--at", at]) == 0
        assert (out / "base.png").read_bytes() == (tmp_path / "base.png").read_bytes()
    assert (tmp_path / "3" / "tuned.png").read_bytes() == (tmp_path / "tuned.png").read_bytes()
    assert main(["sample", key, "--store", str(inline), "--at", "1"]) == 2
    assert "keeps checkpoints at 2, 3" in capsys.readouterr().err


METHOD = '''
"""The cross-entropy of nothing: pulls the adapter to zero, one step at a time."""
from dataclasses import dataclass

from workers.methods import check_config, clip_and_step, optimiser


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float

    def problems(self):
        return [] if self.lr > 0 else [f"method.lr={self.lr} is not above 0; write method.lr=1e-3"]


class Shrink:
    Config = Config

    def __init__(self, problem, config):
        self.problem, self.adam = problem, optimiser(problem, config.lr, 0.0)

    @staticmethod
    def check(spec):
        return check_config(Config, spec)

    def step(self):
        with self.problem.costs():
            reward = self.problem.score(self.problem.sample().y[-1]).mean()
            loss = sum(p.square().sum() for p in self.problem.model.parameters())
            loss.backward()
            norm = clip_and_step(self.adam, self.problem.model.parameters(), None)
        return {"train/reward_mean": reward.item(), "train/loss": loss.item(), "train/grad_norm": norm}

    def state_dict(self):
        return {"adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
'''
REWARD = '''
"""How blue a picture is."""


class Blue:
    differentiable = True

    def __init__(self, strength, device):
        self.strength = strength

    def __call__(self, images, prompts):
        return self.strength * images[:, 2].flatten(1).mean(1)
'''


def test_a_method_a_reward_and_a_prompt_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one YAML each; nothing else is touched, and the shipped method trains on them too."""
    code, conf, store = tmp_path / "code", tmp_path / "conf", tmp_path / "store"
    for path, text in {
        code / "shrink_method.py": METHOD,
        code / "blue_reward.py": REWARD,
        conf / "method" / "shrink.yaml": "_target_: shrink_method.Shrink\nname: shrink\nlr: 0.01\n",
        conf / "reward" / "blue.yaml": "_target_: blue_reward.Blue\nname: blue\nstrength: 2.0\n",
        conf / "prompts" / "mine.yaml": "pair: Two yellow dogs\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(code))
    chosen = ["method=shrink,pi_ft", "reward=blue", "prompts=mine", "prompt=pair", "tracking=none", f"store={store}"]
    assert main(["launch", "--conf", str(conf), "sweep=tiny", "executor=inline", *chosen]) == 0
    finals = {}
    for folder in (store / "trials").iterdir():
        spec, done = read_json(folder / "spec.json"), read_json(folder / "DONE.json")
        assert spec["prompt"] == "Two yellow dogs"
        finals[spec["method"]["name"]] = done["final"]["eval/kl_path_nats"]
    assert finals["shrink"] == 0.0
    assert finals["pi_ft"] > 0.0


def test_free_text_is_trained(tmp_path: Path) -> None:
    words = ["prompt='three blue cats on the moon'", "method=pi_ft", "tracking=none", f"store={tmp_path / 'store'}"]
    assert main(["launch", "sweep=tiny", "executor=inline", *words]) == 0
