"""A whole trial on a tiny real checkpoint: repeatable, resumable, honest about failures, loadable by plain diffusers.

"Equal" is bit for bit: the same spec on the same machine does the same sums in the same order.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import tiny
from workers import guard
from workers.checkpoint import listed
from workers.evaluate import fixed_noise
from workers.generators import Generators
from workers.lease import Folder, newest, process
from workers.models.diffusion import DiffusionModel
from workers.recorder import CLOCK_METRICS, METRICS, read_journal
from workers.run import run_trial
from workers.spec import Lora, Sampler, TrialSpec
from workers.store import TrialFolder, read_json, read_record

QUICK = {"reward_retries": 1}
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp())


CASES = {
    "pi_ft": ("pi_ft", {}),
    "pi_ft_score_K2": ("pi_ft", {"method__estimator": "score", "method__inner_steps": 2}),
    "pi_ft_pathwise_K3": ("pi_ft", {"method__inner_steps": 3}),
    "dpok": ("dpok", {"method__inner_steps": 3}),
}
"""Each stops in the middle of its inner loop somewhere between its 4 gradient steps."""


def spec(checkpoint: Path, case: str = "pi_ft", **changes: object) -> dict:
    method, own = CASES[case]
    given = {"lora__targets": "attention", "train__checkpoint_every": 3}
    return tiny.spec(checkpoint, method, **given | own | changes)


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrialFolder]:
    """The folder of a case run to its end without a stop, made when first asked for."""
    made: dict[str, TrialFolder] = {}

    def run(case: str) -> TrialFolder:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            outcome = run_trial(spec(checkpoint, case), folder)
            assert (outcome.state, outcome.step, outcome.message) == ("done", 4, None)
            made[case] = TrialFolder(folder)
        return made[case]

    return run


def timeless(folder: TrialFolder) -> list[dict]:
    """The journal without what the clock decides."""
    records = list(read_journal(folder.journal))
    for record in records:
        del record["time"]
        for name in CLOCK_METRICS:
            del record["metrics"][name]
    return records


def ended(folder: TrialFolder) -> str | None:
    """How the newest attempt ended."""
    attempt = newest(Folder(folder.attempts))
    return None if attempt is None else attempt.content.get("how")


def assert_same(one: TrialFolder, two: TrialFolder) -> None:
    assert timeless(one) == timeless(two)
    assert (one.root / ADAPTER).read_bytes() == (two.root / ADAPTER).read_bytes()
    for picture in sorted((one.root / "pictures").glob("*")):
        assert picture.read_bytes() == (two.root / "pictures" / picture.name).read_bytes()


# ---------------------------------------------------------------------------------------- repeatable and resumable


@pytest.mark.parametrize("case", ["pi_ft", "dpok"])
def test_the_same_spec_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path, finished, case: str) -> None:
    torch.manual_seed(123)  # nothing may hang on the global generator
    assert run_trial(spec(checkpoint, case), tmp_path).state == "done"
    assert_same(finished(case), TrialFolder(tmp_path))


@pytest.mark.parametrize("case", ["pi_ft_score_K2", "pi_ft_pathwise_K3", "dpok"])
def test_stopped_after_every_step_and_resumed(checkpoint: Path, tmp_path: Path, finished, case: str) -> None:
    """Four processes of one step each. Kills: anything left out of the checkpoint (Adam, targets, replay, value net and
    its Adam, the place in the inner loop, a generator, the budget)."""
    folder = TrialFolder(tmp_path)
    for step in (1, 2, 3):
        outcome = run_trial(spec(checkpoint, case), tmp_path, should_stop=lambda: True)
        assert (outcome.state, outcome.step) == ("stopped", step)
        assert folder.checkpoint(step).exists() and not folder.done.exists() and not folder.failed.exists()
        assert ended(folder) == "stopped" and not folder.adapter.exists()
    assert run_trial(spec(checkpoint, case), tmp_path, should_stop=lambda: True).state == "done"
    assert read_record(folder.done)["attempt"] == 4
    assert_same(finished(case), folder)


@pytest.mark.parametrize(("case", "died_at"), [("dpok", 2), ("pi_ft_score_K2", 4)])
def test_a_trial_that_died_repeats_silently_what_was_journaled(
    checkpoint: Path, tmp_path: Path, finished, case: str, died_at: int
) -> None:
    """Checkpoints at 3 and 4 only: dead at 2, it starts again; dead at 4, before DONE.json, it finishes. A torn line
    is on top."""
    calls = iter(range(1, 9))

    def die() -> bool:
        if next(calls) == died_at:
            raise KeyboardInterrupt
        return False

    folder = TrialFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_trial(spec(checkpoint, case), tmp_path, should_stop=die)
    assert ended(folder) == "interrupted" and not folder.done.exists()
    assert bool(listed(folder)) == (died_at == 4)
    with folder.journal.open("a") as stream:
        stream.write('{"time": 1.0, "step": ')
    assert run_trial(spec(checkpoint, case), tmp_path).state == "done"
    assert_same(finished(case), folder)


# ------------------------------------------------------------------------------------------------ what is written


def test_journal_and_done(checkpoint: Path, finished) -> None:
    for case in ("pi_ft", "dpok"):
        folder = finished(case)
        records = list(read_journal(folder.journal))
        assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
        evaluations = {record["step"]: record for record in records if "samples" in record}
        assert list(evaluations) == [0, 2, 4]
        for step, record in evaluations.items():
            metrics, samples = record["metrics"], record["samples"]
            assert (step > 0) == ("train/loss" in metrics)
            assert {name: len(values) for name, values in samples.items()} == {
                "reward": 4,
                "judge": 4,
                "kl_path_nats": 4,
            }
            for name, key in (("reward", "reward_mean"), ("judge", "judge_mean"), ("kl_path_nats", "kl_path_nats")):
                assert metrics[f"eval/{key}"] == pytest.approx(sum(samples[name]) / 4, rel=1e-8, abs=1e-12)
            objective = sum(r - 0.3 * kl for r, kl in zip(samples["reward"], samples["kl_path_nats"], strict=True)) / 4
            assert metrics["eval/objective"] == pytest.approx(objective, rel=1e-8)
            per_step = sum(metrics[f"eval/kl_step/{k:02d}"] for k in range(4))
            assert per_step == pytest.approx(metrics["eval/kl_path_nats"], rel=1e-9, abs=1e-15)
            assert samples["reward"] == samples["judge"]  # both are Brightness: paired picture by picture
            assert (folder.root / record["pictures"]).is_file() and folder.picture(step).is_file()
        names = {name for record in records for name in record["metrics"]}
        assert {n for n in names if n not in METRICS and not n.startswith(("eval/kl_step/", f"{case}/"))} == set()
        assert records[0]["metrics"]["budget/reward_queries"] == 0 < records[1]["metrics"]["budget/reward_queries"]
        assert records[4]["metrics"]["eval/kl_path_nats"] > 0

        done = read_record(folder.done)
        assert (
            done["key"] == TrialSpec.from_dict(spec(checkpoint, case)).key
            and done["steps"] == 4
            and done["device"] == "cpu"
        )
        assert done["initial"] == records[0]["metrics"] and done["final"] == records[-1]["metrics"]
        assert done["finished_at"] >= done["started_at"] and done["seconds"] > 0
        assert {"spec.json", "journal.jsonl", ADAPTER, "pictures/step_000004.png"} <= set(done["files"])
        for name, digest in done["files"].items():
            content = (folder.root / name).read_bytes()
            assert digest == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert TrialSpec.from_dict(read_json(folder.spec)).key == done["key"]
        assert not folder.failed.exists() and ended(folder) == "done"
        assert not [name for name in folder.root.rglob("*") if name.name.startswith(".")]


class Watcher(tiny.Brightness):
    """Looks at the attempt's record while the trial is at work."""

    folder: TrialFolder
    seen: list[dict] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.seen.append(newest(Folder(self.folder.attempts)).content)
        return super().__call__(images, prompts)


