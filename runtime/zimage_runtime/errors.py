"""Errors at run time. Each has a message of one line: what was wrong, where, and what to do."""


class ZImageRuntimeError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(ZImageRuntimeError):
    """A JSON document (configuration, manifest, results) contains a value that is not allowed."""


class BundleError(ZImageRuntimeError):
    """A bundle is missing, incomplete, altered, or written by a newer version."""


class RequestError(ZImageRuntimeError):
    """A request has a value that is invalid or that the model does not support (size, steps, seed, prompt)."""


class MemoryLimitError(RequestError):
    """A request does not fit in the memory that is available."""


class AdapterError(RequestError):
    """A LoRA's file is damaged, is for another model, or holds what cannot be applied."""


class ExecutorError(ZImageRuntimeError):
    """The device or its library refused to load or run a program."""


class CancelledError(ZImageRuntimeError):
    """The request was cancelled."""

    def __init__(self) -> None:
        super().__init__("cancelled")


class DeviceLostError(ExecutorError):
    """The device failed in a way that ends this process's use of it: even its library's clean-up may hang."""
