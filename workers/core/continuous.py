"""Continuous time: the HJB equation of the control problem, solved through the linear Feynman-Kac equation.

The variance-preserving diffusion with noise rate b(tau), in generation time tau in [0, 1], controlled:

    dY = (b Y/2 + b u(Y, tau)) dtau + sqrt(b) dW,      KL rate b |u - s|^2 / 2
    V_tau + L^s V + b/(2 beta) |grad V|^2 = 0,  V(., 1) = r,   u* = s + grad V / beta                     (HJB)
    phi = e^{V/beta} solves  phi_tau + L^s phi = 0,  phi(., 1) = e^{r/beta},   L^s = (b y/2 + b s) d + b/2 d^2

It is the limit of the chain with alpha_t = abar(tau_t)/abar(tau_{t+1}), sigma_t^2 = 1 - alpha_t as T grows, where c_t
of eq. 18 tends to 1/beta; the error is of first order in 1/T (design notes, section 5; arXiv 2403.06279).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The linear noise rate of the variance-preserving diffusion (Song et al. 2021): `low` at the data, `high` at the
    noise. (.1, 20) is the continuous form of the 1000-step schedule 1e-4 .. 0.02 of DDPM."""

    low: float = 0.1
    high: float = 20.0

    def rate(self, tau: float) -> float:
        """b at generation time tau: `high` at 0, `low` at 1."""
        return self.low + (self.high - self.low) * (1 - tau)

    def abar(self, tau: Any) -> Any:
        """The signal variance at generation time tau: exp of minus the noise still to come off."""
        left = 1 - np.asarray(tau, dtype=float)
        return np.exp(-self.low * left - (self.high - self.low) * left**2 / 2)

    def chain(self, T: int) -> tuple[Array, Array]:
        """(alpha, sigma), (T,) each, generation order: T equal steps of tau, sigma^2 = 1 - alpha."""
        abar = self.abar(np.linspace(0, 1, T + 1))
        alpha = abar[:-1] / abar[1:]
        return alpha, np.sqrt(1 - alpha)


@dataclass(frozen=True)
class HJB:
    """The value function on a grid."""

    y: Array
    tau: Array
    """(m + 1,): 0 .. 1"""
    V: Array
    """(m + 1, n)"""
    beta: float

    @property
    def objective(self) -> float:
        """J* = E V(Y_0, 0), Y_0 ~ N(0, 1)."""
        return float(np.trapezoid(self.V[0] * np.exp(-(self.y**2) / 2) / np.sqrt(2 * np.pi), self.y))


def solve_hjb(
    schedule: Schedule,
    beta: float,
    score: Callable[[Array, float], Any],
    reward: Callable[[Array], Any],
    grid: Any,
    steps: int = 800,
) -> HJB:
    """V on `grid` (n,), evenly spaced, by Crank-Nicolson on phi = e^{V/beta}, second order in 1/steps and the spacing.

    `score(y, tau)` and `reward(y)` are called with numpy arrays (n,). Beyond the grid nothing is assumed: at its ends
    the equation is taken without diffusion, which is right where the drift points inwards there (ValueError elsewhere).
    """
    y = np.asarray(grid, dtype=float)
    h, dt = y[1] - y[0], 1 / steps
    r = np.asarray(reward(y), dtype=float) / beta
    phi, shift, V = np.exp(r - r.max()), r.max(), [beta * r]
    for i in reversed(range(steps)):
        tau = (i + 0.5) * dt
        lower, middle, upper = _generator(schedule, score, y, h, tau)
        half = 0.5 * dt
        right = phi + half * (middle * phi)
        right[1:] += half * lower[1:] * phi[:-1]
        right[:-1] += half * upper[:-1] * phi[1:]
        banded = np.zeros((3, len(y)))
        banded[0, 1:], banded[1], banded[2, :-1] = -half * upper[:-1], 1 - half * middle, -half * lower[1:]
        phi = solve_banded((1, 1), banded, right)
        if not (phi > 0).all():
            raise ArithmeticError(f"phi lost its sign at tau={tau:.3f}: take more steps or a finer grid")
        V.append(beta * (np.log(phi) + shift))
    return HJB(y, np.linspace(0, 1, steps + 1), np.stack(V[::-1]), beta)


def _generator(
    schedule: Schedule, score: Callable[[Array, float], Any], y: Array, h: float, tau: float
) -> tuple[Array, Array, Array]:
    """L^s at tau as three diagonals: central differences inside, one-sided and without diffusion at the ends."""
    b = schedule.rate(tau)
    drift = b * y / 2 + b * np.asarray(score(y, tau), dtype=float)
    if drift[0] < 0 or drift[-1] > 0:
        raise ValueError(f"the pre-trained drift leaves the grid at tau={tau:.3f}; widen the grid")
    lower, upper = b / (2 * h**2) - drift / (2 * h), b / (2 * h**2) + drift / (2 * h)
    middle = np.full_like(y, -b / h**2)
    lower[0], middle[0], upper[0] = 0.0, -drift[0] / h, drift[0] / h
    lower[-1], middle[-1], upper[-1] = -drift[-1] / h, drift[-1] / h, 0.0
    return lower, middle, upper
