"""The comparison: numbers against hand computation and scipy, nothing dropped, a page that needs nothing but itself."""

from __future__ import annotations

import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_store
from scipy import stats

from orchestrator.compare import Report, compare, figures, frame, pictures, verdict
from orchestrator.compare.statistics import estimate, paired, t_interval, t_quantile
from orchestrator.errors import UserError
from orchestrator.ledger import Store
from orchestrator.sample import sample
from workers.recorder import METRICS, read_journal

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


@pytest.mark.parametrize("which", ["gaps", "single"])
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
