"""`pift promote`: a finished trial's adapter as a version of a registered model in MLflow.

What: `promote(store, key)` finds the trial by a unique beginning of its key, sees to it that the adapter is what was
written and one that diffusers loads, and registers it. Tags and description of the version say what it was trained for,
how well it does and how to load it. An adapter is registered once under a name, however often this is said.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.ledger import Store, problems, state
from orchestrator.sample import find_trial
from workers.store import TrialFolder, read_json, sound_record
from workers.text import visible

if TYPE_CHECKING:
    from orchestrator.tracking.registry import Version

FILE, LAW = "pytorch_lora_weights.safetensors", "initial_law.safetensors"
FIGURES = {
    "reward_mean.start": ("initial", "eval/reward_mean"),
    "reward_mean.end": ("final", "eval/reward_mean"),
    "judge_mean.end": ("final", "eval/judge_mean"),
    "kl_path_nats": ("final", "eval/kl_path_nats"),
    "objective": ("final", "eval/objective"),
}
"""Tag of a version -> where DONE.json has the number; workers/recorder.py says what each means."""
LONGEST = 400
"""Characters of a prompt that stand in a version's code; a longer one is taken from the version's tags there."""


@dataclass(frozen=True)
class Adapter:
    """A finished trial's adapter, in words."""

    folder: TrialFolder
    spec: Mapping[str, Any]
    base: str
    revision: str | None
    sweeps: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.folder.root.name

    @property
    def tags(self) -> dict[str, str]:
        """What a version can be searched by; numbers that were not measured are left out."""
        spec, done = self.spec, sound_record(self.folder.done)
        facts = {
            "prompt": spec["prompt"], "prompt_id": spec["prompt_id"], "beta": spec["beta"],
            "method": spec["method"]["name"], "seed": spec["seed"], "model": spec["model"]["name"],
            "reward": spec["reward"]["name"], "base_model": self.base, "base_model.revision": self.revision,
            "sweeps": ", ".join(self.sweeps) or None,
        }  # fmt: skip
        figures = {tag: done.get(when, {}).get(metric) for tag, (when, metric) in FIGURES.items()}
        return {tag: str(value) for tag, value in (facts | figures).items() if value is not None}

    @property
    def summary(self) -> str:
        """ "a dog on the moon", pi_ft, beta 0.1, seed 0; reward 0.1 -> 0.4, path KL 3 nats, J 0.1"""
        tags, figures = self.tags, self.figures
        return (
            f'"{tags["prompt"]}", {tags["method"]}, beta {tags["beta"]}, seed {tags["seed"]}; '
            f"reward {figures['reward']}, path KL {figures['path KL']} nats, J {figures['J']}"
        )

    @property
    def figures(self) -> dict[str, str]:
        """How well it does, in words; "?" for what was not measured."""
        tags = self.tags
        start, end, judge, kl, objective = (f"{float(tags[tag]):.4g}" if tag in tags else "?" for tag in FIGURES)
        return {"reward": f"{start} -> {end}", "judge": judge, "path KL": kl, "J": objective}

    def loading(self, folder: str) -> list[str]:
        """The two lines of plain diffusers; `folder` is the expression for the adapter's folder."""
        pinned = f", revision={json.dumps(self.revision)}" if self.revision else ""
        return [
            f"pipe = StableDiffusionPipeline.from_pretrained({json.dumps(self.base)}{pinned})",
            f'pipe.load_lora_weights({folder}, weight_name="{FILE}")',
        ]

    def drawing(self, prompt: str) -> list[str]:
        """The lines that draw as the trial did; `prompt` is the expression for its prompt."""
        sampler = self.spec["sampler"]
        settings = f"num_inference_steps={sampler['steps']}, eta={sampler['eta']}"
        if learned := (self.folder.adapter / LAW).is_file():
            settings += ", latents=mu + log_std.exp() * noise"
        lines = [
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)",
            f"pipe({prompt}, guidance_scale={sampler['guidance_scale']}, {settings})",
        ]
        return [*lines, f"# mu, log_std: {LAW} beside the adapter, the law of Y_0 that was learned too"][: 2 + learned]

    @property
    def prompt(self) -> str:
        """The prompt as a Python string, without what an editor would hide."""
        return visible(json.dumps(self.spec["prompt"], ensure_ascii=False))

    def description(self, name: str, pictures: Mapping[str, str], run: str) -> str:
        """What the registry's page says of the version, as markdown; `pictures` and `run` are addresses there."""
        from orchestrator.tracking.markdown import fence, link, safe, table
        from orchestrator.tracking.notes import of_pictures

        long = len(self.prompt) > LONGEST
        kept = f'mlflow.MlflowClient().get_model_version("{name}", VERSION).tags["prompt"]'
        code = [
            "import mlflow",
            "from diffusers import DDIMScheduler, StableDiffusionPipeline",
            "",
            f'folder = mlflow.artifacts.download_artifacts("models:/{name}/VERSION") + "/adapter_weights"',
            *self.loading("folder"),
            f'# or: pipe = mlflow.diffusers.load_model("models:/{name}/VERSION").load_pipeline()',
            *self.drawing(kept if long else self.prompt),
        ]
        tags, figures = self.tags, self.figures
        what = f"{tags['method']}, beta {tags['beta']}, seed {tags['seed']}"
        return "\n".join(
            [
                f"LoRA adapter of trial `{self.key}` ({link('its run', run)}): {safe(what)}",
                "",
                f"Prompt: {safe(self.spec['prompt'])}",
                "",
                *table([f"{title}, nats" if title == "path KL" else title for title in figures],
                       [[safe(value) for value in figures.values()]]),
                "",
                *(of_pictures(pictures) if pictures else []),
                "",
                *fence(code, "python"),
            ]
        )  # fmt: skip


