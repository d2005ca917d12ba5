"""The one statement of the model's blocks against diffusers' and transformers' own modules, at the published size."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_graphs_full_size import PUBLISHED
from torch import nn

from zimage_export.storage.precision import FLOAT32_LINEARS, Encoding, StoragePolicy
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.rebalancing import PLACES
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.blocks import (
    BlockPlace,
    all_blocks,
    convolutions,
    layer_blocks,
    modulated_blocks,
    program_blocks,
)
from zimage_runtime.model.linears import (
    LAYER_LINEARS,
    Linear,
    block_linears,
    layer_linears,
    modulation_linears,
)
from zimage_runtime.model.norms import Norm, NormKind, block_norms
from zimage_runtime.model.programs import COMPONENTS, MODEL_PROGRAMS, Program

pytestmark = pytest.mark.deep

Modules = dict[str, nn.Module]


def places(component: str) -> list[BlockPlace]:
    programs = [program for program in MODEL_PROGRAMS if program.component == component]
    return [place for program in programs for place in program_blocks(program, PUBLISHED)]


def stated_linears(component: str) -> list[Linear]:
    """Under their names in the component."""
    found = [replace(one, name=p.tensor(one.name)) for p in places(component) for one in block_linears(p, PUBLISHED)]
    if component != "transformer":
        return found
    modulation = modulation_linears(PUBLISHED)
    return [*found, modulation.hidden, modulation.embedding, *modulation.blocks, modulation.final]


def stated_norms(component: str) -> list[Norm]:
    return [replace(one, name=p.tensor(one.name)) for p in places(component) for one in block_norms(p, PUBLISHED)]


def transformer() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(axes_lens=[1536, 512, 512])


def text_encoder() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    c = PUBLISHED.text_encoder
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: getattr(c, name) for name in (*names, "intermediate_size", "vocab_size")}
    return Qwen3Model(Qwen3Config(**sizes))


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    c = PUBLISHED.vae
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        latent_channels=c.latent_channels,
        norm_num_groups=c.norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@pytest.fixture(scope="module")
def modules() -> dict[str, Modules]:
    """Every module of each component that a bundle uses, by its name."""
    with torch.device("meta"):
        built = {"transformer": transformer(), "text_encoder": text_encoder(), "vae": vae()}
    found = {component: dict(model.named_modules()) for component, model in built.items()}
    unused = ("layers.35", "norm")  # hidden_states[-2] is taken before the last layer and the final norm
    found["text_encoder"] = {n: m for n, m in found["text_encoder"].items() if not n.startswith(unused)}
    return found


@pytest.mark.parametrize("component", COMPONENTS)
def test_linears_are_the_published_ones(modules: dict[str, Modules], component: str) -> None:
    published = {
        Linear(name, m.out_features, m.in_features, m.bias is not None)
        for name, m in modules[component].items()
        if isinstance(m, nn.Linear)
    }
    stated = stated_linears(component)
    assert len(stated) == len(set(stated)) == {"transformer": 276, "text_encoder": 245, "vae": 8}[component]
    assert set(stated) == published


def published_norm(name: str, module: Any) -> Norm | None:
    if isinstance(module, nn.GroupNorm):
        return Norm(name, module.num_channels, module.eps, NormKind.GROUP, module.num_groups)
    if isinstance(module, nn.LayerNorm):
        assert not module.elementwise_affine
        return Norm(name, module.normalized_shape[0], module.eps, NormKind.LAYER)
    if "RMSNorm" in type(module).__name__:
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return Norm(name, module.weight.shape[0], epsilon)
    return None


@pytest.mark.parametrize("component", COMPONENTS)
def test_norms_are_the_published_ones(modules: dict[str, Modules], component: str) -> None:
    published = {n for name, module in modules[component].items() if (n := published_norm(name, module))}
    stated = stated_norms(component)
    assert len(stated) == len(set(stated)) == {"transformer": 206, "text_encoder": 140, "vae": 52}[component]
    assert set(stated) == published


def test_convolutions_are_the_published_ones(modules: dict[str, Modules]) -> None:
    published = {
        name: (m.out_channels, m.in_channels, m.kernel_size, m.stride)
        for name, m in modules["vae"].items()
        if isinstance(m, nn.Conv2d)
    }
    stated = {
        place.tensor(c.name): (c.out_channels, c.in_channels, (c.side, c.side), (c.stride, c.stride))
        for program in (Program.DECODER, Program.ENCODER)
        for place in program_blocks(program, PUBLISHED)
        for c in convolutions(place)
    }
    assert stated == published


def test_blocks_of_the_autoencoder_follow_on_each_other() -> None:
    """What one gives is what the next one takes, in channels and in rows."""
    for program, first, last in ((Program.DECODER, 1, 8), (Program.ENCODER, 8, 1)):
        chain = program_blocks(program, PUBLISHED)
        assert (chain[0].scale, chain[-1].out_scale) == (first, last)
        for before, after in pairwise(chain):
            assert (before.out_channels, before.out_scale) == (after.channels, after.scale), (before, after)


def test_layers_are_the_published_blocks(modules: dict[str, Modules]) -> None:
    for component, kind in (("transformer", "ZImageTransformerBlock"), ("text_encoder", "Qwen3DecoderLayer")):
        published = {name for name, module in modules[component].items() if type(module).__name__ == kind}
        assert {place.name for place in layer_blocks(component, PUBLISHED)} == published
    modulated = {name for name, m in modules["transformer"].items() if getattr(m, "modulation", False)}
    assert {place.name for place in modulated_blocks(PUBLISHED)} == modulated
    assert len(modulation_linears(PUBLISHED).blocks) == len(modulated) == PUBLISHED.transformer.modulated_blocks


def test_linears_by_role_do_what_the_role_says(modules: dict[str, Modules]) -> None:
    """Roles by what the modules themselves call their parts, so that no gate passes for an up projection."""
    attention, mlp = (modules["text_encoder"][f"layers.0.{name}"] for name in ("self_attn", "mlp"))
    text = LAYER_LINEARS["text_encoder"]
    blocks = {"self_attn": attention, "mlp": mlp}
    for role, attribute in (("query", "q_proj"), ("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        scope, _, name = getattr(text, role).partition(".")
        assert name == attribute
        assert getattr(blocks[scope], attribute) is modules["text_encoder"][f"layers.0.{getattr(text, role)}"]
    # diffusers: w2(silu(w1(x)) * w3(x))
    feed_forward = modules["transformer"]["layers.0.feed_forward"]
    with torch.device("cpu"):
        small = type(feed_forward)(8, 12)
    names = LAYER_LINEARS["transformer"]
    gate, up, down = (small.get_submodule(n.removeprefix("feed_forward.")) for n in (names.gate, names.up, names.down))
    x = torch.randn(3, 8)
    assert torch.allclose(small(x), down(nn.functional.silu(gate(x)) * up(x)))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_what_is_quantized_rebalanced_and_kept_is_a_linear_of_the_statement(component: str) -> None:
    stated = {linear.weight for linear in stated_linears(component)}
    policy = StoragePolicy(Precision.INT8)
    quantized = {name for name in stated if policy.encoding(component, name) is Encoding.INT8}
    in_layers = {
        place.tensor(linear.weight)
        for place in layer_blocks(component, PUBLISHED)
        for linear in layer_linears(component, PUBLISHED)
    }
    assert quantized == in_layers
    others = {name for name in stated - quantized if "adaLN_modulation" not in name or "final" in name}
    assert all(name.startswith(FLOAT32_LINEARS) for name in others)
    assert all(StoragePolicy(Precision.FP16).storage(component, name, (1, 1)) is DType.F32 for name in others)
    readers = [reader for place in PLACES[component] for reader in place.readers]
    assert sorted(readers) == sorted(linear.weight for linear in layer_linears(component, PUBLISHED))
    norms = {norm.weight for norm in block_norms(layer_blocks(component, PUBLISHED)[0], PUBLISHED)}
    assert {place.maker for place in PLACES[component]} <= norms | set(readers)


def test_tiles_are_the_decoders_wide_convolutions(modules: dict[str, Modules]) -> None:
    wide = {
        name
        for name, m in modules["vae"].items()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and name.startswith("decoder.")
    }
    every = list(all_blocks(PUBLISHED))
    assert len({place.key for place in every}) == len(every)
    assert {place.name for place in every if place.kind == "decoder_tile"} == wide
