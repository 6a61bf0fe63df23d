"""What a gradient step costs beyond the network passes it must make, on toyland.

    python -m benchmarks.step [--steps 10] [--repeats 7] [--lora all]

For each method: process CPU seconds of its gradient steps, divided by the CPU seconds of the bare network passes they
must make, which are run right after them, in turns, so that a slow minute of the machine slows both. Medians over the
repeats. Bare means: UNet, decoder and reward called directly, on ready tensors, at the batch sizes the method uses.

    pathwise   T rollout forwards (batch N, adapter merged into the weights); T times forward + backward to parameters
               and state; T times forward + backward to the state with the adapter off (the recomputation, counted
               once); decoder and reward, there and back
    score      T rollout forwards; T N pre-trained forwards and T N forward + backward, both in micro-batches of
               mixed steps; decoder and reward forwards
    dpok       per gradient step: forward + backward of its batch; per sampling: T rollout forwards, T N pre-trained
               forwards, decoder and reward forwards

Also: transitions whose gradient is taken per CPU second in the training batch, against bare forward + backward at a
batch of ten, and the peak resident memory above that of the loaded trial (each method in its own process).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workers.core.chain import at
from workers.methods.dpok import DPOK
from workers.rollout import transition_steps
from workers.run import Trial, build
from workers.spec import TrialSpec
from workers.store import TrialFolder

METHODS = {
    "pathwise": {
        "_target_": "workers.methods.pi_ft.PIFT", "name": "pi_ft", "lr": 3e-4, "estimator": "pathwise",
        "inner_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "score": {
        "_target_": "workers.methods.pi_ft.PIFT", "name": "pi_ft", "lr": 3e-4, "estimator": "score",
        "inner_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "dpok": {
        "_target_": "workers.methods.dpok.DPOK", "name": "dpok", "lr": 1e-4, "inner_steps": 10, "batch": 50,
        "buffer": 1000, "reward_weight": 10.0, "clip_nats": 1.6384, "kl": "nats", "future_kl": False,
        "baseline": "value", "value_lr": 1e-4, "value_steps": 5, "value_batch": 256, "value_width": 256,
        "weight_decay": 0.0, "max_grad_norm": 0.1,
    },
}  # fmt: skip


def trial(method: str, steps: int, lora: str) -> Trial:
    """A loaded trial on toyland: ten trajectories, micro-batches of fifty transitions."""
    values = {
        "prompt": "Four wolves in the park", "prompt_id": "counting", "beta": 0.1, "beta_schedule": "constant",
        "seed": 0,
        "model": {"_target_": "workers.models.diffusion.DiffusionModel", "name": "toyland", "path": "toyland",
                  "revision": None, "dtype": "fp32"},
        "reward": {"_target_": "workers.rewards.toyland.ToylandReward", "name": "toyland"},
        "judge": None, "method": METHODS[method],
        "sampler": {"steps": steps, "eta": 1.0, "guidance_scale": 1.0},
        "lora": {"rank": 4, "alpha": 4, "targets": lora},
        "train": {"gradient_steps": 1000, "trajectories": 10, "micro_batch": 50, "checkpoint_every": 1000},
        "eval": {"every": 1000, "samples": 2, "pictures": 1},
    }  # fmt: skip
    return build(TrialSpec.from_dict(values), TrialFolder(Path("unused")), "cpu")


class Bare:
    """The passes themselves, on ready tensors; no control, no chain, no bookkeeping."""

    def __init__(self, of: Trial) -> None:
        self.model, self.reward = of.model, of.reward
        self.N, self.T, self.micro = of.spec.train.trajectories, of.model.chain.T, of.spec.train.micro_batch
        self.prompt = of.spec.prompt
        self.y = torch.randn(self.T * self.N, *self.model.latent_shape)
        self.time = self.model.chain.timesteps[transition_steps(self.model.chain, self.N)]
        self.upstream = torch.randn_like(self.y)

    def unet(self, rows: slice, y: torch.Tensor) -> torch.Tensor:
        embedding = self.model.embedding.expand(len(y), -1, -1)  # type: ignore[attr-defined]
        return self.model.unet(y, self.time[rows], encoder_hidden_states=embedding, return_dict=False)[0]  # type: ignore[attr-defined]

    def rollout(self) -> None:
        """With the adapter off: a rollout's network is the pre-trained one with other numbers in it."""
        with torch.no_grad(), self.model.adapter_off():  # type: ignore[attr-defined]
            for k in range(self.T):
                self.unet(slice(k * self.N, (k + 1) * self.N), self.y[k * self.N : (k + 1) * self.N])

    def pretrained(self) -> None:
        with torch.no_grad(), self.model.adapter_off():  # type: ignore[attr-defined]
            for start in range(0, len(self.y), self.micro):
                rows = slice(start, start + self.micro)
                self.unet(rows, self.y[rows])

    def train(self, count: int, batch: int) -> None:
        """Forward + backward to the parameters, `count` transitions of mixed steps, `batch` at a time."""
        for start in range(0, count, batch):
            rows = slice(start % len(self.y), start % len(self.y) + batch)
            self.unet(rows, self.y[rows]).backward(self.upstream[rows])

    def adjoint(self) -> None:
        for k in range(self.T):
            rows = slice(k * self.N, (k + 1) * self.N)
            y = self.y[rows].clone().requires_grad_()
            self.unet(rows, y).backward(self.upstream[rows])
            with self.model.adapter_off():  # type: ignore[attr-defined]
                eps = self.unet(rows, y)
            eps.backward(self.upstream[rows])

    def decode(self, gradient: bool) -> None:
        y = self.y[: self.N].clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            reward = self.reward(self.model.decode(y), [self.prompt] * self.N).sum()
        if gradient:
            reward.backward()

    def of(self, method: str) -> None:
        """The passes that one cycle of `method` must make."""
        self.rollout()
        self.decode(gradient=method == "pathwise")
        if method == "pathwise":
            return self.adjoint()
        self.pretrained()
        if method == "score":
            return self.train(self.T * self.N, self.micro)
        self.train(METHODS["dpok"]["inner_steps"] * METHODS["dpok"]["batch"], METHODS["dpok"]["batch"])  # type: ignore[operator, arg-type]


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def clear(of: Trial) -> None:
    for parameter in of.model.parameters():
        parameter.grad = None


