"""A request that was checked and planned, before any of it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .adapters.distilled import misfit
from .adapters.reader import WeightedAdapter
from .arrays import FloatArray
from .bundle.bundle import Bundle
from .bundle.controlnet import ControlNet
from .bundle.manifest import Manifest
from .bundle.tensors import TensorFile, to_float32
from .events import NoticeEvent, Request
from .executors.choose import Chosen
from .executors.protocol import Computation, Control, Executor, Plan, Session
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


def read_control(job: Job, session: Session, bundle: Bundle) -> Control | None:
    """What a job's ControlNet reads: the control image's latents, and those of what is kept of a source image."""
    if job.control is None:
        return None
    manifest, net, vae = bundle.manifest, job.control.net, bundle.manifest.config.vae

    def latents_of(pixels: FloatArray) -> FloatArray:
        mean, _ = session.encode(pixels)
        return (mean - np.float32(vae.shift_factor)) * np.float32(vae.scaling_factor)

    size = job.geometry.latent_height, job.geometry.latent_width
    latents = np.zeros((1, net.manifest.config.channels, *size), np.float32)
    latents[:, : vae.latent_channels] = latents_of(job.control.image.pixels)
    if job.source is not None and job.source.mask is not None:
        latents[:, vae.latent_channels] = np.float32(1) - job.source.mask[:, 0]
        latents[:, vae.latent_channels + 1 :] = latents_of(job.source.kept_pixels)
    pad_token = to_float32(*TensorFile(bundle.file(manifest.weights["transformer"])).array("x_pad_token"))
    return Control(net, latents, pad_token, job.control.scale, job.control.steps)


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
    executor: str,
    computed: Computation,
    loras: Sequence[WeightedAdapter] = (),
    control: JobControl | None = None,
) -> ImageInfo:
    """What decides the image of a request whose defaults are filled in. `scale` is None where no step is guided."""
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
        executor=executor,
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
        program=computed.program,
        activation_bits=computed.activation_bits,
        library=computed.library,
        loras=tuple(LoraInfo(one.adapter.name, one.weight, one.adapter.hash) for one in loras),
        control=None if control is None else control.image.image_hash,
        controlnet=None if net is None else net.name,
        controlnet_hash=None if net is None else net.fingerprint,
        control_type=None if request.control_type is None else ControlType(request.control_type).value,
        control_scale=None if control is None else control.scale,
        control_start=float(request.control_start),
        control_end=float(request.control_end),
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
    request: Request, guidance: Guidance, chosen: Chosen, more: Sequence[NoticeEvent] = ()
) -> tuple[NoticeEvent, ...]:
    """What the user should know before anything runs."""
    notices = [NoticeEvent(note) for note in chosen.plan.notes]
    if chosen.why and chosen.unexpected:
        notices.insert(0, NoticeEvent(chosen.why, warning=True))
    if request.negative and not guidance.guided:
        text = "the negative prompt has no effect, as no step is guided; give a cfg scale above 1"
        notices.append(NoticeEvent(text, warning=True))
    return (*notices, *more)
