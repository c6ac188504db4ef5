"""The plugin `nag`: a negative prompt in the attention, for models without guidance too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pilotfish import Conditioning, ModelError, Setting

from .predictions import Windowed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pilotfish import Embedding, Run, Step

Embeddings = dict[str, "Embedding"]  # the negative prompt's, by text encoder


class Nag(Windowed):
    """Lead attention away from a negative prompt, also where there is no guidance: NAG.

    Chen et al. 2025, "Normalized Attention Guidance: Universal Negative Guidance for Diffusion
    Models", arXiv 2505.21179: where image tokens have attended to the text, z = s z+ - (s - 1) z-
    of the two prompts; its L1 norm, token by token, is at most `tau` times that of z+; and alpha z
    + (1 - alpha) z+ goes on. Self-attention of a UNet and pooled embeddings know the prompt alone.
    """

    class Settings(Windowed.Settings):
        negative_prompt: str = Setting(
            "",
            description="what the picture should not show; the run's own one counts for nothing "
            "here",
        )
        scale: float = Setting(5.0, ge=1, description="how far away from it; 1 is off")
        tau: float = Setting(
            2.5, gt=0, description="how much larger attention may become, as a factor of its norm"
        )
        alpha: float = Setting(
            0.25,
            ge=0,
            le=1,
            description="how much of the result goes on; 0 is off",
        )

    def setup(self, run: Run) -> Embeddings:
        if not any(map(sees_text, run.model.sites)):
            raise ModelError(
                "nag: this model's family names no attention to the text (sites), so there is "
                "nothing to lead away; use guidance and the run's negative_prompt"
            )
        return {}

    def embedding_transform(
        self, embedding: Embedding, encode: Callable[[str], Embedding] | None, state: Embeddings
    ) -> None:
        if encode is not None and embedding.role == "positive":
            state[embedding.encoder] = encode(self.settings.negative_prompt)

    def around_network(self, step: Step, state: Embeddings) -> AbstractContextManager[Any] | None:
        settings, run = self.settings, step.run
        if settings.scale == 1 or settings.alpha == 0 or not self._inside(step):
            return None
        if not told_the_prompt(step):
            return None
        embeddings = [state[encoder.name] for encoder in run.model.text_encoders]
        # In the prompt's role: some families leave a negative prompt that the run has not at zero.
        negative = run.model.condition(embeddings, "positive", run).expand(run.num_images)
        return patched(run.model, negative, self._mixed)

    def _mixed(self, told: Tensor, negative: Tensor) -> Tensor:
        """Algorithm 1 of the paper, of attention outputs (B, T, D)."""
        settings = self.settings
        away = settings.scale * told - (settings.scale - 1) * negative
        norms = [t.norm(p=1, dim=-1, keepdim=True) for t in (told, away)]  # (B, T, 1)
        most = settings.tau * norms[0] / norms[1].clamp(min=torch.finfo(away.dtype).tiny)
        mixed: Tensor = torch.lerp(told, away * most.clamp(max=1), settings.alpha)
        return mixed


def sees_text(site: Any) -> bool:
    """Whether image tokens attend to text there."""
    return bool(site.kind != "self")


def told_the_prompt(step: Step) -> bool:
    """Whether the last images of the present call are told the run's prompt."""
    prompt = step.embeddings
    told = step.conditioning["values"][-len(prompt) :, : prompt.shape[1]]
    return told.shape == prompt.shape and torch.equal(told, prompt)


@contextlib.contextmanager
def patched(
    model: Any, negative: Conditioning, mix: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """The last images of a call twice, once with the negative prompt, and their attention mixed.

    Where text is only looked at, attention alone has them twice; where it is changed on the way,
    the whole network. The image tokens of both stay the same, for both go on with the mixture.

    Args:
        negative: as many images as the run has.
        mix: of attention outputs to the prompt and to the negative prompt, (B, T, D) each.
    """
    count = len(negative["values"])

    def mixed(image: slice, values: Tensor) -> Tensor:
        others, *two = torch.split(values, [len(values) - 2 * count, count, count])
        mixture = mix(*(both[:, image] for both in two))
        changed = [both.clone() for both in two]
        for both in changed:
            both[:, image] = mixture
        return torch.cat([others, *changed])

    with ExitStack() as undo:
        for site in filter(sees_text, model.sites):
            undo.callback(hooked(site.module, partial(mixed, site.image)).remove)
            if site.kind == "cross":
                processor = site.module.processor
                undo.callback(site.module.set_processor, processor)
                site.module.set_processor(partial(attended_twice, processor, negative["values"]))
            elif "predict" not in vars(model):
                vars(model)["predict"] = partial(predicted_twice, model.predict, negative)
                undo.callback(vars(model).pop, "predict")
        yield


def hooked(attention: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes what attention gives (B, T, D), before any projection of it."""
    out = getattr(attention, "to_out", None)
    if out is None:  # a single block of FLUX.1 projects elsewhere

        def given(_: Any, __: Any, values: Tensor) -> Tensor:
            return change(values)

        return attention.register_forward_hook(given)

    def taken(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        width = attention.inner_dim  # one of FLUX.2 has a part that is no attention behind it
        values, rest = inputs[0][..., :width], inputs[0][..., width:]
        return (torch.cat([change(values), rest], dim=-1),)

    if isinstance(out, nn.ModuleList):
        out = out[0]
    return out.register_forward_pre_hook(taken)


def attended_twice(
    processor: Any, negative: Tensor, attn: Any, hidden_states: Tensor, **inputs: Any
) -> Tensor:
    """An attention processor's answer, with the last images' attention to the negative prompt."""
    told = inputs.pop("encoder_hidden_states")
    both = torch.cat([told, negative.to(told)])
    hidden = torch.cat([hidden_states, hidden_states[-len(negative) :]])
    answer: Tensor = processor(attn, hidden, encoder_hidden_states=both, **inputs)
    return answer[: len(hidden_states)]


def predicted_twice(
    predict: Callable[..., Tensor],
    negative: Conditioning,
    latents: Tensor,
    timestep: Any,
    conditioning: Conditioning,
    **inputs: Any,
) -> Tensor:
    """The network's answer, made together with the last images told the negative prompt."""
    count = len(negative["values"])
    last = {name: t[-count:] for name, t in conditioning.tensors.items() if name != "mask"}
    text = {name: t for name, t in negative.tensors.items() if name in ("values", "mask")}
    both = conditioning.cat(Conditioning({**last, **text}))
    more = longer(inputs, len(latents), count)
    return predict(torch.cat([latents, latents[-count:]]), timestep, both, **more)[: len(latents)]


def longer(value: Any, length: int, count: int) -> Any:
    """All tensors of `length` images in a value with the last ones once more."""
    if isinstance(value, Tensor) and len(value) == length:
        return torch.cat([value, value[-count:]])
    if isinstance(value, dict):
        return {name: longer(part, length, count) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(longer(part, length, count) for part in value)
    return value
