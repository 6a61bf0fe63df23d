"""Stage `vae`: the autoencoder of toyland, f = 4: 32x32 RGB <-> 8x8x4 latents of unit standard deviation.

Loss: 5 MSE + L1 + KL weight x KL per latent element (nats). Weights are an exponential moving average.
How to run: `python -m workers.models.toyland.train --stages vae --out DIR`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from workers.models.toyland import data

ITERATIONS = 6_000  # at most; the learning rate falls as a cosine to this end
TARGET_PSNR = 31.4  # dB on held-out scenes: good enough, stop
BATCH = 16
LEARNING_RATE = 1.5e-3
KL_WEIGHT = 5e-4
CONFIG = {
    "act_fn": "silu",
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
    "scaling_factor": 1.0,
    "force_upcast": False,
}


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of pictures in [-1, 1]: 10 log10(4 / MSE over all pixels)."""
    return float(10 * torch.log10(4 / (a - b).pow(2).mean()))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of uint8 pictures, not scaled: each [N, 4, 8, 8]."""
    posteriors = [vae.encode(data.pixels(p)).latent_dist for p in pictures.split(batch)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 100) -> Tensor:
    """Unscaled latents -> pictures in [-1, 1]."""
    return torch.cat([vae.decode(z).sample for z in latents.split(batch)]).clamp(-1, 1)


def save(vae: AutoencoderKL, ema: data.Ema, pictures: Tensor, folder: Path) -> float:
    """Write the averaged weights with the scaling factor measured on `pictures`; return their PSNR."""
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    average = AutoencoderKL.from_config(config)
    average.load_state_dict(ema.state)
    average.eval()
    mean, std = encode(average, pictures)
    scale = float(1 / (mean.var() + std.pow(2).mean()).sqrt())
    average.register_to_config(scaling_factor=scale)
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.39.0"} | config | {"scaling_factor": scale}
    data.write_json(folder / "config.json", config)
    data.save_whole(folder / "diffusion_pytorch_model.safetensors", average.state_dict())
    return psnr(decode(average, mean), data.pixels(pictures))


def loss_of(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """5 MSE + L1 + KL_WEIGHT KL, all means over elements."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(generator=generator)).sample
    kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
    return 5 * (y - x).pow(2).mean() + (y - x).abs().mean() + KL_WEIGHT * kl


def train(out: Path, cache: Path, seed: int, iterations: int = ITERATIONS) -> dict[str, object]:
    """Train, writing out/pipeline/vae every 500 iterations; return what training.json records."""
    pictures = data.scene_set(cache, "train", seed)[1]
    heldout = data.scene_set(cache, "heldout", seed)[1][:500]
    torch.manual_seed(data.seed_of(seed, "vae", "weights"))
    vae = AutoencoderKL.from_config(CONFIG)
    noise, order = data.torch_generator(seed, "vae", "noise"), data.torch_generator(seed, "vae", "order")
    optimiser = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    ema, curve, start = data.Ema(vae), [], time.process_time()
    for step in range(iterations):
        # One step on a random batch, mirrored half of the time
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * data.cosine(step, iterations)
        x = data.pixels(pictures[torch.randint(len(pictures), (BATCH,), generator=order)])
        x = x.flip(-1) if step % 2 else x
        loss = loss_of(vae, x, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        ema.update(vae)
        # Record and save
        if (step + 1) % 500 == 0 or step + 1 == iterations:
            score = save(vae, ema, heldout, out / "vae")
            curve.append({"step": step + 1, "loss": float(loss.detach()), "heldout_psnr_db": score})
            data.log(f"vae {step + 1}/{iterations} loss {float(loss.detach()):.4f} held-out PSNR {score:.2f} dB")
            if score >= TARGET_PSNR:
                break
    return {"iterations": step + 1, "cpu_minutes": (time.process_time() - start) / 60, "curve": curve}
