"""Powers of two that are divided out of weights so that fp16 does not overflow, without changing any result.

In a transformer block of the published model, two values exceed fp16's range: the output of the attention's
out-projection and the SwiGLU product that `w2` reads. Both branches end in an RMS norm, which ignores scale. So
`to_out` and `w3` are divided by 2**k, and that norm's epsilon by 2**2k: the same result, bit for bit, in float32 and
bf16. In Qwen3 the branches end in the residual stream; there `v_proj` and `up_proj` are divided, and the branch's
output is multiplied back in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zimage_runtime.model.linears import LAYER_LINEARS


@dataclass(frozen=True)
class BlockFold:
    """The exponents k of one block. Zero leaves the block as published."""

    attention: int = 0  # divided out of to_out (Qwen3: v_proj)
    ffn: int = 0  # divided out of w3 (Qwen3: up_proj)
    product: int = 0  # divided out of the SwiGLU product by a multiplication, where weights cannot take more


Folds = Mapping[str, BlockFold]
"""By block: `layers.7`, `noise_refiner.0`, `context_refiner.1`."""

NO_FOLD = BlockFold()

_ATTENTION = {
    "transformer": f"{LAYER_LINEARS['transformer'].out}.weight",
    "text_encoder": f"{LAYER_LINEARS['text_encoder'].value}.weight",
}
_FFN = {component: f"{names.up}.weight" for component, names in LAYER_LINEARS.items()}


def weight_exponent(folds: Folds, name: str) -> int:
    """The power of two that a stored weight is multiplied by: 0 or less."""
    block, tail = _split(name)
    fold = folds.get(block, NO_FOLD)
    if tail in _ATTENTION.values():
        return -fold.attention
    if tail in _FFN.values():
        return -fold.ffn
    return 0


def folded_weights(component: str, block: str) -> tuple[str, str]:
    """The names of the weights that a block's attention and feed-forward exponents apply to."""
    return f"{block}.{_ATTENTION[component]}", f"{block}.{_FFN[component]}"


def block_of(name: str) -> str:
    """The block that a tensor belongs to; empty for one outside the blocks."""
    return _split(name)[0]


def _split(name: str) -> tuple[str, str]:
    """`layers.7.attention.to_q.weight` → (`layers.7`, `attention.to_q.weight`)."""
    parts = name.split(".", 2)
    return (f"{parts[0]}.{parts[1]}", parts[2]) if len(parts) == 3 else ("", name)


def read_folds(plain: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Folds]:
    """A manifest's folds, by component."""
    return {
        component: {block: BlockFold(**fold) for block, fold in blocks.items()} for component, blocks in plain.items()
    }
