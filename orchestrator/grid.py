"""From conf/, a sweep file and the command line to a plan: a frozen, checked TrialSpec per cell, named by its content.

    plan = compose(["sweep=quickstart", "beta=0.01,0.1"])
    plan.cells[0].key       "29455efa133dc24d"
    plan.cells[0].values    {"prompt": "counting", "beta": 0.01, "method": "pi_ft", "seed": 0}

Precedence, each winning over the ones before it:
    1. conf/config.yaml
    2. the files of the chosen groups; conf/model/toyland.yaml brings the sampler, adapter and budget that fit toyland
    3. the sweep file's `settings`, then its `per_method` of the cell's method
    4. the sweep file's `axes`
    5. the command line: one value sets the key (and replaces an axis of that name by that value), several values
       replace the axis of that name or, where there is none, make a new one behind the others
The choice of a group (model, reward, method, prompts, executor, tracking, resources) follows the same order; model,
reward and method may be axes.

A component's own setting (method.lr, model.path, reward.path, judge.path) applies to the cells whose component has it,
and is an error when none has. An axis over such a setting leaves the other cells as they are, once each, its value
there None. `exclude` drops the cells that agree with every key of one of its entries (a list there means any of these).
Two cells that come out as the same trial are an error that names the axis that does nothing.
"""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestrator.conf_tree import GROUPS, ConfTree
from orchestrator.errors import UserError
from orchestrator.overrides import Override, canonical, close, parse
from orchestrator.schedule import Budget
from workers.remote import Remote, RemoteError, is_url
from workers.spec import COMPONENTS, SpecError, TrialSpec, integer, locate, number, printable, settings
from workers.text import one_line

GROUP_AXES = ("model", "reward", "method")
"""The groups that may be axes; the others say how a sweep runs, not what a cell is."""
CANONICAL = ("prompt", "beta", "method", "seed")
"""The axes every plan has, swept or not."""
SPEC_KEYS = (
    "beta", "beta_schedule", "beta_rate", "seed", *COMPONENTS, "sampler", "lora", "train", "eval", "regulariser",
    "regulariser_order", "regulariser_samples", "initial_law",
)  # fmt: skip
RUN_KEYS = ("executor", "tracking", "resources", "store", "cluster", "retry_failed", "budget", "limits")
"""What is not part of a trial: where and how the sweep runs."""
ENVIRONMENT = {"store": "PIFT_STORE", "executor": "PIFT_EXECUTOR"}
"""Variables that conf/ reads and whose values are checked here."""
SWEEP_KEYS = ("name", "axes", "exclude", "settings", "per_method")
LARGEST_GRID = 10_000
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_MISSING = object()


@dataclass(frozen=True)
class Cell:
    """One trial of the grid."""

    key: str
    spec: TrialSpec
    values: dict[str, Any]
    """Axis -> this cell's label on it, in the plan's order; None where the axis does not apply."""

    @property
    def label(self) -> str:
        """For people: the spec's label and the values on the further axes."""
        further = (
            f"{name}={value}" for name, value in self.values.items() if name not in CANONICAL and value is not None
        )
        return " ".join([self.spec.label, *further])

    def row(self) -> dict[str, Any]:
        """The cell in plan.json and in `pift plan --json`."""
        return {"key": self.key, "label": self.label, "prompt_text": self.spec.prompt, **self.values}