def measure(method: str, steps: int, repeats: int, lora: str) -> dict[str, float]:
    """Figures of one method; meanings in the module's docstring."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    it = trial(method, steps, lora)
    bare = Bare(it)
    cycle = METHODS["dpok"]["inner_steps"] if method == "dpok" else 1
    loaded = resident_mb()

    def method_cycle() -> None:
        for _ in range(int(cycle)):  # type: ignore[call-overload]
            it.method.step()

    method_cycle()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - loaded
    bare.of(method)
    clear(it)
    rows = []
    for _ in range(repeats):
        mine, passes = cpu_seconds(method_cycle), cpu_seconds(lambda: bare.of(method))
        clear(it)
        ten = cpu_seconds(lambda: bare.train(50, 10))
        clear(it)
        fifty = cpu_seconds(training_batch(it, bare))
        clear(it)
        rows.append((mine / cycle, mine / passes, ten / fifty))  # type: ignore[operator]
    seconds, ratio, batching = (statistics.median(column) for column in zip(*rows, strict=True))
    spread = [row[1] for row in rows]
    return {
        "cpu_seconds_per_step": seconds,
        "ratio_to_bare_passes": ratio,
        "ratio_low": min(spread),
        "ratio_high": max(spread),
        "transitions_per_cpu_second_over_bare_batch_of_ten": batching,
        "peak_memory_mb_above_loaded": peak,
    }


def training_batch(of: Trial, bare: Bare) -> Callable[[], None]:
    """The method's own training arithmetic on fifty transitions of mixed steps: what takes 50 transition gradients."""
    problem, chain = of.problem, of.problem.chain
    k = transition_steps(chain, bare.N)[torch.randperm(chain.T * bare.N)[:50]]
    y, target = bare.y[:50], bare.upstream[:50]
    if isinstance(of.method, DPOK):
        batch = of.method.replay.draw(50, torch.Generator().manual_seed(0))
        return lambda: of.method._policy_gradient(batch)  # type: ignore[attr-defined, return-value]

    def regress() -> None:
        u = problem.model.control(k, y)
        penalty = problem.beta[k].to(u) * chain.step_kl(k, u, target)
        (penalty.sum() - (at(chain.B, k, u) * target * u).sum()).backward()

    return regress


def resident_mb() -> float:
    """Resident memory of this process now, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="T, transitions of the chain")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of which the median is taken, at least 3")
    parser.add_argument("--lora", default="all", help="lora.targets: all or attention")
    parser.add_argument("--method", choices=tuple(METHODS), help="one method, in this process, as JSON")
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.steps, options.repeats, options.lora)))
        return
    print(
        f"toyland, T = {options.steps}, 10 trajectories, LoRA rank 4 on {options.lora}, one thread, "
        f"torch {torch.__version__}"
    )
    print(
        f"{'method':10} {'CPU s/step':>10} {'ratio to bare':>14} {'(range)':>15} {'batching gain':>14} {'peak MB':>8}"
    )
    for method in METHODS:
        arguments = ["--steps", options.steps, "--repeats", options.repeats, "--lora", options.lora, "--method", method]
        command = [sys.executable, "-m", "benchmarks.step", *map(str, arguments)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        low_high = f"({result['ratio_low']:.3f}-{result['ratio_high']:.3f})"
        gain = "n/a" if method == "pathwise" else f"{result['transitions_per_cpu_second_over_bare_batch_of_ten']:.2f}"
        print(
            f"{method:10} {result['cpu_seconds_per_step']:10.3f} {result['ratio_to_bare_passes']:14.3f} {low_high:>15} "
            f"{gain:>14} {result['peak_memory_mb_above_loaded']:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
