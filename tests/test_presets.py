"""Each preset against an independent transcription of its paper's formula, in float64."""

import dataclasses
import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pilotfish import PRESETS, Guide, InputError, Plugin, Preset, Sampler, draw
from pilotfish.guidance.presets import find_preset
from pilotfish.models.protocol import Conditioning
from pilotfish.sampling.generators import seeded
from pilotfish.sampling.guides import RECURRENCE, RENEWAL, SAMPLES
from pilotfish.sampling.schedule import noise_level
from pilotfish.testing import GaussianModel

INDEX, STEPS, W, SCALE = 4, 10, 3.0, 0.7  # the step that is guided, inside every preset's window


class Smooth(GaussianModel):
    """A network that is not linear in the latents, and another one for the negative prompt."""

    bend = 0.1

    def condition(self, embeddings, role, run):
        self.asked = not getattr(self, "asked", False)  # the prompt, then the negative prompt
        return Conditioning({"values": torch.full((1, 1, 1), float(self.asked)).double()})

    def predict(self, latents, timestep, conditioning):
        output = super().predict(latents, timestep, conditioning)
        index = int((self.scheduler.timesteps == timestep).nonzero()[0])
        level = noise_level(self.scheduler, index)
        flow = level.prediction_type == "flow"
        scaled = latents / level.norm if flow else latents  # as scale_model_input does
        role = conditioning["values"].view(-1, 1, 1, 1)
        # Of the noise that it sees.
        further = self.bend * (torch.sin(2 * scaled + role) + 0.5 * role * scaled.flip(1))
        return output + (further / level.alpha if flow else further)

    def set_timesteps(self, scheduler, steps, shape):
        """A flow has the noise of DDIM's steps, as its own coordinates tell it."""
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return super().set_timesteps(scheduler, steps, shape)
        other = GaussianModel().new_scheduler("ddim")
        other.set_timesteps(steps)
        levels = [noise_level(other, i) for i in range(steps)]
        scheduler.set_timesteps(sigmas=[v.sigma / (v.alpha + v.sigma) for v in levels])


class Gentle(Smooth):
    """One whose Jacobian is positive, as that of an exact network, a covariance, always is."""

    bend = 0.01


class Same(Plugin):
    """The same first latents on a flow as elsewhere, at its own noise level."""

    def start_latents(self, run, start):
        noise = run.model.noise((run.num_images, 3, 4, 4), start.generator, torch.float64)
        return noise * noise_level(run.model.scheduler, 0).norm, 0


class Curved(Guide):
    def loss_guidance(self, step):
        return loss(step.x0)


class Square(Guide):
    """-log p(y | x0) of the red channel, y = 1 and r^2 = 0.25: what posterior samplers are for."""

    def loss_guidance(self, step):
        return (step.x0[:, 0] - 1).square().sum(dim=(1, 2)) / 0.5


def loss(x0):
    return (x0[:, 0] - 1).square().mean(dim=(1, 2)) + 0.1 * x0.pow(4).mean(dim=(1, 2, 3))


