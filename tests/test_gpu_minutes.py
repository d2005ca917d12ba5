"""The scripts for a GPU that is lent for minutes: what they pack arrives, and what they run runs, here on the CPU."""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from facts import assert_facts

ROOT = Path(__file__).parents[1]
DEVICE = ROOT / "benchmarks" / "device"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the machines are Linux, and run.sh is a shell script")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEVICE))


@pytest.fixture
def pack(scripts: None) -> ModuleType:
    return importlib.import_module("pack")


@pytest.fixture
def minutes(scripts: None) -> ModuleType:
    return importlib.import_module("minutes")


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Kind, generation and payload of each entry, as the library's scripts know the layout."""
    body = b""
    for kind, generation, payload in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0")
        body += (header + struct.pack("<I", generation)).ljust(64, b"\7") + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


H100, OTHERS = (2, 90, b"hopper" * 20), [(1, 75, b"ptx" * 30), (2, 80, b"ampere" * 40), (2, 120, b"blackwell" * 9)]


def test_the_code_of_other_gpus_is_cut_out(scripts: None) -> None:
    prune = importlib.import_module("prune_fatbins").prune
    without = fat_binary(*OTHERS)
    chance = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 1 << 40)
    library = bytearray(b"ELF" + chance + fat_binary(OTHERS[0], H100, *OTHERS[1:]) + b"rodata" + without + b"end")
    whole = bytes(library)
    found = prune(library, {90})
    assert len(library) == len(whole)
    assert library.startswith(b"ELF" + chance)
    assert H100[2] in library
    assert library.endswith(b"rodata" + without + b"end"), "what has no code for it stays as it is"
    for _, _, payload in OTHERS:
        assert library.count(payload) == 1 < whole.count(payload)
    assert found.before == {75: 180, 80: 480, 90: 120, 120: 162}
    assert found.after == {75: 90, 80: 240, 90: 120, 120: 81}


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)


def test_what_is_packed_arrives(pack: ModuleType, tmp_path: Path) -> None:
    """In several pieces, with the library cut, without what is not needed, importable by the command that is run."""
    library = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    wheel(tmp_path / "wheels", "one", {library: os.urandom(9000) + fat_binary(H100, *OTHERS)})
    unneeded = {"onnxruntime/tools/x.py": b"", "onnxruntime/capi/libonnxruntime.so.1.31.1": b"ELF"}
    wheel(tmp_path / "wheels", "two", {"carried_to_a_gpu.py": b"VALUE = 7\n", **unneeded})
    words = ["--out", str(tmp_path / "pieces"), "--wheels", str(tmp_path / "wheels"), "--offline", "--piece", "4000"]
    pack.main(words)
    pieces = sorted((tmp_path / "pieces").glob("?/piece"))
    assert len(pieces) > 1
    assert all(path.stat().st_size <= 4000 for path in pieces)
    code = (
        "import carried_to_a_gpu, importlib.metadata, os, sys, zimage_runtime;"
        "print(carried_to_a_gpu.VALUE, importlib.metadata.version('zimage-rt'), zimage_runtime.__file__, *sys.argv[1:])"
    )
    site = tmp_path / "site"
    command = ["bash", str(DEVICE / "run.sh"), str(tmp_path / "pieces"), str(site), sys.executable, "-c", code, "a b"]
    for _ in range(2):  # a second command finds it unpacked
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.split(maxsplit=3)[0] == "7"
        assert_facts(done.stdout, str(ROOT / "runtime"), "a b")
        shutil.rmtree(tmp_path / "pieces", ignore_errors=True)
    assert (site / library).stat().st_size > 9000
    assert OTHERS[1][2] not in (site / library).read_bytes()
    assert not (site / "onnxruntime/tools").exists()
    assert not list((site / "onnxruntime/capi").glob("libonnxruntime.so.*"))


def test_what_is_carried(pack: ModuleType) -> None:
    """What a GPU machine with torch lacks: without NVML there is no memory to compare the plan with."""
    names = [package.partition("==")[0] for package in pack.wanted([], [])]
    assert {"onnxruntime-gpu", "diffusers", "nvidia-ml-py", "psutil"} <= set(names)
    assert all("==" in package for package in pack.wanted([], ["tensorrt"]))
    assert len(pack.wanted(["diffusers"], ["tensorrt"])) == len(names) - 2 + 4


