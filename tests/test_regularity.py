"""The bounds along Algorithm 1 hold where they are finite and are exact where theory says so; the contraction schedule;
nearly linear-quadratic problems.

Bounds are suprema over the same grid as what they bound: they may be missed by the spline's error only, 1e-4 relative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_cases import ALPHA, SCALAR, TWO_MODES, Array, score_on, signal, strided

from workers.core import grid, lq
from workers.core import regularity as reg

Y = np.linspace(-8, 8, 801)
SLACK = 1 + 1e-4


def mixture(beta: Any, T: int = 25, reward: Any = np.sin) -> grid.GridProblem:
    alpha, sigma = strided(T)
    return grid.grid_problem(alpha, sigma, beta, score_on(TWO_MODES, alpha), reward, Y)


def nearly_lq(epsilon: float, Q: float = -1.0, beta: float = 0.5) -> grid.GridProblem:
    """The golden chain with the score of a Gaussian plus epsilon * sin(y)."""
    abar = signal(ALPHA)
    P = 1 / (0.25 * abar + 1 - abar)
    p = P * np.sqrt(abar)

    def score(y: Array, t: int) -> Array:
        return -P[t] * y + p[t] + epsilon * np.sin(y)

    return grid.grid_problem(ALPHA, SCALAR["sigma"], beta, score, lambda y: Q * y**2 / 2 + 0.5 * y, Y)


def last_step(problem: grid.GridProblem, t: int, V: Array) -> grid.GridProblem:
    """The step t alone, with V_{t+1} for its reward."""
    rows = {name: getattr(problem, name)[t : t + 1] for name in ("A", "B", "sigma", "beta", "s")}
    return replace(problem, **rows, r=V)


def quadratic_problem(d: int, sign: float, seed: int = 0, T: int = 6) -> lq.LinearQuadratic:
    """Random data, chain and beta_t; a reward with eigenvalues of one sign (1), the other (-1) or both (0)."""
    rng = np.random.default_rng(seed)
    alpha, (half, turn) = rng.uniform(0.6, 0.98, T), rng.normal(size=(2, d, d))
    values = np.linspace(0.1, 0.4, d) * (sign or np.where(np.arange(d) % 2, 1, -1))
    basis = np.linalg.qr(turn)[0]
    return lq.gaussian_problem(
        alpha, np.sqrt(1 - alpha) * rng.uniform(0.5, 1, T), rng.uniform(0.8, 2, T), rng.normal(size=d),
        half @ half.T / d + 0.1 * np.eye(d), basis @ np.diag(values) @ basis.T, rng.normal(size=d),
    )  # fmt: skip


# ---- bounds in one dimension


@pytest.mark.parametrize("beta", [2.0, 40.0])
def test_values_stay_within_their_bounds(beta: float) -> None:
    """The mixture, r = sin(y): of the whole recursion where finite, and of each step given the constants of V_{t+1}.

    Kills: J for J^2; 1 + rho L for 1 - rho L; the DJ term missing; rho without sigma^2; J of another step.
    """
    problem = mixture(beta)
    found = grid.iterate(problem)
    seen, bound = reg.measured(problem, found.V), reg.bounds(problem)
    assert (seen.V <= bound.V * SLACK).all() and (seen.grad_V <= bound.grad_V * SLACK).all()
    assert (seen.V[-1], seen.grad_V[-1]) == (bound.V[-1], bound.grad_V[-1]) == pytest.approx((1, 1), abs=1e-3)
    assert np.isfinite(bound.grad_V).sum() >= (3 if beta == 2 else 4) and np.isfinite(bound.V).all()
    held = 0
    for t in range(25):
        one = reg.bounds(last_step(problem, t, found.V[t + 1]))
        assert seen.V[t] <= one.V[0] * SLACK, t
        assert seen.grad_V[t] <= one.grad_V[0] * SLACK, t
        held += np.isfinite(one.grad_V[0])
    assert held >= 22


def test_the_bounds_recursion_in_numbers() -> None:
    """One step: l = J l', L = J^2 L'/(1 - rho L') + DJ l', J and DJ by differences; inf from where rho L' >= 1.

    Kills: any factor of it too many, which no inequality would notice.
    """
    problem = last_step(nearly_lq(2.0, Q=0.6), 1, np.sin(Y))
    h = Y[1] - Y[0]
    mean = problem.mean(0, problem.s[0])
    slope = np.gradient(mean, h)[3:-3]
    bend = np.gradient(np.gradient(mean, h), h)[3:-3]
    J, DJ = np.abs(slope).max(), np.abs(bend).max()
    rho = 0.3 / 0.5
    bound = reg.bounds(problem)
    assert bound.V[0] == pytest.approx(J, rel=1e-3)
    assert bound.grad_V[0] == pytest.approx(J**2 / (1 - rho) + DJ, rel=1e-3)
    assert DJ > 0.5 and abs(J - 1) > 0.05
    strong = reg.bounds(replace(problem, r=1.7 * np.sin(Y)))  # rho L = 1.02
    assert strong.grad_V[0] == np.inf and np.isfinite(strong.V[0])


def test_bounds_are_exact_for_convex_quadratics() -> None:
    """F constant, DJ = 0: the bound on Lip(grad V_t) is |Q_t| itself, and Lip(V_t) on an even grid the product's.

    Kills: J^2 for J in Lip(V); the recursion run forwards.
    """
    problem = nearly_lq(0.0, Q=0.3)
    found = grid.iterate(problem)
    seen, bound = reg.measured(problem, found.V), reg.bounds(problem)
    np.testing.assert_allclose(seen.grad_V, bound.grad_V, rtol=1e-8)
    abar = signal(ALPHA)
    F = np.abs(1 - (1 - ALPHA) / (0.25 * abar + 1 - abar)) / np.sqrt(ALPHA)
    expected = (0.3 * 8 + 0.5) * np.append(np.cumprod(F[::-1])[::-1], 1)
    np.testing.assert_allclose(bound.V, expected, rtol=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_iterates_stay_within_their_bounds(steps: int) -> None:
    """Lip(A y + B u^(m)) <= J sum_{j <= m} (rho L)^j with L of the V_{t+1} at hand: equal for m = 0, and strictly below
    somewhere for others.

    Kills: a sum to m - 1; rho L of V_t; J forgotten.
    """
    problem = mixture(2.0)
    found = grid.iterate(problem, steps)
    constants = reg.iterate_constants(problem, found.u)
    bound = reg.iterate_bounds(problem, reg.measured(problem, found.V).grad_V, steps)
    assert constants.shape == bound.shape == (25,)
    assert (constants <= bound * SLACK).all()
    if steps == 0:
        np.testing.assert_allclose(constants, bound, rtol=1e-12)
    else:
        assert (constants < 0.9 * bound).any()
    convex = nearly_lq(0.0, Q=0.3)
    iterated = grid.iterate(convex, steps)
    tight = reg.iterate_bounds(convex, reg.measured(convex, iterated.V).grad_V, steps)
    np.testing.assert_allclose(reg.iterate_constants(convex, iterated.u), tight, rtol=1e-8)


# ---- bounds on matrices


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_matrices_stay_within_their_bounds(d: int, sign: float) -> None:
    """|Q_t|_2 of the optimum and after two inner steps; equal where the reward is convex and all directions are alike.

    Kills: |F| for |F|^2; a Frobenius norm (too large by sqrt(d) where it is to be exact); rho without sigma^2.
    """
    for seed in range(4):
        problem = quadratic_problem(d, sign, seed)
        bound = reg.lq_bounds(problem)
        for found in (lq.optimum(problem), lq.iterate(problem, 2)):
            norms = torch.linalg.matrix_norm(found.Q, 2)
            assert (norms <= bound * (1 + 1e-12)).all()
        assert bound[-1] == torch.linalg.matrix_norm(problem.Q, 2) and bound.isfinite().sum() >= 3
    some, eye = quadratic_problem(d, 1.0), torch.eye(d, dtype=torch.float64)
    alike = replace(some, P=some.P[:, :1, :1] * eye, Q=0.2 * eye)
    torch.testing.assert_close(
        reg.lq_bounds(alike), torch.linalg.matrix_norm(lq.optimum(alike).Q, 2), rtol=1e-12, atol=0.0
    )
    strong = reg.lq_bounds(replace(quadratic_problem(2, 1.0), beta=torch.full((6,), 0.02, dtype=torch.float64)))
    assert strong[0] == torch.inf and strong[-1].isfinite()


# ---- the schedule with a guaranteed rate


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("floor", [0.01, 0.3])
def test_contraction_schedule_on_the_grid(rate: float, floor: float) -> None:
    """kappa_t <= rate at every t, and equal to it where beta is above its floor; the measured rate obeys it.

    Kills: the rate forgotten (kappa = 1), or multiplied; a floor ignored, or taken for all; E V_t for E V_{t+1}; V of
    the floor's beta.
    """
    problem = mixture(1.0)
    beta = reg.contraction_beta_grid(problem, rate, floor)
    found = grid.iterate(replace(problem, beta=beta), damping=None)
    assert beta.shape == (25,) and (beta >= floor).all() and (found.kappa <= rate + 1e-6).all()
    raised = beta > floor
    assert raised.any() and not raised.all()
    np.testing.assert_allclose(found.kappa[raised], rate, rtol=0, atol=1e-6)
    assert np.nanmax(found.rate) <= rate + 2e-3  # the grid's points do not meet the maximum itself
    assert found.objective == pytest.approx(grid.iterate(replace(problem, beta=beta), 60).objective, abs=1e-9)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_contraction_schedule_of_matrices(rate: float, sign: float) -> None:
    """As on the grid; a floor per step is a floor per step. Kills: as there, and a one-sided kappa."""
    floor = torch.linspace(0.005, 0.3, 6, dtype=torch.float64)
    problem = quadratic_problem(3, sign, seed=5)
    beta = reg.contraction_beta_lq(problem, rate, floor)
    steered = replace(problem, beta=beta)
    found = lq.iterate(steered, 12, damping=None)
    assert (beta >= floor).all() and (lq.optimum(steered).kappa <= rate + 1e-12).all()
    raised = beta > floor
    assert raised.any() and not raised.all()
    torch.testing.assert_close(
        lq.optimum(steered).kappa[raised], torch.full_like(beta[raised], rate), rtol=1e-12, atol=0.0
    )
    assert (found.rate[~found.rate.isnan()] <= rate + 1e-2).all() and not found.rate.isnan().all()
    assert float(found.factor.max()) <= rate + 1e-2
    everywhere = reg.contraction_beta_lq(problem, rate, 5.0)
    assert (everywhere == 5.0).all()


def test_grid_and_matrices_give_one_schedule() -> None:
    """The golden chain: the same beta_t, numbers and floors alike."""
    chain = lq.gaussian_problem(**SCALAR)
    for rate, floor in ((0.4, 0.05), (0.8, 0.2)):
        on_grid = reg.contraction_beta_grid(nearly_lq(0.0), rate, floor)
        exact = reg.contraction_beta_lq(replace(chain, beta=3 * chain.beta), rate, floor)  # its own beta plays no part
        np.testing.assert_allclose(on_grid, exact.numpy(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, True, "0.5", None])
def test_a_rate_that_is_none_is_named(rate: Any) -> None:
    assert reg.rate_problems(0.5) == []
    assert reg.rate_problems(rate) == [
        f"beta_rate={rate!r} is no contraction rate: above 0 and below 1; write beta.rate=0.5"
    ]
    with pytest.raises(ValueError, match="beta_rate="):
        reg.contraction_beta_grid(mixture(1.0, T=10), rate, 0.1)
    with pytest.raises(ValueError, match="beta_rate="):
        reg.contraction_beta_lq(quadratic_problem(2, 1.0), rate, 0.1)


# ---- nearly linear-quadratic


def test_kappa_of_a_nearly_quadratic_problem_is_nearly_the_quadratics() -> None:
    """The difference is O(epsilon): halving epsilon halves it, at every t but the last, where V_{t+1} = r.

    Kills: a kappa that does not see the score (its difference vanishes).
    """
    exact = lq.solve(**{**SCALAR, "reward_c": 0.0}).kappa
    np.testing.assert_allclose(grid.iterate(nearly_lq(0.0)).kappa, exact, rtol=0, atol=1e-9)
    away = [grid.iterate(nearly_lq(epsilon)).kappa - exact for epsilon in (0.1, 0.05, 0.025)]
    assert np.abs(away[0]).max() < 0.3 * 0.1
    for wide, narrow in zip(away, away[1:], strict=False):
        np.testing.assert_allclose(wide[:3] / narrow[:3], 2, rtol=0, atol=0.1)
        assert abs(wide[3]) < 1e-9


@pytest.mark.parametrize(("epsilon", "tolerance"), [(0.0, 0.02), (0.1, 0.08)])
def test_the_gap_of_a_nearly_quadratic_problem_falls_as_kappa_squared(epsilon: float, tolerance: float) -> None:
    """J* - J(m) with m inner steps at every t: log-linear in m with slope about 2 log max kappa, and the control
    converges.

    Kills: eq. 18 with another gain than the limit's; kappa for kappa^2.
    """
    problem = nearly_lq(epsilon)
    best = grid.iterate(problem)
    found = [grid.iterate(problem, m) for m in range(9)]
    gaps = np.array([best.objective - one.objective for one in found])
    assert (gaps > 0).all()
    slope = np.polyfit(np.arange(4, 9), np.log(gaps[4:]), 1)[0]
    assert slope == pytest.approx(2 * np.log(best.kappa.max()), rel=tolerance)
    np.testing.assert_allclose(grid.iterate(problem, 25).u, best.u, rtol=0, atol=1e-9)
