"""Block programs on the CPU: their float32 twins run by ONNX Runtime, behind the stand-in device's addresses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from device_stand_in import StandInDevice
from engine_stand_in import StandInContext
from numpy.typing import NDArray

from zimage_export.engines.block_graphs import BlockProgram, build_blocks
from zimage_export.engines.build import program_spec
from zimage_export.engines.types import EngineTypes
from zimage_export.storage.folds import read_folds
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, read_header
from zimage_runtime.executors.tensorrt.block_catalog import BlockSpec, VariantSpec
from zimage_runtime.machine.gpu_targets import Variant

SCRATCH_PER_POSITION = 1000  # bytes: made up, for no twin has any


def twins(bundle: Bundle, *, lora: bool = False) -> list[BlockProgram]:
    """The float32 twins of a bundle's block programs, from the same builder; with `lora`, those that take LoRA too."""
    headers = {component: read_header(bundle.file(path)) for component, path in bundle.manifest.weights.items()}
    types = EngineTypes(
        lambda component, name, shape: DType(headers[component][name].dtype), Variant.AMPERE, DType.F32, full=True
    )
    return build_blocks(bundle.manifest.config, types, read_folds(bundle.manifest.folds), lora=lora)


def twin_spec(bundle: Bundle, programs: list[BlockProgram]) -> VariantSpec:
    """What a catalog would say of them."""
    config = bundle.manifest.config
    specs, blocks = {}, {}
    for program in programs:
        spec = program_spec(program, config, "")
        scratch = ((0, 0), (1 << 30, SCRATCH_PER_POSITION << 30))
        specs[program.name] = dataclasses.replace(spec, scratch=scratch)
        for key, scalars in program.scalars.items():
            if program.branches:
                blocks[key] = dataclasses.replace(blocks[key], extended=program.name)
            else:
                blocks[key] = BlockSpec(program.name, scalars)
    return VariantSpec(specs, blocks)


class OnnxEngines:
    """Implements `Engines`."""

    def __init__(self, device: StandInDevice, programs: list[BlockProgram], spec: VariantSpec) -> None:
        self._device = device
        self._programs = {program.name: program for program in programs}
        self._spec = spec
        self._sessions: dict[str, Any] = {}
        self.closed = False
        self.saves = 0
        self.capturable = True
        self.shapes: set[tuple[str, tuple[int, ...]]] = set()  # that contexts were made for: program, first input

    def context(self, program: str, shapes: Mapping[str, tuple[int, ...]], stream: int) -> StandInContext:
        self.shapes.add((program, next(iter(shapes.values()))))
        return self._context(program).at(shapes)

    def _context(self, program: str) -> StandInContext:
        model = self._programs[program].model
        outputs = {value.name: _shape(value) for value in model.graph.output}
        spec = self._spec.programs[program]

        def scratch(shapes: Mapping[str, tuple[int, ...]]) -> int:
            (name, *_) = spec.profile
            dims = [d for d, low in zip(shapes[name], spec.profile[name][0], strict=True)]
            free = [d for d, a, b in zip(dims, spec.profile[name][0], spec.profile[name][2], strict=True) if a != b]
            return SCRATCH_PER_POSITION * int(np.prod(free))

        def output_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
            known = _bound(model, shapes)
            return {name: tuple(known[d] if isinstance(d, str) else d for d in dims) for name, dims in outputs.items()}

        return StandInContext(
            self._device,
            program,
            {value.name: (_dtype(value), _shape(value)) for value in model.graph.input},
            {value.name: _dtype(value) for value in model.graph.output},
            lambda arrays: self._run(program, arrays),
            output_shapes,
            scratch,
            spec.profile,
            self.capturable,
        )

    def _run(self, program: str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if program not in self._sessions:
            self._sessions[program] = session(self._programs[program].model)
        names = [value.name for value in self._programs[program].model.graph.output]
        return dict(zip(names, self._sessions[program].run(names, arrays), strict=True))

    def save(self) -> None:
        self.saves += 1

    def close(self) -> None:
        self.closed = True


def session(model: onnx.ModelProto) -> Any:
    """An ONNX Runtime session of a program whose weights are inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # fused into integer kernels, int8 x int8 saturates on processors without VNNI
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _bound(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The free dimensions' values; an up block doubles rows and columns, a down block halves them."""
    known: dict[str, int] = {}
    for value in model.graph.input:
        for dim, size in zip(_shape(value), shapes[value.name], strict=True):
            if isinstance(dim, str):
                known[dim] = size
    ups = sum(node.op_type == "Resize" for node in model.graph.node)
    downs = sum(any(a.name == "strides" and a.ints[0] == 2 for a in node.attribute) for node in model.graph.node)
    if "rows" in known:
        known["out_rows"] = known["rows"] - 2
    for axis in ("h", "w"):
        if axis in known:
            known[f"out_{axis}"] = known[axis] * 2**ups // 2**downs
    return known
