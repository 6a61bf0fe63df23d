"""The journal of a trial: one JSON object a line, appended, flushed; the store's truth about what was measured.

    {"time": 1764000000.123, "step": 40, "metrics": {"eval/reward_mean": 0.31, ...},
     "samples": {"reward": [...], "judge": [...], "kl_path_nats": [...]}, "pictures": "pictures/step_000040.png"}

`step` counts completed gradient steps. `samples` and `pictures` come with evaluations only: one number per evaluation
picture, in the order of the fixed noise, so that any two cells of a prompt can be paired picture by picture.
Metric names and meanings: METRICS below is the one place that documents them, for every method.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS: dict[str, str] = {
    "eval/reward_mean": "mean reward over the evaluation pictures (fixed noise, shared by all cells of a prompt)",
    "eval/reward_sem": "standard error of that mean over pictures (not over seeds)",
    "eval/kl_path_nats": "path KL to the pre-trained chain: sum over steps and latent dimensions, mean over pictures",
    "eval/objective": "J = mean of [reward - sum_t beta_t * step KL_t], the quantity every method maximises; less "
    "beta_0 * eval/kl_initial_nats with a learned initial law, and of the transformed reward with another regulariser",
    "eval/kl_initial_nats": "KL of the learned law of Y_0 to N(0, I), summed over dimensions (initial_law=gaussian)",
    "eval/reward_transformed_mean": "mean of the reward that stands in for the regulariser (other than kl)",
    "regulariser/normaliser_se": "standard error of the mean of (f')^-1 over the samples that its lambda was solved on",
    "regulariser/effective_samples": "how many of those samples carry that mean, (sum)^2 / (sum of squares)",
    "regulariser/normaliser_error": "the same mean less 1 over the evaluation pictures of step 0, new to lambda",
    "theory/gap": "J* - J(theta), exact: by moments or on a grid, not sampled (models with a known optimum)",
    "theory/objective_optimum": "J*, the maximum over all controls (and initial laws, where they are learned)",
    "theory/kappa_max": "the largest kappa_t = sigma_t^2/beta_t |E Hess V_{t+1}|, the factor of an inner step",
    "eval/judge_mean": "mean of the held-out judge, a reward that no method trains on",
    "eval/diversity": "mean over picture pairs of the root-mean-square pixel difference (pixels in 0..1)",
    "train/reward_mean": "mean reward of the newest training trajectories",
    "train/kl_path_nats": "mean path KL of the newest training trajectories",
    "train/loss": "the loss this gradient step minimised (its definition belongs to the method: see its file)",
    "train/grad_norm": "L2 norm of the gradient over all trainable parameters, before clipping",
    "budget/reward_queries": "pictures scored for training so far (evaluation not counted)",
    "budget/transition_gradients": "transitions whose gradient with respect to the parameters was taken so far",
    "budget/model_forwards": "network evaluations in training so far, one per latent; guidance and recomputation count",
    "budget/seconds": "wall-clock seconds of training so far, evaluation and loading not counted",
}
"""Every metric all methods report. A method may add its own under its name, as in `dpok/clip_fraction`;
`eval/kl_step/00` .. hold the KL of each step of the chain, generation order."""

CLOCK_METRICS = frozenset({"budget/seconds"})
"""The metrics that depend on the clock: two runs of one spec agree on everything else, bit for bit."""


class Journal:
    """Appends records to `path`. Records at steps already journaled by an earlier attempt are skipped, so that
    a resumed trial recomputes silently up to where its predecessor died (`last_step`, -1 when there is none)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_tail(path)
        self.last_step = max((int(record["step"]) for record in read_journal(path)), default=-1)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Mapping[str, Sequence[float]] | None = None,
        pictures: str | None = None,
    ) -> None:
        """Append one record; silent while `step` is at or before the last step of an earlier attempt.

        Raises ValueError on a value that is not finite: a missing value is left out, never written as a number.
        """
        if step <= self.last_step:
            return
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"not finite at step {step}: {', '.join(bad)}")
        record: dict[str, Any] = {"time": time.time(), "step": step, "metrics": dict(metrics)}
        if samples:
            record["samples"] = {name: list(values) for name, values in samples.items()}
        if pictures:
            record["pictures"] = pictures
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal, oldest first; a torn last line (a crash while writing) is left out."""
    try:
        stream = path.open("r", encoding="utf-8")
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def _cut_torn_tail(path: Path) -> None:
    """Remove a last line without its newline, so that the next record does not grow onto it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
