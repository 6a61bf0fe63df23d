"""What MLflow's page of runs opens on: one saved view per sweep, and one per prompt where it has several.

    tags(plan, store_id)            {tag of the experiment: its content}: the views, as that page keeps them
    link(experiment_id, view)       the part of a page's address that opens one, behind the server's
    colours(cells)                  {key: the colour of a trial's curves}: a hue per method, darker for a smaller beta

A view says which runs are shown (the sweep's trials), which columns (how a trial did, then what it is), and which
charts: reward, KL, J and the judge over training, reward against KL, the pictures at the end and by step. All other
metrics have charts too, folded away. The format is that of MLflow 3.17 ("Save & share view"); its pages read it, and an
older server shows its own defaults. Nothing here asks MLflow anything.
"""

from __future__ import annotations

import base64
import colorsys
import contextlib
import json
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from orchestrator.schedule import arm

PREFIX = "mlflow.sharedViewState."
"""MLflow's tag of an experiment that holds a view; the view's id comes behind it."""
MOST_PROMPTS = 12
"""Prompts with a view of their own; a longer list would bury the sweeps."""
MOST_SHOWN = 60
"""Runs drawn at once; of a larger sweep the page draws its first twenty until it is told otherwise."""
SAMPLES, END = "samples", "end"
"""Names of logged pictures: an evaluation's strip at its step, and the last one of a finished trial."""
PAGES = {"charts": "CHART", "table": "TABLE"}
METRICS = (
    "eval/reward_mean", "eval/kl_path_nats", "eval/objective", "eval/judge_mean", "eval/diversity", "theory/gap",
    "budget/seconds",
)  # fmt: skip
"""The first columns; one that no run has is left out by the page."""
PARAMS = ("method.name", "beta", "prompt_id", "seed")
REWARD, KL, JUDGE = METRICS[0], METRICS[1], METRICS[3]
HUES = (0.58, 0.07, 0.33, 0.79, 0.95, 0.48, 0.14, 0.67)
"""Blue, orange, green, purple, pink, teal, yellow, violet."""
DARK, LIGHT, SATURATION = 0.28, 0.68, 0.72


def view_id(store_id: str, sweep: str, prompt: str | None = None) -> str:
    """The id of a sweep's view, or of its view of one prompt: the same at every launch."""
    words = f"{store_id}\n{sweep}"
    return "-".join(["pift", _digest(words), *([] if prompt is None else [_digest(prompt)])])


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def prompts_of(plan: Mapping[str, Any]) -> list[str]:
    """The prompt ids that get a view of their own: none where there is one prompt, or very many; and no id that
    MLflow's filters could not name."""
    found = list(dict.fromkeys(str(cell["prompt"]) for cell in plan["cells"] if "prompt" in cell))
    if not 1 < len(found) <= MOST_PROMPTS:
        return []
    return [prompt for prompt in found if "'" not in prompt and "\\" not in prompt]


def tags(plan: Mapping[str, Any], store_id: str) -> dict[str, str]:
    """The views of a plan (the content of plan.json) as tags of the experiment."""
    sweep, created = plan["sweep"], _milliseconds(plan.get("created_at"))
    condition = f"tags.`sweep.{sweep}` = 'cell' and tags.`store.id` = '{store_id}'"
    shown = "SHOW_ALL" if len(plan["cells"]) <= MOST_SHOWN else "FIRST_20_RUNS"
    views = {view_id(store_id, sweep): (sweep, condition)}
    for prompt in prompts_of(plan):
        narrower = f"{condition} and params.prompt_id = '{prompt}'"
        views[view_id(store_id, sweep, prompt)] = (f"{sweep} · {prompt}", narrower)
    further = [name for name in plan["axes"] if name not in ("prompt", "beta", "method", "seed")]
    return {
        f"{PREFIX}{identity}": _packed(name, _state(which, shown, further), created - number)
        for number, (identity, (name, which)) in enumerate(views.items())
    }


def is_ours(tag: str, store_id: str, sweep: str) -> bool:
    """Whether a tag of the experiment is a view of that sweep."""
    return re.fullmatch(rf"{re.escape(PREFIX + view_id(store_id, sweep))}(-\w+)?", tag) is not None


def same(one: str | None, other: str) -> bool:
    """Whether two tags hold the same view, whenever each was made."""
    try:
        contents = [json.loads(text) | {"createdAt": 0} for text in (one or "{}", other)]
    except (ValueError, TypeError):
        return False
    return bool(contents[0] == contents[1])


def link(experiment_id: str, view: str | None = None, page: str = "charts") -> str:
    """#/experiments/1/runs?viewStateShareKey=...: what follows a server's address; without a view all runs."""
    base = f"#/experiments/{quote(experiment_id, safe='')}/runs"
    return base if view is None else f"{base}?viewStateShareKey={view}&compareRunsMode={PAGES[page]}"


