"""The comparison: numbers against hand computation and scipy, nothing dropped, a page that needs nothing but itself."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_store
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from orchestrator.compare import Report, compare, figures, frame, pictures, tables, theory, verdict
from orchestrator.compare.statistics import estimate, paired, t_interval, t_quantile
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.sample import sample
from workers.recorder import METRICS, journal_line, read_journal
from workers.store import write_record

PROMPTS = {"counting": "Four wolves in the park", "odd": 'A <b>cat</b> & "a dog"'}
STATES = {
    ("counting", "dpok", 0.1, 0): "diverged",
    ("counting", "dpok", 0.1, 1): "failed",
    ("counting", "pi_ft", 1.0, 1): "new",
    ("odd", "pi_ft", 0.1, 0): "running",
    ("odd", "dpok", 1.0, 0): "new",
    ("odd", "dpok", 1.0, 1): "resumable",
}


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any], Report]:
    """Two prompts, two betas, two methods, two seeds, with every kind of gap."""
    root = tmp_path_factory.mktemp("gaps")
    plan = fake_store(root, prompts=PROMPTS, seeds=[0, 1], states=STATES, steps=12, every=4, samples=6, pictures=3)
    store = Store(root)
    return store, plan, compare(store, "demo")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any], Report]:
    """One prompt, one seed, a further axis, no judge, larger pictures, and a report elsewhere."""
    root = tmp_path_factory.mktemp("single")
    plan = fake_store(
        root,
        methods=["pi_ft"],
        extras={"method.estimator": ["pathwise", "score"]},
        judge=False,
        size=80,
        steps=8,
        every=4,
    )
    return Store(root), plan, compare(Store(root), "demo", root / "elsewhere")


LQ = {"lq": "linear-quadratic, d = 4"}
THREE = ["algorithm_1", "pi_ft", "dpok"]
LQ_STATES = {
    ("lq", "algorithm_1", 1.0, 0): "running",
    ("lq", "algorithm_1", 1.0, 1): "diverged",
    ("lq", "pi_ft", 0.1, 0): "failed",
    ("lq", "dpok", 1.0, 2): "new",
}
BARE: dict[str, Any] = {"judge": False, "pictures": 0}
"""A model with a known optimum has no judge and nothing to show."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any], Report]:
    """A model with a known optimum: three methods, two betas, three seeds, some of them failed or unfinished."""
    root = tmp_path_factory.mktemp("known")
    sizes = {"steps": 40, "every": 4, "samples": 6}
    plan = fake_store(root, model="lq", prompts=LQ, methods=THREE, seeds=[0, 1, 2], states=LQ_STATES, **sizes, **BARE)
    return Store(root), plan, compare(Store(root), "demo")


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any], Report]:
    """Algorithm 1 alone on a mixture, over the number of steps of the chain, with a learned law of Y_0; one seed."""
    root = tmp_path_factory.mktemp("refined")
    axes = {"sampler.steps": [8, 16, 32, 64], "initial_law": ["gaussian"]}
    sizes = {"steps": 8, "every": 2, "samples": 6}
    plan = fake_store(root, model="mixture", methods=["algorithm_1"], extras=axes, **sizes, **BARE)
    return Store(root), plan, compare(Store(root), "demo")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def journal(store: Store, key: str) -> list[dict[str, Any]]:
    return list(read_journal(store.trial(key).journal))


# --------------------------------------------------------------------------------------------------------- statistics


def test_paired_standard_error_by_hand_and_scipy() -> None:
    before, after = [0.1, 0.5, -0.3, 0.9], [0.4, 0.6, 0.3, 1.3]
    found = paired(before, after)
    assert found is not None
    assert found.mean == pytest.approx(0.35)  # differences .3 .1 .6 .4
    assert found.se == pytest.approx(math.sqrt((0.05**2 + 0.25**2 + 0.25**2 + 0.05**2) / 3 / 4))
    test = stats.ttest_rel(after, before)
    assert found.mean / found.se == pytest.approx(test.statistic)
    unpaired = math.sqrt(stats.sem(before) ** 2 + stats.sem(after) ** 2)
    assert found.se < unpaired / 2  # the point of the same noise


def test_pairing_different_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="3 with 2 pictures"):
        paired([1, 2, 3], [1, 2])


def test_t_interval_is_scipys() -> None:
    values = [0.2, 0.9, 0.4, 0.55]
    found = t_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert t_quantile(1) == pytest.approx(12.7062, abs=1e-4)


def test_one_value_has_no_error_and_claims_nothing() -> None:
    assert t_interval([0.4]).half is None and not t_interval([0.4]).clear
    assert estimate([0.4]).se is None and not estimate([0.4]).clear
    assert estimate([]) is None


# ---------------------------------------------------------------------------------------------------------------- csv


