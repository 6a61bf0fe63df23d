"""ImageReward with random weights of the true size: the package's own numbers, gradients, offline, damaged files.

The weights: matrices of variance 1/inputs, word embeddings of variance 1, biases and norms spread by .1. The last layer
is drawn five times as large, so that the rewards of the pictures here differ by about 1 and those of the prompts by
.03: with the package's initialisation all pictures would get the same reward to 1e-4, and equality would prove nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests import tiny
from workers import weights
from workers.recorder import read_journal
from workers.rewards import image_reward
from workers.rewards.image_reward import CHECKPOINT, CONFIG, HUB_ID, REVISION, VOCABULARY, WORDS_REVISION, ImageReward
from workers.run import run_trial
from workers.spec import SpecError, TrialSpec
from workers.store import TrialFolder, sha256

TARGET = "workers.rewards.image_reward.ImageReward"
PROMPTS = ["a green rabbit", "cat and dog " * 15]
"""The second is longer than the 35 tokens that are read."""
MED_CONFIG = {
    "model_type": "bert", "vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "encoder_width": 768, "add_cross_attention": True,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "type_vocab_size": 2, "initializer_range": 0.02,
}  # fmt: skip
WORDS = 30522
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
OWN = [*dict.fromkeys(" ".join(PROMPTS).split()), *"abcdefghijklmnopqrstuvwxyz"[1:]]


def write_small_files(folder: Path) -> Path:
    """Everything but the checkpoint: med_config.json, and vocab.txt in bert-base-uncased/."""
    words = [SPECIAL.get(i, f"[unused{i}]") for i in range(WORDS)]
    words[1000 : 1000 + len(OWN)] = OWN
    (folder / "bert-base-uncased").mkdir(parents=True)
    (folder / "bert-base-uncased" / VOCABULARY).write_text("\n".join(words) + "\n")
    (folder / CONFIG).write_text(json.dumps(MED_CONFIG))
    return folder


def drawn(needed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that tell pictures and prompts apart; see the module."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in needed.items():
        if not like.is_floating_point():
            state[name] = like.clone()
            continue
        if like.ndim == 1:
            mean, spread = float(name.endswith("weight")), 0.1
        elif "embeddings." in name:
            mean, spread = 0.0, 1.0
        else:
            mean, spread = 0.0, 1 / math.sqrt(like[0].numel())
        state[name] = torch.empty(like.shape).normal_(mean, spread, generator=generator)
    state["blip.visual_encoder.pos_embed"] *= 9  # .02, as BLIP's own initialisation
    state["mlp.layers.7.weight"] *= 5
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ImageReward.pt (1.8 GB), med_config.json, bert-base-uncased/vocab.txt."""
    place = write_small_files(tmp_path_factory.mktemp("image_reward") / "weights")
    network = image_reward._build(place / CONFIG, place / "bert-base-uncased" / VOCABULARY, "")
    needed = network.state_dict()
    assert len(needed) == 625 and sum(part.numel() for part in network.parameters()) == 446_665_953
    torch.save(drawn(needed), place / CHECKPOINT)
    yield place
    (place / CHECKPOINT).unlink()


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(path=str(folder))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder whose checkpoint is a file of a few bytes."""
    place = write_small_files(tmp_path / "small")
    torch.save({"a": torch.zeros(10)}, place / CHECKPOINT)
    return place


def pictures(height: int, width: int, count: int = 2) -> list[Image.Image]:
    """Coloured clouds, coarse and fine, some parts of them saturated."""
    generator = np.random.default_rng(1)
    coarse = [generator.integers(0, 256, (3 + 5 * i, 4 + 5 * i, 3), dtype=np.uint8) for i in range(count)]
    return [Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC) for part in coarse]


def tensor(images: list[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])


# -------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(224, 224), (512, 512), (319, 201)])
def test_scores_are_the_packages(reward: ImageReward, height: int, width: int) -> None:
    """One batch of tensors against the package's `score` of one PIL picture at a time. Kills: another resize or crop,
    no normalisation, prompts in the wrong order, more or fewer tokens, dropout."""
    images, prompts = pictures(height, width), PROMPTS
    ours = reward(tensor(images), prompts)
    theirs = [reward.network.score(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    assert ours.shape == (2,) and not ours.requires_grad
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4)
    assert abs(theirs[0] - theirs[1]) > 0.1
    if height == 224:
        assert abs(reward.network.score(prompts[1], images[0]) - theirs[0]) > 3e-3


@pytest.mark.slow
def test_loaded_as_written(reward: ImageReward, folder: Path) -> None:
    """Every tensor of the file is in the network, frozen, in evaluation mode."""
    written = torch.load(folder / CHECKPOINT, weights_only=True, mmap=True)
    held = reward.network.state_dict()
    assert list(held) == list(written) and all(torch.equal(held[name], written[name]) for name in held)
    assert not any(part.requires_grad for part in reward.network.parameters())
    assert not any(module.training for module in reward.network.modules())


@pytest.mark.slow
def test_a_picture_that_needs_a_gradient_gets_nearly_the_same_reward(reward: ImageReward) -> None:
    """Nothing is rounded then: .02 where pictures differ by 1. The dtype is the pictures'."""
    images = (tensor(pictures(256, 256, 1)) * 0.999 + 0.0004).double().requires_grad_()
    graph = reward(images, PROMPTS[:1])
    with torch.no_grad():
        plain = reward(images, PROMPTS[:1])
    assert plain.dtype == graph.dtype == torch.float64 and graph.requires_grad
    assert 0 < (plain - graph.detach()).abs().item() < 0.02


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(reward: ImageReward) -> None:
    """Through resize, crop and network, for three directions in pixel space: the gradient's own within the red channel,
    within the left half and within the lower half, away from 0 and 1, where nothing is cut off. Rewards are good to
    1e-6 in float32 and the two differ by .05, so that rounding is 4e-5 of it; curvature adds as much (measured: 1.2e-4
    at most)."""
    prompts = PROMPTS[:1]
    images = (0.25 + 0.5 * tensor(pictures(96, 128, 1))).requires_grad_()
    reward(images, prompts).sum().backward()
    gradient = images.grad
    assert gradient is not None and torch.isfinite(gradient).all()
    masks = torch.zeros(3, *images.shape)
    masks[0, :, 0], masks[1, ..., :64], masks[2, ..., 48:, :] = 1, 1, 1
    for mask in masks:
        size = (gradient * mask).norm().item()
        step = 0.025 / size
        moved = (images + sign * step / size * gradient * mask for sign in (1, -1))
        up, down = (reward(picture, prompts).item() for picture in moved)
        assert size > 0.1
        assert (up - down) / (2 * step) == pytest.approx(size, rel=1e-3)


