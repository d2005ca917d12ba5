"""Tasks for `demo_model.workers` that take no time; apart from the tests, so that workers import little."""

from typing import Any

import torch
from torch import Tensor, nn


class Fitting:
    """Fits a small net to a fixed function: a task for `workers` that takes no time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def loss(self, step: int, index: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step * 100 + index))
        wanted = torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1]], dim=1)
        return (self.model(x) - wanted).square().mean()


class Failing(Fitting):
    """Cannot compute its loss."""

    def loss(self, step: int, index: int) -> Tensor:
        raise ValueError("no such scene")
