"""JSON to checked values: a wrong value is named with its place, in the same words whichever way it is read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from zimage_runtime.checked_json import Fields, from_document, to_document
from zimage_runtime.errors import ConfigError


@dataclass(frozen=True)
class Part:
    name: str
    weight: float


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    size: tuple[int, int]
    by_name: dict[str, Part] = field(default_factory=dict)
    spare: Part | None = None
    sealed: bool = False

    def __post_init__(self) -> None:
        if self.size[0] > self.size[1]:
            raise ValueError("sizes must ascend")


WHOLE = Whole((Part("a", 1.5), Part("", 2.0)), (1, 2), {"c": Part("ü", 0.0)}, None, True)


def test_a_dataclass_comes_back_as_it_was_and_unknown_keys_are_ignored() -> None:
    assert from_document(Whole, to_document(WHOLE) | {"more": 1}, "file") == WHOLE


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"parts": [{"name": "a", "weight": "1"}]}, "file: parts[0]: weight"),
        ({"parts": [{"name": "a", "weight": 1}, {"name": 5, "weight": 1}]}, "file: parts[1]: name"),
        ({"parts": [{"name": "\ud800", "weight": 1}]}, "file: parts[0]: name"),
        ({"parts": [{"name": "a", "weight": float("inf")}]}, "file: parts[0]: weight"),
        ({"parts": [{"name": "a"}]}, "file: parts[0]: weight"),
        ({"parts": {}}, "file: parts"),
        ({"parts": [[]]}, "file: parts[0]"),
        ({"size": [1]}, "file: size"),
        ({"size": [1, True]}, "file: size[1]"),
        ({"size": [2, 1]}, "file: sizes"),
        ({"by_name": []}, "file: by_name"),
        ({"by_name": {"x": None}}, "file: by_name: x"),
        ({"spare": 0}, "file: spare"),
        ({"sealed": 1}, "file: sealed"),
        ({"sealed": None}, "file: sealed"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_place(change: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_document(Whole, to_document(WHOLE) | change, "file")
    assert str(caught.value).startswith(place)


@dataclass(frozen=True)
class Plain:
    text: str = "a"
    number: float = 1.0
    boolean: bool = False
    part: Part | None = None


def _part(fields: Fields) -> object:
    return fields.object("part")


def _text(fields: Fields) -> object:
    return fields.text("text")


def _number(fields: Fields) -> object:
    return fields.number("number")


def _boolean(fields: Fields) -> object:
    return fields.boolean("boolean")


@pytest.mark.parametrize(
    ("key", "value", "getter"),
    [
        ("text", 5, _text),
        ("text", "\udfff", _text),
        ("number", "5", _number),
        ("number", True, _number),
        ("number", 10**400, _number),
        ("boolean", 1, _boolean),
        ("boolean", "yes", _boolean),
        ("part", [], _part),
    ],
)
def test_both_ways_to_read_use_the_same_words(key: str, value: object, getter: Callable[[Fields], object]) -> None:
    said = []
    for read in (lambda: from_document(Plain, {key: value}, "file"), lambda: getter(Fields({key: value}, "file"))):
        with pytest.raises(ConfigError) as caught:
            read()
        said.append(str(caught.value).replace(" above zero", ""))
    assert said[0].startswith(f"file: {key}")
    assert said[0] == said[1]


def test_the_limit_of_an_integer_is_named_however_large() -> None:
    with pytest.raises(ConfigError) as refusal:
        Fields({"seed": 2**64}, "file").integer("seed", minimum=0, maximum=2**64 - 1)
    assert str(2**64 - 1) in str(refusal.value)
