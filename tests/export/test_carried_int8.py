"""ComfyUI's int8 with ConvRot in an int8 bundle: the file's own integers and scales, and programs that rotate."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cli_tools import Capture, assert_one_line_error, call_export
from form_images import CASE, QUIET, as_diffusers, form_checkpoint, form_states, with_weights
from form_writers import Written, int8, write_comfy
from onnx import TensorProto, helper
from parity import draw, draw_with_diffusers, open_with_diffusers, relative_error
from single_file_tools import Tensors, to_comfy_transformer

from zimage_export.build import BuildOptions, build
from zimage_export.graphs import Target, build_graph
from zimage_export.graphs.builder import GraphBuilder
from zimage_export.graphs.rotation import rotate
from zimage_export.source.single_files import SingleFiles
from zimage_export.storage.bundle_policy import BundlePolicy
from zimage_export.storage.folds import read_folds, weight_exponent
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, Precision
from zimage_runtime.bundle.stored_weights import PublishedRows
from zimage_runtime.bundle.tensors import DType, TensorFile
from zimage_runtime.model.hadamard import hadamard
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

ROTATED = ("layers.0.", "layers.1.")
"""The blocks that are quantized. Makers leave the refiners in bf16, and here one layer, too."""


@dataclasses.dataclass(frozen=True)
class Carried:
    """A bundle, the file that it was built from, and what the file's weights mean."""

    bundle: Bundle
    written: dict[str, Written]
    values: Tensors
    model: Path


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    folder = tmp_path_factory.mktemp("carried")
    model = form_checkpoint(folder / "model")
    tensors = to_comfy_transformer(form_states(model)["transformer"])
    names = [n for n, v in tensors.items() if n.startswith(ROTATED) and v.ndim == 2 and "adaLN" not in n]
    written = {name: int8(per_row=True, rotation=256 if ".w2." in name else 64)(tensors[name]) for name in names}
    others = {name: value for name, value in tensors.items() if name not in written}
    path = write_comfy(folder / "z_image_turbo_int8_convrot.safetensors", written, others)
    shutil.copytree(model, folder / "rest", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(model / "transformer", folder / "rest" / "transformer", ignore=shutil.ignore_patterns("*.safe*"))
    options = BuildOptions(Precision.INT8, files=SingleFiles(transformer=path))
    bundle = build(folder / "rest", folder / "out", options, QUIET)
    return Carried(bundle, written, others | {name: one.values for name, one in written.items()}, model)


def test_the_integers_and_the_scales_are_the_files_own(carried: Carried) -> None:
    manifest = carried.bundle.manifest
    stored = TensorFile(carried.bundle.file(manifest.weights["transformer"]))
    folds = read_folds(manifest.folds)["transformer"]
    expected = {}
    for name, one in carried.written.items():
        scales = one.companions["weight_scale"]
        if name.endswith(".qkv.weight"):
            layer = name.removesuffix("qkv.weight")
            for kind, rows, own in zip("qkv", one.weight.chunk(3), scales.chunk(3), strict=True):
                expected[f"{layer}to_{kind}.weight"] = rows, own
        else:
            expected[name.replace(".out.", ".to_out.0.")] = one.weight, scales
    for name, (integers, own) in expected.items():
        found, dtype = stored.array(name)
        assert dtype is DType.I8
        np.testing.assert_array_equal(found.T, integers.numpy(), name)
        scale, _ = stored.array(f"{name}_scale")
        np.testing.assert_array_equal(scale, own[:, 0].numpy() * 2.0 ** weight_exponent(folds, name), name)
    sizes = {f"transformer/{name}": 256 if name.endswith("w2.weight") else 64 for name in expected}
    assert dict(manifest.rotations) == sizes
    assert Bundle.open(carried.bundle.root).manifest == manifest


def test_their_published_rows_are_what_the_file_means(carried: Carried) -> None:
    """DoRA takes norms of them: they are turned back."""
    published, expected = PublishedRows(carried.bundle, "transformer"), as_diffusers(carried.values)
    for name in ("layers.0.attention.to_k", "layers.1.attention.to_out.0", "layers.1.feed_forward.w2"):
        found = published.rows(name, 3, 40)
        assert relative_error(found, expected[f"{name}.weight"][3:40].float().numpy()) < 1e-5, name


def test_blocks_with_such_weights_are_not_rebalanced(carried: Carried) -> None:
    manifest = carried.bundle.manifest
    factors = TensorFile(carried.bundle.file(manifest.rebalancing["transformer"]))
    alone = {name: bool((factors.array(name)[0] == 1).all()) for name in factors.entries}
    assert all(same for name, same in alone.items() if name.startswith(ROTATED))
    assert not all(same for name, same in alone.items() if not name.startswith(ROTATED))


def test_the_image_is_that_of_the_dequantized_weights(carried: Carried) -> None:
    """Up to the rounding of activations to 8 bits, and of the other layers' weights."""
    reference = with_weights(open_with_diffusers(carried.model), {"transformer": as_diffusers(carried.values)})
    with Pipeline.from_bundle(carried.bundle.root, executor="cpu") as ours:
        found = draw(ours, CASE)[0]
    expected = draw_with_diffusers(reference, CASE)
    # 0.014 with 7-bit activations; 0.4 where one of the rotations is left out
    assert relative_error(found.latents, expected.latents) < 0.02


def test_programs_are_rebuilt_with_the_rotations(carried: Carried) -> None:
    bundle = carried.bundle
    policy, folds = BundlePolicy.of(bundle), read_folds(bundle.manifest.folds)
    for executor, matrices in ((CPU, {"hadamard_16", "hadamard_4"}), (CUDA, {"hadamard_64", "hadamard_256"})):
        graph = build_graph(Program.DENOISER, bundle.manifest.config, Target(executor, policy, folds))
        assert {tensor.name for tensor in graph.constants if tensor.name.startswith("hadamard")} == matrices
        plain = build_graph(Program.CAPTION, bundle.manifest.config, Target(executor, policy, folds))
        assert not any(tensor.name.startswith("hadamard") for tensor in plain.constants)


def test_rotations_decide_the_image(carried: Carried) -> None:
    manifest = carried.bundle.manifest
    assert dataclasses.replace(manifest, rotations={}).fingerprint != manifest.fingerprint


def test_engines_are_refused(carried: Carried, capsys: Capture) -> None:
    outcome = call_export(capsys, "engines", carried.bundle.root, "--quiet")
    assert_one_line_error(outcome, "ConvRot", "int8", "bf16")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024])
def test_both_forms_of_the_rotation(size: int, whole: bool) -> None:
    b = GraphBuilder(Program.CAPTION, CPU, {}, lambda name, shape: DType.F32)
    b.output(rotate(b, "x", size, 2 * size, whole=whole), "y")
    graph = b.build()
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "rotation",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2 * size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            initializer=graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    x = np.random.default_rng(0).normal(size=(5, 2 * size)).astype(np.float32)
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    expected = np.concatenate([half @ hadamard(size) for half in np.split(x, 2, axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_matrix_is_comfyuis() -> None:
    from comfy_kitchen.tensor.int8_utils import _build_hadamard as theirs

    for size in (4, 16, 64, 256):
        np.testing.assert_allclose(hadamard(size), theirs(size).numpy(), atol=1e-7)
    assert torch.allclose(torch.from_numpy(hadamard(64) @ hadamard(64)), torch.eye(64), atol=1e-6)
