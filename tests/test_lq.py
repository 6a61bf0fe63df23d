"""Algorithm 1 on linear-quadratic problems against golden numbers, and against a plain loop that knows only the paper.

`worth` carries mean and covariance through Y' = (Y + (1-a) u)/sqrt(a) + sigma W in numpy, after section 1 of the design
notes; it shares no line with workers.core. The golden table has 12 digits: 1e-10. Everything else is float64: 1e-9
relative is a few thousand roundings times the condition of T = 50 steps. No beta is 1; it varies with t where it may.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from exact_cases import (
    COLUMNS,
    GOLDEN,
    GOLDEN_J,
    GOLDEN_KL,
    GOLDEN_LAWS,
    GOLDEN_REWARD,
    SCALAR,
    Array,
    smallest_beta,
    strided,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.core import lq
from workers.core.iteration import Diverges, IllPosed

QUICK = settings(deadline=None, max_examples=40, derandomize=True)


# ---- an independent evaluation


class Worth(NamedTuple):
    J: float
    reward: float
    step_kl: Array
    mean: Array
    cov: Array


def pretrained(problem: dict[str, Any], t: int) -> tuple[Array, Array]:
    """(P_t, p_t): s_t(y) = -P_t y + p_t."""
    abar = float(np.prod(problem["alpha"][t:]))
    m, S0 = np.atleast_1d(problem["data_mean"]), np.atleast_2d(problem["data_cov"])
    P = np.linalg.inv(abar * S0 + (1 - abar) * np.eye(len(m)))
    return P, P @ (np.sqrt(abar) * m)


def worth(problem: dict[str, Any], K: Array, k: Array, mean: Any = None, cov: Any = None) -> Worth:
    """J of u_t(y) = K[t] y + k[t] by moments, from N(0, I) or the given law (whose own KL is not counted)."""
    Q, q = np.atleast_2d(problem["reward_Q"]), np.atleast_1d(problem["reward_q"])
    d, T = len(q), len(problem["alpha"])
    beta = np.broadcast_to(problem["beta"], T)
    mean, cov = (np.zeros(d) if mean is None else mean), (np.eye(d) if cov is None else cov)
    kl = np.zeros(T)
    for t, (a, sigma) in enumerate(zip(problem["alpha"], problem["sigma"], strict=True)):
        P, p = pretrained(problem, t)
        slope, shift = (K[t], k[t]) if sigma > 0 else (-P, p)
        if sigma > 0:
            gap = (slope + P) @ mean + shift - p
            size = gap @ gap + np.trace((slope + P) @ cov @ (slope + P).T)  # E |u - s|^2, a sum
            kl[t] = (1 - a) ** 2 / (2 * a * sigma**2) * size
        G = (np.eye(d) + (1 - a) * slope) / np.sqrt(a)
        mean, cov = G @ mean + (1 - a) / np.sqrt(a) * shift, G @ cov @ G.T + sigma**2 * np.eye(d)
    reward = (np.trace(Q @ cov) + mean @ Q @ mean) / 2 + q @ mean + problem["reward_c"]
    return Worth(float(reward - beta @ kl), float(reward), kl, mean, cov)


def random_problem(seed: int, d: int | None = None, T: int | None = None) -> dict[str, Any]:
    """Well posed at every seed: a small indefinite reward, beta in .5 .. 2 varying with t, some sigma_t = 0."""
    rng = np.random.default_rng(seed)
    d, T = d or int(rng.integers(1, 9)), T or int(rng.integers(2, 51))
    alpha = rng.uniform(0.85, 0.999, T) if T > 10 else rng.uniform(0.4, 0.99, T)
    sigma = np.sqrt(1 - alpha) * rng.uniform(0.5, 1.1, T) * (rng.random(T) > 0.2)
    half, symmetric = rng.normal(size=(d, d)), rng.normal(size=(d, d))
    symmetric = symmetric + symmetric.T
    return {
        "alpha": alpha, "sigma": sigma, "beta": rng.uniform(0.5, 2, T), "data_mean": rng.normal(size=d),
        "data_cov": half @ half.T / d + 0.1 * np.eye(d), "reward_Q": 0.3 * symmetric / np.linalg.norm(symmetric, 2),
        "reward_q": rng.normal(size=d), "reward_c": rng.normal(),
    }  # fmt: skip


def close(found: Any, expected: Any, rel: float = 1e-9) -> None:
    """Relative to the largest entry, or 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=rel * max(1.0, float(np.abs(expected).max(initial=0))))


# ---- golden numbers


def test_golden_scalar_case() -> None:
    """Kills: alpha for sqrt(alpha); gain without B or beta; Q[t] for Q[t+1]; no trace term in c_t; the sign of the KL;
    w without its 1/2; sigma for sigma^2."""
    found = lq.solve(**SCALAR)
    for name, column in zip(COLUMNS, GOLDEN.T, strict=True):
        close(getattr(found, name)[:4].reshape(-1), column, 1e-10)
    assert (found.Q[4].item(), found.q[4].item(), found.c[4]) == (-1.0, 0.5, -0.125)
    assert found.objective == pytest.approx(GOLDEN_J, abs=1e-10)
    assert found.expected_reward == pytest.approx(GOLDEN_REWARD, abs=1e-10)
    assert found.path_kl == pytest.approx(GOLDEN_KL, abs=1e-10)
    assert found.path_kl == pytest.approx(found.step_kl.sum(), abs=1e-15)
    assert found.initial_kl == 0 and found.initial_mean == [0] and found.initial_cov == [[1]]


