"""Block programs computed by torch: on a real GPU that TensorRT for RTX does not serve, or behind the stand-in device.

An interpreter of the programs' ONNX graphs, in the programs' own types. What depends on shapes only is computed on the
host, as numpy arrays, and what of it the device needs is uploaded in a context's first run: so later runs neither
allocate from the driver, nor copy, nor wait, and may be captured. A graph writes its temporary tensors to the same
addresses whenever it is launched, so these come from a pool of their own: in torch's common one, what is uploaded later
might lie there, and the next launch would overwrite it. Scratch memory is asked for as an engine would and not used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from device_stand_in import Operation, StandInDevice
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper
from torch import Tensor

from zimage_export.engines.block_graphs import BlockProgram
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU
from zimage_runtime.errors import ExecutorError
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.model.programs import SIGNATURES, Program

Host = NDArray[Any]
Value = Host | Tensor

TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


class Memory(Protocol):
    """Device memory as tensors, and its streams."""

    @property
    def device(self) -> torch.device: ...

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor: ...

    def upload(self, array: Host) -> Tensor: ...

    def queue(self, what: str, reads: "Ranges", writes: "Ranges", run: Callable[[], None], stream: int) -> None: ...


Ranges = Sequence[tuple[int, int]]  # address and bytes


class StandInMemory:
    """Tensors on the stand-in device's memory."""

    device = torch.device("cpu")

    def __init__(self, stand_in: StandInDevice) -> None:
        self._stand_in = stand_in

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        data = self._stand_in.view(address, math.prod(shape) * dtype.itemsize)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def upload(self, array: Host) -> Tensor:
        return to_torch(array)

    def queue(self, what: str, reads: Ranges, writes: Ranges, run: Callable[[], None], stream: int) -> None:
        self._stand_in.enqueue(Operation(what, reads, writes, run), stream)


class CudaMemory:
    """Tensors on memory of a GPU that others allocated, and work on streams that others made."""

    def __init__(self, index: int = 0) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        cudnn.deterministic = True
        self.device = torch.device("cuda", index)
        self._temporary, self._kept = torch.cuda.MemPool(), torch.cuda.MemPool()
        self._streams: dict[int, torch.cuda.ExternalStream] = {}
        self._tensors: dict[tuple[int, torch.dtype, tuple[int, ...]], Tensor] = {}  # views: they own nothing

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        key = (address, dtype, shape)
        if key not in self._tensors:
            found = torch.as_tensor(_Interface(address, dtype, shape), device=self.device)
            if found.data_ptr() != address:
                raise ExecutorError("torch copied what it should only look at")
            self._tensors[key] = found.view(dtype)
        return self._tensors[key]

    def upload(self, array: Host) -> Tensor:
        """A copy that lives as long as its context: never where a graph's temporary tensors are."""
        with torch.cuda.use_mem_pool(self._kept, self.device):
            return to_torch(array).to(self.device)

    def queue(self, what: str, reads: Ranges, writes: Ranges, run: Callable[[], None], stream: int) -> None:
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.ExternalStream(stream, self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[stream]), torch.cuda.use_mem_pool(self._temporary, self.device):
            run()