class Step:
    """What a transcription works with: latents, predictions and abar of one step."""

    def __init__(self, preset, scheduler="ddim", network=Smooth):
        self.network, self.model = network, network()
        self.run = {"scheduler": scheduler, "steps": STEPS, "seed": 5, "num_images": 2}
        self.run |= {"guidance_scale": W, "preset": preset}
        self.flow = "flowmatch-euler" in str(scheduler)
        self.plugins = [Same()] if self.flow else []
        stream = Sampler(self.model).stream(plugins=self.plugins, **self.run)
        *_, step = itertools.islice(stream, INDEX + 1)
        self.x, self.timestep, self.described = step.latents, step.timestep, step.run
        level, after = (noise_level(self.model.scheduler, INDEX + i) for i in (0, 1))
        self.level, self.following = level, after
        self.a, self.b = level.alpha**2, after.alpha**2  # abar, where latents are VP
        self.conditioning = Conditioning(
            {"values": torch.tensor([0.0, 1.0]).double().view(2, 1, 1)}
        )

    def predictions(self, x):
        values = self.conditioning["values"].repeat_interleave(len(x), 0)
        # as the scheduler's scale_model_input, which flows have not
        scaled = torch.cat([x, x]) / (1 if self.flow else self.level.norm)
        return self.model.predict(scaled, self.timestep, Conditioning({"values": values})).chunk(2)

    def eps(self, x):
        uncond, cond = self.predictions(x)
        return uncond + W * (cond - uncond)

    def x0(self, x, eps=None):
        return (x - (1 - self.a) ** 0.5 * (self.eps(x) if eps is None else eps)) / self.a**0.5

    def ddim(self, x0, eps):
        return self.b**0.5 * x0 + (1 - self.b) ** 0.5 * eps

    def gradient(self, function, at):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(function(at).sum(), at)[0]

    def correction(self):
        uncond, cond = self.predictions(self.x)
        return W * rms(cond - uncond)

    v = eps  # what the network of a flow predicts

    def drawn(self, name):
        """The first noise that is drawn for a purpose."""
        return draw(self.x.shape, seeded(self.described, name), torch.float64)

    def result(self, guide=Curved):
        """The latents after the guided step, by the engine."""
        guide = guide(scale=SCALE, start=INDEX / STEPS, stop=(INDEX + 1) / STEPS)
        stream = Sampler(self.network()).stream(plugins=[guide, *self.plugins], **self.run)
        *_, after = itertools.islice(stream, INDEX + 2)
        return after.latents


def rms(tensor):
    return tensor.pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()


def once(name):
    return dataclasses.replace(PRESETS[name], recurrence=1)


def balanced(s):
    g = s.gradient(loss, s.x0(s.x))
    size = SCALE * s.correction() * ((1 - s.a) / s.a) ** 0.5
    x0 = s.x0(s.x) - size * g / rms(g)
    return s.ddim(x0, (s.x - s.a**0.5 * x0) / (1 - s.a) ** 0.5)


def dps(s):
    g = s.gradient(lambda x: loss(s.x0(x)).sqrt(), s.x)
    return s.ddim(s.x0(s.x), s.eps(s.x)) - SCALE * g


def lgd(s):
    generators = seeded(s.described, SAMPLES)
    noises = [draw(s.x.shape, generators, torch.float64) for _ in range(10)]

    def log_mean_exp(x):
        losses = torch.stack([loss(s.x0(x) + (1 - s.a) ** 0.5 * n) for n in noises])
        return -torch.log(torch.exp(-losses).mean(0))

    eps = s.eps(s.x) + SCALE * (1 - s.a) ** 0.5 * s.gradient(log_mean_exp, s.x)
    return s.ddim(s.x0(s.x, eps), eps)


def freedom(s):
    g = s.gradient(lambda x: loss(s.x0(x)), s.x)
    return s.ddim(s.x0(s.x), s.eps(s.x)) - SCALE * 0.2 * s.correction() * g / rms(g)


def ugd(s):
    eps = s.eps(s.x) + SCALE * (1 - s.a) ** 0.5 * s.gradient(lambda x: loss(s.x0(x)), s.x)
    delta = -SCALE * (1 - s.a) / s.a * s.gradient(loss, s.x0(s.x))
    eps = eps - (s.a / (1 - s.a)) ** 0.5 * delta
    return s.ddim(s.x0(s.x, eps), eps)


def tfg(s):
    ratios = [float(r) for r in abar_ratios(s)]
    schedule = ratios[INDEX] * len(ratios) / sum(ratios)
    delta_t = -SCALE * schedule * s.gradient(lambda x: loss(s.x0(x)), s.x)
    x0 = s.x0(s.x)
    for _ in range(4):
        x0 = x0 - SCALE * schedule * s.gradient(loss, x0)
    delta_0 = x0 - s.x0(s.x)
    return s.ddim(s.x0(s.x), s.eps(s.x)) + delta_t / (s.a / s.b) ** 0.5 + s.b**0.5 * delta_0


