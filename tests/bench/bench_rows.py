"""Rows as a run would make them, without a run."""

from collections.abc import Sequence

from zimage_rt.bench.schema import (
    FAILED,
    OK,
    Accuracy,
    Case,
    Draw,
    Floor,
    Memory,
    Reading,
    Row,
    StageMemory,
    Times,
    absent,
)

NO_GPU = absent("no NVIDIA GPU")


def made_row(
    key: str,
    model: str = "tiny-fp32",
    size: tuple[int, int] = (64, 64),
    totals: Sequence[float] = (1.0, 1.1, 1.2, 1.05, 1.3),
    failure: str | None = None,
    peak: int = 3 << 30,
    precision: str = "fp32",
    fingerprint: str = "f" * 64,
    load: float = 0.1,
) -> Row:
    """A row of the cpu executor; without `totals`, one of a case that drew nothing."""
    case = Case(
        "zimage-rt", model, precision, fingerprint, "cpu", *size, 4, 7, "a red fox", max(len(totals), 1), 1, threads=2
    )
    draws = tuple(Draw(total, total / 10, (total / 5,) * 4, total / 20, total / 20) for total in totals)
    number = Reading(1e9)
    return Row(
        key=key,
        case=case,
        status=FAILED if failure or not totals else OK,
        failure=failure if totals else "out of memory",
        times=Times(1.0, 0.1, 2.0, 3.1, "warm", draws) if totals else None,
        memory=Memory(
            0.01,
            Reading(0.0101),
            Reading(0.02),
            Reading(peak + 100),
            Reading(peak),
            Reading(100.0),
            NO_GPU,
            NO_GPU,
            NO_GPU,
            {"denoiser": 5},
            Reading(peak),
            {"step": StageMemory(peak + 100, peak, 100, None)},
            ((0.0, 1 << 30, 50, None), (1.0, peak, 100, None), (2.0, peak, 100, None)),
            (("import", 0.0, 1.0), ("load", 1.0, 1.1), ("text", 1.1, 1.3), ("step", 1.3, 1.9), ("decode", 1.9, 2.0)),
        ),
        floor=Floor(number, number, Reading(0.01), Reading(0.1), Reading(0.02), Reading(0.5)),
        accuracy=Accuracy("fp32", Reading(41.5), False, Reading(3), Reading(0.01), 35.0, True),
        energy=NO_GPU,
        conditions={"before": {"load_average": load}},
        environment={
            "cpu": "a processor",
            "physical_cores": 2,
            "vector_instructions": ["avx2"],
            "memory_gib": 24.0,
            "system": "Linux",
            "python": "3.11",
            "packages": {"onnxruntime": "1.32.0", "onnxruntime-gpu": None},
            "git_commit": "0" * 40,
            "gpu": {"none": "no NVIDIA GPU"},
        },
        picture=None,
        command="zimage-rt bench tiny-fp32",
        started="2026-01-01T00:00:00+00:00",
    )
