"""Training of the demo model's ControlNet: its batched pass is diffusers' own, maps show the outlines, and an
interrupted training goes on to the same bits."""

import pytest
import torch
from diffusers import ZImageControlNetModel

from demo_model.architecture import new_text_encoder, new_transformer
from demo_model.control_layers import Controlled, new_controlnet

pytestmark = pytest.mark.deep


@pytest.mark.parametrize(
    ("height", "width", "length", "padded"), [(16, 16, 20, 32), (24, 16, 40, 64), (16, 18, 32, 32)]
)
def test_the_batched_pass_is_that_of_diffusers(height: int, width: int, length: int, padded: int) -> None:
    torch.manual_seed(1)
    model = Controlled(new_text_encoder(), new_transformer(), new_controlnet()).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1  # away from their neutral values
    latents, control = torch.randn(2, 16, height, width), torch.randn(2, 33, height, width)
    times = torch.tensor([0.3, 0.7])
    tokens = torch.randint(0, 700, (2, padded))
    with torch.no_grad():
        ours = model(latents, times, tokens, torch.tensor([length, length]), control, 0.8)
        text = model.text_encoder.model(input_ids=tokens[:, :length], output_hidden_states=True).hidden_states[-2]
        theirs = ZImageControlNetModel.from_transformer(model.controlnet, model.transformer)
        images = list(latents[:, :, None])
        hints = theirs(images, times, list(text), list(control[:, :, None]), conditioning_scale=0.8)
        out = model.transformer(images, times, list(text), controlnet_block_samples=hints, return_dict=False)[0]
        without = model.transformer(images, times, list(text), return_dict=False)[0]
    expected = torch.stack(out)[:, :, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert float((expected - torch.stack(without)[:, :, 0]).abs().max()) > 0.1
