"""What the data of a sweep say, in sentences: one per cell, per group of seeds and per pair of methods.

What is claimed is bounded by what was measured: a change over pictures is called a change where it exceeds two paired
standard errors, a mean over seeds where its 95 % interval leaves zero out, and one seed claims nothing about seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.compare import theory
from orchestrator.compare.frame import Cell, Sweep, sampled, series, show
from orchestrator.compare.statistics import Estimate, Interval, paired, t_interval
from workers.text import one_line


@dataclass(frozen=True)
class Line:
    """A sentence with its `tone`: up, down, flat, mixed (the judge disagrees), or none where there is no result."""

    tone: str
    subject: str
    text: str


def signed(value: float | None, digits: int = 2) -> str:
    """+0.84 or −0.10, with a true minus sign; an en dash for nothing."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def plain(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else signed(value, digits).removeprefix("+")


def nats(value: float | None) -> str:
    """A KL with three significant digits."""
    return "–" if value is None else f"{value:.3g}"


def tiny(value: float | None) -> str:
    """A gap, over whatever powers of ten: 1.2e-05."""
    return "–" if value is None else f"{value:.1e}"


def with_error(change: Estimate | Interval | None) -> str:
    """+0.84 ± 0.07; without the error where there is none. Two decimals, up to four where the error needs them."""
    if change is None:
        return "–"
    error = change.se if isinstance(change, Estimate) else change.half
    digits = min(4, max(2, -math.floor(math.log10(error)))) if error else 2
    return signed(change.mean, digits) + ("" if error is None else f" ± {error:.{digits}f}")


def with_spread(span: Interval) -> str:
    """A KL over seeds, 6.03 ± 0.73: three significant digits of the mean, the same decimals for its interval."""
    digits = max(0, 2 - math.floor(math.log10(abs(span.mean)))) if span.mean else 2
    return f"{span.mean:.{digits}f}" + ("" if span.half is None else f" ± {span.half:.{digits}f}")


def tone(change: Estimate | Interval | None) -> str:
    if change is None:
        return "none"
    return "flat" if not change.clear else "up" if change.mean > 0 else "down"


ONE_SEED = "One seed: no interval over seeds."
HACKING = " Reward rises while the held-out judge falls: look for reward hacking."


def hacked(reward: Estimate | Interval | None, judge: Estimate | Interval | None) -> bool:
    """Does the reward clearly rise while the judge, which nobody trained on, clearly falls?"""
    return bool(reward and judge and reward.clear and judge.clear and judge.mean < 0 < reward.mean)


def of_cell(cell: Cell) -> Line:
    """ "pi_ft β 0.1 seed 0: reward +0.84 ± 0.07 over its step 0 (paired over 48 pictures), judge ..., KL ... nats"."""
    change, judge, gap = cell.change("reward"), cell.change("judge"), theory.gap(cell)
    if change is None and gap is None:
        return Line(
            "none",
            cell.title,
            f"{cell.status}: no result." if not cell.finished else "done, but nothing to pair.",
        )
    text = ", ".join(_findings(cell)) + "."
    if change and not change.clear:
        text += " No clear change of reward."
    if hacked(change, judge):
        text += HACKING
    if not cell.finished:
        at = cell.evaluations[-1].step if cell.evaluations else cell.step
        return Line("none", cell.title, f"{cell.status}. Up to step {at}: {text}")
    return Line("mixed" if hacked(change, judge) else tone(change) if change else _closer(gap), cell.title, text)


def _findings(cell: Cell) -> list[str]:
    """What a cell has to say of reward, judge, KL and gap, as far as it has them."""
    change, judge, gap = cell.change("reward"), cell.change("judge"), theory.gap(cell)
    parts = []
    if change:
        parts.append(f"reward {with_error(change)} over its step 0 (paired over {change.n} {sampled([cell])})")
    if judge:
        parts.append(f"judge {with_error(judge)}")
    if change or cell.last("eval/kl_path_nats") is not None:
        parts.append(f"KL {nats(cell.last('eval/kl_path_nats'))} nats")
    if gap:
        parts.append(f"gap {tiny(gap[0])} → {tiny(gap[1])}")
    return parts


def _closer(gap: tuple[float, float] | None) -> str:
    """The tone of an exact gap, for a cell with no samples to pair."""
    return "none" if gap is None else "up" if gap[1] < gap[0] else "flat" if gap[1] == gap[0] else "down"


def of_seeds(group: Sequence[Cell]) -> Line:
    """The mean over the finished seeds of one (variant, beta) with its 95 % t interval; or why there is none."""
    finished = [cell for cell in group if cell.finished and (cell.change("reward") or theory.gap(cell))]
    subject = f"{group[0].variant} β\u00a0{show(group[0].beta)}"
    if not finished:
        return Line("none", subject, f"none of {len(group)} seeds has a result.")
    if len(finished) == 1:
        line, only = of_cell(finished[0]), f"The only one of {len(group)} seeds with a result: no interval over seeds."
        return Line(line.tone, line.subject, f"{line.text} {only}" if len(group) > 1 else line.text)
    reward, judge = (_over([c.mean for cell in finished if (c := cell.change(name))]) for name in ("reward", "judge"))
    kl = _over([value for cell in finished if (value := cell.last("eval/kl_path_nats")) is not None])
    gap = _median([found for cell in finished if (found := theory.gap(cell))])
    parts = [f"reward {with_error(reward)} (mean over {len(finished)} seeds, 95 % t interval)"] if reward else []
    parts += [f"judge {with_error(judge)}"] if judge else []
    parts += [f"KL {with_spread(kl)} nats"] if kl else []
    parts += [f"gap {tiny(gap[0])} → {tiny(gap[1])} (median of {len(finished)} seeds)"] if gap else []
    text = ", ".join(parts) + ("." if reward is None or reward.clear else ". The interval includes zero: no claim.")
    if hacked(reward, judge):
        text += HACKING
    if len(finished) < len(group):
        text += f" {len(group) - len(finished)} of {len(group)} seeds have no result and are not in it."
    return Line("mixed" if hacked(reward, judge) else tone(reward) if reward else _closer(gap), subject, text)