def test_an_attempt_says_who_works_while_a_trial_is_at_work(checkpoint: Path, tmp_path: Path) -> None:
    Watcher.folder, Watcher.seen = TrialFolder(tmp_path), []
    given = spec(checkpoint, train__gradient_steps=1, judge=None)
    given["reward"] = {"_target_": f"{__name__}.Watcher", "name": "watcher"}
    assert run_trial(given, tmp_path, facts={"sweep": "s", "launch": "l"}).state == "done"
    assert len(Watcher.seen) == 3  # step 0, training, step 1
    for content in Watcher.seen:
        facts = {"attempt": 1, "steps": 1, "from_step": -1, "sweep": "s", "launch": "l"}
        assert (process() | facts).items() <= content.items()
        assert "ended" not in content
    assert ended(Watcher.folder) == "done"


# -------------------------------------------------------------------------------------------------------- failures


class Fails(tiny.Brightness):
    """Right at step 0's evaluation (pictures of the fixed noise), wrong from then on."""

    calls = 0
    how: Callable[[], float]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        Fails.calls += 1
        return super().__call__(images, prompts) * (Fails.how() if Fails.calls > 2 else 1.0)


def boom() -> float:
    raise RuntimeError("the reward model has a hole")


def no_memory() -> float:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("how", "state", "kind", "message"),
    [
        (lambda: math.nan, "diverged", "diverged", "reward=fails gave nan for picture 0 of 4 (4 such)"),
        (boom, "failed", "reward", "reward=fails raised RuntimeError: the reward model has a hole 2 times in a row"),
        (no_memory, "failed", "out_of_memory", "out of memory with train.micro_batch=4 too: CUDA out of memory"),
    ],
)
def test_a_failure_is_written_down_with_its_class(
    checkpoint: Path, tmp_path: Path, how: Callable[[], float], state: str, kind: str, message: str
) -> None:
    """The first step works, the second one's reward fails; then, repaired, the trial resumes to the end."""
    given = spec(checkpoint, train__checkpoint_every=1, eval__every=4, judge=None)
    given["reward"] = {"_target_": f"{__name__}.Fails", "name": "fails"}
    folder, Fails.calls, Fails.how = TrialFolder(tmp_path), 0, how
    outcome = run_trial(given, tmp_path, limits=QUICK)
    assert (outcome.state, outcome.step) == (state, 1) and message in outcome.message
    written = read_record(folder.failed)
    names = {"key", "class", "message", "traceback", "signature", "step", "attempt", "failed_at"}
    assert set(written) == names
    assert (written["class"], written["step"], written["message"]) == (kind, 1, outcome.message)
    assert written["key"] == TrialSpec.from_dict(given).key
    assert "Traceback" in written["traceback"] and "_pathwise" in written["traceback"]
    assert not folder.done.exists() and ended(folder) == kind
    assert [record["step"] for record in read_journal(folder.journal)] == [0, 1]
    if kind == "reward":
        Fails.how = lambda: 1.0
        assert run_trial(given, tmp_path).state == "done"
        assert not folder.failed.exists() and [r["step"] for r in read_journal(folder.journal)] == [0, 1, 2, 3, 4]


