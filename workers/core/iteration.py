"""What Algorithm 1 of PI-FT shares between its exact forms (lq.py, grid.py): when it works, and the step it takes.

At step t the iteration u <- Phi(u) of eq. 18 is linear near its fixed point, with the eigenvalues lambda of
rho_t E Hess V_{t+1}, rho_t = sigma_t^2 / beta_t (all factors alpha cancel):

    well posed      max lambda < 1          one-sided: J is concave in the control at t
    contracts       kappa_t = max |lambda| < 1      two-sided: a strongly concave reward may be well posed and diverge
    damped step     u <- u + eta (Phi(u) - u) has the factors 1 - eta (1 - lambda); eta = 2 / (2 - min - max) is best
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class IllPosed(ValueError):
    """J has no maximum over the control of some step: E Hess V_{t+1} reaches beta_t / sigma_t^2."""


class Diverges(ValueError):
    """The undamped iteration of eq. 18 would not converge: kappa_t >= 1."""


class Step(NamedTuple):
    """The step taken at one t: kappa_t, the damping eta (1 = eq. 18 as printed) and the factor its error shrinks by."""

    kappa: float
    eta: float
    factor: float


def choose_step(low: float, high: float, damping: str | float | None) -> Step | None:
    """The step for eigenvalues of rho E Hess V within [low, high], high < 1; None where it would diverge.

    `damping`: "auto" damps, with the best eta, where kappa >= 1; None never damps; a number in (0, 1] is eta itself.
    """
    kappa = max(abs(low), abs(high))
    if damping == "auto":
        eta = 1.0 if kappa < 1 else 2 / (2 - low - high)
    elif damping is None:
        eta = 1.0
    elif not isinstance(damping, str) and 0 < damping <= 1:
        eta = float(damping)
    else:
        raise ValueError(f"damping={damping!r} is neither 'auto', None nor a number in (0, 1]; write damping='auto'")
    factor = max(abs(1 - eta * (1 - low)), abs(1 - eta * (1 - high)))
    return Step(kappa, eta, factor) if factor < 1 else None


def step_at(
    t: int, low: float, high: float, beta: float, damping: str | float | None, works: Callable[[float], bool]
) -> Step:
    """The step at t, for eigenvalues of rho_t E Hess V_{t+1} within [low, high]; `works` tells whether a factor on beta
    would do. Raises IllPosed and Diverges."""
    if high >= 1:
        raise ill_posed(t, high, beta, works)
    step = choose_step(low, high, damping)
    if step is None:
        raise diverges(t, max(-low, high), beta, works)
    return step


def step_counts(inner_steps: int | Sequence[int], T: int) -> list[int]:
    """m_t for each t. Raises ValueError where there are not T of them, or a negative one."""
    counts = [int(inner_steps)] * T if isinstance(inner_steps, int) else [int(m) for m in inner_steps]
    if len(counts) != T or min(counts, default=0) < 0:
        raise ValueError(f"inner_steps={inner_steps!r} is neither a whole number nor {T} of them, each at least 0")
    return counts


RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "alpha": ("between 0 and 1", lambda value: 0 < value < 1),
    "sigma": ("at least 0", lambda value: 0 <= value < math.inf),
    "beta": ("above 0", lambda value: 0 < value < math.inf),
}


def range_problems(name: str, values: Sequence[float]) -> list[str]:
    """What is wrong with the first entry of alpha, sigma or beta that is out of its range."""
    bounds, fits = RANGES[name]
    wrong = [(t, value) for t, value in enumerate(values) if not fits(value)][:1]
    return [f"{name}[{t}]={value:g} is out of range; it is finite and {bounds}" for t, value in wrong]


def ill_posed(t: int, kappa: float, beta: float, works: Callable[[float], bool]) -> IllPosed:
    """The error for step t, whose rho_t E Hess V_{t+1} reaches `kappa` >= 1."""
    return IllPosed(
        f"the problem is ill-posed at step t={t}: kappa={kappa:.4g} >= 1 at beta={beta:.4g}, so that E Hess V_{{t+1}} "
        f"reaches beta_t/sigma_t^2 and J grows without bound; {_advice(beta, works)}"
    )


def no_tilt(t: int, share: float, beta: float, works: Callable[[float], bool]) -> IllPosed:
    """The error for a law of Y_t that e^(V_t/beta) cannot tilt: its normaliser is infinite."""
    return IllPosed(
        f"the law of Y_t, t={t}, cannot be tilted by e^(V_t/beta): Cov(Y_t) Hess V_t / beta reaches kappa={share:.4g} "
        f">= 1 at beta={beta:.4g}, so that its normaliser is infinite; {_advice(beta, works)}"
    )


def diverges(t: int, kappa: float, beta: float, works: Callable[[float], bool]) -> Diverges:
    """The error for step t, where the chosen step of eq. 18 would diverge."""
    return Diverges(
        f"the undamped iteration diverges at step t={t}: kappa={kappa:.4g} >= 1 at beta={beta:.4g}; write "
        f"damping='auto' (the problem itself is well posed), or {_advice(beta, works)}"
    )


def _advice(beta: float, works: Callable[[float], bool]) -> str:
    scale = smallest_scale(works)
    if scale is None:
        return "no larger beta that was tried works"
    return f"the smallest beta that works is {round_up(scale * beta)} (all beta_t times {round_up(scale)})"


def smallest_scale(works: Callable[[float], bool], largest: float = 2.0**40) -> float | None:
    """The smallest factor >= 1 on beta at which `works(factor)`, to 4 digits; None where none up to `largest` does."""
    high = 2.0
    while not works(high):
        high *= 2
        if high > largest:
            return None
    low = high / 2
    while high / low > 1 + 1e-4:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def round_up(value: float) -> str:
    """Four digits, never below `value`."""
    shown = f"{value:.4g}"
    return shown if float(shown) >= value else f"{value * (1 + 1e-3):.4g}"
