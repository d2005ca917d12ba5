"""From rows to requests: every field of `Request`, from JSON and from text, ids and seeds."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from facts import raises_with

from zimage_rt.batch.fields import COLUMNS, MOST_CHARACTERS, row_request
from zimage_rt.batch.rows import Row
from zimage_rt.commands.run import run
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.errors import AdapterError, RequestError
from zimage_runtime.events import Request

FOLDER = Path("/rows")


def request(values: dict[str, Any], *, textual: bool = False) -> Request:
    return row_request(Row(1, values, textual), FOLDER).request()


def test_a_row_has_every_option_of_run() -> None:
    """Those of `run` that say what an image is, by the names of `Request`."""
    about_the_image = {one.name for one in fields(Request) if one.init} & {
        {"lora": "loras"}.get(str(one.name), str(one.name)) for one in run.params
    }
    assert about_the_image - {"count"} == set(COLUMNS)
    assert "size" in inspect.signature(Request).parameters


JSON: dict[str, Any] = {
    "prompt": "狐",
    "size": [64, 48],
    "steps": 3,
    "seed": 2**64 - 1,
    "image": "in.png",
    "mask": "/masks/m.png",
    "mask_grow": 2,
    "strength": 0.5,
    "cfg_scale": 2,
    "negative": "hen",
    "cfg_normalization": True,
    "cfg_truncation": 0.5,
    "sampler": "heun",
    "scheduler": "beta",
    "shift": 2.5,
    "variation": [5, 0.2],
    "control": "edges.png",
    "controlnet": "net",
    "control_type": "canny",
    "control_scale": 0.5,
    "control_start": 0.25,
    "control_end": 0.75,
    "loras": ["a.safetensors:0.5", ["b.safetensors", -1]],
    "lora_allow_unused": True,
}
TEXT = {
    **{name: str(value) for name, value in JSON.items()},
    "size": "64x48",
    "variation": "5:0.2",
    "loras": "a.safetensors:0.5|b.safetensors:-1",
    "cfg_normalization": "TRUE",
    "lora_allow_unused": "1",
}


@pytest.mark.parametrize(("values", "textual"), [(JSON, False), (TEXT, True)])
def test_every_field(values: dict[str, Any], textual: bool) -> None:
    assert request(values, textual=textual) == Request(
        "狐",
        size=(64, 48),
        steps=3,
        seed=2**64 - 1,
        image="/rows/in.png",
        mask="/masks/m.png",
        mask_grow=2,
        strength=0.5,
        cfg_scale=2,
        negative="hen",
        cfg_normalization=True,
        cfg_truncation=0.5,
        sampler="heun",
        scheduler="beta",
        shift=2.5,
        variation=(5, 0.2),
        control="/rows/edges.png",
        controlnet="/rows/net",
        control_type="canny",
        control_scale=0.5,
        control_start=0.25,
        control_end=0.75,
        loras=(GivenLora("a.safetensors", 0.5), GivenLora("b.safetensors", -1.0)),
        lora_allow_unused=True,
    )
    assert set(values) == set(COLUMNS)


def test_a_lora_beside_the_file_of_rows_or_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "here.safetensors").write_bytes(b"")
    row = Row(1, {"prompt": "x", "loras": ["here.safetensors", "org/there:2"]})
    found = row_request(row, tmp_path).request().loras
    assert found == (GivenLora(str(tmp_path / "here.safetensors")), GivenLora("org/there", 2.0))


def test_whole_numbers_that_pandas_made_floating_point() -> None:
    assert request({"prompt": "x", "seed": 7.0, "steps": 2.0}) == Request("x", seed=7, steps=2)


def test_an_empty_prompt_and_columns_of_ones_own() -> None:
    assert request({"_sku": "17", "seed": "1"}, textual=True).prompt == ""
    with raises_with(RequestError, "prompt"):
        request({"seed": 1})


def test_a_row_without_a_seed_gets_the_same_each_time() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "id": "x"}, {"prompt": "a", "id": "y"}]
    seeds = [request(row).seed for row in rows]
    assert seeds == [request(row).seed for row in rows]
    assert len(set(seeds)) == 4
    assert all(seed is not None and 0 <= seed < 2**32 for seed in seeds)


def test_ids() -> None:
    def named(**values: Any) -> str:
        return row_request(Row(1, {"prompt": "a", **values}), FOLDER).id

    assert named(id="狐 1.b") == "狐 1.b"
    assert named(id=7) == "7"
    assert named() == named() != named(seed=1)
    assert len(named()) == 12


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "..", ".hidden", "a\0", "a\n", "con", "LPT1.x", "a:", "x" * 121, "a ", True, 1.5, ["a"]]
)
def test_ids_that_are_no_file_names(name: object) -> None:
    with raises_with(RequestError, "id"):
        row_request(Row(1, {"prompt": "a", "id": name}), FOLDER)


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"promt": "x"}, ("'promt'", "prompt", "id")),
        ({"count": 2}, ("'count'", "seed")),
        ({"size": "64*64"}, ("size", "'64*64'")),
        ({"size": [64]}, ("size",)),
        ({"size": 64}, ("size", "'64'")),
        ({"seed": -1}, ("seed", "-1")),
        ({"seed": 1.5}, ("seed", "1.5")),
        ({"seed": "1"}, ("seed", "'1'")),
        ({"steps": True}, ("steps", "True")),
        ({"strength": 0.5}, ("strength", "image")),
        ({"image": 5}, ("image", "5")),
        ({"variation": "5"}, ("variation", "'5'")),
        ({"loras": 5}, ("loras", "5")),
        ({"sampler": "nope"}, ("sampler", "'nope'")),
        ({"prompt": 5}, ("prompt", "int")),
        ({"prompt": {"a": 1}}, ("prompt", "dict")),
        ({"negative": "x" * (MOST_CHARACTERS + 1)}, ("negative", MOST_CHARACTERS + 1, MOST_CHARACTERS)),
        ({"prompt": "\ud800"}, ("\\ud800",)),
    ],
)
def test_what_is_wrong_with_a_row(values: dict[str, Any], facts: tuple[Any, ...]) -> None:
    with raises_with(RequestError, *facts):
        request({"prompt": "x", **values})


@pytest.mark.parametrize(
    ("column", "text"), [("seed", "x"), ("seed", "1.5"), ("shift", "x"), ("cfg_normalization", "yes")]
)
def test_text_that_its_field_cannot_be(column: str, text: str) -> None:
    with raises_with(RequestError, column, f"'{text}'"):
        request({"prompt": "x", column: text}, textual=True)


@pytest.mark.parametrize("loras", [[5], [["a", "b"]], ["a:1e9"]])
def test_what_is_no_lora(loras: list[Any]) -> None:
    with raises_with(AdapterError, "LoRA" if loras != ["a:1e9"] else "weight"):
        request({"prompt": "x", "loras": loras})
