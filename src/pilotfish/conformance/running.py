"""The checks that look at a plugin's runs, each of two steps."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PilotfishError
from ..hooks.plugin import Guide, Plugin, guide
from ..sampling.sampler import Sampler
from .check import Broken, NotTried, check
from .leftovers import shared_tensors, tensors_in
from .still import settings, signature
from .trial import SEEDS, Trial

# ---- ordinary runs ----


def _blame(trial: Trial, name: str) -> None:
    """Raise what went wrong in the ordinary runs, where it belongs to the check of that name."""
    if trial.trouble is None:
        return
    owner, message = trial.trouble
    if owner == name:
        raise Broken(message)
    raise NotTried(f"see {owner}")


@check(signature, settings)
def runs(trial: Trial) -> None:
    """It runs with one and with two images, and no hook raises."""
    _blame(trial, "runs")


@check(signature, settings)
def loss(trial: Trial) -> None:
    """Its loss is finite, has one value per image, and a gradient."""
    _blame(trial, "loss")
    records = [r for r in trial.ordinary.trace if r.loss]
    if not records:
        raise NotTried("it gave no loss in these runs")
    if any(v for r in records for v in r.loss) and not any(
        n for r in records for n in r.gradient_norm
    ):
        raise Broken(
            f"its loss has a gradient of zero at each of {len(records)} steps: it moves nothing. "
            "Rounding, comparing and counting have none"
        )


@check(signature, settings)
def answers(trial: Trial) -> None:
    """What its hooks answer has the type, shape, dtype and device of what they are given."""
    _blame(trial, "answers")


@check(signature, settings)
def inputs(trial: Trial) -> None:
    """No hook changes what it is given."""
    _blame(trial, "inputs")


ORDINARY = (signature, settings, runs, loss, answers, inputs)


@check(*ORDINARY)
def undo(trial: Trial) -> None:
    """It leaves the model's networks and torch's switches as they were."""
    before, after = trial.ordinary.before, trial.ordinary.after
    if changed := [name for name in before | after if before.get(name) != after.get(name)]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Broken(f"leaves {', '.join(changed[:3])}{more} changed; undo it in teardown")


@check(*ORDINARY, undo)
def random_state(trial: Trial) -> None:
    """It leaves all global random generators alone."""
    if trial.drawn:
        raise Broken(
            f"uses the global random state of {' and '.join(sorted(trial.drawn))}; draw from "
            "step.generator, and make what draws by itself under torch.random.fork_rng()"
        )


# ---- one run against another ----


@check(*ORDINARY, undo, random_state)
def repeat(trial: Trial) -> None:
    """It gives the same picture when it runs again, as it is and made afresh."""
    plugin, singles = trial.twin(), trial.ordinary.singles
    fresh = [trial.latents(trial.twin(), seed=seed) for seed in SEEDS]
    if not _equal(fresh, singles):
        raise Broken(
            "gives another picture when it runs again, made afresh too: it depends on a clock, "
            "on a global, or on an attribute of its class"
        )
    if not _equal([trial.latents(plugin, seed=seed) for seed in SEEDS], singles):
        raise Broken(
            "gives another picture when it runs again: it keeps something of the last run. "
            "Make it anew in setup"
        )


@check(*ORDINARY, undo, random_state, repeat)
def instances(trial: Trial) -> None:
    """Two instances in two runs at a time do not know of each other."""
    streams = [
        trial.stream(trial.twin(), seed=SEEDS[0]),
        trial.stream(trial.twin(), seed=SEEDS[0], num_images=2),
    ]
    single, pair = trial.take(*streams)
    if not _equal([single, pair], [trial.ordinary.singles[0], trial.ordinary.pair]):
        raise Broken(
            "gives another picture while another instance runs; keep what belongs to a run in "
            "the instance, not in its class or module"
        )


@check(*ORDINARY, undo, random_state, repeat)
def batch(trial: Trial) -> None:
    """An image's neighbours in the batch do not change it."""
    alone = torch.cat(trial.ordinary.singles)
    # Convolutions sum in another order for another batch size.
    if not torch.allclose(trial.ordinary.pair, alone, atol=1e-3):
        raise Broken(
            "gives an image another picture beside a neighbour; reduce over all axes but the "
            "first, and draw from step.generator, one for each image"
        )


