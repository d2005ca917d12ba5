"""int4 bundles: what is stored, which layers keep 8 bits, how far images are from diffusers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoint_tools import altered_copy
from facts import raises_with
from half_emulation import run_cuda_program_on_cpu
from numpy.typing import NDArray
from parity import Case, draw, draw_with_diffusers, relative_error

from zimage_export.build import BuildOptions, build
from zimage_export.errors import ExportError
from zimage_export.measure.self_check import fixed_inputs
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.storage.quantize import blocks4, blocks8
from zimage_export.synthetic.checkpoint import SMALL, Scale, write_checkpoint
from zimage_export.weights.folding import blocks
from zimage_export.weights.int4_layers import eight_bit_layers
from zimage_export.weights.rebalance import Rebalancing
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import CPU, CUDA, Precision
from zimage_runtime.bundle.stored_weights import dequantized
from zimage_runtime.bundle.tensors import TensorFile
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.executors.ort.host_programs import HostPrograms
from zimage_runtime.model.programs import Program
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

# measured on the small model, and a half more; a wrong graph is off by more than the whole
LATENTS_GATE = 0.13
PSNR_GATE = 34.0
CASES = (Case("a red circle", (80, 64), steps=8, seed=3), Case("白色背景", (64, 96), steps=8, seed=4))
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def int4(bundle_in: Callable[[Precision], Path]) -> Path:
    return bundle_in(Precision.INT4)


@pytest.mark.parametrize("case", CASES)
def test_image_is_within_the_gate_of_diffusers(int4: Path, diffusers_pipeline: Any, case: Case) -> None:
    (ours,), theirs = draw(Pipeline.from_bundle(int4), case), draw_with_diffusers(diffusers_pipeline, case)
    assert relative_error(ours.latents, theirs.latents) <= LATENTS_GATE
    difference = ours.pixels.astype(np.float64) - theirs.pixels
    assert 10 * np.log10(255**2 / np.mean(difference**2)) >= PSNR_GATE


def test_low_memory_generates_nearly_the_same(int4: Path) -> None:
    """Without packing, ONNX Runtime widens the weights and leaves the activations in float32."""
    (fast,), (mapped,) = (draw(Pipeline.from_bundle(int4, low_memory=low), CASES[0]) for low in (False, True))
    assert relative_error(mapped.latents, fast.latents) < 0.03


def test_what_is_stored_stands_for_the_checkpoints_values(checkpoint: Path, int4: Path) -> None:
    source, bundle = Checkpoint.open(checkpoint), Bundle.open(int4)
    kept = eight_bit_layers(source, Rebalancing(source))
    for component, name in (("transformer", "layers.1.feed_forward.w1.weight"), ("text_encoder", LOUD)):
        file = TensorFile(bundle.file(bundle.manifest.weights[component]))
        (stored, _), (scales, _) = file.array(name), file.array(f"{name}_scale")
        eight = f"{component}/{name}" in kept
        found = dequantized(stored, np.asarray(scales, np.float32))
        expected = source.weights(component).get(name).read()
        assert relative_error(found, expected) < (0.01 if eight else 0.11)


LOUD = "layers.1.mlp.gate_proj.weight"


def test_the_operator_reads_the_bytes_as_they_are_meant(int4: Path, checkpoint: Path) -> None:
    """Both programs against products with the values that the bytes stand for, in float64."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((48, 64)).astype(np.float32)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    for (stored, scales), bits in (
        (blocks4(rows), 4),
        (blocks8(rows), 8),
    ):
        from onnx import TensorProto, helper, numpy_helper

        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=48, bits=bits, block_size=32
        )
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 48])],
            [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(scales, "s")],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = x.astype(np.float64) @ dequantized(stored, scales).astype(np.float64).T
        assert relative_error(session.run(None, {"x": x})[0], expected) < 1e-5


def test_cuts_of_blocks_are_never_worse_than_none() -> None:
    rows = np.random.default_rng(0).standard_t(4, (64, 512)).astype(np.float32)

    def error(values: NDArray[np.float32]) -> Any:
        return np.square(values - rows, dtype=np.float64).reshape(64, -1, 32).sum(axis=-1)

    whole = rows.reshape(64, -1, 32)
    scale = np.take_along_axis(whole, np.abs(whole).argmax(-1)[..., None], -1) / -8
    plain = (np.clip(np.rint(whole / scale), -8, 7) * scale).reshape(rows.shape).astype(np.float32)
    found = error(dequantized(*blocks4(rows)))
    assert (found <= error(plain) * (1 + 1e-5)).all()
    assert found.sum() < 0.94 * error(plain).sum()


def test_the_layers_that_lose_most_keep_8_bits(checkpoint: Path, tmp_path: Path) -> None:
    """A layer with a loud value in every block loses the rest of it to 4 bits."""

    def spiky(name: str, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if name != LOUD:
            return None
        values = values.copy()
        values[:, ::32] *= 30
        return values

    altered = Checkpoint.open(altered_copy(checkpoint, tmp_path / "spiky", "text_encoder", spiky))
    kept = eight_bit_layers(altered, Rebalancing(altered))
    assert f"text_encoder/{LOUD}" in kept
    sizes = {
        component: {
            name: int(np.prod(altered.weights(component).get(name).shape))
            for name in altered.weights(component).names()
            if any(name.startswith(f"{block}.") for block in names) and name.endswith(".weight")
        }
        for component, names in blocks(altered.config).items()
    }
    for component, of in sizes.items():
        within = sum(of[name.partition("/")[2]] for name in kept if name.startswith(component))
        assert 0 < within <= 0.1 * sum(of.values())


def test_both_kinds_of_layer_are_in_the_programs(int4: Path) -> None:
    bundle = Bundle.open(int4)
    for executor in (CPU, CUDA):
        graph = onnx.load(bundle.program(Program.DENOISER, executor), load_external_data=False).graph
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        attributes = [{a.name: a.i for a in node.attribute} for node in products]
        assert len(products) == 7 * bundle.manifest.config.transformer.modulated_blocks
        assert {a["bits"] for a in attributes} == {4, 8}
        assert {a["block_size"] for a in attributes} == {32}
        assert {len(node.input) for node in products} == {3}  # symmetric: no zero points
        assert {a["accuracy_level"] for a in attributes} == {4 if executor == CPU else 0}


def test_cuda_programs_in_fp16_give_what_is_expected(bundle: Path, int4: Path) -> None:
    exact, quantized = Bundle.open(bundle), Bundle.open(int4)
    feeds = fixed_inputs(exact.manifest.config)
    for program in (Program.TEXT_ENCODER, Program.CAPTION, Program.DENOISER):
        expected = HostPrograms(exact).run(program, feeds[program])
        for name, value in run_cuda_program_on_cpu(quantized, program, feeds[program]).items():
            assert relative_error(value, expected[name]) < 0.25, (program, name)


def test_widths_that_no_block_divides_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    narrow = replace(SMALL.config, text_encoder=replace(SMALL.config.text_encoder, intermediate_size=152))
    write_checkpoint(tmp_path / "narrow", Scale(narrow))
    with raises_with(ExportError, 152, 32, "int4", "--precision int8"):
        build(tmp_path / "narrow", tmp_path / "bundle", BuildOptions(Precision.INT4), QUIET)
    assert not (tmp_path / "bundle").exists()
