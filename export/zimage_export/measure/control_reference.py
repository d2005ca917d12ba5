"""diffusers' own blocks of a ControlNet in float32, with the tensors of one block in memory at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlTransformerBlock, ZImageTransformerBlock

from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.config import PATCH_SIZE
from zimage_runtime.model.control import EMBEDDER, ControlConfig
from zimage_runtime.model.programs import hint_name

from ..source.control_file import ControlFile
from ..source.weights import Weights


def embedded(
    file: ControlFile, latents: FloatArray, pad_token: FloatArray, image_cos: FloatArray
) -> dict[str, FloatArray]:
    """Control latents [1, channels, h, w] → tokens, padded to the length of a rotary table."""
    _, channels, height, width = latents.shape
    patches = latents.reshape(channels, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
    patches = patches.transpose(1, 3, 2, 4, 0).reshape(-1, file.config.patch_dim)
    tokens = patches @ file.weights.get(f"{EMBEDDER}.weight").read().T + file.weights.get(f"{EMBEDDER}.bias").read()
    pads = np.repeat(pad_token, image_cos.shape[1] - len(tokens), axis=0)
    return {"control": np.concatenate([tokens, pads])[None]}


@torch.no_grad()
def run_blocks(
    file: ControlFile,
    names: tuple[str, ...],
    feeds: Mapping[str, FloatArray],
    embedding: FloatArray,
    *,
    hints: bool,
) -> dict[str, FloatArray]:
    """Control tokens through blocks of these names: hints by their names, and the tokens after the last block."""
    c, x, time = (torch.from_numpy(value) for value in (feeds["control"], feeds["tokens"], embedding))
    rope = torch.complex(torch.from_numpy(feeds["cos"]), torch.from_numpy(feeds["sin"]))
    mask = torch.ones(c.shape[:2], dtype=torch.bool)
    for index, name in enumerate(names):
        block = _block(file.config, file.weights, name, index, hints=hints)
        c = block(c, x, mask, rope, time) if hints else block(c, mask, rope, time)
    if not hints:
        return {"control_out": c.numpy()}
    *found, last = torch.unbind(c)
    return {**{hint_name(index): hint.numpy() for index, hint in enumerate(found)}, "control_out": last.numpy()}


def _block(config: ControlConfig, weights: Weights, name: str, index: int, *, hints: bool) -> Any:
    dims = (index, config.dim, config.n_heads, config.n_heads, config.norm_eps, True)
    with torch.device("meta"):
        block = ZImageControlTransformerBlock(*dims, block_id=index) if hints else ZImageTransformerBlock(*dims)
    names = [key for key, _ in block.named_parameters()]
    state = {key: torch.from_numpy(weights.get(f"{name}.{key}").read()) for key in names}
    block.load_state_dict(state, assign=True)
    return block.eval().requires_grad_(False)
