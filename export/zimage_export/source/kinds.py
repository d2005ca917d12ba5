"""What each component's file looks like, whatever precedes its names, and which of its tensors are the component's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What distinguishes a component's file."""

    title: str
    good: str  # the published file
    markers: tuple[tuple[str, ...], ...]  # tensors of each layout that it comes in, without a prefix


KINDS = {
    "transformer": Kind(
        "Z-Image transformer",
        "z_image_turbo_bf16.safetensors",
        (("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"),),
    ),
    "text_encoder": Kind(
        "Qwen3 text encoder",
        "qwen_3_4b.safetensors",
        (
            ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight"),
            ("token_embd.weight", "blk.0.attn_q_norm.weight"),  # llama.cpp
        ),
    ),
    "vae": Kind("VAE", "ae.safetensors", (("encoder.conv_in.weight", "decoder.conv_in.weight"),)),
}
"""By component."""

LIKE_Z_IMAGE = ("cap_embedder.0.weight",)
"""What the transformers of Z-Image, Lumina 2 and their relatives all have."""


def component_tensors(part: str, tensors: Mapping[str, T]) -> dict[str, T] | None:
    """The tensors of a component without what precedes their names; None for a file without the component.

    Every name may have a prefix, as in a file that contains more than this component; it is whatever precedes the
    component's markers.
    """
    for markers in KINDS[part].markers:
        prefix = find_prefix(tensors, markers)
        if prefix is not None:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return None


def find_prefix(names: Iterable[str], markers: tuple[str, ...]) -> str | None:
    """The shortest prefix under which all of these tensors are."""
    every = set(names)
    first = markers[0]
    prefixes = {name.removesuffix(first) for name in every if name == first or name.endswith(f".{first}")}
    fitting = [prefix for prefix in prefixes if all(f"{prefix}{marker}" in every for marker in markers)]
    return min(fitting, key=lambda prefix: (len(prefix), prefix), default=None)


def parts_in(tensors: Mapping[str, object]) -> list[str]:
    """The components that a file contains."""
    return [part for part in KINDS if component_tensors(part, tensors) is not None]
