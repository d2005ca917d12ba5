"""The `tensorrt` executor: block engines on an NVIDIA GPU, weights resident or streamed within a VRAM budget.

Patches, pads, rotary tables and the modulation table are made on the host, where they are small; everything between
runs on one compute stream. Stages take turns on the device unless all of them fit.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from ...arrays import FloatArray
from ...bundle.bundle import Bundle
from ...bundle.manifest import TENSORRT
from ...bundle.tensors import TensorFile
from ...errors import ExecutorError, ZImageRuntimeError
from ...machine.host_memory import available_memory
from ...model.blocks import CAPTION_EMBEDDER, MAP, MAP_OUT, decoder_blocks, encoder_blocks
from ...model.geometry import ImageGeometry, Rotary
from ...model.programs import Program
from ...tiles.kernels import NumpyTileKernels, TileKernels
from ...tiles.tiling import TiledDecoder, tiled_bytes
from ..ort.cpu import OrtCpuExecutor
from ..ort.cpu_plan import check_tiles_on_host
from ..protocol import Conditioning
from .arena import Budget
from .block_catalog import VariantSpec
from .decoder_tiles import TILES_ON_HOST
from .denoiser import Runs, StageDenoiser
from .device import Device, Engines
from .engine_store import EngineStore, Note, read_catalog, variant_spec
from .loaded_stage import LoadedStage, Machine, Shapes
from .plan import CONTEXT_BYTES, ResidencyPlan, plan_residency, plan_stage
from .stage_sizes import ImageSizes, maps_between
from .tile_kernels import DeviceTileKernels
from .weight_source import WeightSource

_PINNED_SHARE = 0.5  # of the host's free memory, which streamed blocks may hold
_OF_NO_IMAGE = ImageSizes(prompt_tokens=1, image_count=1, image_tokens=32, latent_height=2, latent_width=2)

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequestPlan:
    """A residency plan as the pipeline wants to know of it: what is tiled, is so inside the executor."""

    residency: ResidencyPlan
    tiled: bool = False
    encodes_tiled: bool = False

    @property
    def keep_all(self) -> bool:
        """Whether every stage may stay on the device."""
        return self.residency.keep_all

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it."""
        streamed = len(self.residency.stages[Program.DENOISER].streamed)
        notes = [f"{streamed} of the transformer's blocks are streamed each step"] if streamed else []
        if how := self.residency.how_decoded:
            notes.append(f"the image is decoded {how}")
        return tuple(notes)


