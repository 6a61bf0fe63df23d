"""The order of launches, speeds from finished trials, hours left, and budgets."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_spec
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import schedule
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.schedule import Budget, Speed, Speeds, Work, arm, estimate, order, slots
from workers.store import record_text, sound_record

# ---- the order

SIZES = st.integers(1, 4)


@st.composite
def grids(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The rows of a grid with its axes in any order and any of its cells excluded."""
    axes = {
        "prompt": [f"p{i}" for i in range(draw(SIZES))],
        "seed": [7 * i % 5 for i in range(draw(SIZES))],
        "method": [f"m{i}" for i in range(draw(SIZES))],
        "lora.rank": [1, True, None][: draw(st.integers(1, 3))],
    }
    names = draw(st.permutations(list(axes)))
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[name] for name in names))]
    kept = draw(st.lists(st.booleans(), min_size=len(points), max_size=len(points)))
    rows = [point for point, keep in zip(points, kept, strict=True) if keep]
    return [{"key": str(i), "label": f"cell {i}", "prompt_text": "", **row} for i, row in enumerate(rows)]


def block(cell: Any) -> tuple[Any, Any]:
    return cell["seed"], cell["prompt"]


@given(grids())
def test_any_prefix_has_given_every_arm_as_much(cells: list[dict[str, Any]]) -> None:
    """Kills: arm after arm, a turn that skips an arm with cells left, an order that loses or doubles a cell."""
    ordered = order(cells)
    assert sorted(cell["key"] for cell in ordered) == sorted(cell["key"] for cell in cells)
    left, given_to = Counter(map(arm, cells)), Counter[tuple[str, ...]]()
    for cell in ordered:
        given_to[arm(cell)] += 1
        left[arm(cell)] -= 1
        most = max(given_to.values())
        assert all(given_to[name] >= most - 1 for name in left if left[name])


@given(grids())
def test_the_arms_see_the_blocks_in_one_sequence_seed_by_seed(cells: list[dict[str, Any]]) -> None:
    """Kills: prompt-major blocks, blocks sorted by value instead of as the grid has them, an order per arm."""
    seeds, prompts = ([*dict.fromkeys(cell[name] for cell in cells)] for name in ("seed", "prompt"))
    sequence = list(itertools.product(seeds, prompts))
    ordered = order(cells)
    for name in set(map(arm, cells)):
        places = [sequence.index(block(cell)) for cell in ordered if arm(cell) == name]
        assert places == sorted(places)


def test_the_order_of_a_small_grid() -> None:
    """Kills: the same by keys, seeds sorted downwards, an arm that is a prompt."""
    points = itertools.product([0, 1], ["a", "b"], ["x", "y"])  # seed, method, prompt
    cells = [{"key": f"{m}{s}{p}", "seed": s, "method": m, "prompt": p} for s, m, p in points]
    assert [cell["key"] for cell in order(cells)] == ["a0x", "b0x", "a0y", "b0y", "a1x", "b1x", "a1y", "b1y"]


def test_ten_thousand_cells_are_ordered_at_once() -> None:
    """Kills: a search in a list for every cell."""
    points = itertools.product(range(1250), ["x", "y"], [0.1, 1.0], ["a", "b"])
    cells = [{"key": str(i), "seed": s, "prompt": p, "beta": b, "method": m} for i, (s, p, b, m) in enumerate(points)]
    begun = time.process_time()
    assert len(order(cells)) == 10_000
    assert time.process_time() - begun < 2


# ---- speeds


def finished(store: Store, key: str, seconds: float, *, steps: int = 10, device: str = "cpu", **more: Any) -> None:
    """A finished trial with a spec.json that `more` changes: method=, finished_at=, method.lr=, ..."""
    method, at = more.pop("method", "pi_ft"), more.pop("finished_at", 0.0)
    folder = store.trial(key)
    folder.root.mkdir(parents=True)
    folder.spec.write_text(json.dumps(spec(method, **more)))
    speed = seconds / steps if steps else None
    done = {"key": key, "seconds_per_step": speed, "device": device, "finished_at": at, "files": {}}
    folder.done.write_text(record_text(done))


