"""A trained adapter as an MLflow model of the flavour mlflow.diffusers, written without diffusers and without torch.

    is_lora(folder, spec)              whether the adapter is one that diffusers loads onto a base that the spec names
    base_of(spec)                      (base model, revision): a folder, or a hub id and its pinned commit
    write_model(folder, spec, place)   the model's folder: MLmodel, adapter_weights/, its requirements
    log_adapter(client, ...)           the model that stands for the adapter in the trial's run; its id

    mlflow.diffusers.load_model("models:/<id>").load_pipeline(device=...)     a pipeline with the adapter

mlflow.diffusers.save_model writes the same files and is not called: it loads diffusers and peft (ten seconds, and torch
in a driver that has no use for it), asks the hub for the newest commit of the base and writes that down in place of the
pinned one, and leaves out the name of the weights, which load_lora_weights wants to be told offline. The signature is
ours: the trial's number of steps and guidance, not 30 and 7.5 at 512 x 512.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import mlflow.diffusers
import mlflow.pyfunc
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from orchestrator.tracking.client import clean_name, cut_values
from orchestrator.tracking.points import milliseconds
from workers.models import pipeline_files
from workers.recorder import read_journal
from workers.store import TrialFolder, seal, sound_record

NAME = "adapter"
"""The model's name in its run: runs:/<run id>/adapter."""
FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = "adapter_weights"
"""The folder of the weights inside the model, as mlflow.diffusers names it."""
READY = LoggedModelStatus.READY


class NoModels(Exception):
    """The server is older than MLflow 3 and keeps no models beside its runs."""


def is_lora(folder: TrialFolder, spec: Mapping[str, Any]) -> bool:
    """Whether a finished trial has an adapter in diffusers' LoRA format, of a checkpoint that its spec names."""
    return isinstance(spec["model"].get("path"), str) and (folder.adapter / FILE).is_file()


def base_of(spec: Mapping[str, Any]) -> tuple[str, str | None]:
    """The checkpoint that an adapter belongs to: (absolute folder, None) or (hub id, pinned revision)."""
    path = spec["model"]["path"]
    if pipeline_files.is_local(path):
        return str(pipeline_files.resolve(path).absolute()), None
    return path, spec["model"].get("revision")


def digest(folder: TrialFolder) -> str:
    """SHA-256 of the adapter's weights, as DONE.json states it."""
    entry = sound_record(folder.done).get("files", {}).get(f"{folder.adapter.name}/{FILE}")
    return str((entry or seal(folder.adapter / FILE))["sha256"])


# ---- the folder


def write_model(folder: TrialFolder, spec: Mapping[str, Any], place: Path, **ids: Any) -> None:
    """Write a model's folder to `place`, which must not be there; `ids` are Model's own run_id, model_id and so on."""
    copytree(folder.adapter, place / WEIGHTS, ignore=ignore_patterns(".*"))
    base, revision = base_of(spec)
    model = Model(signature=_signature(spec), metadata=facts(folder, spec), **ids)
    flavor = {
        "base_model": base, "adapter_type": "lora", "adapter_weights": WEIGHTS, "weight_name": FILE,
        "diffusers_version": importlib.metadata.version("diffusers"), "code": None,
    }  # fmt: skip
    if revision is not None:
        flavor["base_model_revision"] = revision
    model.add_flavor(mlflow.diffusers.FLAVOR_NAME, **flavor)
    mlflow.pyfunc.add_to_model(
        model, loader_module="mlflow.diffusers", conda_env="conda.yaml", python_env="python_env.yaml"
    )
    for name, text in _environment().items():
        (place / name).write_text(text, encoding="utf-8")
    model.model_size_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    model.save(str(place / "MLmodel"))


