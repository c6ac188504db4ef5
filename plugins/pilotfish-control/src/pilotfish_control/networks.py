"""What diffusers' ControlNets take and give: one for each kind of network that they steer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from pilotfish import InputError, ModelError, Run, mend_torchvision

from .loading import check_place, fitting

mend_torchvision()

import diffusers  # noqa: E402  # after the declaration, because it imports torchvision

Inputs = dict[str, Any]


class Kind:
    """The ControlNets of one network of diffusers, called as that network itself is called.

    Attributes:
        controlnet: the name of diffusers' class.
        alike: what must be the same in both configurations.
        keys: the network's arguments for what the ControlNet answers, in that order.
    """

    controlnet = "ControlNetModel"
    alike: tuple[str, ...] = (
        *("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"),
    )
    keys: tuple[str, ...] = (*("down_block_additional_residuals", "mid_block_additional_residual"),)

    def prepare(self, controlnet: Any, network: Any) -> None:
        """What the ControlNet needs of the network."""

    def see(self, controlnet: Any, run: Run, picture: Tensor) -> Tensor:
        """A picture (1, 3, 8H, 8W) in [0, 1] as the ControlNet takes it.

        Raises:
            InputError: it makes other sizes of it than the model's VAE.
        """
        halves = len(controlnet.config.conditioning_embedding_out_channels) - 1
        if 2**halves != run.model.factor:
            raise InputError(
                f"this ControlNet sees a cell in {2**halves} x {2**halves} pixels, and this "
                f"model's VAE in {run.model.factor} x {run.model.factor}: it was made for another "
                "model"
            )
        return picture

    def told(self, controlnet: Any, run: Run, told: Inputs) -> Inputs:
        """What the network is told, as the ControlNet takes it."""
        return told

    def spread(self, controlnet: Any, network: Any, answer: Sequence[Any]) -> list[Any]:
        """The residuals, one for each of the network's blocks that takes one."""
        return list(answer)


class SD3(Kind):
    """Of Stable Diffusion 3 and 3.5."""

    controlnet = "SD3ControlNetModel"
    alike = ("in_channels", "num_attention_heads", "attention_head_dim", "pooled_projection_dim")
    keys = ("block_controlnet_hidden_states",)

    def prepare(self, controlnet: Any, network: Any) -> None:
        if not controlnet.config.use_pos_embed:  # those of 3.5 large share the network's
            embed = controlnet._get_pos_embed_from_transformer(network)
            controlnet.pos_embed = embed.to(controlnet.device, controlnet.dtype)

    def see(self, controlnet: Any, run: Run, picture: Tensor) -> Tensor:
        # InstantX trained without the shift, and without the pooled embedding.
        return encoded(
            run, picture, shifted=not controlnet.config.force_zeros_for_pooled_projection
        )

    def told(self, controlnet: Any, run: Run, told: Inputs) -> Inputs:
        config, told = controlnet.config, dict(told)
        if config.force_zeros_for_pooled_projection:
            told["pooled_projections"] = torch.zeros_like(told["pooled_projections"])
        if config.joint_attention_dim is None:
            told["encoder_hidden_states"] = None
        return told

    def spread(self, controlnet: Any, network: Any, answer: Sequence[Any]) -> list[Any]:
        (samples,) = answer
        every = len(network.transformer_blocks) / len(samples)
        return [[samples[int(i / every)] for i in range(len(network.transformer_blocks))]]


class Flux(Kind):
    """Of FLUX.1."""

    controlnet = "FluxControlNetModel"
    alike = (
        *("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim"),
        *("pooled_projection_dim",),
    )
    keys = ("controlnet_block_samples", "controlnet_single_block_samples")

    def see(self, controlnet: Any, run: Run, picture: Tensor) -> Tensor:
        if controlnet.input_hint_block is not None:  # those of XLabs look at pixels
            return picture * 2 - 1
        # (1, HW / 4, 4C): two by two cells of the latents are a token.
        return pixel_unshuffle(encoded(run, picture), 2).flatten(2).transpose(1, 2)

    def told(self, controlnet: Any, run: Run, told: Inputs) -> Inputs:
        latents, guidance = told["hidden_states"], None
        if controlnet.config.guidance_embeds:
            guidance = torch.full([len(latents)], float(run.guidance_scale or 0)).to(latents.device)
        return {**told, "guidance": guidance}

    def spread(self, controlnet: Any, network: Any, answer: Sequence[Any]) -> list[Any]:
        double, single = answer
        again = controlnet.input_hint_block is not None
        return [
            along(double, len(network.transformer_blocks), again=again),
            along(single, len(network.single_transformer_blocks)),
        ]


