"""What the ControlNet learns from: latents of scenes, of maps of their edges, and of the scenes with a part left out.

They are encoded once. Scenes and masks follow from a row's number, as in `dataset`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dataset import SIZES
from .edges import placed_scene, random_edge_map
from .scenes import Scene, draw, random_scene


def control_scene(size: tuple[int, int], index: int) -> Scene:
    """The training scene behind a row: one in five is as the demo model knows them, with places in its captions.

    Of the others, two in three have two objects: there the map must also decide which colour goes where.
    """
    rng = np.random.default_rng([21, *size, index])
    if rng.random() < 0.2:
        return random_scene(rng)
    wanted = 1 if rng.random() < 1 / 3 else 2
    while len((scene := placed_scene(rng, size)).things) != wanted:
        pass
    return scene


def control_mask(size: tuple[int, int], index: int) -> NDArray[np.bool_]:
    """What is painted where a row stands for inpainting, [height, width]: a rectangle, over an object or anywhere."""
    rng = np.random.default_rng([24, *size, index])
    width, height = size
    things = control_scene(size, index).things
    x, y = rng.uniform(0.2, 0.8, 2)
    half_width, half_height = rng.uniform(0.15, 0.4, 2) * size
    if rng.random() < 0.6:
        thing = things[rng.integers(len(things))]
        x, y = thing.x, thing.y
        half_width = half_height = thing.radius * min(size) * rng.uniform(1.2, 1.6)
    mask = np.zeros((height, width), bool)
    top, left = max(0, round(y * height - half_height)), max(0, round(x * width - half_width))
    mask[top : round(y * height + half_height), left : round(x * width + half_width)] = True
    return mask


def write_examples(vae: Any, folder: Path, count: int) -> None:
    """Writes about `count` rows [3, 16, h, w] in float16, scaled as the transformer has them, one file for each size.

    A row is the latents of the scene, of its map, and of the scene in middle gray where the mask is.
    """
    config = vae.config
    folder.mkdir(parents=True, exist_ok=True)
    for size, share in SIZES.items():
        rows = max(1, round(count * share))
        width, height = size
        out = np.empty((rows, 3, 16, height // 8, width // 8), np.float16)
        for row in range(rows):
            scene = control_scene(size, row)
            picture = draw(scene, width, height)
            edges = random_edge_map(scene, size, np.random.default_rng([22, *size, row]))
            rest = np.where(control_mask(size, row)[..., None], np.float32(0.5), picture)
            images = torch.from_numpy(np.stack([picture, edges, rest])).permute(0, 3, 1, 2).contiguous() * 2 - 1
            with torch.no_grad():
                mean = vae.encoder(images)[:, :16]
            out[row] = ((mean - config.shift_factor) * config.scaling_factor).numpy()
        np.save(_file(folder, size), out)


def examples_of(folder: Path, size: tuple[int, int]) -> NDArray[np.float16]:
    """Rows as written, mapped."""
    return np.asarray(np.load(_file(folder, size), mmap_mode="r"))


def _file(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"examples-{size[0]}x{size[1]}.npy"
