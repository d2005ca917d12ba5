"""What `zimage-rt bench` needs beyond a plain install."""

from importlib.util import find_spec

from zimage_runtime.errors import RequestError

_PACKAGES = {"matplotlib": "matplotlib", "flip_evaluator": "flip-evaluator"}  # by module: plots, perceptual metric


def require_extra() -> None:
    """Raises `RequestError` with the command that installs what measuring and reports need, where it is missing."""
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise RequestError(f"zimage-rt bench needs {' and '.join(missing)}: pip install 'zimage-rt[report]'")
