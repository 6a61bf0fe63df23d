"""The grid: axes, exclusions, precedence, keys, Hydra's grammar, conf/ as shipped, and files of the user's own."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grid_parts
import pytest
from omegaconf import OmegaConf

from orchestrator import cli
from orchestrator.conf_tree import GROUPS, ConfTree, conf_dir
from orchestrator.errors import UserError
from orchestrator.grid import Plan, compose
from orchestrator.overrides import close, parse
from workers.spec import Evaluation, Lora, Sampler, SpecError, Train, TrialSpec

SHIPPED = conf_dir()
FILES = {
    "model/plain.yaml": "# @package _global_\nmodel: {_target_: grid_parts.Model, name: plain, path: here}\n"
    "sampler: {steps: 4}\n",
    "model/other.yaml": "_target_: grid_parts.Model\nname: other\npath: there\n",
    "reward/plain.yaml": "# @package _global_\nreward: {_target_: grid_parts.Reward, name: plain}\n"
    "judge: {_target_: grid_parts.Reward, name: held_out, path: null}\n",
    "method/climb.yaml": "_target_: grid_parts.Gradient\nname: climb\nlr: 0.5\nwarmup: 0\n",
    "method/search.yaml": "_target_: grid_parts.Search\nname: search\ntries: 3\n",
    "prompts/mine.yaml": "first: One thing\nsecond: Two things\n",
}
BASE = ["model=plain", "reward=plain", "method=climb", "prompts=mine", "prompt=first"]

Planner = Callable[..., Plan]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A conf folder of a user's own."""
    for name, content in FILES.items():
        write(tmp_path / "conf" / name, content)
    return tmp_path / "conf"


@pytest.fixture
def plan(conf: Path) -> Planner:
    """compose() on the components without weights; later arguments win."""
    return lambda *overrides: compose([*BASE, *overrides], [conf])


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def sweep(conf: Path, content: str) -> str:
    write(conf / "sweep" / "mine.yaml", content)
    return "sweep=mine"


def points(plan: Plan, *axes: str) -> list[tuple[Any, ...]]:
    return [tuple(cell.values[axis] for axis in axes) for cell in plan.cells]


def problems(overrides: list[str], conf: Path) -> str:
    with pytest.raises(UserError) as caught:
        compose([*BASE, *overrides], [conf])
    return str(caught.value)


# ---- axes


def test_without_a_sweep_there_is_one_cell(plan: Planner) -> None:
    found = plan()
    assert found.sweep == "single"
    assert points(found, "prompt", "beta", "method", "seed") == [("first", 0.01, "climb", 0)]
    assert found.axes == {"prompt": ["first"], "beta": [0.01], "method": ["climb"], "seed": [0]}


def test_comma_lists_make_axes_the_first_the_slowest(plan: Planner) -> None:
    found = plan("beta=0.5,1", "method=climb,search", "seed=range(0,2)")
    assert points(found, "beta", "method", "seed") == [
        (beta, method, seed) for beta in (0.5, 1.0) for method in ("climb", "search") for seed in (0, 1)
    ]
    assert found.axes == {"beta": [0.5, 1.0], "method": ["climb", "search"], "seed": [0, 1], "prompt": ["first"]}
    assert len({cell.key for cell in found.cells}) == 8


def test_a_sweep_file(plan: Planner, conf: Path) -> None:
    text = "axes: {prompt: [second, first], beta: [0.5, 2]}\nsettings: {train.gradient_steps: 7}\n"
    found = plan(sweep(conf, text))
    assert found.sweep == "mine"
    assert points(found, "prompt", "beta") == [
        ("first", 0.5),
        ("first", 2.0),
    ]  # BASE says prompt=first: it replaces the axis
    assert {cell.spec.train.gradient_steps for cell in found.cells} == {7}


def test_the_command_line_replaces_an_axis_and_adds_new_ones_behind(plan: Planner, conf: Path) -> None:
    found = plan(sweep(conf, "axes: {seed: [0, 1], beta: [0.5, 2]}\n"), "beta=3,4", "lora.rank=1,2", "seed=5")
    assert points(found, "seed", "beta", "lora.rank") == [(5, 3.0, 1), (5, 3.0, 2), (5, 4.0, 1), (5, 4.0, 2)]
    assert list(found.axes) == ["seed", "beta", "lora.rank", "prompt", "method"]
    assert [cell.label for cell in found.cells][1] == "climb beta=3 first s5 lora.rank=2"


