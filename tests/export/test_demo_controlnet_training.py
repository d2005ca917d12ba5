"""Training of the demo model's ControlNet: its batched pass is diffusers' own, captions keep places to the map, and an
interrupted training goes on to the same bits."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageControlNetModel
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor
from torch.nn import functional

from demo_model import training
from demo_model.architecture import new_text_encoder, new_transformer
from demo_model.captions import caption
from demo_model.control_data import control_mask, control_scene, examples_of, write_examples
from demo_model.control_layers import Controlled, copy_blocks, new_controlnet
from demo_model.controlnet import ControlTask, controlled_demo
from demo_model.dataset import SIZES
from demo_model.edges import edge_map, inside, placed_scene
from demo_model.muon import MuonAdamW
from demo_model.scenes import SHAPES, Scene, Thing, draw
from demo_model.training import Course, train
from zimage_export.source.checkpoint import DEMO

pytestmark = pytest.mark.deep

PLACE_WORDS = ("left", "right", "top", "bottom", "above", "below", "under", "middle")
COURSE = Course(steps=2, microbatches=1, matrix_rate=0.01, vector_rate=1e-3, warmup=2)


@pytest.mark.parametrize(("height", "width", "length", "padded"), [(16, 16, 20, 32), (16, 18, 40, 64)])
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


def test_before_training_nothing_is_added() -> None:
    torch.manual_seed(2)
    transformer, net = new_transformer(), new_controlnet()
    copy_blocks(net, transformer)
    model = Controlled(new_text_encoder(), transformer, net)
    tokens, times, lengths = torch.randint(0, 700, (1, 32)), torch.tensor([0.4]), torch.tensor([9])
    latents, control = torch.randn(1, 16, 8, 8), torch.randn(1, 33, 8, 8)
    with torch.no_grad():
        one, other = (model(latents, times, tokens, lengths, c, 1.0) for c in (control, -control))
        assert torch.equal(one, other)
        image = torch.randn(3, 4, 16)  # pixels of a patch, channels
        wide = torch.cat([image, torch.randn(3, 4, 17)], dim=2)
        read = net.control_all_x_embedder["2-1"](wide.flatten(1))
        torch.testing.assert_close(read, transformer.all_x_embedder["2-1"](image.flatten(1)))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"controlnet.{name}" for name in net.state_dict()}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_map_shows_the_edges_that_pillow_finds(shape: Any) -> None:
    thing = Thing(shape, "red", 0.4, 0.55, 0.3, 5.0)
    lines = Image.fromarray(edge_map(Scene((thing,), ("white",)), (160, 128))[..., 0] > 0.4)
    filled = Image.fromarray(inside(thing, (160, 128))).convert("L")
    edges = ImageChops.difference(filled, filled.filter(ImageFilter.MinFilter(3)))
    for one, other in ((lines.convert("L"), edges), (edges, lines.convert("L"))):
        near = np.asarray(other.filter(ImageFilter.MaxFilter(3))) > 0
        assert np.mean(near[np.asarray(one) > 0]) > 0.97


@pytest.mark.parametrize("size", [(128, 128), (192, 128)])
def test_things_stand_anywhere_apart_and_captions_do_not_mention_it(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    centres = []
    for _ in range(120):
        scene = placed_scene(rng, size)
        covered = np.stack([inside(thing, size) for thing in scene.things])
        assert covered.sum(axis=0).max() == 1
        assert not covered.any(axis=0)[[0, -1]].any()
        assert not covered.any(axis=0)[:, [0, -1]].any()
        text = f" {caption(scene, 'en', rng)} ".lower()
        assert not [word for word in PLACE_WORDS if f" {word}" in text]
        centres.extend((thing.x, thing.y) for thing in scene.things)
    assert np.min(centres) < 0.25
    assert np.max(centres) > 0.75


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each size, encoded by the demo model's own VAE."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("control") / "examples"
    write_examples(AutoencoderKL.from_pretrained(DEMO / "vae").float().eval(), folder, 6)
    return folder


def test_examples_are_encoded_as_diffusers_encodes_them(examples: Path) -> None:
    from diffusers import AutoencoderKL

    vae, size, row = AutoencoderKL.from_pretrained(DEMO / "vae").float().eval(), (192, 128), 0
    clean, _, rest = torch.from_numpy(examples_of(examples, size)[row].astype(np.float32))
    picture = torch.from_numpy(draw(control_scene(size, row), *size)).permute(2, 0, 1)[None] * 2 - 1
    mask = torch.from_numpy(control_mask(size, row))
    for found, image in ((clean, picture), (rest, picture * ~mask)):
        with torch.no_grad():
            mode = vae.encode(image).latent_dist.mode()[0]
        expected = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)  # stored in float16
    assert mask.any()
    assert not mask.all()


def test_a_part_of_the_examples_has_the_channels_for_inpainting(examples: Path) -> None:
    seen: list[Tensor] = []

    def model(mixed: Tensor, times: Tensor, tokens: Tensor, lengths: Tensor, control: Tensor, scale: float) -> Tensor:
        seen.append(control)
        assert 0.65 <= scale <= 1.0
        return mixed

    task = ControlTask(model, examples, batch=8)  # type: ignore[arg-type]
    for step in range(8):
        task.loss(step, 0)
    given = [(one[16], one[17:]) for batch in seen for one in batch]
    used = [bool(mask.any() or rest.any()) for mask, rest in given]
    assert 0.1 < np.mean(used) < 0.5
    sizes = {(width // 8, height // 8): (width, height) for width, height in SIZES}
    for (mask, rest), is_used in zip(given, used, strict=True):
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        if is_used:
            assert rest.any()
            size = sizes[mask.shape[1], mask.shape[0]]
            rows = len(examples_of(examples, size))
            wanted = [torch.from_numpy(~control_mask(size, row)).float()[None, None] for row in range(rows)]
            near = [functional.interpolate(one, size=mask.shape, mode="nearest")[0, 0] for one in wanted]
            assert any(torch.equal(mask, one) for one in near)


class InProcess:
    """Gradients without workers, which would import everything again."""

    def __init__(self, task: Any, microbatches: int) -> None:
        self.task, self.microbatches = task, microbatches

    def __call__(self, step: int) -> float:
        loss = torch.stack([self.task.loss(step, index) for index in range(self.microbatches)]).mean()
        parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = torch.zeros_like(p) if gradient is None else gradient
        return float(loss.detach())


@contextmanager
def in_process(task: Any, microbatches: int, _processes: int | None) -> Iterator[InProcess]:
    yield InProcess(task, microbatches)


def test_an_interrupted_training_goes_on_to_the_same_bits(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "gradient_workers", in_process)
    real, calls = MuonAdamW.step, []

    def trained(state: Path, cut: int | None = None) -> dict[str, Tensor]:
        def step(self: MuonAdamW, scale: float) -> None:
            calls.append(scale)
            if len(calls) == cut:
                raise KeyboardInterrupt
            real(self, scale)

        calls.clear()
        monkeypatch.setattr(MuonAdamW, "step", step)
        model = controlled_demo()
        train(ControlTask(model, examples, batch=2), COURSE, [], state, every=1)
        return dict(model.controlnet.state_dict())

    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", cut=2)
    again = trained(tmp_path / "cut.pt")
    assert len(calls) == 1  # the first of two steps was saved
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not torch.equal(whole["control_layers.0.after_proj.weight"], torch.zeros(192, 192))


@pytest.mark.slow
def test_killed_twice_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL while examples are encoded, and again between two saves."""
    command = [sys.executable, "-m", "demo_model.controlnet", "--quick"]

    def killed_when(ready: Callable[[], bool]) -> None:
        process = subprocess.Popen([*command, str(tmp_path / "cut")])
        try:
            while not ready():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    killed_when(lambda: any((tmp_path / "cut").glob(".examples.*")))
    assert not (tmp_path / "cut" / "examples").exists()
    killed_when(lambda: (tmp_path / "cut" / "controlnet.pt").exists())
    assert not (tmp_path / "cut" / "controlnet").exists()
    for name in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True)
    tensors = [(tmp_path / name / "controlnet" / "diffusion_pytorch_model.safetensors") for name in ("cut", "whole")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
