"""What a user writes for a LoRA: FILE, or FILE:WEIGHT."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AdapterError

MOST_WEIGHT = 1e4
"""Of either sign. Beyond it, products with a file's largest scale leave float32's range."""


@dataclass(frozen=True)
class GivenLora:
    """A file and how much of it counts."""

    file: str  # a path, or a name on the Hub
    weight: float = 1.0  # of any sign

    def __post_init__(self) -> None:
        """Raises `AdapterError` for a weight that is no number, or that no image survives."""
        if not abs(self.weight) <= MOST_WEIGHT:
            name = os.path.basename(self.file)  # not the folder, which a server keeps to itself
            raise AdapterError(
                f"the weight of {name} must be between -{MOST_WEIGHT:g} and {MOST_WEIGHT:g}, not {self.weight:g}"
            )

    @classmethod
    def parse(cls, text: str) -> "GivenLora":
        """Reads FILE[:WEIGHT]. What follows the last colon is a weight if it is a number, as in ``C:\\x.safetensors``
        it is not."""
        file, colon, weight = text.rpartition(":")
        if colon and file:
            try:
                return cls(file, float(weight))
            except ValueError:
                pass
        if not text:
            raise AdapterError("a LoRA's file has no name")
        return cls(text)


LoraInput = str | os.PathLike[str] | GivenLora | tuple[str | os.PathLike[str], float]
"""How a LoRA may be given in Python: FILE, "FILE:WEIGHT", or (FILE, WEIGHT)."""


def given_loras(values: Iterable[LoraInput]) -> tuple[GivenLora, ...]:
    """What was given, in one form. Raises `AdapterError`."""
    if isinstance(values, str | os.PathLike):
        raise AdapterError(f"loras must be a list of files, not {str(values)!r}")
    return tuple(_given(value) for value in values)


def _given(value: object) -> GivenLora:
    match value:
        case GivenLora():
            return value
        case str():
            return GivenLora.parse(value)
        case os.PathLike():
            return GivenLora(os.fspath(value))
        case (str() | os.PathLike() as file, int() | float() as weight) if not isinstance(weight, bool):
            return GivenLora(os.fspath(file), float(weight))
    raise AdapterError(f"a LoRA must be a file, or (file, weight), not {value!r}")