class _Interface:
    """``__cuda_array_interface__`` of an address. bfloat16, which it does not know, is 16-bit integers."""

    def __init__(self, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": {1: "|i1", 2: "<i2", 4: "<f4", 8: "<i8"}[dtype.itemsize],
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def to_torch(array: Host) -> Tensor:
    """A copy of a numpy array, bfloat16 included."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass
class Interpreter:
    """One graph. Runs of the same shapes share what was computed and uploaded in the first."""

    graph: onnx.GraphProto
    upload: Callable[[Host], Tensor]
    _constants: dict[str, Host] = field(default_factory=dict)
    _uploaded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._constants = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Value] = {**self._constants, **inputs}
        for node in self.graph.node:
            given = [values[name] if name else None for name in node.input]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            try:
                results = self._node(node, given, attributes)
            except (RuntimeError, KeyError, TypeError, ValueError) as error:
                shapes = [None if value is None else (value.dtype, tuple(value.shape)) for value in given]
                raise ExecutorError(f"{node.op_type} {node.name} of {shapes} failed: {error}") from error
            values.update(zip(node.output, results, strict=True))
        return {value.name: self._on_device(value.name, values[value.name]) for value in self.graph.output}

    def _node(self, node: NodeProto, given: list[Value | None], attributes: dict[str, Any]) -> Sequence[Value]:
        if node.op_type == "Shape":
            (value,) = given
            assert value is not None
            shape = np.array(tuple(value.shape), np.int64)
            return [shape[attributes.get("start", 0) : attributes.get("end", len(shape))]]
        if node.op_type in _ON_HOST and all(isinstance(value, np.ndarray) for value in given):
            return [np.asarray(_ON_HOST[node.op_type](attributes, *given))]
        arguments: list[Any] = []
        for place, (name, value) in enumerate(zip(node.input, given, strict=True)):
            host = place in _HOST_ARGUMENTS.get(node.op_type, ())
            arguments.append(value if value is None or host else self._on_device(name, value))
        result = _ON_DEVICE[node.op_type](attributes, *arguments)
        return result if isinstance(result, list | tuple) else [result]

    def _on_device(self, name: str, value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if name not in self._uploaded:
            self._uploaded[name] = self.upload(value)
        return self._uploaded[name]


def _squeeze(a: dict[str, Any], x: Host, axes: Host | None = None) -> Host:
    return np.squeeze(x, None if axes is None else tuple(axes.tolist()))


_ON_HOST: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Concat": lambda a, *values: np.concatenate(values, axis=a["axis"]),
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "Identity": lambda a, x: x,
    "Range": lambda a, start, stop, step: np.arange(start, stop, step),
    "Squeeze": _squeeze,
    "Unsqueeze": lambda a, x, axes: np.expand_dims(x, tuple(axes.tolist())),
}

_SECOND = ("Reshape", "Expand", "Unsqueeze", "Squeeze", "ReduceMean", "ReduceMax", "Split")
_HOST_ARGUMENTS = {**dict.fromkeys(_SECOND, (1,)), "Resize": (1, 2, 3)}
"""Arguments that are sizes and axes."""


def _reshape(a: dict[str, Any], x: Tensor, shape: Host) -> Tensor:
    return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(shape.tolist())])


def _expand(a: dict[str, Any], x: Tensor, shape: Host) -> Tensor:
    return x.broadcast_to(np.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _split(a: dict[str, Any], x: Tensor, sizes: Host | None = None) -> list[Tensor]:
    if sizes is not None:
        return list(torch.split_with_sizes(x, sizes.tolist(), a.get("axis", 0)))
    return list(x.chunk(a["num_outputs"], a.get("axis", 0)))


def _conv(a: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
    padded = torch.nn.functional.pad(x, (left, right, top, bottom)) if (top, left) != (bottom, right) else x
    padding = (top, left) if padded is x else (0, 0)
    return torch.conv2d(padded, weight, bias, a.get("strides", (1, 1)), padding, (1, 1), a.get("group", 1))


def _resize(a: dict[str, Any], x: Tensor, region: Host | None, scales: Host) -> Tensor:
    if (a["mode"], a["coordinate_transformation_mode"], a["nearest_mode"]) != (b"nearest", b"asymmetric", b"floor"):
        raise ValueError("another way of resizing")
    for axis, scale in enumerate(scales.tolist()):
        if scale != 1:
            x = x.repeat_interleave(int(scale), axis)
    return x


def _rms_norm(a: dict[str, Any], x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(a.get("axis", -1), keepdim=True) + a.get("epsilon", 1e-5))
    return wide.to(x.dtype) * scale


def _layer_norm(a: dict[str, Any], x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = x.float() - x.float().mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + a.get("epsilon", 1e-5))
    return wide.to(x.dtype) * scale + (0 if bias is None else bias)


def _rotary(a: dict[str, Any], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x of [batch, tokens, heads * channels], or of [batch, heads, tokens, channels]."""
    shape = x.shape
    if x.dim() == 3:
        x, cos, sin = x.reshape(shape[0], shape[1], a["num_heads"], -1), cos.unsqueeze(2), sin.unsqueeze(2)
    else:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = (x[..., 0::2], x[..., 1::2]) if a.get("interleaved", 0) else x.chunk(2, -1)
    turned = [pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos]
    return (torch.stack(turned, -1) if a.get("interleaved", 0) else torch.cat(turned, -1)).reshape(shape)


def _quantize(a: dict[str, Any], x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    dtype = torch.uint8 if zero is None else zero.dtype
    assert scale.numel() == 1
    levels = torch.round(x / scale) + (0 if zero is None else zero.to(x.dtype))
    return levels.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


def _dequantize(a: dict[str, Any], x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    assert scale.numel() == 1
    return (x.to(scale.dtype) if zero is None else x.to(scale.dtype) - zero.to(scale.dtype)) * scale


def _clip(a: dict[str, Any], x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(a: dict[str, Any], x: Tensor, axes: Host) -> Tensor:
        return function(x, tuple(axes.tolist()), keepdim=bool(a.get("keepdims", 1)))

    return reduce


_ON_DEVICE: dict[str, Callable[..., Any]] = {
    "Abs": lambda a, x: x.abs(),
    "Add": lambda a, x, y: x + y,
    "Cast": lambda a, x: x.to(TYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda a, *values: torch.cat(values, a["axis"]),
    "Conv": _conv,
    "Cos": lambda a, x: x.cos(),
    "DequantizeLinear": _dequantize,
    "Div": lambda a, x, y: x / y,
    "Expand": _expand,
    "Gemm": lambda a, x, y, bias: x @ (y.mT if a.get("transB", 0) else y) + bias,
    "Identity": lambda a, x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda a, x, y: x @ y,
    "Max": lambda a, x, y: torch.maximum(x, y),
    "Mul": lambda a, x, y: x * y,
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "Reshape": _reshape,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Sin": lambda a, x: x.sin(),
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Split": _split,
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": lambda a, x, axes: x.squeeze(tuple(axes.tolist())),
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": lambda a, x, axes: x.reshape(np.expand_dims(np.empty(x.shape, np.bool_), tuple(axes)).shape),
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}


class TorchContext:
    """Implements `Context`."""

    def __init__(self, memory: Memory, program: BlockProgram, spec: VariantSpec) -> None:
        self._memory, self._program, self._spec = memory, program, spec.programs[program.name]
        self._interpreter = Interpreter(program.model.graph, memory.upload)
        self._inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.scratch_bytes = 0

    def is_capturable(self, stream: int) -> bool:
        return True

    def at(self, shapes: Mapping[str, tuple[int, ...]]) -> "TorchContext":
        """The context, with its shapes set."""
        graph = self._program.model.graph
        for value in graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = shapes[value.name] if value.name in shapes else tuple(dim.dim_value for dim in dims)
            self._inputs[value.name] = (TYPES[value.type.tensor_type.elem_type], tuple(shape))
        for name, (least, _, most) in self._spec.profile.items():
            if not all(low <= d <= high for low, d, high in zip(least, shapes[name], most, strict=True)):
                raise ExecutorError(f"{self._program.name} does not take {name} of shape {shapes[name]}")
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in self._inputs.items()}
        results = Interpreter(graph, lambda array: to_torch(array).to("meta")).run(empty)
        self._outputs = {name: (result.dtype, tuple(result.shape)) for name, result in results.items()}
        for value in graph.output:
            if self._outputs[value.name][0] != TYPES[value.type.tensor_type.elem_type]:
                raise ExecutorError(f"{self._program.name}: {value.name} is of type {self._outputs[value.name][0]}")
        self.scratch_bytes = self._spec.scratch_bytes(self._spec.positions(shapes))
        return self

    def enqueue(self, addresses: Mapping[str, int], scratch: int, scratch_bytes: int, stream: int) -> None:
        if set(addresses) != set(self._inputs) | set(self._outputs) or scratch_bytes < self.scratch_bytes:
            raise ExecutorError(f"{self._program.name}: addresses or scratch memory missing")

        def run() -> None:
            tensors = {name: self._memory.tensor(addresses[name], *type_) for name, type_ in self._inputs.items()}
            with torch.no_grad():
                for name, result in self._interpreter.run(tensors).items():
                    self._memory.tensor(addresses[name], *self._outputs[name]).copy_(result)

        reads, writes = (
            [(addresses[name], math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in given.items()]
            for given in (self._inputs, self._outputs)
        )
        self._memory.queue(self._program.name, reads, writes, run, stream)


class TorchEngines:
    """Implements `Engines`."""

    def __init__(self, memory: Memory, programs: Sequence[BlockProgram], spec: VariantSpec) -> None:
        self._memory, self._spec = memory, spec
        self._programs = {program.name: program for program in programs}

    def context(self, program: str, shapes: Mapping[str, tuple[int, ...]], stream: int) -> TorchContext:
        return TorchContext(self._memory, self._programs[program], self._spec).at(shapes)

    def save(self) -> None:
        pass

    def close(self) -> None:
        pass


class TorchHostPrograms:
    """Programs on the processor, as `HostPrograms`, where ONNX Runtime is not installed. Enough for the modulation."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def run(self, program: Program, feeds: Mapping[str, Host], stop: object = None) -> dict[str, Host]:
        model = onnx.load(self._bundle.program(program, CPU))
        with torch.no_grad():
            inputs = {name: to_torch(value) for name, value in feeds.items()}
            results = Interpreter(model.graph, to_torch).run(inputs)
        return {name: results[name].numpy().copy() for name in SIGNATURES[program].outputs}

    def release(self, *programs: Program) -> None:
        pass
