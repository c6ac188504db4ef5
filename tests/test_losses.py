"""Guides' losses on finished pictures, without a step of a run."""

import pytest
import torch

from pilotfish import Guide, InputError, PluginError, Setting


class Pixel(Guide):
    """One value of what a guide may see, and of the settings."""

    class Settings(Guide.Settings):
        channel: int = Setting(0)

    def loss_guidance(self, step):
        return step.image[:, self.settings.channel, 3, 5]


class Latent(Guide):
    def loss_guidance(self, step):
        assert step.sigma == 0
        return step.x0[:, 1, 2, 0]


class Words(Guide):
    """Reads the run that the pictures come from."""

    def loss_guidance(self, step):
        return step.x0.new_full((step.run.num_images,), float(len(step.run.prompt)))


class Torn(Guide):
    def loss_guidance(self, step):
        raise ValueError("torn")


@pytest.fixture(scope="module")
def result(random_sampler):
    return random_sampler("a red cat", seed=3, steps=2, num_images=2)


def test_losses_are_those_of_the_finished_picture(random_sampler, result):
    losses = random_sampler.losses(result, [Pixel(channel=2), Latent(), Pixel(), Words()])
    assert list(losses) == ["Pixel", "Latent", "Pixel#2", "Words"]
    image = random_sampler.model.decode(result.latents)
    found = {name: torch.tensor(loss) for name, loss in losses.items()}
    torch.testing.assert_close(found["Pixel"], image[:, 2, 3, 5])
    torch.testing.assert_close(found["Pixel#2"], image[:, 0, 3, 5])
    torch.testing.assert_close(found["Latent"], result.latents[:, 1, 2, 0])
    assert losses["Words"] == (9.0, 9.0)


def test_losses_leave_the_result_alone(random_sampler, result):
    trace, latents = len(result.trace), result.latents.clone()
    random_sampler.losses(result, [Pixel()])
    assert len(result.trace) == trace
    assert torch.equal(result.latents, latents)


def test_a_scale_moves_no_loss_and_no_gradient_is_taken(random_sampler, result):
    class Still(Pixel):
        def loss_guidance(self, step):
            return super().loss_guidance(step).detach()  # what no gradient could be taken of

    plain = random_sampler.losses(result, [Pixel()])["Pixel"]
    assert random_sampler.losses(result, [Pixel(scale=-7)])["Pixel"] == plain
    assert random_sampler.losses(result, [Still()])["Still"] == plain


def test_a_loss_that_fails_names_its_guide(random_sampler, result):
    with pytest.raises(PluginError, match="'Torn'.*torn"):
        random_sampler.losses(result, [Pixel(), Torn()])
    with pytest.raises(InputError, match="no plugin called 'nothing'"):
        random_sampler.losses(result, ["nothing"])
