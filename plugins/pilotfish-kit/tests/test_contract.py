"""The contract of plugins: whole plugins keep it, and each faulty one is caught and told apart."""

import itertools
import random
from typing import Literal

import pytest
import torch
from pilotfish_kit import CHECKS, check_plugin, examine
from pydantic import field_validator
from torch import Tensor, nn

import pilotfish
from pilotfish import Embedding, Guide, PilotfishError, Plugin, Setting, draw, hookimpl
from pilotfish.testing import random_sampler

pytestmark = pytest.mark.slow  # each is short, together they are not


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


# ---- whole plugins ----


class Warm(Guide):
    """A loss, and a hook that does nothing at scale 0."""

    class Settings(Guide.Settings):
        margin: float = Setting(0.5, ge=0)
        colors: list[str] = Setting(default_factory=list)

    def before_step(self, step):
        if not self.settings.scale:
            return None
        noise = draw(step.latents.shape, step.generator, torch.float32)
        return step.latents + 0.01 * noise.to(step.latents)

    def loss_guidance(self, step):
        red, _, blue = step.image.unbind(dim=1)
        return (red - blue - self.settings.margin).abs().mean(dim=(1, 2))


class Learned(Plugin):
    """Loads in setup, drops in teardown, and changes embeddings."""

    target: Tensor | None = None

    def setup(self, run):
        self.target = torch.full((1, 1, 1), run.steps / 100)

    def teardown(self):
        self.target = None

    def embedding_transform(self, embedding):
        values = embedding.values + self.target.to(embedding.values)
        return Embedding(**{**vars(embedding), "values": values})

    def on_predicted_x0(self, x0):
        return 0.9 * x0


class Bare:
    @hookimpl
    def before_step(self, step):
        return step.latents * 1.01


@pytest.mark.parametrize(
    ("plugin", "nothing_to_see"),
    [
        (Warm(margin=0.2, colors=["#fff"], start=0.9, every=3, scale=0), set()),
        (Learned(), {"loss", "scale-0"}),
        (Bare(), {"loss", "scale-0"}),
        (pilotfish.guide(lambda step: step.x0.square().mean(dim=(1, 2, 3)), scale=-0.5), set()),
    ],
    ids=["guide", "plugin", "bare object", "function"],
)
def test_a_whole_plugin_passes_every_check_that_applies(plugin, nothing_to_see, sampler):
    outcomes = examine(plugin, sampler)
    assert [o.check.name for o in outcomes] == list(CHECKS)
    assert {o.check.name: o.message for o in outcomes if o.status == "failed"} == {}
    assert {o.check.name for o in outcomes if o.status == "not tried"} == nothing_to_see


# ---- faulty plugins ----


class NeverFilled(Plugin):
    def before_step(self, step=None):
        return None


class Asynchronous(Plugin):
    async def after_step(self, step): ...


class Doubling(Plugin):
    class Settings(Plugin.Settings):
        size: float = 1.0

        @field_validator("size")
        @classmethod
        def _doubled(cls, size):
            return 2 * size

    def after_step(self, step): ...


class Heavy(Plugin):
    network = nn.Linear(3, 3)

    def after_step(self, step): ...


class Typo(Plugin):
    def before_step(self, step):
        return step.latent


class OverTheBatch(Guide):
    def loss_guidance(self, step):
        return step.image.mean()


class Half(Plugin):
    def on_predicted_x0(self, x0):
        return x0.half()


class Rounded(Guide):
    def loss_guidance(self, step):
        return 1 + step.image.round().mean(dim=(1, 2, 3))


class InPlace(Plugin):
    def embedding_transform(self, embedding):
        embedding.values.mul_(0.999)


class Clamped(Guide):
    def loss_guidance(self, step):
        step.image.data.clamp_(0, 0.1)
        return step.image.mean(dim=(1, 2, 3))


def weight(model):
    """What the network of all runs reads at every step."""
    return model.unet.conv_in.weight


class Forgetful(Plugin):
    def before_step(self, step):
        weight(step.run.model).mul_(1.001)


class GlobalNoise(Plugin):
    def before_step(self, step):
        return step.latents + 0.01 * torch.randn(step.latents.shape).to(step.latents)


class Dice(Plugin):
    def before_step(self, step):
        return step.latents * random.choice([0.9, 1.1])


class Counting(Plugin):
    runs = 0

    def setup(self):
        self.runs += 1

    def before_step(self, step):
        return step.latents * (1 + 0.01 * self.runs)


class CountingAll(Plugin):
    runs = itertools.count()

    def before_step(self, step):
        return step.latents * (1 + 0.01 * next(self.runs))


class Shared(Plugin):
    calls = 0

    def setup(self):
        type(self).calls = 0

    def before_step(self, step):
        type(self).calls += 1
        return step.latents * (1 + 0.01 * self.calls)


class Leaking(Plugin):
    kept = None

    def setup(self, run):
        self.kept = weight(run.model).clone()
        weight(run.model).mul_(1.1)

    def teardown(self, run):
        if self.kept is not None:
            weight(run.model).copy_(self.kept)
        self.kept = None


class Neighbourly(Plugin):
    def before_step(self, step):
        return step.latents - step.latents.mean()


class Always(Guide):
    def before_step(self, step):
        return step.latents * 1.5

    def loss_guidance(self, step):
        return step.image.mean(dim=(1, 2, 3))


