"""How large a full-size bundle will be, from the plan alone: no weight exists."""

from pathlib import Path

import pytest

from zimage_export.storage.stored import total_bytes
from zimage_export.synthetic.outline import planned_weights, write_outline
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision

GB = 1e9


@pytest.mark.parametrize(
    ("precision", "most"),
    [
        (Precision.INT8, {"transformer": 6.35 * GB, "text_encoder": 3.7 * GB, "embeddings": 0.78 * GB}),
        (Precision.INT4, {"transformer": 4.2 * GB, "text_encoder": 2.3 * GB, "embeddings": 0.78 * GB}),
        (Precision.FP32, {"transformer": 24.7 * GB, "text_encoder": 14.2 * GB, "embeddings": 0.78 * GB}),
    ],
)
def test_full_size_bundles(precision: Precision, most: dict[str, float]) -> None:
    files = {name: total_bytes(tensors) for name, tensors in planned_weights(precision).items()}
    sizes = {
        "transformer": files["transformer/weights.safetensors"],
        "text_encoder": files["text_encoder/weights.safetensors"],
        "embeddings": files["text_encoder/embeddings.safetensors"],
    }
    for part, bound in most.items():
        assert 0.95 * bound < sizes[part] <= bound, (part, sizes[part])


def test_an_outline_opens_as_a_bundle_and_occupies_no_disk(tmp_path: Path) -> None:
    bundle = write_outline(tmp_path / "outline", Precision.FP16)
    files = [path for path in bundle.root.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 20 * GB
    assert sum(path.stat().st_blocks * 512 for path in files) < 50e6
    assert Bundle.open(bundle.root).manifest == bundle.manifest
