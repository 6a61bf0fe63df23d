"""The drawing program of toyland: 32x32 RGB scenes of rabbits, cats, dogs and wolves.

What: `sample_scene` draws the attributes (species, colours, count, background), `draw` paints them. The scene is the
ground truth for captions, for the reward and for the judge.
How to run: `python -m workers.models.toyland.sheet` paints a labelled sheet. Everything comes from a numpy Generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
SUPER = 8  # supersampling factor: shapes are painted on a 256x256 canvas and box-averaged
SPECIES = ("rabbit", "cat", "dog", "wolf")
PALETTE = {
    "green": (52, 190, 62),
    "red": (222, 40, 40),
    "blue": (48, 92, 232),
    "yellow": (250, 206, 40),
    "white": (250, 250, 250),
    "brown": (150, 88, 42),
    "grey": (140, 144, 152),
}
COLOURS = tuple(PALETTE)
BACKGROUNDS = ("plain", "park", "moon")
NATURAL = {"rabbit": "white", "cat": "yellow", "dog": "brown", "wolf": "grey"}
COUNTS = (1, 2, 3, 4)
OUTLINE = (28, 24, 30)
PIXELS = {1: 21.0, 2: 14.8, 3: 13.8, 4: 13.8}  # drawn size of one animal by count


@dataclass(frozen=True)
class Scene:
    """What is in the picture: one (species, colour) per animal, left to right and top to bottom."""

    animals: tuple[tuple[str, str], ...]
    background: str

    @property
    def species(self) -> frozenset[str]:
        return frozenset(s for s, _ in self.animals)

    @property
    def colours(self) -> frozenset[str]:
        return frozenset(c for _, c in self.animals)

    @property
    def count(self) -> int:
        return len(self.animals)


def natural_colour(species: str, rng: np.random.Generator) -> str:
    """The species' own colour three times out of four, any other otherwise."""
    return NATURAL[species] if rng.random() < 0.75 else str(rng.choice(COLOURS))


def sample_scene(rng: np.random.Generator, coloured: float = 0.5) -> Scene:
    """A random scene; with probability `coloured` the colours are uniform instead of natural."""
    colour = (lambda s: str(rng.choice(COLOURS))) if rng.random() < coloured else (lambda s: natural_colour(s, rng))
    background = str(rng.choice(BACKGROUNDS))
    if rng.random() < 0.3:  # a pair of two different species
        pair = [str(s) for s in rng.choice(SPECIES, size=2, replace=False)]
        return Scene(tuple((s, colour(s)) for s in pair), background)
    species = str(rng.choice(SPECIES))
    count = int(rng.choice(COUNTS, p=(0.4, 0.15, 0.15, 0.3)))
    return Scene(((species, colour(species)),) * count, background)


# --------------------------------------------------------------------------------------------------------- painting


class _Pen:
    """Paints one animal in its own unit coordinates: centre (0, 0), the animal reaches from -1 to 1."""

    def __init__(self, canvas: ImageDraw.ImageDraw, x: float, y: float, size: float):
        self.d, self.x, self.y, self.r = canvas, x * SUPER, y * SUPER, size / 2 * SUPER
        self.w = 0.95 * SUPER if size > 18 else 0.75 * SUPER  # outline width

    def points(self, xy: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.x + u * self.r, self.y + v * self.r) for u, v in xy]

    def polygon(self, xy: list[tuple[float, float]], fill: tuple[int, ...], outline: bool = True) -> None:
        p = self.points(xy)
        if outline:
            self.d.line([*p, p[0], p[1]], fill=OUTLINE, width=round(2 * self.w), joint="curve")
        self.d.polygon(p, fill=fill)

    def ellipse(
        self, u: float, v: float, a: float, b: float, fill: tuple[int, ...], tilt: float = 0.0, outline: bool = True
    ) -> None:
        """Ellipse with centre (u, v), half axes a, b, turned by `tilt` radians."""
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        c, s = np.cos(tilt), np.sin(tilt)
        x, y = a * np.cos(t), b * np.sin(t)
        self.polygon(list(zip(u + c * x - s * y, v + s * x + c * y, strict=True)), fill, outline)

    def line(self, xy: list[tuple[float, float]], fill: tuple[int, ...], width: float) -> None:
        self.d.line(self.points(xy), fill=fill, width=max(1, round(width * SUPER)))

    def eyes(self, u: float, v: float, r: float = 0.1) -> None:
        for side in (-1, 1):
            self.ellipse(side * u, v, r, r * 1.15, OUTLINE, outline=False)


def _mix(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))


def _rabbit(pen: _Pen, fill: tuple[int, ...]) -> None:
    """Two long upright ears, a small round face, a pink nose."""
    pink = _mix(fill, (255, 150, 170), 0.75)
    for side in (-1, 1):
        pen.ellipse(side * 0.27, -0.5, 0.19, 0.52, fill, tilt=side * 0.12)
        pen.ellipse(side * 0.28, -0.48, 0.08, 0.36, pink, tilt=side * 0.12, outline=False)
    pen.ellipse(0, 0.42, 0.6, 0.54, fill)
    pen.eyes(0.25, 0.3)
    pen.ellipse(0, 0.54, 0.11, 0.08, (240, 110, 140), outline=False)
    pen.polygon([(-0.1, 0.68), (0.1, 0.68), (0.1, 0.88), (-0.1, 0.88)], (255, 255, 255), outline=False)


