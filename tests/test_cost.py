"""What a trial costs, from its architecture: against hand counts, against torch's own counter and against real passes,
the budgets of real trials, and a GPU's table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from workers import cost
from workers.cost import Cost, Memory, Network, Phase, Sketch, Unknown, cost_of
from workers.devices import GPUS, gpu_named
from workers.evaluate import evaluate, fixed_noise
from workers.meter import FusedAttention, Line, Meter, measure
from workers.models import sd15
from workers.models.diffusion import _chain
from workers.recorder import read_journal
from workers.run import Trial, build, run_trial
from workers.spec import Lora, Sampler, TrialSpec
from workers.store import TrialFolder

LORA = Lora(rank=4, alpha=4.0, targets="attention")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD v1.5's layout, 8x8x4 latents."""
    return tiny.checkpoint(tmp_path_factory.getbasetemp(), "sd15")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of any width are estimated."""
    monkeypatch.setattr(cost, "SMALLEST", 1)


def spec_of(folder: Path, method: str = "pi_ft", **changes: object) -> TrialSpec:
    return TrialSpec.from_dict(tiny.spec(folder, method, lora__targets="attention", **changes))


def trial_of(spec: TrialSpec) -> Trial:
    return build(spec, TrialFolder(Path("unused")), "cpu")


def sketch_of(spec: TrialSpec) -> Sketch:
    return cost._sketch_of(spec, cost.configs_of(spec.model))


def true_sketch(dtype: str = "fp16", *, guided: bool = False, recomputed: bool = False) -> Sketch:
    """Stable Diffusion v1.5."""
    configs = {"unet": sd15.UNET, "vae": sd15.VAE}
    return Sketch(
        configs=configs, tokens=77, dtype=dtype, lora=LORA, guided=guided, recomputed=recomputed, channels_last=False
    )


def total(flops: Any) -> float:
    return sum(flops.values())


# ---- Stable Diffusion v1.5


def test_the_true_sizes() -> None:
    """Kills: a width or a block of the config that is not SD v1.5's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def size(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        vae = AutoencoderKL(**sd15.VAE)
        found = [size(UNet2DConditionModel(**sd15.UNET)), size(vae), size(vae.decoder) + size(vae.post_quant_conv)]
        found.append(size(CLIPTextModel(CLIPTextConfig(**sd15.TEXT_ENCODER))))
    assert found == [859_520_964, 83_653_863, 49_490_199, 123_060_480]


