"""What `zimage-rt doctor` reports of an executor on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How much a finding about the machine matters."""

    OK = "ok"
    NOTE = "note"  # worth knowing; images can be generated
    PROBLEM = "problem"  # something is broken, and the text says what to do


@dataclass(frozen=True)
class Examination:
    """What an executor found when it examined itself."""

    verdict: Verdict
    text: str  # one line
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON's own types
