"""`zimage-export build --lora`: merged in float32 before anything else, as diffusers and plain sums have it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import assert_one_line_error, call_export
from facts import raises_with
from lora_tools import CASE, QUIET, adapted, lora
from parity import check_parity, draw, draw_with_diffusers, relative_error
from safetensors.numpy import save_file
from schemes import DIM, SCHEMES, Tensors, values

from zimage_export.build import BuildOptions, build
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.source.merging import read_loras, with_loras
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.errors import AdapterError
from zimage_runtime.pipeline import Pipeline

QUERY = "layers.0.attention.to_q"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, whose threads mostly wait for one another at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merged(checkpoint: Path, *given: str) -> Checkpoint:
    opened = Checkpoint.open(checkpoint)
    loras = read_loras([GivenLora.parse(text) for text in given], opened.config, allow_unused=False)
    return with_loras(opened, loras)


def changed(checkpoint: Path, tensors: Tensors, path: Path, weight: float = 1.0, name: str = QUERY) -> FloatArray:
    """What becomes of one tensor, of the transformer unless it is the text encoder's."""
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, path)
    component = "text_encoder" if ".self_attn." in name else "transformer"
    return merged(checkpoint, f"{path}:{weight}").weights(component).get(f"{name}.weight").read()


def test_a_change_beyond_float32_is_refused_with_its_file(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {
        f"transformer.{QUERY}.lora_A.weight": np.full((1, DIM), 1e20, np.float32),
        f"transformer.{QUERY}.lora_B.weight": np.full((DIM, 1), 1e20, np.float32),
    }
    with raises_with(AdapterError, tmp_path / "loud.safetensors", f"{QUERY}.weight", "finite", "weight"):
        changed(checkpoint, tensors, tmp_path / "loud.safetensors")


@pytest.mark.deep
def test_two_files_merged_are_what_diffusers_loads(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    weights = {lora(tmp_path / "one.safetensors", 1): 0.8, lora(tmp_path / "two.safetensors", 2, rank=7): -0.3}
    given = tuple(GivenLora(str(path), weight) for path, weight in weights.items())
    bundle = build(checkpoint, tmp_path / "bundle", BuildOptions(loras=given), QUIET)
    (found,) = draw(Pipeline.from_bundle(bundle.root), CASE)
    with adapted(checkpoint, weights) as pipeline:
        expected = draw_with_diffusers(pipeline, CASE)
        pipeline.disable_lora()
        plain = draw_with_diffusers(pipeline, CASE)
    assert relative_error(plain.latents, expected.latents) > 0.05, "the files change the image"
    check_parity(found, expected)


@pytest.mark.deep
@pytest.mark.usefixtures("one_thread")
def test_a_merged_bundle_says_so_and_is_measured_against_the_merged_model(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, prompts = lora(tmp_path / "fox.safetensors", 1), tmp_path / "prompts.txt"
    prompts.write_text("a fox", "utf-8")
    given = ("--lora", f"{one}:0.5", "--lora", one)
    made = call_export(capsys, "build", checkpoint, tmp_path / "out", *given, "--json", "--quiet")
    assert made.status == 0, made.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    assert manifest["source"]["name"].endswith("+fox:0.5+fox")
    document = json.loads(made.out)
    forgotten = call_export(capsys, "verify", tmp_path / "out", "--reference", checkpoint, "--quiet")
    assert_one_line_error(forgotten, tmp_path / "out", "fox:0.5", "--lora")
    verified = ("verify", tmp_path / "out", "--reference", checkpoint, "--size", "32x32", "--prompts", prompts)
    assert call_export(capsys, *verified, "--quiet", *given).status == 0
    assert document["fingerprint"] != Pipeline.from_bundle(bundle).bundle.manifest.fingerprint


def base(checkpoint: Path, name: str = QUERY) -> FloatArray:
    return Checkpoint.open(checkpoint).transformer.get(f"{name}.weight").read()


def test_every_scheme_changes_weights_alike(checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("diffusers", "musubi-comfy", "native", "onetrainer-legacy"):
        path = SCHEMES[name].write(tmp_path / f"{name}.safetensors")
        weights = merged(checkpoint, str(path)).transformer
        found[name] = weights.get("layers.2.attention.to_v.weight").read()
    assert all(np.array_equal(found["diffusers"], one) for one in found.values())
    assert not np.array_equal(found["diffusers"], base(checkpoint, "layers.2.attention.to_v"))


def test_weight_0_changes_nothing_and_a_weight_multiplies(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {f"{QUERY}.lora_A.weight": values("a", (4, DIM)), f"{QUERY}.lora_B.weight": values("b", (DIM, 4))}
    original, delta = base(checkpoint), values("b", (DIM, 4)) @ values("a", (4, DIM))
    path = tmp_path / "x.safetensors"
    assert np.array_equal(changed(checkpoint, tensors, path, 0), original)
    assert np.array_equal(changed(checkpoint, tensors, path, -0.5), original - 0.5 * delta)


def test_lokr_and_loha_merge_as_their_products(checkpoint: Path, tmp_path: Path) -> None:
    w1, w2 = values("w1", (8, 12)), values("w2", (12, 8))
    lokr = {f"diffusion_model.{QUERY}.lokr_w1": w1, f"diffusion_model.{QUERY}.lokr_w2": w2}
    found = changed(checkpoint, lokr, tmp_path / "lokr.safetensors")
    assert np.allclose(found, base(checkpoint) + np.kron(w1, w2), atol=1e-6)
    a, b, c, d = (values(x, s) for x, s in zip("abcd", [(DIM, 2), (2, DIM), (DIM, 3), (3, DIM)], strict=True))
    loha = {f"{QUERY}.hada_{n}": v for n, v in (("w1_a", a), ("w1_b", b), ("w2_a", c), ("w2_b", d))}
    found = changed(checkpoint, loha, tmp_path / "loha.safetensors")
    assert np.allclose(found, base(checkpoint) + (a @ b) * (c @ d), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_dora_sets_the_norms_of_the_changed_weight(checkpoint: Path, tmp_path: Path, axis: int, weight: float) -> None:
    """In torch and float64. Axis 0: a norm for each row. The weight is inside of the norm, as PEFT has it."""
    a, b, original = values("a", (4, DIM)), values("b", (DIM, 4)), base(checkpoint)
    norms = np.abs(values("m", (DIM, 1) if axis == 0 else (1, DIM))) + np.float32(0.5)
    tensors = {
        f"{QUERY}.lora_down.weight": a,
        f"{QUERY}.lora_up.weight": b,
        f"{QUERY}.alpha": np.array(2, np.float32),
        f"{QUERY}.dora_scale": norms,
    }
    found = changed(checkpoint, tensors, tmp_path / "x.safetensors", weight)
    new = torch.from_numpy(original.astype(np.float64)) + weight * 0.5 * torch.from_numpy((b @ a).astype(np.float64))
    new = new * torch.from_numpy(norms) / new.norm(dim=1 - axis, keepdim=True)
    assert np.allclose(found, new.numpy() if weight else original, atol=1e-5)
    assert (weight == 0) == np.array_equal(found, original)


@pytest.mark.deep
def test_a_magnitude_of_peft_is_merged_as_peft_merges_it(checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(DIM, DIM, bias=False))
    layer[0].weight.data = torch.from_numpy(base(checkpoint))
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(layer, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    state = peft.get_peft_model_state_dict(model)
    tensors = {name.replace("model.0.", f"model.{QUERY}."): value.numpy() for name, value in state.items()}
    path = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}), "utf-8")
    found = changed(checkpoint, tensors, path)
    expected = model.merge_and_unload()[0].weight.detach().numpy()
    assert relative_error(base(checkpoint), expected) > 0.05
    assert np.allclose(found, expected, atol=1e-5)


def test_whole_changes_norms_and_biases_merge(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.layers.0.attention_norm1.diff": values("n", (DIM,)),
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": values("b", (4 * DIM,)),
        "diffusion_model.x_pad_token.diff": values("p", (1, DIM)),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    found, original = merged(checkpoint, f"{path}:2").transformer, Checkpoint.open(checkpoint).transformer
    names = ("layers.0.attention_norm1.weight", "layers.0.adaLN_modulation.0.bias", "x_pad_token")
    for name, tensor in zip(names, tensors.values(), strict=True):
        assert np.allclose(found.get(name).read(), original.get(name).read() + 2 * tensor, atol=1e-6), name


def test_the_text_encoders_lora_merges(checkpoint: Path, tmp_path: Path) -> None:
    module = "layers.1.self_attn.v_proj"
    name = f"text_encoders.qwen3_4b.transformer.model.{module}"
    a, b = values("a", (2, 64)), values("b", (64, 2))
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    found = changed(checkpoint, tensors, tmp_path / "x.safetensors", name=module)
    original = Checkpoint.open(checkpoint).text_encoder.get(f"{module}.weight").read()
    assert np.allclose(found, original + b @ a, atol=1e-6)


def test_pieces_of_any_size_are_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {
        f"{QUERY}.lora_A.weight": values("a", (4, DIM)),
        f"{QUERY}.lora_B.weight": values("b", (DIM, 4)),
        f"{QUERY}.dora_scale": values("m", (1, DIM)),
    }
    whole = changed(checkpoint, tensors, tmp_path / "x.safetensors")
    source = merged(checkpoint, str(tmp_path / "x.safetensors")).transformer.get(f"{QUERY}.weight")
    for size in (1, 4 * DIM, 4 * DIM * 7, 1 << 20):
        assert np.allclose(np.concatenate(list(source.chunks(size))).reshape(whole.shape), whole, atol=1e-6)
    assert np.allclose(source.picked_rows([5, 90]), whole[[5, 90]], atol=1e-6)
    assert np.allclose(source.read_rows(3), whole[:3], atol=1e-6)


@pytest.mark.deep
def test_int8_is_quantized_after_merging(checkpoint: Path, bundle_in: Any, tmp_path: Path) -> None:
    """The int8 bundle of the merged model is as near to the merged model as int8 is without a file."""
    given = (GivenLora(str(lora(tmp_path / "one.safetensors", 1))),)
    images = {}
    for precision in (Precision.FP32, Precision.INT8):
        root = tmp_path / precision
        build(checkpoint, root, BuildOptions(precision, loras=given), QUIET)
        (images[precision],) = draw(Pipeline.from_bundle(root), CASE)
    (plain,) = draw(Pipeline.from_bundle(bundle_in(Precision.FP32)), CASE)
    assert relative_error(plain.latents, images[Precision.FP32].latents) > 0.05
    assert relative_error(images[Precision.INT8].latents, images[Precision.FP32].latents) < 0.05


def test_a_file_that_cannot_be_merged_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": values("a", (4, 32))}, tmp_path / "flux.safetensors")
    given = (GivenLora(str(tmp_path / "flux.safetensors")),)
    with raises_with(AdapterError, tmp_path / "flux.safetensors", "Flux"):
        build(checkpoint, tmp_path / "out", BuildOptions(loras=given), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-.5", "a.safetensors", -0.5),
        ("C:\\x\\a.safetensors", "C:\\x\\a.safetensors", 1.0),
        ("C:\\x\\a.safetensors:2", "C:\\x\\a.safetensors", 2.0),
        ("org/name/a.safetensors:1e-1", "org/name/a.safetensors", 0.1),
    ],
)
def test_file_and_weight(text: str, file: str, weight: float) -> None:
    assert GivenLora.parse(text) == GivenLora(file, weight)


@pytest.mark.parametrize("text", ["a.safetensors:nan", "a.safetensors:inf", ""])
def test_weights_that_are_none(text: str) -> None:
    with raises_with(AdapterError, text.rpartition(":")[2] or "LoRA"):
        GivenLora.parse(text)