def unet_flops_by_hand() -> float:
    """Multiplications and additions of one pass of SD v1.5's UNet over 4x64x64 latents and 77 tokens."""

    def conv(a: int, b: int, k: int, side: int) -> float:
        return 2.0 * a * b * k * k * side * side

    def resnet(a: int, b: int, side: int) -> float:
        short = conv(a, b, 1, side) if a != b else 0.0
        return conv(a, b, 3, side) + conv(b, b, 3, side) + 2 * 1280 * b + short

    def transformer(c: int, side: int) -> float:
        n = side * side
        own = 2 * n * 4 * c * c + 4 * n * n * c
        words = 2 * n * 2 * c * c + 2 * 77 * 2 * 768 * c + 4 * n * 77 * c
        return 2 * conv(c, c, 1, side) + own + words + 2 * n * c * 8 * c + 2 * n * 4 * c * c

    widths, sides = (320, 640, 1280, 1280), (64, 32, 16, 8)
    found = conv(4, 320, 3, 64) + conv(320, 4, 3, 64) + 2 * (320 * 1280 + 1280 * 1280)
    skips, before = [320], 320
    for level, (width, side) in enumerate(zip(widths, sides, strict=True)):
        for _ in range(2):
            found += resnet(before, width, side) + (transformer(width, side) if level < 3 else 0)
            before = width
            skips.append(width)
        if level < 3:
            found += conv(width, width, 3, side // 2)
            skips.append(width)
    found += 2 * resnet(1280, 1280, 8) + transformer(1280, 8)
    for level in (3, 2, 1, 0):
        width, side = widths[level], sides[level]
        for _ in range(3):
            found += resnet(before + skips.pop(), width, side) + (transformer(width, side) if level < 3 else 0)
            before = width
        found += conv(width, width, 3, 2 * side) if level else 0
    assert not skips
    return found


def test_a_unet_pass_is_counted_in_full() -> None:
    """To the last operation, attention's scores included. Kills: attention that is not counted, counts of half (one per
    multiplication and addition), guidance as one pass."""
    by_hand = unet_flops_by_hand()
    assert by_hand == pytest.approx(0.8033e12, rel=1e-4)
    assert total(true_sketch().control(1, adapted=False).flops) == by_hand
    assert total(true_sketch(guided=True).control(2, adapted=False).flops) == 4 * by_hand


def test_memory_of_a_transition() -> None:
    """SD v1.5 in float16: what a transition keeps for its gradient is 1 GiB, and .14 GiB where blocks are computed
    again, for .6 TFLOP more; linear in the rows. Kills: scores of attention kept (4 GiB), checkpointing that is not
    active, the parameters among the activations."""
    plain, again = (true_sketch(recomputed=recomputed) for recomputed in (False, True))
    one, less = (sketch.control(1, adapted=True, parameters=True) for sketch in (plain, again))
    assert 0.9 < one.kept / 2**30 < 1.05 and one.kept < one.most < 1.1 * one.kept
    assert 0.1 < less.kept / 2**30 < 0.2 and less.kept < less.most < 0.3 * one.most
    forward = total(plain.control(1, adapted=True).flops)
    assert 0.6 * forward < total(less.flops) - total(one.flops) < forward
    line = Line.through(less.most, again.control(2, adapted=True, parameters=True).most)
    assert line.at(7) == pytest.approx(again.control(7, adapted=True, parameters=True).most, rel=1e-3)


# ---- against real passes


@pytest.mark.parametrize(
    ("recomputed", "guidance", "state"),
    [(False, 1.0, False), (False, 3.0, True), (True, 1.0, True), (True, 3.0, False)],
)
def test_a_sketch_makes_the_models_own_passes(folder: Path, recomputed: bool, guidance: float, state: bool) -> None:
    """The FLOPs of DiffusionModel's control and its backward pass by torch's counter, equal; what its graph keeps (by
    hooks on what autograd saves) and holds at most, within 7 % (kernels of the CPU keep a little else). Kills: blocks
    that are not computed again, guidance without its second half, an adapter at other layers or switched off."""
    spec = spec_of(folder, model__gradient_checkpointing=recomputed, sampler__guidance_scale=guidance)
    model: Any = trial_of(spec).model
    y = torch.randn(3, *model.latent_shape, requires_grad=state)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept = saved_bytes(model.unet, lambda: model.control(1, y))
    with FlopCounterMode(display=False) as counter:
        u = model.control(1, y)
        u.backward(torch.ones_like(u))
    del u
    with Meter() as meter:
        u = model.control(1, y)
        u.backward(torch.ones_like(u))
    found = sketch_of(spec).control(3, adapted=True, parameters=True, state=state)
    assert total(found.flops) == counter.get_total_flops() == total(meter.flops)
    assert found.kept == pytest.approx(kept, rel=0.07) and found.most == pytest.approx(meter.most, rel=0.07)


def saved_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of what autograd saves in a forward pass, parameters excluded, each storage once."""
    known = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    held = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_sketch_decodes_as_the_model_does(folder: Path, recomputed: bool) -> None:
    """Kills: the decoder without its own checkpoint, pictures of one batch taken one by one."""
    spec = spec_of(folder, model__gradient_checkpointing=recomputed)
    model: Any = trial_of(spec).model
    y = torch.randn(3, *model.latent_shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.decode(y).sum().backward()
    with Meter() as meter:
        out = model.decode(y)
        kept = meter.now
        out.backward(torch.ones_like(out))
    found = sketch_of(spec).decode(3, gradient=True)
    assert total(found.flops) == counter.get_total_flops()
    assert found.kept == pytest.approx(kept, rel=0.01) and found.most == pytest.approx(meter.most, rel=0.01)


def test_the_graph_that_waits_is_counted(folder: Path, small: None) -> None:
    """pathwise builds the pre-trained control's graph, then the present one's, and walks both: as one pass measured
    here. Kills: the larger of the two instead of the sum."""
    spec = spec_of(folder)
    model: Any = trial_of(spec).model
    y = torch.randn(3, *model.latent_shape, requires_grad=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Meter() as meter:
        s = model.control(1, y, adapted=False)
        u = model.control(1, y)
        (s - u).square().sum().backward()
    memory = cost_of(spec).memory
    (phase,) = (phase for phase in memory.phases if not phase.rewarding)
    assert phase.line.at(3) == pytest.approx(meter.most, rel=0.07) and phase.rows == 4


def test_memory_counts_each_tensor_while_it_lives() -> None:
    """Kills: views and in-place results counted again, the dead counted, a peak that forgets what came before."""
    x = torch.zeros(1000)
    with Meter() as meter:
        y = x + 1
        view = y[:500].view(5, 100)
        y.add_(1)
        assert meter.now == 4000
        z = torch.cat([view.flatten(), x])
        assert meter.now == 10_000
        del y, z
        assert meter.now == 4000
        del view
    assert (meter.now, meter.most) == (0, 10_000)


def test_attention_keeps_no_scores() -> None:
    """Kills: the meta device's own attention, which keeps a matrix of 4096 x 4096."""
    q = torch.empty(1, 1, 4096, 8, device="meta", requires_grad=True)
    found = measure(lambda: nn.functional.scaled_dot_product_attention(q, q, q), gradient=True)
    assert found.kept < 4 * q.nbytes and found.flops == {"fp32": 7 * 2 * 4096 * 4096 * 8}
    with FusedAttention():
        assert nn.functional.silu(q).shape == q.shape


def test_flops_are_counted_by_precision() -> None:
    """Kills: all in the dtype of the model; float32 convolutions, which torch runs in TF32, as the products."""
    with Meter() as meter:
        nn.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.zeros(2, 3, dtype=dtype) @ torch.zeros(3, 5, dtype=dtype)
    assert meter.flops == {"tf32": 2 * 9 * 4, "fp32": 60, "bf16": 60, "fp16": 60}


# ---- passes, against the budgets of real trials

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("pi_ft", {}),
    ("pi_ft", {"method__inner_steps": 3}),
    ("pi_ft", {"method__estimator": "score"}),
    ("pi_ft", {"method__estimator": "score", "method__inner_steps": 2}),
    ("dpok", {}),
    ("dpok", {"method__inner_steps": 3, "method__batch": 5}),
]


