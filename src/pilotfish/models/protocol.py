"""What the engine needs of a model: `LatentDiffusion`, which one file of each family answers.

The engine sees unpacked, normalised latents (B, C, H, W) and conditioning as named tensors.
Packing, signs, maps of time, learned variances, norms after guidance and the VAE's normaliser stay
in the family.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ModelError

Role = Literal["positive", "negative"]
Generators = Sequence[torch.Generator]  # one for each image
Again = Callable[[], AbstractContextManager[Any] | None]  # see `LatentDiffusion.differentiable`


@dataclass(frozen=True)
class Embedding:
    """A prompt's embedding at one of two stages; change it with `dataclasses.replace`.

    Attributes:
        stage: "token" (looked up, before positions and encoder) or "prompt" (encoder's output).
        role: "positive" or "negative" prompt.
        values: (B, T, D), with B = 1: all images of a run share the prompt.
        pooled: (B, D), at stage "prompt" where the encoder gives one, else None.
        tokens: the T tokens as the tokenizer writes them, among them its start, end and padding.
        encoder: the text encoder's name in the model, "text_encoder" for Stable Diffusion.
    """

    stage: Literal["token", "prompt"]
    role: Role
    values: Tensor
    pooled: Tensor | None
    tokens: tuple[str, ...]
    encoder: str


@dataclass(frozen=True)
class Tokens:
    """A prompt as a text encoder takes it.

    Attributes:
        ids: (1, T).
        pieces: the T tokens as the tokenizer writes them.
        used: how many there are before the padding.
        added: vectors (D,) of words that plugins added, by position.
        mask: (1, T), 1 where there is no padding.
    """

    ids: Tensor
    pieces: tuple[str, ...]
    used: int
    added: Mapping[int, Tensor]
    mask: Tensor


OnToken = Callable[[Embedding], Embedding]


class TextEncoder(Protocol):
    """One text encoder of a model with its tokenizer.

    Attributes:
        name: "text_encoder", "text_encoder_2", ...
        kind: "clip", "t5" or "qwen".
        width: D, of its token embeddings.
        length: T, its tokens, among them those that it adds itself.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def network(self) -> Any: ...

    @property
    def width(self) -> int: ...

    @property
    def length(self) -> int: ...

    def with_words(self, words: Mapping[str, Tensor]) -> TextEncoder:
        """The same encoder, which also knows these words of vectors (n, D).

        Raises:
            InputError: it knows one of them already.
        """

    def ids(self, word: str) -> list[int]:
        """The tokens of a word or two as they stand in a prompt, without what goes around one."""

    def tokenize(self, text: str, length: int | None = None) -> Tokens:
        """A text's tokens, cut to `length`.

        Args:
            length: the run's `max_sequence_length`; an encoder of one length does not heed it.

        Warns:
            UserWarning: words were dropped; names them.
        """

    def on(self, device: torch.device) -> TextEncoder:
        """The same encoder, ready on a device, where its network waits elsewhere."""

    def encode(self, tokens: Tokens, role: Role, on_token: OnToken | None) -> Embedding:
        """The embedding at stage "prompt", with `on_token`'s answer at stage "token" in it."""


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of a prompt: named tensors, batch first.

    Attributes:
        tensors: `values` (B, T, D), and what else the family's network takes: `mask` (B, T),
            `pooled` (B, D) ...
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @classmethod
    def alike(cls, tensors: Mapping[str, Tensor]) -> Conditioning:
        """All for as many images as any of them is: a plugin may give each image its own."""
        return cls(tensors).expand(max(len(tensor) for tensor in tensors.values()))

    def expand(self, num_images: int) -> Conditioning:
        """The same prompt for each image."""
        every = {name: t.expand(num_images, *t.shape[1:]) for name, t in self.tensors.items()}
        return Conditioning(every)

    def cat(self, other: Conditioning) -> Conditioning:
        """Both along the batch, this one first; where T differs, padded and with a mask."""
        lengths = {self["values"].shape[1], other["values"].shape[1]}
        ours, theirs = self._padded(max(lengths)), other._padded(max(lengths))
        # A mask that is made here is not looked into: a GPU would be waited for.
        whole = len(lengths) == 1 and ("mask" not in other.tensors or other["mask"].all())
        if "mask" not in self.tensors and whole:
            del ours["mask"], theirs["mask"]
        return Conditioning({name: torch.cat([t, theirs[name]]) for name, t in ours.items()})

    def _padded(self, length: int) -> dict[str, Tensor]:
        values = self["values"]
        mask = self.tensors.get("mask", torch.ones_like(values[..., 0], dtype=torch.bool))
        more = length - values.shape[1]
        padded = {"values": pad(values, (0, 0, 0, more)), "mask": pad(mask, (0, more))}
        return {**self.tensors, **padded}


@dataclass(frozen=True)
class Site:
    """A place in the network where plugins change attention.

    Attributes:
        name: the module's path in the denoiser.
        module: of diffusers.
        kind: "self" among image tokens, "cross" from image to text, or "joint" of both.
        image: which of the tokens in its `hidden_states` are the image's, for the model's `size`.
        text_first: whether the text's, where they come apart from them, are first in attention.
    """

    name: str
    module: Any
    kind: Literal["self", "cross", "joint"]
    image: slice
    text_first: bool = False


@dataclass(frozen=True)
class Defaults:
    """A run's values where the user leaves them open: the family's pipeline's own, or the folder's.

    Attributes:
        height, width: in pixels.
        scheduler: see `Run.scheduler`; None is the model's own.
        true_cfg_scale, max_sequence_length: None where the pipeline takes no such thing.
    """

    steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: Any = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None

    @classmethod
    def of(cls, pipeline: Any, folder: Path | None, height: int, width: int) -> Defaults:
        """The pipeline's own, where `pilotfish.toml` in the model's folder says nothing else.

        Raises:
            ModelError: that file is not TOML, or has another key.
        """
        takes = inspect.signature(type(pipeline).__call__).parameters
        values = {n: takes[n].default for n in cls.__dataclass_fields__ if n in takes}
        values |= {"steps": takes["num_inference_steps"].default, "height": height, "width": width}
        file = folder / "pilotfish.toml" if folder else None
        try:
            text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
            return cls(**{**values, **tomllib.loads(text)})
        except (ValueError, TypeError) as error:
            keys = ", ".join(cls.__dataclass_fields__)
            raise ModelError(f"cannot read {file}, a TOML file with {keys}: {error}") from error


class LatentDiffusion(Protocol):
    """A latent diffusion model.

    Attributes:
        id: the folder, file or hub id that it came from.
        config: the folder or hub id of a single file's configuration, where one was named.
        folder: where it lies on this disk, if it does.
        factor: pixels of the picture for each cell of the latents, along a side: the 8 of `8H`.
        size: height and width of a run's pictures, in pixels; `sites` go by it.
        guidance: "cfg": by two predictions; "embedded": told to the network.
        together: whether the family's pipeline makes both predictions in one call of the network;
            otherwise first that for the prompt.
        masked: whether the network takes prompts of any length, with a mask.
        latents_dtype: the number format in which the family's pipeline keeps latents.
        denoiser: the module that patches hold on to.
        sites: the denoiser's attention, in order.
    """

    id: str | None
    config: str | None
    folder: Path | None
    device: torch.device
    dtype: torch.dtype
    text_encoders: Sequence[TextEncoder]
    defaults: Defaults
    factor: int
    size: tuple[int, int]
    guidance: frozenset[str]
    together: bool
    masked: bool

    @property
    def latents_dtype(self) -> torch.dtype: ...

    @property
    def denoiser(self) -> Any: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    def fingerprint(self) -> str | None:
        """A hash that the networks' weights, as they are now, share with no others; None: unknown.

        Cheap: every run asks for it, before its first step.
        """

    def pipeline(self) -> Any:
        """A pipeline of diffusers over these networks, for its loaders; None where there is none.

        In a run these are the run's own copies: what is loaded into them ends with it.
        """

    def new_scheduler(self, spec: Any) -> Any:
        """A fresh scheduler (see `Run.scheduler`)."""

    def describe_scheduler(self, spec: Any) -> str | dict[str, Any]:
        """A scheduler as a run file holds it: its name, and what differs from the model's."""

    def set_timesteps(self, scheduler: Any, steps: int, shape: Sequence[int]) -> None:
        """Let a scheduler choose its steps for latents (C, H, W): sigmas, mu, shift."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) for a size in pixels."""

    def noise(self, shape: Sequence[int], generators: Generators, dtype: torch.dtype) -> Tensor:
        """Noise (B, C, H, W) on the CPU, drawn as the family's pipeline draws it."""

    def condition(self, embeddings: Sequence[Embedding], role: Role, run: Any) -> Conditioning:
        """One prompt's embeddings, one of each text encoder, as the network takes them."""

    def predict(
        self, latents: Tensor, timestep: Any, conditioning: Conditioning, **inputs: Any
    ) -> Tensor:
        """The network's output for scaled latents (B, C, H, W).

        Args:
            inputs: further keyword arguments of the network.
        """

    def cfg_scale(self, run: Any) -> float | None:
        """The scale of a run's classifier-free guidance; None where there is none."""

    def combine(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the family's pipeline does it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents -> image (B, 3, 8H, 8W), at least float32, in [0, 1] but not clamped."""

    def decode_float32(self, latents: Tensor) -> Tensor:
        """As `decode`, with the decoder itself in float32."""

    def decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """`decode`, or what stands in for it where guides look; see `Run.decoder`."""

    def encode(self, image: Tensor, generator: Generators | None = None) -> Tensor:
        """Image (B, 3, 8H, 8W) in [0, 1] -> clean latents.

        Args:
            generator: draws from what the encoder deems likely, where it does so; of one picture as
                many latents as there are generators. None takes the mean.
        """

    def rgb(self, latents: Tensor) -> Tensor:
        """Clean latents -> linear estimate of the colours at latent size (B, 3, H, W)."""

    def differentiable(
        self, checkpointing: str, again: Again | None = nullcontext
    ) -> LatentDiffusion:
        """The same model as one run uses it: on copies of the modules over the same weights.

        They are frozen, and checkpointed if asked; what is patched in them nobody else sees.

        Args:
            checkpointing: see `Run.checkpointing`.
            again: asked where a checkpointed layer runs: what to put around it when it is computed
                again, or None where that cannot be, and it must keep what it needs. `again` itself
                is None where nothing is patched and no gradient taken: then nothing is copied.
        """

    def refuse_gradients(self) -> str | None:
        """Why no gradient can go through the networks now, and nothing be patched; or None."""
