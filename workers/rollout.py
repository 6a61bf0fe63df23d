"""Trajectories of the controlled chain, and the budget they cost.

Problem        what a method works on: model, reward, chain, beta_k, generators, budget
Trajectories   the sampled chains, float32, generation order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from workers.core.chain import Chain, beta_steps
from workers.generators import Generators
from workers.initial_law import GaussianInitialLaw
from workers.spec import TrialSpec

if TYPE_CHECKING:
    from workers.known import Known


class Model(Protocol):
    """What a method needs of a model; workers.models.diffusion.DiffusionModel is the main one."""

    chain: Chain
    latent_shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    forwards: int

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor: ...
    def sampling(self) -> AbstractContextManager[None]:
        """Entered around many passes without gradients; the control within it may differ by rounding."""
        ...

    def decode(self, y: Tensor) -> Tensor: ...
    def parameters(self) -> list[nn.Parameter]: ...


class TrainedModel(Model, Protocol):
    """What the runner needs of a model besides: its adapter, in memory and on disk."""

    pictures: bool
    """Whether `decode` gives pictures; elsewhere the latents are what is rewarded."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def save_adapter(self, folder: Path) -> None: ...


class Reward(Protocol):
    """Pictures (B, 3, H, W) in [0, 1] (of models without pictures: the latents) and their prompts to rewards (B,)."""

    differentiable: bool

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


