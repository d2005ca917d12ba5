"""What the tests of `zimage-rt batch` share: files of rows, the command, and what a folder holds."""

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cli_tools import Capture, Outcome, call_rt, finish

from zimage_rt.batch.store import ATTEMPTS, LATENTS, RECORDS

SIZE = "32x32"

Rows = Iterable[Mapping[str, Any]]


def rows_of(number: int, **values: Any) -> list[dict[str, Any]]:
    """Rows of small images, of three prompts."""
    prompts = ("a fox", "a hen in the snow", "一只猫")
    return [
        {"id": f"row-{n}", "prompt": prompts[n % 3], "size": SIZE, "steps": 2, "seed": n, **values}
        for n in range(number)
    ]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call_batch(capture: Capture, bundle: Path, rows: Path, out: object, *options: object) -> Outcome:
    """Runs `zimage-rt batch` on the CPU, here."""
    return call_rt(capture, "batch", rows, "-m", bundle, "-o", out, "--executor", "cpu", "--quiet", *options)


def finished(process: "subprocess.Popen[str]") -> Outcome:
    """Waits for a batch, which may take minutes where others compute, too."""
    try:
        return finish(process, timeout=1800)
    finally:
        process.kill()


def images_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for the manifest and what is hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


def manifest_in(folder: Path) -> list[dict[str, Any]]:
    """The manifest's rows."""
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(folder / "manifest.parquet").to_pylist()
    return rows


def without_seconds(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def unfinished(folder: Path) -> list[str]:
    """What waits in the hidden folder."""
    return sorted(
        path.relative_to(folder).as_posix()
        for below in (RECORDS, LATENTS, ATTEMPTS)
        for path in (folder / below).iterdir()
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.005)
