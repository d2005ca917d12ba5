"""Gradients from several processes, one thread each, with the same result for any number of them.

A step is cut into microbatches. A free worker takes the next one, so that a core that is busy elsewhere delays no
other. Each microbatch's gradient has its own place in shared memory, and they are added in order, so the sum does not
depend on which worker computed which.
"""

import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from zimage_runtime.machine.cores import thread_count


class Task(Protocol):
    """What to learn. Pickled to the workers, with `model` in shared memory."""

    model: nn.Module

    def loss(self, step: int, index: int) -> Tensor:
        """The loss of one microbatch, which depends on these two numbers alone."""
        ...


class Gradients:
    """Handed out by `gradient_workers`."""

    def __init__(self, task: Task, microbatches: int, processes: int) -> None:
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        size = sum(p.numel() for p in self.parameters)
        task.model.share_memory()
        self.slots, self.losses = torch.zeros(microbatches, size), torch.zeros(microbatches)
        for shared in (self.slots, self.losses):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        context = mp.get_context("spawn")
        self.todo: Any = context.Queue()
        self.done: Any = context.Queue()
        self.processes = [
            context.Process(
                target=_work, args=(os.getpid(), task, self.slots, self.losses, self.todo, self.done), daemon=True
            )
            for _ in range(processes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, step: int) -> float:
        """Sets every parameter's gradient to the mean over the step's microbatches; returns the mean loss."""
        count = len(self.slots)
        for index in range(count):
            self.todo.put((step, index))
        for _ in range(count):
            failure = self.done.get()
            if failure:
                raise RuntimeError(failure)
        total = self.slots.sum(0) / count
        offset = 0
        for p in self.parameters:
            p.grad = total[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        return float(self.losses.mean())

    def close(self) -> None:
        """Lets the workers end."""
        for _ in self.processes:
            self.todo.put(None)
        for process in self.processes:
            process.join()


@contextmanager
def gradient_workers(task: Task, microbatches: int, processes: int | None = None) -> Iterator[Gradients]:
    """Starts `processes` workers (one per physical core that this process may use), and stops them at the end."""
    gradients = Gradients(task, microbatches, processes or thread_count())
    try:
        yield gradients
    finally:
        gradients.close()


def _work(trainer: int, task: Task, slots: Tensor, losses: Tensor, todo: Any, done: Any) -> None:
    torch.set_num_threads(1)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    while True:
        try:
            job = todo.get(timeout=5)
        except queue.Empty:
            if os.getppid() != trainer:  # it was killed, maybe before this process had started
                return
            continue
        if job is None:
            return
        step, index = job
        try:
            loss = task.loss(step, index)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs], out=slots[index])
            losses[index] = loss.detach()
        except BaseException as error:
            done.put(f"{type(error).__name__}: {error}")
            raise
        done.put(None)
