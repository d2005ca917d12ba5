"""A 16-bit bundle on the CPU with `--low-memory`: weights are widened a layer at a time, not all at once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zimage_export.build import BuildOptions, build
from zimage_export.synthetic import SMALL, Scale, write_checkpoint
from zimage_runtime.bundle import Bundle
from zimage_runtime.contracts import Program
from zimage_runtime.manifest import CPU, Precision
from zimage_runtime.progress import Progress

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
from zimage_export.selfcheck import fixed_inputs
from zimage_runtime.bundle import Bundle
from zimage_runtime.contracts import Program
from zimage_runtime.ort import OrtCpuExecutor

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

bundle = Bundle.open(sys.argv[1])
feeds = fixed_inputs(bundle.manifest.config)
executor = OrtCpuExecutor(bundle, low_memory=True)
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account of the process")
def test_weights_are_widened_one_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", WIDE)
    bundle = build(tmp_path / "checkpoint", tmp_path / "bundle", BuildOptions(Precision.BF16), Progress(quiet=True))
    widened = Bundle.open(bundle.root).manifest.programs[Program.DENOISER][CPU].weight_bytes
    child = subprocess.run([sys.executable, "-c", CHILD, str(bundle.root)], capture_output=True, text=True, check=True)
    assert widened > 190e6
    assert json.loads(child.stdout) < 0.3 * widened
