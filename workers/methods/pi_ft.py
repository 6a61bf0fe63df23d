"""PI-FT: policy-iteration fine-tuning (Han, Razaviyayn, Xu, arXiv 2412.18164), the parametric version of Algorithm 1.

    paper                                       here
    eq. 18   u = s + c_t E[grad V_{t+1}]        regression of u_theta(y_k) on s(y_k) + c_k a_{k+1}, weight beta_k w_k
    grad V_{t+1}(Y_{t+1}), one sample           a[k]  = a_{k+1}, one of two unbiased estimates:
       estimator "pathwise"                       the exact adjoint of r - sum beta KL along the sampled chain
       estimator "score"                          (G_k - b_k) W_k / sigma_k (Stein's identity), G_k the reward-to-go
    line 6   m_t inner iterations               `inner_steps` K: gradient steps on one sampling's targets

The regression weight beta_k w_k makes the loss beta_k w_k |u - s - c_k a|^2. Completing the square shows that its
gradient is that of
    L = mean over chains of sum_k [ beta_k w_k |u_theta - s|^2 - B_k <a_{k+1}, u_theta> ],
which is what is computed (no large terms to cancel when beta is small). At K = 1 that gradient is minus the gradient of
J through the sampled chain, exactly for "pathwise" (tests/test_exact_gradient.py), in expectation for "score".

What differs from the paper: it leaves the estimator of its parametric version open, so both are ours; K > 1 keeps the
sampled a_{k+1} of the first inner step (the exact iteration re-evaluates grad V at the moved state).

With initial_law=gaussian the law of Y_0 is improved beside the control, by the same estimate a_0 of grad V_0(Y_0).

"pathwise" recomputes one transition's graph at a time, so its memory does not grow with T. "score" never needs the
state's gradient: transitions of many time steps share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.core.chain import at
from workers.methods import Passes, check_config, clip_and_step, finite, optimiser
from workers.rollout import Problem, Trajectories, pretrained_controls, rewards_to_go, transition_steps, transitions
from workers.spec import TrialSpec, choice, integer, locate, number


@dataclass(frozen=True, kw_only=True)
class PIFTConfig:
    """Settings of conf/method/pi_ft.yaml."""

    lr: float
    """AdamW's step size."""
    estimator: str
    """"pathwise" (needs a differentiable reward) or "score" (any reward)."""
    inner_steps: int
    """K: gradient steps on one sampling's regression targets; 1 is gradient ascent on J."""
    weight_decay: float
    """AdamW's decay of the adapter."""
    max_grad_norm: float | None
    """L2 clip of the gradient, None for none."""

    def problems(self) -> list[str]:
        found = number("method.lr", self.lr, 0, "AdamW's step size", open_low=True, example=3e-4)
        found += choice("method.estimator", self.estimator, ("pathwise", "score"))
        found += integer("method.inner_steps", self.inner_steps, 1, "gradient steps on one sampling's targets")
        found += number("method.weight_decay", self.weight_decay, 0, "AdamW's decay", example=0.0)
        if self.max_grad_norm is not None:
            found += number("method.max_grad_norm", self.max_grad_norm, 0, "L2 clip", open_low=True, example=1.0)
        return found


@dataclass
class Targets:
    """One sampling's regression problem, (T, N, *latent) each: u at y goes to s + c a."""

    y: Tensor
    s: Tensor
    a: Tensor
    """a[k] estimates grad V_{k+1}(Y_{k+1})."""
    start: Tensor
    """(N, *latent): estimates grad V_0(Y_0), what the law of Y_0 is improved by."""
    noise: Tensor
    """(N, *latent): what Y_0 was made from."""


