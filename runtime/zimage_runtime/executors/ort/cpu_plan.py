"""How much memory an image takes, computed before anything is loaded.

Stages are loaded in turn, so the peak is the largest stage's, not the sum. A stage takes its weights (mapped from
the file; once more where ONNX Runtime packs them for speed) and its activations, which the token count decides.
The factors were measured with `benchmarks/memory_model.py`.
"""

from dataclasses import dataclass

from ...bundle.manifest import CPU, Manifest, Precision
from ...errors import MemoryLimitError, RequestError
from ...machine.host_memory import available_memory
from ...model.geometry import ImageGeometry, image_geometry, padded
from ...model.programs import Program
from ...tiles.tiling import tiled_bytes, tiled_encoder_bytes

_BASE = 160 << 20  # the interpreter, numpy, ONNX Runtime, Pillow and a tokenizer of 150,000 words

_FLOAT = 4  # bytes

# Live activations at a program's peak, in units of one token (or pixel) times the width named beside it
_DENOISER_WIDTHS = 17.0  # x dim
_TEXT_WIDTHS = 15.0  # x intermediate_size / 3
_TEXT_SCORES = 3.0  # x heads x tokens: causal attention holds its scores
_DECODER_MAPS = 4.5  # x the widest feature map at full resolution
_ENCODER_MAPS = 4.5  # x the feature map at full resolution

# Copies of the weights that ONNX Runtime makes at load, low memory or not: convolutions are laid out anew
_DECODER_WEIGHTS = 1.75
_ENCODER_WEIGHTS = 1.25

_WIDENED = (Precision.BF16, Precision.FP16, Precision.INT4)  # what is computed in float32 where it is not packed


@dataclass(frozen=True)
class MemoryPlan:
    """What each program will take, and whether all of them may stay loaded at once. Bytes."""

    programs: dict[Program, int]  # weights and activations
    available: int  # of this machine or control group, now
    low_memory: bool
    tiled: bool = False  # whether the image is decoded in tiles, because the decoder as one program does not fit
    encodes_tiled: bool = False  # the same for the image to start from

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it: nothing, for tiles are no other device here."""
        return ()

    @property
    def peak(self) -> int:
        """The most that is held at once when each stage is freed before the next is loaded."""
        once = self.programs[Program.CAPTION] + self.programs[Program.MODULATION]  # which are held together
        return _BASE + max(once, *self.programs.values())

    @property
    def keep_all(self) -> bool:
        """Whether every program may stay loaded."""
        return _BASE + sum(self.programs.values()) <= self.available


def plan_memory(
    manifest: Manifest,
    geometry: ImageGeometry,
    prompt_tokens: int,
    batch_size: int = 1,
    *,
    low_memory: bool = False,
    encodes: bool = False,
    available: int | None = None,
) -> MemoryPlan:
    """The plan for a request, which `encodes` an image to start from or not.

    An image is decoded or encoded in tiles only where the decoder or encoder as one program does not fit.
    Raises `MemoryLimitError` where the peak is more than what is available, naming the largest size that fits.
    """
    limit = available_memory() if available is None else available
    plan = _plan(manifest, geometry, prompt_tokens, batch_size, low_memory, limit, encodes)
    if plan.peak > limit:
        raise MemoryLimitError(_refusal(manifest, geometry, prompt_tokens, batch_size, plan))
    return plan


def _plan(
    manifest: Manifest,
    geometry: ImageGeometry,
    tokens: int,
    batch: int,
    low_memory: bool,
    limit: int,
    encodes: bool,
) -> MemoryPlan:
    programs = {}
    for program in Program:
        if program is Program.ENCODER and not encodes:
            continue
        # packed copies are what a program cannot do without; mapped weights are the page cache's, which yields
        record = manifest.record(program, CPU)
        weights = record.weight_bytes if record else 0
        copies = {Program.DECODER: _DECODER_WEIGHTS, Program.ENCODER: _ENCODER_WEIGHTS}.get(program, not low_memory)
        programs[program] = int(weights * copies) + _activations(program, manifest, geometry, tokens, batch)
        if low_memory and manifest.precision in _WIDENED:
            programs[program] += _widened_bytes(program, manifest)
    tiled = set()
    for program, size in ((Program.DECODER, tiled_bytes), (Program.ENCODER, tiled_encoder_bytes)):
        in_tiles = size(manifest.config.vae, geometry.width, geometry.height)
        whole = programs.get(program, 0)
        if _BASE + whole > limit and in_tiles < whole:
            programs[program] = in_tiles
            tiled.add(program)
    return MemoryPlan(programs, limit, low_memory, Program.DECODER in tiled, Program.ENCODER in tiled)


def _widened_bytes(program: Program, manifest: Manifest) -> int:
    """Narrow weights that are in float32 at once where they stay mapped: one layer's largest, and the one before."""
    config = manifest.config
    if program is Program.TEXT_ENCODER:
        return 2 * _FLOAT * config.text_encoder.hidden_size * config.text_encoder.intermediate_size
    if program in (Program.DENOISER, Program.CAPTION):
        return 2 * _FLOAT * config.transformer.dim * config.transformer.ffn_dim
    return 0


