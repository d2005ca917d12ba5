"""The model's dimensions, as typed and checked values.

They are read from a checkpoint's ``config.json`` files by the exporter and from ``manifest.json`` by the runtime,
with the same code. Nothing is fixed to the published sizes: any dimensions that the architecture allows are accepted.

Sources: the published configurations; ``transformer_z_image.py`` and ``autoencoder_kl.py`` in diffusers;
``modeling_qwen3.py`` in transformers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from ..checked_json import Fields
from ..errors import ConfigError

PATCH_SIZE = 2
"""Latent rows and columns that make one image token."""

ADALN_WIDTH = 256
"""Of the timestep embedding, unless the model is narrower."""

# Far more than any model has; building for a damaged file with more would take hours
_MOST_LAYERS = 1024
_MOST_POSITIONS = 1 << 16


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: {message}")


def ffn_width(dim: int) -> int:
    """Width of the SwiGLU layer of a transformer's block."""
    return int(dim / 3 * 8)


class BlockDims(Protocol):
    """What decides the shapes of a transformer's block: of the model's own, or of a ControlNet's."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    @property
    def n_heads(self) -> int:
        """Attention heads."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU layer."""

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding."""

    @property
    def norm_eps(self) -> float:
        """Of the block's four norms."""


@dataclass(frozen=True)
class TransformerConfig:
    """The diffusion transformer (``ZImageTransformer2DModel``)."""

    dim: int  # width of the residual stream
    n_layers: int
    n_refiner_layers: int  # noise refiners, and as many context refiners
    n_heads: int
    cap_feat_dim: int  # width of the text encoder's hidden states
    in_channels: int  # latent channels
    norm_eps: float
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, int, int]  # channels of a head that carry time, row, column
    axes_lens: tuple[int, int, int]  # positions that each axis has

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU layer."""
        return ffn_width(self.dim)

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding."""
        return min(self.dim, ADALN_WIDTH)

    @property
    def patch_dim(self) -> int:
        """Values in one image token before it is embedded."""
        return PATCH_SIZE * PATCH_SIZE * self.in_channels

    @property
    def modulated_blocks(self) -> int:
        """Blocks that the timestep modulates: noise refiners first, then the main layers."""
        return self.n_refiner_layers + self.n_layers

    @classmethod
    def read(cls, data: object, where: str) -> Self:
        """From ``transformer/config.json`` or a manifest."""
        fields = Fields(data, where)
        axes_dims = fields.integers("axes_dims", 3)
        axes_lens = fields.integers("axes_lens", 3)
        config = cls(
            dim=fields.integer("dim"),
            n_layers=fields.integer("n_layers", maximum=_MOST_LAYERS),
            n_refiner_layers=fields.integer("n_refiner_layers", maximum=_MOST_LAYERS),
            n_heads=fields.integer("n_heads"),
            cap_feat_dim=fields.integer("cap_feat_dim"),
            in_channels=fields.integer("in_channels"),
            norm_eps=fields.number("norm_eps", 1e-5),
            rope_theta=fields.number("rope_theta", 256.0),
            t_scale=fields.number("t_scale", 1000.0),
            axes_dims=(axes_dims[0], axes_dims[1], axes_dims[2]),
            axes_lens=(axes_lens[0], axes_lens[1], axes_lens[2]),
        )
        _require(config.dim % config.n_heads == 0, where, "dim must be a multiple of n_heads")
        _require(
            sum(axes_dims) == config.head_dim,
            where,
            f"axes_dims must add up to dim / n_heads = {config.head_dim}",
        )
        _require(all(d % 2 == 0 for d in axes_dims), where, "every one of axes_dims must be even")
        _require(max(axes_lens) <= _MOST_POSITIONS, where, f"axes_lens must be at most {_MOST_POSITIONS}")
        kv_heads = fields.integer("n_kv_heads", config.n_heads)
        _require(
            kv_heads == config.n_heads,
            where,
            "n_kv_heads must equal n_heads; grouped heads are not supported",
        )
        _require(
            fields.boolean("qk_norm", True),
            where,
            "qk_norm must be true; a model without it is not supported",
        )
        _require("siglip_feat_dim" not in fields, where, "Z-Image Omni (siglip_feat_dim) is not supported")
        patches = [fields.raw(key) for key in ("all_patch_size", "all_f_patch_size")]
        _require(
            all(p is None or p in ([size], (size,)) for p, size in zip(patches, (PATCH_SIZE, 1), strict=True)),
            where,
            f"all_patch_size must be [{PATCH_SIZE}] and all_f_patch_size [1]",
        )
        return config


