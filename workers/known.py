"""Problems whose optimum is known: what a model offers when it can say how far a control is from the best one.

A model class with a method `known(problem) -> Known` (workers/models/lq.py, mixture.py) makes its trials record

    theory/gap                  J* - J(theta), exact, not sampled: by moments (lq) or on a grid (mixture)
    theory/objective_optimum    J*
    theory/kappa_max            the largest kappa_t of eq. 18
and offers the method `algorithm_1` its iteration. J* is the maximum over all controls (and, with
initial_law=gaussian, all initial laws).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from workers.rollout import Problem


class Inner(NamedTuple):
    """What m inner steps of Algorithm 1 at every t came to."""

    control_error: float
    """Largest |u^(m) - u^(infinity)| over t (the model's own norm)."""
    log10_rate: float | None
    """Predicted change of log10(theory/gap) in one more inner step: twice log10 of the largest factor over t. None
    where one step is exact."""


class Known(Protocol):
    """Exact knowledge of one trial's problem."""

    gap_fixed_point: float | None
    """J* - J of the control that DPOK's gradient as published converges to; None where there is no such control."""

    def metrics(self) -> dict[str, float]:
        """theory/* at the model's present control."""
        ...

    def iterate(self, inner_steps: int, damping: str | float | None) -> Inner:
        """Put the control after that many inner steps of Algorithm 1 into the model."""
        ...


def log10_rate(factor: float) -> float | None:
    """The predicted change of log10(gap) in one inner step; None where one step is exact."""
    return 2 * math.log10(factor) if factor > 1e-12 else None


def known_of(problem: Problem) -> Known | None:
    """What is known of a trial's problem, None for models that know nothing."""
    make = getattr(problem.model, "known", None)
    return None if make is None else make(problem)
