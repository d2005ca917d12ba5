"""Small files in the forms that people have, written by the programs that define them, and what those make of them.

fp8 is cast by torch; NVFP4, MXFP8 and int8 are quantized by comfy-kitchen, ComfyUI's own library; GGUF by the `gguf`
package. `Written.values` is each program's own dequantization.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from single_file_tools import Tensors


@dataclass(frozen=True)
class Written:
    """One quantized weight: what stands in the file, and what it means."""

    weight: torch.Tensor
    values: torch.Tensor  # float32
    companions: Tensors = field(default_factory=dict)  # by the suffix that follows the layer's name
    marker: dict[str, Any] | None = None  # the content of comfy_quant


Writer = Callable[[torch.Tensor], Written]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def plain(dtype: torch.dtype) -> Writer:
    def write(weight: torch.Tensor) -> Written:
        cast = weight.to(dtype)
        return Written(cast, cast.float())

    return write


def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cast = (weight / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return cast, cast.float() * scale


def old_fp8(shape: str = "[]", suffix: str = "scale_weight") -> Writer:
    """ComfyUI's older fp8, whose marker is one of the whole file: with one scale, one per row, or one per block."""

    def write(weight: torch.Tensor) -> Written:
        if shape == "[out, blocks, 1]":
            blocks = weight.unflatten(1, (4, -1))
            scale = blocks.abs().amax(-1, keepdim=True) / 448
            cast, values = _scaled(blocks, scale, E4M3)
            return Written(cast.flatten(1), values.flatten(1), {suffix: scale})
        scale = weight.abs().amax(1, keepdim=True) / 448 if shape == "[out, 1]" else weight.abs().max() / 448
        cast, values = _scaled(weight, scale, E4M3)
        return Written(cast, values, {suffix: scale.reshape(1) if shape == "[1]" else scale})

    return write


def fp8(dtype: torch.dtype = E4M3, container: torch.dtype | None = None, one: bool = False) -> Writer:
    """ComfyUI's fp8, marked layer by layer."""

    def write(weight: torch.Tensor) -> Written:
        scale = weight.abs().max() / torch.finfo(dtype).max
        cast, values = _scaled(weight, scale, dtype)
        name = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}[dtype]
        stored = cast if container is None else cast.view(container)
        companions = {"weight_scale": scale.reshape(1) if one else scale, "input_scale": torch.tensor(0.5)}
        return Written(stored, values, companions, {"format": name, "full_precision_matrix_mult": True})

    return write


def nvfp4(weight: torch.Tensor) -> Written:
    import comfy_kitchen as kitchen

    whole = weight.abs().max() / (448 * 6)
    packed, scales = kitchen.quantize_nvfp4(weight, whole)
    values = kitchen.dequantize_nvfp4(packed, whole, scales, output_type=torch.float32)
    return Written(packed, values, {"weight_scale": scales, "weight_scale_2": whole}, {"format": "nvfp4"})


def smoothed_nvfp4(weight: torch.Tensor) -> Written:
    """With factors for the layer's inputs, which the columns of the weight take."""
    factors = torch.linspace(0.5, 2, weight.shape[1])
    written = nvfp4(weight / factors)
    return Written(
        written.weight, written.values * factors, {**written.companions, "pre_quant_scale": factors}, written.marker
    )


def mxfp8(weight: torch.Tensor) -> Written:
    import comfy_kitchen as kitchen

    cast, scales = kitchen.quantize_mxfp8(weight)
    values = kitchen.dequantize_mxfp8(cast, scales, output_type=torch.float32)
    return Written(cast, values, {"weight_scale": scales.view(torch.uint8)}, {"format": "mxfp8"})


def int8(per_row: bool, rotation: int = 0, nested: bool = False) -> Writer:
    def write(weight: torch.Tensor) -> Written:
        from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout as Layout

        options = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
        quantized, parameters = Layout.quantize(weight, per_channel=per_row, **options)
        values = Layout.dequantize(quantized, parameters).float()
        said = {"params": options} if nested else options
        return Written(
            quantized, values, {"weight_scale": parameters.scale.float()}, {"format": "int8_tensorwise", **said}
        )

    return write


WRITERS: dict[str, Writer] = {
    "fp8 e4m3": plain(E4M3),
    "fp8 e5m2": plain(E5M2),
    "old scaled fp8": old_fp8(),
    "old scaled fp8, [1]": old_fp8("[1]"),
    "old scaled fp8, per row": old_fp8("[out, 1]"),
    "old scaled fp8, blocks": old_fp8("[out, blocks, 1]"),
    "scaled fp8 without a marker": old_fp8(suffix="weight_scale"),
    "comfy fp8 e4m3": fp8(),
    "comfy fp8 e4m3, [1]": fp8(one=True),
    "comfy fp8 e5m2": fp8(E5M2),
    "comfy fp8 in bytes": fp8(container=torch.uint8),
    "nvfp4": nvfp4,
    "nvfp4, smoothed": smoothed_nvfp4,
    "mxfp8": mxfp8,
    "int8": int8(per_row=False),
    "int8 per row": int8(per_row=True),
    "int8 convrot": int8(per_row=True, rotation=64),
    "int8 convrot, nested": int8(per_row=True, rotation=64, nested=True),
}

MIXED = [name for name in WRITERS if not name.startswith("old")]
"""Forms that may stand in one file: the older marker is one of the whole file."""


def comfy_tensors(weights: Mapping[str, Written]) -> Tensors:
    """The tensors of a file, by the weights' names, which end in `.weight`."""
    tensors: Tensors = {}
    for name, written in weights.items():
        layer = name.removesuffix("weight")
        tensors[name] = written.weight.contiguous()
        tensors |= {layer + suffix: value.contiguous().clone() for suffix, value in written.companions.items()}
        if written.marker is not None:
            tensors[f"{layer}comfy_quant"] = as_bytes(written.marker)
    return tensors


def as_bytes(document: object) -> torch.Tensor:
    """JSON as a tensor, which is how ComfyUI marks a layer."""
    return torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)


def write_comfy(path: Path, weights: Mapping[str, Written], others: Tensors, old_prefix: str | None = None) -> Path:
    """A file of quantized weights and other tensors; with `old_prefix`, the older marker stands under it."""
    tensors = comfy_tensors(weights) | others
    if old_prefix is not None:
        tensors[f"{old_prefix}scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    save_file(tensors, path)
    return path


# --- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "BF16", "F16")
"""Types that the `gguf` package quantizes to, with blocks of 32 values at most."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[NDArray[np.float32], str]],
    architecture: str | None = None,
    keys: Mapping[str, int | float] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """A GGUF file of tensors, each with the name of its type. Returns what the package reads each as."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture or "none")
    for key, value in (keys or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "多"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, (values, kind) in tensors.items():
        member = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            data = gguf.quants.quantize(values, member)
            writer.add_tensor(name, data, raw_dtype=member)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {tensor.name: _dequantized(tensor) for tensor in gguf.GGUFReader(path).tensors}


def _dequantized(tensor: Any) -> NDArray[np.float32]:
    import gguf

    shape = tuple(int(side) for side in tensor.shape[::-1])
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
