"""Rewards with a formula, for the models with a known optimum (workers/models/lq.py, mixture.py): r of the final state.

    Quadratic    r(y) = y'Qy/2 + q'y + c           conf/reward/quadratic.yaml; linear with Q = 0
    Bounded      r(y) = height tanh((mean(y) - center)/width)      conf/reward/bounded.yaml: for every f-divergence
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.spec import TrialSpec, locate, number

Number = float | int


def needs_latents(spec: TrialSpec) -> list[str]:
    """The problem of a reward on final states with a model that makes pictures."""
    if getattr(locate(spec.model["_target_"]), "pictures", True):
        return [
            f"reward={spec.reward['name']} is a function of a state and model={spec.model['name']} makes pictures; "
            "write model=lq or model=mixture, or another reward"
        ]
    return []


def as_matrix(value: Any, d: int) -> Tensor:
    """A number (times the identity), d numbers (a diagonal) or d rows as a (d, d) float64 matrix."""
    given = torch.as_tensor(value, dtype=torch.float64)
    if given.dim() == 0:
        return given * torch.eye(d, dtype=torch.float64)
    return torch.diag(given) if given.dim() == 1 else given


def as_vector(value: Any, d: int) -> Tensor:
    """A number (in every place) or d numbers as a (d,) float64 vector."""
    return torch.as_tensor(value, dtype=torch.float64).expand(d).clone()


def shape_problems(field: str, value: Any, d: int, matrix: bool) -> list[str]:
    """What keeps a setting from being a (d, d) matrix or a (d,) vector of finite numbers."""
    try:
        given = torch.as_tensor(value, dtype=torch.float64)
        good = bool(given.isfinite().all()) and given.shape in ((), (d,), *([(d, d)] if matrix else []))
    except (TypeError, ValueError, RuntimeError):
        good = False
    kinds = f"a number, {d} numbers" + (f" or {d} rows of {d}" if matrix else "")
    return [] if good else [f"{field}={value!r} does not fit d={d}; write {kinds}, as in {field}=0.5"]


class Quadratic:
    """r(y) = y'Qy/2 + q'y + c; Q symmetric."""

    differentiable = True
    of_states = True

    def __init__(self, *, Q: Any, q: Any, c: float, device: str = "cpu") -> None:
        self.given, self.device, self.c = (Q, q), device, float(c)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, and with a model that makes pictures."""
        if found := needs_latents(spec):
            return found
        d = spec.model.get("d", 1)
        if not isinstance(d, int) or d < 1:  # the model's own check says so
            return []
        found = shape_problems("reward.Q", spec.reward.get("Q"), d, matrix=True)
        found += shape_problems("reward.q", spec.reward.get("q"), d, matrix=False)
        found += number("reward.c", spec.reward.get("c"), -1e300, "the constant of the reward", example=0.0)
        if not found and not torch.equal(Q := as_matrix(spec.reward["Q"], d), Q.T):
            found.append(f"reward.Q={spec.reward['Q']!r} is not symmetric; y'Qy knows only (Q + Q')/2: write that")
        return found

    def parts(self, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, q, c) as float64 tensors (d, d), (d,), ()."""
        return as_matrix(self.given[0], d), as_vector(self.given[1], d), torch.tensor(self.c, dtype=torch.float64)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Final states (B, d) to (B,)."""
        Q, q, c = (part.to(images) for part in self.parts(images.shape[1]))
        return (images @ Q * images).sum(1) / 2 + images @ q + c


class Bounded:
    """r(y) = height tanh((mean(y) - center)/width)."""

    differentiable = True
    of_states = True

    def __init__(self, *, height: float, center: float, width: float, device: str = "cpu") -> None:
        self.height, self.center, self.width = height, center, width

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, and with a model that makes pictures."""
        found = needs_latents(spec)
        found += number("reward.height", spec.reward.get("height"), 0, "half the reward's range", example=1.0)
        found += number("reward.center", spec.reward.get("center"), -1e300, "where the reward is 0", example=0.0)
        return found + number("reward.width", spec.reward.get("width"), 0, "its width", open_low=True, example=1.0)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Final states (B, d) to (B,)."""
        return self.height * torch.tanh((images.mean(1) - self.center) / self.width)
