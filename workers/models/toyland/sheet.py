"""A labelled sheet of toyland pictures for the README: drawn, autoencoded, generated.

How to run: `python -m workers.models.toyland.sheet` writes docs/images/toyland_sheet.png; `--out FILE` elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.models.toyland import data, evaluate
from workers.models.toyland.scenes import Scene, draw
from workers.models.toyland.train_vae import decode, encode
from workers.rewards.toyland import WEIGHTS

OUT = Path(__file__).parents[3] / "docs" / "images" / "toyland_sheet.png"
COLUMNS = 8
SHOWN = (
    Scene((("rabbit", "green"),), "park"),
    Scene((("cat", "yellow"), ("dog", "brown")), "plain"),
    Scene((("wolf", "grey"),) * 4, "park"),
    Scene((("dog", "brown"),), "moon"),
    Scene((("rabbit", "white"),) * 3, "moon"),
    Scene((("wolf", "blue"),), "plain"),
    Scene((("cat", "red"),) * 2, "park"),
    Scene((("wolf", "grey"), ("rabbit", "white")), "moon"),
)


def strip(pictures: Tensor, gap: int = 2) -> np.ndarray:
    """[N, 3, 32, 32] in [0, 1] -> one row with white gaps: [32, N (32 + gap) - gap, 3]."""
    rows = [torch.nn.functional.pad(p, (0, gap), value=1.0) for p in pictures]
    return torch.cat(rows, 2)[:, :, :-gap].clamp(0, 1).permute(1, 2, 0).numpy()


def rows_of(folder: Path, steps: int) -> list[tuple[str, Tensor]]:
    """Titles and pictures of the sheet."""
    pipeline = evaluate.load_pipeline(folder)
    rng = data.generator(0, "sheet")
    drawn = torch.from_numpy(np.stack([draw(s, rng) for s in SHOWN]).transpose(0, 3, 1, 2).copy())
    coded = (decode(pipeline.vae, encode(pipeline.vae, drawn)[0]) + 1) / 2
    rows = [("drawn", drawn.float() / 255), ("autoencoded", coded)]
    for prompt in evaluate.PROMPTS:
        rows.append((f"“{prompt}”", evaluate.generate(pipeline, prompt, COLUMNS, steps)))
    return rows


def main(arguments: list[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = rows_of(args.weights, args.steps)
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 1.36 * len(rows)), constrained_layout=True)
    for axis, (title, pictures) in zip(axes, rows, strict=True):
        axis.imshow(strip(pictures), interpolation="nearest")
        axis.set_title(title if "“" not in title else f"generated: {title}", fontsize=10, loc="left", pad=3)
        axis.axis("off")
    data.replace_file(args.out, lambda p: figure.savefig(p, dpi=120, format="png"))


if __name__ == "__main__":
    main()
