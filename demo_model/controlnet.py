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
from torch import Tensor

from zimage_export.output import replaced_directory
from zimage_export.source.checkpoint import DEMO
from zimage_runtime.model.tokenizer import PromptTokenizer

from .captions import caption
from .control_layers import Controlled, copy_blocks, new_controlnet
from .dataset import SIZES
from .edges import placed_scene, random_edge_map
from .scenes import Scene, draw, random_scene
from .training import Course, train
from .velocity import VelocityTask

COURSE = Course(steps=1200, microbatches=4, matrix_rate=0.01, vector_rate=1e-3, decay=0.6)
SMALL_COURSE = Course(steps=6, microbatches=2, matrix_rate=0.01, vector_rate=1e-3, warmup=2)
SCENES = 6000
SCALES = 0.65, 1.0
"""What hints are multiplied by in training: the range that users are advised to choose from."""


def control_scene(size: tuple[int, int], index: int) -> Scene:
    """The training scene behind a row: one in five is as the demo model knows them, with places in its captions."""
    rng = np.random.default_rng([21, *size, index])
    return random_scene(rng) if rng.random() < 0.2 else placed_scene(rng, size)


def write_pairs(vae: Any, folder: Path, count: int) -> None:
    """Writes latents of about `count` scenes and their maps, [rows, 2, 16, h, w] in float16, one file for each size."""
    config = vae.config
    for size, share in SIZES.items():
        rows = max(1, round(count * share))
        width, height = size
        out = np.empty((rows, 2, 16, height // 8, width // 8), np.float16)
        for row in range(rows):
            scene = control_scene(size, row)
            edges = random_edge_map(scene, size, np.random.default_rng([22, *size, row]))
            pair = torch.from_numpy(np.stack([draw(scene, width, height), edges])).permute(0, 3, 1, 2).contiguous()
            with torch.no_grad():
                mean = vae.encoder(pair * 2 - 1)[:, :16]
            out[row] = ((mean - config.shift_factor) * config.scaling_factor).numpy()
        np.save(_file(folder, size), out)


def _file(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"pairs-{size[0]}x{size[1]}.npy"


class ControlTask:
    """The demo model's loss with a map beside the caption."""

    def __init__(self, model: Controlled, pairs: Path, batch: int) -> None:
        self.model: Any = model
        self.pairs, self.batch = pairs, batch
        self._rows: dict[tuple[int, int], Any] = {}
        self._words: Any = None

    def loss(self, step: int, index: int) -> Tensor:
        """As `workers.Task` has it."""
        rng = np.random.default_rng([23, step, index])
        sizes = list(SIZES)
        size = sizes[rng.choice(len(sizes), p=list(SIZES.values()))]
        if size not in self._rows:
            self._rows[size] = np.load(_file(self.pairs, size), mmap_mode="r")
        rows = rng.integers(len(self._rows[size]), size=self.batch)
        clean, control = torch.from_numpy(self._rows[size][rows].astype(np.float32)).unbind(1)
        tokens, lengths = self._captions(size, rows, rng)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step * 4096 + index))
        sigma = VelocityTask.sigmas(self.batch, rng)
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        out = self.model(mixed, 1 - sigma, tokens, lengths, control, float(rng.uniform(*SCALES)))
        return torch.as_tensor((out - (clean - noise)).square().mean())

    def _captions(self, size: tuple[int, int], rows: Any, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
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
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3ForCausalLM

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pairs = work / "pairs"
    if not pairs.exists():
        vae = AutoencoderKL.from_pretrained(DEMO / "vae").float().eval()
        with replaced_directory(pairs) as folder:
            write_pairs(vae, folder, 40 if quick else SCENES)
    transformer = ZImageTransformer2DModel.from_pretrained(DEMO / "transformer").float()
    text_encoder = Qwen3ForCausalLM.from_pretrained(DEMO / "text_encoder").float()
    controlnet = new_controlnet()
    copy_blocks(controlnet, transformer)
    model = Controlled(text_encoder, transformer, controlnet)
    plain = [name for name, p in model.named_parameters() if p.ndim > 1 and ("embedder" in name or "adaLN" in name)]
    train(ControlTask(model, pairs, batch=8), SMALL_COURSE if quick else COURSE, plain, work / "controlnet.pt", every=50)
    write_controlnet(controlnet, work / "controlnet")


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
