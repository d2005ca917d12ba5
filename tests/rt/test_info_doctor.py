"""`zimage-rt info` and `zimage-rt doctor`: what they say, and that they say what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import assert_facts
from gpu_stand_in import Card, install_gpus, remove_driver

from zimage_rt.cli import cli
from zimage_rt.commands import doctor
from zimage_rt.commands.doctor import Finding, Verdict
from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.command_line.console import run_command
from zimage_runtime.executors.ort import cuda
from zimage_runtime.executors.ort.cuda_package import SWAP_TO_GPU
from zimage_runtime.executors.ort.known_answer import known_answer
from zimage_runtime.machine import int8_products as integers
from zimage_runtime.machine.processor import Processor


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return shutil.copytree(bundle, tmp_path / "bundle")


def edit_manifest(bundle: Path, **values: object) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lines_of(text: str) -> dict[str, str]:
    """The text of each line by its label, of which indentation is a part."""
    return {line[:16].rstrip(): line[16:].strip() for line in text.splitlines()}


def test_info_says_what_the_manifest_says(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["info", str(bundle)]) == 0
    manifest = Bundle.open(bundle).manifest
    text = capsys.readouterr().out
    lines = lines_of(text)
    assert lines["name"] == manifest.name
    assert lines["source"] == manifest.source.name
    assert lines["precision"] == "fp32"
    assert lines["exporter"] == manifest.exporter
    assert f"width {manifest.config.transformer.dim}, " in lines["transformer"]
    assert lines["default"] == f"{manifest.defaults.width}x{manifest.defaults.height}, 8 steps"
    assert lines["size"].endswith(f"in {len(manifest.files)} files")
    assert {"  text_encoder", "  transformer", "  vae", "  tokenizer.json"} <= lines.keys()
    assert "  programs        cpu: text_encoder, caption, modulation, denoiser, decoder, encoder" in text.splitlines()
    assert all(line[16:18] == "  " for line in text.splitlines()), "values start in one column"
    assert lines["parity"] == "not measured"
    assert lines["fingerprint"] == manifest.fingerprint


def test_info_shows_the_revision_and_nested_parity(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(
        own_bundle,
        source={"name": "Tongyi-MAI/Z-Image-Turbo", "revision": "abc123"},
        parity={"latents": {"relative_error": 0.000012345}, "images": 2},
    )
    assert run_command(cli, ["info", str(own_bundle)]) == 0
    out = capsys.readouterr().out
    assert lines_of(out)["source"] == "Tongyi-MAI/Z-Image-Turbo, revision abc123"
    assert "parity\n  latents:\n    relative_error: 1.234e-05\n  images: 2\n" in out


def test_info_prints_no_control_characters_of_a_manifest(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(own_bundle, exporter="red \x1b[31m\nname   forged")
    assert run_command(cli, ["info", str(own_bundle)]) == 0
    assert lines_of(capsys.readouterr().out)["exporter"] == r"red \x1b[31m\nname   forged"
    assert run_command(cli, ["info", str(own_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exporter"].startswith("red \x1b[31m\n")


@pytest.mark.parametrize(("options", "verified"), [([], None), (["--verify"], True)])
def test_info_json_is_one_document(
    bundle: Path, options: list[str], verified: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli, ["info", str(bundle), "--json", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for key in ("source", "precision", "exporter", "config", "defaults", "self_check", "parity"):
        assert document[key] == manifest[key]
    assert document["fingerprint"] == Bundle.open(bundle).manifest.fingerprint
    assert document["bytes"] == sum(document["components"].values())
    assert document["bytes"] == sum(record["size"] for record in manifest["files"].values())
    assert document["programs"]["cpu"] == [name for name, by in manifest["programs"].items() if "cpu" in by]
    assert document["verified"] is verified


def test_info_verify_reads_every_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["info", str(bundle), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert_facts(out.splitlines()[-1], len(Bundle.open(bundle).manifest.files), "unchanged")
    assert "verifying: 100%" in err


def test_info_verify_names_the_altered_file(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_last_byte(own_bundle / "vae" / "weights.safetensors")
    assert run_command(cli, ["info", str(own_bundle)]) == 0, "hashes are only checked when asked for"
    assert run_command(cli, ["info", str(own_bundle), "--verify"]) == 1
    out, err = capsys.readouterr()
    assert "unchanged" not in out
    last = err.splitlines()[-1]
    assert_facts(last, "error:", own_bundle, "vae/weights.safetensors")
    assert "tokenizer.json" not in last
    assert run_command(cli, ["info", str(own_bundle), "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verified"] is False


def test_info_wants_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["info"]) == 2
    assert "BUNDLE" in capsys.readouterr().err
    assert run_command(cli, ["info", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert_facts(err.strip(), tmp_path, "bundle", "manifest.json", "zimage-export")


def test_doctor_finds_this_environment_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(doctor.CHECKS)
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    assert run_command(cli, ["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    found = {check["name"]: check["values"] for check in document["checks"]}
    assert found["zimage-rt"]["python"] == sys.version.split()[0]
    assert "CPUExecutionProvider" in found["onnxruntime"]["providers"]
    assert found["processor"]["threads_used"] >= 1
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["export"]["torch"]


def test_doctor_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, json; from zimage_rt.cli import cli; from zimage_runtime.command_line.console import run_command;"
        "at_import = sorted({'numpy', 'onnxruntime', 'psutil', 'PIL', 'tqdm', 'tokenizers'} & set(sys.modules));"
        "status = run_command(cli, ['doctor', '--json']);"
        "after = sorted({'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules));"
        "print(json.dumps([at_import, status, after]), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stderr) == [[], 0, []]
    assert json.loads(result.stdout)["ok"] is True


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Makes the doctor see these distributions and no others."""
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name.replace("-", "_")))


