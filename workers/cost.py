"""What a trial costs on a GPU, from its architecture alone: no weights, no computation, no GPU.

    found = cost_of(spec)            raises Unknown, which says why, where nothing is known
    found.seconds(gpu)               per gradient step, evaluations included, on a GPU of workers/devices.py
    found.memory.at(micro_batch)     bytes by part at the worst moment

    architecture    the checkpoint's configs, from its folder or the hub's cache; those of workers/models/sd15.py where
                    it is not here yet. Its networks stand on torch's meta device (workers/meter.py)
    passes          how many rows go through which pass: `passes` of the method's class, and the evaluations
    rewards         a reward's class says what its network takes: `cost(settings) -> Network`
    time            FLOPs / (FRACTION x the vendor's peak): OURS, and not measured
    memory          measured at one row and at two, and linear; the worst phase counts

Not in it: operations that wait for memory, launches of kernels, the allocator's fragmentation, the optimiser's time,
loading, saving, the text encoder (once, on the CPU). A trial that has run is known better: orchestrator/schedule.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers.devices import Gpu
from workers.generators import Generators
from workers.meter import Line, Measured, again, measure
from workers.methods import Passes
from workers.models import pipeline_files, sd15
from workers.models.diffusion import DECODED_TOGETHER, DTYPES, DiffusionModel, add_lora
from workers.spec import Lora, TrialSpec, locate, settings
from workers.weights import find

FRACTION = 0.35
"""Of the vendor's peak, what the passes reach on average: ours."""
CONTEXT = 2**30
"""Bytes of the CUDA context and of the libraries' workspaces: ours."""
OPTIMISED = 16
"""Bytes per trained number: itself, its gradient and AdamW's two moments, in float32."""
MOST_ROWS = 4096
"""The largest micro-batch that is looked at."""
SMALLEST = 32
"""Latents of this width and more are estimated (ours): with smaller ones a GPU waits for the launches of its kernels,
which are not counted, longer than it computes."""


class Unknown(Exception):
    """Why nothing is known of a trial's cost."""


class Network(NamedTuple):
    """What a reward's network takes."""

    flops: float = 0.0
    """Per picture, forward."""
    precision: str = "fp32"
    """fp32, fp16 or bf16."""
    weights: int = 0
    """Bytes."""
    kept: int = 0
    """Bytes that a picture keeps for its gradient."""


# ---- the networks


class Sketch:
    """UNet with its adapter, and decoder, on the meta device; the passes of workers/models/diffusion.py, measured once
    each. `configs`: of unet and vae; `tokens`: of a prompt; `recomputed`: with gradient checkpointing."""

    def __init__(
        self,
        *,
        configs: Mapping[str, Any],
        tokens: int,
        dtype: str,
        lora: Lora,
        guided: bool,
        recomputed: bool,
        channels_last: bool,
    ) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.tokens, self.dtype, self.guided, self.recomputed = tokens, DTYPES[dtype], guided, recomputed
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        with torch.device("meta"):
            self.unet: Any = UNet2DConditionModel.from_config(configs["unet"])
            self.vae: Any = AutoencoderKL.from_config(configs["vae"])
        self.vae.encoder = self.vae.quant_conv = None
        for network in (self.unet, self.vae):
            nn.Module.to(network.requires_grad_(False).eval(), self.dtype).to(memory_format=self.layout)
            if recomputed:
                network.enable_gradient_checkpointing(again)
        self.unet_bytes, self.decoder_bytes = _bytes(self.unet), _bytes(self.vae)
        self._layers = add_lora(self.unet, lora, Generators(0))
        adapter = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in adapter)
        for parameter in adapter:
            parameter.grad = torch.empty_like(parameter)  # made before: no activation
        size = self.unet.config.sample_size
        self.latent = (self.unet.config.in_channels, size, size)
        self.pixels = size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.control = functools.cache(self._control)
        self.decode = functools.cache(self._decode)

    def _control(self, rows: int, *, adapted: bool, parameters: bool = False, state: bool = False) -> Measured:
        """The control of `rows` transitions; with `parameters` or `state` back to these too."""
        for layer in self._layers:
            vars(layer)["_disable_adapters"] = not adapted
        y = torch.empty(rows, *self.latent, device="meta", requires_grad=state)
        batch = 2 * rows if self.guided else rows
        width = self.unet.config.cross_attention_dim
        embedding = torch.empty(batch, self.tokens, width, dtype=self.dtype, device="meta")
        time = torch.empty(batch, dtype=torch.int64, device="meta")

        def forward() -> Tensor:
            latents = y.contiguous(memory_format=self.layout).to(self.dtype)
            latents = torch.cat([latents, latents]) if self.guided else latents
            eps = self.unet(latents, time, encoder_hidden_states=embedding, return_dict=False)[0].to(y.dtype)
            if not self.guided:
                return eps
            unconditional, conditional = eps.chunk(2)
            return unconditional + 2.0 * (conditional - unconditional)

        return measure(forward, gradient=parameters or state)

    def _decode(self, count: int, *, gradient: bool = False) -> Measured:
        """`count` pictures from latents; with `gradient` back to these too."""
        y = torch.empty(count, *self.latent, device="meta", requires_grad=gradient)

        def picture(part: Tensor) -> Tensor:
            latents = (part / self.vae.config.scaling_factor).to(self.dtype).contiguous(memory_format=self.layout)
            return (self.vae.decode(latents, return_dict=False)[0].to(y.dtype) / 2 + 0.5).clamp(0, 1)

        def forward() -> Tensor:
            parts = y.split(1) if self.vae.config.sample_size > DECODED_TOGETHER else (y,)
            whole = self.recomputed and gradient
            return torch.cat([again(picture, part) if whole else picture(part) for part in parts])

        return measure(forward, gradient)


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


