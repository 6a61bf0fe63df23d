"""Adapters as models in MLflow: logged once with their trial, loadable in diffusers, promoted to one version each."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow.diffusers
import pytest
import torch
import yaml
from mlflow import MlflowClient

import tests.fake_trial as fake
from orchestrator import cli
from orchestrator.errors import UserError
from orchestrator.grid import Cell, Plan
from orchestrator.ledger import Store, mlflow_file
from orchestrator.promote import default_name, promote
from orchestrator.tracking import adapters, client, entry, registry, repair
from orchestrator.tracking.mlflow_view import MlflowView
from tests import tiny
from tests.test_forwarding import Server
from workers import sample
from workers.evaluate import fixed_noise
from workers.generators import Generators
from workers.models.diffusion import DiffusionModel
from workers.recorder import read_journal
from workers.run import run_trial
from workers.spec import TrialSpec
from workers.store import TrialFolder, read_record, write_record

Output = pytest.CaptureFixture[str]
WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A spec on a checkpoint in SD v1.5's layout, whose own scheduler is not DDIM, and the folder of a trial of it that
    is done."""
    checkpoint = tiny.checkpoint(tmp_path_factory.getbasetemp(), "sd15")
    values = tiny.spec(checkpoint, method__lr=0.05, lora__alpha=3, beta=0.02, model__revision=None)
    folder = tmp_path_factory.mktemp("trained") / TrialSpec.from_dict(values).key
    assert run_trial(values, folder).state == "done"
    return values, folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing asks MLflow's default tracker: it would leave a database where it stands."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture
def store(database: Path, tmp_path: Path, trained: Any) -> Store:
    """A store with that trial and a sweep of it, and MLflow's database, which knows of neither."""
    found = Store(tmp_path / "store")
    values, folder = trained
    shutil.copytree(folder, found.trial(folder.name).root)
    shutil.copy(database, found.root / "mlflow.db")
    write_record(found.sweep("tried").plan, plan(values))
    return found


def plan(*specs: Mapping[str, Any], sweep: str = "tried") -> dict[str, Any]:
    checked = [TrialSpec.from_dict(values) for values in specs]
    cells = [
        Cell(one.key, one, {"prompt": one.prompt_id, "beta": one.beta, "method": one.method["name"], "seed": one.seed})
        for one in checked
    ]
    return Plan(sweep, {"seed": [one.seed for one in checked]}, cells, {}).row()


def sent(store: Store, key: str) -> MlflowView:
    """The view that has sent the sweep of the trial."""
    view = MlflowView(None, store, store.plan("tried"), launching=False)
    view.close({key: "done"})
    return view


def models(view: MlflowView) -> list[Any]:
    """Every model that MLflow holds."""
    assert view.client is not None
    return list(view.client.search_logged_models([view.experiment_id]))


def key_of(store: Store) -> str:
    (key,) = store.trial_keys()
    return key


def files_of(run: Any) -> Path:
    """Where the files of a run lie."""
    return Path(run.info.artifact_uri.removeprefix("file://"))


def registered(store: Store, name: str) -> list[Any]:
    """The versions of a model in the store's database, oldest first."""
    found = MlflowClient(tracking_uri=registry.default_uri(store)).search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


# ---- a model in the trial's run


def test_a_finished_trial_is_logged_as_one_model(store: Store) -> None:
    """READY, linked to its run, with the run's last evaluation; the run keeps every point once. Sending again, with the
    bookkeeping lost too, makes no second one. Kills: no search before; a link at every sending."""
    key = key_of(store)
    view = sent(store, key)
    assert view.client is not None
    (model,) = models(view)
    run = view.client.get_run(view.trials[key].run_id)
    assert (model.status, model.name, model.source_run_id) == ("READY", "adapter", run.info.run_id)
    assert model.params["train.gradient_steps"] == "4" and model.tags["trial.key"] == key
    final = read_record(store.trial(key).done)["final"]  # type: ignore[index]
    measured = {metric.key: metric.value for metric in model.metrics}
    assert measured["eval/reward_mean"] == final["eval/reward_mean"] and "eval/objective" in measured
    assert not (files_of(run) / "adapter").exists()  # not a second time as plain files
    assert read_record(mlflow_file(store.trial(key)))["store"]["model"] == model.model_id  # type: ignore[index]

    for lost in (False, True):
        if lost:
            mlflow_file(store.trial(key)).unlink()
        else:
            entry.update(mlflow_file(store.trial(key)), "store", closed=None, artifacts=None, model=None)
        again = sent(store, key)
        assert [found.model_id for found in models(again)] == [model.model_id]
    run = view.client.get_run(view.trials[key].run_id)
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(model.model_id, 4)]
    points = view.client.get_metric_history(run.info.run_id, "eval/reward_mean")
    evaluated = [record for record in read_journal(store.trial(key).journal) if "samples" in record]
    assert [(point.step, point.timestamp) for point in sorted(points, key=lambda point: point.step)] == [
        (record["step"], round(record["time"] * 1000)) for record in evaluated
    ]