def spec(method: str = "pi_ft", **changes: Any) -> dict[str, Any]:
    sizes = {"steps": 10, "every": 5, "samples": 4, "pictures": 2}
    found = copy.deepcopy(fake_spec(("p", "a cat"), method, 0.1, 0, {}, **sizes))
    for name, value in changes.items():
        group, _, setting = name.rpartition("__")
        (found[group] if group else found)[setting] = value
    return found


def seconds(speeds: Speeds, of: dict[str, Any], device: str = "cpu") -> float | None:
    found = speeds.of(of, device)
    return found and found.seconds


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_speed_is_the_median_per_step(store: Store) -> None:
    """Kills: the mean, seconds of whole trials, trials of two devices thrown together."""
    for key, total in (("a", 10.0), ("b", 30.0), ("c", 800.0)):
        finished(store, key, total)
    finished(store, "d", 1.0, device="cuda")
    found = Speeds.measured(store, {})
    assert found.of(spec(), "cpu") == Speed(3.0, 3, True)
    assert found.of(spec(), "cuda") == Speed(0.1, 1, True)


SAME = ({"method__lr": 9.0}, {"beta": 5.0}, {"seed": 3}, {"prompt": "a dog"}, {"method__max_grad_norm": 2.0})
OTHER = (
    {"method__inner_steps": 3}, {"sampler__steps": 50}, {"lora__rank": 8}, {"train__micro_batch": 5},
    {"train__trajectories": 20}, {"eval__every": 1}, {"eval__samples": 9}, {"regulariser": "chi_square"},
    {"initial_law": "gaussian"}, {"model__dtype": "fp16"}, {"reward__name": "other"}, {"judge": None},
    {"model__gradient_checkpointing": True}, {"model__channels_last": True}, {"model__offload": True},
    {"reward__dtype": "bf16"}, {"judge__dtype": "bf16"},
)  # fmt: skip


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_costs_nothing_is_not_looked_at(store: Store, change: dict[str, Any]) -> None:
    finished(store, "a", 10.0)
    found = Speeds.measured(store, {}).of(spec(**change), "cpu")
    assert found is not None and found.exact


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_what_costs_time_makes_another_class(store: Store, change: dict[str, Any]) -> None:
    """Kills: each of these left out of the class. The trial of the method and model stands in, and says so."""
    finished(store, "a", 10.0)
    finished(store, "b", 70.0, **change)
    found = Speeds.measured(store, {})
    assert (seconds(found, spec()), seconds(found, spec(**change))) == (1.0, 7.0)
    only = Speeds({}, found.like).of(spec(**change), "cpu")
    assert only == Speed(4.0, 2, False)


def test_the_devices_that_count_are_asked_for(store: Store) -> None:
    """Kills: the filter unused, a device without a name left out when all count."""
    finished(store, "a", 10.0, device="cuda")
    finished(store, "b", 70.0, device="cuda")
    done = store.trial("b").done
    done.write_text(record_text({**sound_record(done), "device_name": "NVIDIA T4"}))
    assert seconds(Speeds.measured(store, {}), spec(), "cuda") == 4.0
    assert seconds(Speeds.measured(store, {}, lambda name: name == "NVIDIA T4"), spec(), "cuda") == 7.0


def test_what_was_never_measured_is_not_known(store: Store) -> None:
    """Kills: another method's speed, another device's, 0 for nothing."""
    assert Speeds.measured(store, {}).of(spec(), "cpu") is None
    finished(store, "a", 10.0)
    found = Speeds.measured(store, {})
    assert found.of(spec("dpok"), "cpu") is None and found.of(spec(), "cuda") is None