@functools.lru_cache
def _sketch(text: str) -> Sketch:
    """The sketch that a JSON object describes, made once in a process. Raises Unknown."""
    given = json.loads(text)
    targets = given["lora"]["targets"]
    given["lora"]["targets"] = tuple(targets) if isinstance(targets, list) else targets
    try:
        return Sketch(**given | {"lora": Lora(**given["lora"])})
    except (ValueError, TypeError, KeyError) as error:
        raise Unknown(f"no networks can be built from the checkpoint's configs and lora.targets: {error}") from error


PARTS = {
    "unet": ("unet/config.json", sd15.UNET),
    "vae": ("vae/config.json", sd15.VAE),
    "text_encoder": ("text_encoder/config.json", sd15.TEXT_ENCODER),
    "scheduler": ("scheduler/scheduler_config.json", sd15.SCHEDULER),
}


def configs_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The configs of a checkpoint's PARTS. Raises Unknown."""
    path, revision = str(model.get("path")), model.get("revision")
    if pipeline_files.is_local(path):
        folder = pipeline_files.resolve(path)
        return _read(path, {part: folder / name for part, (name, _) in PARTS.items()})
    cached = {part: find(path, revision, name) for part, (name, _) in PARTS.items()}
    files = {part: file for part, file in cached.items() if file is not None}
    if len(files) == len(PARTS):
        return _read(path, files)
    if path in sd15.IDS:
        return {part: config for part, (_, config) in PARTS.items()}
    raise Unknown(
        f"model.path={path} is not in the hub's cache; fetch it: {pipeline_files.fetch_command(path, revision)}"
    )


def _read(path: str, files: Mapping[str, Path]) -> dict[str, Any]:
    try:
        return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items()}
    except (OSError, ValueError) as error:
        raise Unknown(f"the configs of model.path={path} cannot be read: {error}") from error


def controlled_steps(scheduler: Mapping[str, Any], steps: int) -> int:
    """How many transitions have noise: all but a last one that ends in a picture without any."""
    ddim = pipeline_files.ddim(scheduler)
    ddim.set_timesteps(steps)
    end = int(ddim.timesteps[-1]) - ddim.config.num_train_timesteps // steps
    return steps - int(end < 0 and float(ddim.final_alpha_cumprod) == 1.0)


# ---- memory


class Phase(NamedTuple):
    """A part of training or evaluation, and the bytes that its passes make."""

    line: Line
    rows: float
    """At most so many in a micro-batch."""
    rewarding: bool
    """Decoder and rewards are at work."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU: what stays, and what comes and goes."""

    resident: Mapping[str, int]
    rewarding: Mapping[str, int]
    """Decoder and rewards; with `offload` there in the phases only that need them."""
    phases: tuple[Phase, ...]
    offload: bool

    def at(self, micro_batch: int) -> dict[str, int]:
        """Bytes by part at the worst moment."""
        return max((self._in(phase, micro_batch) for phase in self.phases), key=lambda parts: sum(parts.values()))

    def _in(self, phase: Phase, micro_batch: int) -> dict[str, int]:
        present = self.rewarding if phase.rewarding or not self.offload else {}
        return {**self.resident, **present, "activations": math.ceil(phase.line.at(min(micro_batch, phase.rows)))}

    def largest(self, limit: float) -> int:
        """The largest micro-batch that fits into `limit` bytes; 0 where none does."""
        low, high = 0, MOST_ROWS
        while low < high:
            middle = (low + high + 1) // 2
            fits = sum(self.at(middle).values()) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


