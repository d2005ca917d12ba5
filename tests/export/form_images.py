"""What the tests of whole files in other forms share: a checkpoint, its tensors, and diffusers with other weights."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity import Case
from safetensors.torch import load_file
from single_file_tools import PARTS, Tensors

from zimage_export.synthetic.checkpoint import SMALL, Scale, write_checkpoint
from zimage_runtime.command_line.progress import Progress

CASE = Case("a red fox", steps=2)
QUIET = Progress(quiet=True)


def form_checkpoint(out: Path) -> Path:
    """A checkpoint whose widths are whole blocks of every form: 384 and 1024 in the transformer, 64 and 160 beside."""
    transformer = replace(
        SMALL.config.transformer, dim=384, n_heads=3, n_layers=3, n_refiner_layers=1, axes_dims=(32, 48, 48)
    )
    write_checkpoint(out, Scale(replace(SMALL.config, transformer=transformer)))
    return out


def form_states(model: Path) -> dict[str, Tensors]:
    """The checkpoint's tensors by component, in float32."""
    return {
        part: {
            name: value.float()
            for path in sorted((model / part).glob("*.safetensors"))
            for name, value in load_file(path).items()
        }
        for part in PARTS
    }


def as_diffusers(comfy: Tensors) -> Tensors:
    """The transformer's tensors under diffusers' names, by its own converter."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    return convert_z_image_transformer_checkpoint_to_diffusers(dict(comfy))


def with_weights(pipeline: Any, values: dict[str, Tensors]) -> Any:
    """diffusers' pipeline with other weights. Its text encoder has names without `model.`."""
    reference = copy.deepcopy(pipeline)
    for part, state in values.items():
        named = {name.removeprefix("model."): value for name, value in state.items()}
        missing, unexpected = getattr(reference, part).load_state_dict(named, strict=False)
        assert (missing, unexpected) == ([], []), part
    return reference
