"""What a trial survives and how it ends otherwise: rewards that raise, hang or return nonsense, memory and disks that
are full, a device that is broken, a control that runs away. Each ends in its class, with the message a user needs.

Real trials on a linear-quadratic problem (tests/quick_trial.py). With 8 steps, evaluated at 0, 4 and 8, the reward's
calls are: 1 at step 0, 2 to 5, 6 the evaluation of step 4, 7 to 10, 11 the evaluation of step 8.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator import ledger
from tests import quick_trial as quick
from workers import guard as guards
from workers import run as runs
from workers.checkpoint import listed
from workers.guard import Guard, Limits, RewardFailed
from workers.lease import Folder, newest
from workers.methods import NotFinite
from workers.recorder import Journal, scan
from workers.rollout import trusting
from workers.run import Outcome, run_trial
from workers.store import TrialFolder, forgive, read_record, sound_picture

TIMED = {"reward_seconds": 60.0}
"""With a bound in time a reward is called in a thread of its own, as a launch does it."""
CALLS = 11


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guards, "PAUSE_SECONDS", 0.002)
    quick.behave()
    yield
    quick.behave()


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    return TrialFolder(tmp_path / "trial")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrialFolder:
    """The trial of `quick.spec()`, its reward called with no guard at all."""
    quick.behave()
    folder = TrialFolder(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Guard", Trusting)
        assert run_trial(quick.spec(), folder.root).state == "done"
    assert quick.Reward.calls == CALLS
    return folder


class Trusting:
    def __init__(self, *_: object) -> None:
        self.close = lambda: None

    __call__ = staticmethod(trusting)


def failure(folder: TrialFolder) -> dict[str, Any]:
    found = read_record(folder.failed)
    assert found is not None and "Traceback" in found["traceback"]
    return found


def hows(folder: TrialFolder) -> list[Any]:
    return [record.get("how") for record in quick.records_of(folder)]


# --------------------------------------------------------------------------------------------------- rewards that raise


def every_seventh(call: int, values: Tensor) -> Tensor:
    if call % 7 == 0:
        raise ConnectionError("the reward server hung up")
    return values


@pytest.mark.parametrize("limits", [{}, TIMED], ids=["called", "in a thread"])
def test_a_reward_that_raises_every_seventh_call(
    folder: TrialFolder, undisturbed: TrialFolder, limits: dict[str, Any]
) -> None:
    """Is called again and changes no bit. Kills: a repetition that counts as a query, draws noise or is not told."""
    quick.behave(every_seventh)
    assert run_trial(quick.spec(), folder.root, limits=limits) == Outcome("done", 8)
    quick.assert_same(undisturbed, folder)
    assert quick.Reward.calls == CALLS + 1
    told = "step 4: reward=quick raised ConnectionError: the reward server hung up; called again"
    assert read_record(folder.done)["warnings"] == [told]
    assert quick.records_of(folder)[0]["warnings"] == [told] and hows(folder) == ["done"]


def test_a_reward_that_always_raises(folder: TrialFolder) -> None:
    """Kills: a failure of an unknown class; a count that is off by one; a reason that is lost."""

    def broken(call: int, values: Tensor) -> Tensor:
        if call > 3:
            raise ConnectionError("no route to the reward server")
        return values

    quick.behave(broken)
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    message = (
        "reward=quick raised ConnectionError: no route to the reward server 5 times in a row; mend it, then pift retry"
    )
    assert outcome == Outcome("failed", 2, message, "reward") and quick.Reward.calls == 3 + 5
    found = failure(folder)
    assert (found["class"], found["step"], found["message"]) == ("reward", 2, message)
    assert "no route to the reward server" in found["traceback"] and hows(folder) == ["reward"]
    assert [record["step"] for record in quick.timeless(folder.journal)] == [0, 1, 2]


def test_a_reward_that_would_end_the_process(folder: TrialFolder) -> None:
    """Kills: a launch that ends with the reward's own exit code, 0 perhaps, in the middle of the sweep."""
    quick.behave(lambda call, values: sys.exit(0))
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    assert (outcome.state, outcome.kind) == ("failed", "reward")
    assert "raised RuntimeError: it would end this process (SystemExit: 0) 5 times in a row" in outcome.message


