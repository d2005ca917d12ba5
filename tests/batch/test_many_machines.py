"""What docs/many-machines.md shows works: the manifest for KubeRay, the example on Ray Serve."""

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from cli_tools import Capture, call_rt
from PIL import Image

from zimage_rt import Pipeline, demo_bundle

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
SCHEMA = REPOSITORY / "tests" / "data" / "rayjob_crd.yaml"


def closed(schema: Any) -> Any:
    """A schema in which an object has no other properties than those that are stated, as Kubernetes has it."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def schema() -> Any:
    (version,) = yaml.safe_load(SCHEMA.read_text("utf-8"))["spec"]["versions"]
    found = closed(version["schema"]["openAPIV3Schema"])
    found["properties"]["metadata"] = {"type": "object"}
    return found


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((DOCS / "rayjob.yaml").read_text("utf-8"))


def test_the_manifest_is_a_ray_job(schema: Any, manifest: Any) -> None:
    jsonschema.validate(manifest, schema)
    spec = manifest["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:
        for container in group["template"]["spec"]["containers"]:
            assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


def spoiled() -> Iterator[tuple[str, Any]]:
    good = yaml.safe_load((DOCS / "rayjob.yaml").read_text("utf-8"))
    for path, value in (
        (("spec", "entryPoint"), "x"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 4),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "valeu"), "0"),
    ):
        bad = copy.deepcopy(good)
        *way, last = path
        at = bad
        for step in way:
            at = at[step]
        at[last] = value
        yield str(last), bad


@pytest.mark.parametrize(("name", "bad"), spoiled())
def test_the_schema_sees_mistakes(schema: Any, name: str, bad: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema)


def test_the_manifests_command_is_one_of_ours(manifest: Any, tmp_path: Path, capsys: Capture) -> None:
    program, *words = manifest["spec"]["entrypoint"].split()
    assert program == "zimage-rt"
    outcome = call_rt(capsys, *words)  # which is parsed, and then finds no bundle
    assert outcome.status == 1
    assert "/shared/<bundle>" in outcome.err


SERVE = """
import json, sys, urllib.error, urllib.request
import ray
from ray import serve
sys.path.insert(0, sys.argv[1])
import ray_serve
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    images = ray_serve.Images.options(ray_actor_options={"num_gpus": 0, "num_cpus": 1})
    serve.run(images.bind(None, "cpu"))
    base = f"http://127.0.0.1:{sys.argv[2]}/?prompt=a+red+circle&seed=7&steps="
    with urllib.request.urlopen(base + "2", timeout=120) as good:
        open(sys.argv[3], "wb").write(good.read())
    try:
        urllib.request.urlopen(base + "-1", timeout=120)
    except urllib.error.HTTPError as bad:
        found = [good.status, good.headers["content-type"], bad.status, bad.read().decode()]
    json.dump(found, open(sys.argv[3] + ".json", "w"))
finally:
    serve.shutdown()
    ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("grpc") is None, reason="needs ray[serve]")
def test_the_example_on_ray_serve(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(DOCS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(DOCS), str(port), str(tmp_path / "image.png")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    status, kind, refused, why = json.loads((tmp_path / "image.png.json").read_text())
    assert (status, kind, refused) == (200, "image/png", 422)
    assert "steps" in why
    with Pipeline.from_bundle(demo_bundle(), "cpu") as pipeline:
        expected = pipeline.generate("a red circle", seed=7, steps=2).images[0]
    found = Image.open(io.BytesIO((tmp_path / "image.png").read_bytes()))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_example_has_some_thirty_lines() -> None:
    lines = [line for line in (DOCS / "ray_serve.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) < 40
