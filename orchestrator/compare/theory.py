"""What the trials of models with a known optimum journal (model=lq, model=mixture), made ready for figures and tables.

    theory/gap                J* - J(theta), exact, in reward units; at convergence rounding may turn its sign
    theory/kappa_max          the largest contraction factor kappa_t of the paper's eq. 18
    algorithm_1/log10_rate    of Algorithm 1: the predicted change of log10(theory/gap) in an inner iteration
    dpok/gap_fixed_point      of DPOK as published: the gap of the fixed point that it converges to
    theory/error_continuous   sup over |y| <= 3 of |V_0 of the chain - V of continuous time|, in reward units
    theory/tv_ideal           total variation between the optimum's terminal law and the ideal tilt

All but the gap are constants of the problem. Nothing here draws: figures.py does, verdict.py and tables.py write.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.compare.frame import Cell, Sweep, show

GAP = "theory/gap"
KAPPA = "theory/kappa_max"
RATE = "algorithm_1/log10_rate"
FIXED_POINT = "dpok/gap_fixed_point"
INITIAL_KL = "eval/kl_initial_nats"
ERRORS = {"theory/error_continuous": "error of V", "theory/tv_ideal": "total variation"}
"""The two distances to continuous time, in words."""

STEPS = "sampler.steps"
ROUNDING = 1e-13
"""A gap this small beside the cell's first one is rounding: J* - J subtracts two numbers of 16 digits."""
FEWEST = 3
"""How many different T a line needs before it has an order: through two points any power law fits."""


def gap(cell: Cell) -> tuple[float, float] | None:
    """The first and the newest gap of a cell; None before there are two."""
    found = [record.metrics[GAP] for record in cell.records if GAP in record.metrics]
    return (found[0], found[-1]) if len(found) > 1 else None


def above_rounding(points: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """The points (x, gap) that a log axis can show: positive, and above the rounding of the first positive gap."""
    first = next((value for _, value in points.values() if value > 0), math.inf)
    return {step: (x, value) for step, (x, value) in points.items() if value > ROUNDING * first}


def fixed_points(sweep: Sweep, cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """(place of beta, gap of DPOK's own fixed point), each once; only what a log axis can show."""
    found = ((sweep.betas.index(cell.beta), cell.newest(FIXED_POINT)) for cell in cells)
    return list(dict.fromkeys((beta, value) for beta, value in found if value is not None and value > 0))


# --------------------------------------------------------------------------------------------------------- refinement


@dataclass(frozen=True)
class Refined:
    """One distance to continuous time of one beta over T, the number of steps of the chain. `quantity`, `beta`:
    places in ERRORS and in the sweep's betas."""

    quantity: int
    beta: int
    steps: Sequence[float]
    values: Sequence[float]

    @property
    def order(self) -> float | None:
        """The p of value ~ T^-p by least squares in log-log; None with fewer than three T."""
        if len(self.steps) < FEWEST:
            return None
        across, along = ([math.log(v) for v in side] for side in (self.steps, self.values))
        return -statistics.linear_regression(across, along).slope


def refinement(sweep: Sweep, cells: Sequence[Cell]) -> list[Refined]:
    """The distances to continuous time over T, a line for each quantity and all that varies beside T and the seed;
    nothing where fewer than three different T have them."""
    lines: dict[tuple[int, str, int], dict[float, list[float]]] = {}
    for cell in cells:
        steps = (cell.spec.get("sampler") or {}).get("steps")
        others = " ".join([cell.method, *(show(value) for name, value in cell.extras.items() if name != STEPS)])
        for quantity, metric in enumerate(ERRORS):
            value = cell.newest(metric)
            if steps and value is not None and value > 0:
                line = lines.setdefault((quantity, others, sweep.betas.index(cell.beta)), {})
                line.setdefault(float(steps), []).append(value)
    if len({steps for line in lines.values() for steps in line}) < FEWEST:
        return []
    return [
        Refined(quantity, beta, sorted(line), [statistics.geometric_mean(line[steps]) for steps in sorted(line)])
        for (quantity, _, beta), line in sorted(lines.items())
    ]


def orders(lines: Sequence[Refined]) -> str:
    """ "0.97 (error of V), 0.95 (total variation)": the fitted orders, from lowest to highest over the lines."""
    parts = []
    for quantity, name in enumerate(ERRORS.values()):
        found = sorted(line.order for line in lines if line.quantity == quantity and line.order is not None)
        ends = list(dict.fromkeys(f"{order:.2f}" for order in (found[0], found[-1]))) if found else []
        parts += [f"{' to '.join(ends)} ({name})"] if ends else []
    return ", ".join(parts)