def test_a_reward_that_is_not_finite_at_step_zero(checkpoint: Path, tmp_path: Path) -> None:
    given = spec(checkpoint, judge=None)
    given["reward"] = {"_target_": f"{__name__}.Fails", "name": "fails"}
    Fails.calls, Fails.how = 9, lambda: math.inf
    assert run_trial(given, tmp_path).state == "diverged"
    assert list(read_journal(TrialFolder(tmp_path).journal)) == []


def test_a_checkpoint_folder_that_is_gone_is_a_failure_not_a_crash(checkpoint: Path, tmp_path: Path) -> None:
    """The spec is good when checked and the weights are unreadable when loaded."""
    shutil.copytree(checkpoint, tmp_path / "model")
    given = spec(tmp_path / "model")
    next((tmp_path / "model" / "unet").glob("*.safetensors")).unlink()
    outcome = run_trial(given, tmp_path / "trial")
    assert outcome.state == "failed" and outcome.step == 0
    assert read_record(TrialFolder(tmp_path / "trial").failed)["class"] == "loading"


# ------------------------------------------------------------------------------------------------ evaluation noise


def test_step_zero_is_the_same_for_every_method_beta_and_seed(checkpoint: Path, tmp_path: Path, finished) -> None:
    """And its KL is exactly 0. Kills: evaluation noise from the trial's generators; a pre-trained control that is
    only nearly so."""
    first = timeless(finished("pi_ft"))[0]
    other = spec(checkpoint, seed=5, beta=0.8, train__gradient_steps=1, lora__rank=3)
    assert run_trial(other, tmp_path).state == "done"
    for folder in (finished("dpok"), TrialFolder(tmp_path)):
        record = timeless(folder)[0]
        assert record["samples"] == first["samples"]
        assert record["metrics"]["eval/reward_mean"] == first["metrics"]["eval/reward_mean"]
        assert record["metrics"]["eval/kl_path_nats"] == 0.0 and record["samples"]["kl_path_nats"] == [0.0] * 4
        assert record["metrics"]["eval/objective"] == first["metrics"]["eval/reward_mean"]
        assert folder.picture(0).read_bytes() == finished("pi_ft").picture(0).read_bytes()


