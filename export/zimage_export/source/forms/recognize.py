"""The tensors of safetensors files, with each quantized weight and its scales as one tensor.

Forms are recognized by what is in the file, never by its name. A weight without the scales that belong to it, and a
marker without what it promises, are errors that name the tensor: read as plain numbers, such weights give white images.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ..tensors import FLOATING, FileTensor, PlainTensor
from .block_scaled import BLOCKS, MXFP8, NVFP4, BlockScaledTensor, scale_bytes
from .markers import LAYER_MARKER, LayerFormat, fp8_prefixes, is_file_marker, layer_formats
from .scaled import CODES, E4M3, E5M2, INT8, ScaledTensor, is_rotation_size
from .unserved import refuse_unserved, unserved_format

_SCALES = (".weight_scale", ".scale_weight")
_COMPANIONS = (*_SCALES, ".weight_scale_2", ".input_scale", ".scale_input", ".pre_quant_scale", LAYER_MARKER)
_FP8_FORMATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
_INT8_FORMAT = "int8_tensorwise"
_DEFAULT_ROTATION = 256
_BYTES = ("U8", E4M3)


def recognize(found: Mapping[str, PlainTensor], metadata: Mapping[str, str], where: Path) -> dict[str, FileTensor]:
    """The tensors by the file's names, without markers and scales. Raises `CheckpointError`."""
    refuse_unserved(found, metadata, where)
    reader = _Recognizer(found, layer_formats(found, metadata, where), fp8_prefixes(found))
    for name, tensor in found.items():
        weight = _weight_of(name)
        if weight is not None and weight not in found:
            raise CheckpointError(f"{tensor.path}: {name} belongs to {weight}, which is not in the file")
    return {name: reader.tensor(name) for name in found if not _is_companion(name, found)}


def _weight_of(name: str) -> str | None:
    """The weight that a scale belongs to."""
    ending = next((ending for ending in (*_SCALES, ".weight_scale_2") if name.endswith(ending)), None)
    return f"{name.removesuffix(ending)}.weight" if ending else None


def _is_companion(name: str, found: Mapping[str, PlainTensor]) -> bool:
    return is_file_marker(name) or name.endswith(_COMPANIONS)


