"""Muon: momentum whose matrices are made orthogonal before each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
MOMENTUM = 0.95
MATCHED = 0.2  # Liu et al. 2025, arXiv 2502.16982: updates of AdamW's size, so its rates carry over


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for weights of two or four axes; kernels count as rows of all their inputs.

    As in Liu et al. 2025 (arXiv 2502.16982), in float32 where they use bfloat16.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step down the gradients that the parameters hold."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        matrix = torch.lerp(gradient, momentum, MOMENTUM).flatten(1)  # (outputs, inputs)
        size = MATCHED * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = orthogonalise(matrix).view(parameter.shape)
        parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with singular values of about 1, by Newton-Schulz iterations.

    Each iteration multiplies from the left by a polynomial of the rows' products, so only the small
    square matrices are iterated: a third of the work for convolutions.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = wide @ wide.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(steps):
        factor = a * identity + torch.addmm(gram, gram, gram, beta=b, alpha=c)
        gram = factor @ gram @ factor
        product = factor @ product
    level: Tensor = product @ wide
    return level.T if tall else level


def split_optimizers(
    module: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the weights inside the networks, AdamW for embeddings, ends, norms and biases.

    Two of Muon with half of the weights each, because they can step at the same time.
    """
    inside: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        end = any(part in name for part in ("conv_in", "conv_out", "embedding"))
        (others if end or parameter.ndim < 2 else inside).append(parameter)
    return [
        Muon(inside[::2], learning_rate, weight_decay),
        Muon(inside[1::2], learning_rate, weight_decay),
        torch.optim.AdamW(others, learning_rate, weight_decay=weight_decay),
    ]