class PIFT:
    """The method; see the module's docstring. One `step` is one AdamW step."""

    Config = PIFTConfig

    def __init__(self, problem: Problem, config: PIFTConfig) -> None:
        self.problem, self.config = problem, config
        self.adam = optimiser(problem, config.lr, config.weight_decay)
        self.inner = 0
        self.targets: Targets | None = None
        self.sampled: dict[str, float] = {}

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the method's settings, the reward's differentiability included."""
        found = check_config(PIFTConfig, spec)
        if not found and spec.method["estimator"] == "pathwise" and not locate(spec.reward["_target_"]).differentiable:
            found.append(
                f"method.estimator=pathwise needs a differentiable reward and reward={spec.reward['name']} has none; "
                "write method.estimator=score"
            )
        return found

    def step(self) -> dict[str, float]:
        with self.problem.costs():
            if self.inner == 0:
                loss = self._improve()
            else:
                assert self.targets is not None
                loss = self._regress(self.targets)
            norm = clip_and_step(
                self.adam, self.problem.parameters(), self.config.max_grad_norm, self.problem.lr_factor
            )
        self.inner = (self.inner + 1) % self.config.inner_steps
        if self.inner == 0:
            self.targets = None
        return {**self.sampled, "train/loss": loss, "train/grad_norm": norm}

    def _improve(self) -> float:
        """Sample, estimate grad V (Algorithm 1, policy evaluation), leave the first inner step's gradient in .grad."""
        trajectories = self.problem.sample()
        if self.config.estimator == "pathwise":
            return self._pathwise(trajectories)
        self.targets = self._score_targets(trajectories)
        return self._regress(self.targets)

    def _pathwise(self, trajectories: Trajectories) -> float:
        """The adjoint, backwards in k, chunk by chunk of chains; theta's gradient comes with it, in the same pass."""
        problem, chain = self.problem, self.problem.chain
        a, s, start = (torch.empty_like(x) for x in (trajectories.W, trajectories.W, trajectories.y[0]))
        kls = trajectories.W.new_zeros(trajectories.W.shape[:2])
        loss = torch.zeros((), dtype=a.dtype, device=a.device)
        rewards, slopes = self._reward_gradients(trajectories.y[-1])
        for rows in _chunks(problem.trajectories, problem.micro_batch):
            costate = slopes[rows]
            for k in reversed(range(chain.T)):
                a[k, rows] = costate
                costate, s[k, rows], kls[k, rows], part = self._adjoint(k, trajectories.y[k, rows], costate)
                loss += part
            start[rows] = costate
        problem.budget.transition_gradients += int(chain.controlled.sum()) * problem.trajectories
        self._keep(rewards, kls)
        targets = Targets(y=trajectories.y[:-1], s=s, a=a, start=start, noise=self._noise(trajectories))
        loss += self._improve_start(targets)
        if self.config.inner_steps > 1:
            self.targets = targets
        return finite("the loss", loss).item()

    def _reward_gradients(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """r(Y_T), (N,), and its gradient, (N, *latent), micro-batch by micro-batch."""
        rewards, slopes = [], []
        with self.problem.rewarding():
            for part in final.split(self.problem.micro_batch):
                y_T = part.clone().requires_grad_()
                reward = finite("the reward", self.problem.score(y_T))
                slopes.append(torch.autograd.grad(reward.sum(), y_T)[0])
                rewards.append(reward.detach())
        return torch.cat(rewards), torch.cat(slopes)

    def _noise(self, trajectories: Trajectories) -> Tensor:
        y0 = trajectories.y[0]
        return y0 if self.problem.initial is None else self.problem.initial.noise(y0)

    def _improve_start(self, targets: Targets) -> float:
        """Add the gradient of beta_0 KL(q0 || p0) - mean <grad V_0(Y_0), Y_0> to .grad, Y_0 = q0(noise); its value.

        That is minus the gradient of J in the law of Y_0: exact for "pathwise", in expectation for "score".
        """
        law = self.problem.initial
        if law is None:
            return 0.0
        pull = (targets.start * law(targets.noise)).sum() / self.problem.trajectories
        loss = self.problem.beta_initial * law.kl() - pull
        loss.backward()
        return loss.item()

    def _adjoint(self, k: int, y: Tensor, costate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """a_k from a_{k+1} by one recomputed transition: H = <a_{k+1}, mean_k(y, u)> - beta_k w_k |u - s|^2,
        a_k = dH/dy; -dH/dtheta / N is added to the parameters' gradients. Also s_k(y), the step KLs, the loss."""
        problem, chain = self.problem, self.problem.chain
        controlled = bool(chain.controlled[k])
        y = y.detach().requires_grad_()
        s = problem.model.control(k, y, adapted=False)
        u = problem.model.control(k, y) if controlled else s
        kl = chain.step_kl(k, u, s)
        penalty = float(problem.beta[k]) * kl.sum()
        H = (costate * chain.mean(k, y, u)).sum() - penalty
        (-H / problem.trajectories).backward()
        assert y.grad is not None
        part = penalty - (at(chain.B, k, u) * costate * u).sum()
        loss = part.detach() / problem.trajectories if controlled else 0.0
        return -y.grad * problem.trajectories, s.detach(), kl.detach(), loss

    def _score_targets(self, trajectories: Trajectories) -> Targets:
        """a_{k+1} = (G_k - b_k) W_k / sigma_k, b_k the mean of the other chains' G_k (independent of W_k: no bias)."""
        problem, chain = self.problem, self.problem.chain
        steps = transition_steps(chain, problem.trajectories)
        with torch.no_grad(), problem.rewarding():
            rewards = finite("the reward", problem.score(trajectories.y[-1]))
        s = pretrained_controls(problem.model, steps, transitions(trajectories.y[:-1]), problem.micro_batch)
        kls = chain.step_kl(steps, transitions(trajectories.u), s).view(chain.T, -1)
        self._keep(rewards, kls)
        weighted = problem.step_kls(kls)
        G = torch.cat([(rewards - weighted.sum(0))[None], rewards_to_go(rewards, weighted)])  # from Y_0, then after k
        advantage = G - (G.sum(1, keepdim=True) - G) / (problem.trajectories - 1)
        sigma = torch.where(chain.controlled, chain.sigma, torch.ones_like(chain.sigma)).to(G)
        std = torch.ones_like(trajectories.y[0]) if problem.initial is None else problem.initial.log_std.detach().exp()
        noise, ones = self._noise(trajectories), [1] * len(problem.model.latent_shape)
        return Targets(
            y=trajectories.y[:-1], s=s.view_as(trajectories.W),
            a=(advantage[1:] / sigma[:, None]).view(chain.T, -1, *ones) * trajectories.W,
            start=advantage[0].view(-1, *ones) * noise / std, noise=noise,
        )  # fmt: skip

    def _regress(self, targets: Targets) -> float:
        """Leave the gradient of L at the present control in .grad; transitions of many time steps in one batch."""
        problem, chain = self.problem, self.problem.chain
        steps = transition_steps(chain, problem.trajectories)
        chosen = chain.controlled[steps].nonzero().flatten()
        y, s, a = (transitions(x)[chosen] for x in (targets.y, targets.s, targets.a))
        loss = torch.zeros((), dtype=y.dtype, device=y.device)
        for rows in _chunks(len(chosen), problem.micro_batch):
            k = steps[chosen[rows]]
            u = problem.model.control(k, y[rows])
            penalty = problem.beta[k].to(u) * chain.step_kl(k, u, s[rows])
            part = (penalty - (at(chain.B, k, u) * a[rows] * u).flatten(1).sum(1)).sum() / problem.trajectories
            part.backward()
            loss += part.detach()
        problem.budget.transition_gradients += len(chosen)
        return finite("the loss", loss).item() + self._improve_start(targets)

    def _keep(self, rewards: Tensor, kls: Tensor) -> None:
        self.sampled = {"train/reward_mean": rewards.mean().item(), "train/kl_path_nats": kls.sum(0).mean().item()}

    def state_dict(self) -> dict[str, Any]:
        targets = None if self.targets is None else vars(self.targets)
        return {"adam": self.adam.state_dict(), "inner": self.inner, "sampled": self.sampled, "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.inner, self.sampled = state["inner"], state["sampled"]
        self.targets = None if state["targets"] is None else Targets(**state["targets"])

    @staticmethod
    def passes(spec: TrialSpec, controlled: int, rows: Callable[[int], int]) -> Passes:
        """Network passes per gradient step; see Passes."""
        T, N, K = spec.sampler.steps, spec.train.trajectories, int(spec.method["inner_steps"])
        regressed = float(rows(controlled * N))
        if spec.method["estimator"] == "score":
            each = {"pretrained": rows(T * N) / K, "pictures": N / K, "gradients": regressed}
        else:
            each = {
                "adjoints": controlled * rows(N) / K, "pretrained_adjoints": T * rows(N) / K,
                "picture_gradients": N / K, "gradients": regressed * (K - 1) / K,
            }  # fmt: skip
        return Passes(controls=T * rows(N) / K, **each)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
