"""Files that people have and that are no Z-Image component: each is refused by what it is.

Some share every tensor name with Z-Image and differ in sizes, or have a few tensors more. Built from one of these, a
bundle would generate noise.

Sources: ComfyUI's ``comfy/model_detection.py`` and ``comfy/lora.py``, ``comfy/weight_adapter``; diffusers'
``loaders/single_file_utils.py``; stable-diffusion.cpp's ``name_conversion.cpp``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .kinds import KINDS, LIKE_Z_IMAGE, find_prefix, parts_in
from .tensors import FileTensor

Tensors = Mapping[str, FileTensor]

_LORA = re.compile(
    r"[._]lora[._]?(A|B|E|up|down|mid|magnitude_vector|linear_layer)\b"
    r"|[._]lora\.(up|down)\."
    r"|\.(hada_[wt][12]|lokr_[wt][12])(_[ab])?$"
    r"|\.(oft_(blocks|diag|R)\b.*|boft_\w+|dora_scale|diff|diff_b|set_weight|w_norm|b_norm)$"
    r"|^(lora|lycoris)_(unet|te|transformer|layers)\w*\.(a1|a2|b1|b2|c1|c2)\.weight$"
    r"|^(lora_unet|lora_te|lora_transformer|lycoris)_"
)
_CONTROL = re.compile(r"(^|\.)(control_layers|control_all_x_embedder|control_noise_refiner|controlnet_blocks)\.")

_OTHERS = (  # a tensor that only these have, and what they are
    (re.compile(r"(^|\.)double_(stream_modulation|blocks)"), "a FLUX transformer"),
    (re.compile(r"(^|\.)joint_blocks\."), "a Stable Diffusion 3 transformer"),
    (re.compile(r"(^|\.)(input_blocks\.|down_blocks\.\d+\.attentions\.)"), "a Stable Diffusion UNet"),
    (re.compile(r"(^|\.)transformer_blocks\.\d+\.(attn\.add_q_proj|img_mod)"), "a FLUX, SD3 or Qwen-Image transformer"),
    (re.compile(r"(^|\.)blocks\.\d+\.cross_attn\."), "a Wan transformer"),
    (re.compile(r"(^|\.)text_model\.encoder\.layers\."), "a CLIP text encoder"),
    (re.compile(r"(^|\.)encoder\.block\.\d+\.layer\."), "a T5 text encoder"),
    (re.compile(r"(^|\.)(mmproj|v\.blk|visual\.blocks)\.?"), "the vision tower of a language model"),
    (re.compile(r"(^|\.)decoder\.layers\.\d+\.conv\."), "a tiny autoencoder for previews (TAESD)"),
    (re.compile(r"(^|\.)(layers|blk)\.0\.(self_attn\.q_proj|attn_q)\.weight$"), "a language model other than Qwen3"),
)

_QWEN3 = {1024: "Qwen3-0.6B", 2048: "Qwen3-1.7B", 2560: "Qwen3-4B", 4096: "Qwen3-8B", 5120: "Qwen3-14B or Qwen3-32B"}
_LUMINA_WIDTH = 2304
_WIDTH = 3840
_LARGE = 1024  # a model of this width was trained by someone; a smaller one is a toy, for tests


def refuse_adapters(tensors: Mapping[str, object], path: Path, title: str) -> None:
    """Raises `CheckpointError` for a LoRA in any spelling and for a ControlNet, which change a model and are none."""
    for name in tensors:
        if is_lora(name):
            raise CheckpointError(
                f"{path}: is a LoRA, not a model (it contains {name}); use --lora to merge it into the {title}"
            )
        if _CONTROL.search(name):
            raise CheckpointError(
                f"{path}: is a ControlNet, not a model (it contains {name}); `zimage-export controlnet` exports it; "
                f"give the {title} that it was trained for"
            )


def is_lora(name: str) -> bool:
    """Whether a tensor's name is one that a LoRA has, in any spelling."""
    return _LORA.search(name) is not None


def other_model(tensors: Mapping[str, object]) -> tuple[str, str] | None:
    """What other model a file is of, and the tensor that shows it; None where that is unknown."""
    for pattern, what in _OTHERS:
        if name := next((name for name in tensors if pattern.search(name)), None):
            return what, name
    return None


