"""Files of LoRA: every scheme gives the same changes, and whatever cannot be used is named in one line."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import assert_facts, raises_with
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from schemes import DIM, FFN, RANK, SCHEMES, SHAPES, Tensors, expected, factors, under, values

from zimage_export.source.checkpoint import Checkpoint
from zimage_export.synthetic.checkpoint import SMALL
from zimage_runtime.adapters.forms import Hadamard, Kronecker, LowRank
from zimage_runtime.adapters.reader import Adapter, Delta, read_adapter
from zimage_runtime.arrays import FloatArray
from zimage_runtime.errors import AdapterError

QUERY = "layers.0.attention.to_q"


def written(path: Path, tensors: Tensors) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def read(path: Path, *, allow_unused: bool = False) -> Adapter:
    return read_adapter(path, SMALL.config, allow_unused=allow_unused)


def dense(delta: Delta) -> FloatArray:
    return delta.scale * delta.form.rows(0, delta.form.shape[0])


def pair(module: str = QUERY, prefix: str = "transformer.") -> Tensors:
    up, down = factors(module, SHAPES[module])
    return {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_change_is_the_same_in_every_scheme(name: str, tmp_path: Path) -> None:
    adapter = read(SCHEMES[name].write(tmp_path / f"{name}.safetensors"))
    found = {delta.tensor: dense(delta) for delta in adapter.deltas}
    assert set(found) == {f"{module}.weight" for module in SHAPES}
    assert len(adapter.deltas) == len(found), "each tensor is changed once"
    for module in SHAPES:
        assert np.array_equal(found[f"{module}.weight"], expected(module)), module


def test_a_part_of_a_block_diagonal_matrix_has_the_rank_of_its_block(tmp_path: Path) -> None:
    adapter = read(SCHEMES["musubi-comfy"].write(tmp_path / "x.safetensors"))
    form = next(d.form for d in adapter.deltas if d.target.name == QUERY)
    assert isinstance(form, LowRank)
    up, down = form.factors()
    assert (up.shape, down.shape) == ((DIM, RANK), (RANK, DIM))
    assert np.array_equal(0.5 * up @ down, expected(QUERY))


@pytest.mark.parametrize(
    "module",
    [
        "noise_refiner.1.attention.to_out.0",
        "context_refiner.0.feed_forward.w2",
        "layers.2.adaLN_modulation.0",
        "noise_refiner.0.adaLN_modulation.0",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "all_x_embedder.2-1",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
    ],
)
def test_every_linear_of_the_transformer_is_known(module: str, checkpoint: Path, tmp_path: Path) -> None:
    out, width = Checkpoint.open(checkpoint).transformer.get(f"{module}.weight").shape
    for index, name in enumerate((f"transformer.{module}", f"lora_unet_{under(module)}")):
        tensors = {f"{name}.lora_A.weight": values("a", (2, width)), f"{name}.lora_B.weight": values("b", (out, 2))}
        (delta,) = read(written(tmp_path / f"{index}.safetensors", tensors)).deltas
        assert delta.tensor == f"{module}.weight"


@pytest.mark.parametrize(
    ("native", "module"), [("x_embedder", "all_x_embedder.2-1"), ("final_layer.linear", "all_final_layer.2-1.linear")]
)
def test_native_names_of_the_ends(native: str, module: str, tmp_path: Path) -> None:
    out, width = (DIM, 64) if native == "x_embedder" else (64, DIM)
    tensors = {
        f"diffusion_model.{native}.lora_A.weight": values("a", (2, width)),
        f"diffusion_model.{native}.lora_B.weight": values("b", (out, 2)),
    }
    (delta,) = read(written(tmp_path / "x.safetensors", tensors)).deltas
    assert delta.target.name == module


def lokr(whole: tuple[bool, bool], alpha: float) -> Tensors:
    """w1 [8, 8] and w2 [12, 12] of a layer, each whole or as a product of rank 2."""
    name, found = f"lycoris_{under(QUERY)}", {}
    for side, is_whole, size in zip(("w1", "w2"), whole, (8, 12), strict=True):
        a, b = values(f"{side}a", (size, 2)), values(f"{side}b", (2, size))
        found |= (
            {f"{name}.lokr_{side}": a @ b} if is_whole else {f"{name}.lokr_{side}_a": a, f"{name}.lokr_{side}_b": b}
        )
    return {**found, f"{name}.alpha": np.array(alpha, np.float32)}


@pytest.mark.parametrize(
    ("whole", "alpha", "scale"),
    [((True, True), 1e10, 1.0), ((True, True), 0.0, 1.0), ((True, False), 1.0, 0.5), ((False, True), 4.0, 2.0)],
)
def test_alpha_of_lokr_counts_where_a_side_is_a_product(
    whole: tuple[bool, bool], alpha: float, scale: float, tmp_path: Path
) -> None:
    (delta,) = read(written(tmp_path / "x.safetensors", lokr(whole, alpha))).deltas
    assert isinstance(delta.form, Kronecker)
    w1, w2 = (values(f"{side}a", (n, 2)) @ values(f"{side}b", (2, n)) for side, n in (("w1", 8), ("w2", 12)))
    assert delta.scale == scale
    assert np.array_equal(dense(delta), scale * np.kron(w1, w2))


def test_lokr_of_a_fused_projection_is_split_by_rows(tmp_path: Path) -> None:
    w1, w2 = values("w1", (12, 8)), values("w2", (24, 12))
    name = "diffusion_model.layers.0.attention.qkv"
    deltas = read(written(tmp_path / "x.safetensors", {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2})).deltas
    product = np.kron(w1, w2)
    for index, (delta, kind) in enumerate(zip(deltas, "qkv", strict=True)):
        assert delta.target.name == f"layers.0.attention.to_{kind}"
        assert np.array_equal(dense(delta), product[index * DIM : (index + 1) * DIM])
        assert isinstance(delta.form, Kronecker)
        assert np.array_equal(delta.form.products().whole(), dense(delta))


def test_loha_is_an_elementwise_product_and_also_low_rank(tmp_path: Path) -> None:
    parts = {f"hada_{w}_{s}": values(w + s, (FFN, 3) if s == "a" else (3, DIM)) for w in ("w1", "w2") for s in "ab"}
    name = "lora_unet_layers_1_feed_forward_w1"
    tensors = {f"{name}.{key}": value for key, value in parts.items()} | {f"{name}.alpha": np.array([1.5], np.float32)}
    (delta,) = read(written(tmp_path / "x.safetensors", tensors)).deltas
    product = 0.5 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert np.array_equal(dense(delta), product)
    assert isinstance(delta.form, Hadamard)
    up, down = delta.form.factors()
    assert up.shape[1] == delta.form.rank == 9
    assert np.array_equal(delta.scale * up @ down, product)


@pytest.mark.parametrize(
    ("key", "shape", "rows"),
    [
        ("dora_scale", (DIM, 1), True),
        ("dora_scale", (1, DIM), False),
        ("lora_magnitude_vector.weight", (DIM,), True),
        ("lora_magnitude_vector.default.weight", (DIM,), True),
        ("lora_magnitude_vector", (DIM,), True),
    ],
)
def test_norms_of_dora(key: str, shape: tuple[int, ...], rows: bool, tmp_path: Path) -> None:
    tensors = pair() | {f"transformer.{QUERY}.{key}": values("m", shape)}
    (delta,) = read(written(tmp_path / "x.safetensors", tensors)).deltas
    assert delta.magnitude is not None
    assert delta.magnitude_of_rows is rows
    assert np.array_equal(delta.magnitude.read(), values("m", shape))


def test_whole_changes_of_weights_norms_and_biases(tmp_path: Path) -> None:
    tensors = {
        f"diffusion_model.{QUERY}.diff": values("d", (DIM, DIM)),
        "diffusion_model.layers.0.attention_norm1.diff": values("n", (DIM,)),
        "diffusion_model.layers.0.attention.q_norm.diff": values("q", (DIM // 3,)),
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": values("b", (4 * DIM,)),
        "diffusion_model.cap_pad_token.diff": values("p", (1, DIM)),
    }
    deltas = read(written(tmp_path / "x.safetensors", tensors)).deltas
    found = {delta.tensor: dense(delta) for delta in deltas}
    names = (
        f"{QUERY}.weight",
        "layers.0.attention_norm1.weight",
        "layers.0.attention.norm_q.weight",
        "layers.0.adaLN_modulation.0.bias",
        "cap_pad_token",
    )
    for name, tensor in zip(names, tensors.values(), strict=True):
        assert np.array_equal(found.pop(name), tensor)
    assert not found


@pytest.mark.parametrize("prefix", ["text_encoders.qwen3_4b.transformer.model.", "text_encoders.transformer.model."])
def test_the_text_encoders_lora_is_known_and_its_last_layer_has_no_effect(prefix: str, tmp_path: Path) -> None:
    last = SMALL.config.text_encoder.num_hidden_layers - 1
    tensors = {}
    for index in (0, last):
        name = f"{prefix}layers.{index}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": values("a", (2, 64)), f"{name}.lora_B.weight": values("b", (128, 2))}
    adapter = read(written(tmp_path / "x.safetensors", tensors))
    assert adapter.components == {"text_encoder"}
    assert [delta.tensor for delta in adapter.deltas] == ["layers.0.self_attn.q_proj.weight"]


def test_text_encoder_under_kohyas_name(tmp_path: Path) -> None:
    name = "lora_te_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": values("a", (2, 64)), f"{name}.lora_up.weight": values("b", (128, 2))}
    assert read(written(tmp_path / "x.safetensors", tensors)).components == {"text_encoder"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_type(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in pair().items()}
    save_torch(tensors | {f"transformer.{QUERY}.alpha": torch.full(shape, -8, dtype=dtype)}, tmp_path / "x.safetensors")
    (delta,) = read(tmp_path / "x.safetensors").deltas
    assert delta.scale == -2.0


def test_sixteen_bits_are_read_exactly(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        path = tmp_path / "x.safetensors"
        save_torch({name: torch.from_numpy(tensor).to(dtype) for name, tensor in pair().items()}, path)
        (delta,) = read(path).deltas
        assert np.array_equal(dense(delta), 2 * expected(QUERY))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_found_in_sixteen_bits(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in pair().items()}
    tensors[A][1, 2] = value
    save_torch(tensors, tmp_path / "x.safetensors")
    with raises_with(AdapterError, tmp_path / "x.safetensors", A):
        read(tmp_path / "x.safetensors")


def test_ranks_may_differ_by_layer_and_exceed_the_width(tmp_path: Path) -> None:
    tensors = {}
    for layer, rank in (("layers.0", 2), ("layers.2", DIM + 3)):
        up, down = factors(f"{layer}.attention.to_v", (DIM, DIM), rank)
        tensors |= {f"{layer}.attention.to_v.lora_A.weight": down, f"{layer}.attention.to_v.lora_B.weight": up}
    forms = [delta.form for delta in read(written(tmp_path / "x.safetensors", tensors)).deltas]
    assert [form.rank for form in forms if isinstance(form, LowRank)] == [2, DIM + 3]


def test_alpha_beside_a_peft_file(tmp_path: Path) -> None:
    up, down = factors(QUERY, SHAPES[QUERY])
    name = f"base_model.model.{QUERY}"
    written(tmp_path / "adapter_model.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    config = {"r": RANK, "lora_alpha": 16, "alpha_pattern": {"attention.to_q": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (delta,) = read(tmp_path / "adapter_model.safetensors").deltas
    assert delta.scale == 0.5
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 16}), "utf-8")
    (delta,) = read(tmp_path / "adapter_model.safetensors").deltas
    assert delta.scale == 4


def test_the_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(pair(), first)
    save_file(pair(), second, {"ss_output_name": "other"})
    data = first.read_bytes()
    after = 8 + int.from_bytes(data[:8], "little")  # as A1111's `addnet_hash_safetensors` reads it
    assert read(first).hash == read(second).hash == hashlib.sha256(data[after:]).hexdigest()
    save_file(pair("layers.1.attention.to_q"), second)
    assert read(second).hash != read(first).hash


def altered(change: Callable[[Tensors], object]) -> Tensors:
    tensors = pair()
    change(tensors)
    return tensors


A, B = f"transformer.{QUERY}.lora_A.weight", f"transformer.{QUERY}.lora_B.weight"
ALPHA = f"transformer.{QUERY}.alpha"
BROKEN: dict[str, tuple[Tensors, tuple[object, ...]]] = {
    "a-without-b": (altered(lambda t: t.pop(B)), (A, "lora_B")),
    "b-without-a": (altered(lambda t: t.pop(A)), (B, "lora_A")),
    "alpha-alone": ({ALPHA: np.array(1.0, np.float32)}, (ALPHA,)),
    "nan": (altered(lambda t: t[A].__setitem__((0, 0), np.nan)), (A, "finite")),
    "infinite": (altered(lambda t: t[B].__setitem__((0, 0), np.inf)), (B, "finite")),
    "ranks": (altered(lambda t: t.update({B: values("b", (DIM, 3))})), (A, B, 3, 4)),
    "transposed": ({A: values("a", (DIM, 4)), B: values("b", (4, DIM))}, (A, "transposed", DIM)),
    "shape": (altered(lambda t: t.update({A: values("a", (4, DIM + 1))})), (97, A)),
    "alpha-0": (altered(lambda t: t.update({ALPHA: np.array(0.0, np.float32)})), (ALPHA, 0)),
    "alpha-1e10": (altered(lambda t: t.update({ALPHA: np.array(1e10, np.float32)})), (ALPHA, "1e+10")),
    "alpha-nan": (altered(lambda t: t.update({ALPHA: np.array(np.nan, np.float32)})), (ALPHA, "nan")),
    "alpha-vector": (altered(lambda t: t.update({ALPHA: np.ones(4, np.float32)})), (ALPHA, "[4]")),
    "empty": ({}, ("empty",)),
    "empty-rank": ({A: np.zeros((0, DIM), np.float32), B: np.zeros((DIM, 0), np.float32)}, (A, "empty")),
    "integers": ({A: np.zeros((4, DIM), np.int8), B: np.zeros((DIM, 4), np.int8)}, (A, "I8")),
    "dora-shape": (altered(lambda t: t.update({f"transformer.{QUERY}.dora_scale": values("m", (5, 1))})), ("[5, 1]",)),
    "dora-alone": ({f"transformer.{QUERY}.dora_scale": values("m", (DIM, 1))}, ("dora_scale",)),
    "two-kinds": (altered(lambda t: t.update({f"transformer.{QUERY}.lokr_w1": values("w", (8, 8))})), ("lokr_w1",)),
    "lokr-half": ({f"transformer.{QUERY}.lokr_w1": values("w", (8, 8))}, ("lokr_w2",)),
    "lokr-shape": (
        {f"{QUERY}.lokr_w1": values("w", (8, 8)), f"{QUERY}.lokr_w2": values("v", (8, 8))},
        (QUERY, "[64, 64]", "[96, 96]"),
    ),
    "bias": ({f"transformer.{QUERY}.diff_b": values("b", (DIM,))}, (QUERY, "bias")),
    "norm-of-rank": (
        {
            "layers.0.attention_norm1.lora_A.weight": values("a", (2, DIM)),
            "layers.0.attention_norm1.lora_B.weight": values("b", (DIM, 2)),
        },
        ("layers.0.attention_norm1",),
    ),
    "two-adapters": (
        {f"{QUERY}.lora_A.one.weight": values("a", (2, DIM)), f"{QUERY}.lora_B.two.weight": values("b", (DIM, 2))},
        ("one", "two"),
    ),
    "two-names": (
        pair() | {name.replace("to_q", "to.q"): 2 * tensor for name, tensor in pair(prefix="diffusion_model.").items()},
        (QUERY, f"diffusion_model.{QUERY.replace('to_q', 'to.q')}"),
    ),
    "wide": (
        {
            "layers.0.attention.to_q.lora_A.weight": values("a", (4, 2304)),
            "layers.0.attention.to_q.lora_B.weight": values("b", (2304, 4)),
        },
        (2304, "Lumina 2", DIM),
    ),
    "flux": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": values("a", (4, 32))}, ("Flux", "Z-Image")),
    "sdxl": (
        {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": values("a", (4, 32))},
        ("Stable Diffusion", "Z-Image"),
    ),
    "qwen-image": ({"transformer_blocks.0.img_mlp.net.0.lora_A.weight": values("a", (4, 32))}, ("Qwen-Image",)),
    "no-lora": ({"model.embed_tokens.weight": values("a", (4, 32))}, ("model.embed_tokens.weight",)),
    "twinflow": (
        pair() | {"transformer.t_embedder_2.mlp.0.lora_A.weight": values("a", (2, 256))},
        ("transformer.t_embedder_2.mlp.0.lora_A.weight", "--lora-allow-unused"),
    ),
    "layer-35": (
        pair() | {"transformer.layers.35.attention.to_q.lora_A.weight": values("a", (2, DIM))},
        ("transformer.layers.35.attention.to_q.lora_A.weight",),
    ),
    "oft": (pair() | {f"transformer.{QUERY}.oft_blocks": values("a", (2, 2, 2))}, ("oft_blocks", 1)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    tensors, facts = BROKEN[case]
    path = written(tmp_path / f"{case}.safetensors", tensors)
    with raises_with(AdapterError, path, *facts):
        read(path)


def test_what_belongs_to_nothing_is_listed_where_that_is_allowed(tmp_path: Path) -> None:
    other = "transformer.layers.35.attention.to_q.lora_A.weight"
    adapter = read(written(tmp_path / "x.safetensors", pair() | {other: values("a", (2, DIM))}), allow_unused=True)
    assert adapter.unused == (other,)
    assert [delta.tensor for delta in adapter.deltas] == [f"{QUERY}.weight"]


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save(pair(), tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("new.pt", "old.pt"):
        with raises_with(AdapterError, tmp_path / name, "pickle", "safetensors"):
            read(tmp_path / name)
    with raises_with(AdapterError, tmp_path / "none.safetensors"):
        read(tmp_path / "none.safetensors")
    with raises_with(AdapterError, tmp_path):
        read(tmp_path)
    whole = written(tmp_path / "whole.safetensors", pair()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with raises_with(AdapterError, tmp_path / "cut.safetensors", "truncated"):
        read(tmp_path / "cut.safetensors")


def test_equal_changes_under_two_names_count_once(tmp_path: Path) -> None:
    both = pair() | pair(prefix="diffusion_model.")
    (delta,) = read(written(tmp_path / "x.safetensors", both)).deltas
    assert np.array_equal(dense(delta), 2 * expected(QUERY))


def test_messages_are_short_however_much_is_unused(tmp_path: Path) -> None:
    many = {f"other.{index}.lora_A.weight": values("a", (2, 2)) for index in range(500)}
    with pytest.raises(AdapterError) as caught:
        read(written(tmp_path / "x.safetensors", pair() | many))
    assert_facts(str(caught.value), 500, "other.0.lora_A.weight", 497)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
