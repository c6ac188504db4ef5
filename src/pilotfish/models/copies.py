"""Copies of networks over the same weights: what one run patches, no other one sees."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import nn

# What a module keeps of its hooks: dictionaries, each of which a copy has for itself.
HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
HOLDERS = {types.MethodType, functools.partial}


def own_copy(network: Any) -> Any:
    """A network's modules once more, over the same weights, which ask for no gradient there.

    A network whose weights hooks move between devices stays as it is: a copy would keep them.
    """
    if offload_hook(network):
        return network
    modules = list(network.modules())
    copies = {id(module): module.__new__(type(module)) for module in modules}
    for module in modules:
        twin = copies[id(module)]
        own = vars(twin)
        own.update(vars(module))
        for name in [name for name, value in own.items() if type(value) in HOLDERS]:
            own[name] = _rebound(own[name], module, twin)
        own["_modules"] = {n: m and copies[id(m)] for n, m in module._modules.items()}
        own["_parameters"] = {n: _frozen(p) for n, p in module._parameters.items()}
        own["_buffers"] = dict(module._buffers)
        for name in HOOKS:
            own[name] = own[name].copy() if own[name] else type(own[name])()  # mostly empty
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


def _frozen(parameter: Any) -> Any:
    if type(parameter) is nn.Parameter and parameter.requires_grad:
        return nn.Parameter(parameter.detach(), requires_grad=False)
    return parameter  # frozen already, or of a kind that has more to it: quantised


def _rebound(value: Any, module: Any, twin: Any) -> Any:
    """What holds on to a module (accelerate's `forward`) holds on to the copy instead."""
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and module in value.args:
        args = [twin if argument is module else argument for argument in value.args]
        return functools.partial(value.func, *args, **value.keywords)
    return value


def offload_hook(network: Any) -> bool:
    """Whether accelerate moves a network's weights from device to device while it runs."""
    hooks = (vars(module).get("_hf_hook") for module in network.modules())
    return any(getattr(h, "offload", False) or type(h).__name__ == "CpuOffload" for h in hooks)
