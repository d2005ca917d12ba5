"""This machine's processor: its name, its cores, and the vector instructions that decide how fast it multiplies.

Linux lists them in ``/proc/cpuinfo``, macOS answers ``sysctl``, Windows has a registry and a function. Instructions
are None where the system does not list them; an empty tuple means that it does, and has none of those that matter.
"""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .arm_cores import core_name

Key = TypeVar("Key")


@dataclass(frozen=True)
class Processor:
    """A processor as people know it."""

    name: str
    physical_cores: int | None  # None where the system does not say
    vector_instructions: tuple[str, ...] | None  # "AVX2", "NEON dot product"; None where the system does not list them


def find_processor() -> Processor:
    """This machine's processor."""
    import psutil

    if sys.platform == "darwin":
        name, instructions = _from_sysctl(_sysctl(_SYSCTL_NAMES))
    elif sys.platform == "win32":
        name, instructions = _from_windows(_registry_name(), _has_windows_feature, platform.machine())
    else:
        name, instructions = _from_cpuinfo(_read(_CPU_INFO), _read(_DEVICE_MODEL))
    named = name or platform.processor() or platform.machine() or "unknown processor"
    return Processor(named, psutil.cpu_count(logical=False), instructions)


def vector_text(instructions: Sequence[str] | None) -> str:
    """Vector instructions in words."""
    if instructions is None:
        return "vector instructions unknown"
    return ", ".join(instructions) or "no AVX2 or NEON"


Found = tuple[str, tuple[str, ...] | None]
"""A name, empty where the system has none, and vector instructions."""

_CPU_INFO = Path("/proc/cpuinfo")
_DEVICE_MODEL = Path("/proc/device-tree/model")  # of ARM boards: "Raspberry Pi 5 Model B Rev 1.0"

_LINUX_FLAGS = {  # x86 "flags", then ARM "Features"
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "neon": "NEON",  # 32 bits
    "asimd": "NEON",  # 64 bits
    "asimddp": "NEON dot product",
    "i8mm": "NEON int8 matrix product",
    "bf16": "NEON bf16",
    "sve": "SVE",
    "sve2": "SVE2",
}


def _from_cpuinfo(text: str, board: str) -> Found:
    """Of Linux. x86 names the model; ARM gives two numbers per core, and the device tree may name the board."""
    fields: dict[str, list[str]] = {}  # in the order of the cores, of which there may be several kinds
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), []).append(value.strip())
    flags = next((fields[key][0].split() for key in ("flags", "Features") if key in fields), None)
    instructions = None if flags is None else _labels(_LINUX_FLAGS, flags.__contains__)
    if "model name" in fields and "flags" in fields:
        name = fields["model name"][0]
        if "cpu family" in fields and "model" in fields:  # which identify it where a cloud hides the name
            name += f" (family {fields['cpu family'][0]}, model {fields['model'][0]})"
        return name, instructions
    parts = zip(fields.get("CPU implementer", ()), fields.get("CPU part", ()), strict=False)
    cores = " + ".join(dict.fromkeys(core_name(implementer, part) for implementer, part in parts))
    board = board.strip("\0\n ")
    if board and cores:
        return f"{board} ({cores})", instructions
    return board or cores or fields.get("model name", [""])[0], instructions


_APPLE_FEATURES = {
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.avx512f": "AVX-512",
    "hw.optional.avx512vnni": "AVX-512 VNNI",
    "hw.optional.arm64": "NEON",
    "hw.optional.arm.FEAT_DotProd": "NEON dot product",
    "hw.optional.arm.FEAT_I8MM": "NEON int8 matrix product",
    "hw.optional.arm.FEAT_BF16": "NEON bf16",
}
_APPLE_NAME = "machdep.cpu.brand_string"
_SYSCTL_NAMES = (_APPLE_NAME, *_APPLE_FEATURES)


def _from_sysctl(answer: str) -> Found:
    """Of macOS: lines such as "hw.optional.arm.FEAT_I8MM: 1". Names that a system does not know are missing."""
    values = {name: value.strip() for name, _, value in (line.partition(":") for line in answer.splitlines())}
    if not values.keys() & _APPLE_FEATURES.keys():
        return values.get(_APPLE_NAME, ""), None
    return values.get(_APPLE_NAME, ""), _labels(_APPLE_FEATURES, lambda name: values.get(name) == "1")


def _sysctl(names: Iterable[str]) -> str:
    command = ["/usr/sbin/sysctl", "-i", *names]  # -i: without those that it does not know
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# PF_… of winnt.h. Windows has no question for VNNI.
_WINDOWS_X86_FEATURES = {40: "AVX2", 41: "AVX-512"}
_WINDOWS_ARM_FEATURES = {19: "NEON", 43: "NEON dot product", 66: "NEON int8 matrix product", 68: "NEON bf16", 46: "SVE"}


def _from_windows(name: str, has_feature: Callable[[int], bool], machine: str) -> Found:
    features = _WINDOWS_ARM_FEATURES if machine.upper().startswith("ARM") else _WINDOWS_X86_FEATURES
    return name, _labels(features, has_feature)


def _registry_name() -> str:
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return ""
    return ""


def _has_windows_feature(number: int) -> bool:
    if sys.platform == "win32":
        import ctypes

        return bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(number))
    return False


def _labels(labels: Mapping[Key, str], has: Callable[[Key], bool]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label for key, label in labels.items() if has(key)))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
