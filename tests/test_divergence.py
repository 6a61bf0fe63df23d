"""f-divergence regularisers: the table's algebra, duality on seven points, limits, and the law that a chain reaches.

f is checked against textbook divergences, phi as the inverse of f' by autograd, the closed form as the maximiser of
E_q r - beta D_f(q || p) among all laws q near it. beta is never 1 but where the design notes' mixture is meant.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_cases import TWO_MODES, score_on, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.core import grid
from workers.core.divergence import (
    REGULARISERS,
    WITH_ORDER,
    Divergence,
    NotPositive,
    divergence,
    normaliser,
    order_problems,
    transformed,
)

QUICK = settings(deadline=None, max_examples=40, derandomize=True)
CASES: list[tuple[str, float | None]] = [
    ("kl", None), ("forward_kl", None), ("chi_square", None), ("jensen_shannon", None), ("alpha", 0.5), ("alpha", 2.0),
    ("alpha", 1.4), ("alpha", 3.0), ("alpha", -1.0), ("gamma", 0.3), ("gamma", 0.8),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("name", "order"), CASES)
BOUNDED_ABOVE = [("forward_kl", None), ("jensen_shannon", None), ("alpha", 0.5), ("alpha", -1.0), ("gamma", 0.3)]
BOUNDED_BELOW = [("chi_square", None), ("alpha", 2.0), ("alpha", 1.4), ("alpha", 3.0)]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(found: Divergence, x: Tensor) -> Tensor:
    """f'(x)."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(found.f(x).sum(), x)[0]


def seven_points() -> tuple[Tensor, Tensor]:
    """(weights, rewards) whose spread every regulariser of CASES can follow at beta = .8."""
    return vector(0.05, 0.2, 0.1, 0.25, 0.15, 0.15, 0.1), vector(0.9, -0.3, 0.1, 0.4, -0.35, 0.0, 0.7)


def test_the_cases_are_all() -> None:
    assert {name for name, _ in CASES} == set(REGULARISERS)


@EVERY
def test_f_is_a_divergences(name: str, order: float | None) -> None:
    """f(1) = f'(1) = 0, f >= 0 and convex, and phi, positive where it is said to be, is the inverse of f'.

    Kills: chi_square with phi = 1 + z; Jensen-Shannon without its 1/2, or with e^z; a sign in gamma; 1/a for 1/(a-1).
    """
    found, one = divergence(name, order), vector(1.0)
    assert found.f(one).abs() < 1e-15 and slope(found, one).abs() < 1e-15
    x = torch.logspace(-1.5, 1.2, 60, dtype=torch.float64)
    assert (found.f(x) >= 0).all()
    z = slope(found, x)
    assert (z.diff() > 0).all() and found.allows(z).all() and ((z > 0) == (x > 1)).all()
    torch.testing.assert_close(found.phi(z), x, rtol=1e-9, atol=0.0)
    assert found.phi(0.0) == 1
    for edge, inside in ((found.low, 1e-9), (found.high, -1e-9)):
        if math.isfinite(edge):
            assert found.allows(vector(edge + inside)) and not found.allows(vector(edge))
            assert found.phi(edge + inside).isfinite() and found.phi(edge + inside) > 0


def test_values_are_the_textbooks() -> None:
    """Two laws on seven points. Kills: any factor or argument order: q for p, 2 for 1/2."""
    p, _ = seven_points()
    q = vector(0.1, 0.1, 0.2, 0.15, 0.05, 0.3, 0.1)

    def kl(a: Tensor, b: Tensor) -> float:
        return float((a * (a / b).log()).sum())

    middle = (p + q) / 2
    expected = {
        ("kl", None): kl(q, p), ("forward_kl", None): kl(p, q), ("chi_square", None): float(((q - p) ** 2 / p).sum()),
        ("jensen_shannon", None): (kl(q, middle) + kl(p, middle)) / 2,
    }  # fmt: skip
    for a in (-1.0, 0.5, 1.4, 2.0, 3.0):
        expected["alpha", a] = float(((q**a * p ** (1 - a)).sum() - 1) / (a * (a - 1)))
    for g in (0.3, 0.8):
        expected["gamma", g] = float(((q ** (1 - g) * p**g).sum() - 1) / (g * (g - 1)))
    for (name, order), value in expected.items():
        assert divergence(name, order).value(q / p, p) == pytest.approx(value, rel=1e-12), (name, order)
        assert divergence(name, order).value(q / p, 5 * p) == pytest.approx(value, rel=1e-12), "weights, not masses"


