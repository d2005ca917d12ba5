"""Flow matching: between noise and latents, learn the straight way (https://arxiv.org/abs/2210.02747)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zimage_runtime.model.schedule import DEFAULT_STEPS
from zimage_runtime.model.tokenizer import PromptTokenizer

from .architecture import TINY
from .captions import caption
from .dataset import SIZES, latents_of, scene_of
from .scenes import Scene, Shape

_SHIFT = TINY.scheduler.shift


def shares(scenes: Sequence[Scene], emphasis: Mapping[Shape, float]) -> NDArray[np.float64]:
    """How likely each scene is drawn; they add up to 1. A scene weighs as much as the weightiest of its shapes."""
    weights = np.array([max(emphasis.get(thing.shape, 1.0) for thing in scene.things) for scene in scenes])
    return np.asarray(weights / weights.sum())


class VelocityTask:
    """Predicts noise - latents from their mixture and a caption; a few captions are empty."""

    def __init__(self, model: nn.Module, latents: Path, tokenizer: Path, mean: float, deviation: float, batch: int):
        self.model: Any = model
        self.latents, self.tokenizer, self.batch = latents, tokenizer, batch
        self.mean, self.deviation = mean, deviation
        self.first = 0  # added to a step's number: a second course over the same steps draws other examples
        self.emphasis: dict[Shape, float] = {}  # how much more often scenes with a shape are drawn
        self._shares: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._rows: dict[tuple[int, int], Any] = {}
        self._words: Any = None

    def loss(self, step: int, index: int) -> Tensor:
        """As `workers.Task` has it."""
        step += self.first
        rng = np.random.default_rng([11, step, index])
        clean, tokens, lengths = self._examples(rng)
        generator = torch.Generator().manual_seed(step * 4096 + index)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = self.sigmas(len(clean), rng)
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        out = self.model(mixed, 1 - sigma, tokens, lengths)
        return torch.as_tensor((out - (clean - noise)).square().mean())

    def _examples(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        sizes = list(SIZES)
        size = sizes[rng.choice(len(sizes), p=list(SIZES.values()))]
        if size not in self._rows:
            self._rows[size] = latents_of(self.latents, size)
        rows = self._chosen(size, rng)
        clean = torch.from_numpy(self._rows[size][rows].astype(np.float32))
        texts = []
        for row in rows:
            text = caption(scene_of(size, int(row)), "en" if rng.random() < 0.5 else "zh", rng)
            texts.append("" if rng.random() < 0.03 else text)
        if self._words is None:
            self._words = PromptTokenizer(self.tokenizer)
        encoded = [self._words.encode(text) for text in texts]
        most = 32 * (-(-max(map(len, encoded)) // 32) + (rng.random() < 0.03))  # rarely, as long as 64
        tokens = torch.zeros(self.batch, most, dtype=torch.long)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return (clean - self.mean) / self.deviation, tokens, torch.tensor([len(ids) for ids in encoded])

    def _chosen(self, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
        """The rows of a batch."""
        count = len(self._rows[size])
        if not self.emphasis:
            return rng.integers(count, size=self.batch)
        if size not in self._shares:
            self._shares[size] = shares([scene_of(size, row) for row in range(count)], self.emphasis)
        return rng.choice(count, size=self.batch, p=self._shares[size])

    @staticmethod
    def sigmas(count: int, rng: np.random.Generator) -> Tensor:
        """Half from the schedule that a picture takes, half from all of (0, 1]; both shifted as it is."""
        place = 1 - rng.random(count)
        place = np.where(rng.random(count) < 0.5, np.ceil(place * DEFAULT_STEPS) / DEFAULT_STEPS, place)
        return torch.from_numpy(_SHIFT * place / (1 + (_SHIFT - 1) * place)).float()
