"""The controlled chain of PI-FT (arXiv 2412.18164, section 2) and its DDIM form.

    Y_{k+1} = A_k Y_k + B_k u_k(Y_k) + sigma_k W_k,   k = 0 .. T-1 in generation order,  W_k ~ N(0, I)       (dynamics)
    step KL_k = w_k |u_k - s_k|^2,  w_k = B_k^2 / (2 sigma_k^2),  SUM over the d dimensions, in nats         (kl)
    J(u) = E[ r(Y_T) - sum_k beta_k step KL_k ]                                                              (objective)

    paper                                   here
    alpha_t                                 chain.alpha[k] = abar[k] / abar_prev[k]
    1 / sqrt(alpha_t)                       chain.A[k]
    (1 - alpha_t) / sqrt(alpha_t)           chain.B[k]               (eta = 1; smaller for eta < 1)
    sigma_t                                 chain.sigma[k]
    s_pre_t, u_t                            scores; the network's eps = -sqrt(1 - abar[k]) u
    c_t of eq. 18                           chain.gain(beta)[k] = sigma_k^2 / (beta_k B_k)

DDIM with eta = 1 is exactly the paper's chain. Where sigma_k = 0 the weight would be infinite: the control there is the
pre-trained one (`controlled[k]` is False), its step KL is 0 and nothing is divided.

Constants are float64 and meet the latents in the latents' own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Constants of a chain of T transitions, each a float64 tensor of shape (T,), generation order."""

    A: Tensor
    B: Tensor
    sigma: Tensor
    abar: Tensor
    """Signal variance at the state a transition starts from: u = -eps / sqrt(1 - abar)."""
    abar_prev: Tensor
    """Signal variance at the state a transition leads to."""
    timesteps: Tensor
    """The network's time input of each transition, int64 (T,)."""

    @property
    def T(self) -> int:
        return len(self.A)

    @property
    def alpha(self) -> Tensor:
        return self.abar / self.abar_prev

    @property
    def controlled(self) -> Tensor:
        """bool (T,): False where sigma is 0, and the control is the pre-trained one."""
        return self.sigma > 0

    @property
    def w(self) -> Tensor:
        """(T,): step KL per unit of |u - s|^2; 0 where nothing is controlled."""
        safe = torch.where(self.controlled, self.sigma, torch.ones_like(self.sigma))
        return torch.where(self.controlled, self.B**2 / (2 * safe**2), torch.zeros_like(self.B))

    def gain(self, beta: Tensor) -> Tensor:
        """c_k of eq. 18, (T,): u = s + c_k E[grad V_{k+1}]. `beta` is (T,) or a scalar tensor, positive."""
        return self.sigma**2 / (beta * self.B)

    def mean(self, k: int | Tensor, y: Tensor, u: Tensor) -> Tensor:
        """E[Y_{k+1} | Y_k = y], shape of y; `k` an int or int64 (B,)."""
        return at(self.A, k, y) * y + at(self.B, k, y) * u

    def step(self, k: int | Tensor, y: Tensor, u: Tensor, W: Tensor) -> Tensor:
        """Y_{k+1} from Y_k = y under the control value u with the noise W (standard normal, shape of y)."""
        return self.mean(k, y, u) + at(self.sigma, k, y) * W

    def step_kl(self, k: int | Tensor, u: Tensor, s: Tensor) -> Tensor:
        """KL of N(mean(u), sigma^2) to N(mean(s), sigma^2), nats, (B,): a SUM over all dimensions but the first."""
        return at(self.w, k, u).flatten() * (u - s).flatten(1).square().sum(1)

    def log_prob(self, k: int | Tensor, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        """log density of y_next under the transition, nats, (B,): a SUM over all dimensions but the first."""
        sigma = at(self.sigma, k, y)
        z = (y_next - self.mean(k, y, u)) / sigma
        d = y[0].numel()
        return -0.5 * z.flatten(1).square().sum(1) - d * (sigma.flatten().log() + 0.5 * math.log(2 * math.pi))


def at(values: Tensor, k: int | Tensor, like: Tensor) -> Tensor:
    """values[k] in the dtype and on the device of `like` (B, ...), shaped to multiply it: (B or 1, 1, ..., 1)."""
    chosen = values[k].to(device=like.device, dtype=like.dtype)
    return chosen.reshape(-1, *([1] * (like.dim() - 1)))


def ddim_chain(abar: Tensor, timesteps: Tensor, previous: Tensor, final_abar: float, eta: float) -> Chain:
    """The chain that DDIM sampling walks (Song et al. 2021, eq. 12 and 16; diffusers' DDIMScheduler).

    `abar` (training steps,): cumulative products of the training schedule, least noisy first. `timesteps` and
    `previous` (T,): where each transition starts and leads to; a negative `previous` means `final_abar`.
    eta in (0, 1] scales the noise; eta = 1 gives A = 1/sqrt(alpha), B = (1 - alpha)/sqrt(alpha).
    """
    abar = abar.double()
    start = abar[timesteps]
    end = torch.where(previous >= 0, abar[previous.clamp(min=0)], torch.full_like(start, final_abar))
    variance = (1 - end) / (1 - start) * (1 - start / end)
    sigma = eta * variance.clamp(min=0).sqrt()
    A = (end / start).sqrt()
    B = A * (1 - start) - ((1 - end - sigma**2).clamp(min=0) * (1 - start)).sqrt()
    return Chain(A=A, B=B, sigma=sigma, abar=start, abar_prev=end, timesteps=timesteps.long())


def ddpm_chain(abar: Tensor) -> Chain:
    """The paper's chain with sigma_k^2 = 1 - alpha_k (DDPM's "fixed large" variance, no step without noise).

    `abar` (T + 1,) float64: signal variances from the first state to the last, in generation order.
    """
    start, end = abar[:-1].double(), abar[1:].double()
    alpha = start / end
    return Chain(
        A=1 / alpha.sqrt(), B=(1 - alpha) / alpha.sqrt(), sigma=(1 - alpha).sqrt(), abar=start, abar_prev=end,
        timesteps=torch.arange(len(alpha)),
    )  # fmt: skip


def score_from_eps(chain: Chain, k: int | Tensor, eps: Tensor) -> Tensor:
    """u = -eps / sqrt(1 - abar): the control that a noise prediction stands for, shape of eps."""
    return -eps / at((1 - chain.abar).sqrt(), k, eps)


def beta_steps(chain: Chain, beta: float, schedule: str | tuple[float, ...]) -> Tensor:
    """beta_k, float64 (T,): `beta` times the schedule's shape.

    "constant": J is E r - beta * path KL. "sigma_squared": proportional to sigma_k^2 with mean one over the controlled
    steps, the schedule with a guaranteed contraction rate (design notes, section 2). A tuple of T numbers: multipliers.
    """
    if schedule == "constant":
        shape = torch.ones_like(chain.sigma)
    elif schedule == "sigma_squared":
        shape = chain.sigma**2 / chain.sigma[chain.controlled].square().mean()
        shape = torch.where(chain.controlled, shape, torch.ones_like(shape))
    else:
        shape = torch.tensor(schedule, dtype=torch.float64)
    return beta * shape
