"""What people see of TensorRT where there is no GPU: engines, plan, doctor, refusals, and the benchmark's report."""

import json
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Capture, assert_one_line_error, call_export, call_rt, unchanged
from facts import assert_facts, memory_amounts
from gpu_stand_in import Card, install_gpus
from library_stand_in import LibraryStandIn

from zimage_export.engines import build as export_engines
from zimage_rt.bench.cards import CARDS_GB, TOKENS, answers, card_table
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.errors import ExecutorError
from zimage_runtime.executors.examination import Verdict
from zimage_runtime.executors.ort.cuda_plan import plan_vram
from zimage_runtime.executors.overheads import CARD
from zimage_runtime.executors.protocol import UNLIMITED, Hardware, Work
from zimage_runtime.executors.tensorrt import kind
from zimage_runtime.executors.tensorrt import trt_api as library
from zimage_runtime.executors.tensorrt.engine_store import read_catalog
from zimage_runtime.executors.tensorrt.plan import CONTEXT_BYTES, plan_residency
from zimage_runtime.machine.gpu_targets import GpuTarget, Variant
from zimage_runtime.model.geometry import image_geometry

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> LibraryStandIn:
    made = LibraryStandIn()
    monkeypatch.setattr(export_engines, "Library", lambda: made)
    return made


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    target = tmp_path / "bundle"
    shutil.copytree(bundle, target)
    return target


