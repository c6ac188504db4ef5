"""Gradient checkpointing on a UNet of Stable Diffusion 1.5's shape."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pilotfish.model import diffusers
from pilotfish.text import Conditioning

pytestmark = pytest.mark.slow


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


def gradient_and_kept_bytes(model, checkpointing):
    """Of one prediction: the gradient at the latents, and what the graph keeps for it."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 32, 32, generator=generator).requires_grad_()
    conditioning = Conditioning(torch.randn(1, 77, 768, generator=generator))
    with model.differentiable(checkpointing):
        with Storages() as storages:
            output = model.predict(latents, torch.tensor(500), conditioning)
        kept = storages.alive(model.unet)
        (gradient,) = torch.autograd.grad(output.square().sum(), latents)
    return gradient, kept


def test_checkpointing_keeps_a_fifth_of_the_bytes_and_the_same_gradient(model):
    plain, all_bytes = gradient_and_kept_bytes(model, "off")
    checkpointed, fewer_bytes = gradient_and_kept_bytes(model, "on")
    print(f"kept: {all_bytes / 1e6:.0f} MB, checkpointed {fewer_bytes / 1e6:.0f} MB")
    assert fewer_bytes <= all_bytes / 5
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_auto_checkpoints_a_network_of_this_size(model):
    with model.differentiable("auto"):
        assert model.unet.is_gradient_checkpointing
    assert not model.unet.is_gradient_checkpointing
