"""The bundle that ships in the package, for a first picture without a download."""

from pathlib import Path

from zimage_runtime.errors import BundleError

_DEMO = Path(__file__).with_name("demo_bundle")


def demo_bundle() -> Path:
    """The path of the bundle that ships. Raises `BundleError` where this version ships none."""
    if not _DEMO.is_dir():
        raise BundleError(
            "no demo bundle ships with this version; give a bundle with -m (zimage-export build makes one)"
        )
    return _DEMO