def test_exclusions_are_partial_matches_and_may_list_values(plan: Planner, conf: Path) -> None:
    axes = "axes: {beta: [0.5, 1, 2], method: [climb, search], lora.rank: [1, 2]}\n"
    rules = "exclude:\n- {method: search, beta: [1, 2]}\n- {lora.rank: 2, beta: 0.5}\n- {prompt: second}\n"
    found = plan(sweep(conf, axes + rules), "method=climb,search")
    assert points(found, "beta", "method", "lora.rank") == [
        (0.5, "climb", 1), (0.5, "search", 1),
        (1.0, "climb", 1), (1.0, "climb", 2), (2.0, "climb", 1), (2.0, "climb", 2),
    ]  # fmt: skip


def test_an_exclusion_of_everything_is_an_error(conf: Path) -> None:
    assert "no cell left" in problems([sweep(conf, "axes: {beta: [1]}\nexclude: [{beta: 1}]\n")], conf)


def test_a_model_axis_brings_each_models_own_settings(plan: Planner) -> None:
    found = plan("model=plain,other")
    assert [(cell.values["model"], cell.spec.sampler.steps) for cell in found.cells] == [("plain", 4), ("other", 50)]


def test_an_axis_of_one_methods_setting_leaves_the_others_alone_once(plan: Planner) -> None:
    found = plan("method=climb,search", "method.lr=0.1,0.2", "beta=1,2")
    assert points(found, "method", "method.lr", "beta") == [
        ("climb", 0.1, 1.0), ("climb", 0.1, 2.0), ("climb", 0.2, 1.0), ("climb", 0.2, 2.0),
        ("search", None, 1.0), ("search", None, 2.0),
    ]  # fmt: skip
    assert found.axes["method.lr"] == [0.1, 0.2]


def test_a_list_valued_axis_has_text_labels(plan: Planner) -> None:
    found = plan("beta_schedule=constant,[1,2,3,4]")
    assert found.axes["beta_schedule"] == ["constant", "[1, 2, 3, 4]"]
    assert found.cells[1].spec.beta_schedule == (1, 2, 3, 4)


# ---- precedence


def test_precedence_rises_from_config_to_command_line(plan: Planner, conf: Path) -> None:
    def eval_every(*overrides: str) -> int:
        return plan(*overrides).cells[0].spec.eval.every

    assert (plan().cells[0].spec.sampler.steps, plan("model=other").cells[0].spec.sampler.steps) == (4, 50)
    one = "settings: {eval.every: 2, method: search}\n"
    two = one + "per_method: {climb: {eval.every: 3}, search: {eval.every: 4}}\n"
    three = two + "axes: {eval.every: [5]}\n"
    assert eval_every() == 50
    assert eval_every(sweep(conf, one)) == 2
    assert eval_every(sweep(conf, two)) == 3
    assert eval_every(sweep(conf, three)) == 5
    assert eval_every(sweep(conf, three), "eval.every=6") == 6


def test_per_method_reaches_its_method_only(plan: Planner, conf: Path) -> None:
    text = "axes: {method: [climb, search]}\n"
    text += "per_method: {climb: {method.lr: 9, train.trajectories: 5}, search: {method.tries: 8}}\n"
    (climb, search) = compose([*[o for o in BASE if "method" not in o], sweep(conf, text)], [conf]).cells
    assert (climb.spec.method["lr"], climb.spec.train.trajectories) == (9.0, 5)
    assert (search.spec.method["tries"], search.spec.train.trajectories) == (8, 10)


def test_a_sweep_may_choose_groups_and_the_command_line_wins(plan: Planner, conf: Path) -> None:
    text = sweep(conf, "settings: {executor: ray, resources: gpu, resources.gpu: 0.5}\n")
    assert plan(text).config["executor"]["name"] == "ray"
    assert plan(text).config["resources"] == {"cpu": 2, "gpu": 0.5, "threads": 2}
    assert plan(text, "executor=inline", "resources.gpu=1").config["executor"] == {"name": "inline"}
    assert plan("store=/data/ü", "retry_failed=true").config["store"] == "/data/ü"


