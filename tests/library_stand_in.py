"""A stand-in for TensorRT that builds in no time: it proves where engines come from, not what they compute."""

from typing import Any

from zimage_runtime.executors.tensorrt.block_catalog import ProgramSpec
from zimage_runtime.executors.tensorrt.engine_cache import Builder
from zimage_runtime.executors.tensorrt.trt_api import Built


class LibraryStandIn:
    """TensorRT that builds in no time and needs no GPU: an engine is the text that says what it was made from."""

    name, version, is_rtx = "tensorrt_rtx", "1.7.1.116", True

    def __init__(self) -> None:
        self.built: list[str] = []
        self.loaded: list[bytes] = []
        self.refused: set[bytes] = set()
        self.kernels: bytes | None = None
        self.compiled = b"kernels compiled so far"
        self.contexts: list[int] = []  # tokens, of each that was made

    def build(self, onnx: bytes, spec: ProgramSpec, gpus: Any = (), *, detailed: bool = False) -> Built:
        self.built.append(spec.name)
        most = max(max(shapes[2]) for shapes in spec.profile.values())
        text = f"{spec.name} for {[str(gpu) for gpu in gpus]} by {self.version}: {hash(onnx)}, up to {most}"
        return Built(text.encode(), f"Total Activation Memory: {1000 * most}\n")

    def runtime(self) -> "LibraryStandIn":
        return self

    def load(self, data: bytes) -> bytes | None:
        self.loaded.append(data)
        return None if data in self.refused else data

    @property
    def builder(self) -> Builder:
        return Builder(self.name, self.version, ("FLAG",))

    def context(self, engine: bytes, shapes: Any, stream: int) -> bytes:
        self.contexts += [shape[1] for name, shape in shapes.items() if name == "x"]
        return engine

    def use_cache(self, stored: bytes | None) -> None:
        self.kernels = stored

    def cache(self) -> bytes:
        return self.compiled

    def last_error(self) -> str:
        return "because"
