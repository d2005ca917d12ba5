"""From a request to a job: checked against the bundle, its defaults filled in, its images and LoRA read, planned."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .adapters.branches import BranchSizes
from .adapters.given import given_loras
from .adapters.shelf import LoraShelf
from .bundle.bundle import Bundle
from .bundle.controlnet import ControlNet
from .bundle.manifest import Manifest
from .errors import RequestError
from .events import Request
from .executors.choose import ExecutorChoice
from .executors.protocol import Work
from .images.control_image import make_control_image, open_control_image
from .images.img2img import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, steps_skipped
from .images.source_image import GivenImage, open_given
from .job import Checked, Job, JobControl, Prompt, computed_by, image_info, lora_notices, notices_of
from .model.control_type import ControlType
from .model.geometry import ImageGeometry, image_geometry
from .model.sampling_names import SchedulerName
from .model.schedule import make_schedule
from .sampling.guidance import make_guidance


def check_request(request: Request, bundle: Bundle, tokenized: Callable[[str], Prompt], shelf: LoraShelf) -> Checked:
    """Checks a request against the bundle. Nothing large is loaded, and no executor is asked. Raises `RequestError`."""
    manifest, config = bundle.manifest, bundle.manifest.config
    given = None if request.image is None else open_given(request.image, request.mask, request.mask_grow)
    given_control = None if request.control is None else open_control_image(request.control)
    size, own = request.size, given or given_control
    if size is None:
        size = (manifest.defaults.width, manifest.defaults.height) if own is None else own.own_size(config.vae)
    geometry = image_geometry(int(size[0]), int(size[1]), config)
    steps, shift = int(request.steps or manifest.defaults.steps), request.shift
    schedule = make_schedule(
        steps, config.scheduler, SchedulerName(request.scheduler), None if shift is None else float(shift)
    )
    source, strength, first_step = None, request.strength, 0
    if given is not None:
        if strength is None:
            strength = DEFAULT_STRENGTH if request.mask is None else DEFAULT_MASKED_STRENGTH
        first_step = steps_skipped(schedule.steps, strength)
        source = given.resized(geometry.width, geometry.height, config.vae)
    control = None
    if given_control is not None:
        control = _control(request, manifest, given_control, geometry, range(first_step, schedule.steps))
        if source is not None and source.mask is not None and not control.net.manifest.config.inpaints:
            raise RequestError(
                f"{control.net.root}: is a ControlNet of version {control.net.manifest.config.version}, which takes no "
                "mask; use one from version 2.0 on, or leave out the mask"
            )
    active_control = control if control is not None and control.has_effect else None
    count = int(request.count)
    variation = None if request.variation is None else (int(request.variation[0]), float(request.variation[1]))
    first = secrets.randbelow(2**32 - count) if request.seed is None else int(request.seed)
    scale = manifest.defaults.cfg_scale if request.cfg_scale is None else float(request.cfg_scale)
    normalize, truncation = request.cfg_normalization, float(request.cfg_truncation)
    guidance = make_guidance(scale, schedule, first_step, normalize=normalize, truncation=truncation)
    loras = shelf.open(given_loras(request.loras), allow_unused=request.lora_allow_unused)
    active = tuple(one for one in loras if one.weight)
    branches = BranchSizes.of(active)
    prompts = [tokenized(text) for text in (request.prompt, request.negative)[: 1 + guidance.guided]]
    info = image_info(
        request,
        manifest,
        seed=first,
        geometry=geometry,
        steps=steps,
        source=source,
        strength=strength,
        scale=scale if guidance.guided else None,
        loras=loras,
        control=control,
    )
    return Checked(
        request=request,
        positive=prompts[0],
        negative=prompts[1] if guidance.guided else None,
        schedule=schedule,
        seeds=tuple(range(first, first + count)) if variation is None else (first,) * count,
        variation=variation,
        source=source,
        first_step=first_step,
        guidance=guidance,
        loras=active,
        control=active_control,
        work=Work(
            geometry=geometry,
            tokens=max(len(prompt.ids) for prompt in prompts),
            guided=guidance.guided,
            batch=min(int(request.batch_size), count),
            count=count,
            steps=schedule.steps,
            encodes=source is not None or active_control is not None,
            branches=branches.nbytes if active else None,
            branch_rank=branches.rank,
            branch_products=branches.products,
            control=None if active_control is None else active_control.net,
        ),
        info=info,
        default_steps=manifest.defaults.steps,
    )


def plan_job(checked: Checked, choice: ExecutorChoice, *, cancels: int, keeps_images: bool) -> Job:
    """Plans a checked request on the executor that suits it. Nothing large is loaded.

    `cancels` counts those of the pipeline so far. `keeps_images` says that the caller holds all images in memory until
    the end. Raises `RequestError`, or `MemoryLimitError` where no executor can hold the request.
    """
    request, work, guidance = checked.request, checked.work, checked.guidance
    if keeps_images:
        work = replace(work, held=3 * work.geometry.width * work.geometry.height * work.count)
    chosen = choice.plan(work)
    more = lora_notices(checked.loras, checked.schedule.steps, guidance, checked.default_steps)
    return Job(
        positive=checked.positive,
        negative=checked.negative,
        geometry=work.geometry,
        schedule=checked.schedule,
        seeds=checked.seeds,
        variation=checked.variation,
        sampler=checked.info.sampler,
        batch_size=work.batch,
        source=checked.source,
        first_step=checked.first_step,
        executor=chosen.executor,
        plan=chosen.plan,
        notices=notices_of(request, guidance, chosen, controlled=checked.control is not None, more=more),
        choice=chosen.why,
        info=computed_by(checked.info, chosen.executor.name, chosen.executor.computation(chosen.plan)),
        cancels=cancels,
        guidance=guidance,
        loras=checked.loras,
        control=checked.control,
        work=work,
    )


def _control(
    request: Request, manifest: Manifest, given: GivenImage, geometry: ImageGeometry, taken: range
) -> JobControl:
    """The ControlNet of a request, opened, and its image; `taken` are the schedule's steps that are taken.

    Raises `BundleError` for a folder that is no ControlNet, `RequestError` for one of another model.
    """
    assert request.controlnet is not None
    net = ControlNet.open(Path(request.controlnet))
    net.manifest.config.check_fits(manifest.config.transformer, net.root)
    kind = None if request.control_type is None else ControlType(request.control_type)
    start, end, count = float(request.control_start), float(request.control_end), len(taken)
    # as diffusers' pipelines with ControlNets decide it
    kept = (step for index, step in enumerate(taken) if index / count >= start and (index + 1) / count <= end)
    image = make_control_image(given, geometry.width, geometry.height, kind)
    return JobControl(net, image, float(request.control_scale), frozenset(kept))
