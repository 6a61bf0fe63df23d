"""A Stable-Diffusion-format checkpoint as a controlled chain: toyland and Stable Diffusion v1.5, one code path.

The folder (or hub id) holds unet/, vae/, text_encoder/, tokenizer/, scheduler/, as
StableDiffusionPipeline.save_pretrained writes it. The control is the UNet with a LoRA adapter on; the pre-trained
control is the same UNet with the adapter switched off, bit for bit the original network: there never is a second one.
Frozen weights take `dtype`; the adapter, the scheduler's arithmetic and the latents stay in float32 (or float64 with
dtype fp64, for proofs).

    dtype fp16               gradients are scaled by a power of two where they enter the half-precision network and
                             scaled back where they leave it (half_precision.py), so that small ones do not vanish
    dtype fp16, bf16         every pass of the UNet has `pass_rows` rows, short ones are padded: kernels are chosen by
                             shape, so a state gets the same bits in a rollout and in a training batch. Else the ratio
                             of fresh data would not be 1, nor an untrained adapter's KL be 0: at 16,384 dimensions and
                             guidance 7.5, bfloat16 rounding alone is worth nats
    gradient_checkpointing   the UNet's and the decoder's blocks keep their inputs only and are computed again in the
                             backward pass, with the adapter as it was in the forward pass: the same bits, less memory.
                             `recomputed` counts the blocks
    attention                torch's scaled_dot_product_attention, diffusers' default: fused where a kernel exists
    text encoder             on the CPU, once, then let go

With guidance g > 1 the control is the guided one, eps = eps_0 + g (eps_c - eps_0), both halves in one doubled batch,
and the KL is the KL of the guided control, not that of the conditional difference (which is 1/g^2 of it where the
adapter moves the conditional prediction alone).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workers.core.chain import Chain, ddim_chain, score_from_eps
from workers.generators import Generators, derived_seed
from workers.models import half_precision, pipeline_files
from workers.models.half_precision import Crossing
from workers.spec import Lora, Sampler, TrialSpec, choice
from workers.store import write_whole
from workers.weights import Weights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DTYPES = half_precision.DTYPES | {"fp64": torch.float64}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""LoRA on the attention projections, as DPOK's official code places it."""
DECODED_TOGETHER = 128
"""Pictures up to this many pixels wide are decoded as one batch, larger ones one by one: each needs gigabytes when a
gradient is wanted, and fills a GPU alone."""
SWITCHES = ("gradient_checkpointing", "channels_last", "offload")
"""The settings that are true or false; conf/model/sd15.yaml says what they do."""


