"""A regulariser other than kl as a change of reward (workers/core/divergence.py says why that is enough).

The normaliser lambda is solved once, on `regulariser_samples` samples of the pre-trained model from the generator
"normaliser", and kept in the checkpoint. How good it is, is recorded:

    regulariser/normaliser_se          standard error of the mean of (f')^-1 over those samples, which lambda makes 1
    regulariser/effective_samples      how many of them carry that mean, (sum phi)^2 / sum phi^2
    regulariser/normaliser_error       the same mean less 1 over the evaluation pictures of step 0, new to lambda
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.core.divergence import Divergence, divergence, normaliser, transformed
from workers.rollout import Problem, rollout
from workers.spec import TrialSpec


class Regulariser:
    """The map r -> r~ = beta log (f')^-1((r - lambda)/beta) of one trial."""

    def __init__(self, found: Divergence, beta: float, lam: float, metrics: dict[str, float]) -> None:
        self.divergence, self.beta, self.lam, self.metrics = found, beta, lam, metrics

    def __call__(self, rewards: Tensor) -> Tensor:
        """r~, shape and dtype of `rewards`; raises NotPositive where there is none."""
        return transformed(self.divergence, rewards, self.beta, self.lam)

    def error(self, rewards: Tensor) -> float:
        """Mean of (f')^-1 over rewards of the pre-trained model, less 1."""
        return float(self.divergence.phi((rewards.double() - self.lam) / self.beta).mean()) - 1

    def state_dict(self) -> dict[str, float]:
        return {"lambda": self.lam, **self.metrics}


def restore(spec: TrialSpec, state: dict[str, float]) -> Regulariser:
    """The regulariser of a checkpoint."""
    metrics = {name: value for name, value in state.items() if name != "lambda"}
    return Regulariser(divergence(spec.regulariser, spec.regulariser_order), spec.beta, state["lambda"], metrics)


@torch.no_grad()
def calibrate(spec: TrialSpec, problem: Problem) -> Regulariser:
    """Solve lambda on fresh samples of the pre-trained model; they count as reward queries.

    The adapter must be at its start, where the control is the pre-trained one. Raises NotPositive where beta is too
    small for these rewards.
    """
    n, model = spec.regulariser_samples, problem.model
    found = divergence(spec.regulariser, spec.regulariser_order)
    with problem.costs():
        y0 = problem.generators.normal("normaliser", (n, *model.latent_shape))
        W = problem.generators.normal("normaliser", (model.chain.T, n, *model.latent_shape))
        final = rollout(model, y0, W, problem.micro_batch).y[-1]
        with problem.rewarding():
            rewards = problem.score(final).double().cpu()
    lam = normaliser(found, rewards, spec.beta)
    phi = found.phi((rewards - lam) / spec.beta)
    metrics = {
        "regulariser/normaliser_se": float(phi.std() / n**0.5),
        "regulariser/effective_samples": float(phi.sum() ** 2 / phi.square().sum()),
    }
    return Regulariser(found, spec.beta, lam, metrics)
