"""The processor of many machines, from what their systems say of it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from facts import assert_facts

from zimage_rt.bench.environment import describe, machine
from zimage_runtime.machine import processor
from zimage_runtime.machine.arm_cores import core_name
from zimage_runtime.machine.processor import Processor, find_processor, vector_text

SAPPHIRE_RAPIDS = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 ssse3 fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni \
amx_bf16 avx512_fp16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ZEN_1 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 23
model\t\t: 1
model name\t: AMD EPYC 7571
flags\t\t: fpu sse2 ssse3 fma avx f16c avx2 sha_ni
"""
CORE_2 = """\
processor\t: 0
model name\t: Intel(R) Core(TM)2 Duo CPU     E8400  @ 3.00GHz
flags\t\t: fpu sse2 ssse3 sse4_1
"""
PI_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
RASPBERRY_PI_5 = (
    "".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {PI_FEATURES}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
        for core in range(4)
    )
    + "Revision\t: c04170\nSerial\t\t: 0\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
ALTRA = f"""\
processor\t: 0
model name\t: ARMv8 Processor rev 1 (v8l)
BogoMIPS\t: 50.00
Features\t: {PI_FEATURES} ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
GRAVITON_3 = """\
processor\t: 0
Features\t: fp asimd aes crc32 atomics asimdhp asimddp sha512 sve svei8mm svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
SNAPDRAGON = """\
processor\t: 0
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd46

processor\t: 1
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4d

processor\t: 2
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4d
"""
RISC_V = "processor\t: 0\nhart\t\t: 2\nisa\t\t: rv64imafdc\nmmu\t\t: sv39\n"


@pytest.mark.parametrize(
    ("cpuinfo", "board", "name", "vectors"),
    [
        (
            SAPPHIRE_RAPIDS,
            "",
            "Intel(R) Xeon(R) Platinum 8488C (family 6, model 143)",
            ("AVX2", "AVX-512", "AVX-512 VNNI", "AVX-VNNI", "AVX-512 bf16", "AMX int8", "AMX bf16"),
        ),
        (ZEN_1, "", "AMD EPYC 7571 (family 23, model 1)", ("AVX2",)),
        (CORE_2, "", "Intel(R) Core(TM)2 Duo CPU     E8400  @ 3.00GHz", ()),
        (
            RASPBERRY_PI_5,
            "Raspberry Pi 5 Model B Rev 1.0\0",
            "Raspberry Pi 5 Model B Rev 1.0 (ARM Cortex-A76)",
            ("NEON", "NEON dot product"),
        ),
        (ALTRA, "", "ARM Neoverse N1", ("NEON", "NEON dot product")),
        (
            GRAVITON_3,
            "",
            "ARM Neoverse V1",
            ("NEON", "NEON dot product", "NEON int8 matrix product", "NEON bf16", "SVE"),
        ),
        (
            SNAPDRAGON,
            "",
            "ARM Cortex-A510 + ARM Cortex-A715",
            ("NEON", "NEON dot product", "NEON int8 matrix product", "NEON bf16"),
        ),
        (RISC_V, "Some Board", "Some Board", None),
    ],
)
def test_a_machine_with_linux(
    cpuinfo: str,
    board: str,
    name: str,
    vectors: tuple[str, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for constant, text in (("_CPU_INFO", cpuinfo), ("_DEVICE_MODEL", board)):
        path = tmp_path / constant
        if text:
            path.write_text(text)
        monkeypatch.setattr(processor, constant, path)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else 6)
    assert find_processor() == Processor(name, 6, vectors)


M2 = """\
machdep.cpu.brand_string: Apple M2
hw.optional.arm64: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 1
"""
M1 = M2.replace("M2", "M1").replace("I8MM: 1", "I8MM: 0").replace("BF16: 1", "BF16: 0")
INTEL_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
hw.optional.avx2_0: 1
hw.optional.avx512f: 0
"""


@pytest.mark.parametrize(
    ("answer", "name", "vectors"),
    [
        (M2, "Apple M2", ("NEON", "NEON dot product", "NEON int8 matrix product", "NEON bf16")),
        (M1, "Apple M1", ("NEON", "NEON dot product")),
        (INTEL_MAC, "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", ("AVX2",)),
        ("machdep.cpu.brand_string: Apple M9\n", "Apple M9", None),
        (None, "arm", None),
    ],
)
def test_a_mac(answer: str | None, name: str, vectors: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        if answer is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    assert find_processor() == Processor(name, 8, vectors)
    (command,) = asked
    assert command[:2] == ["/usr/sbin/sysctl", "-i"]
    assert {"machdep.cpu.brand_string", "hw.optional.arm.FEAT_I8MM", "hw.optional.avx2_0"} <= set(command)


@pytest.mark.parametrize(
    ("machine", "features", "vectors"),
    [
        ("AMD64", {40, 41}, ("AVX2", "AVX-512")),
        ("AMD64", {10, 19}, ()),
        ("ARM64", {19, 43, 66}, ("NEON", "NEON dot product", "NEON int8 matrix product")),
    ],
)
def test_a_machine_with_windows(
    machine: str, features: set[int], vectors: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(processor, "_registry_name", lambda: "A Processor")
    monkeypatch.setattr(processor, "_has_windows_feature", features.__contains__)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)
    assert find_processor() == Processor("A Processor", 4, vectors)


@pytest.mark.parametrize(
    ("implementer", "part", "name"),
    [
        ("0x41", "0xd4f", "ARM Neoverse V2"),
        ("0xc0", "0xac3", "Ampere AmpereOne"),
        ("0x41", "0xfff", "ARM part 0xfff"),
        ("0x99", "0x001", "ARM implementer 0x99 part 0x1"),
        ("unknown", "0x1", ""),
    ],
)
def test_a_core_has_a_name(implementer: str, part: str, name: str) -> None:
    assert core_name(implementer, part) == name


def test_vector_instructions_in_words() -> None:
    assert vector_text(("NEON", "SVE")) == "NEON, SVE"
    assert_facts(vector_text(()), "no AVX2")
    assert_facts(vector_text(None), "unknown")


@pytest.mark.parametrize(("vectors", "said"), [(("NEON",), "NEON"), ((), "no AVX2"), (None, "unknown")])
def test_results_record_what_doctor_shows(
    vectors: tuple[str, ...] | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_rt.bench.environment.find_processor", lambda: Processor("A Core", 6, vectors))
    found = machine("numpy")
    assert (found["cpu"], found["physical_cores"]) == ("A Core", 6)
    assert describe(found).startswith("A Core, 6 cores ")
    assert_facts(describe(found), said)
