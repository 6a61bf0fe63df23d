"""Stable Diffusion v1.5's layout, block for block and a few channels wide, through every code path: both methods, both
estimators, guidance, three precisions, gradient checkpointing, micro-batches, offloading, resuming, plain diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from workers import sample
from workers.evaluate import evaluate, fixed_noise
from workers.models import pipeline_files, sd15
from workers.models.diffusion import DiffusionModel
from workers.models.half_precision import Crossing
from workers.recorder import read_journal
from workers.run import Trial, build, run_trial
from workers.spec import TrialSpec
from workers.store import TrialFolder

GUIDED = {"sampler__guidance_scale": 7.5, "lora__targets": "attention", "train__micro_batch": 4}
CASES = {
    "pathwise": ("pi_ft", {"method__estimator": "pathwise"}),
    "score": ("pi_ft", {"method__estimator": "score"}),
    "dpok": ("dpok", {}),
}
PRECISIONS = ("fp32", "fp16", "bf16")
MISSING = "nobody/never-made"
WEIGHTS = [f"{part}/{name}" for part, name in pipeline_files.WEIGHTS.items()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.getbasetemp(), "sd15")


def spec(checkpoint: Path, case: str = "pathwise", dtype: str = "fp32", **changes: object) -> dict:
    method, own = CASES[case]
    return tiny.spec(checkpoint, method, dtype=dtype, **GUIDED | own | changes)


@pytest.fixture
def trial(checkpoint: Path, tmp_path: Path) -> Callable[..., Trial]:
    def make(case: str = "pathwise", dtype: str = "fp32", **changes: object) -> Trial:
        return build(TrialSpec.from_dict(spec(checkpoint, case, dtype, **changes)), TrialFolder(tmp_path), "cpu")

    return make


def shake(model: DiffusionModel, size: float = 0.05) -> None:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def states(model: DiffusionModel, n: int) -> Tensor:
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(4))


def gradients(of: Trial) -> list[Tensor]:
    """What a first gradient step leaves in .grad, the optimiser kept from moving."""
    of.method.adam.step = lambda: None  # type: ignore[attr-defined]
    of.method.adam.zero_grad = lambda set_to_none: None  # type: ignore[attr-defined]
    of.method.step()
    return [parameter.grad.clone() for parameter in of.model.parameters() if parameter.grad is not None]


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    """Relative, over all gradients together."""
    a, b = (torch.cat([part.flatten().double() for part in side]) for side in (one, two))
    assert len(a) == len(b) > 0 and b.norm() > 0
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------- the architecture


def test_true_sizes() -> None:
    """The networks that workers/models/sd15.py describes have Stable Diffusion v1.5's numbers of parameters."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        vae = AutoencoderKL(**sd15.VAE)
        assert count(UNet2DConditionModel(**sd15.UNET)) == 859_520_964
        assert count(CLIPTextModel(CLIPTextConfig(**sd15.TEXT_ENCODER))) == 123_060_480
    assert (count(vae), count(vae.decoder) + count(vae.post_quant_conv)) == (83_653_863, 49_490_199)
    assert vae.config.scaling_factor == 0.18215


def test_its_own_scheduler_file_gives_the_chain(checkpoint: Path) -> None:
    """The folder names PNDM; the chain is DDIM's on the same schedule: weights per squared eps difference sum to
    11.004, t = 21 alone has 5.362 (design notes). Kills: DDIM's default of clipping where the file does not name it."""
    values = spec(checkpoint, sampler__steps=50)
    model = build(TrialSpec.from_dict(values), TrialFolder(checkpoint), "cpu").model
    assert "PNDM" in (checkpoint / "scheduler" / "scheduler_config.json").read_text()
    per_eps = model.chain.w / (1 - model.chain.abar)
    assert model.chain.timesteps.tolist() == list(range(981, 0, -20)) and bool(model.chain.controlled.all())
    assert per_eps.sum().item() == pytest.approx(11.004, abs=5e-4)
    assert per_eps[-2].item() == pytest.approx(5.362, abs=5e-4)


