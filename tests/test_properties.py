"""Whatever the input: never a traceback, never a hang, never anything but the error that was promised."""

import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import call_redirected
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_inputs import JSON, SMALL_BYTES, altered_bytes, altered_documents

from zimage_rt.cli import cli
from zimage_runtime.bundle.manifest import MANIFEST_NAME, Manifest, checked_path
from zimage_runtime.bundle.tensors import DType, TensorFile, TensorFileError, encode_header, read_header
from zimage_runtime.checked_json import Fields
from zimage_runtime.errors import BundleError, ConfigError, RequestError
from zimage_runtime.images.formats import ImageFormat
from zimage_runtime.images.image_files import encode_image, read_image_info
from zimage_runtime.images.metadata import ImageInfo
from zimage_runtime.pipeline import Pipeline, Request

pytestmark = pytest.mark.deep

FIXED = {
    "derandomize": True,  # the same examples everywhere, so that a failure is nobody's bad luck
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Any:
    return json.loads((bundle / MANIFEST_NAME).read_bytes())


def assert_names(message: str, start: str) -> None:
    """An error begins with what is at fault, and quotes no more of it than a line holds."""
    assert message.startswith(start)
    assert len(message) < len(start) + 1000


def read_manifest(text: str | bytes) -> Manifest | None:
    """Reads a manifest; None where it is refused. Anything but a `BundleError` that names it fails the test."""
    try:
        return Manifest.from_json(text, "manifest.json")
    except BundleError as error:
        assert_names(str(error), "manifest.json: ")
        return None


def check_usable(manifest: Manifest) -> None:
    """What a manifest that is accepted must be good for."""
    assert read_manifest(manifest.to_json().encode()) == manifest
    assert len(manifest.fingerprint) == 64
    assert manifest.name
    for path in manifest.files:
        assert not os.path.isabs(path)
        assert ".." not in Path(path).parts
        os.fsencode(path)


@given(data=st.data())
@settings(max_examples=40, **FIXED)
def test_altered_manifests(manifest: Any, data: st.DataObject) -> None:
    found = read_manifest(json.dumps(data.draw(altered_documents(manifest))))
    if found:
        check_usable(found)


@given(document=JSON)
@settings(max_examples=100, **FIXED)
def test_any_json_as_manifest(document: Any) -> None:
    assert read_manifest(json.dumps(document)) is None
    assert read_manifest(json.dumps({"format": "zimage-bundle", "schema_version": document})) is None


@given(data=st.data())
@settings(max_examples=100, **FIXED)
def test_damaged_manifests(bundle: Path, data: st.DataObject) -> None:
    text = (bundle / MANIFEST_NAME).read_bytes()
    found = read_manifest(data.draw(altered_bytes(text)))
    if found:
        check_usable(found)


@given(text=SMALL_BYTES)
@example(text=b"[" * 100_000)
@example(text=b"9" * 5000)
@example(text=b'{"a":' * 900 + b"1" + b"}" * 900)
@settings(max_examples=100, **FIXED)
def test_any_bytes_as_manifest(text: bytes) -> None:
    assert read_manifest(text) is None


@pytest.mark.parametrize("depth", [10, 300, 600, 900])
@pytest.mark.parametrize("key", ["schema_version", "precision", "config", "files", "weights"])
def test_deeply_nested_value_in_a_manifest(manifest: Any, key: str, depth: int) -> None:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    try:
        text = json.dumps({**manifest, key: value})
    except RecursionError:
        text = json.dumps({**manifest, key: "@"}).replace('"@"', "[" * depth + "]" * depth)
    assert read_manifest(text) is None


@given(path=st.text() | st.lists(st.sampled_from(["a", "b.c", "..", ".", "", "/", "\\", "C:", "\0"])).map("/".join))
@settings(max_examples=200, **FIXED)
def test_accepted_paths_stay_inside(path: str) -> None:
    try:
        checked_path(path, "manifest.json")
    except BundleError:
        return
    assert os.path.normpath(os.path.join("/bundle", path)) == f"/bundle/{path}"
    assert not set(path) & set("\\:\0")


@pytest.fixture(scope="module")
def scratch() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def read_tensors(path: Path, data: bytes) -> None:
    """Reads the header of a file of these bytes: every entry must lie inside it, or `TensorFileError` be raised."""
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except TensorFileError as error:
        assert_names(str(error), str(path))
        return
    for name, entry in entries.items():
        assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(data)
        try:
            values, dtype = TensorFile(path).array(name)
        except TensorFileError:
            assert entry.dtype not in list(DType)
        else:
            assert values.shape == entry.shape
            assert values.nbytes == entry.nbytes
            assert dtype.value == entry.dtype


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "I8", "shape": [0], "data_offsets": [32, 32]},
    "foreign": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [32, 40]},
    "__metadata__": {"format": "pt"},
}


