"""What a gradient step costs on Stable Diffusion v1.5's networks beside its bare network passes.

    python -m benchmarks.sd15                     full size on a GPU, small on a CPU; random weights, no download
    python -m benchmarks.sd15 --size full --dtype fp16 --steps 50 --trajectories 10 --micro-batch 5

Stands alone: torch, diffusers and peft (with transformers, which peft brings) and this repository's workers/.

For each method: the seconds of its gradient step; the same divided by those of the bare network passes that it must
make (the method's own count, `passes`), run right after it, in turns, medians over the repeats: once with the decoder's
passes among them, once of the UNet's alone. Bare means: the networks called directly on ready tensors at the method's
batch size, guidance doubling it and gradient checkpointing on where they are on for the method; no control, no chain,
no optimiser, no bookkeeping.

    samples/s         pictures drawn and decoded, no gradient
    gradients/s       transitions whose gradient is taken, per second of the whole step
    peak memory       of the device (a CPU's: resident above that of the loaded trial), each method in its own process
    TFLOP/s           of the bare forward passes, counted by torch's FlopCounterMode, and as a share of what a large
                      matrix product of the same precision reaches on this device in this run

On a CPU seconds are process CPU seconds, one thread unless --threads says otherwise; on a GPU they are wall-clock
seconds between two synchronisations.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import METHODS, resident_mb
from workers.devices import device_name
from workers.models import sd15
from workers.run import Trial, build
from workers.spec import TrialSpec, locate
from workers.store import TrialFolder

SMALL = {"block_out_channels": (64, 128, 256, 256), "norm_num_groups": 16}
"""Channels of the reduced size: a fifth of the full one's; 16x16 latents, 128x128 pictures."""


class Redness:
    """A reward that costs nothing, so that the networks of the checkpoint are what is measured."""

    differentiable = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 1]).flatten(1).mean(1)


