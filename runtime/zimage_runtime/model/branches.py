"""The inputs of *extended* programs: branches beside each linear layer, for LoRA that change no weight.

A linear layer W [out, in] with its branches gives

    factor ∘ (x Wᵀ) + bias + (x downᵀ) upᵀ + rows ∘ Σ_k ((columns ∘ x) (outer_k ⊗ inner_kᵀ)ᵀ)

The third is low-rank; the fourth is a sum of Kronecker products, which are small; `factor` is DoRA's, one number per
output channel. All are inputs, in float32. Without a branch they have a rank of 0 or zeros, a channel of zeros that is
added to all, and factors of one: an extended program then gives the bits of the one that it extends.

An extended denoiser also has an input for each layer, a *hint* that a ControlNet adds after it: [batch, tokens, dim],
or [1, 1, dim] of zeros. What a bundle computes for a ControlNet besides comes extended only.
"""

from dataclasses import replace

from .blocks import IMAGE_EMBEDDER, noise_blocks, program_blocks
from .config import ModelConfig
from .linears import Linear, block_linears, modulation_linears
from .programs import CONTROLLED_PROGRAMS, Program

EXTENDED = (Program.CAPTION, Program.MODULATION, Program.DENOISER)
"""The programs that come extended, too: those of the transformer."""

ALL_EXTENDED = (*EXTENDED, *CONTROLLED_PROGRAMS)
"""Those and the ones that come extended only."""


def down_input(linear: str) -> str:
    """The input of a layer's branch that is [rank, in], by the layer's name in the component."""
    return f"lora.{linear}.down"


def up_input(linear: str) -> str:
    """The one that is [out, rank], or [1, rank] where there is no branch."""
    return f"lora.{linear}.up"


def outer_input(linear: str) -> str:
    """The outer factors of a layer's Kronecker products, [a, b, products], where a c = out and b d = in."""
    return f"lora.{linear}.outer"


def inner_input(linear: str) -> str:
    """The inner factors, transposed: [d, products, c]."""
    return f"lora.{linear}.inner"


def columns_input(linear: str) -> str:
    """What the input of the Kronecker products is multiplied by: [in], or [1] where there are none."""
    return f"lora.{linear}.columns"


def rows_input(linear: str) -> str:
    """What their output is multiplied by: [out] or [1]."""
    return f"lora.{linear}.rows"


def factor_input(linear: str) -> str:
    """What the layer's own output, without its bias, is multiplied by: [out] or [1]."""
    return f"lora.{linear}.factor"


def branch_linears(program: Program, config: ModelConfig) -> list[Linear]:
    """The linear layers of an extended program, under their names in the component."""
    found = modulation_linears(config)
    match program:
        case Program.MODULATION:
            return [found.hidden, found.embedding, *found.blocks, found.final]
        case Program.TIMESTEP:
            return [found.hidden, found.embedding]
        case Program.TOKENS:
            places = [IMAGE_EMBEDDER]
        case Program.REFINERS:
            places = noise_blocks(config)
        case _:
            places = program_blocks(program, config)
    pairs = [(place, linear) for place in places for linear in block_linears(place, config)]
    return [replace(linear, name=place.tensor(linear.name)) for place, linear in pairs]
