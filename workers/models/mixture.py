"""One-dimensional fine-tuning as a model: a Gaussian mixture's exact score, a smooth control, a known optimum.

    pift launch sweep=theory                                   conf/model/mixture.yaml, nearly_lq.yaml

"Pre-trained" is the exact score of the noised mixture, plus `kernel` * sin(y) (0 but for the nearly linear-quadratic
problem, arXiv 2303.08431). The trained control is s_t(y) + theta_t . features(y), theta = 0 to begin with:

    policy "spline"    cubic B-splines on `knots` even knots over [-reach, reach], constant beyond
    policy "kernel"    (y, 1, sin y): the class of policies of the nearly linear-quadratic problem

J of any such control, and the optimum over all controls, are computed on a grid (workers/core/grid.py). The continuous-
time limit is, too: as sampler.steps grows the chain refines one diffusion (workers/core/continuous.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.core import grid
from workers.core.continuous import solve_hjb
from workers.core.grid import GridProblem
from workers.core.iteration import IllPosed
from workers.core.mixture import Mixture
from workers.core.regularity import contraction_beta_grid
from workers.generators import Generators
from workers.initial_law import GaussianInitialLaw
from workers.known import Inner, log10_rate
from workers.models.analytic import SCHEDULE, AnalyticModel, chain_of, common_problems, new_policy, probe
from workers.rollout import Problem, Reward, beta_of
from workers.spec import Lora, Sampler, TrialSpec, choice, integer, number

Array = NDArray[np.float64]
POINTS = 1601
"""Grid points over [-reach, reach] for what is exact."""
ROUGH = 401
"""Grid points to tell whether a problem is well posed, before anything runs."""
INNER = 3.0
"""|y| up to which the chain's value function is compared with the diffusion's: where Y_0 ~ N(0, 1) has its mass."""


class MixtureModel(AnalyticModel):
    """The controlled one-dimensional chain; latents are (B, 1), float64."""

    def __init__(
        self,
        *,
        weights: Sequence[float],
        means: Sequence[float],
        variances: Sequence[float],
        kernel: float,
        policy: str,
        knots: int,
        reach: float,
        prompt: str,
        sampler: Sampler,
        lora: Lora,
        generators: Generators,
        device: str = "cpu",
    ) -> None:
        self.mixture = Mixture(tuple(weights), tuple(means), tuple(variances))
        self.kernel, self.reach, self.points = float(kernel), float(reach), POINTS
        self.features = _kernel_features if policy == "kernel" else _Splines(knots, self.reach)
        count = self.features(torch.zeros(1, dtype=torch.float64)).shape[1]
        theta = torch.zeros(sampler.steps, count, dtype=torch.float64)
        super().__init__(new_policy(device, theta=theta), chain_of(sampler.steps), 1, device)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, and with a problem that has no optimum (IllPosed)."""
        model, found = spec.model, common_problems(spec)
        try:
            Mixture(*(tuple(map(float, model[name])) for name in ("weights", "means", "variances")))
        except (KeyError, TypeError, ValueError) as error:
            found.append(f"model.weights, means and variances make no mixture: {error}; see conf/model/mixture.yaml")
        found += number("model.kernel", model.get("kernel"), -1e3, "the size of the nonlinear part", example=0.0)
        found += choice("model.policy", model.get("policy"), ("spline", "kernel"))
        found += integer("model.knots", model.get("knots"), 8, "knots of the splines", 1001)
        found += number("model.reach", model.get("reach"), 1, "half the width of the grid", example=8.0)
        return found or _theory_problems(spec)

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor:
        """u_k(y), or s_k(y) with `adapted` False, (B, 1)."""
        steps = self.steps(k, len(y))
        s = self._score(y[:, 0], self.chain.abar.to(self.device)[steps])
        if adapted:
            s = s + (self.features(y[:, 0]) * self.policy["theta"][steps]).sum(1)
        return s[:, None]

    def _score(self, y: Tensor, abar: Tensor) -> Tensor:
        s = self.mixture.score(y, abar)
        return s + self.kernel * torch.sin(y) if self.kernel else s

    @cached_property
    def grid(self) -> Array:
        return np.linspace(-self.reach, self.reach, self.points)

    @torch.no_grad()
    def table(self, adapted: bool = True) -> Array:
        """(T, n): the control on the grid."""
        y = torch.from_numpy(self.grid)[:, None].to(self.device)
        return np.stack([self.control(k, y, adapted)[:, 0].cpu().numpy() for k in range(self.chain.T)])

    def set_table(self, u: Array) -> None:
        """The nearest control (least squares on the grid) to a table (T, n)."""
        features = self.features(torch.from_numpy(self.grid)).numpy()
        theta = np.linalg.lstsq(features, (u - self.table(adapted=False)).T, rcond=None)[0].T
        self.load_state_dict({"theta": torch.from_numpy(theta)})

    @torch.no_grad()
    def problem(
        self, reward: Reward, beta: Tensor | float, transform: Callable[[Tensor], Tensor] | None = None
    ) -> GridProblem:
        """The control problem as tables; `transform` maps rewards to those that are trained on."""
        y = torch.from_numpy(self.grid)[:, None]
        r = reward(y, [""] * len(y))
        r = r if transform is None else transform(r)
        row = torch.as_tensor(beta, dtype=torch.float64).expand(self.chain.T)
        chain = self.chain
        return GridProblem(
            chain.A.numpy(), chain.B.numpy(), chain.sigma.numpy(), row.numpy(), self.grid, self.table(False), r.numpy()
        )

    def contraction_beta(self, reward: Reward, floor: float, rate: float) -> Tensor:
        """beta_t of beta_schedule=contraction, (T,)."""
        return torch.from_numpy(contraction_beta_grid(self.problem(reward, floor), rate, floor))

    def known(self, problem: Problem) -> KnownOnGrid:
        """What theory knows of a trial (workers/known.py)."""
        return KnownOnGrid(self, self.problem(problem.reward, problem.beta, problem.transform), problem.initial)


