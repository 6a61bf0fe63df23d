"""Fake stores that look like real ones, for tests of everything that reads a store: no torch, no training, seeded.

    plan = fake_store(tmp_path, prompts={"counting": "Four wolves in the park"}, betas=[0.1, 1.0], seeds=[0, 1])

Curves follow the linear law of mathematics.md section 3 (gain ~ 1/beta, KL ~ 1/beta^2, saturating), so pictures of them
look like the real ones. `states` maps (prompt, method, beta, seed) to a state other than done.

    plan = fake_store(tmp_path, model="lq", judge=False, pictures=0, methods=["algorithm_1", "pi_ft", "dpok"])

journals gaps to a known optimum too: those of algorithm_1 shrink by kappa^2 an iteration down to rounding, those of
pi_ft roughly exponentially, those of dpok to its own fixed point; no pictures. model="mixture" has errors ~ 1/T too.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.lease import process
from workers.recorder import journal_line
from workers.store import write_record

START = 1_764_000_000.0
KNOWN = ("lq", "mixture")
"""The models whose optimum is known."""
MESSAGES = {
    "failed": ("bug", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (40x16 and 8x4)"),
    "diverged": ("diverged", "loss is not finite after step 20; try a smaller method.lr or a larger beta"),
}


def fake_spec(
    prompt: tuple[str, str], method: str, beta: float, seed: int, extras: Mapping[str, Any], **sizes: int
) -> dict[str, Any]:
    """A resolved spec as in spec.json; every further axis is a setting of its component."""
    spec: dict[str, Any] = {
        "prompt": prompt[1],
        "prompt_id": prompt[0],
        "beta": beta,
        "beta_schedule": "constant",
        "seed": seed,
        "model": {
            "_target_": "workers.models.diffusion.DiffusionModel",
            "name": "toyland",
            "path": "toyland",
            "fingerprint": "f00d",
        },
        "reward": {"_target_": "workers.rewards.toyland.ToylandReward", "name": "toyland", "fingerprint": "beef"},
        "judge": {"_target_": "workers.rewards.toyland.ToylandJudge", "name": "toyland_judge", "fingerprint": "cafe"},
        "method": {"_target_": f"workers.methods.{method}", "name": method, "lr": 3e-4 if method == "pi_ft" else 1e-4},
        "sampler": {"steps": 10, "eta": 1.0, "guidance_scale": 1.0},
        "lora": {"rank": 4, "alpha": 4.0, "targets": "all"},
        "train": {"gradient_steps": sizes["steps"], "trajectories": 10, "micro_batch": 20, "checkpoint_every": 20},
        "eval": {"every": sizes["every"], "samples": sizes["samples"], "pictures": sizes["pictures"]},
        "regulariser": "kl",
        "initial_law": "fixed",
        "schema": 1,
    }
    for name, value in extras.items():
        group, _, setting = name.rpartition(".")
        (spec[group] if group else spec)[setting] = value
    if method == "dpok":
        spec["method"]["buffer"] = 1000
    return spec


def fake_store(
    root: Path,
    *,
    sweep: str = "demo",
    prompts: Mapping[str, str] | None = None,
    methods: Sequence[str] = ("pi_ft", "dpok"),
    betas: Sequence[float] = (0.1, 1.0),
    seeds: Sequence[int] = (0,),
    extras: Mapping[str, Sequence[Any]] | None = None,
    states: Mapping[tuple[str, str, float, int], str] | None = None,
    steps: int = 40,
    every: int = 10,
    samples: int = 16,
    pictures: int = 8,
    size: int = 32,
    judge: bool = True,
    model: str = "toyland",
) -> dict[str, Any]:
    """Write store/sweeps/<sweep>/plan.json and the trials' folders under `root`; returns the plan."""
    prompts = prompts or {"counting": "Four wolves in the park"}
    extras = extras or {}
    sizes = {"steps": steps, "every": every, "samples": samples, "pictures": pictures}
    cells, specs = [], {}
    grid = itertools.product(prompts.items(), methods, betas, seeds, *extras.values())
    for number, (prompt, method, beta, seed, *values) in enumerate(grid):
        further = dict(zip(extras, values, strict=True))
        key = f"{number:04x}{random.Random(f'{sweep} {number}').getrandbits(48):012x}"
        spec = fake_spec(prompt, method, beta, seed, further, **sizes)
        spec["model"] |= {"name": model, "path": model}
        if not judge:
            spec["judge"] = None
        cells.append(
            {
                "key": key,
                "label": f"{method} beta={beta:g} {prompt[0]} s{seed}",
                "prompt": prompt[0],
                "prompt_text": prompt[1],
                "beta": beta,
                "method": method,
                "seed": seed,
                **further,
            }
        )
        specs[key] = spec
        state = (states or {}).get((prompt[0], method, beta, seed), "done")
        if state != "new":
            fake_trial(root / "trials" / key, key, spec, state, size=size)
    axes = {"prompt": list(prompts), "beta": list(betas), "method": list(methods), "seed": list(seeds), **extras}
    plan = {
        "sweep": sweep,
        "created_at": "2026-11-23T02:00:00+00:00",
        "axes": axes,
        "cells": cells,
        "specs": specs,
        "overrides": [f"sweep={sweep}"],
    }
    write_record(root / "sweeps" / sweep / "plan.json", plan)
    return plan


