"""Linear-quadratic fine-tuning as a model: Gaussian data in R^d, an affine control, a known optimum.

    pift launch sweep=theory                                   conf/model/lq.yaml

"Pre-trained" is the exact score of N(data_mean, data_cov) noised, s_t(y) = -P_t y + p_t; the trained control is
u_t(y) = K_t y + k_t, one matrix and one vector per step, at the pre-trained ones to begin with. With reward=quadratic
all of J is a formula (workers/core/lq.py): a trial records its exact distance from the optimum, whatever its method.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from workers.core import lq
from workers.core.iteration import IllPosed
from workers.core.lq import Affine, Law, LinearQuadratic
from workers.core.regularity import contraction_beta_lq
from workers.generators import Generators
from workers.initial_law import GaussianInitialLaw
from workers.known import Inner, log10_rate
from workers.models.analytic import AnalyticModel, chain_of, common_problems, new_policy, probe
from workers.rewards.analytic import Quadratic, as_matrix, as_vector, shape_problems
from workers.rollout import Problem, Reward, beta_of
from workers.spec import Lora, Sampler, TrialSpec, integer, locate


class LinearQuadraticModel(AnalyticModel):
    """The controlled linear chain; latents are (B, d), float64."""

    def __init__(
        self,
        *,
        d: int,
        data_mean: Any,
        data_cov: Any,
        prompt: str,
        sampler: Sampler,
        lora: Lora,
        generators: Generators,
        device: str = "cpu",
    ) -> None:
        chain = chain_of(sampler.steps)
        zero = torch.zeros(d, d, dtype=torch.float64)
        self.base = lq.gaussian_problem(
            chain.alpha, chain.sigma, 1.0, as_vector(data_mean, d), as_matrix(data_cov, d), zero, zero[0]
        )
        start = self.base.pretrained
        super().__init__(new_policy(device, K=start.K, k=start.k), chain, d, device)
        self.pretrained = Affine(start.K.to(self.device), start.k.to(self.device))

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, and with a problem that has no optimum (IllPosed)."""
        found = common_problems(spec)
        found += integer("model.d", spec.model.get("d"), 1, "the dimension", 512)
        if found:
            return found
        d = spec.model["d"]
        found += shape_problems("model.data_mean", spec.model.get("data_mean"), d, matrix=False)
        found += shape_problems("model.data_cov", spec.model.get("data_cov"), d, matrix=True)
        if locate(spec.reward["_target_"]) is not Quadratic:
            found.append(f"reward={spec.reward['name']} has no closed form for model=lq; write reward=quadratic")
        if spec.regulariser != "kl":
            found.append(
                f"regulariser={spec.regulariser} makes the reward no longer quadratic, so model=lq has no closed form; "
                "write model=mixture reward=bounded, or regulariser=kl"
            )
        found = found or Quadratic.check(spec)
        return found or _theory_problems(spec)

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor:
        """u_k(y) = K_k y + k_k, or s_k(y), (B, d)."""
        steps = self.steps(k, len(y))
        K, shift = (self.policy["K"], self.policy["k"]) if adapted else (self.pretrained.K, self.pretrained.k)
        return (K[steps] @ y[:, :, None]).squeeze(2) + shift[steps]

    def problem(self, reward: Reward, beta: Tensor | float) -> LinearQuadratic:
        """The control problem with a quadratic reward and beta_t."""
        assert isinstance(reward, Quadratic)
        Q, q, c = reward.parts(self.base.d)
        row = torch.as_tensor(beta, dtype=torch.float64).expand(self.base.T)
        return LinearQuadratic(**{**vars(self.base), "beta": row, "Q": Q, "q": q, "c": c})

    def contraction_beta(self, reward: Reward, floor: float, rate: float) -> Tensor:
        """beta_t of beta_schedule=contraction, (T,)."""
        return contraction_beta_lq(self.problem(reward, floor), rate, floor)

    def known(self, problem: Problem) -> KnownLQ:
        """What theory knows of a trial (workers/known.py)."""
        return KnownLQ(self, self.problem(problem.reward, problem.beta), problem.initial)


class KnownLQ:
    """Exact knowledge by moments and matrices."""

    def __init__(
        self, model: LinearQuadraticModel, problem: LinearQuadratic, initial: GaussianInitialLaw | None
    ) -> None:
        self.model, self.problem, self.initial = model, problem, initial
        law = "fixed" if initial is None else "tilted"
        best = lq.optimum(problem, law)
        self.optimum, self.kappa_max = float(best.objective), float(best.kappa.max())
        self.gap_fixed_point: float | None = None
        with contextlib.suppress(IllPosed):  # without later KL terms the reward-to-go may curve up where J does not
            self.gap_fixed_point = self.optimum - float(lq.optimum(problem, law, future_kl=False).objective)

    def metrics(self) -> dict[str, float]:
        with torch.no_grad():
            control = Affine(self.model.policy["K"].cpu(), self.model.policy["k"].cpu())
            law = None
            if self.initial is not None:
                law = Law(self.initial.mu.cpu().double(), torch.diag((2 * self.initial.log_std).exp().cpu().double()))
            J = float(lq.evaluate(self.problem, control, law).objective)
        return {
            "theory/gap": self.optimum - J,
            "theory/objective_optimum": self.optimum,
            "theory/kappa_max": self.kappa_max,
        }

    def iterate(self, inner_steps: int, damping: str | float | None) -> Inner:
        found = lq.iterate(self.problem, inner_steps, damping)
        self.model.load_state_dict({"K": found.K, "k": found.k})
        return Inner(float(found.errors[:, inner_steps].max()), log10_rate(float(found.factor.max())))


def _theory_problems(spec: TrialSpec) -> list[str]:
    """Whether the problem has an optimum that the trial's method can be measured against."""
    try:
        model, reward = probe(spec)
        problem = model.problem(reward, beta_of(spec, model, reward))
        lq.optimum(problem, "tilted" if spec.initial_law == "gaussian" else "fixed")
        if "damping" in spec.method:
            lq.iterate(problem, 1, spec.method["damping"])
    except ValueError as error:  # IllPosed and Diverges among them
        return [f"beta={spec.beta:g} with model={spec.model['name']}: {error}"]
    return []