@EVERY
@pytest.mark.parametrize("beta", [0.85, 3.0])
def test_the_normaliser_normalises(name: str, order: float | None, beta: float) -> None:
    """E_p phi((r - lambda)/beta) = 1; with equal weights, unnormalised ones, and points of no mass that phi excludes.

    Kills: lambda's sign; beta forgotten; the wrong end of the bisection; weights ignored.
    """
    found, (p, r) = divergence(name, order), seven_points()
    for weights in (p, 7 * p, None):
        lam = normaliser(found, r, beta, weights)
        mass = torch.ones(7, dtype=torch.float64) if weights is None else weights
        assert float((found.phi((r - lam) / beta) * mass).sum() / mass.sum()) == pytest.approx(1, abs=1e-9)
    lam = normaliser(found, r, beta, p)
    more = normaliser(found, torch.cat([r, vector(-1e3, 1e3)]), beta, torch.cat([p, vector(0.0, 0.0)]))
    assert more == pytest.approx(lam, abs=1e-12)
    assert normaliser(found, r + 5.0, beta, p) == pytest.approx(lam + 5.0, abs=1e-9)
    assert normaliser(found, r.numpy(), beta, p.numpy()) == lam


@EVERY
def test_the_closed_form_is_the_maximiser(name: str, order: float | None) -> None:
    """E_q r - beta D_f(q || p) falls in every direction that keeps a law a law, and to first order not at all.

    Kills: beta forgotten in phi's argument; phi of another divergence; (r + lambda); a normaliser off by 1e-3.
    """
    found, (p, r), beta = divergence(name, order), seven_points(), 0.8
    ratio = found.phi((r - normaliser(found, r, beta, p)) / beta)
    assert ratio.min() > 0

    def worth(law: Tensor) -> float:
        return float((law * r).sum()) - beta * found.value(law / p, p)

    best, generator = worth(ratio * p), torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 0.4):
        for _ in range(20):
            step = torch.randn(7, generator=generator, dtype=torch.float64)
            step = (step - step.mean()) * size * float((ratio * p).min()) / float((step - step.mean()).abs().max())
            gaps = [best - worth(ratio * p + e * step) for e in (1, -1)]
            assert min(gaps) > 0
            assert size > 1e-2 or abs(gaps[0] - gaps[1]) < 5 * size * max(gaps) + 1e-13
    assert best > worth(p)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("alpha", 1 + 1e-6), ("kl", None)),
        (("alpha", 1 - 1e-6), ("kl", None)),
        (("gamma", 1e-6), ("kl", None)),
        (("gamma", 1 - 1e-6), ("forward_kl", None)),
        (("alpha", 1e-6), ("forward_kl", None)),
    ],
)
def test_limits_of_the_families(one: tuple[str, float], other: tuple[str, float | None]) -> None:
    """Kills: a family normalised without a (a - 1), so that its limit is a multiple."""
    left, right, (p, r) = divergence(*one), divergence(*other), seven_points()
    x = torch.logspace(-1, 1, 30, dtype=torch.float64)
    torch.testing.assert_close(left.f(x), right.f(x), rtol=1e-5, atol=1e-8)
    assert normaliser(left, r, 0.8, p) == pytest.approx(normaliser(right, r, 0.8, p), abs=1e-5)
    z = torch.linspace(-1.5, 0.7, 30, dtype=torch.float64)
    torch.testing.assert_close(left.phi(z), right.phi(z), rtol=2e-5, atol=0.0)


def test_alpha_two_is_half_of_chi_square() -> None:
    """So alpha = 2 at 2 beta is chi_square at beta: the same lambda, the same law. Kills: phi = 1 + z for 1 + z/2."""
    two, square, (p, r) = divergence("alpha", 2), divergence("chi_square"), seven_points()
    x = torch.logspace(-1, 1, 30, dtype=torch.float64)
    torch.testing.assert_close(2 * two.f(x), square.f(x), rtol=1e-12, atol=1e-14)
    lam = normaliser(square, r, 0.8, p)
    assert normaliser(two, r, 1.6, p) == pytest.approx(lam, abs=1e-12) == pytest.approx(float((p * r).sum()), abs=1e-9)
    torch.testing.assert_close(two.phi((r - lam) / 1.6), square.phi((r - lam) / 0.8), rtol=1e-12, atol=0.0)


