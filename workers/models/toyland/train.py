"""Train toyland from nothing: `python -m workers.models.toyland.train --out DIR`.

What: stages vae, then unet beside (in a second process) judge and reward, then the report. DIR becomes a Stable
Diffusion folder with reward.safetensors, judge.safetensors, report.json (every bar's figure), training.json and
training.png. Scenes are drawn once into the cache folder. Seeded by names: the same command on the same machine gives
the same weights.
How long: half an hour on two cores, one thread per process; see docs/toyland.md for the minutes of each stage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path

import torch

from workers.models.toyland import data, evaluate, train_critics, train_unet, train_vae

STAGES = ("vae", "judge", "reward", "unet", "report")


def run_stage(stage: str, out: Path, cache: Path, seed: int) -> None:
    """Run one stage in this process and keep its record beside the cached scenes."""
    torch.set_num_threads(1)
    data.log(f"stage {stage}")
    if stage == "report":
        return report(out, cache, seed)
    if stage == "vae":
        record = train_vae.train(out, cache, seed)
    elif stage == "unet":
        record = train_unet.train(out, cache, seed)
    elif stage == "judge":
        record = train_critics.train_judge(out, out / "vae", cache, seed)
    else:
        record = train_critics.train_reward(out, out / "vae", cache, seed)
    data.write_json(cache / f"training_{stage}.json", record)
    return None


def report(out: Path, cache: Path, seed: int) -> None:
    """Collect the stages' records, measure every bar, plot."""
    files = {stage: cache / f"training_{stage}.json" for stage in STAGES[:-1]}
    records = {stage: json.loads(f.read_text()) for stage, f in files.items() if f.exists()}
    data.write_json(out / "training.json", {"seed": seed, "torch": torch.__version__, "stages": records})
    evaluate.plot_training(records, out / "training.png")
    data.write_json(out / "report.json", evaluate.measure(out, cache, seed))


def run_group(stages: list[str], out: Path, cache: Path, seed: int) -> None:
    for stage in stages:
        run_stage(stage, out, cache, seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write (a StableDiffusionPipeline folder)")
    parser.add_argument("--cache", type=Path, help="folder of the drawn scenes (default: OUT/.cache)")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma list out of {','.join(STAGES)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; choose from {', '.join(STAGES)}")
    common = (args.out, args.cache or args.out / ".cache", args.seed)
    if "vae" in stages:
        run_stage("vae", *common)
    beside = [s for s in ("judge", "reward") if s in stages]
    process = None
    if beside:
        process = multiprocessing.get_context("spawn").Process(target=run_group, args=(beside, *common))
        process.start()
    if "unet" in stages:
        run_stage("unet", *common)
    if process is not None:
        process.join()
        if process.exitcode:
            raise SystemExit(f"the stages {beside} failed with exit code {process.exitcode}")
    if "report" in stages:
        run_stage("report", *common)


if __name__ == "__main__":
    main()