def test_picture_i_does_not_depend_on_how_many_there_are() -> None:
    few, many = (fixed_noise("a cat", n, 3, (2, 4, 4)) for n in (2, 6))
    assert torch.equal(few.y0, many.y0[:2]) and torch.equal(few.W, many.W[:, :2])
    other = fixed_noise("a dog", 2, 3, (2, 4, 4))
    assert not torch.equal(few.y0, other.y0)
    pieces = torch.cat([many.y0[None], many.W]).flatten(2).flatten(0, 1)
    assert (torch.corrcoef(pieces) - torch.eye(len(pieces))).abs().max() < 0.9  # no two pieces alike


# ---------------------------------------------------------------------------------------------------- the adapter


def model_of(checkpoint: Path, dtype: str = "fp32", targets: str = "all", guidance: float = 1.0) -> DiffusionModel:
    return DiffusionModel(
        path=str(checkpoint), revision=None, dtype=dtype, prompt="a green rabbit",
        lora=Lora(rank=2, alpha=3.0, targets=targets),
        sampler=Sampler(steps=4, eta=1.0, guidance_scale=guidance), generators=Generators(0),
    )  # fmt: skip


def shake(model: DiffusionModel) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def latents(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_plain_diffusers_loads_the_adapter(checkpoint: Path, tmp_path: Path, targets: str) -> None:
    """A stock pipeline with load_lora_weights gives our control's noise prediction; alpha (3, not the rank) included.
    Kills: alpha lost on the way; names diffusers does not know; an adapter saved before it was trained."""
    from diffusers import StableDiffusionPipeline

    model, y = model_of(checkpoint, targets=targets), latents(3)
    shake(model)
    model.save_adapter(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    words = pipe.encode_prompt("a green rabbit", "cpu", 1, False)[0]
    torch.testing.assert_close(words, model.embedding, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        plain = pipe.unet(y, 501, encoder_hidden_states=words.expand(3, -1, -1)).sample
        pipe.load_lora_weights(
            tmp_path, weight_name=Path(ADAPTER).name
        )  # named: offline, diffusers does not look for it
        tuned = pipe.unet(y, 501, encoder_hidden_states=words.expand(3, -1, -1)).sample
        ours = -model.control(1, y) * (1 - model.chain.abar[1]).sqrt().float()
    assert model.chain.timesteps.tolist() == [751, 501, 251, 1]
    torch.testing.assert_close(ours, tuned, rtol=1e-5, atol=1e-6)
    assert (tuned - plain).abs().max() > 1e-2


def test_an_adapter_file_holds_nothing_in_random_order(finished) -> None:
    """safetensors writes several metadata entries in random order, and sets differ between processes: one entry,
    lists sorted."""
    content = (finished("dpok").root / ADAPTER).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ((_, text),) = header["__metadata__"].items()
    targets = json.loads(text)["unet.target_modules"]
    assert targets == sorted(targets) and len(targets) == 4


def test_an_adapter_comes_back_as_it_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    one, two, y = model_of(checkpoint), model_of(checkpoint), latents(2)
    shake(one)
    one.save_adapter(tmp_path)
    with torch.no_grad():
        assert not torch.equal(one.control(2, y), two.control(2, y))
        two.load_adapter(tmp_path)
        assert torch.equal(one.control(2, y), two.control(2, y))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match="another network"):
        model_of(checkpoint, targets="attention").load_adapter(tmp_path)
    with pytest.raises(OSError):
        two.load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(("dtype", "guidance"), [("fp32", 1.0), ("fp64", 2.0), ("bf16", 1.0)])
def test_adapter_off_is_the_original_unet_bit_for_bit(checkpoint: Path, dtype: str, guidance: float) -> None:
    """Whatever the adapter holds; and with the adapter as it starts, B = 0, on and off are the same bits."""
    from diffusers import UNet2DConditionModel

    model = model_of(checkpoint, dtype, guidance=guidance)
    y = latents(2, model.dtype)
    with torch.no_grad():
        assert torch.equal(model.control(1, y), model.control(1, y, adapted=False))
        shake(model)
        off, on = model.control(1, y, adapted=False), model.control(1, y)
        fresh = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", torch_dtype=model.unet.dtype)
        cast = y.to(fresh.dtype)
        words, rows = model.embedding, len(model.embedding)
        eps = fresh(
            cast.repeat(rows, 1, 1, 1),
            torch.full((2 * rows,), 501),
            encoder_hidden_states=words.repeat_interleave(2, 0),
        ).sample.to(y.dtype)
    if rows == 2:
        eps = eps[:2] + guidance * (eps[2:] - eps[:2])
    assert torch.equal(off, -eps / (1 - model.chain.abar[1]).sqrt().to(y.dtype))
    assert off.dtype == model.dtype and (on - off).abs().max() > 1e-2


def test_sampling_changes_the_cost_and_not_the_controls(checkpoint: Path) -> None:
    """Merged and unmerged agree to rounding, off stays the original bit for bit, also after an error inside.

    Kills: the update without alpha / rank; merged weights left in place; s computed with merged weights.
    """
    model = model_of(checkpoint, "fp64")
    shake(model)
    y, before = latents(2, model.dtype), {name: p.clone() for name, p in model.unet.named_parameters()}
    with torch.no_grad():
        off, on = model.control(1, y, adapted=False), model.control(1, y)
        with pytest.raises(RuntimeError, match="on purpose"), model.sampling():
            merged = model.control(1, y)
            assert torch.equal(model.control(1, y, adapted=False), off)
            assert torch.equal(model.control(1, y), merged)
            raise RuntimeError("on purpose")
        assert torch.equal(model.control(1, y), on)
    assert all(torch.equal(p, before[name]) for name, p in model.unet.named_parameters())
    torch.testing.assert_close(merged, on, rtol=1e-10, atol=1e-10)
    assert not torch.equal(merged, off)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_keeps_the_adapter_at_work(checkpoint: Path, dtype: str) -> None:
    """Kills: merging into weights that would round the update away."""
    model = model_of(checkpoint, dtype)
    shake(model)
    y = latents(2, model.dtype)
    with torch.no_grad():
        on = model.control(1, y)
        with model.sampling():
            assert torch.equal(model.control(1, y), on)


def test_only_the_adapter_has_a_gradient(checkpoint: Path) -> None:
    model, y = model_of(checkpoint), latents(2).requires_grad_()
    shake(model)
    parameters = model.parameters()
    u = model.control(torch.tensor([0, 3]), y)
    s = model.control(torch.tensor([0, 3]), y, adapted=False)
    assert model.decode(y).requires_grad
    (u - s).square().sum().backward()
    moved = [name for name, p in model.unet.named_parameters() if p.grad is not None]
    assert moved and all("lora_" in name for name in moved)
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    assert len(moved) == len(parameters) and all(p.grad.abs().sum() > 0 for p in parameters)
    assert all(p.grad is None for p in model.vae.parameters())
    model.unet.zero_grad()
    y.grad = None
    model.control(0, y, adapted=False).sum().backward()
    assert all(p.grad is None for p in parameters) and y.grad.abs().sum() > 0


def test_the_adapter_starts_from_its_own_generator(checkpoint: Path) -> None:
    """Kills: an adapter drawn from torch's global generator, or one that disturbs it."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = model_of(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = model_of(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    names = [name for name, p in one.unet.named_parameters() if p.requires_grad]
    for name, parameter in zip(names, one.parameters(), strict=True):
        assert (parameter.abs().sum() == 0) == ("lora_B" in name)


def test_a_resumed_run_reads_its_spec_back(checkpoint: Path, finished) -> None:
    """spec.json on disk is the spec that ran: `python -m workers.run <folder>` needs nothing else."""
    folder = finished("pi_ft")
    assert json.loads(folder.spec.read_text()) == TrialSpec.from_dict(spec(checkpoint, "pi_ft")).to_dict()
