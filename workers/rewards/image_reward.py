"""ImageReward (Xu et al. 2023, arXiv 2304.05977): how well people would like a picture as an answer to a prompt.

What: the network of the image-reward package (BLIP with a ViT-L at 224 pixels, 446.7 M parameters, then five linear
layers), through its batched, differentiable path `score_gard`; normalised to mean 0 and standard deviation 1 over the
pictures its authors collected. Numbers are those of `ImageReward.load("ImageReward-v1.0").score(prompt, picture)` where
no gradient is asked for; where one is, nothing is rounded to 8 bits (workers/rewards/pictures.py).
How to run: `ImageReward(path="my/folder")(images, prompts)` with images (B, 3, H, W) in [0, 1] of any size.

What differs from the package: one pass for all pictures; the checkpoint is compared with its SHA-256, read without
running any code in it (weights_only) and has to fit exactly; nothing is fetched; the package's root, which imports
datasets, clip and its training loop, is not imported (`_package`).

    ImageReward.pt, med_config.json    in the folder `path`, or of the hub id `path` in the local cache
    vocab.txt                          BERT's words: in `tokenizer` (a folder or a hub id); null = in
                                       path/bert-base-uncased, in path, or of google-bert/bert-base-uncased in the cache
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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

HUB_ID = "THUDM/ImageReward"
REVISION = "5736be03b2652728fb87788c9797b0570450ab72"
CHECKPOINT, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
WORDS_HUB_IDS = ("google-bert/bert-base-uncased", "bert-base-uncased")
"""The same words under their new and their old name."""
WORDS_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
TOKENS = 35
SIZE = 224
ALIAS = "image_reward_network"


class ImageReward:
    """Rewards of pictures and prompts. Raises OSError where a file is missing or is not what it should be, or the
    package does not work here."""

    name = "image_reward"
    differentiable = True

    def __init__(
        self,
        *,
        path: str = HUB_ID,
        revision: str | None = REVISION,
        tokenizer: str | None = None,
        sha256: str | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> None:
        fetch, fetch_config = (_fetch(path, revision, name) for name in (CHECKPOINT, CONFIG))
        checkpoint = require(path, revision, CHECKPOINT, fetch)
        config = require(path, revision, CONFIG, fetch_config)
        words = _words(path, tokenizer)
        if words is None:
            raise FileNotFoundError(
                f"{_words_place(path, tokenizer)} is not there; on a machine with a network: "
                f"{_words_fetch(path, tokenizer)}"
            )
        verify(checkpoint, sha256, fetch)
        state = _read(checkpoint, fetch)
        self.network = _build(config, words, fetch_config)
        _fill(self.network, state, checkpoint, fetch)
        self.network.requires_grad_(False).eval().to(device, DTYPES[dtype])
        self.network.device = device
        if dtype != "fp32":  # the layers after BLIP stay in float32, as in the package's `score`
            self.network.mlp.float().register_forward_pre_hook(_in_float32)
        self.device, self._crossing = device, Crossing(DTYPES[dtype])
        self._tokens = functools.cache(self._tokenise)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with the settings, as a reward or as a judge. What a hub id lacks in the cache is none: `weights`
        says so."""
        found = []
        for field, settings in places_of(spec, ImageReward):
            found += path_problems(f"{field}.path", settings.get("path", HUB_ID), (CHECKPOINT, CONFIG), HUB_ID)
            if (words := settings.get("tokenizer")) is not None:
                found += path_problems(f"{field}.tokenizer", words, (VOCABULARY,), "null")
            found += pin_problems(field, settings)
            found += choice(f"{field}.dtype", settings.get("dtype", "fp32"), tuple(DTYPES))
        return found

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The checkpoint, the configuration of its text encoder, and BERT's words."""
        path, revision, tokenizer = _source(settings)
        found = [
            Weights(f"{name} in {place(path)}", find(path, revision, name) is not None, _fetch(path, revision, name))
            for name in (CHECKPOINT, CONFIG)
        ]
        there = _words(path, tokenizer) is not None
        return [*found, Weights(_words_place(path, tokenizer), there, _words_fetch(path, tokenizer))]

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: the pinned revision of a hub id, or a digest of a folder's checkpoint."""
        path, revision, _ = _source(settings)
        return fingerprint(path, revision, CHECKPOINT)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> rewards (B,) in the images' dtype."""
        check_pictures(self.name, images, prompts)
        tokens = [self._tokens(prompt) for prompt in prompts]
        ids, mask = (torch.stack(part).to(self.device) for part in zip(*tokens, strict=True))
        pixels = clip_pixels(images, SIZE).to(self.device)
        rewards = self.network.score_gard(ids, mask, self._crossing.enter(pixels))
        return self._crossing.leave(rewards, pixels.dtype).squeeze(1).to(images)

    def _tokenise(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 (35,), as the package pads and cuts them."""
        found = self.network.blip.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return found.input_ids[0], found.attention_mask[0]

    @staticmethod
    def cost(settings: Mapping[str, Any]) -> Network:
        """What the network takes (workers/cost.py): 24 layers of 1024 on 197 tokens of the picture, 12 of 768 on 35 of
        the prompt, 446,665,953 parameters; what a picture keeps for its gradient was measured."""
        from workers.cost import Network

        dtype = settings.get("dtype", "fp32")
        size = DTYPES[dtype].itemsize
        return Network(flops=137_781_397_536, precision=dtype, weights=446_665_953 * size, kept=66_800_000 * size)


def _in_float32(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.float() for part in inputs)


# ---- the files


def _source(settings: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """(path, revision, tokenizer) of the settings, with their defaults."""
    return settings.get("path", HUB_ID), settings.get("revision", REVISION), settings.get("tokenizer")


def _fetch(path: str, revision: str | None, name: str) -> str:
    """The command that puts a file of the network where it is looked for."""
    return fetch_command(HUB_ID, REVISION, [name], path) if is_local(path) else fetch_command(path, revision, [name])


def _words_places(path: str, tokenizer: str | None) -> list[tuple[str, str | None]]:
    """Where the words are looked for, in order: (folder or hub id, revision)."""
    if tokenizer is not None:
        return [(tokenizer, WORDS_REVISION if tokenizer in WORDS_HUB_IDS else None)]
    folders = [str(Path(path) / "bert-base-uncased"), path] if is_local(path) else []
    return [*((folder, None) for folder in folders), *((name, WORDS_REVISION) for name in WORDS_HUB_IDS)]


def _words(path: str, tokenizer: str | None) -> Path | None:
    """BERT's vocab.txt."""
    found = (find(where, revision, VOCABULARY) for where, revision in _words_places(path, tokenizer))
    return next((file for file in found if file is not None), None)


def _words_place(path: str, tokenizer: str | None) -> str:
    where = dict.fromkeys(place(name) for name, _ in _words_places(path, tokenizer) if name != WORDS_HUB_IDS[1])
    return f"{VOCABULARY} (BERT's words) in {', or in '.join(where)}"


def _words_fetch(path: str, tokenizer: str | None) -> str:
    """The command that puts the words where they are looked for first."""
    where, revision = _words_places(path, tokenizer)[0]
    if is_local(where):
        return fetch_command(WORDS_HUB_IDS[0], WORDS_REVISION, [VOCABULARY], where)
    return fetch_command(where, revision, [VOCABULARY])


# ---- the package


@functools.cache
def _package() -> ModuleType:
    """The package's module ImageReward.ImageReward, which holds the network, and nothing of it but what that needs.

    The package's roots import everything there is (15 s, with datasets, clip and pkg_resources). So the same files are
    imported under a name of our own, with roots that do nothing; `import ImageReward` stays what it is. On import the
    package switches off all warnings and transformers' messages: both are put back. Raises OSError where it cannot be
    imported.
    """
    from transformers import logging

    verbosity = logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = importlib.util.find_spec("ImageReward")
            if root is None or not root.submodule_search_locations:
                raise ImportError("there is no package image-reward")
            for name in ("", ".models", ".models.BLIP"):
                empty = importlib.machinery.ModuleSpec(ALIAS + name, None, is_package=True)
                empty.submodule_search_locations = [root.submodule_search_locations[0] + name.replace(".", "/")]
                sys.modules[ALIAS + name] = importlib.util.module_from_spec(empty)
            return importlib.import_module(f"{ALIAS}.ImageReward")
    except Exception as error:  # of a library that does not fit: ImportError, AttributeError, RuntimeError
        for name in [name for name in sys.modules if name.partition(".")[0] == ALIAS]:
            del sys.modules[name]
        raise OSError(
            f"the image-reward package does not work here ({error}); it needs image-reward==1.5, transformers==4.55.4 "
            "(4.56 and later lack what it imports), timm==0.6.13, fairscale==0.4.13 and a torchvision that fits torch: "
            "install what requirements.lock lists"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _words_from(file: Path) -> Iterator[None]:
    """Within it the package, which asks the hub for the tokenizer bert-base-uncased, gets it from here."""
    from transformers import BertTokenizer

    blip = sys.modules[f"{ALIAS}.models.BLIP.blip"]
    asked = blip.BertTokenizer  # type: ignore[attr-defined]
    here = SimpleNamespace(
        from_pretrained=lambda name: BertTokenizer.from_pretrained(str(file.parent), local_files_only=True)
    )
    blip.BertTokenizer = here  # type: ignore[attr-defined]
    try:
        yield
    finally:
        blip.BertTokenizer = asked  # type: ignore[attr-defined]


def _build(config: Path, words: Path, fetch: str) -> Any:
    """The network with its tokenizer and without its weights: made in 2 s, where drawing them first takes 13. Raises
    OSError."""
    package = _package()
    from accelerate import init_empty_weights

    try:
        with _words_from(words), init_empty_weights(include_buffers=False):
            network = package.ImageReward(str(config))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"no network can be built from {config} ({error}); fetch it again: {fetch}") from error
    known, needed = len(network.blip.tokenizer), network.blip.text_encoder.config.vocab_size
    if known != needed:
        raise OSError(
            f"{words} and the package's own two make {known} words, and {config} asks for {needed}; take "
            f"{VOCABULARY} of {WORDS_HUB_IDS[0]}"
        )
    return network


# ---- the checkpoint


def _read(file: Path, fetch: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, mapped into memory where its format allows. Raises OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged file makes of it
        raise OSError(
            f"{file} cannot be read as weights: it is truncated or damaged, or a pickle that holds more than tensors, "
            f"which is not loaded ({type(error).__name__}); fetch it again: {fetch} --force-download"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
        raise OSError(f"{file} holds no table of tensors by name; fetch it again: {fetch} --force-download")
    return state


def _fill(network: nn.Module, state: dict[str, Tensor], file: Path, fetch: str) -> None:
    """Put the weights in; every one has to be there, in its shape, and no other. Raises OSError."""
    needed = network.state_dict()
    problems = {
        "missing": [name for name in needed if name not in state],
        "of a wrong shape": [name for name in needed if name in state and state[name].shape != needed[name].shape],
        "unknown": [name for name in state if name not in needed],
    }
    wrong = [f"{len(names)} {what} (as {names[0]})" for what, names in problems.items() if names]
    if wrong:
        raise OSError(
            f"{file} does not fit ImageReward's network of {len(needed)} tensors: {', '.join(wrong)}; fetch it again: "
            f"{fetch} --force-download"
        )
    network.load_state_dict(state, strict=True, assign=True)
