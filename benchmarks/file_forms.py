"""Quantized files at full size: how fast they are read and streamed into a bundle, and with how much memory.

    python benchmarks/file_forms.py --work DIR [--rounds 3]

1. ComfyUI's int8 ConvRot transformer, of random values (6.2 GB), to an int8 bundle by the product's command line. Its
   own memory and the streaming's time stand beside a plain copy of the same file. The rest of the model is small.
2. GGUF: the linears of one layer of the text encoder in Q4_K and of one block of the transformer in Q8_0, fused as
   files have them, of random bytes. Reading them as the exporter does is timed against the `gguf` package's own
   dequantization of the same tensors, in turns; both must give the same values.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_export.source.tensors import TensorSource
from zimage_export.source.weights import Weights
from zimage_export.storage.stored import row_chunks
from zimage_export.synthetic.checkpoint import FULL, write_checkpoint
from zimage_rt.bench.children import cli_child, measure_child
from zimage_rt.bench.script import Document, Run, Script
from zimage_rt.bench.synthetic import few_blocks
from zimage_rt.bench.tables import column_table
from zimage_rt.bench.timing import interleave, ratio
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.linears import layer_linears

_MARKER = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}).encode()
_PIECE = 32 << 20
_LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_MARKS = (  # by which a component's file is recognized
    *("x_pad_token", "cap_pad_token", "cap_embedder.0.weight", "final_layer.linear.bias"),
    *("token_embd.weight", "blk.0.attn_q_norm.weight"),
)
_SIZES = {"I8": 1, "U8": 1, "F32": 4, "BF16": 2}

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name."""


def measure(run: Run) -> Document:
    """Both; what is made for them is deleted."""
    return {"gguf": dequantized(run.work, run.rounds), "convrot": streamed(run.work, run.rounds)}


def streamed(work: Path, rounds: int) -> dict[str, Any]:
    """The int8 ConvRot file to a bundle, and a plain copy of it, in turns."""
    rest, file = work / "rest", work / "int8_convrot.safetensors"
    out, copy = work / "bundle", work / "copy"
    try:
        small_rest(rest)
        write_random(file, convrot_layout(FULL.config))
        words = ["build", str(rest), str(out), "--precision", "int8", "--transformer", str(file)]
        words += ["--allow-pruned", "--quiet", "--json", "--force"]
        found: list[dict[str, float]] = []
        for _ in range(rounds):
            peak, said = measure_child(cli_child("zimage_export.cli", *words))
            start = time.perf_counter()
            shutil.copyfile(file, copy)
            copied = time.perf_counter() - start
            copy.unlink()
            phases = json.loads(said)["seconds"]
            found.append(
                {
                    "anonymous_bytes": peak.anonymous,
                    "seconds": peak.seconds,
                    "weights_seconds": phases["weights"],
                    "copy_seconds": copied,
                }
            )
        return {
            "file_bytes": file.stat().st_size,
            "bundle_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
            "rounds": found,
        }
    finally:
        for path in (rest, out):
            shutil.rmtree(path, ignore_errors=True)
        for path in (file, copy):
            path.unlink(missing_ok=True)


def small_rest(rest: Path) -> None:
    """A checkpoint whose transformer is but a configuration, of the published size, and whose text encoder is small."""
    write_checkpoint(rest, few_blocks())
    config = FULL.config
    described = rest / "transformer" / "config.json"
    sizes = {"n_layers": config.transformer.n_layers, "n_refiner_layers": config.transformer.n_refiner_layers}
    described.write_text(json.dumps(json.loads(described.read_text()) | sizes))
    for path in (rest / "transformer").glob("*.safetensors*"):
        path.unlink()