@pytest.fixture(scope="session")
def uncontrolled(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same checkpoint, whose chain ends in a transition without noise."""
    place = tmp_path_factory.mktemp("uncontrolled")
    for part in folder.iterdir():
        if part.name != "scheduler":
            (place / part.name).symlink_to(part)
    (place / "scheduler").mkdir()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"set_alpha_to_one": True}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(("method", "changes"), METHODS, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_passes_are_what_the_budget_counts(
    uncontrolled: Path, method: str, changes: dict[str, Any], guidance: float
) -> None:
    """Over one sampling and all the gradient steps on it. Kills: a pass that a method stops making or makes once more,
    T for the controlled steps, sampling in every step."""
    spec = spec_of(uncontrolled, method, sampler__guidance_scale=guidance, **changes)
    trial = trial_of(spec)
    K = int(spec.method["inner_steps"])
    for _ in range(K):
        trial.method.step()
    controlled = cost.controlled_steps(cost.configs_of(spec.model)["scheduler"], spec.sampler.steps)
    assert controlled == 3
    found = type(trial.method).passes(spec, controlled, lambda count: count)  # type: ignore[attr-defined]
    budget, pictures = trial.problem.budget, found.pictures + found.picture_gradients
    transitions = sum(found) - pictures
    assert budget.model_forwards == pytest.approx(K * transitions * (2 if guidance > 1 else 1))
    assert budget.transition_gradients == pytest.approx(K * (found.gradients + found.adjoints))
    assert budget.reward_queries == pytest.approx(K * pictures)


@pytest.mark.parametrize(("method", "changes"), [METHODS[0], METHODS[2], METHODS[4]], ids=str)
def test_padded_rows_are_counted(folder: Path, method: str, changes: dict[str, Any]) -> None:
    """In half precision every pass of the UNet has a whole micro-batch. Kills: the rows asked for."""
    spec = spec_of(folder, method, dtype="bf16", train__micro_batch=3, **changes)
    trial: Any = trial_of(spec)
    seen = []
    trial.model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for _ in range(int(spec.method["inner_steps"])):
        trial.method.step()
    each = spec.eval.samples * cost.evaluations(spec) / spec.train.gradient_steps
    found = cost._passes(spec, 4)
    transitions = sum(found) - found.pictures - found.picture_gradients
    evaluated = 2 * 4 * 6 * each / spec.eval.samples  # 4 pictures as 6 rows, 4 steps, both controls
    assert sum(seen) / int(spec.method["inner_steps"]) == pytest.approx(transitions - evaluated)


def test_evaluations_are_counted(folder: Path, tmp_path: Path) -> None:
    """Kills: the one before the first step or after the last forgotten, the pre-trained pass that measures the KL."""
    spec = spec_of(folder, train__gradient_steps=3, eval__every=2)
    assert run_trial(spec.to_dict(), tmp_path).state == "done"
    records = read_journal(TrialFolder(tmp_path).journal)
    assert sum("eval/objective" in record["metrics"] for record in records) == cost.evaluations(spec) == 3
    trial = trial_of(spec)
    noise = fixed_noise(spec.prompt, spec.eval.samples, 4, trial.model.latent_shape)
    evaluate(trial.problem, None, noise, 8)
    found, bare = cost._passes(spec, 4), type(trial.method).passes(spec, 4, lambda count: count)  # type: ignore[attr-defined]
    assert trial.model.forwards == pytest.approx(
        found.controls + found.pretrained - bare.controls - bare.pretrained
    )  # three evaluations in three steps
    assert found.pictures - bare.pictures == spec.eval.samples


def test_a_regularisers_base_samples_are_counted(folder: Path) -> None:
    plain, other = (
        cost._passes(spec_of(folder, **changes), 4)
        for changes in ({}, {"regulariser": "chi_square", "regulariser_samples": 20})
    )
    assert other.controls - plain.controls == pytest.approx(4 * 20 / 4)
    assert other.pictures - plain.pictures == pytest.approx(20 / 4)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("steps", [2, 7, 50, 999])
def test_controlled_steps_are_the_chains(tmp_path: Path, to_one: bool, steps: int) -> None:
    config = {"_class_name": "DDIMScheduler", **sd15.SCHEDULER, "set_alpha_to_one": to_one}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    chain = _chain(tmp_path, Sampler(steps=steps, eta=1.0, guidance_scale=1.0))
    assert cost.controlled_steps(config, steps) == int(chain.controlled.sum())


# ---- rewards


class Costly(tiny.Brightness):
    """A reward that says what it takes."""

    @staticmethod
    def cost(settings: dict[str, Any]) -> Network:
        return Network(flops=1e12, precision="bf16", weights=7_000, kept=10**9)


class Unsaid(Costly):
    """A reward whose files cannot be read."""

    @staticmethod
    def cost(settings: dict[str, Any]) -> Network:
        raise OSError("no config.json")


def costed(spec: TrialSpec, reward: type | None = None, judge: type | None = None) -> Cost:
    """The cost of a spec with these rewards."""
    components = {
        field: {"_target_": f"tests.test_cost.{found.__name__}", "name": found.__name__}
        for field, found in (("reward", reward), ("judge", judge))
        if found
    }
    return cost_of(dataclasses.replace(spec, **components))


def test_a_rewards_network_is_counted(folder: Path, small: None) -> None:
    """Kills: the judge's FLOPs in every gradient step, the reward's gradient counted as a forward pass, what it keeps
    forgotten, its bytes, and a reward that does not say taken for one that costs nothing."""
    spec = spec_of(folder)  # 4 steps of 4 pictures there and back; 3 evaluations of 4 pictures
    bare, with_reward, with_judge = costed(spec), costed(spec, Costly), costed(spec, None, Costly)
    assert with_reward.flops["bf16"] == pytest.approx(1e12 * (2 * 4 + 3 * 4 / 4))
    assert with_judge.flops["bf16"] == pytest.approx(1e12 * 3 * 4 / 4)
    assert (bare.uncounted, with_reward.uncounted) == (("Brightness", "judge"), ("judge",))
    assert costed(spec, Unsaid, Costly).uncounted == ("Unsaid",)
    assert costed(spec, Costly, Costly).memory.rewarding["rewards"] == 14_000
    assert bare.memory.at(2)["activations"] < 1e9 < 2e9 < with_reward.memory.at(2)["activations"] < 2.1e9
    assert with_judge.memory.at(2)["activations"] < 1e9
    score = costed(spec_of(folder, method__estimator="score"), Costly)
    assert score.flops["bf16"] == pytest.approx(1e12 * (4 + 3 * 4 / 4)) and score.memory.at(2)["activations"] < 1e9


def vit_flops(tokens: int, width: int, patch: int) -> float:
    """24 layers of a vision transformer, and its patches."""
    layer = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    return 24 * layer + 2 * (tokens - 1) * width * 3 * patch**2


def test_what_image_reward_takes() -> None:
    """A hand count. Kills: the text encoder's cross-attention forgotten, half of it, float32 bytes in float16."""
    from workers.rewards.image_reward import ImageReward

    words, image, own = 35, 197, 768
    layer = 2 * words * 12 * own**2 + 4 * words**2 * own  # itself and its feed-forward network
    layer += 2 * words * 2 * own**2 + 2 * image * 2 * 1024 * own + 4 * words * image * own  # cross-attention
    last = 2 * (768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16)
    found = ImageReward.cost({"dtype": "fp16"})
    assert found.flops == vit_flops(197, 1024, 16) + 12 * layer + last
    assert (found.precision, found.weights) == ("fp16", 2 * 446_665_953)
    assert ImageReward.cost({}).kept == 2 * found.kept


@pytest.mark.slow
def test_image_reward_measured(tmp_path: Path) -> None:
    """The package's own network on the meta device, there and back."""
    from tests.test_image_reward import write_small_files
    from workers.rewards import image_reward

    place = write_small_files(tmp_path / "small")
    words = place / "bert-base-uncased" / image_reward.VOCABULARY
    network = image_reward._build(place / image_reward.CONFIG, words, "").to("meta").requires_grad_(False).eval()
    network.device = "meta"
    ids = torch.empty(2, 35, dtype=torch.int64, device="meta")
    pixels = torch.empty(2, 3, 224, 224, device="meta", requires_grad=True)
    found = measure(lambda: network.score_gard(ids, ids, pixels), gradient=True)
    said = image_reward.ImageReward.cost({})
    assert found.kept == pytest.approx(2 * said.kept, rel=0.01)
    assert total(found.flops) == pytest.approx(2 * 2 * said.flops, rel=0.04)


def test_what_clip_score_takes(tmp_path: Path) -> None:
    """CLIP ViT-L/14 on the meta device, and other models, of which nothing is said."""
    from transformers import CLIPConfig, CLIPModel

    from workers.rewards.clip_score import ClipScore

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768)
    with torch.device("meta"):
        network = CLIPModel(config).requires_grad_(False).eval()
    pixels = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True)
    measured = measure(lambda: network.get_image_features(pixel_values=pixels), gradient=True)
    found = ClipScore.cost({})
    assert found is not None and found.weights == 4 * sum(part.numel() for part in network.parameters())
    assert found.flops == vit_flops(257, 1024, 14) + 2 * 1024 * 768
    assert found.kept == pytest.approx(measured.kept, rel=0.01)
    assert total(measured.flops) == pytest.approx(2 * found.flops, rel=0.04)  # attention's backward is 2.5 forwards
    config.save_pretrained(tmp_path)
    assert ClipScore.cost({"path": str(tmp_path)}) == found
    config.vision_config.num_hidden_layers = 12
    config.save_pretrained(tmp_path)
    assert ClipScore.cost({"path": str(tmp_path)}) is None and ClipScore.cost({"path": "other/clip"}) is None


