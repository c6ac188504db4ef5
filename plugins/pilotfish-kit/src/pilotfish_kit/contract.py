"""The contract of plugins, check by check, and three ways to try a plugin against it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pilotfish import Guide, PilotfishError, Plugin, Run, Sampler, guide
from pilotfish.testing import random_sampler

from .trial import Check, NotTried, Outcome, Trial, hooks, require, world

if TYPE_CHECKING:
    import pytest

PROMPT = "a red cat"
CHECKS: dict[str, Check] = {}
"""What every plugin must keep, check by check, by their names."""


def check(needs: Check | None = None) -> Callable[[Callable[[Trial], None]], Check]:
    """Make a function a check: its name is the check's, its docstring the claim."""

    def make(function: Callable[[Trial], None]) -> Check:
        name = function.__name__.replace("_", "-")
        return CHECKS.setdefault(name, Check(name, inspect.getdoc(function) or "", function, needs))

    return make


# ---- the checks ----


@check()
def signature(trial: Trial) -> None:
    """Its hooks are plain functions, and each argument is filled."""
    for name, hook in hooks(trial.plugin).items():
        runs = not (inspect.iscoroutinefunction(hook) or inspect.isgeneratorfunction(hook))
        require(runs, f"{name}() is async or a generator: calling it runs nothing")
        for p in inspect.signature(hook).parameters.values():
            filled = p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
            require(filled, f"{name}() takes {p}, which is never filled: no defaults, no stars")


@check(signature)
def settings(trial: Trial) -> None:
    """Its settings survive a run file, and make the same plugin again."""
    if isinstance(trial.plugin, Plugin):
        own = trial.plugin.settings.model_dump(mode="json")
        (table,) = tomllib.loads(Run(plugins=({**own, "use": "x"},)).to_toml())["plugins"]
        again = type(trial.plugin)(**{name: table[name] for name in own if name in table}).settings
        for name, value in trial.plugin.settings:
            came = getattr(again, name)
            require(came == value, f"{name} is {value!r}, but {came!r} out of a run file")


@check()
def imports(trial: Trial) -> None:
    """Importing it makes no network: its module and its class hold none."""
    kind = type(trial.plugin)
    module = getattr(sys.modules.get(kind.__module__), "__dict__", {})
    for name, value in {**module, **vars(kind)}.items():
        message = f"holds the network {name} since its import; load it in setup"
        require(not isinstance(value, nn.Module), message)


@check(settings)
def runs(trial: Trial) -> None:
    """It runs with one and two images; what it answers is what each hook may."""
    _ = trial.singles, trial.pair


@check(runs)
def loss(trial: Trial) -> None:
    """Its loss has a gradient."""
    if measured_only(trial.plugin):
        raise NotTried('its gradient is "none": what it measures moves nothing')
    records = [record for record in trial.pair.trace if any(record.loss)]
    if not records:
        raise NotTried("it gave no loss in these runs")
    moves = any(norm for record in records for norm in record.gradient_norm)
    require(moves, "the gradient of its loss is zero: rounding, comparing and counting have none")


def measured_only(plugin: Any) -> bool:
    """Whether it is a guide whose loss moves nothing."""
    return isinstance(plugin, Guide) and plugin.settings.gradient == "none"