def facts(folder: TrialFolder, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture drawn as in training needs, and whose adapter it is."""
    sampler = spec["sampler"]
    return {
        "trial.key": folder.root.name,
        "prompt": spec["prompt"],
        "scheduler": "DDIM",
        **{name: sampler[name] for name in ("steps", "eta", "guidance_scale")},
    }


def _signature(spec: Mapping[str, Any]) -> ModelSignature:
    """A prompt in, a PNG out; the picture's size is the checkpoint's."""
    sampler = spec["sampler"]
    return ModelSignature(
        inputs=Schema([ColSpec("string", name="prompt")]),
        outputs=Schema([ColSpec("binary", name="image")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", "integer", int(sampler["steps"])),
                ParamSpec("guidance_scale", "double", float(sampler["guidance_scale"])),
                ParamSpec("negative_prompt", "string", ""),
            ]
        ),
    )


@functools.cache
def _environment() -> dict[str, str]:
    """The files that say what loads the model: this environment's versions."""
    conda = mlflow.diffusers.get_default_conda_env()
    packages = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    python = next(entry.removeprefix("python=") for entry in conda["dependencies"] if isinstance(entry, str))
    needed = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    return {
        "conda.yaml": yaml.safe_dump(conda, sort_keys=False),
        "python_env.yaml": yaml.safe_dump(needed, sort_keys=False),
        "requirements.txt": "\n".join(packages) + "\n",
    }


# ---- in MLflow


def log_adapter(
    client: MlflowClient,
    experiment: str,
    run_id: str,
    folder: TrialFolder,
    spec: Mapping[str, Any],
    params: Mapping[str, str],
    alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> str:
    """The id of the model that holds the trial's adapter as it is, found or made, whole and linked to its run.

    May be repeated, and goes on where it was cut off: a model is searched for before it is made, both inside `alone`
    (one process at a time), and is READY only when its files are there. Raises NoModels.
    """
    with alone():
        model = find(client, experiment, run_id, folder) or _create(client, experiment, run_id, folder, params)
    if model.status == READY:
        return str(model.model_id)
    with tempfile.TemporaryDirectory() as temporary:
        ids = {"model_uuid": model.model_id, "model_id": model.model_id, "run_id": run_id}
        write_model(folder, spec, Path(temporary) / NAME, artifact_path=model.artifact_location, **ids)
        client.log_model_artifacts(model.model_id, str(Path(temporary) / NAME))
    _link(client, run_id, model.model_id, folder)
    client.finalize_logged_model(model.model_id, READY)
    return str(model.model_id)


def find(client: MlflowClient, experiment: str, run_id: str, folder: TrialFolder) -> LoggedModel | None:
    """The model of the trial's adapter; the first one where several were made. Raises NoModels."""
    with _not_found():
        condition = f"source_run_id = '{run_id}' AND name = '{NAME}'"
        models = client.search_logged_models([experiment], condition)
    same = [model for model in models if model.tags.get("adapter.sha256") == digest(folder)]
    return min(same, key=lambda model: (model.creation_timestamp, model.model_id), default=None)


def _create(
    client: MlflowClient, experiment: str, run_id: str, folder: TrialFolder, params: Mapping[str, str]
) -> LoggedModel:
    tags = cut_values({"trial.key": folder.root.name, "adapter.sha256": digest(folder)})
    with _not_found():
        return client.create_logged_model(experiment, NAME, run_id, tags=tags, params=dict(params))


def _link(client: MlflowClient, run_id: str, model_id: str, folder: TrialFolder) -> None:
    """Say that the run made the model, and that the run's last evaluation is the model's: the same points, with the
    times they had."""
    outputs = client.get_run(run_id).outputs
    if outputs is not None and any(model.model_id == model_id for model in outputs.model_outputs):
        return
    measured = [record for record in read_journal(folder.journal) if "samples" in record]
    step, metrics = 0, []
    if measured:
        step, time = int(measured[-1]["step"]), milliseconds(measured[-1])
        shown = {name: value for name, value in measured[-1]["metrics"].items() if name.count("/") == 1}
        metrics = [
            Metric(clean_name(name), float(shown[name]), time, step, model_id=model_id, run_id=run_id)
            for name in sorted(shown, key=lambda name: not name.startswith("eval/"))  # as its page lists them
        ]
    client.log_batch(run_id, metrics=metrics)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def set_versions(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Note on the model that it is this version of a registered one, where MLflow's pages look for it."""
    tag = "mlflow.modelVersions"
    known = json.loads(client.get_logged_model(model_id).tags.get(tag) or "[]")
    if not any(one["name"] == name and str(one["version"]) == str(version) for one in known):
        client.set_logged_model_tags(model_id, {tag: json.dumps([*known, {"name": name, "version": version}])})


@contextlib.contextmanager
def _not_found() -> Any:
    """An address that the server does not know (plain 404, no JSON) becomes NoModels."""
    try:
        yield
    except RestException:
        raise
    except MlflowException as error:
        if "failed with error code 404" not in str(error):
            raise
        raise NoModels(str(error)) from error
