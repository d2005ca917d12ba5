"""What `zimage-rt run` was given: options on one side, a checked request on the other."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimage_runtime.errors import RequestError

if TYPE_CHECKING:
    from zimage_runtime.adapters.given import GivenLora
    from zimage_runtime.events import Request
    from zimage_runtime.images.metadata import ImageInfo

GROUPS = {
    "Common options": ("model", "output", "size", "steps", "seed", "count", "replay"),
    "Image to image": ("image", "strength", "mask", "mask_grow"),
    "Guidance": ("negative", "cfg_scale", "cfg_normalization", "cfg_truncation"),
    "LoRA": ("lora", "lora_allow_unused"),
    "Control": ("control", "controlnet", "control_type", "control_scale", "control_start", "control_end"),
    "Sampling": ("sampler", "scheduler", "shift", "variation"),
    "Execution": ("executor", "device", "vram", "low_memory", "trust_engines"),
    "Output": ("preview", "no_metadata", "as_json", "quiet"),
}
"""Of `--help`, in order."""


@dataclass(frozen=True)
class RunOptions:
    """The values of all options, by the names of their parameters; None where an option was not given."""

    prompt: str | None
    model: str | None
    output: Path | None
    size: tuple[int, int] | None
    steps: int | None
    seed: int | None
    count: int
    replay: Path | None
    image: Path | None
    strength: float | None
    mask: Path | None
    mask_grow: int
    negative: str | None
    cfg_scale: float | None
    cfg_normalization: bool
    cfg_truncation: float | None
    lora: tuple[str, ...]
    lora_allow_unused: bool
    control: Path | None
    controlnet: Path | None
    control_type: str | None
    control_scale: float | None
    control_start: float | None
    control_end: float | None
    sampler: str | None
    scheduler: str | None
    shift: float | None
    variation: tuple[int, float] | None
    executor: str
    device: int
    vram: int | None
    low_memory: bool
    trust_engines: bool
    preview: Path | None
    no_metadata: bool
    as_json: bool
    quiet: bool

    def check(self) -> None:
        """Raises `UsageError` for options that contradict each other."""
        if (self.prompt is None) == (self.replay is None):
            raise click.UsageError("give a PROMPT, or --replay FILE, and not both")
        if self.replay is not None:
            given = [option for option, value in self._recorded() if value]
            if given:
                raise click.UsageError(f"--replay takes {' and '.join(given)} from the file; leave out what it takes")
        if self.preview is not None and self.preview == self.output:
            raise click.UsageError("--preview and --output are the same file; give the preview another name")
        if self.replay is None and self.image is None and (self.strength is not None or self.mask is not None):
            raise click.UsageError("--strength and --mask need a source image: give it with --image")
        if self.mask is None and self.mask_grow:
            raise click.UsageError("--mask-grow widens a mask: give one with --mask")
        if self.replay is None and (self.control is None) != (self.controlnet is None):
            raise click.UsageError("--control and --controlnet go together: give an image and a ControlNet's folder")
        settings = (self.control_type, self.control_scale, self.control_start, self.control_end)
        if self.replay is None and self.control is None and any(value is not None for value in settings):
            raise click.UsageError("--control-type, --control-scale, --control-start and --control-end need --control")

    def _recorded(self) -> tuple[tuple[str, Any], ...]:
        """What an image file holds, by option, and whether it was given."""
        return (
            ("--size", self.size is not None),
            ("--steps", self.steps is not None),
            ("--seed", self.seed is not None),
            ("--count", self.count != 1),
            ("--strength", self.strength is not None),
            ("--mask-grow", self.mask_grow),
            ("--negative", self.negative is not None),
            ("--cfg-scale", self.cfg_scale is not None),
            ("--cfg-normalization", self.cfg_normalization),
            ("--cfg-truncation", self.cfg_truncation is not None),
            ("--sampler", self.sampler is not None),
            ("--scheduler", self.scheduler is not None),
            ("--shift", self.shift is not None),
            ("--variation", self.variation is not None),
            ("--control-type", self.control_type is not None),
            ("--control-scale", self.control_scale is not None),
            ("--control-start", self.control_start is not None),
            ("--control-end", self.control_end is not None),
        )

    def given_loras(self) -> "list[GivenLora]":
        """Files and weights. Raises `AdapterError`."""
        from zimage_runtime.adapters.given import GivenLora

        return [GivenLora.parse(text) for text in self.lora]

    def request(self, recorded: "ImageInfo | None") -> "Request":
        """The request: what the options say or, for a replay, what the file does."""
        from zimage_runtime.events import Request

        if recorded is not None:
            return _replayed(recorded, self)
        settings = {
            "sampler": self.sampler,
            "scheduler": self.scheduler,
            "negative": self.negative,
            "cfg_truncation": self.cfg_truncation,
            "control_scale": self.control_scale,
            "control_start": self.control_start,
            "control_end": self.control_end,
        }
        return Request(
            self.prompt or "",
            size=self.size,
            steps=self.steps,
            seed=self.seed,
            count=self.count,
            image=self.image,
            strength=self.strength,
            mask=self.mask,
            mask_grow=self.mask_grow,
            cfg_scale=self.cfg_scale,
            cfg_normalization=self.cfg_normalization,
            shift=self.shift,
            variation=self.variation,
            loras=self.lora,
            lora_allow_unused=self.lora_allow_unused,
            control=self.control,
            controlnet=self.controlnet,
            control_type=self.control_type,
            **{name: value for name, value in settings.items() if value is not None},  # type: ignore[arg-type]
        )

    def check_sources(self, recorded: "ImageInfo") -> None:
        """An image file holds only the hashes of the images that it was generated from. Raises `RequestError`."""
        for option, given, wanted in (
            ("--image", self.image, recorded.image),
            ("--mask", self.mask, recorded.mask),
            ("--control", self.control, recorded.control),
        ):
            if wanted and given is None:
                raise RequestError(
                    f"{self.replay}: was generated from another image, which is needed again; give it with {option}"
                )
            if given is not None and not wanted:
                raise RequestError(f"{self.replay}: was generated without {option}; leave it out")
        if recorded.controlnet is not None and self.controlnet is None:
            raise RequestError(
                f"{self.replay}: was generated with the ControlNet {recorded.controlnet}; give it with --controlnet"
            )
        names = ", ".join(f"{one.name} ({one.hash[:12]})" for one in recorded.loras)
        if len(self.lora) != len(recorded.loras):
            needed = (
                f"with {names}; give each file with --lora, in this order" if names else "without --lora; leave it out"
            )
            raise RequestError(f"{self.replay}: was generated {needed}")
        for text, lora, one in zip(self.lora, self.given_loras(), recorded.loras, strict=True):
            if text != lora.file and lora.weight != one.weight:
                raise RequestError(
                    f"--lora {text}: {self.replay} was generated with a weight of {one.weight:g}; leave the weight out"
                )

    def check_loras(self, recorded: "ImageInfo", now: "ImageInfo") -> None:
        """Raises `RequestError` for a file that is another LoRA than the image was generated with."""
        for text, wanted, found in zip(self.lora, recorded.loras, now.loras, strict=True):
            if found.hash != wanted.hash:
                raise RequestError(
                    f"--lora {text}: is {found.hash[:12]}, and {self.replay} was generated with {wanted.name}, "
                    f"{wanted.hash[:12]}"
                )


def _replayed(recorded: "ImageInfo", options: RunOptions) -> "Request":
    """The request of an image's metadata. Weights of LoRA are the image's, whatever was given."""
    from zimage_runtime.events import DEFAULT_CONTROL_SCALE, Request

    given = [one.file for one in options.given_loras()]
    seed, strength = recorded.variation_seed, recorded.variation_strength
    return Request(
        recorded.prompt,
        size=(recorded.width, recorded.height),
        steps=recorded.steps,
        seed=recorded.seed,
        image=options.image,
        strength=recorded.strength,
        mask=options.mask,
        mask_grow=recorded.mask_grow,
        cfg_scale=recorded.cfg_scale,
        negative=recorded.negative,
        cfg_normalization=recorded.cfg_normalization,
        cfg_truncation=recorded.cfg_truncation,
        sampler=recorded.sampler,
        scheduler=recorded.scheduler,
        shift=recorded.shift,
        variation=None if seed is None or strength is None else (seed, strength),
        loras=[(file, one.weight) for file, one in zip(given, recorded.loras, strict=True)],
        lora_allow_unused=options.lora_allow_unused,
        control=options.control,
        controlnet=options.controlnet,
        control_type=recorded.control_type,
        control_scale=DEFAULT_CONTROL_SCALE if recorded.control_scale is None else recorded.control_scale,
        control_start=recorded.control_start,
        control_end=recorded.control_end,
    )