def _median(gaps: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The median first and last gap: unlike a mean it is right on a log axis, and a sign lost to rounding is nothing
    to it."""
    before, after = [first for first, _ in gaps], [last for _, last in gaps]
    return (statistics.median(before), statistics.median(after)) if gaps else None


def _over(values: Sequence[float]) -> Interval | None:
    return t_interval(values) if values else None


def of_methods(cells: Sequence[Cell]) -> list[Line]:
    """Two variants at the same beta (and seed), paired over pictures, or over seeds where there are several."""
    lines, groups = [], series(cell for cell in cells if cell.finished and cell.evaluations)
    variants = list(dict.fromkeys(variant for variant, _ in groups))
    for i, one in enumerate(variants):
        for other in variants[i + 1 :]:
            for beta in dict.fromkeys(beta for variant, beta in groups if variant == one and (other, beta) in groups):
                line = _between(groups[one, beta], groups[other, beta])
                lines += [line] if line else []
    return lines


def _between(ones: Sequence[Cell], others: Sequence[Cell]) -> Line | None:
    mates = {cell.seed: cell for cell in others}
    pairs = [(cell, mates[cell.seed]) for cell in ones if cell.seed in mates]
    differences = [d for one, other in pairs if (d := _difference(one, other))]
    if not differences:
        return None
    one, other = pairs[0]
    kls = [[cell.last("eval/kl_path_nats") for cell in side] for side in zip(*pairs, strict=True)]
    means = [sum(value for value in side if value is not None) / len(side) for side in kls]
    found: Estimate | Interval | None = (
        differences[0] if len(differences) == 1 else t_interval([d.mean for d in differences])
    )
    how = (
        f"paired over {differences[0].n} {sampled([one])}, one seed"
        if len(differences) == 1
        else f"{len(differences)} seeds, 95 % t interval"
    )
    text = f"reward {with_error(found)} ({how}) at KL {nats(means[0])} against {nats(means[1])} nats."
    if found and not found.clear:
        text += " No clear difference."
    return Line(tone(found), f"{one.variant} − {other.variant} at β\u00a0{show(one.beta)}", text)


def _difference(one: Cell, other: Cell) -> Estimate | None:
    after, before = (cell.evaluations[-1].samples.get("reward") for cell in (one, other))
    return paired(before, after) if after and before and len(after) == len(before) else None


def table(sweep: Sweep) -> str:
    """The sweep in a terminal: a line per cell, in plan order, under its prompt. `gap` where some cell has one."""
    known = has_gaps(sweep)
    names = heads(known)
    blocks = [f"sweep {sweep.name}: {counts(sweep)}"]
    for cells in sweep.prompts.values():
        rows = [names, *(columns(cell, known) for cell in cells)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        text = [
            "  ".join(
                v.ljust(w) if i in (0, 3) else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        heading = f"\n{one_line(cells[0].prompt_text)}  ({one_line(cells[0].prompt)})"
        blocks.append("\n".join([heading, *(line.rstrip() for line in text)]))
    legend = "reward: step 0 → last; change, judge: over step 0; KL: path KL in nats; s: seconds of training."
    gaps = ["gap: J* − J at the last evaluation, exact, in the reward's units."] * known
    return "\n".join([*blocks, "", legend, *gaps, seeds_note(sweep)])


def has_gaps(sweep: Sweep) -> bool:
    """Whether some cell has an exact gap, and so the table a column for it."""
    return any(cell.newest(theory.GAP) is not None for cell in sweep.cells)


def heads(gaps: bool) -> tuple[str, ...]:
    """The titles of the table of a sweep."""
    return ("method", "β", "seed", "state", "reward", "change", "judge", "KL", *["gap"] * gaps, "s")


def columns(cell: Cell, gaps: bool) -> tuple[str, ...]:
    """One cell in that table."""
    start, end = cell.first("eval/reward_mean"), cell.last("eval/reward_mean")
    state = cell.state if cell.finished or cell.step is None else f"{cell.state} @{cell.step}"
    return (
        one_line(cell.variant),
        show(cell.beta),
        show(cell.seed),
        state,
        "–" if start is None else f"{plain(start)} → {plain(end)}",
        with_error(cell.change("reward")),
        with_error(cell.change("judge")),
        nats(cell.last("eval/kl_path_nats")),
        *[tiny(cell.newest(theory.GAP))] * gaps,
        plain(cell.spent("budget/seconds"), 0),
    )


def counts(sweep: Sweep) -> str:
    """ "16 cells: 14 done, 1 failed, 1 new"."""
    number = len(sweep.cells)
    return f"{number} cell{'s' * (number != 1)}: " + ", ".join(f"{n} {state}" for state, n in sweep.counts.items())


def seeds_note(sweep: Sweep) -> str:
    """What the errors mean, and what they cannot."""
    seeds = len({cell.seed for cell in sweep.cells})
    over = f"± is one paired standard error over the evaluation {sampled(sweep.cells)} (same noise before and after)."
    if seeds == 1:
        return f"{over} {ONE_SEED}"
    return f"{over} Means over seeds carry 95 % t intervals."
