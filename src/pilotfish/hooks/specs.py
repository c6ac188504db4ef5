"""Every hook with its contract: the plugin author's one page.

A plugin implements the hooks it needs and no others, and may leave out arguments that it does not
use. Plugins run in the order in which the user listed them; nothing else decides it. Kinds:

* **chain**: each plugin gets the last one's value and returns a new one, or `None` for unchanged.
  It never changes a tensor in place.
* **collect**: one answer from each plugin; `None` means "not now".
* **first**: the first answer that is not `None` wins; the core's own answer comes last.
* **notify**: returns nothing (`setup`: the plugin's state).

Every hook may also take `state`: what the plugin's own `setup` returned in this run. One plugin can
serve several runs at a time, so what belongs to a run is kept there, not in the plugin.

All hooks run under `torch.no_grad()`, except `loss_guidance`, and except `network_inputs`,
`combine_predictions` and `on_predicted_x0` in a step whose gradient goes through the network: there
they must stay differentiable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..models.protocol import Embedding
    from ..runs.run import Run
    from ..sampling.schedule import Start
    from ..sampling.step import Step

hookspec = pluggy.HookspecMarker("pilotfish")
hookimpl = pluggy.HookimplMarker("pilotfish")
"""Marks the hooks of an object that inherits from no `Plugin`: a decorator of its methods."""

KINDS: dict[str, str] = {}
"""All hooks, and how the answers of several plugins to each of them combine."""


def combined(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a hook whose answers combine so."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[function.__name__] = kind
        return hookspec(function)

    return declare


@combined("notify")
def setup(run: Run) -> Any:
    """Once, before anything else of the run: load what the plugin needs.

    Returns:
        The plugin's state of this run, which its hooks get as `state`; any object, or None.
    """


@combined("notify")
def teardown(run: Run, state: Any) -> None:
    """Notify, once, in reverse order: free what `setup` loaded. Called also when the run raised.

    Args:
        state: None also where `setup` has not run, because a plugin before this one failed.
    """


@combined("collect")
def vocabulary(run: Run, state: Any) -> dict[str, Any] | None:
    """Collect, once, before tokenising: new words for this run only.

    Returns:
        `{"<word>": (n, D) tensor}`, a word of n vectors as wide as the text encoder's embeddings.
        For a model with several text encoders `{"<word>": {encoder: (n, D) tensor}}`; one that is
        left out reads the word as the text that it is. Two plugins may not add the same word.
    """


@combined("chain")
def prompt_transform(prompt: str, run: Run, state: Any) -> str | None:
    """Chain, once for the prompt, before tokenising: text -> text. Not for the negative prompt."""


@combined("chain")
def embedding_transform(
    embedding: Embedding,
    run: Run,
    step: Step | None,
    encode: Callable[[str], Embedding] | None,
    state: Any,
) -> Embedding | None:
    """Chain, once at each stage for each of prompt and negative prompt, and each text encoder.

    `embedding.stage` is `"token"` (looked up, before positions and encoder) or `"prompt"` (the
    encoder's output); `embedding.role` is `"positive"` or `"negative"`.

    If any plugin of the run takes `step`, stage "prompt" comes again at the start of each step,
    for all plugins and from the encoder's output on: that is how conditioning changes in a run.

    Args:
        step: None before the first step.
        encode: at stage "prompt", gives another prompt's embedding as `embedding` was at the start
            of the chain: same encoder and role, with the words and the answers at stage "token" of
            all plugins.

    Returns:
        An `Embedding` made with `dataclasses.replace(embedding, values=...)`: the same T and D.
        At stage "prompt" the batch may be 1 (for all images) or the run's number of images.
    """


@combined("first")
def start_latents(run: Run, start: Start, state: Any) -> tuple[Tensor, int] | None:
    """First, once: where the run starts. The core's answer is pure noise at step 0.

    Args:
        start: the run's own generators, and noise at the level of any step.

    Returns:
        Latents (B, C, H, W) at the noise level of the first step, and that step's index.
    """


@combined("chain")
def before_step(step: Step, state: Any) -> Tensor | None:
    """Chain, each step, before the network: new latents (B, C, H, W) for `step.latents`.

    `step.latents` already holds what the plugins before this one answered.
    """


@combined("chain")
def network_inputs(inputs: Mapping[str, Any], step: Step, state: Any) -> Mapping[str, Any] | None:
    """Chain, before each call of the network: keyword arguments that are added to the call.

    Residuals of a ControlNet, image embeddings and the like: named as the network names them, and
    as long as what it gets: `step.network_latents` (N, C, H, W), scaled, and `step.conditioning`.
    Under classifier-free guidance N is 2B, the negative prompt's half first; a further prediction
    for the prompt (`further_prediction`) adds B behind them.

    Args:
        inputs: what the plugins before this one added; `{}` at first.
    """


@combined("collect")
def around_network(step: Step, state: Any) -> AbstractContextManager[Any] | None:
    """Collect, around each call of the network in this run, and in no other: a context manager.

    What it changes in `step.run.model.denoiser` (attention processors, adapters, hooks), which is
    this run's own copy of the modules over the shared weights, it undoes when it is left. Where
    layers are computed again for a gradient, it is asked once more.
    """


@combined("collect")
def further_prediction(
    step: Step, state: Any
) -> Callable[[slice], AbstractContextManager[Any]] | None:
    """Collect, each step, before the network: one more prediction for the prompt, by a changed one.

    What `combine_predictions` then finds as `step.further_prediction` goes through the network in
    one batch with the prediction for the prompt, and that for the negative one, where the family
    makes those in one call and no plugin of the run has `around_network`; else in a call of its
    own. `step.predict` makes predictions of every other kind.

    Returns:
        A function of a slice: a context manager that changes `step.run.model.denoiser` for these
        images of a call alone. It is asked again where layers are computed again for a gradient.
    """


@combined("chain")
def combine_predictions(
    prediction: Tensor, cond: Tensor, uncond: Tensor | None, step: Step, state: Any
) -> Tensor | None:
    """Chain, each step, after the network: the guided prediction.

    It begins with the family's classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598; for
    Stable Diffusion `uncond + guidance_scale * (cond - uncond)`), so that several plugins stack in
    the user's order. `step.predict` gives further predictions to combine.

    Args:
        prediction: (B, C, H, W), in the model's own prediction type, as the plugins before this
            one left it.
        cond: the network's prediction for the prompt, (B, C, H, W).
        uncond: that for the negative prompt; None where `guidance_scale` is 1 or less.
    """


@combined("chain")
def on_predicted_x0(x0: Tensor, step: Step, state: Any) -> Tensor | None:
    """Chain, each step, when x0 is known: clean latents (B, C, H, W), float32 -> the same shape.

    The scheduler then continues from the changed x0.
    """


@combined("collect")
def loss_guidance(step: Step, state: Any) -> Tensor | None:
    """Collect, each step on which the guide is active: what the guide wants lower.

    Runs under `torch.enable_grad()`. `step.x0`, `step.rgb` and `step.image` are float32 leaves:
    compute the loss from them. Only what is read is computed.

    Returns:
        One loss per image, shape (B,): reduce over all axes but the first, never over the batch.
    """


@combined("first")
def advance(step: Step, state: Any) -> Tensor | None:
    """First, each step, last: the next latents. The core's answer is `scheduler.step`."""


@combined("notify")
def after_step(step: Step, state: Any) -> None:
    """Notify, each step, when it is done: previews, logs. `step.stop()` ends the run early."""


@combined("first")
def resample(step: Step, state: Any) -> Sequence[int] | Tensor | None:
    """First, each step, after `after_step`: which images go on, and in whose place (particles).

    Returns:
        (B,) indices: place i goes on as image `indices[i]` has come so far. Latents, the random
        generators of the run and of all plugins, and the scheduler's history follow.

        Where a plugin has `particles`, B is that many times the run's `num_images`, with a
        picture's candidates side by side, and it is asked before the scheduler's step, in which
        those of one origin part: generators stay where they are. What the last step puts at the
        first place of a picture's candidates becomes the picture.
    """
