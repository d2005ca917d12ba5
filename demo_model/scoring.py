"""How often pictures show what was asked for, over prompts with a pair of colour and shape that training never saw."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .captions import caption
from .checker import Verdict, judge, see
from .scenes import Language, Scene, random_scene

Draw = Callable[[str, int], NDArray[np.uint8]]
"""A prompt and a seed → the picture [height, width, 3]."""


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1. `position` is over the prompts that mention a place or a relation."""

    prompts: int
    positioned: int
    colour: float
    shape: float
    pairs: float
    position: float


def held_out_requests(language: Language, count: int) -> list[tuple[Scene, str]]:
    """Scenes, each with a pair that training never saw, and a prompt for each. Always the same ones."""
    rng = np.random.default_rng([2026, ("en", "zh").index(language)])
    scenes = [random_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, caption(scene, language, rng)) for scene in scenes]


def score(requests: Iterable[tuple[Scene, str]], draw: Draw) -> Scores:
    """Draws each prompt with a seed of its own, and judges the picture."""
    return summary([judge(scene, see(draw(prompt, seed))) for seed, (scene, prompt) in enumerate(requests)])


def summary(verdicts: list[Verdict]) -> Scores:
    """The shares of what is right."""
    positions = [verdict.position for verdict in verdicts if verdict.position is not None]
    count = len(verdicts)
    return Scores(
        prompts=count,
        positioned=len(positions),
        colour=sum(verdict.colour for verdict in verdicts) / count,
        shape=sum(verdict.shape for verdict in verdicts) / count,
        pairs=sum(verdict.pairs for verdict in verdicts) / count,
        position=sum(positions) / max(1, len(positions)),
    )
