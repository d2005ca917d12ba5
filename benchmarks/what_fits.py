"""Which memory is enough for the full-size model: what each executor's plan says, for common cards and machines.

Fills in the README's table, too.

Predicted, not measured: weights and programs have their true sizes, and nothing is computed. TensorRT's part needs its
library (`zimage-rt[tensorrt]`), but no GPU.

    python benchmarks/what_fits.py --work out/what-fits
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from zimage_export.engines.build import add_engines
from zimage_export.synthetic.outline import write_outline
from zimage_rt.bench.script import Document, Run, Script
from zimage_rt.bench.tables import markdown_table
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.manifest import Precision
from zimage_runtime.errors import MemoryLimitError
from zimage_runtime.executors.overheads import CARD
from zimage_runtime.executors.protocol import Hardware, Work
from zimage_runtime.executors.registry import executor_kind
from zimage_runtime.machine.gpu_targets import GpuTarget
from zimage_runtime.model.geometry import image_geometry

README = Path(__file__).parents[1] / "README.md"
_MARKS = re.compile(r"(<!-- what fits: made by .*? -->\n).*?(<!-- end -->)", re.S)

PRECISIONS = (Precision.FP16, Precision.INT8, Precision.INT4)
"""From the nearest to the original to the farthest. bf16 takes what fp16 takes."""

CARDS_GB = (6, 8, 12, 16, 24)
MACHINES_GB = (8, 16, 24, 32)
SIDES = (512, 1024, 1536)
TOKENS = 64  # a prompt of a few sentences
SYSTEM = 2 << 30
"""Bytes of a machine's memory that the operating system and a desktop keep: assumed."""

EXECUTORS = {
    "tensorrt": ("NVIDIA, RTX 20 and newer: TensorRT", CARDS_GB),
    "cuda": ("NVIDIA: CUDA", CARDS_GB),
    "webgpu": ("any GPU: WebGPU", CARDS_GB),
    "cpu": ("CPU", MACHINES_GB),
}


@dataclass(frozen=True)
class Answer:
    """Whether an image of `side` x `side` can be generated. `peak` in bytes; None where it does not fit."""

    executor: str
    precision: str
    side: int
    memory_gb: int
    peak: int | None
    together: bool  # whether everything stays loaded from one image to the next


def measure(run: Run) -> Document:
    """The plans of every executor for bundles in `--work`."""
    bundles = [outline(run.work / str(precision), precision) for precision in PRECISIONS]
    return {
        "tokens": TOKENS,
        "kept_of_a_card": CARD.nbytes,
        "kept_of_a_machine": SYSTEM,
        "answers": [asdict(answer) for bundle in bundles for answer in answers_for(bundle)],
    }


def outline(folder: Path, precision: Precision) -> Bundle:
    """A full-size bundle without weights, with TensorRT's programs where they exist for the precision."""
    if folder.exists():
        return Bundle.open(folder)
    bundle = write_outline(folder, precision)
    return bundle if precision is Precision.INT4 else add_engines(bundle, [GpuTarget.SM86])


def answers_for(bundle: Bundle) -> list[Answer]:
    """Every executor that has programs for a bundle, at every size and with every amount of memory."""
    found = []
    for executor, (_, memories) in EXECUTORS.items():
        if executor == "tensorrt" and bundle.manifest.engines is None:
            continue
        for side in SIDES:
            for memory in memories:
                found.append(answer(bundle, executor, side, memory))
    return found


def answer(bundle: Bundle, executor: str, side: int, memory_gb: int) -> Answer:
    """What the executor's own plan says of one amount of memory."""
    kind = executor_kind(executor)
    work = Work(geometry=image_geometry(side, side, bundle.manifest.config), tokens=TOKENS)
    room = (memory_gb << 30) - (CARD.nbytes if kind.on_gpu else SYSTEM)
    precision = bundle.manifest.precision.value
    hardware = Hardware(memory=room, gpu=GpuTarget.SM86.value if kind.on_gpu else None)
    try:
        plan = kind.predict(bundle, work, hardware)
    except MemoryLimitError:
        return Answer(executor, precision, side, memory_gb, None, False)
    return Answer(executor, precision, side, memory_gb, plan.peak, bool(plan.document()["keep_all"]))


def table(report: Document, side: int, executors: tuple[str, ...], memories: tuple[int, ...]) -> str:
    """Executors down, memory across; each cell has the precisions that fit, bold where everything stays loaded."""
    found: dict[tuple[str, int], list[str]] = {}
    for one in report["answers"]:
        if one["side"] == side and one["peak"] is not None:
            name = f"**{one['precision']}**" if one["together"] else one["precision"]
            found.setdefault((one["executor"], one["memory_gb"]), []).append(name)
    rows = [
        [EXECUTORS[executor][0], *(", ".join(found.get((executor, memory), ["–"])) for memory in memories)]
        for executor in executors
    ]
    return markdown_table(["", *(f"{memory} GB" for memory in memories)], rows)


def page(report: Document) -> list[str]:
    """A pair of tables for each size."""
    gpus = tuple(name for name in EXECUTORS if name != "cpu")
    card, system = report["kept_of_a_card"] / 2**30, report["kept_of_a_machine"] / 2**30
    parts = [
        "What fits",
        "Which bundles of the full-size model fit for an image of one size, by the memory of a GPU or, for the CPU, of "
        "the machine. Predicted by each executor's own plan from the sizes of weights and programs, not measured.",
        f"The driver and a desktop are left {card:.1f} GiB of a GPU's memory, the system {system:.0f} GiB of the "
        "machine's. Bold: everything stays loaded from one image to the next. Otherwise stages are loaded in turn or, "
        "with TensorRT, weights are streamed. bf16 takes what fp16 takes. On the CPU, 16-bit weights are widened to "
        "float32; `--low-memory` takes less, and is slower.",
    ]
    for side in SIDES:
        gpu_table, cpu_table = table(report, side, gpus, CARDS_GB), table(report, side, ("cpu",), MACHINES_GB)
        parts += [f"## {side}x{side}", gpu_table, cpu_table]
    return parts


def readme_tables(report: Document) -> str:
    """The tables of the README: at 1024x1024."""
    gpus = tuple(name for name in EXECUTORS if name != "cpu")
    return "\n\n".join((table(report, 1024, gpus, CARDS_GB), table(report, 1024, ("cpu",), MACHINES_GB)))


def filled(text: str, report: Document) -> str:
    """A text with the tables between its marks."""
    return _MARKS.sub(lambda marks: f"{marks[1]}{readme_tables(report)}\n{marks[2]}", text)


SCRIPT = Script(
    __file__, __doc__, measure, page, work="a few MB", packages=("zimage-rt", "onnxruntime", "tensorrt_rtx")
)

if __name__ == "__main__":
    if (document := SCRIPT.main()) is not None:
        README.write_text(filled(README.read_text("utf-8"), document), "utf-8")
