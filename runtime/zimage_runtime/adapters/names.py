"""The names of tensors in adapters' files: which module of the model each belongs to, and what it is of it.

Trainers write the same module as ``transformer.layers.0.attention.to_q``, ``lora_unet_layers_0_attention_to_q`` and
``layers.0.attention.to.q``, with a dozen prefixes. Without separators all of these are one text, in which no two
modules of the model are the same: that is how modules are looked up.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a tensor is of its module's change."""

    DOWN = "down"  # LoRA: [rank, in]
    UP = "up"  # LoRA: [out, rank]
    ALPHA = "alpha"
    SCALE = "scale"  # in place of alpha over rank
    MAGNITUDE = "magnitude"  # DoRA: [out], [out, 1] or [1, in]
    DIFF = "diff"  # of the weight
    DIFF_BIAS = "diff_b"
    W1 = "lokr_w1"
    W1_A = "lokr_w1_a"
    W1_B = "lokr_w1_b"
    W2 = "lokr_w2"
    W2_A = "lokr_w2_a"
    W2_B = "lokr_w2_b"
    H1_A = "hada_w1_a"
    H1_B = "hada_w1_b"
    H2_A = "hada_w2_a"
    H2_B = "hada_w2_b"


@dataclass(frozen=True)
class Parsed:
    """A tensor's name, taken apart."""

    module: str  # as the file writes it
    part: Part
    adapter: str = ""  # PEFT's name for one of several adapters


_ADAPTER = r"(?:\.(?!weight$)(?P<adapter>[^.]+))?"
_LOW_RANK = {
    Part.DOWN: rf"(?:lora[._]down|lora_linear_layer\.down|lora_A{_ADAPTER})(?:\.weight)?",
    Part.UP: rf"(?:lora[._]up|lora_linear_layer\.up|lora_B{_ADAPTER})(?:\.weight)?",
    Part.MAGNITUDE: rf"(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)",
}
_PATTERNS = [
    *((part, pattern) for part, pattern in _LOW_RANK.items()),
    *((part, re.escape(part.value)) for part in Part if part not in _LOW_RANK),
]
_TAILS = [(part, re.compile(rf"(?P<module>.+?)[._]{pattern}$")) for part, pattern in _PATTERNS]

_PREFIXES = re.compile(
    r"^(?:basemodelmodel|modeldiffusionmodel|diffusionmodel|transformer|loraunet|loratransformer|lycoris)+(?=.)"
)
_TEXT_PREFIXES = re.compile(
    r"^(?:basemodelmodel|textencoders|textencoder|lorate\d?|lycoriste|qwen34b|qwen3|transformer|model)+(?=.)"
)


def parse(name: str) -> Parsed | None:
    """A tensor's module and part; None for a name of no scheme that is known."""
    for part, pattern in _TAILS:
        if found := pattern.match(name):
            return Parsed(found["module"], part, found.groupdict().get("adapter") or "")
    return None


def squeezed(name: str) -> str:
    """A name without separators, in lower case."""
    return re.sub(r"[._\-/]", "", name).lower()


def candidates(module: str) -> list[str]:
    """What a file's module may be called in the model, squeezed: with prefixes, and without them."""
    plain = squeezed(module)
    return list(dict.fromkeys((plain, _PREFIXES.sub("", plain), _TEXT_PREFIXES.sub("", plain))))


_OTHER_MODELS = (
    ("Flux", r"doubleblocks|singleblocks|singletransformerblocks"),
    ("Stable Diffusion 3", r"jointblocks"),
    ("Qwen-Image", r"transformerblocks\d+(?:imgmlp|txtmlp|imgmod|attnaddq)"),
    ("Stable Diffusion", r"downblocks|upblocks|midblock|inputblocks|middleblock|outputblocks|lorate\d?textmodel"),
    ("Wan", r"blocks\d+(?:crossattn|selfattn)"),
    ("another model", r"transformerblocks"),
)
"""What names modules have in files for other models, squeezed."""


def other_model(names: list[str]) -> str | None:
    """The model that a file with these names is for, where it is a known one that is not Z-Image."""
    text = "\n".join(squeezed(name) for name in names)
    return next((model for model, pattern in _OTHER_MODELS if re.search(pattern, text)), None)
