"""Guidance on the tensorrt executor: two prompts of different lengths take turns on one stage."""

from dataclasses import replace

import numpy as np
import pytest
from executor_tools import CASE, Make, least, sizes_of
from parity import Case, Guided, check_parity, draw

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.executors.tensorrt.block_catalog import VariantSpec
from zimage_runtime.pipeline import Pipeline

LONG = "a considerably longer prompt than the one before, about nothing in particular " * 2
GUIDED = [Guided(negative="x"), Guided(negative=LONG, normalization=True), Guided(negative=LONG, truncation=0.2)]


@pytest.mark.parametrize("guided", GUIDED, ids=lambda guided: f"{len(guided.negative)}-{guided.truncation}")
def test_the_image_is_the_cpus(make: Make, cpu: Pipeline, guided: Guided) -> None:
    _, pipeline = make()
    case = replace(CASE, guided=guided)
    check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])


@pytest.mark.deep
def test_the_smallest_budget_streams_a_guided_batch(
    make: Make, cpu: Pipeline, opened: Bundle, spec: VariantSpec
) -> None:
    case = replace(CASE, guided=Guided(negative=LONG))
    tokens = len(cpu.token_ids(LONG))
    sizes = replace(sizes_of(opened, case, tokens, 2), conditionings=2)
    device, pipeline = make(least(opened, spec, sizes))
    for found, expected in zip(draw(pipeline, case, count=2, batch_size=2), draw(cpu, case, count=2), strict=True):
        check_parity(found, expected)
    assert "begin_capture" not in device.calls


def test_each_prompts_step_is_captured_and_what_no_step_changes_is_sent_once(make: Make) -> None:
    """Both captions stay on the device, whatever their lengths."""

    def uploads(steps: int) -> int:
        device, pipeline = make()
        draw(pipeline, Case("x", (32, 32), steps, guided=Guided(negative=LONG)))
        if steps == 6:
            assert device.calls.count("begin_capture") == 2
            # of each prompt's steps, the first and what is run again because the other's shapes came are queued
            assert device.calls.count("launch") == 2 * 6 - 2 - 1
        return int(device.uploaded)

    five, six, twelve = (uploads(steps) for steps in (5, 6, 12))
    assert twelve - six == 6 * (six - five), "each further step sends the same"
    config = make()[1].bundle.manifest.config.transformer
    row = 4 * config.dim * (4 * config.modulated_blocks + 1)
    assert six - five < 2 * (2 * row + 4 * 16 * 16 * 4), "latents and rows of the modulation table, no caption"


def test_prompts_of_one_length_share_their_shapes(make: Make, cpu: Pipeline) -> None:
    _, pipeline = make()
    case = Case("one prompt", (32, 32), 4, guided=Guided(negative="two prompt"))
    check_parity(draw(pipeline, case)[0], draw(cpu, case)[0])
    again = draw(pipeline, replace(case, prompt="two prompt", guided=Guided(negative="one prompt")))[0]
    assert not np.array_equal(draw(pipeline, case)[0].latents, again.latents)
    check_parity(again, draw(cpu, replace(case, prompt="two prompt", guided=Guided(negative="one prompt")))[0])