@check(runs)
def inputs(trial: Trial) -> None:
    """No hook changes what it is given."""

    def watched(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def call(*values: Any, **named: Any) -> Any:
            given = dict(tensors(inspect.signature(hook).bind(*values, **named).arguments))
            before = {name: tensor.detach().clone() for name, tensor in given.items()}
            answer = hook(*values, **named)
            for name, tensor in given.items():
                message = f"{hook.__name__}() changes {name} in place; make a new tensor"
                require(torch.equal(tensor, before[name]), message)
            return answer

        return call

    kind = type(trial.plugin)
    calls = {name: watched(hook) for name, hook in hooks(trial.plugin).items()}
    trial.latents(trial.twin(type(kind.__name__, (kind,), calls)))


def tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a hook is given, and those that it finds in a step or an embedding."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        for attribute in ("latents", "embeddings", "x0", "rgb", "image", "values"):
            with contextlib.suppress(PilotfishError, AttributeError):  # x0 before the network ran
                if isinstance(tensor := getattr(value, attribute), Tensor):
                    yield f"{name}.{attribute}", tensor


@check(runs)
def undo(trial: Trial) -> None:
    """It leaves the model's networks and torch's switches as they were."""
    after = world(trial.sampler.model)
    left = [name for name in trial.before if after.get(name) != trial.before[name]]
    require(not left, f"leaves {', '.join(left[:3])} changed; undo it in teardown")


@check(undo)
def random_state(trial: Trial) -> None:
    """It leaves all global random generators alone."""
    before = random_states()
    trial.latents(trial.twin())
    drawn = [name for name, state in random_states().items() if state != before[name]]
    require(not drawn, f"draws by the global {', '.join(drawn)}; draw from step.generator")


def random_states() -> dict[str, Any]:
    """The state of each global random generator."""
    torchs, numpys = torch.get_rng_state().tolist(), repr(np.random.get_state())
    return {"torch": torchs, "random": random.getstate(), "numpy.random": numpys}


@check(random_state)
def repeat(trial: Trial) -> None:
    """It gives the same picture when it runs again."""
    plugin = trial.twin()
    for _ in range(2):
        same = torch.equal(trial.latents(plugin), trial.singles[0])
        require(same, "gives another picture when it runs again; keep a run's things in `state`")


@check(repeat)
def instances(trial: Trial) -> None:
    """Runs at the same time do not know of each other: of two instances, and of none."""
    streams = [trial.stream(trial.twin(), num_images=number) for number in (1, 2)]
    came = [result.latents for result in trial.take(*streams, trial.stream())]
    same = map(torch.equal, came, (trial.singles[0], trial.pair.latents, trial.absent))
    require(all(same), "changes another run; patch in around_network, keep its things in `state`")


@check(repeat)
def batch(trial: Trial) -> None:
    """An image's neighbours in the batch do not change it."""
    # Convolutions sum in another order for another batch size.
    same = torch.allclose(trial.pair.latents, torch.cat(trial.singles), atol=1e-3)
    rule = "reduce over all axes but the first, and draw from step.generator, one for each image"
    require(same, f"gives an image another picture beside a neighbour; {rule}")


@check(repeat)
def scale_0(trial: Trial) -> None:
    """A guide at scale 0 gives the picture to the bit that there is without it."""
    if not isinstance(trial.plugin, Guide):
        raise NotTried("it has no scale")
    same = torch.equal(trial.latents(trial.twin(scale=0.0)), trial.absent)
    require(same, "changes the picture at scale 0; let its other hooks do nothing there")


@check(runs)
def sizes(trial: Trial) -> None:
    """It runs at sizes that are not square."""
    side = trial.pair.images[0].height
    trial.latents(trial.twin(), height=side, width=side + side // 2)


@check(runs)
def bfloat16(trial: Trial) -> None:
    """It runs with networks in bfloat16."""
    try:
        trial.latents(trial.twin(), sampler=random_sampler(dtype=torch.bfloat16))
    except Exception as error:
        if examine(trial.plugin, None, trial.prompt, [runs])[0].status != "ok":
            raise NotTried("it needs a model of its own: try it on one in bfloat16") from error
        raise


@check(runs)
def through_network(trial: Trial) -> None:
    """It runs where the gradient goes through the network, its own or another guide's."""
    own = isinstance(trial.plugin, Guide) and not measured_only(trial.plugin)
    settings: dict[str, Any] = {"gradient": "latents"} if own else {}
    other = guide(lambda step: step.x0.square().mean(dim=(1, 2, 3)), gradient="latents")
    trial.latents(trial.twin(**settings), other)


@check(runs)
def teardown(trial: Trial) -> None:
    """It lets go of what its setup loaded, also where a run is left or another plugin fails."""

    class Fails(Plugin):
        def setup(self) -> None:
            raise PilotfishError("on purpose")

    plugin = trial.twin()
    with contextlib.closing(trial.stream(plugin)) as stream:
        next(stream)
    kept = [n for n, v in vars(plugin).items() if isinstance(v, Tensor | nn.Module)]
    require(not kept, f"keeps {', '.join(kept)} after a run; keep a run's things in `state`")
    for plugins in ((Fails(), trial.twin()), (trial.twin(), Fails())):
        try:
            trial.latents(*plugins)
        except PilotfishError as error:
            told = " ".join([str(error), *getattr(error, "__notes__", ())])
            require(told == "on purpose", f"fails where another plugin fails: {told}")


# ---- to try them ----


ALL = tuple(CHECKS.values())


def examine(
    plugin: Any,
    sampler: Sampler | None = None,
    prompt: str = PROMPT,
    checks: Iterable[Check] = ALL,
    side: int | None = None,
) -> list[Outcome]:
    """Try a plugin against checks, each told apart; see `check_plugin` and `Trial`."""
    trial = Trial(plugin, sampler, prompt, side)
    return [trial.outcome(check) for check in checks]


def check_plugin(
    plugin: Any, sampler: Sampler | None = None, prompt: str = PROMPT, checks: Iterable[Check] = ALL
) -> None:
    """Check what every plugin must keep, in short runs.

    Args:
        plugin: an instance; its own settings are tried, but for when it acts.
        sampler: the model to try it on; None is `pilotfish.testing.random_sampler()`.
        prompt: of the runs, where the plugin looks for a word in it.
        checks: of `CHECKS`; each is tried only where the one that it needs was kept.

    Raises:
        PilotfishError: what the plugin broke, one line for each check.
    """
    outcomes = examine(plugin, sampler, prompt, checks)
    if lines := [f"  {o.check.name}: {o.message}" for o in outcomes if o.status == "failed"]:
        raise PilotfishError("\n".join([f"{plugin!r} breaks the contract of plugins:", *lines]))


def parametrize_with_checks(plugins: Iterable[Any]) -> pytest.MarkDecorator:
    """One test for each plugin and check: a decorator for a test of `plugin` and `check`.

        @parametrize_with_checks([Warmth(), Warmth(target=0.2)])
        def test_it_keeps_the_contract_of_plugins(plugin, check, random_sampler):
            check(plugin, random_sampler)

    `check` takes what `check_plugin` takes. A check that has nothing to look at, or that another
    one's failure makes meaningless, skips its test and says why.
    """
    import pytest

    shared = functools.cache(Trial)  # the checks of one plugin share its runs

    def test(check: Check, plugin: Any, sampler: Any = None, prompt: str = PROMPT) -> None:
        outcome = shared(plugin, sampler, prompt).outcome(check)
        if outcome.status == "not tried":
            pytest.skip(outcome.message)
        require(outcome.status == "ok", f"{plugin!r}, {check.name}: {outcome.message}")

    cases = [
        pytest.param(plugin, functools.partial(test, check), id=f"{plugin!r}-{check.name}")
        for plugin in plugins
        for check in ALL
    ]
    return pytest.mark.parametrize(("plugin", "check"), cases)
