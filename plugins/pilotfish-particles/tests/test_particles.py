"""Searches by particles: against plain runs, against each other, and against a known posterior."""

import math
from types import SimpleNamespace

import pytest
import torch
from pilotfish_particles import BestOf, Das, FeynmanKac, Svdd
from pilotfish_particles.lineage import Proposed, Scales, systematic

import pilotfish
from pilotfish import Run, Sampler
from pilotfish.testing import GaussianModel, random_sampler

SEARCHES = {"best-of": BestOf, "das": Das, "feynman-kac": FeynmanKac, "svdd": Svdd}
every_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
RUN = {"steps": 5, "seed": 3, "guidance_scale": 3.0, "scheduler": "ddpm"}


def darkness(step):
    """Mean of the picture, by NumPy: no gradient."""
    return torch.tensor(step.image.detach().numpy().mean((1, 2, 3)))


def measured(loss=darkness, **settings):
    return pilotfish.guide(loss, name="dark", gradient="none", **settings)


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


def test_the_best_of_several_is_the_run_of_the_least_loss_among_their_seeds(sampler):
    found = sampler("a cat", plugins=[measured(), BestOf(particles=3)], num_images=2, **RUN)
    assert len(found.images) == len(found.latents) == found.run.num_images == 2
    alone = [sampler("a cat", plugins=[measured()], **{**RUN, "seed": 3 + k}) for k in range(6)]
    losses = [result.trace.losses("dark")[-1] for result in alone]
    for place, group in enumerate((range(3), range(3, 6))):
        best = alone[min(group, key=lambda k: losses[k])].latents[0]
        torch.testing.assert_close(found.latents[place], best, rtol=1e-4, atol=1e-4)


@every_search
def test_a_search_finds_less_loss_than_the_mean_of_its_candidates(sampler, search):
    plugins = [measured(scale=50.0), search(particles=6)]
    options = {**RUN, "steps": 8}
    found = sampler("a cat", plugins=plugins, num_images=2, **options)
    plain = sampler("a cat", plugins=[measured()], num_images=12, **options)
    assert loss_of(sampler, found.latents) < loss_of(sampler, plain.latents)


def loss_of(sampler, latents):
    with torch.no_grad():
        return float(sampler.model.decode(latents).mean())


@every_search
def test_a_search_is_repeated_to_the_bit_from_its_run_file(sampler, search, tmp_path):
    (tmp_path / "own.py").write_text(
        "from pilotfish import Guide\n\n\nclass Dark(Guide):\n"
        "    def loss_guidance(self, step):\n        return step.rgb.mean(dim=(1, 2, 3))\n"
    )
    name = next(name for name, kind in SEARCHES.items() if kind is search)
    own = {"use": f"{tmp_path / 'own.py'}:Dark", "gradient": "none"}
    first = sampler("a cat", plugins=[own, {"use": name, "particles": 3}], num_images=2, **RUN)
    content = Run.parse(first.run.to_toml())
    assert content["num_images"] == 2
    again = sampler(**{key: content[key] for key in content.keys() - {"model", "dtype"}})
    assert torch.equal(first.latents, again.latents)


@pytest.mark.parametrize("search", [FeynmanKac, Svdd])
def test_a_scheduler_without_noise_is_refused(sampler, search):
    plugins = [measured(scale=1000.0), search(particles=3)]
    with pytest.raises(pilotfish.InputError, match="this scheduler draws no noise"):
        sampler("a cat", plugins=plugins, **{**RUN, "scheduler": "ddim"})


@every_search
def test_a_search_needs_a_guide_that_is_asked_at_the_last_step(sampler, search):
    with pytest.raises(pilotfish.InputError, match="there is none: add one"):
        sampler("a cat", plugins=[search()], **RUN)
    with pytest.raises(pilotfish.InputError, match="none is called 'blu'.*: dark"):
        sampler("a cat", plugins=[measured(), search(guides=["blu"])], **RUN)
    with pytest.raises(pilotfish.InputError, match="at the last step, where it needs the loss of"):
        sampler("a cat", plugins=[measured(stop=0.5), search()], **RUN)


@pytest.mark.parametrize("preset", ["dps", "ugd"])
def test_das_refuses_a_preset_whose_moves_it_cannot_weigh(sampler, preset):
    with pytest.raises(pilotfish.InputError, match=f"the preset '{preset}' changes what a step"):
        sampler("a cat", plugins=[measured(), Das()], **RUN, preset=preset)


