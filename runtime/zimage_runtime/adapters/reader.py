"""A file of LoRA, or of a relative of it, as a list of changes: which tensor of the model, what kind, what scale.

Every tensor of a file is used, or the file is refused with the names of those that are not.
"""

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..bundle.tensors import TensorFile, TensorFileError, data_offset, read_metadata
from ..errors import AdapterError
from ..model.config import ModelConfig
from .form_reader import FormReader
from .forms import Form, Values, Whole
from .names import Parsed, Part, candidates, other_model, parse
from .scales import PeftConfig, read_peft_config
from .targets import Place, Target, places

_NAMED = 3  # names in a message
_PIECE = 1 << 22
_OTHER_WIDTHS = {2304: "Lumina 2", 3072: "Flux or Qwen-Image", 1536: "Stable Diffusion 3", 5120: "Wan"}


@dataclass(frozen=True)
class Delta:
    """The change of one tensor of the model: scale times a form and, for DoRA, new norms."""

    target: Target
    form: Form
    scale: float = 1.0
    magnitude: Values | None = None  # DoRA: the norm of each row [out] or column [1, in] of the changed weight
    bias: bool = False  # of the target's bias instead of its weight

    @property
    def tensor(self) -> str:
        """The name of the tensor in the component."""
        return self.target.bias_name if self.bias else self.target.weight

    @property
    def magnitude_of_rows(self) -> bool:
        """Whether DoRA's norms are of rows."""
        assert self.magnitude is not None
        shape = self.magnitude.shape
        return len(shape) == 1 or shape[1] == 1


@dataclass(frozen=True)
class Adapter:
    """A file's changes."""

    path: Path
    deltas: tuple[Delta, ...]
    unused: tuple[str, ...]  # tensors that belong to nothing that is known; empty unless they were allowed
    title: str  # what its name and its metadata call it
    hash: str  # SHA-256 of the tensors' bytes, as kohya's trainer and A1111 count it: a changed header keeps it

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.stem

    @property
    def components(self) -> set[str]:
        """The parts of the model that it changes."""
        return {delta.target.component for delta in self.deltas}


