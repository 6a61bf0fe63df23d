"""Draw pictures from a trained adapter beside the pre-trained model, on the same noise.

write(spec, adapter, n, out) -> out/base.png, out/tuned.png, out/side_by_side.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import Checkpoint
from workers.evaluate import fixed_noise, save_strip
from workers.generators import Generators
from workers.rollout import rollout
from workers.run import build_model, initial_law_of
from workers.spec import TrialSpec
from workers.store import write_whole


@torch.no_grad()
def draw(spec: Mapping[str, Any], tuned_by: Path | Checkpoint, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(base, tuned): pictures (n, 3, H, W) in [0, 1] of the trial's prompt, on its evaluation noise.

    `tuned_by` is the adapter folder that the trial saved, or one of its checkpoints. Raises OSError where it is
    missing, Damaged where it is not what was written.
    """
    checked = TrialSpec.from_dict(spec)
    model = build_model(checked, Generators(checked.seed), device)
    law = initial_law_of(checked, model)
    if isinstance(tuned_by, Checkpoint):
        state = tuned_by.load(device)
        model.load_state_dict(state["adapter"])
        if law is not None:
            law.trained.load_state_dict(state["initial_law"])
    else:
        model.load_adapter(tuned_by)
        if law is not None:
            law.trained.load(tuned_by)
    noise = fixed_noise(checked.prompt, n, model.chain.T, model.latent_shape)
    batch, y0 = checked.train.micro_batch, noise.y0 if law is None else law(noise.y0)
    tuned = rollout(model, y0, noise.W, batch).y[-1]
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    base = rollout(model, noise.y0, noise.W, batch).y[-1]
    return tuple(torch.cat([model.decode(part) for part in final.split(batch)]) for final in (base, tuned))  # type: ignore[return-value]


def write(
    spec: Mapping[str, Any], tuned_by: Path | Checkpoint, n: int, out: Path, device: str = "cpu"
) -> list[Path]:
    """Write the strips base.png and tuned.png, and side_by_side.png: the two under each other, small ones enlarged."""
    base, tuned = draw(spec, tuned_by, n, device)
    save_strip(base, out / "base.png")
    save_strip(tuned, out / "tuned.png")
    _stack(out / "base.png", out / "tuned.png", out / "side_by_side.png", base.shape[-1])
    return [out / "base.png", out / "tuned.png", out / "side_by_side.png"]


def _stack(above: Path, below: Path, out: Path, size: int) -> None:
    """One picture of two strips with a gap between; small pictures are enlarged without smoothing."""
    from PIL import Image

    top, bottom = Image.open(above), Image.open(below)
    scale = max(1, 128 // size)
    joined = Image.new("RGB", (top.width * scale, 2 * top.height * scale + 8), "white")
    for strip, row in ((top, 0), (bottom, top.height * scale + 8)):
        joined.paste(strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST), (0, row))
    write_whole(out, lambda temporary: joined.save(temporary, format="PNG"))
