"""The figures of a comparison: one small panel per question, the same style in all of them.

What: `panels(sweep, prompt)` lists a prompt's panels; `svg(panel)` draws one for the page (colours are CSS variables,
so that it follows the page's light or dark theme; text is text), `sheet(panels, ...)` draws them all into one PNG.

How to read them: a method is a line style and a marker (told apart in black and white), a beta is a colour of one
sequential ramp (viridis, safe for colour-blind readers). One seed: the line is that seed, the bar at its end is one
paired standard error over pictures. Several seeds: the line is their mean, the band a 95 % t interval, the hair lines
are the seeds.

The KL axis is a square-root axis: where the reward is nearly linear, gain = a'Ca/beta and KL = a'Ca/(2 beta^2)
(mathematics, section 3), so a front is straight there; and KL = 0, the pre-trained model, has a place on it.

Trials on models with a known optimum (theory.py) get the exact gap J* - J on a log axis, where a constant factor per
step is a straight line. Mean and interval over seeds are taken of log10 there, so that a band stays positive.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from orchestrator.compare import theory
from orchestrator.compare.frame import Cell, Sweep, sampled, series, show
from orchestrator.compare.statistics import t_interval
from workers.text import one_line

WIDTH, HEIGHT = 3.45, 2.65
"""Inches of a panel: at the width of a phone its 8.5 pt text is read at about 11 px."""
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (4, 1.8)),
    (0, (1, 1.4)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (2.5, 1.2)),
    (0, (8, 2, 2, 2, 2, 2)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "pift",
}


# ----------------------------------------------------------------------------------------------------------- colours


@dataclass(frozen=True)
class Palette:
    """What to draw with: text and axes, quiet text, grid, paper, and one colour per beta."""

    ink: str
    quiet: str
    grid: str
    paper: str
    betas: tuple[str, ...]


def ramp(count: int, dark: bool = False) -> tuple[str, ...]:
    """`count` steps of viridis, cut where it would fade into a white (or, `dark`, a black) page."""
    low, high = (0.42, 0.98) if dark else (0.05, 0.74)
    places = [low + (high - low) * i / max(count - 1, 1) for i in range(count)] if count > 1 else [(low + high) / 2]
    return tuple(to_hex(colormaps["viridis"](place)) for place in places)


def print_palette(count: int) -> Palette:
    return Palette("#1f2328", "#6b7280", "#e5e7eb", "#ffffff", ramp(count))


def page_palette(count: int) -> Palette:
    """Stand-ins that `svg` replaces by CSS variables."""
    return Palette(
        "#010101", "#020202", "#030303", "#040404", tuple(f"#05{i // 256:02x}{i % 256:02x}" for i in range(count))
    )


def _themed(text: str) -> str:
    """Stand-in colours to variables: --ink, --quiet, --grid, --paper, --b0, --b1, ..."""
    names = {"#010101": "--ink", "#020202": "--quiet", "#030303": "--grid", "#040404": "--paper"}
    text = re.sub("#0[1-4]0[1-4]0[1-4]", lambda found: f"var({names.get(found[0], '--ink')})", text)
    return re.sub("#05([0-9a-f]{4})", lambda found: f"var(--b{int(found[1], 16)})", text)


# ------------------------------------------------------------------------------------------------------------ curves


@dataclass(frozen=True)
class Curve:
    """One (variant, beta) of a panel. `low`, `high`: the band; `hairs`: the single seeds; `bar`: half an error bar at
    the end; `whole`: of finished cells (else thin and without markers); `broken`: it failed, a cross marks where."""

    variant: int
    beta: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    hairs: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    bar: float | None = None
    whole: bool = True
    broken: bool = False


Points = dict[int, tuple[float, float]]
"""(x, y) by step."""


def _points(cell: Cell, x: str, y: str, log: bool = False) -> Points:
    """(x, y) at each record that has both; with `log` only what a log axis can show of a gap."""
    found = {}
    for record in (record for record in cell.records if y in record.metrics):
        across = (
            float(record.step)
            if x == "step"
            else cell.spent(x, record.step)
            if x.startswith("budget/")
            else record.metrics.get(x)
        )
        if across is not None:
            found[record.step] = (across, record.metrics[y])
    return theory.above_rounding(found) if log else found


def curves(sweep: Sweep, cells: Sequence[Cell], x: str, y: str, log: bool = False) -> list[Curve]:
    """The curves of a panel. Finished seeds of one (variant, beta) make one curve; a cell that is not finished is its
    own, up to where it came, so that it never bends a mean."""
    found = []
    for (variant, beta), group in series(cells).items():
        place = (sweep.variants.index(variant), sweep.betas.index(beta))
        finished = [cell for cell in group if cell.finished and _points(cell, x, y, log)]
        if finished and (curve := _merged(place, finished, x, y, log)).x:
            found.append(curve)
        for cell in group:
            points = list(_points(cell, x, y, log).values())
            if not cell.finished and points:
                xs, ys = _columns(points)
                found.append(Curve(*place, xs, ys, whole=False, broken=cell.state in ("failed", "diverged")))
    return found


def _merged(place: tuple[int, int], cells: Sequence[Cell], x: str, y: str, log: bool) -> Curve:
    """One curve of the finished seeds: at each step that all of them have, their mean and its 95 % t interval, of the
    values or (`log`) of their log10."""
    points = [_points(cell, x, y, log) for cell in cells]
    if len(cells) == 1:
        change = cells[0].change(_sample(y))
        return Curve(*place, *_columns(list(points[0].values())), bar=change.se if change else None)
    there, back = (math.log10, _ten) if log else (float, float)
    across, means, low, high = [], [], [], []
    for step in [step for step in points[0] if all(step in other for other in points)]:
        span = t_interval([there(other[step][1]) for other in points])
        across.append(math.fsum(other[step][0] for other in points) / len(points))
        means.append(back(span.mean))
        low.append(back(span.mean - (span.half or 0.0)))
        high.append(back(span.mean + (span.half or 0.0)))
    return Curve(*place, across, means, low, high, [_columns(list(other.values())) for other in points])


def _ten(exponent: float) -> float:
    """10^exponent, as far as floats go: the interval of two seeds may be wider."""
    return 10.0 ** min(max(exponent, -300.0), 300.0)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _sample(metric: str) -> str:
    return {"eval/reward_mean": "reward", "eval/judge_mean": "judge", "eval/kl_path_nats": "kl_path_nats"}.get(
        metric, ""
    )


# ------------------------------------------------------------------------------------------------------------ panels


@dataclass(frozen=True)
class Panel:
    """A small figure: `name` for its ids, `title` and `y_label` above it, `note` under it; `draw` paints it on axes."""

    name: str
    title: str
    y_label: str
    note: str
    draw: Callable[[Axes, Palette], None]


def panels(sweep: Sweep, prompt: str) -> list[Panel]:
    """What there is to draw of a prompt: a panel whose quantity nobody journaled is left out."""
    cells = sweep.prompts[prompt]
    found = _measured(sweep, cells)
    gains, label = _gains(sweep, cells), f"change of {_reward(cells)}"
    if len({beta for _, beta, *_ in gains}) > 1:
        paint = partial(_draw_gains, gains=gains, y_label=label)
        found.append(Panel("gain_beta", "Change of reward against β", label, "", paint))
    return found + [panel for draw in (_inner, _training, _refinement) if (panel := draw(sweep, cells))]


def _measured(sweep: Sweep, cells: Sequence[Cell]) -> list[Panel]:
    """The panels of what every model measures."""
    reward = _reward(cells)
    judge = f"{_name(cells, 'judge')} (its own units), not trained on"
    kl = "path KL to the pre-trained model (nats, √ axis)"
    steps, queries = "gradient steps", f"reward queries ({sampled(cells)} scored)"
    wanted = [
        ("reward_steps", reward, steps, "step", "eval/reward_mean"),
        ("kl_steps", kl, steps, "step", "eval/kl_path_nats"),
        ("front", reward, kl, "eval/kl_path_nats", "eval/reward_mean"),
        ("reward_queries", reward, queries, "budget/reward_queries", "eval/reward_mean"),
        ("judge_steps", judge, steps, "step", "eval/judge_mean"),
    ]
    titles = {
        "reward_steps": "Reward over training",
        "kl_steps": "Distance from the pre-trained model",
        "front": "Reward against KL",
        "reward_queries": "Reward per reward query",
        "judge_steps": "Held-out judge over training",
    }
    notes = {
        "front": "Line: the path over training. Large marker: its end. Grey: the ends of one method joined over β."
    }
    found = []
    for name, y_label, x_label, x, y in wanted:
        every = curves(sweep, cells, x, y)
        lines = [curve for curve in every if max(curve.x) > 0] if x.startswith("budget/") else every
        if lines:
            paint = partial(
                _draw, lines=lines, x_label=x_label, y_label=y_label, front=name == "front", root=name == "kl_steps"
            )
            found.append(Panel(name, titles[name], y_label, notes.get(name) or _absent(sweep, every, lines), paint))
    return found


def _absent(sweep: Sweep, every: Sequence[Curve], lines: Sequence[Curve]) -> str:
    """Which methods have no curve in the panel because they never spent what it counts."""
    idle = sorted({curve.variant for curve in every} - {curve.variant for curve in lines})
    return f"Without {', '.join(sweep.variants[i] for i in idle)}: none spent." if idle else ""


def _reward(cells: Sequence[Cell]) -> str:
    return f"{_name(cells, 'reward')} reward (its own units)".strip()


GAP_LABEL = "gap J* − J (reward units, log axis)"


def _inner(sweep: Sweep, cells: Sequence[Cell]) -> Panel | None:
    """Algorithm 1: the gap per inner iteration, and the slope that the theory predicts for it."""
    iterated = [cell for cell in cells if cell.newest(theory.RATE) is not None]
    lines = curves(sweep, iterated, "step", theory.GAP, log=True)
    if not lines:
        return None
    predicted = _predicted(sweep, iterated, lines)
    paint = partial(_draw_gap, lines=lines, x_label="inner iterations (Algorithm 1)", predicted=predicted)
    note = "Dashed grey: the predicted slope κ² per iteration." if predicted else ""
    title = "Gap to the optimum per inner iteration"
    return Panel("gap_inner", title, GAP_LABEL, _with_seeds(note, lines), paint)


def _training(sweep: Sweep, cells: Sequence[Cell]) -> Panel | None:
    """The other methods: the gap over training, and where DPOK as published is heading instead."""
    trained = [cell for cell in cells if cell.newest(theory.RATE) is None]
    lines = curves(sweep, trained, "step", theory.GAP, log=True)
    if not lines:
        return None
    levels = theory.fixed_points(sweep, trained)
    paint = partial(_draw_gap, lines=lines, x_label="gradient steps", levels=levels)
    note = "Horizontal, dotted: the gap of DPOK's own fixed point as published." if levels else ""
    return Panel("gap_steps", "Gap to the optimum over training", GAP_LABEL, _with_seeds(note, lines), paint)


def _with_seeds(note: str, lines: Sequence[Curve]) -> str:
    bands = "Mean and band over seeds: of log10." if any(curve.hairs for curve in lines) else ""
    return f"{note} {bands}".strip()


Segment = tuple[Sequence[float], Sequence[float]]


def _predicted(sweep: Sweep, cells: Sequence[Cell], lines: Sequence[Curve]) -> list[Segment]:
    """Of each (variant, beta) the predicted line: through its first point after step 0 (the first iteration starts
    anywhere, the rate is of those that follow), as far as the panel reaches or down to rounding."""
    found: dict[tuple[int, int], Segment] = {}
    end = max(max(curve.x) for curve in lines)
    rates = {
        (sweep.variants.index(variant), sweep.betas.index(beta)): group[0].newest(theory.RATE)
        for (variant, beta), group in series(cells).items()
    }
    for curve in lines:
        after = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x >= 1]
        rate = rates.get((curve.variant, curve.beta))
        if after and rate is not None and (curve.variant, curve.beta) not in found:
            x, y = after[0]
            floor = math.log10(theory.ROUNDING * curve.y[0] / y)
            reach = min(end, x + floor / rate) if rate < 0 else end
            found[curve.variant, curve.beta] = ([x, reach], [y, y * _ten(rate * (reach - x))])
    return list(found.values())


def _refinement(sweep: Sweep, cells: Sequence[Cell]) -> Panel | None:
    """The distance to continuous time over the number of steps of the chain."""
    lines = theory.refinement(sweep, cells)
    if not lines:
        return None
    label = "● error of V (reward units), □ TV, log axis"
    note = "● largest error of V₀, □ total variation to the ideal tilt. Dashed grey: slope −1."
    note += f" Fitted order: {found}." if (found := theory.orders(lines)) else ""
    paint = partial(_draw_refinement, lines=lines, y_label=label)
    return Panel("refinement", "Refinement towards continuous time", label, note, paint)


def _name(cells: Sequence[Cell], component: str) -> str:
    for cell in cells:
        if cell.spec.get(component):
            return str(cell.spec[component].get("name", ""))
    return ""


def _gains(sweep: Sweep, cells: Sequence[Cell]) -> list[tuple[int, float, float, float | None, int]]:
    """(variant, beta, change of reward, half error bar, colour) of the finished cells: paired standard error for one
    seed, 95 % t interval for several."""
    found = []
    for (variant, beta), group in series(cells).items():
        changes = [change for cell in group if cell.finished and (change := cell.change("reward"))]
        if changes and isinstance(beta, int | float):
            span = t_interval([change.mean for change in changes])
            half = changes[0].se if len(changes) == 1 else span.half
            found.append((sweep.variants.index(variant), float(beta), span.mean, half, sweep.betas.index(beta)))
    return found


def bars_note(cells: Sequence[Cell]) -> str:
    """What bars, bands and crosses are in the figures of these cells."""
    several = len({cell.seed for cell in cells}) > 1
    bars = f"bar: one paired standard error over {sampled(cells)}"
    if several:
        bars = (
            "bands and bars: 95 % t interval over seeds (one finished seed: paired standard error); hair lines: seeds"
        )
    return bars + (
        "; cross: failed or diverged there" if any(cell.state in ("failed", "diverged") for cell in cells) else ""
    )


# ----------------------------------------------------------------------------------------------------------- drawing


def _style(variant: int, colour: str, palette: Palette) -> dict[str, Any]:
    """Line style, marker (filled and open in turn) and colour of a variant."""
    face = colour if variant % 2 == 0 else palette.paper
    return {
        "linestyle": DASHES[variant % len(DASHES)],
        "marker": MARKERS[variant % len(MARKERS)],
        "color": colour,
        "markerfacecolor": face,
        "markeredgecolor": colour,
        "markersize": 4,
        "markeredgewidth": 1.1,
    }


def _draw(
    axes: Axes, palette: Palette, *, lines: list[Curve], x_label: str, y_label: str, front: bool, root: bool
) -> None:
    for curve in lines:
        _paint(axes, palette, curve, front)
    _limits(axes, lines)
    _dress(axes, palette, x_label, y_label)
    if front:
        _join_ends(axes, palette, lines)
        _square_root(axes, "x", max(max(curve.x) for curve in lines))
    if root:
        _square_root(axes, "y", max(max(curve.y) for curve in lines))


def _paint(axes: Axes, palette: Palette, curve: Curve, front: bool = False, faint: bool = False) -> None:
    """One curve with its hairs, band, bar and cross; on a front its end is what counts. `faint`: its line is pale, for
    what is predicted to be seen on it."""
    colour = palette.betas[curve.beta]
    style = _style(curve.variant, colour, palette) | ({} if curve.whole else {"marker": "", "linewidth": 0.9})
    for across, values in curve.hairs:
        axes.plot(across, values, color=colour, linewidth=0.5, alpha=0.45)
    if len(curve.low) and not front:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    if front:
        axes.plot(curve.x, curve.y, **style | {"marker": "", "linewidth": 1.0, "alpha": 0.6})
        axes.plot(curve.x[-1:], curve.y[-1:], **style | {"markersize": 6.5, "zorder": 4})
    else:
        every = max(1, math.ceil(len(curve.x) / (12 if faint else 7)))
        axes.plot(curve.x, curve.y, **style | ({"marker": "", "alpha": 0.4} if faint else {}), markevery=every)
        if faint:
            axes.plot(curve.x, curve.y, **style | {"linestyle": "", "zorder": 3}, markevery=every)
    if curve.bar:
        axes.errorbar(
            curve.x[-1:],
            curve.y[-1:],
            yerr=curve.bar,
            color=colour,
            elinewidth=1.1,
            capsize=2,
            fmt="none",
            zorder=3,
        )
    if curve.broken:
        axes.plot(
            curve.x[-1:], curve.y[-1:], marker="x", color=palette.ink, markersize=7, markeredgewidth=1.6, zorder=5
        )


def _draw_gap(
    axes: Axes,
    palette: Palette,
    *,
    lines: list[Curve],
    x_label: str,
    predicted: Sequence[Segment] = (),
    levels: Sequence[tuple[int, float]] = (),
) -> None:
    """Gaps on a log axis. `predicted`: slopes of the theory; `levels`: (place of beta, gap of a fixed point)."""
    for curve in lines:
        _paint(axes, palette, curve, faint=bool(predicted))
    for across, values in predicted:
        _theory(axes, palette, across, values)
    for beta, level in levels:
        axes.axhline(level, color=palette.betas[beta], linewidth=1.1, linestyle=(0, (1, 2.4)), zorder=1)
    _dress(axes, palette, x_label, GAP_LABEL)
    _log_y(axes, lines, [level for _, level in levels])


def _theory(axes: Axes, palette: Palette, across: Sequence[float], values: Sequence[float]) -> None:
    """What is predicted: thin, dashed and grey, above the lines and under the markers."""
    axes.plot(across, values, color=palette.quiet, linewidth=1.0, linestyle=(0, (3.6, 2.4)), zorder=2.5)


def _draw_refinement(axes: Axes, palette: Palette, *, lines: Sequence[theory.Refined], y_label: str) -> None:
    curved = [Curve(line.quantity, line.beta, line.steps, line.values) for line in lines]
    for curve in curved:
        axes.plot(curve.x, curve.y, **_style(curve.variant, palette.betas[curve.beta], palette))
    every = sorted({steps for curve in curved for steps in curve.x})
    above = 1.4 * max(value * steps for curve in curved for steps, value in zip(curve.x, curve.y, strict=True))
    slope = [above / steps for steps in every]
    _theory(axes, palette, every, slope)
    _dress(axes, palette, "T, steps of the chain (log axis)", y_label)
    _log_y(axes, curved, slope)
    axes.set_xscale("log")
    axes.set_xlim(every[0] / 1.15, every[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(apart(every)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(float(value))))


def _limits(axes: Axes, lines: list[Curve]) -> None:
    axes.set_ylim(*_frame(lines))


def _frame(lines: Sequence[Curve], scale: Callable[[float], float] = float) -> tuple[float, float]:
    """Frame the lines and as much of the bands as fits in half as much again: a two-seed interval is very wide. All
    in the units of `scale`."""
    values = [scale(value) for curve in lines for value in curve.y] + [
        scale(value) for curve in lines for _, hair in curve.hairs for value in hair
    ]
    values += [scale(curve.y[-1] + sign * curve.bar) for curve in lines if curve.bar for sign in (-1, 1)]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    bottom = max(min([low, *(scale(value) for curve in lines for value in curve.low)]), low - span / 4)
    top = min(max([high, *(scale(value) for curve in lines for value in curve.high)]), high + span / 4)
    return bottom - 0.06 * span, top + 0.06 * span


def _log_y(axes: Axes, lines: Sequence[Curve], levels: Sequence[float] = ()) -> None:
    """A log axis that frames the curves, in log10 as `_limits` does it, and the levels."""
    bottom, top = _frame(lines, math.log10)
    places = [math.log10(level) for level in levels]
    low, high = min([bottom, *(place - 0.1 for place in places)]), max([top, *(place + 0.1 for place in places)])
    axes.set_ylim(_ten(low), _ten(high))
    axes.set_yscale("log")  # after the limits, or it would look for its own
    ticks = log_ticks(_ten(low), _ten(high))
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    wide = not all(1e-3 <= tick < 1e4 for tick in ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value) if wide else f"{value:g}"))


def _join_ends(axes: Axes, palette: Palette, lines: list[Curve]) -> None:
    """The front: the ends of one method joined over beta, quietly; and a ring on the pre-trained model."""
    for variant in sorted({curve.variant for curve in lines}):
        ends = sorted((curve.x[-1], curve.y[-1]) for curve in lines if curve.variant == variant and curve.whole)
        if len(ends) > 1:
            axes.plot(
                *zip(*ends, strict=True),
                color=palette.quiet,
                linewidth=0.9,
                alpha=0.6,
                linestyle=DASHES[variant % len(DASHES)],
                zorder=1,
            )
    for start in {(curve.x[0], curve.y[0]) for curve in lines if curve.x[0] == 0}:
        axes.plot(
            *start,
            marker="o",
            markersize=5,
            markerfacecolor=palette.paper,
            markeredgecolor=palette.ink,
            linestyle="",
            zorder=5,
        )


def _draw_gains(
    axes: Axes, palette: Palette, *, gains: list[tuple[int, float, float, float | None, int]], y_label: str
) -> None:
    axes.axhline(0, color=palette.quiet, linewidth=0.8)
    variants = sorted({variant for variant, *_ in gains})
    for variant in variants:
        shift = 1.03 ** (2 * variants.index(variant) - len(variants) + 1)
        points = sorted((beta * shift, mean, half, colour) for v, beta, mean, half, colour in gains if v == variant)
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=palette.quiet,
            linewidth=0.9,
            linestyle=DASHES[variant % len(DASHES)],
        )
        for beta, mean, half, place in points:
            colour = palette.betas[place]
            axes.errorbar(
                [beta],
                [mean],
                yerr=[half or 0],
                **_style(variant, colour, palette) | {"markersize": 5.5},
                elinewidth=1.1,
                capsize=2,
            )
    axes.set_xscale("log")
    betas = sorted({beta for _, beta, *_ in gains})
    _dress(axes, palette, "β (reward units per nat)", y_label)
    axes.xaxis.set_major_locator(FixedLocator(betas))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(float(value))))
    axes.set_xlim(betas[0] / 1.5, betas[-1] * 1.5)


def _dress(axes: Axes, palette: Palette, x_label: str, y_label: str) -> None:
    """Axes in ink, a quiet grid, the unit of y above its axis where it can be read without turning the head."""
    axes.set_title(y_label, color=palette.ink, x=0)
    axes.set_xlabel(x_label, color=palette.ink)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.tick_params(colors=palette.quiet)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(palette.quiet)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # steps and queries; the others set their own
    for axis in (axes.xaxis, axes.yaxis):
        plain = ScalarFormatter(useOffset=False)
        plain.set_scientific(False)
        axis.set_major_formatter(plain)


def _square_root(axes: Axes, which: str, highest: float) -> None:
    """A square-root axis from 0, ticks at 1, 2, 5 times powers of ten where they do not crowd."""
    scale = axes.set_xscale if which == "x" else axes.set_yscale
    scale("function", functions=(lambda v: _signed(v, 0.5), lambda v: _signed(v, 2.0)))
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(root_ticks(highest)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top = (highest or 1.0) * 1.12
    (axes.set_xlim if which == "x" else axes.set_ylim)(-top / 900, top)


def _signed(values: Any, power: float) -> Any:
    import numpy

    return numpy.sign(values) * numpy.abs(values) ** power


def root_ticks(highest: float) -> list[float]:
    """0 and round numbers up to `highest`, at least 15 % of a square-root axis apart."""
    if highest <= 0:
        return [0.0]
    top, decade = math.sqrt(highest), math.floor(math.log10(highest))
    ticks, last = [], math.inf
    for exponent in (decade, decade - 1, decade - 2):
        for lead in (5, 2, 1):
            place = math.sqrt(lead * 10.0**exponent)
            if place <= top and last - place >= 0.15 * top and place >= 0.15 * top:
                ticks.append(lead * 10.0**exponent)
                last = place
    return [0.0, *reversed(ticks)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers of a log axis: at most six powers of ten; with fewer than three, 1, 3 or 1, 2, 5 times them too."""
    bottom, top = math.log10(low), math.log10(high)
    powers = list(range(math.ceil(bottom), math.floor(top) + 1))
    if len(powers) > 2:
        every = math.ceil(len(powers) / 6)
        return [10.0**exponent for exponent in powers if exponent % every == 0]
    leads = (1, 2, 5) if top - bottom < 1.6 else (1, 3)
    decades = range(math.floor(bottom), math.floor(top) + 1)
    found = [lead * 10.0**exponent for exponent in decades for lead in leads if low <= lead * 10.0**exponent <= high]
    return found if len(found) > 1 else [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def power(value: float) -> str:
    """10⁻⁵, 3·10⁻⁵: as text, which follows the page's font where mathematics would not."""
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = f"{value / 10.0**exponent:.3g}"
    ten = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if lead == "1" else f"{lead}·{ten}"


def apart(values: Sequence[float]) -> list[float]:
    """Those of the increasing values that can be labelled on a log axis: at least a twelfth of it from each other."""
    kept, room = [values[0]], math.log(values[-1] / values[0]) / 12
    for value in values[1:]:
        if math.log(value / kept[-1]) >= room:
            kept.append(value)
    return kept


# ------------------------------------------------------------------------------------------------------------ output


def _label_room(axes: Axes) -> float:
    """Inches that the tick labels of the y axis need to the left of it."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    longest = max((len(label) for label in axes.yaxis.get_major_formatter().format_ticks(ticks)), default=1)
    return 0.1 + 0.075 * longest


def svg(panel: Panel, betas: int, identity: str) -> str:
    """The panel as an inline <svg>; `identity` keeps its ids apart from those of other panels on the page."""
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH, HEIGHT - 0.2))
        axes = figure.add_subplot()
        panel.draw(axes, page_palette(betas))
        left = _label_room(axes) / WIDTH
        axes.set_position((left, 0.17, 0.99 - left, 0.8))
        axes.set_title("")  # the page says it above the figure
        stream = io.StringIO()
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = (
        re.sub(r'\bid="', f'id="{identity}-', text)
        .replace('href="#', f'href="#{identity}-')
        .replace("url(#", f"url(#{identity}-")
    )
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1" role="img">', text, count=1)
    return _themed(re.sub(r"\n\s*", "\n", text))


TALL, NOTE_LINE, LETTER = 1.95, 0.125, 0.08
"""Inches, on a sheet: the height of a panel's axes, of a line of its note, and the width of a letter above them."""


def _note(panel: Panel) -> list[str]:
    """The panel's note in lines that fit under it."""
    return textwrap.wrap(panel.note, 58)


def _letters(text: str, limit: int = 300) -> str:
    """A text on one line, its $ no beginning of a formula."""
    return one_line(text, limit).replace("$", r"\$")


def _footnote(axes: Axes, panel: Panel, palette: Palette) -> None:
    """The panel's note under its x label, as the page has it under the figure."""
    lines, below = "\n".join(map(_letters, _note(panel))), (0, -31)
    axes.annotate(lines, (0, 0), below, "axes fraction", "offset points", va="top", color=palette.quiet, fontsize=7)


def shown(sweep: Sweep, cells: Sequence[Cell]) -> tuple[dict[int, str], dict[int, str]]:
    """What a legend of these cells names: variants and betas, by their place in the sweep."""
    variants, betas = {cell.variant for cell in cells}, {show(cell.beta) for cell in cells}
    return (
        {i: name for i, name in enumerate(sweep.variants) if name in variants},
        {i: f"β {show(beta)}" for i, beta in enumerate(sweep.betas) if show(beta) in betas},
    )


def sheet(found: Sequence[Panel], path: Path, sweep: Sweep, cells: Sequence[Cell], *, heading: str, note: str) -> None:
    """All panels of a prompt with their legend as one PNG on white; `note` says what bars and bands are."""
    palette, columns = print_palette(len(sweep.betas)), min(3, len(found))
    rows, width = math.ceil(len(found) / columns), WIDTH * columns
    variants, betas = shown(sweep, cells)
    names = [*variants.values(), *betas.values()]
    fitting = max(1, min(8, int(width / (0.75 + 0.075 * max(map(len, names))))))
    feet = [NOTE_LINE * len(_note(panel)) for panel in found]
    last = (rows - 1) * columns
    top, between = 0.75, 0.8 + max(feet[:last], default=0.0)
    low = 0.85 + max(feet[last:]) + 0.2 * (math.ceil(len(names) / fitting) - 1)
    with rc_context(RC):
        height = top + rows * TALL + (rows - 1) * between + low
        figure = Figure(figsize=(width, height), facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, found, strict=False):
            panel.draw(axes, palette)
            _footnote(axes, panel, palette)
        for axes in list(grid.flat)[len(found) :]:
            axes.set_visible(False)
        room = max(_label_room(axes) for axes in list(grid.flat)[: len(found)])
        gap = (room + 0.15) / ((width - columns * room - 0.15 * columns) / columns)
        edges = (room / width, low / height, 1 - 0.15 / width, 1 - top / height)
        figure.subplots_adjust(*edges, wspace=gap, hspace=between / TALL)
        heading = _letters(heading, int(width / LETTER))
        figure.suptitle(
            heading, x=0.12 / width, y=1 - 0.08 / height, va="top", ha="left", color=palette.ink, fontsize=10
        )
        styles = {name: _style(i, palette.ink, palette) for i, name in variants.items()}
        handles = [Line2D([], [], label=_letters(name), **style) for name, style in styles.items()]
        handles += [Line2D([], [], label=name, color=palette.betas[i], linewidth=4) for i, name in betas.items()]
        figure.text(0.12 / width, 1 - 0.28 / height, note, ha="left", va="top", color=palette.quiet)
        figure.legend(
            handles=handles,
            loc="lower left",
            ncols=fitting,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.4,
            borderaxespad=0.6,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # an emoji of a prompt: a box stands for it
            figure.savefig(path, dpi=160)