def abar_ratios(s):
    abar = s.model.scheduler.alphas_cumprod[s.model.scheduler.timesteps].double()
    return abar / torch.cat([abar[1:], torch.ones(1)])


@pytest.mark.parametrize("paper", [balanced, dps, lgd, freedom, ugd, tfg])
def test_a_step_is_that_of_the_paper(paper):
    s = Step(once(paper.__name__))
    expected, result = paper(s), s.result()
    assert (s.ddim(s.x0(s.x), s.eps(s.x)) - result).abs().max() > 1e-3  # it guides
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def mmps(s, x_variance=None):
    """By dense matrices: what conjugate gradients come to. PiGDM has another variance in them."""
    moved, gamma, r2 = [], (1 - s.a) / s.a**0.5, 0.25 / SCALE
    for x in s.x.split(1):
        J = torch.autograd.functional.jacobian(s.x0, x).reshape(48, 48)
        A = torch.eye(48).double()[:16]  # the red channel
        x0 = s.x0(x).flatten()
        V = gamma * J.T if x_variance is None else x_variance * torch.eye(48).double()
        v = torch.linalg.solve(A @ V @ A.T + r2 * torch.eye(16).double(), 1 - A @ x0)
        moved.append((x0 + gamma * J.T @ A.T @ v).view_as(x))
    x0 = torch.cat(moved)
    return s.ddim(x0, (s.x - s.a**0.5 * x0) / (1 - s.a) ** 0.5)


def pgdm(s):
    sigma2 = (1 - s.a) / s.a  # of sigma-space
    return mmps(s, x_variance=sigma2 / (1 + sigma2))


def diffpir(s):
    rho, x0 = SCALE**-1 * 0.25 * s.a / (1 - s.a), s.x0(s.x)  # lambda r^2 / sigma^2
    x0[:, 0] = (1 + rho * x0[:, 0]) / (1 + rho)  # argmin (x - 1)^2 + rho (x - x0)^2
    eps = (s.x - s.a**0.5 * x0) / (1 - s.a) ** 0.5
    return s.ddim(x0, 0.7**0.5 * eps + 0.3**0.5 * s.drawn(RENEWAL))


@pytest.mark.parametrize("paper", [mmps, pgdm, diffpir])
def test_a_step_of_a_posterior_sampler_is_that_of_the_paper(paper):
    knobs = PRESETS[paper.__name__]
    s = Step(dataclasses.replace(knobs, iterations=20), network=Gentle)  # 16 values were measured
    expected = paper(s)
    assert (s.ddim(s.x0(s.x), s.eps(s.x)) - expected).abs().max() > 1e-2
    torch.testing.assert_close(s.result(Square), expected, rtol=1e-6, atol=1e-6)
    shipped = Step(knobs, network=Gentle).result(Square)  # stops after three
    torch.testing.assert_close(shipped, expected, rtol=0, atol=1e-3)


def test_where_a_networks_jacobian_is_no_variance_the_gradient_is_taken_as_it_is():
    s = Step("mmps")
    x = s.x[:1]
    jacobian = torch.autograd.functional.jacobian(s.x0, x).reshape(48, 48)
    g = s.gradient(lambda x0: SCALE * (x0[:, 0] - 1).square().sum() / 0.5, s.x0(x)).flatten()
    assert g @ jacobian @ g < 0
    plain = Step("clip-guided").result(Square)
    torch.testing.assert_close(s.result(Square)[:1], plain[:1])


