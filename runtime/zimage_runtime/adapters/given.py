"""What a user writes for a LoRA: FILE, or FILE:WEIGHT."""

import math
from dataclasses import dataclass

from ..errors import AdapterError


@dataclass(frozen=True)
class GivenLora:
    """A file and how much of it counts."""

    file: str  # a path, or a name on the Hub
    weight: float = 1.0  # of any sign

    def __post_init__(self) -> None:
        """Raises `AdapterError` for a weight that is no number."""
        if not math.isfinite(self.weight):
            raise AdapterError(f"the weight of {self.file} must be a finite number, not {self.weight}")

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
