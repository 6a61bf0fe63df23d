"""The chain against the paper's formulas, torch.distributions, diffusers' DDIM scheduler and the golden scalar case.

Everything is float64, so a tolerance of 1e-12 is a few hundred roundings. The golden table has 12 digits: 1e-10.
No beta is 1 and no d is 1 where a forgotten beta or a mean over dimensions could hide.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from workers.core.chain import Chain, beta_steps, ddim_chain, score_from_eps

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LATENT = (4, 3, 2)


def scheduler(T: int, alpha_to_one: bool) -> DDIMScheduler:
    """SD v1.5's, its tables in float64."""
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=alpha_to_one, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    made.alphas_cumprod = made.alphas_cumprod.double()
    made.final_alpha_cumprod = torch.as_tensor(made.final_alpha_cumprod).double()
    made.set_timesteps(T)
    return made


def sd_chain(T: int, eta: float = 1.0, alpha_to_one: bool = False) -> Chain:
    made = scheduler(T, alpha_to_one)
    previous = made.timesteps - 1000 // T
    return ddim_chain(made.alphas_cumprod, made.timesteps, previous, float(made.final_alpha_cumprod), eta)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("alpha_to_one", [False, True])
@pytest.mark.parametrize("T", [4, 50])
def test_constants_at_eta_one_are_the_papers(T: int, alpha_to_one: bool) -> None:
    """Kills: w without its 1/2; B or gain without sqrt(alpha); a gain that forgets beta; sigma^2 for sigma."""
    chain, beta = sd_chain(T, alpha_to_one=alpha_to_one), torch.linspace(0.2, 0.7, T, dtype=torch.float64)
    a = chain.abar / chain.abar_prev
    variance = (1 - chain.abar_prev) / (1 - chain.abar) * (1 - a)
    close = torch.testing.assert_close
    close(chain.alpha, a, **EXACT)
    close(chain.A, 1 / a.sqrt(), **EXACT)
    close(chain.B, (1 - a) / a.sqrt(), rtol=1e-10, atol=1e-12)  # a difference of numbers near 1 in ddim_chain
    close(chain.sigma**2, variance, **EXACT)
    keep = chain.controlled
    assert keep.tolist() == [True] * (T - 1) + [not alpha_to_one]
    close(chain.w[keep], ((1 - a) ** 2 / (2 * a * variance))[keep], rtol=1e-9, atol=0.0)
    close(chain.gain(beta)[keep], (a.sqrt() * variance / ((1 - a) * beta))[keep], rtol=1e-9, atol=0.0)
    close(chain.gain(torch.tensor(0.3))[keep], (a.sqrt() * variance / ((1 - a) * 0.3))[keep], rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("T", [4, 10, 50])
def test_a_step_is_diffusers_ddim_step(T: int, eta: float, alpha_to_one: bool) -> None:
    """Kills: eta outside the root; B of eta = 1 used for every eta; the wrong final abar; a wrong previous step;
    u = +eps."""
    made, chain = scheduler(T, alpha_to_one), sd_chain(T, eta, alpha_to_one)
    y, eps, W = normal(1, 3, *LATENT), normal(2, 3, *LATENT), normal(3, 3, *LATENT)
    for k, t in enumerate(made.timesteps):
        expected = made.step(eps, int(t), y, eta=eta, variance_noise=W).prev_sample
        found = chain.step(k, y, score_from_eps(chain, k, eps), W)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, **EXACT)
    assert torch.equal(chain.timesteps, made.timesteps)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_step_kl_is_the_kl_of_the_two_kernels_summed_over_dimensions(eta: float) -> None:
    """Kills: a mean over dimensions (24 times smaller); a missing 1/2; a weight read from the wrong step of a mixed
    batch."""
    chain, y, u, s = sd_chain(10, eta), normal(1, 5, *LATENT), normal(2, 5, *LATENT), normal(3, 5, *LATENT)
    mixed = torch.tensor([7, 0, 9, 3, 3])
    expected = []
    for row, k in enumerate(mixed.tolist()):
        laws = [Normal(chain.A[k] * y[row] + chain.B[k] * v[row], chain.sigma[k]) for v in (u, s)]
        expected.append(kl_divergence(*laws).sum())
        one = chain.step_kl(k, u[row : row + 1], s[row : row + 1])
        torch.testing.assert_close(one, expected[-1][None], rtol=1e-10, atol=0.0)
    torch.testing.assert_close(chain.step_kl(mixed, u, s), torch.stack(expected), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_log_prob_is_the_normal_density_summed_over_dimensions(eta: float) -> None:
    """Kills: a mean over dimensions; log sigma counted once instead of d times; log sigma^2; a forgotten log(2 pi) /
    2."""
    chain, y, u, y_next = sd_chain(10, eta), normal(1, 5, *LATENT), normal(2, 5, *LATENT), normal(3, 5, *LATENT)
    mixed = torch.tensor([7, 0, 9, 3, 3])
    expected = torch.stack([
        Normal(chain.A[k] * y[row] + chain.B[k] * u[row], chain.sigma[k]).log_prob(y_next[row]).sum()
        for row, k in enumerate(mixed.tolist())
    ])  # fmt: skip
    torch.testing.assert_close(chain.log_prob(mixed, y, u, y_next), expected, rtol=1e-11, atol=0.0)
    for row, k in enumerate(mixed.tolist()):
        one = slice(row, row + 1)
        torch.testing.assert_close(chain.log_prob(k, y[one], u[one], y_next[one]), expected[one], rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_gain_is_the_first_order_condition(eta: float) -> None:
    """The u with u = s + gain E grad V maximises E V(Y') - beta step KL for a quadratic V, at every step.

    Kills: w without its 1/2; a gain without beta, B or sigma^2.
    """
    chain, d = sd_chain(10, eta), 3
    beta = torch.linspace(0.3, 0.8, chain.T, dtype=torch.float64)
    half, q, y, s = normal(1, d, d), normal(2, d), normal(3, d), normal(4, d)
    Q = -half @ half.T  # concave: the maximum exists whatever sigma^2 / beta is
    for k in range(chain.T):
        g, A, B = chain.gain(beta)[k], chain.A[k], chain.B[k]
        u = torch.linalg.solve(
            torch.eye(d, dtype=torch.float64) - g * B * Q, s + g * (Q @ (A * y) + q)
        ).requires_grad_()
        mean = chain.mean(k, y[None], u[None])[0]
        expected_value = mean @ Q @ mean / 2 + q @ mean + chain.sigma[k] ** 2 * Q.trace() / 2
        objective = expected_value - beta[k] * chain.step_kl(k, u[None], s[None])[0]
        (slope,) = torch.autograd.grad(objective, u)
        size = (B * (Q @ mean + q)).detach().norm()  # of each of the two terms that cancel
        assert slope.norm() < 1e-9 * size, k


def test_where_sigma_is_zero_nothing_is_divided() -> None:
    """Kills: controlled = sigma >= 0; w = B^2 / (2 sigma^2) unguarded (inf, and NaN in the gradient)."""
    chain = sd_chain(10, alpha_to_one=True)
    last = chain.T - 1
    assert (
        chain.sigma[last] == 0 and chain.w[last] == 0 and not chain.controlled[last] and chain.controlled[:last].all()
    )
    assert chain.gain(torch.tensor(0.3))[last] == 0
    u, s = normal(1, 2, *LATENT).requires_grad_(), normal(2, 2, *LATENT)
    kl = chain.step_kl(last, u, s)
    (slope,) = torch.autograd.grad(kl.sum(), u)
    assert torch.equal(kl, torch.zeros(2, dtype=torch.float64)) and torch.equal(slope, torch.zeros_like(slope))
    y = normal(3, 2, *LATENT)
    assert torch.equal(chain.step(last, y, s, normal(4, 2, *LATENT)), chain.mean(last, y, s))
    for values in (chain.A, chain.B, chain.w, chain.gain(beta_steps(chain, 0.3, "sigma_squared"))):
        assert values.isfinite().all()


def test_beta_schedules() -> None:
    """Kills: a schedule proportional to sigma; one not of mean beta; the mean taken over uncontrolled steps too; beta
    left out of a tuple."""
    for alpha_to_one in (False, True):
        chain = sd_chain(4, alpha_to_one=alpha_to_one)
        keep = chain.controlled
        assert beta_steps(chain, 0.3, "constant").tolist() == [0.3] * 4
        proportional = beta_steps(chain, 0.3, "sigma_squared")
        assert proportional.dtype == torch.float64 and (proportional > 0).all()
        assert proportional[keep].mean().item() == pytest.approx(0.3, rel=1e-14)
        ratio = proportional[keep] / chain.sigma[keep] ** 2
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), **EXACT)
        assert beta_steps(chain, 0.3, (1.0, 2.0, 0.5, 4.0)).tolist() == pytest.approx([0.3, 0.6, 0.15, 1.2], rel=1e-15)


