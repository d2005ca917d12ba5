"""Reads simple scenes back from pictures by hue, connected areas and outlines; independent of any model."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .scenes import COLOURS, PLACES, SHAPES, Colour, Scene, Shape, distance

_HUES: dict[Colour, float] = {"red": 0, "orange": 27, "yellow": 50, "green": 136, "blue": 222, "purple": 279}
_CHROMA = 80  # of 255; backgrounds stay below 50, and objects above 110
_SMALLEST = 0.007  # of the picture's area; the smallest object that is drawn takes twice that
_LIKENESS: dict[Shape, float] = {
    "circle": 0.83,
    "square": 0.81,
    "triangle": 0.70,
    "star": 0.60,
    "ring": 0.67,
    "heart": 0.78,
}
"""Overlap with the nearest outline below which a shape is not recognized.

Of outlines whose points are moved by 4 % of the diameter, 19 of 20 reach theirs. One threshold for all would accept any
lump as a circle and refuse most hand-drawn stars.
"""
_SIDE = 32


@dataclass(frozen=True)
class Seen:
    """One object in a picture; the centre is in fractions of width and height."""

    colour: Colour
    shape: Shape | None
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what the scene's prompt mentions, and no more. `position` is None if it mentions none."""

    colour: bool
    shape: bool
    pairs: bool  # each shape in its own colour
    position: bool | None


def see(picture: NDArray[np.uint8]) -> list[Seen]:
    """The saturated objects in an RGB picture [height, width, 3]."""
    height, width, _ = picture.shape
    seen = []
    for colour, area in coloured_areas(picture):
        rows, columns = np.nonzero(area)
        top, left = rows.min(), columns.min()
        crop = area[top : rows.max() + 1, left : columns.max() + 1]
        x, y = left + crop.shape[1] / 2, top + crop.shape[0] / 2
        seen.append(Seen(colour, _nearest_shape(crop), float(x / width), float(y / height)))
    return seen


def coloured_areas(picture: NDArray[np.uint8]) -> list[tuple[Colour, NDArray[np.bool_]]]:
    """The connected saturated areas [height, width] of an RGB picture [height, width, 3], specks left out."""
    height, width, _ = picture.shape
    pixels = picture.astype(np.float32)
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    kinds = np.where(chroma > _CHROMA, _nearest_colour(pixels, chroma), -1)
    return [
        (colour, area)
        for kind, colour in enumerate(COLOURS)
        for area in _connected(kinds == kind)
        if area.sum() >= _SMALLEST * width * height
    ]


def judge(scene: Scene, seen: list[Seen]) -> Verdict:
    """Compares what is seen with what the scene's prompt mentions."""
    wanted = [(thing.colour, thing.shape) for thing in scene.things]
    return Verdict(
        colour=_same((colour for colour, _ in wanted), (one.colour for one in seen)),
        shape=_same((shape for _, shape in wanted), (str(one.shape) for one in seen)),
        pairs=_same((f"{c} {s}" for c, s in wanted), (f"{one.colour} {one.shape}" for one in seen)),
        position=_position(scene, seen),
    )


def _same(wanted: Iterable[str], found: Iterable[str]) -> bool:
    return sorted(wanted) == sorted(found)


def _position(scene: Scene, seen: list[Seen]) -> bool | None:
    if scene.place is not None:
        if len(seen) != 1:
            return False
        column, row = PLACES[scene.place]
        return _at(seen[0].x, column) and _at(seen[0].y, row)
    if scene.relation is None:
        return None
    if len(seen) != 2:
        return False
    first = scene.things[0]
    one, other = seen
    if not _is(one, first.colour, first.shape, other):
        one, other = other, one
        if not _is(one, first.colour, first.shape, other):
            return False
    along = {"left": other.x - one.x, "right": one.x - other.x, "above": other.y - one.y, "below": one.y - other.y}
    return along[scene.relation] > 0.15


def _is(one: Seen, colour: Colour, shape: Shape, other: Seen) -> bool:
    """Whether `one` is the object meant: distinguished from `other` by colour, or by shape if the colours agree."""
    return one.colour == colour and (other.colour != colour or one.shape == shape)


def _at(place: float, side: int) -> bool:
    return (place < 0.4, 0.35 < place < 0.65, place > 0.6)[side + 1]


def _nearest_colour(pixels: NDArray[np.float32], chroma: NDArray[np.float32]) -> NDArray[np.intp]:
    red, green, blue = np.moveaxis(pixels, 2, 0)
    safe = np.maximum(chroma, 1)
    largest = pixels.argmax(axis=2)
    hue = 60 * np.choose(largest, [(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    away = np.abs(hue[..., None] - np.array(list(_HUES.values()))) % 360
    return np.asarray(np.minimum(away, 360 - away).argmin(axis=2))


def _connected(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Areas of `mask` whose pixels touch at sides: the smallest index spreads until nothing changes."""
    most = mask.size
    labels = np.where(mask, np.arange(most).reshape(mask.shape), most)
    while True:
        wide = np.pad(labels, 1, constant_values=most)
        spread = np.minimum.reduce([wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])
        spread[~mask] = most
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


def _nearest_shape(area: NDArray[np.bool_]) -> Shape | None:
    found = _fitted(area.astype(np.float32))
    likeness = {shape: max(_overlap(found, outline) for outline in _outlines(shape)) for shape in SHAPES}
    best = max(SHAPES, key=likeness.__getitem__)
    return best if likeness[best] >= _LIKENESS[best] else None


def _overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _fitted(area: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(area).resize((_SIDE, _SIDE), Image.Resampling.BOX))


@cache
def _outlines(shape: Shape) -> list[NDArray[np.float32]]:
    """The shape at several angles, each fitted to the square."""
    ramp = np.arange(-50, 51, dtype=np.float32)
    outlines = []
    for angle in (-12, -6, 0, 6, 12):
        inside = distance(shape, ramp[None, :], ramp[:, None], 40, angle) < 0
        rows, columns = np.nonzero(inside)
        crop = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        outlines.append(_fitted(crop.astype(np.float32)))
    return outlines
