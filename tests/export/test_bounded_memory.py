"""Memory of a 16-bit bundle on the CPU: what is widened, what is given back, what the self-check holds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zimage_export.build import BuildOptions, build
from zimage_export.measure.self_check import fixed_inputs
from zimage_export.synthetic.checkpoint import SMALL, Scale, write_checkpoint
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, Precision
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.programs import Program

pytestmark = pytest.mark.deep

WIDE = Scale(
    replace(
        SMALL.config,
        transformer=replace(
            SMALL.config.transformer, dim=512, n_heads=4, n_layers=16, n_refiner_layers=1, axes_dims=(32, 48, 48)
        ),
    )
)
"""50 million parameters in the denoiser: 0.2 GB in float32, of which one layer's largest weight is 3 MB."""

CHILD = """
import json, sys, threading
from pathlib import Path
from zimage_export.measure.self_check import fixed_inputs
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.model.programs import Program
from zimage_runtime.executors.ort.host_programs import HostPrograms

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

bundle = Bundle.open(sys.argv[1])
feeds = fixed_inputs(bundle.manifest.config)
executor = HostPrograms(bundle, low_memory=True)
executor.run(Program.MODULATION, feeds[Program.MODULATION])  # whatever the library takes once, it has now taken
executor.release()
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
executor.run(Program.DENOISER, feeds[Program.DENOISER])
done.set()
watcher.join()
print(json.dumps(peak - before))
"""


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the kernel's account of the process"
)


@pytest.fixture(scope="module", params=[Precision.BF16, Precision.FP16])
def wide_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder / "checkpoint", WIDE)
    return build(folder / "checkpoint", folder / "bundle", BuildOptions(request.param), Progress(quiet=True))


def child(script: str, bundle: Bundle, *arguments: object) -> Any:
    command = [sys.executable, "-c", script, str(bundle.root), *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_proc
def test_weights_are_widened_one_at_a_time(wide_bundle: Bundle) -> None:
    widened = wide_bundle.manifest.programs[Program.DENOISER][CPU].weight_bytes
    assert widened > 190e6
    assert child(CHILD, wide_bundle) < 0.3 * widened


def test_outputs_do_not_keep_a_released_programs_memory(bundle: Path) -> None:
    """An output that lay in the session's arena would keep all of it alive, weights included."""
    opened = Bundle.open(bundle)
    executor = HostPrograms(opened)
    for program, feeds in fixed_inputs(opened.manifest.config).items():
        for name, value in executor.run(program, feeds).items():
            assert value.flags.owndata, (program, name)
            assert value.base is None, (program, name)


SELF_CHECKED = """
import json, sys, threading
from pathlib import Path
from zimage_export.measure import page_cache, self_check
from zimage_runtime.bundle.bundle import Bundle

bundle = Bundle.open(sys.argv[1])
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, page_cache._mapped_bytes())

self_check._MAPPED_BYTES = int(sys.argv[2])
self_check.self_check(bundle)  # the libraries' own pages are mapped in now
watcher = threading.Thread(target=watch)
watcher.start()
checked = self_check.self_check(bundle)
done.set()
watcher.join()
print(json.dumps([peak, checked]))
"""


@needs_proc
def test_the_self_check_hands_mapped_weights_back(wide_bundle: Bundle) -> None:
    free, unbounded = child(SELF_CHECKED, wide_bundle, 1 << 40)
    handed_back, bounded = child(SELF_CHECKED, wide_bundle, 1 << 20)
    assert unbounded == bounded == wide_bundle.manifest.self_check
    assert free - handed_back > 40e6
