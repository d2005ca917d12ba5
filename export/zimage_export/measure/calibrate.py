"""Measuring how large activations get over a few prompts, with the reference, a block at a time.

Measured are the values that exceed fp16's range in this model: the outputs of each block's out-projection, of its
SwiGLU product and of `w2`, and the same in the text encoder (see `storage.folds`); and the range of each channel that a
linear reads (see `weights.rebalance`) and, for int4, how channels vary together (see `storage.feedback`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimage_runtime.bundle.rebalancing import PLACES
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.linears import LAYER_LINEARS
from zimage_runtime.model.schedule import DEFAULT_STEPS

from ..errors import ExportError
from ..source.checkpoint import Checkpoint
from ..storage.feedback import group_slices
from ..weights.folding import ActivationRange, BlockPeak, blocks
from .reference import reference_pipeline

PROMPTS = ("A photograph of a red fox in the snow", "一只在月光下的猫，水彩画")
"""What is measured where the user gives no prompts and a measurement is needed."""

_MAX_PROMPTS = 256
_SIDE = 512  # pixels, or the model's own default where that is less


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one per line; empty lines and lines that start with # are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise ExportError(f"{path}: contains {len(prompts)} prompts; give 1 to {_MAX_PROMPTS}, one per line")
    return prompts


def measure_peaks(
    checkpoint: Checkpoint, prompts: list[str], progress: Progress, *, moments: bool = False
) -> dict[str, dict[str, BlockPeak]]:
    """The largest magnitudes in every block while each prompt is generated once, and `moments` where asked for."""
    pipeline = reference_pipeline(checkpoint)
    peaks = {component: {name: BlockPeak() for name in names} for component, names in blocks(checkpoint.config).items()}
    meters = []
    for component, by_block in peaks.items():
        model = getattr(pipeline, component)
        for name, peak in by_block.items():
            block = model.get_submodule(name)
            _watch(block, peak, component)
            for place in PLACES[component]:
                reader = block.get_submodule(place.readers[0].removesuffix(".weight"))
                meters.append((peak, place.readers[0], _RangeMeter(reader, moments=moments)))
    side = min(_SIDE, checkpoint.config.vae.sample_size)
    with progress.task("calibrating", len(prompts) * DEFAULT_STEPS) as advance, torch.inference_mode():
        pipeline.transformer.register_forward_hook(lambda module, inputs, output: advance(1))
        generate_latents(pipeline, prompts, side)
    for peak, reader_name, meter in meters:
        if meter.count:
            peak.places[reader_name] = meter.measured()
    return peaks


def generate_latents(pipeline: Any, prompts: Iterable[str], side: int) -> None:
    """Generates each prompt once with diffusers' pipeline, without decoding it: for what hooks see meanwhile."""
    for seed, prompt in enumerate(prompts):
        pipeline(
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        )


class _RangeMeter:
    """Measures what a linear reads, per channel."""

    def __init__(self, linear: nn.Module, *, moments: bool) -> None:
        self.count = 0
        self._moments: list[torch.Tensor] | None = [] if moments else None  # by group
        self._squares = torch.zeros(0, dtype=torch.float64)
        self._peaks = torch.zeros(0)
        linear.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: Any) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        squares, peaks = rows.square().sum(0, dtype=torch.float64), rows.abs().amax(0)
        self._squares = self._squares + squares if self.count else squares
        self._peaks = torch.maximum(self._peaks, peaks) if self.count else peaks
        if self._moments is not None:
            groups = [rows[:, own] for own in group_slices(rows.shape[1])]
            if not self._moments:
                self._moments = [torch.zeros(group.shape[1], group.shape[1]) for group in groups]
            for total, group in zip(self._moments, groups, strict=True):
                total.addmm_(group.T, group)
        self.count += len(rows)

    def measured(self) -> ActivationRange:
        """The range of everything that was read so far."""
        moments = None if self._moments is None else tuple((m / self.count).numpy() for m in self._moments)
        rms = (self._squares / self.count).sqrt().float().numpy()
        return ActivationRange(rms, self._peaks.float().numpy(), moments)


def _watch(block: nn.Module, peak: BlockPeak, component: str) -> None:
    names = LAYER_LINEARS[component]
    out, down = block.get_submodule(names.out), block.get_submodule(names.down)
    if component == "text_encoder":
        # v_proj is divided, so the projection's input counts too
        out.register_forward_pre_hook(_keep_input(peak, "attention"))
    out.register_forward_hook(_keep_output(peak, "attention"))
    down.register_forward_pre_hook(_keep_input(peak, "product"))
    down.register_forward_hook(_keep_output(peak, "ffn"))


def _keep_input(peak: BlockPeak, kind: str) -> Callable[[nn.Module, Any], None]:
    def keep(module: nn.Module, inputs: Any) -> None:
        _raise_to(peak, kind, inputs[0])

    return keep


def _keep_output(peak: BlockPeak, kind: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        _raise_to(peak, kind, output)

    return keep


def _raise_to(peak: BlockPeak, kind: str, value: torch.Tensor) -> None:
    setattr(peak, kind, max(getattr(peak, kind), float(value.abs().max())))
