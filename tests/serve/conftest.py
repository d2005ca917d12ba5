"""One server for all modules; those that change what others see start their own."""

from collections.abc import Iterator

import httpx
import pytest
from server_tools import Generate, Server, serving

from zimage_rt.demo import demo_bundle
from zimage_runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo bundle."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def generate() -> Iterator[Generate]:
    """Python's own images of the demo bundle."""
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        yield pipeline.generate


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A client of the server."""
    with server.client() as found:
        yield found