def fake_trial(folder: Path, key: str, spec: dict[str, Any], state: str, *, size: int = 32) -> None:
    """One trial's folder in `state`: done, failed, diverged, running or resumable (the last four stop half-way)."""
    _write(folder / "spec.json", spec)
    steps, every = spec["train"]["gradient_steps"], spec["eval"]["every"]
    last = steps if state == "done" else steps // 2
    lines, rng = [], random.Random(key)
    for step in range(last + 1):
        evaluate = step % every == 0 or step == steps
        lines.append(_record(folder, spec, step, rng, evaluate and not (state == "failed" and step == last), size))
    (folder / "journal.jsonl").write_bytes(b"".join(journal_line(line) for line in lines))
    if state == "done":
        final, initial = (
            {k: v for k, v in lines[i]["metrics"].items() if k.startswith(("eval/", "budget/"))} for i in (-1, 0)
        )
        write_record(
            folder / "DONE.json",
            {
                "key": key,
                "started_at": START,
                "finished_at": START + 2 * steps,
                "seconds": 2.0 * steps,
                "seconds_per_step": 2.0,
                "steps": steps,
                "attempt": 1,
                "device": "cpu",
                "initial": initial,
                "final": final,
                "files": {},
            },
        )
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"not weights")
    elif state in MESSAGES:
        kind, message = MESSAGES[state]
        write_record(
            folder / "FAILED.json",
            {"key": key, "class": kind, "message": message, "traceback": "...", "step": last, "failed_at": START},
        )
    elif state == "running":
        now = time.time()
        beat = {**process(), "attempt": 1, "started": now - 60, "beat": now, "step": last, "steps": steps}
        write_record(folder / "attempts" / "0001.json", beat)
    else:
        write_record(folder / "checkpoints" / f"step_{last:06d}.json", {"step": last})


def _record(
    folder: Path, spec: dict[str, Any], step: int, rng: random.Random, evaluate: bool, size: int
) -> dict[str, Any]:
    beta, total, dpok = spec["beta"], spec["train"]["gradient_steps"], spec["method"]["name"] == "dpok"
    progress = 1 - math.exp(-3 * step / total)
    ideal = 1.9 * math.tanh(0.35 / beta**0.6) * (0.75 if dpok else 1.0) * (1 + 0.06 * math.sin(spec["seed"] + 1))
    gain, kl = ideal * progress, (1.6 if dpok else 0.8) * (ideal * progress) ** 2 * (1 + 0.2 / beta**0.5)
    metrics = {
        "budget/seconds": 1.9 * step,
        "budget/reward_queries": 10.0 * step * (0.1 if dpok else 1),
        "budget/transition_gradients": 100.0 * step,
        "budget/model_forwards": 300.0 * step,
    }
    if step:
        metrics |= {
            "train/reward_mean": gain + rng.gauss(0, 0.2),
            "train/kl_path_nats": kl,
            "train/loss": 1 / step,
            "train/grad_norm": 0.3,
        }
    if spec["method"]["name"] == "algorithm_1":  # it trains on no sample and queries no reward
        metrics = {name: 0.0 if name != "budget/seconds" else 0.01 * step for name in metrics if "budget" in name}
    record: dict[str, Any] = {"time": START + 2 * step, "step": step, "metrics": metrics}
    if not evaluate:
        return record
    noise = random.Random(spec["prompt"])
    base = [noise.gauss(-0.1, 0.6) for _ in range(spec["eval"]["samples"])]
    rewards = [
        value + gain * (1 + 0.3 * math.sin(7 * i)) + (rng.gauss(0, 0.15) if step else 0) for i, value in enumerate(base)
    ]
    hack = 1 - 0.9 * progress if dpok and beta < 0.1 else 1.0
    judges = [
        0.4
        + 0.2 * math.sin(i)
        + hack * 0.2 * gain
        - (0.1 * progress if hack < 1 else 0)
        + (rng.gauss(0, 0.1) if step else 0)
        for i in range(len(base))
    ]
    kls = [kl * (1 + 0.2 * math.cos(i)) if step else 0.0 for i in range(len(base))]
    mean = math.fsum(rewards) / len(rewards)
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1) / len(rewards))
    metrics |= {
        "eval/reward_mean": mean,
        "eval/reward_sem": spread,
        "eval/kl_path_nats": math.fsum(kls) / len(kls),
        "eval/objective": mean - beta * math.fsum(kls) / len(kls),
        "eval/diversity": 0.31 - 0.02 * gain,
    }
    record["samples"] = {"reward": rewards, "kl_path_nats": kls}
    if spec["judge"]:
        record["samples"]["judge"] = judges
        metrics["eval/judge_mean"] = math.fsum(judges) / len(judges)
    if spec["model"]["name"] in KNOWN:
        del metrics["eval/diversity"]
        metrics |= theory(spec, step)
    if not spec["eval"]["pictures"]:
        return record
    record["pictures"] = f"pictures/step_{step:06d}.png"
    _strip(folder / record["pictures"], spec["prompt"], spec["eval"]["pictures"], size, gain)
    return record


