"""Cuts the device code of other GPUs out of a shared library, so that it compresses to a fraction.

    python benchmarks/device/prune_fatbins.py LIBRARY OUT 90

A library that CUDA compiled holds "fat binaries": for each kernel, an entry per GPU generation. The entries of others
are zeroed in place, so that nothing moves and the library still loads; it then runs on the named generations alone. A
fat binary without an entry for them is left as it is.

Layout, found in libraries of CUDA 12 and 13: a header of 16 bytes (magic 0xba55ed50, version 1, its own size, the size
of what follows), then entries: a header (kind: 1 for PTX, 2 for machine code; its own size at byte 4; the payload's
size at byte 8; the generation at byte 28, "90" for 9.0), then the payload.
"""

import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, header's size, size of what follows
_ENTRY = struct.Struct("<HHIQ")  # kind, unknown, header's size, payload's size
_GENERATION_AT, _LEAST_HEADER, _MOST_HEADER = 28, 64, 4096
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class Entry:
    """One kernel's code for one generation."""

    kind: int
    generation: int
    start: int  # of the payload in the file
    size: int


@dataclass(frozen=True)
class Pruned:
    """What was there and what is left, in bytes by generation."""

    before: dict[int, int]
    after: dict[int, int]


def fat_binaries(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """The entries of each fat binary of a library."""
    at = data.find(_MAGIC)
    while at >= 0 and at + _HEADER.size <= len(data):
        _, version, own, size = _HEADER.unpack_from(data, at)
        end = at + own + size
        if version != 1 or own != _HEADER.size or end > len(data):  # the same bytes by chance
            at = data.find(_MAGIC, at + 1)
            continue
        yield list(_entries(data, at + own, end))
        at = data.find(_MAGIC, end)


def _entries(data: bytes | bytearray, at: int, end: int) -> Iterator[Entry]:
    while at + _LEAST_HEADER <= end:
        kind, _, own, size = _ENTRY.unpack_from(data, at)
        if kind not in (PTX, MACHINE_CODE) or not _LEAST_HEADER <= own <= _MOST_HEADER or at + own + size > end:
            return
        (generation,) = struct.unpack_from("<I", data, at + _GENERATION_AT)
        yield Entry(kind, generation, at + own, size)
        at += own + size


def prune(data: bytearray, keep: set[int]) -> Pruned:
    """Zeroes the code of all generations but `keep`, in place."""
    before: Counter[int] = Counter()
    after: Counter[int] = Counter()
    for entries in fat_binaries(data):
        kept = [entry for entry in entries if entry.kind == MACHINE_CODE and entry.generation in keep]
        for entry in entries:
            before[entry.generation] += entry.size
            if kept and entry not in kept:
                data[entry.start : entry.start + entry.size] = bytes(entry.size)
            else:
                after[entry.generation] += entry.size
    return Pruned(dict(before), dict(after))


def main() -> None:
    """The command line."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, target, generations = sys.argv[1:]
    data = bytearray(Path(source).read_bytes())
    found = prune(data, {int(text) for text in generations.split(",")})
    Path(target).write_bytes(data)
    for name, sizes in (("before", found.before), ("after", found.after)):
        print(name, {generation: f"{size / 1e6:.1f} MB" for generation, size in sorted(sizes.items())})


if __name__ == "__main__":
    main()