def save_pipeline(folder: Path, size: str, dtype: torch.dtype) -> Path:
    """A StableDiffusionPipeline folder with random weights, of the true sizes ("full") or reduced ("small")."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    narrow: dict[str, Any] = {} if size == "full" else SMALL
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**sd15.UNET, **narrow, **({} if size == "full" else {"sample_size": 16})})
    vae = AutoencoderKL(**{**sd15.VAE, **narrow, **({} if size == "full" else {"sample_size": 128})})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = [*letters, *(letter + "</w>" for letter in letters)]
    rest = int(sd15.TEXT_ENCODER["vocab_size"]) - len(known) - 2  # type: ignore[call-overload]
    filler = [f"<{number}>" for number in range(rest)]
    words = [*known, *filler, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    networks = {"unet": nn.Module.to(unet, dtype), "vae": nn.Module.to(vae, dtype)}  # diffusers' own warns, of nothing
    pipe = StableDiffusionPipeline(
        **networks, text_encoder=CLIPTextModel(CLIPTextConfig(**sd15.TEXT_ENCODER)), tokenizer=tokenizer,
        scheduler=DDIMScheduler(**sd15.SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def trial(pipeline: Path, method: str, options: argparse.Namespace) -> Trial:
    """A loaded trial."""
    settings: dict[str, Any] = dict(METHODS[method])
    if method == "dpok":
        settings |= {"inner_steps": 2, "batch": min(settings["batch"], options.steps * options.trajectories)}
    values = {
        "prompt": "a dog on the moon", "prompt_id": "location", "beta": 0.01, "beta_schedule": "constant", "seed": 0,
        "model": {"_target_": "workers.models.diffusion.DiffusionModel", "name": "sd15", "path": str(pipeline),
                  "revision": None, "dtype": options.dtype, "gradient_checkpointing": not options.no_checkpointing,
                  "channels_last": not options.contiguous},
        "reward": {"_target_": "benchmarks.sd15.Redness", "name": "redness"}, "judge": None, "method": settings,
        "sampler": {"steps": options.steps, "eta": 1.0, "guidance_scale": options.guidance},
        "lora": {"rank": 4, "alpha": 4, "targets": "attention"},
        "train": {"gradient_steps": 1000, "trajectories": options.trajectories, "micro_batch": options.micro_batch,
                  "checkpoint_every": 1000},
        "eval": {"every": 1000, "samples": 2, "pictures": 1},
    }  # fmt: skip
    return build(TrialSpec.from_dict(values), TrialFolder(Path("unused")), options.device)


class Bare:
    """The passes themselves, `rows` states at a time, on ready tensors."""

    def __init__(self, of: Trial, rows: int) -> None:
        self.model: Any = of.model
        self.reward, self.rows, self.prompt = of.reward, rows, of.spec.prompt
        model, guided = self.model, of.spec.sampler.guidance_scale > 1
        doubled = rows * (2 if guided else 1)
        self.y = torch.randn(rows, *model.latent_shape, device=model.device)
        self.x = torch.randn(doubled, *model.latent_shape, device=model.device).to(model.embedding.dtype)
        self.time = torch.full((doubled,), 501, device=model.device)
        self.words = model.embedding.repeat_interleave(rows, 0) if guided else model.embedding.expand(rows, -1, -1)
        self.upstream = torch.randn_like(self.x)

    def unet(self, x: Tensor) -> Tensor:
        return self.model.unet(x, self.time, encoder_hidden_states=self.words, return_dict=False)[0]

    def controls(self) -> None:
        if self.model.half:  # the adapter is at work in a rollout
            with torch.no_grad():
                self.unet(self.x)
        else:  # it has been merged into the weights
            self.pretrained()

    def pretrained(self) -> None:
        with torch.no_grad(), self.model.adapter_off():
            self.unet(self.x)

    def gradients(self) -> None:
        self.unet(self.x).backward(self.upstream)

    def adjoints(self) -> None:
        self.unet(self.x.clone().requires_grad_()).backward(self.upstream)

    def pretrained_adjoints(self) -> None:
        with self.model.adapter_off():
            eps = self.unet(self.x.clone().requires_grad_())
            eps.backward(self.upstream)

    def pictures(self) -> None:
        with torch.no_grad():
            self.reward(self.model.decode(self.y), [self.prompt] * self.rows)

    def picture_gradients(self) -> None:
        y = self.y.clone().requires_grad_()
        self.reward(self.model.decode(y), [self.prompt] * self.rows).sum().backward()

    def run(self, counts: dict[str, float], cycle: int) -> None:
        """As many passes as `cycle` gradient steps make; `counts` are rows per gradient step."""
        for name, rows in counts.items():
            for _ in range(round(rows * cycle / self.rows)):
                getattr(self, name)()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Process CPU seconds, or of a GPU those on the clock."""
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(5)) / 1e12


