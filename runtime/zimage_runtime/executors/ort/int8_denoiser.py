"""Which of two programs an int8 bundle's denoiser runs on CUDA. Both read the same bytes.

`cuda` multiplies int8 with int8. `cuda-weight-only` widens each weight to fp16 just before its product, so it never
multiplies faster than an fp16 bundle. Widening takes a pass over the weights, whose cost shows with few tokens only.
(The operator for int8 weights alone, `MatMulNBits`, does the same beyond 16 rows, and needs blocks and another layout.)
Its activations are half as wide, so it fits where the other program does not.

Neither was measured here. What others published:

- ONNX Runtime multiplies through ``cublasGemmEx`` on weights [in, out] (``integer_gemm.cc``). cuBLAS's int8 kernels for
  tensor cores require another layout.
- That call took 1.7 times as long as fp16 on a T4 (cupy #9915). On a GB300, weights in this layout took 13 times as
  long as TF32 (pytorch #187094). Volta's tensor cores have no int8 (onnxruntime #3413).
- Such products may run on the ordinary cores (FasterTransformer #95). On data centre GPUs, these are at best a quarter
  as fast as tensor cores with 16 bits. On other GPUs they are about as fast, because tensor cores accumulate in float32
  at half their rate there.

`benchmarks/gpu_cuda.py` measures both programs.
"""

from ...bundle.manifest import CUDA, CUDA_WEIGHT_ONLY, Manifest, Precision
from ...model.programs import Program

Capability = tuple[int, int]

INT8_PRODUCTS = (6, 1)
"""The first compute capability with int8 products (CUDA C++ Programming Guide, ``__dp4a``)."""

_SLOW_INT8: dict[Capability, str] = {
    (7, 0): "V100",
    (7, 2): "Xavier",
    (7, 5): "RTX 20, T4",
    (8, 0): "A100, A30",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (10, 3): "B300",
}
"""GPUs whose fp16 products are expected to be faster than int8 ones, widening included."""


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
    both = (CUDA, CUDA_WEIGHT_ONLY)
    return both[::-1] if capability in _SLOW_INT8 else both


def why_weight_only(capability: Capability | None) -> str:
    """Why the denoiser runs weight-only, as the end of a sentence: because of the GPU's speed, or of its memory."""
    if capability in _SLOW_INT8:
        return f"which compute capability {_dotted(capability)} multiplies faster than int8"
    return "for int8 products do not fit"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