def test_golden_terminal_laws() -> None:
    """Kills: the path tilt with the optimum's covariance (or the other way round); a tilt by r for r/beta; the ideal
    tilt taken for the path tilt."""
    problem, found = lq.gaussian_problem(**SCALAR), lq.solve(**SCALAR)
    base = lq.evaluate(problem, problem.pretrained)
    path, ideal = lq.path_tilt(problem), lq.ideal_tilt(problem)
    laws = {
        "base": (base.terminal_mean, base.terminal_cov), "optimum": (found.terminal_mean, found.terminal_cov),
        "path tilt": (path.mean, path.cov), "ideal tilt": (ideal.mean, ideal.cov),
    }  # fmt: skip
    for name, law in laws.items():
        assert tuple(v.item() for v in law) == pytest.approx(GOLDEN_LAWS[name], abs=1e-10), name


def test_results_are_of_the_kind_of_the_arguments() -> None:
    """numpy and python numbers in: numpy out; torch in, of any dtype: float64 torch out; no argument is changed."""
    plain_numbers = {**SCALAR, "alpha": SCALAR["alpha"].tolist(), "sigma": SCALAR["sigma"].tolist()}
    for kind in (SCALAR, plain_numbers):
        found = lq.policy_iteration(**kind, inner_steps=2)
        assert isinstance(found.objective, float) and isinstance(found.path_kl, float)
        for name in ("K", "k", "Q", "q", "c", "kappa", "step_kl", "errors", "rate", "terminal_mean", "terminal_cov"):
            value = getattr(found, name)
            assert isinstance(value, np.ndarray) and value.dtype == np.float64, name
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in SCALAR.items()}
    before = {name: value.clone() for name, value in given.items()}
    for torch_found in (lq.solve(**given), lq.solve(**{**SCALAR, "reward_q": torch.tensor(0.5)})):
        for value in vars(torch_found).values():
            assert isinstance(value, torch.Tensor) and value.dtype == torch.float64
        close(torch_found.K, lq.solve(**SCALAR).K, 1e-14)
    assert all(torch.equal(given[name], before[name]) for name in given)


# ---- the optimum is one, and is worth what it says


@pytest.mark.parametrize("seed", range(50))
def test_random_problems_are_worth_what_an_independent_evaluation_says(seed: int) -> None:
    """J = E V_0(Y_0) = the plain loop's J, at the optimum, after two inner steps and for DPOK's fixed point.

    Kills: the trace term missing in c_t; a mean for the sum in the KL; beta forgotten in line 8 or in J; line 8 of the
    new control with the old one's KL; a reward constant lost; sigma_t = 0 not skipped.
    """
    problem = random_problem(seed)
    best = lq.solve(**problem)
    iterated, dropped = lq.policy_iteration(**problem, inner_steps=2), lq.solve(**problem, future_kl=False)
    for found in (best, iterated, dropped):
        plain = worth(problem, found.K, found.k)
        close(found.objective, plain.J)
        close(found.expected_reward, plain.reward)
        close(found.step_kl, plain.step_kl)
        close(found.path_kl, plain.step_kl.sum())
        close(found.terminal_mean, plain.mean)
        close(found.terminal_cov, plain.cov)
        assert found.objective <= best.objective + 1e-12 * (1 + abs(best.objective))
        V_0 = np.trace(found.Q[0]) / 2 + found.c[0]
        close(V_0, plain.reward if found is dropped else plain.J)
    base = lq.gaussian_problem(**problem).pretrained
    assert best.objective > worth(problem, base.K.numpy(), base.k.numpy()).J


@pytest.mark.parametrize("seed", range(0, 50, 5))
def test_no_perturbation_improves_the_optimum(seed: int) -> None:
    """Random directions at all t at once and at one t, five sizes: J falls, and to first order not at all.

    Kills: a maximiser of something else (DPOK's fixed point, a gain off by beta_t / beta_{t+1}, the control of t + 1).
    A size is the KL it costs: directions are scaled by sigma/B, so that every t matters alike.
    """
    problem, rng = random_problem(seed), np.random.default_rng(seed)
    found = lq.solve(**problem)
    alpha, sigma = problem["alpha"], problem["sigma"]
    unit = sigma * np.sqrt(alpha) / (1 - alpha) / np.sqrt(len(problem["reward_q"]))
    alone = np.flatnonzero(sigma)[-1 - seed % 2]
    for only in (None, alone):
        scale = unit if only is None else np.where(np.arange(len(alpha)) == only, unit, 0.0)
        dK, dk = rng.normal(size=found.K.shape) * scale[:, None, None], rng.normal(size=found.k.shape) * scale[:, None]
        for size in (1e-3, 1e-2, 0.1, 0.5, 2.0):
            gaps = [found.objective - worth(problem, found.K + e * dK, found.k + e * dk).J for e in (size, -size)]
            assert min(gaps) > 0, (only, size)
            if size <= 1e-2:
                assert abs(gaps[0] - gaps[1]) < 30 * size * max(gaps), (only, size)


# ---- Algorithm 1


