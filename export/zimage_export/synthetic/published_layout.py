"""The files beside the weights of a checkpoint in diffusers' layout, as published."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zimage_runtime.model.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig

from .byte_tokenizer import chat_template


def text_encoder_config(config: TextEncoderConfig) -> dict[str, Any]:
    """The arguments of `transformers.Qwen3Config`, and the content of its ``config.json``."""
    return {
        **asdict(config),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def transformer_config(config: TransformerConfig) -> dict[str, Any]:
    """The arguments of `diffusers.ZImageTransformer2DModel`."""
    return {
        **asdict(config),
        "n_kv_heads": config.n_heads,
        "qk_norm": True,
        "all_patch_size": [2],
        "all_f_patch_size": [1],
    }


def vae_config(config: VaeConfig) -> dict[str, Any]:
    """The arguments of `diffusers.AutoencoderKL`."""
    levels = len(config.block_out_channels)
    return {
        **asdict(config),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def write_configs(folder: Path, config: ModelConfig) -> None:
    """Writes ``model_index.json`` and the configuration of each part."""
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    transformer = {"_class_name": "ZImageTransformer2DModel", **transformer_config(config.transformer)}
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": False,
        **asdict(config.scheduler),
    }
    write_json(folder / "transformer" / "config.json", transformer)
    write_json(folder / "text_encoder" / "config.json", text_encoder_config(config.text_encoder))
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **vae_config(config.vae)})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def write_tokenizer_config(folder: Path) -> None:
    """Writes the configuration file beside ``tokenizer.json``."""
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": chat_template(),
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 131072,
        },
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes `data`, and creates its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
