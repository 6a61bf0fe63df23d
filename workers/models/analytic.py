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
from workers.spec import TrialSpec, locate
from workers.store import write_whole

FILE = "policy.safetensors"
SCHEDULE = Schedule()


def chain_of(steps: int) -> Chain:
    """T equal steps of the variance-preserving diffusion, sigma^2 = 1 - alpha: a finer chain is the same problem."""
    return ddpm_chain(torch.from_numpy(SCHEDULE.abar(np.linspace(0, 1, steps + 1))))


class Policy:
    """Named float64 parameters of a control."""

    def __init__(self, device: str, **values: Tensor) -> None:
        self._all = {name: nn.Parameter(value.double().to(device).clone()) for name, value in values.items()}

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._all[name]

    def parameters(self) -> list[nn.Parameter]:
        return list(self._all.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._all.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._all.items():
                value.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write `folder`/policy.safetensors."""
        from safetensors.torch import save_file

        tensors = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / FILE, lambda temporary: save_file(tensors, temporary))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises OSError without a file."""
        from safetensors.torch import load_file

        self.load_state_dict(load_file(folder / FILE))


class AnalyticModel:
    """Abstract: the half of a rollout.TrainedModel that does not depend on the problem. No pictures, no network."""

    pictures = False
    has_adapter = False
    dtype = torch.float64

    def __init__(self, policy: Policy, chain: Chain, d: int, device: str) -> None:
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