# ---- a trial


def test_hours_follow_from_the_flops(folder: Path, small: None) -> None:
    """All of them, by hand, from the passes. Kills: a kind of pass left out or counted in another's place, the fraction
    of the peak forgotten, one peak for all precisions."""
    spec = spec_of(folder, dtype="fp16")
    found, sketch = cost_of(spec), sketch_of(spec)
    N, T, rows, each = 4, 4, 8, 3 / 4  # rows: a whole micro-batch of 8; evaluations a step
    work = [
        (T * rows * (1 + each), sketch.control(1, adapted=True)),
        (T * rows * each, sketch.control(1, adapted=False)),
        (T * rows, sketch.control(1, adapted=True, parameters=True, state=True)),
        (T * rows, sketch.control(1, adapted=False, state=True)),
        (N, sketch.decode(1, gradient=True)),
        (4 * each, sketch.decode(1)),
    ]
    gpu = gpu_named("a100")
    assert gpu is not None
    seconds = 0.0
    for count, measured in work:
        seconds += count * measured.flops.get("fp16", 0) / 312e12 + count * measured.flops.get("fp32", 0) / 19.5e12
    assert found.seconds(gpu) == pytest.approx(seconds / 0.35)
    assert set(found.flops) == {"fp16", "fp32"}  # the adapter's products
    assert found.gradient == pytest.approx(total(work[2][1].flops) + total(work[3][1].flops))
    assert found.forward == total(work[1][1].flops)


