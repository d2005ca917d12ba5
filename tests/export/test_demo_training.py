"""Training of the demo model: its batched passes are diffusers' own, and its steps do not depend on who computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from facts import raises_with
from fitting import Failing, Fitting
from torch import Tensor

from demo_model.architecture import new_text_encoder, new_transformer
from demo_model.dataset import SIZES, scene_of
from demo_model.generator import Generator, encode_text
from demo_model.muon import MuonAdamW, orthogonal
from demo_model.training import Course, train
from demo_model.velocity import VelocityTask, shares
from demo_model.workers import gradient_workers
from zimage_export.source.checkpoint import DEMO

pytestmark = pytest.mark.deep

COURSE = Course(steps=6, microbatches=4, matrix_rate=0.02, vector_rate=1e-2, warmup=2)


@pytest.mark.parametrize(
    ("height", "width", "length", "padded"), [(16, 16, 20, 32), (24, 24, 32, 32), (16, 24, 40, 64)]
)
def test_the_batched_pass_is_that_of_diffusers(height: int, width: int, length: int, padded: int) -> None:
    torch.manual_seed(1)
    generator = Generator(new_text_encoder(), new_transformer()).eval()
    for name, p in generator.named_parameters():
        if p.ndim == 1 or "pad_token" in name:  # away from their neutral values
            p.data += torch.randn_like(p) * (1 if "pad_token" in name else 0.1)
    latents, times = torch.randn(2, 16, height, width), torch.tensor([0.3, 0.7])
    tokens = torch.randint(0, 700, (2, padded))
    with torch.no_grad():
        ours = generator(latents, times, tokens, torch.tensor([length, length]))
        text = generator.text_encoder.model(input_ids=tokens[:, :length], output_hidden_states=True).hidden_states[-2]
        theirs = generator.transformer(list(latents[:, :, None]), times, list(text), return_dict=False)[0]
        torch.testing.assert_close(encode_text(generator.text_encoder, tokens)[:, :length], text, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, torch.stack(theirs)[:, :, 0], rtol=0, atol=1e-5)


def test_orthogonal_keeps_directions_and_evens_out_lengths() -> None:
    torch.manual_seed(2)
    for shape in ((3, 20, 50), (2, 50, 20)):
        given = torch.randn(shape)
        left, _, right = torch.linalg.svd(given, full_matrices=False)
        stretch = left.transpose(1, 2) @ orthogonal(given) @ right.transpose(1, 2)
        values = stretch.diagonal(dim1=1, dim2=2)
        assert float(values.min()) > 0.4  # Newton-Schulz stops near one, not at it
        assert float(values.max()) < 1.3
        assert float((stretch - torch.diag_embed(values)).abs().max()) < 1e-3


def test_muon_descends() -> None:
    task = Fitting()
    parameters = dict(task.model.named_parameters())
    optimizer = MuonAdamW(parameters, [], 0.02, 1e-2)
    losses = []
    for _ in range(60):
        task.model.zero_grad()
        loss = task.loss(0, 0)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(1.0)
    assert losses[-1] < 0.3 * losses[0]


def trained(state: Path, course: Course = COURSE, processes: int | None = None) -> dict[str, Tensor]:
    task = Fitting()
    train(task, course, [], state, every=2, processes=processes)
    return dict(task.model.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process trains without an interruption."""
    return trained(tmp_path_factory.mktemp("training") / "whole.pt", processes=1)


def test_one_process_or_two_train_to_the_same_bits(whole: dict[str, Tensor], tmp_path: Path) -> None:
    two = trained(tmp_path / "two.pt", processes=2)
    assert all(torch.equal(whole[name], two[name]) for name in whole)
    assert not torch.equal(whole["0.weight"], Fitting().model[0].weight)


def test_an_interrupted_course_goes_on_to_the_same_bits(
    whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = MuonAdamW.step, []

    def failing(self: MuonAdamW, scale: float) -> None:
        calls.append(scale)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, scale)

    monkeypatch.setattr(MuonAdamW, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", processes=1)
    again = trained(tmp_path / "cut.pt", processes=1)
    assert len(calls) == 4 + 4  # from the save at step 2 on
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_failure_in_a_worker_ends_the_training() -> None:
    with raises_with(RuntimeError, "ValueError", "no such scene"), gradient_workers(Failing(), 2, 1) as gradients:
        gradients(0)


def test_gradients_are_those_of_the_whole_batch() -> None:
    task = Fitting()
    with gradient_workers(task, 4, 2) as gradients:
        loss = gradients(3)
    found = [p.grad.clone() for p in task.model.parameters()]
    whole = torch.stack([task.loss(3, index) for index in range(4)]).mean()
    expected = torch.autograd.grad(whole, list(task.model.parameters()))
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


def test_a_shape_that_is_emphasized_is_drawn_more_often() -> None:
    scenes = [scene_of((128, 128), row) for row in range(40)]
    starry = np.array([any(thing.shape == "star" for thing in scene.things) for scene in scenes])
    found = shares(scenes, {"star": 3.0})
    assert found.sum() == pytest.approx(1)
    assert found[starry].min() == pytest.approx(3 * found[~starry].max())
    assert np.ptp(found[~starry]) == 0


def test_a_second_course_goes_on_where_the_examples_of_the_first_ended(tmp_path: Path) -> None:
    for width, height in SIZES:
        np.save(tmp_path / f"latents-{width}x{height}.npy", np.ones((9, 16, height // 8, width // 8), np.float16))
    task = VelocityTask(torch.nn.Identity(), tmp_path, DEMO / "tokenizer" / "tokenizer.json", 0.0, 1.0, batch=4)
    seen: list[Tensor] = []

    def model(mixed: Tensor, times: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        seen.extend((mixed, tokens))
        return mixed

    task.model = model
    task.loss(7, 1)
    task.first = 5
    task.loss(2, 1)
    assert all(torch.equal(one, other) for one, other in zip(seen[:2], seen[2:], strict=True))