class _Recognizer:
    def __init__(
        self, found: Mapping[str, PlainTensor], formats: Mapping[str, LayerFormat], prefixes: Mapping[str, str]
    ) -> None:
        self._found, self._formats, self._prefixes = found, formats, prefixes

    def tensor(self, name: str) -> FileTensor:
        """One tensor, with its scales if it is quantized."""
        tensor = self._found[name]
        layer = name.removesuffix(".weight") if name.endswith(".weight") else None
        if layer is not None and layer in self._formats:
            return self._marked(tensor, layer, self._formats[layer])
        if layer is not None and (scale := self._scale(layer)):
            return self._scaled_by_marker_of_file(tensor, layer, scale)
        if tensor.stored_as not in (E4M3, E5M2):
            return tensor
        if len(tensor.shape) > 1 and self._file_codes(name):
            raise self._lacking(tensor, f"{layer or name}.scale_weight")
        return self._scaled(tensor, tensor.stored_as)

    def _scale(self, layer: str) -> PlainTensor | None:
        return next((self._found[layer + ending] for ending in _SCALES if layer + ending in self._found), None)

    def _file_codes(self, name: str) -> str | None:
        """The type of fp8 weights that the older marker states for a tensor's prefix."""
        return next((codes for prefix, codes in self._prefixes.items() if name.startswith(prefix)), None)

    def _scaled_by_marker_of_file(self, tensor: PlainTensor, layer: str, scale: PlainTensor) -> FileTensor:
        """A weight with a scale, whose layer has no marker of its own."""
        codes = self._file_codes(tensor.name) if tensor.stored_as == "U8" else tensor.stored_as
        if codes not in CODES:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has the scale {scale.name}, but is {tensor.stored_as} without a marker "
                f"({layer}{LAYER_MARKER}) that says what its bytes are"
            )
        return self._scaled(tensor, codes, scale)

    def _marked(self, tensor: PlainTensor, layer: str, marker: LayerFormat) -> FileTensor:
        if marker.format in _FP8_FORMATS:
            codes = _FP8_FORMATS[marker.format]
            self._check_stored(tensor, marker.format, (codes, "U8"))
            return self._scaled(tensor, codes, self._need_scale(tensor, layer))
        if marker.format == _INT8_FORMAT:
            self._check_stored(tensor, marker.format, (INT8,))
            return self._scaled(tensor, INT8, self._need_scale(tensor, layer), _rotation(tensor, marker))
        if marker.format in BLOCKS:
            return self._blocks(tensor, layer, marker.format)
        raise unserved_format(tensor, marker.format)

    def _need_scale(self, tensor: PlainTensor, layer: str) -> PlainTensor:
        scale = self._scale(layer)
        if scale is None:
            raise self._lacking(tensor, f"{layer}.weight_scale")
        return scale

    def _lacking(self, tensor: PlainTensor, scale: str) -> CheckpointError:
        return CheckpointError(f"{tensor.path}: {tensor.name} is quantized, but its scale {scale} is not in the file")

    def _check_stored(self, tensor: PlainTensor, form: str, types: tuple[str, ...]) -> None:
        if tensor.stored_as not in types:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is marked as {form}, but is {tensor.stored_as} of shape "
                f"{list(tensor.shape)}; {form} is stored as {' or '.join(types)}"
            )

    def _scaled(
        self, tensor: PlainTensor, codes: str, scale: PlainTensor | None = None, rotation: int = 0
    ) -> ScaledTensor:
        _check_size(tensor, int(np.prod(tensor.shape)))
        if scale is not None:
            _check_floating(scale)
            _check_scale_shape(tensor, scale)
            if f"{tensor.name.removesuffix('.weight')}.pre_quant_scale" in self._found:
                raise CheckpointError(f"{tensor.path}: {tensor.name} has a pre_quant_scale, which is of NVFP4 alone")
        return ScaledTensor(tensor.name, tensor.path, tensor.entry, codes, scale, rotation)

    def _blocks(self, tensor: PlainTensor, layer: str, form: str) -> BlockScaledTensor:
        self._check_stored(tensor, form, ("U8",) if form == NVFP4 else (E4M3, "U8"))
        scales = self._need_scale(tensor, layer)
        if len(tensor.shape) != 2:
            raise CheckpointError(f"{tensor.path}: {tensor.name} is {form} of shape {list(tensor.shape)}, no matrix")
        rows, width = tensor.shape[0], tensor.shape[1] * (2 if form == NVFP4 else 1)
        _check_size(tensor, int(np.prod(tensor.shape)))
        needed = scale_bytes(rows, width, form)
        stored = ("U8", "F8_E8M0") if form == MXFP8 else _BYTES
        if width % BLOCKS[form] or scales.stored_as not in stored or scales.entry.nbytes != needed:
            raise CheckpointError(
                f"{tensor.path}: {scales.name} is {scales.stored_as} of {scales.entry.nbytes} bytes; the {form} scales "
                f"of a matrix of {rows} x {width} are {needed} bytes"
            )
        whole, inputs = None, self._found.get(f"{layer}.pre_quant_scale")
        if form == NVFP4:
            whole = self._found.get(f"{layer}.weight_scale_2")
            if whole is None:
                raise self._lacking(tensor, f"{layer}.weight_scale_2")
            _check_floating(whole, 1)
        if inputs is not None:
            _check_floating(inputs, width)
        return BlockScaledTensor(
            tensor.name, tensor.path, form, tensor.entry, scales.entry, scales.path, whole, inputs, 0, rows
        )


def _check_size(tensor: PlainTensor, nbytes: int) -> None:
    if tensor.entry.nbytes != nbytes:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name}: {tensor.entry.nbytes} bytes do not make {tensor.stored_as} of shape "
            f"{list(tensor.shape)}"
        )


def _check_floating(tensor: PlainTensor, count: int | None = None) -> None:
    if tensor.stored_as not in FLOATING or (count is not None and np.prod(tensor.shape) != count):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is {tensor.stored_as} of shape {list(tensor.shape)}, which is no scale"
        )


def _check_scale_shape(tensor: PlainTensor, scale: PlainTensor) -> None:
    """One scale, one for each row, or one for each block of a row's values."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    width = int(np.prod(tensor.shape)) // max(rows, 1)
    shape = scale.shape[:-1] if len(scale.shape) == 3 and scale.shape[-1] == 1 else scale.shape
    one = int(np.prod(shape)) == 1
    by_row = shape in ((rows,), (rows, 1))
    by_block = len(shape) == 2 and shape[0] == rows and shape[1] > 0 and width % shape[1] == 0
    if not (one or by_row or by_block):
        raise CheckpointError(
            f"{scale.path}: {scale.name} has shape {list(scale.shape)}, which does not fit {tensor.name} of shape "
            f"{list(tensor.shape)}"
        )


def _rotation(tensor: PlainTensor, marker: LayerFormat) -> int:
    if not marker.options.get("convrot", False):
        return 0
    size = marker.options.get("convrot_groupsize", _DEFAULT_ROTATION)
    if not isinstance(size, int) or not is_rotation_size(size) or tensor.shape[-1] % size:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} of shape {list(tensor.shape)} is marked as rotated in groups of {size}"
        )
    return size