def test_in_float32_rollouts_are_merged(folder: Path, small: None) -> None:
    """Kills: the adapter's products counted in rollouts where it is merged into the weights."""
    spec = spec_of(folder, method__estimator="score")
    found, sketch, passes = cost_of(spec), sketch_of(spec), cost._passes(spec_of(folder, method__estimator="score"), 4)
    expected = (passes.controls + passes.pretrained) * total(sketch.control(1, adapted=False).flops)
    expected += passes.gradients * total(sketch.control(1, adapted=True, parameters=True).flops)
    assert total(found.flops) == pytest.approx(expected + passes.pictures * total(sketch.decode(1).flops))


def test_what_stays_on_the_gpu(folder: Path, small: None) -> None:
    """Kills: float32 bytes of half-precision weights, the encoder, AdamW's moments, the replay buffer."""
    spec = spec_of(folder, "dpok", dtype="bf16", method__buffer=40)
    model: Any = trial_of(spec).model
    resident = cost_of(spec).memory.resident
    frozen = [parameter for parameter in model.unet.parameters() if not parameter.requires_grad]
    assert resident["UNet"] == 2 * sum(parameter.numel() for parameter in frozen)
    assert resident["adapter and AdamW"] == 16 * sum(parameter.numel() for parameter in model.parameters())
    assert cost_of(spec).memory.rewarding["decoder"] == 2 * sum(part.numel() for part in model.vae.parameters())
    larger = cost_of(spec_of(folder, "dpok", dtype="bf16", method__buffer=41)).memory.resident
    name = "trajectories and pictures"
    assert larger[name] - resident[name] == 4 * 3 * 4 * 8 * 8
    assert resident[name] == 4 * ((6 * 16 + 3 * 16 + 3 * 40) * 256 + 4 * 3 * 64 * 64)


