"""The inputs of *extended* programs: branches beside each linear layer, for LoRA that change no weight.

A linear layer W [out, in] with its branches gives x Wᵀ + (x downᵀ) upᵀ + rows ∘ ((columns ∘ x) (outer ⊗ innerᵀ)ᵀ). The
second is low-rank, the third a Kronecker product: outer [a, b] and inner [d, c] with a c = out and b d = in are small,
and rows and columns are one factor for each channel, or one for all. All are inputs, in float32. With a rank of 0 or
zeros, and an outer and inner of a single zero, an extended program gives the bits of the one that it extends.
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


def outer_input(linear: str) -> str:
    """The outer factor of a layer's Kronecker product, [a, b]."""
    return f"lora.{linear}.outer"


def inner_input(linear: str) -> str:
    """The inner factor, transposed: [d, c]."""
    return f"lora.{linear}.inner"


def columns_input(linear: str) -> str:
    """What the product's input is multiplied by: [in] or [1]."""
    return f"lora.{linear}.columns"


def rows_input(linear: str) -> str:
    """What its output is multiplied by: [out] or [1]."""
    return f"lora.{linear}.rows"


def branch_linears(program: Program, config: ModelConfig) -> list[Linear]:
    """The linear layers of an extended program, under their names in the component."""
    if program is Program.MODULATION:
        found = modulation_linears(config)
        return [found.hidden, found.embedding, *found.blocks, found.final]
    places = program_blocks(program, config)
    pairs = [(place, linear) for place in places for linear in block_linears(place, config)]
    return [replace(linear, name=place.tensor(linear.name)) for place, linear in pairs]
