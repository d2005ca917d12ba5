"""Checkpoints of random weights in the exact published layout, names, shapes and types.

Names and shapes come from diffusers' and transformers' own classes. Weights are scaled so that activations stay near
one, as in a trained model: a model whose output is constant or NaN proves nothing. A tensor's values depend on the seed
and its name only, and one tensor is in memory at a time.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.command_line.progress import Advance, Progress
from zimage_runtime.model.config import ModelConfig, SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_runtime.model.linears import EMBEDDINGS

from ..output import check_disk, check_target, replaced_directory
from ..storage.casts import encode
from ..storage.stored import StoredTensor, total_bytes
from ..weights.streaming import write_weights
from .byte_tokenizer import write_byte_tokenizer
from .published_layout import (
    text_encoder_config,
    transformer_config,
    vae_config,
    write_configs,
    write_json,
    write_tokenizer_config,
)


@dataclass(frozen=True)
class Scale:
    """How large a synthetic model is, and how many files its parts have."""

    config: ModelConfig
    shards: int = 3  # of the transformer and the text encoder, as published


SMALL = Scale(
    ModelConfig(
        text_encoder=TextEncoderConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=160,
            vocab_size=320,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
        ),
        transformer=TransformerConfig(
            dim=96,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=3,
            cap_feat_dim=64,
            in_channels=16,
            norm_eps=1e-5,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=(8, 12, 12),
            axes_lens=(1536, 512, 512),
        ),
        vae=VaeConfig(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            sample_size=128,
        ),
        scheduler=SchedulerConfig(shift=3.0, num_train_timesteps=1000),
    )
)
"""Every part of the architecture in a megabyte: seconds to export, fractions of a second to generate."""


FULL = Scale(
    ModelConfig(
        text_encoder=TextEncoderConfig(
            hidden_size=2560,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            vocab_size=151936,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
        ),
        transformer=TransformerConfig(
            dim=3840,
            n_layers=30,
            n_refiner_layers=2,
            n_heads=30,
            cap_feat_dim=2560,
            in_channels=16,
            norm_eps=1e-5,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=(32, 48, 48),
            axes_lens=(1536, 512, 512),
        ),
        vae=VaeConfig(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            norm_num_groups=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            sample_size=1024,
        ),
        scheduler=SchedulerConfig(shift=3.0, num_train_timesteps=1000),
    )
)
"""The published model's own dimensions: 32.9 GB, one tensor in memory at a time."""

SCALES = {"small": SMALL, "full": FULL}