@dataclass(frozen=True)
class Promoted:
    """An adapter and its version in the registry."""

    adapter: Adapter
    version: Version

    @property
    def uri(self) -> str:
        return f"models:/{self.version.name}/{self.version.version}"

    def row(self) -> dict[str, Any]:
        """As `pift promote --json` prints it."""
        adapter, facts = self.adapter, vars(self.version) | {"aliases": list(self.version.aliases)}
        described = {"base_model": adapter.base, "revision": adapter.revision, "tags": adapter.tags}
        return {"key": adapter.key, **facts, "model_uri": self.uri, **described}

    def lines(self) -> list[str]:
        """Its name, what it does, how to load it."""
        adapter, version = self.adapter, self.version
        verb = "is now" if version.created else "was promoted before: it is"
        alias = f", alias {', '.join(version.aliases)}" if version.aliases else ""
        code = {
            "in plain diffusers": adapter.loading(json.dumps(str(adapter.folder.adapter))),
            "with mlflow.diffusers": [
                f"mlflow.set_tracking_uri({json.dumps(version.uri)})",
                f'pipe = mlflow.diffusers.load_model("{self.uri}").load_pipeline()',
            ],
            "pictures as in training": adapter.drawing(adapter.prompt),
        }
        return [
            f"{adapter.key} {verb} version {version.version} of {version.name}{alias}",
            adapter.summary,
            *(line for title, lines in code.items() for line in (f"{title}:", *(f"  {line}" for line in lines))),
        ]


def promote(
    store: Store, key: str, *, name: str | None = None, alias: str | None = None, uri: str | None = None
) -> Promoted:
    """Register the adapter of the trial whose key begins with `key`; `alias` is put on its version, found or made.

    Raises UserError for a name or alias that MLflow does not take, a key that names no or several trials, a trial that
    is not done, an adapter that is damaged or none of diffusers', and an MLflow that does not answer.
    """
    _check_words(name, alias)
    folder = find_trial(store, key)
    store.fetch(folder.root.name, "adapter")
    _check_sound(folder)
    from orchestrator.tracking import adapters, registry

    spec: dict[str, Any] = read_json(folder.spec) or {}
    if not adapters.is_lora(folder, spec):
        raise UserError(
            f"key={folder.root.name} is a trial of model={spec['model']['name']}, which has no LoRA adapter that "
            "diffusers loads; promote one of model=toyland or sd15 (pift status lists them)"
        )
    plans = _plans(store, folder.root.name)
    adapter = Adapter(folder, spec, *adapters.base_of(spec), tuple(plans))
    name = name or default_name(spec)
    describe = functools.partial(adapter.description, name)
    offer = registry.Offer(name, alias, _purpose(spec), describe, adapter.tags)
    version = registry.register(
        store, folder, spec, next(iter(plans.values()), None), offer, registry.uri_of(store, folder, uri),
        say=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    with contextlib.suppress(UserError):  # it is registered; what mlflow.json says of it can be found again
        store.publish()
    return Promoted(adapter, version)


def default_name(spec: Mapping[str, Any]) -> str:
    """pift-<model>-<prompt id>: the adapters that could take each other's place are versions of one model."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"pift-{spec['model']['name']}-{spec['prompt_id']}")[:240]


def _purpose(spec: Mapping[str, Any]) -> str:
    return (
        f"LoRA adapters that pift trained on model={spec['model']['name']} for one prompt; each version is the adapter "
        "of one trial, its tags say beta, method, seed and how well it does"
    )


def _check_words(name: str | None, alias: str | None) -> None:
    """Raises UserError where MLflow would refuse them, or a models:/ address not find them."""
    if name is not None and not re.fullmatch(r"\w[\w .-]{0,239}", name):
        raise UserError(
            f"--name {name!r} is no name of a registered model: up to 240 letters, digits, - _ . and spaces, the first "
            "a letter or digit, as in --name rabbit-adapters"
        )
    if alias is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias):
        raise UserError(f"--alias {alias!r} is no alias: letters, digits, - and _, as in --alias champion")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(f"--alias {alias} means a version by its age to MLflow; choose another, as in --alias champion")


def _check_sound(folder: TrialFolder) -> None:
    """Raises UserError for a trial that is not done, or whose adapter or spec is not what was written."""
    for problem in problems(folder):
        if problem.path in (folder.done, folder.spec) or problem.path.parent == folder.adapter:
            raise UserError(f"{problem}; the launch of its sweep, given again, writes it anew from its checkpoint")
    if (found := state(folder)) != "done":
        raise UserError(
            f"key={folder.root.name} is not done (state: {found}); launch its sweep again, and promote it when "
            "pift status says done"
        )


def _plans(store: Store, key: str) -> dict[str, Mapping[str, Any]]:
    """The plans that have a trial as a cell, by sweep; a damaged plan has none."""
    found: dict[str, Mapping[str, Any]] = {}
    for sweep in store.sweeps():
        with contextlib.suppress(UserError):
            plan = store.plan(sweep)
            if key in plan["specs"]:
                found[sweep] = plan
    return found