@dataclass
class Budget:
    """What training has cost so far; evaluation is not counted. Meanings: workers/recorder.py."""

    reward_queries: int = 0
    transition_gradients: int = 0
    model_forwards: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        return {f"budget/{name}": float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Trajectories:
    """N chains of T transitions."""

    y: Tensor
    """(T + 1, N, *latent): the states."""
    W: Tensor
    """(T, N, *latent): the noise of each transition."""
    u: Tensor
    """(T, N, *latent): the control at y[k]."""


def trusting(name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """A call of a reward without the care of workers/guard.py."""
    return reward(images, prompts)


@dataclass
class Problem:
    """One trial's control problem: maximise J = E[ r(Y_T) - sum_k beta_k step KL_k ]."""

    model: Model
    reward: Reward
    prompt: str
    beta: Tensor
    """(T,) float64: the weight of each step's KL, in reward units per nat."""
    trajectories: int
    micro_batch: int
    generators: Generators
    budget: Budget
    initial: GaussianInitialLaw | None = None
    """The learned law of Y_0, None where it is N(0, I)."""
    transform: Callable[[Tensor], Tensor] | None = None
    """Rewards (N,) to the rewards that are trained on, for a regulariser other than kl."""
    known: Known | None = None
    """What is known of the optimum, where anything is."""
    lr_factor: float = 1.0
    """What the present gradient step's size is multiplied by (train.lr_schedule); the runner sets it."""
    guard: Callable[[str, Reward, Tensor, list[str]], Tensor] = trusting
    """How rewards are called: (name, reward, pictures, prompts) to (B,)."""
    names: tuple[str, str] = ("reward", "judge")
    """What the reward and the judge are called in messages."""
    offloaded: Sequence[nn.Module] = ()
    """Networks that stand in main memory but for the time within `rewarding`."""

    @property
    def beta_initial(self) -> float:
        """The weight of the initial law's KL: the first step's beta."""
        return float(self.beta[0])

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: the model's adapter, then the initial law."""
        return self.model.parameters() + (self.initial.trained.parameters() if self.initial else [])

    def start(self, noise: Tensor) -> Tensor:
        """Y_0 (N, *latent) from standard normal noise."""
        if self.initial is None:
            return noise
        with torch.no_grad():
            return self.initial(noise)

    @property
    def chain(self) -> Chain:
        return self.model.chain

    def sample(self) -> Trajectories:
        """`trajectories` chains under the present control, from the generator `rollout`."""
        shape = (self.trajectories, *self.model.latent_shape)
        y0 = self.start(self.generators.normal("rollout", shape))
        W = self.generators.normal("rollout", (self.chain.T, *shape))
        return rollout(self.model, y0, W, self.micro_batch)

    @contextmanager
    def rewarding(self) -> Iterator[None]:
        """Around a decoding, a reward and the gradient of both: what is offloaded is on the device within it."""
        for network in self.offloaded:
            network.to(self.model.device)
        try:
            yield
        finally:
            for network in self.offloaded:
                network.to("cpu")

    def score(self, y: Tensor) -> Tensor:
        """The rewards to train on, (N,), of final latents, `micro_batch` pictures at a time; counted as queries;
        differentiable if the reward is. Call it within `rewarding`."""
        self.budget.reward_queries += len(y)
        rewards = torch.cat([self._reward(part) for part in y.split(self.micro_batch)])
        return rewards if self.transform is None else self.transform(rewards)

    def _reward(self, y: Tensor) -> Tensor:
        return self.guard(self.names[0], self.reward, self.model.decode(y), [self.prompt] * len(y))

    def step_kls(self, kls: Tensor) -> Tensor:
        """(T, N) step KLs weighted by beta_k."""
        return self.beta.to(kls)[:, None] * kls

    @contextmanager
    def costs(self) -> Iterator[None]:
        """Counts the network evaluations and the seconds of what happens within it."""
        forwards, start = self.model.forwards, time.perf_counter()
        try:
            yield
        finally:
            self.budget.model_forwards += self.model.forwards - forwards
            self.budget.seconds += time.perf_counter() - start


def beta_of(spec: TrialSpec, model: Any, reward: Reward) -> Tensor:
    """beta_k of a trial, float64 (T,)."""
    if spec.beta_schedule == "contraction":
        return model.contraction_beta(reward, spec.beta, spec.beta_rate)
    return beta_steps(model.chain, spec.beta, spec.beta_schedule)


@torch.no_grad()
def rollout(
    model: Model, y0: Tensor, W: Tensor, micro_batch: int, each: Callable[..., Any] | None = None
) -> Trajectories:
    """Chains from y0 (N, *latent) with noise W (T, N, *latent), `micro_batch` chains at a time.

    `each(k, rows, y, u)` is called at every transition, for what wants to look on (evaluation does).
    """
    chain = model.chain
    y0, W = y0.to(model.device, model.dtype), W.to(model.device, model.dtype)
    path, controls = torch.empty(len(W) + 1, *y0.shape, dtype=y0.dtype, device=y0.device), torch.empty_like(W)
    path[0] = y0
    with model.sampling():
        for start in range(0, len(y0), micro_batch):
            rows = slice(start, start + micro_batch)
            for k in range(chain.T):
                u = model.control(k, path[k, rows], adapted=bool(chain.controlled[k]))
                controls[k, rows] = u
                path[k + 1, rows] = chain.step(k, path[k, rows], u, W[k, rows])
                if each:
                    each(k, rows, path[k, rows], u)
    return Trajectories(y=path, W=W, u=controls)


@torch.no_grad()
def pretrained_controls(model: Model, k: Tensor, y: Tensor, micro_batch: int) -> Tensor:
    """s_k(y) for many transitions, (M, *latent), `k` int64 (M,): time steps mixed, `micro_batch` at a time."""
    pieces = zip(k.split(micro_batch), y.split(micro_batch), strict=True)
    return torch.cat([model.control(steps, states, adapted=False) for steps, states in pieces])


def transitions(paths: Tensor) -> Tensor:
    """(T, N, ...) as (T * N, ...), step-major: entry k * N + n is chain n at step k."""
    return paths.flatten(0, 1)


def transition_steps(chain: Chain, count: int) -> Tensor:
    """int64 (T * N,): the step of each entry of `transitions`."""
    return torch.arange(chain.T).repeat_interleave(count)


def rewards_to_go(rewards: Tensor, weighted_kls: Tensor) -> Tensor:
    """G_k = r - sum_{j > k} beta_j KL_j, (T, N): what follows transition k; rewards (N,), beta_k KL_k (T, N)."""
    after = weighted_kls.flip(0).cumsum(0).flip(0) - weighted_kls
    return rewards - after