def with_length(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@given(header=altered_documents(HEADER), data=st.binary(max_size=64))
@settings(max_examples=150, **FIXED)
def test_altered_safetensors_headers(scratch: Path, header: Any, data: bytes) -> None:
    read_tensors(scratch, with_length(json.dumps(header).encode(), data))


@given(header=st.dictionaries(st.text(), JSON, max_size=4) | JSON, data=st.binary(max_size=64))
@settings(max_examples=100, **FIXED)
def test_any_json_as_safetensors_header(scratch: Path, header: Any, data: bytes) -> None:
    read_tensors(scratch, with_length(json.dumps(header).encode(), data))


@given(data=altered_bytes(with_length(json.dumps(HEADER).encode(), bytes(40))) | SMALL_BYTES)
@example(data=b"")
@example(data=struct.pack("<Q", 2**64 - 1))
@example(data=struct.pack("<Q", 2**63))
@example(data=struct.pack("<Q", 0))
@settings(max_examples=150, **FIXED)
def test_damaged_safetensors_files(scratch: Path, data: bytes) -> None:
    read_tensors(scratch, data)


def test_file_cut_anywhere_is_refused(scratch: Path) -> None:
    whole = with_length(json.dumps(HEADER).encode(), bytes(40))
    for length in range(len(whole)):
        scratch.write_bytes(whole[:length])
        with pytest.raises(TensorFileError):
            read_header(scratch)
    read_tensors(scratch, whole)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DType), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        max_size=5,
    )
)
@settings(max_examples=100, **FIXED)
def test_written_headers_are_read_back(scratch: Path, tensors: dict[str, tuple[DType, tuple[int, ...]]]) -> None:
    header = encode_header(tensors)
    assert len(header) % 64 == 0
    scratch.write_bytes(header + bytes(4 * 4**4 * len(tensors)))
    entries = read_header(scratch)
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == tensors


@given(document=st.dictionaries(st.sampled_from("abc"), JSON), key=st.sampled_from("abcd"))
@settings(max_examples=200, **FIXED)
def test_fields_give_what_they_promise_or_name_the_key(document: dict[str, Any], key: str) -> None:
    fields = Fields(document, "file.json")
    getters: list[tuple[Callable[[str], object], type | tuple[type, ...]]] = [
        (fields.integer, int),
        (fields.number, float),
        (fields.text, str),
        (fields.optional_text, (str, type(None))),
        (fields.boolean, bool),
        (fields.integers, tuple),
        (fields.object, Fields),
    ]
    for getter, kind in getters:
        try:
            value = getter(key)
        except ConfigError as error:
            assert_names(str(error), f"file.json: {key}")
        else:
            assert isinstance(value, kind)


INFO = ImageInfo("a fox", 7, 48, 32, 8, "model", "0" * 64, "cpu")
IMAGES = {kind: encode_image(Image.new("RGB", (16, 16)), kind, INFO) for kind in ImageFormat}


def read_info(path: Path, data: bytes) -> ImageInfo | None:
    path.write_bytes(data)
    try:
        return read_image_info(path)
    except RequestError as error:
        assert_names(str(error), str(path))
        return None


@given(data=st.sampled_from(list(IMAGES.values())).flatmap(altered_bytes))
@settings(max_examples=150, **FIXED)
def test_damaged_images(scratch: Path, data: bytes) -> None:
    read_info(scratch, data)


@given(data=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x64\0\0\0WEBPVP8X"]), rest=SMALL_BYTES)
@settings(max_examples=100, **FIXED)
def test_any_bytes_as_image(scratch: Path, data: bytes, rest: bytes) -> None:
    assert read_info(scratch, data + rest) is None


@given(document=altered_documents(json.loads(INFO.replay())))
@settings(max_examples=100, **FIXED)
def test_altered_replay_documents(document: Any) -> None:
    try:
        info = ImageInfo.from_replay(json.dumps(document), "cat.png")
    except RequestError as error:
        assert_names(str(error), "cat.png: ")
    else:
        assert ImageInfo.from_replay(info.replay(), "cat.png") == info


@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=200), kind=st.sampled_from(ImageFormat))
@settings(max_examples=150, **FIXED)
def test_any_prompt_comes_back_from_any_format(scratch: Path, prompt: str, kind: ImageFormat) -> None:
    info = ImageInfo(**{**vars(INFO), "prompt": prompt})
    data = encode_image(Image.new("RGB", (16, 16)), kind, info)
    assert read_info(scratch, data) == info
    with Image.open(io.BytesIO(data)) as image:
        image.load()


