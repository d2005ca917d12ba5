"""One request on TensorRT: its stages, from the inputs that the host uploads to the results that it downloads.

Patches, pads, rotary tables and the modulation table are small and made on the host. Everything else runs on one
compute stream.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from ...adapters.branches import Branches
from ...arrays import FloatArray
from ...bundle.tensors import TensorFile
from ...model.blocks import BAND, CAPTION_EMBEDDER, MAP, MAP_OUT, BlockKind, BlockPlace, decoder_blocks, encoder_blocks
from ...model.config import ModelConfig
from ...model.geometry import Rotary
from ...model.programs import Program
from ...tiles.kernels import NumpyTileKernels, TileKernels
from ...tiles.tiling import TiledDecoder
from ..protocol import Conditioning
from ..worker import Stop, Worker
from .denoiser import Runs, StageDenoiser
from .device import Shapes
from .device_stages import DeviceStages, StageDoesNotFitError
from .loaded_stage import DeviceTools, LoadedStage
from .plan import ResidencyPlan, StagePlan, lora_rank
from .stage_sizes import ImageSizes, Map, bands, maps_between, text_length
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
        """Hidden states of a prompt, padded to one of a few lengths and cut again: attention is causal."""
        tokens, width = embeddings.shape[1:]
        length = text_length(tokens)
        sizes = _sizes(prompt_tokens=self._longest(tokens))
        shapes = _token_shapes(length, width, rotary)

        def run(stage: LoadedStage) -> FloatArray:
            for name, values in (("x", embeddings), ("cos", rotary.cos), ("sin", rotary.sin)):
                stage.send(name, _lengthened(values, length), stage.buffer(name))
            return self._through(stage, shapes, (1, length, width))[:, :tokens]

        return self._stage(
            Program.TEXT_ENCODER, sizes, lambda plan: [(place, shapes) for place in plan.needs.blocks], run
        )

    def _prepare(self, conditioning: Conditioning) -> StageDenoiser:
        tokens, rotary = conditioning.hidden_states.shape[1], conditioning.caption_rotary
        dim = self._config.transformer.dim
        padded = rotary.cos.shape[1]
        shapes = _token_shapes(padded, dim, rotary)
        hidden = _lengthened(conditioning.hidden_states, padded)  # one length for all programs of the stage
        embedder: Shapes = {"hidden_states": hidden.shape}
        pad_token = self._tools.weights.embedded("transformer", "cap_pad_token")

        def run(stage: LoadedStage) -> FloatArray:
            stage.fill_branches(conditioning.branches)
            x = stage.buffer("x")
            stage.send("hidden", hidden, stage.buffer("hidden"))
            stage.send("cos", rotary.cos, stage.buffer("cos"))
            stage.send("sin", rotary.sin, stage.buffer("sin"))
            stage.end(CAPTION_EMBEDDER, {"hidden_states": stage.buffer("hidden"), "y": x}, embedder)
            if padded > tokens:
                stage.send("pads", np.repeat(pad_token, padded - tokens, axis=0), x + 4 * tokens * dim)
            return self._through(stage, shapes, (1, padded, dim))

        caption = self._stage(
            Program.CAPTION,
            _sizes(prompt_tokens=self._longest(tokens), rank=lora_rank(self.plan.work)),
            lambda plan: [(CAPTION_EMBEDDER, embedder), *((place, shapes) for place in plan.needs.blocks)],
            run,
        )
        table = self._modulation(conditioning.timesteps, conditioning.branches)
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

    def _modulation(self, timesteps: FloatArray, branches: Branches | None) -> dict[str, FloatArray]:
        """The table of a schedule, which all conditionings of a request share."""
        key, host = timesteps.tobytes(), self.stages.host
        if key not in self._tables:
            if branches is not None:
                host.extend()
            feeds = {"timesteps": timesteps, **host.branch_inputs(branches, Program.MODULATION)}
            self._tables = {key: host.run(Program.MODULATION, feeds, self.stop)}
            self.stages.host.release()
        return self._tables[key]

    def _longest(self, tokens: int) -> int:
        """The length that a stage is planned for: one plan serves all prompts of a request, so that it stays loaded."""
        return max(tokens, self.plan.work.tokens)

    def _denoise(self, sizes: ImageSizes, runs: Runs, run: Callable[[LoadedStage], FloatArray]) -> FloatArray:
        tokens, conditionings = self._longest(sizes.prompt_tokens), self.plan.work.conditionings
        rank = lora_rank(self.plan.work)
        sizes = replace(sizes, prompt_tokens=tokens, conditionings=conditionings, rank=rank)
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
        maps = maps_between(decoder_blocks(config), height, width)

        def runs(plan: StagePlan) -> list[tuple[BlockPlace, Shapes]]:
            tiles = [(tile.place, tile.shapes) for tile in plan.needs.tiles]
            return [*_map_runs(plan, {"latents": latents.shape}, maps), *tiles]

        def run(stage: LoadedStage) -> FloatArray:
            if stage.plan.needs.tiles:
                return self._decode_in_tiles(stage, latents, maps)
            shape = (1, config.vae.out_channels, height * config.vae.scale, width * config.vae.scale)
            stage.send("latents", latents, stage.buffer("latents"))
            self._maps(stage, "latents", latents.shape, maps, {"image": stage.buffer("image")})
            image = stage.receive("image", shape, stage.buffer("image"))
            stage.synchronize()
            return image()

        try:
            return self._stage(Program.DECODER, sizes, runs, run)
        except StageDoesNotFitError:
            return self._tiled_decoder()(latents)

    def _decode_in_tiles(self, stage: LoadedStage, latents: FloatArray, maps: list[Map]) -> FloatArray:
        """Runs the stage's blocks on whole maps and the decoder's other blocks in tiles."""
        decoder, x, whole = self._tiled_decoder(DeviceTileKernels(stage)), latents[0], stage.plan.needs.blocks
        if whole:
            place = whole[-1]
            rows, columns = (size * place.out_scale for size in latents.shape[2:])
            stage.send("latents", latents, stage.buffer("latents"))
            address = self._maps(stage, "latents", latents.shape, maps)
            dtype = self.stages.spec.program_of(place).map_dtype
            last = stage.receive("map", (rows, columns, place.out_channels), address, dtype)
            stage.synchronize()
            x = np.ascontiguousarray(last().transpose(2, 0, 1))
        return decoder.resume(x, len(whole))[None]

    def _tiled_decoder(self, kernels: TileKernels | None = None) -> TiledDecoder:
        bundle = self.stages.bundle
        weights = TensorFile(bundle.file(bundle.manifest.weights["vae"]))
        return TiledDecoder(self._config.vae, weights, kernels or NumpyTileKernels(check=self.stop.check))

    def _encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        config = self._config
        height, width = image.shape[2] // config.vae.scale, image.shape[3] // config.vae.scale
        sizes = _sizes(latent_height=height, latent_width=width)
        maps = maps_between(encoder_blocks(config), height, width)
        moments = (1, config.vae.latent_channels, height, width)

        def run(stage: LoadedStage) -> tuple[FloatArray, FloatArray]:
            stage.send("image", image, stage.buffer("image"))
            self._maps(stage, "image", image.shape, maps, {name: stage.buffer(name) for name in ("mean", "logvar")})
            mean, logvar = (stage.receive(name, moments, stage.buffer(name)) for name in ("mean", "logvar"))
            stage.synchronize()
            return mean(), logvar()

        try:
            return self._stage(Program.ENCODER, sizes, lambda plan: _map_runs(plan, {"image": image.shape}, maps), run)
        except StageDoesNotFitError:
            outputs = self.stages.host.run(Program.ENCODER, {"image": image}, self.stop)
            self.stages.host.release()
            return outputs["mean"], outputs["logvar"]

    def _maps(
        self,
        stage: LoadedStage,
        source: str,
        shape: tuple[int, ...],
        maps: list[Map],
        outputs: dict[str, int] | None = None,
    ) -> int:
        """Queues blocks of the autoencoder, whose maps take turns in two buffers.

        Without `outputs` for the last block, its map is in the buffer whose address is returned.
        """
        buffers, blocks = (stage.buffer("even"), stage.buffer("odd")), stage.plan.needs.blocks
        last = len(blocks) - 1
        stage.begin()
        for index, place in enumerate(blocks):
            given, written = buffers[(index - 1) % 2], buffers[index % 2]
            inputs = {MAP: given} if index else {source: stage.buffer(source)}
            results = outputs if outputs and index == last else {MAP_OUT: written}
            runs: list[tuple[Mapping[str, int], Shapes]] = []
            for first, shapes in _block_shapes(place, maps[index - 1] if index else None, {source: shape}):
                if BAND in shapes:
                    start = first * place.channels * stage.spec.program_of(place).map_dtype.size
                    runs.append(({MAP: given, BAND: given + start, MAP_OUT: written + start}, shapes))
                else:
                    runs.append(({**inputs, **results}, shapes))
            stage.block(index, runs)
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


def _map_runs(plan: StagePlan, source: Shapes, maps: list[Map]) -> list[tuple[BlockPlace, Shapes]]:
    """The runs of a stage's blocks of the autoencoder; the first one reads the source."""
    given: list[Map | None] = [None, *maps]
    blocks = zip(plan.needs.blocks, given, strict=False)
    return [(place, shapes) for place, one in blocks for _, shapes in _block_shapes(place, one, source)]


def _block_shapes(place: BlockPlace, given: Map | None, source: Shapes) -> list[tuple[int, Shapes]]:
    """The shapes of a block's runs on a map, one for each band of an attention, and where the band begins."""
    if given is None:
        return [(0, source)]
    shape = (1, *given)
    if place.kind is not BlockKind.MIDDLE_ATTENTION:
        return [(0, {MAP: shape})]
    rows, columns, channels = given
    return [(first, {MAP: shape, BAND: (1, count, channels)}) for first, count in bands(rows, columns)]


def _lengthened(values: FloatArray, length: int) -> FloatArray:
    """[1, tokens, width] with zeros for the tokens that are missing."""
    found = np.zeros((1, length, values.shape[2]), np.float32)
    found[:, : values.shape[1]] = values
    return found


def _token_shapes(tokens: int, width: int, rotary: Rotary) -> Shapes:
    half = rotary.cos.shape[2]
    return {"x": (1, tokens, width), "cos": (1, tokens, half), "sin": (1, tokens, half)}
