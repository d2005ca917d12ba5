"""The executors, one line each, best first: the order in which `auto` tries them."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:  # commands list the names before they need an executor
    from .protocol import ExecutorKind

_MODULES: dict[str, str] = {
    "tensorrt": "zimage_runtime.executors.tensorrt.kind",
    "cuda": "zimage_runtime.executors.ort.cuda",
    "webgpu": "zimage_runtime.executors.ort.webgpu",
    "cpu": "zimage_runtime.executors.ort.cpu",
}

EXECUTORS: Mapping[str, str] = MappingProxyType(_MODULES)
"""By name, the module whose `KIND` is the executor's `ExecutorKind`."""

CPU = "cpu"
AUTO = "auto"


def executor_kind(name: str) -> "ExecutorKind":
    """An executor by its name. Raises `RequestError` for one that is unknown."""
    if name not in EXECUTORS:
        raise RequestError(f"executor {name!r} is unknown; choose one of {', '.join((AUTO, *EXECUTORS))}")
    kind: ExecutorKind = import_module(EXECUTORS[name]).KIND
    return kind
