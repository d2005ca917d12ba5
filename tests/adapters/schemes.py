"""LoRA of a small model, written under every naming scheme that people hold files in.

Names are those of `FORMATS.md`'s sources: trainers and converters, not our reader. Values are small integers over
powers of two, so that every form holds exactly the same change.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from zimage_runtime.arrays import FloatArray

RANK = 4
DIM, FFN = 96, 256  # of the small checkpoint's transformer
Tensors = dict[str, np.ndarray]

LAYERS = [f"layers.{index}" for index in range(3)]
BLOCK_LINEARS = {
    "attention.to_q": (DIM, DIM),
    "attention.to_k": (DIM, DIM),
    "attention.to_v": (DIM, DIM),
    "attention.to_out.0": (DIM, DIM),
    "feed_forward.w1": (FFN, DIM),
    "feed_forward.w2": (DIM, FFN),
    "feed_forward.w3": (FFN, DIM),
}
SHAPES = {f"{layer}.{name}": shape for layer in LAYERS for name, shape in BLOCK_LINEARS.items()}


def values(name: str, shape: tuple[int, ...]) -> FloatArray:
    """Integers from -2 to 2 over 16: exact in every type."""
    rng = np.random.default_rng(list(name.encode()))
    return (rng.integers(-2, 3, shape) / 16).astype(np.float32)


def factors(module: str, shape: tuple[int, int], rank: int = RANK) -> tuple[FloatArray, FloatArray]:
    """Up and down of a module."""
    return values(f"{module}.up", (shape[0], rank)), values(f"{module}.down", (rank, shape[1]))


def expected(module: str) -> FloatArray:
    """The change itself: alpha is half of the rank in all schemes that have one, and folded into up in the others."""
    up, down = factors(module, SHAPES[module])
    return 0.5 * (up @ down)


def _pairs(name: Callable[[str], str], down: str, up: str, alpha: str | None) -> Tensors:
    found = {}
    for module, shape in SHAPES.items():
        b, a = factors(module, shape)
        found[f"{name(module)}.{down}"] = a
        found[f"{name(module)}.{up}"] = b if alpha else 0.5 * b
        if alpha:
            found[f"{name(module)}.{alpha}"] = np.array(RANK / 2, np.float32)
    return found


def under(name: str) -> str:
    return name.replace(".", "_")


AB = ("lora_A.weight", "lora_B.weight", None)
DOWN_UP = ("lora_down.weight", "lora_up.weight", "alpha")


def _fused(prefix: str) -> Tensors:
    """Native names: q, k and v in one, block-diagonal, with three times alpha (musubi's converter)."""
    found = {}
    for module, shape in SHAPES.items():
        layer, tail = module[: len("layers.0")], module[len("layers.0.") :]
        if tail in ("attention.to_k", "attention.to_v"):
            continue
        if tail == "attention.to_q":
            pairs = [factors(f"{layer}.attention.to_{kind}", shape) for kind in "qkv"]
            up = np.zeros((3 * DIM, 3 * RANK), np.float32)
            for index, (b, _) in enumerate(pairs):
                up[index * DIM : (index + 1) * DIM, index * RANK : (index + 1) * RANK] = b
            down, name, times = np.concatenate([a for _, a in pairs]), f"{prefix}{under(f'{layer}.attention.qkv')}", 3
        else:
            up, down = factors(module, shape)
            name, times = f"{prefix}{under(module.replace('to_out.0', 'out'))}", 1
        found |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": np.array(times * RANK / 2, np.float32),
        }
    return found


def _anime(first: bool) -> Tensors:
    """Dots for underscores everywhere, and q, k, v and out a second time under their native names.

    The second time they are twice as large, so that counting them shows.
    """
    split = _pairs(lambda m: f"lora_unet_{under(m)}".replace("_", "."), "lora.down.weight", "lora.up.weight", "alpha")
    fused = _fused("diffusion_model." if first else "lora_unet_")  # files are sorted by name
    return split | {name: 2 * tensor for name, tensor in fused.items() if "qkv" in name or "_attention_out." in name}


