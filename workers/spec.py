"""TrialSpec: what one trial is. Frozen, range-checked, named by its content.

The key of a trial is the SHA-256 of its identity: everything that decides which numbers come out, and nothing else.
Where it runs, how often it evaluates or checkpoints and what its prompt's label or its sweep is called do not count.
A component (model, reward, judge, method) is a mapping with `_target_` (the class), `name` (its label) and the
class's own settings; a class that wants its settings checked offers `check(spec) -> list of problems`, the same for
every seed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, cast

from workers.text import one_line, unprintable

SCHEMA = 1
"""Raised when the meaning of a field changes, so that old results are never taken for new ones."""

BETA_SCHEDULES = ("constant", "sigma_squared", "contraction")
INITIAL_LAWS = ("fixed", "gaussian")
LR_SCHEDULES = ("constant", "linear", "cosine")
COMPONENTS = ("model", "reward", "judge", "method")


class SpecError(ValueError):
    """One or more things wrong with a spec, each one sentence that names the field, the value and the fix."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def integer(field: str, value: Any, low: int, why: str, high: int | None = None) -> list[str]:
    """Problems with an integer setting: `low` <= value <= `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{field}={value!r} is not a whole number ({why}); write for example {field}={low}"]
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        return [f"{field}={value} is out of range: {why}, {bounds}; write for example {field}={low}"]
    return []


def number(
    field: str,
    value: Any,
    low: float,
    why: str,
    *,
    high: float = math.inf,
    open_low: bool = False,
    example: float = 0.1,
) -> list[str]:
    """Problems with a real setting: `low` <= value <= `high` (`open_low`: strictly above)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"{field}={value!r} is not a finite number ({why}); write for example {field}={example}"]
    if value < low or value > high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
            f" and at most {high:g}" if high < math.inf else ""
        )
        return [f"{field}={value} is out of range: {why}, {bounds}; write for example {field}={example}"]
    return []