@pytest.mark.parametrize(
    "call", ["create_logged_model", "log_model_artifacts", "log_batch", "log_outputs", "finalize_logged_model"]
)
def test_a_sending_that_is_cut_off_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Behind any of the calls, done there and failed here. Kills: a model that is READY before its files are there."""
    key = key_of(store)
    whole = getattr(MlflowClient, call)
    with monkeypatch.context() as patch:

        def late(self: Any, *args: Any, **options: Any) -> Any:
            whole(self, *args, **options)
            raise TimeoutError("no answer")

        view = MlflowView(None, store, store.plan("tried"), launching=False)
        view.open()
        view.trials[key].send()
        patch.setattr(MlflowClient, call, late)
        with pytest.raises(client.TrackerError, match="no answer"):
            view.close({key: "done"})
    view = sent(store, key)
    (model,) = models(view)
    assert model.status == "READY"
    assert view.client is not None
    assert len(view.client.get_run(view.trials[key].run_id).outputs.model_outputs) == 1
    assert {file.path for file in view.client.list_logged_model_artifacts(model.model_id)} >= {"MLmodel"}


def test_it_is_searched_for_and_made_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches that close one trial make one model: nobody comes between the search and the making."""
    inside: list[bool] = []
    held = False

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        nonlocal held
        held = True
        yield
        held = False

    for name in ("search_logged_models", "create_logged_model", "log_model_artifacts"):
        whole = getattr(MlflowClient, name)

        def noted(self: Any, *args: Any, whole: Any = whole, **options: Any) -> Any:
            inside.append(held)
            return whole(self, *args, **options)

        monkeypatch.setattr(MlflowClient, name, noted)
    view = MlflowView(None, store, store.plan("tried"), launching=False)
    view.open()
    (run,) = view.trials.values()
    assert run.alone == view._lock
    run.alone = alone
    run.send_model(read_spec(store))
    assert inside == [True, True, False]


def read_spec(store: Store) -> dict[str, Any]:
    return dict(json.loads(store.trial(key_of(store)).spec.read_text()))