def _activations(program: Program, manifest: Manifest, geometry: ImageGeometry, tokens: int, batch: int) -> int:
    config = manifest.config
    if program is Program.TEXT_ENCODER:
        text = config.text_encoder
        widths = _TEXT_WIDTHS * text.intermediate_size / 3 + _TEXT_SCORES * text.num_attention_heads * tokens
        return int(_FLOAT * tokens * widths)
    if program is Program.DENOISER:
        sequence = batch * (geometry.image_tokens + padded(tokens))
        return int(_FLOAT * sequence * _DENOISER_WIDTHS * config.transformer.dim)
    if program is Program.ENCODER:
        pixels = geometry.width * geometry.height
        return int(_FLOAT * pixels * config.vae.block_out_channels[0] * _ENCODER_MAPS)
    if program is Program.DECODER:
        channels = config.vae.block_out_channels
        widest = max(channels[0], channels[min(1, len(channels) - 1)])  # the last upsampled map keeps the level's width
        return int(_FLOAT * geometry.width * geometry.height * widest * _DECODER_MAPS)
    return int(_FLOAT * padded(tokens) * _DENOISER_WIDTHS * config.transformer.dim)


def _refusal(manifest: Manifest, geometry: ImageGeometry, tokens: int, batch: int, plan: MemoryPlan) -> str:
    asked = (
        f"{geometry.width}x{geometry.height}"
        + (f" in batches of {batch}" if batch > 1 else "")
        + f" needs about {_gib(plan.peak)} of memory and {_gib(plan.available)} is available"
    )
    advice = []
    if largest := _largest_size(manifest, geometry, tokens, batch, plan):
        advice.append(f"the largest size of this shape that fits is {largest}")
    if not plan.low_memory and _fits(manifest, geometry, tokens, batch, plan, low_memory=True):
        advice.append("it fits with --low-memory")
    return f"{asked}; {'; '.join(advice) or 'no size fits: close other programs or use a smaller bundle'}"


def _fits(
    manifest: Manifest, geometry: ImageGeometry, tokens: int, batch: int, plan: MemoryPlan, *, low_memory: bool
) -> bool:
    """Whether another request for the same memory fits."""
    encodes = Program.ENCODER in plan.programs
    return _plan(manifest, geometry, tokens, batch, low_memory, plan.available, encodes).peak <= plan.available


def _largest_size(manifest: Manifest, geometry: ImageGeometry, tokens: int, batch: int, plan: MemoryPlan) -> str | None:
    unit = manifest.config.vae.scale * 2
    longest = max(geometry.width, geometry.height) // unit
    for side in range(longest - 1, 0, -1):
        width, height = (
            max(round(pixels / unit * side / longest), 1) * unit for pixels in (geometry.width, geometry.height)
        )
        try:
            smaller = image_geometry(width, height, manifest.config)
        except RequestError:
            continue
        if _fits(manifest, smaller, tokens, batch, plan, low_memory=plan.low_memory):
            return f"{width}x{height}"
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def check_tiles_on_host(geometry: ImageGeometry, nbytes: int) -> None:
    """Raises `MemoryLimitError` where a GPU works in tiles, and the host has no room for the maps they are cut from."""
    if nbytes > (available := available_memory()):
        raise MemoryLimitError(
            f"{geometry.width}x{geometry.height} does not fit on the GPU, and in tiles it needs {nbytes / 2**30:.1f} "
            f"GiB of memory, of which {available / 2**30:.1f} is free; choose a smaller --size"
        )
