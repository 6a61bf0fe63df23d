"""A few named tensors that are trained: in memory, in a checkpoint, and as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from workers.store import write_whole


class NamedParameters:
    """Parameters by name, in the order given; `file` is the name they have on disk."""

    def __init__(self, file: str, **values: Tensor) -> None:
        self.file = file
        self._all = {name: nn.Parameter(value.clone()) for name, value in values.items()}

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._all[name]

    def parameters(self) -> list[nn.Parameter]:
        return list(self._all.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._all.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError where a name is missing."""
        with torch.no_grad():
            for name, value in self._all.items():
                value.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write `folder`/`file`, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / self.file, lambda temporary: save_file(tensors, temporary))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises OSError without a file."""
        from safetensors.torch import load_file

        self.load_state_dict(load_file(folder / self.file))
