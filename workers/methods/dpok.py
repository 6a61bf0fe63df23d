"""DPOK: KL-regularised policy gradient (Fan et al., arXiv 2305.16381; official code google-research, folder dpok).

Every `inner_steps` gradient steps: sample chains, put their transitions into the replay buffer, train the value
network. Every gradient step: draw `batch` transitions from the buffer, and descend, per transition,

    reward_weight * [ -A_k * ratio_k + (beta_k step KL_k) / d ],      ratio_k = exp((log p_theta - log p_old) / d)

    DPOK                            here
    advantage r - V(x_t, t)         A_k; baseline "value", "mean" (of the buffer's rewards) or "none"
    log-probability                 a MEAN over the d latent dimensions, as the official code has it (its text: a sum):
                                    `ratio` above; in nats it is the sum, and `clip_nats` bounds the change of it
    ratio clip                      clamp(ratio, 1 - c, 1 + c), c = clip_nats / d, and no min() with the unclipped: a
                                    clipped transition has no gradient of its reward term on either side (official code)
    kl_weight * mean (eps difference)^2
                                    `kl` "mse": the same form, kl_weight = beta * reward_weight * mean_k w'_k: worth
                                    beta at equal mean-squared difference (w'_k = nats per unit of summed squared eps
                                    difference); the effective weight in nats is then beta * mean(w') / w'_k
                                    `kl` "nats": beta_k step KL_k itself, the J of every other method

The official code's KL weight and reward weight act per dimension, hence the 1/d on both terms: beta is the weight of
the path KL in nats in J, here as everywhere. Native and effective values are recorded as dpok/*.

As published, the gradient leaves out what an action does to later KL terms, so its fixed point is not the optimum of J
(design notes, section 6). `future_kl` puts them in: the reward of transition k becomes the reward-to-go
r - sum_{j>k} beta_j KL_j, and the method's expected gradient on fresh data is that of J.

With initial_law=gaussian, Y_0 is one more action: its chains of the newest sampling enter every gradient step with the
same ratio, clip and 1/d, and weigh as much as one of the T transitions of a chain. DPOK itself has no such law.

What differs from the official code: one prompt per trial, so the value network sees latent and time but no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.core.chain import Chain
from workers.methods import Passes, check_config, clip_and_step, finite, optimiser
from workers.rollout import Problem, pretrained_controls, rewards_to_go, transition_steps, transitions
from workers.spec import TrialSpec, choice, integer, number


@dataclass(frozen=True, kw_only=True)
class DPOKConfig:
    """Settings of conf/method/dpok.yaml and dpok_official.yaml."""

    lr: float
    """AdamW's step size."""
    inner_steps: int
    """Gradient steps per sampling."""
    batch: int
    """Transitions drawn from the buffer per gradient step."""
    buffer: int
    """Transitions the replay buffer holds; the oldest go first."""
    reward_weight: float
    """alpha: scales the whole loss; only the gradient clip and AdamW's eps can tell."""
    clip_nats: float
    """Bound on |log p_theta - log p_old|, nats, summed over dimensions."""
    kl: str
    """"nats" or "mse", see the module."""
    future_kl: bool
    """Count an action's effect on later KL terms; False as published."""
    baseline: str
    """"value", "mean" or "none"."""
    value_lr: float
    value_steps: int
    """Gradient steps of the value network per sampling."""
    value_batch: int
    value_width: int
    """Units of its two hidden layers."""
    weight_decay: float
    max_grad_norm: float | None

    def problems(self) -> list[str]:
        found = number("method.lr", self.lr, 0, "AdamW's step size", open_low=True, example=1e-5)
        for name in ("inner_steps", "batch", "buffer", "value_steps", "value_batch", "value_width"):
            found += integer(f"method.{name}", getattr(self, name), 1, "a count")
        for name in ("reward_weight", "clip_nats", "value_lr"):
            found += number(f"method.{name}", getattr(self, name), 0, "a positive number", open_low=True, example=1.0)
        found += choice("method.kl", self.kl, ("nats", "mse"))
        found += choice("method.baseline", self.baseline, ("value", "mean", "none"))
        if not isinstance(self.future_kl, bool):
            found.append(f"method.future_kl={self.future_kl!r} is not true or false; write method.future_kl=false")
        found += number("method.weight_decay", self.weight_decay, 0, "AdamW's decay", example=0.0)
        if self.max_grad_norm is not None:
            found += number("method.max_grad_norm", self.max_grad_norm, 0, "L2 clip", open_low=True, example=0.1)
        return found


