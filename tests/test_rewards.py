"""CLIPScore on a tiny CLIP, compressibility, and how pictures are prepared, against the field's own tools."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from orchestrator.grid import compose
from tests import tiny
from workers.evaluate import save_strip
from workers.recorder import read_journal
from workers.rewards import image_reward, pictures
from workers.rewards.clip_score import CHECKPOINT, FILES, HUB_ID, REVISION, ClipScore
from workers.rewards.compressibility import Compressibility
from workers.run import run_trial
from workers.spec import SpecError, TrialSpec
from workers.store import TrialFolder, sha256

CLIP = "workers.rewards.clip_score.ClipScore"
JPEG = "workers.rewards.compressibility.Compressibility"
PROMPTS = ["a green rabbit", "cat dog", "a cat"]
LONG = "a green rabbit " * 40
SIZE, TOKENS = 32, 12


def image(height: int, width: int, kind: str) -> Image.Image:
    """A picture of clouds, of noise, or of black and white with hard edges, where resizing overshoots."""
    generator = np.random.default_rng(height)
    if kind == "noise":
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return smooth if kind == "smooth" else smooth.point(lambda level: 255 * (level > 128))


def tensor(*images: Image.Image) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255 for one in images])


def levels(difference: Tensor) -> Tensor:
    """How far apart normalised pixels are, in levels of 255."""
    return (difference * 255 * torch.tensor(pictures.STD)[:, None, None]).abs()


# ------------------------------------------------------------------------------------------------------------- pictures

SHAPES = [(224, 224), (512, 512), (64, 64), (300, 500), (227, 224), (225, 301)]


@pytest.mark.parametrize("kind", ["smooth", "noise", "edges"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_without_a_gradient_pixels_are_those_of_the_saved_picture(height: int, width: int, kind: str) -> None:
    """Bit for bit what CLIP, BLIP and ImageReward make of a PIL picture, of a float picture rounded as it is saved.
    Kills: torchvision's resize of 8-bit tensors (off by 28 levels), a crop rounded down, truncation to 8 bits."""
    prepare = transforms.Compose([
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize(pictures.MEAN, pictures.STD),
    ])  # fmt: skip
    saved = image(height, width, kind)
    off = torch.empty(1, 3, height, width).uniform_(-0.49, 0.49, generator=torch.Generator().manual_seed(0)) / 255
    assert torch.equal(pictures.clip_pixels(tensor(saved) + off, 224)[0], prepare(saved))


@pytest.mark.parametrize("kind", ["smooth", "noise", "edges"])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_with_a_gradient_pixels_differ_by_rounding_alone(height: int, width: int, kind: str) -> None:
    """Pillow rounds to whole levels once per axis: half a level each, the first weighted by the second axis' weights.
    Kills: no antialiasing, no cut to [0, 1] (off by up to 51 levels), axes or crop exchanged."""
    images = tensor(image(height, width, kind)).requires_grad_()
    found = pictures.clip_pixels(images, 224)
    assert found.requires_grad and found.shape == (1, 3, 224, 224)
    with torch.no_grad():
        apart = levels(found - pictures.clip_pixels(images, 224))
    assert apart.max() < 1.2 and apart.mean() < 0.35


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 500), (101, 77)])
def test_the_matrices_are_torchs_antialiased_bicubic_resize(height: int, width: int) -> None:
    images = 0.3 + 0.4 * tensor(image(height, width, "noise"))
    tall, wide, top, left = pictures.sizes(height, width, 48)
    theirs = functional.resize(images, 48, functional.InterpolationMode.BICUBIC, antialias=True)
    assert theirs.shape[2:] == (tall, wide)
    ours = pictures._resized(images, 48)
    assert torch.allclose(ours, theirs[..., top : top + 48, left : left + 48].clamp(0, 1), atol=1e-6)