def write_checkpoint(
    out: Path,
    scale: Scale,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    transformer_type: DType = DType.F32,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint to `out`, which must not exist. `tokenizer` replaces the small byte-level one.

    Without diffusers, names and shapes are those that our programs use: the published ones without the text encoder's
    last layer, which no program uses.

    Raises `ExportError` if `out` exists.
    """
    check_target(out, force=False)
    config = scale.config
    if tokenizer is not None:
        config = _with_vocabulary_of(config, tokenizer)
    parts = {
        "transformer": (_transformer_shapes(config), transformer_type, scale.shards, "diffusion_pytorch_model"),
        "text_encoder": (_text_encoder_shapes(config), DType.BF16, scale.shards, "model"),
        "vae": (_vae_shapes(config), DType.BF16, 1, "diffusion_pytorch_model"),
    }
    tensors = {
        part: [_random_tensor(name, shape, dtype, seed) for name, shape in shapes.items()]
        for part, (shapes, dtype, _, _) in parts.items()
    }
    total = sum(total_bytes(group) for group in tensors.values())
    check_disk(out, total)
    with (
        replaced_directory(out) as folder,
        (progress or Progress(quiet=True)).task("random weights", total, in_bytes=True) as advance,
    ):
        write_configs(folder, config)
        for part, (_, _, shards, stem) in parts.items():
            _write_sharded(folder / part, stem, tensors[part], shards, advance)
        _write_tokenizer(folder / "tokenizer", tokenizer)


def _with_vocabulary_of(config: ModelConfig, tokenizer: Path) -> ModelConfig:
    from dataclasses import replace

    from zimage_runtime.model.tokenizer import PromptTokenizer

    rows = -(-PromptTokenizer(tokenizer).vocab_size // 64) * 64
    return replace(config, text_encoder=replace(config.text_encoder, vocab_size=rows))


def program_shapes(config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that our programs use of a component, as published."""
    from ..graphs import Target, build_graphs

    used = (graph.weights for graph in build_graphs(config, Target()) if graph.program.component == component)
    shapes = {name: shape for weights in used for name, shape in weights.items()}
    if component != "text_encoder":
        return shapes
    encoder = config.text_encoder
    return {EMBEDDINGS: (encoder.vocab_size, encoder.hidden_size), **shapes}


def _transformer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if find_spec("diffusers") is None:
        return program_shapes(config, "transformer")
    from diffusers import ZImageTransformer2DModel

    return _meta_shapes(ZImageTransformer2DModel, **transformer_config(config.transformer))


def _vae_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if find_spec("diffusers") is None:
        return program_shapes(config, "vae")
    from diffusers import AutoencoderKL

    return _meta_shapes(AutoencoderKL, **vae_config(config.vae))


def _text_encoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if find_spec("transformers") is None:
        return program_shapes(config, "text_encoder")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shapes = _meta_shapes(Qwen3ForCausalLM, Qwen3Config(**text_encoder_config(config.text_encoder)))
    shapes.pop("lm_head.weight", None)  # tied to the embeddings, so not stored
    return shapes


def _meta_shapes(model_class: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a class's state, without allocating it."""
    import torch

    with torch.device("meta"):
        model = model_class(*args, **kwargs)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _random_tensor(name: str, shape: tuple[int, ...], dtype: DType, seed: int) -> StoredTensor:
    mean, deviation = _distribution(name, shape)

    def chunks() -> Iterator[NDArray[np.generic]]:
        # uniform values from the fastest generator there is: a full-size model has ten billion of them
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
        spread = np.float32(deviation * math.sqrt(12))
        left, most = math.prod(shape), 1 << 22
        while left:
            count = min(left, most)
            left -= count
            values = rng.random(count, dtype=np.float32)
            values -= np.float32(0.5)
            values *= spread
            values += np.float32(mean)
            yield encode(values, dtype, name)

    return StoredTensor(name, dtype, shape, chunks)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near one."""
    if name.endswith("_pad_token") or "embed_tokens" in name:
        return 0.0, 1.0
    if name.endswith(".bias"):
        return 0.0, 0.05
    if len(shape) == 1:
        return 1.0, 0.1  # norm weights
    gain = 1.0
    if "adaLN_modulation" in name:
        gain = 1.5  # the timestep embedding is about 0.3
    elif name in ("decoder.conv_out.weight", "encoder.conv_out.weight"):
        gain = 0.5  # images between -1 and 1, most of them not clipped
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def _write_sharded(folder: Path, stem: str, tensors: list[StoredTensor], shards: int, advance: Advance) -> None:
    folder.mkdir(exist_ok=True)
    if shards == 1:
        write_weights(folder / f"{stem}.safetensors", tensors, advance)
        return
    groups: list[list[StoredTensor]] = [[] for _ in range(shards)]
    total, written = total_bytes(tensors), 0
    for tensor in tensors:
        groups[min(written * shards // total, shards - 1)].append(tensor)
        written += tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"{stem}-{number:05d}-of-{shards:05d}.safetensors"
        write_weights(folder / name, group, advance)
        weight_map.update({tensor.name: name for tensor in group})
    write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    folder.mkdir(exist_ok=True)
    if tokenizer is None:
        write_byte_tokenizer(folder / "tokenizer.json")
    else:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_tokenizer_config(folder)
