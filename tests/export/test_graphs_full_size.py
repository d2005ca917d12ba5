"""The graphs at the published size, without any weights: names, shapes, counts, and small files."""

import math
from typing import Any

import pytest
from onnx import TensorProto

from zimage_export.graphs import Graph, build_graphs
from zimage_runtime.bundle.tensors import TensorEntry
from zimage_runtime.model.config import ModelConfig, SchedulerConfig, TextEncoderConfig, TransformerConfig, VaeConfig

PUBLISHED = ModelConfig(
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
"""Tongyi-MAI/Z-Image-Turbo."""

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    return build_graphs(PUBLISHED)


def weights(graphs: list[Graph], component: str) -> Shapes:
    return {name: shape for g in graphs if g.program.component == component for name, shape in g.weights.items()}


def shapes_of(model_class: Any, *args: Any, **kwargs: Any) -> Shapes:
    import torch

    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in model_class(*args, **kwargs).state_dict().items()}


def test_transformer_weights(graphs: list[Graph]) -> None:
    from diffusers import ZImageTransformer2DModel

    found = weights(graphs, "transformer")
    assert len(found) == 521
    assert sum(math.prod(shape) for shape in found.values()) == 6_154_908_736
    assert found == shapes_of(ZImageTransformer2DModel, axes_lens=[1536, 512, 512])


def test_text_encoder_weights(graphs: list[Graph]) -> None:
    from transformers import Qwen3Config, Qwen3Model

    c = PUBLISHED.text_encoder
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = Qwen3Config(
        **{name: getattr(c, name) for name in names}, intermediate_size=c.intermediate_size, vocab_size=c.vocab_size
    )
    published = shapes_of(Qwen3Model, config)
    assert len(published) == 398
    unused = {n for n in published if n.startswith("layers.35.")} | {"norm.weight", "embed_tokens.weight"}
    assert weights(graphs, "text_encoder") == {n: s for n, s in published.items() if n not in unused}


def test_vae_weights(graphs: list[Graph]) -> None:
    from diffusers import AutoencoderKL

    found = weights(graphs, "vae")
    assert len(found) == 244
    assert found == shapes_of(
        AutoencoderKL,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=PUBLISHED.vae.block_out_channels,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def test_programs_are_small(graphs: list[Graph]) -> None:
    for graph in graphs:
        entries, offset = {}, 0
        for name, shape in graph.weights.items():
            nbytes = 4 * math.prod(shape)
            entries[name] = TensorEntry("F32", shape, offset, nbytes)
            offset += nbytes
        model = graph.to_model("weights.safetensors", entries)
        size = len(model.SerializeToString())
        assert size < 3_000_000, f"{graph.program} takes {size} bytes"
        outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        assert {t.name for t in outside} == set(graph.weights)
