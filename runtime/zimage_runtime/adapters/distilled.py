"""LoRA that make a model generate in few steps, told by their names: which request they are made for."""

import re

from .reader import Adapter

_STEPS = re.compile(r"(?<![\d.])(\d{1,2})[ _-]?steps?(?![a-z])", re.IGNORECASE)
_KIND = re.compile(r"distill|lightning|turbo|hyper|dmd|lcm", re.IGNORECASE)
_FEW = 16


def misfit(adapter: Adapter, steps: int, *, guided: bool, defaults: int) -> str | None:
    """What does not fit a request, as a line; None for a file that is not distilled, or where all fits.

    `defaults` are the steps that the model itself takes: a file that only says so many is not distilled.
    """
    found = _STEPS.search(adapter.title)
    count = int(found[1]) if found else None
    distilled = bool(_KIND.search(adapter.title)) or (count is not None and count != defaults)
    if not distilled or (count is not None and count > _FEW):
        return None
    wrong = []
    if count is not None and steps != count:
        wrong.append(f"is made for {count} steps, and {steps} were asked for")
    if count is not None and guided:
        wrong.append("is made for images without guidance: leave out --cfg-scale")
    return f"{adapter.name} {' and '.join(wrong)}" if wrong else None