def wrong_component(part: str, tensors: Tensors, path: Path) -> CheckpointError:
    """The error, for the caller to raise, for a file without the component `part`."""
    wanted = KINDS[part]
    if others := [KINDS[other].title for other in parts_in(tensors)]:
        return CheckpointError(
            f"{path}: contains a {' and a '.join(others)}; expected a {wanted.title} ({wanted.good})"
        )
    if part == "transformer" and (prefix := find_prefix(tensors, LIKE_Z_IMAGE)) is not None:
        width = _width(tensors, f"{prefix}noise_refiner.0.attention_norm1.weight")
        return CheckpointError(
            f"{path}: is no Z-Image transformer, but has its names: {_relative(width)}; it lacks x_pad_token or "
            f"cap_pad_token; use {wanted.good}"
        )
    if found := other_model(tensors):
        what, name = found
        return CheckpointError(f"{path}: is {what} (it contains {name}); expected a {wanted.title} ({wanted.good})")
    markers = ", ".join(wanted.markers[0])
    return CheckpointError(
        f"{path}: contains no {wanted.title} ({wanted.good}), which would have the tensors {markers}"
    )


def refuse_relatives(part: str, tensors: Tensors, path: Path) -> None:
    """Raises `CheckpointError` for a component of another model that has the same names. Names have no prefix."""
    {"transformer": _check_transformer, "text_encoder": _check_text_encoder, "vae": _check_vae}[part](tensors, path)


def _check_transformer(tensors: Tensors, path: Path) -> None:
    good = KINDS["transformer"].good
    for start, what in (
        ("siglip_", "Z-Image Omni or Edit, which also reads images"),
        ("t_embedder_2.", "TwinFlow, which embeds a second timestep"),
        ("dec_net.", "a pixel-space variant (Zeta-Chroma, L2P), which has no latents"),
    ):
        if name := next((name for name in tensors if name.startswith(start)), None):
            raise CheckpointError(f"{path}: is {what} (it contains {name}), and is not supported; use {good}")
    if not any("final_layer" in name for name in tensors):
        raise CheckpointError(f"{path}: has no final_layer: a pixel-space variant or an incomplete file; use {good}")
    width = _width(tensors, "noise_refiner.0.attention_norm1.weight")
    if width >= _LARGE and width != _WIDTH:
        raise CheckpointError(f"{path}: {_relative(width)}; use {good}")


def _check_text_encoder(tensors: Tensors, path: Path) -> None:
    if name := next((name for name in tensors if re.match(r"visual\.|v\.blk\.", name)), None):
        raise CheckpointError(f"{path}: is a Qwen3-VL model (it contains {name}); use {KINDS['text_encoder'].good}")


def _check_vae(tensors: Tensors, path: Path) -> None:
    good = KINDS["vae"].good
    channels = tensors["decoder.conv_in.weight"].shape[1:2]
    if channels == (32,) or any(name.startswith("bn.") for name in tensors):
        raise CheckpointError(f"{path}: is FLUX.2's VAE, whose latents have 32 channels; use {good}")
    if any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in tensors):
        raise CheckpointError(f"{path}: contains quant_conv, unlike Z-Image's VAE; use {good}")


def wrong_text_encoder(hidden_size: int, caption_width: int, path: Path) -> CheckpointError:
    """The error, for the caller to raise, for a text encoder whose width the transformer cannot read."""
    what = _QWEN3.get(hidden_size, "a model")
    return CheckpointError(
        f"{path}: is {what} with hidden states of width {hidden_size}, but the transformer's cap_embedder reads "
        f"{caption_width}; use {_QWEN3.get(caption_width, 'the text encoder of the same model')}"
    )


def _width(tensors: Tensors, name: str) -> int:
    shape = tensors[name].shape if name in tensors else ()
    return shape[0] if shape else 0


def _relative(width: int) -> str:
    if width == _LUMINA_WIDTH:
        return f"its width is {width}, which is Lumina 2's or NewBie's; Z-Image's is {_WIDTH}"
    return f"its width is {width or 'unknown'}; Z-Image's is {_WIDTH}"
