"""The training loop that the VAE, the UNet and the judge share: seeded and resumable."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

WARM_UP = 0.05  # share of the steps in which the learning rate rises
CLIP = 1.0


def adamw(
    module: nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters."""
    return [torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=weight_decay)]


@dataclass
class Run:
    """What is trained, how far, and where its checkpoint lies.

    `loss` takes the module, the step's index and a generator seeded for that step: with nothing
    else drawn, a resumed run sees the same batches as one that was never stopped. Several workers
    compute it at the same time, each with a generator of its own; their gradients are averaged.
    """

    module: nn.Module
    loss: Callable[[Any, int, torch.Generator], Tensor]
    num_steps: int
    learning_rate: float
    checkpoint: Path
    seed: int = 0
    weight_decay: float = 0.01
    optimizers: Callable[[nn.Module, float, float], list[torch.optim.Optimizer]] = adamw
    workers: int = 1
    ema_decay: float = 0.0  # 0 keeps no average
    snapshot: Callable[[int, nn.Module], None] | None = None  # called with the averaged weights
    snapshot_seconds: float = 600.0
    checkpoint_seconds: float = 180.0


def train(run: Run, *, stop_after: int | None = None) -> nn.Module:
    """The trained module: its averaged weights if the run keeps an average.

    Args:
        stop_after: end early after this step, as an interruption would.
    """
    optimizers = run.optimizers(run.module, run.learning_rate, run.weight_decay)
    average = [p.detach().clone() for p in run.module.parameters()] if run.ema_decay else []
    first = _restore(run, optimizers, average)
    last = run.num_steps if stop_after is None else min(stop_after, run.num_steps)
    saved = shown = time.monotonic()
    smooth = 0.0
    replicas = replicate(run.module, run.workers)
    bar = tqdm(range(first, last), initial=first, total=run.num_steps, mininterval=10)
    for step in bar:
        loss = _step(run, step, replicas, optimizers)
        _follow(run, step, average)
        smooth = loss if step == first else 0.98 * smooth + 0.02 * loss
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        now = time.monotonic()
        if now - saved > run.checkpoint_seconds:
            _save(run, step + 1, optimizers, average)
            saved = now
        if run.snapshot and now - shown > run.snapshot_seconds:
            with averaged(run.module, average):
                run.snapshot(step + 1, run.module)
            shown = now
    if first < last:
        _save(run, last, optimizers, average)
    _load_average(run.module, average)
    return run.module


def one_cycle(step: int, num_steps: int, peak: float) -> float:
    """The learning rate of a step: a linear rise to the peak, then half a cosine to a hundredth."""
    rise = max(1, round(WARM_UP * num_steps))
    if step < rise:
        return peak * (0.04 + 0.96 * step / rise)
    part = torch.tensor((step - rise) / max(1, num_steps - rise))
    return peak * (0.01 + 0.99 * float(0.5 * (1 + torch.cos(torch.pi * part))))


def replicate(module: nn.Module, count: int) -> list[nn.Module]:
    """The module and copies that share its weights, but have gradients of their own."""
    copies = [copy.deepcopy(module) for _ in range(count - 1)]
    for replica in copies:
        for own, shared in zip(replica.parameters(), module.parameters(), strict=True):
            own.data = shared.data
    return [module, *copies]


def _step(
    run: Run, step: int, replicas: list[nn.Module], optimizers: list[torch.optim.Optimizer]
) -> float:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = one_cycle(step, run.num_steps, run.learning_rate)
    with ThreadPoolExecutor(run.workers, "", _share_threads, (run.workers,)) as pool:
        losses = list(pool.map(lambda pair: _backward(run, step, *pair), enumerate(replicas)))
        _average_gradients(replicas)
        nn.utils.clip_grad_norm_(run.module.parameters(), CLIP)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
    return sum(losses) / len(losses)


def _share_threads(workers: int) -> None:
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _backward(run: Run, step: int, worker: int, replica: nn.Module) -> float:
    seed = (run.seed * 1_000_003 + step) * run.workers + worker
    generator = torch.Generator().manual_seed(seed)
    replica.train().zero_grad(set_to_none=True)
    loss = run.loss(replica, step, generator)
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def _average_gradients(replicas: list[nn.Module]) -> None:
    if len(replicas) == 1:
        return
    first, *others = (_gradients(replica) for replica in replicas)
    for gradients in others:
        torch._foreach_add_(first, gradients)
    torch._foreach_div_(first, len(replicas))


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@torch.no_grad()
def _follow(run: Run, step: int, average: list[Tensor]) -> None:
    if average:
        decay = min(run.ema_decay, (1 + step) / (10 + step))
        parameters = [p.detach() for p in run.module.parameters()]
        torch._foreach_lerp_(average, parameters, 1 - decay)


class averaged:
    """Within the block the module has its averaged weights, afterwards its own again."""

    def __init__(self, module: nn.Module, average: list[Tensor]) -> None:
        self.module, self.average = module, average

    def __enter__(self) -> None:
        self.own = [p.detach().clone() for p in self.module.parameters()]
        _load_average(self.module, self.average)

    def __exit__(self, *_: object) -> None:
        _load_average(self.module, self.own)


@torch.no_grad()
def _load_average(module: nn.Module, average: list[Tensor]) -> None:
    for parameter, value in zip(module.parameters(), average, strict=False):
        parameter.copy_(value)


def _save(
    run: Run, step: int, optimizers: list[torch.optim.Optimizer], average: list[Tensor]
) -> None:
    state: dict[str, Any] = {
        "step": step,
        "num_steps": run.num_steps,
        "module": run.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average,
    }
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = run.checkpoint.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, run.checkpoint)


def _restore(run: Run, optimizers: list[torch.optim.Optimizer], average: list[Tensor]) -> int:
    if not run.checkpoint.exists():
        return 0
    state = torch.load(run.checkpoint, weights_only=True)
    if state["num_steps"] != run.num_steps:
        raise ValueError(
            f"{run.checkpoint} belongs to a run of {state['num_steps']} steps, not "
            f"{run.num_steps}. Ask for as many steps, or remove the file to start again."
        )
    run.module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for mine, value in zip(average, state["average"], strict=True):
        mine.copy_(value)
    return int(state["step"])
