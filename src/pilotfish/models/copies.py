"""Copies of networks over the same weights: what one run patches, no other one sees."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

from torch import nn

# What a module keeps its hooks, an adapter's scales and the like in: a copy has its own.
CONTAINERS = {dict, list, OrderedDict}
HOLDERS = {types.MethodType, functools.partial}


def own_copy(network: Any, device: Any = None) -> Any:
    """A network's modules once more, over the same weights, which ask for no gradient there.

    A network whose weights hooks move between devices stays as it is: a copy would keep them.

    Args:
        device: where its weights shall lie; None is where they are.
    """
    if offload_hook(network):
        return network
    modules = list(network.modules())
    copies = {id(module): module.__new__(type(module)) for module in modules}
    weights = {id(p): _frozen(p, device) for p in network.parameters()}  # tied ones stay so
    for module in modules:
        twin = copies[id(module)]
        own = vars(twin)
        own.update(vars(module))
        for name, value in own.items():  # no key is added or taken away
            if type(value) in CONTAINERS:
                own[name] = value.copy() if value else type(value)()  # mostly empty
            elif type(value) in HOLDERS:
                own[name] = _rebound(value, module, twin)
        own["_modules"] = {n: m and copies[id(m)] for n, m in module._modules.items()}
        own["_parameters"] = {n: weights.get(id(p)) for n, p in module._parameters.items()}
        own["_buffers"] = {n: b if b is None else b.to(device) for n, b in module._buffers.items()}
    if config := vars(network).get("_internal_dict"):  # of diffusers, which loaders of adapters set
        copies[id(network)]._internal_dict = copy.copy(config)
    return copies[id(network)]


def float32(network: Any, kept: dict[Any, Any]) -> Any:
    """The network in float32, frozen: the last one, where neither network nor weights changed.

    Args:
        kept: what holds the last one.
    """
    settings = [value for value in vars(network).values() if isinstance(value, int | float)]
    tensors = [*network.parameters(), *network.buffers()]
    weights = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    last = kept.get("float32")
    if last is None or last[0] is not network or last[1:3] != (settings, weights):
        made = copy.deepcopy(network).float().requires_grad_(False)
        last = kept["float32"] = network, settings, weights, made
    return last[3]


def make_eager(network: Any) -> None:
    """Let a copy run its own modules from now on, where a compiled original would run its own."""
    for module in network.modules() if network is not None else ():
        vars(module)["_compiled_call_impl"] = None


def _frozen(parameter: Any, device: Any) -> Any:
    if device is None and not parameter.requires_grad:
        return parameter
    if type(parameter) is nn.Parameter:
        return nn.Parameter(parameter.detach().to(device), requires_grad=False)
    return parameter if device is None else parameter.to(device)  # one that is quantised


def _rebound(value: Any, module: Any, twin: Any) -> Any:
    """What holds on to a module (accelerate's `forward`) holds on to the copy instead."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and module in value.args:
        args = [twin if argument is module else argument for argument in value.args]
        return functools.partial(value.func, *args, **value.keywords)
    return value


def has_hooks(network: Any) -> bool:
    """Whether accelerate or diffusers does anything around its modules' calls.

    diffusers itself looks for where they run a network in 1 to 1.5 ms, which every run would wait.
    """
    hooks = {"_hf_hook", "_diffusers_hook"}
    return any(not hooks.isdisjoint(vars(module)) for module in network.modules())


def offload_hook(network: Any) -> bool:
    """Whether accelerate moves a network's weights from device to device while it runs."""
    hooks = (vars(module).get("_hf_hook") for module in network.modules())
    return any(getattr(h, "offload", False) or type(h).__name__ == "CpuOffload" for h in hooks)