# ----------------------------------------------------------------------------------------------- every path trains


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_two_steps(trial: Callable[..., Trial], case: str, dtype: str, checkpointing: bool) -> None:
    """Before the first step the KL of the sampled chains is 0 and DPOK's ratio 1, exactly, in every precision; then
    the adapter, float32, moves. Kills: latents in half precision; s and u from passes of other shapes."""
    it = trial(case, dtype, model__gradient_checkpointing=checkpointing)
    before = [parameter.clone() for parameter in it.model.parameters()]
    first, second = it.method.step(), it.method.step()
    assert first["train/kl_path_nats"] == 0
    if case == "dpok":
        assert first["dpok/fresh_log_ratio_max"] == 0 and first["dpok/clip_fraction"] == 0
        assert "dpok/fresh_log_ratio_max" not in second
    assert all(parameter.dtype == torch.float32 for parameter in it.model.parameters())
    assert it.problem.sample().y.dtype == torch.float32
    assert it.model.embedding.dtype == it.model.unet.conv_in.weight.dtype
    assert any(not torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))
    assert (it.model.recomputed > 0) == checkpointing


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_no_bit(trial: Callable[..., Trial], case: str, dtype: str) -> None:
    """Also where the backward pass walks through both controls. Kills: blocks computed again with the adapter's switch
    where it stands by then (the pathwise cases), or with other batch sizes."""
    ends = []
    for checkpointing in (False, True):
        it = trial(case, dtype, model__gradient_checkpointing=checkpointing)
        shake(it.model)
        for _ in range(2):
            it.method.step()
        ends.append(it.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_checkpointing_is_active_in_evaluation_mode(trial: Callable[..., Trial]) -> None:
    """Every block that holds a checkpoint is computed once again per backward pass, and only then; the networks are
    in evaluation mode all along. Kills: checkpointing that waits for training mode, as DPOK's with diffusers 0.14."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    model = trial(model__gradient_checkpointing=True).model
    blocks: list[int] = []
    for part in model.unet.modules():
        if isinstance(part, ResnetBlock2D | BasicTransformerBlock):
            part.register_forward_pre_hook(lambda *_: blocks.append(1))
    assert not model.unet.training and not model.vae.training
    with torch.no_grad():
        model.control(1, states(model, 2))
    assert len(blocks) == 22 + 16 and model.recomputed == 0
    u = model.control(1, states(model, 2))
    assert len(blocks) == 2 * 38 and model.recomputed == 0
    u.sum().backward()
    again = 38 - 2  # not the first one, before any trained layer, nor the one of the middle that diffusers leaves alone
    assert model.recomputed == again and len(blocks) == 2 * 38 + again
    y = states(model, 2).requires_grad_()
    before = model.recomputed
    model.decode(y).sum().backward()
    assert model.recomputed > before and y.grad is not None


@pytest.mark.parametrize(
    ("dtype", "guidance", "bound"), [("fp32", 1.0, 1e-5), ("fp32", 7.5, 3e-5), ("fp64", 7.5, 1e-13)]
)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_leave_the_gradient(
    trial: Callable[..., Trial], case: str, dtype: str, guidance: float, bound: float
) -> None:
    """1, 3 (which leaves a rest) or all at once, on the same chains, to rounding (which guidance multiplies). Kills: a
    mean per micro-batch; a rest dropped."""
    of = [trial(case, dtype, sampler__guidance_scale=guidance, train__micro_batch=size) for size in (64, 1, 3)]
    chains = of[0].problem.sample()
    for it in of:
        it.problem.sample = lambda: chains  # type: ignore[method-assign]
    whole, single, rest = map(gradients, of)
    assert difference(single, whole) < bound and difference(rest, whole) < bound


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_has_the_gradient_of_float32(trial: Callable[..., Trial], case: str, dtype: str) -> None:
    """To their rounding. Kills: parameters whose gradient is scaled and not scaled back."""
    exact = gradients(trial(case))
    assert difference(gradients(trial(case, dtype)), exact) < (0.03 if dtype == "fp16" else 0.25)


@pytest.mark.parametrize("case", ["pathwise", "score"])
def test_small_rewards_do_not_vanish_in_float16(trial: Callable[..., Trial], case: str) -> None:
    """A reward and a beta of a hundred-millionth have a hundred-millionth of the gradient. Kills: gradients cast to
    float16 as they are, which leaves zeros."""
    small = gradients(trial(case, "fp16", reward="Faint", beta=0.3e-8))
    assert difference([1e8 * part for part in small], gradients(trial(case))) < 0.02


def test_the_crossing_is_exact_where_nothing_rounds() -> None:
    """Power-of-two scales come off at the input and at the parameters; an infinite gradient stays so, a zero too."""
    weight = nn.Parameter(torch.tensor([0.5, 2.0]))
    crossing = Crossing(torch.float16, [weight])
    y = torch.tensor([2.0, -4.0], requires_grad=True)
    for gradient in (torch.tensor([3.0, -1.5]), torch.tensor([3.0, 1.5]) / 2**30, torch.zeros(2)):
        y.grad = weight.grad = None
        crossing.leave(crossing.enter(y) * weight.half(), torch.float32).backward(gradient)
        assert torch.equal(y.grad, gradient * weight.detach()) and torch.equal(weight.grad, gradient * y.detach())
    y.grad = None
    crossing.leave(crossing.enter(y) * weight.half(), torch.float32).backward(torch.tensor([torch.inf, 1.0]))
    assert not torch.isfinite(y.grad[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_passes_have_one_shape(trial: Callable[..., Trial], dtype: str) -> None:
    """A state has the same control alone, in a short batch and at any place of a full one; the UNet only ever sees full
    ones. Kills: short batches that are not padded."""
    model = trial("dpok", dtype, train__micro_batch=5).model
    shake(model)
    seen: set[int] = set()
    model.unet.register_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0])))
    y, k = states(model, 5), torch.tensor([0, 1, 2, 3, 1])
    with torch.no_grad():
        whole = model.control(k, y)
        for n in (1, 2, 4):
            assert torch.equal(model.control(k[:n], y[:n]), whole[:n])
        order = torch.tensor([3, 0, 4, 1, 2])
        assert torch.equal(model.control(k[order], y[order]), whole[order])
    assert seen == {10}  # doubled by guidance
    assert model.forwards == 2 * (5 + 1 + 2 + 4 + 5)  # what was asked for, not the padding


def test_a_ratio_that_is_not_1_is_caught(trial: Callable[..., Trial]) -> None:
    """States stored in half precision, as in DPOK's code of the day: the first step says so and does not move."""
    it = trial("dpok")
    add = it.method.replay.add  # type: ignore[attr-defined]
    rounded = {"y": lambda y: y.bfloat16().float(), "y_next": lambda y: y.bfloat16().float()}
    it.method.replay.add = lambda **new: add(  # type: ignore[attr-defined]
        **{name: rounded.get(name, lambda same: same)(value) for name, value in new.items()}
    )
    before = it.model.state_dict()
    with pytest.raises(RuntimeError, match="ratio of fresh data is not 1.*nats before any step"):
        it.method.step()
    assert all(torch.equal(value, before[name]) for name, value in it.model.state_dict().items())


def test_channels_last_is_the_same_network(trial: Callable[..., Trial]) -> None:
    plain, other = trial().model, trial(model__channels_last=True).model
    for model in (plain, other):
        shake(model)
    y = states(plain, 3)
    assert other.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    other.unet.conv_in.register_forward_hook(
        lambda _, inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        torch.testing.assert_close(other.control(2, y), plain.control(2, y), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.decode(y), plain.decode(y), rtol=1e-4, atol=1e-4)
    assert seen == [True]


# --------------------------------------------------------------------------------------------------------- guidance


def test_guidance_and_its_two_kls(trial: Callable[..., Trial]) -> None:
    """The control is eps_0 + g (eps_c - eps_0), both halves in one doubled batch; eval/kl_path_nats is the guided
    control's, eval/kl_path_conditional_nats that of the conditional halves. Recomputed here with separate passes."""
    it = trial(eval__samples=2)
    model, problem = it.model, it.problem
    shake(model)
    noise = fixed_noise(it.spec.prompt, 2, model.chain.T, model.latent_shape)
    found = evaluate(problem, None, noise, 2).metrics
    y, guided, conditional = noise.y0, torch.zeros(2).double(), torch.zeros(2).double()
    w = model.chain.w / (1 - model.chain.abar)

    def eps(k: int, y: Tensor, which: int) -> Tensor:
        time = model.chain.timesteps[k].expand(2)
        words = model.embedding[which : which + 1].expand(2, -1, -1)
        return model.unet(y, time, encoder_hidden_states=words).sample

    with torch.no_grad():
        for k in range(model.chain.T):
            free, asked = eps(k, y, 0), eps(k, y, 1)
            with model.adapter_off():
                base_free, base_asked = eps(k, y, 0), eps(k, y, 1)
            one = free + 7.5 * (asked - free)
            two = base_free + 7.5 * (base_asked - base_free)
            guided += w[k] * (one - two).double().flatten(1).square().sum(1)
            conditional += w[k] * (asked - base_asked).double().flatten(1).square().sum(1)
            y = model.chain.step(k, y, -one / (1 - model.chain.abar[k]).sqrt().float(), noise.W[k])
    assert found["eval/kl_path_nats"] == pytest.approx(guided.mean().item(), rel=1e-3)
    assert found["eval/kl_path_conditional_nats"] == pytest.approx(conditional.mean().item(), rel=1e-3)
    assert guided.mean() > 3 * conditional.mean() > 0


def test_without_guidance_there_is_one_kl(trial: Callable[..., Trial]) -> None:
    it = trial(sampler__guidance_scale=1.0, eval__samples=2)
    noise = fixed_noise(it.spec.prompt, 2, it.model.chain.T, it.model.latent_shape)
    assert "eval/kl_path_conditional_nats" not in evaluate(it.problem, None, noise, 2).metrics


# ------------------------------------------------------------------------------------------------ where things stand


def test_the_text_encoder_is_let_go(trial: Callable[..., Trial]) -> None:
    import gc

    from transformers import CLIPTextModel

    gc.collect()
    before = sum(isinstance(found, CLIPTextModel) for found in gc.get_objects())
    model = trial().model
    gc.collect()
    assert sum(isinstance(found, CLIPTextModel) for found in gc.get_objects()) == before
    assert model.embedding.shape == (2, 16, 16) and model.vae.encoder is None


@pytest.mark.parametrize("case", CASES)
def test_offloading(trial: Callable[..., Trial], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder and reward come to the device for the reward and its gradient, and go; the UNet stays; the numbers are
    the same. Kills: a gradient taken after the networks have gone."""
    moves: list[tuple[str, str]] = []
    to = nn.Module.to

    def noted(self: nn.Module, *where: Any, **how: Any) -> nn.Module:
        if type(self).__name__ in ("AutoencoderKL", "Conv2d") and where:
            moves.append((type(self).__name__, str(where[0])))
        return to(self, *where, **how)

    plain = trial(case, reward="Networked")
    plain.method.step()
    monkeypatch.setattr(nn.Module, "to", noted)
    it = trial(case, reward="Networked", model__offload=True)
    both = [("AutoencoderKL", "cpu"), ("Conv2d", "cpu")]
    assert moves == [("AutoencoderKL", "cpu"), *both]  # loaded to the device, then put away
    moves.clear()
    with it.problem.rewarding():
        assert moves == both
    assert moves == 2 * both
    it.method.step()
    assert moves == 4 * both
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), it.model.parameters(), strict=True))


def test_what_changes_no_number_is_no_part_of_the_key(checkpoint: Path) -> None:
    """Kills: a cell that has to run again because its machine needs checkpointing."""
    plain = TrialSpec.from_dict(spec(checkpoint)).key
    for name in ("gradient_checkpointing", "offload"):
        assert TrialSpec.from_dict(spec(checkpoint, **{f"model__{name}": True})).key == plain
    assert TrialSpec.from_dict(spec(checkpoint, model__channels_last=True)).key != plain
    for name in ("gradient_checkpointing", "offload", "channels_last"):
        with pytest.raises(ValueError, match=f"model.{name}='yes' is not true or false; write model.{name}=false"):
            TrialSpec.from_dict(spec(checkpoint, **{f"model__{name}": "yes"}))


# ------------------------------------------------------------------------------------------------------ whole trials


@pytest.mark.parametrize(("case", "dtype"), [("pathwise", "bf16"), ("score", "fp16"), ("dpok", "bf16")])
def test_a_resumed_trial_is_the_same(checkpoint: Path, tmp_path: Path, case: str, dtype: str) -> None:
    """Stopped after every step, checkpointing on. Kills: a state kept in half precision in the checkpoint."""
    values = spec(checkpoint, case, dtype, model__gradient_checkpointing=True)
    assert run_trial(values, tmp_path / "whole").state == "done"
    outcome, attempts = run_trial(values, tmp_path / "cut", should_stop=lambda: True), 1
    while outcome.state == "stopped":
        outcome, attempts = run_trial(values, tmp_path / "cut", should_stop=lambda: True), attempts + 1
    assert (outcome.state, attempts) == ("done", 4)
    one, two = (TrialFolder(tmp_path / name) for name in ("whole", "cut"))
    file = "pytorch_lora_weights.safetensors"
    assert (one.adapter / file).read_bytes() == (two.adapter / file).read_bytes()
    losses = [[record["metrics"].get("train/loss") for record in read_journal(folder.journal)] for folder in (one, two)]
    assert losses[0] == losses[1]


def test_plain_diffusers_draws_the_same_pictures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stock pipeline on the checkpoint, with DDIM, eta 1, guidance 7.5 and load_lora_weights, fed the same noise,
    draws what `pift sample` draws. Kills: alpha lost; guidance the other way round; the KL's chain not DDIM's."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.schedulers import scheduling_ddim

    values = spec(checkpoint, "dpok", method__lr=0.05, lora__alpha=3)
    folder = TrialFolder(tmp_path / "trial")
    assert run_trial(values, folder.root).state == "done"
    base, tuned = sample.draw(values, folder.adapter, 2)
    assert (base - tuned).abs().max() > 0.01

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder.adapter, weight_name="pytorch_lora_weights.safetensors")
    noise = fixed_noise(values["prompt"], 2, 4, (4, 8, 8))
    drawn = iter(noise.W)
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, **__: next(drawn))
    images = pipe(
        values["prompt"], num_images_per_prompt=2, latents=noise.y0, num_inference_steps=4, eta=1.0,
        guidance_scale=7.5, output_type="pt",
    ).images  # fmt: skip
    assert next(drawn, None) is None
    assert (images - tuned).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------- weights that are absent


def test_absent_weights_are_named_with_their_command(checkpoint: Path, tmp_path: Path) -> None:
    """A hub id that is not cached is no problem of a spec (it may be another machine's); loading it says what to do."""
    values = spec(checkpoint, model__path=MISSING, model__revision="abc123")
    checked = TrialSpec.from_dict(values)
    (entry,) = DiffusionModel.weights(checked.model)
    command = f"hf download {MISSING} {' '.join([*pipeline_files.SETTINGS, *WEIGHTS])} --revision abc123"
    assert not entry.present and entry.fetch.startswith(command)
    outcome = run_trial(values, tmp_path / "trial")
    assert (outcome.state, outcome.kind) == ("failed", "loading")
    assert "is not in the hub's cache and cannot be fetched" in str(outcome.message)
    assert command in str(outcome.message)


@pytest.mark.parametrize("path", ["two words", "a/b/c", ""])
def test_what_is_no_hub_id_is_a_problem(checkpoint: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"model.path='.*' is (neither a folder nor a hub id|no folder and no hub id)"):
        TrialSpec.from_dict(spec(checkpoint, model__path=path))


def test_a_hub_id_in_the_cache_is_read_from_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pinned revision, offline."""
    from huggingface_hub import constants, file_download

    home = tmp_path / "models--nobody--tiny"
    shutil.copytree(checkpoint, home / "snapshots" / "0123abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abc")
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    for revision in (None, "0123abc"):
        found = pipeline_files.locate_folder("nobody/tiny", revision)
        assert found == home / "snapshots" / "0123abc"
    assert DiffusionModel.weights({"path": "nobody/tiny", "revision": None})[0].present
    assert not DiffusionModel.weights({"path": "nobody/tiny", "revision": "other"})[0].present
    (home / "snapshots" / "0123abc" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not DiffusionModel.weights({"path": "nobody/tiny", "revision": None})[0].present


def test_pickles_are_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    """A folder with .bin weights is named for what it is."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(OSError, match=r"lacks unet/diffusion_pytorch_model.safetensors; unet/.*\.bin is a pickle"):
        pipeline_files.locate_folder(str(folder), None)


def test_half_precision_files_do_where_they_are_alone(checkpoint: Path, tmp_path: Path) -> None:
    """A folder of `...fp16.safetensors`, as `hf download --include "*fp16*"` leaves one."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    for part, name in pipeline_files.WEIGHTS.items():
        file = folder / part / name
        file.rename(file.with_name(name.replace(".safetensors", ".fp16.safetensors")))
    assert pipeline_files.absent(folder) == []
    model = build(TrialSpec.from_dict(spec(folder, dtype="fp16")), TrialFolder(tmp_path), "cpu").model
    plain = build(TrialSpec.from_dict(spec(checkpoint, dtype="fp16")), TrialFolder(tmp_path), "cpu").model
    with torch.no_grad():
        assert torch.equal(model.control(1, states(model, 2)), plain.control(1, states(plain, 2)))


# --------------------------------------------------------------------------------------------- the papers' sweeps

PROMPTS = {
    "color": "A green colored rabbit", "composition": "A cat and a dog", "counting": "Four wolves in the park",
    "location": "A dog on the moon",
}  # fmt: skip


def test_the_paper_s_sweeps() -> None:
    """What the paper states (design notes, section 7), and DPOK's cells shared by the two sweeps. Kills: a number of
    the paper's changed in a default; a full stop."""
    from orchestrator.grid import compose

    paper, pathwise = compose(["sweep=paper"]), compose(["sweep=paper_pathwise"])
    assert len(paper.cells) == 4 * 3 * 2 * 3
    keys = [{cell.key for cell in plan.cells if cell.spec.method["name"] == "dpok"} for plan in (paper, pathwise)]
    assert keys[0] == keys[1] and len(keys[0]) == 36
    for plan, estimator in ((paper, "score"), (pathwise, "pathwise")):
        for cell in plan.cells:
            spec = cell.spec
            assert spec.prompt == PROMPTS[spec.prompt_id] and 0.01 in plan.axes["beta"]
            assert (spec.sampler.steps, spec.train.trajectories, spec.train.gradient_steps) == (50, 10, 1000)
            assert (spec.model["name"], spec.reward["name"]) == ("sd15", "image_reward")
            method = spec.method
            if method["name"] == "pi_ft":
                assert (method["lr"], method["estimator"], method["inner_steps"]) == (3e-4, estimator, 1)
            else:
                assert (method["lr"], method["inner_steps"], method["batch"]) == (1e-5, 10, 50)
    assert paper.config["resources"]["gpu"] == 1 and paper.config["executor"]["name"] == "ray"


def test_dpok_s_own_sweep_has_its_own_weights() -> None:
    """Its kl_weight .01 beside reward_weight 10, ratio clip 1e-4, 10,000 updates, 20,000 pictures, full stops."""
    from diffusers import DDIMScheduler

    from orchestrator.grid import compose
    from workers.core.chain import beta_steps, ddim_chain
    from workers.methods.dpok import kl_weights

    scheduler = DDIMScheduler(**sd15.SCHEDULER)
    scheduler.set_timesteps(50)
    time = scheduler.timesteps
    chain = ddim_chain(scheduler.alphas_cumprod, time, time - 20, float(scheduler.final_alpha_cumprod), 1.0)
    plan = compose(["sweep=dpok_official"])
    assert {cell.spec.prompt for cell in plan.cells} == {f"{prompt}." for prompt in PROMPTS.values()}
    for cell in plan.cells:
        spec, method = cell.spec, cell.spec.method
        weight = kl_weights(chain, beta_steps(chain, spec.beta, "constant"), method["kl"])
        native = weight / (1 - chain.abar) * method["reward_weight"]
        assert native.tolist() == pytest.approx([0.01] * 50, rel=1e-4)
        assert method["clip_nats"] / 16_384 == pytest.approx(1e-4)
        assert (spec.train.gradient_steps, spec.sampler.guidance_scale, spec.lora.rank) == (10_000, 7.5, 4)
        assert spec.train.gradient_steps / method["inner_steps"] * spec.train.trajectories == 20_000
