"""What the models with a known optimum (lq.py, mixture.py) share: the chain, a policy in memory and on disk, checks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.core.chain import Chain, ddpm_chain
from workers.core.continuous import Schedule
from workers.generators import Generators
from workers.parameters import NamedParameters
from workers.rollout import Reward
from workers.spec import TrialSpec, locate, settings

SCHEDULE = Schedule()


def chain_of(steps: int) -> Chain:
    """T equal steps of the variance-preserving diffusion, sigma^2 = 1 - alpha: a finer chain is the same problem."""
    return ddpm_chain(torch.from_numpy(SCHEDULE.abar(np.linspace(0, 1, steps + 1))))


def new_policy(device: str, **values: Tensor) -> NamedParameters:
    """The float64 parameters of a control, on a device."""
    return NamedParameters("policy.safetensors", **{name: value.double().to(device) for name, value in values.items()})


class AnalyticModel:
    """Abstract: the half of a rollout.TrainedModel that does not depend on the problem. No pictures, no network."""

    pictures = False
    has_adapter = False
    dtype = torch.float64

    def __init__(self, policy: NamedParameters, chain: Chain, d: int, device: str) -> None:
        self.policy, self.chain, self.latent_shape, self.device = policy, chain, (d,), torch.device(device)
        self.forwards = 0

    def sampling(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def decode(self, y: Tensor) -> Tensor:
        """The final state itself is what is rewarded, (B, d)."""
        return y

    def parameters(self) -> list[nn.Parameter]:
        return self.policy.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.policy.load_state_dict(state)

    def save_adapter(self, folder: Path) -> None:
        self.policy.save(folder)

    def load_adapter(self, folder: Path) -> None:
        self.policy.load(folder)

    def steps(self, k: int | Tensor, count: int) -> Tensor:
        """k as int64 (count,) on the policy's device; counts the evaluations."""
        self.forwards += count
        return torch.as_tensor(k, device=self.device).expand(count)


def common_problems(spec: TrialSpec) -> list[str]:
    """What keeps a trial's other settings from fitting such a model."""
    name, found = spec.model["name"], []
    if spec.sampler.eta != 1:
        found.append(f"sampler.eta={spec.sampler.eta:g} does not fit model={name}, whose chain is the paper's; write 1")
    if spec.sampler.guidance_scale != 1:
        found.append(f"sampler.guidance_scale={spec.sampler.guidance_scale:g} means nothing to model={name}; write 1")
    for field in ("reward", "judge"):
        component: Mapping[str, Any] | None = getattr(spec, field)
        if component is not None and not getattr(locate(component["_target_"]), "of_states", False):
            found.append(
                f"{field}={component['name']} scores pictures and model={name} makes none; write reward=quadratic or "
                "reward=bounded"
            )
    return found


def probe(spec: TrialSpec) -> tuple[Any, Reward]:
    """The model and the reward of a trial, to find out whether its problem has an optimum before it runs."""
    model = locate(spec.model["_target_"])(
        **settings(spec.model), prompt=spec.prompt, sampler=spec.sampler, lora=spec.lora, generators=Generators(0)
    )
    return model, locate(spec.reward["_target_"])(**settings(spec.reward))
