"""What the runtime restates in numpy, against the original: the scheduler, torch's noise, transformers' tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zimage_runtime.model.config import SchedulerConfig
from zimage_runtime.model.noise import TorchGenerator
from zimage_runtime.model.schedule import make_schedule
from zimage_runtime.model.tokenizer import MAX_PROMPT_TOKENS, PromptTokenizer

# Schedule


@pytest.mark.deep
@pytest.mark.parametrize("shift", [3.0, 6.0, 1.0])
@pytest.mark.parametrize("steps", [*range(1, 21), 50])
def test_sigmas_and_timesteps(steps: int, shift: float) -> None:
    """Equal to the last bit or two: how torch rounds `linspace` depends on the CPU's vector width."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist())
    found = make_schedule(steps, SchedulerConfig(shift=shift, num_train_timesteps=1000))
    assert found.steps == steps
    np.testing.assert_allclose(found.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=2e-7)
    np.testing.assert_allclose(found.timesteps, ((1000 - scheduler.timesteps) / 1000).numpy(), rtol=0, atol=2e-7)


@pytest.mark.deep
def test_a_step_is_the_schedulers_step() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / 8, 8).tolist())
    schedule = make_schedule(8, SchedulerConfig(shift=3.0, num_train_timesteps=1000))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 16, 8, 8), dtype=np.float32)
    expected = torch.from_numpy(latents)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = rng.standard_normal(latents.shape, dtype=np.float32)
        latents = latents + schedule.step_size(index) * velocity
        expected = scheduler.step(torch.from_numpy(velocity), timestep, expected, return_dict=False)[0]
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=2e-6)


# Noise

# The last two hold no multiple of 16 values, of which torch draws the last 16 again
SHAPES = [(1, 16, 8, 8), (1, 16, 14, 10), (16,), (31,), (3, 7, 11)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**63 + 1, 2**64 - 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise(seed: int, shape: tuple[int, ...]) -> None:
    found = TorchGenerator(seed).normals(shape)
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-7, atol=3e-7)


def test_noise_of_two_draws_in_a_row() -> None:
    ours, theirs = TorchGenerator(11), torch.Generator("cpu").manual_seed(11)
    for shape in ((1, 16, 6, 10), (35,), (1, 16, 6, 10)):
        expected = torch.randn(shape, generator=theirs)
        np.testing.assert_allclose(ours.normals(shape), expected.numpy(), rtol=3e-7, atol=3e-7)


def test_noise_in_the_large() -> None:
    """A million values; torch vectorizes its transform, so the last bit may differ, and no more."""
    found = TorchGenerator(3).normals((1, 16, 256, 256))
    expected = torch.randn((1, 16, 256, 256), generator=torch.Generator("cpu").manual_seed(3)).numpy()
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)


# Tokens

PROMPTS = [
    "",
    " ",
    "\n",
    "a red fox in the snow",
    "  two  spaces, a\ttab,\r\nand a line",
    "雪地里的一只红狐狸，黄昏的光线",
    "日本語 한국어 العربية हिन्दी",
    "a 🦊 and a 👩‍🚀 under a 🌈",
    "Cafe\u0301 Å ﬁ ½",  # composed by the normalizer, or not
    "a <|im_end|> b <|endoftext|> c",
    "<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nyes",
    "<think>\n\n</think> {{ jinja }} {% raw %}",
    "3.14159 1234567890 it's WE'LL",
    "zero\u200bwidth \x00 \x7f",
    "a long walk through the old town, " * 40,
    "长" * 700,
    "<|endoftext|>" * 600,
]


def reference_ids(tokenizer: Any, prompt: str) -> list[int]:
    """As in ``_encode_prompt`` of ``pipeline_z_image.py``."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    encoded = tokenizer([text], padding="max_length", max_length=512, truncation=True, return_tensors="np")
    return encoded.input_ids[0][encoded.attention_mask[0].astype(bool)].tolist()


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["checkpoint", "qwen_checkpoint"])
def test_token_ids(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(kind) / "tokenizer"
    reference = AutoTokenizer.from_pretrained(folder)
    tokenizer = PromptTokenizer(folder / "tokenizer.json")
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt) == reference_ids(reference, prompt), repr(prompt)


@pytest.mark.parametrize("kind", ["checkpoint", "qwen_checkpoint"])
def test_the_cut_is_counted(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = PromptTokenizer(request.getfixturevalue(kind) / "tokenizer" / "tokenizer.json")
    template = len(tokenizer.encode(""))
    ids, cut = tokenizer.encode_counted("<|endoftext|>" * 600)
    assert (len(ids), cut) == (MAX_PROMPT_TOKENS, 600 + template - MAX_PROMPT_TOKENS)
    ids, cut = tokenizer.encode_counted("<|endoftext|>" * (MAX_PROMPT_TOKENS - template))
    assert (len(ids), cut) == (MAX_PROMPT_TOKENS, 0)


def test_the_published_templates_text_is_known_by_its_ids(qwen_tokenizer: Path) -> None:
    """The published tokenizer's own ids, so that both sides cannot be wrong together."""
    im_start, im_end, user, assistant, newline = 151644, 151645, 872, 77091, 198
    found = PromptTokenizer(qwen_tokenizer).encode("")
    assert found == [im_start, user, newline, im_end, newline, im_start, assistant, newline]
