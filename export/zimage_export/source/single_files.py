"""Components in single files, as ComfyUI, llama.cpp and fine-tuners publish them, under the names of diffusers.

Only headers are read here: a tensor's bytes stay where they are in the file, and the fused query, key and value
projection becomes three ranges of its rows.

The names: `model.comfyui_names`, `llama_names`. The forms that weights are stored in: `forms`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage_runtime.model.comfyui_names import Rows, from_comfyui, is_pixelwise
from zimage_runtime.model.programs import COMPONENTS

from ..errors import CheckpointError
from .contents import Contents, read_contents
from .foreign import refuse_adapters, refuse_relatives, wrong_component
from .gguf_file import Value
from .kinds import KINDS, component_tensors
from .llama_names import from_llama
from .tensors import FileTensor


@dataclass(frozen=True)
class SingleFiles:
    """The components that come from a file of their own, in place of a folder of the checkpoint."""

    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None  # the published one

    def get(self, part: str) -> Path | None:
        """The file of `text_encoder`, `transformer` or `vae`, if there is one."""
        return {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae}[part]

    @property
    def complete(self) -> bool:
        """Whether every component has its file, so that no checkpoint is needed but for the tokenizer."""
        return all(self.get(part) for part in COMPONENTS)


NO_FILES = SingleFiles()
"""Everything comes from the checkpoint's own folders."""

_PADS = ("x_pad_token", "cap_pad_token")


@dataclass(frozen=True)
class ComponentFile:
    """A component's tensors by diffusers' names, and what the file says about itself."""

    tensors: dict[str, FileTensor]
    metadata: Mapping[str, Value]


def read_single_file(part: str, path: Path) -> ComponentFile:
    """The component of a file, or of a set of shards. A file that uses diffusers' names already is read as it is.

    Raises `CheckpointError` for a file that contains something else than the component, or contains it in a form that
    is not supported.
    """
    kind = KINDS[part]
    return component_of(part, read_contents(path, f"the {kind.title}'s file ({kind.good})"))


def component_of(part: str, contents: Contents) -> ComponentFile:
    """The component of a file's contents. Raises `CheckpointError`."""
    path = contents.where
    refuse_adapters(contents.tensors, path, KINDS[part].title)
    own = component_tensors(part, contents.tensors)
    if own is None:
        raise wrong_component(part, contents.tensors, path)
    refuse_relatives(part, own, path)
    if part == "text_encoder":
        own = {name: own[theirs] for theirs, name in from_llama(own).items()}
    return ComponentFile(_renamed(part, own, path), contents.metadata)


def _renamed(part: str, tensors: Mapping[str, FileTensor], path: Path) -> dict[str, FileTensor]:
    """The tensors under diffusers' names."""
    renamed = {}
    for name, rows in from_comfyui(part, tensors).items():
        tensor = _range(rows, tensors[rows.name], path).renamed(name)
        if is_pixelwise(part, name) and tensor.shape[2:] == (1, 1):
            tensor = tensor.reshaped(tensor.shape[:2])
        elif part == "transformer" and name in _PADS and len(tensor.shape) == 1:
            tensor = tensor.reshaped((1, *tensor.shape))
        renamed[name] = tensor
    return renamed


def _range(rows: Rows, tensor: FileTensor, path: Path) -> FileTensor:
    """A range of a fused projection's rows, [3 * dim, dim]; any other tensor as it is."""
    if rows.parts == 1:
        return tensor
    if len(tensor.shape) != 2 or tensor.shape[0] % rows.parts:
        raise CheckpointError(f"{path}: {rows.name} has shape {list(tensor.shape)}, which is not query, key and value")
    return tensor.part(rows.part, rows.parts)
