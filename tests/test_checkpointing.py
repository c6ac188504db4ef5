"""Gradient checkpointing: what it keeps of a UNet of Stable Diffusion 1.5's shape, and its undo."""

import contextlib
import functools

import pytest
import torch
from diffusers.models import resnet
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pilotfish import Sampler
from pilotfish.models.checkpointing import checkpoint_layers
from pilotfish.models.copies import own_copy
from pilotfish.models.protocol import Conditioning
from pilotfish.models.schedulers import diffusers
from pilotfish.testing import random_pipeline


@pytest.fixture(scope="module")
def model():
    """The random model, with a UNet of 860 million parameters in the place of its own."""
    pipeline = random_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet = diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=16
        ).eval()
    assert sum(p.numel() for p in pipeline.unet.parameters()) > 800_000_000
    return Sampler.from_pipeline(pipeline).model


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
    conditioning = Conditioning({"values": torch.randn(1, 77, 16, generator=generator)})
    own = model.differentiable(checkpointing)
    with Storages() as storages:
        output = own.predict(latents, torch.tensor(500), conditioning)
    kept = storages.alive(own.unet)
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


def checkpointed(network):
    """A copy of a network whose layers keep only their inputs."""
    own = own_copy(network)
    checkpoint_layers(own, "on", contextlib.nullcontext)
    return own


def test_a_forward_that_was_replaced_before_is_called_and_stays():
    """As accelerate's hooks replace it, to move what a module takes to its device."""
    block, calls = resnet.Downsample2D(4), []
    original = block.forward

    def hooked(*args):
        calls.append(args)
        return original(*args)

    block.forward = hooked
    own = checkpointed(block)
    own(torch.ones(1, 4, 4, 4, requires_grad=True)).sum().backward()
    assert len(calls) == 2  # once more for the gradient
    assert block.forward is hooked and own.forward is not hooked


def test_a_copy_is_bound_to_itself_and_shares_its_weights():
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=4).eval()
    block.norm1._old_forward = block.norm1.forward
    block.norm1.forward = functools.partial(lambda m, x: m._old_forward(x) * m.gain, block.norm1)
    block.norm1.gain = 1.0
    own = own_copy(block)
    own.norm1.gain = 2.0
    image = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(own(image, None), block(image, None))
    own.norm1.gain = 1.0
    assert torch.equal(own(image, None), block(image, None))
    for ours, theirs in zip(own.parameters(), block.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and theirs.requires_grad
        assert not ours.requires_grad


def test_dropout_is_drawn_again_as_it_was():
    options = {"in_channels": 8, "temb_channels": None, "groups": 4, "dropout": 0.5}
    block = resnet.ResnetBlock2D(**options).train()
    image = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(module):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            output = module(image, None)
            return torch.autograd.grad(output.square().sum(), image)[0]

    torch.testing.assert_close(gradient(checkpointed(block)), gradient(block), rtol=0, atol=0)


def test_a_hook_on_a_copy_is_not_on_the_original():
    block = resnet.Downsample2D(4)
    block.register_forward_hook(lambda *_: None)
    own = own_copy(block)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        getattr(own, register)(lambda *_: None)
    own.register_full_backward_hook(lambda *_: None)
    assert (len(own._forward_hooks), len(block._forward_hooks)) == (2, 1)
    assert not block._forward_pre_hooks and not block._backward_hooks


def test_lists_tables_and_the_configuration_of_a_copy_are_its_own():
    """An adapter's scales lie in such tables, and loaders of adapters set the configuration."""
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    network.encoder.scales, network.encoder.names = {"one": 1.0}, ["one"]
    own = own_copy(network)
    own.encoder.scales["two"] = 2.0
    own.encoder.names.append("two")
    own.config.scaling_factor = 3.0
    assert (network.encoder.scales, network.encoder.names) == ({"one": 1.0}, ["one"])
    assert network.config.scaling_factor == 1.0
    assert own.config.latent_channels == network.config.latent_channels
