"""The built-in pictures: ten kinds of shapes, drawn by number, so that training needs nothing to download.

    draw_picture(7, size=32)     # a house: (32, 32, 3) uint8

Packed data live on in caches: a change to what is drawn must raise data.VERSION.
"""

from functools import partial

import numpy as np
from PIL import Image, ImageDraw

def draw_picture(index, size, seed=0):
    """Picture number `index` of the built-in data: (H, W, 3) uint8; its class is index % 10, in the order of SHAPES.

    A shape of random colour, place, size and tilt on a pale two-coloured gradient. Each kind has parts
    that must fit together (a face has two eyes, a star five equal points), so that bad samples look bad."""
    rng = np.random.default_rng([seed, index])
    big = 4 * size                                            # drawn large, then shrunk: smooth edges
    hue = rng.random()
    fore, part, top, bottom = (_colour(rng, h) for h in (hue, hue + 0.17, hue + 0.42, hue + 0.58))
    top, bottom = (0.5 * c + 110 for c in (top, bottom))      # pale: the shape stands out
    ramp = np.linspace(0, 1, big)[:, None, None]
    image = Image.fromarray(np.uint8(np.broadcast_to(ramp * bottom + (1 - ramp) * top, (big, big, 3))))
    r = big * rng.uniform(0.38, 0.44)
    centre = complex(*rng.uniform(r * 1.05, big - r * 1.05, 2))
    scale = r * np.exp(1j * rng.uniform(-0.12, 0.12))         # a complex factor turns the shape as well
    pen, own = ImageDraw.Draw(image), {"fore": fore, "part": part}
    for corners, colour in _PARTS[SHAPES[index % len(SHAPES)]]:
        fill = tuple(np.uint8(own.get(colour, colour)).tolist())
        pen.polygon([(p.real, p.imag) for p in centre + scale * corners], fill)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))

def _colour(rng, hue):
    """A fairly saturated colour (3,) in 0 … 255 by its hue in turns: three cosines, a third of a turn apart."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1, 2]) / 3))
    return 255 * (rng.uniform(0.55, 1.0) * (0.15 + 0.85 * wave))

# ---- the shapes -------------------------------------------------------------------------------------
# Corners are complex numbers in the shape's own coordinates: centre 0, radius 1, y down. Discs and boxes
# are polygons too, so that one line turns and places everything.

def _disc(centre, radius):
    return centre + radius * np.exp(2j * np.pi * np.arange(48) / 48)

def _box(left, top, right, bottom):
    return np.array([left + 1j * top, right + 1j * top, right + 1j * bottom, left + 1j * bottom])

def _arc(start, end, corners):
    """On the unit circle, from one angle to another, in half turns."""
    return np.exp(1j * np.linspace(start, end, corners) * np.pi)

_K, _A = np.arange(10), 2 * np.pi * np.arange(64) / 64
_STAR = np.where(_K % 2, 0.42, 1.0) * np.exp(1j * np.pi * (_K / 5 - 0.5))
_HEART = np.sin(_A) ** 3 - 1j * (13 * np.cos(_A) - 5 * np.cos(2 * _A) - 2 * np.cos(3 * _A) - np.cos(4 * _A)) / 16
_MOON = np.concatenate([_arc(0.25, 1.75, 40), 0.45 + 0.75 * _arc(1.61, 0.39, 40)])       # out, then back inside
_MOUTH = np.concatenate([0.62 * _arc(0.1, 0.9, 24), 0.42 * _arc(0.1, 0.9, 24)[::-1]]) + 0.08j
_ROOF = np.array([-1 - 0.1j, 1 - 0.1j, -1j])
_LAYERS = [np.array([1j * top, half + 1j * base, -half + 1j * base])
           for top, half, base in ((-1, 0.5, -0.35), (-0.65, 0.68, 0.1), (-0.25, 0.85, 0.55))]
_FIELDS = [(i + j, 0.45 * i - 0.9, 0.45 * j - 0.9) for i in range(4) for j in range(4)]

# The parts of each kind, from back to front: corners, and a colour or the name of one of a picture's own two.
_PARTS = {
    "ball": [(_disc(0, 1), "fore"), (_disc(-0.35 - 0.35j, 0.28), (255, 255, 255))],
    "ring": [(_disc(0, 1), "fore"), (_disc(0, 0.55), "part"), (_disc(0, 0.3), "fore")],
    "star": [(_STAR, "fore")],
    "heart": [(_HEART, "fore")],
    "moon": [(_MOON, "fore")],
    "checkers": [(_box(x, y, x + 0.45, y + 0.45), (20, 20, 20) if k % 2 else "fore") for k, x, y in _FIELDS],
    "flower": [*((_disc(0.62 * np.exp(2j * np.pi * k / 6), 0.36), "fore") for k in range(6)),
               (_disc(0, 0.36), (250, 240, 120))],
    "house": [(_box(-0.75, -0.1, 0.75, 0.95), "fore"), (_ROOF, "part"), (_box(-0.2, 0.35, 0.2, 0.95), (60, 35, 20))],
    "tree": [(_box(-0.16, 0.4, 0.16, 1), (90, 55, 30)), *((layer, "fore") for layer in _LAYERS)],
    "face": [(_disc(0, 1), "fore"), *((part, (10, 10, 10)) for part in
                                      (_disc(-0.38 - 0.25j, 0.17), _disc(0.38 - 0.25j, 0.17), _MOUTH))],
}
SHAPES = list(_PARTS)     # the classes' names

class BuiltIn:
    """The built-in pictures as one of data.py's sources."""

    name, classes = "builtin", SHAPES

    def __init__(self, count=20_000):
        self.count, self.fingerprint, self.labels = count, f"builtin {count}", np.arange(count) % len(SHAPES)

    def items(self, start, size):
        for i in range(start, self.count):
            yield f"picture {i}", partial(draw_picture, i, size), i % len(SHAPES)
