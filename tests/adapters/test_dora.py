"""DoRA and several LoKr of a layer at run time: as PEFT has them, and as the merged model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import with_loud_channels
from dora_tools import dora, fused_lokr, lokr
from lora_tools import CASE, QUIET, adapted, drawn, everywhere, lora
from parity import Drawing, check_parity, draw, draw_with_diffusers, relative_error

from zimage_export.build import BuildOptions, build
from zimage_export.programs import add_programs
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.branches import BranchSizes, make_branches
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.kronecker import ProductSum, joined, joined_sizes
from zimage_runtime.adapters.reader import WeightedAdapter, read_adapter
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.stored_weights import PublishedRows
from zimage_runtime.pipeline import Pipeline

Given = tuple[tuple[Path, float], ...]


@pytest.mark.deep
@pytest.mark.parametrize("names", [("dora", "plain"), ("plain", "dora"), ("dora", "other")])
def test_a_dora_beside_another_file_is_what_diffusers_loads(
    names: tuple[str, str], checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    """The order counts, and a weight is inside of the norm."""
    pytest.importorskip("peft")
    files = {
        "dora": (dora(tmp_path / "dora.safetensors", checkpoint, 1), 0.8),
        "other": (dora(tmp_path / "other.safetensors", checkpoint, 2, rank=5), 1.3),
        "plain": (lora(tmp_path / "plain.safetensors", 2, rank=7), -0.3),
    }
    weights = dict(files[name] for name in names)
    found = drawn(Pipeline.from_bundle(root), *weights.items())
    with adapted(checkpoint, weights) as pipeline:
        expected = draw_with_diffusers(pipeline, CASE)
    check_parity(found, expected)
    turned = drawn(Pipeline.from_bundle(root), *reversed(weights.items()))
    assert relative_error(turned.latents, expected.latents) > 1e-3


def mixed(folder: Path, checkpoint: Path) -> Given:
    """All kinds on the same layers: LoRA, DoRA, LoKr of two sizes, one of them with new norms, fused LoKr."""
    return (
        (everywhere(folder / "low.safetensors", 0.1), 0.7),
        (lokr(folder / "eights.safetensors", 8, 8), 0.5),
        (dora(folder / "dora.safetensors", checkpoint, 1), 0.8),
        (lokr(folder / "sixteens.safetensors", 16, 16, seed=2, dora_of=checkpoint), -0.6),
        (fused_lokr(folder / "fused.safetensors"), 0.3),
    )


def merged(checkpoint: Path, given: Given, out: Path) -> Path:
    loras = tuple(GivenLora(str(path), weight) for path, weight in given)
    return build(checkpoint, out, BuildOptions(loras=loras), QUIET).root


@pytest.fixture(scope="module")
def all_kinds(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Given, Drawing]:
    """The files, and the image of the model that they are merged into, in float32."""
    folder = tmp_path_factory.mktemp("kinds")
    given = mixed(folder, checkpoint)
    return given, draw(Pipeline.from_bundle(merged(checkpoint, given, folder / "merged")), CASE)[0]


@pytest.mark.deep
@pytest.mark.parametrize(
    ("precision", "limit"),
    [  # three times what was measured: what a precision loses of the weights
        (Precision.FP32, 3e-6),
        (Precision.BF16, 0.01),
        (Precision.FP16, 0.0013),
        (Precision.INT8, 0.05),
        (Precision.INT4, 0.3),
    ],
)
def test_all_kinds_together_are_the_merged_model(
    precision: Precision,
    limit: float,
    all_kinds: tuple[Given, Drawing],
    extended_in: Callable[[Precision], Path],
) -> None:
    given, expected = all_kinds
    with Pipeline.from_bundle(extended_in(precision)) as pipeline:
        first = drawn(pipeline)
        assert relative_error(first.latents, expected.latents) > 0.3
        assert relative_error(drawn(pipeline, *given).latents, expected.latents) < limit
        assert np.array_equal(drawn(pipeline).latents, first.latents)


@pytest.mark.deep
def test_norms_are_of_the_published_weights(checkpoint: Path, tmp_path: Path) -> None:
    """int8 weights of loud channels were multiplied by factors that are far from one."""
    loud = with_loud_channels(checkpoint, tmp_path / "loud")
    given: Given = ((dora(tmp_path / "dora.safetensors", loud, 1), 0.8),)
    (expected,) = draw(Pipeline.from_bundle(merged(loud, given, tmp_path / "merged")), CASE)
    int8 = build(loud, tmp_path / "int8", BuildOptions(Precision.INT8), QUIET)
    found = drawn(Pipeline.from_bundle(add_programs(int8, (), QUIET, lora=True).bundle.root), *given)
    assert relative_error(found.latents, expected.latents) < 0.035


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        (Precision.FP32, 1e-7),
        (Precision.FP16, 3e-4),
        (Precision.BF16, 3e-3),
        (Precision.INT8, 0.02),
        (Precision.INT4, 0.15),
    ],
)
def test_rows_as_they_were_published(
    precision: Precision, limit: float, bundle_in: Callable[[Precision], Path], checkpoint: Path
) -> None:
    source = Checkpoint.open(checkpoint).transformer
    published = PublishedRows(Bundle.open(bundle_in(precision)), "transformer")
    for tail in ("attention.to_v", "attention.to_out.0", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
        weight = source.get(f"layers.1.{tail}.weight").read()
        assert relative_error(published.rows(f"layers.1.{tail}", 5, 21), weight[5:21]) < limit, tail


def products(rng: np.random.Generator, *sizes: int) -> ProductSum:
    terms, a, b, c, d = sizes
    return ProductSum(rng.standard_normal((terms, a, b), np.float32), rng.standard_normal((terms, c, d), np.float32))


def as_matrix(one: ProductSum) -> FloatArray:
    return np.asarray(sum(np.kron(left, right) for left, right in zip(one.outer, one.inner, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(1, 4, 6, 12, 16), (2, 4, 6, 12, 16)], (3, 4, 6, 12, 16)),
        ([(1, 4, 4, 12, 24), (1, 8, 4, 6, 24)], (3, 8, 4, 6, 24)),
        ([(1, 16, 3, 3, 32), (1, 3, 32, 16, 3)], (1, 1, 1, 48, 96)),  # as small products, longer than one matrix
    ],
)
def test_products_of_any_sizes_are_joined(sizes: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    parts = [products(rng, *one) for one in sizes]
    total = joined([(part, None) for part in parts], joined_sizes([part.sizes for part in parts]))
    assert total.sizes == expected
    assert np.allclose(as_matrix(total), sum(as_matrix(part) for part in parts), atol=1e-4)
    assert np.allclose(total.whole(), as_matrix(total), atol=1e-5)


def test_products_of_different_rows_are_one_matrix() -> None:
    rng = np.random.default_rng(0)
    parts, rows = [products(rng, 1, 4, 6, 12, 16) for _ in range(2)], rng.standard_normal(48).astype(np.float32)
    sizes = joined_sizes([part.sizes for part in parts], whole=True)
    total = joined([(parts[0], rows), (parts[1], None)], sizes)
    assert total.sizes == sizes == (1, 1, 1, 48, 96)
    assert np.allclose(as_matrix(total), rows[:, None] * as_matrix(parts[0]) + as_matrix(parts[1]), atol=1e-4)


def test_what_all_kinds_take_is_counted(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    given = mixed(tmp_path, checkpoint)
    loras = [WeightedAdapter(read_adapter(path, SMALL.config), weight) for path, weight in given]
    assert make_branches(Bundle.open(root), loras).nbytes == BranchSizes.of(loras).nbytes
    turned = [loras[3], loras[1]]  # a LoKr after another one's new norms: one matrix for each layer
    branches = make_branches(Bundle.open(root), turned)
    assert branches.nbytes == BranchSizes.of(turned).nbytes
    assert branches.products["layers.0.attention.to_q"].inner.shape == (96, 1, 96)
