"""Gaussian mixtures in one dimension, noised: their exact scores and densities; numpy in, numpy out, torch likewise.

Data sum_i weight_i N(mean_i, variance_i). At signal variance abar, Y = sqrt(abar) X + sqrt(1 - abar) Z has the law
sum_i weight_i N(sqrt(abar) mean_i, abar variance_i + 1 - abar), whose score is a closed form. One component with a
`kernel` is the nearly linear-quadratic problem: the score of a Gaussian plus kernel * sin(y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """The law of the data. Raises ValueError for weights or variances that make no law."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (len(self.weights) == len(self.means) == len(self.variances) > 0):
            raise ValueError("weights, means and variances have different lengths")
        if min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(f"weights={list(self.weights)} are not positive with sum 1")
        if min(self.variances) < 0:
            raise ValueError(f"variances={list(self.variances)} has a negative one")

    def _logs(self, y: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """log weight_i N(y; ...) and the slopes -(y - mean)/variance, each (..., components)."""
        weights, means, variances = (torch.tensor(v).to(y) for v in (self.weights, self.means, self.variances))
        mean, variance = abar[..., None].sqrt() * means, abar[..., None] * variances + 1 - abar[..., None]
        z = y[..., None] - mean
        return weights.log() - z**2 / (2 * variance) - (2 * math.pi * variance).log() / 2, -z / variance

    def score(self, y: Any, abar: Any) -> Any:
        """grad log p(y) at signal variance abar (a number, or one per entry of y), shape of y."""
        if not isinstance(y, Tensor):
            return self.score(torch.as_tensor(y, dtype=torch.float64), abar).numpy()
        logs, slopes = self._logs(y, torch.as_tensor(abar).to(y))
        return ((logs - logs.logsumexp(-1, keepdim=True)).exp() * slopes).sum(-1)

    def density(self, y: Any, abar: Any = 1.0) -> Any:
        """p(y) at signal variance abar, shape of y."""
        if not isinstance(y, Tensor):
            return self.density(torch.as_tensor(y, dtype=torch.float64), abar).numpy()
        return self._logs(y, torch.as_tensor(abar).to(y))[0].logsumexp(-1).exp()
