"""CLIPScore: the cosine between CLIP's features of a picture and of its prompt, times 100.

What: 100 max(cos(picture, prompt), 0), as torchmetrics' CLIPScore counts; Hessel et al. 2021 (arXiv 2104.08718) write
2.5 max(cos, 0) and put "A photo depicts" before the text, which is not done here. Usual pictures score 15 to 35. Unlike
ImageReward it knows nothing of people's taste, which makes it a judge to hold out.
How to run: `ClipScore(path="my/folder")(images, prompts)` with images (B, 3, H, W) in [0, 1] of any size.

Any CLIPModel of transformers, from safetensors; the size of its pictures is read from its configuration. Pictures are
prepared as workers/rewards/pictures.py says. A prompt longer than the model reads (77 tokens) is cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.models.half_precision import DTYPES, Crossing
from workers.rewards.pictures import check_pictures, clip_pixels
from workers.spec import TrialSpec, choice
from workers.weights import (
    Weights,
    fetch_command,
    find,
    fingerprint,
    is_local,
    path_problems,
    pin_problems,
    place,
    places_of,
    require,
    verify,
)

if TYPE_CHECKING:
    from workers.cost import Network

HUB_ID = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
CHECKPOINT = "model.safetensors"
FILES = (CHECKPOINT, "config.json", "vocab.json", "merges.txt")
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 224}


class ClipScore:
    """Scores of pictures and prompts. Raises OSError where a file is missing or is not what it should be."""

    name = "clip_score"
    differentiable = True

    def __init__(
        self,
        *,
        path: str = HUB_ID,
        revision: str | None = REVISION,
        sha256: str | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> None:
        from transformers import CLIPTokenizer

        fetch = _fetch(path, revision, FILES)
        files = [require(path, revision, name, fetch) for name in FILES]
        verify(files[0], sha256, _fetch(path, revision, FILES[:1]))
        folder = str(files[0].parent)
        self.network = _load(folder, DTYPES[dtype], fetch)
        self.network.requires_grad_(False).eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.size: int = self.network.config.vision_config.image_size
        self.device, self._crossing = device, Crossing(DTYPES[dtype])
        self._known: dict[str, Tensor] = {}

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, as a reward or as a judge. What a hub id lacks in the cache is none: `weights`
        says so."""
        found = []
        for field, settings in places_of(spec, ClipScore):
            found += path_problems(f"{field}.path", settings.get("path", HUB_ID), FILES, HUB_ID)
            found += pin_problems(field, settings)
            found += choice(f"{field}.dtype", settings.get("dtype", "fp32"), tuple(DTYPES))
        return found

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The checkpoint, its configuration and its words: one entry, they are fetched together."""
        path, revision = settings.get("path", HUB_ID), settings.get("revision", REVISION)
        lost = [name for name in FILES if find(path, revision, name) is None]
        what = f"CLIP in {place(path)}" + (f" ({', '.join(lost)})" if lost else "")
        return [Weights(what, not lost, _fetch(path, revision, FILES))]

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: the pinned revision of a hub id, or a digest of a folder's checkpoint."""
        return fingerprint(settings.get("path", HUB_ID), settings.get("revision", REVISION), CHECKPOINT)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> scores (B,) in the images' dtype."""
        check_pictures(self.name, images, prompts)
        pixels = clip_pixels(images, self.size).to(self.device)
        features = self.network.get_image_features(pixel_values=self._crossing.enter(pixels))
        texts = torch.stack([self._text(prompt) for prompt in prompts])
        cosines = (_unit(self._crossing.leave(features, pixels.dtype)) * texts).sum(1)
        return (100 * cosines.clamp(min=0)).to(images)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """A prompt's features, of length 1; computed once."""
        if prompt not in self._known:
            longest = self.network.config.text_config.max_position_embeddings
            tokens = self.tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").to(self.device)
            features = self.network.get_text_features(**tokens)
            self._known[prompt] = _unit(features.to(torch.promote_types(features.dtype, torch.float32)))[0]
        return self._known[prompt]

    @staticmethod
    def cost(settings: Mapping[str, Any]) -> Network | None:
        """What the network takes (workers/cost.py): 24 layers of 1024 on 257 tokens of the picture (the prompt is read
        once), 427,616,513 parameters; what a picture keeps for its gradient was measured. None for another model than
        ViT-L/14."""
        from workers.cost import Network

        path, revision = settings.get("path", HUB_ID), settings.get("revision", REVISION)
        file = find(path, revision, "config.json")
        vision = {} if file is None else json.loads(file.read_text(encoding="utf-8")).get("vision_config", {})
        if (file is None and path != HUB_ID) or any(vision.get(name, value) != value for name, value in VIT_L.items()):
            return None
        dtype = settings.get("dtype", "fp32")
        size = DTYPES[dtype].itemsize
        return Network(flops=162_025_537_536, precision=dtype, weights=427_616_513 * size, kept=89_100_000 * size)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True)


def _fetch(path: str, revision: str | None, names: Sequence[str]) -> str:
    """The command that puts files where they are looked for."""
    return fetch_command(HUB_ID, REVISION, names, path) if is_local(path) else fetch_command(path, revision, names)


def _load(folder: str, dtype: torch.dtype, fetch: str) -> Any:
    """The network, every weight from the file. Raises OSError."""
    from transformers import CLIPModel

    try:
        network, notes = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file makes of it
        raise OSError(f"CLIP in {folder} cannot be read ({error}); fetch it again: {fetch} --force-download") from error
    if lost := sorted(notes["missing_keys"]):
        raise OSError(
            f"{folder}/{CHECKPOINT} lacks {len(lost)} of CLIP's weights (as {lost[0]}); fetch it again: {fetch} "
            "--force-download"
        )
    return network