def test_it_loads_in_diffusers_and_draws_as_trained(
    store: Store, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's UNet predicts what the trained control does, and not what the base's does; from the base that the
    model names, and from one that is named. Kills: weight_name left out (offline); the base's weights alone."""
    values, folder = trained
    base = values["model"]["path"]
    (model,) = models(sent(store, key_of(store)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.default_uri(store))
    loaded = mlflow.diffusers.load_model(f"models:/{model.model_id}")
    assert (loaded.base_model, loaded.base_model_revision) == (base, None)

    checked = TrialSpec.from_dict(values)
    settings = {name: checked.model[name] for name in ("path", "revision", "dtype")}
    ours = DiffusionModel(
        **settings, prompt=checked.prompt, sampler=checked.sampler, lora=checked.lora, generators=Generators(0)
    )
    ours.load_adapter(folder / "adapter")
    y = torch.randn(3, *ours.latent_shape, generator=torch.Generator().manual_seed(2))
    shutil.copytree(base, elsewhere := store.root / "elsewhere")
    with torch.no_grad():
        scale = (1 - ours.chain.abar[1]).sqrt().float()
        trained_eps, base_eps = (-ours.control(1, y, adapted=adapted) * scale for adapted in (True, False))
        for where in (None, str(elsewhere)):
            pipe = loaded.load_pipeline(base_model=where, device="cpu")
            time = int(ours.chain.timesteps[1])
            eps = pipe.unet(y, time, encoder_hidden_states=ours.embedding.expand(3, -1, -1)).sample
            torch.testing.assert_close(eps, trained_eps, rtol=1e-4, atol=1e-5)
    assert (trained_eps - base_eps).abs().max() > 1e-2


def test_the_folder_is_what_mlflow_would_write(trained: Any, tmp_path: Path) -> None:
    """Files and flavours, but for what adapters.py says: the weights' name, the signature, and the environment's pip.
    Fails where a newer MLflow writes something else."""
    values, folder = trained
    adapters.write_model(TrialFolder(folder), values, tmp_path / "ours")
    mlflow.diffusers.save_model(
        str(folder / "adapter"), str(tmp_path / "theirs"), base_model=values["model"]["path"]
    )
    ours, theirs = (yaml.safe_load((tmp_path / name / "MLmodel").read_text()) for name in ("ours", "theirs"))
    assert ours["flavors"]["diffusers"].pop("weight_name") == Path(WEIGHTS).name
    assert ours["flavors"] == theirs["flavors"]
    assert set(theirs) - set(ours) == set() and set(ours) - set(theirs) == {"metadata"}
    listed = [
        {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*")} for name in ("ours", "theirs")
    ]
    assert listed[0] == listed[1]
    for name in ("conda.yaml", "python_env.yaml"):
        one, two = (yaml.safe_load((tmp_path / place / name).read_text()) for place in ("ours", "theirs"))
        assert set(one) == set(two)
    requirements = [set((tmp_path / place / "requirements.txt").read_text().split()) for place in ("ours", "theirs")]
    assert requirements[0] == requirements[1]
    wanted = {one["name"]: one["default"] for one in json.loads(ours["signature"]["params"])}
    assert wanted == {"num_inference_steps": 4, "guidance_scale": 1.0, "negative_prompt": ""}


def test_a_hub_id_keeps_its_pinned_revision(trained: Any, tmp_path: Path) -> None:
    """And nobody asks the hub (the tests have no network). Kills: the newest commit in its place."""
    values = json.loads(json.dumps(trained[0]))
    values["model"] |= {"path": "owner/name", "revision": "abc123"}
    adapters.write_model(TrialFolder(trained[1]), values, tmp_path / "model")
    loaded = mlflow.diffusers.load_model(str(tmp_path / "model"))
    assert (loaded.base_model, loaded.base_model_revision) == ("owner/name", "abc123")


def test_toyland_is_named_by_its_folder() -> None:
    base, revision = adapters.base_of({"model": {"path": "toyland", "revision": None}})
    assert (Path(base) / "model_index.json").is_file() and revision is None


def test_torch_stays_out_of_the_launch(trained: Any, tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path; from workers.store import TrialFolder\n"
        "from orchestrator.tracking import adapters\n"
        f"folder = TrialFolder(Path({str(trained[1])!r}))\n"
        f"adapters.write_model(folder, json.loads(folder.spec.read_text()), Path({str(tmp_path / 'model')!r}))\n"
        "print({'torch', 'diffusers', 'peft'} & set(sys.modules))"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and (tmp_path / "model" / "MLmodel").is_file()


def test_other_adapters_stay_files(store: Store) -> None:
    """A model without a checkpoint has nothing that diffusers would load it onto."""
    spec = fake.spec()
    fake.run_trial(spec.to_dict(), store.trial(spec.key).root)
    view = MlflowView(None, store, fake.plan(store.root, spec).row(), launching=False)
    view.close({spec.key: "done"})
    assert view.client is not None and models(view) == []
    assert (files_of(view.client.get_run(view.trials[spec.key].run_id)) / WEIGHTS).is_file()


def test_a_lost_database_gets_it_again(store: Store, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(store)
    (before,) = models(sent(store, key))
    other = Store(store.root.parent / "moved")
    shutil.copytree(store.root, other.root, ignore=shutil.ignore_patterns("mlartifacts"))
    shutil.copy(database, other.root / "mlflow.db")
    assert repair.rebuild(other, say=lambda text: None).trials == 1
    view = MlflowView(None, other, other.plan("tried"), launching=False)
    view.open()
    (model,) = models(view)
    assert model.status == "READY" and model.model_id != before.model_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.default_uri(other))
    assert str(other.root) in mlflow.diffusers.load_model(f"models:/{model.model_id}").adapter_path


# ---- a server from before MLflow 3


def test_an_old_server_is_known_by_its_404(store: Store) -> None:
    class Old(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asked = client.connect(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(adapters.NoModels):
            adapters.find(asked, "1", "0" * 32, store.trial(key_of(store)))
    finally:
        server.shutdown()
        server.server_close()


def test_an_old_server_gets_the_model_as_files_of_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fails, it loads from the run, and it can be promoted."""

    def absent(*_: Any) -> None:
        raise adapters.NoModels("404")

    monkeypatch.setattr(adapters, "find", absent)
    key = key_of(store)
    view = sent(store, key)
    run_id = view.trials[key].run_id
    assert view.client is not None and view.client.get_run(run_id).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.default_uri(store))
    assert Path(mlflow.diffusers.load_model(f"runs:/{run_id}/adapter").adapter_path).is_dir()
    found = promote(store, key)
    assert found.version.model_id is None
    assert Path(mlflow.diffusers.load_model(found.uri).adapter_path).is_dir()


# ---- promotion


def test_promoted_once_however_often(store: Store, database: Path) -> None:
    """One version with all that is known of it; the alias moves to it. Kills: a version at every call."""
    key = key_of(store)
    sent(store, key)
    first = promote(store, key[:6])
    assert first.version.created and (first.version.name, first.version.version) == ("pift-tiny-rabbit", "1")
    assert first.version.aliases == ()
    again = promote(store, key, alias="champion")
    assert not again.version.created and again.version.version == "1" and again.version.aliases == ("champion",)
    (version,) = registered(store, "pift-tiny-rabbit")
    done = read_record(store.trial(key).done)
    assert done is not None
    assert version.tags == {
        "trial.key": key, "adapter.sha256": done["files"][WEIGHTS]["sha256"], "prompt": "a green rabbit",
        "prompt_id": "rabbit", "beta": "0.02", "method": "pi_ft", "seed": "0", "model": "tiny", "reward": "Brightness",
        "base_model": first.adapter.base, "sweeps": "tried",
        "reward_mean.start": str(done["initial"]["eval/reward_mean"]),
        "reward_mean.end": str(done["final"]["eval/reward_mean"]),
        "judge_mean.end": str(done["final"]["eval/judge_mean"]),
        "kl_path_nats": str(done["final"]["eval/kl_path_nats"]),
        "objective": str(done["final"]["eval/objective"]),
    }  # fmt: skip
    assert done["initial"]["eval/reward_mean"] != done["final"]["eval/reward_mean"]
    assert version.source == f"models:/{first.version.model_id}" and version.run_id == first.version.run_id
    assert 'pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights' in version.description
    (model,) = models(sent(store, key))
    assert json.loads(model.tags["mlflow.modelVersions"])[0]["name"] == "pift-tiny-rabbit"

    other = promote(store, key, name="rabbits 2")
    assert other.version.created and other.version.version == "1" and len(registered(store, "rabbits 2")) == 1


def test_another_adapter_is_another_version(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another trial; and of the same trial, where it was trained anew to other weights."""
    key = key_of(store)
    assert promote(store, key, alias="champion").version.version == "1"
    folder = store.trial(key)
    weights = folder.root / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = read_record(folder.done)
    assert done is not None
    done["files"][WEIGHTS] = adapters.seal(weights)
    write_record(folder.done, done)
    found = promote(store, key, alias="champion")
    assert found.version.created and found.version.version == "2"
    asked = MlflowClient(tracking_uri=registry.default_uri(store))
    assert asked.get_model_version_by_alias("pift-tiny-rabbit", "champion").version in (2, "2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.default_uri(store))
    path = mlflow.diffusers.load_model(found.uri).adapter_path
    assert (Path(path) / weights.name).read_bytes() == bytes(content)


@pytest.mark.parametrize("gone", ["never tracked", "run deleted", "model missing"])
def test_what_mlflow_does_not_have_is_sent_first(store: Store, capsys: Output, gone: str) -> None:
    key = key_of(store)
    if gone == "never tracked":
        (store.root / "mlflow.db").unlink()
    else:
        view = sent(store, key)
        assert view.client is not None
        if gone == "run deleted":
            view.client.delete_run(view.trials[key].run_id)
        else:
            view.client.delete_logged_model(models(view)[0].model_id)
    found = promote(store, key)
    run = MlflowClient(tracking_uri=registry.default_uri(store)).get_run(found.version.run_id)
    assert (run.info.status, run.data.tags["trial.key"]) == ("FINISHED", key)
    assert ("sending the sweep tried" in capsys.readouterr().err) == (gone != "model missing")
    assert len(registered(store, "pift-tiny-rabbit")) == 1
    assert repair.duplicates(store) == {} and repair.zombies(store) == []


def test_what_is_printed_draws_what_pift_sample_draws(
    store: Store, trained: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed lines, run as they stand: plain diffusers and mlflow.diffusers. Kills: another scheduler, steps, eta;
    the tracker's address; the adapter's folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.schedulers import scheduling_ddim

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")
    key, (values, _) = key_of(store), trained
    assert cli.main(["promote", key, "--store", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{key} is now version 1 of pift-tiny-rabbit\n")
    blocks = re.split("in plain diffusers:\n|with mlflow.diffusers:\n|pictures as in training:\n", out)
    plain, theirs, drawing = ([line.strip() for line in block.splitlines()] for block in blocks[1:])
    noise = fixed_noise(values["prompt"], 2, 4, (4, 8, 8))
    base, tuned = sample.draw(values, store.trial(key).adapter, 2)
    assert (base - tuned).abs().max() > 0.01
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)  # it is what it was afterwards
    for lines in (plain, theirs):
        names: dict[str, Any] = {"StableDiffusionPipeline": StableDiffusionPipeline, "mlflow": mlflow}
        names |= {"DDIMScheduler": DDIMScheduler, "latents": noise.y0}
        drawn = iter(noise.W)
        monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, drawn=drawn, **__: next(drawn))
        given = ", num_images_per_prompt=2, latents=latents, output_type='pt')"
        code = [*lines, drawing[0], "images = " + drawing[1].removesuffix(")") + given + ".images"]
        exec("\n".join(code), names)
        assert next(drawn, None) is None
        assert (names["images"] - tuned).abs().max() < 1e-3


def test_json_for_machines(store: Store, capsys: Output) -> None:
    assert cli.main(["promote", key_of(store), "--store", str(store.root), "--json", "--alias", "champion"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["created"] and said["aliases"] == ["champion"] and said["key"] == key_of(store)
    assert said["model_uri"] == "models:/pift-tiny-rabbit/1" and said["tags"]["method"] == "pi_ft"
    assert said["uri"] == registry.default_uri(store) and said["revision"] is None


def test_names_are_made_of_what_mlflow_takes() -> None:
    spec = {"model": {"name": "sd/1:5"}, "prompt_id": "a-dog-on-the-moon"}
    assert default_name(spec) == "pift-sd-1-5-a-dog-on-the-moon"
    assert len(default_name({"model": {"name": "m"}, "prompt_id": "x" * 500})) <= 240


# ---- what is refused


def _ruin(store: Store, what: str) -> None:
    folder = store.trial(key_of(store))
    if what == "adapter":
        content = bytearray((folder.root / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (folder.root / WEIGHTS).write_bytes(content)
    elif what == "lost adapter":
        (folder.root / WEIGHTS).unlink()
    elif what == "done":
        folder.done.write_text(folder.done.read_text()[:-9])
    elif what == "undone":
        folder.done.unlink()
    elif what == "second":
        shutil.copytree(folder.root, store.trial(folder.root.name[:4] + "0" * 12).root)
    elif what == "analytic":
        shutil.rmtree(folder.root)
        spec = fake.spec()
        fake.run_trial(spec.to_dict(), store.trial(spec.key).root)
    elif what == "orphan":
        shutil.rmtree(store.root / "sweeps")
    elif what == "two trackers":
        for place in ("store", "http://127.0.0.1:9"):
            entry.replace(mlflow_file(folder), place, {"run_id": "0" * 32, "experiment_id": "1"})
    elif what == "database":
        (store.root / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(4000))


REFUSED = {
    "adapter": ("its checksum is not the one in DONE.json", "launch of its sweep"),
    "lost adapter": ("it is gone", "launch of its sweep"),
    "done": ("DONE.json is damaged", "launch of its sweep"),
    "undone": ("is not done (state: resumable)", "pift status"),
    "second": ("begins 2 trials", "write more of it"),
    "analytic": ("model=fake", "no LoRA adapter", "toyland or sd15"),
    "orphan": ("no sweep of store=", "nothing is trained again"),
    "two trackers": ("several trackers", "http://127.0.0.1:9", "--uri URI"),
    "database": ("mlflow.db is damaged", "pift doctor --fix"),
}


def refused(store: Store, capsys: Output, *options: str, key: str | None = None) -> str:
    """The one line of a refusal with exit code 2, in our words."""
    given = key if key is not None else key_of(store)
    assert cli.main(["promote", given, "--store", str(store.root), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pift: ") and err.count("\n") == 1 and "Traceback" not in err
    assert "did not register" not in err
    return err


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_promoted(store: Store, capsys: Output, what: str) -> None:
    key = key_of(store)
    _ruin(store, what)
    given = key[:4] if what == "second" else None
    message = refused(store, capsys, key=given)
    for words in REFUSED[what]:
        assert words in message
    if what != "database":
        assert registered(store, "pift-tiny-rabbit") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--name", "a/b"), "--name 'a/b' is no name"),
        (("--name", "a:b"), "--name 'a:b' is no name"),
        (("--name", ""), "--name '' is no name"),
        (("--name", "it's"), "is no name of a registered model"),
        (("--name", "x" * 241), "up to 240"),
        (("--name", ".."), "the first a letter or digit"),
        (("--alias", "my champion"), "--alias 'my champion' is no alias"),
        (("--alias", ""), "--alias '' is no alias"),
        (("--alias", "Latest"), "--alias Latest means a version"),
        (("--alias", "v12"), "--alias v12 means a version"),
        (("--uri", "nonsense"), "--uri 'nonsense' is not an address"),
        (("--uri", "sqlite:////nowhere/at/all.db"), "cannot write /nowhere/at/all.db"),
    ],
)
def test_words_that_mlflow_refuses(store: Store, capsys: Output, options: tuple[str, str], words: str) -> None:
    assert words in refused(store, capsys, *options)


def test_a_name_that_is_taken_by_something_else(store: Store, capsys: Output) -> None:
    """MLflow keeps prompts under the same names, and would take an adapter for the next one."""
    asked = client.connect(registry.default_uri(store))
    asked.register_prompt("mine", "a template")
    sent(store, key_of(store))
    assert "--name mine is a prompt in MLflow" in refused(store, capsys, "--name", "mine")


@pytest.mark.parametrize("key", ["ffff", ""])
def test_a_key_that_is_none(store: Store, capsys: Output, key: str) -> None:
    assert "is no trial in store=" in refused(store, capsys, key=key)


def test_nobody_answers(store: Store, capsys: Output) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{free.getsockname()[1]}"
        message = refused(store, capsys, "--uri", uri)
    assert "no MLflow answers there" in message and "--uri http://127.0.0.1:5000" in message and "secret" not in message


def test_others_are_writing(store: Store, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(store, key_of(store))
    monkeypatch.setattr(registry, "LOCK_SECONDS", 0.1)
    with registry.FileLock(registry.lock_of(registry.default_uri(store), store)):
        assert "a launch has been writing to MLflow" in refused(store, capsys)


def test_help_teaches_by_example(capsys: Output) -> None:
    assert cli.main(["promote", "--help"]) == 0
    assert "pift promote 3f0c91 --alias champion" in capsys.readouterr().out.partition("options:")[2]


def test_the_trackers_that_know_a_trial(store: Store) -> None:
    """The one that has its run; the named one before it; with none the store's database."""
    folder = store.trial(key_of(store))
    assert registry.uri_of(store, folder, None) is None
    write_record(mlflow_file(folder), {"http://host:5000": {"run_id": "1"}, "store": {"experiment_id": "1"}})
    assert registry.uri_of(store, folder, None) == "http://host:5000"
    assert registry.uri_of(store, folder, "http://other:1") == "http://other:1"
    with pytest.raises(UserError, match="--uri 'http://'"):
        registry.uri_of(store, folder, "http://")


# ---- through a server


@pytest.mark.slow
def test_through_a_server(
    store: Store, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Logged, loaded and promoted over HTTP, files included; MLflow says nothing of its own on stdout."""
    shutil.copy(database, tmp_path / "server.db")
    server = Server(tmp_path / "server.db")
    key = key_of(store)
    try:
        server.begin()
        server.wait()
        found = promote(store, key, uri=server.uri, alias="champion")
        assert found.version.created and found.version.aliases == ("champion",) and capsys.readouterr().out == ""
        assert promote(store, key).version == registry.Version(**{**vars(found.version), "created": False})
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        loaded = mlflow.diffusers.load_model("models:/pift-tiny-rabbit@champion", dst_path=str(store.root))
        one, two = Path(loaded.adapter_path) / Path(WEIGHTS).name, store.trial(key).root / WEIGHTS
        assert one.read_bytes() == two.read_bytes()
        asked = client.connect(server.uri)
        (model,) = asked.search_logged_models([found.version.experiment_id])
        assert model.status == "READY" and model.model_id == found.version.model_id
        assert len(json.loads(model.tags["mlflow.modelVersions"])) == 1
    finally:
        server.kill()
