"""What the programs for WebGPU take of a GPU's memory.

Everything is computed in float32, and weights that are narrower are widened one after the other. The factors were
measured on Mesa's software Vulkan, by counting what the library allocates there (`benchmarks/webgpu_block.py`), and are
rounded up. The library frees a buffer for use by the next operators only every sixteen operators, and keeps buffers of
certain sizes, to which smaller ones are rounded up.
"""

import bisect
from dataclasses import dataclass

from ...bundle.controlnet import ControlManifest
from ...bundle.manifest import WEBGPU, WEBGPU_FUSED, Manifest, Precision
from ...errors import MemoryLimitError
from ...model.geometry import conditioning_bytes
from ...model.programs import CONTROL_PROGRAMS, Program
from ...model.query_blocks import MOST_SCORES, autoencoder_scores, denoiser_scores
from ...units import gib, gib_needed
from ..overheads import ORT_WEBGPU
from ..protocol import Work
from .control_memory import hint_bytes, tokens_of
from .cpu_plan import largest_size
from .device_plan import FLOAT, VramPlan, best_plan, refusal
from .webgpu_adapters import Adapter

# Live values at a program's peak
_TOKENS = 19  # x all tokens x dim
_EMBEDDED = 4  # x the same, where tokens are only embedded
_HIDDEN = 4  # x all tokens x ffn_dim
_SCORES = 3  # blocks of scores: the products, their softmax, and one that is just freed
_WIDENED_WEIGHTS = 3  # of the largest linear, in float32
_TEXT_WIDTHS = 15.0  # x tokens x intermediate_size / 3
_TEXT_SCORES = 4.0  # x heads x tokens x tokens
_MAPS = 6.5  # x the widest feature map at full resolution
_CONVOLUTIONS = 2  # copies of the autoencoder's weights, in another layout and on their way to it, which stay

_BUCKETS = (
    *(1 << 20, 2 << 20, 4 << 20, 8 << 20, 12 << 20, 16 << 20, 26214400, 33554432, 44236800, 58982400),
    *(67108864, 134217728, 167772160),
)
"""Sizes of buffers that are kept, in bytes (``buffer_manager.cc``); larger ones are as large as they need to be."""

_PIECES = 4
"""Pieces that a buffer may be bound in: a kernel has ten bindings at least, for what it reads and writes."""


@dataclass(frozen=True)
class WebGpuCosts:
    """What a bundle's programs take on an adapter. Implements `DeviceCosts`."""

    denoisers: tuple[str, ...] = (WEBGPU,)
    largest_map: int = 1 << 62  # bytes of a buffer that a kernel can read and write

    executor = WEBGPU
    overhead = ORT_WEBGPU
    allocated = 1.0
    keeps_buffers = True  # until the next run, or for good where sizes repeat

    def activations(self, program: Program, manifest: Manifest, work: Work, denoiser: str) -> int:
        config, geometry, tokens = manifest.config, work.geometry, work.tokens
        if program in (Program.ENCODER, Program.DECODER):
            record = manifest.record(program, WEBGPU)
            weights = record.weight_bytes if record else 0
            maps = _bucket(_largest_map(program, manifest, work)) * _MAPS
            return int(_CONVOLUTIONS * weights + maps + _SCORES * autoencoder_scores(geometry))
        if program is Program.TEXT_ENCODER:
            text = config.text_encoder
            widths = _TEXT_WIDTHS * text.intermediate_size / 3 + _TEXT_SCORES * text.num_attention_heads * tokens
            return int(FLOAT * tokens * widths) + _widened(manifest, text.hidden_size * text.intermediate_size)
        transformer, extra = config.transformer, 0
        if program in (Program.TOKENS, Program.CONTROL_TOKENS):
            return _EMBEDDED * _bucket(FLOAT * tokens_of(program, work) * transformer.dim)
        owner = work.control.manifest if work.control and program in CONTROL_PROGRAMS else manifest
        if program is Program.DENOISER:
            extra = (work.kept_conditionings - 1) * conditioning_bytes(transformer, geometry, tokens)
        sequence = tokens_of(program, work)
        if program is Program.CAPTION:
            scores = FLOAT * transformer.n_heads * sequence**2
        else:
            scores = 0 if denoiser == WEBGPU_FUSED else denoiser_scores(geometry, tokens, work.batch, config)
        # inputs and outputs of the library's own, beside the host's
        extra += hint_bytes(work) if program in (Program.DENOISER, Program.CONTROL_LAYERS) else 0
        values = _TOKENS * _bucket(FLOAT * sequence * transformer.dim)
        values += _HIDDEN * _bucket(FLOAT * sequence * transformer.ffn_dim)
        return extra + values + _SCORES * _bucket(scores) + _widened(owner, transformer.dim * transformer.ffn_dim)

    def hints(self, work: Work) -> int:
        return 0  # on the host: what a run reads and writes is among its activations

    def needs_tiles(self, program: Program, manifest: Manifest, work: Work) -> bool:
        too_large = _largest_map(program, manifest, work) > self.largest_map
        return too_large or autoencoder_scores(work.geometry) > MOST_SCORES

    def denoiser_note(self, denoiser: str) -> str:
        return ""