class KnownOnGrid:
    """Exact knowledge on a grid. Besides theory/gap, its constants (one beta, fixed initial law):

    theory/tv_ideal               total variation between the optimum's terminal law and the ideal tilt p e^{r/beta}
    theory/objective_continuous   J* of the diffusion that the chain discretises
    theory/error_continuous       max over |y| <= 3 of |V_0(y) - V(y, 0)|, the chain's value against the diffusion's
    """

    def __init__(self, model: MixtureModel, problem: GridProblem, initial: GaussianInitialLaw | None) -> None:
        self.model, self.problem, self.initial = model, problem, initial
        law = "fixed" if initial is None else "tilted"
        best = grid.iterate(problem, initial_law=law)
        self.optimum = best.objective
        self.constants = {"theory/objective_optimum": best.objective, "theory/kappa_max": float(best.kappa.max())}
        if (problem.beta == problem.beta[0]).all():
            ideal = grid.ideal_tilt_density(problem)
            self.constants["theory/tv_ideal"] = grid.total_variation(best.terminal_density, ideal, problem.y)
            if initial is None:
                self.constants |= self._continuous(best)
        self.gap_fixed_point: float | None = None
        with contextlib.suppress(IllPosed):  # without later KL terms the reward-to-go may curve up where J does not
            self.gap_fixed_point = self.optimum - grid.iterate(problem, initial_law=law, future_kl=False).objective

    def _continuous(self, best: grid.Solution) -> dict[str, float]:
        problem, model = self.problem, self.model

        def score(y: Array, tau: float) -> Array:
            return model._score(torch.from_numpy(y), torch.as_tensor(SCHEDULE.abar(tau))).numpy()

        limit = solve_hjb(SCHEDULE, float(problem.beta[0]), score, lambda y: problem.r, problem.y)
        near = np.abs(problem.y) <= INNER
        return {
            "theory/objective_continuous": limit.objective,
            "theory/error_continuous": float(np.abs(best.V[0] - limit.V[0])[near].max()),
        }

    def metrics(self) -> dict[str, float]:
        initial: str | Array = "fixed"
        if self.initial is not None:
            mu, std = float(self.initial.mu.detach()), float(self.initial.log_std.detach().exp())
            initial = np.exp(-(((self.problem.y - mu) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
        J = grid.evaluate(self.problem, self.model.table(), initial).objective
        return {"theory/gap": self.optimum - J, **self.constants}

    def iterate(self, inner_steps: int, damping: str | float | None) -> Inner:
        found = grid.iterate(self.problem, inner_steps, damping=damping)
        self.model.set_table(found.u)
        return Inner(max(float(errors[-1]) for errors in found.errors), log10_rate(float(found.factor.max())))


def _kernel_features(y: Tensor) -> Tensor:
    """(n,) to (n, 3): y, 1, sin y."""
    return torch.stack([y, torch.ones_like(y), torch.sin(y)], 1)


class _Splines:
    """Cubic B-splines on even knots over [-reach, reach]; (n,) to (n, knots + 2)."""

    def __init__(self, knots: int, reach: float) -> None:
        self.width, self.reach = 2 * reach / (knots - 1), reach
        self.centers = torch.linspace(-reach - self.width, reach + self.width, knots + 2, dtype=torch.float64)

    def __call__(self, y: Tensor) -> Tensor:
        y = y.clamp(-self.reach, self.reach)
        z = ((y[:, None] - self.centers.to(y.device)) / self.width).abs()
        return torch.where(z < 1, 2 / 3 - z**2 + z**3 / 2, (2 - z).clamp(min=0) ** 3 / 6)


def _theory_problems(spec: TrialSpec) -> list[str]:
    """Whether the problem has an optimum that the trial's method can be measured against (known for kl at once; for
    other regularisers only when the normaliser is solved)."""
    if spec.regulariser != "kl":
        return []
    try:
        model, reward = probe(spec)
        model.points = ROUGH
        problem = model.problem(reward, beta_of(spec, model, reward))
        inner, damping = None, "auto"
        if "damping" in spec.method:  # Algorithm 1 begins with one inner step, whose value may bend more
            inner, damping = [1] * problem.T, spec.method["damping"]
        if not grid.works_at(problem, inner, damping):
            grid.iterate(problem, inner, damping=damping)  # says what is wrong
    except (ArithmeticError, ValueError, TypeError) as error:  # IllPosed and Diverges are ValueErrors
        return [f"beta={spec.beta:g} with model={spec.model['name']}: {error}"]
    return []
