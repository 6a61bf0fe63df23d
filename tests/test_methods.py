"""PI-FT and DPOK on linear-Gaussian chains, where J and its gradient have closed forms.

The expectation over the noise is taken EXACTLY. Along a linear chain with a quadratic reward both estimators are
polynomials of degree at most 3 in each single noise coordinate, and up to there the two values -1 and +1 with equal
weight have the moments of a standard normal. So a sampling of all 2^m sign combinations is the expectation itself,
and an estimator's gradient equals the closed form's to rounding: 1e-9 relative, where a mutant misses by percents.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from workers.core.chain import Chain, beta_steps, ddim_chain
from workers.generators import Generators
from workers.methods import NotFinite, clip_and_step
from workers.methods.dpok import DPOK, DPOKConfig, Replay, kl_weights
from workers.methods.pi_ft import PIFT, PIFTConfig
from workers.rollout import Budget, Problem, rewards_to_go

BETA = 0.37


class Linear:
    """A rollout.Model: u_k = K_k y + h_k, pre-trained s_k = P_k y + p_k, pictures are the latents themselves."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, chain: Chain, d: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.chain, self.latent_shape, self.forwards = chain, (d,), 0
        self.P = -torch.randn(chain.T, d, d, generator=draw, dtype=torch.float64) * 0.4
        self.p = torch.randn(chain.T, d, generator=draw, dtype=torch.float64)
        self.K = nn.Parameter(self.P + 0.5 * torch.randn(chain.T, d, d, generator=draw, dtype=torch.float64))
        self.h = nn.Parameter(self.p + 0.5 * torch.randn(chain.T, d, generator=draw, dtype=torch.float64))

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor:
        self.forwards += len(y)
        k = torch.as_tensor(k).expand(len(y))
        slope, shift = (self.K, self.h) if adapted else (self.P, self.p)
        return torch.einsum("bij,bj->bi", slope[k], y) + shift[k]

    def sampling(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def decode(self, y: Tensor) -> Tensor:
        return y

    def parameters(self) -> list[nn.Parameter]:
        return [self.K, self.h]


class Quadratic:
    """r = y'Qy / 2 + q'y + c, neither concave nor symmetric about 0."""

    differentiable = True

    def __init__(self, d: int) -> None:
        draw = torch.Generator().manual_seed(9)
        half = torch.randn(d, d, generator=draw, dtype=torch.float64)
        self.Q, self.q, self.c = (half + half.T) / 2 - 0.5 * torch.eye(d), torch.randn(d, generator=draw).double(), 0.7

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images @ self.Q * images).sum(1) / 2 + images @ self.q + self.c


class Designed(Generators):
    """Hands out y0 and W that the test chose."""

    def __init__(self, y0: Tensor | None = None, W: Tensor | None = None) -> None:
        super().__init__(0)
        self.y0, self.W = y0, W

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert name == "rollout"
        given = self.W if len(shape) == self.W.dim() else self.y0
        assert given.shape == tuple(shape)
        return given


def chain_of(T: int, eta: float = 1.0, final_abar: float = 0.97) -> Chain:
    """DDIM's chain on a few made-up signal variances."""
    abar = torch.linspace(0.06, 0.85, T, dtype=torch.float64)
    return ddim_chain(abar.flip(0), torch.arange(T - 1, -1, -1), torch.arange(T - 2, -2, -1), final_abar, eta)


def signs(T: int, d: int) -> tuple[Tensor, Tensor]:
    """All 2^(d (T + 1)) noises of signs: y0 (N, d), W (T, N, d)."""
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d * (T + 1))), dtype=torch.float64)
    noise = every.view(-1, T + 1, d).transpose(0, 1)
    return noise[0], noise[1:]


