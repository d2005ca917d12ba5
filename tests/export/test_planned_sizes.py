"""How large a full-size bundle will be, from the plan alone: no weight exists."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zimage_export.graphs import build_programs
from zimage_export.source.tensors import PlainTensor
from zimage_export.storage.precision import StoragePolicy
from zimage_export.storage.stored import total_bytes
from zimage_export.synthetic.checkpoint import FULL
from zimage_export.weights.streaming import plan_embeddings, plan_weights
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.tensors import TensorEntry

GB = 1e9


class AnyWeights:
    """Headers of the published type and of whatever shape is asked for."""

    def __init__(self, dtype: str, size: int) -> None:
        self._dtype, self._size = dtype, size

    def get(self, name: str, shape: tuple[int, ...]) -> PlainTensor:
        nbytes = self._size
        for side in shape:
            nbytes *= side
        return PlainTensor(name, Path("none"), TensorEntry(self._dtype, shape, 0, nbytes))


def planned(precision: Precision) -> dict[str, int]:
    text = AnyWeights("BF16", 2)
    parts = {"transformer": AnyWeights("F32", 4), "text_encoder": text, "vae": AnyWeights("BF16", 2)}
    checkpoint: Any = SimpleNamespace(config=FULL.config, weights=parts.__getitem__, text_encoder=text)
    policy = StoragePolicy(precision)
    graphs = build_programs(FULL.config, policy, {})
    sizes = {name: total_bytes(tensors) for name, tensors in plan_weights(checkpoint, graphs, policy, {}).items()}
    return sizes | {"embeddings": total_bytes(plan_embeddings(checkpoint, policy))}


@pytest.mark.parametrize(
    ("precision", "most"),
    [
        (Precision.INT8, {"transformer": 6.35 * GB, "text_encoder": 3.7 * GB, "embeddings": 0.78 * GB}),
        (Precision.INT4, {"transformer": 4.2 * GB, "text_encoder": 2.3 * GB, "embeddings": 0.78 * GB}),
        (Precision.FP32, {"transformer": 24.7 * GB, "text_encoder": 14.2 * GB, "embeddings": 0.78 * GB}),
    ],
)
def test_full_size_bundles(precision: Precision, most: dict[str, float]) -> None:
    sizes = planned(precision)
    for part, bound in most.items():
        assert 0.95 * bound < sizes[part] <= bound, (part, sizes[part])
