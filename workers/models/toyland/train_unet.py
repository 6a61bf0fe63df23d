"""Stage `unet`: the denoiser and the text encoder of toyland, trained together on cached latents.

Loss: epsilon prediction with the min-SNR weight min(SNR, 5) / SNR (Hang et al. 2023), SD v1.5's noise schedule.
Captions are wrong about each attribute at times (text.CORRUPTION): that is the headroom fine-tuning works in; one in
ten is empty, for guidance. Early-stopped on the held-out loss with fixed noise.
How to run: `python -m workers.models.toyland.train --stages unet --out DIR` (needs the stage vae).
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from workers.models.toyland import data
from workers.models.toyland.scenes import Scene
from workers.models.toyland.text import CORRUPTION, MAX_LENGTH, caption, corrupt, write_tokenizer
from workers.models.toyland.train_vae import encode

ITERATIONS = 8_000
BATCH = 64
LEARNING_RATE = 1.5e-3
MIN_SNR = 5.0
EMPTY_SHARE = 0.1
CAPTIONS = 4  # captions kept per scene
PATIENCE = 8  # evaluations without progress
EVALUATE_EVERY = 500
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,  # diffusers' old name: four heads
    "norm_num_groups": 8,
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.39.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=192,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """As StableDiffusionPipeline does it: padded to the longest length."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def corrupted_captions(scenes: list[Scene], rng: np.random.Generator, n: int) -> list[str]:
    """n captions per scene, each wrong about attributes with the probabilities of CORRUPTION; some are empty."""
    return [
        "" if rng.random() < EMPTY_SHARE else caption(corrupt(s, rng, CORRUPTION), rng)
        for s in scenes
        for _ in range(n)
    ]


def latent_cache(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled posterior means and deviations of pictures and of their mirror images: [2, N, 4, 8, 8] each."""
    pairs = [encode(vae, p) for p in (pictures, pictures.flip(-1))]
    return tuple(torch.stack(x) * vae.config.scaling_factor for x in zip(*pairs, strict=True))


def loss_of(unet, text_encoder, x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """min-SNR weighted epsilon loss, mean over batch and elements."""
    a = alphas[t].view(-1, 1, 1, 1)
    estimate = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text_encoder(ids)[0]).sample
    snr = alphas[t] / (1 - alphas[t])
    return ((estimate - noise).pow(2).mean((1, 2, 3)) * snr.clamp(max=MIN_SNR) / snr).mean()


class Heldout:
    """The held-out denoising loss: fixed scenes, captions, times and noise."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, cache: Path, seed: int, n: int = 512):
        scenes, pictures = data.scene_set(cache, "heldout", seed)
        generator = data.torch_generator(seed, "unet", "heldout")
        self.x0 = encode(vae, pictures[:n])[0] * vae.config.scaling_factor
        self.ids = token_ids(tokenizer, corrupted_captions(scenes[:n], data.generator(seed, "unet", "heldout"), 1))
        self.t = torch.randint(0, 1000, (n,), generator=generator)
        self.noise = torch.randn(self.x0.shape, generator=generator)

    @torch.no_grad()
    def loss(self, unet, text_encoder, alphas: Tensor) -> float:
        return float(loss_of(unet, text_encoder, self.x0, self.ids, self.t, self.noise, alphas))


def save(unet, text_encoder, folder: Path) -> None:
    """Both networks in Stable Diffusion's layout; every file appears whole."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.39.0"} | config
    data.write_json(folder / "unet" / "config.json", config)
    data.save_whole(folder / "unet" / "diffusion_pytorch_model.safetensors", unet.state_dict())
    text = text_encoder.config.to_dict() | {"architectures": ["CLIPTextModel"]}
    data.write_json(folder / "text_encoder" / "config.json", text)
    data.save_whole(folder / "text_encoder" / "model.safetensors", text_encoder.state_dict())


def build(folder: Path, seed: int) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Fresh networks; tokenizer, scheduler and index are written on the way."""
    write_tokenizer(folder / "tokenizer")
    scheduler = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.39.0"} | SCHEDULER
    data.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    data.write_json(folder / "model_index.json", INDEX)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    torch.manual_seed(data.seed_of(seed, "unet", "weights"))
    return UNet2DConditionModel(**UNET), CLIPTextModel(text_config(tokenizer)), tokenizer


class Batches:
    """Random latents, captions, times and noise out of the cached scenes and their mirror images."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, cache: Path, seed: int):
        scenes, pictures = data.scene_set(cache, "train", seed)
        data.log("unet: encoding the scenes")
        self.mean, self.std = latent_cache(vae, pictures)
        captions = corrupted_captions(scenes, data.generator(seed, "unet", "captions"), CAPTIONS)
        self.ids = token_ids(tokenizer, captions).view(len(scenes), CAPTIONS, -1)
        self.generator = data.torch_generator(seed, "unet", "noise")

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0 [n, 4, 8, 8], token ids [n, L], times [n], noise [n, 4, 8, 8]."""
        g = self.generator
        i = torch.randint(self.mean.shape[1], (n,), generator=g)
        mirrored = torch.randint(2, (n,), generator=g)
        mean, std = self.mean[mirrored, i], self.std[mirrored, i]
        x0 = mean + std * torch.randn(mean.shape, generator=g)
        t = torch.randint(0, 1000, (n,), generator=g)
        ids = self.ids[i, torch.randint(CAPTIONS, (n,), generator=g)]
        return x0, ids, t, torch.randn(x0.shape, generator=g)


def train(out: Path, cache: Path, seed: int, iterations: int = ITERATIONS) -> dict[str, object]:
    """Train and write out/unet, out/text_encoder at every best held-out loss; return what training.json records."""
    start = time.process_time()
    unet, text_encoder, tokenizer = build(out, seed)
    vae = AutoencoderKL.from_pretrained(str(out / "vae")).eval()
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    batches, heldout = Batches(vae, tokenizer, cache, seed), Heldout(vae, tokenizer, cache, seed)
    both = torch.nn.ModuleList([unet, text_encoder])
    averaged, ema = copy.deepcopy(both).eval(), data.Ema(both, 0.9995)
    optimiser = torch.optim.AdamW(both.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    curve, best, waited = [], float("inf"), 0
    for step in range(iterations):
        # One step on random scenes, captions, times and noise
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * data.cosine(step, iterations, warmup=500)
        x0, ids, t, noise = batches.draw(BATCH)
        loss = loss_of(unet, text_encoder, x0, ids, t, noise, alphas)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        ema.update(both)
        if (step + 1) % EVALUATE_EVERY and step + 1 < iterations:
            continue
        # Record, save the best, stop early
        averaged.load_state_dict(ema.state)
        score = heldout.loss(averaged[0], averaged[1], alphas)
        curve.append({"step": step + 1, "loss": float(loss.detach()), "heldout_loss": score})
        data.log(f"unet {step + 1}/{iterations} loss {float(loss.detach()):.4f} held-out {score:.5f}")
        waited = 0 if score < best else waited + 1
        if score < best:
            best = score
            save(averaged[0], averaged[1], out)
        if waited >= PATIENCE:
            break
    return {"iterations": step + 1, "cpu_minutes": (time.process_time() - start) / 60, "curve": curve}