class Square(Guide):
    def loss_guidance(self, step):
        return (step.image - step.image.transpose(2, 3)).square().mean(dim=(1, 2, 3))


class Numpy(Plugin):
    def before_step(self, step):
        return torch.from_numpy(step.latents.numpy() * 1.01)


class Detached(Plugin):
    def on_predicted_x0(self, x0):
        return x0.detach() * 0.9


class Hoarder(Plugin):
    def setup(self):
        self.weights = torch.zeros(3)

    def after_step(self, step): ...


class Impatient(Plugin):
    def setup(self):
        self.weights = torch.zeros(3)

    def teardown(self):
        del self.weights


FAULTY = {
    NeverFilled: ("signature", "before_step() takes step=None, which is never filled"),
    Asynchronous: ("signature", "after_step() is async"),
    Doubling: ("settings", "size is 2.0, but 4.0 out of a run file"),
    Heavy: ("imports", "holds the network network since its import"),
    Typo: ("runs", "before_step() raised AttributeError: 'Step' object has no attribute 'latent'"),
    OverTheBatch: ("runs", "returned shape (); expected one value per image, shape (2,)"),
    Half: ("runs", "on_predicted_x0() returned dtype torch.float16; expected torch.float32"),
    Rounded: ("loss", "the gradient of its loss is zero"),
    InPlace: ("runs", "embedding_transform() changed embedding.values in place"),
    Clamped: ("inputs", "loss_guidance() changes step.image in place"),
    Forgetful: ("undo", " changed; undo it in teardown"),
    GlobalNoise: ("random-state", "draws by the global torch;"),
    Dice: ("random-state", "draws by the global random;"),
    Counting: ("repeat", "another picture when it runs again"),
    CountingAll: ("repeat", "another picture when it runs again"),
    Shared: ("instances", "changes another run"),
    Leaking: ("instances", "changes another run"),
    Neighbourly: ("batch", "beside a neighbour"),
    Always: ("scale-0", "changes the picture at scale 0"),
    Square: ("sizes", "loss_guidance() raised RuntimeError: The size of tensor a"),
    Numpy: ("bfloat16", "before_step() raised TypeError: Got unsupported ScalarType BFloat16"),
    Detached: ("through-network", "does not require grad"),
    Hoarder: ("teardown", "keeps weights after a run"),
    Impatient: ("teardown", "'Impatient': teardown() raised AttributeError"),
}


@pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.__name__)
def test_a_faulty_plugin_fails_the_check_that_is_about_its_fault_and_no_other(kind, sampler):
    name, words = FAULTY[kind]
    own = random_sampler() if kind in (Forgetful, Leaking) else sampler  # they break it
    failed = {o.check.name: o.message for o in examine(kind(), own) if o.status == "failed"}
    assert list(failed) == [name]
    assert words in failed[name]


def test_every_check_is_failed_by_some_faulty_plugin():
    assert {name for name, _ in FAULTY.values()} == set(CHECKS)


def test_a_plugin_that_only_one_model_can_run_is_not_tried_on_another():
    own = random_sampler(seed=1)
    expected = weight(own.model).clone()

    class Choosy(Plugin):
        def setup(self, run):
            if not torch.equal(weight(run.model), expected):
                raise PilotfishError("made for another model")

    (outcome,) = examine(Choosy(), own, checks=[CHECKS["bfloat16"]])
    assert (outcome.status, outcome.message[:26]) == ("not tried", "it needs a model of its ow")


def test_a_loss_that_is_measured_only_needs_no_gradient(sampler):
    class Measured(Guide):
        class Settings(Guide.Settings):
            gradient: Literal["none"] = "none"

        def loss_guidance(self, step):
            return step.image.detach().round().mean(dim=(1, 2, 3))

    outcomes = {o.check.name: o for o in examine(Measured(), sampler)}
    assert outcomes["loss"].status == "not tried" and "measures" in outcomes["loss"].message
    assert {o.status for name, o in outcomes.items() if name != "loss"} == {"ok"}


def test_what_cannot_be_told_after_a_failure_is_not_tried():
    outcomes = {o.check.name: (o.status, o.message) for o in examine(OverTheBatch())}
    assert outcomes["runs"][0] == "failed"
    assert outcomes["undo"] == ("not tried", "see runs")
    assert outcomes["scale-0"] == ("not tried", "see repeat")
    assert outcomes["signature"] == ("ok", "")


def test_check_plugin_names_the_plugin_and_every_failure(sampler):
    class Both(Guide):
        """Two faults."""

        def before_step(self, step):
            return step.latents - step.latents.mean()

        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    with pytest.raises(PilotfishError) as caught:
        check_plugin(Both(scale=2), sampler)
    head, *lines = str(caught.value).splitlines()
    assert head == "Both(scale=2.0) breaks the contract of plugins:"
    assert [line.split(":")[0].strip() for line in lines] == ["batch", "scale-0"]


def test_a_check_that_needs_a_word_gets_the_prompt(sampler):
    class Word(Plugin):
        def prompt_transform(self, prompt):
            if "otter" not in prompt:
                raise ValueError("no otter")
            return prompt

    check_plugin(Word(), sampler, prompt="an otter")
    with pytest.raises(PilotfishError, match=r"runs: .* no otter"):
        check_plugin(Word(), sampler)
