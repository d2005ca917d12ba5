"""The steps of one conditioning: latents → patches → all blocks → velocity.

Where all blocks are resident, the second step is captured as one CUDA graph, which is launched from then on. If that
fails, steps are queued as the first one. The first
step is not captured, because TensorRT may still compile kernels in it. For a launch, the host only writes to the pinned
memory that the graph reads.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...arrays import FloatArray
from ...errors import DeviceLostError, ExecutorError
from ...model.blocks import FINAL_LAYER, IMAGE_EMBEDDER, NORMS, BlockPlace
from ...model.config import PATCH_SIZE, ModelConfig
from ..protocol import Conditioning
from .device import Graph, Shapes
from .loaded_stage import LoadedStage
from .plan import StagePlan
from .stage_sizes import ImageSizes, row_bytes

_FLOAT = 4  # bytes

Runs = Callable[[StagePlan], list[tuple[BlockPlace, Shapes]]]
"""From a stage's plan, every block that will run, with its shapes."""

OnStage = Callable[[ImageSizes, Runs, Callable[[LoadedStage], FloatArray]], FloatArray]
"""Brings the denoiser's stage onto the device and calls a function with it."""


def patchify(latents: FloatArray) -> FloatArray:
    """[channels, h, w] → [1, tokens, channels of 2 x 2 patches], as the model's embedder reads them."""
    channels, height, width = latents.shape
    x = latents.reshape(channels, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
    return x.transpose(1, 3, 2, 4, 0).reshape(1, -1, PATCH_SIZE**2 * channels)


def unpatchify(patches: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The inverse of `patchify`: patches → latents of `shape`."""
    channels, height, width = shape
    x = patches.reshape(height // PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE, PATCH_SIZE, channels)
    return x.transpose(4, 0, 2, 1, 3).reshape(shape)


@dataclass
class StageDenoiser:
    """Implements `Denoiser`. The caption tokens are kept on the host, for when another stage used the device."""

    config: ModelConfig
    conditioning: Conditioning
    caption: FloatArray  # [1, caption_tokens, dim]
    modulation: FloatArray  # [steps, blocks, 4, dim]
    final_scale: FloatArray  # [steps, dim]
    pad_token: FloatArray  # [1, dim], of the image
    on_stage: OnStage
    slot: int = 0  # which of the stage's buffers for conditionings it fills

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        """The velocity at a step: [batch, channels, h, w], in and out."""
        shapes = _StepShapes.of(self.config, self.conditioning, latents.shape)
        return self.on_stage(shapes.sizes, shapes.runs, lambda stage: self._step(stage, shapes, latents, step))

    def _step(self, stage: LoadedStage, shapes: "_StepShapes", latents: FloatArray, step: int) -> FloatArray:
        if stage.owners.get(self.slot) is not self:
            self._fill(stage, shapes)
        stage.fill_branches(self.conditioning.branches)
        stage.write("modulation", self._rows(step, shapes.row))
        streamed = bool(stage.plan.streamed)
        groups = [list(range(len(latents)))] if streamed else [[index] for index in range(len(latents))]
        velocities = []
        for group in groups:
            for turn, index in enumerate(group):
                stage.write(f"patches.{turn}", patchify(latents[index]))
            if streamed:
                self._queue(stage, shapes, len(group))
            else:
                self._replay(stage, shapes)
            stage.tools.device.synchronize(stage.tools.compute)
            for turn in range(len(group)):
                values = stage.host(f"velocity.{turn}", shapes.patch_bytes).data[: shapes.patch_bytes]
                # the model predicts the direction towards the image; sigma runs the other way
                velocities.append(-unpatchify(values.view(np.float32), latents.shape[1:]))
        return np.stack(velocities)

    def _fill(self, stage: LoadedStage, shapes: "_StepShapes") -> None:
        """Uploads what is the same in every step."""
        stage.owners.pop(self.slot, None)
        image, caption = self.conditioning.image_rotary, self.conditioning.caption_rotary
        stage.send("cos", np.concatenate([image.cos, caption.cos], axis=1), self._buffer(stage, "cos"))
        stage.send("sin", np.concatenate([image.sin, caption.sin], axis=1), self._buffer(stage, "sin"))
        stage.send("caption", self.caption, self._buffer(stage, "caption"))
        if shapes.pads:
            stage.send("pads", np.repeat(self.pad_token, shapes.pads, axis=0), stage.buffer("pads"))
        stage.tools.device.synchronize(stage.tools.compute)
        stage.owners[self.slot] = self

    def _buffer(self, stage: LoadedStage, name: str) -> int:
        return stage.buffer(f"{name}.{self.slot}")

    def _rows(self, step: int, row: int) -> FloatArray:
        """A step's rows of the modulation table, then the final scale as one more row. Each row starts aligned."""
        dim = self.config.transformer.dim
        rows = np.zeros((len(NORMS) * self.config.transformer.modulated_blocks + 1, row // _FLOAT), np.float32)
        rows[:-1, :dim] = self.modulation[step].reshape(-1, dim)
        rows[-1, :dim] = self.final_scale[step]
        return rows

    def _replay(self, stage: LoadedStage, shapes: "_StepShapes") -> None:
        """Queues a step of one image, as a graph from the second step on."""
        tools, key = stage.tools, (self.slot, shapes.sizes.caption_tokens)
        if key not in stage.graphs and key in stage.warm and tools.capturing.possible:
            graph = self._captured(stage, shapes)
            if graph is not None:
                stage.keep_graph(key, graph)
        if key in stage.graphs:
            tools.device.launch(stage.graphs[key], tools.compute)
        else:
            self._queue(stage, shapes, 1)
            stage.warm.add(key)

    def _captured(self, stage: LoadedStage, shapes: "_StepShapes") -> Graph | None:
        """A step as a graph; None where it cannot be one, which is noted and not tried again."""
        device, stream, capturing = stage.tools.device, stage.tools.compute, stage.tools.capturing
        if not stage.is_capturable:
            capturing.give_up("TensorRT's engines cannot be captured")
            return None
        begun = False
        try:
            device.begin_capture(stream)
            begun = True
            self._queue(stage, shapes, 1)
            begun = False
            return device.end_capture(stream)
        except BaseException as error:
            if begun:
                with contextlib.suppress(ExecutorError):  # ending a failed capture fails, too
                    device.destroy_graph(device.end_capture(stream))
            if not isinstance(error, ExecutorError) or isinstance(error, DeviceLostError):
                raise
            capturing.give_up(str(error))
            return None

    def _queue(self, stage: LoadedStage, shapes: "_StepShapes", images: int) -> None:
        """Queues a step of `images` images, from and to pinned memory."""
        device, stream = stage.tools.device, stage.tools.compute
        rows = stage.buffer("modulation")
        stage.upload("modulation", shapes.rows * shapes.row, rows)
        places = [[stage.buffer(f"{name}.{turn}") for name in ("x", "y")] for turn in range(images)]
        for turn, (x, _) in enumerate(places):
            patches = stage.buffer(f"patches.{turn}")
            stage.upload(f"patches.{turn}", shapes.patch_bytes, patches)
            stage.end(IMAGE_EMBEDDER, {"patches": patches, "y": x}, shapes.patches)
            if shapes.pads:
                end = x + shapes.sizes.image_count * shapes.token_bytes
                device.copy(end, stage.buffer("pads"), shapes.pads * shapes.token_bytes, stream)
        tables = {name: self._buffer(stage, name) for name in ("cos", "sin")}
        stage.begin()
        for index in range(len(stage.plan.needs.blocks)):
            if index == shapes.refiners:
                for x, _ in places:
                    end = x + shapes.sizes.image_tokens * shapes.token_bytes
                    device.copy(
                        end, self._buffer(stage, "caption"), shapes.sizes.caption_tokens * shapes.token_bytes, stream
                    )
            runs: list[tuple[Mapping[str, int], Shapes]] = [
                ({"x": x, "y": y, **tables}, shapes.of_block(index)) for x, y in places
            ]
            stage.block(index, runs, rows + index * len(NORMS) * shapes.row, shapes.row)
            places = [[y, x] for x, y in places]
        for turn, (x, _) in enumerate(places):
            velocity = stage.buffer(f"velocity.{turn}")
            scale = rows + (shapes.rows - 1) * shapes.row
            stage.end(FINAL_LAYER, {"x": x, "final_scale": scale, "patches": velocity}, shapes.final)
            target = stage.host(f"velocity.{turn}", shapes.patch_bytes)
            device.download(target.address, velocity, shapes.patch_bytes, stream)


@dataclass(frozen=True)
class _StepShapes:
    """Sizes of a step, and the shapes of its blocks' inputs that have free dimensions."""

    sizes: ImageSizes
    patches: Shapes
    image: Shapes
    unified: Shapes
    final: Shapes
    refiners: int  # blocks that run on image tokens only
    rows: int  # of modulation, the final scale included
    row: int  # bytes
    token_bytes: int
    patch_bytes: int  # of all patches of an image

    @classmethod
    def of(cls, config: ModelConfig, conditioning: Conditioning, latents: tuple[int, ...]) -> "_StepShapes":
        """The shapes for latents [batch, channels, h, w]."""
        c = config.transformer
        batch, _, height, width = latents
        count, half = height * width // PATCH_SIZE**2, c.head_dim // 2
        prompt, image = conditioning.hidden_states.shape[1], conditioning.image_rotary.cos.shape[1]
        sizes = ImageSizes(prompt, count, image, height, width, batch)

        def tokens(number: int) -> Shapes:
            return {"x": (1, number, c.dim), "cos": (1, number, half), "sin": (1, number, half)}

        return cls(
            sizes,
            {"patches": (1, count, c.patch_dim)},
            tokens(image),
            tokens(sizes.tokens),
            {"x": (1, count, c.dim)},
            c.n_refiner_layers,
            len(NORMS) * c.modulated_blocks + 1,
            row_bytes(config),
            c.dim * _FLOAT,
            count * c.patch_dim * _FLOAT,
        )

    @property
    def pads(self) -> int:
        """Tokens that pad the image to a multiple of 32."""
        return self.sizes.image_tokens - self.sizes.image_count

    def of_block(self, index: int) -> Shapes:
        """A block's free shapes: noise refiners run on image tokens only."""
        return self.image if index < self.refiners else self.unified

    def runs(self, plan: StagePlan) -> list[tuple[BlockPlace, Shapes]]:
        """Every block of a step, with its shapes. A `Runs`."""
        blocks = [(place, self.of_block(index)) for index, place in enumerate(plan.needs.blocks)]
        return [(IMAGE_EMBEDDER, self.patches), *blocks, (FINAL_LAYER, self.final)]
