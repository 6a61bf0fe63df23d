"""Regularity along Algorithm 1, and the beta schedule with a guaranteed rate (design notes, section 2).

With m(y) = A y + B s(y) the pre-trained mean, J = sup |m'|, DJ = sup |m''|, L_t = Lip(grad V_t), l_t = Lip(V_t),
rho = sigma^2/beta:

    l_t <= J l_{t+1}                            L_t <= J^2 L_{t+1} / (1 - rho L_{t+1}) + DJ l_{t+1}
    Lip(x^(m)) <= J (1 - (rho L)^{m+1}) / (1 - rho L),     x^(m) = A y + B u^(m) the iterates' closed-loop means

so beta_t >= sigma_t^2 L_{t+1} / lambda, chosen backwards in t, gives kappa_t <= lambda < 1 at every step. That makes
beta_t proportional to sigma_t^2: the penalty is then no longer one beta times the path KL. The constants are exact on
linear-quadratic problems, suprema over the grid on one-dimensional ones; the paper's own constants are not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.core import grid, lq
from workers.core.grid import GridProblem, Smooth
from workers.core.lq import LinearQuadratic

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Constants:
    """Lipschitz constants, each (T + 1,), of V_t and of grad V_t; inf where a bound fails (rho L >= 1)."""

    V: Array
    grad_V: Array


def rate_problems(rate: Any) -> list[str]:
    """What is wrong with a contraction rate, as the field `beta_rate`."""
    good = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1
    return [] if good else [f"beta_rate={rate!r} is no contraction rate: above 0 and below 1; write beta.rate=0.5"]


# ------------------------------------------------------------------------------------------------------ one dimension


def measured(problem: GridProblem, V: Array) -> Constants:
    """The constants of value tables (T + 1, n) over the grid."""
    tables = [Smooth(problem.y, table) for table in V]
    return Constants(*(np.array([np.abs(table(problem.y, n)).max() for table in tables]) for n in (1, 2)))


def bounds(problem: GridProblem) -> Constants:
    """The recursion's bounds on them, from the reward's constants and the pre-trained chain alone."""
    reward = measured(problem, problem.r[None])
    values, slopes = [reward.V[0]], [reward.grad_V[0]]
    for t in reversed(range(problem.T)):
        J, DJ = _chain_constants(problem, t)
        contraction = problem.rho[t] * slopes[-1]
        grown = J**2 * slopes[-1] / (1 - contraction) + DJ * values[-1] if contraction < 1 else np.inf
        values.append(J * values[-1])
        slopes.append(grown)
    return Constants(np.array(values[::-1]), np.array(slopes[::-1]))


def _chain_constants(problem: GridProblem, t: int) -> tuple[float, float]:
    """sup |m'| and sup |m''| over the grid."""
    mean = Smooth(problem.y, problem.mean(t, problem.s[t]))
    return float(np.abs(mean(problem.y, 1)).max()), float(np.abs(mean(problem.y, 2)).max())


def iterate_constants(problem: GridProblem, u: Array) -> Array:
    """(T,): Lip of the closed-loop means A y + B u_t(y) of a control table, over the grid."""
    means = (Smooth(problem.y, problem.mean(t, u[t])) for t in range(problem.T))
    return np.array([np.abs(mean(problem.y, 1)).max() for mean in means])


def iterate_bounds(problem: GridProblem, grad_V: Array, inner_steps: int) -> Array:
    """(T,): the bound on `iterate_constants` after m inner steps of eq. 18, given Lip(grad V_t) (T + 1,)."""
    J = np.array([_chain_constants(problem, t)[0] for t in range(problem.T)])
    powers = (problem.rho * grad_V[1:])[:, None] ** np.arange(inner_steps + 1)
    return J * powers.sum(1)


def contraction_beta_grid(problem: GridProblem, rate: float, floor: Any) -> Array:
    """(T,): beta_t = max(floor_t, sigma_t^2 sup|E V''_{t+1}| / rate), backwards in t: kappa_t <= rate at every step."""
    if problems := rate_problems(rate):
        raise ValueError(problems[0])
    beta = np.array(np.broadcast_to(np.asarray(floor, dtype=float), problem.sigma.shape))
    V = problem.r
    for t in reversed(range(problem.T)):
        G = Smooth(problem.y, grid.expected(problem.y, V, float(problem.sigma[t])))
        low, high = grid.bends(replace(problem, beta=beta), t, G)
        beta[t] = max(beta[t], beta[t] * max(-low, high) / rate)  # bends are sigma^2/beta times E V''
        now = replace(problem, beta=beta)
        V = grid.value(now, t, V, grid.fixed_point(now, t, G))
    return beta


# ------------------------------------------------------------------------------------------------------ lq


def lq_bounds(problem: LinearQuadratic) -> Tensor:
    """(T + 1,): the recursion's bounds on Lip(grad V_t) = |Q_t|_2; inf from where rho L >= 1."""
    L = [torch.linalg.matrix_norm(problem.Q, 2)]
    for t in reversed(range(problem.T)):
        contraction = problem.rho[t] * L[-1]
        J = torch.linalg.matrix_norm(problem.F[t], 2)
        L.append(J**2 * L[-1] / (1 - contraction) if contraction < 1 else torch.full_like(L[-1], torch.inf))
    return torch.stack(L[::-1])


def contraction_beta_lq(problem: LinearQuadratic, rate: float, floor: Any) -> Tensor:
    """(T,): beta_t = max(floor_t, sigma_t^2 |Q_{t+1}|_2 / rate), backwards in t: kappa_t <= rate at every step."""
    if problems := rate_problems(rate):
        raise ValueError(problems[0])
    beta = torch.as_tensor(floor, dtype=torch.float64).expand(problem.T).clone()
    Q, q, c = problem.Q, problem.q, problem.c
    for t in reversed(range(problem.T)):
        beta[t] = torch.maximum(beta[t], problem.sigma[t] ** 2 * torch.linalg.matrix_norm(Q, 2) / rate)
        Q, q, c = lq.maximised(replace(problem, beta=beta), t, Q, q, c)
    return beta
