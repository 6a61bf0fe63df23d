"""f-divergence regularisers by a change of reward (Tang and co-authors, arXiv 2403.06279; design notes, section 5).

    maximise  E_q r - beta D_f(q || p)      at      q*(y) = p(y) phi((r(y) - lambda)/beta),   phi = (f')^-1,
    lambda with E_p phi((r - lambda)/beta) = 1, so that q* = p e^{r~/beta} with the reward

    r~ = beta log phi((r - lambda)/beta)                                                               (transformed)

and the machinery of the KL runs on r~ unchanged. D_f(q || p) = E_p f(q/p), with f(1) = f'(1) = 0 throughout:

    regulariser        f(x)                                                   phi(z)                  needs
    kl                 x log x - x + 1                                        e^z                     nothing
    forward_kl         -log x + x - 1                                         1/(1 - z)               z < 1
    chi_square         (x - 1)^2                                              1 + z/2                 z > -2
    alpha, a != 0, 1   (x^a - a x + a - 1)/(a (a - 1))                        (1 + (a-1) z)^{1/(a-1)} (a - 1) z > -1
    jensen_shannon     (x log x - (x + 1) log((x + 1)/2))/2                   e^{2z}/(2 - e^{2z})     z < log(2)/2
    gamma, 0 < g < 1   (x^{1-g} - (1 - g) x - g)/(g (g - 1))                  (1 - g z)^{-1/g}        g z < 1

kl is KL(q || p), forward_kl KL(p || q). gamma is the family that f-DPO (arXiv 2309.16240) writes with that sign: alpha
at a = 1 - g; both are offered because papers use both. a -> 1 (g -> 0) is kl, a -> 0 (g -> 1) forward_kl, a = 2 half
of chi_square.

Where "needs" fails phi is not positive: q* would be 0 there (or negative, which is no law), r~ = -infinity, and no
Gaussian kernel can follow. Such a reward is an error, NotPositive, which says what to change; never a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REGULARISERS = ("kl", "forward_kl", "chi_square", "alpha", "jensen_shannon", "gamma")
WITH_ORDER = ("alpha", "gamma")
"""The regularisers that take an order: a and g of the table."""


class NotPositive(ValueError):
    """(f')^-1((r - lambda)/beta) is not positive for some reward: the optimal law would vanish there."""


@dataclass(frozen=True)
class Divergence:
    """One row of the table. `f` and `phi` map float64 tensors; phi is positive on the open interval (low, high)."""

    name: str
    f: Callable[[Tensor], Tensor]
    log_phi: Callable[[Tensor], Tensor]
    low: float
    high: float

    def phi(self, z: Any) -> Tensor:
        """(f')^-1(z), for z in (low, high)."""
        return self.log_phi(torch.as_tensor(z, dtype=torch.float64)).exp()

    def allows(self, z: Tensor) -> Tensor:
        """bool: where phi is positive."""
        return (z > self.low) & (z < self.high)

    def value(self, ratio: Any, weights: Any) -> float:
        """D_f(q || p) for ratio = q/p on points that p gives the `weights`."""
        ratio, weights = (torch.as_tensor(value, dtype=torch.float64) for value in (ratio, weights))
        return float((self.f(ratio) * weights).sum() / weights.sum())


def divergence(name: str, order: float | None = None) -> Divergence:
    """The divergence called `name`; `order` is a of alpha, g of gamma. Raises ValueError for what is no divergence."""
    if problems := order_problems(name, order):
        raise ValueError("; ".join(problems))
    xlogx = torch.special.xlogy
    if name == "kl":
        return Divergence(name, lambda x: xlogx(x, x) - x + 1, lambda z: z, -math.inf, math.inf)
    if name == "forward_kl":
        return Divergence(name, lambda x: -x.log() + x - 1, lambda z: -torch.log1p(-z), -math.inf, 1.0)
    if name == "chi_square":
        return Divergence(name, lambda x: (x - 1) ** 2, lambda z: torch.log1p(z / 2), -2.0, math.inf)
    if name == "jensen_shannon":
        return Divergence(
            name, lambda x: (xlogx(x, x) - (x + 1) * ((x + 1) / 2).log()) / 2,
            lambda z: 2 * z - (2 - (2 * z).exp()).log(), -math.inf, math.log(2) / 2,
        )  # fmt: skip
    assert order is not None
    a = order if name == "alpha" else 1 - order
    low, high = (-math.inf, 1 / (1 - a)) if a < 1 else (-1 / (a - 1), math.inf)
    return Divergence(
        name, lambda x: (x**a - a * x + a - 1) / (a * (a - 1)), lambda z: torch.log1p((a - 1) * z) / (a - 1), low, high
    )  # fmt: skip


def order_problems(name: str, order: Any) -> list[str]:
    """What is wrong with `name` and `order`, as fields `regulariser` and `regulariser_order`."""
    if name not in REGULARISERS:
        return [f"regulariser={name!r} is not known; choose one of {', '.join(REGULARISERS)}"]
    if name not in WITH_ORDER:
        return (
            []
            if order is None
            else [f"regulariser_order={order!r} means nothing to regulariser={name}; write regulariser_order=null"]
        )
    wanted = "0 < order < 1" if name == "gamma" else "neither 0 (forward_kl) nor 1 (kl)"
    number = isinstance(order, int | float) and not isinstance(order, bool) and math.isfinite(order)
    if not number or (not 0 < order < 1 if name == "gamma" else order in (0, 1)):
        return [
            f"regulariser_order={order!r} is no order of regulariser={name} ({wanted}); write for example "
            "regulariser_order=0.5"
        ]
    return []


def normaliser(found: Divergence, rewards: Any, beta: float, weights: Any = None) -> float:
    """lambda with E_p phi((r - lambda)/beta) = 1, for rewards (n,) of points that p gives the `weights` (equal ones).

    Raises NotPositive where no lambda makes phi positive at all of them with mean 1: beta is too small.
    """
    r = torch.as_tensor(rewards, dtype=torch.float64)
    p = torch.ones_like(r) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    r, p = r[p > 0], p[p > 0]
    if found.name == "kl":
        return float(beta * torch.logsumexp(r / beta + (p / p.sum()).log(), 0))
    if not _has_law(found, r, p, beta):
        raise NotPositive(
            f"regulariser={found.name} at beta={beta:g} leaves no positive law for these rewards (they span "
            f"{float(r.max() - r.min()):.4g}): {_why(found)}. The smallest beta that works here is "
            f"{_smallest_beta(found, r, p, beta):.4g}"
        )
    low, high = _bracket(found, r, beta)
    while low < (middle := (low + high) / 2) < high and high - low > 1e-15 * (1 + abs(low) + abs(high)):
        low, high = (middle, high) if _mean_phi(found, r, p, beta, middle) >= 1 else (low, middle)
    return high if found.high < math.inf else low


def _why(found: Divergence) -> str:
    if found.high < math.inf:
        return (
            "(f')^-1((r - lambda)/beta) becomes infinite at the highest reward before its mean reaches 1, so that the "
            "optimum would be a point mass there"
        )
    return (
        "(f')^-1((r - lambda)/beta) is negative at the lowest rewards, so that the optimum would give those no mass at "
        "all, which no chain of Gaussian steps does"
    )


def _bracket(found: Divergence, r: Tensor, beta: float) -> tuple[float, float]:
    """The interval of lambda that keeps phi positive at all rewards, cut where all z >= 0 or all z <= 0 (phi(0) = 1):
    E phi falls with lambda, from at least 1 to at most 1 where there is a law at all."""
    low, high = float(r.min()), float(r.max())
    if found.high < math.inf:
        low = max(low, high - beta * found.high * (1 - 1e-12))
    if found.low > -math.inf:
        high = min(high, float(r.min()) - beta * found.low * (1 - 1e-12))
    return low, high


def _mean_phi(found: Divergence, r: Tensor, p: Tensor, beta: float, lam: float) -> float:
    return float((found.phi((r - lam) / beta) * p).sum() / p.sum())


def _has_law(found: Divergence, r: Tensor, p: Tensor, beta: float) -> bool:
    low, high = _bracket(found, r, beta)
    return low <= high and _mean_phi(found, r, p, beta, low) >= 1 >= _mean_phi(found, r, p, beta, high)


def _smallest_beta(found: Divergence, r: Tensor, p: Tensor, beta: float) -> float:
    """The smallest beta, to four digits and not below, at which there is a law."""
    low, high = beta, 2 * beta
    while not _has_law(found, r, p, high):
        low, high = high, 2 * high
    while high / low > 1 + 1e-5:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _has_law(found, r, p, middle) else (middle, high)
    return high * (1 + 5e-4)


def transformed(found: Divergence, rewards: Tensor, beta: float, lam: float) -> Tensor:
    """r~ = beta log phi((r - lambda)/beta), shape and dtype of `rewards`; differentiable.

    Raises NotPositive where phi is not positive at some reward.
    """
    z = (rewards.double() - lam) / beta
    outside = rewards.detach()[~found.allows(z.detach())]
    if outside.numel():
        bounded_above = found.high < math.inf
        worst = outside.max() if bounded_above else outside.min()
        edge, side = (found.high, "below") if bounded_above else (found.low, "above")
        raise NotPositive(
            f"a reward of {float(worst):.4g} has no weight under regulariser={found.name}: (f')^-1((r - lambda)/beta) "
            f"is positive for rewards {side} {lam + beta * edge:.4g} only (lambda={lam:.4g} from the base model's "
            f"samples, beta={beta:g}). The optimal law would be {'infinite' if bounded_above else 'empty'} there: "
            "raise beta, bound the reward, or write regulariser=kl"
        )
    return (beta * found.log_phi(z)).to(rewards.dtype)