def test_a_methods_setting_goes_to_the_methods_that_have_it(plan: Planner, conf: Path) -> None:
    (climb, search) = plan("method=climb,search", "method.lr=2").cells
    assert climb.spec.method["lr"] == 2.0 and "lr" not in search.spec.method
    assert "method.lr is not a setting of method=search; climb" in problems(["method=search", "method.lr=2"], conf)


def test_budget_and_limits_belong_to_the_sweep(plan: Planner, conf: Path) -> None:
    """Kills: settings of a sweep file that do not arrive, null refused where it means no limit."""
    assert plan().config["budget"] == {"hours": None, "trials": None, "deadline": None}
    text = sweep(conf, "settings: {budget.hours: 3, limits.deaths: 5, budget.deadline: 2026-12-01T08:00}\n")
    found = plan(text, "limits.kl_nats=null", "limits.reward_seconds=null", "limits.reward_retries=0").config
    assert found["budget"] == {"hours": 3, "trials": None, "deadline": "2026-12-01T08:00"}
    assert found["limits"] == {
        "kl_nats": None, "reward_seconds": None, "reward_retries": 0, "storage_seconds": 300, "deaths": 5,
    }  # fmt: skip
    assert plan(text, "budget.hours=null").config["budget"]["hours"] is None
    zone = "2026-12-01T08:00+01:00"
    assert plan(f"budget.deadline={zone}").config["budget"]["deadline"] == zone
    for text, value in (("null", None), ("true", True), ("false", False)):
        assert plan(f"tracking.required={text}").config["tracking"]["required"] is value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.hours=0", "budget.hours=0 is out of range"),
        ("budget.trials=1.5", "budget.trials=1.5 is not a whole number"),
        (
            "budget.deadline=soon",
            "budget.deadline='soon' is no time; write for example budget.deadline=2026-12-01T08:00",
        ),
        ("budget=5", "set one of them: budget.hours, budget.trials, budget.deadline"),
        ("budget.hours=1,2", "budget.hours cannot be an axis"),
        ("budget.hour=1", "did you mean budget.hours?"),
        ("limits.kl_nats=0", "limits.kl_nats=0 is out of range"),
        ("limits.kl_nats=much", "limits.kl_nats='much' is not a finite number (the path KL beyond which"),
        ("limits.reward_seconds=-1", "limits.reward_seconds=-1 is out of range"),
        ("limits.reward_retries=null", "limits.reward_retries=None is not a whole number"),
        ("limits.reward_retries=-1", "limits.reward_retries=-1 is out of range"),
        ("limits.storage_seconds=null", "limits.storage_seconds=None is not a finite number"),
        ("limits.deaths=0", "limits.deaths=0 is out of range"),
        ("limits.deaths=1,2", "limits.deaths cannot be an axis"),
        ("tracking.required=maybe", "tracking.required=maybe is neither true, false nor null"),
    ],
)
def test_a_bad_budget_or_limit_is_refused(conf: Path, override: str, words: str) -> None:
    assert words in problems([override], conf)


def test_problems_of_budget_and_limits_come_together(conf: Path) -> None:
    assert (
        len(problems(["budget.hours=0", "budget.trials=0", "limits.deaths=0", "limits.kl_nats=0"], conf).split("\n"))
        == 4
    )


def test_a_config_of_an_older_version_is_named(conf: Path) -> None:
    text = (SHIPPED / "config.yaml").read_text()
    start, end = text.index("limits:"), text.index("prompt: counting")
    write(conf / "config.yaml", text[:start] + text[end:])
    assert problems([], conf) == "conf/config.yaml lacks limits; take the shipped one as the example"


def test_the_sweep_can_be_renamed(plan: Planner, conf: Path) -> None:
    assert plan("sweep.name=second_try").sweep == "second_try"
    assert "names a folder" in problems(["sweep.name=../up"], conf)


# ---- prompts


