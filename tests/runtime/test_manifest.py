"""The manifest: what is written is what is read, and its properties say what they should."""

import dataclasses
import json
from pathlib import Path

import pytest
from facts import raises_with

from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.files import hash_file
from zimage_runtime.bundle.manifest import SCHEMA_VERSION, FileRecord, Manifest, Origin, checked_path
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.errors import BundleError
from zimage_runtime.model.programs import COMPONENTS, MODEL_PROGRAMS, Program


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def test_round_trip(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json(), "here")
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_round_trip_of_what_a_build_leaves_empty(manifest: Manifest) -> None:
    full = dataclasses.replace(
        manifest,
        source=Origin("Tongyi-MAI/Z-Image-Turbo", "0123abc"),
        parity={"latents": 1e-6, "psnr": 60.0},
        self_check={"decoder": {"image": 0.5}},
    )
    again = Manifest.from_json(full.to_json(), "here")
    assert again == full
    assert again.name == "Z-Image-Turbo-fp32"


def test_what_a_build_writes(manifest: Manifest, bundle: Path) -> None:
    assert manifest.config == SMALL.config
    assert (manifest.defaults.width, manifest.defaults.height, manifest.defaults.steps) == (128, 128, 8)
    assert manifest.name == "checkpoint-fp32"
    assert manifest.parity is None
    assert "cpu" in manifest.executors
    assert set(manifest.programs) == set(MODEL_PROGRAMS)
    assert set(manifest.weights) == set(COMPONENTS)
    assert set(manifest.self_check) >= {program.value for program in MODEL_PROGRAMS}
    on_disk = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert set(on_disk) == {*manifest.files, "manifest.json"}
    for name, record in manifest.files.items():
        assert record == FileRecord(on_disk[name].stat().st_size, hash_file(on_disk[name])), name


def test_the_bundle_names_no_place_on_this_machine(bundle: Path, checkpoint: Path) -> None:
    text = (bundle / "manifest.json").read_text("utf-8")
    for place in (bundle, checkpoint, Path.home()):
        assert str(place) not in text


def test_the_fingerprint_is_of_what_decides_the_image(manifest: Manifest) -> None:
    config = manifest.config
    shifted = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, shift=5.0))
    decisive = [*manifest.weights.values(), manifest.embeddings, manifest.tokenizer]
    others = [
        dataclasses.replace(manifest, files={**manifest.files, path: FileRecord(1, "0" * 64)}) for path in decisive
    ]
    others += [
        dataclasses.replace(manifest, config=shifted),
        dataclasses.replace(manifest, precision=Precision.BF16),
        dataclasses.replace(manifest, folds={"transformer": {"layers.0": {"product": 1}}}),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    assert not any(manifest.matches(other.fingerprint) for other in others)


def test_the_fingerprint_leaves_out_what_can_be_renewed(manifest: Manifest) -> None:
    decisive = {*manifest.weights.values(), manifest.embeddings, manifest.tokenizer}
    programs = {path: FileRecord(1, "0" * 64) for path in manifest.files if path not in decisive}
    same = [
        dataclasses.replace(manifest, source=Origin("another"), parity={"latents": 0.0}, exporter="another"),
        dataclasses.replace(manifest, files=dict(reversed(list(manifest.files.items())))),
        dataclasses.replace(manifest, files={**manifest.files, **programs}),
        dataclasses.replace(manifest, files={**manifest.files, "engines/a.engine": FileRecord(1, "0" * 64)}),
        dataclasses.replace(manifest, programs={Program.DENOISER: manifest.programs[Program.DENOISER]}),
    ]
    assert programs
    assert {other.fingerprint for other in same} == {manifest.fingerprint}


def test_an_unknown_key_is_for_a_later_version(manifest: Manifest) -> None:
    document = json.loads(manifest.to_json())
    document["comment"] = {"by": "a later exporter"}
    assert Manifest.from_json(json.dumps(document), "here") == manifest


def test_a_later_schema_says_to_upgrade(manifest: Manifest) -> None:
    document = {**json.loads(manifest.to_json()), "schema_version": 99}
    with raises_with(BundleError, "here:", 99, SCHEMA_VERSION, "upgrade zimage-rt"):
        Manifest.from_json(json.dumps(document), "here")


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "a..b/c", "ä/雪.bin", ".hidden"])
def test_paths_that_stay_inside(path: str) -> None:
    assert checked_path(path, "here") == path


@pytest.mark.parametrize("path", ["", "/a", "a//b", "..", "a/../b", "./a", "a/", "a\\b", "C:/a", "a\0b"])
def test_paths_that_lead_out(path: str) -> None:
    with raises_with(BundleError, "here:", repr(path)):
        checked_path(path, "here")
