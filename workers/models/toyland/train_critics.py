"""Stages `judge` and `reward`: two networks of different architecture, data and seed; neither sees the other.

judge: reads attributes; cross-entropy on its own scenes, drawn, autoencoded and decoded from noisy latents.
reward: regresses the truth of a caption about a scene, in [0, 1], on scenes and their siblings, which differ in one
attribute; drawn, autoencoded, noisy, and blended with the sibling (the blend has the blend of the truths: the reward
rises on the way from a wrong scene to a right one), with a penalty on the squared norm of its gradient in the pixels:
a steep reward gives the pathwise policy gradient more noise than signal.
How to run: `python -m workers.models.toyland.train --stages judge,reward --out DIR` (needs the stage vae).
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from workers.models.toyland import data
from workers.models.toyland.scenes import BACKGROUNDS, COLOURS, SPECIES, Scene, draw, sample_scene
from workers.models.toyland.text import caption, parse, truth, vary, word_ids, words
from workers.models.toyland.train_vae import decode, encode
from workers.rewards.toyland import JudgeNetwork, RewardNetwork

JUDGE_ITERATIONS = 3_000
REWARD_ITERATIONS = 3_500
BATCH = 64
PENALTY = 0.05  # weight of the squared input gradient (truth in 0..1, pixels in 0..1, summed over pixels)
COLOUR_WEIGHT = 0.1  # of the colour read-out inside the reward
CAPTIONS = 6  # per scene
SIBLINGS = 5_000  # pairs of scenes that differ in one attribute


def is_heldout(text: str) -> bool:
    """One sentence in ten, chosen by its words, is never seen by the reward in training."""
    return hashlib.sha256(" ".join(words(text)).encode()).digest()[0] % 10 == 0


def wrong_caption(scene: Scene, other: Scene, rng: np.random.Generator, heldout: bool) -> str:
    """A caption of the scene with none to three attributes changed, in one case of six of another scene."""
    while True:
        said = other if rng.random() < 1 / 6 else scene
        for _ in range(int(rng.integers(4))):
            said = vary(said, rng)
        text = caption(said, rng)
        if is_heldout(text) == heldout:
            return text


def captioned(
    scenes: list[Scene], partners: list[Scene], rng: np.random.Generator, n: int, heldout: bool
) -> tuple[list[str], Tensor, Tensor]:
    """n captions per scene: texts, and their truths about the scenes and about the partners, each [N, n]."""
    texts = [wrong_caption(s, o, rng, heldout) for s, o in zip(scenes, partners, strict=True) for _ in range(n)]
    asked = [parse(t) for t in texts]
    own = [truth(scenes[i // n], a) for i, a in enumerate(asked)]
    others = [truth(partners[i // n], a) for i, a in enumerate(asked)]
    return texts, torch.tensor(own).view(-1, n), torch.tensor(others).view(-1, n)


def unit_pixels(pictures: Tensor) -> Tensor:
    """uint8 -> [0, 1]."""
    return pictures.float() / 255


def to_uint8(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def noisy(vae: AutoencoderKL, latents: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Pictures decoded from latents with noise of a random level up to `strength` standard deviations."""
    level = torch.rand(len(latents), 1, 1, 1, generator=generator) * strength / vae.config.scaling_factor
    return to_uint8(decode(vae, latents + level * torch.randn(latents.shape, generator=generator)))


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Targets of the judge's heads."""
    return {
        "species": torch.tensor([[float(n in s.species) for n in SPECIES] for s in scenes]),
        "colours": torch.tensor([[float(n in s.colours) for n in COLOURS] for s in scenes]),
        "count": torch.tensor([s.count - 1 for s in scenes]),
        "background": torch.tensor([BACKGROUNDS.index(s.background) for s in scenes]),
    }


