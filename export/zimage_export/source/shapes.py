"""Configurations read off the tensors, for files without a ``config.json``.

Sizes are derived from the tensors' shapes. What shapes do not determine is assumed to be the published model's, or, for
a text encoder in GGUF, read from the file's keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runtime.model.config import PATCH_SIZE, ModelConfig
from zimage_runtime.model.linears import PATCH

from ..errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Of a component's tensors, under diffusers' names."""

_AXES_DIMS = (32, 48, 48)
_VAE_CHANNELS = [128, 256, 512, 512]

_PUBLISHED_DEPTHS = {  # by component: the width that is the published model's, and its layers
    "transformer": ("dim", 3840, {"n_layers": 30, "n_refiner_layers": 2}),
    "text_encoder": ("hidden_size", 2560, {"num_hidden_layers": 36}),
}

_STACKS = {
    "transformer": {"n_layers": "layers", "n_refiner_layers": "noise_refiner"},
    "text_encoder": {"num_hidden_layers": "layers"},
    "vae": {"layers_per_block": "encoder.down_blocks.0.resnets"},
}

_QWEN_EPS, _QWEN_THETA = "qwen3.attention.layer_norm_rms_epsilon", "qwen3.rope.freq_base"


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a file's tensors, all of which are required."""

    shapes: Shapes
    path: Path

    def size(self, name: str, axis: int, rank: int) -> int:
        """The size of one axis of a tensor of so many axes."""
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{self.path}: tensor {name} not found; is the file complete?")
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(f"{self.path}: {name} has shape {list(shape)}, expected {rank} axes")
        return shape[axis]

    def need_config(self, found: str, published: str, part: str) -> CheckpointError:
        """The error, for the caller to raise, for sizes from which the configuration does not follow."""
        return CheckpointError(
            f"{self.path}: {found}, the published model's {published}; the shapes do not determine its configuration: "
            f"give a MODEL directory with {part}/config.json"
        )


def infer_config(part: str, shapes: Shapes, path: Path, metadata: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The content of a ``config.json`` for a file's tensors, which have diffusers' names.

    Raises `CheckpointError` where it does not follow from the shapes: for sizes other than the published ones.
    """
    sizes = _Sizes(shapes, path)
    if part == "transformer":
        return _infer_transformer(sizes)
    return _infer_text_encoder(sizes, metadata or {}) if part == "text_encoder" else _infer_vae(sizes)


def _infer_transformer(sizes: _Sizes) -> dict[str, Any]:
    dim = sizes.size("x_pad_token", 1, 2)
    head_dim = sizes.size("layers.0.attention.norm_q.weight", 0, 1)
    if head_dim != sum(_AXES_DIMS):
        raise sizes.need_config(f"heads have {head_dim} channels", str(sum(_AXES_DIMS)), "transformer")
    return {
        **_depths("transformer", sizes.shapes),
        "dim": dim,
        "n_heads": dim // head_dim,
        "cap_feat_dim": sizes.size("cap_embedder.0.weight", 0, 1),
        "in_channels": sizes.size(f"all_x_embedder.{PATCH}.weight", 1, 2) // PATCH_SIZE**2,
        "axes_dims": _AXES_DIMS,
        "axes_lens": (1536, 512, 512),
        "norm_eps": 1e-5,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


def _infer_text_encoder(sizes: _Sizes, metadata: Mapping[str, object]) -> dict[str, Any]:
    layer = "layers.0"
    head_dim = sizes.size(f"{layer}.self_attn.q_norm.weight", 0, 1)
    return {
        **_depths("text_encoder", sizes.shapes),
        "vocab_size": sizes.size("embed_tokens.weight", 0, 2),
        "hidden_size": sizes.size("embed_tokens.weight", 1, 2),
        "num_attention_heads": sizes.size(f"{layer}.self_attn.q_proj.weight", 0, 2) // head_dim,
        "num_key_value_heads": sizes.size(f"{layer}.self_attn.k_proj.weight", 0, 2) // head_dim,
        "head_dim": head_dim,
        "intermediate_size": sizes.size(f"{layer}.mlp.gate_proj.weight", 0, 2),
        "rms_norm_eps": _number(metadata, _QWEN_EPS, 1e-6),
        "rope_theta": _number(metadata, _QWEN_THETA, 1e6),
    }


def _number(metadata: Mapping[str, object], key: str, published: float) -> float:
    """A key's value, which GGUF stores as float32: the shortest decimal number that it stands for."""
    value = metadata.get(key)
    return float(f"{value:.7g}") if isinstance(value, float | int) else published


def _infer_vae(sizes: _Sizes) -> dict[str, Any]:
    levels = _count(sizes.shapes, "encoder.down_blocks")
    blocks = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    channels = [sizes.size(name, 0, 4) for name in blocks]
    if channels != _VAE_CHANNELS:
        raise sizes.need_config(f"blocks have {channels} channels", str(_VAE_CHANNELS), "vae")
    return {
        "layers_per_block": _depths("vae", sizes.shapes)["layers_per_block"],
        "block_out_channels": channels,
        "latent_channels": sizes.size("decoder.conv_in.weight", 1, 4),
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "sample_size": 1024,
    }


def text_width(shapes: Shapes) -> int:
    """The width of a text encoder's hidden states; 0 where its shapes do not say."""
    shape = shapes.get("embed_tokens.weight", ())
    return shape[1] if len(shape) == 2 else 0


def _count(shapes: Shapes, stem: str) -> int:
    """How many different numbers follow a stem: the number of layers."""
    start = stem + "."
    return len({name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)})


def _depths(part: str, shapes: Shapes) -> dict[str, int]:
    """Layers of each stack, by the configuration's key."""
    return {key: _count(shapes, stem) for key, stem in _STACKS[part].items()}


def check_published_depth(part: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises `CheckpointError` for fewer layers than published at the published width: a pruned or incomplete file."""
    key, width, depths = _PUBLISHED_DEPTHS.get(part, ("", 0, {}))
    if not key or config[key] != width:
        return
    for depth, published in depths.items():
        if config[depth] < published:
            raise CheckpointError(
                f"{path}: has {depth} {config[depth]}, the published model {published}: it is pruned or incomplete; "
                f"--allow-pruned builds it as it is"
            )


def with_depth(part: str, config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """A ``config.json`` with the number of layers that a file has."""
    return {**config, **_depths(part, shapes)}


def check_depth(part: str, shapes: Shapes, path: Path, config: ModelConfig) -> None:
    """Raises `CheckpointError` for a file with another number of layers than the configuration.

    Any other difference is a tensor that is missing or has another shape, which is reported when it is read.
    """
    expected = getattr(config, part)
    for key, count in _depths(part, shapes).items():
        known = getattr(expected, key)
        if count != known:
            pruned = "; if it is pruned, --allow-pruned builds it as it is" if count < known and part != "vae" else ""
            raise CheckpointError(f"{path}: has {key} {count}, but the configuration has {known}{pruned}")
