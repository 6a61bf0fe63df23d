"""Data of toyland's training: named generators, scenes drawn once and kept in a cache folder, captions, weights files.

What: `scene_set(folder, name, n)` draws (or loads) n scenes; `generator(*names)` is a numpy Generator that depends on
the names only; `save_whole` and `write_json` let files appear whole. Run through workers.models.toyland.train.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.models.toyland.scenes import Scene, draw, sample_scene

SIZES = {"train": 24_000, "heldout": 2_000, "judge": 12_000}
START = time.monotonic()


def log(message: str) -> None:
    """Progress goes to stderr with the minutes since the start."""
    print(f"[{(time.monotonic() - START) / 60:6.1f} min] {message}", file=sys.stderr, flush=True)


def seed_of(*names: object) -> int:
    """A seed made of names: sha256 of their text."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:6], "big")


def generator(*names: object) -> np.random.Generator:
    """A numpy Generator for a named purpose, for example generator(0, "scenes", "train")."""
    return np.random.default_rng(seed_of(*names))


def torch_generator(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*names))


def replace_file(target: Path, write) -> None:
    """Call write(temporary path), then move the file into place: no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    write(temporary)
    temporary.chmod(0o644)  # safetensors writes files that only the owner may read
    os.replace(temporary, target)


def write_json(target: Path, value: object) -> None:
    replace_file(target, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def save_whole(target: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors, whole or not at all."""
    state = {k: v.detach().contiguous().clone() for k, v in state.items()}
    replace_file(target, lambda p: save_file(state, str(p), metadata={"format": "pt"} | (metadata or {})))


def scene_set(cache: Path, name: str, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes and their pictures (uint8 [N, 3, 32, 32]); drawn on first use."""
    file = cache / f"scenes_{name}_{seed}.pkl"
    if not file.exists():
        log(f"drawing {SIZES[name]} scenes ({name})")
        rng = generator(seed, "scenes", name)
        scenes = [sample_scene(rng) for _ in range(SIZES[name])]
        pictures = np.stack([draw(s, rng) for s in scenes]).transpose(0, 3, 1, 2)
        replace_file(file, lambda p: p.write_bytes(pickle.dumps((scenes, np.ascontiguousarray(pictures)))))
    scenes, pictures = pickle.loads(file.read_bytes())
    return scenes, torch.from_numpy(pictures)


def pixels(pictures: Tensor) -> Tensor:
    """uint8 in 0..255 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


class Ema:
    """Exponential moving average of a network's parameters with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay, self.step = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.step += 1
        share = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        for k, v in module.state_dict().items():
            if v.is_floating_point():
                self.state[k].lerp_(v, share)
            else:
                self.state[k].copy_(v)


def cosine(step: int, total: int, warmup: int = 200, floor: float = 0.01) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