@check(*ORDINARY, undo)
def scale_0(trial: Trial) -> None:
    """A guide at scale 0 gives the picture to the bit that there is without it."""
    if not isinstance(trial.plugin, Guide):
        raise NotTried("it has no scale")
    if not torch.equal(trial.latents(trial.twin(scale=0.0)), trial.ordinary.absent):
        raise Broken(
            "changes the picture at scale 0; let the other hooks do nothing where "
            "self.settings.scale is 0"
        )


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- other runs ----


@check(*ORDINARY, undo)
def sizes(trial: Trial) -> None:
    """It runs at sizes that are not square."""
    run = trial.stream().run
    side = run.height or 0
    trial.latents(trial.twin(), height=side, width=side + side // 2)


@check(*ORDINARY, undo)
def bfloat16(trial: Trial) -> None:
    """It runs with networks in bfloat16."""
    trial.latents(trial.twin(), sampler=in_bfloat16(trial.sampler))


def in_bfloat16(sampler: Sampler) -> Sampler:
    """The same model with copies of its networks in bfloat16."""
    model: Any = copy.copy(sampler.model)
    copies = {
        id(part): nn.Module.to(copy.deepcopy(part), torch.bfloat16)  # diffusers' own one warns
        for part in vars(model).values()
        if isinstance(part, nn.Module)
    }
    vars(model).update({n: copies.get(id(part), part) for n, part in vars(model).items()})
    model.text_encoders = tuple(
        dataclasses.replace(encoder, network=copies.get(id(encoder.network), encoder.network))
        for encoder in model.text_encoders
    )
    model.dtype = torch.bfloat16
    return Sampler(model)


@check(*ORDINARY, undo)
def through_network(trial: Trial) -> None:
    """It runs where the gradient goes through the network, its own or another guide's."""
    if isinstance(trial.plugin, Guide):
        trial.latents(trial.twin(gradient="latents"))
    elif hasattr(trial.plugin, "on_predicted_x0") or hasattr(trial.plugin, "combine_predictions"):
        other = guide(lambda step: step.x0.square().mean(dim=(1, 2, 3)), gradient="latents")
        trial.latents(trial.twin(), other)
    else:
        raise NotTried("it stands outside of that gradient")


@check(*ORDINARY, undo)
def teardown(trial: Trial) -> None:
    """After a run, whole or cut short, nothing is held of what its setup loaded."""
    plugin = trial.twin()
    counts = [len(_held(plugin))]
    for how, run in (("a run", trial.latents), ("a run that was cut short", trial.cut_short)):
        trial.loaded = []
        run(plugin)
        held = tensors_in(plugin)
        if kept := [t for t in trial.loaded if id(t) in held]:
            size = sum(t.nbytes for t in kept) / 2**20
            raise Broken(
                f"still holds {size:.2g} MB of tensors that its setup loaded, after {how}; "
                "drop them in teardown"
            )
        counts.append(len(_held(plugin)))
    if counts[0] < counts[1] < counts[2]:  # what runs fill once is full by now
        raise Broken("holds more tensors with each run; drop them in teardown")
    _check_teardown_without_setup(trial)


def _held(plugin: object) -> dict[int, Tensor]:
    """The tensors of a plugin, its class and its module."""
    return {**tensors_in(plugin), **shared_tensors(plugin)}


def _check_teardown_without_setup(trial: Trial) -> None:
    """The core tears all plugins down, also where the setup of one before them raised."""

    class Fails(Plugin):
        def setup(self) -> None:
            raise PilotfishError("on purpose")

    try:
        trial.latents(Fails(), trial.twin())
    except PilotfishError as error:
        if str(error) != "on purpose":
            raise Broken(f"its teardown needs its setup, which may not have run: {error}") from None
