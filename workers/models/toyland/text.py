"""Captions of toyland: grammar, parser, tokenizer vocabulary and the truth of a caption about a scene.

What: `caption(scene, rng)` writes a sentence, `parse(prompt)` reads which attributes it asks for, `truth(scene,
asked)` says which share of them the scene has, `check_words` refuses words that the models never saw.
How to run: `write_tokenizer(folder)` writes vocab.json and merges.txt for transformers' CLIPTokenizer, one token per
word.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workers.models.toyland.scenes import BACKGROUNDS, COLOURS, COUNTS, SPECIES, Scene, natural_colour

MAX_LENGTH = 16  # tokens, with the start and end marks
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PLURAL = {"rabbit": "rabbits", "cat": "cats", "dog": "dogs", "wolf": "wolves"}
SINGULAR = {p: s for s, p in PLURAL.items()}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLACES = {
    "plain": ("on a plain background", "on plain background"),
    "park": ("in the park", "in a park"),
    "moon": ("on the moon",),
}
OTHER = ("and", "in", "on", "the", "of", "colored", "coloured", "gray", "background", "picture", "photo", "drawing")
KNOWN_WORDS = tuple(sorted({*SPECIES, *SINGULAR, *COLOURS, *NUMBERS, *BACKGROUNDS, *OTHER}))


@dataclass(frozen=True)
class Attributes:
    """What a prompt asks for; None or an empty set: not asked."""

    species: frozenset[str] = frozenset()
    colours: frozenset[str] = frozenset()
    count: int | None = None
    background: str | None = None
    every_coloured: bool = True  # every named species has a colour: no other colour may appear

    def asked(self) -> tuple[str, ...]:
        """Names of the attributes asked for."""
        values = {n: getattr(self, n) for n in ("species", "colours", "count", "background")}
        return tuple(n for n, v in values.items() if v)


def words(prompt: str) -> list[str]:
    """Lower-case words of a prompt; commas and full stops do not count."""
    return re.sub(r"[.,\s]+", " ", prompt.lower()).split()


def check_words(prompt: str) -> None:
    """Raise ValueError, naming them, where a prompt has words that toyland does not know."""
    unknown = [w for w in words(prompt) if w not in KNOWN_WORDS]
    if unknown:
        raise ValueError(
            f"toyland does not know {', '.join(map(repr, unknown))} in the prompt {prompt!r}; "
            f"use these words only: {', '.join(KNOWN_WORDS)}"
        )
    if len(words(prompt)) > MAX_LENGTH - 3:
        raise ValueError(f"toyland reads {MAX_LENGTH - 3} words, the prompt {prompt!r} has {len(words(prompt))}")


def parse(prompt: str) -> Attributes:
    """Attributes a prompt asks for. A bare plural ("cats") asks for no count; "a cat and a dog" for two animals."""
    check_words(prompt)
    species: list[str] = []
    colours: list[str] = []
    counts: list[int | None] = []
    background, number, coloured, described = None, None, False, 0
    for word in words(prompt):
        if word in NUMBERS:
            number = NUMBERS[word]
        elif word in COLOURS or word == "gray":
            colours.append("grey" if word == "gray" else word)
            coloured = True
        elif word in PLURAL or word in SINGULAR:
            species.append(SINGULAR.get(word, word))
            counts.append(number if word in SINGULAR else number or 1)
            described += coloured
            number, coloured = None, False
        elif word in BACKGROUNDS:
            background, number = word, None
        elif word == "of":  # "a picture of ...": the number belonged to the picture
            number = None
    count = sum(c for c in counts if c) if counts and all(counts) else None
    return Attributes(frozenset(species), frozenset(colours), count, background, described == len(species))


def compare(
    asked: Attributes, species: frozenset[str], colours: frozenset[str], count: int, background: str
) -> dict[str, bool]:
    """For every attribute asked for: is it so in a picture that holds these?"""
    right = {
        "species": asked.species == species,
        "colours": asked.colours == colours if asked.every_coloured else asked.colours <= colours,
        "count": asked.count == count,
        "background": asked.background == background,
    }
    return {name: right[name] for name in asked.asked()}


def matches(scene: Scene, asked: Attributes) -> dict[str, bool]:
    """For every attribute asked for: does the scene have it?"""
    return compare(asked, scene.species, scene.colours, scene.count, scene.background)


def truth(scene: Scene, asked: Attributes) -> float:
    """Share in [0, 1] of the asked attributes that the scene has (1 where nothing is asked)."""
    right = matches(scene, asked)
    return sum(right.values()) / len(right) if right else 1.0


# ---------------------------------------------------------------------------------------------------------- captions


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random true sentence about a scene; colour and background are left out at times."""
    with_colour = rng.random() < (0.5 if scene.count == 1 or len(scene.species) == 1 else 0.3)
    if len(scene.species) == 2:
        animals = list(scene.animals)
        if rng.random() < 0.5:
            animals.reverse()
        text = " and ".join(_noun_phrase(s, c if with_colour else None, 1, rng) for s, c in animals)
    else:
        species, colour = scene.animals[0]
        text = _noun_phrase(species, colour if with_colour else None, scene.count, rng)
    if rng.random() < 0.6:
        text += " " + str(rng.choice(PLACES[scene.background]))
    if len(scene.species) == 1 and rng.random() < 0.05:
        text = f"a {rng.choice(('picture', 'photo', 'drawing'))} of {text}"
    return _finish(text, rng)