@dataclass(frozen=True)
class WeightedAdapter:
    """A file's changes, and how much of them counts."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class _Module:
    """The tensors that a file has under one name."""

    name: str
    place: Place
    parts: Mapping[Part, str]  # names of tensors


def read_adapter(path: Path, config: ModelConfig, *, allow_unused: bool = False) -> Adapter:
    """Reads and checks a file. Raises `AdapterError`, in one line, for anything in it that cannot be used.

    With `allow_unused`, tensors of no module of the model are listed in the result instead.
    """
    file = _open(path)
    modules, unused = _modules(file, config)
    if not modules:
        raise AdapterError(_of_another_model(path, list(file.entries)))
    if unused and not allow_unused:
        raise AdapterError(f"{path}: {_unused(unused)}; --lora-allow-unused leaves them out")
    _check_width(path, file, modules, config)
    peft = read_peft_config(path)
    deltas = _distinct(path, [(module, _deltas(file, module, peft)) for module in modules])
    if not deltas:
        raise AdapterError(f"{path}: changes nothing that is used for an image")
    return Adapter(path, tuple(deltas), tuple(unused), _title(path), _hash(path))


def _open(path: Path) -> TensorFile:
    if path.is_dir():
        raise AdapterError(f"{path}: is a directory; give a .safetensors file")
    if path.is_file() and _is_pickle(path):
        raise AdapterError(
            f"{path}: is a pickle, which can run any code when it is read; use a .safetensors file of the same LoRA"
        )
    try:
        file = TensorFile(path)
    except TensorFileError as error:
        raise AdapterError(str(error)) from None
    if not file.entries:
        raise AdapterError(f"{path}: is empty: it has no tensors")
    return file


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
    except OSError:
        return False
    return zipfile.is_zipfile(path) or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _modules(file: TensorFile, config: ModelConfig) -> tuple[list[_Module], list[str]]:
    known = places(config)
    found: dict[str, dict[Part, str]] = {}
    where: dict[str, Place] = {}
    adapters: dict[str, str] = {}
    unused: list[str] = []
    for name in file.entries:
        parsed = parse(name)
        place = None if parsed is None else next((known[c] for c in candidates(parsed.module) if c in known), None)
        if parsed is None or place is None:
            unused.append(name)
            continue
        _check_single(file.path, parsed, found, adapters, name)
        found.setdefault(parsed.module, {})[parsed.part] = name
        where[parsed.module] = place
    return [_Module(name, where[name], parts) for name, parts in found.items()], unused


def _check_single(
    path: Path, parsed: Parsed, found: Mapping[str, Mapping[Part, str]], adapters: dict[str, str], name: str
) -> None:
    """PEFT files may hold several adapters under names of their own, and any file the same part twice."""
    if parsed.adapter and adapters.setdefault("", parsed.adapter) != parsed.adapter:
        raise AdapterError(
            f"{path}: holds several adapters, {adapters['']} and {parsed.adapter}; save one of them alone"
        )
    if parsed.part in found.get(parsed.module, {}):
        raise AdapterError(f"{path}: {name} and {found[parsed.module][parsed.part]} are of the same layer")


def _unused(names: list[str]) -> str:
    some = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    other = other_model(names)
    of = f", which are of {other}" if other else ""
    return f"{len(names)} of its tensors belong to nothing in the model{of}: {some}"


def _of_another_model(path: Path, names: list[str]) -> str:
    other = other_model(names)
    if other:
        return f"{path}: is for {other}, not for Z-Image (it has {names[0]})"
    return f"{path}: is not a LoRA for Z-Image: none of its tensors belongs to the model, such as {names[0]}"


def _check_width(path: Path, file: TensorFile, modules: Iterable[_Module], config: ModelConfig) -> None:
    """Lumina 2 and others name their layers as Z-Image does, in other widths."""
    width = config.transformer.dim
    for module in modules:
        target, down = module.place.targets[0], module.parts.get(Part.DOWN)
        if down is None or target.component != "transformer" or not target.name.endswith("attention.to_q"):
            continue
        shape = file.entries[down].shape
        if len(shape) >= 2 and width not in shape[:2]:
            found = max(shape[:2])
            what = f", as {_OTHER_WIDTHS[found]} has" if found in _OTHER_WIDTHS else ""
            raise AdapterError(
                f"{path}: is for a model of width {found}{what}; this one has {width} ({down} has shape {list(shape)})"
            )


def _deltas(file: TensorFile, module: _Module, peft: PeftConfig) -> list[Delta]:
    """The changes of a module's targets, of which a fused projection has several."""
    targets, parts = module.place.targets, module.parts
    whole = replace(targets[0], shape=(sum(t.shape[0] for t in targets), *targets[0].shape[1:]))
    reader = FormReader(file, module.name, whole, parts, peft)
    found: list[Delta] = []
    if name := parts.get(Part.DIFF_BIAS):
        if not whole.bias:
            raise AdapterError(f"{file.path}: {name}: {whole.name} has no bias in the model")
        found.append(Delta(whole, reader.whole(name, (whole.shape[0],)), bias=True))
    if name := parts.get(Part.DIFF):
        found.extend(_split(targets, reader.whole(name, whole.shape), 1.0, None))
    if not found or set(parts) - {Part.DIFF, Part.DIFF_BIAS, Part.ALPHA, Part.SCALE}:
        form, scale = reader.form()
        found.extend(_split(targets, form, scale, reader.magnitude()))
    return [delta for delta in found if delta.target.runs]


def _split(targets: tuple[Target, ...], form: Form, scale: float, magnitude: Values | None) -> list[Delta]:
    count = len(targets)
    if count == 1:
        return [Delta(targets[0], form, scale, magnitude)]
    if magnitude is not None and len(magnitude.shape) > 1 and magnitude.shape[1] != 1:
        raise AdapterError(
            f"{magnitude.file.path}: {magnitude.name}: DoRA of the columns of a fused projection is not supported"
        )
    return [
        Delta(target, form.part(i, count), scale, magnitude and magnitude.part(i, count))
        for i, target in enumerate(targets)
    ]


def _distinct(path: Path, modules: Iterable[tuple[_Module, list[Delta]]]) -> list[Delta]:
    """One change of each kind for each tensor. A file may hold a projection split and fused: the split one counts."""
    found: dict[tuple[str, str, bool], tuple[_Module, Delta]] = {}
    for module, deltas in modules:
        for delta in deltas:
            key = (delta.target.component, delta.tensor, isinstance(delta.form, Whole))
            other, known = found.get(key, (None, None))
            if other is None or known is None or (other.place.native and not module.place.native):
                found[key] = module, delta
            elif module.place.native == other.place.native and not _equal(known, delta):
                raise AdapterError(f"{path}: {module.name} and {other.name} are different changes of {delta.tensor}")
    return [delta for _, delta in found.values()]


def _equal(one: Delta, other: Delta) -> bool:
    rows = one.form.shape[0]
    return one.scale == other.scale and np.array_equal(one.form.rows(0, rows), other.form.rows(0, rows))


def _title(path: Path) -> str:
    texts = read_metadata(path)
    return " ".join([path.stem, *(texts[key] for key in ("modelspec.title", "ss_output_name") if key in texts)])


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(data_offset(path))
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
