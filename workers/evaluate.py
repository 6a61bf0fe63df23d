"""Evaluation on fixed noise: the same pictures for every cell of a prompt, at every step of training.

Picture i of a prompt has its own generator, seeded from (prompt, i) alone: initial latent and all the chain's noise. So
cells that differ in method, beta or seed start from the same pictures and can be compared picture by picture, and
picture i does not change with the number of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.generators import derived_seed
from workers.methods import finite
from workers.rewards.pictures import to_8_bits
from workers.rollout import Problem, Reward, rollout
from workers.store import write_whole


@dataclass(frozen=True)
class Noise:
    """y0 (n, *latent) and W (T, n, *latent), float32."""

    y0: Tensor
    W: Tensor


def fixed_noise(prompt: str, n: int, T: int, latent_shape: tuple[int, ...]) -> Noise:
    """The evaluation noise of a prompt, n pictures."""
    each = []
    for i in range(n):
        generator = torch.Generator().manual_seed(derived_seed("evaluation", prompt, i))
        each.append(torch.randn((T + 1, *latent_shape), generator=generator))
    noise = torch.stack(each, 1)
    return Noise(y0=noise[0], W=noise[1:])


@dataclass(frozen=True)
class Evaluation:
    """What was measured: metrics by name, one number per picture by name, and the pictures (n, 3, H, W) in [0, 1]."""

    metrics: dict[str, float]
    samples: dict[str, list[float]]
    images: Tensor


@torch.no_grad()
def evaluate(problem: Problem, judge: Reward | None, noise: Noise, batch: int) -> Evaluation:
    """Sample the present control on `noise` (`batch` pictures at a time) and measure it; meanings: workers/recorder.py.

    The KL is computed where it is sampled, control and pre-trained control on the same batch, so that an untrained
    adapter has a KL of exactly 0. Raises NotFinite when a reward or a KL is not.
    """
    model, beta = problem.model, problem.beta
    n, T = noise.y0.shape[0], model.chain.T
    kls = torch.zeros(T, n, device=model.device, dtype=model.dtype)
    guided: Any = model if getattr(model, "guidance_scale", 1.0) > 1 else None
    conditional = torch.zeros(n, device=model.device, dtype=torch.float64)

    def measure(k: int, rows: slice, y: Tensor, u: Tensor) -> None:
        half = guided and guided.conditional
        kls[k, rows] = model.chain.step_kl(k, u, model.control(k, y, adapted=False))
        if guided:
            conditional[rows] += model.chain.step_kl(k, half, guided.conditional)

    final = rollout(model, problem.start(noise.y0), noise.W, batch, each=measure).y[-1]
    with problem.rewarding():
        images = torch.cat([model.decode(part) for part in final.split(batch)])
        rewards = _score(problem, problem.names[0], problem.reward, images, batch)
        judged = None if judge is None else _score(problem, problem.names[1], judge, images, batch)
    kls = finite("the path KL", kls).double().cpu()
    trained_on = rewards if problem.transform is None else problem.transform(rewards)
    objective = trained_on - (beta[:, None] * kls).sum(0)
    samples = {"reward": rewards, "kl_path_nats": kls.sum(0)}
    metrics = {
        "eval/reward_mean": rewards.mean(),
        "eval/reward_sem": rewards.std() / n**0.5,
        "eval/kl_path_nats": kls.sum(0).mean(),
        "eval/objective": objective.mean(),
        "eval/diversity": diversity(images),
    }
    if guided:
        metrics["eval/kl_path_conditional_nats"] = finite("the conditional path KL", conditional).mean()
    if judged is not None:
        samples["judge"] = judged
        metrics["eval/judge_mean"] = judged.mean()
    if problem.transform is not None:
        metrics["eval/reward_transformed_mean"] = trained_on.mean()
    if problem.initial is not None:
        metrics["eval/kl_initial_nats"] = problem.initial.kl().cpu()
        metrics["eval/objective"] -= problem.beta_initial * metrics["eval/kl_initial_nats"]
    metrics |= {f"eval/kl_step/{k:02d}": kls[k].mean() for k in range(T)}
    return Evaluation(
        metrics={name: float(value) for name, value in metrics.items()},
        samples={name: [float(f"{value:.9g}") for value in values.tolist()] for name, values in samples.items()},
        images=images,
    )


def _score(problem: Problem, name: str, reward: Reward, images: Tensor, batch: int) -> Tensor:
    """Rewards (n,), float64 on the CPU."""
    parts = [problem.guard(name, reward, part, [problem.prompt] * len(part)) for part in images.split(batch)]
    return finite("the reward", torch.cat(parts)).double().cpu()


def diversity(images: Tensor) -> Tensor:
    """Mean over the n (n - 1) / 2 pairs of pictures of their root-mean-square pixel difference."""
    return torch.pdist(images.flatten(1).double()).mean() / images[0].numel() ** 0.5


def save_strip(images: Tensor, path: Path) -> None:
    """Write pictures (n, 3, H, W) in [0, 1] side by side as one PNG, whole or not at all."""
    from PIL import Image

    strip = np.concatenate(to_8_bits(images), 1)
    write_whole(path, lambda temporary: Image.fromarray(strip).save(temporary, format="PNG"))
