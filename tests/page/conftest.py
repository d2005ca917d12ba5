"""A server and a browser for a test of the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Server, browsing, require_chromium, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """`zimage-rt serve` with the demo bundle and an empty gallery."""
    require_chromium()
    with serving(tmp_path / "images") as running:
        yield running


@pytest.fixture
def browser() -> Iterator["Browser"]:
    """Chromium."""
    with browsing() as running:
        yield running
