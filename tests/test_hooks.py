"""Every hook does what its contract says, in the user's order."""

import dataclasses
import inspect

import diffusers
import pytest
import torch

import pilotfish
from pilotfish import Guide, InputError, Plugin, PluginError, draw
from pilotfish.hooks import specs as hookspecs
from pilotfish.hooks.stack import Stack


class Tell(Plugin):
    """Writes its name into a list that tests look at."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def prompt_transform(self, prompt):
        return f"{prompt} {self.name}"

    def before_step(self, step):
        self.log.append(f"before {self.name}")

    def after_step(self, step):
        self.log.append(f"after {self.name}")

    def setup(self):
        self.log.append(f"setup {self.name}")

    def teardown(self):
        self.log.append(f"teardown {self.name}")


def test_plugins_run_in_the_listed_order_and_are_torn_down_in_reverse(sampler):
    log = []
    sampler("a", plugins=[Tell("x", log), Tell("y", log)], steps=1, seed=0)
    assert log == [
        *("setup x", "setup y", "before x", "before y", "after x", "after y"),
        *("teardown y", "teardown x"),
    ]


def test_a_chain_passes_each_answer_on(sampler, latents_of):
    log = []
    plugins = [Tell("red", log), Tell("cat", log)]
    changed = sampler("a", plugins=plugins, steps=4, seed=3).latents
    assert torch.equal(changed, sampler("a red cat", steps=4, seed=3).latents)


def test_a_chains_later_plugin_sees_the_earlier_ones_latents(sampler):
    seen = []

    class Double(Plugin):
        def before_step(self, step):
            seen.append(step.latents)
            return step.latents * 2

    sampler("a cat", plugins=[Double(), Double()], steps=1, seed=0)
    assert torch.equal(seen[1], seen[0] * 2)


def test_plugins_of_one_kind_are_numbered_and_may_be_named():
    class Blue(Guide):
        def loss_guidance(self, step):
            return step.image.mean(dim=(1, 2, 3))

    stack = Stack([Blue(), Blue(scale=2)])
    assert list(stack.entries) == ["Blue", "Blue#2"]


def test_one_instance_twice_is_refused():
    plugin = Tell("x", [])
    with pytest.raises(InputError, match="twice as one object"):
        Stack([plugin, plugin])


def test_start_latents_sets_where_the_run_starts(sampler):
    seen = []

    class Start(Plugin):
        def start_latents(self, run):
            return torch.ones(run.num_images, 4, 16, 16), 2

        def after_step(self, step):
            seen.append((step.index, float(step.latents.mean())))

    sampler("a cat", plugins=[Start()], steps=4, scheduler="euler")
    assert [index for index, _ in seen] == [2, 3]
    assert seen[0][1] == 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "kdpm2", "dpmsolver-multistep"])
def test_a_start_adds_noise_of_the_level_of_its_step(sampler, scheduler):
    class Late(Plugin):
        def start_latents(self, run, start):
            self.x0, self.noise = (
                draw((1, 4, 16, 16), start.generator, torch.float32) for _ in "12"
            )
            return start.noised(self.x0, self.noise, 2 * start.order), 2 * start.order

        def before_step(self, step):
            if step.index == self.first:
                expected = step.alpha * self.x0 + step.sigma * self.noise
                torch.testing.assert_close(step.latents, expected, rtol=1e-4, atol=1e-4)
                self.checked = True

    plugin = Late()
    plugin.first = 4 if scheduler in ("heun", "kdpm2") else 2
    sampler("a cat", plugins=[plugin], steps=4, seed=0, scheduler=scheduler)
    assert plugin.checked


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ("ddim", diffusers.DDIMScheduler),
        ("ddpm", diffusers.DDPMScheduler),
        ("euler-ancestral", diffusers.EulerAncestralDiscreteScheduler),
    ],
)
def test_a_start_draws_from_the_runs_own_generators(pipeline, latents_of, scheduler, kind):
    class Noise(Plugin):
        def start_latents(self, run, start):
            made = kind.from_config(pipeline.scheduler.config)
            made.set_timesteps(run.steps)
            noise = draw((run.num_images, 4, 16, 16), start.generator, run.model.dtype)
            return noise * made.init_noise_sigma, 0

    run = {"scheduler": scheduler, "num_images": 2}
    assert torch.equal(latents_of(Noise(), **run), latents_of(**run))


def test_encoding_with_generators_draws_from_the_posterior_as_diffusers_does(sampler, pipeline):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seeds = (1, 2)
    with torch.no_grad():
        posterior = pipeline.vae.encode(image * 2 - 1).latent_dist
        drawn = sampler.model.encode(image, [torch.Generator().manual_seed(s) for s in seeds])
        mean = sampler.model.encode(image)
    for latents, seed in zip(drawn, seeds, strict=True):
        expected = posterior.sample(torch.Generator().manual_seed(seed))[0]
        assert torch.equal(latents, expected * pipeline.vae.config.scaling_factor)
    assert torch.equal(mean, posterior.mean * pipeline.vae.config.scaling_factor)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "lms", "dpmsolver-multistep", "heun"])
def test_stopping_and_starting_again_at_a_step_continues_the_run(sampler, scheduler):
    """What start_latents is given at step k goes on as a run that was at step k would."""
    whole = list(sampler.stream("a cat", steps=4, seed=0, scheduler=scheduler))

    class Resume(Plugin):
        def start_latents(self, run):
            return whole[-2].latents, whole[-2].index

    resumed = list(
        sampler.stream("a cat", steps=4, seed=0, scheduler=scheduler, plugins=[Resume()])
    )
    assert resumed[0].index == whole[-2].index
    assert resumed[0].sigma == whole[-2].sigma
    torch.testing.assert_close(resumed[0].x0, whole[-2].x0)


def test_combine_predictions_replaces_classifier_free_guidance(sampler, latents_of):
    class Own(Plugin):
        def combine_predictions(self, cond, uncond, step):
            return uncond + step.run.guidance_scale * (cond - uncond)

    class Unguided(Plugin):
        def combine_predictions(self, cond):
            return cond

    assert torch.equal(latents_of(Own()), latents_of())
    off = latents_of(guidance_scale=1)
    torch.testing.assert_close(latents_of(Unguided()), off, rtol=1e-4, atol=1e-4)


def test_combining_is_a_chain_that_begins_with_classifier_free_guidance(latents_of):
    class Halved(Plugin):
        def combine_predictions(self, prediction, cond, uncond, step):
            guided = uncond + step.run.guidance_scale * (cond - uncond)
            assert torch.equal(prediction, guided)
            return prediction / 2

    class Doubled(Plugin):
        def combine_predictions(self, prediction):
            return prediction * 2

    class Cond(Plugin):
        def combine_predictions(self, cond):
            return cond

    assert torch.equal(latents_of(Halved(), Doubled()), latents_of())
    assert torch.equal(latents_of(Doubled(), Cond()), latents_of(Cond()))
    assert not torch.equal(latents_of(Cond(), Doubled()), latents_of(Cond()))


def test_on_predicted_x0_steers_the_scheduler(sampler):
    """With x0 held at a constant, every solver must arrive at that constant."""

    class Hold(Plugin):
        def on_predicted_x0(self, x0):
            return torch.full_like(x0, 0.25)

    for scheduler in ("ddim", "euler", "lms", "heun", "dpmsolver-multistep", "unipc"):
        latents = sampler("a cat", plugins=[Hold()], steps=12, scheduler=scheduler, seed=0).latents
        # Those that stop at the smallest training noise keep sigma 0.04 of noise.
        noise = 0.15 if scheduler == "ddim" else 2e-3
        torch.testing.assert_close(latents, torch.full_like(latents, 0.25), atol=noise, rtol=0)


def test_on_predicted_x0_that_returns_its_input_changes_nothing(latents_of):
    class Same(Plugin):
        def on_predicted_x0(self, x0):
            return x0

    assert torch.equal(latents_of(Same()), latents_of())


def test_advance_replaces_the_schedulers_step(sampler):
    class Euler(Plugin):
        def advance(self, step):
            assert (step.next_alpha, step.alpha) == (1, 1)
            return step.latents + (step.next_sigma - step.sigma) * step.eps

    run = {"steps": 5, "seed": 0, "scheduler": "euler"}
    ours = sampler("a cat", plugins=[Euler()], **run).latents
    torch.testing.assert_close(ours, sampler("a cat", **run).latents, rtol=1e-4, atol=1e-3)


def test_stop_ends_the_run_and_its_x0_is_the_result(sampler):
    class Enough(Plugin):
        def after_step(self, step):
            self.x0 = step.x0
            if step.index == 1:
                step.stop()

    plugin = Enough()
    stream = sampler.stream("a cat", plugins=[plugin], steps=5, seed=0)
    assert [step.last for step in stream] == [False, True]
    torch.testing.assert_close(stream.result().latents, plugin.x0)
    assert [step.last for step in sampler.stream("a cat", steps=2, seed=0)] == [False, True]


def test_what_stop_is_given_is_the_result_and_what_the_stream_shows(sampler):
    class Enough(Plugin):
        def after_step(self, step):
            step.stop(2 * step.x0)

    class Look(Plugin):
        def on_predicted_x0(self, x0):
            self.x0 = x0

    look = Look()
    (step, *rest) = (stream := sampler.stream("a cat", plugins=[look, Enough()], steps=5, seed=0))
    assert not rest
    assert torch.equal(step.x0, 2 * look.x0)
    assert torch.equal(stream.result().latents, 2 * look.x0)


def test_breaking_out_of_a_stream_tears_the_plugins_down(sampler):
    log = []
    stream = sampler.stream("a", plugins=[Tell("x", log)], steps=5, seed=0)
    for _ in stream:
        break
    stream.close()
    assert log[-1] == "teardown x"
    with pytest.raises(pilotfish.PilotfishError, match="ended before it was done"):
        stream.result()


def test_teardown_runs_for_all_also_when_one_raises(sampler):
    log = []

    class Bad(Plugin):
        def teardown(self):
            raise RuntimeError("no")

    with pytest.raises(PluginError, match=r"'Bad': teardown\(\) raised RuntimeError"):
        sampler("a", plugins=[Tell("x", log), Bad(), Tell("y", log)], steps=1, seed=0)
    assert log[-2:] == ["teardown y", "teardown x"]


def test_of_several_errors_at_teardown_the_last_tells_of_the_others(sampler):
    class Bad(Plugin):
        def teardown(self):
            raise RuntimeError("no")

    with pytest.raises(PluginError, match="'Bad': ") as caught:
        sampler("a", plugins=[Bad(), Bad(), Bad()], steps=1, seed=0)
    assert ["'Bad#3'" in note for note in caught.value.__notes__] == [True, False]
    assert "'Bad#2'" in caught.value.__notes__[1]


def test_a_stream_shows_sigma_x0_and_a_preview(sampler):
    steps = list(sampler.stream("a cat", steps=4, seed=0, num_images=2, scheduler="euler"))
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert [s.progress for s in steps] == [0, 0.25, 0.5, 0.75]
    assert sorted((s.sigma for s in steps), reverse=True) == [s.sigma for s in steps]
    assert steps[0].x0.shape == (2, 4, 16, 16)
    assert steps[0].image.shape == (2, 3, 32, 32)
    assert steps[0].rgb.shape == (2, 3, 16, 16)
    assert len(steps[0].preview()) == 2
    assert not steps[0].image.requires_grad
    for s in steps:
        torch.testing.assert_close(s.alpha * s.x0 + s.sigma * s.eps, s.latents)


def test_a_plugins_draws_do_not_depend_on_other_plugins_nor_on_its_neighbours(sampler):
    class Noisy(Plugin):
        def before_step(self, step):
            shape = step.latents.shape
            self.drawn = draw(shape, step.generator, step.latents.dtype)

    def drawn(*others, num_images=1, seed=5):
        plugin = Noisy()
        sampler("a cat", plugins=[*others, plugin], steps=1, seed=seed, num_images=num_images)
        return plugin.drawn

    class Other(Plugin):
        def before_step(self, step):
            draw(step.latents.shape, step.generator, step.latents.dtype)

    alone = drawn()
    assert torch.equal(drawn(Other()), alone)
    assert torch.equal(drawn(num_images=3, seed=4)[1:2], alone)
    assert not torch.equal(drawn(seed=6), alone)


def test_hooks_run_without_gradients_except_losses(sampler):
    seen = {}

    class Watch(Guide):
        def before_step(self, step):
            seen["before_step"] = torch.is_grad_enabled()

        def after_step(self, step):
            seen["after_step"] = torch.is_grad_enabled()

        def loss_guidance(self, step):
            seen["loss_guidance"] = torch.is_grad_enabled()
            return step.x0.mean(dim=(1, 2, 3))

    with torch.enable_grad():
        for _ in sampler.stream("a cat", plugins=[Watch()], steps=1, seed=0):
            assert torch.is_grad_enabled()
    assert seen == {"before_step": False, "after_step": False, "loss_guidance": True}


def test_every_hook_is_documented_and_has_a_kind():
    hooks = {n: f for n, f in vars(hookspecs).items() if hasattr(f, "pilotfish_spec")}
    assert set(hooks) == set(hookspecs.KINDS)
    for name, function in hooks.items():
        kind = "Once" if name == "setup" else hookspecs.KINDS[name].capitalize()
        assert inspect.getdoc(function).startswith(kind), name


def test_an_embedding_is_frozen():
    embedding = pilotfish.Embedding("token", "positive", torch.ones(1, 1, 1), None, ("a",), "t")
    with pytest.raises(dataclasses.FrozenInstanceError):
        embedding.values = None


def test_an_argument_that_a_hook_does_not_have_is_refused_with_those_it_has():
    class Wrong(Plugin):
        def on_predicted_x0(self, x0, latents):
            return x0

    with pytest.raises(PluginError, match=r"asks for latents; it takes: x0, step"):
        Stack([Wrong()])


def test_a_plugins_own_latents_are_not_asked_for_gradients(sampler):
    class Holds(Guide):
        def before_step(self, step):
            held.append(step.latents.clone())
            return held[-1]

        def loss_guidance(self, step):
            return step.x0.mean(dim=(1, 2, 3))

    held = []
    sampler("a", plugins=[Holds(gradient="latents")], steps=2, seed=0)
    assert not any(latents.requires_grad for latents in held)


def test_a_picture_that_was_read_before_x0_changed_is_not_kept(sampler):
    class Changes(Plugin):
        def on_predicted_x0(self, x0, step):
            seen.append(step.image)
            return x0 + 1

    seen = []
    step = next(sampler.stream("a", plugins=[Changes()], steps=2, seed=0))
    with torch.no_grad():
        assert torch.equal(step.image, sampler.model.decode(step.x0))
    assert not torch.equal(step.image, seen[0])