def closed_J(model: Linear, reward: Quadratic, beta: Tensor, published: bool = False) -> Tensor:
    """J by carrying mean m and second-moment S = E yy' - mm' through the chain; `published`: the objective whose
    gradient leaves out what an action does to later KL terms (each KL sees the states' law as a constant)."""
    chain, d = model.chain, model.latent_shape[0]
    m, S, J = (
        torch.zeros(d, dtype=torch.float64),
        torch.eye(d, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    for k in range(chain.T):
        K, h = (model.K[k], model.h[k]) if chain.sigma[k] > 0 else (model.P[k], model.p[k])
        if chain.sigma[k] > 0:
            at_m, at_S = (m.detach(), S.detach()) if published else (m, S)
            D, e = K - model.P[k], h - model.p[k]
            weight = chain.B[k] ** 2 / (2 * chain.sigma[k] ** 2)
            J = J - beta[k] * weight * ((D @ at_m + e).square().sum() + (D @ at_S @ D.T).trace())
        step = chain.A[k] * torch.eye(d, dtype=torch.float64) + chain.B[k] * K
        m, S = step @ m + chain.B[k] * h, step @ S @ step.T + chain.sigma[k] ** 2 * torch.eye(d, dtype=torch.float64)
    return J + ((reward.Q @ S).trace() + m @ reward.Q @ m) / 2 + reward.q @ m + reward.c


def gradient(J: Tensor, model: Linear) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(J, model.parameters())])


def capture(method: PIFT | DPOK) -> list[Tensor]:
    """The gradients that the method's optimiser is handed, one flat tensor a step, from now on."""
    taken: list[Tensor] = []

    def take(*_: object) -> None:
        values = [p.grad for p in method.problem.model.parameters()]
        taken.append(torch.cat([v.detach().clone().flatten() for v in values if v is not None]))

    method.adam.register_step_pre_hook(take)
    return taken


def problem_of(
    model: Linear,
    reward: object,
    *,
    generators: Generators,
    N: int,
    beta: Tensor | None = None,
    micro_batch: int = 10**6,
) -> Problem:
    beta = beta_steps(model.chain, BETA, "constant") if beta is None else beta
    return Problem(
        model=model, reward=reward, prompt="a cat", beta=beta, trajectories=N, micro_batch=micro_batch,
        generators=generators, budget=Budget(),
    )  # fmt: skip


def pift(problem: Problem, **changes: object) -> PIFT:
    """lr 1e-30: a step changes no parameter, whose gradient is all that is wanted."""
    given = {"lr": 1e-30, "estimator": "pathwise", "inner_steps": 1, "weight_decay": 0.0, "max_grad_norm": None}
    return PIFT(problem, PIFTConfig(**given | changes))


def dpok(problem: Problem, **changes: object) -> DPOK:
    given = {key: value for key, value in tiny.METHODS["dpok"].items() if key not in ("_target_", "name")}
    given |= {"lr": 1e-30, "inner_steps": 1, "batch": 10**6, "buffer": 10**6, "reward_weight": 10.0, "clip_nats": 1e-6}
    return DPOK(problem, DPOKConfig(**given | {"baseline": "none", "max_grad_norm": None} | changes))


