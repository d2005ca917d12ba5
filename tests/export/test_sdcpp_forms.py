"""GGUF files of stable-diffusion.cpp's converter: our values are those that it computes from them, to the bit."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from zimage_export.source.weights import Weights

pytestmark = pytest.mark.slow

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
IQ_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
OTHERS = ("TQ1_0", "TQ2_0")
MARKS = ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight", "final_layer.linear.bias")
WIDTH, INNER = 256, 512
LOSSES = {"IQ1": 0.7, "TQ": 1.0, "Q2": 0.4, "IQ2": 0.5, "Q3": 0.25, "IQ3": 0.3}  # measured, and a third more


@pytest.fixture(scope="module")
def converter() -> Any:
    """The library's own binding, whose functions are C's."""
    reason = "stable-diffusion-cpp-python is not installed; it is built from source, which takes minutes"
    pytest.importorskip("stable_diffusion_cpp", reason=reason)
    return importlib.import_module("stable_diffusion_cpp.stable_diffusion_cpp")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """A transformer's linears under ComfyUI's names, with attention fused, and what makes the file one."""
    rng = np.random.default_rng(0)
    shapes = {
        "attention.qkv": (3 * WIDTH, WIDTH),
        "attention.out": (WIDTH, WIDTH),
        "feed_forward.w1": (INNER, WIDTH),
        "feed_forward.w2": (WIDTH, INNER),
    }
    linears = {f"layers.0.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("sdcpp") / "model.safetensors"
    save_file(linears | {name: np.ones(WIDTH, np.float32) for name in MARKS}, path)
    return path, linears


def convert(converter: Any, source: Path, out: Path, kind: str) -> dict[str, Any]:
    """Converts a file, and returns the tensors of what was written, as the `gguf` package lists them."""
    import gguf

    member = int(gguf.GGMLQuantizationType[kind])
    assert converter.convert(str(source).encode(), b"", str(out).encode(), member, b"", False)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


@pytest.mark.parametrize("kind", [*K_TYPES, *IQ_TYPES, *OTHERS])
def test_values_are_the_converters_own(
    kind: str, converter: Any, original: tuple[Path, Mapping[str, NDArray[np.float32]]], tmp_path: Path
) -> None:
    path, linears = original
    written = convert(converter, path, tmp_path / "quantized.gguf", kind)
    widened = convert(converter, tmp_path / "quantized.gguf", tmp_path / "widened.gguf", "F32")
    weights = Weights.in_file("transformer", tmp_path / "quantized.gguf")
    names = {name: [name] for name in linears} | {
        "layers.0.attention.qkv.weight": [f"layers.0.attention.to_{one}.weight" for one in "qkv"],
        "layers.0.attention.out.weight": ["layers.0.attention.to_out.0.weight"],
    }
    for name, values in linears.items():
        assert written[name].tensor_type.name == kind
        assert widened[name].tensor_type.name == "F32"
        theirs = np.asarray(widened[name].data).reshape(values.shape)
        np.testing.assert_array_equal(np.concatenate([weights.get(part).read() for part in names[name]]), theirs)
        bound = next((loss for start, loss in LOSSES.items() if kind.startswith(start)), 0.15)
        assert np.linalg.norm(theirs - values) < bound * np.linalg.norm(values)
