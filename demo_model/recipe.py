"""From nothing to the demo checkpoint: tokenizer, VAE, latents, then text encoder and transformer together.

Each stage leaves a file in the working folder and is passed over when that is there; training itself goes on from
its last saved step. The same seed on the same machine gives the same weights, whatever number of processes help.
"""

from dataclasses import replace
from pathlib import Path

import torch

from zimage_export.output import replaced_directory
from zimage_export.synthetic.published_layout import write_configs, write_tokenizer_config

from .architecture import TINY, new_autoencoder, new_text_encoder, new_transformer
from .autoencoder import Reconstruction
from .dataset import statistics, write_latents
from .generator import Generator
from .scenes import Shape
from .training import Course, train
from .velocity import VelocityTask
from .vocabulary import write_tokenizer

VAE_COURSE = Course(steps=1400, microbatches=2, matrix_rate=0.01, vector_rate=2e-3, decay=0.6)
GENERATOR_COURSE = Course(steps=2100, microbatches=8, matrix_rate=0.02, vector_rate=2e-3, decay=0.5)
REFINING_COURSE = Course(steps=2200, microbatches=8, matrix_rate=0.014, vector_rate=1.4e-3, decay=1.0)
HARD: dict[Shape, float] = {"star": 1.8, "heart": 1.3, "ring": 1.2}
"""Shapes whose outlines the first course leaves the farthest off, and how much more often the second shows them."""
SCENES = 20000
SMALL_COURSE = Course(steps=4, microbatches=2, matrix_rate=0.01, vector_rate=1e-3, warmup=2)


def train_demo(work: Path, *, quick: bool = False) -> None:
    """Runs every stage in `work`; the checkpoint is ``work/checkpoint``. `quick` only shows that each stage runs."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = work / "tokenizer.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    vae_course, course, refining = (
        (SMALL_COURSE, SMALL_COURSE, SMALL_COURSE) if quick else (VAE_COURSE, GENERATOR_COURSE, REFINING_COURSE)
    )

    vae = new_autoencoder()
    ends = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    train(Reconstruction(vae, 8, whole_from=vae_course.steps * 4 // 5), vae_course, ends, work / "vae.pt")

    latents = work / "latents"
    if not latents.exists():
        with replaced_directory(latents) as folder:
            write_latents(vae.eval(), folder, 64 if quick else SCENES)
    mean, deviation = statistics(latents)

    generator = Generator(new_text_encoder(), new_transformer())
    generator.transformer.all_final_layer["2-1"].linear.weight.data.zero_()
    task = VelocityTask(generator, latents, tokenizer, mean, deviation, batch=8)
    train(task, course, _plain(generator), work / "generator.pt")
    task.first = course.steps  # other scenes, captions and noise than the first time
    task.emphasis = HARD
    train(task, refining, _plain(generator), work / "refined.pt")
    write_demo_checkpoint(generator, vae, tokenizer, mean, deviation, work / "checkpoint")


def _plain(generator: Generator) -> list[str]:
    """Matrices that are no maps between hidden states: tables, ends, and what the timestep passes through."""
    marks = ("embed_tokens", "embedder", "final_layer", "adaLN", "pad_token")
    return [name for name, p in generator.named_parameters() if any(mark in name for mark in marks) and p.ndim > 1]


def write_demo_checkpoint(
    generator: Generator, vae: torch.nn.Module, tokenizer: Path, mean: float, deviation: float, out: Path
) -> None:
    """Writes the three parts in diffusers' layout, bfloat16; replaces what is at `out`."""
    from safetensors.torch import save_file

    vae_config = replace(TINY.vae, scaling_factor=1 / deviation, shift_factor=mean)
    parts = {
        "transformer/diffusion_pytorch_model": generator.transformer.state_dict(),
        "text_encoder/model": generator.text_encoder.state_dict(),
        "vae/diffusion_pytorch_model": vae.state_dict(),
    }
    parts["text_encoder/model"].pop("lm_head.weight", None)  # tied to the embeddings
    with replaced_directory(out) as folder:
        write_configs(folder, replace(TINY, vae=vae_config))
        for name, state in parts.items():
            tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        write_tokenizer_config(folder / "tokenizer")
