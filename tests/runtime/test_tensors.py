"""Safetensors files: what a whole one says, and what is said of a broken one."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from facts import raises_with

from zimage_runtime.bundle.tensors import DType, TensorFile, TensorFileError, encode_header, read_header, to_float32


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_written_header_reads_back(tmp_path: Path) -> None:
    tensors = {"a": (DType.F32, (2, 3)), "b.ü": (DType.BF16, (5,)), "empty": (DType.F16, (0, 4)), "one": (DType.I8, ())}
    header = encode_header(tensors)
    assert len(header) % 64 == 0
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + bytes(24 + 10 + 0 + 1))
    entries = read_header(path)
    assert {name: (DType(e.dtype), e.shape) for name, e in entries.items()} == tensors
    assert [e.offset - len(header) for e in entries.values()] == [0, 24, 34, 34]
    assert [e.nbytes for e in entries.values()] == [24, 10, 0, 1]


def test_files_are_the_ones_of_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array([1.5, -2], dtype=np.float16)}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(values, theirs, metadata={"format": "pt"})
    ours.write_bytes(
        encode_header({"x": (DType.F32, (2, 3)), "y": (DType.F16, (2,))})
        + values["x"].tobytes()
        + values["y"].tobytes()
    )
    read = load_file(ours)
    file = TensorFile(theirs)
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)
        np.testing.assert_array_equal(file.array(name)[0], value)


def test_bfloat16_widens_exactly() -> None:
    """All 65,536 of them, against torch; infinities, zeros of both signs and subnormals included."""
    import torch

    bits = np.arange(1 << 16, dtype=np.uint16)
    found = to_float32(bits, DType.BF16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(found[~numbers]).all()


def test_float16_widens_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = ~np.isnan(bits)
    found = to_float32(bits, DType.F16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[numbers].astype(np.float64), bits[numbers].astype(np.float64))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ("truncated", "0 bytes")),
        (b"\x01\x02\x03", ("truncated", "3 bytes")),
        (struct.pack("<Q", 50) + b"{}", ("truncated", "header")),
        (struct.pack("<Q", 2**60) + b"{}", ("safetensors", "header", 2**60)),
        (b"PK\x03\x04 a zip, not this format", ("safetensors", "header")),
        (struct.pack("<Q", 4) + b"nope", ("safetensors", "header", "JSON")),
        (struct.pack("<Q", 4) + b"\xff\xfe\x00\x80", ("safetensors", "header", "JSON")),
        (struct.pack("<Q", 2) + b"[]", ("safetensors", "header", "JSON object")),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, facts: tuple[object, ...]) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with raises_with(TensorFileError, path, *facts):
        read_header(path)


@pytest.mark.parametrize(
    "broken",
    [
        7,
        entry(dtype=4),
        entry(shape="2"),
        entry(shape=[2.0]),
        entry(shape=[-2]),
        entry(shape=[True, 2]),
        entry(offsets=[8]),
        entry(offsets=[8, 0]),
        entry(offsets=[-8, 0]),
        entry(offsets=None),
        entry(shape=[3]),
        entry(dtype="BF16"),
        entry(shape=[2**62, 4], offsets=[0, 16]),
    ],
    ids=str,
)
def test_a_malformed_entry_is_named(tmp_path: Path, broken: object) -> None:
    path = write(tmp_path / "bad.safetensors", {"layers.0.weight": broken}, bytes(64))
    with raises_with(TensorFileError, path, "layers.0.weight"):
        read_header(path)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", {"w": entry()}, bytes(5))
    with raises_with(TensorFileError, path, "truncated", "3 bytes"):
        read_header(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with raises_with(TensorFileError, tmp_path / "none.safetensors", "no such file"):
        read_header(tmp_path / "none.safetensors")


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": entry()}, bytes(8))
    assert list(read_header(path)) == ["w"]


def test_a_type_that_we_lack_is_refused_only_when_read(tmp_path: Path) -> None:
    header = {"step": entry("I64", [1], [0, 8]), "w": entry("F32", [1], [8, 12])}
    file = TensorFile(write(tmp_path / "a.safetensors", header, bytes(8) + struct.pack("<f", 1.25)))
    np.testing.assert_array_equal(file.array("w")[0], [1.25])
    with raises_with(TensorFileError, tmp_path / "a.safetensors", "step", "I64"):
        file.array("step")
    with raises_with(TensorFileError, tmp_path / "a.safetensors", "nothing"):
        file.array("nothing")
