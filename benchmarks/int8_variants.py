"""Ways to bring int8 and int4 nearer to float32, each built and compared: PSNR of the demo model's images.

    PYTHONPATH=.:tests python benchmarks/int8_variants.py --work DIR [--prompts 240] [--only NAME ...]

For the demo model and for the same model with loud channels (50 times the others', planted so that its images stay the
same), every variant is built, and generates the same held-out prompts and seeds as the fp32 bundle. PSNR is against
that bundle's images. The variants are tried here and are no part of the product unless it says so. What they change:

- rebalanced: channels are made alike before they are quantized, as `--precision int8` does;
- rotated: activations are multiplied by a regular Hadamard matrix in groups at run time, as for ConvRot;
- heads: each head's values are rotated in the weights of `to_v` and `to_out`, which costs nothing at run time;
- feedback: rounding errors of a weight are made up for by its other columns, see `error_feedback`.
"""

import argparse
import json
import shutil
import unittest.mock
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_tools import with_loud_channels
from common import RESULTS, describe, machine, markdown_table, write_results
from error_feedback import Moments, int4_with_feedback, int8_with_feedback, measured_moments
from numpy.typing import NDArray

from demo_model.captions import caption
from demo_model.scenes import random_scene
from demo_model.scoring import held_out_requests
from zimage_export.build import BuildOptions, build
from zimage_export.measure.calibrate import measure_peaks
from zimage_export.source.checkpoint import Checkpoint
from zimage_export.source.tensors import TensorSource
from zimage_export.storage.precision import Encoding, StoragePolicy
from zimage_export.storage.quantize import blocks4, blocks8, int8_rows, quantized
from zimage_export.storage.stored import StoredTensor
from zimage_export.weights.folding import blocks
from zimage_export.weights.rebalance import Ranges, Rebalancing, measured_ranges
from zimage_rt import Pipeline
from zimage_rt.bench.accuracy import psnr_db
from zimage_runtime.arrays import FloatArray
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.bundle.rebalancing import PLACES, Factors
from zimage_runtime.bundle.tensors import DType, encode_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.machine.int8_products import activation_bits
from zimage_runtime.model.config import ModelConfig
from zimage_runtime.model.hadamard import hadamard
from zimage_runtime.model.linears import LAYER_LINEARS, layer_linears

DEMO = Path(__file__).parents[1] / "demo_model" / "tiny"
QUIET = Progress(quiet=True)
CALIBRATION = 8  # prompts of the training's kind in each language; none of them is held out
_GROUP = 256
WHOLE = 1 << 20  # inputs: more than any linear has

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Variant:
    """One way to quantize."""

    name: str
    precision: Precision = Precision.INT8
    rebalanced: bool = True
    rotated: bool = False
    heads: bool = False
    feedback: int = 0  # within groups of so many inputs; 0 for none
    calibrated: bool = False  # rebalanced by measured ranges
    only_loud: bool = False  # rebalanced only where a channel's factor is far from the others'
    product: bool = False  # by the product's own command, with `--calibrate` where it is calibrated


REFERENCE = Variant("fp32", Precision.FP32, product=True)
INT8, INT4 = Variant("int8"), Variant("int4", Precision.INT4, rebalanced=False)
BASELINES = tuple(replace(one, name=f"{one.name} (the product)", product=True) for one in (INT8, INT4))
VARIANTS = (
    *BASELINES,
    *(replace(one, name=f"{one.name} with --calibrate", calibrated=True, product=True) for one in (INT8, INT4)),
    replace(INT8, name="int8, calibrated", calibrated=True),
    replace(INT8, name="int8, not rebalanced", rebalanced=False),
    replace(INT8, name="int8, rotated, not rebalanced", rebalanced=False, rotated=True),
    replace(INT8, name="int8, rebalanced, then rotated", rotated=True),
    replace(INT8, name="int8, only loud channels rebalanced", only_loud=True),
    replace(INT8, name="int8, only loud channels rebalanced, feedback in groups of 256", only_loud=True, feedback=256),
    replace(INT8, name="int8, heads, not rebalanced", rebalanced=False, heads=True),
    replace(INT8, name="int8, heads, then rebalanced", heads=True),
    replace(INT8, name="int8, feedback", feedback=WHOLE),
    replace(INT8, name="int8, feedback in groups of 256", feedback=256),
    replace(INT8, name="int8, feedback in groups of 64", feedback=64),
    replace(INT8, name="int8, calibrated, feedback", calibrated=True, feedback=WHOLE),
    replace(INT8, name="int8, calibrated, feedback in groups of 256", calibrated=True, feedback=256),
    replace(INT8, name="int8, feedback, not rebalanced", rebalanced=False, feedback=WHOLE),
    replace(INT8, name="int8, heads, then rebalanced, feedback", heads=True, feedback=WHOLE),
    replace(INT4, name="int4, feedback", feedback=WHOLE),
    replace(INT4, name="int4, feedback in groups of 256", feedback=256),
    replace(INT4, name="int4, feedback in groups of 64", feedback=64),
    replace(INT4, name="int4, rebalanced", rebalanced=True),
    replace(INT4, name="int4, rebalanced, feedback in groups of 256", rebalanced=True, feedback=256),
    replace(INT4, name="int4, only loud channels rebalanced", rebalanced=True, only_loud=True),
    replace(
        INT4,
        name="int4, only loud channels rebalanced, feedback in groups of 256",
        rebalanced=True,
        only_loud=True,
        feedback=256,
    ),
    replace(INT4, name="int4, heads", heads=True),
    replace(INT4, name="int4, heads, feedback", heads=True, feedback=WHOLE),
)


