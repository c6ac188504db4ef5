"""The contract of plugins: whole plugins keep it, and each faulty one is caught and told apart."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from pydantic import field_validator

import pilotfish
from pilotfish import Embedding, Guide, PilotfishError, Plugin, Setting, draw, hookimpl
from pilotfish.hooks import registry
from pilotfish.testing import CHECKS, check_plugin, examine, random_sampler, random_step

# ---- whole plugins ----


class Warm(Guide):
    """A loss, and a hook that does nothing at scale 0."""

    class Settings(Guide.Settings):
        margin: float = Setting(0.5, ge=0)
        colors: list[str] = Setting(default_factory=list)

    def before_step(self, step):
        if self.settings.scale:
            return step.latents + 0.01 * draw(step.latents.shape, step.generator, torch.float32).to(
                step.latents
            )
        return None

    def loss_guidance(self, step):
        red, _, blue = step.image.unbind(dim=1)
        return (red - blue - self.settings.margin).abs().mean(dim=(1, 2))


class Learned(Plugin):
    """Loads in setup, drops in teardown, and changes embeddings."""

    target: torch.Tensor | None = None

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
    "plugin",
    [
        Warm(margin=0.2, colors=["#fff"], start=0.9, every=3, scale=0),
        Learned(),
        Bare(),
        pilotfish.guide(lambda step: step.x0.square().mean(dim=(1, 2, 3)), scale=-0.5),
    ],
    ids=["guide", "plugin", "bare object", "function"],
)
def test_a_whole_plugin_passes_every_check_that_applies(plugin, sampler):
    outcomes = examine(plugin, sampler)
    assert [o.check.name for o in outcomes] == list(CHECKS)
    assert {o.check.name: o.message for o in outcomes if o.status == "failed"} == {}
    nothing_to_see = {o.check.name for o in outcomes if o.status == "not tried"}
    assert nothing_to_see <= {"imports", "settings", "loss", "scale-0", "through-network"}


# ---- faulty plugins ----


class NeverFilled(Plugin):
    def before_step(self, step=None):
        return None


class Mixin:
    def before_step(self, step):
        return step.latents * 2


class Unmarked(Mixin, Plugin):
    def after_step(self, step): ...


class Lossless(Guide):
    def before_step(self, step): ...


class Asynchronous(Plugin):
    async def after_step(self, step): ...


@dataclass
class Equal:
    factor: float = 1.01

    @hookimpl
    def before_step(self, step):
        return step.latents * self.factor


class Doubling(Plugin):
    class Settings(Plugin.Settings):
        size: float = 1.0

        @field_validator("size")
        @classmethod
        def _doubled(cls, size):
            return 2 * size

    def after_step(self, step): ...


class Renamed(Plugin):
    class Settings(Plugin.Settings):
        name: str = "x"

    def after_step(self, step): ...


class Picky(Plugin):
    def __init__(self, target):
        super().__init__()
        self.target = target

    def after_step(self, step): ...


class Typo(Plugin):
    def before_step(self, step):
        return step.latent


class OverTheBatch(Guide):
    def loss_guidance(self, step):
        return step.image.mean()


class NotANumber(Guide):
    def loss_guidance(self, step):
        return (step.image.mean(dim=(1, 2, 3)) - 1e9).sqrt()


class Rounded(Guide):
    def loss_guidance(self, step):
        return 1 + step.image.round().mean(dim=(1, 2, 3))


class Half(Plugin):
    def on_predicted_x0(self, x0):
        return x0.half()


class InPlace(Plugin):
    def before_step(self, step):
        step.embeddings.mul_(0.5)


class Clamped(Guide):
    def loss_guidance(self, step):
        step.image.data.clamp_(0, 0.1)
        return step.image.mean(dim=(1, 2, 3))


class Forgetful(Plugin):
    def before_step(self, step):
        step.run.model.unet.register_forward_hook(lambda *_: None)


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
        self.table = {"weights": [torch.zeros(2**18)]}

    def after_step(self, step): ...


class Archive(Plugin):
    kept = []  # noqa: RUF012  # the fault

    def after_step(self, step):
        self.kept.append(step.x0)


class Diary(Plugin):
    def __init__(self):
        super().__init__()
        self.kept = []

    def after_step(self, step):
        self.kept.append(step.latents.clone())


class Impatient(Plugin):
    def setup(self):
        self.weights = torch.zeros(3)

    def teardown(self):
        del self.weights


FAULTY = {
    NeverFilled: ("signature", "gives 'step' a default, so it is never filled"),
    Unmarked: ("signature", "before_step is never called"),
    Lossless: ("signature", "is a Guide without loss_guidance()"),
    Asynchronous: ("signature", "after_step() is async"),
    Equal: ("identity", "cannot be hashed"),
    Doubling: ("settings", "setting 'size' is 2.0, but 4.0 when it comes back"),
    Renamed: ("settings", "has a setting 'name', which a run file needs"),
    Picky: ("settings", "cannot be made again from its settings alone: TypeError"),
    Typo: ("runs", "before_step() raised AttributeError: 'Step' object has no attribute 'latent'"),
    OverTheBatch: ("loss", "returned shape (); expected one value per image, shape (2,)"),
    NotANumber: ("loss", "returned a loss that is not finite"),
    Rounded: ("loss", "a gradient of zero at each of 2 steps"),
    Half: ("answers", "on_predicted_x0() returned dtype torch.float16; expected torch.float32"),
    InPlace: ("inputs", "before_step() changed step.embeddings in place"),
    Clamped: ("inputs", "loss_guidance() changed step.image in place"),
    Forgetful: ("undo", "leaves model.unet changed"),
    GlobalNoise: ("random-state", "uses the global random state of torch;"),
    Dice: ("random-state", "uses the global random state of random;"),
    Counting: ("repeat", "when it runs again: it keeps something of the last run"),
    CountingAll: ("repeat", "when it runs again, made afresh too"),
    Shared: ("instances", "while another instance runs"),
    Neighbourly: ("batch", "beside a neighbour"),
    Always: ("scale-0", "changes the picture at scale 0"),
    Square: ("sizes", "loss_guidance() raised RuntimeError: The size of tensor a"),
    Numpy: ("bfloat16", "before_step() raised TypeError: Got unsupported ScalarType BFloat16"),
    Detached: ("through-network", "does not require grad"),
    Hoarder: ("teardown", "still holds 1 MB of tensors that its setup loaded, after a run"),
    Archive: ("teardown", "holds more tensors with each run"),
    Diary: ("teardown", "holds more tensors with each run"),
    Impatient: ("teardown", "its teardown needs its setup, which may not have run"),
}


def failures(kind, sampler, checks):
    plugin = kind("x") if kind is Picky else kind()
    own = random_sampler() if kind is Forgetful else sampler  # it breaks its own
    outcomes = examine(plugin, own, checks=checks)
    return {o.check.name: o.message for o in outcomes if o.status == "failed"}


@pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.__name__)
def test_a_faulty_plugin_fails_the_check_that_is_about_its_fault(kind, sampler):
    name, words = FAULTY[kind]
    assert words in failures(kind, sampler, [CHECKS[name]])[name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.__name__)
def test_a_faulty_plugin_fails_no_other_check(kind, sampler):
    assert list(failures(kind, sampler, CHECKS.values())) == [FAULTY[kind][0]]


def test_every_check_is_failed_by_some_faulty_plugin():
    in_files = {"imports"}  # below; one that keeps it is in test_kit.py
    assert {name for name, _ in FAULTY.values()} | in_files == set(CHECKS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("NETWORK = torch.nn.Linear(3, 3)", "builds Linear on import; load networks in setup"),
        ("WEIGHTS = torch.zeros(2**19)", "holds 2 MB of tensors after its import"),
    ],
    ids=["a network", "weights"],
)
def test_an_import_that_loads_something_is_caught(line, words, tmp_path, sampler):
    path = tmp_path / "my_plugin.py"
    path.write_text(
        f"import torch\nfrom pilotfish import Plugin\n{line}\n"
        "class Mine(Plugin):\n    def after_step(self, step): ...\n"
    )
    plugin = registry.resolve(f"{path}:Mine").plugin
    (outcome,) = examine(plugin, sampler, checks=[CHECKS["imports"]])
    assert outcome.status == "failed" and words in outcome.message


def test_what_cannot_be_told_after_a_failure_is_not_tried():
    outcomes = {o.check.name: o for o in examine(OverTheBatch())}
    assert outcomes["loss"].status == "failed"
    assert outcomes["scale-0"].status == "not tried"
    assert outcomes["scale-0"].message == "see loss"
    assert outcomes["identity"].status == "ok"


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


def test_a_trial_leaves_the_global_random_state_as_it_was(sampler):
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    examine(GlobalNoise(), sampler)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# ---- the step ----


def test_a_random_step_shows_the_given_picture_and_takes_gradients():
    image = torch.rand(3, 3, 8, 12)
    step = random_step(image=image)
    assert torch.equal(step.image, image)
    assert step.x0.shape == (3, 4, 16, 16) and step.rgb.shape == (3, 3, 16, 16)
    loss = Warm(margin=0.2).loss_guidance(step)
    (gradient,) = torch.autograd.grad(loss.sum(), step.image)
    assert gradient.shape == image.shape and gradient.abs().sum() > 0


def test_a_random_step_depends_on_its_seed_alone():
    same, other = random_step(seed=0), random_step(seed=1)
    assert torch.equal(random_step().image, same.image)
    assert not torch.equal(other.image, same.image)
    assert not torch.equal(same.image[0], same.image[1])
    assert (same.index, same.num_steps, same.run.num_images) == (0, 10, 2)
    torch.testing.assert_close(same.alpha * same.x0 + same.sigma * same.eps, same.latents)