def choice(field: str, value: Any, allowed: Sequence[str]) -> list[str]:
    """Problems with a setting that takes one of a few words."""
    if value not in allowed:
        return [f"{field}={value!r} is not known; choose one of {', '.join(allowed)}"]
    return []


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The chain: T = `steps` DDIM steps, noise level `eta` (1 = the paper's chain), guidance (1 = none)."""

    steps: int
    eta: float
    guidance_scale: float

    def problems(self) -> list[str]:
        return (
            integer("sampler.steps", self.steps, 2, "the number T of transitions of the chain", 999)
            + number("sampler.eta", self.eta, 0, "DDIM's noise level", high=1, open_low=True, example=1.0)
            + number("sampler.guidance_scale", self.guidance_scale, 1, "1 switches guidance off", example=1.0)
        )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter: rank, alpha (the update is alpha/rank times BA), and which layers carry one."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]

    def problems(self) -> list[str]:
        found = integer("lora.rank", self.rank, 1, "the rank of the low-rank update")
        found += number("lora.alpha", self.alpha, 0, "the scale of the update", open_low=True, example=4)
        if isinstance(self.targets, str):
            return found + choice("lora.targets", self.targets, ("all", "attention"))
        if not self.targets:
            found.append("lora.targets=[] is empty; write lora.targets=attention, all, or a list of layer names")
        return found


@dataclass(frozen=True, kw_only=True)
class Train:
    """The budget: optimiser steps, trajectories per sampling, and how they are cut up (`micro_batch` transitions at
    once). `checkpoint_every` (gradient steps) is not part of the identity. `lr_schedule`: what becomes of a method's
    step size over the gradient steps: it stays, or falls to 0 on a line or half a cosine."""

    gradient_steps: int
    trajectories: int
    micro_batch: int
    checkpoint_every: int
    lr_schedule: str = "constant"

    def problems(self) -> list[str]:
        return (
            integer("train.gradient_steps", self.gradient_steps, 1, "the number of optimiser steps")
            + integer("train.trajectories", self.trajectories, 2, "trajectories sampled at a time")
            + integer("train.micro_batch", self.micro_batch, 1, "transitions in one network pass")
            + integer("train.checkpoint_every", self.checkpoint_every, 1, "gradient steps between checkpoints")
            + choice("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        )

    def lr_factor(self, step: int) -> float:
        """What the step size is multiplied by after `step` gradient steps."""
        left = 1 - step / self.gradient_steps
        if self.lr_schedule == "linear":
            return left
        return (1 - math.cos(math.pi * left)) / 2 if self.lr_schedule == "cosine" else 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every `every` gradient steps, on `samples` pictures from fixed noise, of which `pictures` are kept as images.
    `every` and `pictures` are not part of the identity."""

    every: int
    samples: int
    pictures: int

    def problems(self) -> list[str]:
        found = integer("eval.every", self.every, 1, "gradient steps between evaluations")
        found += integer("eval.samples", self.samples, 2, "evaluation pictures")
        if isinstance(self.samples, int) and self.samples >= 2:
            found += integer("eval.pictures", self.pictures, 1, "evaluation pictures kept as images", self.samples)
        return found


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One cell of a sweep, fully resolved. Build it with `TrialSpec.from_dict`, which checks everything at once."""

    prompt: str
    """The text the model is asked for."""
    prompt_id: str
    """Its label in tables and file names; not part of the identity."""
    beta: float
    """Weight of the path KL (nats, summed over dimensions) in J, the same for every method."""
    beta_schedule: str | tuple[float, ...]
    """beta_t / beta: "constant", "sigma_squared" (proportional to sigma_t^2, mean one) or T positive numbers; or
    "contraction": beta_t = max(beta, what makes eq. 18 contract by `beta_rate` at step t), where that is known."""
    seed: int
    model: Mapping[str, Any]
    reward: Mapping[str, Any]
    judge: Mapping[str, Any] | None
    method: Mapping[str, Any]
    sampler: Sampler
    lora: Lora
    train: Train
    eval: Evaluation
    regulariser: str = "kl"
    """The f-divergence that beta weighs; other than kl: through a change of reward (workers/core/divergence.py)."""
    initial_law: str = "fixed"
    """The law of Y_0: "fixed", N(0, I), or "gaussian", a learned diagonal one whose KL costs beta_0 a nat."""
    beta_rate: float | None = None
    """The rate of beta_schedule "contraction"."""
    regulariser_order: float | None = None
    """The order of the regularisers alpha and gamma."""
    regulariser_samples: int = 256
    """Samples of the pre-trained model that solve the normaliser of a regulariser other than kl."""
    schema: int = SCHEMA

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], checked: dict[str, list[str]] | None = None) -> TrialSpec:
        """The checked spec of a plain mapping (as in spec.json). Raises SpecError with every problem found.

        `checked` remembers the components' problems from one call to the next: those of two specs that differ in
        nothing but the seed are found once.
        """
        known, needed, _ = _fields(cast(type, cls))
        problems = [
            f"{name} is not a field of a trial; known: {', '.join(sorted(known))}"
            for name in values
            if name not in known
        ]
        problems += [f"{name} is missing" for name in sorted(needed - set(values))]
        if problems:
            raise SpecError(problems)
        content = dict(values)
        for name, group in (("sampler", Sampler), ("lora", Lora), ("train", Train), ("eval", Evaluation)):
            content[name], found = _group(name, group, content[name])
            problems += found
        if problems:
            raise SpecError(problems)
        if isinstance(content["beta_schedule"], list):
            content["beta_schedule"] = tuple(content["beta_schedule"])
        for name in ("beta", "beta_rate", "regulariser_order"):
            content[name] = _plain(content.get(name), real=True)
        spec = cls(**content)
        problems = spec.problems(checked)
        if problems:
            raise SpecError(problems)
        return spec

    def problems(self, checked: dict[str, list[str]] | None = None) -> list[str]:
        """Everything wrong with this spec, one sentence each; the components' own checks included."""
        if found := self._own_problems():
            return found
        if checked is None:
            return self._components_problems()
        mark = json.dumps({name: value for name, value in vars(self).items() if name != "seed"}, default=str)
        if mark not in checked:
            checked[mark] = self._components_problems()
        return checked[mark]

    def _own_problems(self) -> list[str]:
        """What is wrong with the fields as such."""
        found: list[str] = []
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            found.append(
                f"prompt={self.prompt!r} is empty; write a prompt id or a text, as in prompt='a dog on the moon'"
            )
        else:
            found += printable("prompt", self.prompt, "\n\t")
        found += printable("prompt_id", self.prompt_id)
        found += number("beta", self.beta, 0, "the weight of the path KL in J", open_low=True)
        found += self._schedule_problems()
        found += integer("seed", self.seed, 0, "the seed of every named generator", 2**31 - 1)
        found += choice("initial_law", self.initial_law, INITIAL_LAWS)
        found += self._regulariser_problems()
        if self.schema != SCHEMA:
            found.append(f"schema={self.schema} was written by another version; this one reads {SCHEMA}")
        for group in (self.sampler, self.lora, self.train, self.eval):
            found += group.problems()
        return found

    def _components_problems(self) -> list[str]:
        found: list[str] = []
        for name in COMPONENTS:
            component = getattr(self, name)
            if component is not None:
                found += self._component_problems(name, component)
        return found

    def _schedule_problems(self) -> list[str]:
        if self.beta_schedule == "contraction":
            why = "the contraction rate that beta_t is chosen for"
            return number("beta_rate", self.beta_rate, 0, why, high=1 - 1e-9, open_low=True, example=0.5)
        if self.beta_rate is not None:
            return [
                f"beta_rate={self.beta_rate!r} means nothing with beta_schedule={self.beta_schedule}; write "
                "beta.schedule=contraction, or leave beta.rate out"
            ]
        if isinstance(self.beta_schedule, str):
            return choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        found = []
        if len(self.beta_schedule) != self.sampler.steps:
            found.append(
                f"beta_schedule has {len(self.beta_schedule)} numbers but sampler.steps={self.sampler.steps}; "
                "give one per step"
            )
        for value in self.beta_schedule:
            found += number("beta_schedule", value, 0, "a multiplier of beta", open_low=True, example=1.0)
        return found

    def _regulariser_problems(self) -> list[str]:
        from workers.core.divergence import order_problems

        found = order_problems(self.regulariser, self.regulariser_order)
        found += integer("regulariser_samples", self.regulariser_samples, 16, "samples that solve the normaliser")
        if self.regulariser != "kl" and self.beta_schedule != "constant":
            found.append(
                f"regulariser={self.regulariser} works through one beta and beta_schedule={self.beta_schedule} has "
                "several; write beta.schedule=constant"
            )
        return found

    def _component_problems(self, field: str, component: Mapping[str, Any]) -> list[str]:
        if not isinstance(component, Mapping) or "_target_" not in component or "name" not in component:
            return [f"{field} needs _target_ (the class, as in package.module.Class) and name; see conf/{field}/"]
        try:
            target = locate(component["_target_"])
        except (ImportError, AttributeError, ValueError) as error:
            return [f"{field}._target_={component['_target_']!r} cannot be imported: {error}"]
        check = getattr(target, "check", None)
        return list(check(self)) if check else []

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping for spec.json; `from_dict` gives the same spec back."""
        return _as_json(self)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers that come out: the content that is hashed into the key."""
        content = self.to_dict()
        del (
            content["prompt_id"],
            content["train"]["checkpoint_every"],
            content["eval"]["every"],
            content["eval"]["pictures"],
        )
        if self.train.lr_schedule == "constant":
            del content["train"]["lr_schedule"]
        for name in self._idle():
            del content[name]
        for name in getattr(self._model_class(), "placement", ()):
            content["model"].pop(name, None)
        return content

    def _idle(self) -> list[str]:
        """The fields that decide nothing here; those of trials that were named before the fields existed, too."""
        idle = [name for name in ("beta_rate", "regulariser_order") if getattr(self, name) is None]
        if self.regulariser == "kl":
            idle.append("regulariser_samples")
        if not getattr(self._model_class(), "has_adapter", True):
            idle.append("lora")
        return idle

    def _model_class(self) -> Any:
        """None for a class of another machine's."""
        with suppress(ImportError, AttributeError, ValueError):
            return locate(self.model["_target_"])
        return None

    @property
    def key(self) -> str:
        """The trial's name: 16 hex digits of the SHA-256 of its identity."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """For people: "pi_ft beta=0.1 counting s0"."""
        return f"{self.method['name']} beta={self.beta:g} {self.prompt_id} s{self.seed}"


@functools.cache
def _fields(group: type) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The names of a dataclass's fields: all, those without a default, the real ones."""
    found = fields(group)
    return (
        frozenset(field.name for field in found),
        frozenset(field.name for field in found if field.default is MISSING),
        frozenset(field.name for field in found if field.type == "float"),
    )


def _as_json(value: Any) -> Any:
    """What a JSON file gives back for a value: new mappings with texts as keys, lists for tuples."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    return json.loads(json.dumps(value, default=dict))


def _group(name: str, group: type, values: Any) -> tuple[Any, list[str]]:
    if not isinstance(values, Mapping):
        return None, [f"{name}={values!r} is not a mapping; it needs {', '.join(f.name for f in fields(group))}"]
    known, needed, real = _fields(group)
    problems = [
        f"{name}.{key} is not a setting; known: {', '.join(sorted(known))}" for key in values if key not in known
    ]
    problems += [f"{name}.{key} is missing" for key in sorted(needed - set(values))]
    if problems:
        return None, problems
    return group(**{key: _plain(value, key in real) for key, value in values.items()}), []


def _plain(value: Any, real: bool) -> Any:
    """A list as a tuple; a whole number where a real one belongs as that, so that 1 and 1.0 are one trial."""
    if real and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def printable(name: str, value: str, allowed: str = "") -> list[str]:
    """What is wrong with a text that must hold no control characters but those of `allowed`."""
    if (found := unprintable(str(value), allowed)) is None:
        return []
    return [f"{name}={one_line(str(value), 80)!r} holds the control character {found}; take it out"]


def locate(path: str) -> Any:
    """The class that a `_target_` names. Raises ImportError, AttributeError or ValueError (not dotted)."""
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ValueError("not a dotted path such as workers.methods.pi_ft.PIFT")
    return getattr(importlib.import_module(module), name)


def settings(component: Mapping[str, Any]) -> dict[str, Any]:
    """A component's own settings: everything but `_target_`, `name` and `fingerprint`."""
    return {key: value for key, value in component.items() if key not in ("_target_", "name", "fingerprint")}
