"""A checkpoint in diffusers layout as ComfyUI's three single files, which stable-diffusion.cpp reads.

Bytes are copied as they are, tensor by tensor: only names change, three projections become the rows of one, and the
VAE's attention layers get the shape of convolutions over single pixels. Source for the names:
``convert_z_image_transformer_checkpoint_to_diffusers`` and ``convert_ldm_vae_checkpoint`` in diffusers'
``loaders/single_file_utils.py``, whose inverse this is.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.bundle.files import atomic_write
from zimage_runtime.bundle.tensors import DType, TensorEntry, encode_header, read_header
from zimage_runtime.errors import ZImageRuntimeError

FILES = {"transformer": "z_image.safetensors", "text_encoder": "qwen_3_4b.safetensors", "vae": "ae.safetensors"}
"""The file of each component."""

_PIECE = 16 << 20


class ConversionError(ZImageRuntimeError):
    """A checkpoint that cannot be written under other names."""


@dataclass(frozen=True)
class Source:
    """A tensor where it lies now."""

    path: Path
    entry: TensorEntry


@dataclass(frozen=True)
class Target:
    """A tensor of the new file: the bytes of one or three others, one after the other."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def convert(checkpoint: Path, out: Path) -> Path:
    """Writes the files that are not in `out` yet, and gives `out`. Raises `ConversionError` or `TensorFileError`."""
    out.mkdir(parents=True, exist_ok=True)
    for component, name in FILES.items():
        if not (out / name).exists():
            _write(out / name, RENAMERS[component](_tensors(checkpoint / component)))
    return out


def _tensors(folder: Path) -> dict[str, Source]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ConversionError(f"{folder}: holds no safetensors files; give a checkpoint in diffusers layout")
    return {name: Source(shard, entry) for shard in shards for name, entry in read_header(shard).items()}


def _write(path: Path, targets: Mapping[str, Target]) -> None:
    header = {name: (_dtype(name, target), target.shape) for name, target in targets.items()}
    with atomic_write(path) as file:
        file.write(encode_header(header))
        for target in targets.values():
            for piece in _pieces(target.sources):
                file.write(piece)


def _dtype(name: str, target: Target) -> DType:
    types = {source.entry.dtype for source in target.sources}
    if len(types) != 1 or not types <= set(DType.__members__):
        raise ConversionError(f"{name}: cannot be written as {' and '.join(sorted(types))}")
    return DType(types.pop())


def _pieces(sources: Iterable[Source]) -> Iterator[bytes]:
    for source in sources:
        with source.path.open("rb") as file:
            file.seek(source.entry.offset)
            left = source.entry.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ConversionError(f"{source.path}: became shorter while it was read")
                left -= len(piece)
                yield piece


def _same(source: Source) -> Target:
    return Target(source.entry.shape, (source,))


_FUSED = re.compile(r"(?P<scope>.+\.attention)\.to_(?P<kind>[qkv])\.weight")
_TRANSFORMER = (
    (re.compile(r"\.attention\.to_out\.0\."), ".attention.out."),
    (re.compile(r"\.attention\.norm_([qk])\."), r".attention.\1_norm."),
    (re.compile(r"^all_(x_embedder|final_layer)\.2-1\."), r"\1."),
)


def _transformer(tensors: Mapping[str, Source]) -> dict[str, Target]:
    found: dict[str, Target] = {}
    for name, source in tensors.items():
        if match := _FUSED.fullmatch(name):
            if match["kind"] == "q":
                parts = tuple(_need(tensors, f"{match['scope']}.to_{kind}.weight") for kind in "qkv")
                rows, columns = source.entry.shape
                found[f"{match['scope']}.qkv.weight"] = Target((3 * rows, columns), parts)
            continue
        for pattern, new in _TRANSFORMER:
            name = pattern.sub(new, name)
        found[name] = _same(source)
    return found


def _need(tensors: Mapping[str, Source], name: str) -> Source:
    if name not in tensors:
        raise ConversionError(f"the checkpoint holds no {name}")
    return tensors[name]


def _text_encoder(tensors: Mapping[str, Source]) -> dict[str, Target]:
    """Names are the same; a model that was saved without its head lacks their first part."""
    return {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": _same(s) for name, s in tensors.items()
    }


_BLOCK = re.compile(r"(?P<coder>encoder\.down|decoder\.up)_blocks\.(?P<level>\d+)\.(?P<rest>.+)")
_MIDDLE = re.compile(r"(?P<coder>(?:en|de)coder)\.mid_block\.(?P<rest>.+)")
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae(tensors: Mapping[str, Source]) -> dict[str, Target]:
    levels = 1 + max((int(m["level"]) for name in tensors if (m := _BLOCK.fullmatch(name))), default=0)
    found = {}
    for name, source in tensors.items():
        target = _same(source)
        if match := _BLOCK.fullmatch(name):
            name = _level(match, levels)
        elif match := _MIDDLE.fullmatch(name):
            name = f"{match['coder']}.mid.{_middle(match['rest'])}"
            if ".attn_1." in name and len(target.shape) == 2:
                target = Target((*target.shape, 1, 1), target.sources)
        else:
            name = name.replace("conv_norm_out.", "norm_out.")
        found[name] = target
    return found


def _level(match: re.Match[str], levels: int) -> str:
    """diffusers counts the decoder's levels from the latents, the file from the picture."""
    level = int(match["level"])
    level = levels - 1 - level if match["coder"] == "decoder.up" else level
    rest = re.sub(r"^resnets\.", "block.", match["rest"])
    rest = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", rest).replace("conv_shortcut", "nin_shortcut")
    return f"{match['coder']}.{level}.{rest}"


def _middle(rest: str) -> str:
    if match := re.fullmatch(r"resnets\.(\d)\.(.+)", rest):
        return f"block_{int(match[1]) + 1}.{match[2]}"
    for theirs, name in _ATTENTION.items():
        rest = rest.replace(f"attentions.0.{theirs}.", f"attn_1.{name}.")
    return rest


RENAMERS = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}
"""By component."""