@pytest.mark.parametrize("name", ["mmps", "diffpir"])
def test_a_posterior_sampler_goes_through_networks_again_and_keeps_images_apart(sampler, name):
    """Each iteration pulls through one graph, also where checkpoints compute it again."""

    class Red(Guide):
        def loss_guidance(self, step):
            return 50 * (step.image[:, 0] - 0.5).square().mean(dim=(1, 2))

    def latents(**options):
        return sampler("a cat", plugins=[Red()], preset=name, steps=3, **options).latents

    both = latents(seed=0, num_images=2)
    assert torch.equal(latents(seed=0, num_images=2, checkpointing="on"), both)
    # Convolutions sum in another order for another batch size; these latents are tens in size.
    torch.testing.assert_close(both[1:], latents(seed=1), rtol=0, atol=1e-3)


def flowchef(s):
    t, down, v = s.level.sigma, s.following.sigma, s.v(s.x)
    x = s.x - SCALE * s.gradient(loss, s.x - t * v)
    return x + (down - t) * v


def flowdps(s):
    t, down, v = s.level.sigma, s.following.sigma, s.v(s.x)
    clean, noise = s.x - t * v, s.x + (1 - t) * v
    y = clean
    for _ in range(3):
        y = y - SCALE * s.gradient(lambda x: loss(x).sqrt(), y)
    blended = (1 - t) * clean + t * y
    return (1 - down) * blended + down * (down**0.5 * noise + (1 - down) ** 0.5 * s.drawn(RENEWAL))


@pytest.mark.parametrize("paper", [flowchef, flowdps])
def test_a_step_of_a_flow_is_that_of_the_paper(paper):
    s = Step(PRESETS[paper.__name__], "flowmatch-euler")
    expected, result = paper(s), s.result()
    assert (s.x + (s.following.sigma - s.level.sigma) * s.v(s.x) - result).abs().max() > 1e-2
    # The scheduler takes its step in float32.
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["clip-guided", "deep-dive"])
def test_a_step_of_the_presets_in_sigma_space_is_theirs(name):
    """Karras' coordinates and Euler's method, as k-diffusion and the talk have it."""
    s = Step(name, "euler")
    sigma, down = s.level.sigma, s.following.sigma
    s.a = 1 / (1 + sigma**2)

    def x0(x):
        return x - sigma * s.eps(x)

    if name == "clip-guided":
        denoised = x0(s.x) - SCALE * sigma**2 * s.gradient(lambda x: loss(x0(x)), s.x)
        expected = s.x + (s.x - denoised) / sigma * (down - sigma)
    else:
        moved = s.x - SCALE * sigma**2 * s.gradient(loss, x0(s.x))
        expected = moved + s.eps(s.x) * (down - sigma)
    torch.testing.assert_close(s.result(), expected, rtol=1e-6, atol=1e-6)


def posterior(s, x0):
    """DDPM's: the mean (Ho et al. 2020, equation 7), its standard deviation, the drawn noise."""
    ratio = s.a / s.b
    mean = s.b**0.5 * (1 - ratio) / (1 - s.a) * x0 + ratio**0.5 * (1 - s.b) / (1 - s.a) * s.x
    generators = seeded(s.described, "")
    *_, noise = (draw(s.x.shape, generators, torch.float64) for _ in range(INDEX + 2))
    return mean, ((1 - s.b) / (1 - s.a) * (1 - ratio)) ** 0.5, noise


def test_a_step_of_mpgd_is_that_of_the_papers_code():
    s = Step("mpgd", "ddpm")
    g = s.gradient(loss, s.x0(s.x))
    mean, deviation, noise = posterior(s, s.x0(s.x) - 15 * SCALE * s.correction() * g / rms(g))
    torch.testing.assert_close(s.result(), mean + deviation * noise, rtol=1e-6, atol=1e-6)


