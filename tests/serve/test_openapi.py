"""Requests made from the OpenAPI document: whatever is sent, the server answers, and never with its own failure."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from server_tools import PATIENCE, Server, serving

pytestmark = pytest.mark.deep

_LIMITS = ("--max-pixels", "64x64", "--max-steps", "2", "--max-queue", "8")
QUICK = 6  # requests for each route
THOROUGH = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that generates nothing large."""
    with serving(tmp_path_factory.mktemp("server"), *_LIMITS) as running:
        yield running


def check(server: Server, examples: int) -> int:
    """Sends requests to every route, and returns how many that were."""
    sent = 0
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()
        if operation.body:  # and bodies that break the document's rules
            strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=examples == QUICK,
        )
        @given(case=strategy)
        def send(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=[not_a_server_error], timeout=PATIENCE)

        send()
    return sent


def test_every_route_is_in_the_document(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    expected = {
        "/v1/models",
        "/v1/images/generations",
        "/v1/images/edits",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/options",
        "/sdapi/v1/progress",
        "/sdapi/v1/interrupt",
        "/sdapi/v1/samplers",
        "/sdapi/v1/schedulers",
        "/sdapi/v1/sd-models",
        "/sdapi/v1/sd-vae",
        "/sdapi/v1/sd-modules",
        "/sdapi/v1/loras",
        "/sdapi/v1/upscalers",
        "/sdapi/v1/latent-upscale-modes",
        "/api/state",
        "/api/plan",
        "/api/jobs",
        "/api/jobs/{id}",
        "/api/jobs/{id}/events",
        "/api/images",
        "/api/images/{name}",
        "/images/{name}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert expected <= set(document["paths"])
    assert set(document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }


def test_no_request_makes_the_server_fail(server: Server) -> None:
    assert check(server, QUICK) > 50
    assert server.metric('zimage_refusals_total{status="500"}') == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_thousands_of_requests_do_not_either(server: Server) -> None:
    assert check(server, THOROUGH) > 1000
    assert "Traceback" not in server.log.read_text()


def test_the_document_is_valid_json_for_any_reader(server: Server, tmp_path: Path) -> None:
    text = httpx.get(f"{server.url}/openapi.json", trust_env=False).text
    document = json.loads(text)
    references = [word for word in text.split('"') if word.startswith("#/")]
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
