"""Measure toyland on held-out data: the figures in report.json and the curves of training.

What: PSNR of the autoencoder, the judge's accuracy on autoencoded scenes, the reward's correlation with the truth on
held-out captions, how often base samples are right as the judge reads them, seconds and sizes.
How to run: `python -m workers.models.toyland.evaluate --weights DIR` prints the report; training writes it to
report.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from workers.models.toyland import data
from workers.models.toyland.scenes import Scene
from workers.models.toyland.text import parse, truth
from workers.models.toyland.train_critics import captioned, to_uint8, unit_pixels
from workers.models.toyland.train_vae import decode, encode, psnr
from workers.rewards.toyland import HEADS, WEIGHTS, ToylandJudge, ToylandReward

PROMPTS = ("A green colored rabbit", "A cat and a dog", "Four wolves in the park", "A dog on the moon")
PICTURES = 256
STEPS = (10, 20, 50)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: StableDiffusionPipeline, prompt: str, n: int, steps: int, seed: int = 0, guidance: float = 1.0
) -> Tensor:
    """n pictures [n, 3, 32, 32] in [0, 1]: DDIM, eta 1, no guidance (guidance_scale 1)."""
    g = data.torch_generator(seed, "evaluate", prompt, steps)
    batches = [
        pipeline(
            [prompt] * min(64, n - start), num_inference_steps=steps, guidance_scale=guidance, eta=1.0, generator=g,
            output_type="pt",
        ).images
        for start in range(0, n, 64)
    ]  # fmt: skip
    return torch.cat(batches)


def judge_accuracy(judge: ToylandJudge, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures whose attribute is read exactly (sets must be equal)."""
    seen = judge.read(images)
    return {k: float(np.mean([getattr(s, k) == v for s, v in zip(scenes, seen[k], strict=True)])) for k in HEADS}


@torch.no_grad()
def reward_scores(reward: ToylandReward, images: Tensor, prompts: list[str]) -> np.ndarray:
    chunks = range(0, len(images), 200)
    return torch.cat([reward(images[i : i + 200], prompts[i : i + 200]) for i in chunks]).numpy()


def reward_correlation(reward: ToylandReward, images: Tensor, scenes: list[Scene], seed: int) -> dict[str, float]:
    """Pearson correlation of reward and truth: captions never trained on, captions at large, the four prompts."""
    partners = scenes[1:] + scenes[:1]
    rng = data.generator(seed, "evaluate", "captions")
    held, t_held, _ = captioned(scenes, partners, rng, 1, heldout=True)
    seen, t_seen, _ = captioned(scenes, partners, rng, 1, heldout=False)
    result = {
        "heldout_captions": _correlation(reward_scores(reward, images, held), t_held[:, 0].numpy()),
        "training_captions": _correlation(reward_scores(reward, images, seen), t_seen[:, 0].numpy()),
    }
    for prompt in PROMPTS:
        values = np.array([truth(s, parse(prompt)) for s in scenes])
        result[prompt] = _correlation(reward_scores(reward, images, [prompt] * len(scenes)), values)
    return result


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def reward_slope(reward: ToylandReward, images: Tensor, prompts: list[str]) -> float:
    """Median norm of d reward / d pixels (standard deviations per unit of pixel distance)."""
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, prompts).sum(), x)
    return float(gradient.flatten(1).norm(dim=1).median())


def base_samples(pipeline, reward: ToylandReward, judge: ToylandJudge, steps: int, n: int) -> dict[str, dict]:
    """Per prompt: share of right pictures, mean judge probability, mean and deviation of the reward."""
    result = {}
    for prompt in PROMPTS:
        images = generate(pipeline, prompt, n, steps)
        scores = reward_scores(reward, images, [prompt] * n)
        with torch.no_grad():
            probability = float(judge(images, [prompt] * n).mean())
        right = float(judge.right(images, [prompt] * n).float().mean())
        moments = {"reward_mean": float(scores.mean()), "reward_std": float(scores.std())}
        result[prompt] = {"right": right, "judge_probability": probability} | moments
        data.log(f"{steps} steps, {prompt}: {result[prompt]}")
    return result


@torch.no_grad()
def seconds(pipeline: StableDiffusionPipeline, n: int = 10, repeats: int = 20) -> dict[str, float]:
    """Median processor seconds (all threads) of a UNet forward and of a decoding, each of a batch of ten."""
    x, t = torch.randn(n, 4, 8, 8), torch.full((n,), 500)
    c = torch.randn(n, pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size)
    timings: dict[str, list[float]] = {"unet_forward_batch_10": [], "vae_decode_batch_10": []}
    for _ in range(repeats):
        for name, call in zip(timings, (lambda: pipeline.unet(x, t, c), lambda: pipeline.vae.decode(x)), strict=True):
            start = time.process_time()
            call()
            timings[name].append(time.process_time() - start)
    return {k: float(np.median(v)) for k, v in timings.items()} | {"threads": torch.get_num_threads()}


def sizes(pipeline: StableDiffusionPipeline, folder: Path) -> dict[str, int]:
    parts = {k: getattr(pipeline, k) for k in ("unet", "vae", "text_encoder")}
    counts = {f"{k}_parameters": sum(p.numel() for p in m.parameters()) for k, m in parts.items()}
    return counts | {"safetensors_bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors"))}


def measure(folder: Path, cache: Path, seed: int = 0, pictures: int = PICTURES) -> dict[str, object]:
    """Every bar's figure."""
    pipeline, reward, judge = load_pipeline(folder), ToylandReward(folder), ToylandJudge(folder)
    scenes, drawn = data.scene_set(cache, "heldout", seed)
    decoded = decode(pipeline.vae, encode(pipeline.vae, drawn)[0])
    images = unit_pixels(to_uint8(decoded))
    return {
        "autoencoder_psnr_db": psnr(decoded, data.pixels(drawn)),
        "judge_accuracy_autoencoded": judge_accuracy(judge, images, scenes),
        "judge_accuracy_drawn": judge_accuracy(judge, unit_pixels(drawn), scenes),
        "reward_correlation": reward_correlation(reward, images, scenes, seed),
        "reward_input_gradient_norm": reward_slope(reward, images[:200], [PROMPTS[i % 4] for i in range(200)]),
        "base_samples": {str(n): base_samples(pipeline, reward, judge, n, pictures) for n in STEPS},
        "pictures_per_prompt": pictures,
        "seconds": seconds(pipeline),
        "sizes": sizes(pipeline, folder),
    }


def plot_training(records: dict[str, dict], target: Path) -> None:
    """Held-out curves of the stages over iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("vae", "heldout_psnr_db", "autoencoder: held-out PSNR (dB)"),
        ("unet", "heldout_loss", "UNet: held-out denoising loss"),
        ("reward", "heldout_correlation", "reward: correlation with the truth"),
        ("judge", "loss", "judge: training loss"),
    )
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), constrained_layout=True)
    for axis, (stage, key, title) in zip(axes, panels, strict=True):
        curve = records.get(stage, {}).get("curve", [])
        axis.plot([p["step"] for p in curve], [p[key] for p in curve], color="#2f6db5", lw=2)
        minutes = records.get(stage, {}).get("cpu_minutes")
        axis.set_title(title + (f"\n{minutes:.0f} CPU minutes" if minutes else ""), fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    if records.get("unet"):
        axes[1].set_yscale("log")
    data.replace_file(target, lambda p: figure.savefig(p, dpi=110, format="png"))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "toyland_cache")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(measure(args.weights, args.cache, 0, args.pictures), indent=1))


if __name__ == "__main__":
    main()
