"""What a linear of diffusers' model reads while an image is generated: by a hook of the tests' own."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rows_read(pipeline: Any, linear: Any, prompt: str, side: int) -> NDArray[np.float64]:
    """The rows [rows, width] that a linear reads in 8 steps with seed 0."""
    import torch

    seen: list[NDArray[np.float32]] = []
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().numpy()))
    try:
        pipeline(
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=8,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
        )
    finally:
        handle.remove()
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in seen]).astype(np.float64)
