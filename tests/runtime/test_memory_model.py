"""What an image will take is known before anything is loaded, and is about what it then takes."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from facts import memory_amounts, raises_with

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest, Precision
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.ort.cpu_plan import MemoryPlan, plan_memory
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.programs import Program

PLENTY = 1 << 50


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def plan(
    manifest: Manifest,
    width: int,
    height: int,
    *,
    tokens: int = 32,
    batch: int = 1,
    low_memory: bool = False,
    available: int = PLENTY,
) -> MemoryPlan:
    geometry = image_geometry(width, height, manifest.config)
    work = Work(geometry=geometry, tokens=tokens, batch=batch)
    return plan_memory(manifest, work, low_memory=low_memory, available=available)


def test_what_is_needed_is_exactly_enough(manifest: Manifest) -> None:
    needed = plan(manifest, 512, 512).peak
    assert plan(manifest, 512, 512, available=needed).peak == needed
    in_tiles = plan(manifest, 512, 512, available=needed - 1)  # with a byte less, the decoder works in tiles
    assert in_tiles.tiled
    assert in_tiles.peak < needed
    with pytest.raises(MemoryLimitError):
        plan(manifest, 512, 512, available=in_tiles.peak - 1)


def sizes_in(text: str) -> list[tuple[int, int]]:
    """The sizes of images that a text names, in order."""
    return [(int(width), int(height)) for width, height in re.findall(r"(\d+)x(\d+)", text)]


@pytest.mark.parametrize("asked", [(512, 512), (768, 512), (512, 768), (1024, 256)])
def test_a_refusal_names_the_largest_size_that_fits(manifest: Manifest, asked: tuple[int, int]) -> None:
    width, height = asked
    available = (plan(manifest, width, height).peak + plan(manifest, 64, 64).peak) // 2
    with raises_with(MemoryLimitError, f"{width}x{height}", "GiB") as refusal:
        plan(manifest, width, height, available=available)
    (first, named) = sizes_in(str(refusal.value))
    assert first == asked
    needed, free = memory_amounts(str(refusal.value))
    assert needed > free
    plan(manifest, *named, available=available)  # fits: not refused
    assert named[0] / named[1] == pytest.approx(width / height, rel=0.1)
    next_width = named[0] + 16
    next_height = max(round(height * next_width / width / 16), 1) * 16
    with pytest.raises(MemoryLimitError):
        plan(manifest, next_width, next_height, available=available)


def test_a_refusal_says_when_low_memory_would_do(manifest: Manifest) -> None:
    small = plan(manifest, 16, 16), plan(manifest, 16, 16, low_memory=True)
    assert small[1].peak < small[0].peak
    with raises_with(MemoryLimitError, "16x16", "--low-memory"):
        plan(manifest, 16, 16, available=small[1].peak)


def test_a_refusal_says_when_nothing_would_do(manifest: Manifest) -> None:
    for low_memory in (False, True):
        with raises_with(MemoryLimitError, "512x512", "bundle") as refusal:
            plan(manifest, 512, 512, available=1 << 20, low_memory=low_memory)
        assert "--low-memory" not in str(refusal.value)
        assert sizes_in(str(refusal.value)) == [(512, 512)], "no other size is named"


def test_a_refusal_names_the_batch(manifest: Manifest) -> None:
    with raises_with(MemoryLimitError, "512x512", "batches", 3):
        plan(manifest, 512, 512, batch=3, available=1 << 20)


def test_every_part_of_a_request_counts(manifest: Manifest) -> None:
    base = plan(manifest, 256, 256).programs
    wider, taller = plan(manifest, 512, 256).programs, plan(manifest, 256, 512).programs
    for program in (Program.DENOISER, Program.DECODER):
        assert wider[program] > base[program]
        assert wider[program] == taller[program]
    longer = plan(manifest, 256, 256, tokens=200).programs
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER):
        assert longer[program] > base[program]
    assert longer[Program.DECODER] == base[Program.DECODER]
    assert plan(manifest, 256, 256, batch=2).programs[Program.DENOISER] > base[Program.DENOISER]
    # images of a batch are decoded one by one
    assert plan(manifest, 256, 256, batch=2).programs[Program.DECODER] == base[Program.DECODER]


def test_an_image_to_start_from_counts(manifest: Manifest) -> None:
    work = Work(geometry=image_geometry(512, 512, manifest.config), tokens=32)
    without = plan_memory(manifest, work, available=PLENTY)
    encodes = plan_memory(manifest, replace(work, encodes=True), available=PLENTY)
    assert Program.ENCODER not in without.programs
    assert encodes.programs[Program.ENCODER] > 0
    assert {p: size for p, size in encodes.programs.items() if p is not Program.ENCODER} == without.programs
    wide = Work(geometry=image_geometry(1024, 512, manifest.config), tokens=32, encodes=True)
    wider = plan_memory(manifest, wide, available=PLENTY)
    assert wider.programs[Program.ENCODER] > encodes.programs[Program.ENCODER]


def test_low_memory_saves_the_copies_of_the_weights(manifest: Manifest) -> None:
    usual, low = (plan(manifest, 256, 256, low_memory=flag).programs for flag in (False, True))
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.MODULATION, Program.DENOISER):
        assert usual[program] - low[program] >= manifest.programs[program]["cpu"].weight_bytes


@pytest.mark.parametrize(
    ("precision", "widened"), [(Precision.BF16, True), (Precision.INT4, True), (Precision.INT8, False)]
)
def test_mapped_weights_that_are_widened_a_layer_at_a_time_count(
    manifest: Manifest, precision: Precision, widened: bool
) -> None:
    """int8 products read the mapped weights as they are."""
    config = manifest.config
    layers = {
        Program.DENOISER: 2 * 4 * config.transformer.dim * config.transformer.ffn_dim,
        Program.TEXT_ENCODER: 2 * 4 * config.text_encoder.hidden_size * config.text_encoder.intermediate_size,
    }
    narrow = plan(replace(manifest, precision=precision), 256, 256, low_memory=True).programs
    plain = plan(manifest, 256, 256, low_memory=True).programs
    for program, widest in layers.items():
        assert narrow[program] - plain[program] == (widest if widened else 0)


def test_everything_stays_loaded_only_where_all_of_it_fits(manifest: Manifest) -> None:
    needed = plan(manifest, 256, 256)
    base = needed.peak - max(needed.programs.values())
    together = base + sum(needed.programs.values())
    assert plan(manifest, 256, 256, available=together).keep_all
    assert not plan(manifest, 256, 256, available=together - 1).keep_all


# Prints the growth of anonymous memory over what the process had before it loaded the program, and the whole peak.
MEASURED_CHILD = """
import sys, threading, time
import numpy as np
import onnxruntime
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.model.programs import Program
from zimage_runtime.executors.ort.host_programs import HostPrograms

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

executor = HostPrograms(Bundle.open(sys.argv[1]))
side = int(sys.argv[2]) // 8
latents = np.random.default_rng(0).standard_normal((1, 16, side, side), dtype=np.float32)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
executor.run(Program.DECODER, {"latents": latents})
print(peak - before, peak)
"""


@pytest.mark.deep
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_decoder_takes_what_was_predicted(bundle: Path, manifest: Manifest) -> None:
    side = 896
    needed = plan(manifest, side, side)
    predicted = needed.programs[Program.DECODER]
    assert predicted >= 200 << 20
    command = [sys.executable, "-c", MEASURED_CHILD, str(bundle), str(side)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    growth, peak = (int(value) for value in output.split())
    assert 1.0 <= predicted / growth <= 1.5
    base = needed.peak - max(needed.programs.values())
    assert peak <= base + predicted
