"""Between float32 states and a half-precision network: casts, and gradients that do not vanish in float16.

    crossing = Crossing(torch.float16, parameters)
    x = crossing.enter(y)              float32 to float16
    eps = crossing.leave(network(x))   float16 to float32

Backward, the gradient of `leave` is multiplied by the power of two that makes its largest entry about one, and divided
by it where it comes out: at `enter`, and at the trained parameters, which take their gradient inside the network. A
power of two costs no digit, and the scale is of this one pass, so nothing has to be adapted, skipped or saved. bfloat16
has float32's exponents: there the casts are all there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The precisions of a frozen network, by their names in settings."""


@dataclass
class _Scale:
    """The power of two of one pass; `leave` sets it in the backward pass, before anything else needs it."""

    value: Tensor | None = None


class Crossing:
    """Casts into a network of dtype `inner` and back. `parameters` are trained inside it, in float32; a graph that is
    walked backwards holds one pass through them (as every method here has it)."""

    def __init__(self, inner: torch.dtype, parameters: Iterable[nn.Parameter] = ()) -> None:
        self.inner, self.scaled = inner, inner == torch.float16
        self._present, self._trained = _Scale(), _Scale()
        if self.scaled:
            for parameter in parameters:
                parameter.register_hook(self._back)

    def _back(self, gradient: Tensor) -> Tensor:
        return gradient if self._trained.value is None else gradient / self._trained.value

    def enter(self, y: Tensor, trained: bool = True) -> Tensor:
        """y in the network's dtype; begins a pass, `trained` when it goes through the trained parameters."""
        if not self.scaled:
            return y.to(self.inner)
        self._present = _Scale()
        if trained:
            self._trained = self._present
        return _Enter.apply(y, self.inner, self._present)  # type: ignore[no-any-return]

    def leave(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's answer in `dtype`; ends the pass."""
        if not self.scaled:
            return out.to(dtype)
        return _Leave.apply(out, dtype, self._present)  # type: ignore[no-any-return]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, inner: torch.dtype, scale: _Scale) -> Tensor:  # type: ignore[override]
        ctx.dtype, ctx.scale = y.dtype, scale
        return y.to(inner)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient.to(ctx.dtype) / ctx.scale.value, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, dtype: torch.dtype, scale: _Scale) -> Tensor:  # type: ignore[override]
        ctx.inner, ctx.scale = out.dtype, scale
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        largest = gradient.abs().amax()
        power = torch.exp2(-largest.log2().floor().clamp(-126, 126))
        ctx.scale.value = torch.where(torch.isfinite(power), power, torch.ones_like(power))
        return (gradient * ctx.scale.value).to(ctx.inner), None, None