def test_constants_meet_latents_in_the_latents_dtype() -> None:
    """float32 latents stay float32, and lose no more than float32 loses: 3 roundings of 6e-8 on terms below 10."""
    chain = sd_chain(10)
    y, u, W = (normal(i, 3, *LATENT) for i in range(3))
    found = chain.step(torch.tensor([1, 5, 9]), y.float(), u.float(), W.float())
    assert found.dtype == torch.float32
    exact = chain.step(torch.tensor([1, 5, 9]), y.float().double(), u.float().double(), W.float().double())
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=3e-6)


def test_kl_units_of_stable_diffusion() -> None:
    """The figures of the design notes: nats per unit of summed squared eps difference, w' = w / (1 - abar).

    Kills: anything wrong in w, abar or the walk of the schedule by a percent. Tolerances: half a unit of the last
    digit printed.
    """
    chain = sd_chain(50)
    per_eps = chain.w / (1 - chain.abar)
    a = chain.alpha
    torch.testing.assert_close(per_eps, (1 - a) / (2 * a * (1 - chain.abar_prev)), rtol=1e-9, atol=0.0)
    assert per_eps[:3].tolist() == pytest.approx([0.131, 0.127, 0.123], abs=5e-4)
    assert per_eps[-5:].tolist() == pytest.approx([0.205, 0.287, 0.517, 5.362, 0.503], abs=5e-4)
    assert per_eps.sum().item() == pytest.approx(11.004, abs=5e-4)
    assert chain.timesteps[-2:].tolist() == [21, 1] and chain.abar[0].item() == pytest.approx(0.0058, abs=5e-5)
    assert (per_eps[-2] / per_eps.sum()).item() == pytest.approx(0.49, abs=5e-3)
    assert (per_eps[-3:].sum() / per_eps.sum()).item() == pytest.approx(0.58, abs=5e-3)
    assert per_eps.mean().item() * 16384 * 50 == pytest.approx(180_290, abs=5)
    for T, penultimate in ((10, 34.6), (20, 14.7)):
        shorter = sd_chain(T)
        assert (shorter.w / (1 - shorter.abar))[-2].item() == pytest.approx(penultimate, abs=0.05)