# ---- a trial


@dataclass(frozen=True)
class Cost:
    """What a trial takes, whatever the GPU."""

    flops: Mapping[str, float]
    """Per gradient step, evaluations spread over the steps, by precision."""
    passes: Passes
    """Rows per gradient step, evaluations spread over the steps."""
    memory: Memory
    forward: float
    """FLOPs of one UNet pass over one picture's latents, without guidance."""
    gradient: float
    """FLOPs of one transition's gradient: all of its passes, guidance and recomputation included."""
    pixels: int
    """The width of a picture."""
    uncounted: tuple[str, ...]
    """The rewards that do not say what they take."""

    def seconds(self, gpu: Gpu) -> float:
        """Per gradient step, with the GPU for itself."""
        return sum(count / (gpu.peak(precision) * 1e12 * FRACTION) for precision, count in self.flops.items())


def check_known(spec: TrialSpec) -> None:
    """Raises Unknown where `cost_of` would, without building a network."""
    model = locate(spec.model["_target_"])
    if not (isinstance(model, type) and issubclass(model, DiffusionModel)):
        raise Unknown(f"model={spec.model['name']} is no Stable-Diffusion-format checkpoint")
    if spec.model.get("dtype") == "fp64":
        raise Unknown("model.dtype=fp64 is for proofs")
    if not hasattr(locate(spec.method["_target_"]), "passes"):
        raise Unknown(f"method={spec.method['name']} does not say which passes it makes")
    size = configs_of(spec.model)["unet"].get("sample_size")
    if not isinstance(size, int) or size < SMALLEST:
        raise Unknown(
            f"model={spec.model['name']} has latents of width {size}: below {SMALLEST} a GPU waits for the launches of "
            "its kernels longer than it computes"
        )


def cost_of(spec: TrialSpec) -> Cost:
    """What a trial takes. Raises Unknown."""
    check_known(spec)
    configs = configs_of(spec.model)
    sketch = _sketch_of(spec, configs)
    passes = _passes(spec, controlled_steps(configs["scheduler"], spec.sampler.steps))
    components = [component for component in (spec.reward, spec.judge) if component is not None]
    networks = [_network(component) for component in components]
    reward, judge = [*(network or Network() for network in networks), Network()][:2]
    return Cost(
        flops=_flops(spec, sketch, passes, reward, judge),
        passes=passes,
        memory=_memory(spec, sketch, passes, reward, judge),
        forward=sum(sketch.control(1, adapted=False).flops.values()) / (1 + sketch.guided),
        gradient=sum(sum(work(1).flops.values()) for work in _gradient(sketch, passes)),
        pixels=sketch.pixels,
        uncounted=tuple(str(c["name"]) for c, network in zip(components, networks, strict=True) if network is None),
    )


def evaluations(spec: TrialSpec) -> int:
    """How many a trial makes: before the first step, every `eval.every` steps, and after the last."""
    return 1 + math.ceil(spec.train.gradient_steps / spec.eval.every)


def _half(spec: TrialSpec) -> bool:
    return spec.model.get("dtype", "fp32") in ("fp16", "bf16")


def _sketch_of(spec: TrialSpec, configs: Mapping[str, Any]) -> Sketch:
    given = {
        "configs": {part: configs[part] for part in ("unet", "vae")},
        "tokens": configs["text_encoder"].get("max_position_embeddings", 77),
        "dtype": spec.model.get("dtype", "fp32"),
        "lora": spec.to_dict()["lora"],
        "guided": spec.sampler.guidance_scale > 1,
        "recomputed": spec.model.get("gradient_checkpointing", False),
        "channels_last": spec.model.get("channels_last", False),
    }
    return _sketch(json.dumps(given, sort_keys=True))


def _network(component: Mapping[str, Any]) -> Network | None:
    """What a reward's network takes, None where it does not say."""
    cost = getattr(locate(component["_target_"]), "cost", None)
    with contextlib.suppress(OSError, ValueError):  # of its own files; loading it will say so
        return None if cost is None else cost(settings(component))
    return None