@pytest.mark.slow
def test_half_precision(reward: ImageReward, folder: Path) -> None:
    """Close to float32, in reward and gradient; the layers after BLIP stay in float32, so rewards are no multiples of
    1/256. (float16 takes minutes on a CPU.)"""
    images = tensor(pictures(64, 64, 1)).requires_grad_()
    half = ImageReward(path=str(folder), dtype="bf16")
    assert half.network.mlp.layers[0].weight.dtype == torch.float32
    assert half.network.blip.visual_encoder.cls_token.dtype == torch.bfloat16
    found, exact = half(images, PROMPTS[:1]), reward(images, PROMPTS[:1])
    assert found.dtype == torch.float32 and found.item() != found.bfloat16().item()
    assert found.item() == pytest.approx(exact.item(), abs=0.1)
    ours, theirs = (torch.autograd.grad(rewards.sum(), images)[0].flatten() for rewards in (found, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.slow
def test_a_whole_trial(folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The pathwise estimator goes through it, from the pictures to the adapter."""
    component = {"_target_": TARGET, "name": "image_reward", "path": str(folder), "revision": None, "tokenizer": None,
                 "sha256": None, "dtype": "fp32"}  # fmt: skip
    values = tiny.spec(
        tiny.checkpoint(tmp_path_factory.getbasetemp()), sampler__steps=2, train__gradient_steps=1,
        train__trajectories=2, eval__samples=2, eval__every=1, eval__pictures=1,
    )  # fmt: skip
    values |= {"reward": component}
    outcome = run_trial(values, tmp_path)
    assert outcome.state == "done", outcome.message
    first, last = (record["metrics"] for record in read_journal(TrialFolder(tmp_path).journal))
    assert first["eval/reward_mean"] != last["eval/reward_mean"]


@pytest.mark.parametrize(
    ("shape", "prompts", "words"),
    [((1, 4, 8, 8), ["a"], "scores images of shape"), ((2, 3, 8, 8), ["a"], "per image: got 1 prompts for 2")],
)
def test_what_is_no_batch_of_pictures(shape: tuple[int, ...], prompts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageReward.__call__(ImageReward.__new__(ImageReward), torch.rand(shape), prompts)


# ------------------------------------------------------------------------------------------------ without a network

FRESH = """
import socket, sys, warnings
asked = []
def nobody(*where, **how):
    asked.append(where)
    raise OSError("no network")
socket.getaddrinfo = nobody
socket.socket.connect = nobody
import transformers
from workers.rewards.image_reward import ImageReward
filters, verbosity = list(warnings.filters), transformers.logging.get_verbosity()
reward = ImageReward(path=sys.argv[1])
assert warnings.filters == filters, "the warnings' filters have changed"
assert transformers.logging.get_verbosity() == verbosity, "transformers' verbosity has changed"
assert not {"ImageReward", "clip", "datasets", "pkg_resources"} & set(sys.modules), "too much was imported"
import torch
print(reward(torch.full((1, 3, 8, 8), 0.5), ["a green rabbit"]).item())
import ImageReward
assert callable(ImageReward.load) and ImageReward.ReFL.__name__ == "ImageReward.ReFL"
assert ImageReward.utils.ImageReward is sys.modules["ImageReward.ImageReward"].ImageReward
import ImageReward.models.BLIP.blip
assert ImageReward.models.BLIP.blip.BertTokenizer is transformers.BertTokenizer
assert not asked, f"asked for {asked}"
"""


@pytest.mark.slow
def test_a_fresh_process_needs_no_network_and_changes_nothing(folder: Path, reward: ImageReward) -> None:
    """From a folder, with nothing that tells the libraries to stay offline: no host is asked for. Warnings and
    messages are as before, and the package can be imported in full afterwards."""
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    command = [sys.executable, "-c", FRESH, str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = reward(torch.full((1, 3, 8, 8), 0.5), ["a green rabbit"]).item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Path], Path]:
    """An empty hub cache, and what puts a file into it: (hub id, revision, file) to the place of its content."""
    from huggingface_hub import constants, file_download

    cache = tmp_path / "hub"
    cache.mkdir()
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache), raising=False)

    def put(name: str, revision: str, file: Path, blob: str | None = None) -> Path:
        home = cache / f"models--{name.replace('/', '--')}"
        content = home / "blobs" / (blob or sha256(file))
        link = home / "snapshots" / revision / file.name
        for place in (content, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, content)
        link.symlink_to(os.path.relpath(content, link.parent))
        return content

    return put


@pytest.mark.slow
def test_from_the_hubs_cache(folder: Path, hub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults alone: pinned revisions, the words under their old name too, the SHA-256 that is the file's name."""
    content = hub(HUB_ID, REVISION, folder / CHECKPOINT)
    hub(HUB_ID, REVISION, folder / CONFIG)
    with pytest.raises(FileNotFoundError, match="vocab.txt .* hf download google-bert/bert-base-uncased vocab.txt"):
        ImageReward()
    hub("bert-base-uncased", WORDS_REVISION, folder / "bert-base-uncased" / VOCABULARY)
    assert all(entry.present for entry in ImageReward.weights({}))
    checked: list[Path] = []
    digest = weights.digest
    monkeypatch.setattr(weights, "digest", lambda file: checked.append(file.resolve()) or digest(file))
    found = ImageReward()
    assert checked == [content]
    assert found.network.score_gard is not None and found.network.blip.tokenizer.enc_token_id == WORDS + 1
    with pytest.raises(FileNotFoundError, match=f"hf download {HUB_ID} {CHECKPOINT} --revision other"):
        ImageReward(revision="other")


# ------------------------------------------------------------------------------------------ what is not as it should be


def test_nothing_in_the_cache_names_the_commands(hub: Callable[..., Path], tmp_path: Path) -> None:
    """A plan takes it (the trials' machine may have the weights); the trial says how to fetch them, and so does
    `weights`."""
    with pytest.raises(FileNotFoundError, match=rf"ImageReward\.pt is not in {HUB_ID} in the hub's cache; .* hf downl"):
        ImageReward()
    values = tiny.spec(tiny.checkpoint(tmp_path), "pi_ft")
    values |= {"reward": {"_target_": TARGET, "name": "image_reward", "path": HUB_ID, "revision": REVISION}}
    outcome = run_trial(values, tmp_path / "trial")
    assert (outcome.state, outcome.kind) == ("failed", "loading")
    assert f"hf download {HUB_ID} {CHECKPOINT} --revision {REVISION}" in str(outcome.message)
    entries = ImageReward.weights(values["reward"])
    assert [entry.present for entry in entries] == [False, False, False]
    assert [entry.fetch for entry in entries] == [
        f"hf download {HUB_ID} {CHECKPOINT} --revision {REVISION}",
        f"hf download {HUB_ID} {CONFIG} --revision {REVISION}",
        f"hf download google-bert/bert-base-uncased {VOCABULARY} --revision {WORDS_REVISION}",
    ]


@pytest.mark.parametrize("lost", [CHECKPOINT, CONFIG, VOCABULARY])
def test_a_file_that_is_missing(small: Path, hub: Callable[..., Path], lost: str) -> None:
    (file,) = small.rglob(lost)
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        ImageReward(path=str(small))
    source = "google-bert/bert-base-uncased" if lost == VOCABULARY else HUB_ID
    assert lost in str(error.value) and f"the folder {small}" in str(error.value)
    assert f"hf download {source} {lost} --revision" in str(error.value)
    assert f"--local-dir {file.parent}" in str(error.value)
    (entry,) = [entry for entry in ImageReward.weights({"path": str(small)}) if not entry.present]
    assert lost in entry.what and entry.fetch in str(error.value)


def test_words_beside_the_checkpoint_will_do(small: Path, tmp_path: Path) -> None:
    """In the folder itself, or in a folder of their own."""
    words = small / "bert-base-uncased" / VOCABULARY
    assert image_reward._words(str(small), None) == words
    beside, elsewhere = small / VOCABULARY, tmp_path / "words" / VOCABULARY
    elsewhere.parent.mkdir()
    shutil.copy(words, elsewhere)
    words.rename(beside)
    assert image_reward._words(str(small), None) == beside
    assert image_reward._words(str(small), str(elsewhere.parent)) == elsewhere


def wrong_setting(place: Path, hub: Callable[..., Path]) -> dict[str, Any]:
    return {"path": str(place), "sha256": "A" * 64}


def wrong_note(place: Path, hub: Callable[..., Path]) -> dict[str, Any]:
    (place / f"{CHECKPOINT}.sha256").write_text(f"{'a' * 64}  {CHECKPOINT}\n")
    return {"path": str(place)}


def wrong_blob(place: Path, hub: Callable[..., Path]) -> dict[str, Any]:
    hub(HUB_ID, REVISION, place / CHECKPOINT, "a" * 64)
    hub(HUB_ID, REVISION, place / CONFIG)
    return {"tokenizer": str(place / "bert-base-uncased")}


@pytest.mark.parametrize("wrong", [wrong_setting, wrong_note, wrong_blob])
def test_a_wrong_checksum(small: Path, hub: Callable[..., Path], wrong: Callable[..., dict[str, Any]]) -> None:
    """From the setting, from a file beside it, from the hub's cache. Kills: a checksum that is not compared."""
    found = sha256(small / CHECKPOINT)
    settings = wrong(small, hub)
    with pytest.raises(OSError, match="is not what it should be") as error:
        ImageReward(**settings)
    for words in (CHECKPOINT, f"SHA-256 is {found}", f"expected {'a' * 64}", f"hf download {HUB_ID} {CHECKPOINT}"):
        assert words in str(error.value)
    assert str(error.value).endswith("--force-download")


def test_a_right_checksum(small: Path) -> None:
    """The setting counts, then the note. What is wrong next is found then: this checkpoint fits nothing."""
    file = small / CHECKPOINT
    (small / f"{CHECKPOINT}.sha256").write_text("nonsense\n")
    with pytest.raises(OSError, match=r"ImageReward\.pt\.sha256 holds no SHA-256"):
        weights.verify(file, None, "")
    weights.verify(file, sha256(file).upper(), "")
    (small / f"{CHECKPOINT}.sha256").write_text(f"{sha256(file)} *{CHECKPOINT}\n")
    weights.verify(file, None, "")
    with file.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(OSError, match="is not what it should be"):
        weights.verify(file, None, "")


class Harmful:
    """A pickle of it writes a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["truncated", "empty", "a page of an error", "code", "code in a list", "a list"])
def test_a_file_that_is_no_checkpoint(small: Path, kind: str) -> None:
    file, trace = small / CHECKPOINT, small / "trace"
    if kind.startswith("code"):
        torch.save({"a": Harmful(trace)} if kind == "code" else [Harmful(trace)], file)
    elif kind == "a list":
        torch.save([torch.zeros(1)], file)
    else:
        content = {"truncated": file.read_bytes()[:-100], "empty": b"", "a page of an error": b"<html>404</html>"}[kind]
        file.write_bytes(content)
    words = "holds no table of tensors" if kind == "a list" else "cannot be read as weights: it is truncated or damaged"
    with pytest.raises(OSError, match=words) as error:
        ImageReward(path=str(small))
    assert str(file) in str(error.value) and f"hf download {HUB_ID} {CHECKPOINT}" in str(error.value)
    assert not trace.exists() and "weights_only" not in str(error.value)


def test_a_checkpoint_of_another_network(small: Path) -> None:
    """Nothing may be missing, unknown or of another shape (the package loads with strict=False)."""
    network = image_reward._build(small / CONFIG, small / "bert-base-uncased" / VOCABULARY, "")
    state = dict(network.state_dict())
    state["odd"] = state.pop("mlp.layers.0.bias")
    state["mlp.layers.7.bias"] = torch.zeros(2)
    words = "1 missing (as mlp.layers.0.bias), 1 of a wrong shape (as mlp.layers.7.bias), 1 unknown (as odd)"
    with pytest.raises(OSError, match=re.escape(f"network of 625 tensors: {words}")):
        image_reward._fill(network, state, small / CHECKPOINT, "hf download")
    with pytest.raises(OSError, match="does not fit .* 625 missing"):
        ImageReward(path=str(small))


def test_words_and_configuration_of_another_network(small: Path) -> None:
    words = small / "bert-base-uncased" / VOCABULARY
    whole = words.read_text()
    words.write_text(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"vocab\.txt and the package's own two make \d+ words, and .* asks for 30524"):
        ImageReward(path=str(small))
    words.write_text(whole)
    (small / CONFIG).write_text("{")
    with pytest.raises(OSError, match=rf"no network can be built from .*{CONFIG}.*: hf download {HUB_ID} {CONFIG}"):
        ImageReward(path=str(small))


@pytest.mark.parametrize("lost", ["apply_chunking_to_forward", None])
def test_libraries_that_do_not_fit(small: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None) -> None:
    """As transformers 4.56 has it, and without the package. Once they fit, it works."""
    for name in [name for name in sys.modules if name.startswith(image_reward.ALIAS)]:
        del sys.modules[name]
    image_reward._package.cache_clear()
    with monkeypatch.context() as patch:
        if lost is None:
            patch.setattr(image_reward.importlib.util, "find_spec", lambda name: None)
        else:
            patch.delattr(transformers.modeling_utils, lost)
        with pytest.raises(OSError, match=r"image-reward package does not work here.*transformers==4\.55\.4.*4\.56"):
            ImageReward(path=str(small))
        assert not any(name.startswith(image_reward.ALIAS) for name in sys.modules)
    with pytest.raises(OSError, match="does not fit .* 625 missing"):
        ImageReward(path=str(small))


# --------------------------------------------------------------------------------------------------- a plan's questions


@pytest.mark.parametrize("field", ["reward", "judge"])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("path", "/not/there", "is not there; write {}.path=THUDM/ImageReward or a folder that holds ImageReward.pt,"),
        ("path", None, "is no folder and no hub id"),
        ("path", "a/b/c", "is neither a folder nor a hub id"),
        ("tokenizer", "./not/there", "is not there; write {}.tokenizer=null or a folder that holds vocab.txt"),
        ("sha256", "abc", "is no SHA-256; write the 64 hex digits"),
        ("revision", 5736, "is no commit; quote it"),
        ("dtype", "fp64", "is not known; choose one of fp32, fp16, bf16"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, field: str, name: str, value: Any, words: str) -> None:
    values = tiny.spec(tiny.checkpoint(tmp_path))
    sound = {"_target_": TARGET, "name": "image_reward", "path": HUB_ID, "revision": REVISION, "sha256": "A" * 64}
    TrialSpec.from_dict(values | {field: sound})
    with pytest.raises(SpecError) as error:
        TrialSpec.from_dict(values | {field: sound | {name: value}})
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{field}.{name}={value!r} {words.format(field)}")


def test_a_folder_without_its_files_is_a_problem_of_the_spec(small: Path, tmp_path: Path) -> None:
    (small / CONFIG).unlink()
    values = tiny.spec(tiny.checkpoint(tmp_path))
    values["reward"] = {"_target_": TARGET, "name": "image_reward", "path": str(small)}
    with pytest.raises(SpecError, match=r"reward\.path='.*small' is a folder without med_config\.json; write"):
        TrialSpec.from_dict(values)


def test_the_fingerprint(small: Path, hub: Callable[..., Path]) -> None:
    """A pinned hub id has the same one whether it is cached or not: a trial's key depends on it."""
    assert ImageReward.fingerprint({}) == f"revision:{REVISION}"
    assert ImageReward.fingerprint({"revision": None}) == "revision:None"
    digits = sha256(small / CHECKPOINT)
    assert ImageReward.fingerprint({"path": str(small), "revision": REVISION}) == f"sha256:{digits[:16]}"
    hub(HUB_ID, REVISION, small / CHECKPOINT)
    assert ImageReward.fingerprint({"path": HUB_ID, "revision": REVISION}) == f"revision:{REVISION}"
    hub(HUB_ID, "0123abc", small / CONFIG)
    hub("other/one", "0123abc", small / CHECKPOINT, "b" * 64)
    main = Path(weights.find("other/one", "0123abc", CHECKPOINT)).parents[2] / "refs" / "main"
    main.parent.mkdir()
    main.write_text("0123abc")
    assert ImageReward.fingerprint({"path": "other/one", "revision": None}) == f"sha256:{'b' * 16}"
    (small / CHECKPOINT).unlink()
    with pytest.raises(FileNotFoundError, match=f"the folder {small} has no {CHECKPOINT}"):
        ImageReward.fingerprint({"path": str(small)})
