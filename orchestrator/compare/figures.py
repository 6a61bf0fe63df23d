"""The figures of a comparison: one small panel per question, the same style in all of them.

What: `panels(sweep, prompt)` lists a prompt's panels; `svg(panel)` draws one for the page (colours are CSS variables,
so that it follows the page's light or dark theme; text is text), `sheet(panels, ...)` draws them all into one PNG.

How to read them: a method is a line style and a marker (told apart in black and white), a beta is a colour of one
sequential ramp (viridis, safe for colour-blind readers). One seed: the line is that seed, the bar at its end is one
paired standard error over pictures. Several seeds: the line is their mean, the band a 95 % t interval, the hair lines
are the seeds.

The KL axis is a square-root axis: where the reward is nearly linear, gain = a'Ca/beta and KL = a'Ca/(2 beta^2)
(mathematics, section 3), so a front is straight there; and KL = 0, the pre-trained model, has a place on it.
"""

from __future__ import annotations

import io
import math
import re
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

from orchestrator.compare.frame import Cell, Sweep, series, show
from orchestrator.compare.statistics import t_interval

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


def _points(cell: Cell, x: str, y: str) -> dict[int, tuple[float, float]]:
    """(x, y) at each evaluation that has both, by step."""
    found = {}
    for record in cell.evaluations:
        across = (
            float(record.step)
            if x == "step"
            else cell.spent(x, record.step)
            if x.startswith("budget/")
            else record.metrics.get(x)
        )
        if across is not None and y in record.metrics:
            found[record.step] = (across, record.metrics[y])
    return found


def curves(sweep: Sweep, cells: Sequence[Cell], x: str, y: str) -> list[Curve]:
    """The curves of a panel. Finished seeds of one (variant, beta) make one curve; a cell that is not finished is its
    own, up to where it came, so that it never bends a mean."""
    found = []
    for (variant, beta), group in series(cells).items():
        place = (sweep.variants.index(variant), sweep.betas.index(beta))
        finished = [cell for cell in group if cell.finished and _points(cell, x, y)]
        if finished:
            found.append(_merged(place, finished, x, y))
        for cell in group:
            points = list(_points(cell, x, y).values())
            if not cell.finished and points:
                xs, ys = _columns(points)
                found.append(Curve(*place, xs, ys, whole=False, broken=cell.state in ("failed", "diverged")))
    return found


def _merged(place: tuple[int, int], cells: Sequence[Cell], x: str, y: str) -> Curve:
    """One curve of the finished seeds: at each step that all of them have, their mean and its 95 % t interval."""
    points = [_points(cell, x, y) for cell in cells]
    if len(cells) == 1:
        change = cells[0].change(_sample(y))
        return Curve(*place, *_columns(list(points[0].values())), bar=change.se if change else None)
    across, means, low, high = [], [], [], []
    for step in [step for step in points[0] if all(step in other for other in points)]:
        span = t_interval([other[step][1] for other in points])
        across.append(math.fsum(other[step][0] for other in points) / len(points))
        means.append(span.mean)
        low.append(span.mean - (span.half or 0.0))
        high.append(span.mean + (span.half or 0.0))
    return Curve(*place, across, means, low, high, [_columns(list(other.values())) for other in points])


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
    reward = f"{_name(cells, 'reward')} reward (its own units)"
    judge = f"{_name(cells, 'judge')} (its own units), not trained on"
    kl = "path KL to the pre-trained model (nats, √ axis)"
    steps, queries = "gradient steps", "reward queries (pictures scored)"
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
        lines = curves(sweep, cells, x, y)
        if lines:
            paint = partial(
                _draw, lines=lines, x_label=x_label, y_label=y_label, front=name == "front", root=name == "kl_steps"
            )
            found.append(Panel(name, titles[name], y_label, notes.get(name, ""), paint))
    gains = _gains(sweep, cells)
    if len({beta for _, beta, *_ in gains}) > 1:
        label = f"change of {reward}"
        paint = partial(_draw_gains, gains=gains, y_label=label)
        found.append(Panel("gain_beta", "Change of reward against β", label, "", paint))
    return found


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
    bars = "bar: one paired standard error over pictures"
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
            axes.plot(curve.x, curve.y, **style, markevery=max(1, math.ceil(len(curve.x) / 7)))
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
    _limits(axes, lines)
    _dress(axes, palette, x_label, y_label)
    if front:
        _join_ends(axes, palette, lines)
        _square_root(axes, "x", max(max(curve.x) for curve in lines))
    if root:
        _square_root(axes, "y", max(max(curve.y) for curve in lines))


def _limits(axes: Axes, lines: list[Curve]) -> None:
    """Frame the lines and as much of the bands as fits in half as much again: a two-seed interval is very wide."""
    values = [value for curve in lines for value in curve.y] + [
        value for curve in lines for _, hair in curve.hairs for value in hair
    ]
    values += [curve.y[-1] + sign * curve.bar for curve in lines if curve.bar for sign in (-1, 1)]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    bottom = max(min([low, *(value for curve in lines for value in curve.low)]), low - span / 4)
    top = min(max([high, *(value for curve in lines for value in curve.high)]), high + span / 4)
    axes.set_ylim(bottom - 0.06 * span, top + 0.06 * span)


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


def sheet(
    found: Sequence[Panel], path: Path, *, heading: str, note: str, variants: Sequence[str], betas: Sequence[Any]
) -> None:
    """All panels of a prompt with their legend as one PNG on white; `note` says what bars and bands are."""
    palette, columns = print_palette(len(betas)), min(3, len(found))
    rows = math.ceil(len(found) / columns)
    with rc_context(RC):
        width, height = WIDTH * columns, HEIGHT * rows + 0.95
        figure = Figure(figsize=(width, height), facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, found, strict=False):
            panel.draw(axes, palette)
        for axes in list(grid.flat)[len(found) :]:
            axes.set_visible(False)
        room = max(_label_room(axes) for axes in list(grid.flat)[: len(found)])
        gap = (room + 0.15) / ((width - columns * room - 0.15 * columns) / columns)
        figure.subplots_adjust(room / width, 0.85 / height, 1 - 0.15 / width, 1 - 0.75 / height, gap, 0.42)
        figure.suptitle(
            heading, x=0.12 / width, y=1 - 0.08 / height, va="top", ha="left", color=palette.ink, fontsize=10
        )
        handles = [Line2D([], [], label=name, **_style(i, palette.ink, palette)) for i, name in enumerate(variants)]
        handles += [
            Line2D([], [], label=f"β {show(beta)}", color=palette.betas[i], linewidth=4) for i, beta in enumerate(betas)
        ]
        figure.text(0.12 / width, 1 - 0.28 / height, note, ha="left", va="top", color=palette.quiet)
        figure.legend(
            handles=handles,
            loc="lower left",
            ncols=8,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.4,
            borderaxespad=0.6,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
