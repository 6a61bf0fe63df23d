"""The size of a picture as a JPEG file: a reward that is no network and has no gradient.

What: minus the size in kB (1000 bytes) at quality 95, as DDPO counts it (Black et al. 2023, arXiv 2305.13301; official
code, rewards.py); with `prefer="large"` plus the size, DDPO's incompressibility. The prompt does not matter. It shows
quickly whether a method climbs at all, with any model that makes pictures, of any size.
How to run: `Compressibility(prefer="small", quality=95)(images, prompts)` with images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from workers.rewards.pictures import check_pictures, to_8_bits
from workers.spec import TrialSpec, choice, integer
from workers.weights import places_of

SIGNS = {"small": -1.0, "large": 1.0}


class Compressibility:
    """Minus the kB of pictures as JPEG, or plus where large files are preferred."""

    name = "compressibility"
    differentiable = False

    def __init__(self, *, prefer: str = "small", quality: int = 95, device: str = "cpu") -> None:
        self.sign, self.quality, self.device = SIGNS[prefer], quality, device

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, as a reward or as a judge."""
        found = []
        for field, settings in places_of(spec, Compressibility):
            found += choice(f"{field}.prefer", settings.get("prefer", "small"), tuple(SIGNS))
            why = "JPEG's quality; above 95 files grow and pictures do not"
            found += integer(f"{field}.quality", settings.get("quality", 95), 1, why, 95)
        return found

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> rewards (B,) in kB, in the images' dtype."""
        check_pictures(self.name, images, prompts)
        sizes = [_jpeg_bytes(Image.fromarray(picture), self.quality) for picture in to_8_bits(images)]
        return torch.tensor(sizes, dtype=torch.float64).mul(self.sign / 1000).to(images)


def _jpeg_bytes(picture: Image.Image, quality: int) -> int:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return file.tell()
