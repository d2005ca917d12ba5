"""Requests under a ControlNet that run together, and rows of a batch: the images of single runs, to the byte."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Capture, call_rt
from control_tools import TWO_ONE, photograph
from PIL import Image

from zimage_runtime.events import ImageEvent, Request
from zimage_runtime.executors.ort.cpu_plan import MemoryPlan
from zimage_runtime.pipeline import Pipeline

Nets = Callable[..., Path]
SIZE = (64, 48)


@pytest.fixture
def rows(net_of: Nets, tmp_path: Path) -> list[dict[str, Any]]:
    """Two under control with one image, one with another scale, one that repaints, one without."""
    photograph(*SIZE).save(tmp_path / "edges.png")
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (0, 0, 32, 48))
    mask.save(tmp_path / "mask.png")
    control = {"control": str(tmp_path / "edges.png"), "controlnet": str(net_of(TWO_ONE))}
    base = {"prompt": "a fox", "size": list(SIZE), "steps": 2}
    return [
        {**base, **control, "seed": 1},
        {**base, **control, "seed": 2},
        {**base, **control, "seed": 3, "control_scale": 0.3, "control_end": 0.6},
        {**base, **control, "seed": 4, "image": str(tmp_path / "edges.png"), "mask": str(tmp_path / "mask.png")},
        {**base, "seed": 5},
    ]


def images(events: Iterator[Any]) -> list[bytes]:
    return [event.image.tobytes() for event in events if isinstance(event, ImageEvent)]


@pytest.mark.parametrize("takes_turns", [False, True])
def test_a_group_under_control(
    pipeline: Pipeline, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, takes_turns: bool
) -> None:
    if takes_turns:
        monkeypatch.setattr(MemoryPlan, "keep_all", False)
    requests = [Request(**{**row, "size": SIZE}) for row in rows]
    single = [image for request in requests for image in images(pipeline.run(pipeline.prepare(request)))]
    assert len(set(single)) == len(rows)
    jobs = [pipeline.prepare(request) for request in requests]
    group = pipeline.group(jobs)
    assert len(group.jobs) == 4, "the last one has no ControlNet"
    assert images(one.event for one in pipeline.run_group(group)) == single[:4]


def test_rows_under_control(root: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: Capture) -> None:
    named = [{"id": f"row-{n}", **row} for n, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in named))
    words = ("-m", root, "--executor", "cpu", "--quiet")
    outcome = call_rt(capsys, "batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out", *words)
    assert (outcome.status, outcome.err) == (0, "")
    options = ("--control", rows[2]["control"], "--controlnet", rows[2]["controlnet"], "--control-scale", 0.3)
    options += ("--control-end", 0.6, "--size", "64x48", "--steps", 2, "--seed", 3)
    single = call_rt(capsys, "run", "a fox", "-o", tmp_path / "single.png", *options, *words)
    assert single.status == 0, single.err
    assert (tmp_path / "single.png").read_bytes() == (tmp_path / "out" / "row-2.png").read_bytes()
