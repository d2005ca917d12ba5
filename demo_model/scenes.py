"""Scenes of one or two simple objects, and their pictures.

A scene is data; its picture and its captions follow from it. Some pairs of colour and shape are never drawn for
training (`HELD_OUT`): whether the model draws them on request shows that it understood words, not that it remembers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Shape = Literal["circle", "square", "triangle", "star", "ring", "heart"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple"]
Relation = Literal["left", "right", "above", "below"]
Language = Literal["en", "zh"]
Pixels = NDArray[np.float32]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "ring", "heart")
RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (218, 38, 42),
    "orange": (243, 124, 22),
    "yellow": (250, 212, 30),
    "green": (38, 164, 72),
    "blue": (38, 92, 222),
    "purple": (142, 58, 190),
}
COLOURS: tuple[Colour, ...] = tuple(RGB)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (18, 18, 22),
    "gray": (150, 152, 156),
    "light blue": (200, 224, 248),
    "pink": (250, 214, 224),
    "cream": (250, 240, 214),
}
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
PLACES: dict[str, tuple[int, int]] = {
    f"{row} {column}".replace("middle middle", "centre").replace("middle ", "").replace(" middle", ""): (x, y)
    for y, row in enumerate(("top", "middle", "bottom"), -1)
    for x, column in enumerate(("left", "middle", "right"), -1)
}
"""Name of a place → its column and row, each -1, 0 or 1."""

HELD_OUT: frozenset[tuple[Colour, Shape]] = frozenset(
    {
        ("red", "triangle"),
        ("orange", "square"),
        ("yellow", "ring"),
        ("green", "star"),
        ("blue", "heart"),
        ("purple", "circle"),
    }
)
"""Pairs that no training scene shows. Every colour and every shape is in one of them, and in five others."""


@dataclass(frozen=True)
class Thing:
    """One object. Centre and radius are fractions of the picture's width and height, and of its shorter side."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    radius: float
    angle: float = 0.0  # degrees
    size: Literal["", "small", "large"] = ""  # the word a caption may use


@dataclass(frozen=True)
class Scene:
    """What there is to see, and which of it a caption mentions."""

    things: tuple[Thing, ...]
    background: tuple[str, ...]  # one name, or two for a gradient from top to bottom
    place: str | None = None  # of a single object, if captions mention it
    relation: Relation | None = None  # of the first object to the second, if captions mention it (otherwise left)
    mentions_background: bool = False


