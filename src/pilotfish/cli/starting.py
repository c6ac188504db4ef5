"""How a command starts: what its process does without, and how long ago it began."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import module_from_spec
from types import SimpleNamespace
from typing import Any

import psutil

from .sources import spec_of


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """In here torch's compiler, sympy and scipy's statistics are imported only by who uses them.

    diffusers and transformers import both at the top of their modules, for decorators that tell a
    compiler what to leave alone, for the question whether a network is compiled, and for one
    scheduler's option: a third of the time until the first step. torch asks whether a network that
    has no weights yet is of symbols. Nothing is compiled in here, so the answers are known. Whoever
    asks for anything else, then or later, gets the real module.

    To be removed when they import them where they use them: `diffusers/utils/torch_utils.py`,
    `transformers/masking_utils.py` and diffusers' schedulers.
    """
    marks = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _unmarked)
    compiled = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
    with (
        _instead("torch._dynamo", eval_frame=compiled, **marks),
        _instead("torch._dynamo.utils", "is_compile_supported"),
        _instead("sympy", Basic=type("Basic", (), {})),
        _instead("scipy.integrate"),
        _instead("scipy.optimize", "linear_sum_assignment"),
        _instead("scipy.stats"),
        _instead("kornia.geometry", "pyrup"),
        _instead("kornia.geometry.transform", "build_laplacian_pyramid"),
        _instead("onnxruntime"),
    ):
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In here torch says that it knows no other processes, unless this one is of several.

    transformers then leaves out what divides networks among processes, as it does on builds of
    torch without that part: a tenth of the time until the first step.
    """
    import torch.distributed

    usual = torch.distributed.is_available
    if "WORLD_SIZE" not in os.environ:
        torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = usual


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with arguments or without, that leaves a function or class as it is."""
    return (lambda function: function) if function is None else function


@contextlib.contextmanager
def _instead(name: str, *functions: str, **known: Any) -> Iterator[None]:
    """A module that becomes the real one when anything is asked of it but what is known.

    Args:
        functions: may be imported from it; it becomes the real one when they are called.
    """
    spec = spec_of(name)
    if spec is None or spec.loader is None or name in sys.modules:
        yield
        return
    module, loader = module_from_spec(spec), spec.loader

    def real(attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system asks what kind of module it is
            raise AttributeError(attribute)
        if sys.modules.get(name) is not module:
            return getattr(import_module(name), attribute)
        if spec_of(f"{name}.{attribute}"):
            return import_module(f"{name}.{attribute}")
        for stand_in in (*known, "__getattr__"):
            delattr(module, stand_in)
        loader.exec_module(module)
        return getattr(module, attribute)

    def later(function: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: real(function)(*args, **kwargs)

    known |= {function: later(function) for function in functions}
    vars(module).update(known, __getattr__=real)
    sys.modules[name] = module
    try:
        yield
    finally:
        if "__getattr__" in vars(module):
            del sys.modules[name]


def seconds_since_start() -> float:
    """Since this process began, the interpreter's own start included."""
    return float(time.time() - psutil.Process().create_time())
