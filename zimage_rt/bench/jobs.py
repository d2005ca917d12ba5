"""Which cases a run has: each bundle on each executor at each size, and the baselines on the checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.hub import bundle_directory, hub_id
from zimage_runtime.bundle.manifest import CPU, Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import RequestError
from zimage_runtime.machine.host_memory import available_memory
from zimage_runtime.pipeline import Pipeline, Request

from .checkpoints import Original
from .schema import OURS, Case
from .systems import REFERENCE, STREAMED_REFERENCE, find_system

Size = tuple[int, int]

_BESIDE_WEIGHTS = 1.25  # memory that generating needs, as a multiple of the weights'


@dataclass(frozen=True)
class Opened:
    """A bundle and what results call it."""

    name: str
    bundle: Bundle

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.bundle.root


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    sizes: tuple[Size, ...]  # empty: each bundle's own
    executors: tuple[str, ...]
    steps: int | None
    prompt: str
    seed: int
    repeat: int
    warmup: int
    low_memory: bool = False
    drop_cache: bool = False
    checkpoint: Original | None = None
    baselines: tuple[str, ...] = ()
    reference: Opened | None = None
    vram: int | None = None  # bytes


@dataclass(frozen=True)
class Planned:
    """A case, where its model is, and the bundle whose configuration gives its dimensions."""

    case: Case
    model: Path
    opened: Opened
    reference: "Planned | str" = "this is a reference itself"  # what its image is compared with, or why nothing is
    plan: Mapping[str, Any] | None = None  # the executor's own document of the memory that it will take


def open_bundles(paths: Iterable[str], progress: Progress | None = None) -> list[Opened]:
    """Opens bundles, which are fetched where they are on the Hub.

    Raises `BundleError`, `HubError`, or `RequestError` for two bundles of one name.
    """
    found: list[Opened] = []
    for path in paths:
        name = hub_id(path)
        bundle = Bundle.open(bundle_directory(path, progress))
        found.append(Opened(name.partition("/")[2] if name else bundle.root.resolve().name, bundle))
    names = [opened.name for opened in found]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two bundles are named {name}: rename one folder, so that reports can name both")
    return found


def plan_cases(settings: Settings, bundles: Sequence[Opened], threads: int) -> list[Planned]:
    """Every case, checked: what cannot work is refused now, before anything is measured.

    Raises `RequestError`.
    """
    _check_checkpoint(settings.checkpoint, bundles)
    planned = []
    for opened in bundles:
        for executor in settings.executors:
            pipeline = Pipeline.from_bundle(opened.path, executor, settings.vram, low_memory=settings.low_memory)
            for width, height in settings.sizes or (_own_size(opened),):
                job = pipeline.prepare(
                    Request(settings.prompt, size=(width, height), steps=settings.steps, seed=settings.seed)
                )
                case = Case(
                    system=OURS,
                    model=opened.name,
                    precision=opened.bundle.manifest.precision.value,
                    fingerprint=opened.bundle.manifest.fingerprint,
                    executor=job.executor.name,
                    width=width,
                    height=height,
                    steps=job.schedule.steps,
                    seed=settings.seed,
                    prompt=settings.prompt,
                    repeat=settings.repeat,
                    warmup=settings.warmup,
                    low_memory=settings.low_memory,
                    drop_cache=settings.drop_cache,
                    threads=threads,
                    vram=settings.vram,
                )
                planned.append(Planned(case, opened.path, opened, plan=job.plan.document()))
    each = {one.case: one for one in planned}  # "auto" may be an executor that is asked for, too
    found = [*each.values(), *_baseline_cases(settings, bundles, threads)]
    exact = _exact_bundles(settings, bundles)
    return [replace(one, reference=_reference(settings, bundles, exact, one.case)) for one in found]


def _check_checkpoint(checkpoint: Original | None, bundles: Sequence[Opened]) -> None:
    for opened in bundles:
        if checkpoint is not None and opened.bundle.manifest.config != checkpoint.config:
            raise RequestError(
                f"{opened.name}: its dimensions are not those of {checkpoint.name}; "
                "give --checkpoint the checkpoint that it was made from"
            )


def _baseline_cases(settings: Settings, bundles: Sequence[Opened], threads: int) -> list[Planned]:
    if not settings.baselines:
        return []
    if settings.checkpoint is None:
        raise RequestError("baselines generate from a checkpoint: give one with --checkpoint")
    planned = []
    for name in settings.baselines:
        system = find_system(name)
        if reason := system.obstacle(bundles[0].bundle.manifest.config):
            raise RequestError(f"baseline {name} cannot run here: {reason}")
        for size in settings.sizes or (_own_size(bundles[0]),):
            planned.append(_checkpoint_case(settings, bundles[0], settings.checkpoint, name, size, threads))
    return planned


def _exact_bundles(settings: Settings, bundles: Sequence[Opened]) -> list[Opened]:
    """The float32 bundles that can be a reference: the one that is asked for, or those that are measured."""
    if settings.reference is None:
        return [opened for opened in bundles if opened.bundle.manifest.precision is Precision.FP32]
    precision = settings.reference.bundle.manifest.precision
    if precision is not Precision.FP32:
        raise RequestError(f"{settings.reference.name}: a bundle in {precision}; the reference must be an fp32 bundle")
    return [settings.reference]


def _reference(settings: Settings, bundles: Sequence[Opened], exact: Sequence[Opened], of: Case) -> Planned | str:
    """What generates the reference of a case: diffusers in float32, or a float32 bundle; or why nothing does."""
    missing = "give --checkpoint or --reference"
    if settings.checkpoint is not None:
        if obstacle := find_system(REFERENCE).obstacle(settings.checkpoint.config):
            missing = obstacle
        else:
            fits = settings.checkpoint.float32_bytes * _BESIDE_WEIGHTS < available_memory()
            name = REFERENCE if fits else STREAMED_REFERENCE
            size = (of.width, of.height)
            return _once(_checkpoint_case(settings, bundles[0], settings.checkpoint, name, size, of.threads))
    if settings.reference is None:
        measured = next((opened for opened in bundles if opened.name == of.model), bundles[0])
        source = measured.bundle.manifest.source
        exact = [opened for opened in exact if opened.bundle.manifest.source == source]
    if not exact:
        return f"no float32 reference: {missing}"
    opened = exact[0]
    case = replace(
        of,
        system=OURS,
        model=opened.name,
        precision=Precision.FP32.value,
        fingerprint=opened.bundle.manifest.fingerprint,
        executor=CPU,
        vram=None,
    )
    return _once(Planned(case, opened.path, opened))


def _once(planned: Planned) -> Planned:
    """The same without repetitions: only its image is wanted."""
    return replace(planned, case=replace(planned.case, repeat=1, warmup=0, drop_cache=False))


def _checkpoint_case(
    settings: Settings, opened: Opened, checkpoint: Original, name: str, size: Size, threads: int
) -> Planned:
    case = Case(
        system=name,
        model=checkpoint.name,
        precision=find_system(name).precision,
        fingerprint=checkpoint.fingerprint,
        executor=name,
        width=size[0],
        height=size[1],
        steps=settings.steps or opened.bundle.manifest.defaults.steps,
        seed=settings.seed,
        prompt=settings.prompt,
        repeat=settings.repeat,
        warmup=settings.warmup,
        drop_cache=settings.drop_cache,
        threads=threads,
    )
    return Planned(case, checkpoint.root, opened)


def _own_size(opened: Opened) -> Size:
    defaults = opened.bundle.manifest.defaults
    return defaults.width, defaults.height