def test_a_step_of_dsg_is_that_of_the_paper():
    s = Step("dsg", "ddpm")
    g = s.gradient(lambda x: loss(s.x0(x)), s.x)
    mean, deviation, noise = posterior(s, s.x0(s.x))
    norm = torch.linalg.vector_norm
    r = g[0].numel() ** 0.5 * deviation
    d_star = -r * g / norm(g, dim=(1, 2, 3), keepdim=True)
    mixed = deviation * noise + 0.1 * SCALE * (d_star - deviation * noise)
    expected = mean + r * mixed / norm(mixed, dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(s.result(), expected, rtol=1e-5, atol=1e-5)  # DDPM in float32


def test_a_step_of_dsg_on_a_flow_that_draws_noise_is_that_of_the_paper():
    s = Step("dsg", {"name": "flowmatch-euler", "stochastic_sampling": True})
    t, down = s.level.sigma, s.following.sigma
    g = s.gradient(lambda x: loss(x - t * s.v(x)), s.x)
    generators = seeded(s.described, "")  # first latents in float64, then the scheduler in float32
    kinds = [torch.float64] + [torch.float32] * (INDEX + 1)
    *_, noise = (draw(s.x.shape, generators, kind) for kind in kinds)
    norm = torch.linalg.vector_norm
    r = g[0].numel() ** 0.5 * down
    d_star = -r * g / norm(g, dim=(1, 2, 3), keepdim=True)
    mixed = down * noise + 0.1 * SCALE * (d_star - down * noise)
    mean = (1 - down) * (s.x - t * s.v(s.x))
    expected = mean + r * mixed / norm(mixed, dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(s.result(), expected, rtol=1e-5, atol=1e-5)  # steps in float32


def test_a_step_that_is_taken_twice_puts_noise_back_in_between():
    s = Step(dataclasses.replace(PRESETS["dps"], recurrence=2))
    ratio = s.a / s.b
    noise = draw(s.x.shape, seeded(s.described, RECURRENCE), torch.float64)
    first = dps(s)
    s.x = ratio**0.5 * first + (1 - ratio) ** 0.5 * noise
    torch.testing.assert_close(s.result(), dps(s), rtol=1e-6, atol=1e-6)


DETERMINISTIC = [name for name in PRESETS if name not in ("dsg", "lgd")]


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (name, scheduler)
        for name in DETERMINISTIC
        for scheduler in ({"name": "euler", "timestep_spacing": "leading"}, "flowmatch-euler")
        if (name, scheduler) != ("deep-dive", "flowmatch-euler")  # see below
    ],
    ids=str,
)
def test_a_preset_moves_latents_alike_in_every_family(name, scheduler):
    """DDIM is Euler's method in sigma-space and on a flow: the same x0 after a guided step."""
    seen = []
    for each in ("ddim", scheduler):
        s = Step(once(name), each)
        seen.append((s.x / s.level.norm, s.result() / s.following.norm))
    assert s.level.alpha == pytest.approx(1 if isinstance(scheduler, dict) else 1 - s.level.sigma)
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-4)


