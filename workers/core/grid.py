"""Algorithm 1 of PI-FT on one-dimensional problems with any smooth score and reward, on a grid (arXiv 2412.18164).

    found = policy_iteration(alpha, sigma, beta, score, reward, grid)      score(y, t), reward(y): callables
    found.objective, found.u[t], found.V[t], found.kappa[t], found.terminal_density

Functions of y are tables on `grid` (n,), read between its points through cubic splines and continued beyond its ends by
the second-order Taylor polynomial (exact for quadratics). With x = A y + B u the closed-loop mean and
G_t(x) = E V_{t+1}(x + sigma W) (a sum over the grid, Gauss-Hermite where sigma is below its spacing), the algorithm is

    eq. 18     u <- s + c_t G_t'(A y + B u)         line 8     V_t(y) = G_t(x) - beta_t w_t |u - s|^2
    kappa_t    rho_t max |G_t''|, rho_t = sigma_t^2/beta_t     well posed iff rho_t max G_t'' < 1
    (the maximum over the points where the pre-trained chain leads to from the grid)

Densities move with the chain: pushed forward by the monotone map y -> x, then smoothed by sigma W. The grid should be
evenly spaced, fine enough for the score's and the reward's bends, and hold all of the mass. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from workers.core.iteration import Step, choose_step, range_problems, step_at, step_counts

Array = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
"""E g(W) = WEIGHTS @ g(NODES) for a standard normal W and a g that is smooth on its scale."""
RESOLVED = 1.3
"""sigma in units of the grid's spacing from which sums over the grid are exact to rounding, exp(-2 (pi 1.3)^2)."""
TAIL = 8.5
"""Standard deviations after which a Gaussian is cut off: 1e-17 of its mass."""
MOST_STEPS = 10_000
"""Inner steps after which an iteration to `tol` is given up."""


@dataclass(frozen=True)
class GridProblem:
    """A controlled one-dimensional chain, its score and its reward as tables on `y`."""

    A: Array
    """(T,)"""
    B: Array
    sigma: Array
    beta: Array
    y: Array
    """(n,): the grid, increasing"""
    s: Array
    """(T, n): the pre-trained control"""
    r: Array
    """(n,): the reward"""

    @property
    def T(self) -> int:
        return len(self.A)

    @property
    def rho(self) -> Array:
        """sigma_t^2 / beta_t, (T,)."""
        return self.sigma**2 / self.beta

    @property
    def gain(self) -> Array:
        """c_t of eq. 18, (T,)."""
        return self.rho / self.B

    @property
    def w(self) -> Array:
        """(T,): step KL per unit of |u - s|^2; 0 where sigma_t = 0 (there u = s)."""
        led = self.sigma > 0
        return np.where(led, self.B**2 / (2 * np.where(led, self.sigma, 1.0) ** 2), 0.0)

    @cached_property
    def base_law(self) -> Array:
        """The density of Y_0 ~ N(0, 1) on the grid."""
        return np.exp(-(self.y**2) / 2) / np.sqrt(2 * np.pi)

    def mean(self, t: int, u: Array) -> Array:
        """The closed-loop mean x = A y + B u, (n,)."""
        return self.A[t] * self.y + self.B[t] * u

    def integral(self, values: Array) -> float:
        """The integral over the grid (trapezoidal: spectrally exact for what vanishes at both ends)."""
        return float(np.trapezoid(values, self.y))


@dataclass(frozen=True)
class Evaluation:
    """What a control table is worth."""

    V: Array
    """(T + 1, n): V_t(y) = E[r - sum_{j >= t} beta_j KL_j | Y_t = y] by line 8; V_T = r"""
    objective: float
    """E V_0(Y_0) - beta_0 KL(q0 || p0)"""
    expected_reward: float
    path_kl: float
    """nats, unweighted, the initial law's apart"""
    initial_kl: float
    initial_density: Array
    """(n,): of Y_0"""


@dataclass(frozen=True)
class Solution(Evaluation):
    """The result of Algorithm 1."""

    problem: GridProblem
    u: Array
    """(T, n): the control"""
    kappa: Array
    """(T,): rho_t max |E V''_{t+1}| where the pre-trained chain leads to from the grid"""
    rate: Array
    """(T,): measured, |u^(m+1) - u^(inf)| / |u^(m) - u^(inf)| at each point's last inner step with errors above
    rounding, its maximum over the grid; NaN where there is none. Theory: `factor`."""
    eta: Array
    """(T,): the damping; 1 is eq. 18 as printed"""
    factor: Array
    """(T,): what theory says the error shrinks by in an inner step"""
    errors: list[Array]
    """errors[t][m] = max over the grid of |u^(m) - u^(infinity)| for the value V_{t+1} at hand"""

    @cached_property
    def terminal_density(self) -> Array:
        """(n,): the density of Y_T on the grid."""
        return terminal_density(self.problem, self.u, self.initial_density)

    @property
    def control(self) -> Callable[[Any, int], Array]:
        """u(y, t) between the grid's points."""
        return lambda y, t: Smooth(self.problem.y, self.u[t])(np.asarray(y, dtype=float))