def _noun_phrase(species: str, colour: str | None, count: int, rng: np.random.Generator) -> str:
    noun = species if count == 1 else PLURAL[species]
    if count == 1:
        number = "a" if rng.random() < 0.85 else "one"
    else:
        number = NUMBER_WORDS[count] if rng.random() < 0.9 else ""
    shade = ""
    if colour is not None:
        shade = "gray" if colour == "grey" and rng.random() < 0.3 else colour
        shade += str(rng.choice(("", " colored", " coloured"), p=(0.55, 0.35, 0.1)))
    return " ".join(w for w in (number, shade, noun) if w)


def _finish(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.5 else "")


CORRUPTION = {"species": 0.3, "colours": 0.3, "count": 0.2, "background": 0.25}


def corrupt(scene: Scene, rng: np.random.Generator, p: dict[str, float]) -> Scene:
    """The scene that a careless writer saw: each attribute is another one with its probability."""
    background = scene.background
    if rng.random() < p["background"]:
        background = _other(background, BACKGROUNDS, rng)
    animals = list(scene.animals)
    if len(scene.species) == 1:
        (species, colour), count = animals[0], scene.count
        species = _other(species, SPECIES, rng) if rng.random() < p["species"] else species
        colour = natural_colour(species, rng) if rng.random() < p["colours"] else colour
        if rng.random() < p["count"]:
            count = _other(count, COUNTS, rng)
            if rng.random() < 0.3:  # the writer saw a second species
                other = _other(species, SPECIES, rng)
                return Scene(((species, colour), (other, natural_colour(other, rng))), background)
        return Scene(((species, colour),) * count, background)
    if rng.random() < p["species"]:  # one of the two is said to be another animal
        i = int(rng.integers(2))
        animals[i] = (str(rng.choice([s for s in SPECIES if s not in scene.species])), animals[i][1])
    if rng.random() < p["colours"]:
        animals = [(s, natural_colour(s, rng)) for s, _ in animals]
    if rng.random() < p["count"]:  # only one of the two is mentioned, once or several times
        return Scene((animals[int(rng.integers(2))],) * int(rng.choice(COUNTS)), background)
    return Scene(tuple(animals), background)


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute, chosen at random, changed into another value, chosen evenly."""
    what = str(rng.choice(("species", "colours", "count", "background")))
    if what == "background":
        return Scene(scene.animals, _other(scene.background, BACKGROUNDS, rng))
    animals, pair = list(scene.animals), len(scene.species) == 2
    i = int(rng.integers(len(animals)))
    species, colour = animals[i]
    if what == "colours":
        changed = (species, _other(colour, COLOURS, rng))
    elif what == "species":
        changed = (_other(species, tuple(s for s in SPECIES if s == species or s not in scene.species), rng), colour)
    else:  # another number, of one species
        return Scene((animals[i],) * _other(scene.count, COUNTS, rng), scene.background)
    if pair or (scene.count == 2 and what == "species" and rng.random() < 0.5):
        animals[i] = changed
        return Scene(tuple(animals), scene.background)
    return Scene((changed,) * scene.count, scene.background)


def _other(value, choices: tuple, rng: np.random.Generator):
    options = [c for c in choices if c != value]
    return options[int(rng.integers(len(options)))]


# --------------------------------------------------------------------------------------------------------- tokenizer


def merge_rules(vocabulary: tuple[str, ...] = KNOWN_WORDS) -> list[tuple[str, str]]:
    """Byte-pair merges under which every word is one token.

    Words are merged left to right; a rule of one word may steal the start of another ("the" in "three"), so rules are
    added for the broken word's pieces until all words come out whole.
    """
    rules: list[tuple[str, str]] = []
    for _ in range(10):
        whole = True
        for word in vocabulary:
            pieces = _bpe(word, rules)
            while len(pieces) > 1:
                whole = False
                rules.append((pieces[0], pieces[1]))
                pieces = _bpe(word, rules)
        if whole:
            return rules
    raise RuntimeError("merges do not settle")


def _bpe(word: str, rules: list[tuple[str, str]]) -> list[str]:
    """Pieces of a word under merge rules, lowest rank first, as CLIPTokenizer does."""
    rank = {pair: i for i, pair in enumerate(rules)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:], strict=False))
        best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        i = pairs.index(best)
        pieces[i : i + 2] = [best[0] + best[1]]
    return pieces


def tokens() -> list[str]:
    """The vocabulary in the order of its ids: letters, letters at a word's end, merged pieces, the two marks."""
    letters = sorted({c for w in KNOWN_WORDS for c in w})
    merged = list(dict.fromkeys(a + b for a, b in merge_rules()))
    return [*letters, ".", ",", *(c + "</w>" for c in letters), ".</w>", ",</w>", *merged, BOS, EOS]


def write_tokenizer(folder: Path) -> None:
    """Write a CLIPTokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {t: i for i, t in enumerate(tokens())}
    special = {
        name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, text in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
    } | {"pad_token": EOS}
    config = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, indent=0))
    merges = "\n".join(f"{a} {b}" for a, b in merge_rules())
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def word_ids(prompts: list[str], length: int = MAX_LENGTH - 2) -> np.ndarray:
    """Ids of known words for the reward and the judge, 0 = padding: int64 [B, length]."""
    index = {w: i + 1 for i, w in enumerate(KNOWN_WORDS)}
    ids = np.zeros((len(prompts), length), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        check_words(prompt)
        found = [index[w] for w in words(prompt)]
        row[: len(found)] = found
    return ids
