"""Files of DoRA and of several LoKr for the small checkpoint."""

from pathlib import Path

import numpy as np
from lora_tools import written
from schemes import under

from zimage_export.source.checkpoint import Checkpoint
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.arrays import FloatArray
from zimage_runtime.model.branches import EXTENDED, branch_linears
from zimage_runtime.model.linears import Linear

LINEARS = [linear for program in EXTENDED for linear in branch_linears(program, SMALL.config)]


def magnitudes(checkpoint: Path, linear: Linear, seed: int) -> FloatArray:
    """Norms of a trained layer: a fifth away from those of the published one."""
    weight = Checkpoint.open(checkpoint).transformer.get(linear.weight).read()
    noise = np.random.default_rng([seed, *linear.name.encode()]).standard_normal(linear.out_width)
    return np.asarray(np.linalg.norm(weight, axis=1) * (1 + 0.2 * noise), np.float32)


def dora(path: Path, checkpoint: Path, seed: int, rank: int = 3) -> Path:
    """diffusers' file of a DoRA of every linear of the transformer, those with biases included."""
    tensors = {}
    for linear in LINEARS:
        rng = np.random.default_rng([seed, *linear.name.encode()])
        down = rng.standard_normal((rank, linear.in_width)) / linear.in_width**0.5
        tensors |= {
            f"transformer.{linear.name}.lora_A.weight": down.astype(np.float32),
            f"transformer.{linear.name}.lora_B.weight": 0.2 * rng.standard_normal((linear.out_width, rank), np.float32),
            f"transformer.{linear.name}.lora_magnitude_vector": magnitudes(checkpoint, linear, seed),
        }
    return written(path, tensors)


def lokr(path: Path, a: int, b: int, *, seed: int = 1, dora_of: Path | None = None) -> Path:
    """A LoKr with outer factors [a, b] of every linear that they divide, with new norms for a checkpoint's weights."""
    tensors = {}
    for linear in LINEARS:
        if linear.out_width % a or linear.in_width % b:
            continue
        rng = np.random.default_rng([seed, *linear.name.encode()])
        inner = rng.standard_normal((linear.out_width // a, linear.in_width // b)) / linear.in_width**0.5
        name = f"lycoris_{under(linear.name)}"
        tensors[f"{name}.lokr_w1"] = 0.4 * rng.standard_normal((a, b), np.float32)
        tensors[f"{name}.lokr_w2"] = inner.astype(np.float32)
        if dora_of is not None:
            tensors[f"{name}.dora_scale"] = magnitudes(dora_of, linear, seed)[:, None]
    return written(path, tensors)


def fused_lokr(path: Path) -> Path:
    """A LoKr of fused projections; a third of its rows, which one of them is, ends within the inner factor."""
    tensors = {}
    for layer in ("layers.0", "layers.1"):
        rng = np.random.default_rng(list(layer.encode()))
        tensors[f"{layer}.attention.qkv.lokr_w1"] = rng.standard_normal((4, 8), np.float32)
        tensors[f"{layer}.attention.qkv.lokr_w2"] = 0.1 * rng.standard_normal((72, 12), np.float32)
    return written(path, tensors)
