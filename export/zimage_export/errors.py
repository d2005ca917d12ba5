"""What can go wrong in an export, said in one line."""

from zimage_runtime.errors import ZImageRuntimeError


class ExportError(ZImageRuntimeError):
    """Base class of every error that this package raises on purpose."""


class CheckpointError(ExportError):
    """A checkpoint is missing, incomplete, damaged, or not a Z-Image model."""
