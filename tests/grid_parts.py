"""Components without weights for tests of the grid: what a user's own file would name in `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.spec import TrialSpec, number

FINGERPRINTED: list[dict[str, Any]] = []
"""Every call of Model.fingerprint, oldest first."""


class Model:
    """Knows every word; its weights are its path."""

    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        print("a library that talks on stdout")
        return ["model.path='nowhere' is not there; write model.path=here"] if spec.model["path"] == "nowhere" else []

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        FINGERPRINTED.append(dict(settings))
        if settings["path"] == "torn":
            raise OSError("unet.safetensors ends too early")
        return f"weights of {settings['path']}"


class Reward:
    differentiable = True


class Gradient:
    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        return number("method.lr", spec.method["lr"], 0, "the step size", open_low=True)


class Search:
    """A method that has no step size."""


class Broken:
    @staticmethod
    def check(spec: TrialSpec) -> list[str]:
        raise RuntimeError("a fault in somebody's check\nwith details")
