"""What counts as the right picture."""

import numpy as np
import pytest
from facts import assert_facts

from zimage_rt.bench.accuracy import IDENTICAL, Pixels, Reference, flip, gate_db, judge, psnr_db
from zimage_runtime.bundle.precision import Precision

RNG = np.random.default_rng(0)


def picture() -> Pixels:
    return RNG.integers(0, 256, (64, 48, 3)).astype(np.uint8)


def noisy(pixels: Pixels, deviation: float) -> Pixels:
    return np.clip(np.rint(pixels + RNG.normal(0, deviation, pixels.shape)), 0, 255).astype(np.uint8)


def test_each_precision_is_held_to_its_own_gate_and_unknown_ones_to_the_loosest() -> None:
    stated = {"fp32": 48.0, "bf16": 25.0, "fp16": 35.0, "int8": 34.0, "int4": 25.0}
    assert {precision.value: gate_db(precision.value) for precision in Precision} == stated
    assert gate_db("q8_0") == gate_db("another system's") == 20.0


def test_psnr_is_the_definition() -> None:
    reference = np.full((8, 8, 3), 100, np.uint8)
    assert psnr_db(reference + np.uint8(1), reference) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
    assert psnr_db(reference, reference) == float("inf")


def test_an_image_close_enough_passes_and_one_beyond_the_gate_fails() -> None:
    expected = picture()
    reference = Reference("the reference", expected)
    for deviation, failed in ((2.0, False), (40.0, True)):
        accuracy, failure = judge(noisy(expected, deviation), "bf16", reference, ["a", "a"])
        assert (failure is not None) is failed
        assert accuracy.psnr_db.value is not None
        assert (accuracy.psnr_db.value < gate_db("bf16")) is failed
    assert failure is not None
    assert_facts(failure, f"{accuracy.psnr_db.value:.1f} dB", "the reference", "bf16", "25 dB")


def test_identical_images_are_said_to_be_and_have_no_psnr() -> None:
    expected = picture()
    accuracy, failure = judge(expected.copy(), "fp32", Reference("r", expected), ["a", "b"])
    assert failure is None
    assert accuracy.identical
    assert accuracy.psnr_db.reason == IDENTICAL
    assert accuracy.max_difference.value == 0
    assert accuracy.repeatable is False  # its draws differed


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_constant_image_fails_even_where_the_reference_is_constant(with_reference: bool) -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    reference = Reference("r", black) if with_reference else Reference(None, None, "none was given")
    accuracy, failure = judge(black, "fp32", reference, ["a"])
    assert "constant" in str(failure)
    assert (accuracy.psnr_db.reason == "none was given") is not with_reference


def test_an_image_of_another_size_fails() -> None:
    _, failure = judge(picture()[:32], "fp32", Reference("r", picture()), ["a"])
    assert failure is not None
    assert "48x32" in failure
    assert "48x64" in failure


def test_flip_grows_with_what_an_eye_sees() -> None:
    pytest.importorskip("flip_evaluator")
    expected = picture()
    little, much = (flip(noisy(expected, deviation), expected).value for deviation in (2.0, 60.0))
    assert little is not None
    assert much is not None
    assert 0 < little < much <= 1