def test_a_library_without_code_for_the_gpu_is_an_error(pack: ModuleType, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "one", {"onnxruntime/capi/libonnxruntime_providers_cuda.so": fat_binary(*OTHERS)})
    words = ["--out", str(tmp_path / "pieces"), "--wheels", str(tmp_path / "wheels"), "--offline"]
    with pytest.raises(SystemExit) as refusal:
        pack.main(words)
    assert_facts(str(refusal.value), "9.0")


def lines_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "minutes.jsonl").read_text().splitlines()]


@pytest.mark.deep
def test_a_trial_of_the_minutes(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """As the README has it, but for --trial; the models are there already."""
    work, out, pieces = tmp_path / "work", tmp_path / "out", tmp_path / "pieces"
    work.mkdir()
    (work / "checkpoint-small").symlink_to(checkpoint)
    shutil.copytree(bundle, work / "bundle-small-fp32")
    site = tmp_path / "site"
    site.mkdir()
    (site / ".complete").touch()
    command = ["bash", str(DEVICE / "run.sh"), str(pieces), str(site), sys.executable, str(DEVICE / "minutes.py")]
    words = ["--trial", "--only", "correctness", "--out", str(out), "--work", str(work), "--seconds", "200"]
    subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    statuses = {line["step"]: line.get("status", line.get("left_out")) for line in lines_of(out)}
    assert statuses == {"doctor": 0, "correct-fp32": 0}, [path.read_text()[-2000:] for path in out.glob("*.txt")]
    rows = json.loads((out / "correct-fp32.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["placement", "parity", "cycle"]
    placement, parity, cycle = (row["result"] for row in rows)
    assert placement["denoiser"]["as_it_should_be"]
    assert parity["latents_error"] < 1e-5
    assert (cycle["images"], cycle["equal"]) == (4, True)
    assert "computes a known answer right" in (out / "doctor.txt").read_text()


def one_step(minutes: ModuleType, code: str, limit: float, **more: object) -> object:
    return minutes.Step("speed", "one", (sys.executable, "-c", code), limit, **more)


def run_of(minutes: ModuleType, tmp_path: Path, seconds: float) -> object:
    return minutes.Minutes(tmp_path, tmp_path, time.monotonic() + seconds)


def test_a_step_ends_at_its_limit_with_its_children(minutes: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib;"
        f"one = subprocess.Popen(['sleep', '60']); pathlib.Path({str(mark)!r}).write_text(str(one.pid)); one.wait()"
    )
    run_of(minutes, tmp_path, 100).take(one_step(minutes, code, 1.5))  # type: ignore[attr-defined]
    (line,) = lines_of(tmp_path)
    assert_facts(str(line["status"]), "not done")
    stat = Path(f"/proc/{mark.read_text()}/stat")
    end = time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_does_not_fit_is_left_out(minutes: ModuleType, tmp_path: Path) -> None:
    run = run_of(minutes, tmp_path, 20)
    run.take(one_step(minutes, "", 100))  # type: ignore[attr-defined]
    run.take(one_step(minutes, "", 10, needs=("full-bf16",)))  # type: ignore[attr-defined]
    run.take(one_step(minutes, "raise SystemExit(3)", 10))  # type: ignore[attr-defined]
    late, missing, failed = lines_of(tmp_path)
    assert_facts(str(late["left_out"]), "100")
    assert_facts(str(missing["left_out"]), "full-bf16", "built")
    assert failed["status"] == 3


def test_the_real_minutes_fit(minutes: ModuleType, tmp_path: Path) -> None:
    """Ten minutes at most a command: what runs at the same time takes as long as the longest of it."""
    models, steps = minutes.steps_of(tmp_path, tmp_path, trial=False)
    at_once = {part: max([step.limit for step in steps if step.part == part and step.together], default=0)
               for part in minutes.PARTS}  # fmt: skip
    alone = sum(step.limit for step in steps if not step.together)
    assert sum(at_once.values()) + alone <= 570
    assert [step.part for step in steps] == sorted((step.part for step in steps), key=minutes.PARTS.index)
    assert {name for step in steps for name in step.needs} <= {model.name for model in models}
    assert not [step for step in steps if step.together and step.part != "correctness"], "they measure"