def test_das_weighs_its_proposals_by_the_ratio_of_two_normal_densities(sampler):
    """By torch.distributions: q around the moved mean, p around the model's own."""
    alpha, sigma, after, next_sigma = 0.6, 0.8, 0.8, 0.6
    deviation = next_sigma * math.sqrt(1 - (alpha * next_sigma / (after * sigma)) ** 2)

    def mean(latents, x0):
        kept = math.sqrt(next_sigma**2 - deviation**2)
        return after * x0 + kept * (latents - alpha * x0) / sigma

    generator = torch.Generator().manual_seed(0)
    latents, x0, moved, elsewhere = torch.randn(4, 2, 4, 2, 2, generator=generator)
    x0, moved = x0.double(), moved.double()
    state = Proposed(Scales({}), model=(latents, x0), log_weights=torch.zeros(1, 2))
    step = SimpleNamespace(
        alpha=alpha, sigma=sigma, next_alpha=after, next_sigma=next_sigma, last=False,
        latents=latents + 0.1 * elsewhere, x0=moved, run=SimpleNamespace(model=sampler.model),
        generator=[torch.Generator().manual_seed(k) for k in range(2)],
    )  # fmt: skip
    came = Das(particles=2).advance(step, state)
    own = torch.distributions.Normal(mean(latents, x0), deviation)
    proposal = torch.distributions.Normal(mean(step.latents, moved), deviation)
    ratio = (own.log_prob(came) - proposal.log_prob(came)).flatten(1).sum(dim=1)
    torch.testing.assert_close(
        state.log_weights[0], ratio.float(), rtol=1e-4, atol=1e-4, check_dtype=False
    )


def test_two_searches_in_one_run_are_refused(sampler):
    with pytest.raises(pilotfish.InputError, match="each choose among candidates"):
        sampler("a cat", plugins=[measured(), BestOf(), Svdd()], **RUN)


def test_a_search_goes_along_with_a_guide_that_moves(sampler):
    def blue(step):
        return (step.image[:, 2] - 0.9).abs().mean(dim=(1, 2))

    moving = pilotfish.guide(blue, name="blue")
    found = sampler("a cat", plugins=[moving, measured(), Svdd(guides=["dark"])], **RUN)
    assert found.trace.losses("blue")[-1] < found.trace.losses("blue")[0]
    assert found.trace.of("dark")[0].share == ()  # it moves nothing


def test_svdd_of_one_temperature_draws_by_the_rewards(sampler):
    """With a temperature far above all differences of rewards, anyone is chosen."""
    cold = sampler("a cat", plugins=[measured(), Svdd()], **RUN).latents
    hot = sampler("a cat", plugins=[measured(), Svdd(temperature=1e9)], **RUN).latents
    assert not torch.allclose(cold, hot, atol=1e-2)


# ---- a known posterior ----

SIZE = {"height": 2, "width": 2}
STEPS, STD, NOISE, AIM = 100, 0.7, 0.5, 1.0


def misfit(step):
    """-log p(y | x0) of a measurement of one coordinate, with noise."""
    return (step.x0[:, 0, 0, 0] - AIM).square() / (2 * NOISE**2)


def posterior():
    variance = 1 / (1 / STD**2 + 1 / NOISE**2)
    return variance * AIM / NOISE**2, variance


# What filters, how strong a guide proposes (too strong as well: weights make up for it), pictures.
FILTERS = {
    "feynman-kac": (FeynmanKac, None, 256),
    "das, guided": (Das, 1.0, 128),
    "das, guided too far": (Das, 1.5, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize(("search", "scale", "count"), FILTERS.values(), ids=FILTERS)
def test_particles_reach_the_mean_and_the_variance_of_the_posterior(search, scale, count):
    guides = [pilotfish.guide(misfit, name="measured", gradient="none")]
    if scale:
        guides.append(pilotfish.guide(misfit, name="moving", scale=scale))
    chosen = {"particles": 64, "strength": 1.0, "pick": "weighted", "guides": ["measured"]}
    result = Sampler(GaussianModel(STD))(
        plugins=[*guides, search(**chosen)],
        **{"steps": STEPS, "seed": 0, "num_images": count, "guidance_scale": 1.0, **SIZE},
        scheduler={"name": "ddpm", "timestep_spacing": "trailing"},
        preset="clip-guided",
    )
    measured_one = result.latents[:, 0, 0, 0]
    mean, variance = posterior()
    assert float(measured_one.mean()) == pytest.approx(mean, abs=0.05)
    assert float(measured_one.var()) == pytest.approx(variance, abs=0.05)
    others = result.latents[:, 1:]  # nothing was measured of these
    assert float(others.mean()) == pytest.approx(0, abs=0.05)
    assert float(others.var()) == pytest.approx(STD**2, abs=0.05)


def test_a_systematic_draw_takes_each_by_its_weight_to_one():
    weights = torch.tensor([[0.5, 0.26, 0.2, 0.04, 0.0]])
    generators = [torch.Generator().manual_seed(0)]
    for _ in range(20):
        counts = systematic(weights, generators)[0].bincount(minlength=5).tolist()
        for count, weight in zip(counts, weights[0].tolist(), strict=True):
            assert math.floor(5 * weight - 1e-6) <= count <= math.ceil(5 * weight + 1e-6)
        assert sum(counts) == 5