@dataclass(frozen=True)
class Plan:
    """A resolved sweep."""

    sweep: str
    axes: dict[str, list[Any]]
    """Axis -> its labels in order; prompt, beta, method and seed are always there."""
    cells: list[Cell]
    config: dict[str, Any]
    """executor, tracking, resources, store, cluster, retry_failed, budget, limits: what does not belong to a trial."""
    overrides: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What plan.json holds but for the time it was written."""
        return {
            "sweep": self.sweep,
            "axes": self.axes,
            "cells": [cell.row() for cell in self.cells],
            "specs": {cell.key: cell.spec.to_dict() for cell in self.cells},
            "overrides": self.overrides,
        }


@dataclass(frozen=True)
class Sweep:
    """A sweep file with the command line laid over it: what is set, and what is swept."""

    name: str
    axes: dict[str, list[Any]]
    exclude: list[dict[str, Any]]
    settings: dict[str, Any]
    per_method: dict[str, dict[str, Any]]
    command_line: dict[str, Any]


def compose(overrides: list[str], conf_dirs: Sequence[Path] = ()) -> Plan:
    """The plan of a command line. Raises UserError with every problem of a kind at once; writes nothing."""
    tree = ConfTree([Path(folder) for folder in conf_dirs])
    sweep = _sweep(tree, parse(overrides))
    choices = _group_choices(tree, sweep)
    bases = [tree.compose(choice) for choice in choices]
    _check_files(tree, choices, bases)
    _check_keys(tree, sweep, bases)
    drafts = _cells(tree, sweep, choices)
    cells = _checked(drafts)
    _refuse_equal(cells, [draft.point for draft in drafts])
    return Plan(sweep.name, _axes(sweep, cells), cells, _run_config(sweep, bases[0]), list(overrides))


# ---- what is asked for: the sweep file and the command line over it


def _sweep(tree: ConfTree, overrides: dict[str, Override]) -> Sweep:
    """Read the sweep file and lay the command line over its axes."""
    chosen = overrides.pop("sweep", None)
    choice = chosen.values[0] if chosen else tree.defaults["sweep"]
    if chosen and chosen.swept:
        raise UserError(f"{chosen.text}: one launch runs one sweep; write sweep={choice}")
    if problems := tree.problems("sweep", choice):
        raise UserError(*problems)
    path = tree.find(f"sweep/{choice}")
    content = _sweep_content(path, tree.read(path))
    name = str(overrides.pop("sweep.name").values[0]) if "sweep.name" in overrides else str(content["name"])
    if not FOLDER_NAME.fullmatch(name):
        raise UserError(f"sweep.name={name!r} names a folder: use letters, digits, . _ - as in sweep.name=my_sweep")
    axes: dict[str, list[Any]] = dict(content["axes"])
    single: dict[str, Any] = {}
    for key, override in overrides.items():
        if override.swept or key in axes:
            axes[key] = list(override.values)
        else:
            single[key] = override.values[0]
    problems = [
        ("" if key in overrides else f"sweep {choice}: ") + problem
        for key, values in axes.items()
        for problem in _axis_problems(key, values)
    ]
    if problems:
        raise UserError(*problems)
    return Sweep(name, axes, content["exclude"], content["settings"], content["per_method"], single)


def _sweep_content(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """A sweep file's content, with nothing missing. Raises UserError when it has another form."""
    problems = [f"{path}: {key} is not known there{close(key, SWEEP_KEYS)}" for key in raw if key not in SWEEP_KEYS]
    inner = {"axes": list, "exclude": dict, "per_method": dict}
    content: dict[str, Any] = {"name": raw.get("name") or path.stem}
    for key, kind, example in (
        ("axes", dict, "{beta: [0.01, 0.1]}"),
        ("exclude", list, "[{method: dpok, beta: 1}]"),
        ("settings", dict, "{train.gradient_steps: 40}"),
        ("per_method", dict, "{dpok: {method.lr: 1e-4}}"),
    ):
        value = kind() if raw.get(key) is None else raw[key]
        right = isinstance(value, kind)
        if right and key in inner:
            entries = value.values() if isinstance(value, dict) else value
            right = all(isinstance(entry, inner[key]) for entry in entries)
        if not right:
            problems.append(f"{path}: {key} has the wrong form; write for example {key}: {example}")
        content[key] = value
    if problems:
        raise UserError(*problems)
    for key in ("axes", "settings"):
        content[key] = _canonical(content[key])
    content["exclude"] = [_canonical(entry) for entry in content["exclude"]]
    content["per_method"] = {name: _canonical(values) for name, values in content["per_method"].items()}
    return content


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    return {canonical(str(key)): value for key, value in values.items()}


