"""Which of two programs an int8 bundle's denoiser runs on CUDA. Both read the same bytes.

`cuda` multiplies int8 with int8 (W8A8). `cuda-weight-only` widens each weight to fp16 just before its product, so it
never multiplies faster than an fp16 bundle. Widening takes a pass over the weights, whose cost shows with few tokens
only. Its activations are half as wide, so it fits where the other program does not.

`CHOICES` says which comes first on which GPU, and why. Neither program was measured on a GPU yet; what is known of the
operator:

- ONNX Runtime multiplies through ``cublasGemmEx`` on weights [in, out] (``integer_gemm.cc``). cuBLAS's int8 kernels for
  tensor cores require another layout, in which the inner axis is contiguous in both operands (cuBLAS, "cublasGemmEx").
- Such products may run on the ordinary cores (FasterTransformer #95): four for one of float32's. On data centre GPUs
  that is at best a quarter of the rate of tensor cores with 16 bits. On other GPUs it is about as fast, because tensor
  cores that accumulate in float32 run at half their rate there.

Elsewhere int8 wins on Turing, Ampere and Ada (published: 1.66 → 0.85 s per step on a GPU of the RTX 3090's class) and
loses on an H100. That is with kernels for the other layout, which this operator does not reach.

Blocks of 8 bits (`MatMulNBits`) widen to fp16 too beyond 16 rows, so that they would save what weight-only saves; they
need another layout on the disk, [out, in / 32, 32], and scales per block. int4 bundles have them for the layers that
lose most at 4 bits.

`benchmarks/gpu.py` measures both programs.
"""

from dataclasses import dataclass

from ...bundle.manifest import CUDA, CUDA_WEIGHT_ONLY, Manifest, Precision
from ...model.programs import Program

Capability = tuple[int, int]

INT8_PRODUCTS = (6, 1)
"""The first compute capability with int8 products (CUDA C++ Programming Guide, ``__dp4a``)."""


@dataclass(frozen=True)
class Choice:
    """Which program comes first on GPUs of a compute capability."""

    gpus: str  # examples
    first: str  # CUDA or CUDA_WEIGHT_ONLY
    source: str


_CORES = "int8 at four times float32's rate, tensor cores with 16 bits at about the same (NVIDIA's data sheets)"
_DATA_CENTRE = "tensor cores with 16 bits are at least four times as fast as int8 on ordinary cores (data sheets)"

CHOICES: dict[Capability, Choice] = {
    (6, 1): Choice("GTX 10, P40", CUDA, "no tensor cores; fp16 at 1/64 of float32 (CUDA C++ guide)"),
    (7, 0): Choice("V100", CUDA_WEIGHT_ONLY, "tensor cores without int8 (onnxruntime #3413)"),
    (7, 2): Choice("Xavier", CUDA_WEIGHT_ONLY, _DATA_CENTRE),
    (7, 5): Choice("RTX 20, T4", CUDA_WEIGHT_ONLY, "the same call took 1.7 times as long as fp16 on a T4 (cupy #9915)"),
    (8, 0): Choice("A100, A30", CUDA_WEIGHT_ONLY, _DATA_CENTRE),
    (8, 6): Choice("RTX 30, A10", CUDA, _CORES),
    (8, 9): Choice("RTX 40, L4", CUDA, _CORES),
    (9, 0): Choice("H100, H200", CUDA_WEIGHT_ONLY, _DATA_CENTRE),
    (10, 0): Choice("B200", CUDA_WEIGHT_ONLY, "13 times as long as TF32 in this layout, on a GB300 (pytorch #187094)"),
    (10, 3): Choice("B300", CUDA_WEIGHT_ONLY, "13 times as long as TF32 in this layout, on a GB300 (pytorch #187094)"),
    (12, 0): Choice("RTX 50", CUDA, _CORES),
}
"""By compute capability. A GPU that is not here multiplies int8."""


def why_no_int8(precision: Precision, capability: Capability) -> str | None:
    """Why a GPU cannot run a bundle's integer products. The text encoder of every int8 bundle has some."""
    if precision is not Precision.INT8 or capability >= INT8_PRODUCTS:
        return None
    return f"it does not multiply int8, which needs compute capability {_dotted(INT8_PRODUCTS)}; use a bundle in fp16"


def denoiser_programs(manifest: Manifest, capability: Capability | None) -> tuple[str, ...]:
    """The names in the manifest of the denoiser's programs for CUDA, the better one for the GPU first.

    Without a capability, the program that multiplies int8 comes first.
    """
    if manifest.record(Program.DENOISER, CUDA_WEIGHT_ONLY) is None:
        return (CUDA,)
    first = _first(capability)
    return first, CUDA_WEIGHT_ONLY if first == CUDA else CUDA


def why_weight_only(capability: Capability | None) -> str:
    """Why the denoiser runs weight-only, as the end of a sentence: because of the GPU's speed, or of its memory."""
    if capability and _first(capability) == CUDA_WEIGHT_ONLY:
        return f"which compute capability {_dotted(capability)} multiplies faster than int8"
    return "for int8 products do not fit"


def _first(capability: Capability | None) -> str:
    choice = CHOICES.get(capability) if capability else None
    return choice.first if choice else CUDA


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
