"""Every field of a request is checked where it is written; what is accepted and refused does not depend on a bundle."""

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_with

from zimage_rt import Pipeline
from zimage_runtime.errors import RequestError
from zimage_runtime.pipeline import Request

WRONG: dict[str, list[Any]] = {
    "prompt": [None, 7, b"a fox", ["a fox"]],
    "size": [(128.0, 128.0), (64,), 64, "64x64", (64, None), (True, 64)],
    "steps": [2.5, 0, -1, 257, "8", True],
    "seed": ["7", -1, 1.0, 2**64, None.__class__],
    "count": [0, 10_001, 1.5, None, None.__class__],
    "batch_size": [0, "2", 1.0, None],
    "strength": ["half", True, b"1"],
    "mask_grow": [-1, 2.5, "4", None],
    "image": [7, b"fox.png", np.zeros((16, 16, 3), np.uint8)],
    "mask": [7, b"fox.png", np.zeros((16, 16), np.uint8)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named_with_its_field(name: str, value: Any) -> None:
    options: dict[str, Any] = {"prompt": "a fox", "image": "fox.png", name: value}
    with raises_with(RequestError, name) as refusal:
        Request(**options)
    assert str(refusal.value).startswith(name)


def test_numbers_of_numpy_are_numbers() -> None:
    size = (np.int64(64), np.int32(48))
    request = Request("a fox", size=size, steps=np.int64(2), seed=np.uint32(7), count=np.int8(2))  # type: ignore[arg-type]
    assert request.size == (64, 48)


def test_seeds_of_all_images_must_exist() -> None:
    last = 2**64 - 1
    Request("a fox", seed=last)
    with raises_with(RequestError, last, last + 1):
        Request("a fox", seed=last, count=2)
    with raises_with(RequestError, last, last + 1):  # numpy's own sum would be 0
        Request("a fox", seed=np.uint64(last), count=np.uint64(2))  # type: ignore[arg-type]


def test_a_mask_is_grown_only_where_there_is_one() -> None:
    with raises_with(RequestError, "mask_grow"):
        Request("a fox", image="fox.png", mask_grow=3)
    Request("a fox", image="fox.png", mask="mask.png", mask_grow=3)


@pytest.mark.parametrize("option", [{"strength": 0.5}, {"mask": "mask.png"}])
def test_options_of_a_source_image_need_one(option: dict[str, Any]) -> None:
    with raises_with(RequestError, *option, "image"):
        Request("a fox", **option)


def test_a_request_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Request("a fox").prompt = "a hen"  # type: ignore[misc]


def test_generate_and_stream_take_the_fields_of_a_request_and_no_others(bundle: Path) -> None:
    names = ["self", *(field.name for field in fields(Request))]
    for method in (Pipeline.generate, Pipeline.stream):
        parameters = inspect.signature(method).parameters
        assert list(parameters) == names
        assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("self", "prompt"))
    with Pipeline.from_bundle(bundle, "cpu") as pipeline, raises_with(TypeError, "'colour'"):
        pipeline.generate("a fox", colour="red")  # type: ignore[call-arg]


def test_an_image_that_is_saved_from_python_is_replayed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli_tools import call_rt

    with Pipeline.from_bundle(bundle, "cpu") as pipeline:
        result = pipeline.generate("a fox", size=(48, 32), steps=2, seed=9, count=2)
    paths = result.save(tmp_path / "fox.png")
    assert [path.name for path in paths] == ["fox-9.png", "fox-10.png"]
    for path in paths:
        again = tmp_path / "again.png"
        outcome = call_rt(capsys, "run", "--replay", path, "-m", bundle, "--quiet", "-o", again)
        assert (outcome.status, outcome.err) == (0, "")
        assert again.read_bytes() == path.read_bytes()
