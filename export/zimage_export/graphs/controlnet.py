"""A ControlNet as programs: tokens (once per image), modulation (once per schedule), refiner and layers (each step).

A control block is a block of the transformer on the control tokens and, after it, a linear that gives the hint
(``controlnet_z_image.py`` in diffusers). The first block's input is a linear of the control tokens plus the model's
tokens. Hints are multiplied by the scale where they are made.
"""

import dataclasses
from dataclasses import dataclass

from zimage_runtime.bundle.tensors import DType
from zimage_runtime.model.control import AFTER, BEFORE, COMPONENT, EMBEDDER, ControlConfig, Refiner
from zimage_runtime.model.linears import Linear
from zimage_runtime.model.programs import Program, hint_name

from .builder import Graph, GraphBuilder
from .layers import Layers
from .target import PROGRAM_SETS, Target
from .transformer_block import BlockGraphs, norm_rows, pad, patchify, tables_of_images


@dataclass(frozen=True)
class ControlGraphs:
    """Builds the programs of a ControlNet."""

    config: ControlConfig
    target: Target

    @property
    def _blocks(self) -> BlockGraphs:
        return BlockGraphs(self.config, self.target)

    def build(self, program: Program) -> Graph:
        """One of the ControlNet's programs."""
        match program:
            case Program.CONTROL_TOKENS:
                return self._tokens()
            case Program.CONTROL_MODULATION:
                return self._modulation()
            case Program.CONTROL_REFINER:
                return self._hints(program, self.config.refiner_blocks, self.config.refiner is Refiner.CONTROL)
            case Program.CONTROL_LAYERS:
                return self._hints(program, self.config.layer_blocks, True)
            case _:
                raise ValueError(f"{program} is no program of a ControlNet")

    def _builder(self, program: Program) -> GraphBuilder:
        c = self.config
        dims = {
            "dim": c.dim,
            "half_head": c.head_dim // 2,
            "control_channels": c.channels,
            "adaln_dim": c.adaln_dim,
            "control_blocks": len(c.blocks),
            "refiner_blocks": len(c.refiner_blocks),
            "layer_blocks": len(c.layer_blocks),
        }
        return self.target.builder(program, dims)

    def _tokens(self) -> Graph:
        """Latents of the control image → its tokens, with the model's pads."""
        c, b = self.config, self._builder(Program.CONTROL_TOKENS)
        layers = self.target.layers(b)
        patches, _ = patchify(b, b.integers(1), c.channels)
        x = layers.linear(layers.rows(patches, c.patch_dim), Linear(EMBEDDER, c.dim, c.patch_dim, bias=True))
        x = layers.reshape(x, b.integers(1, -1, c.dim), "tokens")
        b.output(pad(b, x, "pad_token", "image_cos", "x_pad", c.dim), "control")
        return b.build()

    def _modulation(self) -> Graph:
        """Embeddings of timesteps → what each block's norms multiply by."""
        c, b = self.config, self._builder(Program.CONTROL_MODULATION)
        layers = self.target.layers(b)
        linears = [Linear(f"{block}.adaLN_modulation.0", 4 * c.dim, c.adaln_dim, bias=True) for block in c.blocks]
        tables = [
            self._blocks.modulation(layers, "embedding", block, linear)
            for block, linear in zip(c.blocks, linears, strict=True)
        ]
        b.output(b.op("Concat", *tables, name="stack", axis=1), "modulation")
        return b.build()

    def _hints(self, program: Program, names: tuple[str, ...], gives_hints: bool) -> Graph:
        """Control tokens and tokens → hints, times the scale, and control tokens."""
        c, b = self.config, self._builder(program)
        layers = self.target.layers(b)
        x, tokens = (b.input(name, DType.F32) for name in ("control", "tokens"))
        if gives_hints:
            with b.scope(names[0]):
                x = layers.residual(tokens, self._projected(layers, x, BEFORE), "start")
        batch = b.dim(x, 0, "batch")
        tables = tables_of_images(b, "cos", "sin", batch, "rotary")
        shape = b.op("Shape", x, name="shape")
        rows = norm_rows(layers, "modulation", len(names), c.dim)
        for index, (name, norms) in enumerate(zip(names, rows, strict=True)):
            with b.scope(name):
                x = self._blocks.block(layers, x, shape, norms, tables, self.target.fold(COMPONENT, name))
                if gives_hints:
                    hint = b.op("Mul", self._projected(layers, x, AFTER), "scale", name="hint")
            if gives_hints:
                b.extra_output(hint, hint_name(index), ("batch", "tokens", c.dim), layers.hints)
        b.output(x, "control_out")
        return b.build()

    def _projected(self, layers: Layers, x: str, name: str) -> str:
        """A linear of the residual stream itself, in float32: no norm keeps its values within fp16's range."""
        b, dim = layers.b, self.config.dim
        wide = layers if layers.compute is DType.BF16 else dataclasses.replace(layers, compute=DType.F32)
        y = wide.plain_linear(layers.rows(x, dim, f"{name}.rows"), Linear(name, dim, dim, bias=True))
        return b.cast(layers.reshape(y, b.op("Shape", x, name=f"{name}.shape"), f"{name}.tokens"), DType.F32)


CONTROL_SETS = ("cpu", "cuda", "cuda-weight-only", "webgpu", "webgpu-fused")
"""The sets that a ControlNet gets programs of; TensorRT's are block programs, which take no hints."""

_LONG = (Program.CONTROL_REFINER, Program.CONTROL_LAYERS)
"""The programs of which further sets have another form: those with attention."""


def control_programs(config: ControlConfig, target: Target) -> list[Program]:
    """The programs that a ControlNet gets for a target."""
    programs = PROGRAM_SETS[target.executor]
    on_host = (Program.CONTROL_MODULATION,)  # what is computed once for a schedule
    if programs.executor == "cpu":
        return list(config.programs)
    if programs.variant_of:
        return [program for program in config.programs if program in _LONG]
    return [program for program in config.programs if program not in on_host]
