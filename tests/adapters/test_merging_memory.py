"""Merging takes memory for a few rows at a time, however large the model and its change are."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lora_tools import written

from zimage_export.synthetic.checkpoint import SMALL, Scale, write_checkpoint
from zimage_runtime.model.blocks import layer_blocks
from zimage_runtime.model.linears import block_linears

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account of the process"),
]

WIDE = Scale(
    replace(
        SMALL.config,
        transformer=replace(
            SMALL.config.transformer, dim=512, n_heads=4, n_layers=8, n_refiner_layers=1, axes_dims=(32, 48, 48)
        ),
    )
)
"""26 million parameters in the blocks: their change is 0.1 GB in float32, and 3 MB for the largest linear."""

CHILD = """
import json, sys, threading
from pathlib import Path
from zimage_export.build import BuildOptions, build
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.command_line.progress import Progress

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def peak(name, *files):
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    options = BuildOptions(Precision.BF16, loras=tuple(GivenLora(file) for file in files))
    build(sys.argv[1], Path(sys.argv[2]) / name, options, Progress(quiet=True))
    done.set()
    watcher.join()
    return most

peak("first")  # whatever the libraries take once, they have now taken
print(json.dumps([peak("plain"), peak("merged", *sys.argv[3:])]))
"""


def test_a_merged_build_takes_little_more_than_a_plain_one(tmp_path: Path) -> None:
    """A LoRA and a DoRA of every linear of every block, with the norms of rows."""
    write_checkpoint(tmp_path / "checkpoint", WIDE)
    low, dora, changed = {}, {}, 0
    for place in layer_blocks("transformer", WIDE.config):
        for linear in block_linears(place, WIDE.config):
            name, changed = place.tensor(linear.name), changed + 4 * linear.parameters
            for tensors in (low, dora):
                tensors[f"{name}.lora_A.weight"] = np.full((4, linear.in_width), 0.01, np.float32)
                tensors[f"{name}.lora_B.weight"] = np.full((linear.out_width, 4), 0.01, np.float32)
            dora[f"{name}.dora_scale"] = np.ones((linear.out_width, 1), np.float32)
    files = written(tmp_path / "low.safetensors", low), written(tmp_path / "dora.safetensors", dora)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "checkpoint"), str(tmp_path), *map(str, files)]
    plain, merged = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert changed > 95e6
    assert merged - plain < 0.3 * changed