WORK = Phase(Line(100.0, 10.0), math.inf, rewarding=False)
SHOWN = Phase(Line(0.0, 30.0), 4, rewarding=True)


@pytest.mark.parametrize(
    ("phases", "offload", "micro_batch", "expected"),
    [
        ((WORK, SHOWN), False, 2, 1000 + 500 + 120),
        ((WORK, SHOWN), False, 6, 1000 + 500 + 160),
        ((SHOWN, WORK), True, 2, 1000 + 500 + 60),  # what is away in the other phase makes this one the worst
        ((SHOWN,), False, 9, 1000 + 500 + 120),  # no more rows than there are
        ((WORK,), True, 1, 1000 + 110),
    ],
)
def test_the_worst_phase_counts(phases: tuple[Phase, ...], offload: bool, micro_batch: int, expected: int) -> None:
    memory = Memory({"UNet": 1000}, {"decoder": 500}, phases, offload)
    assert sum(memory.at(micro_batch).values()) == expected


def test_the_largest_micro_batch_that_fits() -> None:
    """Kills: one too many, one too few, 1 where nothing fits."""
    memory = Memory({"UNet": 1000}, {}, (WORK,), False)
    assert [memory.largest(limit) for limit in (1109, 1110, 1119, 1120, 1150, 1e9)] == [0, 1, 1, 2, 5, cost.MOST_ROWS]


# ---- what is not known


