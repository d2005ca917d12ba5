"""Quantized forms that are recognized and refused, each with its reason.

They hold more than weights and scales: corrections of low rank, codebooks, smoothing of activations, or values that
were rounded to 4 bits for one library's kernels. Their makers publish the unquantized weights too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from ..tensors import PlainTensor

_INSTEAD = "use the bf16, fp8, int8 or GGUF file"


@dataclass(frozen=True)
class _Form:
    title: str
    names: re.Pattern[str]  # of tensors that only this form has
    reason: str


_FORMS = (
    _Form(
        "nunchaku (SVDQuant)",
        re.compile(r"\.(wscales|wcscales|wtscale|smooth_factor|smooth_factor_orig|proj_down)$"),
        "its 4-bit weights need a correction of low rank",
    ),
    _Form(
        "bitsandbytes",
        re.compile(r"\.(quant_state\.bitsandbytes__\w+|absmax|quant_map|nested_absmax|SCB)$"),
        "its blocks are packed for that library's kernels",
    ),
    _Form(
        "SDNQ", re.compile(r"\.(svd_up|svd_down|zero_point)$"), "its layers carry zero points and low-rank corrections"
    ),
    _Form("quanto", re.compile(r"\.weight\._(data|scale|shift)$"), "its tensors are packed for that library"),
    _Form(
        "torchao",
        re.compile(r"(\.weight_qdata|_weight_qdata|\.weight:qdata)$"),
        "its tensors are packed for that library",
    ),
    _Form("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$"), "its 4-bit weights have zero points"),
    _Form(
        "W4A8", re.compile(r"\.(weight_s_rel|weight_s_channel|weight_codebook)$"), "its 4-bit weights have a codebook"
    ),
    _Form(
        "fp8 in blocks of 128 x 128", re.compile(r"\.weight_scale_inv$"), "no maker of Z-Image files is known to use it"
    ),
)

_FORMATS = {
    "convrot_w4a4": "W4A4: its weights have 4 bits, made for 4-bit activations",
    "asym_w4a8_int8": "W4A8: its 4-bit weights have a codebook",
}


def refuse_unserved(found: Mapping[str, PlainTensor], metadata: Mapping[str, str], where: Path) -> None:
    """Raises `CheckpointError` for a file in one of these forms, with its name and the reason."""
    for form in _FORMS:
        name = next((name for name in found if form.names.search(name)), None)
        if name is not None:
            raise CheckpointError(
                f"{where}: is quantized with {form.title}, which is not supported: {form.reason} (it contains {name}); "
                f"{_INSTEAD}"
            )
    if "quantization_config" in metadata:
        method = _method(metadata["quantization_config"])
        raise CheckpointError(f"{where}: is quantized with {method}, which is not supported; {_INSTEAD}")


def unserved_format(tensor: PlainTensor, form: str) -> CheckpointError:
    """The error for a layer whose marker names a format that is not read."""
    reason = _FORMATS.get(form, "this version does not know it")
    return CheckpointError(f"{tensor.path}: {tensor.name} is quantized as {form}, not supported: {reason}; {_INSTEAD}")


def refuse_quantized_config(config: Mapping[str, object], where: Path) -> None:
    """Raises `CheckpointError` for a component whose ``config.json`` has a `quantization_config`."""
    said = config.get("quantization_config")
    if said is None:
        return
    method = said.get("quant_method", said.get("quant_type")) if isinstance(said, dict) else None
    raise CheckpointError(
        f"{where}: quantization_config says that the weights are quantized with {method or 'some library'}, which "
        f"is not supported; use the unquantized checkpoint, or a single file in fp8, int8 or GGUF"
    )


def _method(text: str) -> str:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    method = said.get("quant_method", said.get("method")) if isinstance(said, dict) else None
    return str(method) if method else "nunchaku (SVDQuant)"
