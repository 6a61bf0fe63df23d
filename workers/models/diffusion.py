"""A Stable-Diffusion-format checkpoint as a controlled chain: toyland and Stable Diffusion v1.5, one code path.

The folder (or hub id) holds unet/, vae/, text_encoder/, tokenizer/, scheduler/, as
StableDiffusionPipeline.save_pretrained writes it. The control is the UNet with a LoRA adapter on; the pre-trained
control is the same UNet with the adapter switched off, bit for bit the original network: there never is a second one.
Frozen weights take `dtype`; the adapter, the scheduler's arithmetic and the latents stay in float32 (or float64 with
dtype fp64, for proofs).

With guidance g > 1 the control is the guided one, eps = eps_0 + g (eps_c - eps_0), both halves in one doubled batch,
and the KL is the KL of the guided control.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workers.core.chain import Chain, ddim_chain, score_from_eps
from workers.generators import Generators, derived_seed
from workers.spec import Lora, Sampler, TrialSpec, choice
from workers.store import write_whole
from workers.weights import Weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
TOYLAND = Path(__file__).parent / "toyland" / "weights"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""LoRA on the attention projections, as DPOK's official code places it."""


def resolve_path(path: str) -> str:
    """The folder or hub id that `model.path` names; "toyland" is the checkpoint shipped with the package."""
    return str(TOYLAND) if path == "toyland" else str(Path(path).expanduser()) if _is_local(path) else path


def _is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or Path(path).is_dir()


