"""How often a step waits for the device: a GPU is held up by each number that is read from it."""

import traceback
from contextlib import closing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default


class Reads(TorchDispatchMode):
    """Counts tensors that become numbers of Python's, but for those of diffusers' schedulers.

    What a scheduler reads lies on the CPU on every machine.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist  # which needs no operator on the CPU

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READING:
            files = [frame.filename for frame in traceback.extract_stack(limit=12)]
            self.count += not any("scheduling_" in file for file in files)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads_of_a_step(sampler, monkeypatch):
    """Of one in the middle of a run: `reads_of_a_step(plugin, ..., scheduler="ddim")`."""

    def run(*plugins, **options):
        with closing(sampler.stream("a cat", plugins=plugins, steps=4, **options)) as stream:
            next(stream)
            with Reads(monkeypatch) as reads:
                next(stream)
        return reads.count

    return run


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver-multistep"])
def test_a_step_waits_for_the_device_once(reads_of_a_step, scheduler):
    assert reads_of_a_step(scheduler=scheduler) == 1
    assert reads_of_a_step("pag", scheduler=scheduler) == 1


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_guided_step_waits_three_times_whatever_the_number_of_guides(reads_of_a_step, num_images):
    assert reads_of_a_step("blue", num_images=num_images) == 3
    assert reads_of_a_step("blue", "palette:colors=#ff0000", num_images=num_images) == 3