def control_error(problem: dict[str, Any], counts: list[int], t: int) -> Array:
    """(d, d + 1): (K, k) at t after `counts` inner steps, minus the optimum's."""
    found, best = lq.policy_iteration(**problem, inner_steps=counts), lq.solve(**problem)
    return np.column_stack([found.K[t] - best.K[t], found.k[t] - best.k[t]])


def fully_controlled(seed: int, d: int, T: int) -> dict[str, Any]:
    problem = random_problem(seed, d, T)
    return {**problem, "sigma": np.sqrt(1 - problem["alpha"])}


@pytest.mark.parametrize(("t", "seed"), [(5, 1), (5, 2), (2, 3)])
def test_an_inner_step_multiplies_the_error_by_rho_Q(t: int, seed: int) -> None:
    """error^(m+1) = rho_t Q_{t+1} error^(m), a matrix identity, from u^(0) = s on; `errors` holds its norms.

    Kills: rho = sigma/beta or without beta; the score or Q of another t in eq. 18; a gain without B; an iteration that
    starts elsewhere than at s.
    """
    problem = fully_controlled(seed, d=3, T=6)
    best, rho = lq.solve(**problem), problem["sigma"][t] ** 2 / problem["beta"][t]
    P, p = pretrained(problem, t)
    error = np.column_stack([-P - best.K[t], p - best.k[t]])
    for m in range(4):
        counts = [0] * t + [m] + [60] * (5 - t)
        close(control_error(problem, counts, t), error, 1e-11)
        reported = lq.policy_iteration(**problem, inner_steps=counts).errors[t]
        assert reported[m] == pytest.approx(np.linalg.norm(error), rel=1e-9) and np.isnan(reported[m + 1 :]).all()
        error = rho * best.Q[t + 1] @ error


@pytest.mark.parametrize("seed", range(6))
def test_measured_rate_is_kappa(seed: int) -> None:
    """Kills: kappa without sigma^2, or with sigma; |Q_t| for |Q_{t+1}|; a one-sided kappa; the rate of a mere mean over
    the rows."""
    problem = random_problem(seed)
    found = lq.policy_iteration(**problem, inner_steps=4)
    seen = ~np.isnan(found.rate)
    assert seen[problem["sigma"] > 0].all() and not seen[problem["sigma"] == 0].any()
    np.testing.assert_allclose(found.rate[seen], found.kappa[seen], rtol=0.01)
    spectra = [np.abs(np.linalg.eigvalsh(Q)).max() for Q in found.Q[1:]]
    close(found.kappa, problem["sigma"] ** 2 / problem["beta"] * spectra, 1e-12)
    assert (found.eta == 1).all()
    close(found.factor, found.kappa, 1e-12)


def test_doubling_beta_halves_kappa_at_the_last_step() -> None:
    """A larger beta converges faster: exactly twice as fast per inner step where V_{t+1} = r does not depend on it.

    Kills: kappa or the gain without beta, or with its square.
    """
    problem = fully_controlled(4, d=3, T=6)
    one, two = (lq.policy_iteration(**{**problem, "beta": b * problem["beta"]}, inner_steps=3) for b in (1, 2))
    assert two.kappa[-1] == pytest.approx(one.kappa[-1] / 2, rel=1e-14)
    assert two.rate[-1] == pytest.approx(one.rate[-1] / 2, rel=1e-6)
    assert (two.kappa < one.kappa).all()


def test_value_error_falls_as_kappa_squared() -> None:
    """J* - J(u^(m)) shrinks by kappa^2 an inner step: exactly where there is one step (J is quadratic in its control),
    and asymptotically for one step of four.

    Kills: line 8 evaluating u^(m+1)'s predecessor (kappa^2 off by one step); an objective read from the value of the
    limit.
    """
    one = {**SCALAR, "alpha": SCALAR["alpha"][:1], "sigma": SCALAR["sigma"][:1], "reward_Q": -0.6}
    for problem, t, rel in ((one, 0, 1e-5), (SCALAR, 3, 0.01), (SCALAR, 1, 0.01)):
        best, later = lq.solve(**problem), [60] * (len(problem["alpha"]) - t - 1)
        counts = [[60] * t + [m] + later for m in range(4)]
        gaps = [best.objective - lq.policy_iteration(**problem, inner_steps=c).objective for c in counts]
        kappa = best.kappa[t]
        assert kappa > 0.015
        assert gaps[2] / gaps[1] == pytest.approx(kappa**2, rel=rel), t
        assert gaps[1] / gaps[0] == pytest.approx(kappa**2, rel=rel if len(counts[0]) == 1 else 0.3), t


# ---- damping, and what cannot be solved


