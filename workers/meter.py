"""FLOPs and memory of a network's pass, counted and not run: on torch's meta device.

    measure(forward, gradient) -> Measured(flops by precision, bytes kept for the backward pass, bytes at most)

On the meta device an operation has shapes, dtypes and lifetimes and computes nothing: SD v1.5's UNet there and back
takes half a second. `Meter` works on real tensors too, which is how it is tested.

    FLOPs     2 per multiplication and addition, of convolutions, matrix products and attention, by the formulas of
              torch's FlopCounterMode; what a pass computes again under checkpointing is counted again
    bytes     of all tensors made and still alive, each storage once; as a GPU with fused attention would hold them,
              without the allocator's fragmentation and the kernels' workspaces
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Meter(TorchDispatchMode):
    """Counts what runs within it: FLOPs by precision, and bytes of the tensors made, `now` and at `most`. Tensors made
    before count nothing; views and in-place results nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._see(tensor, new=False)
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            precision = PRECISIONS.get(given[0].dtype, "fp32")
            if precision == "fp32" and "convolution" in str(packet):
                precision = "tf32"  # torch's default for convolutions; matrix products stay in float32
            count = flop_registry[packet](*args, **kwargs, out_val=out)
            self.flops[precision] = self.flops.get(precision, 0.0) + count
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, new=True)
        return out

    def _see(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = storage.nbytes() if new else 0
            self._seen[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self._seen.pop(key, None)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Attention that keeps its inputs, its output and one number per query for the backward pass, as the kernels of a
    GPU do: on the meta device torch would keep the whole matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        parts = (named[name] for name in ("query", "key", "value"))
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(*parts, named.get("attn_mask"), torch.is_grad_enabled())[0]


again = functools.partial(
    checkpoint,
    use_reentrant=False,
    preserve_rng_state=False,
    context_fn=lambda: (contextlib.nullcontext(), FusedAttention()),
)
"""checkpoint(block, *inputs) on the meta device: computed again in the backward pass, which FusedAttention around the
forward pass does not reach."""


class Measured(NamedTuple):
    """One pass."""

    flops: Mapping[str, float]
    """By precision: fp16, bf16, tf32 (convolutions of float32), fp32."""
    kept: int
    """Bytes alive between forward and backward."""
    most: int
    """Bytes alive at the worst moment."""


def measure(forward: Callable[[], Tensor], gradient: bool) -> Measured:
    """What `forward`, on meta tensors, takes, and with `gradient` the backward pass from its output."""
    with Meter() as meter, torch.set_grad_enabled(gradient):
        with FusedAttention():
            out = forward()
        kept = meter.now
        if gradient:
            torch.autograd.backward(out, torch.empty_like(out))
    return Measured(meter.flops, kept, meter.most)


class Line(NamedTuple):
    """base + slope x rows: memory by rows is one."""

    base: float
    slope: float

    @classmethod
    def through(cls, one: float, two: float) -> Line:
        """From the values at one row and at two."""
        return cls(2 * one - two, two - one)

    def plus(self, base: float, slope: float) -> Line:
        return Line(self.base + base, self.slope + slope)

    def at(self, rows: float) -> float:
        return self.base + self.slope * rows
