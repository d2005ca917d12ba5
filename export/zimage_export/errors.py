"""The errors of an export, each with a message of one line."""

from importlib.util import find_spec

from zimage_runtime.errors import ZImageRuntimeError


class ExportError(ZImageRuntimeError):
    """Base class of every error that this package raises on purpose."""


def require_extra() -> None:
    """Raises `ExportError` with the command that installs the export extra, if a part of it is missing."""
    missing = [name for name in ("onnx", "torch", "diffusers", "transformers") if find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs {', '.join(missing)}: pip install 'zimage-rt[export]'")


def require_onnx() -> None:
    """Raises `ExportError` with the command that installs onnx, which is all that building programs takes."""
    if find_spec("onnx") is None:
        raise ExportError("building programs needs onnx: pip install onnx")


def require_gguf() -> None:
    """Raises `ExportError` with the command that installs the gguf package, which dequantizes GGUF files."""
    if find_spec("gguf") is None:
        raise ExportError("reading GGUF files needs gguf: pip install 'zimage-rt[export]'")


class CheckpointError(ExportError):
    """A checkpoint is missing, incomplete, damaged, or not a Z-Image model."""