def test_configs_of_a_hub_id_that_is_not_here() -> None:
    """Kills: SD v1.5's sizes for any checkpoint, the files of the cache unread."""
    found = cost.configs_of({"path": sd15.IDS[0], "revision": "0" * 40})
    assert found["unet"] is sd15.UNET and found["scheduler"] is sd15.SCHEDULER
    with pytest.raises(Unknown, match="model.path=owner/other is not in the hub's cache; fetch it: hf download owner/"):
        cost.configs_of({"path": "owner/other", "revision": None})


def test_a_checkpoint_in_the_cache_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda path, name, revision: str(folder / name))
    assert cost.configs_of({"path": sd15.IDS[0], "revision": None})["unet"]["block_out_channels"] == [8, 8, 16, 16]


def test_unknown_says_why(folder: Path, tmp_path: Path, small: None) -> None:
    """Kills: a traceback, a cost of nothing."""
    spec = spec_of(folder)
    damaged = tmp_path / "damaged"
    (damaged / "unet").mkdir(parents=True)
    (damaged / "unet" / "config.json").write_text("{")
    changed = [
        (spec.model | {"path": str(damaged)}, spec.method, "cannot be read"),
        (spec.model | {"dtype": "fp64"}, spec.method, "model.dtype=fp64 is for proofs"),
        (spec.model, {"_target_": "workers.methods.algorithm_1.Algorithm1", "name": "mine"}, "method=mine does not"),
        ({"_target_": "workers.models.lq.LinearQuadraticModel", "name": "lq"}, spec.method, "model=lq is no Stable-D"),
    ]
    for model, method, words in changed:
        with pytest.raises(Unknown, match=words):
            cost_of(dataclasses.replace(spec, model=model, method=method))
    with pytest.raises(Unknown, match="no networks can be built from .*lora.targets"):
        cost_of(dataclasses.replace(spec, lora=Lora(rank=1, alpha=1.0, targets=("nowhere",))))


def test_small_latents_are_not_estimated(folder: Path) -> None:
    """Kills: hours of toyland on a GPU, a hundredth of what the launches of its kernels take."""
    with pytest.raises(Unknown, match="latents of width 8"):
        cost_of(spec_of(folder))


# ---- GPUs

NAMES = {
    "a100": "A100 80GB", "A100-80GB": "A100 80GB", "NVIDIA A100-SXM4-80GB": "A100 80GB", "A100_40gb": "A100 40GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB", "NVIDIA A100-PCIE-40GB": "A100 40GB", "h100": "H100 SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200", "Tesla T4": "T4", "NVIDIA L4": "L4", "l40s": "L40S", "NVIDIA A10G": "A10G", "A10": "A10",
    "NVIDIA GeForce RTX 4090": "RTX 4090", "4090": "RTX 4090", "rtx3090": "RTX 3090", "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada", "Tesla V100-SXM2-32GB": "V100 32GB", "v100": "V100 16GB",
    "NVIDIA B200": "B200", "NVIDIA GeForce RTX 5090": "RTX 5090",
}  # fmt: skip
OTHERS = (
    "cpu", "", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA GB200", "A1000", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "RTX 2080",
)  # fmt: skip


def test_gpus_are_known_by_torchs_names_and_by_peoples() -> None:
    """Kills: an A100 taken for an A10, a laptop's or a slice's speed as the card's, a name that only one of the two
    writes."""
    assert {name: getattr(gpu_named(name), "name", None) for name in NAMES} == NAMES
    assert all(getattr(gpu_named(gpu.name), "name", None) == gpu.name for gpu in GPUS)
    assert [name for name in OTHERS if gpu_named(name)] == []


def test_the_table_is_plausible() -> None:
    """Kills: sparse figures (twice the dense ones), columns exchanged."""
    for gpu in GPUS:
        assert gpu.memory >= 15 and gpu.source
        assert gpu.fp16 / gpu.fp32 < 35 and gpu.fp16 >= 1.9 * gpu.fp32
        assert gpu.bf16 in (None, gpu.fp16) and (gpu.tf32 is None or 0.45 < gpu.tf32 / gpu.fp16 <= 0.52)
        assert gpu.peak("bf16") == (gpu.bf16 or gpu.fp32) and gpu.peak("tf32") == (gpu.tf32 or gpu.fp32)
