"""On a real UNet with a real VAE: the gradients of PI-FT against plain autograd through the whole sampled chain.

`plain_J` is a loop that knows nothing of workers.core or of the adapter's switch: its pre-trained control is a second
UNet, its constants are the paper's formulas, and it keeps the graph of all T transitions. Everything is float64, so
agreement is limited by rounding alone: about 1e-13 is found, 1e-9 is asked, and a mutant misses by percents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny
from workers.core.chain import beta_steps
from workers.generators import Generators
from workers.initial_law import GaussianInitialLaw
from workers.methods.pi_ft import PIFT, PIFTConfig
from workers.models.diffusion import DiffusionModel
from workers.rollout import Budget, Problem
from workers.spec import Lora, Sampler

PLAIN = {"estimator": "pathwise", "inner_steps": 1, "weight_decay": 0.0, "max_grad_norm": None}
BETA, PROMPT, T, N = 0.07, "a green rabbit", 4, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp())


def model_of(checkpoint: Path, guidance: float, eta: float) -> DiffusionModel:
    """A model whose adapter is switched on in earnest: B drawn, so that u is not s."""
    model = DiffusionModel(
        path=str(checkpoint), revision=None, dtype="fp64", prompt=PROMPT,
        sampler=Sampler(steps=T, eta=eta, guidance_scale=guidance),
        lora=Lora(rank=2, alpha=3.0, targets="attention"), generators=Generators(0),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@dataclass
class Plain:
    """What the plain loop measured: J with its graph, mean reward, mean path KL, and u and s at every transition."""

    J: Tensor
    reward: float
    kl: float
    states: list[Tensor]
    u: list[Tensor]
    s: list[Tensor]


def plain_J(
    model: DiffusionModel,
    base: torch.nn.Module,
    guidance: float,
    eta: float,
    beta: list[float],
    states: Tensor | None = None,
    start: Callable[[Tensor], Tensor] = lambda noise: noise,
) -> Plain:
    """Sample N chains from the trial's noise with everything's graph kept, or (`states`) stay on given ones; `start`
    makes Y_0 of its noise."""
    generators = Generators(7)
    y = start(generators.normal("rollout", (N, 4, 4, 4)).double())
    W = generators.normal("rollout", (T, N, 4, 4, 4)).double()
    tables = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0).double()
    total, found = torch.zeros(N, dtype=torch.float64), Plain(torch.zeros(()), 0.0, 0.0, [], [], [])
    path_kl = torch.zeros(N, dtype=torch.float64)

    def noise_prediction(unet: torch.nn.Module, t: int) -> Tensor:
        each = [unet(y, t, encoder_hidden_states=words[None].expand(N, -1, -1)).sample for words in model.embedding]
        return each[0] if len(each) == 1 else each[0] + guidance * (each[1] - each[0])

    for k, t in enumerate((751, 501, 251, 1)):
        y = y if states is None else states[k]
        here, there = tables[t], tables[t - 250] if t > 250 else tables[0]
        variance = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
        means, controls = [], []
        for unet in (model.unet, base):
            eps = noise_prediction(unet, t)
            clean = (y - (1 - here).sqrt() * eps) / here.sqrt()
            means.append(there.sqrt() * clean + (1 - there - variance).sqrt() * eps)
            controls.append(-eps / (1 - here).sqrt())
        kl = ((means[0] - means[1]) ** 2).flatten(1).sum(1) / (2 * variance)
        found.states.append(y), found.u.append(controls[0]), found.s.append(controls[1])
        total, path_kl = total - beta[k] * kl, path_kl + kl
        y = means[0] + variance.sqrt() * W[k]
    images = (model.vae.decode(y / model.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    reward = tiny.Brightness()(images, [PROMPT] * N)
    found.J, found.reward, found.kl = (total + reward).mean(), reward.mean().item(), path_kl.mean().item()
    return found


def problem_of(model: DiffusionModel, schedule: str, micro_batch: int) -> Problem:
    return Problem(
        model=model, reward=tiny.Brightness(), prompt=PROMPT, beta=beta_steps(model.chain, BETA, schedule),
        trajectories=N, micro_batch=micro_batch, generators=Generators(7), budget=Budget(),
    )  # fmt: skip


def method_of(problem: Problem, **changes: object) -> tuple[PIFT, list[list[Tensor]]]:
    """PI-FT at lr 1e-30, which moves nothing, and the gradients its optimiser is handed."""
    method, taken = PIFT(problem, PIFTConfig(**{"lr": 1e-30, **PLAIN} | changes)), []
    method.adam.register_step_pre_hook(lambda *_: taken.append([p.grad.clone() for p in problem.model.parameters()]))
    return method, taken


def base_unet(checkpoint: Path) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=torch.float64).requires_grad_(
        False
    )


def far(found: list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> float:
    """|found - expected| / |expected| over all parameters together."""
    one, two = (torch.cat([g.flatten() for g in group]) for group in (found, expected))
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize(
    ("guidance", "eta", "schedule", "micro_batch"),
    [
        (1.0, 1.0, "constant", 8),
        (1.0, 0.5, "sigma_squared", 2),
        (2.0, 1.0, "sigma_squared", 1),
        (2.0, 1.0, "constant", 2),
    ],
)
def test_pathwise_is_minus_the_gradient_of_J(
    checkpoint: Path, guidance: float, eta: float, schedule: str, micro_batch: int
) -> None:
    """Kills: a costate that does not pass through u's or s's dependence on the state; later KL terms dropped; beta or
    its schedule forgotten; KL of the conditional instead of the guided control; a chunk weighted by its own size; a
    mean over the 64 dimensions; the VAE or its scaling left out of the reward's path.
    """
    model = model_of(checkpoint, guidance, eta)
    shape = (
        (model.chain.sigma**2 / (model.chain.sigma**2).mean()).tolist() if schedule == "sigma_squared" else [1.0] * T
    )
    plain = plain_J(model, base_unet(checkpoint), guidance, eta, [BETA * value for value in shape])
    expected = torch.autograd.grad(plain.J, model.parameters())
    method, (taken,) = method_and_step(problem_of(model, schedule, micro_batch))
    assert far([-g for g in taken], expected) < 1e-9
    assert method["train/reward_mean"] == pytest.approx(plain.reward, rel=1e-10)
    assert method["train/kl_path_nats"] == pytest.approx(plain.kl, rel=1e-10)
    assert plain.kl > 0.01  # the KL takes part
    assert method["train/grad_norm"] == pytest.approx(
        torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-9
    )


def method_and_step(problem: Problem) -> tuple[dict[str, float], list[list[Tensor]]]:
    method, taken = method_of(problem)
    return method.step(), taken


def test_pathwise_gradient_of_the_initial_law_is_exact_too(checkpoint: Path) -> None:
    """initial_law=gaussian: minus the gradient of J - beta_0 KL(q0 || N(0, I)) in mu and log std, by plain autograd.

    Kills: the costate of Y_1 for that of Y_0; a KL averaged over the 64 latent dimensions; beta_0 forgotten.
    """
    model = model_of(checkpoint, 1.0, 1.0)
    mu = torch.linspace(-0.3, 0.4, 64, dtype=torch.float64).view(4, 4, 4).requires_grad_()
    log_std = torch.linspace(0.2, -0.1, 64, dtype=torch.float64).view(4, 4, 4).requires_grad_()
    plain = plain_J(model, base_unet(checkpoint), 1.0, 1.0, [BETA] * T, start=lambda e: mu + log_std.exp() * e)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, log_std.exp()), torch.distributions.Normal(0 * mu, 1 + 0 * mu)
    )
    expected = torch.autograd.grad(plain.J - BETA * kl.sum(), [*model.parameters(), mu, log_std])
    problem = problem_of(model, "constant", 2)
    problem.initial = GaussianInitialLaw((4, 4, 4), model.device, model.dtype)
    problem.initial.trained.load_state_dict({"mu": mu.detach(), "log_std": log_std.detach()})
    method = PIFT(problem, PIFTConfig(**{"lr": 1e-30, **PLAIN}))
    taken: list[Tensor] = []
    method.adam.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in problem.parameters()))
    method.step()
    assert far([-g for g in taken], expected) < 1e-9
    assert far([-g for g in taken[-2:]], expected[-2:]) < 1e-9


def test_reward_and_kl_both_weigh_in_the_gradient(checkpoint: Path) -> None:
    """The test above is not empty: leaving beta out, or the reward, changes the plain gradient by more than 5 %."""
    model, base = model_of(checkpoint, 1.0, 1.0), base_unet(checkpoint)
    full, free, much = (
        torch.autograd.grad(plain_J(model, base, 1.0, 1.0, [beta] * T).J, model.parameters())
        for beta in (BETA, 0.0, 1e6)
    )
    assert far(list(free), full) > 0.05
    assert far([g * BETA / 1e6 for g in much], full) > 0.05


@pytest.mark.parametrize("estimator", ["pathwise", "score"])
def test_inner_steps_mix_time_steps_in_one_batch(checkpoint: Path, estimator: str) -> None:
    """K = 2 on the UNet: the second gradient is that of mean_n sum_k [beta w |u - s|^2 - B <a, u>] on the stored
    targets, taken transition by transition. Kills: steps and rows of a mixed batch out of order; guidance halves
    swapped in a batch."""
    guidance, eta = 2.0, 1.0
    model = model_of(checkpoint, guidance, eta)
    method, taken = method_of(problem_of(model, "constant", 5), estimator=estimator, inner_steps=2)
    method.step()
    targets = method.targets
    method.step()
    plain = plain_J(model, base_unet(checkpoint), guidance, eta, [BETA] * T, states=targets.y)
    loss = torch.zeros((), dtype=torch.float64)
    for k in range(T):
        assert (plain.s[k] - targets.s[k]).abs().max() < 1e-12
        weight = model.chain.B[k] ** 2 / (2 * model.chain.sigma[k] ** 2)
        loss = loss + BETA * weight * (plain.u[k] - targets.s[k]).square().sum() / N
        loss = loss - model.chain.B[k] * (targets.a[k] * plain.u[k]).sum() / N
    assert far(taken[1], torch.autograd.grad(loss, model.parameters())) < 1e-9
    if estimator == "pathwise":  # nothing moved in between: the two passes agree
        assert far(taken[1], taken[0]) < 1e-9


def test_decode_is_differentiated_as_computed(checkpoint: Path) -> None:
    """The reward's slope through the VAE against central differences: step 1e-5, error about 1e-10 of the curvature."""
    model = model_of(checkpoint, 1.0, 1.0)
    draw = torch.Generator().manual_seed(3)
    y, direction = (torch.randn(2, 4, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))

    def value(at: Tensor) -> Tensor:
        return tiny.Brightness()(model.decode(at), [PROMPT] * 2).sum()

    y.requires_grad_()
    (slope,) = torch.autograd.grad(value(y), y)
    with torch.no_grad():
        difference = (value(y + 1e-5 * direction) - value(y - 1e-5 * direction)) / 2e-5
    assert (slope * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
