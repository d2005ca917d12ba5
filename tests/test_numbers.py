"""Every number with a unit in the documentation is a committed result, or is listed here as no measurement of ours.

`numbers_in_pages` describes the comments that tie numbers to results.
"""

import json
from pathlib import Path

import numbers_in_pages as numbers
import pytest

STATED: dict[str, tuple[str, ...]] = {
    "docs/precisions.md": ("| `fp32` | 41 GB |", "| `int4` | 8 GB |", "(24 GB for"),  # these follow from the shapes
    "docs/architecture.md": ("Latents (1 MB",),
    "docs/gpu.md": ("# 104 MB", "at most 3 MB serves", "# 7 MB"),  # downloads, and what the builder writes
    "docs/benchmarks.md": (
        "channels 50 times as loud",  # how the test is made
        "gate 8 times less",
        "user's cache (2 GB)",
    ),
    "docs/control.md": ("are 0.95 GB in float32", "a rounding of 0.2 % of each hint"),  # sizes of shapes and types
    "docs/gpu_findings.md": (
        "(18 GB",  # plans, not measurements
        "exactly: 673 MB",
        "get 1 % and 2 MiB",
        "the larger of 512 MiB and 5 %",
        "once more with 10 %",
        "within 5 % for six images on the card, 10 %",
        "at 26 dB on CUDA, 34 dB on the CPU",  # one image, of the finding that is refuted there
        "errors within 3 %",
        "488 MB instead of 370 MB",
    ),
    "docs/integers.md": (
        "take 1.5 GB while",  # moments of the published widths
        "channels 50 times as loud",  # rules and settings of the comparison
        "at least 3 dB",
        "at most 3 % of the time",
        "1 dB; [int4",
    ),
    "docs/lora.md": ("changes of 2 and 5 %",),  # sizes of what was measured
    "docs/many-machines.md": (  # what the page's model gives
        "= 1.215 s per image",
        "so that loading takes about 3.1 s",
        "the model gives 1.26 s, 3.4 times",
    ),
    "docs/serve.md": (  # limits that the server sets
        "after 10 seconds is ended",
        "has 30 seconds to finish",
        "after 45 seconds begins",
        "| 64 MiB, counted",
        "no answer yet | 256 MiB |",
        "that wait | 512 MiB |",
    ),
    "docs/webgpu_attention/README.md": ("4 to 10 %",),  # reproduce.py, beside it, prints it
}
"""Phrases of each page whose numbers are no committed measurement of ours: sizes that follow from shapes, settings."""


@pytest.mark.parametrize("page", numbers.pages(), ids=lambda path: str(path.relative_to(numbers.ROOT)))
def test_numbers_are_those_of_the_results(page: Path) -> None:
    wrong = [reason for number in numbers.tied_numbers(page.read_text("utf-8")) if (reason := number.wrong())]
    assert wrong == []


@pytest.mark.parametrize("page", numbers.pages(), ids=lambda path: str(path.relative_to(numbers.ROOT)))
def test_every_number_has_a_source(page: Path) -> None:
    name = str(page.relative_to(numbers.ROOT))
    untied = numbers.untied_numbers(page.read_text("utf-8"), STATED.get(name, ()))
    assert untied == [], "tie each to a result (tests/numbers_in_pages.py says how), or add its phrase to STATED"


def test_no_phrase_is_listed_in_vain() -> None:
    pages = {str(page.relative_to(numbers.ROOT)): page.read_text("utf-8") for page in numbers.pages()}
    listed = [(pages[name], phrase) for name, some in STATED.items() for phrase in some if name in pages]
    assert [phrase for page, phrase in listed if not numbers.phrase_pattern(phrase).search(page)] == []


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    document = {"rows": [{"size": "a", "seconds": 1.234, "all": [1, 3, 8]}, {"size": "b", "seconds": 0.0617}]}
    (tmp_path / "x.json").write_text(json.dumps(document))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1.23 s<!-- x: rows/size=a/seconds -->", True),
        ("1.24 s<!-- x: rows/size=a/seconds -->", False),
        ("**62 ms**<!-- x: rows/-1/seconds -->", True),
        ("6e-2<!-- x: rows/1/seconds -->", True),
        ("20 times<!-- x: rows/0/seconds over rows/1/seconds -->", True),
        ("21 times<!-- x: rows/0/seconds over rows/1/seconds -->", False),
        ("3 dB<!-- x: rows/0/all/median -->", True),
        ("123 %<!-- x: rows/0/seconds -->", True),
        ("2 s<!-- at most x: rows/0/seconds -->", True),
        ("2 s<!-- at least x: rows/0/seconds -->", False),
    ],
)
def test_a_number_is_compared_in_its_unit_and_to_its_digits(results: Path, text: str, right: bool) -> None:
    (number,) = numbers.tied_numbers(f"takes {text}, not more")
    assert (number.wrong() is None) is right
    assert numbers.untied_numbers(f"takes {text}, not more", ()) == []


@pytest.mark.parametrize("path", ["rows/2/seconds", "rows/size=c/seconds", "rows/0/nothing", "rows/0/size"])
def test_a_source_that_does_not_exist_is_an_error(results: Path, path: str) -> None:
    (number,) = numbers.tied_numbers(f"1 s<!-- x: {path} -->")
    with pytest.raises(LookupError):
        number.wrong()


def test_numbers_without_a_source_are_found() -> None:
    page = "It takes 5 s and `7 s`, 12 GB (see [8 GB](a/9 GB)) of 1024x1024.\n```\n3 s\n```\n"
    found = [one.split()[-2:] for one in numbers.untied_numbers(page, ())]
    assert found == [["5", "s"], ["12", "GB"], ["[8", "GB"]]
    assert numbers.untied_numbers(page, ("12 GB (see [8 GB]", "takes 5 s")) == []
