"""Which weights the trials of a sweep need, and which of them are not on this machine.

    missing(specs)        what the components of some trials lack here, each once
    refuse(specs, config) for a launch: raises UserError where the trials would run on this machine

A component names its weights by `weights(settings)` (workers/weights.py). A plan needs none: it says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from orchestrator.errors import UserError
from workers.spec import COMPONENTS, locate, settings
from workers.weights import Weights


def needed(component: Mapping[str, Any]) -> list[Weights]:
    """What one component needs. Raises ImportError, AttributeError, ValueError or OSError where it cannot be asked."""
    hook = getattr(locate(component["_target_"]), "weights", None)
    return [] if hook is None else list(hook(settings(component)))


def missing(specs: Iterable[Mapping[str, Any]]) -> list[Weights]:
    """What is not there of all that some trials (specs as in spec.json) need, in the order of the trials."""
    asked: dict[str, Mapping[str, Any]] = {}
    for spec in specs:
        for name in COMPONENTS:
            if spec.get(name) is not None:
                asked.setdefault(json.dumps(spec[name], sort_keys=True, default=str), spec[name])
    found: dict[Weights, None] = {}
    for component in asked.values():
        with suppress(ImportError, AttributeError, ValueError):  # a class of another machine's
            found |= dict.fromkeys(needed(component))
    return [entry for entry in found if not entry.present]


def text(entry: Weights) -> str:
    """ "openai/clip-vit-large-patch14 in the hub's cache is not there: hf download ..."."""
    return f"{entry.what} is not there: {entry.fetch}"


def on_this_machine(config: Mapping[str, Any]) -> bool:
    """Whether the trials of a plan run where it is launched, and on no cluster's other machines."""
    return config["executor"].get("address") in (None, "local")


def refuse(specs: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    """Raises UserError for weights that trials on this machine lack; for a cluster's: what to say to people."""
    lost = [text(entry) for entry in missing(specs)]
    if lost and on_this_machine(config):
        raise UserError(*lost)
    return [f"{problem} (looked at here; every machine of the cluster needs it)" for problem in lost]
