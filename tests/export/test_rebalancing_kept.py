"""Rebalancing factors in int8 bundles: the published weights can be recovered, and changed as a LoRA changes them."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import altered_copy, with_loud_channels
from cli_tools import Capture, call_rt
from facts import raises_with
from parity import Case, draw, relative_error

import zimage_export.weights.rebalance as rebalance
from zimage_export.build import BuildOptions, build
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.storage.folds import read_folds, weight_exponent
from zimage_export.storage.precision import StoragePolicy, scale_of
from zimage_export.weights.folding import ActivationRange, blocks
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.bundle.precision import Precision
from zimage_runtime.bundle.rebalancing import PLACES, Factors, RebalancingFactors, SharedHeads
from zimage_runtime.bundle.stored_weights import dequantized
from zimage_runtime.bundle.tensors import TensorFile, read_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import BundleError
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

QUIET = Progress(quiet=True)
CASE = Case("a red fox in the snow", (80, 112), 4, 3)
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def loud(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are far from what an int8 bundle stores."""
    return with_loud_channels(checkpoint, tmp_path_factory.mktemp("outliers") / "checkpoint")


@pytest.fixture(scope="module")
def int8(loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "int8"
    build(loud, out, BuildOptions(Precision.INT8), QUIET)
    return out


def linears(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Component and name of every rebalanced linear."""
    for component, names in blocks(bundle.manifest.config).items():
        readers = [reader for place in PLACES[component] for reader in place.readers]
        yield from ((component, f"{block}.{reader}") for block in names for reader in readers)


def power(bundle: Bundle, component: str, name: str) -> float:
    """What the manifest's folds multiply a stored weight by."""
    return 2.0 ** weight_exponent(read_folds(bundle.manifest.folds)[component], name)


def recovered(values: FloatArray, factors: Factors) -> FloatArray:
    """The published weight that stored values stand for."""
    ones = Factors(*(np.float32(1) if f is None else 1 / f for f in (factors.rows, factors.columns)))
    values = values * ones.columns
    return values if factors.rows is None else values * np.asarray(ones.rows)[:, None]


def test_every_published_weight_is_recovered_within_the_quantization_error(int8: Path, loud: Path) -> None:
    """Of each value the error is at most half a step, but for the few that quantization cuts off."""
    bundle, published = Bundle.open(int8), Checkpoint.open(loud)
    errors: list[float] = []
    without: list[float] = []
    for component, name in linears(bundle):
        file = TensorFile(bundle.file(bundle.manifest.weights[component]))
        integers, scales = file.array(name)[0], np.asarray(file.array(scale_of(name))[0], np.float32)
        factors = RebalancingFactors(bundle, component).of(name)
        fold = power(bundle, component, name)
        weight = published.weights(component).get(name).read()
        found = recovered(dequantized(integers, scales) / fold, factors)
        step = recovered(np.broadcast_to(scales[:, None] / fold, weight.shape), factors)
        assert np.mean(np.abs(found - weight) <= 0.501 * step) > 0.99, (component, name)
        errors.append(relative_error(found, weight))
        if component == "transformer":
            without.append(relative_error(dequantized(integers, scales) / fold, weight))
    assert max(errors) < 0.05
    assert min(without) > 0.1, "the checkpoint does not show whether the factors are used"


def test_norms_have_their_factors_too(int8: Path, loud: Path) -> None:
    bundle, published = Bundle.open(int8), Checkpoint.open(loud)
    for component, name in (
        ("transformer", "layers.1.attention_norm1.weight"),
        ("text_encoder", "layers.0.post_attention_layernorm.weight"),
    ):
        stored, _ = TensorFile(bundle.file(bundle.manifest.weights[component])).array(name)
        weight = published.weights(component).get(name).read()
        np.testing.assert_allclose(RebalancingFactors(bundle, component).of(name).apply(weight), stored, rtol=1e-6)
        assert relative_error(weight, np.asarray(stored, np.float32)) > 0.05


def test_what_takes_no_part_has_no_factors(int8: Path, bundle: Path) -> None:
    rebalanced, plain = Bundle.open(int8), Bundle.open(bundle)
    for opened, component, name in (
        (rebalanced, "transformer", "layers.0.attention_norm2.weight"),
        (rebalanced, "transformer", "x_pad_token"),
        (rebalanced, "vae", "decoder.conv_in.weight"),
        (plain, "transformer", "layers.0.attention.to_q.weight"),
    ):
        assert RebalancingFactors(opened, component).of(name) == Factors()


def test_the_files_are_small_listed_and_hold_one_vector_per_place(int8: Path, capsys: Capture) -> None:
    bundle = Bundle.open(int8)
    assert set(bundle.manifest.rebalancing) == set(PLACES)
    for component, path in bundle.manifest.rebalancing.items():
        names = {f"{block}.{p.maker}" for block in blocks(bundle.manifest.config)[component] for p in PLACES[component]}
        assert {name: len(entry.shape) for name, entry in read_header(bundle.file(path)).items()} == dict.fromkeys(
            names, 1
        )
        assert bundle.manifest.files[path].size < 0.05 * bundle.manifest.files[bundle.manifest.weights[component]].size
    assert Manifest.from_json(bundle.manifest.to_json(), "here") == bundle.manifest
    lines = call_rt(capsys, "info", int8).out.splitlines()
    assert [line for line in lines if line.startswith("rebalancing") and all(name in line for name in PLACES)]
    without = dataclasses.replace(bundle.manifest, rebalancing={})
    assert without.fingerprint == bundle.manifest.fingerprint


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT4])
def test_precisions_that_are_not_rebalanced_have_none(checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    built = build(checkpoint, tmp_path / "bundle", BuildOptions(precision), QUIET)
    assert built.manifest.rebalancing == {}
    assert RebalancingFactors(built, "transformer").of("layers.0.attention.to_v.weight") == Factors()


def test_a_bundle_that_did_not_keep_them_says_so(tmp_path: Path) -> None:
    zipfile.ZipFile(DATA / "bundle-9e9dc91-int8.zip").extractall(tmp_path)
    with raises_with(BundleError, tmp_path, "rebalancing", "transformer", "export"):
        RebalancingFactors(Bundle.open(tmp_path), "transformer")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_damaged_factors_are_named(int8: Path, tmp_path: Path, value: float) -> None:
    copy = Path(shutil.copytree(int8, tmp_path / "bundle"))
    path = copy / "transformer/rebalancing.safetensors"
    entry = read_header(path)["layers.0.attention.to_v.weight"]
    data = bytearray(path.read_bytes())
    data[entry.offset : entry.offset + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    with raises_with(BundleError, path, "layers.0.attention.to_v.weight"):
        RebalancingFactors(Bundle.open(copy), "transformer").of("layers.0.attention.to_out.0.weight")


@pytest.mark.parametrize("paths", [[], {"transformer": "vae/other.safetensors"}, {"transformer": 5}])
def test_a_manifest_that_lists_them_wrongly_is_refused(int8: Path, paths: object) -> None:
    document = json.loads((int8 / "manifest.json").read_text("utf-8")) | {"rebalancing": paths}
    with raises_with(BundleError, "here:"):
        Manifest.from_json(json.dumps(document), "here")


CHANGED = ("attention.to_v.weight", "attention.to_out.0.weight", "feed_forward.w3.weight", "feed_forward.w2.weight")
CHANGED_TEXT = ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def low_rank(name: str, shape: tuple[int, ...]) -> FloatArray:
    """A change of rank 2, as a LoRA makes it."""
    rng = np.random.default_rng(list(name.encode()))
    product = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    return (0.3 * product / np.sqrt(shape[1])).astype(np.float32)


def is_changed(name: str) -> bool:
    return name.split(".", 2)[-1] in CHANGED + CHANGED_TEXT


def test_a_change_of_the_weights_is_transformed_into_the_bundles(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where nothing hides behind quantization: the change added to a rebalanced bundle is the change
    added to the checkpoint."""

    def changed(name: str, values: FloatArray) -> FloatArray | None:
        return values + low_rank(name, values.shape) if is_changed(name) else None

    altered = altered_copy(checkpoint, tmp_path / "once", "transformer", changed)
    altered = altered_copy(
        altered, tmp_path / "both", "text_encoder", lambda n, v: changed(n.removeprefix("model."), v)
    )
    build(altered, tmp_path / "expected", BuildOptions(), QUIET)
    (expected,) = draw(Pipeline.from_bundle(tmp_path / "expected"), CASE)

    rng = np.random.default_rng(0)

    def factors(activations: ActivationRange, readers: object) -> FloatArray:
        return np.exp(rng.uniform(-3, 3, len(activations.rms))).astype(np.float32)

    monkeypatch.setattr(rebalance, "choose", factors)
    monkeypatch.setattr(StoragePolicy, "rebalanced", True)
    bundle = build(checkpoint, tmp_path / "bundle", BuildOptions(), QUIET)
    (before,) = draw(Pipeline.from_bundle(bundle.root), CASE)
    for component in PLACES:
        kept, path = RebalancingFactors(bundle, component), bundle.file(bundle.manifest.weights[component])
        for name, entry in read_header(path).items():
            if is_changed(name):
                # the checkpoint rounds to bf16: the change is what it holds then
                ends = (Checkpoint.open(root).weights(component).get(name).read() for root in (altered, checkpoint))
                delta = np.subtract(*ends)
                stored = np.memmap(path, np.float32, "r+", entry.offset, entry.shape)
                stored += kept.of(name).apply(delta) * np.float32(power(bundle, component, name))
                stored.flush()
    (found,) = draw(Pipeline.from_bundle(bundle.root), CASE)
    assert relative_error(before.latents, expected.latents) > 0.05, "the change shows in the image"
    assert relative_error(found.latents, expected.latents) < 1e-4


def test_heads_that_share_values_are_repeated_in_order() -> None:
    values = np.arange(4, dtype=np.float32)
    assert SharedHeads(3, 2).repeat(values).tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
