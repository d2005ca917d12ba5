"""What the tests of single files share: tensors under ComfyUI's names, files without data, and comparisons."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from zimage_export.source.weights import Weights
from zimage_runtime.bundle.bundle import Bundle

Tensors = dict[str, torch.Tensor]

PARTS = ("transformer", "text_encoder", "vae")


def to_comfy_transformer(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        if re.search(r"\.to_[qkv]\.weight$", name):
            scope = name.rpartition(".to_")[0]
            out[f"{scope}.qkv.weight"] = torch.cat([tensors[f"{scope}.to_{kind}.weight"] for kind in "qkv"])
            continue
        for theirs, comfys in (
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1", "final_layer"),
            ("to_out.0", "out"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ):
            name = name.replace(theirs, comfys)
        out[name] = value.clone()
    return out


def to_ldm_vae(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"(up|down)samplers\.0", r"\1sample", name)
        name = name.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[name] = value.clone()
    return out


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def assert_same(weights: Weights, expected: Mapping[str, torch.Tensor]) -> None:
    assert set(weights.names()) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(weights.get(name, tuple(value.shape)).read(), value.float().numpy(), name)


def weight_hashes(bundle: Path) -> dict[str, str]:
    files = Bundle.open(bundle).manifest.files
    return {path: record.sha256 for path, record in files.items() if path.endswith(".safetensors")}


def write_headers(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file of the size it should have, without data in it."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * sizes.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