def _merged_native() -> Tensors:
    """diffusion_model. names with fused qkv: one down for all three."""
    found = {}
    for layer in LAYERS:
        shape = (DIM, DIM)
        pairs = [factors(f"{layer}.attention.to_{kind}", shape) for kind in "qkv"]
        name = f"diffusion_model.{layer}.attention.qkv"
        up = np.zeros((3 * DIM, 3 * RANK), np.float32)
        for index, (b, _) in enumerate(pairs):
            up[index * DIM : (index + 1) * DIM, index * RANK : (index + 1) * RANK] = 0.5 * b
        found |= {f"{name}.lora_A.weight": np.concatenate([a for _, a in pairs]), f"{name}.lora_B.weight": up}
        for tail in list(BLOCK_LINEARS)[3:]:
            b, a = factors(f"{layer}.{tail}", BLOCK_LINEARS[tail])
            native = f"diffusion_model.{layer}.{tail.replace('to_out.0', 'out')}"
            found |= {f"{native}.lora_A.weight": a, f"{native}.lora_B.weight": 0.5 * b}
    return found


def _diffusers_metadata(tensors: Tensors, stabilized: bool) -> dict[str, str]:
    alpha = RANK / 2 if not stabilized else 0.5 * RANK**0.5
    config = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "transformer.use_rslora": stabilized}
    return {"lora_adapter_metadata": json.dumps(config)}


@dataclass(frozen=True)
class Scheme:
    """How a maker writes the change."""

    tensors: Callable[[], Tensors]
    metadata: Callable[[Tensors], dict[str, str]] = lambda tensors: {}

    def write(self, path: Path) -> Path:
        tensors = self.tensors()
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, self.metadata(tensors) or None)
        return path


def _unscaled(name: Callable[[str], str], down: str, up: str) -> Tensors:
    found = {}
    for module, shape in SHAPES.items():
        b, a = factors(module, shape)
        found |= {f"{name(module)}.{down}": a, f"{name(module)}.{up}": b}
    return found


_DIFFUSERS = ("lora_A.weight", "lora_B.weight")

SCHEMES: dict[str, Scheme] = {
    "diffusers": Scheme(lambda: _pairs(lambda m: f"transformer.{m}", *AB)),
    "diffusers-metadata": Scheme(
        lambda: _unscaled(lambda m: f"transformer.{m}", *_DIFFUSERS), lambda t: _diffusers_metadata(t, False)
    ),
    "diffusers-rslora": Scheme(
        lambda: _unscaled(lambda m: f"transformer.{m}", *_DIFFUSERS), lambda t: _diffusers_metadata(t, True)
    ),
    "peft": Scheme(lambda: _pairs(lambda m: f"base_model.model.{m}", *AB)),
    "peft-default": Scheme(
        lambda: _pairs(lambda m: f"base_model.model.{m}", "lora_A.default.weight", "lora_B.default.weight", None)
    ),
    "ai-toolkit": Scheme(lambda: _pairs(lambda m: f"diffusion_model.{m}", *AB)),
    "musubi": Scheme(lambda: _pairs(lambda m: f"lora_unet_{under(m)}", *DOWN_UP)),
    "musubi-comfy": Scheme(lambda: _fused("lora_unet_")),
    "musubi-other": Scheme(
        lambda: _pairs(lambda m: f"diffusion_model.{m.replace('feed_forward', 'feed.forward')}", *AB)
    ),
    "onetrainer-legacy": Scheme(lambda: _pairs(lambda m: f"transformer.{m}", *DOWN_UP)),
    "onetrainer-original": Scheme(lambda: _pairs(lambda m: m, "lora_A.weight", "lora_B.weight", "alpha")),
    "diffsynth": Scheme(lambda: _pairs(lambda m: m, "lora_A.default.weight", "lora_B.default.weight", None)),
    "videox-fun": Scheme(lambda: _pairs(lambda m: f"lora_unet__{under(m)}", *DOWN_UP)),
    "anime": Scheme(lambda: _anime(False)),
    "anime-fused-first": Scheme(lambda: _anime(True)),
    "native": Scheme(_merged_native),
    "lora-bare": Scheme(lambda: _pairs(lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", None)),
    "lora-linear-layer": Scheme(
        lambda: _pairs(
            lambda m: f"transformer.{m}", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "alpha"
        )
    ),
    "sd-cpp-scale": Scheme(
        lambda: {
            name.replace(".alpha", ".scale"): np.array(0.5, np.float32) if name.endswith(".alpha") else tensor
            for name, tensor in _pairs(lambda m: f"diffusion_model.{m}", *DOWN_UP).items()
        }
    ),
    "lycoris": Scheme(lambda: _pairs(lambda m: f"lycoris_{under(m)}", *DOWN_UP)),
}
