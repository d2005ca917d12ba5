"""Which stages stay loaded beside the one that runs, and how many images are denoised before any is decoded."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import TypeVar

from ..bundle.manifest import Manifest
from ..errors import CancelledError, DeviceLostError
from ..model.geometry import ImageGeometry
from ..model.programs import Program

_MOST_IMAGES = 16
_MOST_BYTES = 256 << 20

_ONCE = frozenset(  # small, and run one after the other
    {Program.CAPTION, Program.MODULATION, Program.TIMESTEP, Program.CONTROL_TOKENS, Program.CONTROL_MODULATION}
)
_STEP = frozenset(  # which run one after the other in each step
    {Program.DENOISER, Program.TOKENS, Program.REFINERS, Program.CONTROL_REFINER, Program.CONTROL_LAYERS}
)
_BEFORE_STEPS = frozenset({Program.ENCODER, Program.TEXT_ENCODER}) | _ONCE


_LEFT = (GeneratorExit, KeyboardInterrupt, SystemExit, CancelledError)
"""The caller left, or was interrupted: what is loaded is in order."""

S = TypeVar("S")


def group_size(manifest: Manifest, geometry: ImageGeometry) -> int:
    """Images whose latents wait in memory while stages take turns, so that each stage is loaded once for all of them:
    at most 16, or 256 MB of latents."""
    latents = 4 * manifest.config.vae.latent_channels * geometry.latent_height * geometry.latent_width
    return max(min(_MOST_IMAGES, _MOST_BYTES // latents), 1)


def together(programs: Iterable[Program]) -> list[list[Program]]:
    """Programs in groups that stay loaded beside each other even where stages take turns."""
    groups: dict[frozenset[Program], list[Program]] = {}
    for program in programs:
        own = next((group for group in (_ONCE, _STEP) if program in group), frozenset({program}))
        groups.setdefault(own, []).append(program)
    return list(groups.values())


def leaving(entering: Program, loaded: Set[Program], *, keep_all: bool, keep_loaded: bool) -> set[Program]:
    """What is freed before `entering` is loaded.

    `keep_all`: everything fits at once. `keep_loaded`: what fits also stays for the next request.
    """
    if keep_all and keep_loaded:
        return set()
    beside = next((group for group in (_ONCE, _STEP) if entering in group), {entering})
    others = {program for program in loaded if program not in beside}
    if keep_all:  # steps and decoding alternate, so both stay; what runs before the first step is not needed again
        return others & _BEFORE_STEPS
    return others


@contextmanager
def scope(session: S, *, keeps: bool, free: Callable[[], object]) -> Iterator[S]:
    """A session's life. At its end `free` is called, unless it `keeps` what is loaded and nothing failed."""
    kept = False
    try:
        yield session
        kept = keeps
    except _LEFT:
        kept = keeps
        raise
    except DeviceLostError:
        kept = True  # freeing may wait for the device without end
        raise
    finally:
        if not kept:
            free()
