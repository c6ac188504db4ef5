"""What outlives a run or an import: tensors, changed networks, switches of torch."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Ends of the search: from a function's globals or a class one reaches the whole program.
_ENDS = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)

# Run by a fresh interpreter. Its last line is what the import left there, as JSON.
_PROBE = """
import gc, importlib, json, sys
from pilotfish.hooks.registry import load_class
answer, target = {"missing": None, "networks": [], "tensors": 0}, sys.argv[1]
try:
    kept = load_class(target) if ".py:" in target else importlib.import_module(target)
except Exception as error:
    cause = error.__cause__ or error
    if not isinstance(cause, ModuleNotFoundError):
        raise
    answer["missing"] = cause.name
torch = sys.modules.get("torch")
if torch is not None:
    # isinstance() would ask proxies for their class, and load what they stand for.
    found = [o for o in gc.get_objects() if issubclass(type(o), (torch.nn.Module, torch.Tensor))]
    modules = [o for o in found if issubclass(type(o), torch.nn.Module)]
    answer["networks"] = sorted({type(m).__name__ for m in modules if list(m.parameters())})
    answer["tensors"] = sum(o.nbytes for o in found if issubclass(type(o), torch.Tensor))
print()
print(json.dumps(answer))
"""


def tensors_in(root: object) -> dict[int, Tensor]:
    """All tensors that an object holds, through attributes and containers, by their `id`."""
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        kind = type(item)  # isinstance() would ask proxies for their class, and load it
        if id(item) in seen or issubclass(kind, _ENDS):
            continue
        seen.add(id(item))
        if issubclass(kind, Tensor):
            found[id(item)] = item
        elif kind is types.FunctionType:
            waiting += item.__closure__ or ()
        else:
            waiting += gc.get_referents(item)
    return found


def shared_tensors(plugin: object) -> dict[int, Tensor]:
    """The tensors that a plugin's class and module hold, as `tensors_in`."""
    kinds = [kind for kind in type(plugin).__mro__ if not kind.__module__.startswith("pilotfish.")]
    modules = {kind.__module__ for kind in kinds} & set(sys.modules)
    owners = [*kinds, *(sys.modules[name] for name in modules)]
    return tensors_in([list(vars(owner).values()) for owner in owners])


def world_state(model: Any) -> dict[str, Any]:
    """What a run must leave as it was, by name: a model's networks, and torch's own switches."""
    state: dict[str, Any] = {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.are_deterministic_algorithms_enabled()": (
            torch.are_deterministic_algorithms_enabled()
        ),
    }
    for name, network in vars(model).items():
        if isinstance(network, nn.Module):
            state |= {f"model.{name}{path}": value for path, value in _network_state(network)}
    for encoder in getattr(model, "text_encoders", ()):
        state[f"the tokenizer of {encoder.name}"] = len(encoder.tokenizer)
    return state


def _network_state(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in network.named_modules():
        hooks = {n: len(v) for n, v in vars(module).items() if n.endswith("hooks") and v}
        dot = f".{path}" if path else ""
        yield dot, (module.training, hooks, "forward" in vars(module))
    for path, parameter in network.named_parameters():
        values = parameter.detach().double()
        yield f".{path}", (parameter.requires_grad, values.sum().item(), values.norm().item())


@functools.cache  # an import is the same every time, and torch's alone takes seconds
def left_by_import(target: str, path: tuple[str, ...]) -> dict[str, Any]:
    """What importing a plugin's module alone leaves in a fresh interpreter.

    Args:
        target: a module, or `file.py:Class`.
        path: where to look for modules, as `sys.path`.

    Returns:
        `missing`, a module that was not found; `networks`, names of classes with parameters;
        `tensors`, their bytes. Or `failure`, the error, where it does not import.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-c", _PROBE, target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().rpartition("\n")[2]
    if done.returncode or not last.startswith("{"):
        return {"failure": last or f"it ends Python, with exit code {done.returncode}"}
    answer: dict[str, Any] = json.loads(last)
    return answer
