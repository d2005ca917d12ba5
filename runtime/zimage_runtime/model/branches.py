"""The inputs of *extended* programs: a low-rank branch beside each linear layer, for LoRA that change no weight.

A linear layer W [out, in] with a branch gives x Wᵀ + (x downᵀ) upᵀ. Both matrices are inputs, float32, in the layout of
LoRA's files. With a rank of 0, or with zeros, an extended program gives the bits of the one that it extends.
"""

from dataclasses import replace

from .blocks import program_blocks
from .config import ModelConfig
from .linears import Linear, block_linears, modulation_linears
from .programs import Program

EXTENDED = (Program.CAPTION, Program.MODULATION, Program.DENOISER)
"""The programs that come extended, too: those of the transformer."""


def down_input(linear: str) -> str:
    """The input of a layer's branch that is [rank, in], by the layer's name in the component."""
    return f"lora.{linear}.down"


def up_input(linear: str) -> str:
    """The one that is [out, rank]."""
    return f"lora.{linear}.up"


def branch_linears(program: Program, config: ModelConfig) -> list[Linear]:
    """The linear layers of an extended program, under their names in the component."""
    if program is Program.MODULATION:
        found = modulation_linears(config)
        return [found.hidden, found.embedding, *found.blocks, found.final]
    places = program_blocks(program, config)
    pairs = [(place, linear) for place in places for linear in block_linears(place, config)]
    return [replace(linear, name=place.tensor(linear.name)) for place, linear in pairs]