class Untouched(Rebalancing):
    """Leaves all channels as they are."""

    def _choose_block(self, component: str, block: str) -> dict[str, FloatArray]:
        weights = self._checkpoint.weights(component)
        return {
            place.maker: np.ones(weights.get(f"{block}.{place.maker}").shape[0], np.float32)
            for place in PLACES[component]
        }


def main() -> None:
    """Builds, generates, and writes the report; variants that were measured before are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints, bundles and what was measured lie")
    parser.add_argument("--prompts", type=int, default=240, help="for each language")
    parser.add_argument("--models", nargs="+", default=["demo", "demo with loud channels"])
    parser.add_argument("--only", nargs="+", default=[one.name for one in VARIANTS])
    parser.add_argument("--name", default="int8_variants", help="of the report")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    requests = [p for language in ("en", "zh") for _, p in held_out_requests(language, options.prompts)]
    psnrs: dict[str, dict[str, list[float]]] = {}
    for name in options.models:
        model = Model(options.work / name.replace(" ", "-"), loud="loud" in name)
        for variant in VARIANTS:
            if values := model.psnrs(variant, requests, measure=variant.name in options.only):
                psnrs.setdefault(name, {})[variant.name] = values
                print(f"{name}: {variant.name}: median {np.median(values):.2f} dB", flush=True)
    report = {"machine": machine("numpy", "onnxruntime"), "activation_bits": activation_bits(), "psnr_db": psnrs}
    text = to_markdown(report, options.prompts)
    write_results(options.name, report, text, options.out)
    print(text)


class Model:
    """A checkpoint and the bundles that are made of it, in a folder."""

    def __init__(self, folder: Path, *, loud: bool) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._plain = folder / "checkpoint" if loud else DEMO
        if loud and not self._plain.exists():
            with_loud_channels(DEMO, self._plain)
        self._turned = cache(self._with_turned_heads)
        self._ranges = cache(
            lambda checkpoint: measured_ranges(measure_peaks(Checkpoint.open(checkpoint), calibration_prompts(), QUIET))
        )
        self._moments = cache(lambda: measured_moments(self._plain, calibration_prompts()))

    def psnrs(self, variant: Variant, prompts: list[str], *, measure: bool) -> list[float]:
        """PSNR of each prompt's image, measured or as it was measured before; nothing where neither is so."""
        kept = self._folder / f"{len(prompts)} {variant.name.replace('/', ' ')}.json"
        if not kept.exists() and measure:
            drawn, reference = self.images(variant, prompts), self._reference(prompts)
            found = [psnr_db(one, other) for one, other in zip(drawn, reference, strict=True)]
            kept.write_text(json.dumps([round(min(value, 99.0), 2) for value in found]))
        return json.loads(kept.read_text()) if kept.exists() else []

    def _reference(self, prompts: list[str]) -> Pictures:
        kept = self._folder / f"{len(prompts)} fp32.npy"
        if not kept.exists():
            np.save(kept, np.stack(self.images(REFERENCE, prompts)))
        return list(np.load(kept))

    def images(self, variant: Variant, prompts: list[str]) -> Pictures:
        """An image of each prompt, with its place as the seed."""
        checkpoint = self._turned() if variant.heads else self._plain
        moments = self._moments() if variant.feedback else {}
        if variant.heads:
            moments = with_turned_columns(moments, Checkpoint.open(checkpoint).config)
        bundle = self._folder / f"bundle {variant.name}"
        if variant.product:
            build(checkpoint, bundle, self._options(variant), QUIET)
        else:
            ranges = self._ranges(checkpoint) if variant.calibrated else {}
            built(checkpoint, bundle, variant, Measured(moments, ranges))
        pipeline = Pipeline.from_bundle(bundle, "cpu")
        try:
            return [np.asarray(pipeline.generate(p, seed=seed).images[0]) for seed, p in enumerate(prompts)]
        finally:
            pipeline.release()

    def _options(self, variant: Variant) -> BuildOptions:
        prompts = self._folder / "prompts.txt"
        prompts.write_text("\n".join(calibration_prompts()), encoding="utf-8")
        return BuildOptions(variant.precision, force=True, calibrate=prompts if variant.calibrated else None)

    def _with_turned_heads(self) -> Path:
        out = self._folder / "turned"
        shutil.rmtree(out, ignore_errors=True)
        return with_turned_heads(self._plain, out)