def test_results_without_a_duration_count_for_nothing(store: Store) -> None:
    """Kills: 0 seconds as a speed, and none at all (an attempt that only had to finish)."""
    for key, total, steps in (("a", 0.0, 10), ("b", 5.0, 0), ("c", 5.0, 10)):
        finished(store, key, total, steps=steps)
    store.trial("c").done.write_text("{half a fi")
    finished(store, "d", 20.0)
    store.trial("d").spec.unlink()
    assert Speeds.measured(store, {}) == Speeds()


def test_specs_at_hand_are_not_read_and_of_the_others_the_newest_are(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: the oldest first, no bound on what is read, the bound on the specs at hand."""
    monkeypatch.setattr(schedule, "MOST_SPECS", 2)
    for number in range(5):
        finished(store, str(number), 10.0 * (number + 1), finished_at=float(number))
    assert Speeds.measured(store, {}).of(spec(), "cpu") == Speed(4.5, 2, True)
    for number in range(5):
        store.trial(str(number)).spec.unlink()
    specs = {str(number): spec() for number in range(5)}
    assert Speeds.measured(store, specs).of(spec(), "cpu") == Speed(3.0, 5, True)


# ---- hours


def work(key: str, method: str, steps: int, cost: float | None, begun: bool = False) -> Work:
    return Work(key, method, steps, None if cost is None else Speed(cost, 1, True), begun)


def test_hours_per_method_and_on_the_clock() -> None:
    """Kills: the sum divided by the slots (7/3 h here), unknown cells counted as measured, seconds for hours."""
    pieces = [work("a", "x", 3600, 1.0), work("b", "y", 3600, 2.0), work("c", "x", 3600, 4.0), work("d", "z", 9, None)]
    found = estimate(pieces, 3)
    assert (found.hours, found.wall_hours, found.unknown) == (7.0, 4.0, 1)
    assert {name: (share.cells, share.unknown, share.hours) for name, share in found.methods.items()} == {
        "x": (2, 0, 5.0), "y": (1, 0, 2.0), "z": (1, 1, 0.0),
    }  # fmt: skip
    assert [speed.seconds for speed in found.methods["x"].speeds] == [1.0, 4.0]
    assert estimate(pieces, 1).wall_hours == 7.0
    assert estimate(pieces, 2).wall_hours == 5.0  # the third starts when the first ends
    assert estimate(pieces, None).wall_hours is None


@pytest.mark.parametrize(
    ("executor", "resources", "expected"),
    [
        ({"name": "inline"}, {"cpu": 1, "gpu": 1}, 1),
        ({"name": "ray", "address": None, "cpus": 8}, {"cpu": 2, "gpu": 0}, 4),
        ({"name": "ray", "address": None, "cpus": 8}, {"cpu": 0.5, "gpu": 0}, 16),
        ({"name": "ray", "address": None, "cpus": 1}, {"cpu": 2, "gpu": 0}, 1),
        ({"name": "ray", "address": None, "cpus": 8}, {"cpu": 1, "gpu": 0.5}, None),
        ({"name": "ray", "address": "auto", "cpus": None}, {"cpu": 1, "gpu": 0}, None),
        ({"name": "ray", "address": None, "cpus": 8}, {"cpu": 0, "gpu": 0}, None),
    ],
)
def test_slots_are_known_where_one_machine_decides(executor: Any, resources: Any, expected: int | None) -> None:
    """Kills: a cluster or its GPUs guessed from this machine's CPUs."""
    assert slots({"executor": executor, "resources": resources}) == expected


# ---- budgets

NOW = 1_800_000_000.0


def deadline(hours: float) -> datetime:
    return datetime.fromtimestamp(NOW, UTC) + timedelta(hours=hours)


def test_a_budget_is_read_from_conf() -> None:
    """Kills: a deadline without a zone taken for UTC, trials as a real number."""
    assert not Budget.of({"hours": None, "trials": None, "deadline": None})
    found = Budget.of({"hours": 2, "trials": 3, "deadline": "2026-12-01T08:00"})
    assert (found.hours, found.trials, found.deadline) == (2, 3, datetime(2026, 12, 1, 8).astimezone())
    zoned = Budget.of({"deadline": "2026-12-01T08:00+05:00"}).deadline
    assert zoned == datetime(2026, 12, 1, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hours": 0}, "budget.hours=0 is out of range"),
        ({"hours": -1.0}, "budget.hours=-1.0 is out of range"),
        ({"hours": "8h"}, "budget.hours='8h' is not a finite number"),
        ({"trials": 0}, "budget.trials=0 is out of range"),
        ({"trials": 1.5}, "budget.trials=1.5 is not a whole number"),
        ({"trials": True}, "budget.trials=True is not a whole number"),
        ({"deadline": "tomorrow"}, "budget.deadline='tomorrow' is no time; write for example budget.deadline=2026-"),
        ({"deadline": 5}, "budget.deadline=5 is no time"),
    ],
)
def test_a_bad_budget_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        Budget.of(settings)
    assert words in str(caught.value)


