"""``python -m demo_model.controlnet WORK``: trains the demo model's ControlNet, or goes on training it.

The demo model stays as it is. Scenes stand anywhere in the picture, captions do not mention where, and the map shows
their outlines. The loss is the demo model's own. Each stage leaves a file in the working folder and is passed over
when that is there; training goes on from its last saved step, to the same bits.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zimage_export.output import replaced_directory
from zimage_export.source.checkpoint import DEMO
from zimage_runtime.model.tokenizer import PromptTokenizer

from .captions import caption
from .control_data import control_mask, control_scene, examples_of, write_examples
from .control_layers import Controlled, copy_blocks, new_controlnet
from .dataset import SIZES
from .training import Course, train
from .velocity import VelocityTask

COURSE = Course(steps=500, microbatches=4, matrix_rate=0.01, vector_rate=1e-3, decay=0.6)
SMALL_COURSE = Course(steps=6, microbatches=2, matrix_rate=0.01, vector_rate=1e-3, warmup=2)
SCENES = 6000
SCALES = 0.65, 1.0
"""What hints are multiplied by in training: the range that users are advised to choose from."""
INPAINTING = 0.3
"""The share of examples in which a part is painted and the rest is given."""


class ControlTask:
    """The demo model's loss with a map beside the caption."""

    def __init__(self, model: Controlled, examples: Path, batch: int) -> None:
        self.model: Any = model
        self.examples, self.batch = examples, batch
        self._rows: dict[tuple[int, int], NDArray[np.float16]] = {}
        self._words: PromptTokenizer | None = None

    def loss(self, step: int, index: int) -> Tensor:
        """As `workers.Task` has it."""
        rng = np.random.default_rng([23, step, index])
        sizes = list(SIZES)
        size = sizes[rng.choice(len(sizes), p=list(SIZES.values()))]
        if size not in self._rows:
            self._rows[size] = examples_of(self.examples, size)
        rows = rng.integers(len(self._rows[size]), size=self.batch)
        clean, edges, rest = torch.from_numpy(self._rows[size][rows].astype(np.float32)).unbind(1)
        control = torch.cat([edges, self._given(size, rows, rest, rng)], dim=1)
        tokens, lengths = self._captions(size, rows, rng)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step * 4096 + index))
        sigma = VelocityTask.sigmas(self.batch, rng)
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        out = self.model(mixed, 1 - sigma, tokens, lengths, control, float(rng.uniform(*SCALES)))
        return torch.as_tensor((out - (clean - noise)).square().mean())

    def _given(self, size: tuple[int, int], rows: NDArray[np.int64], rest: Tensor, rng: np.random.Generator) -> Tensor:
        """The channels for inpainting [n, 17, h, w]: 1 where the picture is kept, and its latents; or zeros."""
        kept = np.stack([~control_mask(size, int(row))[::8, ::8] for row in rows])  # as "nearest" picks pixels
        given = torch.cat([torch.from_numpy(kept).float()[:, None], rest], dim=1)
        chosen = torch.from_numpy(rng.random(self.batch) < INPAINTING)
        return torch.where(chosen[:, None, None, None], given, 0.0)

    def _captions(
        self, size: tuple[int, int], rows: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if self._words is None:
            self._words = PromptTokenizer(DEMO / "tokenizer" / "tokenizer.json")
        texts = [caption(control_scene(size, int(row)), "en" if rng.random() < 0.5 else "zh", rng) for row in rows]
        encoded = [self._words.encode("" if rng.random() < 0.03 else text) for text in texts]
        tokens = torch.zeros(self.batch, 32 * -(-max(map(len, encoded)) // 32), dtype=torch.long)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens, torch.tensor([len(ids) for ids in encoded])


def train_controlnet(work: Path, *, quick: bool = False) -> None:
    """Runs every stage in `work`; the result is ``work/controlnet``. `quick` only shows that each stage runs."""
    from diffusers import AutoencoderKL

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    examples = work / "examples"
    if not examples.exists():
        vae = AutoencoderKL.from_pretrained(DEMO / "vae").float().eval()
        with replaced_directory(examples) as folder:
            write_examples(vae, folder, 40 if quick else SCENES)
    model = controlled_demo()
    plain = [name for name, p in model.named_parameters() if p.ndim > 1 and ("embedder" in name or "adaLN" in name)]
    course, every = (SMALL_COURSE, 2) if quick else (COURSE, 50)
    train(ControlTask(model, examples, batch=8), course, plain, work / "controlnet.pt", every=every)
    write_controlnet(model.controlnet, work / "controlnet")


def controlled_demo() -> Controlled:
    """The demo model as it ships, with a ControlNet that is about to learn."""
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3ForCausalLM

    transformer = ZImageTransformer2DModel.from_pretrained(DEMO / "transformer").float()
    text_encoder = Qwen3ForCausalLM.from_pretrained(DEMO / "text_encoder").float()
    controlnet = new_controlnet()
    copy_blocks(controlnet, transformer)
    return Controlled(text_encoder, transformer, controlnet)


def write_controlnet(controlnet: Any, out: Path) -> None:
    """Writes the ControlNet's own tensors in diffusers' layout, bfloat16; replaces what is at `out`."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in controlnet.state_dict().items()}
    config = {name: value for name, value in controlnet.config.items() if not name.startswith("_")}
    with replaced_directory(out) as folder:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        text = json.dumps({"_class_name": "ZImageControlNetModel", **config}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="A few steps of everything, to see that it runs.")
def main(work: Path, quick: bool) -> None:
    """Train the ControlNet in WORK; the result is WORK/controlnet. Interrupted, it goes on from its last save."""
    train_controlnet(work, quick=quick)
    click.echo(str(work / "controlnet"))


if __name__ == "__main__":
    main()