def test_every_cell_of_the_plan_is_a_row(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    _, plan, report = gaps
    table = rows(report.csv)
    assert [row["key"] for row in table] == [cell["key"] for cell in plan["cells"]]
    for row, cell in zip(table, plan["cells"], strict=True):
        expected = STATES.get((cell["prompt"], cell["method"], cell["beta"], cell["seed"]), "done")
        assert row["state"] == expected
        assert bool(row["message"]) == (expected != "done")
        if expected == "new":
            assert row["reward_last"] == row["reward_change"] == row["seconds"] == ""  # empty, never a number


def test_the_numbers_are_the_journals(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    store, _, report = gaps
    for row in rows(report.csv):
        records = journal(store, row["key"])
        evaluated = [record for record in records if "samples" in record]
        if len(evaluated) < 2:
            continue
        first, last = evaluated[0], evaluated[-1]
        for name in ("reward", "judge"):
            test = stats.ttest_rel(last["samples"][name], first["samples"][name])
            change, error = float(row[f"{name}_change"]), float(row[f"{name}_change_se"])
            assert change / error == pytest.approx(test.statistic)
            assert change == pytest.approx(last["metrics"][f"eval/{name}_mean"] - first["metrics"][f"eval/{name}_mean"])
            assert float(row[f"{name}_last"]) == last["metrics"][f"eval/{name}_mean"]
        assert float(row["kl_path_nats"]) == last["metrics"]["eval/kl_path_nats"]
        assert float(row["objective"]) == last["metrics"]["eval/objective"]
        assert float(row["reward_queries"]) == records[-1]["metrics"]["budget/reward_queries"]
        assert int(row["pictures"]) == 6


def test_curves_hold_every_point(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    store, plan, report = gaps
    table = rows(report.curves)
    found = {(row["key"], int(row["step"]), row["metric"]): float(row["value"]) for row in table}
    expected = {
        (cell["key"], record["step"], name): value
        for cell in plan["cells"]
        for record in journal(store, cell["key"])
        for name, value in record["metrics"].items()
    }
    assert found == expected and len(table) == len(expected)


def test_a_further_axis_is_a_column_and_a_line_style(single: tuple[Store, dict[str, Any], Report]) -> None:
    store, _, report = single
    assert [row["method.estimator"] for row in rows(report.csv)] == ["pathwise", "score"] * 2
    assert frame.load(store, "demo").variants == ["pi_ft estimator=pathwise", "pi_ft estimator=score"]


def test_an_axis_that_the_prompt_decides_is_no_variant(tmp_path: Path) -> None:
    """A model with a prompt of its own: one line style for both. Mutants: whatever varies in the sweep; what varies in
    every prompt (the score estimator is tried on one of them only)."""
    plan = fake_store(tmp_path, prompts={"lq": "one", "mixture": "two"}, methods=["pi_ft"], betas=[0.1])
    ways = [("lq", "pathwise"), ("lq", "score"), ("mixture", "pathwise")]
    one, two = plan["cells"]
    one["beta"] = 0.5
    cells = [{**(one if model == "lq" else two), "model": model, "method.estimator": way} for model, way in ways]
    write_record(tmp_path / "sweeps/demo/plan.json", plan | {"cells": cells})
    sweep = frame.load(Store(tmp_path), "demo")
    assert [cell.variant for cell in sweep.cells] == [f"pi_ft estimator={way}" for _, way in ways]
    assert figures.shown(sweep, sweep.prompts["mixture"]) == ({0: "pi_ft estimator=pathwise"}, {0: "β 0.1"})


# --------------------------------------------------------------------------------------------------------------- page


class Loads(HTMLParser):
    """Collects what a page would fetch, its ids, its text, and checks that its tags close."""

    VOID = ("meta", "link", "img", "input", "br", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster") and value:
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.mark.parametrize("which", ["gaps", "single", "known", "refined"])
def test_the_page_needs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    report: Report = request.getfixturevalue(which)[2]
    page = report.html.read_text(encoding="utf-8")
    seen = Loads()
    seen.feed(page)
    assert seen.open == []
    assert all(link.startswith(("#", "data:")) for link in seen.fetched), seen.fetched
    assert all(link[1:] in seen.ids for link in seen.fetched if link.startswith("#"))
    assert len(seen.ids) == len(set(seen.ids))
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert len(page) < 3_000_000
    assert not re.search(r"#0[1-5]0[0-9a-f]{3}", page)  # stand-in colours all replaced


def test_the_page_names_every_cell_and_metric(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    _, plan, report = gaps
    page = report.html.read_text(encoding="utf-8")
    assert all(cell["key"] in page for cell in plan["cells"])
    assert all(name in page for name in METRICS)
    assert "6 of 16 cells have no final result" in page
    assert "loss is not finite after step 20" in page and "mat1 and mat2 shapes" in page
    assert "<b>cat</b>" not in page and "A &lt;b&gt;cat&lt;/b&gt; &amp; " in page
    assert "mean over 2 seeds, 95 % t interval" in page and "One seed:" not in page


def test_one_seed_says_so_and_gives_paired_errors(single: tuple[Store, dict[str, Any], Report]) -> None:
    _, _, report = single
    page = report.html.read_text(encoding="utf-8")
    assert report.html.parent.name == "elsewhere"
    assert "One seed: no interval over seeds." in page and "t interval)" not in page
    assert "over its step 0 (paired over 16 pictures)" in page
    assert "Held-out judge" not in page  # there is none here


def test_figures_and_csv_lie_beside_the_page(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    store, _, report = gaps
    assert report.html == store.sweep("demo").report / "report.html"
    assert [path.is_file() for path in (report.html, report.csv, report.curves, *report.figures)] == [True] * 5


def test_the_terminal_table_has_a_line_per_cell(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    _, plan, report = gaps
    lines = report.table.splitlines()
    for state in ("done", "diverged @6", "failed @6", "new", "running @6", "resumable @6"):
        assert any(f" {state} " in line for line in lines), state
    assert sum(line.startswith(("pi_ft", "dpok")) for line in lines) == len(plan["cells"])
    assert "16 cells: 10 done" in lines[0]


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_a_seed_without_result_never_enters_a_mean(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    store, _, _ = gaps
    sweep = frame.load(store, "demo")
    groups = frame.series(sweep.prompts["counting"])
    whole, half, none = groups["pi_ft", 0.1], groups["pi_ft", 1.0], groups["dpok", 0.1]
    changes = [cell.change("reward").mean for cell in whole]
    assert verdict.with_error(t_interval(changes)) in verdict.of_seeds(whole).text
    assert "The only one of 2 seeds with a result" in verdict.of_seeds(half).text
    assert verdict.of_seeds(none).tone == "none" and "none of 2 seeds" in verdict.of_seeds(none).text
    assert "diverged at step 6 of 12" in verdict.of_cell(none[0]).text
    ends = {(c.variant, c.whole): c.x[-1] for c in figures.curves(sweep, none, "step", "eval/reward_mean")}
    assert set(ends) == {(1, False)}


def test_methods_are_paired_by_seed_and_beta(single: tuple[Store, dict[str, Any], Report]) -> None:
    store, _, _ = single
    cells = frame.load(store, "demo").cells
    lines = verdict.of_methods(cells)
    assert [line.subject for line in lines] == [
        f"pi_ft estimator=pathwise − pi_ft estimator=score at β\u00a0{beta}" for beta in ("0.1", "1")
    ]
    one, other = (cell.evaluations[-1].samples["reward"] for cell in cells[:2])
    assert verdict.with_error(paired(other, one)) in lines[0].text


def test_reward_hacking_is_pointed_out(tmp_path: Path) -> None:
    fake_store(tmp_path, methods=["dpok"], betas=[0.05], samples=40, steps=8, every=8, size=8)
    (cell,) = frame.load(Store(tmp_path), "demo").cells
    assert verdict.of_cell(cell).tone == "mixed" and "reward hacking" in verdict.of_cell(cell).text


# ------------------------------------------------------------------------------------------------- figures, pictures


def test_square_root_ticks_are_round_and_apart() -> None:
    for highest in (0.004, 0.31, 1.0, 9.7, 26.0, 4200.0):
        ticks = figures.root_ticks(highest)
        gaps = [math.sqrt(b) - math.sqrt(a) for a, b in zip(ticks, ticks[1:], strict=False)]
        assert ticks[0] == 0 and ticks[-1] <= highest and 2 <= len(ticks) <= 7
        assert min(gaps) >= 0.149 * math.sqrt(highest)
    assert figures.root_ticks(0.0) == [0.0]


def test_colours_are_a_ramp_of_falling_darkness() -> None:
    def light(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [light(colour) for colour in figures.ramp(6)]
    assert shades == sorted(shades) and shades[-1] - shades[0] > 100


def test_notes_stand_on_the_figure_sheet_too(known: tuple[Store, dict[str, Any], Report], tmp_path: Path) -> None:
    """A dashed line that only the page explains is no use in a paper. Mutant: the room is kept, the words are not."""
    sweep = frame.load(known[0], "demo")
    images = []
    for letter in "ab":
        noted = [replace(panel(known[0], "lq", "gap_inner"), note=letter * 40)]
        figures.sheet(noted, tmp_path / f"{letter}.png", sweep, sweep.cells, heading="", note="")
        images.append((tmp_path / f"{letter}.png").read_bytes())
    assert images[0] != images[1]


def test_the_sheet_keeps_pixels_ends_and_its_budget(gaps: tuple[Store, dict[str, Any], Report]) -> None:
    from PIL import Image

    store, _, _ = gaps
    cells = frame.load(store, "demo").prompts["counting"]
    sheet = pictures.sheet(cells, budget=1)
    assert sheet is not None and sheet.common and sheet.pixels and sheet.columns == 3
    row = sheet.rows[0]
    assert [strip.step for strip in row.strips] == [0, 12]
    import base64
    import io

    shown = Image.open(io.BytesIO(base64.b64decode(row.strips[-1].uri.partition(",")[2]))).convert("RGB")
    stored = Image.open(row.cell.folder.picture(12)).convert("RGB")
    assert shown.crop((33, 0, 65, 32)).tobytes() == stored.crop((32, 0, 64, 32)).tobytes()
    assert row.strips[-1].rewards == row.cell.evaluations[-1].samples["reward"][:3]


# ------------------------------------------------------------------------------------------------------ known optimum


def panel(store: Store, prompt: str, name: str) -> figures.Panel:
    return next(found for found in figures.panels(frame.load(store, "demo"), prompt) if found.name == name)


def drawn(found: figures.Panel) -> Axes:
    """The panel on axes of its own, in the colours of the sheet."""
    axes = Figure().add_subplot()
    found.draw(axes, figures.print_palette(2))
    return axes


def test_gaps_lost_in_rounding_leave_the_log_axis() -> None:
    """Mutants: the floor beside 1 in place of the first gap; beside the last; `>=`; |gap|; the first value, positive
    or not."""
    gaps = {0: -1e-3, 1: 4.0, 2: 1e-2, 3: 4.1e-13, 4: 4e-13, 5: -1e-6, 6: 0.0, 7: 5e-13}
    kept = theory.above_rounding({step: (float(step), gap) for step, gap in gaps.items()})
    assert list(kept) == [1, 2, 3, 7] and kept[7] == (7.0, 5e-13)
    assert theory.above_rounding({0: (0.0, -1e-16)}) == {}


def test_each_method_has_its_gap_panel(known: tuple[Store, dict[str, Any], Report]) -> None:
    """Algorithm 1 per inner iteration, the others per gradient step. Mutants: either filter the other way round."""
    store, _, _ = known
    sweep = frame.load(store, "demo")
    assert [found.name for found in figures.panels(sweep, "lq")] == [
        "reward_steps",
        "kl_steps",
        "front",
        "reward_queries",
        "gain_beta",
        "gap_inner",
        "gap_steps",
    ]
    inner, training = panel(store, "lq", "gap_inner"), panel(store, "lq", "gap_steps")
    assert {curve.variant for curve in inner.draw.keywords["lines"]} == {0}
    assert {curve.variant for curve in training.draw.keywords["lines"]} == {1, 2}
    assert inner.note.startswith("Dashed grey: the predicted slope κ² per iteration.")
    assert training.note.startswith("Horizontal, dotted: the gap of DPOK's own fixed point as published.")
    for found, words in ((inner, "inner iterations (Algorithm 1)"), (training, "gradient steps")):
        axes = drawn(found)
        assert axes.get_yscale() == "log" and axes.get_xlabel() == words and "reward units, log axis" in found.y_label


def test_a_log_axis_has_the_mean_and_interval_of_log10(known: tuple[Store, dict[str, Any], Report]) -> None:
    """Against scipy, for three finished seeds. Mutants: the mean of the gaps; the band of the gaps (it would be
    negative); half the band; natural logarithms in place of one of the two conversions."""
    store, plan, _ = known
    lines = panel(store, "lq", "gap_steps").draw.keywords["lines"]
    (curve,) = [curve for curve in lines if (curve.variant, curve.beta) == (1, 1)]
    keys = [cell["key"] for cell in plan["cells"] if (cell["method"], cell["beta"]) == ("pi_ft", 1.0)]
    gaps = [[record["metrics"]["theory/gap"] for record in journal(store, key) if "samples" in record] for key in keys]
    assert len(keys) == 3 and list(curve.x) == [4.0 * i for i in range(11)]
    assert list(curve.y) == pytest.approx([stats.gmean(values) for values in zip(*gaps, strict=True)])
    logs = [math.log10(values[-1]) for values in gaps]
    low, high = stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((10**low, 10**high))
    assert (
        min(curve.low) > 0
        and len(curve.hairs) == 3
        and "Mean and band over seeds: of log10." in panel(store, "lq", "gap_steps").note
    )


def test_an_interval_of_hundreds_of_decades_is_drawn(tmp_path: Path) -> None:
    """Two seeds far apart: t = 12.7. Mutant: 10 ** exponent without bounds (it overflows)."""
    fake_store(tmp_path, model="lq", methods=["pi_ft"], betas=[0.1], seeds=[0, 1], steps=4, every=2, **BARE)
    store = Store(tmp_path)
    for cell, gap in zip(frame.load(store, "demo").cells, (1e-2, 1e-60), strict=True):
        lines = [{**line, "metrics": {**line["metrics"], "theory/gap": 1e3}} for line in journal(store, cell.key)]
        lines[-1]["metrics"]["theory/gap"] = gap
        lines[0]["metrics"]["theory/gap"] = gap * 10
        store.trial(cell.key).journal.write_bytes(b"".join(map(journal_line, lines)))
    (curve,) = panel(store, "counting", "gap_steps").draw.keywords["lines"]
    assert (curve.low[-1], curve.high[-1]) == (1e-300, 1e300)  # 10^(-31 ± 12.7 * 29)
    assert curve.y[-1] == pytest.approx(1e-31)
    assert "<svg" in figures.svg(panel(store, "counting", "gap_steps"), 1, "a")


def test_the_predicted_slope_starts_after_step_0_and_ends_at_rounding(
    known: tuple[Store, dict[str, Any], Report],
) -> None:
    """By hand from the journal: 2 log10 kappa per iteration from the first evaluation after step 0. Mutants: from step
    0; the line of the other beta; no floor; the floor of the first point after step 0; e for 10; one line a cell."""
    store, plan, _ = known
    segments = panel(store, "lq", "gap_inner").draw.keywords["predicted"]
    assert len(segments) == 2  # of beta 0.1 with three finished seeds; of beta 1 with one, one running, one diverged
    for beta, (across, values) in zip((0.1, 1.0), segments, strict=True):
        chosen = (cell for cell in plan["cells"] if (cell["method"], cell["beta"], cell["seed"]) == (THREE[0], beta, 2))
        first, second = [line["metrics"] for line in journal(store, next(chosen)["key"]) if "samples" in line][:2]
        rate, gap = first["algorithm_1/log10_rate"], second["theory/gap"]
        lost = 4 + (math.log10(1e-13 * first["theory/gap"]) - math.log10(gap)) / rate
        end = min(40.0, lost)
        assert (end == 40.0) == (beta == 0.1)
        assert list(across) == pytest.approx([4.0, end])
        assert list(values) == pytest.approx([gap, gap * 10 ** (rate * (end - 4))])
    axes = drawn(panel(store, "lq", "gap_inner"))
    dashed = [line for line in axes.lines if line.get_color() == figures.print_palette(2).quiet]
    assert [tuple(line.get_ydata()) for line in dashed] == [tuple(values) for _, values in segments]


def test_the_finished_curve_says_where_the_predicted_line_begins(known: tuple[Store, dict[str, Any], Report]) -> None:
    """Curves of failed cells come after it. Mutant: the last curve wins."""
    sweep = frame.load(known[0], "demo")
    cells = [cell for cell in sweep.cells if cell.method == "algorithm_1"]
    whole, failed = ([0.0, 1.0, 2.0], [1.0, 0.1, 0.01]), ([0.0, 1.0], [9.0, 8.0])
    lines = [figures.Curve(0, 0, *whole), figures.Curve(0, 0, *failed, whole=False)]
    ((across, values),) = figures._predicted(sweep, cells, lines)
    assert (across[0], values[0]) == (1.0, 0.1)


@pytest.mark.parametrize(("second", "left"), [([-1e-16] * 3, [0.0, 2.0]), ([-1e-16, -1e-16, 1e-3], [])])
def test_a_seed_at_the_optimum_hides_no_other(tmp_path: Path, second: list[float], left: list[float]) -> None:
    """One seed has no positive gap: the curve is of the other. They share no step: no curve, and no crash. Mutants: a
    seed without points is merged too; a curve without points is kept."""
    fake_store(tmp_path, model="lq", methods=["pi_ft"], betas=[0.1], seeds=[0, 1], steps=4, every=2, **BARE)
    store = Store(tmp_path)
    for cell, gaps in zip(frame.load(store, "demo").cells, ([1.0, 0.1, -1e-16], second), strict=True):
        kept = [line for line in journal(store, cell.key) if "samples" in line]
        for line, gap in zip(kept, gaps, strict=True):
            line["metrics"]["theory/gap"] = gap
        store.trial(cell.key).journal.write_bytes(b"".join(map(journal_line, kept)))
    sweep = frame.load(store, "demo")
    found = figures.curves(sweep, sweep.cells, "step", theory.GAP, log=True)
    assert [list(curve.x) for curve in found] == ([left] if left else [])
    assert compare(store, "demo").html.is_file()


def test_cells_without_result_have_their_own_gap_curves(known: tuple[Store, dict[str, Any], Report]) -> None:
    """A cell that is not finished bends no mean; a cross marks where one failed. Mutant: they are left out."""
    store, _, _ = known
    inner, training = (panel(store, "lq", name).draw.keywords["lines"] for name in ("gap_inner", "gap_steps"))
    assert {(c.beta, c.broken, c.x[-1]) for c in inner if not c.whole} == {(1, False, 20.0), (1, True, 20.0)}
    assert {(c.variant, c.beta, c.x[-1]) for c in training if not c.whole} == {(1, 0, 16.0)}  # failed while evaluating
    crosses = [line for line in drawn(panel(store, "lq", "gap_steps")).lines if line.get_marker() == "x"]
    assert len(crosses) == 1


def test_the_fixed_points_of_dpok_are_levels_in_their_betas_colour(
    known: tuple[Store, dict[str, Any], Report],
) -> None:
    """Once a beta, whatever the seeds. Mutants: one level a cell; the colour of the other beta; the gap itself."""
    store, _, _ = known
    palette, axes = figures.print_palette(2), drawn(panel(store, "lq", "gap_steps"))
    levels = [line for line in axes.lines if len(line.get_ydata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
    fixed = [0.15 * 0.3 / (0.1 + beta) for beta in (0.1, 1.0)]
    assert [line.get_ydata()[0] for line in levels] == pytest.approx(fixed)
    assert [line.get_color() for line in levels] == list(palette.betas)
    low, high = axes.get_ylim()
    assert low < min(fixed) and high > max(fixed)


def test_levels_above_and_below_the_curves_are_framed() -> None:
    """Mutant: the limits of the curves alone."""
    axes = Figure().add_subplot()
    curve = figures.Curve(0, 0, [0.0, 1.0], [1e-2, 1e-3])
    levels = [(0, 5.0), (0, 1e-7)]
    figures._draw_gap(axes, figures.print_palette(1), lines=[curve], x_label="", levels=levels)
    assert axes.get_ylim()[0] < 1e-7 and axes.get_ylim()[1] > 5.0


def test_nothing_is_spent_before_the_first_step(tmp_path: Path) -> None:
    """Where step 0 journals no budget it stands at 0, later at nothing. Mutants: none; 0 for whatever is missing."""
    fake_store(tmp_path, methods=["pi_ft"], betas=[0.1], steps=2, every=1, samples=4, **BARE)
    store = Store(tmp_path)
    (cell,) = frame.load(store, "demo").cells
    kept = journal(store, cell.key)
    del kept[0]["metrics"]["budget/reward_queries"]
    store.trial(cell.key).journal.write_bytes(b"".join(map(journal_line, kept)))
    (cell,) = frame.load(store, "demo").cells
    assert [cell.spent("budget/reward_queries", step) for step in (0, 1, None)] == [0.0, 10.0, 20.0]
    assert [cell.spent("budget/none", step) for step in (0, 1, None)] == [0.0, None, None]


def test_what_queries_no_reward_is_no_curve_over_queries(
    known: tuple[Store, dict[str, Any], Report], refined: tuple[Store, dict[str, Any], Report]
) -> None:
    """A vertical line at 0 says nothing; the note says who is missing. Mutants: drawn all the same; all dropped."""
    found = panel(known[0], "lq", "reward_queries")
    assert {curve.variant for curve in found.draw.keywords["lines"]} == {1, 2}
    assert found.note == "Without algorithm_1: none spent."
    (curve,) = [c for c in found.draw.keywords["lines"] if (c.variant, c.beta) == (1, 1)]
    assert list(curve.x) == [40.0 * i for i in range(11)]  # ten a step: what was spent by then, not in the end
    names = [found.name for found in figures.panels(frame.load(refined[0], "demo"), "counting")]
    assert names == ["reward_steps", "kl_steps", "front", "gain_beta", "gap_inner", "refinement"]


def test_the_order_of_refinement_is_fitted(refined: tuple[Store, dict[str, Any], Report]) -> None:
    """errors ~ 1/T and T^-0.9 by construction. Mutants: the sign; log T against the error; the first and last value of
    the wrong quantity; T taken from the plan's order; the slope through the ends (a bend tells it from the fit)."""
    store, _, _ = refined
    sweep = frame.load(store, "demo")
    lines = theory.refinement(sweep, sweep.cells)
    assert [(line.quantity, line.beta) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(list(line.steps) == [8, 16, 32, 64] for line in lines)
    assert list(lines[0].values) == pytest.approx([0.8 / steps / 0.1**0.5 for steps in (8, 16, 32, 64)])
    assert [line.order for line in lines] == pytest.approx([1.0, 1.0, 0.9, 0.9])
    bent = theory.Refined(0, 0, [1, 10, 100, 1000], [1.0, 0.2, 0.1, 0.001])
    slope = stats.linregress([0, 1, 2, 3], [math.log10(v) for v in bent.values]).slope
    assert bent.order == pytest.approx(-slope)
    found = panel(store, "counting", "refinement")
    assert found.note.endswith("Dashed grey: slope −1. Fitted order: 1.00 (error of V), 0.90 (total variation).")
    several = [theory.Refined(0, 0, [1, 2, 4], [1, 2.0**-p, 4.0**-p]) for p in (1.2, 0.8)]
    assert theory.orders([*several, theory.Refined(1, 0, [1, 2], [1.0, 0.5])]) == "0.80 to 1.20 (error of V)"


def test_the_refinement_is_drawn_on_two_log_axes_with_slope_minus_one(
    refined: tuple[Store, dict[str, Any], Report],
) -> None:
    """Mutants: a linear axis; slope 1; a reference line on a curve, which would hide it."""
    axes = drawn(panel(refined[0], "counting", "refinement"))
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert list(axes.get_xticks()) == [8, 16, 32, 64]
    (line,) = [line for line in axes.lines if line.get_color() == figures.print_palette(2).quiet]
    products = [x * y for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert products == pytest.approx([products[0]] * 4) and products[0] > 1.2 * 0.8 / 0.1**0.5
    assert axes.get_ylim()[1] > max(line.get_ydata())


def test_two_lengths_are_no_refinement(tmp_path: Path) -> None:
    """Mutant: `<` two; counting cells in place of different T."""
    extras = {"sampler.steps": [8, 16]}
    sizes = {"steps": 4, "every": 2}
    fake_store(tmp_path, model="mixture", methods=["algorithm_1"], seeds=[0, 1], extras=extras, **sizes, **BARE)
    sweep = frame.load(Store(tmp_path), "demo")
    assert theory.refinement(sweep, sweep.cells) == []
    assert "refinement" not in [found.name for found in figures.panels(sweep, "counting")]


def test_gap_kappa_and_initial_kl_are_columns_where_they_are(
    known: tuple[Store, dict[str, Any], Report],
    refined: tuple[Store, dict[str, Any], Report],
    gaps: tuple[Store, dict[str, Any], Report],
) -> None:
    """Page, terminal and CSV. Mutants: always there; never; gap and kappa exchanged; a fixed number of decimals."""
    for (_, _, report), names in (
        (known, ["gap to J*", "κ max"]),
        (refined, ["KL of Y_0", "gap to J*", "κ max"]),
        (gaps, ["judge", "judge", "judge change", "diversity", "diversity"]),
    ):
        page = report.html.read_text(encoding="utf-8")
        table = page[page.index('<section id="cells"') :].partition("</table>")[0]
        heads = re.findall(r"<button>(.*?)</button>", table)
        assert [head for head in heads if head in tables.OPTIONAL] == names
        assert all(row.count("<td") == len(heads) for row in table.split("<tr>")[2:])
    store, plan, report = known
    key, row = plan["cells"][0]["key"], rows(report.csv)[0]
    last = journal(store, key)[-1]["metrics"]
    assert {name: float(row[name]) for name in row if name.startswith("theory/")} == {
        name: value for name, value in last.items() if name.startswith("theory/")
    }
    page, gap = report.html.read_text(encoding="utf-8"), last["theory/gap"]
    assert f'<td data-v="{gap}">{gap:.1e}</td><td data-v="{last["theory/kappa_max"]}">0.763</td>' in page
    assert report.table.splitlines()[3].split()[-2:] == ["gap", "s"]
    assert report.table.splitlines()[4].split()[-2] == f"{gap:.1e}"
    assert "gap: J* − J" in report.table and "gap" not in gaps[2].table


def test_a_verdict_names_the_gap(known: tuple[Store, dict[str, Any], Report]) -> None:
    """Mutants: last before first; the mean over seeds (rounding may turn its sign) for the median."""
    store, _, report = known
    cell, *others = frame.load(store, "demo").cells
    ends = [theory.gap(seed) for seed in (cell, *others[:2])]
    assert f", gap {ends[0][0]:.1e} → {ends[0][1]:.1e}." in verdict.of_cell(cell).text
    assert "paired over 6 samples" in verdict.of_cell(cell).text  # it has no pictures
    assert verdict._median([(1.0, 3e-9), (2.0, -1e-16), (9.0, 2e-12)]) == (2.0, 2e-12)
    middle = sorted(last for _, last in ends)[1]
    assert f"gap 1.5e+00 → {middle:.1e} (median of 3 seeds)" in verdict.of_seeds([cell, *others[:2]]).text
    page = report.html.read_text(encoding="utf-8")
    assert f'<span class="whole">gap {ends[0][0]:.1e} → {ends[0][1]:.1e}</span>.' in page
    assert "picture" not in page[page.index("What the data say") : page.index("All cells</h2>")]


def test_exact_evaluations_without_samples_are_a_result(tmp_path: Path) -> None:
    """Algorithm 1 may journal nothing but exact numbers. Mutants: "nothing to pair"; a rising gap called better."""
    fake_store(tmp_path, model="lq", methods=["algorithm_1"], betas=[0.1], seeds=[0, 1], steps=4, every=2, **BARE)
    store = Store(tmp_path)
    for number, cell in enumerate(frame.load(store, "demo").cells):
        lines = [{k: v for k, v in line.items() if k != "samples"} for line in journal(store, cell.key)]
        lines = lines if number == 0 else lines[:1] + lines[3:]
        for line in lines:
            line["metrics"] = {k: v for k, v in line["metrics"].items() if k.startswith(("theory", "algorithm_1"))}
        store.trial(cell.key).journal.write_bytes(b"".join(map(journal_line, lines)))
    cells = frame.load(store, "demo").cells
    line = verdict.of_cell(cells[0])
    assert line.tone == "up" and re.fullmatch(r"gap 1\.5e\+00 → \d\.\de-\d\d\.", line.text)
    assert verdict.of_seeds(cells).tone == "up" and "(median of 2 seeds)." in verdict.of_seeds(cells).text
    assert verdict._closer((1.0, 2.0)) == "down" and verdict._closer((1.0, 1.0)) == "flat"
    report = compare(store, "demo")
    assert [found.name for found in figures.panels(frame.load(store, "demo"), "counting")] == ["gap_inner"]
    assert report.figures[0].is_file() and "no result" not in report.html.read_text(encoding="utf-8")


def test_log_ticks_are_round_few_and_inside() -> None:
    """Mutants: floor for ceil (a tick below the axis); no thinning; 1, 2, 5 whatever the span."""
    for low, high in ((3e-15, 2.0), (2e-4, 0.7), (0.9e-3, 0.2), (0.11, 0.19), (0.02, 0.3), (1.01, 1.4), (1.1e-3, 0.9)):
        ticks = figures.log_ticks(low, high)
        assert 2 <= len(ticks) <= 7 and ticks == sorted(ticks), (low, high, ticks)
        assert all(low <= tick <= high for tick in ticks)
    assert figures.log_ticks(2e-4, 0.7) == pytest.approx([1e-3, 1e-2, 1e-1])
    assert figures.log_ticks(0.02, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert [figures.power(value) for value in (1e-12, 1.0, 3e-5, 10.0**-15)] == ["10⁻¹²", "10⁰", "3·10⁻⁵", "10⁻¹⁵"]
    assert figures.apart([8, 16, 17, 32, 512]) == [8, 16, 32, 512]


# ------------------------------------------------------------------------------------------------------------- errors


def test_unknown_sweep_lists_the_sweeps_there_are(gaps: tuple[Store, dict[str, Any], Report], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep='nope' is not in .*choose one of demo"):
        compare(gaps[0], "nope")
    with pytest.raises(UserError, match="pift launch"):
        compare(Store(tmp_path / "empty"), "demo")
    assert not (tmp_path / "empty").exists()


def test_a_sweep_before_its_first_step(tmp_path: Path) -> None:
    states = {("counting", method, 0.1, 0): "new" for method in ("pi_ft", "dpok")}
    fake_store(tmp_path, betas=[0.1], states=states)
    report = compare(Store(tmp_path), "demo")
    assert "2 of 2 cells have no final result" in report.html.read_text(encoding="utf-8")
    assert report.figures == () and len(rows(report.csv)) == 2


def test_sample_finds_its_trial_or_says_why_not(
    gaps: tuple[Store, dict[str, Any], Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan, _ = gaps
    keys = [cell["key"] for cell in plan["cells"]]
    calls: list[tuple[Any, ...]] = []
    drawer = type("Drawer", (), {"write": staticmethod(lambda *given: calls.append(given) or [tmp_path / "base.png"])})
    monkeypatch.setitem(__import__("sys").modules, "workers.sample", drawer)
    assert sample(store, keys[0][:6], 4, tmp_path) == [tmp_path / "base.png"]
    assert calls[0][1:] == (store.trial(keys[0]).adapter, 4, tmp_path, "cpu")
    assert calls[0][0]["prompt"] == PROMPTS["counting"]
    diverged = next(c["key"] for c in plan["cells"] if (c["method"], c["beta"], c["seed"]) == ("dpok", 0.1, 0))
    for key, message in (
        (diverged, "no adapter yet"),
        ("00", "begins 14 trials"),
        ("zz", "is no trial"),
        ("", "is no trial"),
    ):
        with pytest.raises(UserError, match=message):
            sample(store, key, 4, tmp_path)
    with pytest.raises(UserError, match="n=0"):
        sample(store, keys[0], 0, tmp_path)
    with pytest.raises(UserError, match="pift launch"):
        sample(Store(tmp_path / "none"), "ab", 1, tmp_path)
