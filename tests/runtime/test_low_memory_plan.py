"""The pipeline plans with the memory mode that its executor has."""

from pathlib import Path

import pytest
from facts import raises_with

from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.ort import cpu_plan
from zimage_runtime.executors.protocol import Work
from zimage_runtime.pipeline import Pipeline, Request


def test_low_memory_is_planned_as_such(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (64, 64)
    whole, mapped = (Pipeline.from_bundle(bundle, low_memory=low) for low in (False, True))
    manifest = whole.bundle.manifest
    work = Work(geometry=whole.prepare(Request("a cat", size=size)).geometry, tokens=20)
    least = cpu_plan.plan_memory(manifest, work, low_memory=True).peak
    most = cpu_plan.plan_memory(manifest, work).peak
    assert least < most
    monkeypatch.setattr(cpu_plan, "available_memory", lambda: (least + most) // 2)
    with raises_with(MemoryLimitError, "64x64", "--low-memory"):
        whole.stream("a cat", size=size)
    mapped.stream("a cat", size=size)