def concave(d: int = 2) -> dict[str, Any]:
    """Well posed with kappa > 1 at two steps: a strongly concave reward, beta varying with t."""
    Q = np.diag([-150.0, -20.0, 0.3][:d]) if d > 1 else np.array([[-150.0]])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    return {
        **SCALAR, "beta": np.array([0.5, 0.7, 0.4, 0.6]), "data_mean": np.linspace(-1, 1, d),
        "data_cov": np.diag(np.linspace(0.25, 1, d)), "reward_Q": turn @ Q @ turn.T, "reward_q": np.linspace(0.5, 1, d),
    }  # fmt: skip


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_damped_step_converges_where_eq_18_diverges(d: int) -> None:
    """To solve()'s control, at the rate of theory with the best eta; None raises; a number is eta itself.

    Kills: eta of the wrong sign or 2/(2 + low + high); damping where kappa < 1 already; a factor that forgets eta;
    "auto" that never damps.
    """
    problem = concave(d)
    best, found = lq.solve(**problem), lq.policy_iteration(**problem, inner_steps=700)
    close(found.K, best.K, 1e-9)
    close(found.k, best.k, 1e-9)
    close(found.objective, best.objective)
    rho = problem["sigma"] ** 2 / problem["beta"]
    spectra = [np.linalg.eigvalsh(r * Q) for r, Q in zip(rho, best.Q[1:], strict=True)]
    damped = np.array([np.abs(values).max() >= 1 for values in spectra])
    assert damped.any() and not damped.all()
    eta = np.array([2 / (2 - v[0] - v[-1]) if is_damped else 1.0 for v, is_damped in zip(spectra, damped, strict=True)])
    factor = [np.abs(1 - e * (1 - v)).max() for e, v in zip(eta, spectra, strict=True)]
    close(found.eta, eta, 1e-9)
    close(found.factor, factor, 1e-9)
    close(found.kappa, [np.abs(v).max() for v in spectra], 1e-9)
    rates = lq.policy_iteration(**problem, inner_steps=[0, 0, 0, 4]).rate
    assert d == 1 or rates[3] == pytest.approx(factor[3], rel=0.01)
    with pytest.raises(Diverges, match=rf"diverges at step t=3: kappa={np.abs(spectra[3]).max():.4g} >= 1 at beta=0.6"):
        lq.policy_iteration(**problem, inner_steps=1, damping=None)
    slow = lq.policy_iteration(**problem, inner_steps=700, damping=0.1)
    assert (slow.eta == 0.1).all()
    close(slow.K, best.K, 1e-9)
    with pytest.raises(Diverges, match="damping='auto'"):
        lq.policy_iteration(**problem, inner_steps=400, damping=0.99)


@pytest.mark.parametrize(("steps", "damping"), [(1, None), (3, None), (50, None), ([0, 5, 2, 20], None), (5, 0.9)])
@pytest.mark.parametrize("beta", [0.5, np.array([0.5, 0.7, 0.4, 0.6])])
def test_diverges_names_the_smallest_beta(beta: Any, steps: Any, damping: float | None) -> None:
    """It works and 1 % less does not, for the inner steps asked for: V_{t+1} after a few of them bends more than the
    optimum's.

    Kills: the smallest beta for well-posedness alone, or for the optimum's values; a wrong bisection; rounding down;
    the factor applied to one beta_t only; a damping taken for none.
    """
    problem = {**concave(), "beta": beta}
    with pytest.raises(Diverges) as raised:
        lq.policy_iteration(**problem, inner_steps=steps, damping=damping)
    value, scale = smallest_beta(str(raised.value))
    assert value == pytest.approx(scale * np.broadcast_to(beta, 4)[3], rel=2e-3)
    found = lq.policy_iteration(**{**problem, "beta": scale * beta}, inner_steps=steps, damping=damping)
    assert 0.95 < found.factor.max() < 1 and (found.eta == (damping or 1)).all()
    with pytest.raises(Diverges):
        lq.policy_iteration(**{**problem, "beta": 0.99 * scale * beta}, inner_steps=steps, damping=damping)


@pytest.mark.parametrize("future_kl", [True, False])
@pytest.mark.parametrize("beta", [0.05, np.array([0.05, 0.07, 0.04, 0.06])])
def test_ill_posed_names_step_kappa_and_the_smallest_beta(beta: Any, future_kl: bool) -> None:
    """Kills: a two-sided test of well-posedness; |Q| < beta without sigma^2; a smallest beta of the wrong objective
    (future_kl); a message with the kappa of another step."""
    problem = {**SCALAR, "data_cov": 1.5, "reward_Q": 0.9, "beta": beta}
    with pytest.raises(IllPosed) as raised:
        lq.solve(**problem, future_kl=future_kl)
    value, scale = smallest_beta(str(raised.value))
    beta_3, beta_2 = np.broadcast_to(beta, 4)[3:1:-1]
    if float(beta_3) > 0.05:  # t = 3 is fine: rho Q = .01/.06 * .9, and V_3 = (Q/(1 - rho Q)) F^2
        assert 0.01 / beta_3 * 0.9 < 1
    F = (1 - 0.01 / (0.99 * 1.5 + 0.01)) / np.sqrt(0.99)
    M = 1 / (1 - 0.01 / beta_3 * 0.9)
    Q_3 = F**2 * 0.9 * (M if future_kl else M**2)
    expected = f"ill-posed at step t=2: kappa={0.1 / beta_2 * Q_3:.4g} >= 1 at beta={beta_2:g}, so that E Hess"
    assert expected in str(raised.value)
    assert value == pytest.approx(scale * beta_2, rel=2e-3)
    fine = lq.solve(**{**problem, "beta": scale * beta}, future_kl=future_kl)
    assert 0.97 < fine.kappa.max() < 1
    with pytest.raises(IllPosed):
        lq.solve(**{**problem, "beta": 0.99 * scale * beta}, future_kl=future_kl)


