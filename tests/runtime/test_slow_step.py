"""A step that will take minutes is announced, by one short measurement; other requests are not measured at all."""

import pytest
from facts import assert_facts

from zimage_export.synthetic.checkpoint import FULL
from zimage_runtime.bundle.manifest import Manifest, Precision
from zimage_runtime.executors.ort import slow_step
from zimage_runtime.executors.protocol import Work
from zimage_runtime.model.geometry import image_geometry
from zimage_runtime.model.operations import step_operations


class Full:
    """As much of a manifest as is asked for: the published model's."""

    def __init__(self, precision: Precision) -> None:
        self.config, self.precision = FULL.config, precision


def notes(side: int, precision: Precision = Precision.FP32, batch: int = 1) -> tuple[str, ...]:
    work = Work(geometry=image_geometry(side, side, FULL.config), tokens=64, batch=batch)
    manifest: Manifest = Full(precision)  # type: ignore[assignment]
    return slow_step.slow_step_notes(manifest, work)


def test_a_step_of_minutes_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def rate(integer: bool) -> float:
        asked.append(integer)
        return 4e11 if integer else 2e11

    monkeypatch.setattr(slow_step, "quick_rate", rate)
    operations = step_operations(FULL.config, image_geometry(1024, 1024, FULL.config), 64)
    (note,) = notes(1024)
    assert_facts(note, f"{operations.total / 2e11 / 60:.0f} min")
    assert not any(asked)
    (note,) = notes(1024, Precision.INT8)
    assert_facts(note, f"{(operations.linear / 4e11 + operations.other / 2e11) / 60:.0f} min")
    assert any(asked)
    (note,) = notes(2048, batch=64)
    hours = 64 * step_operations(FULL.config, image_geometry(2048, 2048, FULL.config), 64).total / 2e11 / 3600
    assert_facts(note, f"{hours:.1f} h")


def test_a_fast_processor_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_step, "quick_rate", lambda integer: 1e13)
    assert notes(1024) == ()


def test_small_requests_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(integer: bool) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(slow_step, "quick_rate", refuse)
    assert notes(256) == ()


def test_the_demo_model_at_its_largest_is_announced_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """8192x8192 is a quarter of a million tokens, whose attention alone takes minutes."""
    from zimage_rt import Pipeline, demo_bundle
    from zimage_runtime.executors.ort import cpu_plan
    from zimage_runtime.pipeline import Request

    monkeypatch.setattr(slow_step, "quick_rate", lambda integer: 2e11)
    monkeypatch.setattr(cpu_plan, "available_memory", lambda: 1 << 40)
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        job = pipeline.prepare(Request("a red circle", size=(8192, 8192)))
    (notice,) = job.notices
    assert_facts(notice.text, "step", "min")
