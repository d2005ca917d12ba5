"""The modules of a model that adapters change, by every name that files give them."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..model.blocks import program_blocks, text_blocks
from ..model.comfyui_names import to_comfyui
from ..model.config import ModelConfig
from ..model.linears import Linear, block_linears, layer_linears, modulation_linears
from ..model.norms import NormKind, block_norms
from ..model.programs import Program
from .names import squeezed


@dataclass(frozen=True)
class Target:
    """A tensor of the model that an adapter changes: a linear's weight, or whatever else `.diff` may be of."""

    component: str  # `transformer` or `text_encoder`
    name: str  # of the module, in diffusers' words: `layers.0.attention.to_q`
    shape: tuple[int, ...]  # of its weight
    bias: bool = False
    runs: bool = True  # false for the text encoder's last layer, whose result is never used

    @property
    def linear(self) -> bool:
        """Whether it multiplies: what is no linear has no low-rank change."""
        return len(self.shape) == 2 and not self.name.endswith("_pad_token")

    @property
    def weight(self) -> str:
        """The name of the tensor in the component; pads are no modules, and have no `.weight`."""
        return self.name if self.name.endswith("_pad_token") else f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        """The name of its bias."""
        return f"{self.name}.bias"

    @property
    def block(self) -> str:
        """`layers.7`; empty outside of blocks."""
        parts = self.name.split(".", 2)
        return ".".join(parts[:2]) if len(parts) == 3 and parts[1].isdigit() else ""


@dataclass(frozen=True)
class Place:
    """Where a file's module lies in the model."""

    targets: tuple[Target, ...]  # several for a fused projection: equal ranges of its rows
    native: bool = False  # under the name of ComfyUI's files, where diffusers has another


def places(config: ModelConfig) -> dict[str, Place]:
    """Every module of a model by its squeezed name, of both kinds."""
    found: dict[str, Place] = {}
    by_weight: dict[str, Target] = {}
    for target in _targets(config):
        found[squeezed(target.name)] = Place((target,))
        if target.component == "transformer":
            by_weight[target.weight] = target
    for native, parts in to_comfyui("transformer", by_weight).items():
        name = squeezed(native.removesuffix(".weight"))
        if name not in found and all(part in by_weight for part in parts):
            found[name] = Place(tuple(by_weight[part] for part in parts), native=True)
    return found


def _targets(config: ModelConfig) -> Iterator[Target]:
    modulation = modulation_linears(config)
    blocks = [*program_blocks(Program.CAPTION, config), *program_blocks(Program.DENOISER, config)]
    for linear in (modulation.hidden, modulation.embedding, *modulation.blocks, modulation.final):
        yield _of(linear, "transformer")
    for place in blocks:
        for linear in block_linears(place, config):
            yield _of(linear, "transformer", place.tensor(linear.name))
        for norm in block_norms(place, config):
            if norm.kind is not NormKind.LAYER:
                yield Target("transformer", place.tensor(norm.name), (norm.width,))
    dim = config.transformer.dim
    for pad in ("x_pad_token", "cap_pad_token"):
        yield Target("transformer", pad, (1, dim))
    linears = layer_linears("text_encoder", config)
    for index in range(config.text_encoder.num_hidden_layers):
        runs = index < config.text_encoder.used_layers
        for linear in linears:
            yield _of(linear, "text_encoder", f"layers.{index}.{linear.name}", runs=runs)
    for place in text_blocks(config):
        for norm in block_norms(place, config):
            yield Target("text_encoder", place.tensor(norm.name), (norm.width,))


def _of(linear: Linear, component: str, name: str = "", *, runs: bool = True) -> Target:
    return Target(component, name or linear.name, (linear.out_width, linear.in_width), linear.bias, runs)
