"""The figures and numbers of docs/theory.md: Algorithm 1 and its closed forms, computed anew.

    python -m benchmarks.theory --out docs/images  (make figures; two minutes on one core)
    python -m benchmarks.theory --store store      after `pift launch sweep=theory`: theory_sweep.png from its trials

Writes theory_NAME.png for rate, laws, continuous, dpok, divergences, regularity and nearly, and prints the tables that
the page quotes. Everything is float64 and without a random draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.compare import figures, frame
from orchestrator.compare.figures import RC, ramp
from orchestrator.ledger import Store
from workers.core import grid, lq, regularity
from workers.core.continuous import Schedule, solve_hjb
from workers.core.divergence import divergence, normaliser, transformed
from workers.core.mixture import Mixture
from workers.store import write_whole

MIXTURE = Mixture((0.7, 0.3), (-2.0, 2.0), (0.25, 0.25))
GRID = np.linspace(-8, 8, 1601)
SCHEDULE = Schedule()
BETAS = (1.0, 2.0, 4.0)
INK, QUIET = "#1f2328", "#6b7280"
DPOK = {
    "data_mean": [-0.297969511106, -0.527384193033],
    "data_cov": [[1.225041259356, -0.326006094837], [-0.326006094837, 1.180177516476]],
    "reward_Q": [[-0.8, 0.0], [0.0, 0.25]],
    "reward_q": [0.6, -0.4],
}
"""The example of the design notes, section 6."""


def linear(y: Any) -> Any:
    return y


def strided(T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, sigma, abar) of the 1000-step schedule 1e-4 .. 0.02 strided to T, sigma^2 = 1 - alpha."""
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar = table[np.arange(999, -1, -1000 // T)[:T]]
    alpha = abar / np.append(abar[1:], 1.0)
    return alpha, np.sqrt(1 - alpha), abar


def mixture(T: int, beta: Any, reward: Callable[[Any], Any] = linear) -> grid.GridProblem:
    """The two-mode mixture on the strided chain."""
    alpha, sigma, abar = strided(T)
    return grid.grid_problem(alpha, sigma, beta, lambda y, t: MIXTURE.score(y, abar[t]), reward, GRID)


def quadratic(T: int, beta: float) -> lq.LinearQuadratic:
    """The example of the design notes, section 6, at any beta."""
    alpha, sigma, _ = strided(T)
    return lq.gaussian_problem(alpha, sigma, beta, **DPOK)


# ---------------------------------------------------------------------------------------------------------- figures


def rate(axes: list[Axes]) -> list[str]:
    """The control's error per inner step at every t, and the gap of J, by beta, with the predicted slopes."""
    lines = ["| beta | largest kappa_t | largest difference of rate and kappa_t | gap after 1, 2, 4, 8 inner steps |"]
    lines.append("|---|---|---|---|")
    for beta, colour in zip(BETAS, ramp(3), strict=True):
        problem = mixture(25, beta)
        best = grid.iterate(problem)
        t = int(best.kappa.argmax())
        errors = best.errors[t][: 1 + int((best.errors[t] > 1e-12).sum())]
        steps = np.arange(len(errors))
        axes[0].semilogy(steps, errors, "o-", color=colour, label=f"β {beta:g}, t = {t}", markersize=4)
        axes[0].semilogy(steps, errors[1] * best.kappa[t] ** (steps - 1.0), "--", color=QUIET, linewidth=0.9)
        gaps = [best.objective - grid.evaluate(problem, problem.s).objective]
        gaps += [best.objective - grid.iterate(problem, m).objective for m in range(1, 13)]
        kept = [m for m, gap in enumerate(gaps) if gap > 1e-13]
        axes[1].semilogy(kept, [gaps[m] for m in kept], "o-", color=colour, label=f"β {beta:g}", markersize=4)
        predicted = gaps[1] * best.kappa.max() ** (2.0 * (np.array(kept) - 1))
        axes[1].semilogy(kept, predicted, "--", color=QUIET, linewidth=0.9)
        known = ~np.isnan(best.rate)
        off = float(np.abs(best.rate[known] / best.kappa[known] - 1).max())
        shown = ", ".join(f"{gaps[m]:.1e}" for m in (1, 2, 4, 8))
        lines.append(f"| {beta:g} | {best.kappa.max():.4f} | {100 * off:.2f} % | {shown} |")
    _dress(axes[0], "inner steps m", "max error of the control (score units)", "One t: error falls as κᵐ")
    _dress(axes[1], "inner steps m at every t", "J* − J (reward units)", "The objective: gap falls as κ²ᵐ or faster")
    axes[1].set_ylim(1e-13, 3)
    return lines


def laws(axes: list[Axes]) -> list[str]:
    """Four terminal laws of one problem, and how their distances depend on T."""
    problem = mixture(25, 1.0)
    best = grid.iterate(problem)
    ideal = grid.ideal_tilt_density(problem)
    shown = (
        ("pre-trained", grid.terminal_density(problem, problem.s), ":", QUIET),
        ("(a) PI-FT optimum", best.terminal_density, "-", ramp(3)[0]),
        ("(b) path tilt", grid.path_tilt_density(problem), "--", ramp(3)[1]),
        ("(c) ideal tilt", ideal, (0, (1, 1.4)), INK),
    )
    for label, density, style, colour in shown:
        axes[0].plot(GRID, density, linestyle=style, color=colour, label=label)
    axes[0].set_xlim(-4, 4.5)
    _dress(axes[0], "y", "density of Y_T", "Three laws, T = 25, r = y, β = 1")
    lines = ["| T | TV (a)-(c) | kappa | TV (b)-(c) | (b)-(c), law of Y_0 tilted | (a)-(c), law of Y_0 tilted |"]
    lines.append("|---|---|---|---|---|---|")
    sizes, found = (25, 50, 100, 200, 500), []
    for T in sizes:
        problem = mixture(T, 1.0)
        best, tilted = grid.iterate(problem), grid.iterate(problem, initial_law="tilted")
        ideal = grid.ideal_tilt_density(problem)

        def far(density: np.ndarray, ideal: np.ndarray = ideal) -> float:
            return grid.total_variation(density, ideal, GRID)

        path, full = grid.path_tilt_density(problem), grid.path_tilt_density(problem, "tilted")
        row = [far(density) for density in (best.terminal_density, path, full, tilted.terminal_density)]
        found.append(row)
        lines.append(f"| {T} | {row[0]:.4f} | {best.kappa.max():.4f} | {row[1]:.1e} | {row[2]:.0e} | {row[3]:.4f} |")
    columns = np.array(found).T
    axes[1].loglog(sizes, columns[0], "o-", color=ramp(3)[0], label="(a) to (c)", markersize=4)
    axes[1].loglog(sizes, columns[1], "s--", color=ramp(3)[1], label="(b) to (c): the initial law", markersize=4)
    _slope(axes[1], sizes, columns[0][0])
    _dress(axes[1], "T", "total variation", "First order in 1/T")
    order = -np.polyfit(np.log(sizes[:4]), np.log(columns[0][:4]), 1)[0]
    return [*lines, f"order of (a)-(c) over T = 25 .. 200: {order:.3f}"]


def continuous(axes: list[Axes]) -> list[str]:
    """The chain's value against the HJB equation's, as T grows."""
    beta, sizes = 1.0, (25, 50, 100, 200, 400)
    limit = solve_hjb(SCHEDULE, beta, lambda y, tau: MIXTURE.score(y, SCHEDULE.abar(tau)), linear, GRID, 1600)
    near = np.abs(GRID) <= 3
    errors, gaps = [], []
    for T in sizes:
        alpha, sigma = SCHEDULE.chain(T)
        abar = SCHEDULE.abar(np.linspace(0, 1, T + 1))
        best = grid.policy_iteration(
            alpha, sigma, beta, lambda y, t, abar=abar: MIXTURE.score(y, abar[t]), linear, GRID
        )
        errors.append(float(np.abs(best.V[0] - limit.V[0])[near].max()))
        gaps.append(limit.objective - best.objective)
        if T in (25, 100):
            style = "--" if T == 25 else "-."
            axes[0].plot(GRID, best.V[0], style, color=ramp(3)[0 if T == 25 else 1], label=f"chain, T = {T}")
    axes[0].plot(GRID, limit.V[0], color=INK, label="HJB")
    axes[0].set_xlim(-3, 3)
    axes[0].set_ylim(0.7, 1.2)
    _dress(axes[0], "y", "V(y, 0) (reward units)", "The value at the start")
    axes[1].loglog(sizes, errors, "o-", color=ramp(3)[0], label="max |V₀ − V|, |y| ≤ 3", markersize=4)
    axes[1].loglog(sizes, gaps, "s--", color=ramp(3)[1], label="J* of the diffusion − of the chain", markersize=4)
    _slope(axes[1], sizes, errors[0])
    _dress(axes[1], "T", "error (reward units)", "First order in 1/T")
    orders = [float(-np.polyfit(np.log(sizes[1:]), np.log(values[1:]), 1)[0]) for values in (errors, gaps)]
    rows = [f"| {T} | {e:.5f} | {g:.5f} |" for T, e, g in zip(sizes, errors, gaps, strict=True)]
    head = ["| T | max error of V_0 | J* diffusion - J* chain |", "|---|---|---|"]
    return [*head, *rows, f"orders over T = 50 .. 400: {orders[0]:.3f}, {orders[1]:.3f}"]


def dpok(axes: list[Axes]) -> list[str]:
    """The optimum against the fixed point of DPOK's gradient as published, by beta."""
    betas = np.geomspace(0.7, 10, 40)
    best = [lq.optimum(quadratic(25, float(beta))) for beta in betas]
    fixed = [lq.optimum(quadratic(25, float(beta)), future_kl=False) for beta in betas]
    for found, label, style, colour in ((best, "optimum", "-", INK), (fixed, "DPOK as published", "--", ramp(3)[1])):
        axes[0].semilogx(betas, [float(f.objective) for f in found], style, color=colour, label=label)
        axes[1].plot([float(f.path_kl) for f in found], [float(f.expected_reward) for f in found], style, color=colour,
                     label=label)  # fmt: skip
    _ticks(axes[0], (0.7, 1, 2, 5, 10))
    _dress(axes[0], "β", "J (reward units)", "What the dropped KL terms cost")
    _dress(axes[1], "path KL (nats)", "expected reward", "Nearly one front; β means something else")
    rows = ["| | J | reward | path KL |", "|---|---|---|---|"]
    for label, found in (("optimum", True), ("DPOK as published", False)):
        at = lq.optimum(quadratic(25, 1.0), future_kl=found)
        rows.append(f"| {label} | {at.objective:.6f} | {at.expected_reward:.6f} | {at.path_kl:.6f} |")
    return rows


def divergences(axes: list[Axes]) -> list[str]:
    """The laws that the f-divergences lead to, closed form and controlled chain; r = tanh y, beta = 1, T = 200."""
    rows = ["| regulariser | lambda | TV of the controlled law to the closed form | TV moved | largest kappa |"]
    rows.append("|---|---|---|---|---|")
    base = mixture(200, 1.0, np.tanh)
    p, r = grid.terminal_density(base, base.s), base.r
    axes[0].plot(GRID, p, ":", color=QUIET, label="pre-trained")
    cases: tuple[tuple[str, float | None], ...] = (
        ("kl", None), ("forward_kl", None), ("chi_square", None), ("alpha", 0.5), ("jensen_shannon", None),
        ("gamma", 0.5),
    )  # fmt: skip
    for i, (name, order) in enumerate(cases):
        found = divergence(name, order)
        lam = normaliser(found, r, 1.0, p)
        target = p * found.phi((r - lam) / 1.0).numpy()
        reward = transformed(found, torch.from_numpy(r), 1.0, lam).numpy()
        best = grid.iterate(replace(base, r=reward))
        colour, style = ramp(len(cases))[i], ("-", "--", ":", "-.")[i % 4]
        label = name if order is None else f"{name} {order:g}"
        if name != "gamma":  # the same law as alpha .5
            axes[0].plot(GRID, target, linestyle=style, color=colour, label=label)
            axes[1].plot(r, reward, linestyle=style, color=colour, label=label)
        far = grid.total_variation(best.terminal_density, target, GRID)
        moved = grid.total_variation(p, target, GRID)
        rows.append(f"| {label} | {lam:.4f} | {far:.4f} | {moved:.3f} | {best.kappa.max():.3f} |")
    axes[0].set_xlim(-4, 4)
    _dress(axes[0], "y", "density of Y_T", "Closed-form laws, r = tanh y, β = 1")
    _dress(axes[1], "r", "transformed reward", "What the KL machinery is given")
    return rows


def regular(axes: list[Axes]) -> list[str]:
    """Measured Lipschitz constants against their bounds, and the contraction schedule."""
    problem = mixture(25, 2.0, np.sin)
    best = grid.iterate(problem)
    measured, bound = regularity.measured(problem, best.V), regularity.bounds(problem)
    t = np.arange(26)
    axes[0].semilogy(t, measured.V, "o-", color=ramp(3)[0], label="Lip V", markersize=3.5)
    axes[0].semilogy(t, bound.V, "--", color=ramp(3)[0], label="its bound")
    axes[0].semilogy(t, measured.grad_V, "s-", color=ramp(3)[2], label="Lip grad V", markersize=3.5)
    held = np.isfinite(bound.grad_V)
    axes[0].semilogy(t[held], bound.grad_V[held], "--", color=ramp(3)[2], label="its bound (infinite before)")
    axes[0].set_ylim(1e-4, 3e3)
    _dress(axes[0], "t (generation order)", "Lipschitz constant", "r = sin y, β = 2: bounds hold, and are worst cases")
    floor = 0.5
    schedule = regularity.contraction_beta_grid(problem, 0.3, floor)
    plain, bent = (grid.iterate(replace(problem, beta=beta)) for beta in (np.full(25, floor), schedule))
    axes[1].plot(t[:-1], plain.kappa, "o--", color=QUIET, label=f"κ, β = {floor:g}", markersize=3.5)
    axes[1].plot(t[:-1], bent.kappa, "s-", color=ramp(3)[0], label="κ, contraction schedule", markersize=3.5)
    axes[1].plot(t[:-1], bent.rate, "x", color=INK, label="measured rate", markersize=5)
    axes[1].axhline(0.3, color=QUIET, linewidth=0.8, linestyle=":")
    _dress(axes[1], "t (generation order)", "contraction factor", "beta.schedule=contraction beta.rate=0.3")
    return [
        f"largest kappa without the schedule {plain.kappa.max():.4f}, with it {bent.kappa.max():.4f}; measured "
        f"{np.nanmax(bent.rate):.4f}; beta_t from {schedule.min():.3f} to {schedule.max():.3f}",
        f"largest measured/bound: V {np.max(measured.V / bound.V):.3f}, grad V "
        f"{np.max(measured.grad_V / bound.grad_V):.3f}",
    ]


def nearly(axes: list[Axes]) -> list[str]:
    """Policy gradient, exact, on a Gaussian's score plus epsilon sin(y), in the policies (y, 1, sin y): the gap to the
    best of the class, its measured local rate, and what the Hessian there predicts; Algorithm 1's kappa beside it."""
    rows = ["| epsilon | Algorithm 1: kappa | its gap after 6 inner steps | policy gradient: measured | predicted |"]
    rows += ["|---|---|---|---|---|"]
    for epsilon, colour in zip((0.0, 0.1, 0.2), ramp(3), strict=True):
        problem = nearly_lq(epsilon)
        best = grid.iterate(problem)
        gap = best.objective - grid.iterate(problem, 6).objective
        values, predicted = gradient_ascent(problem, 400)
        gaps = values[-1] - np.array(values[:400])
        measured = float((gaps[360] / gaps[320]) ** (1 / 40))
        axes[0].semilogy(gaps, color=colour, label=f"ε = {epsilon:g}")
        axes[0].semilogy(range(50, 400), gaps[320] * predicted ** (np.arange(50, 400) - 320.0), "--", color=QUIET,
                         linewidth=0.9)  # fmt: skip
        axes[1].plot(best.kappa, "o-", color=colour, label=f"κ, ε = {epsilon:g}", markersize=3.5)
        rows.append(f"| {epsilon:g} | {best.kappa.max():.4f} | {gap:.1e} | {measured:.4f} | {predicted:.4f} |")
    _dress(axes[0], "gradient steps", "best J of the class − J", "Policy gradient: a local linear rate")
    _dress(axes[1], "t (generation order)", "κ", "Algorithm 1: κ moves with ε")
    return rows


def nearly_lq(epsilon: float) -> grid.GridProblem:
    """N(.5, .8) data, the score plus epsilon sin(y), r = -y^2/2 + y, beta 1, T = 12."""
    alpha, sigma = SCHEDULE.chain(12)
    abar, y = SCHEDULE.abar(np.linspace(0, 1, 13)), GRID[::4]
    one = Mixture((1.0,), (0.5,), (0.8,))
    return grid.grid_problem(
        alpha, sigma, 1.0, lambda y, t: one.score(y, abar[t]) + epsilon * np.sin(y), lambda y: y - y**2 / 2, y
    )


def gradient_ascent(problem: grid.GridProblem, steps: int) -> tuple[list[float], float]:
    """J along gradient ascent in theta (T, 3), u = s + theta . (y, 1, sin y), each t with its own fixed step size; and
    the local factor predicted by the Hessian at the end: the gap shrinks by the square of the iterates' factor."""
    y = problem.y
    features = np.stack([y, np.ones_like(y), np.sin(y)], 1)
    laws = grid.densities(problem, problem.s)[:-1, :, None] * (y[1] - y[0])
    largest = np.array([np.linalg.eigvalsh((features * p).T @ features)[-1] for p in laws])
    step = 1 / (2 * problem.beta * problem.w * largest)

    def slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        J, density = grid.policy_gradient(problem, problem.s + theta @ features.T)
        return J, np.trapezoid(density[:, :, None] * features, y, axis=1)

    theta, values = np.zeros((problem.T, 3)), []
    for _ in range(steps):
        J, gradient = slope(theta)
        values.append(J)
        theta = theta + step[:, None] * gradient
    root = np.repeat(np.sqrt(step), 3)
    columns = []
    for i in range(theta.size):
        moved = np.zeros(theta.size)
        moved[i] = 1e-4
        change = slope(theta + moved.reshape(theta.shape))[1] - slope(theta - moved.reshape(theta.shape))[1]
        columns.append(change.ravel() / 2e-4)
    plain = np.stack(columns, 1)
    J, gradient = slope(theta)
    values.append(J - gradient.ravel() @ np.linalg.solve(plain + plain.T, gradient.ravel()))  # the class's best, Newton
    hessian = root[:, None] * plain * root
    factors = 1 + np.linalg.eigvalsh((hessian + hessian.T) / 2)
    return values, float(np.abs(factors).max() ** 2)


FIGURES: dict[str, Callable[[list[Axes]], list[str]]] = {
    "rate": rate,
    "laws": laws,
    "continuous": continuous,
    "dpok": dpok,
    "divergences": divergences,
    "regularity": regular,
    "nearly": nearly,
}


def _slope(axes: Axes, sizes: tuple[int, ...], start: float) -> None:
    axes.loglog(sizes, start * sizes[0] / np.array(sizes), "--", color=QUIET, linewidth=0.9, label="slope −1")
    _ticks(axes, sizes)


def _ticks(axes: Axes, places: tuple[float, ...]) -> None:
    """A logarithmic x axis with these ticks and no others."""
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)


def _dress(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7.5)


def draw(name: str, out: Path) -> list[str]:
    """Write one figure of two panels; returns the lines of its table."""
    with rc_context({**RC, "axes.spines.top": False}):
        figure = Figure(figsize=(8.2, 3.1), layout="constrained")
        lines = FIGURES[name](list(figure.subplots(1, 2)))
        write_whole(out / f"theory_{name}.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    return lines


def of_sweep(store: Path, out: Path) -> Path:
    """The report's gap panels of the sweep `theory` in a store, both problems, as theory_sweep.png."""
    from PIL import Image

    found = frame.load(Store(store), "theory")
    pictures = []
    for prompt, cells in found.prompts.items():
        wanted = [panel for panel in figures.panels(found, prompt) if panel.name in ("gap_inner", "gap_steps")]
        path = out / f".{prompt}.png"
        figures.sheet(wanted, path, found, cells, heading=cells[0].prompt_text, note="")
        pictures.append(Image.open(path).convert("RGB"))
        path.unlink()
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    write_whole(out / "theory_sweep.png", lambda temporary: sheet.save(temporary, format="PNG"))
    return out / "theory_sweep.png"


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/theory.md and print its numbers.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: docs/images)")
    parser.add_argument("--only", choices=sorted(FIGURES), help="one of them")
    parser.add_argument("--store", type=Path, help="draw theory_sweep.png from this store's sweep `theory` instead")
    options = parser.parse_args()
    if options.store:
        print(of_sweep(options.store, options.out))
        return 0
    for name in [options.only] if options.only else FIGURES:
        print(f"\n{name}", *draw(name, options.out), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