@pytest.mark.parametrize("future_kl", [True, False])
def test_an_initial_law_that_cannot_be_tilted_names_the_smallest_beta(future_kl: bool) -> None:
    """The chain is well posed, p0 e^(V_0/beta_0) has no expectation. Kills: a test against beta of another step; no
    test at all (a covariance that is none); the smallest beta of the optimum for DPOK's values."""
    problem = {
        **SCALAR, "alpha": [0.3, 0.95], "sigma": [0.3, 0.05], "beta": [0.5, 0.7], "data_cov": 9.0, "reward_Q": 0.4,
    }  # fmt: skip
    lq.solve(**problem, future_kl=future_kl)
    with pytest.raises(IllPosed, match="t=0, cannot be tilted .* kappa=[12][.].* >= 1 at beta=0.5") as raised:
        lq.solve(**problem, future_kl=future_kl, initial_law="tilted")
    value, scale = smallest_beta(str(raised.value))
    assert value == pytest.approx(0.5 * scale, rel=2e-3)
    for factor in (scale, 0.99 * scale):
        scaled = {**problem, "beta": factor * np.array(problem["beta"])}
        if factor == scale:
            assert lq.solve(**scaled, future_kl=future_kl, initial_law="tilted").initial_cov.item() > 30
        else:
            with pytest.raises(IllPosed):
                lq.solve(**scaled, future_kl=future_kl, initial_law="tilted")


def test_an_ideal_tilt_that_does_not_exist_names_the_smallest_beta() -> None:
    """It exists iff Cov(Y_T) Q < beta, whatever the chain does. In two dimensions, where that product is not symmetric.

    Kills: the smallest beta of Y_0's tilt; eigenvalues of a symmetric matrix taken of one that is not.
    """
    problem = {
        **SCALAR, "data_mean": [0.5, -1.0], "data_cov": [[3.0, 1.2], [1.2, 0.8]], "reward_Q": [[0.3, 0.4], [0.4, -0.5]],
        "reward_q": [0.1, 0.2],
    }  # fmt: skip
    chain = lq.gaussian_problem(**problem)
    S = lq.evaluate(chain, chain.pretrained).terminal_cov.numpy()
    least = np.linalg.eigvals(S @ problem["reward_Q"]).real.max()
    assert least > 0.5
    with pytest.raises(IllPosed, match=f"t=4, cannot be tilted .* kappa={least / 0.5:.4g} >= 1 at beta=0.5") as raised:
        lq.ideal_tilt(chain)
    assert least < smallest_beta(str(raised.value))[0] < 1.003 * least
    lq.ideal_tilt(lq.gaussian_problem(**{**problem, "beta": 1.001 * least}))
    with pytest.raises(IllPosed):
        lq.ideal_tilt(lq.gaussian_problem(**{**problem, "beta": 0.999 * least}))


