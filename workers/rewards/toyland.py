"""toyland's own reward, and an independent judge that no method is trained on.

What: `ToylandReward` scores how well a 32x32 picture fits a prompt, in standard deviations over held-out scenes and
captions (ImageReward's convention); `ToylandJudge` reads species, colours, count and background off a picture and
gives the probability that everything the prompt asks for is right. Both are small convolutional networks,
differentiable in the picture, trained by `python -m workers.models.toyland.train --stages judge,reward` on different
data with different seeds.
How to run: `ToylandReward()(images, ["A cat and a dog"])` with images [B, 3, 32, 32] in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.toyland.scenes import BACKGROUNDS, COLOURS, COUNTS, SIZE, SPECIES
from workers.models.toyland.text import KNOWN_WORDS, Attributes, check_words, compare, parse, word_ids
from workers.spec import TrialSpec
from workers.store import sha256
from workers.weights import Weights

WEIGHTS = Path(__file__).parents[1] / "models" / "toyland" / "weights"
HEADS = {"species": len(SPECIES), "colours": len(COLOURS), "count": len(COUNTS), "background": len(BACKGROUNDS)}


class RewardNetwork(nn.Module):
    """Convolutions whose features a sentence scales and shifts (FiLM); smooth activations, smooth input gradients."""

    def __init__(self, channels: tuple[int, ...] = (24, 32, 48, 64), text: int = 64):
        super().__init__()
        self.words = nn.Embedding(len(KNOWN_WORDS) + 1, text, padding_idx=0)
        self.sentence = nn.Sequential(nn.Linear(text, text), nn.SiLU(), nn.Linear(text, text), nn.SiLU())
        wide = (*channels, channels[-1])
        strides = (1, 2, 2, 2, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in zip((3, *wide[:-1]), wide, strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in wide)
        self.film = nn.ModuleList(nn.Linear(text, 2 * c) for c in wide[2:])
        self.paint = nn.Conv2d(channels[1], 32, 3, stride=2, padding=1)  # which colours are there, without the text
        self.colours = nn.Linear(64, len(COLOURS))
        self.asked = nn.Linear(text, len(COLOURS))
        self.head = nn.Sequential(nn.Linear(channels[-1] + text + 2 * len(COLOURS), 64), nn.SiLU(), nn.Linear(64, 1))

    def both(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, 32, 32] in [0, 1], ids [B, L] (0 = padding) -> scores [B], colour logits [B, 7]."""
        present = (ids > 0).unsqueeze(-1)
        sentence = self.sentence((self.words(ids) * present).sum(1) / 2)
        h, colours = images * 2 - 1, images.new_zeros(())
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            if i >= 2:
                scale, shift = self.film[i - 2](sentence)[:, :, None, None].chunk(2, dim=1)
                h = h * (1 + scale) + shift
            h = F.silu(h)
            if i == 1:
                painted = F.silu(self.paint(h))
                colours = self.colours(torch.cat([painted.mean((2, 3)), painted.amax((2, 3))], 1))
        found = colours.sigmoid()
        score = self.head(torch.cat([h.mean((2, 3)), sentence, found, found * self.asked(sentence)], 1))
        return score.squeeze(1), colours

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Scores [B]."""
        return self.both(images, ids)[0]


class JudgeNetwork(nn.Module):
    """A plain classifier without text: wide first filters, max-pooling, batch normalisation, one head per attribute."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 48)):
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((3, *channels[:-1]), channels, strict=True)):
            layers += [nn.Conv2d(a, b, 5 if i == 0 else 3, padding=2 if i == 0 else 1), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(channels[-1], 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 4, 96), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, n) for name, n in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, 32, 32] in [0, 1] -> logits per attribute."""
        h = self.hidden(self.trunk(images * 2 - 1))
        return {name: head(h) for name, head in self.heads.items()}


def _load(network: nn.Module, file: Path, device: str) -> tuple[nn.Module, dict[str, float]]:
    """A frozen network in evaluation mode and the numbers stored beside its weights."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; train it with `python -m workers.models.toyland.train`")
    with safe_open(str(file), framework="pt") as f:
        network.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118 - not a dict
        numbers = json.loads((f.metadata() or {}).get("numbers", "{}"))
    return network.to(device).eval().requires_grad_(False), numbers