def test_prompts_are_ids_texts_or_free(plan: Planner) -> None:
    found = plan("prompt=first,'Two things','A third thing, on the moon','a THIRD thing on the moon!',42")
    assert [(cell.spec.prompt_id, cell.spec.prompt) for cell in found.cells[:3]] == [
        ("first", "One thing"), ("second", "Two things"), ("a-third-thing-on-the-moon", "A third thing, on the moon")
    ]  # fmt: skip
    assert re.fullmatch(r"a-third-thing-on-the-moon-[0-9a-f]{6}", found.cells[3].spec.prompt_id)
    assert found.cells[4].spec.prompt == "42"


def test_a_prompt_like_an_id_is_taken_for_a_typing_error(plan: Planner, conf: Path) -> None:
    assert "did you mean first?" in problems(["prompt=frist"], conf)
    assert plan("prompt=frist.").cells[0].spec.prompt == "frist."


def test_a_comma_and_a_blank_in_an_unquoted_prompt_ask_back(conf: Path) -> None:
    assert "may be one text or several" in problems(["prompt=a dog, on the moon"], conf)


def test_a_prompt_file_may_hold_its_lines_under_prompts(plan: Planner, conf: Path) -> None:
    write(conf / "prompts" / "nested.yaml", "prompts:\n  third: Three things\n")
    assert plan("prompts=nested", "prompt=third").cells[0].spec.prompt == "Three things"


# ---- keys


def test_keys_ignore_what_does_not_decide_the_numbers(plan: Planner, conf: Path) -> None:
    key = plan().cells[0].key
    write(conf / "prompts" / "again.yaml", "renamed: One thing\n")
    for same in (
        ["train.checkpoint_every=3"], ["eval.every=3"], ["eval.pictures=2"], ["prompts=again", "prompt=renamed"],
        ["prompt='One thing'"], ["executor=ray"], ["resources=gpu"], ["store=elsewhere"], ["tracking.uri=http://h:1"],
        ["sweep.name=other"], ["beta=0.010"], ["sampler.eta=1"], ["lora.alpha=4"],
        ["method.lr=5e-1"], ["retry_failed=true"], ["budget.hours=2"], ["limits.kl_nats=null"], ["limits.deaths=9"],
        ["tracking.required=false"],
    ):  # fmt: skip
        assert plan(*same).cells[0].key == key, same


def test_keys_know_every_field_of_the_identity(plan: Planner) -> None:
    """Each leaf of the identity is changed in turn; no two of the results may have one key."""
    spec = plan().cells[0].spec
    changes: dict[str, Any] = {
        "prompt": "Two things", "beta": 0.02, "beta_schedule": "sigma_squared", "seed": 1,
        "model._target_": "grid_parts.Search", "model.name": "x", "model.path": "x", "model.fingerprint": "x",
        "reward._target_": "grid_parts.Search", "reward.name": "x", "judge._target_": "grid_parts.Search",
        "judge.name": "x", "judge.path": "x", "method._target_": "grid_parts.Search", "method.name": "x",
        "method.lr": 0.25, "method.warmup": 1, "sampler.steps": 5, "sampler.eta": 0.5, "sampler.guidance_scale": 2.0,
        "lora.rank": 5, "lora.alpha": 5.0, "lora.targets": "all", "train.gradient_steps": 5, "train.trajectories": 5,
        "train.micro_batch": 5, "eval.samples": 9, "regulariser": "chi_square", "initial_law": "gaussian",
    }  # fmt: skip
    assert set(leaf_names(spec.identity())) - {"schema"} == set(changes)
    changes |= {"train.lr_schedule": "linear", "beta_rate": 0.5, "regulariser_order": 0.5}  # idle at their defaults
    keys = {"": spec.key}
    for name, value in changes.items():
        content = copy.deepcopy(spec.to_dict())
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
        keys[name] = unchecked(content).key
    assert len(set(keys.values())) == len(keys), keys


def test_settings_that_decide_nothing_are_no_part_of_the_key() -> None:
    """Kills: regulariser_samples in the key of a kl trial, lora in that of a model without an adapter. (That adding a
    field leaves old keys alone is the test above: an identity has no other leaves.)"""
    assert compose([]).cells[0].key == compose(["regulariser_samples=512"]).cells[0].key
    exact = ["model=lq", "reward=quadratic", "method=algorithm_1"]
    assert compose(exact).cells[0].key == compose([*exact, "lora.rank=8"]).cells[0].key
    other = ["model=mixture", "reward=bounded", "regulariser=jensen_shannon", "beta=1"]
    assert compose(other).cells[0].key != compose([*other, "regulariser_samples=512"]).cells[0].key


