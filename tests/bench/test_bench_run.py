"""`zimage-rt bench` from end to end: what is measured, what is caught, what is done once, and what is refused."""

import json
import shutil
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import Capture, Outcome, assert_one_line_error, call_redirected, call_rt
from facts import assert_facts, has_fact, raises_with

from zimage_export.synthetic.checkpoint import SMALL
from zimage_rt.bench import jobs
from zimage_rt.bench import run as runs
from zimage_rt.bench.checkpoints import open_checkpoint
from zimage_rt.bench.floor import unknown_rates
from zimage_rt.bench.job import Failed, WorkerJob, decode_event, encode_event
from zimage_rt.bench.jobs import Planned, Settings, open_bundles, plan_cases
from zimage_rt.bench.results import read_rows
from zimage_rt.bench.schema import Row
from zimage_rt.bench.systems import BASELINES, find_system
from zimage_rt.cli import cli
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import read_header
from zimage_runtime.command_line.progress import Progress
from zimage_runtime.pipeline import Pipeline

pytestmark = pytest.mark.deep

QUICK = ("--size", "48x32", "--steps", "2", "--repeat", "2", "--quiet")


@pytest.fixture(scope="module")
def broken(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with one weight of the transformer times 10: one before SiLU, for a norm would take the factor out."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("broken") / "scaled-by-10"))
    weights = copy / Bundle.open(copy).manifest.weights["transformer"]
    entry = read_header(weights)["layers.1.feed_forward.w1.weight"]
    with weights.open("r+b") as file:
        file.seek(entry.offset)
        values = np.frombuffer(file.read(entry.nbytes), "<f4") * np.float32(10)
        file.seek(entry.offset)
        file.write(values.tobytes())
    return copy


@pytest.fixture(scope="module")
def measured(bundle: Path, broken: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the right bundle and the broken one."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "cpu_rates", lambda: unknown_rates("not measured in this test"))
        patch.setattr("sys.argv", ["zimage-rt", "bench", str(bundle), str(broken), *QUICK, "--out", str(out)])
        outcome = _call(*sys.argv[1:])
    rows = {row.case.model: row for row in read_rows(out / "results.jsonl")}
    return {"out": out, "outcome": outcome, "right": rows[bundle.name], "broken": rows["scaled-by-10"]}


def _call(*arguments: object) -> Outcome:
    return call_redirected(cli, *arguments)


def test_a_weight_scaled_by_10_is_caught_by_its_image(measured: dict[str, Any]) -> None:
    right, broken = measured["right"], measured["broken"]
    assert right.status == "ok"
    assert right.accuracy.identical
    assert broken.status == "failed"
    assert_facts(broken.failure, "fp32", "48 dB")
    assert broken.accuracy.psnr_db.value < 48
    assert broken.times is not None, "it failed because of its image, which was generated and timed"
    assert measured["outcome"].status == 1
    assert_facts(measured["outcome"].err.splitlines()[-1], "error:", "1 of", "failed")


def test_stages_add_up_to_the_image(measured: dict[str, Any]) -> None:
    row: Row = measured["right"]
    assert row.times is not None
    assert len(row.times.draws) == row.case.repeat == 2
    for draw in row.times.draws:
        assert len(draw.steps) == row.case.steps == 2
        assert draw.text is not None
        assert draw.decode is not None
        assert draw.total == pytest.approx(draw.text + sum(draw.steps) + draw.decode + draw.save)
        assert min(draw.text, *draw.steps, draw.decode, draw.save) > 0
    times = row.times
    assert times.cold_start == pytest.approx(times.importing + times.loading + times.cold_picture)
    assert times.page_cache == "warm"


def test_memory_is_seen_from_outside_and_a_gpu_that_is_not_there_is_null_with_a_reason(
    measured: dict[str, Any],
) -> None:
    memory = measured["right"].memory
    assert memory.resident.value > 20 << 20
    assert memory.resident.value <= memory.anonymous.value + memory.mapped.value
    assert set(memory.stages) == {"import", "load", "text", "step", "decode", "save"}
    assert memory.planned["denoiser"] > 0
    if memory.gpu_process.value is None:
        assert memory.gpu_process.reason
    ends = [end for _, _, end in memory.bands]
    assert ends == sorted(ends)
    assert memory.trace[-1][0] <= ends[-1] + 5


def test_rows_name_no_path_of_the_machine(measured: dict[str, Any], bundle: Path) -> None:
    text = (measured["out"] / "results.jsonl").read_text() + (measured["out"] / "report.md").read_text()
    for folder in (bundle.parent, measured["out"].parent):
        assert str(folder) not in text
    assert measured["right"].command.startswith(f"zimage-rt bench {bundle.name} scaled-by-10 --size 48x32 ")


def test_reports_are_written_and_the_page_needs_nothing_else(measured: dict[str, Any]) -> None:
    out = measured["out"]
    page = (out / "report.html").read_text()
    assert "scaled-by-10 cpu" in page
    assert 'src="data:image/png;base64,' in page
    for outside in ("http://", "https://", "<script", "url("):
        assert outside not in page
    markdown = (out / "report.md").read_text()
    assert "| scaled-by-10 cpu | 48x32 |" in markdown
    for link in markdown.split("](")[1:]:
        assert (out / link.split(")")[0]).is_file()


def test_a_second_run_measures_nothing_again(
    measured: dict[str, Any], bundle: Path, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(measured["out"], tmp_path / "out"))
    before = (out / "results.jsonl").read_bytes()

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("a case that is there was measured again")

    monkeypatch.setattr(runs, "watch", refuse)
    outcome = _call("bench", bundle, broken, *QUICK, "--out", out, "--json")
    assert [row["status"] for row in json.loads(outcome.out)["rows"]] == ["ok", "failed"]
    assert (out / "results.jsonl").read_bytes() == before


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(
    measured: dict[str, Any], bundle: Path, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(measured["out"], tmp_path / "out"))
    results = out / "results.jsonl"
    results.write_text(results.read_text().splitlines(keepends=True)[0])
    seen = []

    def interrupt(job: Any, *_: object, **__: object) -> Any:
        seen.append(job.case.model)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "watch", interrupt)
    assert _call("bench", bundle, broken, *QUICK, "--out", out).status == 130
    assert seen == ["scaled-by-10"], "only what was missing is measured"
    assert [row.case.model for row in read_rows(results)] == [bundle.name]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--size", "50x32"), ["width", "50", "16"]),
        (("--executor", "abacus"), ["'abacus'", "cpu"]),
        (("--baseline", "diffusers"), ["--checkpoint"]),
        (("--baseline", "magic", "--checkpoint", "CHECKPOINT"), ["'magic'", "diffusers"]),
        (("--checkpoint", "BUNDLE", "--baseline", "diffusers"), ["BUNDLE", "diffusers", "model_index.json"]),
        (("--checkpoint", "missing"), ["missing:", "directory"]),
        (("--checkpoint", "tiny"), ["NAME", "tiny", "dimensions"]),
        (("--reference", "missing"), ["missing:", "bundle"]),
        (("BUNDLE",), ["NAME", "two bundles"]),
        (("--executor", "cpu", "--vram", "8GiB"), ["vram", "cpu", "GPU"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    arguments: tuple[str, ...],
    facts: list[str],
    bundle: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "watch", None)
    places = {"BUNDLE": str(bundle), "CHECKPOINT": str(checkpoint)}
    words = [places.get(word, word) for word in arguments]
    outcome = call_rt(capsys, "bench", bundle, "--out", tmp_path / "out", "--quiet", *words)
    assert_one_line_error(outcome, *({**places, "NAME": bundle.name}.get(fact, fact) for fact in facts))
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_budget_reaches_the_jobs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the GPU's place, which takes no budget."""
    given: list[int | None] = []
    open_pipeline = Pipeline.from_bundle

    def opened(path: Any, executor: str, vram: int | None = None, **options: Any) -> Pipeline:
        given.append(vram)
        return open_pipeline(path, "cpu", **options)

    monkeypatch.setattr(Pipeline, "from_bundle", opened)
    settings = Settings(((64, 64),), ("cuda",), 1, "a", 7, 1, 1, vram=8 << 30)
    (planned,) = plan_cases(settings, open_bundles([str(bundle)]), 1)
    assert planned.case.vram == 8 << 30
    assert isinstance(planned.reference, Planned)
    assert planned.reference.case.vram is None, "it is generated on the CPU"
    job = WorkerJob.from_json(WorkerJob(planned.case, str(bundle), "x.png").to_json())
    find_system(job.case.system).load(job)
    assert given == [8 << 30, 8 << 30]


def test_a_worker_that_breaks_is_a_failed_row_with_its_reason(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    program = next(copy.glob("transformer/denoiser.cpu.onnx"))
    program.write_bytes(b"\0" * program.stat().st_size)
    monkeypatch.setattr(runs, "cpu_rates", lambda: unknown_rates("not measured in this test"))
    outcome = _call("bench", copy, *QUICK, "--out", tmp_path / "out", "--reference", bundle)
    assert outcome.status == 1
    (row,) = read_rows(tmp_path / "out" / "results.jsonl")
    assert row.status == "failed"
    assert_facts(str(row.failure), "denoiser", program)
    assert row.times is None
    assert not row.finished
    assert str(row.failure) in unescape((tmp_path / "out" / "report.html").read_text())


def test_a_reference_that_fails_is_the_reason_why_rows_are_not_checked(
    measured: dict[str, Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a later run with one that works checks them without measuring again."""
    reference = Path(shutil.copytree(bundle, tmp_path / "reference"))
    program = next(reference.glob("transformer/denoiser.cpu.onnx"))
    whole = program.read_bytes()
    program.write_bytes(b"\0" * len(whole))
    monkeypatch.setattr(runs, "cpu_rates", lambda: unknown_rates("not measured in this test"))
    out = tmp_path / "out"
    words = ("bench", bundle, *QUICK[:-1], "--repeat", "1", "--out", out, "--reference", reference)
    outcome = _call(*words)
    assert outcome.status == 0, "what is not checked has not failed"
    notes = [line for line in outcome.err.splitlines() if has_fact(line, program)]
    assert len(notes) == 2, "when the reference fails, and at the row that is not checked"
    for note in notes:
        assert_facts(note, "reference", "denoiser")
    (row,) = read_rows(out / "results.jsonl")
    assert row.status == "ok"
    assert row.accuracy is not None
    reason = str(row.accuracy.psnr_db.reason)
    assert_facts(reason, "reference", "denoiser", program)
    report = (out / "report.md").read_text()
    assert "1 row not checked" in report
    assert reason in report

    program.write_bytes(whole)
    jobs_run = []
    measure = runs.watch

    def watch(job: WorkerJob, *rest: Any, **options: Any) -> Any:
        jobs_run.append(job.case.model)
        return measure(job, *rest, **options)

    monkeypatch.setattr(runs, "watch", watch)
    assert _call(*words).status == 0
    (checked,) = read_rows(out / "results.jsonl")
    assert jobs_run == ["reference"]
    assert checked.accuracy is not None
    assert checked.accuracy.identical
    assert (checked.times, checked.accuracy.repeatable) == (row.times, row.accuracy.repeatable)


def test_events_cross_the_process_border() -> None:
    assert decode_event(encode_event(Failed("out of memory"))) == Failed("out of memory")
    for line in ("[]", "{}", '{"event": "Rumour"}'):
        with raises_with(ValueError, "event"):
            decode_event(line)


def test_a_reference_that_does_not_fit_in_memory_is_streamed(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same image: the code is diffusers' own."""
    original = open_checkpoint(checkpoint, Progress(quiet=True), tmp_path / "layout")
    settings = Settings(((48, 32),), ("cpu",), 2, "a", 7, 1, 1, checkpoint=original)
    pictures = []
    for available, name in ((1 << 40, "diffusers"), (original.float32_bytes, "diffusers-streamed")):
        monkeypatch.setattr(jobs, "available_memory", lambda available=available: available)
        (planned,) = plan_cases(settings, open_bundles([str(bundle)]), 1)
        assert isinstance(planned.reference, Planned)
        case = planned.reference.case
        assert (case.system, case.precision) == (name, "fp32")
        model = find_system(name).load(WorkerJob(case, str(checkpoint), "x.png"))
        pictures.append(np.asarray(model.generate(lambda stage, ended=None: None)))
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_says_what_keeps_it_from_running(name: str) -> None:
    system = find_system(name)
    reason = system.obstacle(SMALL.config)
    assert reason is None or len(reason) > 10
    if name == "stable-diffusion.cpp":
        assert_facts(str(reason), "30 layers", 3840)
    assert system.precision
    assert system.packages
