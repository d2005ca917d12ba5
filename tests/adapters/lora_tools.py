"""What the tests of LoRA share: files for the small checkpoint, and images generated with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from parity import Case, Drawing, open_with_diffusers
from safetensors.numpy import save_file
from schemes import DIM, Tensors, under

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.branches import EXTENDED, branch_linears
from zimage_runtime.pipeline import ImageEvent, Pipeline

QUIET = Progress(quiet=True)
CASE = Case("a red fox in the snow", size=(48, 64), steps=2, seed=3)


def drawn(pipeline: Pipeline, *loras: tuple[Path | str, float], case: Case = CASE) -> Drawing:
    events = pipeline.stream(case.prompt, size=case.size, steps=case.steps, seed=case.seed, loras=loras)
    (found,) = [Drawing(e.latents, np.asarray(e.image)) for e in events if isinstance(e, ImageEvent)]
    return found


def written(path: Path, tensors: Tensors) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def lora(path: Path, seed: int, rank: int = 4) -> Path:
    """diffusers' file for every attention, refiners included, and for the modulation of a layer."""
    rng = np.random.default_rng(seed)
    stems = ["layers.0", "layers.1", "layers.2", "noise_refiner.0", "noise_refiner.1", "context_refiner.1"]
    shapes = {f"{stem}.attention.{name}": (DIM, DIM) for stem in stems for name in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= {"layers.1.adaLN_modulation.0": (4 * DIM, DIM), "layers.1.feed_forward.w2": (DIM, 256)}
    tensors = {}
    for module, (out, width) in shapes.items():
        down, up = rng.standard_normal((rank, width)) / width**0.5, rng.standard_normal((out, rank)) / 2
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)
    return path


def everywhere(path: Path, scale: float = 0.3) -> Path:
    """A change of every linear of the transformer: embedders, refiners, modulation and the ends included."""
    tensors = {}
    for linear in (linear for program in EXTENDED for linear in branch_linears(program, SMALL.config)):
        rng = np.random.default_rng(list(linear.name.encode()))
        down, up = rng.standard_normal((3, linear.in_width)), rng.standard_normal((linear.out_width, 3))
        tensors[f"lora_unet_{under(linear.name)}.lora_down.weight"] = (down / linear.in_width**0.5).astype(np.float32)
        tensors[f"lora_unet_{under(linear.name)}.lora_up.weight"] = (scale * up).astype(np.float32)
    return written(path, tensors)


def products(path: Path) -> Path:
    """The same as LoKr: a product of [8, 8] and what is left."""
    tensors = {}
    for linear in (linear for program in EXTENDED for linear in branch_linears(program, SMALL.config)):
        rng = np.random.default_rng(list(linear.name.encode()))
        inner = rng.standard_normal((linear.out_width // 8, linear.in_width // 8)) / linear.in_width**0.5
        tensors[f"lycoris_{under(linear.name)}.lokr_w1"] = rng.standard_normal((8, 8)).astype(np.float32)
        tensors[f"lycoris_{under(linear.name)}.lokr_w2"] = inner.astype(np.float32)
    return written(path, tensors)


@contextmanager
def adapted(checkpoint: Path, weights: dict[Path, float]) -> Iterator[Any]:
    """diffusers' pipeline with files and weights."""
    pipeline = open_with_diffusers(checkpoint)
    for path in weights:
        pipeline.load_lora_weights(path, adapter_name=path.stem)
    pipeline.set_adapters([path.stem for path in weights], list(weights.values()))
    yield pipeline
