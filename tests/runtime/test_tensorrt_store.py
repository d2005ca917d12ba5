"""Engines are found in the bundle, kept in the user's cache or built, and only ever loaded from where they may be."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from facts import assert_facts, raises_with
from library_stand_in import LibraryStandIn

from zimage_export.engines import build as export_engines
from zimage_export.engines.build import add_engines
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.errors import BundleError, ExecutorError
from zimage_runtime.executors.tensorrt import engine_store
from zimage_runtime.executors.tensorrt.block_catalog import Catalog
from zimage_runtime.executors.tensorrt.engine_cache import HashedCache, cache_folder, engine_name
from zimage_runtime.executors.tensorrt.engine_store import (
    EngineStore,
    read_catalog,
    read_hashed,
    variant_spec,
)
from zimage_runtime.executors.tensorrt.trt_api import Built
from zimage_runtime.machine.gpu_targets import GpuTarget, Variant, gpu_of, variant_of


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> LibraryStandIn:
    stand_in = LibraryStandIn()
    monkeypatch.setattr(export_engines, "Library", lambda: stand_in)
    return stand_in


@pytest.fixture(scope="module")
def engined_once(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("engined") / "bundle"
    shutil.copytree(bundle, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_engines, "Library", LibraryStandIn)
        add_engines(Bundle.open(copy), [GpuTarget.SM86, GpuTarget.SM75])
    return copy


@pytest.fixture
def engined(engined_once: Path, tmp_path: Path, library: LibraryStandIn) -> Bundle:
    """A bundle with engines for SM86 and Turing; `library` is asked for others."""
    copy = tmp_path / "bundle"
    shutil.copytree(engined_once, copy)
    return Bundle.open(copy)


@pytest.fixture
def cache(tmp_path: Path) -> HashedCache:
    return HashedCache(tmp_path / "cache")


def store(
    bundle: Bundle,
    library: LibraryStandIn,
    cache: HashedCache,
    capability: tuple[int, int] = (8, 6),
    *,
    trusted: bool = False,
) -> EngineStore:
    return EngineStore(bundle, read_catalog(bundle), library, capability, trusted=trusted, cache=cache)  # type: ignore[arg-type]


def made(found: EngineStore, program: str, tokens: int = 1) -> bytes:
    """The engine of a context, which is what the stand-in's contexts are."""
    return found.context(program, {"x": (1, tokens, 64)}, 0)  # type: ignore[return-value]


def test_generations() -> None:
    assert gpu_of((8, 6)) is GpuTarget.SM86
    assert gpu_of((12, 0)) is GpuTarget.SM120
    assert gpu_of((9, 0)) is GpuTarget.PORTABLE, "what has no engine of its own runs the portable one"
    assert [variant_of(c) for c in ((7, 5), (8, 0), (12, 1))] == [Variant.TURING, Variant.AMPERE, Variant.AMPERE]
    assert not GpuTarget.PORTABLE.runs_on((7, 5))


def test_an_engine_of_the_bundle_is_not_loaded_unless_it_is_trusted(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache
) -> None:
    """The manifest's hashes are by the maker of the engines: they say nothing about them."""
    theirs = {engined.file(engine.path).read_bytes() for engine in read_catalog(engined).engines}
    ours = made(store(engined, library, cache), "transformer_block")
    assert library.built == ["transformer_block"]
    assert not theirs & {*library.loaded[:-1]}
    (kept,) = cache.folder.iterdir()
    assert kept.read_bytes().endswith(ours)
    assert kept.stat().st_mode & 0o777 == 0o600


