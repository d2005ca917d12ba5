"""Which activations this processor multiplies without saturating, and that nothing else is ever used."""

from typing import Any

import numpy as np
import onnxruntime
import pytest

from zimage_runtime.machine import int8_products as integers
from zimage_runtime.machine.int8_products import EXACT_LEVELS, KNOWN_PRODUCT_MODEL, SAFE_LEVELS


def products(x: Any, w: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(KNOWN_PRODUCT_MODEL, providers=["CPUExecutionProvider"])
    return list(session.run(["y", "z"], {"x": x, "w": w}))


def test_the_answer_is_the_processors_own() -> None:
    """Exact or not: the verdict is what a comparison with numpy's integers gives."""
    x, w = np.full((5, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    exact = x.astype(np.int64) @ w.astype(np.int64)
    assert integers.products_are_exact() == all((found == exact).all() for found in products(x, w))


def test_seven_bits_are_exact_on_every_processor() -> None:
    rng = np.random.default_rng(0)
    w = rng.choice(np.array([-127, 127], np.int8), (64, 32))
    x = np.where(w[:, 0] > 0, 127, 0).astype(np.uint8)[None].repeat(5, 0)  # all that can add up does
    exact = x.astype(np.int64) @ w.astype(np.int64)
    assert (products(x, w)[0] == exact).all()
    assert (products(np.full((5, 64), 127, np.uint8), w)[1] == 127 * 64 * 127).all()


@pytest.mark.parametrize("broken", [b"", KNOWN_PRODUCT_MODEL.replace(b"MatMulInteger", b"MatMulXnteger")])
def test_a_library_that_cannot_tell_is_not_trusted(broken: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "KNOWN_PRODUCT_MODEL", broken)
    assert not integers.products_are_exact()


@pytest.mark.parametrize("wrong", ["y", "z"])
def test_one_kernel_that_saturates_is_enough(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
            exact = feeds["x"].astype(np.int64) @ feeds["w"].astype(np.int64)
            return [exact - (name == wrong and len(exact) == 1) for name in names]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert not integers.products_are_exact()
    monkeypatch.setattr(Session, "run", lambda self, names, feeds: [np.full((1, 1), 64 * 255 * 127)] * 2)
    assert integers.products_are_exact()


@pytest.mark.parametrize(("exact", "levels", "bits"), [(True, EXACT_LEVELS, 8), (False, SAFE_LEVELS, 7)])
def test_levels_follow_the_answer(exact: bool, levels: float, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "products_are_exact", lambda: exact)
    integers.activation_levels.cache_clear()
    try:
        assert integers.activation_levels() == levels
        assert integers.activation_bits() == bits
    finally:
        integers.activation_levels.cache_clear()
