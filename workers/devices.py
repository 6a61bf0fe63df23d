"""The devices of this machine: their names, and how much of their memory a trial may take."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import torch


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