def test_pixels_have_the_right_gradient() -> None:
    """In float64, up and down in size, some of the picture cut off."""
    images = 0.3 + 0.4 * torch.rand(1, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (5, 12):
        assert torch.autograd.gradcheck(lambda y, n=size: pictures.clip_pixels(y, n), images.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_are_at_least_float32(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 20, 20).to(dtype)
    for asked in (False, True):
        found = pictures.clip_pixels(images.requires_grad_(asked), 16)
        assert found.dtype == torch.promote_types(dtype, torch.float32) and found.requires_grad == asked


def test_eight_bits_are_those_of_the_strip(tmp_path: Path) -> None:
    """What a reward sees is what is kept as a picture, out of range, too."""
    images = torch.empty(1, 3, 16, 24).uniform_(-0.1, 1.1, generator=torch.Generator().manual_seed(0))
    save_strip(images, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert np.array_equal(pictures.to_8_bits(images)[0], np.asarray(strip))


# ------------------------------------------------------------------------------------------------------------ CLIPScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with everything it needs, 32-pixel pictures and 12 tokens; features spread wide."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted({letter for word in tiny.WORDS for letter in word})
    pieces = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(12)  # scores on both sides of 0
    model = CLIPModel(CLIPConfig(
        text_config=narrow | {"vocab_size": len(pieces), "max_position_embeddings": TOKENS,
                              "bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1},
        vision_config=narrow | {"image_size": SIZE, "patch_size": 8}, projection_dim=8,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / math.sqrt(parameter[0].numel()))
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def transformers_score(folder: Path, saved: Image.Image, prompt: str) -> float:
    """100 cos by transformers' own model and processor, one PIL picture at a time."""
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor(text=[prompt], images=saved, return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder).eval()(**inputs)
    return 100 * torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).item()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (100, 100), (64, 96)])
def test_clip_score_is_transformers_own(clip: Path, height: int, width: int) -> None:
    """Three pictures with three prompts in one batch; those of negative cosine count 0. Kills: features not of length
    1, prompts exchanged, the wrong token pooled."""
    images = [image(height, width, kind) for kind in ("smooth", "noise", "edges")]
    theirs = [transformers_score(clip, saved, prompt) for saved, prompt in zip(images, PROMPTS, strict=True)]
    ours = ClipScore(path=str(clip))(tensor(*images), PROMPTS)
    assert ours.tolist() == pytest.approx([max(score, 0.0) for score in theirs], abs=1e-4)
    assert min(theirs) < -10 < 10 < max(theirs)


def test_clip_scores_gradient(clip: Path) -> None:
    """In float64, against finite differences; the scores that are cut off at 0 have none."""
    score = ClipScore(path=str(clip))
    score._known = {prompt: score._text(prompt).double() for prompt in PROMPTS}  # its text mask overflows in float64
    score.network.double()
    score._crossing.inner = torch.float64
    images = 0.3 + 0.4 * torch.rand(6, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prompts = (PROMPTS * 2)[:6]
    values = score(images.requires_grad_(), prompts)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    positive = values > 0
    assert 0 < positive.sum() < 6 and torch.isfinite(gradient).all()
    assert torch.equal(gradient.flatten(1).norm(dim=1) > 0, positive)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    up, down = (score((images + sign * 1e-5 * direction).requires_grad_(), prompts).sum() for sign in (1, -1))
    assert ((up - down) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_a_long_prompt_is_cut_off(clip: Path) -> None:
    """At the model's 12 tokens, as transformers does; every prompt is encoded once."""
    score = ClipScore(path=str(clip))
    encoded: list[int] = []
    encode = score.network.get_text_features
    score.network.get_text_features = lambda **tokens: encoded.append(tokens["input_ids"].shape[1]) or encode(**tokens)
    images = [image(50, 50, kind) for kind in ("smooth", "noise", "edges", "smooth")]
    theirs = [max(transformers_score(clip, saved, LONG), 0.0) for saved in images]
    assert score(tensor(*images), [LONG] * 4).tolist() == pytest.approx(theirs, abs=1e-4)
    score(tensor(*images[:2]), [LONG, "cat"])
    assert encoded == [TOKENS, 5]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_clip_score_in_half_precision(clip: Path, dtype: str) -> None:
    images = tensor(image(40, 40, "smooth"), image(40, 40, "edges")).requires_grad_()
    exact, half = (ClipScore(path=str(clip), dtype=of)(images, PROMPTS[:2]) for of in ("fp32", dtype))
    assert half.dtype == torch.float32
    assert half.tolist() == pytest.approx(exact.tolist(), abs=2.0 if dtype == "bf16" else 0.5)
    assert torch.isfinite(torch.autograd.grad(half.sum(), images)[0]).all()


@pytest.mark.parametrize("lost", FILES)
def test_a_file_of_clip_that_is_missing(clip: Path, tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    assert ClipScore.weights({"path": str(folder)})[0].present
    (folder / lost).unlink()
    command = f"hf download {HUB_ID} {' '.join(FILES)} --revision {REVISION} --local-dir {folder}"
    with pytest.raises(FileNotFoundError) as error:
        ClipScore(path=str(folder))
    assert str(error.value) == f"{lost} is not in the folder {folder}; on a machine with a network: {command}"
    (entry,) = ClipScore.weights({"path": str(folder)})
    assert not entry.present and f"({lost})" in entry.what and entry.fetch == command
    values = tiny.spec(tiny.checkpoint(tmp_path))
    values["judge"] = {"_target_": CLIP, "name": "clip_score", "path": str(folder)}
    with pytest.raises(SpecError, match=rf"judge\.path='.*' is a folder without {lost}; write judge\.path={HUB_ID}"):
        TrialSpec.from_dict(values)


@pytest.mark.parametrize("harm", ["checksum", "truncated", "another network"])
def test_clip_weights_that_are_not_as_they_should_be(clip: Path, tmp_path: Path, harm: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    file = folder / CHECKPOINT
    settings: dict[str, Any] = {"path": str(folder), "sha256": sha256(file)}
    ClipScore(**settings)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "another network":
        state = load_file(file)
        del state["logit_scale"]
        save_file(state, file, metadata={"format": "pt"})
    words = {
        "checksum": f"its SHA-256 is {settings['sha256']}, expected {'0' * 64}",
        "truncated": f"CLIP in {folder} cannot be read",
        "another network": r"lacks 1 of CLIP's weights \(as logit_scale\)",
    }[harm]
    settings["sha256"] = "0" * 64 if harm == "checksum" else None
    with pytest.raises(OSError, match=words + f".*hf download {HUB_ID} {CHECKPOINT}"):
        ClipScore(**settings)


def test_clips_pickles_are_not_loaded(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    (folder / CHECKPOINT).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=CHECKPOINT):
        ClipScore(path=str(folder))


def test_clip_in_a_plan(clip: Path) -> None:
    """A pinned hub id goes by its commit; a folder by its content. Nothing in the cache is no problem of a spec."""
    assert ClipScore.fingerprint({}) == f"revision:{REVISION}"
    assert ClipScore.fingerprint({"path": str(clip)}) == f"sha256:{sha256(clip / CHECKPOINT)[:16]}"
    (entry,) = ClipScore.weights({"path": "nobody/clip", "revision": "0123abc"})
    assert not entry.present and entry.fetch == f"hf download nobody/clip {' '.join(FILES)} --revision 0123abc"


@pytest.mark.parametrize("field", ["reward", "judge"])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("path", 3, "is no folder"),
        ("sha256", 12, "is no SHA-256"),
        ("revision", 3, "is no commit"),
        ("dtype", "int8", "is not known"),
    ],
)
def test_settings_of_clip_that_cannot_be(tmp_path: Path, field: str, name: str, value: Any, words: str) -> None:
    values = tiny.spec(tiny.checkpoint(tmp_path))
    sound = {"_target_": CLIP, "name": "clip_score", "path": HUB_ID, "revision": REVISION, "sha256": None}
    TrialSpec.from_dict(values | {field: sound})
    with pytest.raises(SpecError, match=rf"{field}\.{name}=.* {words}"):
        TrialSpec.from_dict(values | {field: sound | {name: value}})


# ------------------------------------------------------------------------------------------------------ compressibility


def jpeg_kilobytes(saved: Image.Image, quality: int) -> float:
    file = io.BytesIO()
    saved.save(file, "JPEG", quality=quality)
    return len(file.getvalue()) / 1000


@pytest.mark.parametrize(("prefer", "sign"), [("small", -1), ("large", 1)])
@pytest.mark.parametrize("quality", [95, 50])
def test_compressibility_is_the_size_of_the_file(prefer: str, sign: int, quality: int) -> None:
    images = [image(64, 48, kind) for kind in ("smooth", "noise", "edges")]
    found = Compressibility(prefer=prefer, quality=quality)(tensor(*images), PROMPTS)
    assert found.tolist() == pytest.approx([sign * jpeg_kilobytes(saved, quality) for saved in images], rel=1e-6)
    assert sign * found[1] > sign * found[0] > 0  # noise makes the larger file
    half = Compressibility(prefer=prefer, quality=quality)(tensor(*images).half().requires_grad_(), PROMPTS)
    assert half.dtype == torch.float16 and not half.requires_grad


@pytest.mark.parametrize("field", ["reward", "judge"])
@pytest.mark.parametrize(("name", "value"), [("prefer", "tiny"), ("quality", 0), ("quality", 96), ("quality", 9.5)])
def test_settings_of_compressibility_that_cannot_be(tmp_path: Path, field: str, name: str, value: Any) -> None:
    values = tiny.spec(tiny.checkpoint(tmp_path), method__estimator="score")
    sound = {"_target_": JPEG, "name": "compressibility", "prefer": "large", "quality": 95}
    TrialSpec.from_dict(values | {field: sound})
    with pytest.raises(SpecError, match=rf"^{field}\.{name}={value!r} "):
        TrialSpec.from_dict(values | {field: sound | {name: value}})


def test_compressibility_has_no_gradient_to_ask_for(tmp_path: Path) -> None:
    values = tiny.spec(tiny.checkpoint(tmp_path), method__estimator="pathwise")
    values["reward"] = {"_target_": JPEG, "name": "compressibility", "prefer": "small", "quality": 95}
    with pytest.raises(SpecError, match=r"pathwise needs a differentiable reward.*write method\.estimator=score"):
        TrialSpec.from_dict(values)


@pytest.mark.parametrize("judge", [None, "clip"])
def test_a_whole_trial(
    clip: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, judge: str | None
) -> None:
    """Compressibility through the score estimator, with CLIPScore held out: both are tracked, and the reward that is
    written down is that of the pictures that are kept."""
    values = tiny.spec(tiny.checkpoint(tmp_path_factory.getbasetemp()), method__estimator="score", eval__pictures=4)
    values["reward"] = {"_target_": JPEG, "name": "compressibility", "prefer": "small", "quality": 95}
    values["judge"] = judge and {"_target_": CLIP, "name": "clip_score", "path": str(clip), "revision": None,
                                 "sha256": None, "dtype": "fp32"}  # fmt: skip
    outcome = run_trial(values, tmp_path)
    assert outcome.state == "done", outcome.message
    records = [record for record in read_journal(TrialFolder(tmp_path).journal) if "samples" in record]
    assert [record["step"] for record in records] == [0, 2, 4]
    for record in records:
        with Image.open(TrialFolder(tmp_path).picture(record["step"])) as strip:
            parts = [strip.crop((8 * i, 0, 8 * i + 8, 8)) for i in range(4)]
        assert record["samples"]["reward"] == pytest.approx([-jpeg_kilobytes(part, 95) for part in parts], rel=1e-6)
        if judge is None:
            assert "judge" not in record["samples"]
        else:
            scores = [max(transformers_score(clip, part, values["prompt"]), 0.0) for part in parts]
            assert record["samples"]["judge"] == pytest.approx(scores, abs=1e-3) and max(scores) > 1


# ---------------------------------------------------------------------------------------------------------- their files

PINS = {
    "image_reward": {"path": image_reward.HUB_ID, "revision": image_reward.REVISION, "sha256": None, "dtype": "fp32"},
    "clip_score": {"path": HUB_ID, "revision": REVISION, "sha256": None, "dtype": "fp32"},
}


@pytest.mark.parametrize(("name", "judge"), [("image_reward", "clip_score"), ("clip_score", "image_reward")])
def test_each_is_the_others_judge(name: str, judge: str) -> None:
    """The shipped files pin what the classes do, and a plan needs neither weights nor network."""
    (cell,) = compose([f"reward={name}", "prompt=counting"]).cells
    for field, component in (("reward", cell.spec.reward), ("judge", cell.spec.judge)):
        expected = name if field == "reward" else judge
        assert component["name"] == expected and component["fingerprint"] == f"revision:{PINS[expected]['revision']}"
        assert {key: component[key] for key in PINS[expected]} == PINS[expected]


def test_compressibility_as_shipped() -> None:
    """As DDPO counts it; another preference is another trial."""
    asked = ["reward=compressibility", "method.estimator=score", "prompt=counting"]
    cells = compose([*asked, "reward.prefer=small,large"]).cells
    assert [cell.spec.reward["prefer"] for cell in cells] == ["small", "large"]
    assert cells[0].key == compose(asked).cells[0].key != cells[1].key
    assert cells[0].spec.reward["quality"] == 95 and cells[0].spec.judge is None
