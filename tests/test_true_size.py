"""Stable Diffusion v1.5 at its true size, random weights: one gradient step on a CPU, within a 24 GB machine.

Takes ten minutes and 8 GB of disk, so it runs on request: PIFT_TRUE_SIZE=1 pytest tests/test_true_size.py -s
Figures of the day it was run: benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("PIFT_TRUE_SIZE"), reason="ten minutes; set PIFT_TRUE_SIZE=1"),
    pytest.mark.timeout(3600),
]
GIB = 2**30


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.sd15 import save_pipeline

    return save_pipeline(tmp_path_factory.mktemp("sd15"), "full", torch.float32)


@pytest.mark.parametrize("method", ["pathwise", "score"])
def test_a_gradient_step_fits_in_24_gb(pipeline: Path, method: str) -> None:
    """T = 2, one state a pass, in its own process, whose peak memory counts: weights, decoder and graph of a step."""
    command = [sys.executable, "-m", "tests.test_true_size", str(pipeline), method]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    print(run.stdout)
    peak, loss, moved = map(float, run.stdout.splitlines()[-1].split())
    assert peak < 24 * GIB and loss == loss and moved > 0


def main(pipeline: Path, method: str) -> None:
    """One step; prints its figures, last the peak of resident memory in bytes, the loss and how far it moved."""
    from benchmarks.sd15 import trial

    torch.set_num_threads(2)
    options = argparse.Namespace(
        dtype="fp32", no_checkpointing=False, contiguous=True, steps=2, guidance=1.0, trajectories=2, micro_batch=1,
        device="cpu",
    )  # fmt: skip
    start = time.perf_counter()
    it = trial(pipeline, method, options)
    loaded, before = time.perf_counter() - start, [parameter.clone() for parameter in it.model.parameters()]
    found = it.method.step()
    moved = sum(float((a - b).abs().sum()) for a, b in zip(before, it.model.parameters(), strict=True))
    size = sum(parameter.numel() for parameter in it.model.parameters())
    print(f"{method}: loaded in {loaded:.0f} s, step {time.perf_counter() - start - loaded:.0f} s, adapter of {size:,}")
    print(found, it.model.recomputed)  # type: ignore[attr-defined]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, found["train/loss"], moved)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