def close(found: Tensor, expected: Tensor, rel: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() < rel * expected.norm(), ((found - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------------- PI-FT


@pytest.mark.parametrize("schedule", ["constant", "sigma_squared", (0.5, 2.0, 1.0, 0.3)])
@pytest.mark.parametrize(("eta", "final_abar"), [(1.0, 0.97), (0.6, 0.97), (1.0, 1.0)])
def test_pathwise_expectation_is_the_gradient_of_J(
    eta: float, final_abar: float, schedule: str | tuple[float, ...]
) -> None:
    """T = 4, d = 2, 1024 chains, also where the last step has no noise.

    Kills: an adjoint that stops at the step (no derivative through y or s); later KL terms dropped; beta or its
    schedule forgotten; KL without 1/2; a sum over chains for the mean; adapting the step without noise.
    """
    model, reward = Linear(chain_of(4, eta, final_abar), 2), Quadratic(2)
    beta = beta_steps(model.chain, BETA, schedule)
    y0, W = signs(4, 2)
    method = pift(problem_of(model, reward, generators=Designed(y0, W), N=len(y0), beta=beta, micro_batch=300))
    taken = capture(method)
    metrics = method.step()
    J = closed_J(model, reward, beta)
    close(taken[0], -gradient(J, model))
    if schedule == "constant":
        assert metrics["train/reward_mean"] - BETA * metrics["train/kl_path_nats"] == pytest.approx(J.item(), rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "sigma_squared"])
@pytest.mark.parametrize(("T", "d", "fixed"), [(3, 1, False), (2, 2, True)])
def test_score_estimator_is_unbiased_with_two_chains(T: int, d: int, fixed: bool, schedule: str) -> None:
    """Every pair of chains out of all sign combinations, N = 2: the exact expectation over two independent chains.
    With `fixed` the chains start at 0, so that two dimensions and two steps stay 256 pairs.

    Kills: a baseline that holds the chain's own reward (half the gradient at N = 2); later KL terms dropped; KL
    without 1/2; beta forgotten; sigma^2 for sigma in W / sigma. (The step's own KL in the reward-to-go is a baseline
    that depends on the state alone: no bias, so test_rewards_to_go kills that one.)
    """
    model, reward = Linear(chain_of(T), d, seed=1), Quadratic(d)
    beta = beta_steps(model.chain, BETA, schedule)
    y0, W = signs(T, d)
    if fixed:
        keep = (y0 == 1).all(1)
        y0, W = torch.zeros_like(y0[keep]), W[:, keep]
    noise = Designed()
    method = pift(problem_of(model, reward, generators=noise, N=2, beta=beta), estimator="score")
    taken = capture(method)
    for pair in itertools.product(range(len(y0)), repeat=2):
        noise.y0, noise.W = y0[list(pair)], W[:, list(pair)]
        method.step()
    assert len(taken) == 256
    J = closed_J_from(model, reward, beta, fixed)
    close(torch.stack(taken).mean(0), -gradient(J, model))


def closed_J_from(model: Linear, reward: Quadratic, beta: Tensor, fixed: bool) -> Tensor:
    """closed_J, or its value when every chain starts at 0, by all sign combinations in one plain loop."""
    if not fixed:
        return closed_J(model, reward, beta)
    chain, (T, d) = model.chain, (model.chain.T, model.latent_shape[0])
    W = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d * T)), dtype=torch.float64).view(-1, T, d)
    y, cost = torch.zeros(len(W), d, dtype=torch.float64), torch.zeros(len(W), dtype=torch.float64)
    for k in range(T):
        u, s = y @ model.K[k].T + model.h[k], y @ model.P[k].T + model.p[k]
        cost = cost + beta[k] * chain.B[k] ** 2 / (2 * chain.sigma[k] ** 2) * (u - s).square().sum(1)
        y = chain.A[k] * y + chain.B[k] * u + chain.sigma[k] * W[:, k]
    return (reward(y, []) - cost).mean()


def test_score_agrees_with_pathwise_on_real_noise() -> None:
    """The two estimators on the same 20 x 4000 random chains agree within five standard errors in every coordinate,
    and so does pathwise with the closed form: the generator's noise is standard normal. The largest error bar is 2 %
    of the gradient."""
    model, reward, found = Linear(chain_of(3), 2, seed=2), Quadratic(2), {}
    exact = -gradient(closed_J(model, reward, beta_steps(model.chain, BETA, "constant")), model)
    for estimator in ("pathwise", "score"):
        method = pift(problem_of(model, reward, generators=Generators(3), N=4000), estimator=estimator)
        taken = capture(method)
        for _ in range(20):
            method.step()
        found[estimator] = torch.stack(taken)
        error = found[estimator].std(0) / 20**0.5
        assert ((found[estimator].mean(0) - exact).abs() < 5 * error).all(), estimator
        assert error.norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("estimator", ["pathwise", "score"])