def _axis_problems(key: str, values: Sequence[Any]) -> list[str]:
    """What is wrong with an axis as such, whatever its key means in a cell."""
    if not values or list(values) == [[]]:
        return [f"the axis {key} is empty; give it a value, as in {key}=a,b, or take it out of the sweep file"]
    head = key.partition(".")[0]
    if head == "prompts":
        return ["prompts cannot be an axis; sweep over the prompts of one set, as in prompt=counting,color"]
    if head in RUN_KEYS or head == "sweep":
        return [
            f"{key} cannot be an axis: it is no part of a trial; give it one value, as in {key}={_text(values[:1])}"
        ]
    seen: dict[Any, list[Any]] = {}
    for value in values:
        rivals = seen.setdefault(value if isinstance(value, Hashable) else None, [])
        if any(_same(value, other) for other in rivals):
            return [f"the axis {key} holds {_text([value])} twice; take one out"]
        rivals.append(value)
    return []


def _group_choices(tree: ConfTree, sweep: Sweep) -> list[dict[str, str]]:
    """Every combination of group choices of the grid, the one that compose() needs for a cell among them."""
    options: dict[str, list[Any]] = {}
    for group, default in tree.defaults.items():
        if group == "sweep":
            continue
        for source in (sweep.command_line, sweep.axes, sweep.settings):
            if group in source:
                options[group] = source[group] if source is sweep.axes else [source[group]]
                break
        else:
            options[group] = [default]
        options[group] = [str(name) if isinstance(name, int | float) else name for name in options[group]]
    problems = [
        _origin(group, sweep) + problem
        for group, names in options.items()
        for name in names
        for problem in tree.problems(group, name)
    ]
    known = tree.choices("method")
    problems += [
        f"sweep {sweep.name}: per_method has {name}, which is no method{close(name, known)}"
        for name in sweep.per_method
        if name not in known
    ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return [dict(zip(options, names, strict=True)) for names in itertools.product(*options.values())]


def _origin(key: str, sweep: Sweep) -> str:
    """The variable that a setting has its value from, for the beginning of a message; empty for one that was typed."""
    name = ENVIRONMENT.get(key, "")
    return f"{name}: " if name in os.environ and key not in {**sweep.settings, **sweep.command_line} else ""


# ---- keys: does every one of them exist, and in which cells


def _check_files(tree: ConfTree, choices: Sequence[Mapping[str, str]], bases: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError for component files that lack `_target_` or are not called what they call themselves."""
    problems: dict[str, None] = {}
    for choice, base in zip(choices, bases, strict=True):
        for group in GROUP_AXES:
            component, path = base.get(group), tree.find(f"{group}/{choice[group]}")
            if isinstance(component, Mapping) and isinstance(component.get(group), Mapping):
                problems[f"{path} has {group}: inside {group}; write `# @package _global_` as its first line"] = None
            elif not isinstance(component, Mapping) or not {"_target_", "name"} <= set(component):
                problems[f"{path} needs _target_ (the class, as in package.module.Class) and name"] = None
            elif component["name"] != choice[group]:
                problems[
                    f"{path} has name: {component['name']}; write name: {choice[group]}, as the file is called"
                ] = None
    if problems:
        raise UserError(*problems)


def _check_keys(tree: ConfTree, sweep: Sweep, bases: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError for every key that no cell has, and for values put where a group of settings stands."""
    used = {base["method"]["name"] for base in bases}
    problems = []
    for where, values in (
        ("", sweep.command_line),
        ("", dict.fromkeys(sweep.axes)),
        (f"sweep {sweep.name}, settings: ", sweep.settings),
        *(
            (f"sweep {sweep.name}, per_method {name}: ", sweep.per_method[name])
            for name in sweep.per_method
            if name in used
        ),
    ):
        for key, value in values.items():
            problems += [where + problem for problem in _key_problems(tree, key, value, bases)]
    known = {*CANONICAL, *sweep.axes}
    problems += [
        f"sweep {sweep.name}, exclude: {key} is not an axis{close(key, known)}"
        for entry in sweep.exclude
        for key in entry
        if key not in known and _key_problems(tree, key, None, bases)
    ]
    if problems:
        raise UserError(*problems)


def _key_problems(tree: ConfTree, key: str, value: Any, bases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with setting `key`, in the configurations of all group choices of the grid."""
    if key in GROUPS and key != "sweep":
        return []
    head, _, rest = key.partition(".")
    here = [current for base in bases if (current := _get(base, key)) is not _MISSING]
    if head in COMPONENTS and rest in ("_target_", "name", "fingerprint"):
        return [
            f"{key} stands in the file of conf/{head}/; choose another file, or add one of yours with pift --conf DIR"
        ]
    if head == "sweep":
        return [f"{key} is set in the sweep file; here write the axis itself, as in beta=0.01,0.1 (or sweep.name=...)"]
    if head == "prompts":
        return [f"{key} is set in a file of conf/prompts/; a text of your own: \"prompt='{value}'\""]
    if not here:
        known = {name for base in bases for name in _flat(base)} | set(GROUPS)
        owners = _owners(tree, head, rest)
        if owners and head in COMPONENTS:
            names = sorted({str(base[head]["name"]) for base in bases if isinstance(base.get(head), Mapping)})
            return [f"{key} is not a setting of {head}={','.join(names)}; {', '.join(owners)} has it"]
        return [f"{key} is not a setting; pift plan --help and conf/ list them{close(key, known)}"]
    if isinstance(here[0], Mapping) and not (key == "judge" and value is None):
        inner = ", ".join(f"{key}.{name}" for name in here[0] if name not in ("_target_", "name"))
        return [f"{key}={_text([value])} replaces a group of settings; set one of them: {inner}"]
    if value == [] and key in CANONICAL:
        return [f"the axis {key} is empty; give it a value, as in {key}=a,b, or leave it out"]
    if isinstance(value, list) and key in CANONICAL:
        return [f"{key}={_text([value])} is a list; several values are {key}={_text(value) if value else 'a,b'}"]
    return []


def _owners(tree: ConfTree, group: str, setting: str) -> list[str]:
    """The choices of a group whose files have a setting."""
    if group not in GROUP_AXES or not setting:
        return []
    files = {name: tree.read(tree.find(f"{group}/{name}")) for name in tree.choices(group)}
    return [name for name, content in files.items() if setting in content]


def _get(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or _MISSING."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key that exists. A whole number where a real one stands becomes real, so that 1 and 1.0 are one trial.
    `config` itself changes; the mappings in it are replaced by changed copies."""
    *parents, name = key.split(".")
    for part in parents:
        config[part] = dict(config[part])
        config = config[part]
    if isinstance(config[name], float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    config[name] = value


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that may be set."""
    for name, value in config.items():
        if isinstance(value, Mapping) and prefix + name not in ("sweep", "prompts"):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in ("_target_", "name"):
            yield prefix + name


# ---- cells


@dataclass(frozen=True)
class _Draft:
    """A cell before its check: the spec as plain data, and its labels on the axes that are not in CANONICAL."""

    point: Mapping[str, Any]
    """What was asked for on each axis."""
    content: dict[str, Any]
    further: dict[str, Any]


def _cells(tree: ConfTree, sweep: Sweep, choices: Sequence[Mapping[str, str]]) -> list[_Draft]:
    """The product of the axes less the exclusions, every cell resolved."""
    size = 1
    for values in sweep.axes.values():
        size *= len(values)
    if size > LARGEST_GRID:
        raise UserError(f"the grid has {size} cells, at most {LARGEST_GRID}; shorten an axis: {', '.join(sweep.axes)}")
    groups = [group for group in GROUP_AXES if group in sweep.axes]
    grounds = {tuple(choice[group] for group in groups): _ground(tree, sweep, choice) for choice in choices}
    drafts: list[_Draft] = []
    skipped: set[str] = set()
    for labels in itertools.product(*sweep.axes.values()):
        point = dict(zip(sweep.axes, labels, strict=True))
        draft = _resolve(grounds[tuple(str(point[group]) for group in groups)], sweep, point)
        if _excluded(draft, sweep.exclude):
            continue
        idle = [name for name, value in draft.further.items() if value is None and name.partition(".")[0] in COMPONENTS]
        if idle:
            mark = json.dumps([draft.content, idle], sort_keys=True, default=str)
            if mark in skipped:
                continue
            skipped.add(mark)
        drafts.append(draft)
    if not drafts:
        raise UserError(f"sweep {sweep.name} has no cell left: its exclude list drops all {size} of them")
    _distinct_slugs(drafts)
    return drafts


@dataclass(frozen=True)
class _Ground:
    """What the cells of one choice of groups start from; shared among them, so nothing in it is ever changed."""

    config: dict[str, Any]
    """The composed configuration with the sweep file's `settings` and `per_method` laid over it."""
    idle: frozenset[str]
    """The keys of those that the configuration does not have."""
    refers: bool
    """Whether there is a `${...}` in what a trial is made of."""
    followed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Configurations whose `${...}` have been followed, by their text without the seed."""


def _ground(tree: ConfTree, sweep: Sweep, choice: Mapping[str, str]) -> _Ground:
    config, idle = _laid_over(tree.compose(choice), sweep.settings, sweep.per_method.get(choice["method"], {}))
    return _Ground(config, idle, _refers({key: value for key, value in config.items() if key not in RUN_KEYS}))


def _resolve(ground: _Ground, sweep: Sweep, point: Mapping[str, Any]) -> _Draft:
    """One cell: the composed configuration with the layers of the module's docstring laid over it."""
    config, idle = _laid_over(ground.config, point, sweep.command_line)
    if ground.refers or _refers([*point.values(), *sweep.command_line.values()]):
        config = _followed(config, ground.followed)
    prompt_id, prompt = _prompt(config["prompt"], _prompts(config))
    content = {key: config.get(key) for key in SPEC_KEYS} | {"prompt": prompt, "prompt_id": prompt_id}
    further = {}
    for name in point:
        if name in GROUP_AXES:
            further[name] = config[name]["name"]
        elif name not in CANONICAL:
            further[name] = None if name in idle or name in ground.idle else _label(_get(config, name))
    return _Draft(point, content, {name: label for name, label in further.items() if name not in CANONICAL})


def _laid_over(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """A configuration with layers of values over it, and the keys that it does not have; choices of groups are passed
    over. What no layer touches is shared with `base`."""
    config, idle = dict(base), set()
    for layer in layers:
        for key, value in layer.items():
            if key in GROUPS:
                continue
            if _get(config, key) is _MISSING:
                idle.add(key)
            else:
                _set(config, key, value)
    return config, frozenset(idle)


def _refers(value: Any) -> bool:
    """Whether there is a `${...}` somewhere."""
    return "${" in json.dumps(value, default=str)


def _followed(config: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`_interpolated`, which takes milliseconds, once for all that differ in nothing but a seed nobody refers to."""
    text = json.dumps({name: value for name, value in config.items() if name != "seed"}, default=str)
    if re.search(r"\$\{[^}]*seed", text) or _refers(config["seed"]):
        return _interpolated(config)
    if text not in known:
        known[text] = _interpolated(config)
    return known[text] | {"seed": config["seed"]}


def _interpolated(config: dict[str, Any]) -> dict[str, Any]:
    """`${...}` replaced by what it refers to."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(
            f"a ${{...}} in conf/ or in an override refers to nothing: {str(error).splitlines()[0]}"
        ) from None


def _excluded(draft: _Draft, exclude: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cell agrees with every key of one of the entries."""
    content = draft.content
    labels = {**draft.further, "prompt": content["prompt_id"], "beta": content["beta"], "seed": content["seed"]}
    labels["method"] = content["method"]["name"]

    def agrees(key: str, wanted: Any) -> bool:
        value = labels[key] if key in labels else _label(_get(content, key))
        options = wanted if isinstance(wanted, list) else [wanted]
        return any(_same(value, option) for option in options) or (key == "prompt" and content["prompt"] in options)

    return any(entry and all(agrees(key, wanted) for key, wanted in entry.items()) for entry in exclude)


def _prompts(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Id -> text; a prompts file may hold the lines themselves or have them under `prompts:`."""
    prompts = config["prompts"]
    nested = prompts.get("prompts")
    return nested if isinstance(nested, Mapping) else prompts


def _prompt(value: Any, prompts: Mapping[str, str]) -> tuple[str, Any]:
    """(id, text) of `prompt=`: an id, the text of one, or a free text, whose id is a slug."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        return "", "" if text is None else text
    text = text.strip()
    if text in prompts:
        return text, prompts[text]
    for name, known in prompts.items():
        if known == text:
            return name, text
    if re.fullmatch(r"[\w-]+", text) and close(text, prompts):
        raise UserError(
            f"prompt={text} is no id of the prompt set ({', '.join(prompts)}){close(text, prompts)} "
            f"If the word itself is the prompt, end it with a full stop: prompt={text}."
        )
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return slug or _digest(text), text


def _distinct_slugs(drafts: Sequence[_Draft]) -> None:
    """Give free texts with the same slug ids of their own."""
    texts: dict[str, dict[str, None]] = {}
    for draft in drafts:
        if isinstance(draft.content["prompt"], str):
            texts.setdefault(draft.content["prompt_id"], {})[draft.content["prompt"]] = None
    for draft in drafts:
        rivals = texts.get(draft.content["prompt_id"], {})
        if len(rivals) > 1 and draft.content["prompt"] != next(iter(rivals)):
            draft.content["prompt_id"] += "-" + _digest(draft.content["prompt"])


def _digest(text: str) -> str:
    return sha256(text.encode(errors="surrogatepass")).hexdigest()[:6]


# ---- checks


def _checked(drafts: Sequence[_Draft]) -> list[Cell]:
    """The drafts as cells. Raises UserError with the problems of all cells, each once."""
    problems: dict[str, None] = {}
    specs: list[TrialSpec] = []
    checked: dict[str, list[str]] = {}
    for draft in drafts:
        try:
            specs.append(TrialSpec.from_dict(draft.content, checked))
        except SpecError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UserError(*problems)
    fingerprints: dict[str, str | None] = {}
    cells = []
    for spec, draft in zip(specs, drafts, strict=True):
        spec = _with_fingerprints(spec, fingerprints)
        canonical = {"prompt": spec.prompt_id, "beta": spec.beta, "method": spec.method["name"], "seed": spec.seed}
        cells.append(Cell(spec.key, spec, canonical | draft.further))
    return cells


def _with_fingerprints(spec: TrialSpec, known: dict[str, str | None]) -> TrialSpec:
    """The spec with the content hash of its components' weights; each distinct component is hashed once."""
    changed: dict[str, Any] = {}
    for name in COMPONENTS:
        component = getattr(spec, name)
        if component is None:
            continue
        mark = json.dumps(component, sort_keys=True, default=str)
        if mark not in known:
            known[mark] = _fingerprint(name, component)
        if known[mark] is not None:
            changed[name] = {**component, "fingerprint": known[mark]}
    return replace(spec, **changed)


def _fingerprint(name: str, component: Mapping[str, Any]) -> str | None:
    make = getattr(locate(component["_target_"]), "fingerprint", None)
    if make is None:
        return None
    try:
        return make(settings(component))
    except OSError as error:
        raise UserError(
            f"the weights of {name}={component['name']} cannot be read: {error}; see conf/{name}/"
        ) from None


def _refuse_equal(cells: Sequence[Cell], asked: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where two cells are the same trial, naming both and the axis that does nothing."""
    first: dict[str, Mapping[str, Any]] = {}
    problems = []
    for cell, point in zip(cells, asked, strict=True):
        other = first.setdefault(cell.key, point)
        if other is not point:
            idle = [name for name in point if not _same(point[name], other[name])]
            one, two = (" ".join(f"{name}={_text([at[name]])}" for name in idle) for at in (other, point))
            problems.append(
                f"two cells are the same trial {cell.key} ({cell.spec.label}): {one} and {two}; "
                f"the axis {' and '.join(idle)} decides nothing there: take one of the values out"
            )
    if problems:
        raise UserError(*problems[:3], *([f"... and {len(problems) - 3} more pairs"] if len(problems) > 3 else []))


# ---- what the plan carries besides its cells


def _axes(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """Axis -> labels that occur, in order: the sweep's axes first, then those of CANONICAL that are not swept."""
    axes: dict[str, list[Any]] = {}
    for name in [*sweep.axes, *(name for name in CANONICAL if name not in sweep.axes)]:
        found = dict.fromkeys(cell.values[name] for cell in cells)
        axes[name] = [label for label in found if label is not None]
    return axes


def _run_config(sweep: Sweep, base: Mapping[str, Any]) -> dict[str, Any]:
    """What RUN_KEYS names, with the sweep's settings and the command line over it."""
    if missing := [key for key in RUN_KEYS if key not in base]:
        raise UserError(f"conf/config.yaml lacks {', '.join(missing)}; take the shipped one as the example")
    config = copy.deepcopy(dict(base))
    problems = []
    for layer in (sweep.settings, sweep.command_line):
        for key, value in layer.items():
            if key.partition(".")[0] in RUN_KEYS and key not in GROUPS:
                problems += _run_problems(key, _get(config, key), value)
                _set(config, key, value)
    if problems:
        raise UserError(*problems)
    if _refers(config):
        config = _interpolated(config)
    problems = [*_budget_problems(config["budget"]), *_limits_problems(config["limits"])]
    if origin := _origin("store", sweep):
        problems += [origin + problem for problem in _run_problems("store", "", config["store"])]
    if problems:
        raise UserError(*problems)
    return {key: config[key] for key in RUN_KEYS}


def _run_problems(key: str, current: Any, value: Any) -> list[str]:
    """What is wrong with a setting that is not part of a trial; budget and limits are checked as a whole."""
    if key.partition(".")[0] in ("budget", "limits"):
        return []
    if isinstance(current, bool) and not isinstance(value, bool):
        return [f"{key}={_text([value])} is neither true nor false; write for example {key}=true"]
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    if isinstance(current, int | float) and not isinstance(current, bool) and not number:
        return [f"{key}={_text([value])} is not a number of at least 0; write for example {key}={current}"]
    if key == "store" and (not isinstance(value, str) or not value.strip()):
        return [f"store={_text([value])} is not a folder; write for example store=store"]
    if key == "store":
        return printable("store", value) or (_url_problems(value) if is_url(value) else _path_problems(value))
    if key == "tracking.required" and not (value is None or isinstance(value, bool)):
        return [f"{key}={_text([value])} is neither true, false nor null; write for example {key}=false"]
    return []


def _path_problems(path: str) -> list[str]:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"{one_line(path, 80)} ({len(path)} letters)"
            return [f"store={shown} is longer than a path may be; write for example store=store"]
    return []


def _url_problems(url: str) -> list[str]:
    try:
        Remote(url)
    except RemoteError as error:
        return [str(error)]
    return []


def _budget_problems(budget: Mapping[str, Any]) -> list[str]:
    try:
        Budget.of(budget)
    except UserError as error:
        return error.problems
    return []


def _limits_problems(limits: Mapping[str, Any]) -> list[str]:
    """What is wrong with what a trial puts up with; null switches a limit off where that makes sense."""
    found = []
    for name, why, example in (
        ("kl_nats", "the path KL beyond which a trial counts as diverged, null for none", 10_000),
        ("reward_seconds", "how long one reward call may take, null for ever", 600),
    ):
        if limits[name] is not None:
            found += number(f"limits.{name}", limits[name], 0, why, open_low=True, example=example)
    found += integer(
        "limits.reward_retries", limits["reward_retries"], 0, "how often a failing reward call is repeated"
    )
    why = "how long a trial trains on while its folder cannot be written"
    found += number("limits.storage_seconds", limits["storage_seconds"], 0, why, example=300)
    return found + integer("limits.deaths", limits["deaths"], 1, "attempts in a row that may die without a new step")


def _label(value: Any) -> Any:
    """A value as it stands in tables and in plan.json: a number, a word, or a list's text."""
    return value if value is None or isinstance(value, str | int | float | bool) else _text([value])


def _same(value: Any, other: Any) -> bool:
    """Equality of labels: 1 is 1.0, but True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _text(values: Sequence[Any]) -> str:
    """Values as one would type them."""
    shown = [
        json.dumps(value) if isinstance(value, list | dict | bool) or value is None else str(value) for value in values
    ]
    return ",".join(shown) or "''"