def calibration_prompts() -> list[str]:
    """Prompts of pairs that training saw, in both languages."""
    rng = np.random.default_rng(19)
    return [caption(random_scene(rng), language, rng) for _ in range(CALIBRATION) for language in ("en", "zh")]


@dataclass(frozen=True)
class Measured:
    """What calibration found, where a variant uses it."""

    moments: Moments
    ranges: Ranges


def built(checkpoint: Path, out: Path, variant: Variant, measured: Measured) -> None:
    """The bundle of a variant, by the product's own exporter with its rounding exchanged."""
    balances: list[Rebalancing] = []

    def balance(opened: Checkpoint, *options: Any, **more: Any) -> Rebalancing:
        balances.append(
            (Rebalancing if variant.rebalanced else Untouched)(
                opened, measured.ranges or None, only_far=variant.only_loud
            )
        )
        return balances[-1]

    def rotated_weight(source: TensorSource, exponent: int = 0) -> list[StoredTensor]:
        component = next(part for part, names in LAYER_LINEARS.items() if _tail(source.name) in names)
        return quantized(source, Encoding.INT8, balances[-1].factors(component, source.name), exponent)

    def stored(
        source: TensorSource, encoding: Encoding, factors: Factors, moments: Any
    ) -> tuple[NDArray[np.generic], FloatArray]:
        weights = factors.apply(source.read())
        moment = measured.moments.get(source.name)
        if moment is not None and factors.columns is not None:
            moment = moment / np.outer(factors.columns, factors.columns)
        if variant.rotated:
            weights = turned_columns(weights, hadamard(rotation_size(weights.shape[1])))
        if encoding is Encoding.INT8:
            values, scales = (
                int8_rows(weights) if moment is None else int8_with_feedback(weights, moment, variant.feedback)
            )
            return values.T, scales
        if encoding is Encoding.BLOCKS4:
            return blocks4(weights) if moment is None else int4_with_feedback(weights, moment, variant.feedback)
        return blocks8(weights)

    with ExitStack() as stack:
        stack.enter_context(unittest.mock.patch("zimage_export.build.Rebalancing", balance))
        stack.enter_context(unittest.mock.patch("zimage_export.weights.streaming.carried", rotated_weight))
        stack.enter_context(unittest.mock.patch("zimage_export.storage.quantize._stored", stored))
        if variant.precision is Precision.INT4 and variant.rebalanced:
            stack.enter_context(unittest.mock.patch.object(StoragePolicy, "rebalanced", True))
        if variant.rotated:
            stack.enter_context(unittest.mock.patch("zimage_export.build._rotations", lambda c, o: rotations(c.config)))
        build(checkpoint, out, BuildOptions(precision=variant.precision, force=True), QUIET)


def rotations(config: ModelConfig) -> dict[str, int]:
    """Of every linear of all blocks, by `component/weight`."""
    return {
        f"{component}/{block}.{linear.weight}": rotation_size(linear.in_width)
        for component, names in blocks(config).items()
        for block in names
        for linear in layer_linears(component, config)
    }


def rotation_size(width: int) -> int:
    """The largest power of four up to 256 that divides the width."""
    size = _GROUP
    while width % size:
        size //= 4
    return size


def turned_columns(weights: NDArray[Any], matrix: FloatArray) -> NDArray[Any]:
    """Rows [rows, width], with each group of as many columns as the matrix has multiplied by it."""
    turned: NDArray[Any] = np.ascontiguousarray(weights).reshape(len(weights), -1, len(matrix)) @ matrix
    return turned.reshape(weights.shape)


