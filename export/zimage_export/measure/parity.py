"""Distances between a bundle and its checkpoint: how they are computed, reported and judged."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.manifest import Manifest
from zimage_runtime.model.programs import Program

from ..errors import ExportError


def relative_error(value: FloatArray, expected: FloatArray) -> float:
    """The norm of the difference over the norm of the expected value."""
    difference = np.linalg.norm(value.astype(np.float64) - expected.astype(np.float64))
    return float(difference / np.linalg.norm(expected.astype(np.float64)))


def summarize(measured: Sequence[dict[str, float]], name: str, size: str, steps: int) -> dict[str, Any]:
    """The worst over the prompts. A PSNR of null stands for identical images."""
    worst = {key: max(m[key] for m in measured) for key in measured[0]}
    components = {p.value: _rounded(worst[p.value]) for p in Program if p.value in worst}
    return {
        "reference": f"{name} with diffusers in float32",
        "executor": "cpu",
        "size": size,
        "steps": steps,
        "prompts": len(measured),
        "relative_error": components,
        "latents": _rounded(worst["latents"]),
        "latents_median": _rounded(statistics.median(m["latents"] for m in measured)),
        "picture": {
            "psnr_db": _psnr(worst["mean_square"]),
            "psnr_db_median": _psnr(statistics.median(m["mean_square"] for m in measured)),
            "psnr_db_each": [_psnr(m["mean_square"]) for m in measured],
            "max_difference": int(worst["max_difference"]),
        },
    }


def _psnr(mean_square: float) -> float | None:
    return round(10 * math.log10(255**2 / mean_square), 2) if mean_square else None


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def check_gate(parity: dict[str, Any], manifest: Manifest) -> None:
    """Raises `ExportError` for a bundle that is further from its checkpoint than its precision allows."""
    gate = manifest.precision.gate
    latents, difference = parity["latents"], parity["picture"]["max_difference"]
    psnr = parity["picture"]["psnr_db"]
    psnr = math.inf if psnr is None else psnr
    if not (latents <= gate.latents and difference <= gate.max_difference and psnr >= gate.psnr_db):
        raise ExportError(
            f"the bundle is further from its checkpoint than {manifest.precision} allows: latents {latents} "
            f"(at most {gate.latents}), image {psnr} dB (at least {gate.psnr_db}), pixels {difference}/255 "
            f"(at most {gate.max_difference}/255)"
        )


def parity_table(parity: dict[str, Any]) -> str:
    """The parity document as a table for people."""
    image = parity["picture"]
    psnr = "identical" if image["psnr_db"] is None else f"{image['psnr_db']} dB"
    if parity["prompts"] > 1 and image["psnr_db_median"] is not None:
        psnr += f" (median {image['psnr_db_median']})"
    rows = [*((name, f"{error:.2e}") for name, error in parity["relative_error"].items())]
    rows += [
        ("latents", f"{parity['latents']:.2e}"),
        ("image", f"{psnr}, at most {image['max_difference']}/255 off"),
    ]
    title = f"against {parity['reference']}, {parity['size']}, {parity['steps']} steps, {parity['prompts']} prompts"
    return "\n".join([title, *(f"  {name:<14}{value}" for name, value in rows)])