def _checked(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """float32 images, or a ValueError that says what is wrong."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(
            f"toyland scores images of shape [B, 3, {SIZE}, {SIZE}] in [0, 1], got {list(images.shape)}; "
            "resize them with antialiasing first"
        )
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"one prompt per image: got {len(prompts)} prompts for {len(images)} images")
    return images.float()


class ToylandReward:
    """Fit of picture and prompt in standard deviations over held-out pairs; differentiable in the picture."""

    name = "toyland"
    differentiable = True

    def __init__(self, path: str | Path | None = None, device: str = "cpu"):
        file = Path(path or WEIGHTS) / "reward.safetensors"
        self.network, numbers = _load(RewardNetwork(), file, device)
        self.mean, self.std, self.device = numbers["mean"], numbers["std"], device

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with reward.path and with the words of the prompt."""
        return _problems("reward", spec.reward or {}, "reward.safetensors", spec.prompt)

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The reward's network."""
        return _weights(settings, "reward.safetensors")

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: a digest of their file."""
        return "sha256:" + sha256(Path(settings.get("path") or WEIGHTS) / "reward.safetensors")[:16]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> rewards [B] in the images' dtype."""
        x = _checked(images, prompts)
        ids = torch.from_numpy(word_ids(prompts)).to(x.device)
        return ((self.network(x, ids) - self.mean) / self.std).to(images.dtype)


def _weights(settings: Mapping[str, Any], name: str) -> list[Weights]:
    path = Path(settings.get("path") or WEIGHTS) / name
    return [Weights(f"toyland's {name} in {path.parent}", path.is_file(), "make toyland (it trains them anew)")]


class ToylandJudge:
    """Probability that all attributes a prompt asks for are right; an independent check against reward hacking."""

    name = "toyland_judge"
    differentiable = True

    def __init__(self, path: str | Path | None = None, device: str = "cpu"):
        self.network, _ = _load(JudgeNetwork(), Path(path or WEIGHTS) / "judge.safetensors", device)
        self.device = device

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with judge.path and with the words of the prompt."""
        return _problems("judge", spec.judge or {}, "judge.safetensors", spec.prompt)

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The judge's network."""
        return _weights(settings, "judge.safetensors")

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: a digest of their file."""
        return "sha256:" + sha256(Path(settings.get("path") or WEIGHTS) / "judge.safetensors")[:16]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> probabilities [B] (product over the asked attributes)."""
        asked = [parse(p) for p in prompts]
        logits = self.network(_checked(images, prompts))
        rows = [_log_probability({k: v[i] for k, v in logits.items()}, a) for i, a in enumerate(asked)]
        return torch.stack(rows).exp().to(images.dtype) if rows else images.new_zeros(0)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, list]:
        """What is seen: lists of species sets, colour sets, counts and backgrounds, one entry per picture."""
        logits = self.network(_checked(images))
        return {
            "species": [_names(row, SPECIES) for row in logits["species"]],
            "colours": [_names(row, COLOURS) for row in logits["colours"]],
            "count": [COUNTS[int(i)] for i in logits["count"].argmax(1)],
            "background": [BACKGROUNDS[int(i)] for i in logits["background"].argmax(1)],
        }

    def right(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Hard reading: is everything right that the prompt asks for? bool [B]."""
        seen = self.read(_checked(images, prompts))
        rows = zip(*(seen[k] for k in HEADS), strict=True)
        verdicts = [all(compare(parse(p), *row).values()) for p, row in zip(prompts, rows, strict=True)]
        return torch.tensor(verdicts, dtype=torch.bool, device=images.device)


def _names(logits: Tensor, names: tuple[str, ...]) -> frozenset[str]:
    """Names with a probability above one half; the likeliest where there is none."""
    found = frozenset(n for n, v in zip(names, logits.tolist(), strict=True) if v > 0)
    return found or frozenset({names[int(logits.argmax())]})


def _log_probability(logits: dict[str, Tensor], asked: Attributes) -> Tensor:
    """Log of the product of the asked attributes' probabilities, of one picture."""
    total = logits["count"].new_zeros(())
    for name, names, exact in (("species", SPECIES, True), ("colours", COLOURS, asked.every_coloured)):
        wanted = getattr(asked, name)
        for i, n in enumerate(names if wanted else ()):
            if n in wanted:
                total = total + F.logsigmoid(logits[name][i])
            elif exact:
                total = total + F.logsigmoid(-logits[name][i])
    if asked.count is not None and asked.count in COUNTS:
        total = total + logits["count"].log_softmax(0)[COUNTS.index(asked.count)]
    elif asked.count is not None:
        total = total + torch.full_like(total, -30.0)  # more animals than any scene has
    if asked.background is not None:
        total = total + logits["background"].log_softmax(0)[BACKGROUNDS.index(asked.background)]
    return total


def _problems(field: str, component: Mapping[str, Any], file: str, prompt: str) -> list[str]:
    """Problems with a component's path and with the words of the prompt, in words."""
    folder = Path(component.get("path") or WEIGHTS)
    if not (folder / file).is_file():
        return [f"{field}.path={str(folder)!r} has no {file}; write {field}.path=null for the shipped weights"]
    try:
        check_words(prompt)
    except ValueError as error:
        return [f"prompt={prompt!r}: {error}"]
    return []
