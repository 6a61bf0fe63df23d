"""A tiny Stable-Diffusion-format checkpoint with random weights, made on the spot: real classes, quick passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.models import sd15

WORDS = ("a", "green", "rabbit", "cat", "dog")


def save_checkpoint(folder: Path) -> Path:
    """unet/ vae/ text_encoder/ tokenizer/ scheduler/ model_index.json, 4x4x4 latents, 8x8 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, sample_size=8, scaling_factor=1.0,
    )  # fmt: skip
    return _save(folder, unet, vae, DDIMScheduler(**sd15.SCHEDULER))


def save_sd15(folder: Path) -> Path:
    """Stable Diffusion v1.5's layout, block for block, a few channels wide: 8x8x4 latents, 64x64 pictures, the PNDM
    scheduler that its folder names."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(1)
    narrow = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
    size = {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 2}
    unet = UNet2DConditionModel(**{**sd15.UNET, **narrow, **size})
    vae = AutoencoderKL(**{**sd15.VAE, **narrow, "sample_size": 64})
    known = {name: value for name, value in sd15.SCHEDULER.items() if name != "clip_sample"}
    return _save(folder, unet, vae, PNDMScheduler(**known, skip_prk_steps=True))


def _save(folder: Path, unet: Any, vae: Any, scheduler: Any) -> Path:
    """A pipeline of these and of a text encoder of one layer."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    pieces = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"), model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"


class Brightness:
    """A smooth reward: how green the picture is, against red."""

    differentiable = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 3 * (images[:, 1] - images[:, 0]).tanh().flatten(1).mean(1) + images[:, 2].square().flatten(1).mean(1)


class BlackBox:
    """The same number, without a gradient."""

    differentiable = False

    def __init__(self, device: str = "cpu") -> None:
        self.inner = Brightness(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.inner(images, prompts)


class Faint(Brightness):
    """A hundred-millionth of it."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 1e-8 * super().__call__(images, prompts)


class Networked(Brightness):
    """The same number, from a network that can be moved."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.network = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.network.weight.copy_(torch.eye(3)[:, :, None, None])

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(self.network(images), prompts)


METHODS = {
    "pi_ft": {
        "_target_": "workers.methods.pi_ft.PIFT", "name": "pi_ft", "lr": 1e-3, "estimator": "pathwise",
        "inner_steps": 1,
        "weight_decay": 0.0, "max_grad_norm": None,
    },
    "dpok": {
        "_target_": "workers.methods.dpok.DPOK", "name": "dpok", "lr": 1e-3, "inner_steps": 2, "batch": 8, "buffer": 40,
        "reward_weight": 10.0, "clip_nats": 1.6, "kl": "nats", "future_kl": False, "baseline": "value",
        "value_lr": 1e-4,
        "value_steps": 2, "value_batch": 8, "value_width": 16, "weight_decay": 0.0, "max_grad_norm": 0.1,
    },
}  # fmt: skip


def changed(values: dict, changes: Mapping[str, object]) -> dict:
    """A spec with some of its values set; `changes` are dotted keys with __ for the dot."""
    for name, value in changes.items():
        group, _, key = name.partition("__")
        if key:
            values[group][key] = value
        else:
            values[group] = value
    return values


def spec(
    path: Path, method: str = "pi_ft", *, reward: str = "Brightness", dtype: str = "fp32", **changes: object
) -> dict:
    """A TrialSpec as a plain mapping on the tiny checkpoint; `changes` are dotted keys with __ for the dot."""
    values: dict = {
        "prompt": "a green rabbit", "prompt_id": "rabbit", "beta": 0.3, "beta_schedule": "constant", "seed": 0,
        "model": {"_target_": "workers.models.diffusion.DiffusionModel", "name": "tiny", "path": str(path),
                  "revision": None,
                  "dtype": dtype},
        "reward": {"_target_": f"tests.tiny.{reward}", "name": reward},
        "judge": {"_target_": "tests.tiny.Brightness", "name": "judge"},
        "method": dict(METHODS[method]),
        "sampler": {"steps": 4, "eta": 1.0, "guidance_scale": 1.0},
        "lora": {"rank": 2, "alpha": 2, "targets": "all"},
        "train": {"gradient_steps": 4, "trajectories": 4, "micro_batch": 8, "checkpoint_every": 2},
        "eval": {"every": 2, "samples": 4, "pictures": 2},
    }  # fmt: skip
    return changed(values, changes)


_MADE: dict[Path, Path] = {}


def checkpoint(base: Path, layout: str = "tiny") -> Path:
    """`save_checkpoint`, or with layout "sd15" `save_sd15`, under `base` (pytest's `tmp_path_factory.getbasetemp()`),
    once in a process."""
    place = base / layout
    if place not in _MADE:
        _MADE[place] = (save_sd15 if layout == "sd15" else save_checkpoint)(place)
    return _MADE[place]