def test_inner_steps_regress_on_the_stored_targets(estimator: str) -> None:
    """K = 3: after the sampling, each inner step has the gradient of mean_n sum_k beta_k w_k |u - s - c_k a|^2 at the
    parameters of the moment; then a new sampling is drawn.

    Kills: targets that move with theta; c without beta; a weight without beta or w; targets kept past K; micro-batches
    that lose the last, shorter one.
    """
    chain = chain_of(3, final_abar=1.0)  # the last step has no control
    model, reward = Linear(chain, 2), Quadratic(2)
    beta = beta_steps(chain, BETA, (0.5, 2.0, 1.0))
    problem = problem_of(model, reward, generators=Generators(0), N=5, beta=beta, micro_batch=4)
    method = pift(problem, estimator=estimator, inner_steps=3, lr=0.05)
    taken, at = capture(method), []
    targets = None
    for inner in range(3):
        at.append([p.detach().clone() for p in model.parameters()])
        method.step()
        targets = method.targets or targets
        assert (method.targets is None) == (inner == 2)
        assert problem.budget.reward_queries == 5
    for (K, h), found in zip(at, taken, strict=True):
        K, h = K.requires_grad_(), h.requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(2):
            u = targets.y[k] @ K[k].T + h[k]
            weight, gain = chain.B[k] ** 2 / (2 * chain.sigma[k] ** 2), chain.sigma[k] ** 2 / (beta[k] * chain.B[k])
            loss = loss + beta[k] * weight * (u - targets.s[k] - gain * targets.a[k]).square().sum() / 5
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (K, h))])
        close(found, expected)
    assert (at[0][0] - at[2][0]).abs().max() > 0.05  # the parameters did move in between
    method.step()
    assert problem.budget.reward_queries == 10


def golden_model() -> Linear:
    """The golden scalar case (mathematics, section 3), started at the pre-trained control."""
    from tests.test_chain import golden_chain

    chain, P, p = golden_chain()
    model = Linear(chain, 1)
    model.P, model.p = -P[:, None, None], p[:, None]
    with torch.no_grad():
        model.K.copy_(model.P), model.h.copy_(model.p)
    return model


class Golden(Quadratic):
    def __init__(self) -> None:
        self.Q, self.q, self.c = -torch.eye(1).double(), torch.tensor([0.5]).double(), -0.125


def test_golden_optimum_is_where_the_gradient_vanishes() -> None:
    """At the golden u* the pathwise gradient is zero to the table's 12 digits, J is the golden J, and it is not zero
    elsewhere."""
    from tests.test_chain import GOLDEN, GOLDEN_J

    model, reward, (y0, W) = golden_model(), Golden(), signs(4, 1)
    beta = torch.full((4,), 0.5, dtype=torch.float64)
    method = pift(problem_of(model, reward, generators=Designed(y0, W), N=len(y0), beta=beta))
    taken = capture(method)
    method.step()
    with torch.no_grad():
        model.K.copy_(torch.tensor([[[row[0]]] for row in GOLDEN], dtype=torch.float64))
        model.h.copy_(torch.tensor([[row[1]] for row in GOLDEN], dtype=torch.float64))
    method.step()
    assert closed_J(model, reward, beta).item() == pytest.approx(GOLDEN_J, abs=1e-10)
    assert taken[0].norm() > 0.05 and taken[1].norm() < 1e-10


def test_pi_ft_reaches_the_golden_optimum() -> None:
    """From the pre-trained control. Pathwise on exact expectations: J to 1e-6 of J*, from .15 below. Score on 64 random
    chains a step: nine tenths of the way."""
    from tests.test_chain import GOLDEN_J

    reward, beta = Golden(), torch.full((4,), 0.5, dtype=torch.float64)
    y0, W = signs(4, 1)
    start = closed_J(golden_model(), reward, beta).item()
    assert start < GOLDEN_J - 0.05
    for estimator, lr, steps, generators, N, share in (
        ("pathwise", 0.05, 250, Designed(y0, W), len(y0), 0.9999),
        ("score", 0.02, 250, Generators(0), 64, 0.9),
    ):
        model = golden_model()
        method = pift(problem_of(model, reward, generators=generators, N=N, beta=beta), estimator=estimator, lr=lr)
        for _ in range(steps):
            method.step()
        reached = closed_J(model, reward, beta).item()
        assert reached < GOLDEN_J + 1e-10, estimator
        assert reached > start + share * (GOLDEN_J - start), (estimator, (reached - start) / (GOLDEN_J - start))


