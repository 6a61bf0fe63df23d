"""The HJB equation against the posterior's closed form, its own residual, and the chain that tends to it.

For Gaussian-mixture data V(y, tau) = beta log E[e^{r(X)/beta} | Y_tau = y] is known: in closed form for r = x, by a sum
over x else. Crank-Nicolson is of second order in step and spacing together, the chain of first order in 1/T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exact_cases import TWO_MODES, Array, score_on
from scipy.integrate import quad
from scipy.special import logsumexp

from workers.core import grid
from workers.core.continuous import HJB, Schedule, solve_hjb

DIFFUSION = Schedule()
BETA = 0.7


def score(y: Array, tau: float) -> Array:
    return TWO_MODES.score(y, float(DIFFUSION.abar(tau)))


def solved(steps: int, points: int, reward: Callable[[Any], Any] = lambda y: y, beta: float = BETA) -> HJB:
    return solve_hjb(DIFFUSION, beta, score, reward, np.linspace(-8, 8, points), steps)


def exact_linear(y: Array, tau: float, beta: float = BETA) -> Array:
    """beta log E[e^{X/beta} | Y_tau = y]: the posterior is a mixture of two Gaussians."""
    abar = float(DIFFUSION.abar(tau))
    weight, mean, variance = (np.array(v) for v in (TWO_MODES.weights, TWO_MODES.means, TWO_MODES.variances))
    total = abar * variance + 1 - abar
    off = y[:, None] - math.sqrt(abar) * mean
    log_share = np.log(weight) - off**2 / (2 * total) - np.log(total) / 2
    log_share = log_share - logsumexp(log_share, axis=1, keepdims=True)
    posterior_mean = mean + math.sqrt(abar) * variance * off / total
    posterior_variance = variance * (1 - abar) / total
    return beta * logsumexp(log_share + posterior_mean / beta + posterior_variance / (2 * beta**2), axis=1)


def exact(y: Array, tau: float, reward: Callable[[Array], Array], beta: float = BETA) -> Array:
    """beta log E[e^{r(X)/beta} | Y_tau = y] by a sum over x, tau < 1."""
    abar, x = float(DIFFUSION.abar(tau)), np.linspace(-6, 6, 2401)
    log_joint = np.log(TWO_MODES.density(x)) - (y[:, None] - math.sqrt(abar) * x) ** 2 / (2 * (1 - abar))
    return beta * (logsumexp(log_joint + reward(x) / beta, axis=1) - logsumexp(log_joint, axis=1))


def wavy(y: Any) -> Any:
    return np.sin(2 * y) - 0.3 * y


# ---- the equation


def test_the_schedule_is_the_integral_of_its_rate() -> None:
    """And its chain's product; the continuous form of DDPM's. Kills: high and low swapped; tau run backwards; a rate
    without its 1/2 in the exponent."""
    for tau in (0.0, 0.3, 0.9):
        assert DIFFUSION.abar(tau) == pytest.approx(math.exp(-quad(DIFFUSION.rate, tau, 1)[0]), rel=1e-12)
    assert DIFFUSION.abar(1.0) == 1 and (DIFFUSION.rate(0), DIFFUSION.rate(1)) == (20.0, pytest.approx(0.1))
    alpha, sigma = DIFFUSION.chain(40)
    assert np.prod(alpha) == pytest.approx(DIFFUSION.abar(0.0), rel=1e-12)
    np.testing.assert_allclose(np.prod(alpha[12:]), DIFFUSION.abar(0.3), rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1 - alpha, rtol=0, atol=1e-15)
    ddpm = np.log(1 - np.linspace(1e-4, 0.02, 1000)).sum()
    assert math.log(DIFFUSION.abar(0.0)) == pytest.approx(ddpm, rel=0.01)


def test_value_is_the_posteriors_closed_form() -> None:
    """At every tenth of the time, |y| < 4, to 1e-3 and J to 1e-5. Kills: the drift's sign; b for b/2 in the diffusion;
    a V without beta; tau taken at the wrong end of a step."""
    found = solved(1200, 1201)
    inner = np.abs(found.y) < 4
    for i in range(0, 1201, 120):
        np.testing.assert_allclose(found.V[i][inner], exact_linear(found.y, found.tau[i])[inner], rtol=0, atol=1e-3)
    J = np.trapezoid(exact_linear(found.y, 0.0) * np.exp(-(found.y**2) / 2), found.y) / math.sqrt(2 * math.pi)
    assert found.objective == pytest.approx(J, abs=1e-5)
    assert found.tau.tolist() == np.linspace(0, 1, 1201).tolist() and found.V.shape == (1201, 1201)
    np.testing.assert_allclose(found.V[-1], found.y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [0.4, 1.5])
def test_value_of_a_reward_that_is_no_line(beta: float) -> None:
    """Kills: a maximum of r/beta subtracted and not put back, or put back without beta; e^r for e^{r/beta}."""
    found = solved(800, 801, lambda y: 3 + wavy(y), beta)
    inner = np.abs(found.y) < 4
    for i in (0, 300, 600, 720):
        expected = 3 + exact(found.y, found.tau[i], wavy, beta)
        np.testing.assert_allclose(found.V[i][inner], expected[inner], rtol=0, atol=3e-3)
    np.testing.assert_allclose(found.V[0][inner], 3 + exact(found.y, 0.0, wavy, beta)[inner], rtol=0, atol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.75])
def test_second_order_when_step_and_spacing_are_halved(tau: float) -> None:
    """The error falls by 4 each time. Kills: an implicit or explicit step for Crank-Nicolson; the operator at the end
    of the step for its middle; a one-sided drift inside."""
    errors = []
    for n in (100, 200, 400):
        found = solved(n, n + 1)
        i, inner = round(tau * n), np.abs(found.y) < 4
        assert found.tau[i] == pytest.approx(tau)
        errors.append(np.abs(found.V[i] - exact_linear(found.y, tau))[inner].max())
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, abs=0.2)


def test_the_hjb_equation_holds() -> None:
    """V_tau + (b y/2 + b s) V' + b V''/2 + b V'^2/(2 beta) = 0 by differences, against its largest term.

    Kills: a control cost without beta or its 1/2; the drift of another time; b missing from any term.
    """
    found = solved(1000, 801, wavy)
    h, dt = found.y[1] - found.y[0], found.tau[1]
    inner = np.abs(found.y) < 4
    for i in (100, 400, 700, 850):
        V, tau = found.V[i], found.tau[i]
        V_tau = (found.V[i + 1] - found.V[i - 1]) / (2 * dt)
        slope, bend = np.gradient(V, h), np.gradient(np.gradient(V, h), h)
        b = DIFFUSION.rate(tau)
        terms = (V_tau, b * (found.y / 2 + score(found.y, tau)) * slope, b / 2 * bend, b / (2 * BETA) * slope**2)
        size = max(np.abs(term[inner]).max() for term in terms)
        assert np.abs(sum(terms)[inner]).max() < 0.01 * size, i


def test_the_grid_may_be_wider() -> None:
    """Nothing is assumed beyond the ends: V inside does not notice where they are. Kills: V = 0 or a flat V there."""
    one = solved(400, 401)
    wide = solve_hjb(DIFFUSION, BETA, score, lambda y: y, np.linspace(-12, 12, 601), 400)
    inside = np.abs(wide.y) <= 8 + 1e-9
    for i in (0, 200, 380):
        gap = np.abs(wide.V[i][inside] - one.V[i])
        assert gap.max() < 2e-2 and gap[np.abs(one.y) < 6].max() < 1e-6


def test_errors_of_the_solver() -> None:
    """A drift that leaves the grid names tau; a phi that is no longer positive is no NaN."""
    with pytest.raises(ValueError, match=r"the pre-trained drift leaves the grid at tau=0.9\d+; widen the grid"):
        solve_hjb(DIFFUSION, 0.7, lambda y, tau: 0 * y, lambda y: y, np.linspace(-8, 8, 101), 50)
    with pytest.raises(ValueError, match="drift leaves the grid"):
        solve_hjb(DIFFUSION, 0.7, score, lambda y: y, np.linspace(0.5, 8, 101), 50)
    with pytest.raises(ArithmeticError, match="phi lost its sign at tau="):
        solved(4, 801, lambda y: 40.0 * (np.abs(y) < 0.05))


# ---- the chain tends to it


@pytest.fixture(scope="module")
def chains() -> dict[int, tuple[grid.Solution, Array]]:
    """T -> the optimum of the chain of T steps, and the indices of |y| < 4."""
    y = np.linspace(-8, 8, 801)
    found = {}
    for T in (50, 100, 200, 400):
        alpha, sigma = DIFFUSION.chain(T)
        found[T] = grid.policy_iteration(alpha, sigma, BETA, score_on(TWO_MODES, alpha), lambda x: x, y)
    return {T: (one, np.abs(y) < 4) for T, one in found.items()}


def order(errors: dict[int, float]) -> float:
    """Minus the slope of log error in log T."""
    return float(-np.polyfit(np.log([*errors]), np.log([*errors.values()]), 1)[0])


def test_the_chain_tends_to_it_with_order_one(chains: dict[int, tuple[grid.Solution, Array]]) -> None:
    """V_0 and J, against the closed form, which solve_hjb meets. J* of the chain lies below: it controls less.

    Kills: a chain whose sigma or alpha is off by a step; a beta in one and not in the other.
    """
    y = next(iter(chains.values()))[0].problem.y
    V_0 = exact_linear(y, 0.0)
    J = float(np.trapezoid(V_0 * np.exp(-(y**2) / 2), y) / math.sqrt(2 * math.pi))
    values = {T: float(np.abs(one.V[0] - V_0)[inner].max()) for T, (one, inner) in chains.items()}
    gaps = {T: J - one.objective for T, (one, _) in chains.items()}
    assert order(values) == pytest.approx(1, abs=0.1) and values[400] < 0.01
    assert min(gaps.values()) > 0 and order(gaps) == pytest.approx(1, abs=0.1) and gaps[400] < 0.01
    assert solved(800, 801).objective == pytest.approx(J, abs=1e-4)


def test_the_chains_control_tends_to_s_plus_grad_V_over_beta(chains: dict[int, tuple[grid.Solution, Array]]) -> None:
    """c_t -> 1/beta, at tau = 0, 1/2 and 3/4. Kills: 1/beta^2; V' of the wrong time; g^2/beta for 1/beta."""
    for tau in (0.0, 0.5, 0.75):
        errors = {}
        for T, (one, inner) in chains.items():
            if T % 4 == 0:
                t, y = round(tau * T), one.problem.y
                limit = score(y, tau) + np.gradient(exact_linear(y, tau), y) / BETA
                errors[T] = float(np.abs(one.u[t] - limit)[inner].max())
                assert one.problem.gain[t] == pytest.approx(1 / BETA, rel=12 / T)
        assert order(errors) == pytest.approx(1, abs=0.2), tau