def judge_loss(logits: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Sum over the heads of the cross-entropies (binary ones summed over names), mean over the batch."""
    sets = ("species", "colours")
    terms = [F.binary_cross_entropy_with_logits(logits[k], target[k]) * target[k].shape[1] for k in sets]
    terms += [F.cross_entropy(logits[k], target[k]) for k in ("count", "background")]
    return torch.stack(terms).sum()


def train_judge(out: Path, vae_folder: Path, cache: Path, seed: int, iterations: int = JUDGE_ITERATIONS) -> dict:
    """Train and write out/judge.safetensors."""
    start = time.process_time()
    vae = AutoencoderKL.from_pretrained(str(vae_folder)).eval()
    scenes, pictures = data.scene_set(cache, "judge", seed)
    target, g = labels(scenes), data.torch_generator(seed, "judge", "noise")
    mean, std = encode(vae, pictures)
    sampled = to_uint8(decode(vae, mean + std * torch.randn(std.shape, generator=g)))
    views = torch.stack([pictures, sampled, noisy(vae, mean, 0.5, g)])
    torch.manual_seed(data.seed_of(seed, "judge", "weights"))
    network = JudgeNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    curve = []
    for step in range(iterations):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * data.cosine(step, iterations)
        i = torch.randint(len(scenes), (BATCH,), generator=g)
        x = unit_pixels(views[torch.randint(3, (BATCH,), generator=g), i])
        x = x.flip(-1) if step % 2 else x
        loss = judge_loss(network(x), {k: v[i] for k, v in target.items()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 500 == 0:
            curve.append({"step": step + 1, "loss": float(loss.detach())})
            data.log(f"judge {step + 1}/{iterations} loss {float(loss.detach()):.4f}")
    data.save_whole(out / "judge.safetensors", network.state_dict())
    return {"iterations": iterations, "cpu_minutes": (time.process_time() - start) / 60, "curve": curve}


def siblings(seed: int) -> tuple[list[Scene], Tensor]:
    """SIBLINGS scenes, then as many that differ from them in one attribute and are drawn in the same places."""
    rng = data.generator(seed, "reward", "scenes")
    first = [sample_scene(rng) for _ in range(SIBLINGS)]
    scenes = first + [vary(s, rng) for s in first]
    places = [data.generator(seed, "reward", "places", i % SIBLINGS) for i in range(len(scenes))]
    pictures = np.stack([draw(s, g) for s, g in zip(scenes, places, strict=True)])
    return scenes, torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


class RewardData:
    """Four views of every scene (drawn, autoencoded, noisy, blended with its sibling), captions and their truths."""

    def __init__(self, vae: AutoencoderKL, seed: int):
        scenes, pictures = siblings(seed)
        data.log("reward: scenes drawn, decoding")
        self.generator = g = data.torch_generator(seed, "reward", "noise")
        self.blend = torch.rand(len(scenes), generator=g)
        latents = encode(vae, pictures)[0]
        mixed = torch.lerp(latents, latents.roll(SIBLINGS, 0), self.blend.view(-1, 1, 1, 1))
        views = [pictures, to_uint8(decode(vae, latents)), noisy(vae, latents, 0.8, g), to_uint8(decode(vae, mixed))]
        self.views = torch.stack(views)
        partners = scenes[SIBLINGS:] + scenes[:SIBLINGS]
        rng = data.generator(seed, "reward", "captions")
        texts, self.own, self.other = captioned(scenes, partners, rng, CAPTIONS, heldout=False)
        self.colours = labels(scenes)["colours"]
        self.ids = torch.from_numpy(word_ids(texts)).view(len(scenes), CAPTIONS, -1)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures [B, 3, 32, 32], word ids [B, L], truths [B], colours [B, 7]."""
        g = self.generator
        i = torch.randint(self.views.shape[1], (BATCH,), generator=g)
        c = torch.randint(CAPTIONS, (BATCH,), generator=g)
        view = torch.randint(4, (BATCH,), generator=g)
        share = self.blend[i] * (view == 3)
        x = unit_pixels(self.views[view, i])
        flip = torch.rand(BATCH, 1, 1, 1, generator=g) < 0.5
        sibling = (i + SIBLINGS) % len(self.colours)
        colours = torch.lerp(self.colours[i], self.colours[sibling], share[:, None])
        truths = torch.lerp(self.own[i, c], self.other[i, c], share)
        return torch.where(flip, x.flip(-1), x), self.ids[i, c], truths, colours


def reward_loss(
    network: RewardNetwork, x: Tensor, ids: Tensor, target: Tensor, colours: Tensor, penalise: bool
) -> tuple[Tensor, float]:
    """Squared error, colour cross-entropy and, on half the batch, the penalty on |d score / d pixels|^2; the error."""
    half = len(x) // 2 if penalise else 0
    y = x[:half].requires_grad_()
    parts = [network.both(y, ids[:half])] if half else []
    parts.append(network.both(x[half:], ids[half:]))
    scores, logits = (torch.cat(p) for p in zip(*parts, strict=True))
    error = (scores - target).pow(2).mean()
    loss = error + COLOUR_WEIGHT * F.binary_cross_entropy_with_logits(logits, colours)
    if half:
        (slope,) = torch.autograd.grad(parts[0][0].sum(), y, create_graph=True)
        loss = loss + 2 * PENALTY * slope.pow(2).sum((1, 2, 3)).mean()
    return loss, float(error.detach())


def train_reward(out: Path, vae_folder: Path, cache: Path, seed: int, iterations: int = REWARD_ITERATIONS) -> dict:
    """Train and write out/reward.safetensors with the mean and deviation that normalise it."""
    start = time.process_time()
    vae = AutoencoderKL.from_pretrained(str(vae_folder)).eval()
    pairs = RewardData(vae, seed)
    x_test, ids_test, truth_test = heldout_pairs(vae, cache, seed)
    torch.manual_seed(data.seed_of(seed, "reward", "weights"))
    network = RewardNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    ema, averaged, curve = data.Ema(network), RewardNetwork().eval(), []
    for step in range(iterations):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * data.cosine(step, iterations)
        loss, error = reward_loss(network, *pairs.batch(), penalise=step % 2 == 0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        ema.update(network)
        if (step + 1) % 500 == 0 or step + 1 == iterations:
            averaged.load_state_dict(ema.state)
            scores = predict(averaged, x_test, ids_test)
            r = float(np.corrcoef(scores, truth_test)[0, 1])
            curve.append({"step": step + 1, "loss": error, "heldout_correlation": r})
            data.log(f"reward {step + 1}/{iterations} error {error:.4f} held-out correlation {r:.3f}")
            numbers = f'{{"mean": {float(scores.mean())}, "std": {float(scores.std())}}}'
            data.save_whole(out / "reward.safetensors", ema.state, {"numbers": numbers})
    return {"iterations": iterations, "cpu_minutes": (time.process_time() - start) / 60, "curve": curve}


def heldout_pairs(vae: AutoencoderKL, cache: Path, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out autoencoded scenes with held-out captions: pictures [N, 3, 32, 32], word ids [N, L], truths [N]."""
    scenes, pictures = data.scene_set(cache, "heldout", seed)
    partners = scenes[1:] + scenes[:1]
    texts, own, _ = captioned(scenes, partners, data.generator(seed, "reward", "heldout"), 1, heldout=True)
    x = unit_pixels(to_uint8(decode(vae, encode(vae, pictures)[0])))
    return x, torch.from_numpy(word_ids(texts)), own[:, 0]


@torch.no_grad()
def predict(network: RewardNetwork, x: Tensor, ids: Tensor) -> Tensor:
    """Raw scores [N], in batches."""
    return torch.cat([network(a, b) for a, b in zip(x.split(200), ids.split(200), strict=True)])
