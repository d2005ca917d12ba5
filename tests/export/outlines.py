"""Outlines that a hand might draw, and outlines of nothing: what the demo's checker is set and tested with."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo_model.scenes import RGB, Shape, distance

SIDE = 128
Area = NDArray[np.bool_]


def wavering(shape: Shape, amplitude: float, rng: np.random.Generator) -> Area:
    """The shape [128, 128], in some size, with all its points moved: by a smooth field whose root mean square is
    `amplitude` of the shape's diameter."""
    radius = rng.uniform(16, 40)
    place = np.arange(SIDE) - (SIDE - 1) / 2
    x, y = np.meshgrid(place, place)
    across, down = (field * amplitude * 2 * radius for field in _fields(place / radius, rng))
    moved_x, moved_y = (x + across).astype(np.float32), (y + down).astype(np.float32)
    return distance(shape, moved_x, moved_y, radius, float(rng.uniform(-8, 8))) < 0


def _fields(place: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two sums of waves of up to three periods over 2.8 radii, short ones weaker; each with mean square 1 over that.

    `place` [n] is x along a row and y along a column. A wave of i periods in x and j in y is the real part of a product
    of one that only x decides and one that only y does, so that each sum [n, n] is two products of matrices.
    """
    numbers = range(-3, 4)
    periods = [(i, j) for i in numbers for j in numbers if (i, j) != (0, 0)]
    power = sum(1 / (i * i + j * j) / 2 for i, j in periods)
    along = np.exp(2j * math.pi / 2.8 * np.outer(numbers, place))  # [7, n]
    found = []
    for _ in range(2):
        waves = np.zeros((len(numbers), len(numbers)), complex)
        for i, j in periods:
            strength, turn = rng.normal(), rng.uniform(0, 2 * math.pi)
            waves[j + 3, i + 3] = strength / math.hypot(i, j) * np.exp(1j * turn)
        found.append((along.T @ waves @ along).real / math.sqrt(power))
    return found[0], found[1]


def blob(rng: np.random.Generator) -> Area:
    """A closed curve around the middle, of no shape in particular."""
    turns = np.linspace(0, 2 * math.pi, 200, endpoint=False)
    bumps = (rng.normal() * 9 / math.sqrt(k) * np.cos(k * turns + rng.uniform(0, 2 * math.pi)) for k in range(2, 7))
    radii = np.clip(30 + sum(bumps, start=np.zeros_like(turns)), 6, 56)
    return polygon(np.stack([np.cos(turns) * radii, np.sin(turns) * radii], axis=1))


def polygon(points: NDArray[np.float64]) -> Area:
    """Filled; points [n, 2] around the middle."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).polygon([(SIDE / 2 + x, SIDE / 2 + y) for x, y in points], fill=255)
    return np.asarray(image) > 127


def letter(character: str) -> Area:
    """A bold character."""
    image = Image.new("L", (SIDE, SIDE))
    font = ImageFont.load_default(70)
    ImageDraw.Draw(image).text((30, 15), character, fill=255, font=font, stroke_width=4)
    return np.asarray(image) > 127


def painted(area: Area) -> NDArray[np.uint8]:
    """The area in green on white."""
    return np.where(area[..., None], np.uint8(RGB["green"]), np.uint8(255))
