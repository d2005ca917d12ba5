"""A step under a ControlNet, whatever the device: from latents to the hints that the denoiser takes.

Programs of the bundle and of the ControlNet's folder take turns, for none can read weights of both. What does not
depend on the latents is computed once: the control image's tokens, and the modulation of each timestep.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from ...arrays import FloatArray
from ...model.branches import ALL_EXTENDED
from ...model.config import ModelConfig
from ...model.control import Refiner
from ...model.geometry import Rotary
from ...model.programs import Program, hint_name
from ..protocol import Conditioning, Control

V = TypeVar("V")  # a value where the executor keeps values

Shape = tuple[int, ...]


class ControlRunner(Protocol[V]):
    """What a session does for a step under control."""

    def upload(self, values: FloatArray) -> V:
        """An array, for as long as the steps take."""

    def no_hint(self) -> V:
        """[1, 1, dim] of zeros, in the type of hints."""

    def run_host(self, program: Program, feeds: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """Runs a program on the host's processor."""

    def run_step(self, program: Program, inputs: Mapping[str, V], outputs: Mapping[str, Shape]) -> dict[str, V]:
        """Runs a program. Outputs whose names are hints' have the type of hints."""


@dataclass(frozen=True)
class ControlledSteps(Generic[V]):
    """The steps of one conditioning under control."""

    runner: ControlRunner[V]
    control: Control
    model: ModelConfig
    caption: V  # [1, caption_tokens, dim]
    image: Mapping[str, V]  # rotary tables of image tokens ...
    unified: Mapping[str, V]  # ... and of image and caption
    image_tokens: int
    all_tokens: int
    tokens: V  # of the control image
    refiner_rows: tuple[V, ...]  # modulation, by step
    layer_rows: tuple[V, ...]
    branches: Mapping[Program, Mapping[str, V]] = field(default_factory=dict)  # LoRA

    def hints(self, latents: V, batch: int, step: int, modulation: V) -> dict[str, V]:
        """The hints of a step, by the denoiser's inputs; none where the step is not under control."""
        if step not in self.control.steps:
            return {}
        config, dim, run = self.control.net.manifest.config, self.model.transformer.dim, self.runner.run_step
        of_image, of_all = (batch, self.image_tokens, dim), (batch, self.all_tokens, dim)
        tokens = run(
            Program.TOKENS,
            {"latents": latents, "image_cos": self.image["cos"], **self._lora(Program.TOKENS)},
            {"image": of_image},
        )["image"]
        refining, plain = config.refining, config.refiner is Refiner.PLAIN
        rows = self.layer_rows if config.refiner is Refiner.LAYERS else self.refiner_rows
        names = [hint_name(index) for index in range(self.model.transformer.n_refiner_layers)]
        control_shape = (1, *of_image[1:]) if plain else of_image
        refined = run(
            refining,
            {"control": self.tokens, "tokens": tokens, "modulation": rows[step], **self.image, **self._scale},
            {"control_out": control_shape} | ({} if plain else dict.fromkeys(names, of_image)),
        )
        if plain:
            refined |= dict.fromkeys(names, self.runner.no_hint())
        both = run(
            Program.REFINERS,
            {
                "tokens": tokens,
                "control": refined["control_out"],
                "caption": self.caption,
                "modulation": modulation,
                "image_cos": self.image["cos"],
                "image_sin": self.image["sin"],
                **{name: refined[name] for name in names},
                **self._lora(Program.REFINERS),
            },
            {"unified_tokens": of_all, "unified_control": (control_shape[0], *of_all[1:])},
        )
        del refined, tokens  # a device's memory, which the layers can use
        found = run(
            Program.CONTROL_LAYERS,
            {
                "control": both["unified_control"],
                "tokens": both["unified_tokens"],
                "modulation": self.layer_rows[step],
                **self.unified,
                **self._scale,
            },
            {hint_name(index): of_all for index in range(len(config.places))},
        )
        return {hint_name(place): found[hint_name(index)] for index, place in enumerate(config.places)}

    def _lora(self, program: Program) -> Mapping[str, V]:
        return self.branches.get(program, {})

    @property
    def _scale(self) -> dict[str, V]:
        return {"scale": self.runner.upload(np.array([self.control.scale], np.float32))}


def controlled_steps(
    runner: ControlRunner[V],
    conditioning: Conditioning,
    model: ModelConfig,
    caption: V,
    branches: Mapping[Program, Mapping[str, V]],
    timestep_branches: Mapping[str, FloatArray],
) -> ControlledSteps[V] | None:
    """What steps under control need, for a conditioning's caption tokens; None without control."""
    control = conditioning.control
    if control is None:
        return None
    image, of_caption = conditioning.image_rotary, conditioning.caption_rotary
    config, upload = control.net.manifest.config, runner.upload
    tables = {"cos": upload(image.cos), "sin": upload(image.sin)}
    unified = _joined(image, of_caption)
    image_tokens = image.cos.shape[1]
    inputs = {"latents": upload(control.latents), "pad_token": upload(control.pad_token), "image_cos": tables["cos"]}
    tokens = runner.run_step(Program.CONTROL_TOKENS, inputs, {"control": (1, image_tokens, config.dim)})["control"]
    feeds = {"timesteps": conditioning.timesteps, **timestep_branches}
    embedding = runner.run_host(Program.TIMESTEP, feeds)["embedding"]
    table = runner.run_host(Program.CONTROL_MODULATION, {"embedding": embedding})["modulation"]
    refiners = len(config.refiner_blocks)
    return ControlledSteps(
        runner=runner,
        control=control,
        model=model,
        caption=caption,
        image=tables,
        unified={"cos": upload(unified.cos), "sin": upload(unified.sin)},
        image_tokens=image_tokens,
        all_tokens=unified.cos.shape[1],
        tokens=tokens,
        refiner_rows=tuple(upload(np.ascontiguousarray(row[:refiners])) for row in table) if refiners else (),
        layer_rows=tuple(upload(np.ascontiguousarray(row[refiners:])) for row in table),
        branches={program: branches.get(program, {}) for program in ALL_EXTENDED},
    )


def _joined(image: Rotary, caption: Rotary) -> Rotary:
    cos, sin = (np.concatenate(both, axis=1) for both in ((image.cos, caption.cos), (image.sin, caption.sin)))
    return Rotary(cos, sin)


def no_hints(zero: V, model: ModelConfig) -> dict[str, V]:
    """What an extended denoiser takes where nothing is added."""
    return {hint_name(layer): zero for layer in range(model.transformer.n_layers)}