@pytest.fixture(scope="module")
def engined_once(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engined") / "bundle"
    shutil.copytree(bundle, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_engines, "Library", LibraryStandIn)
        export_engines.add_engines(Bundle.open(target))
    return target


@pytest.fixture
def engined(engined_once: Path, tmp_path: Path) -> Path:
    target = tmp_path / "engined"
    shutil.copytree(engined_once, target)
    return target


# zimage-export engines, build --engines


def test_engines_of_a_bundle(copy: Path, stand_in: LibraryStandIn, capsys: Capture) -> None:
    outcome = call_export(capsys, "engines", copy, "--gpu", "sm89", "--gpu", "sm75", "--json", "--quiet")
    assert outcome.status == 0, outcome.err
    document = json.loads(outcome.out)
    catalog = read_catalog(Bundle.open(copy))
    assert {engine["gpu"] for engine in document["engines"]} == {"sm89", "sm75"}
    assert len(document["engines"]) == len(catalog.engines) == 46
    assert set(catalog.variants) == set(Variant)
    assert call_rt(capsys, "info", copy, "--verify").status == 0
    plain = call_export(capsys, "engines", copy, "--quiet")
    assert plain.out == f"{copy}\n"
    assert {engine.gpu for engine in read_catalog(Bundle.open(copy)).engines} == {GpuTarget.PORTABLE, GpuTarget.SM75}


def test_engines_are_built_off_the_main_thread(
    copy: Path, stand_in: LibraryStandIn, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On it, TensorRT would catch in its logger what Ctrl-C raises, and go on."""
    threads, build = set(), stand_in.build

    def noted(*given: Any, **options: Any) -> Any:
        threads.add(threading.current_thread())
        return build(*given, **options)

    monkeypatch.setattr(stand_in, "build", noted)
    assert call_export(capsys, "engines", copy, "--gpu", "sm89", "--quiet").status == 0
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_build_with_engines(checkpoint: Path, tmp_path: Path, stand_in: LibraryStandIn, capsys: Capture) -> None:
    out = tmp_path / "out"
    options = ("--precision", "bf16", "--engines", "--gpu", "sm120", "--quiet")
    assert call_export(capsys, "build", checkpoint, out, *options).status == 0
    catalog = read_catalog(Bundle.open(out))
    assert {engine.gpu for engine in catalog.engines} == {GpuTarget.SM120}
    weights = catalog.variants[Variant.AMPERE].programs["transformer_block"].weights
    joined = weights["attention.qkv.weight"]
    assert joined.dtype == "BF16"
    assert joined.parts == tuple(f"attention.to_{name}.weight" for name in "qkv")
    assert weights["attention_norm1.weight"].dtype == "F32"
    assert not list(tmp_path.glob(".*.part"))


def test_gpu_without_engines_is_a_usage_error(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    outcome = call_export(capsys, "build", checkpoint, tmp_path / "out", "--gpu", "sm86")
    assert_one_line_error(outcome, "--engines", status=2)


def test_engines_without_tensorrt_say_how_to_get_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(library, "import_module", missing)
    outcome = call_export(capsys, "engines", copy, "--quiet")
    assert_one_line_error(outcome, "pip install 'zimage-rt[tensorrt]'")


def test_what_tensorrt_refuses_is_one_line(copy: Path, stand_in: LibraryStandIn, capsys: Capture) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise ExecutorError("tensorrt_rtx cannot build block program text_layer: why")

    stand_in.build = refuse  # type: ignore[method-assign]
    outcome = call_export(capsys, "engines", copy, "--quiet")
    assert_one_line_error(outcome, "tensorrt_rtx", "text_layer", "why")
    Bundle.open(copy).verify()


@pytest.mark.slow
def test_engines_by_tensorrt_itself(copy: Path, capsys: Capture) -> None:
    """The whole set for every generation, at the small model's widths."""
    gpus = [word for gpu in GpuTarget for word in ("--gpu", gpu.value)]
    assert call_export(capsys, "engines", copy, *gpus, "--quiet").status == 0
    opened = Bundle.open(copy)
    opened.verify()
    catalog = read_catalog(opened)
    assert len(catalog.engines) == 23 * len(GpuTarget)
    for engine in catalog.engines:
        assert opened.manifest.files[engine.path].size < 3_000_000, engine.path
    for spec in catalog.variants.values():
        for program in spec.programs.values():
            assert program.scratch[-1][1] > 0
    assert call_rt(capsys, "plan", copy).status == 0


def test_int4_has_no_engines(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    with unchanged(tmp_path):
        outcome = call_export(capsys, "build", checkpoint, tmp_path / "b", "--precision", "int4", "--engines")
    assert_one_line_error(outcome, "int4", "int8")


# zimage-rt plan


def test_plan_says_what_is_where(engined: Path, capsys: Capture) -> None:
    outcome = call_rt(capsys, "plan", engined, "--size", "64x96", "--tokens", 40)
    assert outcome.status == 0, outcome.err
    labels = [line.split()[0] for line in outcome.lines]
    stages = ["text_encoder", "caption", "denoiser", "decoder", "encoder"]
    assert labels == ["image", "executor", "budget", "peak", *stages, "step"]
    assert_facts(outcome.lines[3], "GiB", "all stages")
    assert_facts(outcome.lines[-1], "CUDA graph")


def test_plan_as_json_in_a_budget(engined: Path, capsys: Capture) -> None:
    refusal = call_rt(capsys, "plan", engined, "--size", "64x96", "--vram", "0.1GiB")
    given, smallest = memory_amounts(assert_one_line_error(refusal, "VRAM", "--vram", "--size", "--executor cpu"))
    assert given == 0.1
    tight = call_rt(capsys, "plan", engined, "--size", "64x96", "--vram", f"{smallest}GiB", "--json")
    found = json.loads(tight.out)
    assert found["peak"] <= found["budget"]
    less = f"{smallest - 0.01:.2f}GiB"
    assert call_rt(capsys, "plan", engined, "--size", "64x96", "--vram", less).status == 1
    assert found["context"] == CONTEXT_BYTES


def test_plan_says_what_the_cpu_does_and_from_which_budget_the_gpu_would(engined: Path, capsys: Capture) -> None:
    def line(stage: str, *options: object) -> str:
        outcome = call_rt(capsys, "plan", engined, *options)
        assert outcome.status == 0, outcome.err
        return next(line.split(maxsplit=1)[1] for line in outcome.lines if line.startswith(f"{stage} "))

    large = ("--size", "1024x1024", "--vram")

    def in_tiles(budget: str) -> tuple[int, float]:
        """Blocks of the decoder that are whole in a budget, and the budget from which on all are."""
        said = line("decoder", *large, budget)
        assert_facts(said, "tiles", "whole")
        blocks = re.search(r"first (\d+) blocks", said)
        assert blocks is not None
        return int(blocks[1]), memory_amounts(said)[-1]

    whole, budget = in_tiles("0.45GiB")
    assert_facts(line("decoder", *large, f"{budget}GiB"), "resident")
    assert "tiles" not in line("decoder", *large, f"{budget}GiB")
    assert in_tiles(f"{budget - 0.01:.2f}GiB") >= (whole, budget)
    encoder = line("encoder", *large, "0.45GiB")
    assert_facts(encoder, "CPU", "GPU")
    (enough,) = memory_amounts(encoder)
    assert "CPU" not in line("encoder", *large, f"{enough}GiB")
    found = json.loads(call_rt(capsys, "plan", engined, *large, "0.45GiB", "--json").out)
    assert set(found["on_cpu"]) == {"encoder"}
    assert not set(found["on_cpu"]) & set(found["stages"])
    assert found["stages"]["decoder"]["blocks"] == whole
    smallest = found["in_tiles"]["decoder"]["smallest_budget"]
    assert budget - 0.01 < smallest / 2**30 <= budget
    wide = line("decoder", "--size", "4096x16")
    assert_facts(wide, "CPU", "tiles", "engines")
    assert memory_amounts(wide) == [], "no budget is enough"


def test_plan_grows_with_the_image_and_the_batch(engined: Path, capsys: Capture) -> None:
    def peak(*options: object) -> int:
        return int(json.loads(call_rt(capsys, "plan", engined, "--json", *options).out)["peak"])

    assert peak("--size", "64x64") < peak("--size", "512x512") < peak("--size", "1024x1024")
    assert peak("--gpu", "sm75") > 0


def test_plan_needs_engines(bundle: Path, engined: Path, stand_in: LibraryStandIn, capsys: Capture) -> None:
    assert_one_line_error(call_rt(capsys, "plan", bundle, "--executor", "tensorrt"), bundle, "zimage-export engines")
    export_engines.add_engines(Bundle.open(engined), [GpuTarget.SM86])
    assert_one_line_error(call_rt(capsys, "plan", engined, "--gpu", "sm75"), "sm75", "zimage-export engines")


def test_plan_for_cuda_is_the_executors_own(bundle: Path, capsys: Capture) -> None:
    options = ("--size", "512x512", "--tokens", 40, "--json")
    found = json.loads(call_rt(capsys, "plan", bundle, *options).out)
    manifest = Bundle.open(bundle).manifest
    expected = plan_vram(manifest, Work(geometry=image_geometry(512, 512, manifest.config), tokens=40), UNLIMITED)
    assert (found["executor"], found["peak"]) == ("cuda", expected.peak)
    lines = call_rt(capsys, "plan", bundle, "--size", "512x512").lines
    assert [line.split()[0] for line in lines][:4] == ["image", "executor", "budget", "peak"]
    assert_one_line_error(call_rt(capsys, "plan", bundle, "--vram", "0.1GiB"), "0.1 GiB", "--vram")


def test_the_table_of_cards_has_tensorrt_too(engined: Path, bundle: Path) -> None:
    opened = Bundle.open(engined)
    table = {row.executor: row for row in card_table([("m", opened)], [(512, 512)], [])}
    assert set(table) == {"tensorrt", "cuda", "webgpu", "cpu"}
    spec = read_catalog(opened).variants[Variant.AMPERE]
    work = Work(geometry=image_geometry(512, 512, opened.manifest.config), tokens=TOKENS)
    for card, answer in zip(CARDS_GB, table["tensorrt"].answers, strict=True):
        budget = (card << 30) - CARD.nbytes
        assert answer.peak == plan_residency(spec, opened.manifest, work, budget).peak
    (none,) = answers(lambda room: kind.predict(opened, work, Hardware(memory=room)).peak, None, cards=(0,))
    assert not none.fits
    assert "tensorrt" not in {row.executor for row in card_table([("m", Bundle.open(bundle))], [(512, 512)], [])}


# run and doctor


@pytest.mark.parametrize("executor", ["tensorrt", "cuda"])
def test_run_without_a_gpu_is_one_line(engined: Path, executor: str, capsys: Capture) -> None:
    """It says what is missing, and what to do."""
    outcome = call_rt(capsys, "run", "x", "-m", engined, "--executor", executor)
    assert_one_line_error(outcome, f"'{executor}'", "NVIDIA driver", "`zimage-rt doctor`", "--executor cpu")


def test_run_without_the_packages_is_one_line(engined: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    install_gpus(monkeypatch, Card())
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    outcome = call_rt(capsys, "run", "x", "-m", engined, "--executor", "tensorrt")
    assert_one_line_error(outcome, "pip install 'zimage-rt[tensorrt]'")


def test_vram_is_for_gpus(bundle: Path, capsys: Capture) -> None:
    assert_one_line_error(call_rt(capsys, "run", "x", "-m", bundle, "--vram", "4GiB"), "vram")
    assert_one_line_error(call_rt(capsys, "run", "x", "-m", bundle, "--vram", "4"), "8GiB", status=2)


class Device:
    """A GPU as `CudaDevice` describes it."""

    name, capability = "a card", (8, 9)

    def __init__(self, index: int = 0) -> None:
        assert index == 0


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kind.examine()
    assert found.verdict is Verdict.NOTE
    assert_facts(found.text, "NVIDIA driver")
    monkeypatch.setattr(kind, "CudaDevice", Device)
    found = kind.examine()
    assert found.verdict is Verdict.OK
    assert_facts(found.text, "a card", "sm89", "Ada", "RTX 40", "zimage-export engines")
    monkeypatch.setattr(Device, "capability", (6, 1))
    assert_facts(kind.examine().text, "a card", "older", "7.5", "--executor cpu")
    monkeypatch.setattr(kind, "find_spec", lambda name: None)
    found = kind.examine()
    assert found.verdict is Verdict.NOTE
    assert_facts(found.text, "tensorrt_rtx", "cuda-bindings", "`pip install 'zimage-rt[tensorrt]'`")


def test_why_it_is_unavailable_is_in_words(engined: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(path: Path) -> str:
        unavailable = kind.why_unavailable(Bundle.open(path), 0)
        return "" if unavailable is None else unavailable.reason

    assert_facts(reason(engined), "NVIDIA driver")
    install_gpus(monkeypatch, Card())
    monkeypatch.setattr(kind, "CudaDevice", Device)
    monkeypatch.setattr(Device, "capability", (8, 6))
    assert reason(engined) == ""
    assert_facts(reason(bundle), bundle, "zimage-export engines")
    monkeypatch.setattr(Device, "capability", (7, 0))
    assert_facts(reason(engined), "7.0", "older", "--executor cuda")