@QUICK
@given(st.floats(0.02, 0.98), st.floats(0.5, 3.0))
def test_gamma_is_alpha_at_one_minus_g(g: float, beta: float) -> None:
    gamma, alpha, (p, r) = divergence("gamma", g), divergence("alpha", 1 - g), seven_points()
    x = torch.logspace(-1, 1, 30, dtype=torch.float64)
    torch.testing.assert_close(gamma.f(x), alpha.f(x), rtol=1e-9, atol=1e-12)
    explicit = (x ** (1 - g) - (1 - g) * x - g) / (g * (g - 1))
    torch.testing.assert_close(gamma.f(x), explicit, rtol=1e-9, atol=1e-12)
    z = torch.linspace(-2, 0.9 / g, 30, dtype=torch.float64)
    torch.testing.assert_close(gamma.phi(z), (1 - g * z) ** (-1 / g), rtol=1e-9, atol=0.0)
    assert (gamma.low, gamma.high) == (alpha.low, alpha.high)
    assert gamma.high == pytest.approx(1 / g)
    assert normaliser(gamma, r, beta, p) == normaliser(alpha, r, beta, p)


# ---- where there is no law


def named_beta(message: str, name: str, beta: float) -> float:
    assert f"regulariser={name} at beta={beta:g} " in message
    found = re.search(r"The smallest beta that works here is (\S+)$", message)
    assert found
    return float(found[1])


@pytest.mark.parametrize(("name", "order"), BOUNDED_BELOW)
def test_lowest_rewards_without_mass_are_an_error(name: str, order: float | None) -> None:
    """At a small beta the optimum drops points. The beta that the message names works, 1 % less does not.

    Kills: a phi clipped at 0; a smallest beta rounded down; the span of points without mass counted.
    """
    found, (p, r) = divergence(name, order), seven_points()
    r, p = torch.cat([r, vector(99.0)]), torch.cat([p, vector(0.0)])
    with pytest.raises(NotPositive, match=r"they span 1\.25\).*negative at the lowest rewards") as raised:
        normaliser(found, r, 0.05, p)
    beta = named_beta(str(raised.value), name, 0.05)
    lam = normaliser(found, r, beta, p)
    ratio = found.phi((r - lam) / beta)[p > 0]
    assert (ratio > 0).all() and ratio.min() < 0.1
    with pytest.raises(NotPositive):
        normaliser(found, r, 0.99 * beta, p)
    if name == "chi_square":
        assert beta == pytest.approx(float((p * r).sum() + 0.35) / 2, rel=1e-3)


@pytest.mark.parametrize(("name", "order"), BOUNDED_ABOVE)
def test_a_point_mass_at_the_highest_reward_is_an_error(name: str, order: float | None) -> None:
    """A top reward of hardly any mass: phi is infinite there before its mean is 1. forward_kl: 1/beta = E 1/(top - r).

    Kills: a law declared wherever the bracket is not empty.
    """
    found, r, p = divergence(name, order), vector(0.0, 0.5, 1.0), vector(0.5, 0.5, 1e-60)
    with pytest.raises(NotPositive, match="point mass") as raised:
        normaliser(found, r, 0.1, p)
    beta = named_beta(str(raised.value), name, 0.1)
    lam = normaliser(found, r, beta, p)
    assert float((found.phi((r - lam) / beta) * p).sum()) == pytest.approx(1, abs=1e-9)
    with pytest.raises(NotPositive):
        normaliser(found, r, 0.99 * beta, p)
    if name == "forward_kl":
        assert beta == pytest.approx(1 / 1.5, rel=1e-3)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transformed_reward(name: str, order: float | None, dtype: torch.dtype) -> None:
    """beta log phi((r - lambda)/beta): its e^{r~/beta} has mean 1, it rises with r, and never is NaN.

    Kills: beta forgotten outside or inside; lambda's sign; a transformed reward that loses its gradient.
    """
    found, (p, r), beta = divergence(name, order), seven_points(), 0.8
    lam = normaliser(found, r, beta, p)
    given = r.to(dtype).requires_grad_()
    tilde = transformed(found, given, beta, lam)
    assert tilde.dtype == dtype and tilde.shape == r.shape and tilde.isfinite().all()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert float(((tilde.detach() / beta).exp().double() * p).sum()) == pytest.approx(1, abs=tolerance)
    torch.testing.assert_close((tilde / beta).exp().double(), found.phi((r - lam) / beta), rtol=1e-5, atol=0.0)
    (up,) = torch.autograd.grad(tilde.sum(), given)
    assert (up > 0).all() and up.isfinite().all()
    if name == "kl":
        torch.testing.assert_close(tilde, (r - lam).to(dtype), rtol=1e-6, atol=1e-7)
        assert (up == 1).all()


