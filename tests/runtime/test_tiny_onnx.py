"""Models written without `onnx` are what `onnx` writes, and run."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from zimage_runtime.executors.ort.known_answer import known_answer_model
from zimage_runtime.executors.ort.tile_kernels import NORMED_MODEL, PLAIN_MODEL
from zimage_runtime.machine.int8_products import KNOWN_PRODUCT_MODEL
from zimage_runtime.machine.tiny_onnx import Element, Node, Value, onnx_model

info, node = helper.make_tensor_value_info, helper.make_node


def with_onnx(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any] | None = None, **opsets: int
) -> onnx.ModelProto:
    """The same as `onnx_model`, by the `onnx` package; a keyword's "_" stands for the "." in a domain's name."""
    for one in nodes:
        one.name = one.output[0]
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    versions = {domain.replace("_", "."): version for domain, version in opsets.items()}
    versions = {"": versions.pop("onnx"), **versions}
    imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def assert_same(written: bytes, expected: onnx.ModelProto) -> None:
    found = onnx.load_from_string(written)
    onnx.checker.check_model(found, full_check=True)
    assert found == expected


def test_a_product_with_a_constant() -> None:
    weights = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
    written = onnx_model(
        [Node("MatMul", "x w", "y")],
        {"x": Value(Element.FLOAT, ("rows", 4))},
        {"y": Value(Element.FLOAT, ("rows", 3))},
        {"w": weights},
        opset=21,
    )
    floats = TensorProto.FLOAT
    x, y = info("x", floats, ["rows", 4]), info("y", floats, ["rows", 3])
    assert_same(written, with_onnx([node("MatMul", ["x", "w"], ["y"])], [x], [y], {"w": weights}, onnx=21))
    values = np.random.default_rng(0).standard_normal((5, 4), np.float32)
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": values})[0], values @ weights, rtol=1e-5)


def test_every_kind_of_attribute() -> None:
    tensor = np.array([[-1, 1 << 40]], np.int64)
    nodes = [
        Node("Constant", "", "a", {"value": tensor}),
        Node("Gather", "a i", "b", {"axis": -1}),
        Node("Cast", "b", "c", {"to": Element.FLOAT}),
        Node("LeakyRelu", "c", "d", {"alpha": 0.25}),
        Node("DepthToSpace", "e", "f", {"blocksize": 300, "mode": "CRD"}),
        Node("Constant", "", "g", {"value_floats": [0.5, -2.0]}),
        Node("Conv", "h k", "l", {"pads": [1, 0, 2, 0], "strides": (2, 1)}),
    ]
    expected = [
        node("Constant", [], ["a"], value=numpy_helper.from_array(tensor)),
        node("Gather", ["a", "i"], ["b"], axis=-1),
        node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        node("LeakyRelu", ["c"], ["d"], alpha=0.25),
        node("DepthToSpace", ["e"], ["f"], blocksize=300, mode="CRD"),
        node("Constant", [], ["g"], value_floats=[0.5, -2.0]),
        node("Conv", ["h", "k"], ["l"], pads=[1, 0, 2, 0], strides=[2, 1]),
    ]
    indices = Value(Element.INT64, (None,))
    images = Value(Element.FLOAT, (1, 90_000, None, None))
    written = onnx_model(
        nodes,
        {"i": indices, "e": images, "h": images, "k": images},
        {"d": Value(Element.FLOAT, (1, None)), "f": images, "l": images},
        opset=20,
    )
    free = [info(name, TensorProto.FLOAT, [1, 90_000, None, None]) for name in "ehk"]
    outputs = [
        info("d", TensorProto.FLOAT, [1, None]),
        info("f", TensorProto.FLOAT, [1, 90_000, None, None]),
        info("l", TensorProto.FLOAT, [1, 90_000, None, None]),
    ]
    found = onnx.load_from_string(written)
    assert found == with_onnx(expected, [info("i", TensorProto.INT64, [None]), *free], outputs, onnx=20)


@pytest.mark.parametrize("element", list(Element))
def test_constants_of_every_type_keep_their_values(element: Element) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(element.value)
    values = np.array([[0, 1, 100], [3, 5, 127]], dtype)
    written = onnx_model(
        [Node("Identity", "c", "y")], {}, {"y": Value(element, (2, 3))}, {"c": values, "one": values[0, 1]}, opset=20
    )
    model = onnx.load_from_string(written)
    onnx.checker.check_model(model, full_check=True)
    for initializer, expected in zip(model.graph.initializer, (values, values[0, 1]), strict=True):
        read = numpy_helper.to_array(initializer)
        assert (read.dtype, read.shape) == (dtype, expected.shape)
        assert (read == expected).all()


def test_the_known_product() -> None:
    nodes = [
        node("MatMulInteger", ["x", "w"], ["y"]),
        node("ConstantOfShape", ["shape"], ["constant"], value=numpy_helper.from_array(np.array([127], np.int8))),
        node("MatMulIntegerToFloat", ["x", "constant", "one", "one"], ["z"], domain="com.microsoft"),
    ]
    expected = with_onnx(
        nodes,
        [info("x", TensorProto.UINT8, ["rows", 64]), info("w", TensorProto.INT8, [64, 32])],
        [info("y", TensorProto.INT32, ["rows", 32]), info("z", TensorProto.FLOAT, ["rows", 32])],
        {"shape": np.array([64, 32], np.int64), "one": np.array(1, np.float32)},
        onnx=23,
        com_microsoft=1,
    )
    assert_same(KNOWN_PRODUCT_MODEL, expected)


def test_the_doctors_known_answer() -> None:
    floats = TensorProto.FLOAT
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("RMSNormalization", ["y", "scale"], ["z"])]
    inputs = [info("x", floats, [2, 4]), info("w", floats, [4, 2]), info("scale", floats, [2])]
    assert_same(known_answer_model(), with_onnx(nodes, inputs, [info("z", floats, [2, 2])], onnx=23))


def test_the_programs_of_a_tile() -> None:
    def free(name: str, rank: int, element: int = TensorProto.FLOAT) -> Any:
        return info(name, element, [None] * rank)

    convolution = [free("weight", 4), free("bias", 1)]
    plain = [node("Conv", ["x", "weight", "bias"], ["y"])]
    assert_same(PLAIN_MODEL, with_onnx(plain, [free("x", 4), *convolution], [free("y", 4)], onnx=18))
    normed = [
        node("Mul", ["x", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["normed"]),
        node("Sigmoid", ["normed"], ["gate"]),
        node("Mul", ["normed", "gate"], ["activated"]),
        node("Pad", ["activated", "pads"], ["bordered"]),
        node("Conv", ["bordered", "weight", "bias"], ["y"]),
    ]
    pads = free("pads", 1, TensorProto.INT64)
    inputs = [free("x", 4), free("scale", 3), free("shift", 3), pads, *convolution]
    assert_same(NORMED_MODEL, with_onnx(normed, inputs, [free("y", 4)], onnx=18))
