"""The demo model's dimensions, and its parts as diffusers and transformers build them."""

from typing import Any

from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from zimage_export.synthetic.published_layout import text_encoder_config, transformer_config, vae_config
from zimage_runtime.model.config import ModelConfig, SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig

TINY = ModelConfig(
    text_encoder=TextEncoderConfig(
        hidden_size=128,
        num_hidden_layers=3,  # a picture uses the first two
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        vocab_size=704,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    transformer=TransformerConfig(
        dim=192,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=6,
        cap_feat_dim=128,
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
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,  # both from the latents' statistics, when there are latents
        shift_factor=0.0,
        sample_size=128,
    ),
    scheduler=SchedulerConfig(shift=3.0, num_train_timesteps=1000),
)
"""Six million parameters, the published architecture in every part."""


def new_autoencoder() -> Any:
    """An `AutoencoderKL` of random weights."""
    return AutoencoderKL(**vae_config(TINY.vae))


def new_text_encoder() -> Any:
    """A `Qwen3ForCausalLM` of random weights."""
    return Qwen3ForCausalLM(Qwen3Config(**text_encoder_config(TINY.text_encoder), initializer_range=0.05))


def new_transformer() -> Any:
    """A `ZImageTransformer2DModel` of random weights."""
    return ZImageTransformer2DModel(**transformer_config(TINY.transformer))