@dataclass
class TensorRtExecutor:
    """Runs a bundle's stages on one device. `open_executor` makes one for the GPU at hand."""

    bundle: Bundle
    device: Device
    engines: Engines
    spec: VariantSpec
    vram: int  # budget in bytes, CUDA's own needs included
    pinnable: int = 0  # bytes of host memory that streamed blocks may hold pinned
    _keep_all: bool = False  # as the last plan has it
    _machine: Machine = field(init=False, repr=False)
    _stages: dict[Program, LoadedStage] = field(default_factory=dict, repr=False)
    _host: OrtCpuExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._machine = Machine(
            self.device,
            self.engines,
            self.spec,
            WeightSource(self.bundle),
            Budget(self.vram - CONTEXT_BYTES),
            self.device.create_stream(),
            self.device.create_stream(),
            self.pinnable,
        )
        self._host = OrtCpuExecutor(self.bundle, low_memory=True)

    @property
    def name(self) -> str:
        """The executor's name on the command line."""
        return TENSORRT

    @property
    def peak_bytes(self) -> int:
        """The most device memory that was allocated so far, CUDA's own needs not included."""
        return self._machine.budget.peak

    @property
    def loaded(self) -> set[Program]:
        """The stages that are on the device now."""
        return set(self._stages)

    def plan(
        self, geometry: ImageGeometry, prompt_tokens: int, batch_size: int = 1, *, encodes: bool = False
    ) -> "RequestPlan":
        """How a request will be generated, before anything is loaded. Raises `MemoryLimitError` if it does not fit."""
        sizes = ImageSizes.of(geometry, prompt_tokens, batch_size)
        plan = plan_residency(self.spec, self.bundle.manifest.config, sizes, self.vram)
        if plan.how_decoded is not None:
            maps = tiled_bytes(self.bundle.manifest.config.vae, geometry.width, geometry.height)
            check_tiles_on_host(geometry, maps + TILES_ON_HOST)
        self._keep_all = plan.keep_all
        return RequestPlan(plan)

    def encode_text(self, embeddings: FloatArray, rotary: Rotary) -> FloatArray:
        """See `Executor`."""
        tokens, width = embeddings.shape[1:]
        sizes = _sizes(prompt_tokens=tokens)
        shapes = _token_shapes(tokens, width, rotary)

        def run(stage: LoadedStage) -> FloatArray:
            stage.send("x", embeddings, stage.buffer("x"))
            stage.send("cos", rotary.cos, stage.buffer("cos"))
            stage.send("sin", rotary.sin, stage.buffer("sin"))
            return self._through(stage, shapes, embeddings.shape)

        return self._stage(Program.TEXT_ENCODER, sizes, lambda places: [(place, shapes) for place in places], run)

    def prepare(self, conditioning: Conditioning) -> StageDenoiser:
        """See `Executor`."""
        tokens, rotary = conditioning.hidden_states.shape[1], conditioning.caption_rotary
        dim = self.bundle.manifest.config.transformer.dim
        padded = rotary.cos.shape[1]
        shapes = _token_shapes(padded, dim, rotary)
        embedder: Shapes = {"hidden_states": conditioning.hidden_states.shape}
        pad_token = self._machine.weights.embedded("transformer", "cap_pad_token")

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
            _sizes(prompt_tokens=tokens),
            lambda places: [(CAPTION_EMBEDDER, embedder), *((place, shapes) for place in places)],
            run,
        )
        table = self._host.run(Program.MODULATION, {"timesteps": conditioning.timesteps})
        self._host.release()
        return StageDenoiser(
            self.bundle.manifest.config,
            conditioning,
            caption,
            table["modulation"],
            table["final_scale"],
            self._machine.weights.embedded("transformer", "x_pad_token"),
            self._denoise,
        )

    def _denoise(self, sizes: ImageSizes, runs: Runs, run: Callable[[LoadedStage], FloatArray]) -> FloatArray:
        return self._stage(Program.DENOISER, sizes, runs, run)

    def _through(self, stage: LoadedStage, shapes: Shapes, shape: tuple[int, ...]) -> FloatArray:
        """All blocks of a stage of tokens, from and to buffer `x` or `y`; the values that come out."""
        x, y = stage.buffer("x"), stage.buffer("y")
        tables = {"cos": stage.buffer("cos"), "sin": stage.buffer("sin")}
        stage.begin()
        for index in range(len(stage.plan.needs.blocks)):
            stage.block(index, [({"x": x, "y": y, **tables}, shapes)])
            x, y = y, x
        result = stage.receive("result", shape, x)
        self.device.synchronize(self._machine.compute)
        return result()

    def decode(self, latents: FloatArray) -> FloatArray:
        """See `Executor`. What does not fit the budget is decoded in tiles, on the CPU if not even one of them fits."""
        return np.concatenate([self._decode(one[None]) for one in latents])

    def _decode(self, latents: FloatArray) -> FloatArray:
        config = self.bundle.manifest.config
        height, width = latents.shape[2:]
        sizes = _sizes(latent_height=height, latent_width=width)
        plan = plan_stage(Program.DECODER, self.spec, config, sizes, self.vram)
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
        """The stage's blocks on whole maps, the others in tiles."""
        decoder, x = self._tiled_decoder(DeviceTileKernels(stage)), latents[0]
        if shapes:
            place = stage.plan.needs.blocks[-1]
            rows, columns = (size * place.out_scale for size in latents.shape[2:])
            stage.send("latents", latents, stage.buffer("latents"))
            address = self._maps(stage, "latents", shapes)
            dtype = self.spec.program_of(place).map_dtype
            last = stage.receive("map", (rows, columns, place.out_channels), address, dtype)
            stage.synchronize()
            x = np.ascontiguousarray(last().transpose(2, 0, 1))
        return decoder.resume(x, len(shapes))[None]

    def _tiled_decoder(self, kernels: TileKernels | None = None) -> TiledDecoder:
        weights = TensorFile(self.bundle.file(self.bundle.manifest.weights["vae"]))
        return TiledDecoder(self.bundle.manifest.config.vae, weights, kernels or self.tile_kernels())

    def encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See `Executor`. What does not fit the budget is encoded on the CPU."""
        pairs = [self._encode(one[None]) for one in image]
        return np.concatenate([mean for mean, _ in pairs]), np.concatenate([logvar for _, logvar in pairs])

    def _encode(self, image: FloatArray) -> tuple[FloatArray, FloatArray]:
        config = self.bundle.manifest.config
        height, width = image.shape[2] // config.vae.scale, image.shape[3] // config.vae.scale
        sizes = _sizes(latent_height=height, latent_width=width)
        maps = maps_between(encoder_blocks(config), height, width)
        shapes: list[Shapes] = [{"image": image.shape}, *({MAP: (1, *one)} for one in maps)]
        moments = (1, config.vae.latent_channels, height, width)

        def run(stage: LoadedStage) -> tuple[FloatArray, FloatArray]:
            stage.send("image", image, stage.buffer("image"))
            self._maps(stage, "image", shapes, {name: stage.buffer(name) for name in ("mean", "logvar")})
            mean, logvar = (stage.receive(name, moments, stage.buffer(name)) for name in ("mean", "logvar"))
            self.device.synchronize(self._machine.compute)
            return mean(), logvar()

        if plan_stage(Program.ENCODER, self.spec, config, sizes, self.vram) is None:
            found = self._host.encode(image)
            self._host.release()
            return found
        return self._stage(Program.ENCODER, sizes, lambda places: list(zip(places, shapes, strict=True)), run)

    def _maps(
        self, stage: LoadedStage, source: str, shapes: list[Shapes], outputs: dict[str, int] | None = None
    ) -> int:
        """The blocks of the autoencoder, whose maps take turns in two buffers. Without `outputs`, the last one's map
        is in the buffer that is returned."""
        buffers = (stage.buffer("even"), stage.buffer("odd"))
        last = len(shapes) - 1
        stage.begin()
        for index, shape in enumerate(shapes):
            inputs = {MAP: buffers[(index - 1) % 2]} if index else {source: stage.buffer(source)}
            results = outputs if outputs and index == last else {MAP_OUT: buffers[index % 2]}
            stage.block(index, [({**inputs, **results}, shape)])
        return buffers[last % 2]

    def _stage(
        self,
        program: Program,
        sizes: ImageSizes,
        runs: Runs,
        run: Callable[[LoadedStage], Result],
    ) -> Result:
        """Brings a stage onto the device for an image's sizes and runs it. Whatever fails, nothing stays behind."""
        plan = plan_stage(program, self.spec, self.bundle.manifest.config, sizes, self.vram)
        if plan is None:
            raise ExecutorError(f"{program} does not fit in the VRAM budget")  # the callers asked before
        try:
            stage = self._stages.get(program)
            if stage is not None and stage.plan.resident != plan.resident:
                self.release(program)
                stage = None
            others = set(self._stages) - {program}
            if others and not self._keep_all:
                self.release(*others)
            if stage is None:
                stage = self._stages[program] = LoadedStage(self._machine, program, plan)
                stage.prepare(plan, runs(plan.needs.blocks))
                stage.load()
            else:
                stage.prepare(plan, runs(plan.needs.blocks))
            return run(stage)
        except BaseException:
            self._abandon()
            raise

    def tile_kernels(self) -> TileKernels:
        """See `Executor`. What does not fit the budget is decoded on the host."""
        return NumpyTileKernels()

    def release(self, *programs: Program) -> None:
        """See `Executor`."""
        if not self._stages or (programs and not set(programs) & set(self._stages)):
            return
        try:
            self._settle()
            for program in programs or tuple(self._stages):
                stage = self._stages.pop(program, None)
                if stage is not None:
                    stage.release()
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Frees everything, the engines too."""
        self.release()
        self._machine.weights.close()
        self.engines.close()

    def _settle(self) -> None:
        """Waits until nothing is under way."""
        self.device.synchronize(self._machine.copies)
        self.device.synchronize(self._machine.compute)

    def _abandon(self) -> None:
        """Frees what can be freed after a failure, whose own error is what the caller must see."""
        for free in (self._settle, *(self._stages.pop(program).release for program in tuple(self._stages))):
            with contextlib.suppress(Exception):
                free()


def _sizes(**values: int) -> ImageSizes:
    """Sizes of which a stage only looks at these."""
    return replace(_OF_NO_IMAGE, **values)


def _token_shapes(tokens: int, width: int, rotary: Rotary) -> Shapes:
    half = rotary.cos.shape[2]
    return {"x": (1, tokens, width), "cos": (1, tokens, half), "sin": (1, tokens, half)}


def open_executor(bundle: Bundle, vram: int | None = None, note: Note = lambda text: None) -> TensorRtExecutor:
    """The executor for the GPU at hand. `vram` is a budget in bytes; by default, what is free.

    Raises `ExecutorError` without package, driver or GPU, and `BundleError` for a bundle without block programs.
    """
    from .cuda import CudaDevice
    from .trt_api import Library

    library = Library()
    device = CudaDevice()
    catalog = read_catalog(bundle)  # after the GPU: without one, that is what the user must hear
    store = EngineStore(bundle, catalog, library, device.capability, note)
    free, total = device.memory()
    available = min(free + CONTEXT_BYTES, total)  # CUDA's own needs are taken already
    spec = variant_spec(catalog, device.capability)
    budget = available if vram is None else min(vram, available)
    return TensorRtExecutor(bundle, device, store, spec, budget, int(available_memory() * _PINNED_SHARE))


def why_no_tensorrt(bundle: Bundle) -> str | None:
    """Why this executor cannot run a bundle here, in words that say what to do; None where it can."""
    from .cuda import CudaDevice
    from .trt_api import Library

    try:
        Library()
        variant_spec(read_catalog(bundle), CudaDevice().capability)
    except ZImageRuntimeError as error:
        return str(error)
    return None