def test_doctor_shows_how_to_swap_two_onnx_runtimes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, onnxruntime="1.23.0", onnxruntime_gpu="1.23.1")
    assert run_command(cli, ["doctor"]) == 1
    (problem,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    commands = (
        "`pip uninstall -y onnxruntime onnxruntime-gpu`",
        '`pip install "onnxruntime-gpu[cuda,cudnn]>=1.26"`',
        "`pip install onnxruntime`",
    )
    assert_facts(problem, "onnxruntime 1.23.0", "onnxruntime-gpu 1.23.1", *commands)
    assert run_command(cli, ["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_one_onnx_runtime_of_either_kind_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime_gpu="1.23.1")
    assert doctor.check_packages("packages").verdict is Verdict.OK
    install(monkeypatch)
    assert doctor.check_packages("packages").verdict is Verdict.NOTE, "importable, but installed by other means"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.check_packages("packages").verdict is Verdict.PROBLEM


class WrongSession:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return [np.ones((2, 2), np.float32)]


def refuse(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("opset 23 is\nunder development")


@pytest.mark.parametrize(("session", "reason"), [(WrongSession, "wrong"), (refuse, "opset 23 is under development")])
def test_doctor_notices_an_onnx_runtime_that_does_not_compute(
    session: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    finding = doctor.check_onnxruntime("onnxruntime")
    assert finding.verdict is Verdict.PROBLEM
    assert_facts(finding.text, reason, "pip install", "--force-reinstall")


def test_doctor_survives_libraries_that_do_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_driver(monkeypatch)  # or the executor of what GPU there is could not be examined either
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert run_command(cli, ["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    broken = {line.split()[1]: line for line in lines if line.startswith("problem")}
    assert broken.keys() == {"processor", "memory", "onnxruntime"}
    assert_facts(broken["onnxruntime"], "pip install", "--force-reinstall", "onnxruntime")
    assert_facts(broken["memory"], "psutil")


def test_a_new_check_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = {"moon": lambda name: Finding(name, Verdict.NOTE, "full", {"phase": 1.0})}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert run_command(cli, ["doctor"]) == 0
    assert capsys.readouterr().out.split() == ["note", "moon", "full"]


@pytest.mark.parametrize(
    ("vectors", "verdict", "said"),
    [
        (("NEON", "NEON dot product"), Verdict.OK, "NEON, NEON dot product"),
        ((), Verdict.NOTE, "no AVX2"),
        (None, Verdict.NOTE, "unknown"),
    ],
)
def test_doctor_shows_the_processor(
    vectors: tuple[str, ...] | None, verdict: Verdict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_runtime.machine.processor.find_processor", lambda: Processor("A Core", 7, vectors))
    finding = doctor.check_processor("processor")
    assert finding.verdict is verdict
    assert_facts(finding.text, "A Core", "7 physical cores", said)
    assert finding.values["vector_instructions"] == (None if vectors is None else list(vectors))


@pytest.mark.parametrize("limit", [3 << 29, None])
def test_doctor_names_the_control_groups_limit(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runtime.machine.host_memory.control_group_limit", lambda: limit)
    finding = doctor.check_memory("memory")
    assert finding.values["control_group_limit"] == limit
    if limit is None:
        assert "control group" not in finding.text
    else:
        assert_facts(finding.text, "control group", "1.5 GiB")


OLD = Card("NVIDIA GeForce GTX 1080", (6, 1), 8 << 30, 7 << 30)


def test_doctor_lists_gpus_as_cuda_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card())
    finding = doctor.check_gpus("gpu")
    assert finding.verdict is Verdict.OK
    assert_facts(finding.text, "NVIDIA GeForce RTX 4090", "8.9", "24.0 GiB", "20.0 GiB free", "580.65.06", "CUDA 13.2")
    install_gpus(monkeypatch, OLD, Card(), cuda=[1, 0])
    finding = doctor.check_gpus("gpu")
    first, second, _ = finding.text.split("; ")
    assert_facts(first, "GPU 0", "NVIDIA GeForce RTX 4090")
    assert_facts(second, "GPU 1", "NVIDIA GeForce GTX 1080")
    assert [gpu["index"] for gpu in finding.values["gpus"]] == [0, 1]
    assert str(OLD.id) not in json.dumps(finding.values), "nothing that identifies this card"


def test_doctor_without_a_gpu_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_driver(monkeypatch)
    finding = doctor.check_gpus("gpu")
    assert (finding.name, finding.verdict) == ("gpu", Verdict.OK)
    assert finding.values == {"gpus": [], "driver": None, "cuda": None}
    assert_facts(finding.text, "CPU", "no NVIDIA driver")
    finding = doctor.check_executor("cuda")
    assert (finding.verdict, finding.values) == (Verdict.OK, {"gpu": None})
    assert_facts(finding.text, "no NVIDIA driver")


def test_doctor_says_what_cuda_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpus(monkeypatch, Card())
    finding = doctor.check_executor("cuda")  # with the package for the CPU
    assert finding.verdict is Verdict.NOTE
    assert_facts(finding.text, *(f"`{line}`" for line in SWAP_TO_GPU))
    # with the package for the GPU, but without what it needs: the session runs on the CPU and says nothing
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr(cuda, "preload_libraries", lambda: "Failed to load libcudnn.so.9")

    def without_cuda(providers: list[str], **options: Any) -> tuple[Any, Any]:
        assert providers == ["CUDAExecutionProvider"]
        return known_answer(["CPUExecutionProvider"])

    monkeypatch.setattr(cuda, "known_answer", without_cuda)
    finding = doctor.check_executor("cuda")
    assert finding.verdict is Verdict.PROBLEM
    assert_facts(finding.text, "CUDA", "Failed to load libcudnn.so.9")

    class Session:
        def get_providers(self) -> list[str]:
            return providers

    right, _ = known_answer(["CPUExecutionProvider"])
    monkeypatch.setattr(cuda, "known_answer", lambda wanted, **options: (right, Session()))
    assert doctor.check_executor("cuda").verdict is Verdict.OK
    monkeypatch.setattr(cuda, "known_answer", lambda wanted, **options: (1.1 * right, Session()))
    finding = doctor.check_executor("cuda")
    assert finding.verdict is Verdict.PROBLEM
    assert_facts(finding.text, "wrong")


def test_doctor_lists_what_exporting_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("torch", "onnx") else object())
    finding = doctor.check_export("export")
    assert finding.verdict is Verdict.NOTE
    assert_facts(finding.text, "torch", "onnx", "`pip install 'zimage-rt[export]'`")
    assert "diffusers" not in finding.text


@pytest.mark.parametrize(
    ("exact", "verdict", "facts"),
    [(True, Verdict.OK, ["8-bit"]), (False, Verdict.NOTE, ["7-bit", "VNNI", "int8"])],
)
def test_doctor_shows_the_bits_of_an_int8_bundles_activations(
    exact: bool, verdict: Verdict, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "products_are_exact", lambda: exact)
    integers.activation_levels.cache_clear()
    try:
        finding = doctor.CHECKS["cpu"]("cpu")
    finally:
        integers.activation_levels.cache_clear()
    assert finding.verdict is verdict
    assert_facts(finding.text, *facts)
    assert finding.values == {"activation_bits": 8 if exact else 7}
