"""LoRA that become part of a checkpoint: its tensors are changed as they are read, in float32, a few rows at a time.

What reads the checkpoint (folding, rebalancing, quantizing, measuring) sees the changed model and needs not know.

A DoRA sets the norms of the changed weight's rows: W' = magnitude · (W + Δ) / ‖W + Δ‖, with its weight in Δ, as it does
at run time (`zimage_runtime.adapters.dora`, which is as PEFT has it); LyCORIS has it of columns, too. (ComfyUI divides
by the norms of the *unchanged* rows, and diffusers drops ``dora_scale``.)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimage_runtime.adapters.dora import EPSILON, row_factors
from zimage_runtime.adapters.given import GivenLora
from zimage_runtime.adapters.reader import Delta, WeightedAdapter, read_adapter
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.hub import adapter_file
from zimage_runtime.bundle.tensors import DType
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.errors import AdapterError
from zimage_runtime.model.config import ModelConfig

from .checkpoint import Checkpoint
from .tensors import TensorSource, check_finite
from .weights import Weights

_PIECE_BYTES = 4 << 20  # of float32


@dataclass
class Change:
    """A change of one tensor."""

    delta: Delta
    weight: float
    path: Path  # of its file
    _column_norms: FloatArray | None = None

    def applied(self, first: int, changed: FloatArray, original: FloatArray, whole: TensorSource) -> FloatArray:
        """Rows of the tensor, from `first` on, as earlier changes left them: changed once more."""
        change = self._delta_rows(first, len(original), original.shape[1:])
        found: FloatArray = changed + change
        if self.delta.magnitude is None:
            return found
        if self.delta.magnitude_of_rows:
            magnitudes = self.delta.magnitude.rows(first, first + len(original))
            found *= row_factors(original + change, magnitudes)[:, None]
        else:
            found *= self.delta.magnitude.read() / (self._norms_of_columns(whole) + EPSILON)
        return found

    def _delta_rows(self, first: int, count: int, rest: tuple[int, ...]) -> FloatArray:
        form = self.delta.form
        if len(form.shape) == 1:  # a vector is one row
            return np.float32(self.weight) * form.rows(0, form.shape[0]).reshape(count, *rest)
        return np.float32(self.delta.scale * self.weight) * form.rows(first, first + count)

    def _norms_of_columns(self, whole: TensorSource) -> FloatArray:
        if self._column_norms is None:
            squares = np.zeros(whole.shape[1], np.float64)
            for first, rows in _rows(whole):
                changed = rows + self._delta_rows(first, len(rows), rows.shape[1:])
                squares += np.square(changed, dtype=np.float64).sum(axis=0)
            self._column_norms = np.sqrt(squares).astype(np.float32)[None]
        return self._column_norms


@dataclass(frozen=True)
class MergedTensor(TensorSource):
    """A tensor with its changes, in float32. Reading raises `AdapterError` where a change exceeds float32."""

    original: TensorSource
    changes: tuple[Change, ...]

    @classmethod
    def of(cls, original: TensorSource, changes: Sequence[Change]) -> "MergedTensor":
        """The tensor that a checkpoint has, changed."""
        return cls(original.name, original.path, original, tuple(changes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.original.shape

    @property
    def dtype(self) -> DType:
        """Sums are in float32, whatever the file stores."""
        return DType.F32

    @property
    def stored_as(self) -> str:
        """How its values come: no longer as the file stores them."""
        return DType.F32

    def chunks(self, max_bytes: int = _PIECE_BYTES) -> Iterator[NDArray[np.generic]]:
        """The elements, flat, in whole rows of at most `max_bytes`, or one; by default few, for changes take memory."""
        return super().chunks(max_bytes)

    def _elements(self, first: int, count: int) -> NDArray[np.generic]:
        original = self.original.rows(first, count)
        changed = original
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            for change in self.changes:
                changed = change.applied(first, changed, original, self.original)
        if not np.isfinite(changed).all():
            check_finite(original, self.name, self.path)
            files = " and ".join(sorted({str(change.path) for change in self.changes}))
            raise AdapterError(f"{files}: changes {self.name} to values that are not finite; give a smaller weight")
        return changed.reshape(-1)


def _rows(source: TensorSource) -> Iterator[tuple[int, FloatArray]]:
    for first, count in _ranges(source, _PIECE_BYTES):
        yield first, source.rows(first, count)


def _ranges(source: TensorSource, max_bytes: int) -> Iterator[tuple[int, int]]:
    """First rows and counts. A vector is one row."""
    if len(source.shape) < 2:
        yield 0, 1
        return
    step = max(max_bytes // (4 * source.shape[1]), 1)
    for first in range(0, source.shape[0], step):
        yield first, min(step, source.shape[0] - first)


def read_loras(
    given: Sequence[GivenLora], config: ModelConfig, *, allow_unused: bool, progress: Progress | None = None
) -> list[WeightedAdapter]:
    """Reads files that are to be merged, fetched if they are on the Hub. Raises `AdapterError` or `HubError`."""
    paths = [adapter_file(lora.file, progress) for lora in given]
    return [
        WeightedAdapter(read_adapter(path, config, allow_unused=allow_unused), lora.weight)
        for path, lora in zip(paths, given, strict=True)
    ]


def with_loras(checkpoint: Checkpoint, loras: Sequence[WeightedAdapter]) -> Checkpoint:
    """The checkpoint whose tensors have the files' changes, named after all of them."""
    changes: dict[str, dict[str, list[Change]]] = {}
    for lora in loras:
        for delta in lora.adapter.deltas if lora.weight else ():
            tensors = changes.setdefault(delta.target.component, {})
            tensors.setdefault(delta.tensor, []).append(Change(delta, lora.weight, lora.adapter.path))

    def merged(component: str) -> Weights:
        weights = checkpoint.weights(component)
        tensors = changes.get(component, {}).items()
        return weights.with_tensors(
            {name: MergedTensor.of(weights.get(name, _shape(some[0].delta)), some) for name, some in tensors}
        )

    name = "+".join([checkpoint.name, *(_name(lora) for lora in loras)])
    text_encoder, transformer = merged("text_encoder"), merged("transformer")
    return dataclasses.replace(checkpoint, name=name, text_encoder=text_encoder, transformer=transformer)


def _shape(delta: Delta) -> tuple[int, ...]:
    return (delta.target.shape[0],) if delta.bias else delta.target.shape


def _name(lora: WeightedAdapter) -> str:
    return lora.adapter.name if lora.weight == 1 else f"{lora.adapter.name}:{lora.weight:g}"
