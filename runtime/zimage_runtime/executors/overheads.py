"""The memory that is taken but is not ours: what libraries, drivers and desktops hold. One table for all plans."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Overhead:
    """Bytes that a plan adds or leaves alone, and where the figure comes from."""

    nbytes: int
    what: str
    source: str  # "assumed", or what measured it and on what


PROCESS = Overhead(
    160 << 20,
    "the interpreter, numpy, ONNX Runtime, Pillow and a tokenizer of 150,000 words",
    "measured with benchmarks/memory_model.py on x86-64 Linux",
)
ORT_CUDA = Overhead(
    700 << 20,
    "CUDA, cuBLAS and cuDNN, as ONNX Runtime loads them",
    "reserved (626 MiB measured with benchmarks/gpu.py on an H100)",
)
ORT_WEBGPU = Overhead(
    256 << 20, "the driver, compiled kernels and buffers for copying, with ONNX Runtime's WebGPU", "assumed"
)
TENSORRT_CUDA = Overhead(400 << 20, "CUDA, the driver and compiled kernels, as TensorRT loads them", "assumed")
TENSORRT_MARGIN = Overhead(
    512 << 20,
    "free GPU memory that is left to kernels TensorRT compiles, to graphs and to a desktop, or 5 % where that is more",
    "assumed",
)
DESKTOP = Overhead(256 << 20, "free GPU memory that is left to others, since a desktop's use varies", "assumed")
CARD = Overhead(512 << 20, "what the driver and a desktop keep of a GPU's memory", "assumed")

ALL = (PROCESS, ORT_CUDA, ORT_WEBGPU, TENSORRT_CUDA, TENSORRT_MARGIN, DESKTOP, CARD)
