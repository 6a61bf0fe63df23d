"""Where a saved StableDiffusionPipeline lies: a folder in diffusers' format, or a hub id in the local cache.

    resolve("toyland")                        the folder shipped with the package
    locate_folder(path, revision)             the folder to read from; a hub id that is not cached is fetched if there
                                              is a network
    absent(folder), fetch_command(...)        what is not there, and the command that fetches it

Only safetensors are read. Where a folder holds no plain weights but half-precision ones (`...fp16.safetensors`), those
are: `variant(folder, part)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers import weights

TOYLAND = Path(__file__).parent / "toyland" / "weights"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SETTINGS = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def is_local(path: str) -> bool:
    """Whether `model.path` names a folder, there or not, and no hub id."""
    return path == "toyland" or weights.is_local(path)


def resolve(path: str) -> Path:
    """The folder that a local `model.path` names; "toyland" is the checkpoint shipped with the package."""
    return TOYLAND if path == "toyland" else Path(path).expanduser()


def variant(folder: Path, part: str) -> str | None:
    """None where the plain weights of a part are there, or "fp16" where half-precision ones are alone."""
    plain = WEIGHTS[part]
    stem = plain.removesuffix(".safetensors")
    half = any((folder / part).glob(f"{stem}.fp16*.safetensors"))
    there = (folder / part / plain).is_file() or (folder / part / f"{plain}.index.json").is_file()
    return "fp16" if half and not there else None


def absent(folder: Path) -> list[str]:
    """The files of a pipeline that `folder` lacks, as paths in it; weights count in any variant, whole or sharded."""
    lost = [name for name in SETTINGS if not (folder / name).is_file() and not name.startswith("tokenizer/s")]
    for part, name in WEIGHTS.items():
        stem = name.removesuffix(".safetensors")
        if not any((folder / part).glob(f"{stem}*.safetensors")):
            lost.append(f"{part}/{name}")
    return lost


def cached_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the local cache; None where the id, or a part of it, is not there."""
    index = weights.find(path, revision, "model_index.json")
    return None if index is None or absent(index.parent) else index.parent


def locate_folder(path: str, revision: str | None) -> Path:
    """The folder to load from. Raises OSError that names what is missing and says how to fetch it."""
    if is_local(path):
        folder = resolve(path)
        if lost := absent(folder):
            raise OSError(_incomplete(folder, lost))
        return folder
    if (cached := cached_folder(path, revision)) is not None:
        return cached
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=[*SETTINGS, *_weight_files()]))
    except Exception as error:  # offline, no such id, no room: one answer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"model.path={path!r} is not in the hub's cache and cannot be fetched from here ({reason}); on a machine "
            f"with a network: {fetch_command(path, revision)}, or write model.path=FOLDER"
        ) from error
    if lost := absent(folder):
        raise OSError(_incomplete(folder, lost))
    return folder


def _incomplete(folder: Path, lost: list[str]) -> str:
    pickles = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.bin"))
    hint = f"; {pickles[0]} is a pickle, which is not loaded: save it again with safe_serialization" if pickles else ""
    return f"model.path={str(folder)!r} lacks {', '.join(lost)}{hint}"


def fetch_command(path: str, revision: str | None) -> str:
    """The command that puts what is needed of a hub id into the local cache, and no more (SD v1.5: 4.3 GB of 40)."""
    return weights.fetch_command(path, revision, [*SETTINGS, *_weight_files()])


def _weight_files() -> list[str]:
    return [f"{part}/{name}" for part, name in WEIGHTS.items()]


def folder_digest(folder: Path) -> str:
    """16 hex digits over the names, sizes and content (large files: their first and last MiB) of a pipeline's parts."""
    digest = hashlib.sha256()
    for part in PARTS:
        for file in sorted((folder / part).glob("*")):
            if file.suffix not in (".json", ".txt", ".safetensors"):
                continue
            size = file.stat().st_size
            digest.update(f"{part}/{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
                if size > 1 << 20:
                    stream.seek(max(1 << 20, size - (1 << 20)))
                    digest.update(stream.read())
    return "sha256:" + digest.hexdigest()[:16]


def problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with model.path and model.revision as such. A hub id that is not in the cache, a folder that lacks
    a part: no problem of a spec, whose machine may be another one; a launch asks `weights`."""
    if settings.get("path") == "toyland":
        return []
    return weights.path_problems("model.path", settings.get("path"), ["model_index.json"], "toyland") + (
        weights.pin_problems("model", settings)
    )


def ddim(config: Mapping[str, Any]) -> Any:
    """The DDIM scheduler of a checkpoint's scheduler_config.json. What the file does not say is DDIM's default, but for
    clip_sample: that default is for pixels, and most schedulers' files do not name it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config({"clip_sample": False, **config})
