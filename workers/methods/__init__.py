"""Fine-tuning methods, one file each, one skeleton.

    Config          a frozen dataclass of the method's own settings (conf/method/<name>.yaml), range-checked
    check(spec)     problems with those settings, in words
    __init__(problem, config)
    step() -> dict  one gradient step (sampling when it is due); returns metrics, never logs
    state_dict() / load_state_dict(state)      everything a resumed run needs beyond the adapter and the generators
    passes(spec, controlled, rows)             what a gradient step takes; a method without it has no estimated cost

A new method is one such file and one YAML whose `_target_` names the class.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from workers.rollout import Problem
from workers.spec import TrialSpec, settings


class Method(Protocol):
    """What the runner needs of a method."""

    Config: type

    def __init__(self, problem: Problem, config: Any) -> None: ...
    def step(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Passes(NamedTuple):
    """How many transitions (of the last two: pictures) go through each kind of network pass in one gradient step,
    averaged over the steps of one sampling. `passes` of a method counts them, from the spec, the number of controlled
    steps of the chain, and `rows(n)`: as many as n transitions take, cut into micro-batches (more than n where short
    ones are padded)."""

    controls: float = 0.0
    """The present control, no gradient."""
    pretrained: float = 0.0
    """The pre-trained control, no gradient."""
    gradients: float = 0.0
    """The present control and back to the parameters."""
    adjoints: float = 0.0
    """The present control and back to parameters and state."""
    pretrained_adjoints: float = 0.0
    """The pre-trained control and back to the state."""
    pictures: float = 0.0
    """Decoded and rewarded, no gradient."""
    picture_gradients: float = 0.0
    """Decoded and rewarded, and back to the latents."""


def check_config(config: type, spec: TrialSpec) -> list[str]:
    """Problems with a method's settings: unknown or missing names, then what `config.problems()` finds."""
    given = settings(spec.method)
    known = {field.name: field for field in fields(config)}
    found = [
        f"method.{name} is not a setting of {spec.method['name']}; known: {', '.join(known)}"
        for name in given
        if name not in known
    ]
    needed = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    found += [f"method.{name} is missing" for name in needed if name not in given]
    return found or config(**given).problems()


def optimiser(problem: Problem, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all that is trained, with torch's defaults (betas .9, .999; eps 1e-8), in one fused pass."""
    return torch.optim.AdamW(problem.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


class NotFinite(ArithmeticError):
    """A loss, gradient or reward is not finite: the trial has diverged, and the optimiser has not moved."""


def clip_and_step(
    adam: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    max_grad_norm: float | None,
    lr_factor: float = 1.0,
) -> float:
    """Clip the gradient to `max_grad_norm` (L2, None = leave it), move by `lr_factor` times the step size (see
    train.lr_schedule), clear; returns the norm before clipping.

    Raises NotFinite before anything moves.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not torch.isfinite(norm):
        raise NotFinite(f"the gradient's norm is {norm.item()}")
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in adam.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor
    adam.step()
    adam.zero_grad(set_to_none=True)
    return float(norm)


def finite(name: str, values: Tensor) -> Tensor:
    """`values` when all are finite; raises NotFinite otherwise."""
    if not torch.isfinite(values).all():
        raise NotFinite(f"{name} is not finite")
    return values
