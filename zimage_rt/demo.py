"""The bundle that ships in the package, for a first image without a download."""

from pathlib import Path

from zimage_runtime.errors import BundleError

_DEMO = Path(__file__).with_name("demo_bundle")


def demo_bundle() -> Path:
    """The path of the bundle that ships. Raises `BundleError` if this version contains none."""
    if not _DEMO.is_dir():
        raise BundleError("this version contains no demo bundle; give a bundle with -m (zimage-export build makes one)")
    return _DEMO