def with_turned_heads(checkpoint: Path, out: Path) -> Path:
    """The same model in float32, with each head's values multiplied by an orthogonal matrix and back."""
    changes: dict[str, Callable[[str, FloatArray], FloatArray]] = {}
    for component, width in head_widths(Checkpoint.open(checkpoint).config).items():
        matrix, names = sylvester(width), LAYER_LINEARS[component]

        def turn(name: str, values: FloatArray, matrix: FloatArray = matrix, names: Any = names) -> FloatArray:
            if _tail(name) == names.out:
                return turned_columns(values, matrix)
            if _tail(name) == names.value:
                return turned_columns(values.T, matrix).T
            return values

        changes[component] = turn
    return rewritten(checkpoint, out, changes)


def with_turned_columns(moments: Moments, config: ModelConfig) -> Moments:
    """What the same model's linears read once each head's values are turned."""
    matrices = {LAYER_LINEARS[component].out: sylvester(width) for component, width in head_widths(config).items()}

    def turned(name: str, moment: NDArray[np.float64]) -> NDArray[np.float64]:
        matrix = matrices.get(_tail(name))
        return moment if matrix is None else turned_columns(turned_columns(moment, matrix).T, matrix)

    return {name: turned(name, moment) for name, moment in moments.items()}


def head_widths(config: ModelConfig) -> dict[str, int]:
    """How many channels a head's values have, by component."""
    transformer = config.transformer
    return {"transformer": transformer.dim // transformer.n_heads, "text_encoder": config.text_encoder.head_dim}


def sylvester(size: int) -> FloatArray:
    """[size, size]: Sylvester's Hadamard matrix of a power of two, orthogonal and symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def rewritten(checkpoint: Path, out: Path, changes: dict[str, Callable[[str, FloatArray], FloatArray]]) -> Path:
    """A copy of a checkpoint in which some components are changed, in float32 and one file each."""
    shutil.copytree(checkpoint, out)
    opened = Checkpoint.open(checkpoint)
    for component, change in changes.items():
        weights = opened.weights(component)
        names = weights.names()
        for old in (out / component).glob("*.safetensors*"):
            old.unlink()
        stem = "diffusion_pytorch_model" if component == "transformer" else "model"
        with (out / component / f"{stem}.safetensors").open("wb") as file:
            file.write(encode_header({name: (DType.F32, weights.get(name).shape) for name in names}))
            for name in names:
                file.write(np.ascontiguousarray(change(name, weights.get(name).read()), "<f4").tobytes())
    return out


def _tail(name: str) -> str:
    """`layers.0.attention.to_v.weight` → `attention.to_v`."""
    return name.split(".", 2)[-1].removesuffix(".weight")


def to_markdown(report: dict[str, Any], prompts: int) -> str:
    """A table for each model."""
    parts = ["# Ways to bring int8 and int4 nearer to float32\n"]
    for model, by_variant in report["psnr_db"].items():
        rows = []
        for name, values in by_variant.items():
            base = next(one.name for one in BASELINES if one.name[:4] == name[:4])
            found, product = np.asarray(values), np.asarray(by_variant.get(base, values))
            spread = np.std(found - product) / np.sqrt(len(found))
            rows.append(
                [
                    name,
                    *(f"{np.quantile(found, q):.1f}" for q in (0, 0.1, 0.5, 0.9)),
                    f"{np.median(found) - np.median(product):+.1f}",
                    f"{np.mean(found - product):+.1f} ± {spread:.1f}",
                ]
            )
        header = ["variant", "least", "10 %", "median", "90 %", "median, gained", "mean, gained"]
        parts.append(f"## {model}\n\n{markdown_table(header, rows)}\n")
    return "\n".join(
        [
            *parts,
            f"PSNR in dB of {prompts} held-out prompts in each language, against the fp32 bundle's image of the same "
            f"prompt and seed. Rotations are in the largest groups of 4, 16, 64 or 256 that divide a width (the demo "
            f"model's are 128, 192, 384 and 512), heads' values over their 32. Feedback is measured over {CALIBRATION} "
            f"other prompts in each language.\n",
            f"`PYTHONPATH=.:tests python benchmarks/int8_variants.py --work DIR --prompts {prompts}`, with `--only` "
            f"for some of the variants at a time; integer products "
            f"with activations of {report['activation_bits']} bits; {describe(report['machine'])}",
        ]
    )


if __name__ == "__main__":
    main()
