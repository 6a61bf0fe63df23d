"""Calls of a reward by somebody who does not trust it: repeated when it fails, bounded in time, its answer checked.

    guard = Guard(limits, note)
    rewards = guard("reward=image_reward", reward, images, prompts)      # (B,), finite

A reward is other people's code, at times behind a network. What it does wrong ends the trial in a class of its own:
    raises                  repeated limits.reward_retries times, after .5, 1, 2, 4 s ..., then RewardFailed
    does not return         RewardFailed after limits.reward_seconds, with the place where it hangs
    wrong shape or type     RewardFailed at once, with what it returned and what it should
    nan or inf              NotFinite at once: the trial has diverged
The call runs in a thread of its own, because only so a call that hangs can be left behind; its numbers are the same.
"""

from __future__ import annotations

import queue
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from workers.methods import NotFinite
from workers.rollout import Reward

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
PAUSE_SECONDS = 0.5
"""Before the first repetition; doubled before each further one."""


class RewardFailed(Exception):
    """A reward that cannot be used; the message says what it did."""


@dataclass(frozen=True)
class Limits:
    """What a trial puts up with (conf/config.yaml, `limits`); no part of its identity."""

    kl_nats: float | None = None
    """A path KL beyond it counts as diverged; None = no limit."""
    reward_seconds: float | None = None
    """How long one reward call may take; None = for ever."""
    reward_retries: int = 4
    storage_seconds: float = 300.0
    """How long a trial trains on while its folder cannot be written."""
    deaths: int = 3
    """Attempts in a row that may die without a new journaled step, in one launch."""


class Guard:
    """See the module. `note(text)` is told about every repetition."""

    def __init__(self, limits: Limits, note: Callable[[str], None] = lambda text: None) -> None:
        self.limits, self.note = limits, note
        self._thread: _Thread | None = None

    def __call__(self, name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
        """The rewards (B,) of B pictures. Raises RewardFailed, NotFinite, or what `out_of_memory` and `device_failed`
        know."""
        for repetition in range(self.limits.reward_retries + 1):
            try:
                values = self._timed(name, reward, images, prompts)
                break
            except (RewardFailed, NotFinite):
                raise
            except Exception as error:
                if out_of_memory(error) or device_failed(error):  # not the reward's fault
                    raise
                reason = f"{type(error).__name__}: {error}".strip()
                if repetition == self.limits.reward_retries:
                    times = f"{repetition + 1} times in a row" if repetition else "and limits.reward_retries=0"
                    raise RewardFailed(f"{name} raised {reason} {times}; mend it, then pift retry") from error
                self.note(f"{name} raised {reason}; called again")
                time.sleep(PAUSE_SECONDS * 2**repetition)
        return _checked(name, values, prompts)

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._thread.leave()
            self._thread = None

    def _timed(self, name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Any:
        if self.limits.reward_seconds is None:
            return reward(images, prompts)
        if self._thread is None:
            self._thread = _Thread()
        try:
            return self._thread.call(lambda: reward(images, prompts), images, self.limits.reward_seconds)
        except TimeoutError:
            place = self._thread.where()
            self.close()
            raise RewardFailed(
                f"{name} did not return within limits.reward_seconds={self.limits.reward_seconds:g}; it hangs "
                f"at {place}"
            ) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def device_failed(error: BaseException) -> bool:
    """Whether the GPU's driver failed, which goes on in this process and may be over in the next one."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error" in text or "CUDNN_STATUS" in text)


def _checked(name: str, values: Any, prompts: list[str]) -> Tensor:
    """Raises RewardFailed for anything but one real number per picture, NotFinite where one is not finite."""
    count = len(prompts)
    if not isinstance(values, Tensor) or values.shape != (count,) or not values.is_floating_point():
        got = f"shape {tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else repr(type(values))
        raise RewardFailed(
            f"{name} returned {got} for {count} pictures; it must return one real number each: a tensor of "
            f"shape ({count},)"
        )
    bad = (~torch.isfinite(values.detach())).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(
            f"the reward is not finite: {name} gave {values[bad[0]].item()} for picture {bad[0]} of {count} "
            f"({len(bad)} such), prompt {prompts[bad[0]]!r}"
        )
    return values


class _Thread:
    """One thread that does calls for another; it can be left behind in the middle of one."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    def call(self, act: Callable[[], Any], images: Tensor, seconds: float) -> Any:
        """What `act` returns or raises, under the caller's gradient mode; TimeoutError after `seconds`."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((act, torch.is_grad_enabled(), images.device, answer))
        try:
            value, error = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(error, Exception):
            raise error
        if error is not None:  # no signal gets here: somebody called sys.exit
            raise RuntimeError(f"it would end this process ({type(error).__name__}: {error})") from error
        return value

    def leave(self) -> None:
        self._calls.put(None)

    def where(self) -> str:
        """Where the call is: its innermost line that is not Python's or a package's, "file.py:12 in name"."""
        frame: FrameType | None = sys._current_frames().get(self._thread.ident or 0)
        stack = [] if frame is None else traceback.extract_stack(frame)
        begun = [i for i, entry in enumerate(stack) if (entry.filename, entry.name) == (__file__, "<lambda>")]
        called = stack[begun[0] + 1 :] if begun else []
        own = [entry for entry in called if not entry.filename.startswith(LIBRARIES)] or called
        return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else "an unknown place"

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while (found := self._calls.get()) is not None:
            act, gradients, device, answer = found
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                with torch.set_grad_enabled(gradients):
                    answer.put((act(), None))
            except BaseException as error:
                answer.put((None, error))
            del act, answer, found