class DiffusionModel:
    """One prompt's controlled chain on a Stable-Diffusion-format checkpoint.

    Latents are (B, *latent_shape); `k` is a step of the chain in generation order, an int or int64 (B,).
    Raises OSError when the checkpoint cannot be loaded (a missing folder, or a hub id that is not in the cache).
    """

    pictures = True

    def __init__(
        self,
        *,
        path: str,
        revision: str | None,
        dtype: str,
        prompt: str,
        sampler: Sampler,
        lora: Lora,
        generators: Generators,
        device: str = "cpu",
    ) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        source = resolve_path(path)
        frozen = DTYPES[dtype]
        self.device = torch.device(device)
        self.dtype = torch.float64 if dtype == "fp64" else torch.float32
        load: dict[str, Any] = {"revision": revision, "torch_dtype": frozen, "use_safetensors": True}
        self.unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **load)
        self.vae = AutoencoderKL.from_pretrained(source, subfolder="vae", **load)
        for network in (self.unet, self.vae):
            network.requires_grad_(False).eval().to(self.device)
        self.guidance_scale = sampler.guidance_scale
        self.embedding = _embed(source, revision, prompt, self.guidance_scale > 1).to(self.device, frozen)
        self.chain = _chain(source, revision, sampler)
        size = self.unet.config.sample_size
        self.latent_shape = (self.unet.config.in_channels, size, size)
        self._adapters = _add_lora(self.unet, lora, generators)
        self._parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self._switches = [vars(layer) for layer in self._adapters]  # past nn.Module's slow attribute setter
        self._merged: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.forwards = 0

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with model.path, model.dtype and, for toyland, with the words of the prompt."""
        path, problems = str(spec.model.get("path")), choice("model.dtype", spec.model.get("dtype"), tuple(DTYPES))
        if spec.beta_schedule == "contraction":
            problems.append(
                f"beta_schedule=contraction needs the value's Lipschitz constants, which are unknown for model={path}; "
                "write beta.schedule=sigma_squared (the same shape) or constant, or model=lq or mixture"
            )
        if path == "toyland":
            from workers.models.toyland.text import check_words

            try:
                check_words(spec.prompt)
            except ValueError as error:
                problems.append(f"prompt={spec.prompt!r}: {error}")
        elif (Path(resolve_path(path)) / "model_index.json").is_file():
            pass
        elif _is_local(path):
            problems.append(
                f"model.path={path!r} is no folder with a model_index.json (a saved StableDiffusionPipeline); "
                "write model.path=toyland or the path of such a folder"
            )
        elif not _cached(spec.model):
            problems.append(
                f"model.path={path!r} is neither a folder nor a hub id in the local cache; write model.path=toyland, "
                f"a folder, or fetch it first: hf download {path}"
            )
        return problems

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The checkpoint, and the command that fetches it."""
        path = str(settings["path"])
        folder = Path(resolve_path(path))
        if _is_local(path) or path == "toyland":
            there = (folder / "model_index.json").is_file()
            return [Weights(f"the checkpoint in {folder}", there, "save a StableDiffusionPipeline there")]
        revision = f" --revision {settings['revision']}" if settings.get("revision") else ""
        return [Weights(f"{path} in the hub's cache", _cached(settings), f"hf download {path}{revision}")]

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: the pinned revision of a hub id, or a digest of a folder's configs and weights."""
        source = Path(resolve_path(str(settings["path"])))
        if not source.is_dir():
            return f"revision:{settings.get('revision')}"
        return folder_digest(source, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor:
        """u_k(y), or s_k(y) with `adapted` False: a score, shape and dtype of y; differentiable in both."""
        batch = len(y)
        steps = torch.as_tensor(k, device=self.device).expand(batch)
        time = self.chain.timesteps.to(self.device)[steps]
        latents, embedding = y.to(self.embedding.dtype), self.embedding
        if self.guidance_scale > 1:
            latents, time = torch.cat([latents, latents]), torch.cat([time, time])
            embedding = embedding.repeat_interleave(batch, 0)
        else:
            embedding = embedding.expand(batch, -1, -1)
        self.forwards += len(latents)
        with self._weights(adapted):
            eps = self.unet(latents, time, encoder_hidden_states=embedding, return_dict=False)[0].to(y.dtype)
        if self.guidance_scale > 1:
            unconditional, conditional = eps.chunk(2)
            eps = unconditional + self.guidance_scale * (conditional - unconditional)
        return score_from_eps(self.chain, steps.cpu(), eps)

    def decode(self, y: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] from final latents, in the latents' dtype; differentiable."""
        latents = (y / self.vae.config.scaling_factor).to(self.embedding.dtype)
        return (self.vae.decode(latents, return_dict=False)[0].to(y.dtype) / 2 + 0.5).clamp(0, 1)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within it the UNet is the pre-trained one. Only the switch is thrown: requires_grad stays as it is, so a
        graph built before can be walked after (peft's own disable_adapters would unmark the parameters)."""
        before = [switch["_disable_adapters"] for switch in self._switches]
        for switch in self._switches:
            switch["_disable_adapters"] = True
        try:
            yield
        finally:
            for switch, off in zip(self._switches, before, strict=True):
                switch["_disable_adapters"] = off

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it nothing is trained, and the control costs what the pre-trained control costs: the adapter's update
        is added to copies of the weights, once (an adapter at work makes a small network's forward 1.6 times as long).
        The pre-trained weights themselves are never written to. Half-precision weights would swallow the update: there
        the adapter stays at work."""
        if self._merged or self.embedding.dtype not in (torch.float32, torch.float64):
            yield
            return
        weights = [layer.get_base_layer().weight for layer in self._adapters]
        with torch.no_grad():
            updates = [layer.get_delta_weight("default") for layer in self._adapters]
            self._merged = [(w, w.data, w.data + update) for w, update in zip(weights, updates, strict=True)]
        try:
            with self.adapter_off():
                self._put(adapted=True)
                yield
        finally:
            self._put(adapted=False)
            self._merged = []

    def _put(self, adapted: bool) -> None:
        """Point the weights at their merged copies, or back at the pre-trained numbers."""
        for weight, original, merged in self._merged:
            weight.data = merged if adapted else original

    @contextlib.contextmanager
    def _weights(self, adapted: bool) -> Iterator[None]:
        """The UNet with the weights of one control or the other."""
        if adapted:
            yield
        elif not self._merged:
            with self.adapter_off():
                yield
        else:
            self._put(adapted=False)
            try:
                yield
            finally:
                self._put(adapted=True)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, in a fixed order."""
        return self._parameters

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's weights by name."""
        return {name: p.detach().clone() for name, p in self.unet.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put an adapter's weights back. Raises KeyError where a name is missing."""
        with torch.no_grad():
            for name, parameter in self.unet.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state[name])

    def save_adapter(self, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors in diffusers' LoRA format: `pipe.load_lora_weights(folder)` reads it.

        Equal adapters give equal bytes: one metadata entry (safetensors writes several in random order), lists sorted
        (peft keeps its targets in sets, whose order differs between processes).
        """
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        saved = get_peft_model_state_dict(self.unet).items()
        layers = {f"unet.{name}": value.detach().cpu().contiguous() for name, value in saved}
        given = self.unet.peft_config["default"].to_dict().items()
        config = {f"unet.{name}": sorted(value) if isinstance(value, set | list) else value for name, value in given}
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
        write_whole(
            folder / "pytorch_lora_weights.safetensors", lambda temporary: save_file(layers, temporary, metadata)
        )

    def load_adapter(self, folder: Path) -> None:
        """Read back what `save_adapter` wrote. Raises OSError without a file, ValueError where it does not fit."""
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        saved = load_file(folder / "pytorch_lora_weights.safetensors")
        layers = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in saved.items()})
        wrong = set_peft_model_state_dict(self.unet, layers)
        if wrong.unexpected_keys:
            raise ValueError(
                f"{folder} holds an adapter for another network or other lora.targets: {wrong.unexpected_keys[:3]}"
            )


def folder_digest(folder: Path, parts: tuple[str, ...]) -> str:
    """16 hex digits over the names, sizes and content (large files: their first and last MiB) of some subfolders."""
    digest = hashlib.sha256()
    for part in parts:
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


def _cached(model: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(
            try_to_load_from_cache(model["path"], "model_index.json", revision=model.get("revision")), str
        )
    except HFValidationError:
        return False


def _embed(source: str, revision: str | None, prompt: str, guided: bool) -> Tensor:
    """The text encoder's output, (1, tokens, width), or (2, ...) with the empty prompt first; the encoder is let go."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision)
    encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", revision=revision, use_safetensors=True)
    texts = ["", prompt] if guided else [prompt]
    tokens = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return encoder.eval()(tokens.input_ids)[0]


def _chain(source: str, revision: str | None, sampler: Sampler) -> Chain:
    """The chain of the checkpoint's own noise schedule, walked in `sampler.steps` DDIM steps."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler", revision=revision)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"prediction_type={scheduler.config.prediction_type!r} is not supported; the chain needs epsilon"
        )
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError("the checkpoint's scheduler clips its samples; the chain is Gaussian only without that")
    scheduler.set_timesteps(sampler.steps)
    timesteps = scheduler.timesteps.cpu()
    previous = timesteps - scheduler.config.num_train_timesteps // sampler.steps
    return ddim_chain(scheduler.alphas_cumprod, timesteps, previous, float(scheduler.final_alpha_cumprod), sampler.eta)


def _add_lora(unet: UNet2DConditionModel, lora: Lora, generators: Generators) -> list[Any]:
    """Put the adapter on the UNet and return its layers. A is drawn from the generator `lora_init`, B is zero: at the
    start the adapted network is the pre-trained one."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    seed = int(torch.randint(2**62, (), generator=generators["lora_init"]))
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_target_modules(unet, lora.targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed))
        unet.add_adapter(config)
    trained = torch.float64 if unet.dtype == torch.float64 else torch.float32  # unet.dtype walks the whole network
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(trained)
            parameter.requires_grad_(True)
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def _target_modules(unet: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    if targets == "attention":
        return list(ATTENTION)
    if targets == "all":
        return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return list(targets)
