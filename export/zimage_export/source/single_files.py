"""Components in single files, as ComfyUI and fine-tuners publish them, under the names that diffusers gives them.

Only headers are read here: a tensor's bytes stay where they are in the file, and the fused query, key and value
projection becomes three ranges of its rows. These files have no ``config.json``: sizes are derived from the tensors'
shapes, and everything that shapes do not determine is assumed to be the published model's.

The names: `model.comfyui_names`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zimage_runtime.bundle.tensors import TensorEntry, TensorFileError, read_header
from zimage_runtime.model.comfyui_names import Rows, from_comfyui, is_pixelwise
from zimage_runtime.model.config import PATCH_SIZE, ModelConfig
from zimage_runtime.model.linears import PATCH
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError

Entries = Mapping[str, TensorEntry]


@dataclass(frozen=True)
class SingleFiles:
    """The components that come from a file of their own, in place of a folder of the checkpoint."""

    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None

    def get(self, part: str) -> Path | None:
        """The file of `text_encoder`, `transformer` or `vae`, if there is one."""
        return {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}[part]

    @property
    def complete(self) -> bool:
        """Whether every component has its file, so that no checkpoint is needed but for the tokenizer."""
        return all(self.get(part) for part in COMPONENTS)


NO_FILES = SingleFiles()
"""Everything comes from the checkpoint's own folders."""


@dataclass(frozen=True)
class _Kind:
    """What a component's file looks like."""

    title: str
    good: str  # the published file, in a type that we read
    prefixes: tuple[str, ...]  # before every name, where a file holds more than this component
    markers: tuple[str, ...]  # tensors that distinguish it from other components, without the prefix


_KINDS = {
    "transformer": _Kind(
        "Z-Image transformer",
        "z_image_turbo_bf16.safetensors",
        ("model.diffusion_model.", "diffusion_model."),
        ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"),
    ),
    "text_encoder": _Kind(
        "Qwen3 text encoder",
        "qwen_3_4b.safetensors",
        ("text_encoders.qwen3_4b.transformer.model.", "model."),
        ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight"),
    ),
    "vae": _Kind(
        "VAE",
        "ae.safetensors",
        ("first_stage_model.", "vae."),
        ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    ),
}

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_LORA = re.compile(r"[._]lora_(A|B|down|up)\b|\.(hada_w1_a|lokr_w1|lokr_w1_a)$")
_QUANTIZED_KEYS = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale(_inv|_2)?|comfy_quant|qweight|qzeros|wscales|quant_state\.\w+)$"
)
_QUANTIZED_TYPES = ("F8_", "F6_", "F4")


def read_single_file(part: str, path: Path) -> dict[str, TensorEntry]:
    """The tensors of a component's file by diffusers' names. A file that uses these names already is read as it is.

    Raises `CheckpointError` for a file that is not a safetensors file, contains something else than the component, or
    contains it in a form that is not supported.
    """
    kind = _KINDS[part]
    _check_format(path, kind)
    try:
        found: Entries = read_header(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None
    own = _without_prefix(found, kind)
    _check_stored(own, path, kind)
    if not _is_kind(own, kind):
        _refuse(path, kind, next((k for k in _KINDS.values() if _is_kind(_without_prefix(found, k), k)), None))
    return _renamed(part, own, path)


def _check_format(path: Path, kind: _Kind) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give the {kind.title}'s file ({kind.good})")
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path}: is a pickle, which can run any code when it is loaded; use a safetensors file ({kind.good})"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: GGUF is not supported yet; use the safetensors file ({kind.good})")


def _check_stored(entries: Entries, path: Path, kind: _Kind) -> None:
    for name, entry in entries.items():
        if _LORA.search(name):
            raise CheckpointError(
                f"{path}: is a LoRA, not a model (it contains {name}); use --lora to merge it into the {kind.title}"
            )
        if _QUANTIZED_KEYS.search(name) or entry.dtype.startswith(_QUANTIZED_TYPES):
            raise CheckpointError(
                f"{path}: quantized weights (fp8, int8, 4-bit) are not supported yet (it contains {name} as "
                f"{entry.dtype}); use the bf16 file ({kind.good})"
            )


def _without_prefix(entries: Entries, kind: _Kind) -> Entries:
    """The tensors under the component's prefix, without it; all tensors if there are none."""
    for prefix in kind.prefixes:
        own = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
        if own:
            return own
    return entries


def _is_kind(entries: Entries, kind: _Kind) -> bool:
    return all(name in entries for name in kind.markers)


def _refuse(path: Path, wanted: _Kind, other: _Kind | None) -> NoReturn:
    if other is not None:
        raise CheckpointError(f"{path}: contains a {other.title}; expected a {wanted.title} ({wanted.good})")
    markers = ", ".join(wanted.markers)
    raise CheckpointError(f"{path}: contains no {wanted.title} ({wanted.good}), which would have the tensors {markers}")


def _renamed(part: str, entries: Entries, path: Path) -> dict[str, TensorEntry]:
    """The tensors under diffusers' names."""
    if part == "vae" and any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in entries):
        raise CheckpointError(f"{path}: contains quant_conv, unlike Z-Image's VAE; use {_KINDS['vae'].good}")
    renamed = {}
    for name, rows in from_comfyui(part, entries).items():
        entry = _range(rows, entries[rows.name], path)
        if is_pixelwise(part, name) and entry.shape[2:] == (1, 1):
            entry = dataclasses.replace(entry, shape=entry.shape[:2])
        renamed[name] = entry
    return renamed