@pytest.mark.parametrize("final_abar", [0.97, 1.0])
def test_budgets_count_what_was_done(final_abar: float) -> None:
    """One network evaluation per latent; the pre-trained control and every recomputation count. A transition without
    noise has no gradient to take, and pathwise needs s alone there."""
    chain, reward, T, N = chain_of(3, final_abar=final_abar), Quadratic(2), 3, 4
    led = int(chain.controlled.sum())
    assert led == (3 if final_abar < 1 else 2)
    for make, forwards, gradients in (
        (lambda p: pift(p), (2 * T + led) * N, led * N),
        (lambda p: pift(p, estimator="score"), (2 * T + led) * N, led * N),
        (lambda p: dpok(p, batch=7), 2 * T * N + 7, 7),
    ):
        problem = problem_of(Linear(chain, 2), reward, generators=Generators(0), N=N, micro_batch=3)
        make(problem).step()
        counted = problem.budget.metrics()
        assert counted.pop("budget/seconds") > 0
        assert counted == {
            "budget/reward_queries": N, "budget/transition_gradients": gradients, "budget/model_forwards": forwards,
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- DPOK


@pytest.mark.parametrize("schedule", ["constant", "sigma_squared"])
@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
@pytest.mark.parametrize("future_kl", [True, False])
def test_dpok_on_fresh_data_is_the_policy_gradient(future_kl: bool, baseline: str, schedule: str) -> None:
    """reward_weight / (d T) times the gradient of J with future KL terms, of the published objective without, whatever
    the baseline; and every ratio is 1.

    Kills: a ratio from the pre-trained control; KL without 1/2 or without 1/d; later KL terms dropped (or kept where
    published leaves them out); beta forgotten; sum for mean.
    """
    model, reward = Linear(chain_of(3), 2, seed=1), Quadratic(2)
    beta = beta_steps(model.chain, BETA, schedule)
    y0, W = signs(3, 2)
    problem = problem_of(model, reward, generators=Designed(y0, W), N=len(y0), beta=beta, micro_batch=100)
    method = dpok(problem, future_kl=future_kl, baseline=baseline)
    taken = capture(method)
    metrics = method.step()
    close(taken[0], -10 / (2 * 3) * gradient(closed_J(model, reward, beta, published=not future_kl), model))
    assert metrics["dpok/clip_fraction"] == 0.0
    batch = method.replay.columns
    again = model.chain.log_prob(batch["k"], batch["y"], model.control(batch["k"], batch["y"]), batch["y_next"])
    assert torch.equal(torch.exp((again.detach() - batch["log_p"]) / 2), torch.ones(len(again), dtype=torch.float64))
    if schedule == "constant" and not future_kl:
        advantage = metrics["train/reward_mean"] if baseline == "none" else 0.0
        if baseline != "value":
            expected = 10 * (-advantage + BETA * metrics["train/kl_path_nats"] / 3 / 2)
            assert metrics["train/loss"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_two_dpok_gradients_differ() -> None:
    """The test above would be empty if later KL terms weighed nothing here: they are more than 5 % of the gradient."""
    model, reward = Linear(chain_of(3), 2, seed=1), Quadratic(2)
    beta = beta_steps(model.chain, BETA, "constant")
    full, published = (gradient(closed_J(model, reward, beta, published=flag), model) for flag in (False, True))
    assert (full - published).norm() > 0.05 * full.norm()


def test_a_clipped_transition_keeps_only_its_kl_term() -> None:
    """Off-policy: where |log p - log p_old| leaves clip_nats the reward term has no gradient, on either side and for
    either sign of the advantage; elsewhere it is A ratio grad log p / d.

    Kills: PPO's min() with the unclipped; no clamp; a clip of total nats instead of nats / d; a KL term clipped too.
    """
    model, reward = Linear(chain_of(3), 2), Quadratic(2)
    problem = problem_of(model, reward, generators=Generators(0), N=40, micro_batch=50)
    method = dpok(problem, inner_steps=2, baseline="mean", clip_nats=0.2)
    taken = capture(method)
    method.step()
    with torch.no_grad():
        model.K += 0.05 * torch.randn(model.K.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        model.h += 0.1
    metrics = method.step()
    b = method.replay.columns
    chain, k, d = model.chain, b["k"], 2
    u = torch.einsum("bij,bj->bi", model.K[k], b["y"]) + model.h[k]
    z = (b["y_next"] - chain.A[k, None] * b["y"] - chain.B[k, None] * u) / chain.sigma[k, None]
    log_p = -0.5 * z.square().sum(1) - d * (chain.sigma[k].log() + 0.5 * math.log(2 * math.pi))
    ratio = torch.exp((log_p - b["log_p"]) / d)
    A = b["goal"] - b["goal"].mean()
    free = ((ratio - 1).abs() <= 0.2 / d).detach()
    for high, positive in itertools.product((True, False), repeat=2):
        assert (~free & ((ratio > 1) == high) & ((A > 0) == positive)).sum() >= 5
    assert free.sum() >= 20
    kl = BETA * chain.B[k] ** 2 / (2 * chain.sigma[k] ** 2) * (u - b["s"]).square().sum(1) / d
    loss = 10 * (-(A * ratio)[free].sum() + kl.sum()) / len(k)
    close(taken[1], gradient(loss, model))
    assert metrics["dpok/clip_fraction"] == pytest.approx(1 - free.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("final_abar", [0.97, 1.0])
def test_kl_weights_mse_and_nats(final_abar: float) -> None:
    """mse: one weight per unit of eps difference at every controlled step, and the nats form's total at equal
    difference.

    Kills: 1 - abar on the wrong side; a mean over uncontrolled steps; beta forgotten.
    """
    chain = chain_of(4, final_abar=final_abar)
    beta = beta_steps(chain, BETA, (0.5, 2.0, 1.0, 0.3))
    keep = chain.controlled
    nats, mse = kl_weights(chain, beta, "nats"), kl_weights(chain, beta, "mse")
    torch.testing.assert_close(nats, beta * chain.w, rtol=1e-14, atol=0.0)
    per_eps = mse[keep] / (1 - chain.abar[keep])  # |u - s|^2 = |eps difference|^2 / (1 - abar)
    torch.testing.assert_close(per_eps, per_eps[:1].expand_as(per_eps), rtol=1e-13, atol=0.0)
    assert per_eps.sum().item() == pytest.approx((nats / (1 - chain.abar))[keep].sum().item(), rel=1e-13)
    assert (mse[~keep] == 0).all() and (nats[~keep] == 0).all()


@pytest.mark.parametrize("kl", ["mse", "nats"])
def test_dpok_records_native_and_effective_units(kl: str) -> None:
    """native kl_weight = what the official loss would carry on mean (eps difference)^2; log beta_eff = log(beta) for
    nats."""
    chain = chain_of(4)
    model, reward = Linear(chain, 2), Quadratic(2)
    method = dpok(problem_of(model, reward, generators=Generators(0), N=4), kl=kl, clip_nats=1.6)
    taken = capture(method)
    metrics = method.step()
    per_eps = chain.w / (1 - chain.abar)
    assert metrics["dpok/native_clip"] == pytest.approx(0.8)
    assert metrics["dpok/native_kl_weight"] == pytest.approx(10 * BETA * per_eps.mean().item(), rel=1e-12)
    effective = (BETA * per_eps.mean() / per_eps).log() if kl == "mse" else torch.full((4,), BETA).log()
    assert metrics["dpok/log_beta_effective_mean"] == pytest.approx(effective.mean().item(), rel=1e-6)
    assert metrics["dpok/log_beta_effective_max"] == pytest.approx(effective.max().item(), rel=1e-6)
    b = method.replay.columns
    u = torch.einsum("bij,bj->bi", model.K[b["k"]], b["y"]) + model.h[b["k"]]
    difference = (u - b["s"]).square().sum(1) * (1 - chain.abar[b["k"]]) / 2  # mean squared eps difference
    weight = BETA * (per_eps.mean() if kl == "mse" else per_eps[b["k"]])
    log_p = chain.log_prob(b["k"], b["y"], u, b["y_next"])
    loss = (-10 * b["goal"] * log_p / 2 + 10 * weight * difference).mean()
    close(taken[0], gradient(loss, model))


def test_replay_keeps_the_newest_and_draws_without_replacement() -> None:
    """Kills: the newest let go; rows mixed between columns; drawing with replacement."""
    replay = Replay(10, {})
    for start in (0, 4, 8):
        new = torch.arange(start, start + 4)
        replay.add(
            k=new, y=new[:, None] * 1.0, y_next=new[:, None] + 0.5, s=-new[:, None], log_p=new * 2.0, goal=new * 3.0
        )
    assert replay.columns["k"].tolist() == list(range(2, 12)) and len(replay) == 10
    drawn = replay.draw(6, torch.Generator().manual_seed(0))
    assert len(set(drawn["k"].tolist())) == 6
    assert torch.equal(drawn["goal"], drawn["k"] * 3.0) and torch.equal(drawn["y_next"][:, 0], drawn["k"] + 0.5)
    assert sorted(replay.draw(99, torch.Generator())["k"].tolist()) == list(range(2, 12))


def test_replay_of_a_method_stays_within_its_capacity() -> None:
    problem = problem_of(Linear(chain_of(3), 2), Quadratic(2), generators=Generators(0), N=4)
    method = dpok(problem, buffer=20, inner_steps=1)
    for _ in range(3):
        method.step()
    assert len(method.replay) == 20 and problem.budget.transition_gradients == 12 + 20 + 20
    assert torch.equal(method.replay.columns["k"][-12:], torch.arange(3).repeat_interleave(4))


def test_value_network_learns_a_constant() -> None:
    """A reward of 3 everywhere: its least squares go to 0, and the advantage with them. Kills: a value net that is
    never stepped; a loss against the wrong column."""
    problem = problem_of(
        Linear(chain_of(3), 2), lambda y, _: torch.full((len(y),), 3.0).double(), generators=Generators(0), N=16
    )
    method = dpok(problem, baseline="value", value_lr=0.02, value_steps=40, value_batch=48, value_width=16)
    losses = [method.step()["dpok/value_loss"] for _ in range(6)]
    b = method.replay.columns
    assert method.value is not None and losses[0] > 20 * losses[-1] and losses[-1] < 0.01
    assert (method.value(b["k"], b["y"]) - 3).abs().mean() < 0.1


# ------------------------------------------------------------------------------------------------------- failures


def bad_value(y: Tensor, _: list[str]) -> Tensor:
    return y.sum(1) * math.nan


def bad_slope(y: Tensor, _: list[str]) -> Tensor:
    return (y - y.detach()).square().sum(1).sqrt()  # value 0, gradient NaN


@pytest.mark.parametrize(
    ("make", "reward"),
    [
        (lambda p: pift(p, lr=0.1), bad_value),
        (lambda p: pift(p, lr=0.1), bad_slope),
        (lambda p: pift(p, lr=0.1, estimator="score"), bad_value),
        (lambda p: dpok(p, lr=0.1), bad_value),
        (lambda p: dpok(p, lr=0.1, baseline="value"), bad_value),
    ],
)
def test_not_finite_is_raised_before_anything_moves(make, reward) -> None:
    model = Linear(chain_of(3), 2)
    before = [p.detach().clone() for p in model.parameters()]
    method = make(problem_of(model, reward, generators=Generators(0), N=4))
    with pytest.raises(NotFinite, match="not finite"):
        method.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not method.adam.state


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(value: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, value, 1.0])
    with pytest.raises(NotFinite, match="norm"):
        clip_and_step(adam, [parameter], 1.0)
    assert torch.equal(parameter.detach(), torch.ones(3)) and not adam.state


def test_clip_and_step_clips_the_joint_norm_and_reports_it_before() -> None:
    """Kills: a clip per parameter; the norm after clipping."""
    two = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    sgd = torch.optim.SGD(two, lr=1.0)
    for parameter, slope in zip(two, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([slope])
    assert clip_and_step(sgd, two, 0.5) == pytest.approx(5.0)
    assert [p.item() for p in two] == pytest.approx([-0.3, -0.4], rel=1e-4)
    assert all(p.grad is None for p in two)


def test_rewards_to_go_hold_later_steps_only() -> None:
    found = rewards_to_go(torch.tensor([10.0, 20.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert found.tolist() == [[2.0, 10.0], [5.0, 14.0], [10.0, 20.0]]


# ------------------------------------------------------------------------------------------------------- settings

BAD = {
    "pi_ft": [
        ("lr", 0.0), ("lr", -1e-3), ("lr", math.nan), ("lr", "fast"), ("lr", True), ("estimator", "reinforce"),
        ("inner_steps", 0), ("inner_steps", 1.5), ("inner_steps", True), ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("max_grad_norm", 0.0), ("max_grad_norm", -1.0), ("max_grad_norm", "none"),
    ],
    "dpok": [
        ("lr", 0), ("inner_steps", 0), ("batch", 0), ("batch", 2.0), ("buffer", 0), ("reward_weight", 0.0),
        ("reward_weight", math.inf), ("clip_nats", 0.0), ("clip_nats", -1.6), ("kl", "reverse"), ("future_kl", 1),
        ("future_kl", "yes"), ("baseline", "critic"), ("value_lr", 0.0), ("value_steps", 0), ("value_batch", 0),
        ("value_width", 0), ("weight_decay", -1.0), ("max_grad_norm", 0.0),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("method", "field", "value"), [(m, *case) for m, cases in BAD.items() for case in cases])
def test_a_setting_out_of_range_is_named_with_its_value(method: str, field: str, value: object) -> None:
    component = dict(tiny.METHODS[method])
    spec = SimpleNamespace(method=component, reward={"_target_": "tests.tiny.Brightness", "name": "Brightness"})
    check = {"pi_ft": PIFT, "dpok": DPOK}[method].check
    assert check(spec) == []
    component[field] = value
    (problem,) = check(spec)
    assert problem.startswith(f"method.{field}=") and repr(value) in problem


@pytest.mark.parametrize("method", ["pi_ft", "dpok"])
def test_unknown_and_missing_settings_are_named(method: str) -> None:
    component = dict(tiny.METHODS[method])
    spec = SimpleNamespace(method=component, reward={"_target_": "tests.tiny.Brightness", "name": "Brightness"})
    del component["lr"]
    component["learning_rate"] = 1e-3
    unknown, missing = {"pi_ft": PIFT, "dpok": DPOK}[method].check(spec)
    assert "method.learning_rate" in unknown and "lr" in unknown
    assert missing == "method.lr is missing"


def test_pathwise_needs_a_differentiable_reward() -> None:
    spec = SimpleNamespace(
        method=dict(tiny.METHODS["pi_ft"]), reward={"_target_": "tests.tiny.BlackBox", "name": "BlackBox"}
    )
    (problem,) = PIFT.check(spec)
    assert "method.estimator=pathwise" in problem and "BlackBox" in problem and "method.estimator=score" in problem
    spec.method["estimator"] = "score"
    assert PIFT.check(spec) == []
