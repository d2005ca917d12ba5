"""The catalog of a bundle's block programs: what is written comes back, and what cannot be used is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from facts import raises_with
from library_stand_in import LibraryStandIn

from zimage_export.engines import build as export_engines
from zimage_export.engines.build import add_engines
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import BundleError
from zimage_runtime.executors.tensorrt.block_catalog import SCHEMA_VERSION, Catalog
from zimage_runtime.executors.tensorrt.engine_store import read_catalog
from zimage_runtime.machine.gpu_targets import GpuTarget, Variant


@pytest.fixture(scope="module")
def engined(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    copy = tmp_path_factory.mktemp("engined") / "bundle"
    shutil.copytree(bundle, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_engines, "Library", LibraryStandIn)
        return add_engines(Bundle.open(copy), [GpuTarget.SM86, GpuTarget.SM75])


def test_the_catalog_comes_back_as_it_was(engined: Bundle) -> None:
    catalog = read_catalog(engined)
    assert Catalog.from_json(catalog.to_json(), "here") == catalog
    assert {engine.gpu for engine in catalog.engines} == {GpuTarget.SM86, GpuTarget.SM75}
    for engine in catalog.engines:
        for part in (engine.program, "fp32", engine.gpu.value, "max", "tensorrt_rtx1.7.1.116"):
            assert part in engine.path


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        ("variants", None),
        ("variants", []),
        ("variants", "x"),
        ("variants", {"sm80": {}}),
        ("variants", {"sm80": {"programs": {"x": {}}, "blocks": {}}}),
        ("variants", {"sm80": {"programs": {}, "blocks": {"x": {"program": "y", "scalars": {}}}}}),
        ("engines", None),
        ("engines", {}),
        ("engines", [1]),
        ("engines", [{"path": "../x", "program": "x", "variant": "sm80", "gpu": "sm86"}]),
        ("engines", [{"path": "x", "program": "x", "variant": "sm99", "gpu": "sm86"}]),
        ("schema_version", 10**9),
        ("schema_version", "x"),
    ],
)
def test_a_damaged_catalog_is_named(engined: Bundle, place: str, damage: object) -> None:
    document = json.loads(read_catalog(engined).to_json())
    with raises_with(BundleError, "here"):
        Catalog.from_json(json.dumps({**document, place: damage}), "here")


def test_programs_of_another_version_are_to_be_made_again(engined: Bundle) -> None:
    document = json.loads(read_catalog(engined).to_json())
    document["variants"]["sm80"]["programs"]["upsample"]["kind"] = "decoder_up"
    with raises_with(BundleError, "here", "'decoder_up'", "zimage-export engines"):
        Catalog.from_json(json.dumps(document), "here")


def test_a_catalog_of_an_earlier_version_is_to_be_made_again(engined: Bundle) -> None:
    """Its programs take other weights, and its figures of memory are wrong."""
    document = json.loads(read_catalog(engined).to_json())
    with raises_with(BundleError, "here", "earlier", "zimage-export engines"):
        Catalog.from_json(json.dumps({**document, "schema_version": SCHEMA_VERSION - 1}), "here")


@pytest.mark.parametrize(
    "damage", [[], "x", {"dtype": "F9", "shape": [1]}, {"dtype": "F16", "shape": [1], "parts": [1]}]
)
def test_a_damaged_weight_is_named(engined: Bundle, damage: object) -> None:
    document = json.loads(read_catalog(engined).to_json())
    document["variants"]["sm80"]["programs"]["text_layer"]["weights"]["self_attn.qkv.weight"] = damage
    with raises_with(BundleError, "here", "self_attn.qkv.weight"):
        Catalog.from_json(json.dumps(document), "here")


def test_scratch_is_interpolated_between_what_was_measured(engined: Bundle) -> None:
    program = read_catalog(engined).variants[Variant.AMPERE].programs["transformer_block"]
    program = dataclasses.replace(program, scratch=((100, 1000), (200, 3000), (400, 3000)))
    assert [program.scratch_bytes(n) for n in (1, 100, 150, 151, 200, 300, 400, 1000)] == [
        1000, 1000, 2020 + (2 << 20), 2040 + (2 << 20), 3000, 3030 + (2 << 20), 3000, 3000,
    ]  # fmt: skip


def test_scratch_that_a_context_needs_is_known_from_then_on(engined: Bundle) -> None:
    program = read_catalog(engined).variants[Variant.AMPERE].programs["transformer_block"]
    program = dataclasses.replace(program, scratch=((100, 1000), (200, 3000), (400, 9000)))
    more = program.needing(150, 5000)
    assert more.scratch == ((100, 1000), (150, 5000), (200, 5000), (400, 9000))
    assert program.needing(500, 9500).scratch_bytes(500) == 9500
    assert program.positions({"x": (1, 77, 64), "cos": (1, 77, 4), "sin": (1, 77, 4)}) == 77
