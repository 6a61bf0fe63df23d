"""The journal of a trial: one JSON object a line, appended, flushed; the store's truth about what was measured.

    {"time": 1764000000.123, "step": 40, "metrics": {"eval/reward_mean": 0.31, ...},
     "samples": {"reward": [...], "judge": [...], "kl_path_nats": [...]}, "pictures": "pictures/step_000040.png",
     "crc32": "1c291ca3"}

Each line ends with the checksum of what stands before it, so that an altered number is never taken for a measured one.
`step` counts completed gradient steps. `samples` and `pictures` come with evaluations only: one number per evaluation
picture, in the order of the fixed noise, so that any two cells of a prompt can be paired picture by picture.
Metric names and meanings: METRICS below is the one place that documents them, for every method.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.store import Damaged

METRICS: dict[str, str] = {
    "eval/reward_mean": "mean reward over the evaluation pictures (fixed noise, shared by all cells of a prompt)",
    "eval/reward_sem": "standard error of that mean over pictures (not over seeds)",
    "eval/kl_path_nats": "path KL to the pre-trained chain: sum over steps and latent dimensions, mean over pictures; "
    "of the guided control where there is guidance",
    "eval/kl_path_conditional_nats": "the same sum over the conditional predictions alone (guidance_scale > 1 only): "
    "what papers report that leave guidance out of the KL; not the KL in J",
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
    "budget/model_forwards": "network evaluations in training so far, one per latent; guidance counts twice, "
    "the blocks that gradient checkpointing computes again do not count",
    "budget/seconds": "wall-clock seconds of training so far, evaluation and loading not counted",
}
"""Every metric all methods report. A method may add its own under its name, as in `dpok/clip_fraction`;
`eval/kl_step/00` .. hold the KL of each step of the chain, generation order."""

CLOCK_METRICS = frozenset({"budget/seconds"})
"""The metrics that depend on the clock: two runs of one spec agree on everything else, bit for bit."""


STORAGE_SECONDS = 300.0
"""How long records are held in memory while the journal cannot be written (limits.storage_seconds)."""
_CRC = b', "crc32": "'


class StorageFailed(OSError):
    """The trial's folder could not be written for longer than limits.storage_seconds."""


class Journal:
    """Appends records to `path`. Records at steps already journaled by an earlier attempt are skipped, so that
    a resumed trial recomputes silently up to where its predecessor died (`last_step`, -1 when there is none).

    A journal that cannot be written (a full disk, a share that is away) stops no training at once: its records wait in
    memory, and every further record tries again, until `patience` seconds have passed.
    """

    def __init__(
        self,
        path: Path,
        *,
        patience: float = STORAGE_SECONDS,
        before: Callable[[], None] | None = None,
        set_aside: Callable[[Path], object] | None = None,
    ) -> None:
        """`before` is called before each write and each cut and may raise (the trial is another's by now). `set_aside`
        keeps a copy of a journal with a damaged line, before it is cut back to what is sound."""
        self.path, self.patience, self._before = path, patience, before
        path.parent.mkdir(parents=True, exist_ok=True)
        found = scan(path)
        if before is not None:
            before()
        if found.problem and set_aside is not None:
            set_aside(path)
        if path.exists() and found.sound < path.stat().st_size:
            os.truncate(path, found.sound)
        self.problem = found.problem
        self.records = found.records
        """The records of earlier attempts."""
        self.last_step = found.last_step
        self.unwritten: OSError | None = None
        """Why the last record could not be written yet."""
        self._size, self._since = found.sound, 0.0
        self._waiting: list[bytes] = []

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Mapping[str, Sequence[float]] | None = None,
        pictures: str | None = None,
    ) -> None:
        """Append one record; silent while `step` is at or before the last step of an earlier attempt.

        Raises ValueError on a value that is not finite: a missing value is left out, never written as a number.
        Raises StorageFailed when nothing could be written for `patience` seconds.
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
        self._waiting.append(journal_line(record))
        self.flush()

    @property
    def waiting(self) -> int:
        """Records that are not on the disk yet."""
        return len(self._waiting)

    def flush(self) -> bool:
        """Try to write what waits; True when nothing waits any more."""
        if not self._waiting:
            return True
        if self._before is not None:
            self._before()
        block = b"".join(self._waiting)
        try:
            with self.path.open("ab") as stream:
                stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            self._undo()
            self.unwritten = error
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since >= self.patience:
                raise StorageFailed(error.errno, error.strerror or str(error), str(self.path)) from error
            return False
        self._size, self._waiting, self._since = self._size + len(block), [], 0.0
        return True

    def _undo(self) -> None:
        """Take back what a failed write may have left: shortening a file needs no space."""
        try:
            if self.path.stat().st_size > self._size:
                os.truncate(self.path, self._size)
        except OSError:
            pass  # the next attempt cuts it off


@dataclass(frozen=True)
class Scan:
    """What is sound of a journal: its records up to the first damage, and where they end."""

    records: list[dict[str, Any]]
    sound: int
    """Bytes of the sound part."""
    problem: str | None
    """What is wrong behind it; None also for a last line that was cut off while it was written."""

    @property
    def last_step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else -1


def journal_line(record: Mapping[str, Any]) -> bytes:
    """A record as its line. NaN and infinity are refused (ValueError)."""
    body = json.dumps(record, allow_nan=False).encode()
    return body[:-1] + _CRC + f'{zlib.crc32(body[:-1]):08x}"}}\n'.encode()


def parse_line(line: bytes) -> dict[str, Any]:
    """The record of a whole line. Raises ValueError when it is not what was written."""
    body, mark, crc = line.rpartition(_CRC)
    if not mark or crc.rstrip(b"\n") != f'{zlib.crc32(body):08x}"}}'.encode():
        raise ValueError("its checksum does not fit its content")
    return json.loads(body + b"}")


def lines_of(content: bytes) -> list[bytes]:
    """The lines of a journal, each with its end; a carriage return ends none, as it does for bytes.splitlines."""
    return io.BytesIO(content).readlines()


def scan(path: Path) -> Scan:
    """Read a journal up to its first damage. A record that was written twice (by a process that did not know yet that
    another had taken over) counts once."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Scan([], 0, None)
    records: list[dict[str, Any]] = []
    sound = 0
    for number, line in enumerate(lines_of(content), 1):
        if not line.endswith(b"\n"):
            return Scan(records, sound, None)
        try:
            record = parse_line(line)
        except ValueError as error:
            return Scan(records, sound, f"line {number} (byte {sound} of {len(content)}): {error}")
        if not records or record["step"] > records[-1]["step"]:
            records.append(record)
        sound += len(line)
    return Scan(records, sound, None)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a journal, oldest first; a torn last line (a crash while writing) is left out.

    Raises Damaged when a line is not what was written.
    """
    found = scan(path)
    if found.problem:
        raise Damaged(path, found.problem)
    yield from found.records
