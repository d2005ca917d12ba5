"""The demo model's VAE: a small `AutoencoderKL`, trained on scenes that are drawn as it learns."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .scenes import draw, random_scene

CROP = 64  # most of training sees quarters of a picture: the layers are local, and it costs a quarter


class Reconstruction:
    """Pictures through the bottleneck and back. Whole pictures instead of crops from `whole_from` on."""

    def __init__(self, model: nn.Module, batch: int, whole_from: int, seed: int = 0) -> None:
        self.model: Any = model
        self.batch, self.whole_from, self.seed = batch, whole_from, seed

    def pictures(self, step: int, index: int) -> Tensor:
        """[batch, 3, height, width] between -1 and 1."""
        rng = np.random.default_rng([self.seed, step, index])
        whole = step >= self.whole_from
        pictures = []
        for _ in range(self.batch // 4 if whole else self.batch):
            size = int(rng.choice([112, 128, 128, 160]))
            picture = draw(random_scene(rng), size, size)
            side = 128 if whole else CROP
            if size >= side:
                top, left = rng.integers(size - side + 1, size=2)
                picture = picture[top : top + side, left : left + side]
            else:
                picture = draw(random_scene(rng), side, side)
            pictures.append(picture)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1

    def loss(self, step: int, index: int) -> Tensor:
        """As `workers.Task` has it."""
        pictures = self.pictures(step, index)
        generator = torch.Generator().manual_seed(step * 1000 + index)
        moments = self.model.encoder(pictures)
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        again = self.model.decoder(latents)
        difference = again - pictures
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # absolute error for sharp edges, squared error against the rare large one; the divergence only keeps the
        # latents in a small, smooth range
        return torch.as_tensor(difference.abs().mean() + 2 * difference.square().mean() + 2e-4 * divergence)