@dataclass(frozen=True)
class TextEncoderConfig:
    """The text encoder (Qwen3), of which the last layer, the norm and the head are never used."""

    hidden_size: int
    num_hidden_layers: int  # as published, the last one included
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def used_layers(self) -> int:
        """Layers up to ``hidden_states[-2]``."""
        return self.num_hidden_layers - 1

    @classmethod
    def read(cls, data: object, where: str) -> Self:
        """From ``text_encoder/config.json`` (either generation of transformers) or a manifest."""
        fields = Fields(data, where)
        kind = fields.text("model_type", "qwen3")
        _require(kind == "qwen3", where, f"model_type {kind!r} is not supported; Z-Image's text encoder is qwen3")
        _require(not fields.boolean("attention_bias", False), where, "attention_bias is not supported")
        _require(not fields.boolean("use_sliding_window", False), where, "use_sliding_window is not supported")
        config = cls(
            hidden_size=fields.integer("hidden_size"),
            num_hidden_layers=fields.integer("num_hidden_layers", minimum=2, maximum=_MOST_LAYERS),
            num_attention_heads=fields.integer("num_attention_heads"),
            num_key_value_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(fields),
        )
        _require(config.head_dim % 2 == 0, where, "head_dim must be even")
        _require(
            config.num_attention_heads % config.num_key_value_heads == 0,
            where,
            "num_attention_heads must be a multiple of num_key_value_heads",
        )
        return config


def _rope_theta(fields: Fields) -> float:
    """transformers 4 writes ``rope_theta``; transformers 5 writes ``rope_parameters``."""
    for key in ("rope_parameters", "rope_scaling"):
        if key in fields:
            rope = fields.object(key)
            kind = rope.text("rope_type", "default")
            _require(kind == "default", rope.where, f"rope_type {kind!r} is not supported")
            if "rope_theta" in rope:
                return rope.number("rope_theta")
    return fields.number("rope_theta")


@dataclass(frozen=True)
class VaeConfig:
    """The variational autoencoder (``AutoencoderKL``)."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    sample_size: int  # default image size, in pixels per side

    @property
    def scale(self) -> int:
        """Pixels per latent row or column."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def read(cls, data: object, where: str) -> Self:
        """From ``vae/config.json`` or a manifest."""
        fields = Fields(data, where)
        channels = fields.integers("block_out_channels")
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = fields.raw(key)
            _require(kinds is None or kinds == [kind] * len(channels), where, f"{key} must all be {kind}")
        for key in ("use_quant_conv", "use_post_quant_conv"):
            _require(not fields.boolean(key, False), where, f"{key} is not supported")
        _require(fields.boolean("mid_block_add_attention", True), where, "mid_block_add_attention must be true")
        _require(fields.text("act_fn", "silu") == "silu", where, "act_fn must be silu")
        config = cls(
            in_channels=fields.integer("in_channels", 3),
            out_channels=fields.integer("out_channels", 3),
            latent_channels=fields.integer("latent_channels"),
            block_out_channels=channels,
            layers_per_block=fields.integer("layers_per_block"),
            norm_num_groups=fields.integer("norm_num_groups", 32),
            scaling_factor=fields.number("scaling_factor"),
            shift_factor=fields.number("shift_factor", 0.0, positive=False),
            sample_size=fields.integer("sample_size", 1024),
        )
        _require(config.in_channels == 3 and config.out_channels == 3, where, "images must have 3 channels")
        _require(
            all(c % config.norm_num_groups == 0 for c in channels),
            where,
            "every one of block_out_channels must be a multiple of norm_num_groups",
        )
        return config


@dataclass(frozen=True)
class SchedulerConfig:
    """The flow-matching Euler schedule (``FlowMatchEulerDiscreteScheduler``)."""

    shift: float
    num_train_timesteps: int

    @classmethod
    def read(cls, data: object, where: str) -> Self:
        """From ``scheduler/scheduler_config.json`` or a manifest."""
        fields = Fields(data, where)
        for key in (
            "use_dynamic_shifting",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "stochastic_sampling",
        ):
            _require(not fields.boolean(key, False), where, f"{key} is not supported")
        _require("shift_terminal" not in fields, where, "shift_terminal is not supported")
        return cls(shift=fields.number("shift", 3.0), num_train_timesteps=fields.integer("num_train_timesteps", 1000))


@dataclass(frozen=True)
class ModelConfig:
    """The configurations of all four parts, checked against each other."""

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig
    scheduler: SchedulerConfig

    @classmethod
    def read(cls, parts: Mapping[str, object], where: Mapping[str, str]) -> Self:
        """From the four JSON objects by part name, and the file that each came from."""
        config = cls(
            text_encoder=TextEncoderConfig.read(parts["text_encoder"], where["text_encoder"]),
            transformer=TransformerConfig.read(parts["transformer"], where["transformer"]),
            vae=VaeConfig.read(parts["vae"], where["vae"]),
            scheduler=SchedulerConfig.read(parts["scheduler"], where["scheduler"]),
        )
        _require(
            config.transformer.cap_feat_dim == config.text_encoder.hidden_size,
            where["transformer"],
            f"cap_feat_dim {config.transformer.cap_feat_dim} does not fit the text encoder's "
            f"hidden_size {config.text_encoder.hidden_size}",
        )
        _require(
            config.transformer.in_channels == config.vae.latent_channels,
            where["transformer"],
            f"in_channels {config.transformer.in_channels} does not fit the VAE's "
            f"latent_channels {config.vae.latent_channels}",
        )
        return config

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The four parts as JSON objects, by part name."""
        return asdict(self)


PARTS = ("text_encoder", "transformer", "vae", "scheduler")
"""The parts of a model that have a configuration."""