NUMBERS = st.sampled_from(["0", "1", "-1", "2", "7", "1e3", "0x10", "", "٣", "9" * 30, str(2**64 - 1), "9" * 5000])
SIDES = st.sampled_from(["16", "32", "48", "0", "-16", "17", "8208", "9" * 20, "٣٢", ""])
# steps stay few and sizes small, so that what is accepted is generated in no time
OPTIONS = (
    st.tuples(st.just("--steps"), st.sampled_from(["0", "1", "2", "-1", "257", "two", "9" * 5000]))
    | st.tuples(st.just("--size"), st.builds("{}{}{}".format, SIDES, st.sampled_from("xX×,"), SIDES) | st.text())
    | st.tuples(st.just("--seed"), NUMBERS)
    | st.tuples(st.sampled_from(["-n", "--count"]), st.sampled_from(["0", "1", "2", "-1", "9" * 12, "9" * 5000]))
    | st.tuples(
        st.sampled_from(["-o", "--output"]),
        st.sampled_from(["a.png", "a.jpg", "a.webp", "a.gif", "", ".", "x/a.png", "a" * 300 + ".png", "\udcff.png"]),
    )
    | st.tuples(st.just("--replay"), st.sampled_from(["a.png", "a.jpg", "a.webp", "", ".", "none.png"]))
    | st.tuples(st.just("--executor"), st.sampled_from(["auto", "cpu", "abacus"]))
    | st.tuples(st.sampled_from(["--low-memory", "--no-metadata", "--json", "--quiet", "--nothing", "--", "-"]))
    | st.tuples(st.text(st.characters(exclude_characters="\0"), max_size=20))
)


@given(words=st.lists(OPTIONS, max_size=6), small=st.booleans())
@settings(max_examples=150, **FIXED)
def test_any_command_line(bundle: Path, tmp_path: Path, words: list[tuple[str, ...]], small: bool) -> None:
    arguments = [word for option in words for word in option]
    # help is no failure, and no image; and a default size and step count would take long
    assume(not any(word.startswith(("-h", "--h", "-m", "--m")) for word in arguments))
    cheap = ["--size", "16x16", "--steps", "1"] if small and "--replay" not in arguments else []
    if not cheap and "--replay" not in arguments:
        assume("--size" in arguments and "--steps" in arguments)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        outcome = call_redirected(cli, "run", "-m", bundle, *cheap, *arguments)
    finally:
        os.chdir(before)
    assert outcome.status in (0, 1, 2), outcome
    assert "Traceback" not in outcome.err
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    if outcome.status == 0:
        assert "error: " not in outcome.err
        assert outcome.out
    else:
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1


@given(words=st.lists(st.sampled_from(["run", "info", "doctor", "-m", "--verify", "--json", "x", "--", "--quiet", ""])))
@settings(max_examples=40, **FIXED)
def test_any_order_of_commands(tmp_path: Path, words: list[str]) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        outcome = call_redirected(cli, *words)
    finally:
        os.chdir(before)
    assert outcome.status in (0, 1, 2), outcome
    assert "Traceback" not in outcome.err
    generated = os.listdir(tmp_path)  # by `run` with a prompt, from the bundle that ships
    assert all(name.startswith("zimage-") and name.endswith(".png") for name in generated), generated
    for name in generated:
        (tmp_path / name).unlink()


@given(
    size=st.tuples(st.integers(), st.integers()) | st.tuples(*[st.sampled_from([16, 32, 8192, 2**62, 10**30])] * 2),
    steps=st.integers() | st.integers(1, 256),
    seed=st.none() | st.integers() | st.integers(2**64 - 3, 2**64),
    count=st.integers() | st.integers(1, 3),
)
@example(size=(16, 16), steps=1, seed=None, count=2**32)
@example(size=(16, 16), steps=1, seed=0, count=10**12)
@settings(max_examples=200, **FIXED)
def test_any_request(pipeline: Pipeline, size: tuple[int, int], steps: int, seed: int | None, count: int) -> None:
    try:
        request = pipeline.prepare(Request("a fox", size=size, steps=steps, seed=seed, count=count))
    except RequestError:
        return
    assert (request.geometry.width, request.geometry.height) == size
    assert request.schedule.steps == steps
    assert len(request.seeds) == count
    assert all(0 <= number < 2**64 for number in request.seeds)


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)
