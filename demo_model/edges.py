"""Scenes whose objects stand anywhere, and maps of their outlines: what the demo model's ControlNet learns from.

Captions name the objects and not their places, so that only the map tells where they are.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .scenes import Pixels, Scene, Thing, distance, random_scene

_REACH = 1.22  # the farthest point of any outline from the centre, in radii: a square's corner


def placed_scene(rng: np.random.Generator, size: tuple[int, int], *, held_out: bool = False) -> Scene:
    """A scene of one or two objects at random places of a picture of `size`, wholly inside and apart.

    Things, background and `held_out` are as in `random_scene`; no caption mentions a place or a relation.
    """
    scene = random_scene(rng, held_out=held_out)
    things = _placed(scene.things, rng, size)
    return replace(scene, things=things, place=None, relation=None)


def _placed(things: tuple[Thing, ...], rng: np.random.Generator, size: tuple[int, int]) -> tuple[Thing, ...]:
    short = min(size)
    most = 0.32 if len(things) == 1 else 0.21
    while True:
        placed = []
        for thing in things:
            radius = rng.uniform(0.13, most)
            x, y = (rng.uniform(reach, 1 - reach) for reach in (_REACH * radius * short / side for side in size))
            angle = float(rng.uniform(-8, 8))
            placed.append(replace(thing, x=x, y=y, radius=radius, angle=angle, size=_word(radius, len(things), rng)))
        if len(placed) == 1 or _apart(placed[0], placed[1], size):
            return tuple(placed)


def _word(radius: float, count: int, rng: np.random.Generator) -> Literal["", "small", "large"]:
    """What captions call the size: where it is clear, every second one does."""
    if count > 1 or rng.random() < 0.5:
        return ""
    return "small" if radius < 0.16 else "large" if radius > 0.29 else ""


def _apart(one: Thing, other: Thing, size: tuple[int, int]) -> bool:
    away = np.hypot((one.x - other.x) * size[0], (one.y - other.y) * size[1])
    return bool(away > _REACH * (one.radius + other.radius) * min(size))


def edge_map(scene: Scene, size: tuple[int, int], width: float = 1.5, level: float = 1.0) -> Pixels:
    """White outlines on black, [height, width, 3] between 0 and 1; `width` in pixels, `level` the brightness."""
    lines = np.zeros((size[1], size[0]), np.float32)
    for thing in scene.things:
        np.maximum(lines, np.clip(width / 2 + 0.5 - np.abs(_distance(thing, size)), 0, 1), out=lines)
    return np.repeat(lines[..., None] * np.float32(level), 3, axis=2)


def random_edge_map(scene: Scene, size: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """As different programs draw it: thin or thick, smooth or in whole pixels (as Canny's are), a little dimmer."""
    lines = edge_map(scene, size, float(rng.uniform(1.0, 2.5)))
    if rng.random() < 0.4:
        lines = (lines > 0.5).astype(np.float32)
    return lines * np.float32(rng.uniform(0.7, 1.0))


def inside(thing: Thing, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels [height, width] that an object covers."""
    return np.asarray(_distance(thing, size) < 0)


def _distance(thing: Thing, size: tuple[int, int]) -> Pixels:
    width, height = size
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5 - thing.x * width
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - thing.y * height
    return distance(thing.shape, x, y, thing.radius * min(size), thing.angle)