@pytest.mark.parametrize(("failures", "pauses"), [(0, []), (1, [0.5]), (4, [0.5, 1.0, 2.0, 4.0])])
def test_pauses_between_repetitions_double(monkeypatch: pytest.MonkeyPatch, failures: int, pauses: list[float]) -> None:
    """Kills: no pause; a pause after the last one; repetitions that are not told, each with its reason."""
    slept: list[float] = []
    told: list[str] = []
    monkeypatch.setattr(guards, "PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(guards.time, "sleep", slept.append)
    calls = iter(range(10))

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if (call := next(calls)) < failures:
            raise OSError(f"failure {call}")
        return images[:, 0]

    assert Guard(Limits(), told.append)("r", reward, torch.ones(2, 1), ["", ""]).tolist() == [1.0, 1.0]
    assert slept == pauses
    assert told == [f"r raised OSError: failure {call}; called again" for call in range(failures)]


@pytest.mark.parametrize(("retries", "ending"), [(0, "and limits.reward_retries=0"), (2, "3 times in a row")])
def test_the_count_of_calls_is_in_the_message(retries: int, ending: str) -> None:
    calls: list[int] = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(RewardFailed, match=f"r raised ValueError: no {ending}") as caught:
        Guard(Limits(reward_retries=retries))("r", reward, torch.ones(2, 1), ["", ""])
    assert len(calls) == retries + 1 and isinstance(caught.value.__cause__, ValueError)


# --------------------------------------------------------------------------------------------- what a reward returns


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a column": (lambda values: values[:, None], "shape (4, 1) of torch.float64"),
    "a mean": (lambda values: values.mean(), "shape () of torch.float64"),
    "one too few": (lambda values: values[1:], "shape (3,) of torch.float64"),
    "integers": (lambda values: values.long(), "shape (4,) of torch.int64"),
    "booleans": (lambda values: values > 0, "shape (4,) of torch.bool"),
    "complex numbers": (lambda values: values + 0j, "shape (4,) of torch.complex128"),
    "a float": (lambda values: float(values.mean()), "<class 'float'>"),
    "a list": (lambda values: values.tolist(), "<class 'list'>"),
    "nothing": (lambda values: None, "<class 'NoneType'>"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_but_a_number_each_is_refused_at_once(folder: TrialFolder, case: str) -> None:
    """At step 0, called once, with what came and what should have. Kills: a shape that is broadcast into a wrong mean
    (B, 1); a repetition of what cannot get better."""
    wrong, got = WRONG[case]
    quick.behave(lambda call, values: wrong(values.detach()))
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    assert (outcome.state, outcome.kind, outcome.step) == ("failed", "reward", 0)
    assert outcome.message == (
        f"reward=quick returned {got} for 4 pictures; it must return one real number each: a tensor of shape (4,)"
    )
    assert quick.Reward.calls == 1 and failure(folder)["class"] == "reward"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("call", "step", "count"), [(1, 0, 4), (5, 3, 8), (6, 3, 4)])
def test_a_reward_that_is_not_finite_has_diverged(
    folder: TrialFolder, value: float, call: int, step: int, count: int
) -> None:
    """In an evaluation as in training, and it says which picture. Kills: only nan looked for; a bug instead of a
    divergence; a step journaled with the bad number; a repetition."""

    def act(number: int, values: Tensor) -> Tensor:
        bad = torch.zeros_like(values)
        bad[[1, 3]] = value
        return values + bad if number == call else values

    quick.behave(act)
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    message = f"the reward is not finite: reward=quick gave {value} for picture 1 of {count} (2 such), prompt 'none'"
    assert outcome == Outcome("diverged", step, message, "diverged") and quick.Reward.calls == call
    assert (failure(folder)["class"], failure(folder)["step"]) == ("diverged", step)
    assert [record["step"] for record in quick.timeless(folder.journal)] == list(range(step + (call > 1)))
    assert ledger.state(folder) == "diverged"


def test_a_gradient_flows_through_a_guarded_call() -> None:
    """Equal bits, in the caller's mode of gradients. Kills: values detached; a thread that has gradients on where the
    caller has them off, or the other way round."""
    images, seen = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
        return (images**3).sin().sum(1)

    guard = Guard(Limits(**TIMED))
    grads = []
    for call in (guard, trusting):
        leaf = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call("r", reward, leaf, [""] * 5).sum(), leaf)
        grads.append(grad)
    assert torch.equal(*grads)
    with torch.no_grad():
        assert not guard("r", reward, leaf, [""] * 5).requires_grad
    assert seen == [(mode, torch.get_num_threads()) for mode in (True, True, False)]
    guard.close()