# ------------------------------------------------------------------------------------------------------ functions


class Smooth:
    """The cubic spline through a table, continued beyond both ends by its second-order Taylor polynomial there."""

    def __init__(self, y: Array, values: Array) -> None:
        self.inner, self.low, self.high = CubicSpline(y, values), y[0], y[-1]

    def __call__(self, x: Array, derivative: int = 0) -> Array:
        """The value, or a derivative (1 or 2), at x of any shape."""
        inside = np.clip(x, self.low, self.high)
        found = self.inner(inside, derivative)
        out = np.nonzero(inside != x)
        if len(out[0]) and derivative < 2:
            past, at = (x - inside)[out], inside[out]
            if derivative == 0:
                found[out] += self.inner(at, 1) * past + self.inner(at, 2) * past**2 / 2
            else:
                found[out] += self.inner(at, 2) * past
        return found


def expected(y: Array, values: Array, sigma: float) -> Array:
    """E g(y + sigma W), (n,), for the table g = `values`."""
    if sigma == 0:
        return values
    g = Smooth(y, values)
    kernel = _kernel(y, sigma)
    if kernel is None:
        return g(y[:, None] + sigma * NODES) @ WEIGHTS
    beyond = (y[1] - y[0]) * np.arange(1, len(kernel) // 2 + 1)
    return np.convolve(np.concatenate([g(y[0] - beyond[::-1]), values, g(y[-1] + beyond)]), kernel, "valid")


def _kernel(y: Array, sigma: float) -> Array | None:
    """The weights of a Gaussian on the grid's points, an odd number; None where the grid cannot resolve it."""
    h = y[1] - y[0]
    if sigma < RESOLVED * h or not np.allclose(np.diff(y), h, rtol=1e-6, atol=0):
        return None
    reach = int(np.ceil(TAIL * sigma / h))
    weights = np.exp(-((np.arange(-reach, reach + 1) * h / sigma) ** 2) / 2)
    return weights / weights.sum()


def total_variation(one: Array, other: Array, y: Array) -> float:
    """Half the integral of |p - q|, for densities on the grid."""
    return float(np.trapezoid(np.abs(one - other), y)) / 2


def kl_divergence(one: Array, other: Array, y: Array) -> float:
    """KL(one || other), nats."""
    held = one > 0
    ratio = np.log(np.where(held, one, 1.0)) - np.log(np.where(held, np.maximum(other, 1e-300), 1.0))
    return float(np.trapezoid(one * ratio, y))


# ------------------------------------------------------------------------------------------------------ the problem


def grid_problem(
    alpha: Any,
    sigma: Any,
    beta: Any,
    score: Callable[[Any, int], Any],
    reward: Callable[[Any], Any],
    grid: Any,
) -> GridProblem:
    """Tables of a problem: alpha, sigma (T,) in generation order, beta a number or (T,), grid (n,) increasing.

    `score(y, t)` and `reward(y)` are called with numpy arrays (n,), or with torch tensors where `grid` is one.
    Raises ValueError naming what is wrong.
    """
    alpha, sigma = (np.atleast_1d(np.asarray(value, dtype=float)) for value in (alpha, sigma))
    beta = np.asarray(beta, dtype=float)
    beta = np.full_like(alpha, beta) if beta.ndim == 0 else beta
    y = np.asarray(grid, dtype=float)
    asked = grid if isinstance(grid, torch.Tensor) else y
    found = []
    for name, row in (("alpha", alpha), ("sigma", sigma), ("beta", beta)):
        if row.shape != alpha.shape or row.ndim != 1:
            found.append(f"{name} has shape {row.shape} but alpha has {alpha.shape}; give one number per step")
        else:
            found += range_problems(name, row.tolist())
    if alpha.size == 0:
        found.append("alpha is empty; give one number per step")
    if y.ndim != 1 or len(y) < 8 or not (np.diff(y) > 0).all():
        found.append("grid is not an increasing one-dimensional array of at least 8 points")
    if found:
        raise ValueError("; ".join(found))
    s = np.stack([np.asarray(score(asked, t), dtype=float) for t in range(len(alpha))])
    r = np.asarray(reward(asked), dtype=float)
    if s.shape != (len(alpha), len(y)) or r.shape != y.shape:
        raise ValueError(f"score and reward give shapes {s.shape[1:]} and {r.shape} on a grid of {y.shape}")
    if not (np.isfinite(s).all() and np.isfinite(r).all()):
        raise ValueError("score or reward is not finite on the grid")
    return GridProblem(1 / np.sqrt(alpha), (1 - alpha) / np.sqrt(alpha), sigma, beta, y, s, r)


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(problem: GridProblem, u: Array, initial: str | Array = "fixed") -> Evaluation:
    """J and its parts for any control table (T, n): line 8 backwards, the reward and the KL by recursions of their own.

    `initial`: "fixed" (N(0, 1)), "tilted" (the best q0 for this control) or a density (n,).
    """
    reward, kl, V = problem.r, np.zeros_like(problem.r), [problem.r]
    for t in reversed(range(problem.T)):
        reward, kl = (_next(problem, t, table, problem.mean(t, u[t])) for table in (reward, kl))
        kl = kl + problem.w[t] * (u[t] - problem.s[t]) ** 2
        V.append(value(problem, t, V[-1], u[t]))
    q0 = _initial_density(problem, V[-1], initial)
    initial_kl = 0.0 if q0 is problem.base_law else kl_divergence(q0, problem.base_law, problem.y)
    return Evaluation(
        V=np.stack(V[::-1]), objective=problem.integral(q0 * V[-1]) - float(problem.beta[0]) * initial_kl,
        expected_reward=problem.integral(q0 * reward), path_kl=problem.integral(q0 * kl), initial_kl=initial_kl,
        initial_density=q0,
    )  # fmt: skip


def value(problem: GridProblem, t: int, V: Array, u: Array) -> Array:
    """V_t from V_{t+1} = `V` under the control u: line 8, policy evaluation."""
    return _next(problem, t, V, problem.mean(t, u)) - problem.beta[t] * problem.w[t] * (u - problem.s[t]) ** 2


def _next(problem: GridProblem, t: int, table: Array, x: Array) -> Array:
    """E table(x + sigma_t W), (n,)."""
    return Smooth(problem.y, expected(problem.y, table, float(problem.sigma[t])))(x)


def _initial_density(problem: GridProblem, V: Array, initial: str | Array) -> Array:
    if not isinstance(initial, str):
        return np.asarray(initial, dtype=float)
    if initial == "fixed":
        return problem.base_law
    if initial != "tilted":
        raise ValueError(f"initial_law={initial!r} is not known; choose fixed, tilted or a density on the grid")
    return tilted(problem.base_law, V / problem.beta[0], problem.y)


def tilted(density: Array, exponent: Array, y: Array) -> Array:
    """density * e^exponent, normalised."""
    weights = density * np.exp(exponent - exponent[density > 0].max())
    return weights / np.trapezoid(weights, y)


# ------------------------------------------------------------------------------------------------------ Algorithm 1


def policy_iteration(
    alpha: Any,
    sigma: Any,
    beta: Any,
    score: Callable[[Any, int], Any],
    reward: Callable[[Any], Any],
    grid: Any,
    inner_steps: int | Sequence[int] | None = None,
    tol: float = 1e-12,
    *,
    damping: str | float | None = "auto",
    initial_law: str | Array = "fixed",
    future_kl: bool = True,
) -> Solution:
    """Algorithm 1 from u^(0) = s: `inner_steps` inner steps at each t, or, where None, until the control moves by less
    than `tol` (relative to 1 + max |u|). Arguments as in `grid_problem`; `damping` as in lq.policy_iteration;
    `future_kl` False takes the gradient of the expected reward alone, as DPOK as published does.

    Raises IllPosed and, without damping where kappa_t >= 1, Diverges (ValueErrors that name t, kappa, beta and the
    smallest beta that works).
    """
    problem = grid_problem(alpha, sigma, beta, score, reward, grid)
    return iterate(problem, inner_steps, tol, damping, initial_law, future_kl)


def iterate(
    problem: GridProblem,
    inner_steps: int | Sequence[int] | None = None,
    tol: float = 1e-12,
    damping: str | float | None = "auto",
    initial_law: str | Array = "fixed",
    future_kl: bool = True,
) -> Solution:
    """Algorithm 1 on tables; see `policy_iteration`. The margin has the paper's steps, as in lq.iterate."""
    m_t = step_counts(MOST_STEPS + 1 if inner_steps is None else inner_steps, problem.T)

    def works(scale: float) -> bool:
        scaled = replace(problem, beta=scale * problem.beta)
        return works_at(scaled, None if inner_steps is None else m_t, damping, future_kl)

    V = target = problem.r                                                             # V_T = r
    rows: list[tuple[Array, Step, Array, float]] = []
    for t in reversed(range(problem.T)):                                               # for t = T-1, ..., 0
        G = Smooth(problem.y, expected(problem.y, target, float(problem.sigma[t])))    #   E V_{t+1}(. + sigma W)
        step = step_at(t, *bends(problem, t, G), float(problem.beta[t]), damping, works)
        limit, u = fixed_point(problem, t, G), problem.s[t]                            #   u^(0) = s
        found, rate, before = [], np.full_like(u, np.nan), None
        for m in range(m_t[t] + 1):                                                    #   line 6: for m < m_t
            error = np.abs(u - limit)
            rate, before = _measured_rate(before, error, limit, rate), error
            found.append(float(error.max()))
            if m == m_t[t] and inner_steps is None:
                raise ArithmeticError(f"eq. 18 did not converge at t={t} in {MOST_STEPS} inner steps (tol={tol:g})")
            if m == m_t[t]:
                break
            new = _eq_18(problem, t, G, u)                                             #     line 7: eq. 18
            moved, u = float(np.abs(new - u).max()), u + step.eta * (new - u)          #     (damped: part of the way)
            if inner_steps is None and moved <= tol * (1 + float(np.abs(u).max())):
                break
        V = value(problem, t, V, u)                                                    #   line 8: V_t = E V - beta KL
        target = V if future_kl else G(problem.mean(t, u))                             #   (or E r alone, as DPOK)
        rows.append((u, step, np.array(found), _largest(rate)))
    if not future_kl and isinstance(initial_law, str) and initial_law == "tilted":     #   DPOK's Y_0 sees E r alone too
        initial_law = tilted(problem.base_law, target / float(problem.beta[0]), problem.y)
    us, steps, errors, rates = zip(*rows[::-1], strict=True)
    kappa, eta, factor = (np.array(column) for column in zip(*steps, strict=True))
    return Solution(
        **vars(evaluate(problem, np.stack(us), initial_law)), problem=problem, u=np.stack(us), kappa=kappa,
        rate=np.array(rates), eta=eta, factor=factor, errors=list(errors),
    )  # fmt: skip


def _measured_rate(before: Array | None, after: Array, limit: Array, known: Array) -> Array:
    """(n,): the ratio of two successive errors where the second is above rounding, elsewhere what was known."""
    if before is None:
        return known
    held = after > 1e-9 * (1 + np.abs(limit))
    return np.where(held, after / np.where(held, before, 1.0), known)


def _largest(values: Array) -> float:
    """The maximum of those that are no NaN, NaN where all are."""
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else float("nan")


def bends(problem: GridProblem, t: int, G: Smooth) -> tuple[float, float]:
    """The smallest and largest rho_t E V''_{t+1} where the pre-trained chain leads to from the grid."""
    z = problem.mean(t, problem.s[t])
    found = problem.rho[t] * G(np.linspace(z.min(), z.max(), len(z)), 2)
    return float(found.min()), float(found.max())


def _eq_18(problem: GridProblem, t: int, G: Smooth, u: Array) -> Array:
    """s + c_t E grad V_{t+1}(A y + B u + sigma W)."""
    return problem.s[t] + problem.gain[t] * G(problem.mean(t, u), 1)


def works_at(
    problem: GridProblem,
    m_t: Sequence[int] | None,
    damping: str | float | None = "auto",
    future_kl: bool = True,
) -> bool:
    """Whether no step of Algorithm 1, with m_t inner steps (None: all it takes), is ill-posed or would diverge."""
    V = target = problem.r
    for t in reversed(range(problem.T)):
        G = Smooth(problem.y, expected(problem.y, target, float(problem.sigma[t])))
        low, high = bends(problem, t, G)
        step = choose_step(low, high, damping) if high < 1 else None
        if step is None:
            return False
        u = fixed_point(problem, t, G) if m_t is None else problem.s[t]
        for _ in range(0 if m_t is None else m_t[t]):
            u = u + step.eta * (_eq_18(problem, t, G, u) - u)
        V = value(problem, t, V, u)
        target = V if future_kl else G(problem.mean(t, u))
    return True


def fixed_point(problem: GridProblem, t: int, G: Smooth) -> Array:
    """The control with u = s + c G'(A y + B u): Newton on x - rho G'(x) = z, z the pre-trained mean."""
    if problem.rho[t] == 0:
        return problem.s[t]
    rho, z = problem.rho[t], problem.mean(t, problem.s[t])
    x = z
    for _ in range(200):
        move = (x - rho * G(x, 1) - z) / (1 - rho * G(x, 2))
        x = x - move
        if np.abs(move).max() <= 1e-14 * (1 + np.abs(x).max()):
            break
    return (x - problem.A[t] * problem.y) / problem.B[t]


# ------------------------------------------------------------------------------------------------------ laws


def terminal_density(problem: GridProblem | Solution, u: Array | None = None, initial: Array | None = None) -> Array:
    """(n,): the density of Y_T under the control table `u` (T, n; the pre-trained one by default), from `initial`
    (N(0, 1) by default); of a Solution, under its own control and from its own initial law.

    Raises ValueError where y -> A y + B u(y) is not increasing: the density would fold over.
    """
    if isinstance(problem, Solution):
        return problem.terminal_density
    return densities(problem, problem.s if u is None else u, initial)[-1]


def densities(problem: GridProblem, u: Array, initial: Array | None = None) -> Array:
    """(T + 1, n): the densities of Y_0 .. Y_T; see `terminal_density`."""
    found = [problem.base_law if initial is None else initial]
    for t in range(problem.T):
        found.append(_pushed(problem, t, found[-1], problem.mean(t, u[t])))
    return np.stack(found)


def policy_gradient(problem: GridProblem, u: Array, initial: str | Array = "fixed") -> tuple[float, Array]:
    """J and, (T, n), the density of its gradient in the control: for u_theta, dJ/dtheta is the integral over y of
    sum_t gradient[t] du_theta[t]/dtheta. Exact: p_t(y) [B_t E V'_{t+1} - 2 beta_t w_t (u - s)], later KLs included.
    """
    worth = evaluate(problem, u, initial)
    p, slopes = densities(problem, u, worth.initial_density), []
    for t in range(problem.T):
        G = Smooth(problem.y, expected(problem.y, worth.V[t + 1], float(problem.sigma[t])))
        pull = problem.B[t] * G(problem.mean(t, u[t]), 1)
        slopes.append(p[t] * (pull - 2 * problem.beta[t] * problem.w[t] * (u[t] - problem.s[t])))
    return worth.objective, np.stack(slopes)


def _pushed(problem: GridProblem, t: int, density: Array, x: Array) -> Array:
    """The density of x(Y) + sigma_t W for Y ~ `density`."""
    slope = CubicSpline(problem.y, x)(problem.y, 1)
    if not ((np.diff(x) > 0).all() and (slope > 0).all()):
        raise ValueError(f"the closed-loop mean is not increasing in y at t={t}: refine or widen the grid")
    moved, sigma = CubicSpline(x, density / slope, extrapolate=False), float(problem.sigma[t])
    kernel = _kernel(problem.y, sigma) if sigma > 0 else np.ones(1)
    if kernel is None:
        return np.nan_to_num(moved(problem.y[:, None] - sigma * NODES)) @ WEIGHTS
    reach = len(kernel) // 2
    return np.convolve(np.pad(np.nan_to_num(moved(problem.y)), reach), kernel, "valid")


def path_tilt_density(problem: GridProblem, initial_law: str = "fixed") -> Array:
    """(n,): the terminal law when every kernel is p e^{V/beta}, one beta: e^{r/beta} times the base chain's push of
    q0/phi_0, where phi_t = E_base[e^{r/beta} | Y_t]. With initial_law="tilted" it is the ideal tilt, exactly."""
    beta = _one_beta(problem)
    top = problem.r.max()
    phi = np.exp((problem.r - top) / beta)
    terminal = phi
    for t in reversed(range(problem.T)):
        phi = _next(problem, t, phi, problem.mean(t, problem.s[t]))
    q0 = _initial_density(problem, beta * np.log(phi), initial_law)
    return terminal * terminal_density(problem, problem.s, q0 / phi)


def ideal_tilt_density(problem: GridProblem) -> Array:
    """(n,): p_pre(y_T) e^{r/beta}, normalised."""
    return tilted(terminal_density(problem, problem.s), problem.r / _one_beta(problem), problem.y)


def _one_beta(problem: GridProblem) -> float:
    if not (problem.beta == problem.beta[0]).all():
        raise ValueError("beta varies with t: the tilts p e^(V/beta) are defined for one beta; give a number")
    return float(problem.beta[0])
