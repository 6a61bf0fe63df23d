"""The little statistics of a comparison: paired differences over pictures, intervals over seeds.

Two different questions, never mixed:
* Pictures. Every cell of a prompt is evaluated on the same fixed noise, so a change is judged picture by picture:
  mean and standard error of the differences (`paired`). It says how sure we are of THIS adapter, not of the method.
* Seeds. With several training seeds the mean over seeds gets a Student t interval (`t_interval`). With one seed
  there is none, and nothing here pretends otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `n` pictures; `se` is None where n = 1."""

    mean: float
    se: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Is the mean more than two standard errors away from zero? (A zero error counts only for a nonzero mean.)"""
        return self.se is not None and abs(self.mean) > 2 * self.se


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and the half width of its t interval; `half` is None where n = 1."""

    mean: float
    half: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Does the interval leave zero out?"""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error (ddof = 1) of a sample; None where it is empty."""
    if not values:
        return None
    n = len(values)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n)


def paired(before: Sequence[float], after: Sequence[float]) -> Estimate | None:
    """Mean change and its paired standard error: sd(after_i - before_i) / sqrt(n), i over the pictures.

    None where there is nothing to pair. Raises ValueError where the two were not measured on the same pictures.
    """
    if len(before) != len(after):
        raise ValueError(f"cannot pair {len(before)} with {len(after)} pictures: not the same evaluation noise")
    return estimate([b - a for a, b in zip(before, after, strict=True)])


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The two-sided Student t quantile, as in 12.706 for one degree of freedom at 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + level / 2))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with the half width of its two-sided t interval. Raises ValueError where there is no value."""
    found = estimate(values)
    if found is None:
        raise ValueError("no values to take the mean of")
    half = None if found.se is None else t_quantile(found.n - 1, level) * found.se
    return Interval(found.mean, half, found.n)