@pytest.mark.parametrize(("name", "order"), BOUNDED_ABOVE + BOUNDED_BELOW)
def test_a_reward_out_of_range_is_an_error(name: str, order: float | None) -> None:
    """NotPositive, which names the reward, the edge and what to do. Kills: NaN; -inf; the edge of the other side; an
    edge without lambda or beta."""
    found, beta, lam = divergence(name, order), 0.8, 0.3
    above = math.isfinite(found.high)
    edge = lam + beta * (found.high if above else found.low)
    sign = 1 if above else -1
    assert transformed(found, vector(edge - 1e-6 * sign, lam), beta, lam).isfinite().all()
    for past in (1e-6, 1.0, 1e6):
        reward = edge + past * sign
        said = f"a reward of {reward:.4g} has no weight under regulariser={name}"
        with pytest.raises(NotPositive) as raised:
            transformed(found, vector(lam, reward, lam), beta, lam)
        message = str(raised.value)
        assert said in message and "raise beta" in message and "regulariser=kl" in message
        assert f"rewards {'below' if above else 'above'} {edge:.4g} only" in message and "beta=0.8" in message
    if not above:
        with pytest.raises(NotPositive):
            transformed(found, vector(edge - 1.0).requires_grad_(), beta, lam)
    assert transformed(divergence("kl"), vector(1e6, -1e6), beta, lam).isfinite().all()


@QUICK
@given(
    st.sampled_from(CASES), st.lists(st.floats(-3, 3), min_size=2, max_size=12), st.floats(0.05, 5), st.integers(0, 9)
)
def test_any_rewards_have_a_law_or_an_error(case: Any, rewards: list[float], beta: float, seed: int) -> None:
    """Mean 1 and a finite transformed reward, or NotPositive whose beta works. Kills: a bracket without the root."""
    found, r = divergence(*case), vector(*rewards)
    p = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    try:
        lam = normaliser(found, r, beta, p)
    except NotPositive as error:
        assert case in BOUNDED_BELOW  # where phi is bounded above, a point of mass can always carry it
        beta = float(str(error).split()[-1])
        lam = normaliser(found, r, beta, p)
    mean = float((found.phi((r - lam) / beta) * p).sum() / p.sum())
    assert mean == pytest.approx(1, abs=1e-6)
    assert transformed(found, r, beta, lam).isfinite().all()


@pytest.mark.parametrize(
    ("name", "order", "problem"),
    [
        ("wasserstein", None, "regulariser='wasserstein' is not known; choose one of kl, forward_kl"),
        ("kl", 0.5, "regulariser_order=0.5 means nothing to regulariser=kl"),
        ("alpha", None, "regulariser_order=None is no order of regulariser=alpha"),
        ("alpha", 0, "neither 0 (forward_kl) nor 1 (kl)"),
        ("alpha", 1.0, "neither 0 (forward_kl) nor 1 (kl)"),
        ("alpha", math.nan, "is no order"),
        ("alpha", math.inf, "is no order"),
        ("alpha", True, "is no order"),
        ("alpha", "2", "regulariser_order='2' is no order"),
        ("gamma", 0.0, "0 < order < 1"),
        ("gamma", 1.5, "0 < order < 1"),
    ],
)
def test_what_is_no_divergence_is_named(name: str, order: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        divergence(name, order)
    assert not order_problems("alpha", -2) and not order_problems("gamma", 0.5) and not order_problems("kl", None)
    assert set(WITH_ORDER) == {"alpha", "gamma"}


# ---- the chain reaches the closed form


@pytest.fixture(scope="module")
def base() -> tuple[grid.GridProblem, np.ndarray]:
    """The mixture at T = 200, r = tanh(y), beta = 1, and its terminal law."""
    alpha, sigma = strided(200)
    problem = grid.grid_problem(alpha, sigma, 1.0, score_on(TWO_MODES, alpha), np.tanh, np.linspace(-8, 8, 601))
    return problem, grid.terminal_density(problem, problem.s)


TERMINAL = [*CASES[:4], ("alpha", 3.0), ("gamma", 0.5)]


@pytest.mark.parametrize(("name", "order"), TERMINAL)
def test_the_controlled_chain_reaches_the_closed_form(
    base: tuple[grid.GridProblem, np.ndarray], name: str, order: float | None
) -> None:
    """Algorithm 1 on the transformed reward ends within .02 of p phi((r - lambda)/beta), far nearer than the base law.

    Kills: phi for log phi; the reward itself; a transformed reward without beta.
    """
    problem, law = base
    found, rewards = divergence(name, order), torch.from_numpy(problem.r)
    lam = normaliser(found, rewards, 1.0, law)
    target = law * found.phi((rewards - lam) / 1.0).numpy()
    assert np.trapezoid(target, problem.y) == pytest.approx(1, abs=1e-6)
    tilde = transformed(found, rewards, 1.0, lam).numpy()
    reached = grid.iterate(replace(problem, r=tilde)).terminal_density
    distance = grid.total_variation(reached, target, problem.y)
    assert distance < 0.02 and distance < 0.05 * grid.total_variation(law, target, problem.y)
