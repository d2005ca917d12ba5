"""How a server was started."""

from dataclasses import dataclass
from pathlib import Path

from .limits import Limits


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine process needs."""

    bundle: Path
    output_dir: Path  # where images are written
    executor: str = "auto"
    device: int = 0  # which GPU
    vram: int | None = None  # bytes
    low_memory: bool = False
    trust_engines: bool = False
    takes_loras: bool = False  # the programs that take LoRA run from the first image on
    controlnet: Path | None = None  # a ControlNet's folder


@dataclass(frozen=True)
class Keep:
    """Which images stay: the newest `count`, or those of the last `days`; None is no limit."""

    count: int | None = None
    days: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the web process needs."""

    engine: EngineSettings
    limits: Limits
    keep: Keep = Keep()
    lora_dir: Path | None = None
    keys: tuple[str, ...] = ()  # any of which lets a client in; empty lets in everyone who reaches the socket
    host_names: tuple[str, ...] = ()  # names besides the machine's own that clients may use for it
    origins: tuple[str, ...] = ()  # pages elsewhere that may call the API from a browser
    as_asked: bool = False  # A1111's route takes steps and CFG beyond what a Turbo model is made for
    grace: float = 30.0  # seconds that the job at work gets when the server stops