def test_a_dotted_alias_is_the_setting_beside_beta() -> None:
    """On the command line and in sweep files; as an axis too."""
    exact = ["model=lq", "reward=quadratic", "method=algorithm_1"]
    found = compose([*exact, "beta.schedule=contraction", "beta.rate=0.3,0.5"])
    assert [cell.spec.beta_rate for cell in found.cells] == [0.3, 0.5] and list(found.axes)[0] == "beta_rate"
    assert {cell.spec.beta_schedule for cell in found.cells} == {"contraction"}


def unchecked(content: dict[str, Any]) -> TrialSpec:
    """A spec of any values, sensible or not."""
    groups = {"sampler": Sampler, "lora": Lora, "train": Train, "eval": Evaluation}
    return TrialSpec(**{name: groups[name](**value) if name in groups else value for name, value in content.items()})


def leaf_names(content: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in content.items():
        found += leaf_names(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


def test_weights_are_hashed_once_per_component(plan: Planner, conf: Path) -> None:
    grid_parts.FINGERPRINTED.clear()
    found = plan("beta=1,2,3", "model=plain,other")
    assert {cell.spec.model["fingerprint"] for cell in found.cells} == {"weights of here", "weights of there"}
    assert [settings["path"] for settings in grid_parts.FINGERPRINTED] == ["here", "there"]
    assert "fingerprint" not in found.cells[0].spec.reward
    assert "ends too early" in problems(["model.path=torn"], conf)


def test_checks_are_made_once_for_all_seeds(plan: Planner, monkeypatch: Any) -> None:
    """Kills: a check per cell, and one answer for cells that differ in more than the seed."""
    asked: list[tuple[float, int]] = []

    def check(spec: TrialSpec) -> list[str]:
        asked.append((spec.beta, spec.sampler.steps))
        return []

    monkeypatch.setattr(grid_parts.Model, "check", staticmethod(check))
    plan("seed=range(0,5)", "beta=1,2", "sampler.steps=6,7")
    assert sorted(asked) == [(1.0, 6), (1.0, 7), (2.0, 6), (2.0, 7)]


def test_a_check_that_fails_does_so_for_every_seed(conf: Path) -> None:
    """Kills: problems remembered as none."""
    content = compose(BASE, [conf]).cells[0].spec.to_dict()
    content["model"]["path"] = "nowhere"
    checked: dict[str, list[str]] = {}
    for seed in (0, 1):
        with pytest.raises(SpecError, match="model.path='nowhere' is not there"):
            TrialSpec.from_dict(content | {"seed": seed}, checked)
    assert len(problems(["seed=0,1", "model.path=nowhere"], conf).splitlines()) == 1


def test_a_spec_as_a_mapping_is_what_json_would_give_back(plan: Planner, conf: Path) -> None:
    """Kills: whole-number keys left as they are, tuples for lists, mappings shared with the spec or another cell."""
    write(
        conf / "method" / "odd.yaml", "_target_: grid_parts.Search\nname: odd\nat: {10: a, 2: b}\nlist: [1, {3: b}]\n"
    )
    first, second = plan("method=odd", "lora.targets=[to_q,to_k]", "seed=0,1").cells
    content = first.spec.to_dict()
    assert content == json.loads(json.dumps(dataclasses.asdict(first.spec), default=dict))
    assert content["method"]["list"] == [1, {"3": "b"}] and content["lora"]["targets"] == ["to_q", "to_k"]
    before = copy.deepcopy(second.spec.to_dict())
    content["method"]["at"]["10"] = content["sampler"]["steps"] = None
    assert second.spec.to_dict() == before and first.spec.key == TrialSpec.from_dict(first.spec.to_dict()).key


def test_references_are_followed_in_every_cell(plan: Planner, conf: Path) -> None:
    """Kills: one cell's value for all, a reference in a file or on the command line left as it is,
    one to the seed or in it answered for another seed."""
    linked = FILES["model/plain.yaml"].replace("{steps: 4}", "{eta: '${beta}'}").replace("name: plain", "name: linked")
    write(conf / "model" / "linked.yaml", linked)
    assert [cell.spec.sampler.eta for cell in plan("model=linked", "beta=0.5,1").cells] == [0.5, 1.0]
    found = plan("beta=0.25,0.5", "sampler.eta=${beta}").cells
    assert [cell.spec.sampler.eta for cell in found] == [0.25, 0.5]
    found = plan("seed=2,3", "lora.rank=4,5", "train.micro_batch=${lora.rank}").cells
    assert [(cell.spec.seed, cell.spec.train.micro_batch) for cell in found] == [(2, 4), (2, 5), (3, 4), (3, 5)]
    assert [cell.spec.lora.rank for cell in plan("seed=2,3", "lora.rank=${seed}").cells] == [2, 3]
    assert [cell.spec.seed for cell in plan("lora.rank=2,3", "seed=${lora.rank}").cells] == [2, 3]


def test_two_sweeps_share_their_equal_cells(plan: Planner, conf: Path) -> None:
    first, second = plan("beta=1,2"), plan(sweep(conf, "axes: {beta: [2, 3]}\n"))
    assert first.cells[1].key == second.cells[0].key


# ---- the plan as others read it


def test_a_plan_is_plain_json(plan: Planner) -> None:
    found = plan("method=climb,search", "method.lr=0.1,0.2", "beta_schedule=constant,[1,2,3,4]")
    row = json.loads(json.dumps(found.row(), allow_nan=False))
    assert set(row) == {"sweep", "axes", "cells", "specs", "overrides"}
    assert [cell["key"] for cell in row["cells"]] == list(row["specs"]) == [cell.key for cell in found.cells]
    assert {"key", "label", "prompt", "prompt_text", "beta", "method", "seed", "method.lr"} <= set(row["cells"][0])
    for key, spec in row["specs"].items():
        assert TrialSpec.from_dict(spec).key == key


def test_json_on_stdout_is_json_and_nothing_else(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--conf", str(conf), "plan", *BASE, "--json", "beta=1,2"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content["sweep"] == "single" and content["counts"] == {"new": 2}
    assert all(cell["state"] == "new" for cell in content["cells"])
    assert "a library that talks on stdout" in err


def test_conf_may_stand_before_or_behind_and_in_between(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(conf.parent / "more" / "prompts" / "mine.yaml", "third: Three things\n")
    more = str(conf.parent / "more")
    assert (
        cli.main(["--conf", str(conf), "plan", *BASE[:3], "--conf", more, "prompts=mine", "prompt=third", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["cells"][0]["prompt_text"] == "Three things"  # the last folder wins
    assert cli.main(["launch", "--dry-run", *BASE, "--conf", str(conf)]) == 0
    assert "pift launch --conf" in capsys.readouterr().out


# ---- the grammar


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("beta=0.1", (0.1,)),
        ("beta=1e-3,2", (1e-3, 2)),
        ("beta=choice(1,2)", (1, 2)),
        ("seed=range(3)", (0, 1, 2)),
        ("prompt='a, b','c=d'", ("a, b", "c=d")),
        ('prompt="a, b"', ("a, b",)),
        ("prompt=a dog", ("a dog",)),
        ("prompt=ein Hündchen", ("ein Hündchen",)),
        ("judge=null", (None,)),
        ("lora.targets=[to_q,'to_k']", (["to_q", "to_k"],)),
        ("store=/data/a b", ("/data/a b",)),
        ("model.path=C:\\models", ("C:\\models",)),
        ("prompt=", ("",)),
    ],
)
def test_hydras_grammar(argument: str, values: tuple[Any, ...]) -> None:
    (override,) = parse([argument]).values()
    assert override.values == values and override.swept == (len(values) > 1)


def test_the_later_of_two_overrides_counts() -> None:
    assert parse(["beta=1", "beta=2"])["beta"].values == (2,)


def test_names_nearest_to_a_typing_error() -> None:
    assert close("lr", ["method.lr", "lora.rank"]) == "; did you mean method.lr?"
    assert close("xyz", ["method.lr", "beta"]) == ""


# ---- files of the user's own


def test_a_third_method_reward_and_prompt_set_are_one_file_each(conf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One Python file and one YAML each, and no other edit."""
    write(tmp_path / "code" / "my_things.py", "class Method:\n    pass\nclass Reward:\n    differentiable = False\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    mine = tmp_path / "mine"
    write(mine / "method" / "newest.yaml", "_target_: my_things.Method\nname: newest\nstrength: 0.5\n")
    write(mine / "reward" / "taste.yaml", "_target_: my_things.Reward\nname: taste\n")
    write(mine / "prompts" / "walk.yaml", "walk: A dog on a walk\n")
    chosen = [
        "method=pi_ft,newest",
        "reward=taste",
        "prompts=walk",
        "prompt=walk",
        "model=plain",
        "method.estimator=score",
    ]
    found = compose([*chosen, "method.strength=2"], [conf, mine])
    assert [cell.label for cell in found.cells] == ["pi_ft beta=0.01 walk s0", "newest beta=0.01 walk s0"]
    assert found.cells[1].spec.method == {"_target_": "my_things.Method", "name": "newest", "strength": 2.0}
    assert found.cells[0].spec.reward["name"] == "taste" and found.cells[0].spec.prompt == "A dog on a walk"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("method/bad.yaml", "name: bad\n", "needs _target_"),
        ("method/bad.yaml", "_target_: grid_parts.Search\nname: other\n", "write name: bad"),
        ("method/bad.yaml", "method: {_target_: grid_parts.Search, name: bad}\n", "@package _global_"),
        ("method/bad.yaml", "_target_: [unclosed\n", "do not fit together"),
        ("method/bad.yaml", "_target_: grid_parts.Nobody\nname: bad\n", "cannot be imported"),
        ("method/bad.yaml", "defaults: [nothing_here]\nname: bad\n", "do not fit together"),
        ("sweep/bad.yaml", "axes: [beta]\n", "axes has the wrong form"),
        ("sweep/bad.yaml", "axes: {beta: 0.1}\n", "axes has the wrong form"),
        ("sweep/bad.yaml", "axes: {beta: []}\n", "the axis beta is empty"),
        ("sweep/bad.yaml", "axis: {beta: [1]}\n", "did you mean axes"),
        ("sweep/bad.yaml", "settings: {betta: 1}\n", "settings: betta is not a setting"),
        ("sweep/bad.yaml", "per_method: {clim: {method.lr: 1}}\n", "did you mean climb"),
        ("sweep/bad.yaml", "per_method: {climb: {method.tries: 1}}\n", "per_method climb: method.tries"),
        ("sweep/bad.yaml", "exclude: [{methode: climb}]\n", "did you mean method"),
        ("sweep/bad.yaml", "axes: {store: [a, b]}\n", "cannot be an axis"),
        ("sweep/bad.yaml", "{[", "cannot be read"),
        ("sweep/bad.yaml", "- beta\n", "is not a file of"),
        ("config.yaml", "beta: 1\n", "defaults list lacks"),
    ],
)
def test_a_bad_file_is_named(conf: Path, name: str, content: str, words: str) -> None:
    write(conf / name, content)
    group = name.partition("/")[0]
    message = problems([f"{group}=bad"] if group != "config.yaml" else [], conf)
    assert words in message
    assert "bad" in message or "config.yaml" in message or "grid_parts.Nobody" in message


# ---- what is shipped


COMPANIONS = {
    "model/lq": ["reward=quadratic"], "model/mixture": ["reward=quadratic"], "model/nearly_lq": ["reward=quadratic"],
    "reward/quadratic": ["model=lq"], "reward/bounded": ["model=mixture", "beta=1"],
    "method/algorithm_1": ["model=lq", "reward=quadratic"], "reward/compressibility": ["method.estimator=score"],
}  # fmt: skip
"""What a choice needs beside it: models without pictures and rewards of pictures do not go together, nor does a reward
without a gradient with the adjoint."""


def shipped() -> list[Path]:
    return sorted(SHIPPED.rglob("*.yaml"))


@pytest.mark.parametrize(
    "path", [p for p in shipped() if p.name != "config.yaml"], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_shipped_file_composes_and_plans(path: Path) -> None:
    group, name = path.parent.name, path.stem
    assert group in GROUPS
    found = compose([f"{group}={name}", *COMPANIONS.get(f"{group}/{name}", [])])
    assert found.cells
    if group == "sweep":
        assert found.sweep == name
    if group == "prompts":
        ids = OmegaConf.to_container(OmegaConf.load(path))
        assert len(compose([f"prompts={name}", f"prompt={','.join(map(str, ids))}"]).cells) == len(ids)


def test_every_shipped_file_opens_with_a_comment() -> None:
    for path in shipped():
        text = path.read_text().removeprefix("# @package _global_\n")
        assert text.startswith("# "), path
        assert path.parent.name != "sweep" or "pift launch" in text, path


SOURCE = re.compile(r"#.*\b(paper|official code|ours)\b")
NUMBER = re.compile(r"(?<![\w.-])-?\d+(\.\d*)?([eE][-+]?\d+)?(?![\w.-])")


def unsourced(text: str) -> list[str]:
    """The lines of a YAML file with a number in a value and no word, there or in the line above, where it is from."""
    lines = text.splitlines()
    found = []
    for above, line in zip(["", *lines], lines, strict=False):
        value, _, comment = line.partition("#")
        value = value.partition(":")[2] or value
        if (
            NUMBER.search(value)
            and not SOURCE.search(f"#{comment}")
            and not (above.lstrip().startswith("#") and SOURCE.search(above))
        ):
            found.append(line)
    return found


def test_every_number_says_where_it_comes_from() -> None:
    assert {str(path): lines for path in shipped() if (lines := unsourced(path.read_text()))} == {}


def test_the_search_for_unsourced_numbers_finds_them() -> None:
    text = "a: 1\nb: 2  # ours\n# paper: three\nc: 3\nd: [4, 5]\ne: {f: 6.5}\ng: 1e-4\nh: sd15\ni: fp32\nj: -7 # nice\n"
    assert unsourced(text) == ["a: 1", "d: [4, 5]", "e: {f: 6.5}", "g: 1e-4", "j: -7 # nice"]


def test_no_group_is_called_like_a_value() -> None:
    """Hydra takes `prompt=x` for a group choice as soon as there is a folder conf/prompt/."""
    values = {key for key, value in ConfTree().compose({}).items() if not isinstance(value, dict)}
    assert not values & {folder.name for folder in SHIPPED.iterdir()}


def test_the_command_line_and_conf_agree_on_the_store() -> None:
    assert compose([]).config["store"] == cli.STORE


def test_shipped_numbers_are_the_papers() -> None:
    """Where conf/ says paper or official code, the number is the one of mathematics.md sections 6 and 7."""
    config = OmegaConf.load(SHIPPED / "config.yaml")
    assert (config.beta, config.sampler.steps, config.train.trajectories, config.train.gradient_steps) == (
        0.01,
        50,
        10,
        1000,
    )
    pi_ft, dpok, official = (
        OmegaConf.load(SHIPPED / "method" / f"{name}.yaml") for name in ("pi_ft", "dpok", "dpok_official")
    )
    assert pi_ft.lr == 3e-4
    assert (dpok.lr, dpok.inner_steps, dpok.batch) == (1e-5, 10, 50)
    assert (official.lr, official.inner_steps, official.batch, official.buffer) == (1e-5, 5, 48, 1000)
    assert (official.max_grad_norm, official.value_lr, official.value_batch, official.value_steps) == (
        0.1,
        1e-4,
        256,
        5,
    )
    assert official.clip_nats == pytest.approx(1e-4 * 4 * 64 * 64)
    assert dict(ConfTree().compose({})["prompts"]) == {
        "color": "A green colored rabbit", "composition": "A cat and a dog",
        "counting": "Four wolves in the park", "location": "A dog on the moon",
    }  # fmt: skip


def test_the_shipped_sweeps_are_what_they_are_called() -> None:
    quick, four, tiny = (compose([f"sweep={name}"]) for name in ("quickstart", "four_prompts", "tiny"))
    assert (len(quick.cells), len(four.cells), len(tiny.cells)) == (6, 16, 2)
    assert len(quick.axes["beta"]) >= 3 and quick.axes["method"] == ["pi_ft", "dpok"] and len(quick.axes["prompt"]) == 1
    assert four.axes["prompt"] == ["color", "composition", "counting", "location"]
    assert tiny.cells[0].spec.train.gradient_steps == 3
