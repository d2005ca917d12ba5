"""Scenes as latents, encoded once: most of a training step would otherwise be the VAE's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .scenes import Scene, draw, random_scene

SIZES: dict[tuple[int, int], float] = {(128, 128): 0.8, (192, 128): 0.08, (128, 192): 0.08, (192, 192): 0.04}
"""Width and height → share of the scenes."""


def scene_of(size: tuple[int, int], index: int) -> Scene:
    """The training scene behind a row of latents."""
    return random_scene(np.random.default_rng([7, *size, index]))


def _file(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"latents-{size[0]}x{size[1]}.npy"


def write_latents(vae: Any, folder: Path, count: int) -> None:
    """Writes the means of the posterior of about `count` scenes, float16, one file for each size."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, share in SIZES.items():
        rows = max(1, round(count * share))
        width, height = size
        out = np.empty((rows, 16, height // 8, width // 8), np.float16)
        for start in range(0, rows, 16):
            pictures = np.stack([draw(scene_of(size, i), width, height) for i in range(start, min(start + 16, rows))])
            batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1
            with torch.no_grad():
                out[start : start + len(batch)] = vae.encoder(batch)[:, :16].numpy()
        np.save(_file(folder, size), out)


def latents_of(folder: Path, size: tuple[int, int]) -> NDArray[np.float16]:
    """Rows [n, 16, height / 8, width / 8] as written, mapped."""
    return np.asarray(np.load(_file(folder, size), mmap_mode="r"))


def statistics(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation over all values: the VAE's shift, and the inverse of its scaling."""
    values = np.concatenate([latents_of(folder, size).astype(np.float32).ravel() for size in SIZES])
    return float(values.mean()), float(values.std())
