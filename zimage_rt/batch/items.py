"""Rows that were checked against the bundle: what will be generated, or all that is wrong, before anything is.

An item's key is a hash of its id and of all that decides its image: the request with its defaults filled in, the pixels
of its source images, its LoRA, the bundle. What computes it (executor, library) is not part of it: done is done.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_runtime.errors import ExecutorError, ZImageRuntimeError
from zimage_runtime.job import Checked, Job

from .fields import RowRequest, folded, row_request
from .rows import BadRow, Read

Check = Callable[[Any], Checked | Job]
"""Checks a request; raises `ZImageRuntimeError`."""


@dataclass(frozen=True)
class Shape:
    """What rows of one group share."""

    width: int
    height: int
    loras: tuple[tuple[str, float], ...]  # hash and weight
    controlnet: str | None  # its fingerprint


@dataclass(frozen=True)
class Item:
    """A row that can be generated."""

    line: int  # of the file, from 1
    request: RowRequest
    key: str
    shape: Shape
    steps: int  # that are taken
    prompts: tuple[str, ...]  # which are encoded
    sourced: bool  # whether there is an image to encode
    cut_tokens: int  # of the prompts, which the model does not see

    @property
    def id(self) -> str:
        """The name of its image, without extension."""
        return self.request.id

    @property
    def file(self) -> str:
        """The name of its image."""
        return f"{self.id}.png"

    @property
    def seed(self) -> int:
        """The seed, given or derived."""
        return int(self.request.values["seed"])


def check_rows(
    rows: Sequence[Read], folder: Path, check: Check, *, metadata: bool, advance: Callable[[int], object]
) -> tuple[list[Item], list[BadRow]]:
    """All items, and all rows that are wrong. `check` does it against the bundle; paths are relative to `folder`."""
    items: list[Item] = []
    bad: list[BadRow] = []
    lines: dict[str, int] = {}
    for row in rows:
        advance(1)
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            request = row_request(row, folder)
            first = lines.setdefault(folded(request.id), row.line)
            if first != row.line:
                bad.append(BadRow(row.line, f"id {request.id!r} is the one of line {first}, too"))
                continue
            items.append(_item(row.line, request, check(request.request()), metadata))
        except ExecutorError:
            raise
        except ZImageRuntimeError as error:
            bad.append(BadRow(row.line, str(error)))
    return items, sorted(bad, key=lambda one: one.line)


def _item(line: int, request: RowRequest, checked: Checked | Job, metadata: bool) -> Item:
    content = replace(checked.info, executor="", program=None, activation_bits=None, library=None).replay()
    prompts = [checked.positive] + ([] if checked.negative is None else [checked.negative])
    return Item(
        line=line,
        request=request,
        key=hashlib.sha256("\n".join((request.id, str(metadata), content)).encode()).hexdigest(),
        shape=Shape(
            checked.info.width,
            checked.info.height,
            tuple((one.hash, one.weight) for one in checked.info.loras),
            checked.info.controlnet_hash,
        ),
        steps=checked.schedule.steps - checked.first_step,
        prompts=tuple(prompt.text for prompt in prompts),
        sourced=checked.source is not None or checked.control is not None,
        cut_tokens=sum(prompt.cut_tokens for prompt in prompts),
    )


def groups(items: Iterable[Item], most: int = 64, most_bytes: int = 256 << 20) -> list[list[Item]]:
    """Items of one shape together, those that share prompts beside each other, at most `most` in a group.

    Groups without LoRA come first: programs that take LoRA stay loaded for the others. Source images are in memory for
    all of a group, at most `most_bytes` of them.
    """
    shapes: dict[Shape, dict[tuple[int, tuple[str, ...]], list[Item]]] = {}
    for item in items:
        shapes.setdefault(item.shape, {}).setdefault((item.steps, item.prompts), []).append(item)
    found = []
    for shape in sorted(shapes, key=lambda shape: bool(shape.loras)):
        ordered = [item for alike in shapes[shape].values() for item in alike]
        sourced = any(item.sourced for item in ordered)
        pixels = 4 * 3 * shape.width * shape.height
        size = min(most, max(most_bytes // pixels, 1)) if sourced else most
        found += [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return found