def theory(spec: Mapping[str, Any], step: int) -> dict[str, float]:
    """What trials with a known optimum journal at an evaluation."""
    beta, method, total = spec["beta"], spec["method"]["name"], spec["train"]["gradient_steps"]
    rng = random.Random(f"{spec['seed']} {method} {beta} {step}")
    kappa, start, best = 0.8 / (1 + beta) ** 0.5, 0.3 / (0.1 + beta), 1 + 0.2 / beta
    rate, fixed = 2 * math.log10(kappa), 0.15 * start
    found = {"theory/kappa_max": kappa, "theory/objective_optimum": best}
    if method == "algorithm_1":
        shrunk = start * 0.4 * (1 + 0.5 * 0.7**step) * 10 ** (rate * (step - 1)) if step else start
        found |= {"theory/gap": shrunk + (rng.gauss(0, 3e-16 * best) if step else 0), "algorithm_1/log10_rate": rate}
    elif method == "dpok":
        shrunk = fixed + (start - fixed) * math.exp(-6 * step / total + (rng.gauss(0, 0.1) if step else 0))
        found |= {"theory/gap": shrunk, "dpok/gap_fixed_point": fixed}
    else:
        found["theory/gap"] = start * math.exp(
            -8 * step / total / (1 + beta) ** 0.3 + (rng.gauss(0, 0.25) if step else 0)
        )
    if spec["initial_law"] == "gaussian":
        found["eval/kl_initial_nats"] = 0.02 * (1 - math.exp(-3 * step / total)) / beta
    if spec["model"]["name"] == "mixture" and method == "algorithm_1":
        steps = spec["sampler"]["steps"]
        found |= {"theory/objective_continuous": best + 0.1, "theory/error_continuous": 0.8 / steps / beta**0.5}
        found["theory/tv_ideal"] = 0.3 / steps**0.9 / (1 + beta)
    return found


def _strip(path: Path, prompt: str, count: int, size: int, gain: float) -> None:
    """A strip of `count` squares: the same faces for one prompt, greener with the gain."""
    from PIL import Image, ImageDraw

    rng, strip = random.Random(prompt), Image.new("RGB", (count * size, size))
    pen = ImageDraw.Draw(strip)
    for i in range(count):
        ground = tuple(rng.randrange(90, 200) for _ in range(3))
        pen.rectangle((i * size, 0, (i + 1) * size - 1, size - 1), fill=ground)
        x, y, r = (i + rng.uniform(0.35, 0.65)) * size, rng.uniform(0.45, 0.6) * size, size * rng.uniform(0.2, 0.32)
        green = min(1.0, gain / 2 + rng.uniform(0, 0.2))
        fill = (int(200 - 150 * green), int(90 + 110 * green), 70)
        for ear in (-0.6, 0.6):
            pen.ellipse((x + ear * r - r / 4, y - 1.8 * r, x + ear * r + r / 4, y), fill=fill, outline=(30, 25, 30))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=(30, 25, 30))
        for eye in (-0.4, 0.4):
            pen.ellipse((x + eye * r - 1, y - 0.3 * r - 1, x + eye * r + 1, y - 0.3 * r + 1), fill=(20, 20, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
