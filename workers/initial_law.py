"""A learned law of Y_0, one per prompt: q0 = N(mu, diag(std^2)) in place of N(0, I) (initial_law=gaussian).

Without it the optimum falls short of the ideal tilt p e^{r/beta} by what Y_T remembers of Y_0 (design notes, section 4;
arXiv 2402.15194 controls the initial law too). The best q0 is p0 e^{V_0/beta_0}; this one is the best Gaussian with
independent coordinates. KL(q0 || N(0, I)), a SUM over the latent's dimensions in nats, costs beta_0 (the first step's
beta) in J and is reported apart from the path KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.parameters import NamedParameters


class GaussianInitialLaw:
    """q0 for latents of a shape; N(0, I) at the start. `trained` holds mu and log_std, in memory and on disk."""

    def __init__(self, latent_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        zero = torch.zeros(latent_shape, device=device, dtype=dtype)
        self.trained = NamedParameters("initial_law.safetensors", mu=zero, log_std=zero)
        self.mu, self.log_std = self.trained["mu"], self.trained["log_std"]

    def __call__(self, noise: Tensor) -> Tensor:
        """Y_0 (n, *latent) from standard normal noise of that shape; differentiable in the parameters."""
        return self.mu + self.log_std.exp() * noise.to(self.mu)

    def noise(self, y0: Tensor) -> Tensor:
        """The noise that y0 was made from, (n, *latent)."""
        return ((y0 - self.mu) / self.log_std.exp()).detach()

    def kl(self) -> Tensor:
        """KL(q0 || N(0, I)) in nats, summed over dimensions, ()."""
        return ((2 * self.log_std).exp() + self.mu**2 - 1 - 2 * self.log_std).sum() / 2

    def log_prob(self, y0: Tensor) -> Tensor:
        """log q0(y0) up to a constant, nats, summed over dimensions, (n,)."""
        z = (y0 - self.mu) / self.log_std.exp()
        return -(z**2 / 2 + self.log_std).flatten(1).sum(1)
