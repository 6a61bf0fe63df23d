"""The devices of this machine: their names, and how much of their memory a trial may take. And the GPUs that a plan's
cost can be estimated for: what their vendor says of them.

    gpus()                 what torch sees here
    gpu_named(name)        a row of GPUS, by torch's name for it or a person's: "A100-80GB", "h100", "rtx 4090"
"""

from __future__ import annotations

import gc
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """A GPU as its vendor describes it: peaks in TFLOP/s of matrix products without sparsity, float32 accumulation."""

    name: str
    mark: str
    """A regular expression, found in the GPU's name in small letters, whatever is no letter or digit a blank."""
    memory: float
    """GiB: what is sold as GB. A driver that corrects errors may keep some of it."""
    fp16: float
    bf16: float | None
    """None: its matrix units have no bfloat16."""
    tf32: float | None
    fp32: float
    """Without TF32, which torch keeps for convolutions."""
    source: str

    def peak(self, precision: str) -> float:
        """TFLOP/s in fp16, bf16, tf32 or fp32; where a precision has no matrix units, those of float32."""
        found: float | None = getattr(self, precision)
        return self.fp32 if found is None else found


HALF = "half of its figures with sparsity"
GPUS = (
    Gpu("B200", r"\bb200\b", 180, 2250, 2250, 1100, 75, f"NVIDIA's HGX B200 datasheet, {HALF}"),
    Gpu("H200", r"\bh200\b", 141, 989, 989, 494, 67, f"NVIDIA's H200 datasheet, {HALF}"),
    Gpu("H100 NVL", r"\bh100 ?nvl\b", 94, 835, 835, 417, 60, f"NVIDIA's H100 NVL datasheet, {HALF}"),
    Gpu("H100 PCIe", r"\bh100 ?(80 ?gb )?pcie\b", 80, 756, 756, 378, 51, f"NVIDIA's H100 datasheet, {HALF}"),
    Gpu("H100 SXM", r"\bh100 ?(sxm\d?)?\b", 80, 989, 989, 494, 67, f"NVIDIA's H100 datasheet, {HALF}"),
    Gpu("A100 40GB", r"\ba100\b.* 40 ?gb\b", 40, 312, 312, 156, 19.5, "NVIDIA's A100 datasheet"),
    Gpu("A100 80GB", r"\ba100\b", 80, 312, 312, 156, 19.5, "NVIDIA's A100 datasheet"),
    Gpu("L40S", r"\bl40s\b", 48, 362, 362, 183, 91.6, "NVIDIA's L40S datasheet"),
    Gpu("L4", r"\bl4\b", 24, 121, 121, 60, 30.3, f"NVIDIA's L4 datasheet, {HALF}"),
    Gpu("A10G", r"\ba10g\b", 24, 70, 70, 35, 31.5, "NVIDIA's A10G datasheet"),
    Gpu("A10", r"\ba10\b", 24, 125, 125, 62.5, 31.2, "NVIDIA's A10 datasheet"),
    Gpu("RTX 6000 Ada", r"\b6000 ada\b", 48, 364, 364, 182, 91.1, f"NVIDIA's RTX 6000 Ada datasheet, {HALF}"),
    Gpu("RTX A6000", r"\ba6000\b", 48, 154.8, 154.8, 77.4, 38.7, f"NVIDIA's RTX A6000 datasheet, {HALF}"),
    Gpu("RTX 5090", r"\b(rtx)?5090\b(?! d| laptop)", 32, 209.5, 209.5, 104.8, 104.8, "NVIDIA's Blackwell whitepaper"),
    Gpu("RTX 4090", r"\b(rtx)?4090\b(?! d| laptop)", 24, 165.2, 165.2, 82.6, 82.6, "NVIDIA's Ada whitepaper"),
    Gpu("RTX 3090", r"\b(rtx)?3090\b(?! ti| laptop)", 24, 71, 71, 35.6, 35.6, "NVIDIA's Ampere GA102 whitepaper"),
    Gpu("V100 32GB", r"\bv100s?\b.* 32 ?gb\b", 32, 125, None, None, 15.7, "NVIDIA's V100 datasheet, SXM2"),
    Gpu("V100 16GB", r"\bv100s?\b", 16, 125, None, None, 15.7, "NVIDIA's V100 datasheet, SXM2"),
    Gpu("T4", r"\bt4\b", 16, 65, None, None, 8.1, "NVIDIA's T4 datasheet"),
)  # fmt: skip
"""The first one whose mark is found is meant: special ones before general ones. No datasheet could be opened where this
was written: A10G, H100 NVL, RTX A6000, RTX 6000 Ada, 5090, 4090 and 3090 are from memory, the others agree with pages
that quote them."""


def gpu_named(name: str) -> Gpu | None:
    """The row of GPUS that a name means; None for a GPU that is not there, or a slice (MIG) of one."""
    plain = re.sub(r"[^a-z0-9]+", " ", name.lower())
    if "mig" in plain.split():
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.mark, plain)), None)


def gpus() -> list[tuple[str, int]]:
    """(name, bytes of memory) of every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [(device.name, device.total_memory) for device in found]


def limit_gpu_memory(share: float) -> None:
    """Keep this process to a share (0..1) of the GPU's memory; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """What a device is called: the GPU's name, or the processor's."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return device
