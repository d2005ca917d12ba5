"""Which of three programs an int8 bundle's denoiser runs on CUDA. All read the same bytes.

`cuda` multiplies int8 with int8 (W8A8). `cuda-weight-only` widens each weight to fp16 just before its product, so it
never multiplies faster than an fp16 bundle. Widening takes a pass over the weights, whose cost shows with few tokens
only. Its activations are half as wide, so it fits where the other program does not.

`cuda-blocks` is `MatMulNBits` of 8 bits: weights are brought into its layout when the program is loaded, in the host's
memory. From 17 rows on, its kernel widens to fp16 too, and then it saves what weight-only saves. A package that was
built with ``USE_FPA_INTB_GEMM`` has kernels that multiply fp16 with int8 as it is, for blocks of 64 or 128 and with the
environment variable ``ORT_FPA_INTB_GEMM=1``. It comes first nowhere before it is measured; `cuda_executor` runs it with
``denoiser=CUDA_BLOCKS``.

`CHOICES` says which comes first on which GPU, and why. None of these programs was measured on a GPU yet; what is known
of the integer product:

- ONNX Runtime multiplies through ``cublasGemmEx`` on weights [in, out] (``integer_gemm.cc``). cuBLAS's int8 kernels for
  tensor cores require another layout, in which the inner axis is contiguous in both operands (cuBLAS, "cublasGemmEx").
- Such products may run on the ordinary cores (FasterTransformer #95): four for one of float32's. On data centre GPUs
  that is at best a quarter of the rate of tensor cores with 16 bits. On other GPUs it is about as fast, because tensor
  cores that accumulate in float32 run at half their rate there.

Elsewhere int8 wins on Turing, Ampere and Ada (published: 1.66 → 0.85 s per step on a GPU of the RTX 3090's class) and
loses on an H100. That is with kernels for the other layout, which this operator does not reach.

`benchmarks/gpu_cuda.py` measures all of them.
"""

from dataclasses import dataclass

from ...bundle.manifest import CUDA, CUDA_BLOCKS, CUDA_WEIGHT_ONLY, Manifest, Precision
from ...model.programs import Program

Capability = tuple[int, int]

INT8_PRODUCTS = (6, 1)
"""The first compute capability with int8 products (CUDA C++ Programming Guide, ``__dp4a``)."""


@dataclass(frozen=True)
class Choice:
    """Which program comes first on GPUs of a compute capability."""

    gpus: str  # examples
    first: str  # CUDA, CUDA_WEIGHT_ONLY or CUDA_BLOCKS
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


_PROGRAMS = (CUDA, CUDA_WEIGHT_ONLY, CUDA_BLOCKS)


def why_no_int8(precision: Precision, capability: Capability) -> str | None:
    """Why a GPU cannot run a bundle's integer products. The text encoder of every int8 bundle has some."""
    if precision is not Precision.INT8 or capability >= INT8_PRODUCTS:
        return None
    return f"it does not multiply int8, which needs compute capability {_dotted(INT8_PRODUCTS)}; use a bundle in fp16"


def denoiser_programs(manifest: Manifest, capability: Capability | None) -> tuple[str, ...]:
    """The names in the manifest of the denoiser's programs for CUDA, the better one for the GPU first.

    Without a capability, the program that multiplies int8 comes first.
    """
    there = [name for name in _PROGRAMS if name == CUDA or manifest.record(Program.DENOISER, name) is not None]
    first = _first(capability)
    return tuple(sorted(there, key=lambda name: name != first))  # the others stay in their order


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