# The golden scalar case of the design notes (mathematics, section 3): columns k, h, Q, q, c, kappa of t = 0 .. 3.
GOLDEN = (
    (-1.363308059003, 0.602134068212, -0.020152364314, -0.044039911122, -0.184545539902, 0.091122143316),
    (-2.171278269915, 1.320687984195, -0.091122143316, -0.050854381338, -0.127834425456, 0.251600531249),
    (-4.094816084877, 3.105714390424, -0.419334218748, 0.101065482186, -0.062922730871, 0.182974500008),
    (-5.768132495717, 4.763741489288, -0.914872500042, 0.436753692874, -0.109251569607, 0.020000000000),
)
GOLDEN_J, GOLDEN_REWARD, GOLDEN_KL = -0.194621722059, -0.152376930328, 0.084489583461


def golden_chain() -> tuple[Chain, Tensor, Tensor]:
    """The chain, and s_t(y) = -P_t y + p_t of data N(1, .25): (chain, P, p)."""
    alpha = torch.tensor([0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
    abar = alpha.flip(0).cumprod(0).flip(0)
    after = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    chain = Chain(
        A=alpha**-0.5, B=(1 - alpha) * alpha**-0.5, sigma=(1 - alpha).sqrt(), abar=abar, abar_prev=after,
        timesteps=torch.arange(4),
    )  # fmt: skip
    P = 1 / (0.25 * abar + 1 - abar)
    return chain, P, P * abar.sqrt()


def test_golden_case_value_control_and_contraction() -> None:
    """V_t = E V_{t+1} - beta step KL under u*, u* = s + gain E grad V_{t+1}, and eq. 18's error shrinks by kappa_t.

    Kills: w without 1/2; gain without beta or with 1/alpha; sigma^2 for sigma.
    """
    chain, P, p = golden_chain()
    beta, gain = 0.5, chain.gain(torch.tensor(0.5, dtype=torch.float64))
    V = [*(row[2:5] for row in GOLDEN), (-1.0, 0.5, -0.125)]
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for t, (k, h, Q, q, c, kappa) in enumerate(GOLDEN):
        Q1, q1, c1 = V[t + 1]
        s, u = -P[t] * y + p[t], k * y + h
        ahead = chain.mean(t, y, u)
        torch.testing.assert_close(u, s + gain[t] * (Q1 * ahead + q1), rtol=0, atol=1e-10)
        value = Q1 / 2 * (ahead**2 + chain.sigma[t] ** 2) + q1 * ahead + c1
        value = value[:, 0] - beta * chain.step_kl(t, u, s)
        torch.testing.assert_close(value, (Q / 2 * y**2 + q * y + c)[:, 0], rtol=0, atol=1e-10)
        off = s + gain[t] * (Q1 * chain.mean(t, y, u + 0.1) + q1) - u
        torch.testing.assert_close(off.abs(), torch.full_like(off, 0.1 * kappa), rtol=0, atol=1e-10)
    assert V[0][0] / 2 + V[0][2] == pytest.approx(GOLDEN_J, abs=1e-10)


def test_golden_case_moments() -> None:
    """Mean and variance carried through the chain give the golden reward, KL and J. Kills: sigma^2 for sigma; w
    without 1/2."""
    chain, P, p = golden_chain()
    mean, second, kl = 0.0, 1.0, 0.0
    for t, (k, h, *_rest) in enumerate(GOLDEN):
        dk, dh = k + P[t].item(), h - p[t].item()
        kl += chain.w[t].item() * (dk**2 * second + 2 * dk * dh * mean + dh**2)
        slope, shift = (chain.A[t] + chain.B[t] * k).item(), chain.B[t].item() * h
        second = slope**2 * second + 2 * slope * shift * mean + shift**2 + chain.sigma[t].item() ** 2
        mean = slope * mean + shift
    reward = -(second - mean + 0.25) / 2
    assert (mean, second - mean**2) == pytest.approx((0.741671868234, 0.246348568761), abs=1e-10)
    assert (reward, kl, reward - 0.5 * kl) == pytest.approx((GOLDEN_REWARD, GOLDEN_KL, GOLDEN_J), abs=1e-10)
    assert math.isclose(GOLDEN_REWARD - 0.5 * GOLDEN_KL, GOLDEN_J, abs_tol=1e-10)
