"""A file that we write is whole or absent, whatever happens."""

import hashlib
import os
from pathlib import Path

import pytest

from zimage_runtime.bundle.files import atomic_write, hash_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException], overwrite: bool) -> None:
    def fail() -> None:
        with atomic_write(tmp_path / "a.bin", overwrite=overwrite) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_without_overwrite_a_taken_name_is_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    if not links:

        def refuse(*args: object) -> None:
            raise OSError("not supported")

        monkeypatch.setattr(os, "link", refuse)

    def write() -> None:
        with atomic_write(path, overwrite=False) as file:
            file.write(b"mine")
            path.write_bytes(b"theirs")  # taken in the meantime

    with pytest.raises(FileExistsError):
        write()
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.bin"]
    path.unlink()
    with atomic_write(path, overwrite=False) as file:
        file.write(b"mine")
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_hashes_are_sha256_and_progress_adds_up(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than two of the pieces that it is read in
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    pieces: list[int] = []
    assert hash_file(path, pieces.append) == hashlib.sha256(data).hexdigest()
    assert len(pieces) > 2
    assert sum(pieces) == len(data)