def _range(rows: Rows, entry: TensorEntry, path: Path) -> TensorEntry:
    """A range of a fused projection's rows, [3 * dim, dim]; any other tensor as it is."""
    if rows.parts == 1:
        return entry
    if len(entry.shape) != 2 or entry.shape[0] % rows.parts:
        raise CheckpointError(f"{path}: {rows.name} has shape {list(entry.shape)}, which is not query, key and value")
    count, nbytes = entry.shape[0] // rows.parts, entry.nbytes // rows.parts
    return dataclasses.replace(
        entry, shape=(count, entry.shape[1]), nbytes=nbytes, offset=entry.offset + rows.part * nbytes
    )


def _count(entries: Entries, stem: str) -> int:
    """How many different numbers follow a stem: the number of layers."""
    start = stem + "."
    return len({name[len(start) :].partition(".")[0] for name in entries if name.startswith(start)})


@dataclass(frozen=True)
class _Shapes:
    """Sizes of a file's tensors, all of which are required."""

    entries: Entries
    path: Path

    def size(self, name: str, axis: int, rank: int) -> int:
        """The size of one axis of a tensor of so many axes."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} not found; is the file complete?")
        if len(entry.shape) != rank or 0 in entry.shape:
            raise CheckpointError(f"{self.path}: {name} has shape {list(entry.shape)}, expected {rank} axes")
        return entry.shape[axis]

    def need_config(self, found: str, published: str, part: str) -> CheckpointError:
        """The error, for the caller to raise, for sizes from which the configuration does not follow."""
        return CheckpointError(
            f"{self.path}: {found}, the published model's {published}; the shapes do not determine its configuration: "
            f"give a MODEL directory with {part}/config.json"
        )


def infer_config(part: str, entries: Entries, path: Path) -> dict[str, Any]:
    """The content of a ``config.json`` for a file's tensors, which have diffusers' names.

    Raises `CheckpointError` where it does not follow from the shapes: for sizes other than the published ones.
    """
    return {"transformer": _infer_transformer, "text_encoder": _infer_text_encoder, "vae": _infer_vae}[part](
        _Shapes(entries, path)
    )


_AXES_DIMS = (32, 48, 48)


def _infer_transformer(shapes: _Shapes) -> dict[str, Any]:
    dim = shapes.size("x_pad_token", 1, 2)
    head_dim = shapes.size("layers.0.attention.norm_q.weight", 0, 1)
    if head_dim != sum(_AXES_DIMS):
        raise shapes.need_config(f"heads have {head_dim} channels", str(sum(_AXES_DIMS)), "transformer")
    return {
        **_depths("transformer", shapes.entries),
        "dim": dim,
        "n_heads": dim // head_dim,
        "cap_feat_dim": shapes.size("cap_embedder.0.weight", 0, 1),
        "in_channels": shapes.size(f"all_x_embedder.{PATCH}.weight", 1, 2) // PATCH_SIZE**2,
        "axes_dims": _AXES_DIMS,
        "axes_lens": (1536, 512, 512),
        "norm_eps": 1e-5,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


def _infer_text_encoder(shapes: _Shapes) -> dict[str, Any]:
    layer = "layers.0"
    head_dim = shapes.size(f"{layer}.self_attn.q_norm.weight", 0, 1)
    return {
        **_depths("text_encoder", shapes.entries),
        "vocab_size": shapes.size("embed_tokens.weight", 0, 2),
        "hidden_size": shapes.size("embed_tokens.weight", 1, 2),
        "num_attention_heads": shapes.size(f"{layer}.self_attn.q_proj.weight", 0, 2) // head_dim,
        "num_key_value_heads": shapes.size(f"{layer}.self_attn.k_proj.weight", 0, 2) // head_dim,
        "head_dim": head_dim,
        "intermediate_size": shapes.size(f"{layer}.mlp.gate_proj.weight", 0, 2),
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


_VAE_CHANNELS = [128, 256, 512, 512]


def _infer_vae(shapes: _Shapes) -> dict[str, Any]:
    levels = _count(shapes.entries, "encoder.down_blocks")
    blocks = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    channels = [shapes.size(name, 0, 4) for name in blocks]
    if channels != _VAE_CHANNELS:
        raise shapes.need_config(f"blocks have {channels} channels", str(_VAE_CHANNELS), "vae")
    return {
        "layers_per_block": _depths("vae", shapes.entries)["layers_per_block"],
        "block_out_channels": channels,
        "latent_channels": shapes.size("decoder.conv_in.weight", 1, 4),
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "sample_size": 1024,
    }


_STACKS = {
    "transformer": {"n_layers": "layers", "n_refiner_layers": "noise_refiner"},
    "text_encoder": {"num_hidden_layers": "layers"},
    "vae": {"layers_per_block": "encoder.down_blocks.0.resnets"},
}


def _depths(part: str, entries: Entries) -> dict[str, int]:
    """Layers of each stack, by the configuration's key."""
    return {key: _count(entries, stem) for key, stem in _STACKS[part].items()}


def check_depth(part: str, entries: Entries, path: Path, config: ModelConfig) -> None:
    """Raises `CheckpointError` for a file with more layers than the configuration, which would leave some out.

    Any other difference is a tensor that is missing or has another shape, which is reported when it is read.
    """
    expected = getattr(config, part)
    for key, count in _depths(part, entries).items():
        if count > getattr(expected, key):
            raise CheckpointError(f"{path}: has {key} {count}, but the configuration has {getattr(expected, key)}")
