"""Building an ONNX graph whose weights are only names and shapes.

Nothing is traced and no weight is ever in memory: the model is stated operator by operator, in milliseconds and a
few megabytes at any size, and every node, value and initializer has the name that the checkpoint uses.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from zimage_runtime.bundle.tensors import DType, TensorEntry
from zimage_runtime.model.programs import SIGNATURES, Program, Shape

OPSET = 23
_IR_VERSION = 11
_CONTRIB = "com.microsoft"

ONNX_TYPES = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
    DType.I8: TensorProto.INT8,
    DType.U8: TensorProto.UINT8,
}

Attribute = int | float | str | Sequence[int]

Storage = Callable[[str, tuple[int, ...]], DType]
"""The stored type of a weight, by its name and shape."""


@dataclass(frozen=True)
class Graph:
    """A program without its weights."""

    program: Program
    executor: str
    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]  # small ones, inside the file
    weights: dict[str, tuple[int, ...]]  # name → shape, outside the file
    dims: Mapping[str, int]  # the config's values for names in the signature's shapes
    settings: tuple[str, ...] = ()  # the constants that the runtime may override
    types: Mapping[str, DType] = field(default_factory=dict)  # of weights, and of other values that are not float32
    scalars: Mapping[str, float] = field(default_factory=dict)  # float32 inputs of one element, with the values to feed
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of weights that several tensors make up
    branches: Mapping[str, Shape] = field(default_factory=dict)  # inputs of an extended program, after its signature's
    outputs: Mapping[str, Shape] = field(default_factory=dict)  # hints, before its signature's
    inputs: Mapping[str, Shape] = field(default_factory=dict)  # hints, after its signature's

    @property
    def input_names(self) -> set[str]:
        """The inputs of the program, without weights."""
        return {*SIGNATURES[self.program].inputs, *self.inputs, *self.branches, *self.settings}

    def to_model(self, weights_file: str, entries: Mapping[str, TensorEntry]) -> onnx.ModelProto:
        """The ONNX model, whose initializers point into a safetensors file beside it.

        `entries` is that file's header. Inputs and outputs are the ones of `zimage_runtime.model.programs`.
        """
        signature = SIGNATURES[self.program]
        inputs = {**signature.inputs, **self.inputs, **self.branches}
        initializers = [self._external(name, weights_file, entries[name]) for name in self.weights]
        graph = helper.make_graph(
            self.nodes,
            self.program.value,
            [
                *(self._value(name, shape) for name, shape in inputs.items()),
                # an input with an initializer is optional, and by default has its value
                *(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in self.settings),
            ],
            [self._value(name, shape) for name, shape in {**self.outputs, **signature.outputs}.items()],
            initializer=[*self.constants, *initializers],
        )
        return self._model(graph)

    def to_model_of_inputs(
        self, name: str, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]
    ) -> onnx.ModelProto:
        """The ONNX model whose weights are inputs, after `inputs`: one program then serves every layer of its shape.

        Branches of an extended program are the last inputs.
        """
        weights = [
            helper.make_tensor_value_info(weight, ONNX_TYPES[self.types[weight]], shape)
            for weight, shape in self.weights.items()
        ]
        # with the rank of what they multiply: TensorRT would reshape them in a kernel
        scalars = [helper.make_tensor_value_info(scalar, TensorProto.FLOAT, [1, 1, 1]) for scalar in self.scalars]
        branches = [self._value(value, shape) for value, shape in self.branches.items()]
        graph = helper.make_graph(
            self.nodes,
            name,
            [*(self._value(value, shape) for value, shape in inputs.items()), *weights, *scalars, *branches],
            [self._value(value, shape) for value, shape in outputs.items()],
            initializer=self.constants,
        )
        return self._model(graph)

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == _CONTRIB for node in self.nodes):
            opsets.append(helper.make_opsetid(_CONTRIB, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="zimage-export")

    def _value(self, name: str, shape: Shape) -> onnx.ValueInfoProto:
        known = [self.dims.get(d, d) if isinstance(d, str) else d for d in shape]
        return helper.make_tensor_value_info(name, ONNX_TYPES[self.types.get(name, DType.F32)], known)

    def _external(self, name: str, location: str, entry: TensorEntry) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=ONNX_TYPES[DType(entry.dtype)], dims=entry.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", entry.offset), ("length", entry.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


@dataclass
class GraphBuilder:
    """Collects the nodes of one program. Values are the strings that name them, and each has an element type."""

    program: Program
    executor: str
    dims: Mapping[str, int]
    storage: Storage
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    _weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _scalars: dict[str, float] = field(default_factory=dict)
    _parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)
    _types: dict[str, DType] = field(default_factory=dict)
    _casts: dict[str, str] = field(default_factory=dict)
    _widening: list[onnx.NodeProto] = field(default_factory=list)  # casts of weights
    _scope: list[str] = field(default_factory=list)
    _settings: list[str] = field(default_factory=list)
    _branches: dict[str, Shape] = field(default_factory=dict)
    _outputs: dict[str, Shape] = field(default_factory=dict)
    _inputs: dict[str, Shape] = field(default_factory=dict)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names inside the block start with `name` and a dot."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Names inside the block are the program's own, independent of the current scope."""
        scope, self._scope = self._scope, []
        try:
            yield
        finally:
            self._scope = scope

    @contextlib.contextmanager
    def widening(self) -> Iterator[None]:
        """Nodes of the block widen a weight, as casts of weights do: each runs just before the node that reads it."""
        start = len(self._nodes)
        yield
        self._widening.extend(self._nodes[start:])
        del self._nodes[start:]

    def _full(self, name: str) -> str:
        return ".".join([*self._scope, name])

    def op(self, kind: str, *inputs: str, name: str, contrib: bool = False, **attributes: Attribute) -> str:
        """Adds a node with one output and returns the output's name. An empty input name leaves that input out."""
        return self.ops(kind, *inputs, name=name, outputs=1, contrib=contrib, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, name: str, outputs: int, contrib: bool = False, **attributes: Attribute
    ) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        unique = full = self._full(name)
        repeat = 1
        while unique in self._names:
            repeat += 1
            unique = f"{full}_{repeat}"
        self._names.add(unique)
        values = [unique] if outputs == 1 else [f"{unique}.{index}" for index in range(outputs)]
        known = next((self._types[value] for value in inputs if value in self._types), None)
        if known is not None:
            self._types.update(dict.fromkeys(values, known))
        domain = _CONTRIB if contrib else ""
        self._nodes.append(helper.make_node(kind, inputs, values, name=unique, domain=domain, **attributes))
        return values

    def full_name(self, name: str) -> str:
        """A weight's name in the component, by the scope and its name there."""
        return self._full(name)

    def weight(self, name: str, shape: Sequence[int], dtype: DType | None = None) -> str:
        """A tensor of the component's weights file; in its stored type unless another is given."""
        full = self._full(name)
        self._weights[full] = tuple(shape)
        self._types[full] = dtype or self.storage(full, tuple(shape))
        return full

    def joined_weight(self, name: str, parts: Sequence[str], shape: Sequence[int], dtype: DType) -> str:
        """Tensors of the weights file one after the other, along their first axis, as one value of `shape`."""
        names = tuple(self._full(part) for part in parts)
        full = self.weight(name, shape, dtype)
        if names != (full,):
            self._parts[full] = names
        return full

    def typed(self, value: str, dtype: DType) -> str:
        """The value, now known to have another element type than its node's first input."""
        self._types[value] = dtype
        return value

    def setting(self, name: str, default: float) -> str:
        """A float32 scalar that the runtime may override; the same name is the same scalar everywhere."""
        self.constant(np.array(default, dtype=np.float32), name)
        if name not in self._settings:
            self._settings.append(name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """A float32 input of one element, by scope and name: what differs between layers that share a program."""
        full = self._full(name)
        self._scalars[full] = value
        return full

    def branch_input(self, name: str, shape: Shape, dtype: DType = DType.F32) -> str:
        """An input of an extended program beside those of its signature, float32 unless said otherwise."""
        self._branches[name] = shape
        return self.input(name, dtype) if dtype is not DType.F32 else name

    def storage_of(self, name: str, shape: Sequence[int]) -> DType:
        """The element type of a weight of the scope, as the program receives it."""
        return self.storage(self._full(name), tuple(shape))

    def has(self, value: str) -> bool:
        """Whether there is a node of this name."""
        return value in self._names

    def type_of(self, value: str) -> DType:
        """The element type of a floating-point value. Inputs and constants are float32."""
        return self._types.get(value, DType.F32)

    def cast(self, value: str, dtype: DType) -> str:
        """The value in another element type; the value itself where it has that type."""
        if self.type_of(value) is dtype:
            return value
        key = f"{value}:{dtype}"
        if key not in self._casts:
            with self.outside():
                self._casts[key] = self.op("Cast", value, name=f"{value}.{dtype.lower()}", to=ONNX_TYPES[dtype])
            self._types[self._casts[key]] = dtype
            if value in self._weights:
                self._widening.append(self._nodes.pop())
        return self._casts[key]

    def constant(self, value: NDArray[np.generic], name: str) -> str:
        """A small tensor inside the file; the same name is the same tensor everywhere."""
        tensor = numpy_helper.from_array(value, name)
        known = self._constants.setdefault(name, tensor)
        if known != tensor:
            raise ValueError(f"constant {name} has two values")
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64), "int64_" + "_".join(str(v) for v in values))

    def number(self, value: float, dtype: DType = DType.F32) -> str:
        """A constant scalar, float32 unless said otherwise."""
        name = f"float_{value:g}" if dtype is DType.F32 else f"{dtype.lower()}_{value:g}"
        tensor = helper.make_tensor(name, ONNX_TYPES[dtype], [], [value])
        if dtype is DType.F32:
            tensor = numpy_helper.from_array(np.array(value, dtype=np.float32), name)
        self._constants[name] = tensor
        self._types[name] = dtype
        return name

    def dim(self, value: str, axis: int, name: str) -> str:
        """The size of one axis of a value, as an int64 vector of one element."""
        return self.op("Shape", value, name=name, start=axis, end=axis + 1)

    def input(self, name: str, dtype: DType) -> str:
        """An input of the program that is not float32."""
        self._types[name] = dtype
        return name

    def output(self, value: str, name: str, dtype: DType = DType.F32) -> None:
        """Makes a value an output of the program."""
        self._nodes.append(helper.make_node("Identity", [self.cast(value, dtype)], [name], name=name))
        self._types[name] = dtype

    def extra_input(self, name: str, shape: Shape, dtype: DType) -> str:
        """An input that the program's signature does not have."""
        self._inputs[name] = shape
        return self.input(name, dtype)

    def extra_output(self, value: str, name: str, shape: Shape, dtype: DType) -> None:
        """Makes a value an output that the program's signature does not have."""
        self._outputs[name] = shape
        self.output(value, name, dtype)

    def build(self) -> Graph:
        """The finished graph."""
        # ONNX Runtime walks back from the outputs and runs, of a node's inputs, the one that stands later in the file
        # first. With the casts of weights at the front, each runs just before its layer and is freed after it; left
        # in place, all of them run before the first layer, and a 16-bit model is in memory in float32.
        nodes = [*self._widening, *self._nodes]
        return Graph(
            self.program,
            self.executor,
            nodes,
            list(self._constants.values()),
            self._weights,
            self.dims,
            tuple(self._settings),
            self._types,
            self._scalars,
            self._parts,
            self._branches,
            self._outputs,
            self._inputs,
        )