def convrot_layout(config: ModelConfig) -> Layout:
    """ComfyUI's names: int8 in the main blocks, whose attention is fused, and bf16 elsewhere."""
    c = config.transformer
    roles = layer_linears("transformer", config)
    found: Layout = {}
    stacks = [("layers", c.n_layers), ("noise_refiner", c.n_refiner_layers), ("context_refiner", c.n_refiner_layers)]
    for block in (f"{stack}.{number}" for stack, count in stacks for number in range(count)):
        linears = [("attention.qkv", 3 * c.dim, c.dim), ("attention.out", c.dim, c.dim)]
        linears += [(linear.name, linear.out_width, linear.in_width) for linear in roles if "feed" in linear.name]
        for name, rows, width in linears:
            weight = f"{block}.{name}.weight"
            if not block.startswith("layers"):
                found[weight] = ("BF16", (rows, width))
                continue
            found[weight] = ("I8", (rows, width))
            found[f"{weight}_scale"] = ("F32", (rows, 1))
            found[f"{block}.{name}.comfy_quant"] = ("U8", (len(_MARKER),))
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            found[f"{block}.{norm}.weight"] = ("BF16", (c.dim,))
        for norm in ("q_norm", "k_norm"):
            found[f"{block}.attention.{norm}.weight"] = ("BF16", (c.dim // c.n_heads,))
        if not block.startswith("context"):
            found |= biased(f"{block}.adaLN_modulation.0", 4 * c.dim, c.adaln_dim)
    ends = {
        "x_embedder": (c.dim, c.patch_dim),
        "final_layer.linear": (c.patch_dim, c.dim),
        "final_layer.adaLN_modulation.1": (c.dim, c.adaln_dim),
        "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (c.adaln_dim, 1024),
        "cap_embedder.1": (c.dim, c.cap_feat_dim),
    }
    for name, (rows, width) in ends.items():
        found |= biased(name, rows, width)
    pads: Layout = dict.fromkeys(("x_pad_token", "cap_pad_token"), ("BF16", (1, c.dim)))
    return found | pads | {"cap_embedder.0.weight": ("BF16", (c.cap_feat_dim,))}


def biased(name: str, rows: int, width: int) -> Layout:
    """A linear layer in bf16."""
    return {f"{name}.weight": ("BF16", (rows, width)), f"{name}.bias": ("BF16", (rows,))}


def write_random(path: Path, layout: Layout) -> None:
    """A safetensors file of random values: integers over all of int8, scales near 3e-4, the rest near 0.02."""
    rng, header, offset = np.random.default_rng(0), {}, 0
    for name, (kind, shape) in layout.items():
        size = int(np.prod(shape)) * _SIZES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    words = (rng.standard_normal(_PIECE // 2, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    pools: dict[str, NDArray[np.uint8]] = {
        "I8": rng.integers(-127, 128, _PIECE, np.int8).view(np.uint8),
        "BF16": words.astype(np.uint16).view(np.uint8),
        "F32": (rng.random(_PIECE // 4, np.float32) * np.float32(1e-4) + np.float32(2.5e-4)).view(np.uint8),
        "U8": np.frombuffer(_MARKER, np.uint8),
    }
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for kind, shape in layout.values():
            left = int(np.prod(shape)) * _SIZES[kind]
            while left:
                left -= file.write(pools[kind][:left].data)


def dequantized(work: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the processor, ours and the package's, for the linears of one layer of each component."""
    return [
        compared(work / "text.gguf", "text_encoder", "Q4_K", text_layer(FULL.config), rounds),
        compared(work / "transformer.gguf", "transformer", "Q8_0", transformer_block(FULL.config), rounds),
    ]


def text_layer(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of a layer's linears under llama.cpp's names."""
    linears = zip(_LLAMA, layer_linears("text_encoder", config), strict=True)
    return {f"blk.0.{name}.weight": (linear.out_width, linear.in_width) for name, linear in linears}


def transformer_block(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of a block's linears as files have them, queries, keys and values in one."""
    layout = convrot_layout(config)
    return {
        name: (shape[0], shape[1])
        for name, (kind, shape) in layout.items()
        if name.startswith("layers.0.") and kind == "I8"
    }


def compared(path: Path, part: str, kind: str, shapes: dict[str, tuple[int, int]], rounds: int) -> dict[str, Any]:
    """One file of random blocks, read by both. Raises `ValueError` where they differ."""
    import gguf

    try:
        write_blocks(path, kind, shapes)
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name in shapes}
        weights = Weights.in_file(part, path)
        names = [name for name in weights.names() if weights.get(name).quantized]

        def read_ours() -> None:
            for name in names:
                for _ in row_chunks(weights.get(name)):
                    pass

        def read_theirs() -> None:
            for tensor in theirs.values():
                gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)

        check_equal((weights.get(name) for name in names), theirs)
        taken = interleave({"ours": read_ours, "gguf": read_theirs}, rounds, time.process_time)
        over = ratio(taken["ours"], taken["gguf"])
        return {
            "part": part,
            "type": kind,
            "parameters": sum(rows * width for rows, width in shapes.values()),
            "seconds": taken,
            "ours_over_gguf": [over.least, over.median, over.most],
        }
    finally:
        path.unlink(missing_ok=True)


def write_blocks(path: Path, kind: str, shapes: dict[str, tuple[int, int]]) -> None:
    """Random bytes as blocks of a type, whose fp16 scales are finite: no byte sets an exponent's highest bit."""
    import gguf

    member, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    values, size = gguf.GGML_QUANT_SIZES[member]
    writer = gguf.GGUFWriter(path, "none")
    for name in _MARKS:
        writer.add_tensor(name, np.ones((1, 2560), np.float32))
    for name, (rows, width) in shapes.items():
        data = rng.integers(0, 256, (rows, width // values * size), np.uint8) & np.uint8(0xBB)
        writer.add_tensor(name, data, raw_dtype=member)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_equal(sources: Iterator[TensorSource], theirs: dict[str, Any]) -> None:
    """Raises `ValueError` where a value differs. What is fused in the file is split in rows, in the same order."""
    import gguf

    for tensor in theirs.values():
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        first = 0
        while first < len(expected):
            found = next(sources).read()
            if not np.array_equal(found, expected[first : first + len(found)]):
                raise ValueError(f"{tensor.name}: our values differ from the package's")
            first += len(found)


def page(report: Document) -> list[str]:
    """Both tables."""
    convrot = report["convrot"]
    builds = {
        "own memory, GB": lambda row: f"{row['anonymous_bytes'] / 1e9:.2f}",
        "whole build, s": "{seconds:.0f}",
        "streaming and hashing, s": "{weights_seconds:.1f}",
        "plain copy of the file, s": "{copy_seconds:.1f}",
        "ratio": lambda row: f"{row['weights_seconds'] / row['copy_seconds']:.2f}",
    }
    reads = {
        "linears of a layer": "{part}, {type}",
        "million values": lambda row: f"{row['parameters'] / 1e6:.0f}",
        "ours, s": lambda row: f"{np.median(row['seconds']['ours']):.2f}",
        "`gguf`, s": lambda row: f"{np.median(row['seconds']['gguf']):.2f}",
        "ours over `gguf`": "{ours_over_gguf[1]:.2f} ({ours_over_gguf[0]:.2f} to {ours_over_gguf[2]:.2f})",
    }
    return [
        "Quantized files at full size",
        "ComfyUI's int8 ConvRot transformer of the published size and random values, "
        f"{convrot['file_bytes'] / 1e9:.2f} GB, to an int8 bundle of {convrot['bundle_bytes'] / 1e9:.2f} GB; the text "
        "encoder has two layers. Builds and copies take turns, on a machine that other work shared.",
        column_table(builds, convrot["rounds"]),
        "GGUF, read as the exporter does, some rows at a time, and dequantized by the `gguf` package, a tensor at a "
        "time: seconds of the processor, medians of calls in turns. The values are the same.",
        column_table(reads, report["gguf"]),
    ]


SCRIPT = Script(
    __file__, __doc__, measure, page, packages=("numpy", "gguf", "onnxruntime"), work="20 GB, freed again", rounds=3
)

if __name__ == "__main__":
    SCRIPT.main()
