"""Gradient checkpointing: what it keeps of a UNet of Stable Diffusion 1.5's shape, and its undo."""

import contextlib
import copy

import pytest
import torch
from diffusers.models import resnet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pilotfish.models.checkpointing import checkpointed, parts
from pilotfish.models.protocol import Conditioning
from pilotfish.models.schedulers import diffusers


@pytest.fixture(scope="module")
def model(sampler):
    """The random model, with a UNet of 860 million parameters in the place of its own."""
    model = copy.copy(sampler.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964
    return model


class Storages(TorchDispatchMode):
    """All storages that operations made; those still alive are what the graph keeps."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return results

    def alive(self, apart):
        """Bytes, the parameters of a network apart: a view of a weight has its storage."""
        weights = {StorageWeakRef(p.untyped_storage()).cdata for p in apart.parameters()}
        alive = {ref.cdata: n for ref, n in self.sizes.items() if not ref.expired()}
        return sum(n for cdata, n in alive.items() if cdata not in weights)


def gradient_and_kept_bytes(model, checkpointing, side=32):
    """Of one prediction: the gradient at the latents, and what the graph keeps for it."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=generator).requires_grad_()
    conditioning = Conditioning(torch.randn(1, 77, 768, generator=generator))
    with model.differentiable(checkpointing):
        with Storages() as storages:
            output = model.predict(latents, torch.tensor(500), conditioning)
        kept = storages.alive(model.unet)
        (gradient,) = torch.autograd.grad(output.square().sum(), latents)
    return gradient, kept


@pytest.mark.slow
def test_checkpointing_keeps_a_tenth_of_the_bytes_and_the_same_gradient(model):
    plain, all_bytes = gradient_and_kept_bytes(model, "off")
    checkpointed, fewer_bytes = gradient_and_kept_bytes(model, "on")
    print(f"kept: {all_bytes / 1e6:.0f} MB, checkpointed {fewer_bytes / 1e6:.0f} MB")
    assert fewer_bytes <= all_bytes / 10
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.slow
def test_auto_checkpoints_a_network_of_this_size(model):
    _, kept = gradient_and_kept_bytes(model, "on", side=8)
    assert gradient_and_kept_bytes(model, "auto", side=8)[1] == kept
    assert gradient_and_kept_bytes(model, "off", side=8)[1] > kept


@pytest.mark.parametrize("fail", [False, True])
def test_a_forward_that_was_replaced_before_is_called_and_put_back(fail):
    """As accelerate's hooks replace it, to move what a module takes to its device."""
    block, calls = resnet.Downsample2D(4), []
    original = block.forward

    def hooked(*args):
        calls.append(args)
        if fail:
            raise RuntimeError("on purpose")
        return original(*args)

    block.forward = hooked
    expected = pytest.raises(RuntimeError, match="purpose") if fail else contextlib.nullcontext()
    with expected, checkpointed(parts(block)):
        assert block.forward is not hooked
        block(torch.ones(1, 4, 4, 4, requires_grad=True))
    assert calls and block.forward is hooked


def test_dropout_is_drawn_again_as_it_was():
    options = {"in_channels": 8, "temb_channels": None, "groups": 4, "dropout": 0.5}
    block = resnet.ResnetBlock2D(**options).train()
    image = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(modules):
        with torch.random.fork_rng(), checkpointed(modules):
            torch.manual_seed(1)
            output = block(image, None)
            return torch.autograd.grad(output.square().sum(), image)[0]

    torch.testing.assert_close(gradient(parts(block)), gradient([]), rtol=0, atol=0)