def _widened(manifest: Manifest | ControlManifest, parameters: int) -> int:
    """Bytes of narrow weights that are in float32 at a time: int4 is multiplied as it is."""
    narrow = manifest.precision in (Precision.FP16, Precision.INT8)
    return narrow * _WIDENED_WEIGHTS * _bucket(FLOAT * parameters)


def _largest_map(program: Program, manifest: Manifest, work: Work) -> int:
    """Bytes of the decoder's or encoder's widest map at full resolution."""
    channels = manifest.config.vae.block_out_channels
    widest = max(channels[:2]) if program is Program.DECODER else channels[0]
    return FLOAT * widest * work.geometry.width * work.geometry.height


def _bucket(nbytes: int) -> int:
    """Bytes of the buffer that a value gets."""
    place = bisect.bisect_left(_BUCKETS, nbytes)
    return _BUCKETS[place] if place < len(_BUCKETS) else nbytes


def largest_buffer(adapter: Adapter) -> int:
    """Bytes of the largest buffer that kernels can read and write on an adapter."""
    return min(adapter.buffer, _PIECES * adapter.binding)


def plan_webgpu(manifest: Manifest, work: Work, budget: int, costs: WebGpuCosts) -> VramPlan:
    """The plan for a request within `budget` bytes. Nothing is loaded or looked up.

    Raises `MemoryLimitError` where a block of the denoiser's scores, or even one stage at a time, does not fit, naming
    the largest size of the shape that would.
    """

    def fits(work: Work) -> bool:
        within = scores_of(manifest, work, costs) <= MOST_SCORES
        return within and best_plan(costs, manifest, work, budget).peak <= budget

    if fits(work):
        return best_plan(costs, manifest, work, budget)
    largest, scores = largest_size(manifest, work, fits), scores_of(manifest, work, costs)
    advice = f"the largest size of this shape that fits is {largest}" if largest else "no size fits"
    if scores <= MOST_SCORES:
        raise MemoryLimitError(refusal(best_plan(costs, manifest, work, budget), advice, smaller=largest is not None))
    what = f"{work.geometry.width}x{work.geometry.height}" + (f" in batches of {work.batch}" if work.batch > 1 else "")
    raise MemoryLimitError(
        f"{what} is too large for attention that stores its scores: a block of them takes {gib_needed(scores, 2)}, and "
        f"{gib(MOST_SCORES, 2)} is the most; {advice}; choose a smaller --size, or --executor cpu"
    )


def scores_of(manifest: Manifest, work: Work, costs: WebGpuCosts) -> int:
    """Bytes of a block of the denoiser's scores; 0 where the fused attention stores none."""
    if WEBGPU_FUSED in costs.denoisers:
        return 0
    return denoiser_scores(work.geometry, work.tokens, work.batch, manifest.config)
