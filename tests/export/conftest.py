"""What the tests of single files share: a checkpoint, and ComfyUI's files of it and of the published widths.

All are made once a session and must not be written to; a test that alters one works on a copy.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file_tools import PARTS, Tensors, to_comfy_transformer, to_ldm_vae, write_headers

from zimage_export.source.single_files import SingleFiles
from zimage_export.synthetic.checkpoint import SMALL, Scale, write_checkpoint

PUBLISHED_HEADS = replace(SMALL.config.transformer, dim=256, n_heads=2, n_layers=2, axes_dims=(32, 48, 48))
"""Narrow, but with heads of the published width, so that the configuration can be read off the shapes."""


@pytest.fixture(scope="session")
def single_files_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint whose transformer has heads of the published width."""
    out = tmp_path_factory.mktemp("single") / "base-model"
    config = replace(SMALL.config, transformer=PUBLISHED_HEADS, vae=replace(SMALL.config.vae, sample_size=32))
    write_checkpoint(out, Scale(config))
    return out


@pytest.fixture(scope="session")
def stored(single_files_model: Path) -> dict[str, Tensors]:
    """The checkpoint's tensors by component, under diffusers' names."""
    return {
        part: {
            k: v
            for path in sorted((single_files_model / part).glob("*.safetensors"))
            for k, v in load_file(path).items()
        }
        for part in PARTS
    }


@pytest.fixture(scope="session")
def comfy(stored: dict[str, Tensors], tmp_path_factory: pytest.TempPathFactory) -> SingleFiles:
    """The same tensors in ComfyUI's files."""
    folder = tmp_path_factory.mktemp("comfy")
    paths = [folder / name for name in ("my_finetune.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")]
    save_file(to_comfy_transformer(stored["transformer"]), paths[0])
    save_file({**stored["text_encoder"], "lm_head.weight": torch.zeros(2, 2)}, paths[1])
    save_file(to_ldm_vae(stored["vae"]), paths[2])
    return SingleFiles(*paths)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> SingleFiles:
    """Files of the published widths, fewer layers and no data, beside a tokenizer's folder."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(n_layers=3, n_refiner_layers=2)  # the defaults are the published sizes
        qwen = Qwen3Config(
            hidden_size=2560,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=9728,
            vocab_size=151936,
            tie_word_embeddings=True,
        )
        text_encoder = Qwen3ForCausalLM(qwen)
        vae = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    states = {
        "transformer": to_comfy_transformer(transformer.state_dict()),
        "text_encoder": text_encoder.state_dict(),
        "vae": to_ldm_vae(vae.state_dict()),
    }
    paths = {
        part: write_headers(folder / f"{part}.safetensors", {k: ("BF16", tuple(v.shape)) for k, v in state.items()})
        for part, state in states.items()
    }
    return SingleFiles(**paths)