class DiffusionModel:
    """One prompt's controlled chain on a Stable-Diffusion-format checkpoint.

    Latents are (B, *latent_shape); `k` is a step of the chain in generation order, an int or int64 (B,) on the CPU.
    Raises OSError when the checkpoint cannot be loaded (a folder without it, or a hub id that is not in the cache and
    cannot be fetched), ValueError for a scheduler whose chain is not Gaussian.
    """

    pictures = True
    placement = ("gradient_checkpointing", "offload")
    """Settings that say where numbers are kept and change none of them: no part of a trial's identity."""

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
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        offload: bool = False,
    ) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        folder, frozen = pipeline_files.locate_folder(path, revision), DTYPES[dtype]
        self.device = torch.device(device)
        self.dtype = torch.float64 if dtype == "fp64" else torch.float32
        self.half = frozen in (torch.float16, torch.bfloat16)
        self.pass_rows = 0
        """In half precision: rows of every pass of the UNet, before guidance (the runner sets it); 0 = as given."""
        self.unet = _load(UNet2DConditionModel, folder, "unet", frozen)
        self.vae = _load(AutoencoderKL, folder, "vae", frozen)
        self.vae.encoder = self.vae.quant_conv = None  # nothing is ever encoded
        layout = torch.channels_last if channels_last else torch.contiguous_format  # a convolution passes it on
        for network in (self.unet, self.vae):
            network.requires_grad_(False).eval().to(self.device, memory_format=layout)
        self.guidance_scale = sampler.guidance_scale
        self.embedding = _embed(folder, prompt, self.guidance_scale > 1).to(self.device, frozen)
        self.chain = _chain(folder, sampler)
        size = self.unet.config.sample_size
        self.latent_shape = (self.unet.config.in_channels, size, size)
        self._adapters = add_lora(self.unet, lora, generators)
        self._parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self._switches = [vars(layer) for layer in self._adapters]  # past nn.Module's slow attribute setter
        self._crossing = Crossing(frozen, self._parameters)
        self._merged: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.offloaded: list[nn.Module] = [self.vae] if offload else []
        """Networks that stand in main memory while they are not at work."""
        self.conditional: Tensor | None = None
        """With guidance: the conditional control of the last pass, without a gradient."""
        self.forwards = self.recomputed = 0
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(self._checkpointed)
            self.vae.enable_gradient_checkpointing(self._checkpointed)

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        """Problems with model.path and the other settings and, for toyland, with the words of the prompt."""
        settings, path = spec.model, str(spec.model.get("path"))
        problems = choice("model.dtype", settings.get("dtype"), tuple(DTYPES))
        for name in SWITCHES:
            if not isinstance(settings.get(name, False), bool):
                problems.append(f"model.{name}={settings[name]!r} is not true or false; write model.{name}=false")
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
        return problems + pipeline_files.problems(settings)

    @staticmethod
    def weights(settings: Mapping[str, Any]) -> list[Weights]:
        """The checkpoint, and the command that fetches it."""
        path, revision = str(settings["path"]), settings.get("revision")
        if pipeline_files.is_local(path):
            folder = pipeline_files.resolve(path)
            lost = pipeline_files.absent(folder)
            what = f"the checkpoint in {folder}" + (f" ({', '.join(lost)})" if lost else "")
            return [Weights(what, not lost, "save a StableDiffusionPipeline there")]
        there = pipeline_files.cached_folder(path, revision) is not None
        command = pipeline_files.fetch_command(path, revision)
        return [Weights(f"{path} in the hub's cache", there, f"{command}    # or model.path=FOLDER")]

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """What the weights are: the pinned revision of a hub id, or a digest of a folder's configs and weights."""
        path = str(settings["path"])
        if not pipeline_files.is_local(path):
            return f"revision:{settings.get('revision')}"
        return pipeline_files.folder_digest(pipeline_files.resolve(path))

    def control(self, k: int | Tensor, y: Tensor, adapted: bool = True) -> Tensor:
        """u_k(y), or s_k(y) with `adapted` False: a score, shape and dtype of y; differentiable in both."""
        batch = len(y)
        steps = torch.as_tensor(k).expand(batch)
        if self.half and batch < self.pass_rows:
            y, steps = _padded(y, self.pass_rows), _padded(steps, self.pass_rows)
        rows = len(y)
        time = self.chain.timesteps[steps].to(self.device)
        latents, embedding = self._crossing.enter(y, adapted), self.embedding
        if self.guidance_scale > 1:
            latents, time = torch.cat([latents, latents]), torch.cat([time, time])
            embedding = embedding.repeat_interleave(rows, 0)
        else:
            embedding = embedding.expand(rows, -1, -1)
        self.forwards += batch * len(latents) // rows
        with self._weights(adapted):
            eps = self.unet(latents, time, encoder_hidden_states=embedding, return_dict=False)[0]
        eps = self._crossing.leave(eps, y.dtype)
        if self.guidance_scale > 1:
            unconditional, conditional = eps.chunk(2)
            self.conditional = score_from_eps(self.chain, steps[:batch], conditional[:batch].detach())
            eps = unconditional + self.guidance_scale * (conditional - unconditional)
        return score_from_eps(self.chain, steps[:batch], eps[:batch])

    def decode(self, y: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] from final latents, in the latents' dtype; differentiable."""
        again = self.gradient_checkpointing and torch.is_grad_enabled() and y.requires_grad
        parts = y.split(1) if self.vae.config.sample_size > DECODED_TOGETHER else (y,)
        return torch.cat(
            [
                checkpoint(self._decode, part, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._decode(part)
                for part in parts
            ]
        )

    def _decode(self, y: Tensor) -> Tensor:
        latents = self._crossing.enter(y / self.vae.config.scaling_factor, trained=False)
        pictures = self._crossing.leave(self.vae.decode(latents, return_dict=False)[0], y.dtype)
        return (pictures / 2 + 0.5).clamp(0, 1)

    def _checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """A block whose activations are computed again in the backward pass, when the adapter's switch may stand
        elsewhere: it is put where it stood."""
        off = bool(self._switches) and self._switches[0]["_disable_adapters"]
        return checkpoint(
            block, *inputs, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), self._again(off)),
        )  # fmt: skip

    @contextlib.contextmanager
    def _again(self, off: bool) -> Iterator[None]:
        self.recomputed += 1
        with self._switched(off):
            yield

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within it the UNet is the pre-trained one. Only the switch is thrown: requires_grad stays as it is, so a
        graph built before can be walked after (peft's own disable_adapters would unmark the parameters)."""
        with self._switched(off=True):
            yield

    @contextlib.contextmanager
    def _switched(self, off: bool) -> Iterator[None]:
        before = [switch["_disable_adapters"] for switch in self._switches]
        for switch in self._switches:
            switch["_disable_adapters"] = off
        try:
            yield
        finally:
            for switch, was in zip(self._switches, before, strict=True):
                switch["_disable_adapters"] = was

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it nothing is trained, and the control costs what the pre-trained control costs: the adapter's update
        is added to copies of the weights, once (an adapter at work makes a small network's forward 1.6 times as long).
        The pre-trained weights themselves are never written to. Half-precision weights would swallow the update: there
        the adapter stays at work."""
        if self._merged or self.half:
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


def _padded(rows: Tensor, count: int) -> Tensor:
    """`rows` (B, ...) with its first one repeated behind it, (count, ...)."""
    return torch.cat([rows, rows[:1].detach().expand(count - len(rows), *rows.shape[1:])])


def _load(network: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One network of a pipeline, from safetensors alone. Raises OSError."""
    variant = pipeline_files.variant(folder, part)
    return network.from_pretrained(
        folder, subfolder=part, torch_dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True
    )


def _embed(folder: Path, prompt: str, guided: bool) -> Tensor:
    """The text encoder's output, (1, tokens, width), or (2, ...) with the empty prompt first, computed on the CPU in
    float32; the encoder is let go."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    encoder = _load(CLIPTextModel, folder, "text_encoder", torch.float32)
    texts = ["", prompt] if guided else [prompt]
    tokens = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return encoder.eval()(tokens.input_ids)[0]


def _chain(folder: Path, sampler: Sampler) -> Chain:
    """The chain of the checkpoint's own noise schedule, walked in `sampler.steps` DDIM steps."""
    from diffusers import DDIMScheduler

    scheduler = pipeline_files.ddim(DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True))
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


def add_lora(unet: UNet2DConditionModel, lora: Lora, generators: Generators) -> list[Any]:
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
