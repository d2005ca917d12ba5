"""Do shapes land where a map puts them? Judged by connected areas and overlap, independently of any model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .captions import caption
from .checker import coloured_areas, see
from .edges import edge_map, inside, placed_scene
from .scenes import Scene

OVERLAP = 0.5
"""An object has landed if an area of one colour and its outline's inside share this much of what both cover."""


@dataclass(frozen=True)
class Request:
    """A prompt that does not mention places, and the map that shows them, [height, width, 3]."""

    scene: Scene
    prompt: str
    edges: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.edges.shape[1], self.edges.shape[0]


@dataclass(frozen=True)
class Landing:
    """What became of a request. Overlaps are those of the object that is the farthest off."""

    overlap: float  # with an area of any colour
    coloured: float  # with an area of the object's own colour
    shapes: bool  # what is seen are the shapes asked for, each in its colour, and no others

    @property
    def landed(self) -> bool:
        """Every object is where the map puts it."""
        return self.overlap >= OVERLAP

    @property
    def landed_coloured(self) -> bool:
        """Every object is where the map puts it, in the colour that the prompt gives it."""
        return self.coloured >= OVERLAP


def map_requests(count: int, size: tuple[int, int] = (128, 128)) -> list[Request]:
    """Always the same ones, English and Chinese in turns. Each has a pair of colour and shape not seen in training."""
    requests = []
    for index in range(count):
        rng = np.random.default_rng([2027, index])
        scene = placed_scene(rng, size, held_out=True)
        prompt = caption(scene, ("en", "zh")[index % 2], rng)
        requests.append(Request(scene, prompt, np.rint(edge_map(scene, size) * 255).astype(np.uint8)))
    return requests


def judge_landing(request: Request, picture: NDArray[np.uint8]) -> Landing:
    """Compares a picture [height, width, 3] with the map behind it."""
    areas = coloured_areas(picture)
    overlaps, coloured = [], []
    for thing in request.scene.things:
        wanted = inside(thing, request.size)
        found = [(_overlap(area, wanted), colour) for colour, area in areas]
        overlaps.append(max((share for share, _ in found), default=0.0))
        coloured.append(max((share for share, colour in found if colour == thing.colour), default=0.0))
    asked = sorted(f"{thing.colour} {thing.shape}" for thing in request.scene.things)
    return Landing(min(overlaps), min(coloured), asked == sorted(f"{one.colour} {one.shape}" for one in see(picture)))


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())