def forward_flops(bare: Bare) -> float:
    """FLOPs of one bare pre-trained forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bare.pretrained()
    return float(counter.get_total_flops())


def measure(pipeline: Path, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Figures of one method; meanings in the module's docstring."""
    torch.set_num_threads(options.threads)
    it = trial(pipeline, method, options)
    device, m = it.model.device, options.micro_batch
    torch.manual_seed(0)
    bare, loaded = Bare(it, m), resident_mb()
    hook = locate(it.spec.method["_target_"]).passes
    counts = hook(it.spec, int(it.model.chain.controlled.sum()), lambda n: -(-n // m) * m)._asdict()
    unet_only = {name: rows for name, rows in counts.items() if not name.startswith("picture")}
    cycle = int(it.spec.method["inner_steps"])

    def steps() -> None:
        for _ in range(cycle):
            it.method.step()

    def clear() -> None:
        for parameter in it.model.parameters():
            parameter.grad = None

    steps()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        steps()
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - loaded
    bare.run(counts, 1)
    clear()
    rows = []
    for _ in range(options.repeats):
        mine = seconds(steps, device)
        passes = seconds(lambda: bare.run(unet_only, cycle), device)
        decoded = seconds(lambda: bare.run({n: r for n, r in counts.items() if n not in unet_only}, cycle), device)
        clear()
        drawn = seconds(lambda: _draw(it), device)
        forward = seconds(bare.pretrained, device)
        rows.append((mine / cycle, mine / (passes + decoded), mine / passes, drawn, forward))
    step, ratio, to_unet, drawn, forward = (statistics.median(column) for column in zip(*rows, strict=True))
    taken = counts["gradients"] + counts["adjoints"]
    achieved = forward_flops(bare) / forward / 1e12
    dtype = it.model.embedding.dtype  # type: ignore[attr-defined]
    best = matrix_peak(device, dtype)
    return {
        "seconds_per_step": step, "ratio": ratio, "ratio_low": min(row[1] for row in rows),
        "ratio_high": max(row[1] for row in rows), "ratio_to_unet": to_unet,
        "samples_per_second": options.trajectories / drawn, "gradients_per_second": taken / step, "peak_mb": peak,
        "tflops": achieved, "matrix_tflops": best,
    }  # fmt: skip


@torch.no_grad()
def _draw(it: Trial) -> None:
    for part in it.problem.sample().y[-1].split(it.problem.micro_batch):
        it.model.decode(part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=("full", "small"), default="full" if gpu else "small")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16" if gpu else "fp32")
    parser.add_argument("--steps", type=int, default=10 if gpu else 4, help="T, transitions of the chain")
    parser.add_argument("--trajectories", type=int, default=10 if gpu else 4)
    parser.add_argument("--micro-batch", type=int, default=5 if gpu else 2, help="divides --trajectories and 50")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--repeats", type=int, default=5 if gpu else 3)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="repeatable; all by default")
    parser.add_argument("--pipeline", type=Path, help=argparse.SUPPRESS)  # for the process of one method
    return parser


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.trajectories % options.micro_batch or 50 % options.micro_batch:
        parser.error(f"--micro-batch {options.micro_batch} does not divide --trajectories and 50; write 1 or 2")
    if options.pipeline:
        print(json.dumps(measure(options.pipeline, options.method[0], options)))
        return 0
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    print(
        f"{options.size} size on {device_name(options.device)}, {options.dtype}, T = {options.steps}, "
        f"{options.trajectories} trajectories, micro-batch {options.micro_batch}, guidance {options.guidance:g}, "
        f"{'all activations kept' if options.no_checkpointing else 'gradient checkpointing'}, "
        f"{'contiguous' if options.contiguous else 'channels_last'}, torch {torch.__version__}"
    )
    heads = ("s/step", "ratio", "(range)", "to UNet", "samples/s", "gradients/s", "peak MB", "TFLOP/s", "of peak")
    widths = (9, 7, 15, 8, 10, 12, 9, 8, 15)
    print(f"{'method':10}" + "".join(head.rjust(width) for head, width in zip(heads, widths, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = save_pipeline(Path(folder), options.size, dtype)
        for method in options.method or METHODS:
            command = [sys.executable, "-m", "benchmarks.sd15", *sys.argv[1:], "--pipeline", str(pipeline)]
            run = subprocess.run([*command, "--method", method], capture_output=True, text=True)
            if run.returncode:
                print(run.stderr, file=sys.stderr)
                return 1
            found = json.loads(run.stdout.splitlines()[-1])
            share = f"{found['tflops'] / found['matrix_tflops']:.0%} of {found['matrix_tflops']:.3g}"
            cells = (
                f"{found['seconds_per_step']:.3g}", f"{found['ratio']:.3f}",
                f"({found['ratio_low']:.3f}-{found['ratio_high']:.3f})", f"{found['ratio_to_unet']:.3f}",
                f"{found['samples_per_second']:.3g}", f"{found['gradients_per_second']:.3g}", f"{found['peak_mb']:.0f}",
                f"{found['tflops']:.3g}", share,
            )  # fmt: skip
            row = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            print(f"{method:10}{row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
