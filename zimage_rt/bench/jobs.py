"""Which cases a run has: every bundle, executor and size, and the baselines on the checkpoint."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.hub import bundle_directory
from zimage_runtime.bundle.manifest import CPU, Precision
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.errors import RequestError
from zimage_runtime.machine.host_memory import available_memory
from zimage_runtime.pipeline import Pipeline

from .schema import OURS, Case
from .systems import REFERENCE, STREAMED_REFERENCE, find_system

Size = tuple[int, int]

_BESIDE_WEIGHTS = 1.25  # memory that drawing takes, in the weights' own


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    bundles: tuple[str, ...]
    sizes: tuple[Size, ...]  # empty: each bundle's own
    executors: tuple[str, ...]
    steps: int | None
    prompt: str
    seed: int
    repeat: int
    warmup: int
    low_memory: bool = False
    drop_cache: bool = False
    checkpoint: Path | None = None
    baselines: tuple[str, ...] = ()
    reference: str | None = None
    vram: int | None = None  # bytes


@dataclass(frozen=True)
class Opened:
    """A bundle and what to call it."""

    name: str
    bundle: Bundle

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.bundle.root


@dataclass(frozen=True)
class Planned:
    """A case, where its model is, and the bundle that tells its dimensions."""

    case: Case
    model: Path
    opened: Opened
    reference: "Planned | str" = "it is a reference"  # what its picture is held against, or why there is nothing


def open_bundles(paths: Iterable[str]) -> list[Opened]:
    """Raises `BundleError`, `HubError`, or `RequestError` for two bundles of one name."""
    found: list[Opened] = []
    for path in paths:
        bundle = Bundle.open(bundle_directory(path))
        found.append(Opened(bundle.root.resolve().name, bundle))
    names = [opened.name for opened in found]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two bundles are named {name}: rename one folder, so that reports can tell them apart")
    return found


def plan_cases(settings: Settings, bundles: Sequence[Opened], threads: int) -> list[Planned]:
    """Every case, checked: what would fail for a reason that is known now fails now, before anything is measured."""
    planned = []
    for opened in bundles:
        for executor in settings.executors:
            pipeline = Pipeline.from_bundle(opened.path, executor, settings.vram, low_memory=settings.low_memory)
            for width, height in settings.sizes or (_own_size(opened),):
                request = pipeline.request(settings.prompt, (width, height), settings.steps, settings.seed)
                case = Case(
                    system=OURS,
                    model=opened.name,
                    precision=opened.bundle.manifest.precision.value,
                    fingerprint=opened.bundle.manifest.fingerprint,
                    executor=pipeline.executor.name,
                    width=width,
                    height=height,
                    steps=request.schedule.steps,
                    seed=settings.seed,
                    prompt=settings.prompt,
                    repeat=settings.repeat,
                    warmup=settings.warmup,
                    low_memory=settings.low_memory,
                    drop_cache=settings.drop_cache,
                    threads=threads,
                    vram=settings.vram,
                )
                planned.append(Planned(case, opened.path, opened))
    each = {one.case: one for one in planned}  # "auto" may be an executor that is asked for, too
    found = [*each.values(), *_baseline_cases(settings, bundles, threads)]
    return [replace(one, reference=_reference(settings, bundles, one.case)) for one in found]


def _baseline_cases(settings: Settings, bundles: Sequence[Opened], threads: int) -> list[Planned]:
    if not settings.baselines:
        return []
    checkpoint = need_checkpoint(settings)
    planned = []
    for name in settings.baselines:
        system = find_system(name)
        if reason := system.obstacle(bundles[0].bundle.manifest.config):
            raise RequestError(f"baseline {name} cannot run here: {reason}")
        for width, height in settings.sizes or (_own_size(bundles[0]),):
            planned.append(_checkpoint_case(settings, bundles[0], checkpoint, name, (width, height), threads))
    return planned


def _reference(settings: Settings, bundles: Sequence[Opened], of: Case) -> Planned | str:
    """What draws the reference of a case: diffusers in float32, or a float32 bundle; or why there is nothing."""
    config = bundles[0].bundle.manifest.config
    if settings.checkpoint is not None and find_system(REFERENCE).obstacle(config) is None:
        fits = float32_bytes(settings.checkpoint) * _BESIDE_WEIGHTS < available_memory()
        name = REFERENCE if fits else STREAMED_REFERENCE
        planned = _checkpoint_case(settings, bundles[0], settings.checkpoint, name, (of.width, of.height), of.threads)
        return _once(planned)
    if settings.reference is not None:
        (opened,) = open_bundles([settings.reference])
        if opened.bundle.manifest.precision is not Precision.FP32:
            raise RequestError(f"{settings.reference}: the reference must be an fp32 bundle")
    else:
        source = next(
            (o.bundle.manifest.source for o in bundles if o.name == of.model), bundles[0].bundle.manifest.source
        )
        exact = [o for o in bundles if o.bundle.manifest.precision is Precision.FP32]
        same = [o for o in exact if o.bundle.manifest.source == source]
        if not same:
            return "no float32 reference: give --checkpoint or --reference"
        opened = same[0]
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


def float32_bytes(checkpoint: Path) -> int:
    """What a checkpoint's weights take in memory in float32. Raises `TensorFileError` for a damaged file."""
    entries = [entry for path in checkpoint.rglob("*.safetensors") for entry in read_header(path).values()]
    return sum(4 * math.prod(entry.shape) for entry in entries)


def _once(planned: Planned) -> Planned:
    """The same without repetitions: only its picture is wanted."""
    return replace(planned, case=replace(planned.case, repeat=1, warmup=0, drop_cache=False))


def need_checkpoint(settings: Settings) -> Path:
    """The checkpoint's folder. Raises `RequestError` where there is none."""
    if settings.checkpoint is None:
        raise RequestError("baselines draw from a checkpoint: give its folder with --checkpoint")
    if not (settings.checkpoint / "transformer" / "config.json").is_file():
        raise RequestError(
            f"{settings.checkpoint}: holds no transformer/config.json; give a folder in diffusers layout"
        )
    return settings.checkpoint


def _checkpoint_case(
    settings: Settings, opened: Opened, checkpoint: Path, name: str, size: Size, threads: int
) -> Planned:
    files = tuple(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    steps = settings.steps or opened.bundle.manifest.defaults.steps
    case = Case(
        system=name,
        model=checkpoint.resolve().name,
        precision=find_system(name).precision,
        fingerprint=_fingerprint(checkpoint, files),
        executor=name,
        width=size[0],
        height=size[1],
        steps=steps,
        seed=settings.seed,
        prompt=settings.prompt,
        repeat=settings.repeat,
        warmup=settings.warmup,
        drop_cache=settings.drop_cache,
        threads=threads,
    )
    return Planned(case, checkpoint, opened)


def _fingerprint(root: Path, files: Sequence[Path]) -> str:
    """Of names, sizes and times: hashing 33 GB would take minutes."""
    listed = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _own_size(opened: Opened) -> Size:
    defaults = opened.bundle.manifest.defaults
    return defaults.width, defaults.height