def test_deep_dive_keeps_what_the_network_itself_predicted():
    """Beside moved latents a flow's v stays, where the talk's eps stays."""
    s = Step("deep-dive", "flowmatch-euler")
    t, v = s.level.sigma, s.v(s.x)
    moved = s.x - SCALE * (t / s.level.alpha) ** 2 * s.level.alpha * s.gradient(loss, s.x - t * v)
    expected = moved + (s.following.sigma - t) * v
    torch.testing.assert_close(s.result(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_guide_of_scale_zero_changes_nothing_in_any_preset(sampler, name):
    run = {"preset": name, "steps": 5, "seed": 1, "scheduler": "euler-ancestral"}
    plain = sampler("a cat", **run).latents
    assert torch.equal(sampler("a cat", plugins=[Curved(scale=0)], **run).latents, plain)
    weak = Curved(scale=1e-4)  # latents of random networks are large, and so are its gradients
    assert not torch.equal(sampler("a cat", plugins=[weak], **run).latents, plain)


@pytest.mark.parametrize("scheduler", ["heun", "kdpm2", "unipc-multistep", "pndm"])
def test_a_scheduler_that_keeps_latents_is_refused_with_the_reason(sampler, scheduler):
    run = {"preset": "freedom", "steps": 5, "scheduler": scheduler}
    with pytest.raises(InputError, match="takes steps more than once, and .* that it kept"):
        sampler("a cat", plugins=[Curved()], **run)
    sampler("a cat", seed=0, **run)  # nothing is taken twice without a guide
    run["preset"] = "flowdps"
    with pytest.raises(InputError, match="'flowdps' puts noise back, and .* that it kept"):
        sampler("a cat", plugins=[Curved()], **run)


SCHEDULERS = [
    *("ddim", "ddpm", "euler", "euler-ancestral", "lms", "dpmsolver-multistep", "deis-multistep"),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_other_schedulers_take_a_step_twice_and_count_it_once(sampler, scheduler):
    preset = {"base": "balanced", "recurrence": 2}
    run = {"preset": preset, "steps": 5, "scheduler": scheduler, "seed": 0}
    result = sampler("a cat", plugins=[Curved(start=0.2, stop=0.6)], **run)
    assert [(r.index, r.repeat) for r in result.trace] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("preset", ["dsg", "diffpir", "flowdps"])
def test_a_plugin_that_takes_the_step_itself_is_refused_where_its_noise_is_changed(sampler, preset):
    class Still(Plugin):
        def advance(self, step):
            return step.latents

    said = f"'{preset}' turns the noise .* a plugin takes the step in its"
    with pytest.raises(InputError, match=said):
        sampler("a cat", plugins=[Curved(), Still()], preset=preset, scheduler="ddpm", steps=4)


@pytest.mark.parametrize("scheduler", ["ddim", "lms", "dpmsolver-multistep", "euler-ancestral"])
def test_noise_that_is_drawn_anew_takes_ddims_step_and_the_scheduler_goes_on_from_there(scheduler):
    """All of it: the next latents are x0 with fresh noise, and it is the same run for all of them
    until the guide has done; then each takes the rest on its own, from its own step count."""
    run = {"preset": {"base": "diffpir", "renoise": 1.0}, "scheduler": scheduler, "seed": 0}
    stream = Sampler(GaussianModel()).stream(
        plugins=[Curved(scale=1e-9, stop=0.5)], steps=6, guidance_scale=1, num_images=2, **run
    )
    steps = list(stream)
    generators = seeded(steps[0].run, RENEWAL)
    for step, after in itertools.pairwise(steps[:4]):
        noise = draw(step.x0.shape, generators, torch.float64)
        expected = after.alpha * step.x0 + after.sigma * noise
        torch.testing.assert_close(after.latents, expected, rtol=1e-5, atol=1e-5)
    assert [int(step.timestep) for step in steps] == sorted(
        {int(step.timestep) for step in steps}, reverse=True
    )
    assert stream.result().latents.abs().max() < 4  # of data with a deviation of 0.7


def test_a_scheduler_without_noise_is_refused_by_dsg(sampler):
    with pytest.raises(InputError, match="'sphere' turns the noise .* DDIMScheduler adds none"):
        sampler("a cat", plugins=[Curved()], preset="dsg", scheduler="ddim", steps=4)


def test_inner_iterations_descend_on_x0_without_calling_the_network(sampler):
    losses = []
    for iterations in (1, 4):
        preset = {"base": "tfg", "gradient": "x0", "mu": 1e-3, "iterations": iterations}
        run = {"preset": preset, "steps": 8, "seed": 0, "scheduler": "ddim"}
        result = sampler("a cat", plugins=[Curved()], **run)
        losses.append(float(loss(result.latents)))
    assert losses[1] < losses[0]


def test_what_pulls_against_another_guide_is_projected_out(sampler):
    class Up(Guide):
        def loss_guidance(self, step):
            return -step.x0[:, 0].mean(dim=(1, 2)) - step.x0[:, 1].mean(dim=(1, 2))

    class Down(Guide):
        def loss_guidance(self, step):
            return step.x0[:, 0].mean(dim=(1, 2)) - step.x0[:, 1].mean(dim=(1, 2))

    run = {"steps": 6, "seed": 0, "scheduler": "ddim"}
    projected = {"preset": {"base": "balanced", "combine": "project"}}
    for stack in ([Up()], [Up(), Up()]):  # no conflict: nothing is projected
        plain, same = (sampler("a cat", plugins=stack, **run, **o).latents for o in ({}, projected))
        torch.testing.assert_close(same, plain)
    opposed = [Up(), Up(scale=-1.0)]
    gone = sampler("a cat", plugins=opposed, **run, **projected).latents
    torch.testing.assert_close(gone, sampler("a cat", **run).latents, rtol=1e-4, atol=1e-4)
    # The channel they fight over is left alone, the one they share is moved by both.
    first = {"steps": 1, "guidance_scale": 1, **run}
    moved = next(sampler.stream("a cat", plugins=[Up(), Down()], **first, **projected)).x0
    moved = moved - next(sampler.stream("a cat", **first)).x0
    assert moved[:, 0].abs().max() < 1e-6 < moved[:, 1].min()


def test_trust_bounds_the_move_by_the_prompts_pull(sampler):
    run = {"steps": 4, "seed": 0, "scheduler": "ddim"}

    def moved(scale, trust):
        preset = {"base": "balanced", "trust": trust} if trust else "balanced"
        step = next(sampler.stream("a cat", plugins=[Curved(scale=scale)], preset=preset, **run))
        return step.x0 - next(sampler.stream("a cat", **run)).x0

    torch.testing.assert_close(moved(3.0, 0.5), moved(0.5, None))
    torch.testing.assert_close(moved(0.2, 0.5), moved(0.2, None))


def test_a_presets_window_is_within_the_guides_own(sampler):
    preset = {"base": "balanced", "start": 0.25, "stop": 0.75}
    result = sampler("a cat", plugins=[Curved(stop=0.5)], preset=preset, steps=8, seed=0)
    assert [r.index for r in result.trace] == [2, 3]


def test_a_knob_can_be_changed_alone_and_comes_back_from_a_run_file(sampler):
    changed = find_preset({"base": "tfg", "rho": 0.5})
    assert changed == dataclasses.replace(PRESETS["tfg"], rho=0.5)
    assert changed.changes() == {"base": "tfg", "rho": 0.5}
    assert find_preset(changed.changes()) == changed
    own = dataclasses.replace(changed, name="mine", trust=2.0)
    assert find_preset(own.changes()) == own


def test_a_file_is_a_preset(tmp_path):
    path = tmp_path / "soft.toml"
    path.write_text('base = "balanced"\nmu = 0.5\n')
    assert find_preset(str(path)) == dataclasses.replace(PRESETS["balanced"], name="soft", mu=0.5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("tgf", "no preset called 'tgf'. Did you mean 'tfg'"),
        ({"base": "tfg", "rh": 1}, "no knob 'rh'. Did you mean 'rho'"),
        ({"base": "tfg", "rho": -1}, "rho must be greater than or equal to 0; got -1"),
        ({"base": "mmps", "rule": "rms"}, "variance 'move' .* takes rule='sigma2'"),
        ({"rule": "rms"}, "gradient must be given. applied_to must be given"),
        ({"base": "dps", "rule": "sphere", "gradient": "x0"}, "'sphere' turns the noise"),
        ("none.toml", "cannot read the preset file none.toml"),
        (3, "no preset called '3'"),
    ],
)
def test_a_wrong_preset_says_what_is_wrong(table, message):
    with pytest.raises(InputError, match=message):
        find_preset(table)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_names_its_source(preset):
    assert isinstance(preset, Preset)
    assert preset.source == "" or len(preset.source) > 20
