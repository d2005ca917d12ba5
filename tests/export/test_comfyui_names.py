"""ComfyUI's names in both directions: what goes out comes back, and is what an independent converter writes."""

import pytest
import torch
from single_file_tools import Tensors, to_comfy_transformer, to_ldm_vae
from test_graphs_full_size import PUBLISHED

from zimage_export.synthetic.checkpoint import program_shapes
from zimage_runtime.model.comfyui_names import Rows, from_comfyui, is_pixelwise, to_comfyui
from zimage_runtime.model.linears import component_linears
from zimage_runtime.model.programs import COMPONENTS


def tensors(component: str) -> Tensors:
    return {name: torch.empty(shape, device="meta") for name, shape in program_shapes(PUBLISHED, component).items()}


@pytest.mark.parametrize("component", COMPONENTS)
def test_names_come_back(component: str) -> None:
    names = list(tensors(component))
    written = to_comfyui(component, names)
    assert sorted(part for parts in written.values() for part in parts) == sorted(names)
    read = from_comfyui(component, written)
    for theirs, parts in written.items():
        for index, ours in enumerate(parts):
            found = read[f"model.{ours}" if component == "text_encoder" else ours]
            assert found == Rows(theirs, index, len(parts))
    assert len(read) == len(names)


@pytest.mark.parametrize(("component", "convert"), [("transformer", to_comfy_transformer), ("vae", to_ldm_vae)])
def test_names_are_an_independent_converters(component: str, convert: object) -> None:
    own = tensors(component)
    assert callable(convert)
    expected = convert(own)
    assert set(to_comfyui(component, own)) == set(expected)
    assert set(from_comfyui(component, expected)) == set(own)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_diffusers_names_stay_what_they_are(component: str) -> None:
    names = list(tensors(component))
    assert from_comfyui(component, names) == {name: Rows(name) for name in names}


def test_three_projections_are_the_rows_of_one() -> None:
    parts = [f"layers.3.attention.to_{kind}.weight" for kind in "qkv"]
    assert to_comfyui("transformer", parts[1:]) == {"layers.3.attention.qkv.weight": tuple(parts)}
    fused = "layers.3.attention.qkv.weight"
    assert from_comfyui("transformer", [fused]) == {name: Rows(fused, i, 3) for i, name in enumerate(parts)}


def test_the_decoders_levels_are_counted_from_the_other_end() -> None:
    names = ["encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.1.resnets.0.conv1.weight"]
    names += ["decoder.up_blocks.0.upsamplers.0.conv.weight", "decoder.up_blocks.1.resnets.2.conv_shortcut.weight"]
    assert list(to_comfyui("vae", names)) == [
        "encoder.down.0.block.0.conv1.weight",
        "encoder.down.1.block.0.conv1.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.2.nin_shortcut.weight",
    ]


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_vaes_linears_are_convolutions_over_pixels(component: str) -> None:
    linears = {linear.weight for linear in component_linears(component, PUBLISHED)}
    pixelwise = {name for name in tensors(component) if is_pixelwise(component, name)}
    assert pixelwise == (linears if component == "vae" else set())
