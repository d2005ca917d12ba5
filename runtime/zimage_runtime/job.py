"""A request that was checked and planned, before any of it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .adapters.distilled import misfit
from .adapters.reader import WeightedAdapter
from .bundle.controlnet import ControlNet
from .bundle.manifest import Manifest
from .events import NoticeEvent, Request
from .executors.choose import Chosen
from .executors.protocol import Computation, Executor, Plan, Work
from .images.control_image import ControlImage
from .images.metadata import ImageInfo, LoraInfo
from .images.source_image import SourceImage
from .model.control_type import ControlType
from .model.geometry import ImageGeometry
from .model.sampling_names import SamplerName, SchedulerName
from .model.schedule import Schedule
from .sampling.guidance import Guidance, NoGuidance


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, in its template."""

    text: str
    ids: tuple[int, ...]
    cut_tokens: int  # beyond what the model sees


@dataclass(frozen=True)
class JobControl:
    """What a ControlNet adds to a request's images."""

    net: ControlNet
    image: ControlImage
    scale: float
    steps: frozenset[int]  # of the schedule

    @property
    def has_effect(self) -> bool:
        """Whether it changes anything; without a scale or steps, the request is one without control."""
        return bool(self.scale and self.steps)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request that was checked against the bundle, its defaults filled in and its images read. Not yet planned."""

    request: Request
    positive: Prompt
    negative: Prompt | None  # only where it has an effect
    schedule: Schedule
    seeds: tuple[int, ...]
    variation: tuple[int, float] | None
    source: SourceImage | None
    first_step: int
    guidance: Guidance
    loras: tuple[WeightedAdapter, ...]  # those that have an effect
    control: JobControl | None  # that has an effect
    work: Work  # what it asks of an executor
    info: ImageInfo  # of the first seed's image, without what computes it
    default_steps: int  # the bundle's


@dataclass(frozen=True)
class Job:
    """A request that was checked against the bundle and planned: its defaults filled in, its images read."""

    positive: Prompt
    negative: Prompt | None  # only where it has an effect
    geometry: ImageGeometry
    schedule: Schedule
    seeds: tuple[int, ...]
    batch_size: int
    source: SourceImage | None
    first_step: int  # of the schedule; a source image leaves out those before it
    executor: Executor
    plan: Plan
    work: Work  # what the plan was made for
    notices: tuple[NoticeEvent, ...]  # what the user should know
    choice: str | None  # which executor `auto` chose, and why
    info: ImageInfo  # of the first seed's image
    cancels: int = 0  # of the pipeline when the request came
    variation: tuple[int, float] | None = None  # the first image's other seed, and its share of the noise
    sampler: SamplerName = SamplerName.EULER
    guidance: Guidance = field(default_factory=NoGuidance)
    loras: tuple[WeightedAdapter, ...] = ()  # those that have an effect
    control: JobControl | None = None  # that has an effect

    @property
    def inpaints_by_control(self) -> bool:
        """Whether the ControlNet sees what is kept: then nothing else restores it, as in diffusers."""
        return self.control is not None and self.source is not None and self.source.mask is not None

    @property
    def prompt(self) -> str:
        """The prompt, as it was given."""
        return self.positive.text

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.positive.ids

    @property
    def prompt_ids(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of all prompts that are encoded."""
        return (self.positive.ids,) if self.negative is None else (self.positive.ids, self.negative.ids)

    def info_of(self, index: int) -> ImageInfo:
        """What decides the image of that index."""
        info = replace(self.info, seed=self.seeds[index])
        if self.variation is None:
            return info
        return replace(info, variation_seed=self.variation[0] + index)

    @property
    def steps(self) -> int:
        """Steps that are taken for each image."""
        return self.schedule.steps - self.first_step


def image_info(
    request: Request,
    manifest: Manifest,
    *,
    seed: int,
    geometry: ImageGeometry,
    steps: int,
    source: SourceImage | None,
    strength: float | None,
    scale: float | None,
    loras: Sequence[WeightedAdapter] = (),
    control: JobControl | None = None,
) -> ImageInfo:
    """What decides the image of a request whose defaults are filled in, but for what computes it. `scale` is None where
    no step is guided."""
    guided = scale is not None
    variation_seed, variation_strength = request.variation or (None, None)
    net = None if control is None else control.net.manifest
    return ImageInfo(
        prompt=request.prompt,
        seed=seed,
        width=geometry.width,
        height=geometry.height,
        steps=steps,
        model=manifest.name,
        fingerprint=manifest.fingerprint,
        executor="",
        strength=None if source is None or strength is None else float(strength),
        image=source.image_hash if source else None,
        mask=source.mask_hash if source else None,
        mask_grow=source.mask_grow if source else 0,
        cfg_scale=1.0 if scale is None else scale,
        negative=request.negative if guided else "",
        cfg_normalization=request.cfg_normalization and guided,
        cfg_truncation=float(request.cfg_truncation) if guided else 1.0,
        sampler=SamplerName(request.sampler),
        scheduler=SchedulerName(request.scheduler),
        shift=None if request.shift is None else float(request.shift),
        variation_seed=None if variation_seed is None else int(variation_seed),
        variation_strength=None if variation_strength is None else float(variation_strength),
        loras=tuple(LoraInfo(one.adapter.name, one.weight, one.adapter.hash) for one in loras),
        control=None if control is None else control.image.image_hash,
        controlnet=None if net is None else net.name,
        controlnet_hash=None if net is None else net.fingerprint,
        control_type=None if request.control_type is None else ControlType(request.control_type).value,
        control_scale=None if control is None else control.scale,
        control_start=float(request.control_start),
        control_end=float(request.control_end),
    )


def computed_by(info: ImageInfo, executor: str, computed: Computation) -> ImageInfo:
    """What decides an image, with what computes it."""
    return replace(
        info,
        executor=executor,
        program=computed.program,
        activation_bits=computed.activation_bits,
        library=computed.library,
    )


def lora_notices(loras: Sequence[WeightedAdapter], steps: int, guidance: Guidance, defaults: int) -> list[NoticeEvent]:
    """What does not fit, and what of the files is left out."""
    found = []
    for one in loras:
        if text := misfit(one.adapter, steps, guided=guidance.guided, defaults=defaults):
            found.append(NoticeEvent(text, warning=True))
        if unused := one.adapter.unused:
            text = f"{one.adapter.path}: {len(unused)} tensors belong to nothing in the model and are left out: "
            found.append(NoticeEvent(text + ", ".join(unused), warning=True))
    return found


def notices_of(
    request: Request, guidance: Guidance, chosen: Chosen, *, controlled: bool, more: Sequence[NoticeEvent] = ()
) -> tuple[NoticeEvent, ...]:
    """What the user should know before anything runs. `controlled`: whether a ControlNet adds anything."""
    notices = [NoticeEvent(note) for note in chosen.plan.notes]
    if chosen.why and chosen.unexpected:
        notices.insert(0, NoticeEvent(chosen.why, warning=True))
    if request.negative and not guidance.guided:
        text = "the negative prompt has no effect, as no step is guided; give a cfg scale above 1"
        notices.append(NoticeEvent(text, warning=True))
    if request.control is not None and not controlled and request.control_scale:
        text = (
            f"the control image has no effect: no step lies between {request.control_start:g} and "
            f"{request.control_end:g} of the way"
        )
        notices.append(NoticeEvent(text, warning=True))
    return (*notices, *more)
