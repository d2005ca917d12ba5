"""Block programs computed by torch, as `benchmarks/gpu_torch_engines.py` runs them on a GPU; here on the stand-in."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from leftovers import REPOSITORY

from zimage_runtime.bundle.manifest import Precision

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_every_check_passes(bundle_in: Callable[[Precision], Path], precision: Precision, tmp_path: Path) -> None:
    script, out = REPOSITORY / "benchmarks" / "gpu_torch_engines.py", tmp_path / "checks.json"
    words = [bundle_in(precision), "--stand-in", "--size", "32", "--steps", "2", "--limit", "120", "--out", out]
    done = subprocess.run([sys.executable, "-B", script, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    named = [check for check in checks if "check" in check]
    assert len(named) >= 12
    assert all(check["ok"] for check in named)