BAD = {
    "alpha above": ({"alpha": [0.5, 0.7, 1.0, 0.99]}, r"alpha\[2\]=1 is out of range"),
    "alpha zero": ({"alpha": [0.0, 0.7, 0.9, 0.99]}, r"alpha\[0\]=0 is out of range"),
    "alpha nan": ({"alpha": [0.5, np.nan, 0.9, 0.99]}, r"alpha\[1\]=nan"),
    "sigma": ({"sigma": [0.1, 0.1, 0.1, -0.1]}, r"sigma\[3\]=-0.1 is out of range; it is finite and at least 0"),
    "sigma inf": ({"sigma": [0.1, np.inf, 0.1, 0.1]}, r"sigma\[1\]=inf"),
    "beta zero": ({"beta": 0.0}, r"beta\[0\]=0 is out of range; it is finite and above 0"),
    "beta negative": ({"beta": [0.5, 0.5, -1, 0.5]}, r"beta\[2\]=-1"),
    "beta length": ({"beta": [0.5, 0.5]}, "beta has 2 numbers but alpha has 4"),
    "sigma length": ({"sigma": [0.5]}, "sigma has 1 numbers but alpha has 4"),
    "no steps": ({"alpha": [], "sigma": []}, "alpha is empty"),
    "not finite": ({"reward_q": np.nan, "data_mean": np.inf}, "data_mean is not finite; reward_q is not finite"),
    "not finite, square": ({"reward_Q": np.nan, "data_cov": np.nan}, "data_cov is not .*; reward_Q is not finite"),
    "constant": ({"reward_c": [0.1, 0.2]}, "reward_c has 2 numbers"),
    "two at once": ({"sigma": [0.5], "beta": -1.0}, r"sigma has 1 .*beta\[0\]=-1"),
    "dimensions": ({"reward_q": [0.5, 0.5]}, "dimensions differ: data_mean 1, data_cov 1, reward_Q 1, reward_q 2"),
    "shape": ({"data_cov": np.ones((2, 3))}, r"data_cov has shape \(2, 3\)"),
    "row": ({"reward_q": np.ones((2, 3))}, r"reward_q has shape \(2, 3\)"),
    "negative": ({"data_cov": -0.1}, "data_cov is not a covariance"),
    "asymmetric": (
        {"data_mean": [0.0, 0], "data_cov": [[1, 0.5], [0, 1]], "reward_Q": np.eye(2) / 9, "reward_q": [0.0, 0]},
        "data_cov is not a covariance",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    """Each wrong field by its name and its value, all at once. Kills: any of the checks left out."""
    wrong, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        lq.solve(**{**SCALAR, **wrong})
    with pytest.raises(ValueError, match=message):
        lq.policy_iteration(**{**SCALAR, **wrong}, inner_steps=1)


def test_a_degenerate_covariance_is_one() -> None:
    """Data on a line, or a point. Kills: eigenvalues compared with 0 exactly (rounding makes some -1e-16)."""
    for v in (np.array([1.0, 2, 3]), np.array([0.3, -0.7, 0.1]), np.zeros(3)):
        problem = {**random_problem(0, d=3, T=4), "data_cov": np.outer(v, v)}
        found = lq.solve(**problem)
        close(found.objective, worth(problem, found.K, found.k).J)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="initial_law='other' is not known; choose one of fixed, tilted"):
        lq.solve(**SCALAR, initial_law="other")
    for steps in (-1, [1, 1], [1, 1, 1, -1]):
        with pytest.raises(ValueError, match="inner_steps="):
            lq.policy_iteration(**SCALAR, inner_steps=steps)
    for damping in (0, -0.5, 1.5, "best"):
        with pytest.raises(ValueError, match="damping="):
            lq.policy_iteration(**SCALAR, inner_steps=1, damping=damping)
    varying = lq.gaussian_problem(**{**SCALAR, "beta": [0.5, 0.5, 0.5, 0.6]})
    for law in (lq.path_tilt, lq.ideal_tilt, lq.initial_law_bias):
        with pytest.raises(ValueError, match="beta varies with t"):
            law(varying)


# ---- DPOK's fixed point

DPOK_ALPHA, DPOK_SIGMA = strided(25)
DPOK = {
    "alpha": DPOK_ALPHA, "sigma": DPOK_SIGMA, "beta": 1.0, "data_mean": np.array([-0.297969511106, -0.527384193033]),
    "data_cov": np.array([[1.225041259356, -0.326006094837], [-0.326006094837, 1.180177516476]]),
    "reward_Q": np.diag([-0.8, 0.25]), "reward_q": np.array([0.6, -0.4]), "reward_c": 0.0,
}  # fmt: skip


def test_dpok_example_of_the_design_notes() -> None:
    """Kills: future_kl ignored; the later KLs dropped from J too; a score or a strided schedule off by one step."""
    best, found = lq.solve(**DPOK), lq.solve(**DPOK, future_kl=False)
    assert (best.objective, best.expected_reward, best.path_kl) == pytest.approx((0.383034, 0.997134, 0.6141), abs=1e-5)
    assert (found.objective, found.expected_reward, found.path_kl) == pytest.approx(
        (0.353848, 1.139726, 0.785878), abs=1e-5
    )


@pytest.mark.parametrize("problem", [DPOK, random_problem(7), random_problem(23)], ids=["example", "7", "23"])
def test_dpoks_control_is_the_recursion_of_the_text(problem: dict[str, Any]) -> None:
    """A = M_r F, b = M_r (f + rho q_r), q_r <- A'(Q_r b + q_r), Q_r <- A' Q_r A. Kills: one M_r too few; F for A."""
    found = lq.solve(**problem, future_kl=False)
    Q, q, eye = problem["reward_Q"], problem["reward_q"], np.eye(len(problem["reward_q"]))
    beta = np.broadcast_to(problem["beta"], len(problem["alpha"]))
    for t in reversed(range(len(beta))):
        a, rho, (P, p) = problem["alpha"][t], problem["sigma"][t] ** 2 / beta[t], pretrained(problem, t)
        F, f, M = (eye - (1 - a) * P) / np.sqrt(a), (1 - a) * p / np.sqrt(a), np.linalg.inv(eye - rho * Q)
        A, b = M @ F, M @ (f + rho * q)
        close(found.K[t], (np.sqrt(a) * A - eye) / (1 - a))
        close(found.k[t], np.sqrt(a) * b / (1 - a))
        assert found.kappa[t] == pytest.approx(rho * np.abs(np.linalg.eigvalsh(Q)).max(), abs=1e-12)
        q, Q = A.T @ (Q @ b + q), A.T @ Q @ A
        close(found.Q[t], Q)
        close(found.q[t], q)


@pytest.mark.parametrize("problem", [DPOK, random_problem(8)], ids=["example", "8"])
def test_dpoks_control_is_a_fixed_point_of_the_reward_gradient(problem: dict[str, Any]) -> None:
    """u = s + c_t E grad R_{t+1}, R_{t+1}(y) = E[r(Y_T) | Y_{t+1} = y] by carrying the mean and its slope forward.

    Kills: the gradient of V for that of R; R of the pre-trained control.
    """
    found, y = lq.solve(**problem, future_kl=False), np.random.default_rng(0).normal(size=len(problem["reward_q"]))
    eye, alpha = np.eye(len(y)), problem["alpha"]
    beta = np.broadcast_to(problem["beta"], len(alpha))
    G = [(eye + (1 - a) * K) / np.sqrt(a) for a, K in zip(alpha, found.K, strict=True)]
    g = [(1 - a) / np.sqrt(a) * k for a, k in zip(alpha, found.k, strict=True)]
    for t, (a, sigma) in enumerate(zip(alpha, problem["sigma"], strict=True)):
        mean, flow = G[t] @ y + g[t], eye
        for later in range(t + 1, len(alpha)):
            mean, flow = G[later] @ mean + g[later], G[later] @ flow
        slope = flow.T @ (problem["reward_Q"] @ mean + problem["reward_q"])
        P, p = pretrained(problem, t)
        gain = np.sqrt(a) * sigma**2 / ((1 - a) * beta[t])
        close(found.K[t] @ y + found.k[t], -P @ y + p + gain * slope)


# ---- the three laws, and the law of Y_0


def linear(seed: int = 3, beta: float = 0.6) -> dict[str, Any]:
    """A linear reward in three dimensions whose Y_0 is far from independent of Y_T."""
    problem = random_problem(seed, d=3, T=5)
    sigma = np.sqrt(1 - problem["alpha"]) * np.linspace(0.6, 1, 5)
    return {**problem, "sigma": sigma, "beta": beta, "reward_Q": np.zeros((3, 3))}


def carried(problem: dict[str, Any], cov: Array) -> Array:
    """Cov of Y_T from the covariance `cov` of Y_0, under the pre-trained chain."""
    for t, (a, sigma) in enumerate(zip(problem["alpha"], problem["sigma"], strict=True)):
        eye = np.eye(len(cov))
        F = (eye - (1 - a) * pretrained(problem, t)[0]) / np.sqrt(a)
        cov = F @ cov @ F.T + sigma**2 * eye
    return cov


def test_laws_of_a_linear_reward() -> None:
    """kappa = 0 and one inner step is exact; with C = Cov(Y_T | Y_0): the mean moves by C a/beta, KL a'Ca/(2 beta^2),
    gain a'Ca/beta, J half of it; the covariance stays.

    Kills: C for Cov(Y_T); beta forgotten in any of the three; a mean over dimensions in the KL.
    """
    problem = linear()
    a, beta = problem["reward_q"], problem["beta"]
    C = carried(problem, np.zeros((3, 3)))
    base = lq.evaluate(lq.gaussian_problem(**problem), lq.gaussian_problem(**problem).pretrained)
    best, once = lq.solve(**problem), lq.policy_iteration(**problem, inner_steps=1)
    assert (best.kappa == 0).all()
    close(once.K, best.K, 1e-12)
    close(once.k, best.k, 1e-12)
    for found in (best, once):
        close(found.terminal_mean - base.terminal_mean.numpy(), C @ a / beta)
        close(found.terminal_cov, base.terminal_cov.numpy())
        close(found.expected_reward - base.expected_reward.item(), a @ C @ a / beta)
        close(found.path_kl, a @ C @ a / (2 * beta**2))
        close(found.objective - base.objective.item(), a @ C @ a / (2 * beta))


def test_a_tilted_initial_law_removes_the_bias_of_a_linear_reward() -> None:
    """Terminal mean and covariance are the ideal tilt's, J is beta log E e^(r/beta); without, the mean stays behind by
    the covariance that comes from Y_0, times a/beta.

    Kills: q0 ~ p0 e^V without beta, or with the sign of V; a bias of C; a J without the initial law's KL, or with it
    unweighted.
    """
    problem = linear()
    chain, a, beta = lq.gaussian_problem(**problem), problem["reward_q"], problem["beta"]
    tilted, fixed, ideal = lq.solve(**problem, initial_law="tilted"), lq.solve(**problem), lq.ideal_tilt(chain)
    close(tilted.terminal_mean, ideal.mean, 1e-8)
    close(tilted.terminal_cov, ideal.cov, 1e-8)
    base = lq.evaluate(chain, chain.pretrained)
    S, m = base.terminal_cov.numpy(), base.terminal_mean.numpy()
    close(ideal.mean, m + S @ a / beta)
    close(ideal.cov, S)
    close(tilted.objective, a @ m + a @ S @ a / (2 * beta) + problem["reward_c"])
    assert tilted.objective > fixed.objective
    close(tilted.objective, tilted.expected_reward - beta * (tilted.path_kl + tilted.initial_kl))
    shift = tilted.initial_mean
    close(tilted.initial_kl, (shift @ shift + np.trace(tilted.initial_cov - np.eye(3))) / 2)
    bias = carried(problem, np.eye(3)) - carried(problem, np.zeros((3, 3)))
    close(lq.initial_law_bias(chain), bias @ a / beta)
    close(ideal.mean.numpy() - fixed.terminal_mean, bias @ a / beta)
    assert np.linalg.norm(bias @ a / beta) > 0.05


@pytest.mark.parametrize("seed", range(5))
def test_the_path_tilt_from_a_tilted_initial_law_is_the_ideal_tilt(seed: int) -> None:
    """For quadratic rewards too. From Y_0 fixed it is not, and the optimum has its mean but never its covariance.

    Kills: beta forgotten in the tilt of Y_0; M sigma^2 without M; the path tilt's mean with another gain.
    """
    problem = {**random_problem(seed, d=3, T=5), "beta": 0.7}
    chain = lq.gaussian_problem(**problem)
    ideal, path, fixed = lq.ideal_tilt(chain), lq.path_tilt(chain, "tilted"), lq.path_tilt(chain)
    close(path.mean, ideal.mean, 1e-8)
    close(path.cov, ideal.cov, 1e-8)
    best = lq.solve(**problem)
    close(fixed.mean, best.terminal_mean)
    assert np.abs(fixed.cov.numpy() - best.terminal_cov).max() > 1e-4
    assert np.abs(fixed.mean.numpy() - ideal.mean.numpy()).max() > 1e-3


def test_the_tilted_initial_law_is_the_best_one() -> None:
    """With beta varying with t: no other mean or covariance of Y_0 is worth more, KL(q0 || p0) costing beta_0 a nat.

    Kills: another beta than beta_0; Q_1 for Q_0; a covariance in place of a precision.
    """
    problem = fully_controlled(11, d=2, T=4)
    found, rng, eye = lq.solve(**problem, initial_law="tilted"), np.random.default_rng(0), np.eye(2)

    def total(mean: Array, cov: Array) -> float:
        kl = (np.trace(cov) + mean @ mean - 2 - np.linalg.slogdet(cov)[1]) / 2
        return worth(problem, found.K, found.k, mean, cov).J - problem["beta"][0] * kl

    close(found.objective, total(found.initial_mean, found.initial_cov))
    for size in (1e-3, 1e-2, 0.1, 0.5):
        for _ in range(5):
            shift, turn = size * rng.normal(size=2), size * rng.normal(size=(2, 2))
            worths = [
                total(found.initial_mean + e * shift, (eye + e * turn) @ found.initial_cov @ (eye + e * turn).T)
                for e in (1, -1)
            ]
            gaps = [found.objective - J for J in worths]
            assert min(gaps) > 0
            if size <= 1e-2:
                assert abs(gaps[0] - gaps[1]) < 50 * size * max(gaps)


def test_log_axes_slopes_of_a_linear_reward() -> None:
    """Gain ~ 1/beta, KL ~ 1/beta^2. Kills: a beta too many or too few anywhere between eq. 18 and J."""
    found = [lq.solve(**linear(beta=beta)) for beta in (0.6, 1.2)]
    base = lq.evaluate(lq.gaussian_problem(**linear()), lq.gaussian_problem(**linear()).pretrained)
    gains = [one.expected_reward - base.expected_reward.item() for one in found]
    assert gains[0] / gains[1] == pytest.approx(2, rel=1e-9)
    assert found[0].path_kl / found[1].path_kl == pytest.approx(4, rel=1e-9)


# ---- any schedule


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    T, d = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    number = st.floats(-1, 1, allow_nan=False)
    alpha = np.array(draw(st.lists(st.floats(0.3, 0.999), min_size=T, max_size=T)))
    share = np.array(draw(st.lists(st.sampled_from([0.0, 0.0, 0.4, 0.7, 1.0]), min_size=T, max_size=T)))
    half = np.array(draw(st.lists(number, min_size=d * d, max_size=d * d))).reshape(d, d)
    beta = np.array(draw(st.lists(st.floats(1.0, 5.0), min_size=T, max_size=T)))
    return {
        "alpha": alpha, "sigma": share * np.sqrt(1 - alpha), "beta": beta, "data_mean": np.full(d, draw(number)),
        "data_cov": half @ half.T / d + 0.05 * np.eye(d), "reward_Q": 0.25 * (half + half.T) / d,
        "reward_q": np.full(d, draw(number)), "reward_c": draw(number),
    }  # fmt: skip


@QUICK
@given(problems(), st.integers(0, 3))
def test_any_schedule(problem: dict[str, Any], steps: int) -> None:
    """Steps without noise anywhere, the last included: u = s and kappa = 0 there, nothing is NaN, J is consistent.

    Kills: a division by sigma_t = 0; w = inf; a control that moves where nothing is led.
    """
    chain = lq.gaussian_problem(**problem)
    best, found = lq.solve(**problem), lq.policy_iteration(**problem, inner_steps=steps)
    still = problem["sigma"] == 0
    assert (chain.w.numpy()[still] == 0).all() and (chain.gain.numpy()[still] == 0).all()
    for one in (best, found, lq.solve(**problem, future_kl=False), lq.solve(**problem, initial_law="tilted")):
        close(one.K[still], -chain.P.numpy()[still], 1e-14)
        close(one.k[still], chain.p.numpy()[still], 1e-14)
        assert (one.kappa[still] == 0).all() and (one.step_kl[still] == 0).all()
        assert all(np.isfinite(v).all() for name, v in vars(one).items() if name not in ("errors", "rate"))
        plain = worth(problem, one.K, one.k, one.initial_mean, one.initial_cov)
        close(one.objective, plain.J - problem["beta"][0] * one.initial_kl)
    assert found.objective <= best.objective + 1e-12
    if steps == 0:
        close(found.K, -chain.P.numpy(), 1e-14)


def test_evaluate_ignores_a_control_where_there_is_no_noise_and_can_be_differentiated() -> None:
    """Kills: a NaN gradient through sigma_t = 0; a control that acts there. The gradient vanishes at the optimum."""
    problem = {**SCALAR, "sigma": SCALAR["sigma"] * np.array([1, 0, 1, 0])}
    chain = lq.gaussian_problem(**problem)
    best = lq.optimum(chain)
    K, k = best.K.clone().requires_grad_(), best.k.clone().requires_grad_()
    J = lq.evaluate(chain, lq.Affine(K, k)).objective
    slopes = torch.autograd.grad(J, (K, k))
    assert all(float(slope.abs().max()) < 1e-12 for slope in slopes)
    led = chain.sigma > 0
    wild = lq.Affine(torch.where(led[:, None, None], best.K, 99.0), torch.where(led[:, None], best.k, 99.0))
    for initial in (None, lq.Law(chain.mean, chain.cov)):
        assert lq.evaluate(chain, wild, initial).objective == J.detach()
