"""Pictures as the rewards' networks take them: resized, cut to a square, normalised as CLIP was trained.

    check_pictures(name, images, prompts)    (B, 3, H, W) and one prompt each, or a ValueError
    to_8_bits(images)                        (B, H, W, 3), as a picture is saved
    clip_pixels(images, size)                (B, 3, size, size)

`clip_pixels` has two ways, one result but for rounding:
    no gradient is asked for   what CLIP, BLIP and ImageReward do with a saved picture: 8 bits, resized by Pillow. By
                               Pillow itself: torchvision's resize of 8-bit tensors differs from it by up to 28 of 255
                               levels at hard edges, because Pillow cuts to [0, 255] after each axis
    a gradient is asked for    the same without rounding, in float32 (float64 stays): a matrix for each axis, and the
                               cut to [0, 1] after each
They differ by .3 of 255 levels on average and 1.5 at most (measured, random pictures of 32 to 768 pixels); without the
cut the second would be off by up to 51. The matrices hold torch's antialiased bicubic weights: its own resize of a GPU
tensor has a backward pass that may give other bits every time.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (github.com/openai/CLIP, clip.py); BLIP and ImageReward took them over."""


def check_pictures(name: str, images: Tensor, prompts: list[str]) -> None:
    """Raises ValueError for anything but colour pictures (B, 3, H, W) with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} scores images of shape [B, 3, H, W] in [0, 1], got {list(images.shape)} of {images.dtype}"
        )
    if len(prompts) != len(images):
        raise ValueError(f"one prompt per image: got {len(prompts)} prompts for {len(images)} images")


def to_8_bits(images: Tensor) -> np.ndarray:
    """Pictures (B, 3, H, W) in [0, 1] as uint8 (B, H, W, 3), as every picture here is saved."""
    return images.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as (B, 3, size, size): the shorter side to `size`, bicubic with antialiasing, the
    middle cut out, normalised. float32 (float64 stays), on the pictures' device; differentiable. See the module."""
    exact = images.double() if images.dtype == torch.float64 else images.float()
    if torch.is_grad_enabled() and images.requires_grad:
        pixels = _resized(exact, size)
    else:
        pixels = _saved_and_resized(images, size).to(exact)
    mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (pixels - mean) / std


def sizes(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(height, width) after the resize and the (top, left) corner of the cut, as torchvision's Resize and CenterCrop
    round them."""
    short = min(height, width)
    tall, wide = (size if side == short else int(size * side / short) for side in (height, width))
    return tall, wide, round((tall - size) / 2), round((wide - size) / 2)


def _saved_and_resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, size, size) in [0, 1] by way of 8 bits, float32 on the CPU."""
    tall, wide, top, left = sizes(images.shape[2], images.shape[3], size)
    box = (left, top, left + size, top + size)
    resized = [
        np.asarray(Image.fromarray(picture).resize((wide, tall), Image.Resampling.BICUBIC).crop(box))
        for picture in to_8_bits(images)
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def _resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, size, size) in [0, 1], not rounded; across first, then down, as Pillow."""
    tall, wide, top, left = sizes(images.shape[2], images.shape[3], size)
    across = _bicubic(images.shape[3], wide)[left : left + size].to(images)
    down = _bicubic(images.shape[2], tall)[top : top + size].to(images)
    return (down @ (images @ across.T).clamp(0, 1)).clamp(0, 1)


@functools.lru_cache
def _bicubic(source: int, target: int) -> Tensor:
    """(target, source): the antialiased bicubic weights of one axis, float64."""
    identity = torch.eye(source, dtype=torch.float64)[None, None]
    return F.interpolate(identity, size=(target, source), mode="bicubic", antialias=True)[0, 0]