def test_engines_that_were_exported_here_are_in_the_users_cache(
    bundle: Path, tmp_path: Path, library: LibraryStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    opened = add_engines(Bundle.open(copy), [GpuTarget.SM89, GpuTarget.PORTABLE])
    library.built.clear()
    for capability, target in (((8, 9), "sm89"), ((8, 6), "portable")):
        engine = made(store(opened, library, HashedCache(cache_folder()), capability), "text_layer")
        assert f"['{target}']".encode() in engine
    assert library.built == []


def test_whatever_an_engine_depends_on_is_in_its_name(engined: Bundle, library: LibraryStandIn) -> None:
    program = read_catalog(engined).variants[Variant.AMPERE].programs["text_layer"]
    wider = dataclasses.replace(program, profile={"x": ((1,), (2,), (3,))})
    builder = library.builder
    builders = [dataclasses.replace(builder, **other) for other in ({"version": "9"}, {"flags": ()}, {"library": "x"})]
    names = [
        engine_name(builder, program, "a", GpuTarget.SM86),
        *(engine_name(other, program, "a", GpuTarget.SM86) for other in builders),
        engine_name(builder, wider, "a", GpuTarget.SM86),
        engine_name(builder, program, "b", GpuTarget.SM86),
        engine_name(builder, program, "a", GpuTarget.SM89),
    ]
    assert len(set(names)) == len(names)


def test_an_engine_of_a_trusted_bundle_is_loaded_as_it_is(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache
) -> None:
    engine = made(store(engined, library, cache, trusted=True), "transformer_block")
    assert library.built == []
    assert engine in {engined.file(path).read_bytes() for path in engined.manifest.files}
    assert b"['sm86']" in engine  # type: ignore[operator]
    assert not cache.folder.exists() or not list(cache.folder.iterdir())


@pytest.mark.parametrize(
    ("version", "capability", "target"),
    [
        ("1.8.0", (8, 6), "sm86"),
        ("1.7.1.116", (8, 9), "sm89"),
        ("1.8.0", (7, 5), "sm75"),
        ("1.7.1.116", (9, 0), "portable"),
    ],
)
def test_what_does_not_fit_is_built_once_and_kept(
    engined: Bundle,
    library: LibraryStandIn,
    cache: HashedCache,
    version: str,
    capability: tuple[int, int],
    target: str,
) -> None:
    library.version = version
    notes: list[str] = []
    first = store(engined, library, cache, capability)
    first.note = notes.append
    engine = made(first, "text_layer")
    assert f"['{target}'] by {version}".encode() in engine  # type: ignore[operator]
    (note,) = notes
    assert_facts(note, "text_layer", "tensorrt_rtx", version)
    made(first, "text_layer")
    again = made(store(engined, library, cache, capability), "text_layer")
    assert again == engine
    assert library.built == ["text_layer"]


def test_an_engine_that_the_library_refuses_is_built_again(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache
) -> None:
    path = next(e.path for e in read_catalog(engined).engines if e.program == "final_layer" and e.gpu is GpuTarget.SM86)
    library.refused.add(engined.file(path).read_bytes())
    with raises_with(ExecutorError, "tensorrt_rtx", "final_layer", "because"):
        made(
            store(engined, library, cache, trusted=True), "final_layer"
        )  # what is built is the same text, refused again
    assert library.built == ["final_layer"]


def test_an_altered_engine_is_not_loaded(engined: Bundle, library: LibraryStandIn, cache: HashedCache) -> None:
    path = next(e.path for e in read_catalog(engined).engines if e.program == "text_layer" and e.gpu is GpuTarget.SM86)
    data = bytearray(engined.file(path).read_bytes())
    data[0] ^= 1
    engined.file(path).write_bytes(data)
    with raises_with(BundleError, engined.file(path), "altered"):
        made(store(engined, library, cache, trusted=True), "text_layer")
    assert bytes(data) not in library.loaded


def test_an_altered_program_is_not_built(engined: Bundle, library: LibraryStandIn, cache: HashedCache) -> None:
    program = variant_spec(read_catalog(engined), (8, 9)).programs["text_layer"]
    engined.file(program.path).write_bytes(b"\0" * engined.manifest.files[program.path].size)
    with raises_with(BundleError, engined.file(program.path), "altered"):
        made(store(engined, library, cache, (8, 9)), "text_layer")
    assert library.built == []


def test_an_altered_catalog_is_not_read(engined: Bundle) -> None:
    path = engined.file(engined.manifest.engines or "")
    path.write_text(path.read_text().replace("portable", "Portable").replace("sm86", "sm89"))
    with raises_with(BundleError, path, "altered"):
        read_catalog(engined)


def test_a_file_that_the_manifest_does_not_list_is_not_read(engined: Bundle) -> None:
    stray = engined.root / "engines" / "stray.engine"
    stray.write_bytes(b"anything")
    with raises_with(BundleError, stray, "manifest", "zimage-export engines"):
        read_hashed(engined, "engines/stray.engine")


@pytest.mark.parametrize("damage", ["altered", "cut", "empty", "theirs", "open"])
def test_a_cache_that_cannot_be_trusted_is_not(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache, damage: str
) -> None:
    made(store(engined, library, cache, (8, 9)), "text_layer")
    (kept,) = cache.folder.iterdir()
    data = kept.read_bytes()
    if damage == "altered":
        kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        kept.write_bytes(data[:-1])
    elif damage == "empty":
        kept.write_bytes(b"")
    elif damage == "open":
        cache.folder.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(cache.folder, 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    made(store(engined, library, cache, (8, 9)), "text_layer")
    assert library.built == ["text_layer", "text_layer"]


def test_a_cache_that_cannot_be_written_is_done_without(
    engined: Bundle, library: LibraryStandIn, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = HashedCache(tmp_path / "file" / "cache")
    assert made(store(engined, library, blocked, (8, 9)), "text_layer")


def kernel_files(cache: HashedCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes()[32:] for path in cache.folder.glob("kernels-*")}


def test_compiled_kernels_are_kept_between_runs(engined: Bundle, library: LibraryStandIn, cache: HashedCache) -> None:
    first = store(engined, library, cache)
    made(first, "text_layer")
    assert library.kernels is None
    assert kernel_files(cache) == {}
    first.save()
    ((name, kernels),) = kernel_files(cache).items()
    for part in (library.name, library.version, "sm86"):
        assert part in name
    assert kernels == library.compiled
    assert (cache.folder / name).stat().st_mode & 0o777 == 0o600
    second = store(engined, library, cache)
    made(second, "text_layer")
    assert library.kernels == kernels


def test_kernels_are_written_when_there_are_new_ones_alone(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache
) -> None:
    def written() -> int:
        return next(cache.folder.glob("kernels-*")).stat().st_ino  # each writing is another file

    first = store(engined, library, cache)
    made(first, "text_layer")
    first.close()
    before = written()
    same = store(engined, library, cache)
    made(same, "text_layer")
    same.close()
    assert written() == before, "these kernels were in the file"
    more = store(engined, library, cache)
    made(more, "text_layer", tokens=64)
    library.compiled += b" and more"
    more.save()
    assert written() != before
    assert list(kernel_files(cache).values()) == [library.compiled]


def test_kernels_of_other_programs_and_gpus_have_files_of_their_own(
    engined: Bundle, bundle_in: Callable[[Precision], Path], library: LibraryStandIn, cache: HashedCache, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle_in(Precision.INT8), other)
    for opened, capability in (
        (engined, (8, 6)),
        (engined, (8, 9)),
        (add_engines(Bundle.open(other), [GpuTarget.SM86]), (8, 6)),
    ):
        found = store(opened, library, cache, capability)
        made(found, "text_layer")
        found.close()
    assert len(kernel_files(cache)) == 3


def test_contexts_stay_for_stages_that_return_the_last_ones_used(
    engined: Bundle, library: LibraryStandIn, cache: HashedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_store, "_CONTEXTS", 2)
    found = store(engined, library, cache)
    for tokens in (1, 2, 1, 3, 1, 2):
        made(found, "text_layer", tokens)
    assert library.contexts == [1, 2, 3, 2], "of two that are kept, the one of 1 token was used each time"


def test_gpus_that_cannot_run_it_are_named(engined: Bundle) -> None:
    catalog = read_catalog(engined)
    with raises_with(ExecutorError, "7.0", "older", "--executor cuda", "cpu"):
        variant_spec(catalog, (7, 0))
    alone = Catalog({Variant.AMPERE: catalog.variants[Variant.AMPERE]})
    with raises_with(ExecutorError, "7.5", "bf16", "--precision fp16", "int8"):
        variant_spec(alone, (7, 5))


def test_engines_are_renewed_without_changing_what_the_bundle_generates(
    engined: Bundle, bundle: Path, library: LibraryStandIn
) -> None:
    before = set(engined.manifest.files)
    assert engined.manifest.fingerprint == Bundle.open(bundle).manifest.fingerprint
    (engined.root / "engines" / "left-behind.part").write_bytes(b"of a run that was killed")
    library.version = "1.8.0"
    renewed = add_engines(engined, [GpuTarget.PORTABLE])
    assert renewed.manifest.fingerprint == engined.manifest.fingerprint
    on_disk = {f"engines/{path.name}" for path in (renewed.root / "engines").iterdir()}
    assert on_disk == {path for path in renewed.manifest.files if path.startswith("engines/")}
    assert not any("sm75" in path for path in on_disk)
    assert before - set(renewed.manifest.files)
    renewed.verify()


def test_a_run_that_fails_leaves_the_engines_as_they_were(
    engined: Bundle, library: LibraryStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Built:
        raise ExecutorError("no")

    monkeypatch.setattr(library, "build", refuse)
    with pytest.raises(ExecutorError):
        add_engines(engined, [GpuTarget.SM89])
    again = Bundle.open(engined.root)
    assert again.manifest == engined.manifest
    again.verify()
    read_catalog(again)
