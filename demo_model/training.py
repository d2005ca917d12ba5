"""The loop that trains a part: rates, checkpoints, and going on from the last one."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .muon import MuonAdamW
from .workers import Task, gradient_workers


@dataclass(frozen=True)
class Course:
    """How long and how fast. Rates rise over `warmup` steps, stay, and fall to zero over the last `decay` share."""

    steps: int
    microbatches: int
    matrix_rate: float
    vector_rate: float
    warmup: int = 30
    decay: float = 0.5

    def scale(self, step: int) -> float:
        """What both rates are multiplied by at a step."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.decay * self.steps))
        return rise * fall


def train(
    task: Task,
    course: Course,
    plain: Iterable[str],
    state: Path,
    *,
    every: int = 100,
    processes: int | None = None,
) -> None:
    """Trains `task.model` in place. Goes on from `state`, which is rewritten every `every` steps and at the end.

    `plain` as for `MuonAdamW`, `processes` as for `gradient_workers`.

    A line of JSON every 20 steps goes into ``<state>.log``: step, loss (mean since the last line), seconds.
    """
    parameters = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    optimizer = MuonAdamW(parameters, plain, course.matrix_rate, course.vector_rate)
    first = _resume(task, optimizer, state) if state.exists() else 0
    losses: list[float] = []
    start = time.monotonic()
    log_file = state.with_name(state.name + ".log")
    with (
        gradient_workers(task, course.microbatches, processes) as gradients,
        log_file.open("a", encoding="utf-8") as log,
    ):
        for step in range(first, course.steps):
            losses.append(gradients(step))
            optimizer.step(course.scale(step))
            if (step + 1) % 20 == 0:
                line = {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": time.monotonic() - start}
                log.write(json.dumps(line) + "\n")
                log.flush()
                losses.clear()
            if (step + 1) % every == 0 or step + 1 == course.steps:
                _save(task, optimizer, state, step + 1)


def _save(task: Task, optimizer: MuonAdamW, state: Path, step: int) -> None:
    temporary = state.with_name(state.name + ".new")
    torch.save({"step": step, "model": task.model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    os.replace(temporary, state)


def _resume(task: Task, optimizer: MuonAdamW, state: Path) -> int:
    saved = torch.load(state, weights_only=True)
    task.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])
