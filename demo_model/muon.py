"""Muon for the matrices, AdamW for the rest: about half the steps that AdamW alone would need here.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal by a Newton-Schulz
iteration before it is applied. torch's own runs that iteration in bfloat16, which a CPU without it emulates.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor) -> Tensor:
    """Near-orthogonal matrices [n, rows, columns] in place of those given: their singular values become about 1."""
    a, b, c = _QUINTIC
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if turned else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.as_tensor(x.transpose(1, 2) if turned else x)


class MuonAdamW:
    """One optimizer over named parameters. `matrix_rate` and `vector_rate` are the two learning rates at scale 1.

    Convolutions count as matrices [out, in x height x width]. `plain` names the parameters that AdamW updates
    although they are matrices (embeddings, first and last layers).
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], plain: Iterable[str], matrix_rate: float, vector_rate: float
    ) -> None:
        by_adam = set(plain)
        self.rates = matrix_rate, vector_rate
        self.matrices = [p for name, p in parameters.items() if p.ndim >= 2 and name not in by_adam]
        others = [p for name, p in parameters.items() if p.ndim < 2 or name in by_adam]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(others, lr=vector_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, p in enumerate(self.matrices):
            self.groups[(p.shape[0], p.numel() // p.shape[0])].append(index)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Applies the parameters' gradients, with both learning rates times `scale`."""
        for group in self.adam.param_groups:
            group["lr"] = self.rates[1] * scale
        self.adam.step()
        rate = self.rates[0] * scale
        for (rows, columns), members in self.groups.items():
            updates = []
            for index in members:
                gradient = self.matrices[index].grad
                assert gradient is not None
                momentum = self.momenta[index].lerp_(gradient, 0.05)
                updates.append(gradient.lerp(momentum, 0.95).reshape(rows, columns))
            gain = max(1.0, rows / columns) ** 0.5
            for index, update in zip(members, orthogonal(torch.stack(updates)), strict=True):
                p = self.matrices[index]
                p.mul_(1 - rate * 0.01).add_(update.reshape(p.shape), alpha=-rate * gain)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another optimizer of the same parameters was."""
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.adam.load_state_dict(state["adam"])
