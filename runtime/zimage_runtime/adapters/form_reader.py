"""The tensors of one module of an adapter's file, as one change of its weight. What is wrong is named by its tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.tensors import DType, TensorFile
from ..errors import AdapterError
from .forms import Factor, Form, Hadamard, Kronecker, LowRank, Values, Whole
from .names import Part
from .scales import PeftConfig, checked_scale, scalar
from .targets import Target

_LABELS = {Part.DOWN: "lora_A (lora_down)", Part.UP: "lora_B (lora_up)"}
_LOW_RANK = {Part.DOWN, Part.UP}
_HADAMARD = {Part.H1_A, Part.H1_B, Part.H2_A, Part.H2_B}
_KRONECKER = {Part.W1, Part.W1_A, Part.W1_B, Part.W2, Part.W2_A, Part.W2_B}
_BESIDE = {Part.ALPHA, Part.SCALE, Part.MAGNITUDE, Part.DIFF, Part.DIFF_BIAS}


@dataclass(frozen=True)
class FormReader:
    """Reads one module. Everything that is wrong with it is named by its tensor."""

    file: TensorFile
    module: str
    target: Target  # as a whole, where it is a fused projection
    parts: Mapping[Part, str]
    peft: PeftConfig

    def fail(self, text: str) -> AdapterError:
        """The error: the caller raises it."""
        return AdapterError(f"{self.file.path}: {text}")

    def values(self, name: str) -> Values:
        """A tensor of finite floating-point values, which is not empty."""
        entry = self.file.entries[name]
        if entry.dtype not in (DType.F32, DType.F16, DType.BF16):
            raise self.fail(f"{name} is stored as {entry.dtype}, which is not supported; save it in F32, F16 or BF16")
        if entry.nbytes == 0:
            raise self.fail(f"{name} is empty: its shape is {list(entry.shape)}")
        if not _finite(*self.file.array(name)):
            raise self.fail(f"{name} contains values that are not finite; download or copy the file again")
        return Values.of(self.file, name)

    def matrix(self, part: Part) -> Values:
        """A part that must be there, with two axes."""
        name = self.parts.get(part)
        if name is None:
            have = ", ".join(sorted(self.parts.values()))
            raise self.fail(f"{self.module} has {have}, but no {_LABELS.get(part, part.value)}; the file is incomplete")
        values = self.values(name)
        if len(values.shape) != 2:
            raise self.fail(f"{name} has shape {list(values.shape)}, it must have two axes")
        return values

    def whole(self, name: str, shape: tuple[int, ...]) -> Whole:
        """A change as it is."""
        values = self.values(name)
        if values.shape != shape:
            raise self.fail(f"{name} has shape {list(values.shape)}, {self.target.name} in the model has {list(shape)}")
        return Whole(values)

    def form(self) -> tuple[Form, float]:
        """The module's change of its weight, and its scale."""
        if not self.target.linear:
            raise self.fail(f"{next(iter(self.parts.values()))}: {self.target.name} is no linear layer")
        given = set(self.parts) - _BESIDE
        kind = next((kind for kind in (_LOW_RANK, _HADAMARD, _KRONECKER) if given & kind), None)
        if kind is None:
            names = ", ".join(self.parts.values())
            raise self.fail(f"{names}: {self.module} has nothing else in the file; it is incomplete")
        if extra := given - kind:
            names = ", ".join(self.parts[part] for part in sorted(extra))
            raise self.fail(f"{self.module} is changed in two ways at once, the other by {names}")
        if kind is _KRONECKER:
            return self._kronecker()
        if kind is _HADAMARD:
            return self._hadamard(), self._scale(self.matrix(Part.H1_B).shape[0])
        return self._low_rank(), self._scale(self.matrix(Part.DOWN).shape[0])

    def _low_rank(self) -> LowRank:
        down, up = self.matrix(Part.DOWN), self.matrix(Part.UP)
        out, width = self.target.shape
        if (down.shape[1], up.shape[0]) != (width, out):
            if (down.shape[0], up.shape[1]) == (width, out):
                raise self.fail(f"{down.name} is transposed: its shape is {list(down.shape)}, not [rank, {width}]")
            raise self.fail(
                f"{down.name} {list(down.shape)} and {up.name} {list(up.shape)} do not fit {self.target.name}, "
                f"which is [{out}, {width}] in the model"
            )
        self._same_rank(up, down)
        return LowRank(up, down)

    def _same_rank(self, left: Values, right: Values) -> None:
        if left.shape[1] != right.shape[0]:
            raise self.fail(
                f"{right.name} has rank {right.shape[0]} and {left.name} has rank {left.shape[1]}: they do not multiply"
            )

    def _hadamard(self) -> Hadamard:
        a, b, c, d = (self.matrix(part) for part in (Part.H1_A, Part.H1_B, Part.H2_A, Part.H2_B))
        self._same_rank(a, b)
        self._same_rank(c, d)
        for left, right in ((a, b), (c, d)):
            self._check_shape((left.shape[0], right.shape[1]), left.name)
        return Hadamard(a, b, c, d)

    def _kronecker(self) -> tuple[Kronecker, float]:
        w1, w2 = self._factor(Part.W1, Part.W1_A, Part.W1_B), self._factor(Part.W2, Part.W2_A, Part.W2_B)
        form = Kronecker(w1, w2)
        self._check_shape(form.shape, next(iter(self.parts.values())))
        # alpha counts where a side is a product; with both sides whole, trainers write any number, 1e10 for one
        rank = w2.rank or w1.rank
        return form, 1.0 if rank is None else self._scale(rank)

    def _factor(self, whole: Part, a: Part, b: Part) -> Factor:
        if whole in self.parts:
            if a in self.parts or b in self.parts:
                raise self.fail(f"{self.parts[whole]} is there twice, whole and as a product")
            return Factor(whole=self.matrix(whole))
        if a not in self.parts and b not in self.parts:
            self.matrix(whole)  # which says what is missing
        left, right = self.matrix(a), self.matrix(b)
        self._same_rank(left, right)
        return Factor(a=left, b=right)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> None:
        if shape != self.target.shape:
            raise self.fail(
                f"{name} makes a change of shape {list(shape)}, {self.target.name} in the model has "
                f"{list(self.target.shape)}"
            )

    def _scale(self, rank: int) -> float:
        if name := self.parts.get(Part.SCALE):
            scale = scalar(self.file, name)
            return checked_scale(scale, scale, f"{self.file.path}: {name}")
        if name := self.parts.get(Part.ALPHA):
            alpha = scalar(self.file, name)
            return checked_scale(alpha / rank, alpha, f"{self.file.path}: {name}")
        return self.peft.scale(self.module, rank)

    def magnitude(self) -> Values | None:
        """DoRA's norms, if it has some."""
        name = self.parts.get(Part.MAGNITUDE)
        if name is None:
            return None
        values, (out, width) = self.values(name), self.target.shape
        if values.shape not in ((out,), (out, 1), (1, width)):
            raise self.fail(f"{name} has shape {list(values.shape)}, it must be [{out}] or [1, {width}]")
        return values


def _finite(values: NDArray[Any], dtype: DType) -> bool:
    """Whether all values are: in 16 bits, whether no exponent has all its bits set."""
    exponent = {DType.BF16: 0x7F80, DType.F16: 0x7C00}.get(dtype)
    if exponent is None:
        return bool(np.isfinite(values).all())
    return not bool(((values.view(np.uint16) & np.uint16(exponent)) == exponent).any())