def along(samples: Sequence[Tensor] | None, blocks: int, again: bool = False) -> Any:
    """FLUX's residuals for each block: one for several in a row, or all again and again."""
    if not samples:
        return None
    every = math.ceil(blocks / len(samples))
    return [samples[i % len(samples) if again else i // every] for i in range(blocks)]


def encoded(run: Run, picture: Tensor, shifted: bool = True) -> Tensor:
    """A picture's clean latents, by the mean of the VAE's posterior; scaled, and shifted or not."""
    vae = run.model.pipeline().vae
    mean = vae.encode((picture * 2 - 1).to(run.model.device, vae.dtype)).latent_dist.mode()
    latents: Tensor = (mean - vae.config.shift_factor * shifted) * vae.config.scaling_factor
    return latents


KINDS: Mapping[str, Kind] = {
    "UNet2DConditionModel": Kind(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
}
"""By the name of the network's class in diffusers."""


def kind_of(network: Any) -> Kind:
    """The ControlNets of a network.

    Raises:
        ModelError: there are none.
    """
    name = type(network).__name__
    if name not in KINDS:
        raise ModelError(f"plugin 'controlnet' steers {', '.join(KINDS)}; this model's is a {name}")
    return KINDS[name]


def load(model: Any, kind: Kind, network: Any, run: Run) -> Any:
    """A ControlNet for a network: a run's own, frozen, on the network's device.

    Args:
        model: a folder, a hub id, or a network of diffusers, which stays as it is.

    Raises:
        InputError: there is none, it was made for another network, or it cannot be loaded.
    """
    if isinstance(model, nn.Module):
        what, name = "the ControlNet", type(model).__name__
        config = getattr(model, "config", {})
    else:
        what, place = f"the ControlNet {model}", check_place(model, "ControlNet: model")
        with fitting(what, network):
            config = diffusers.ControlNetModel.load_config(place)
        name = str(config.get("_class_name"))
    check_fit(what, name, config, kind, network)
    if isinstance(model, nn.Module):
        controlnet = twin(model)
    else:
        with fitting(what, network):
            options = {"torch_dtype": run.model.dtype}
            controlnet = getattr(diffusers, name).from_pretrained(place, **options)
    # Its own `to` warns of layers to keep in float32, where there are none.
    nn.Module.to(controlnet, run.model.device, run.model.dtype).requires_grad_(False).eval()
    if run.checkpointing != "off":
        controlnet.enable_gradient_checkpointing()
    kind.prepare(controlnet, network)
    return controlnet


def check_fit(what: str, name: str, config: Mapping[str, Any], kind: Kind, network: Any) -> None:
    """Refuse a ControlNet of another class, or of other widths, than a network takes.

    Raises:
        InputError: says what it is, and what the network takes.
    """
    if name != kind.controlnet:
        raise InputError(
            f"{what} is a {name}; this model's {type(network).__name__} takes a {kind.controlnet}. "
            "It was made for another model family"
        )
    for key in kind.alike:
        ours, theirs = (plain(c.get(key)) for c in (config, network.config))
        if ours != theirs:
            raise InputError(
                f"{what} has {key} = {ours}, and this model's {type(network).__name__} {theirs}: "
                "it was made for another model"
            )


def plain(value: Any) -> Any:
    """A value of a configuration as it is in a file."""
    return list(value) if isinstance(value, tuple) else value


def twin(network: nn.Module) -> Any:
    """A network's modules once more, over the same weights."""
    weights = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, {**weights, **{id(b): b for b in network.buffers()}})


@dataclass
class Control:
    """A ControlNet in one run.

    Attributes:
        picture: as the ControlNet takes it, (1, ...).
        more: further arguments of its own.
        kept: of a step's first call: latents, whether with a graph, and the residuals.
    """

    kind: Kind
    controlnet: Any
    run: Run
    picture: Tensor
    more: Inputs
    kept: tuple[Tensor, bool, list[Any]] | None = None

    def residuals(self, latents: Tensor, timestep: Tensor, told: Any, scale: float) -> list[Any]:
        """What the ControlNet answers to what the network is asked, one value for each key.

        Where the family makes two predictions in calls of their own, its pipeline asks the
        ControlNet at the first of them, and the second call gets the same residuals.
        """
        model, graph = self.run.model, torch.is_grad_enabled()
        if self.kept and self.kept[1] == graph and torch.equal(self.kept[0], latents):
            return self.kept[2]
        answers: list[Sequence[Any]] = []

        def stand_in(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            answers.append(
                self.controlnet(*args, **self.kind.told(self.controlnet, self.run, kwargs))
            )
            return (args[0] if args else kwargs["hidden_states"],)

        # The family itself calls the ControlNet, as it would call its network.
        ask: Any = asking(model, stand_in).predict
        count = len(latents)
        own = {name: value.expand(count, *value.shape[1:]) for name, value in self.more.items()}
        picture = self.picture.expand(count, *self.picture.shape[1:])
        ask(latents, timestep, told, controlnet_cond=picture, conditioning_scale=scale, **own)
        found = self.kind.spread(self.controlnet, model.denoiser, answers[0])
        self.kept = None if model.together else (latents, graph, found)
        return found


def asking(model: Any, network: Any) -> Any:
    """A model with another network."""
    other = copy.copy(model)
    setattr(other, model.network, network)
    return other


def added(before: Any, came: Any) -> Any:
    """The sum of two plugins' residuals: a tensor, or as many as there are blocks."""
    if before is None or came is None:
        return came if before is None else before
    if isinstance(came, Tensor):
        return before + came
    return [one + other for one, other in zip(before, came, strict=True)]
