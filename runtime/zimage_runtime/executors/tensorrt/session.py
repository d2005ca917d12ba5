"""One request on TensorRT: its stages, from the inputs that the host uploads to the results that it downloads.

Patches, pads, rotary tables and the modulation table are small and made on the host. Everything else runs on one
compute stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from ...arrays import FloatArray
from ...bundle.tensors import TensorFile
from ...model.blocks import CAPTION_EMBEDDER, MAP, MAP_OUT, decoder_blocks, encoder_blocks
from ...model.config import ModelConfig
from ...model.geometry import Rotary
from ...model.programs import Program
from ...tiles.kernels import NumpyTileKernels, TileKernels
from ...tiles.tiling import TiledDecoder
from ..protocol import Conditioning
from ..worker import Stop, Worker
from .denoiser import Runs, StageDenoiser
from .device_stages import DeviceStages
from .loaded_stage import DeviceTools, LoadedStage, Shapes
from .plan import ResidencyPlan, plan_stage
from .stage_sizes import ImageSizes, maps_between
from .tile_kernels import DeviceTileKernels

_OF_NO_IMAGE = ImageSizes(prompt_tokens=1, image_count=1, image_tokens=32, latent_height=2, latent_width=2)

Result = TypeVar("Result")


@dataclass
class TensorRtSession:
    """Implements `Session`. Public methods hand their work to the executor's thread."""

    stages: DeviceStages
    plan: ResidencyPlan
    worker: Worker
    stop: Stop = field(default_factory=Stop)
    _tables: dict[bytes, dict[str, FloatArray]] = field(default_factory=dict, repr=False)
    _made: int = 0  # denoisers

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        return self.worker.call(lambda: self._encode_text(embeddings, rotary), self.stop)

    def denoiser(self, conditioning: Conditioning) -> "_ThreadedDenoiser":
        return _ThreadedDenoiser(self, self.worker.call(lambda: self._prepare(conditioning), self.stop))

    def decode(self, latents: FloatArray) -> FloatArray:
        return self.worker.call(lambda: np.concatenate([self._decode(one[None]) for one in latents]), self.stop)

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        pairs = self.worker.call(lambda: [self._encode(one[None]) for one in image], self.stop)
        return np.concatenate([mean for mean, _ in pairs]), np.concatenate([logvar for _, logvar in pairs])

    def cancel(self) -> None:
        self.stop.request()

    @property
    def _config(self) -> ModelConfig:
        return self.stages.bundle.manifest.config

    @property
    def _tools(self) -> DeviceTools:
        return self.stages.tools

    def _encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        tokens, width = embeddings.shape[1:]
        sizes = _sizes(prompt_tokens=self._longest(tokens))
        shapes = _token_shapes(tokens, width, rotary)

        def run(stage: LoadedStage) -> FloatArray:
            stage.send("x", embeddings, stage.buffer("x"))
            stage.send("cos", rotary.cos, stage.buffer("cos"))
            stage.send("sin", rotary.sin, stage.buffer("sin"))
            return self._through(stage, shapes, embeddings.shape)

        return self._stage(Program.TEXT_ENCODER, sizes, lambda places: [(place, shapes) for place in places], run)

    def _prepare(self, conditioning: Conditioning) -> StageDenoiser:
        tokens, rotary = conditioning.hidden_states.shape[1], conditioning.caption_rotary
        dim = self._config.transformer.dim
        padded = rotary.cos.shape[1]
        shapes = _token_shapes(padded, dim, rotary)
        embedder: Shapes = {"hidden_states": conditioning.hidden_states.shape}
        pad_token = self._tools.weights.embedded("transformer", "cap_pad_token")

        def run(stage: LoadedStage) -> FloatArray:
            x = stage.buffer("x")
            stage.send("hidden", conditioning.hidden_states, stage.buffer("hidden"))
            stage.send("cos", rotary.cos, stage.buffer("cos"))
            stage.send("sin", rotary.sin, stage.buffer("sin"))
            stage.end(CAPTION_EMBEDDER, {"hidden_states": stage.buffer("hidden"), "y": x}, embedder)
            if padded > tokens:
                stage.send("pads", np.repeat(pad_token, padded - tokens, axis=0), x + 4 * tokens * dim)
            return self._through(stage, shapes, (1, padded, dim))

        caption = self._stage(
            Program.CAPTION,
            _sizes(prompt_tokens=self._longest(tokens)),
            lambda places: [(CAPTION_EMBEDDER, embedder), *((place, shapes) for place in places)],
            run,
        )
        table = self._modulation(conditioning.timesteps)
        slot = self._made % self.plan.work.conditionings
        self._made += 1
        return StageDenoiser(
            self._config,
            conditioning,
            caption,
            table["modulation"],
            table["final_scale"],
            self._tools.weights.embedded("transformer", "x_pad_token"),
            self._denoise,
            slot,
        )

    def _modulation(self, timesteps: FloatArray) -> dict[str, FloatArray]:
        """The table of a schedule, which all conditionings of a request share."""
        key = timesteps.tobytes()
        if key not in self._tables:
            self._tables = {key: self.stages.host.run(Program.MODULATION, {"timesteps": timesteps}, self.stop)}
            self.stages.host.release()
        return self._tables[key]

    def _longest(self, tokens: int) -> int:
        """The length that a stage is planned for: one plan serves all prompts of a request, so that it stays loaded."""
        return max(tokens, self.plan.work.tokens)

    def _denoise(self, sizes: ImageSizes, runs: Runs, run: Callable[[LoadedStage], FloatArray]) -> FloatArray:
        tokens, conditionings = self._longest(sizes.prompt_tokens), self.plan.work.conditionings
        sizes = replace(sizes, prompt_tokens=tokens, conditionings=conditionings)
        return self._stage(Program.DENOISER, sizes, runs, run)

    def _through(self, stage: LoadedStage, shapes: Shapes, shape: tuple[int, ...]) -> FloatArray:
        """Runs all blocks of a stage on tokens, in buffers `x` and `y` by turns; returns the last block's values."""
        x, y = stage.buffer("x"), stage.buffer("y")
        tables = {"cos": stage.buffer("cos"), "sin": stage.buffer("sin")}
        stage.begin()
        for index in range(len(stage.plan.needs.blocks)):
            stage.block(index, [({"x": x, "y": y, **tables}, shapes)])
            x, y = y, x
        result = stage.receive("result", shape, x)
        stage.synchronize()
        return result()

    def _decode(self, latents: FloatArray) -> FloatArray:
        config = self._config
        height, width = latents.shape[2:]
        sizes = _sizes(latent_height=height, latent_width=width)
        plan = plan_stage(Program.DECODER, self.stages.spec, config, sizes, self.stages.vram)
        if plan is None:
            return self._tiled_decoder()(latents)
        maps = maps_between(decoder_blocks(config), height, width)
        shapes: list[Shapes] = [{"latents": latents.shape}, *({MAP: (1, *one)} for one in maps)]
        shapes = shapes[: len(plan.needs.blocks)]

        def run(stage: LoadedStage) -> FloatArray:
            if plan.needs.tiles:
                return self._decode_in_tiles(stage, latents, shapes)
            shape = (1, config.vae.out_channels, height * config.vae.scale, width * config.vae.scale)
            stage.send("latents", latents, stage.buffer("latents"))
            self._maps(stage, "latents", shapes, {"image": stage.buffer("image")})
            image = stage.receive("image", shape, stage.buffer("image"))
            stage.synchronize()
            return image()

        tiles = [(tile.place, tile.shapes) for tile in plan.needs.tiles]
        return self._stage(Program.DECODER, sizes, lambda places: [*zip(places, shapes, strict=True), *tiles], run)

    def _decode_in_tiles(self, stage: LoadedStage, latents: FloatArray, shapes: list[Shapes]) -> FloatArray:
        """Runs the stage's blocks on whole maps and the decoder's other blocks in tiles."""
        decoder, x = self._tiled_decoder(DeviceTileKernels(stage)), latents[0]
        if shapes:
            place = stage.plan.needs.blocks[-1]
            rows, columns = (size * place.out_scale for size in latents.shape[2:])
            stage.send("latents", latents, stage.buffer("latents"))
            address = self._maps(stage, "latents", shapes)
            dtype = self.stages.spec.program_of(place).map_dtype
            last = stage.receive("map", (rows, columns, place.out_channels), address, dtype)
            stage.synchronize()
            x = np.ascontiguousarray(last().transpose(2, 0, 1))
        return decoder.resume(x, len(shapes))[None]

    def _tiled_decoder(self, kernels: TileKernels | None = None) -> TiledDecoder:
        bundle = self.stages.bundle
        weights = TensorFile(bundle.file(bundle.manifest.weights["vae"]))
        return TiledDecoder(self._config.vae, weights, kernels or NumpyTileKernels(check=self.stop.check))

    def _encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        config = self._config
        height, width = image.shape[2] // config.vae.scale, image.shape[3] // config.vae.scale
        sizes = _sizes(latent_height=height, latent_width=width)
        maps = maps_between(encoder_blocks(config), height, width)
        shapes: list[Shapes] = [{"image": image.shape}, *({MAP: (1, *one)} for one in maps)]
        moments = (1, config.vae.latent_channels, height, width)

        def run(stage: LoadedStage) -> tuple[FloatArray, FloatArray]:
            stage.send("image", image, stage.buffer("image"))
            self._maps(stage, "image", shapes, {name: stage.buffer(name) for name in ("mean", "logvar")})
            mean, logvar = (stage.receive(name, moments, stage.buffer(name)) for name in ("mean", "logvar"))
            stage.synchronize()
            return mean(), logvar()

        if plan_stage(Program.ENCODER, self.stages.spec, config, sizes, self.stages.vram) is None:
            outputs = self.stages.host.run(Program.ENCODER, {"image": image}, self.stop)
            self.stages.host.release()
            return outputs["mean"], outputs["logvar"]
        return self._stage(Program.ENCODER, sizes, lambda places: list(zip(places, shapes, strict=True)), run)

    def _maps(
        self, stage: LoadedStage, source: str, shapes: list[Shapes], outputs: dict[str, int] | None = None
    ) -> int:
        """Queues blocks of the autoencoder, whose maps take turns in two buffers.

        Without `outputs` for the last block, its map is in the buffer whose address is returned.
        """
        buffers = (stage.buffer("even"), stage.buffer("odd"))
        last = len(shapes) - 1
        stage.begin()
        for index, shape in enumerate(shapes):
            inputs = {MAP: buffers[(index - 1) % 2]} if index else {source: stage.buffer(source)}
            results = outputs if outputs and index == last else {MAP_OUT: buffers[index % 2]}
            stage.block(index, [({**inputs, **results}, shape)])
        return buffers[last % 2]

    def _stage(self, program: Program, sizes: ImageSizes, runs: Runs, run: Callable[[LoadedStage], Result]) -> Result:
        return self.stages.run(program, sizes, runs, run, keep_all=self.plan.keep_all, stop=self.stop)


@dataclass(frozen=True)
class _ThreadedDenoiser:
    """Implements `Denoiser` on the executor's thread."""

    session: TensorRtSession
    steps: StageDenoiser

    def __call__(self, latents: FloatArray, step: int) -> FloatArray:
        return self.session.worker.call(lambda: self.steps(latents, step), self.session.stop)


def _sizes(**values: int) -> ImageSizes:
    """The sizes of a stage that uses only these."""
    return replace(_OF_NO_IMAGE, **values)


def _token_shapes(tokens: int, width: int, rotary: Rotary) -> Shapes:
    half = rotary.cos.shape[2]
    return {"x": (1, tokens, width), "cos": (1, tokens, half), "sin": (1, tokens, half)}