def others(tags: Mapping[str, str], experiment_id: str, store_id: str, sweep: str) -> list[tuple[str, str]]:
    """(name, address) of the views that are no view of this sweep, newest first, of an experiment's tags."""
    found = []
    for tag, text in tags.items():
        identity = tag.removeprefix(PREFIX)
        if re.fullmatch(r"pift-[0-9a-f]{10}", identity) and not is_ours(tag, store_id, sweep):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                content = json.loads(text)
                found.append((-float(content["createdAt"]), str(content["name"]), link(experiment_id, identity)))
    return [(name, address) for _, name, address in sorted(found)]


def colours(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for every cell of a plan: cells that differ in prompt or seed alone have the same."""
    variants = list(dict.fromkeys(_variant(cell) for cell in cells))
    betas = sorted({float(cell["beta"]) for cell in cells if "beta" in cell})
    found = {}
    for cell in cells:
        hue = HUES[variants.index(_variant(cell)) % len(HUES)]
        rank = betas.index(float(cell["beta"])) / max(1, len(betas) - 1) if "beta" in cell else 0.5
        lightness = DARK + (LIGHT - DARK) * (rank if len(betas) > 1 else 0.5)
        parts = colorsys.hls_to_rgb(hue, lightness, SATURATION)
        found[cell["key"]] = "#" + "".join(f"{round(255 * part):02x}" for part in parts)
    return found


def _variant(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a cell's curve from others but for beta: its method, and its values on further axes."""
    return tuple(part for part in arm(cell) if not part.startswith("beta="))


# ---- the format


def _packed(name: str, state: Mapping[str, Any], created: int) -> str:
    """The tag's content: the name in the page's menu "Views", its age (the menu is sorted by it), the packed state."""
    text = json.dumps(state, separators=(",", ":")).encode()
    packed = f"deflate;{base64.b64encode(zlib.compress(text, 9)).decode()}"
    return json.dumps({"name": name, "createdAt": created, "state": packed})


def _state(condition: str, shown: str, further: Sequence[str]) -> dict[str, Any]:
    """What the page remembers of its settings."""
    params = [*PARAMS[:2], *further, *PARAMS[2:]]
    columns = [*(f"metrics.`{name}`" for name in METRICS), *(f"params.`{name}`" for name in params)]
    columns.append("attributes.`Models`")
    sections, charts = _charts()
    return {
        "searchFilter": condition,
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": ["attributes.`Run Name`", "attributes.`Created`", *columns],
        "columnWidths": {name: 130 for name in columns},
        "runsHiddenMode": shown,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _charts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(sections, charts). The page adds a chart for every metric that has none, to the section of its prefix."""
    training, front, pictures = (
        _section("Over training: reward, path KL in nats, J, judge", columns=2, cardHeight=300),
        _section("Reward and judge against path KL, at the end", columns=2, cardHeight=360),
        _section("Pictures: at the end, and by step (move the slider)", columns=1, cardHeight=560),
    )
    folded = [_section(name, display=False) for name in ("eval", "train", "theory", "budget")]
    folded += [_section(name, display=False) for name in ("Model metrics", "System metrics")]
    charts = [_line(training, name) for name in (REWARD, KL, "eval/objective", "eval/judge_mean")]
    for quality in (REWARD, JUDGE):
        axes = {"xaxis": {"key": KL, "type": "METRIC"}, "yaxis": {"key": quality, "type": "METRIC"}}
        charts.append(_chart(front, "SCATTER", quality, **axes))
    for name in (END, SAMPLES):
        charts.append(_chart(pictures, "IMAGE", name, imageKeys=[name], step=0, showRunParams=False))
    return [training, front, pictures, *folded], charts


def _section(name: str, **layout: Any) -> dict[str, Any]:
    return {"uuid": _uuid(name), "name": name, "display": True, "isReordered": True, "deleted": False} | layout


def _line(section: Mapping[str, Any], metric: str) -> dict[str, Any]:
    ways = {"lineSmoothness": 0, "xAxisKey": "step", "selectedXAxisMetricKey": "", "xAxisScaleType": "linear"}
    ways |= {"scaleType": "linear", "range": {}, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return _chart(section, "LINE", metric, metricKey=metric, selectedMetricKeys=[metric], **ways)


def _chart(section: Mapping[str, Any], kind: str, name: str, **content: Any) -> dict[str, Any]:
    place = {"uuid": _uuid(f"{section['name']} {kind} {name}"), "metricSectionId": section["uuid"]}
    shared = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return {"type": kind} | place | shared | content


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"pift {name}"))


def _milliseconds(created: Any) -> int:
    """A plan's time (seconds, or ISO 8601 of an older one) as MLflow counts."""
    if isinstance(created, str):
        return round(datetime.fromisoformat(created).timestamp() * 1000)
    return round(float(created or 0) * 1000)