def _passes(spec: TrialSpec, controlled: int) -> Passes:
    """Rows per gradient step of the method and, spread over the steps, of the evaluations and of a regulariser's base
    samples. In half precision every pass has a whole micro-batch."""
    size, steps, T = spec.train.micro_batch, spec.train.gradient_steps, spec.sampler.steps

    def rows(count: int) -> int:
        return size * math.ceil(count / size) if _half(spec) else count

    found: Passes = locate(spec.method["_target_"]).passes(spec, controlled, rows)
    each = evaluations(spec) / steps
    base = 0 if spec.regulariser == "kl" else spec.regulariser_samples
    return found._replace(
        controls=found.controls + T * (each * rows(spec.eval.samples) + rows(base) / steps),
        pretrained=found.pretrained + T * each * rows(spec.eval.samples),
        pictures=found.pictures + each * spec.eval.samples + base / steps,
    )


def _gradient(sketch: Sketch, passes: Passes) -> list[Callable[[int], Measured]]:
    """The passes over some rows that a transition's gradient takes, those first whose backward pass comes first."""
    trained = functools.partial(sketch.control, adapted=True, parameters=True)
    if not passes.adjoints:
        return [trained]
    return [functools.partial(trained, state=True), functools.partial(sketch.control, adapted=False, state=True)]


def _flops(spec: TrialSpec, sketch: Sketch, passes: Passes, reward: Network, judge: Network) -> dict[str, float]:
    """Per gradient step, by precision."""
    merged = not _half(spec)  # into copies of the weights, while sampling
    each = evaluations(spec) * spec.eval.samples / spec.train.gradient_steps
    counts = [
        (passes.controls, sketch.control(1, adapted=not merged).flops),
        (passes.pretrained, sketch.control(1, adapted=False).flops),
        (passes.pictures, sketch.decode(1).flops),
        (passes.pictures + 2 * passes.picture_gradients, {reward.precision: reward.flops}),
        (each, {judge.precision: judge.flops}),
    ]
    if passes.gradients:
        counts.append((passes.gradients, sketch.control(1, adapted=True, parameters=True).flops))
    if passes.adjoints:
        counts.append((passes.adjoints, sketch.control(1, adapted=True, parameters=True, state=True).flops))
        counts.append((passes.pretrained_adjoints, sketch.control(1, adapted=False, state=True).flops))
    if passes.picture_gradients:
        counts.append((passes.picture_gradients, sketch.decode(1, gradient=True).flops))
    precisions = dict.fromkeys(precision for _, flops in counts for precision in flops)
    return {name: sum(count * flops.get(name, 0.0) for count, flops in counts) for name in precisions}


def _memory(spec: TrialSpec, sketch: Sketch, passes: Passes, reward: Network, judge: Network) -> Memory:
    """What stays on the GPU, and the phases' activations."""
    N, T, samples = spec.train.trajectories, spec.sampler.steps, spec.eval.samples
    states = 6 * T * N + 3 * T * samples + 3 * int(spec.method.get("buffer", 0))
    """Of training (y, W, u, s, a, and a copy), of an evaluation (y, W, u), of a replay buffer (y, y_next, s)."""
    resident = {
        "UNet": sketch.unet_bytes,
        "adapter and AdamW": OPTIMISED * sketch.trained,
        "trajectories and pictures": 4 * (states * math.prod(sketch.latent) + samples * 3 * sketch.pixels**2),
        "CUDA": CONTEXT,
    }
    rewarding = {"decoder": sketch.decoder_bytes, "rewards": reward.weights + judge.weights}
    return Memory(
        resident, rewarding, tuple(_phases(spec, sketch, passes, reward)), bool(spec.model.get("offload", False))
    )


def _phases(spec: TrialSpec, sketch: Sketch, passes: Passes, reward: Network) -> list[Phase]:
    N, T, padded = spec.train.trajectories, spec.sampler.steps, math.inf if _half(spec) else 0
    found = [Phase(_line(sketch.decode, "most"), max(N, spec.eval.samples), rewarding=True)]
    if passes.gradients:
        rows = max(padded, int(spec.method.get("batch", T * N)))
        found.append(Phase(_line(_gradient(sketch, Passes())[0], "most"), rows, rewarding=False))
    if passes.adjoints:
        first, waiting = _gradient(sketch, passes)  # the second pass's graph waits while the first runs backward
        both = _line(first, "most").plus(*_line(waiting, "kept"))
        found.append(Phase(both, max(padded, N), rewarding=False))
    if passes.picture_gradients:
        decode = functools.partial(sketch.decode, gradient=True)
        found.append(Phase(_line(decode, "most"), N, rewarding=True))
        found.append(Phase(_line(decode, "kept").plus(0, reward.kept), N, rewarding=True))
    return found


def _line(work: Callable[[int], Measured], what: str) -> Line:
    return Line.through(getattr(work(1), what), getattr(work(2), what))