def _cat(pen: _Pen, fill: tuple[int, ...]) -> None:
    """A wide round face, small triangular ears far apart, whiskers."""
    for side in (-1, 1):
        pen.polygon([(side * 0.82, -0.82), (side * 0.85, 0.0), (side * 0.2, -0.42)], fill)
        pen.polygon([(side * 0.72, -0.58), (side * 0.72, -0.2), (side * 0.42, -0.38)], (255, 150, 170), outline=False)
    pen.ellipse(0, 0.12, 0.9, 0.66, fill)
    for side in (-1, 1):
        for v, w in ((0.2, 0.12), (0.36, 0.42)):
            pen.line([(side * 0.42, v + 0.08), (side * 1.08, w)], OUTLINE, 0.6)
        pen.ellipse(side * 0.36, 0.0, 0.15, 0.17, (190, 240, 60), outline=False)
        pen.ellipse(side * 0.36, 0.0, 0.07, 0.16, OUTLINE, outline=False)
    pen.polygon([(-0.11, 0.24), (0.11, 0.24), (0, 0.38)], (240, 110, 140), outline=False)


def _dog(pen: _Pen, fill: tuple[int, ...]) -> None:
    """A tall face between big dark hanging ears, a round nose, the tongue out."""
    dark = _mix(fill, (30, 18, 14), 0.62)
    pen.ellipse(0, -0.1, 0.6, 0.72, fill)
    for side in (-1, 1):
        pen.ellipse(side * 0.72, 0.06, 0.24, 0.62, dark, tilt=-side * 0.14)
    pen.eyes(0.24, -0.24)
    pen.ellipse(0, 0.6, 0.2, 0.34, (255, 70, 110))
    pen.ellipse(0, 0.3, 0.42, 0.34, _mix(fill, (255, 255, 255), 0.6), outline=False)
    pen.ellipse(0, 0.14, 0.19, 0.14, OUTLINE, outline=False)


def _wolf(pen: _Pen, fill: tuple[int, ...]) -> None:
    """Tall pointed ears, a V-shaped face, pale cheeks, a long dark snout, slanted eyes."""
    pale = _mix(fill, (255, 255, 255), 0.75)
    for side in (-1, 1):
        pen.polygon([(side * 0.62, -1.0), (side * 0.72, -0.15), (side * 0.05, -0.4)], fill)
    pen.polygon([(-0.66, -0.34), (0.66, -0.34), (0.92, 0.12), (0.2, 0.94), (-0.2, 0.94), (-0.92, 0.12)], fill)
    for side in (-1, 1):
        pen.polygon(
            [(side * 0.2, 0.02), (side * 0.86, 0.12), (side * 0.2, 0.84), (side * 0.1, 0.6)], pale, outline=False
        )
        pen.polygon(
            [(side * 0.16, 0.0), (side * 0.52, -0.22), (side * 0.46, 0.02), (side * 0.2, 0.1)], (250, 210, 40), False
        )
        pen.ellipse(side * 0.32, -0.05, 0.08, 0.1, OUTLINE, outline=False)
    dark = _mix(fill, (25, 25, 30), 0.6)
    pen.polygon([(-0.12, 0.0), (0.12, 0.0), (0.17, 0.7), (-0.17, 0.7)], dark, outline=False)
    pen.ellipse(0, 0.78, 0.2, 0.16, OUTLINE, outline=False)


_PAINT = {"rabbit": _rabbit, "cat": _cat, "dog": _dog, "wolf": _wolf}


def _plain(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((0, 0, 256, 256), fill=(244, 222, 196))


def _park(d: ImageDraw.ImageDraw) -> None:
    """Sky above, meadow below, a tree at either edge."""
    d.rectangle((0, 0, 256, 256), fill=(160, 214, 250))
    d.rectangle((0, 136, 256, 256), fill=(150, 206, 92))
    for x in (0, 256):
        d.rectangle((x - 14, 70, x + 14, 150), fill=(112, 74, 44))
        d.ellipse((x - 46, 0, x + 46, 96), fill=(30, 116, 62))


def _moon(d: ImageDraw.ImageDraw) -> None:
    """Black sky with stars, pale ground with craters."""
    d.rectangle((0, 0, 256, 256), fill=(18, 16, 52))
    for x, y in ((20, 24), (76, 60), (132, 12), (196, 44), (240, 92), (24, 104)):
        d.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(255, 250, 210))
    d.ellipse((-120, 150, 376, 420), fill=(196, 194, 206))
    for x, y, r in ((36, 214, 18), (216, 206, 22), (128, 240, 14)):
        d.ellipse((x - r, y - r * 0.6, x + r, y + r * 0.6), fill=(156, 154, 172))


_BACK = {"plain": _plain, "park": _park, "moon": _moon}
_SPOTS = {
    1: ((16.0, 17.0),),
    2: ((8.4, 18.0), (23.6, 18.0)),
    3: ((8.4, 8.6), (23.6, 8.6), (16.0, 23.6)),
    4: ((8.2, 8.4), (23.8, 8.4), (8.2, 23.8), (23.8, 23.8)),
}
_JITTER = {1: (3.0, 2.5), 2: (0.4, 3.5), 3: (0.5, 0.5), 4: (0.5, 0.5)}


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene -> uint8 [32, 32, 3]; the generator moves the animals by a pixel or two."""
    image = Image.new("RGB", (SIZE * SUPER,) * 2)
    canvas = ImageDraw.Draw(image)
    _BACK[scene.background](canvas)
    jx, jy = _JITTER[scene.count]
    for (species, colour), (x, y) in zip(scene.animals, _SPOTS[scene.count], strict=True):
        dx, dy = rng.uniform(-1, 1, 2)
        _PAINT[species](_Pen(canvas, x + jx * dx, y + jy * dy, PIXELS[scene.count]), PALETTE[colour])
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