FRESH = 0.1
"""The share of the clip that rounding may use up in the first step."""
COLUMNS = ("k", "y", "y_next", "s", "log_p", "goal")


@dataclass
class Replay:
    """Transitions, newest last: k, states y and y_next, s_k(y), log p_old (nats), goal: reward or reward-to-go."""

    capacity: int
    columns: dict[str, Tensor]

    def add(self, **new: Tensor) -> None:
        """Append transitions and let the oldest go beyond `capacity`."""
        old = self.columns
        joined = {name: torch.cat([old[name], new[name]]) if old else new[name] for name in COLUMNS}
        self.columns = {name: values[-self.capacity :].clone() for name, values in joined.items()}

    def __len__(self) -> int:
        return len(self.columns["k"])

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` transitions without replacement (all of them when the buffer holds fewer)."""
        rows = torch.randperm(len(self), generator=generator)[:count]
        return {name: values[rows.to(values.device)] for name, values in self.columns.items()}


class Value(nn.Module):
    """V(y, k): the expected goal from state y at step k; (B, d) and int64 (B,) to (B,)."""

    def __init__(self, d: int, T: int, width: int) -> None:
        super().__init__()
        self.T = T
        self.layers = nn.Sequential(
            nn.Linear(d + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, k: Tensor, y: Tensor) -> Tensor:
        time = (k.to(y) / self.T)[:, None]
        features = torch.cat([y.flatten(1), time, torch.sin(torch.pi * time), torch.cos(torch.pi * time)], 1)
        return self.layers(features).squeeze(1)


class DPOK:
    """The method; see the module's docstring. One `step` is one AdamW step on the adapter."""

    Config = DPOKConfig

    def __init__(self, problem: Problem, config: DPOKConfig) -> None:
        self.problem, self.config = problem, config
        self.d = int(torch.Size(problem.model.latent_shape).numel())
        self.adam = optimiser(problem, config.lr, config.weight_decay)
        self.inner = 0
        self.replay = Replay(config.buffer, {})
        self.starts: dict[str, Tensor] = {}
        self.sampled: dict[str, float] = {}
        self.weight = kl_weights(problem.chain, problem.beta, config.kl)
        self.value: Value | None = None
        if config.baseline == "value":
            self.value = self._new_value()
            self.value_adam = torch.optim.AdamW(self.value.parameters(), lr=config.value_lr)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the method's settings."""
        return check_config(DPOKConfig, spec)

    def _new_value(self) -> Value:
        seed = int(torch.randint(2**62, (), generator=self.problem.generators["value_init"]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = Value(self.d, self.problem.chain.T, self.config.value_width)
        return value.to(self.problem.model.device, self.problem.model.dtype)

    def step(self) -> dict[str, float]:
        with self.problem.costs():
            first = not self.replay.columns
            if self.inner == 0:
                self._sample()
            batch = self.replay.draw(self.config.batch, self.problem.generators["replay"])
            loss, clipped, moved = self._policy_gradient(batch)
            fresh = self._check_fresh(moved) if first else {}
            loss += self._start_gradient()
            norm = clip_and_step(
                self.adam, self.problem.parameters(), self.config.max_grad_norm, self.problem.lr_factor
            )
        self.inner = (self.inner + 1) % self.config.inner_steps
        return {**self.sampled, **fresh, "train/loss": loss, "train/grad_norm": norm, "dpok/clip_fraction": clipped}

    def _sample(self) -> None:
        """Sample chains, score them, and put their transitions into the buffer."""
        problem, chain = self.problem, self.problem.chain
        trajectories = problem.sample()
        steps = transition_steps(chain, problem.trajectories)
        y, y_next, u = (transitions(x) for x in (trajectories.y[:-1], trajectories.y[1:], trajectories.u))
        with torch.no_grad(), problem.rewarding():
            rewards = finite("the reward", problem.score(trajectories.y[-1]))
        s = pretrained_controls(problem.model, steps, y, problem.micro_batch)
        kls = chain.step_kl(steps, u, s).view(chain.T, -1)
        goal = rewards_to_go(rewards, problem.step_kls(kls)) if self.config.future_kl else rewards.expand_as(kls)
        rows = chain.controlled[steps].nonzero().flatten()
        log_p = chain.log_prob(steps[rows], y[rows], u[rows], y_next[rows])
        self.replay.add(
            k=steps[rows], y=y[rows], y_next=y_next[rows], s=s[rows], log_p=log_p, goal=goal.flatten()[rows]
        )
        if problem.initial is not None:
            total = rewards - problem.step_kls(kls).sum(0) if self.config.future_kl else rewards
            y0 = trajectories.y[0]
            self.starts = {"y0": y0, "log_q": problem.initial.log_prob(y0).detach(), "goal": total}
        self.sampled = {"train/reward_mean": rewards.mean().item(), "train/kl_path_nats": kls.sum(0).mean().item()}
        if self.value is not None:
            self.sampled["dpok/value_loss"] = self._fit_value(self.value)
        self.sampled |= self._units()

    def _fit_value(self, value: Value) -> float:
        """`value_steps` steps of least squares on the buffer; returns the last loss (reward units squared)."""
        for _ in range(self.config.value_steps):
            batch = self.replay.draw(self.config.value_batch, self.problem.generators["value_batch"])
            loss = (value(batch["k"], batch["y"]) - batch["goal"]).square().mean()
            self.value_adam.zero_grad(set_to_none=True)
            finite("the value loss", loss.detach())
            loss.backward()
            self.value_adam.step()
        return loss.item()

    @torch.no_grad()
    def _advantage(self, batch: dict[str, Tensor]) -> Tensor:
        """Goal minus the baseline, reward units, (B,)."""
        if self.value is not None:
            return batch["goal"] - self.value(batch["k"], batch["y"])
        return batch["goal"] - (self.replay.columns["goal"].mean() if self.config.baseline == "mean" else 0.0)

    def _policy_gradient(self, batch: dict[str, Tensor]) -> tuple[float, float, float]:
        """Leave the loss's gradient in .grad, micro-batch by micro-batch; returns the loss, the clipped fraction and
        the largest |log p_theta - log p_old|, nats."""
        problem, count = self.problem, len(batch["k"])
        advantage, limit = self._advantage(batch), self.config.clip_nats / self.d
        total, clipped, moved = (torch.zeros((), dtype=advantage.dtype, device=advantage.device) for _ in range(3))
        for part, A in _micro_batches(batch, advantage, problem.micro_batch):
            k, y = part["k"], part["y"]
            u = problem.model.control(k, y)
            log_ratio = problem.chain.log_prob(k, y, u, part["y_next"]) - part["log_p"]
            ratio = torch.exp(log_ratio / self.d)
            penalty = self.weight[k].to(u) * (u - part["s"]).flatten(1).square().sum(1)
            terms = -A * ratio.clamp(1 - limit, 1 + limit) + penalty / self.d
            loss = self.config.reward_weight * terms.sum() / count
            loss.backward()
            total += loss.detach()
            clipped += ((ratio.detach() - 1).abs() > limit).sum()
            moved = torch.maximum(moved, log_ratio.detach().abs().max())
        problem.budget.transition_gradients += count
        return finite("the loss", total).item(), clipped.item() / count, moved.item()

    def _check_fresh(self, moved: float) -> dict[str, float]:
        """In the first step all data is the present control's own, and every ratio must be 1: raises RuntimeError where
        one is off by a tenth of the clip or more (as with states or probabilities kept in half precision)."""
        bound = FRESH * self.config.clip_nats
        if moved > bound:
            raise RuntimeError(
                f"the ratio of fresh data is not 1: log p_theta - log p_old is up to {moved:.3g} nats before any step, "
                f"and of method.clip_nats={self.config.clip_nats:g} rounding may take {bound:.3g}; sampling and "
                "training compute different probabilities: try model.dtype=fp32, and report it"
            )
        return {"dpok/fresh_log_ratio_max": moved}

    def _start_gradient(self) -> float:
        """Add the gradient of the initial law's share of the loss to .grad; returns it."""
        law = self.problem.initial
        if law is None:
            return 0.0
        y0, goal, limit = self.starts["y0"], self.starts["goal"], self.config.clip_nats / self.d
        advantage = goal - (goal.sum() - goal) / (len(goal) - 1)
        ratio = torch.exp((law.log_prob(y0) - self.starts["log_q"]) / self.d).clamp(1 - limit, 1 + limit)
        share = self.config.reward_weight / int(self.problem.chain.controlled.sum())
        loss = share * (self.problem.beta_initial * law.kl() / self.d - (advantage * ratio).mean())
        loss.backward()
        return finite("the loss", loss.detach()).item()

    def _units(self) -> dict[str, float]:
        """Native and effective values of the penalty and the clip (design notes, section 6)."""
        chain, keep = self.problem.chain, self.problem.chain.controlled
        effective = (self.weight[keep] / chain.w[keep]).log()
        native = self.weight[keep] / (1 - chain.abar[keep]) * self.config.reward_weight
        known = self.problem.known
        gap = None if known is None or self.config.kl != "nats" or self.config.future_kl else known.gap_fixed_point
        fixed_point = {} if gap is None else {"dpok/gap_fixed_point": gap}
        return fixed_point | {
            "dpok/native_kl_weight": native.mean().item(),
            "dpok/native_clip": self.config.clip_nats / self.d,
            "dpok/log_beta_effective_mean": effective.mean().item(),
            "dpok/log_beta_effective_max": effective.max().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        value = None if self.value is None else {"net": self.value.state_dict(), "adam": self.value_adam.state_dict()}
        return {
            "adam": self.adam.state_dict(),
            "inner": self.inner,
            "sampled": self.sampled,
            "replay": self.replay.columns,
            "starts": self.starts,
            "value": value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.inner, self.sampled = state["inner"], state["sampled"]
        self.replay.columns, self.starts = dict(state["replay"]), dict(state.get("starts", {}))
        if self.replay.columns:
            self.replay.columns["k"] = state["replay"]["k"].cpu()  # steps index the chain's constants, which stay there
        if self.value is not None:
            self.value.load_state_dict(state["value"]["net"])
            self.value_adam.load_state_dict(state["value"]["adam"])

    @staticmethod
    def passes(spec: TrialSpec, controlled: int, rows: Callable[[int], int]) -> Passes:
        """Network passes per gradient step; see Passes. A step takes a whole `batch`, as it does once the buffer has
        that many."""
        T, N, K = spec.sampler.steps, spec.train.trajectories, int(spec.method["inner_steps"])
        batch = min(int(spec.method["batch"]), int(spec.method["buffer"]))
        return Passes(
            controls=T * rows(N) / K, pretrained=rows(T * N) / K, gradients=float(rows(batch)), pictures=N / K
        )


def kl_weights(chain: Chain, beta: Tensor, kl: str) -> Tensor:
    """(T,) float64: the penalty per unit of summed squared difference of controls |u - s|^2, before reward_weight / d.

    "nats": beta_k w_k. "mse": the same penalty per unit of eps difference at every step, worth beta on average.
    """
    if kl == "nats":
        return beta * chain.w
    per_eps = chain.w / (1 - chain.abar)
    keep = chain.controlled
    flat = (beta * per_eps)[keep].mean() * (1 - chain.abar)
    return torch.where(keep, flat, torch.zeros_like(flat))


def _micro_batches(
    batch: dict[str, Tensor], advantage: Tensor, size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for start in range(0, len(advantage), size):
        rows = slice(start, start + size)
        yield {name: values[rows] for name, values in batch.items()}, advantage[rows]
