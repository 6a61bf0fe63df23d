"""Named random generators: every draw of a trial comes from one, and all of them are saved with the checkpoint.

    lora_init      the adapter's initial weights
    rollout        initial latents and noise of the training trajectories
    replay         which transitions a gradient step takes from the replay buffer
    value_init     initial weights of a value network
    value_batch    which transitions train it
    normaliser     samples of the pre-trained model that solve a regulariser's normaliser

Evaluation noise is not among them: it depends on the prompt alone (see evaluate.py), so that all cells share it.
Numbers are drawn on the CPU and then moved, so that a seed means the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("lora_init", "rollout", "replay", "value_init", "value_batch", "normaliser")


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: equal parts, equal seed, on every machine and Python."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Generators:
    """The named generators of one trial, each seeded from (seed, name)."""

    def __init__(self, seed: int) -> None:
        self._all = {name: torch.Generator().manual_seed(derived_seed(seed, name)) for name in NAMES}

    def __getitem__(self, name: str) -> torch.Generator:
        return self._all[name]

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 on the CPU, of the given shape."""
        return torch.randn(tuple(shape), generator=self._all[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self._all.items()}

    def load_state_dict(self, states: dict[str, Tensor]) -> None:
        for name, state in states.items():
            self._all[name].set_state(state)