def test_a_deadline_that_has_passed_starts_nothing() -> None:
    """Kills: the comparison turned round, one without a deadline refused."""
    Budget(deadline=deadline(1)).check_deadline(NOW)
    Budget(hours=1).check_deadline(NOW)
    with pytest.raises(UserError, match="budget.deadline=.* has passed; write a later one"):
        Budget(deadline=deadline(-1)).check_deadline(NOW)


def test_what_is_left_never_falls_below_nothing() -> None:
    """Kills: hours as seconds, negative rests, 0 for no bound."""
    budget = Budget(2.0, 5, deadline(0.5))
    assert budget.left(1800, 2, NOW) == schedule.Left(5400.0, 3, 1800.0)
    assert budget.left(9e9, 9, NOW + 9e9) == schedule.Left(0.0, 0, 0.0)
    assert Budget().left(9e9, 9, NOW) == schedule.Left(None, None, None)


def test_hours_and_deadline_stop_trials_at_work_and_a_number_of_trials_does_not() -> None:
    """Kills: >= for > at the bound, a full number of trials that stops the last one."""
    budget = Budget(1.0, 1, deadline(1))
    assert budget.reached(3599.0, NOW) is None
    assert "budget.hours=1 are used up; for more: budget.hours=2" in str(budget.reached(3600.0, NOW))
    assert "budget.deadline" in str(budget.reached(0.0, NOW + 3600))
    assert Budget().reached(9e9, 9e9) is None


PIECES = [
    work("a", "x", 1, 1800.0), work("b", "y", 1, None), work("c", "x", 1, 1800.0, begun=True),
    work("d", "y", 1, 1801.0), work("e", "x", 1, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "used", "started", "expected"),
    [
        (Budget(), 9e9, 99, "abcde"),
        (Budget(hours=1), 0, 1, "abc"),  # d does not fit, and e, which would, waits behind it
        (Budget(hours=1), 1, 1, "ab"),
        (Budget(hours=1.6), 0, 1, "abcde"),
        (Budget(hours=1), 3600, 1, ""),  # not even what is of unknown length
        (Budget(trials=2), 0, 1, "ac"),  # one new one, and the one begun before
        (Budget(trials=1), 9e9, 1, "c"),
        (Budget(trials=3, hours=1), 0, 1, "abc"),
        (Budget(trials=1, hours=0.5), 0, 1, "c"),  # what may not start uses no hours
        (Budget(deadline=deadline(1)), 0, 1, "abcde"),
        (Budget(deadline=deadline(0)), 0, 1, ""),
    ],
)
def test_which_cells_fit(budget: Budget, used: float, started: int, expected: str) -> None:
    """Kills: a later small cell let past a large one, a trial begun before that takes a new place, unknown lengths
    that keep cells out, hours taken by cells that have no place."""
    assert budget.admits(PIECES, used, started, NOW) == set(expected)