def random_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A scene whose pairs of colour and shape are all training pairs, or (`held_out`) one of them is held out."""
    first = _pair(rng, held_out)
    background, mentions_background = _background(rng)
    if rng.random() < 0.5:
        return _one_thing(rng, first, background, mentions_background)
    second = _pair(rng, False)
    while second == first:
        second = _pair(rng, False)
    pairs = (first, second) if rng.random() < 0.5 else (second, first)
    relation = RELATIONS[rng.integers(4)]
    # without a mention, side by side in reading order: otherwise the noise would choose between arrangements
    mentions = relation != "left" or bool(rng.random() < 0.6)
    return Scene(
        _two_things(rng, pairs, relation), background, None, relation if mentions else None, mentions_background
    )


def _pair(rng: np.random.Generator, held_out: bool) -> tuple[Colour, Shape]:
    while True:
        pair = COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
        if (pair in HELD_OUT) == held_out:
            return pair


def _background(rng: np.random.Generator) -> tuple[tuple[str, ...], bool]:
    names = list(BACKGROUNDS)
    if rng.random() < 0.5:
        plain = names[rng.integers(len(names))] if rng.random() < 0.5 else "white"
        return (plain,), False
    if rng.random() < 0.65:
        return (names[rng.integers(len(names))],), True
    top, bottom = rng.choice(len(names), 2, replace=False)
    return (names[top], names[bottom]), True


def _one_thing(
    rng: np.random.Generator, pair: tuple[Colour, Shape], background: tuple[str, ...], mentions_background: bool
) -> Scene:
    place = list(PLACES)[rng.integers(len(PLACES))] if rng.random() < 0.5 else None
    size: Literal["", "small", "large"] = ""
    draw = rng.random()
    if draw < 0.2:
        size, radius = "small", rng.uniform(0.12, 0.16)
    elif draw < 0.4 and place is None:
        size, radius = "large", rng.uniform(0.29, 0.35)
    else:
        radius = rng.uniform(0.17, 0.21) if place else rng.uniform(0.19, 0.27)
    column, row = PLACES[place] if place else (0, 0)
    x, y = (0.5 + 0.26 * side + rng.uniform(-0.03, 0.03) for side in (column, row))
    thing = Thing(pair[1], pair[0], float(x), float(y), float(radius), float(rng.uniform(-8, 8)), size)
    return Scene((thing,), background, place, None, mentions_background)


def _two_things(
    rng: np.random.Generator, pairs: tuple[tuple[Colour, Shape], ...], relation: Relation
) -> tuple[Thing, ...]:
    gap = rng.uniform(0.23, 0.26)
    sides = (-1, 1) if relation in ("left", "above") else (1, -1)
    things = []
    for (colour, shape), side in zip(pairs, sides, strict=True):
        along, across = 0.5 + side * gap, 0.5 + rng.uniform(-0.06, 0.06)
        x, y = (along, across) if relation in ("left", "right") else (across, along)
        radius = rng.uniform(0.15, 0.2)
        things.append(Thing(shape, colour, float(x), float(y), float(radius), float(rng.uniform(-8, 8))))
    return tuple(things)


def draw(scene: Scene, width: int, height: int) -> Pixels:
    """The picture, [height, width, 3] between 0 and 1: smooth edges, a soft shadow, light from above."""
    rows = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    columns = (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    top, bottom = (_colour(BACKGROUNDS[name]) for name in (scene.background[0], scene.background[-1]))
    blend = (rows / height)[..., None]
    picture = np.broadcast_to(top * (1 - blend) + bottom * blend, (height, width, 3)).astype(np.float32)
    for thing in scene.things:
        radius = thing.radius * min(width, height)
        x, y = columns - thing.x * width, rows - thing.y * height
        shadow = _smooth(-distance(thing.shape, x, y - 0.12 * radius, radius, thing.angle), 0.22 * radius)
        picture *= 1 - 0.22 * shadow[..., None]
        inside = np.clip(0.5 - distance(thing.shape, x, y, radius, thing.angle), 0, 1)[..., None]
        light = np.clip(-y / radius, -1, 1)[..., None] * 0.1
        paint = _colour(RGB[thing.colour])
        paint = np.where(light > 0, paint + (1 - paint) * light, paint * (1 + light))
        picture += inside * (paint - picture)
    return np.asarray(picture, np.float32)


def _colour(rgb: tuple[int, int, int]) -> Pixels:
    return np.asarray(rgb, np.float32) / np.float32(255)


def _smooth(distance: Pixels, width: float) -> Pixels:
    step = np.clip(distance / (2 * width) + 0.5, 0, 1)
    return np.asarray(step * step * (3 - 2 * step), np.float32)


def distance(shape: Shape, x: Pixels, y: Pixels, radius: float, angle: float = 0.0) -> Pixels:
    """Signed distance in pixels from points (x, y), relative to the centre, to the outline; negative inside."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius, np.float32)
    if shape == "ring":
        return np.asarray(np.abs(np.hypot(x, y) - 0.78 * radius) - 0.22 * radius, np.float32)
    turn = math.radians(angle)
    points = _outline(shape) * radius @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return _polygon_distance(points, x, y)


def _outline(shape: Shape) -> NDArray[np.float64]:
    """Corners [n, 2] around the origin; y points down."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86
    if shape == "triangle":
        return np.array([[0, -1.0], [1.0, 0.78], [-1.0, 0.78]])
    if shape == "star":
        turns = np.arange(10) * math.pi / 5 - math.pi / 2
        lengths = np.where(np.arange(10) % 2, 0.46, 1.08)
        return np.stack([np.cos(turns) * lengths, np.sin(turns) * lengths + 0.06], axis=1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 36, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y - 2.5], axis=1) / 15.5
    raise ValueError(f"no outline for {shape}")


def _polygon_distance(points: NDArray[np.float64], x: Pixels, y: Pixels) -> Pixels:
    """Distance to the nearest edge; the sign from how often a ray crosses the edges."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey = np.float32(bx - ax), np.float32(by - ay)
        px, py = x - np.float32(ax), y - np.float32(ay)
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, np.hypot(px - along * ex, py - along * ey), out=nearest)
        if ay != by:
            crosses = (y >= min(ay, by)) & (y < max(ay, by)) & (px < py * (ex / ey))
            inside ^= crosses
    return np.asarray(np.where(inside, -nearest, nearest), np.float32)