@pytest.mark.parametrize("changes", [{}, {"method__estimator": "score"}], ids=["pathwise", "score"])
def test_a_guarded_trial_is_the_unguarded_one(
    folder: TrialFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Kills: a call in a thread with other sums (threads, modes, types), in whichever estimator."""
    assert run_trial(quick.spec(**changes), folder.root, limits=TIMED).state == "done"
    monkeypatch.setattr(runs, "Guard", Trusting)
    other = TrialFolder(tmp_path / "other")
    assert run_trial(quick.spec(**changes), other.root).state == "done"
    quick.assert_same(other, folder)


def test_the_thread_ends_with_the_trial(folder: TrialFolder) -> None:
    """Kills: a thread left behind by each of a sweep's trials."""
    assert run_trial(quick.spec(), folder.root, limits=TIMED).state == "done"
    deadline = time.monotonic() + 5
    while any(thread.name == "reward" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------- rewards that hang


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    """Set at the end, so that what hung does not hang on beside the other tests."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("how", ["asleep", "busy"])
def test_a_reward_that_hangs(
    folder: TrialFolder, undisturbed: TrialFolder, tmp_path: Path, request: Any, let_go: threading.Event, how: str
) -> None:
    """The trial ends within the limit, names the place, and this process goes on to the next trial. Kills: a wait
    without an end; the next trial's calls in the thread that hangs; a message that leaves the user to guess."""

    released: list[bool] = []
    request.addfinalizer(lambda: released.append(True))

    def asleep(call: int, values: Tensor) -> Tensor:
        while call == 5 and not let_go.is_set():
            time.sleep(0.05)
        return values

    def busy(call: int, values: Tensor) -> Tensor:
        while call == 5 and not released:
            pass
        return values

    quick.behave({"asleep": asleep, "busy": busy}[how])
    began = time.monotonic()
    outcome = run_trial(quick.spec(), folder.root, limits={"reward_seconds": 0.3})
    assert time.monotonic() - began < 5
    assert (outcome.state, outcome.kind, outcome.step) == ("failed", "reward", 3)
    assert "reward=quick did not return within limits.reward_seconds=0.3; it hangs at " in outcome.message
    assert f"{Path(__file__).name}:" in outcome.message and outcome.message.endswith(f" in {how}")
    assert failure(folder)["class"] == "reward" and hows(folder) == ["reward"]
    other = TrialFolder(tmp_path / "next")
    assert run_trial(quick.spec(), other.root, limits=TIMED) == Outcome("done", 8)  # beside the one that hangs
    quick.assert_same(undisturbed, other)
    let_go.set()
    released.append(True)
    assert run_trial(quick.spec(), folder.root, limits=TIMED) == Outcome("done", 8)
    quick.assert_same(undisturbed, folder)


def test_a_guard_is_of_use_after_a_call_that_hung(let_go: threading.Event) -> None:
    guard = Guard(Limits(reward_seconds=0.1))
    with pytest.raises(RewardFailed, match="test_guard.py:[0-9]+ in <lambda>"):
        guard("r", lambda images, prompts: let_go.wait(), torch.ones(1, 1), [""])
    assert guard("r", lambda images, prompts: images[:, 0], torch.ones(1, 1), [""]).tolist() == [1.0]
    guard.close()


# --------------------------------------------------------------------------------------------------- out of memory


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")


def cpu_memory() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")


def fits(largest: int, error: Callable[[], Exception] = out_of_memory, start: int = 1) -> Any:
    """A reward for which more than `largest` pictures at once are too many, from the call `start` on."""

    def act(call: int, values: Tensor) -> Tensor:
        if call >= start and len(values) > largest:
            raise error()
        return values

    return act


@pytest.mark.parametrize("error", [out_of_memory, cpu_memory, MemoryError])
def test_out_of_memory_is_tried_once_more_with_half(
    folder: TrialFolder, undisturbed: TrialFolder, error: Callable[[], Exception]
) -> None:
    """The same effective batch: as many queries and transitions, the same numbers but for rounding. Marked in the
    attempt and in DONE.json. Kills: half the batch; a repetition of the reward as if it had failed; no mark."""
    quick.behave(fits(4, error))
    assert run_trial(quick.spec(), folder.root, limits=TIMED) == Outcome("done", 8)
    assert hows(folder) == ["out_of_memory", "done"]
    first, second = quick.records_of(folder)
    assert "micro_batch" not in first and second["micro_batch"] == 4 and "train.micro_batch=8" in first["message"]
    assert read_record(folder.done)["micro_batch"] == 4 and not folder.failed.exists()
    assert "micro_batch" not in read_record(undisturbed.done)
    for found, expected in zip(quick.timeless(folder.journal), quick.timeless(undisturbed.journal), strict=True):
        for name, value in expected["metrics"].items():
            close = value if name.startswith("budget/") else pytest.approx(value, rel=1e-9, abs=1e-12)
            assert found["metrics"][name] == close, name


def test_out_of_memory_twice_is_a_failure(folder: TrialFolder) -> None:
    """Kills: halving without an end; a message that says nothing of what to lower. A retry goes on halving."""
    quick.behave(fits(2))
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    assert (outcome.state, outcome.kind) == ("failed", "out_of_memory")
    assert outcome.message == (
        "out of memory with train.micro_batch=4 too: CUDA out of memory. Tried to allocate 2.00 GiB.; lower "
        "train.trajectories, sampler.steps or the number of trials on one GPU (resources.gpu), then pift retry"
    )
    assert hows(folder) == ["out_of_memory"] * 2 and failure(folder)["class"] == "out_of_memory"
    forgive(folder)
    assert run_trial(quick.spec(), folder.root, limits=TIMED).state == "done"
    assert [record.get("micro_batch") for record in quick.records_of(folder)] == [None, 4, 2]
    assert read_record(folder.done)["micro_batch"] == 2


def test_a_batch_of_one_cannot_be_halved(folder: TrialFolder) -> None:
    quick.behave(fits(0))
    outcome = run_trial(quick.spec(train__micro_batch=1), folder.root, limits=TIMED)
    assert outcome.state == "failed" and "train.micro_batch=1 too" in outcome.message
    assert hows(folder) == ["out_of_memory"]


def test_a_trial_that_was_killed_keeps_its_half(folder: TrialFolder) -> None:
    """Kills: an attempt after the one that halved that begins with the whole again (and a second out of memory would
    be final); one that halves again."""
    quick.behave(fits(4, start=5))
    calls = iter(range(100))

    def die() -> bool:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_trial(quick.spec(), folder.root, limits=TIMED, should_stop=die)
    assert hows(folder) == ["out_of_memory", "interrupted"]
    assert run_trial(quick.spec(), folder.root, limits=TIMED) == Outcome("done", 8)
    assert [record.get("micro_batch") for record in quick.records_of(folder)] == [None, 4, 4]
    assert read_record(folder.done)["micro_batch"] == 4
    assert [record["step"] for record in quick.timeless(folder.journal)] == list(range(9))


# ------------------------------------------------------------------------------------- limits, devices, other classes


def test_a_control_that_runs_away_has_diverged(folder: TrialFolder, tmp_path: Path) -> None:
    """Kills: a limit that looks at evaluations only; a message that does not name it; a limit of 0 taken for none."""
    outcome = run_trial(quick.spec(), folder.root, limits={"kl_nats": 1e-4})
    assert (outcome.state, outcome.kind) == ("diverged", "diverged") and outcome.step == 1
    assert outcome.message.startswith("train/kl_path_nats is ") and "beyond limits.kl_nats=0.0001: " in outcome.message
    assert "a larger beta or a smaller method.lr holds it" in outcome.message
    assert [record["step"] for record in quick.timeless(folder.journal)] == [0, 1]
    assert failure(folder)["class"] == "diverged"
    other = TrialFolder(tmp_path / "evaluated")
    found = run_trial(quick.spec(steps=1), other.root, limits={"kl_nats": 0})
    assert found.state == "diverged" and found.message.startswith("eval/kl_path_nats is ")


def broken_device() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_broken_device_can_be_resumed(folder: TrialFolder, undisturbed: TrialFolder) -> None:
    """In a new process the GPU works again: no FAILED.json, no repetition here. Kills: the reward blamed; a bug."""

    def act(call: int, values: Tensor) -> Tensor:
        if call >= 8:
            raise broken_device()
        return values

    quick.behave(act)
    outcome = run_trial(quick.spec(), folder.root, limits=TIMED)
    message = "the device failed: CUDA error: an illegal memory access was encountered"
    assert outcome == Outcome("stopped", 5, message, "device") and quick.Reward.calls == 8
    assert hows(folder) == ["device"] and not folder.failed.exists() and ledger.state(folder) == "resumable"
    quick.behave()
    assert run_trial(quick.spec(), folder.root, limits=TIMED).state == "done"
    quick.assert_same(undisturbed, folder)


def test_a_device_that_breaks_again_and_again_is_given_up(folder: TrialFolder, undisturbed: TrialFolder) -> None:
    """After limits.deaths attempts of one launch without a new step; the next launch tries again. Kills: a trial that
    is put back for ever; steps in between that are not seen; another launch's attempts counted."""

    given = dict(limits=TIMED | {"deaths": 2}, facts={"launch": "one"})
    for calls, kind in ((2, "device"), (2, "device"), (0, "device"), (0, "device"), (9, "worker_died")):

        def act(call: int, values: Tensor, calls: int = calls) -> Tensor:
            if call > calls:
                raise broken_device()
            return values

        quick.behave(act)
        outcome = run_trial(quick.spec(), folder.root, **given)
        assert (outcome.state, outcome.kind) == ("stopped", kind)
    assert [record["from_step"] for record in quick.records_of(folder)] == [-1, 1, 2, 2]
    assert "died 2 times in a row" in outcome.message and "fewer trials" in outcome.message
    assert quick.Reward.calls == 0 and ledger.state(folder) == "resumable"
    quick.behave()
    again = run_trial(quick.spec(), folder.root, limits=given["limits"], facts={"launch": "two"})
    assert again == Outcome("done", 8)
    quick.assert_same(undisturbed, folder)


def test_a_fault_in_the_code_is_a_bug(folder: TrialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them at one place have one signature, at two places two. Kills: a signature with a number or a path of the
    trial in it."""
    signatures = []
    for name in ("chain_length", "chain_length", "width"):

        def step(self: Any, name: str = name) -> dict[str, float]:
            return getattr(self, name) if name == "width" else self.chain_length

        monkeypatch.setattr("workers.methods.pi_ft.PIFT.step", step)
        forgive(folder)
        outcome = run_trial(quick.spec(seed=len(signatures)), folder.root)
        assert (outcome.state, outcome.kind) == ("failed", "bug")
        assert outcome.message == f"AttributeError: 'PIFT' object has no attribute '{name}'"
        signatures.append(failure(folder)["signature"])
    assert signatures[0] == signatures[1]


# ------------------------------------------------------------------------------------------------------- full disks


def filling(disk: Path, full: range, seen: list[tuple[int, int]], journal: Path, pause: float = 0.0) -> Any:
    """A reward during whose calls `full` the disk is; it notes (call, steps in the journal) at each."""

    def act(call: int, values: Tensor) -> Tensor:
        if call in full:
            quick.fill(disk)
            time.sleep(pause)
        elif call == full.stop:
            (disk / "ballast").unlink()
        found = scan(journal)
        assert found.problem is None and found.sound == (journal.stat().st_size if journal.exists() else 0)
        seen.append((call, found.last_step))
        return values

    return act


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> TrialFolder:
    """An undisturbed trial of 40 steps: more than the rest of a page of the journal holds."""
    quick.behave()
    folder = TrialFolder(tmp_path_factory.mktemp("long"))
    assert run_trial(LONG, folder.root).state == "done"
    return folder


LONG = quick.spec(steps=40)


def test_training_goes_on_while_the_disk_is_full(tmp_path: Path, long: TrialFolder) -> None:
    """Records wait in memory; with space again all are written, once, in order, and the bits are those of a run that
    noticed nothing. Kills: a step lost or written twice; half a line left; training that stops; no word about it."""
    with quick.small_disk(tmp_path / "disk", 512) as disk:
        folder, seen = TrialFolder(disk / "trial"), []
        quick.behave(filling(disk, range(7, 37), seen, folder.journal))
        assert run_trial(LONG, folder.root, limits=TIMED) == Outcome("done", 40)
        quick.assert_same(long, folder)
        steps = dict(seen)
        assert steps[36] < 15 and steps[37] < 15 and steps[39] > 28, seen  # call 36 is in step 28
        warnings = read_record(folder.done)["warnings"]
        assert any("no checkpoint: [Errno 28] No space left on device" in text for text in warnings), warnings
        assert hows(folder) == ["done"] and quick.records_of(folder)[0]["step"] == 40
        assert not [path for path in folder.root.rglob(".*")]


@pytest.mark.parametrize(
    ("full", "pause"), [(range(7, 99), 0.05), (range(45, 99), 0.0)], ids=["in a step", "at the end"]
)
def test_a_disk_that_stays_full(tmp_path: Path, long: TrialFolder, full: range, pause: float) -> None:
    """After limits.storage_seconds the trial stops: neither running nor failed, to be resumed; so it is told again
    while the disk is full, and with space it finishes with the same bits. Kills: a failure of the trial for a full
    disk; a lease that is held on to; a wait without an end; training thrown away at once."""
    limits = TIMED | {"storage_seconds": 0.3}
    with quick.small_disk(tmp_path / "disk", 512) as disk:
        folder, seen = TrialFolder(disk / "trial"), []
        quick.behave(filling(disk, full, seen, folder.journal, pause))
        began = time.monotonic()
        outcome = run_trial(LONG, folder.root, limits=limits)
        assert time.monotonic() - began < 10
        assert (outcome.state, outcome.kind) == ("stopped", "storage")
        assert 10 < outcome.step < 40 if pause else outcome.step == 40, outcome
        message = f"the store cannot be written: [Errno 28] No space left on device: '{folder.root}"
        assert outcome.message.startswith(message), outcome.message
        assert hows(folder) == ["storage"] and ledger.state(folder) == "resumable"
        assert ledger.detail(folder)["message"] == outcome.message
        assert not folder.done.exists() and not folder.failed.exists()
        assert not [path for path in folder.root.rglob(".*")]
        again = run_trial(LONG, folder.root, limits=limits)
        assert (again.state, again.kind) == ("stopped", "storage") and "No space left on device" in again.message
        assert ledger.state(folder) == "resumable" and scan(folder.journal).problem is None
        (disk / "ballast").unlink()
        quick.behave()
        assert run_trial(LONG, folder.root, limits=limits) == Outcome("done", 40)
        quick.assert_same(long, folder)


@pytest.mark.parametrize("pages", range(4))
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, undisturbed: TrialFolder, pages: int) -> None:
    """With room for nothing, for the attempt's record, for the spec too, for a first line: the trial never holds on to
    its lease, so this process and every other one can go on later. Kills: an attempt that is begun and not ended."""
    limits = TIMED | {"storage_seconds": 0.1}
    with quick.small_disk(tmp_path / "disk", 512) as disk:
        folder = TrialFolder(disk / "trial")
        quick.fill(disk, leave=pages)
        for _ in range(2):
            outcome = run_trial(quick.spec(), folder.root, limits=limits)
            assert (outcome.state, outcome.kind) == ("stopped", "storage"), outcome
            assert "No space left on device" in outcome.message
            assert ledger.state(folder) in ("new", "resumable")
            attempt = newest(Folder(folder.attempts))
            assert attempt is None or attempt.content["how"] == "storage"
        (disk / "ballast").unlink()
        assert run_trial(quick.spec(), folder.root, limits=limits) == Outcome("done", 8)
        quick.assert_same(undisturbed, folder)


def test_no_checkpoint_is_ahead_of_the_journal(
    folder: TrialFolder, undisturbed: TrialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the journal alone cannot be written, a killed trial leaves the checkpoint that its journal covers. Kills: a
    checkpoint written while records wait: it could not be used, and the ones that could would have gone for it."""
    real, flush = Journal.flush, []

    def failing(self: Journal) -> bool:
        if flush:
            self.unwritten = OSError(5, "Input/output error")
        return not flush and real(self)

    monkeypatch.setattr(Journal, "flush", failing)
    calls = iter(range(1, 99))

    def die() -> bool:
        if (call := next(calls)) == 7:
            raise KeyboardInterrupt
        flush.extend([True] if call == 3 else [])
        return False

    with pytest.raises(KeyboardInterrupt):
        run_trial(quick.spec(), folder.root, limits=TIMED, should_stop=die)
    assert scan(folder.journal).last_step == 3 and [found.step for found in listed(folder)] == [2]
    warnings = quick.records_of(folder)[0]["warnings"]
    assert "step 4: no checkpoint: [Errno 5] Input/output error; the one before it stands" in warnings
    flush.clear()
    assert run_trial(quick.spec(), folder.root, limits=TIMED) == Outcome("done", 8)
    quick.assert_same(undisturbed, folder)


def test_pictures_wait_for_space_too(tmp_path: Path) -> None:
    """Kills: a picture that is given up, or a checkpoint past a picture that exists nowhere."""
    spec = quick.spec(model="PictureModel")
    reference = TrialFolder(tmp_path / "reference")
    assert run_trial(spec, reference.root).state == "done"
    with quick.small_disk(tmp_path / "disk", 512) as disk:
        folder, seen = TrialFolder(disk / "trial"), []
        quick.behave(filling(disk, range(5, 9), seen, folder.journal))
        assert run_trial(spec, folder.root, limits=TIMED) == Outcome("done", 8)
        quick.assert_same(reference, folder)
        for step in (0, 4, 8):
            assert folder.picture(step).read_bytes() == reference.picture(step).read_bytes()
            assert sound_picture(folder.picture(step))
        warnings = read_record(folder.done)["warnings"]
        assert any("step_000004.png cannot be written yet" in text for text in warnings), warnings


def test_an_error_that_is_not_finite_says_so() -> None:
    """Which class an exception belongs to, whoever raised it. Kills: an OSError of a reward taken for the store's."""
    for error, kind in (
        (NotFinite("x"), "diverged"),
        (RewardFailed("x"), "reward"),
        (out_of_memory(), "out_of_memory"),
        (cpu_memory(), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (broken_device(), "device"),
        (OSError(28, "No space left on device"), "storage"),
        (RuntimeError("shapes do not fit"), "bug"),
        (KeyError("x"), "bug"),
    ):
        assert runs.classify(error) == kind, error
    assert runs.classify(OSError("no such file"), loading=True) == "loading"
