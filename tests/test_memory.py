"""Memory that is not enough: once, always, for the network, for the decode, for a guide."""

import pytest
import torch

from pilotfish import Guide, InputError, OutOfMemoryError, Plugin

RUN = {"steps": 3, "seed": 5, "num_images": 4}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"),
]


@pytest.fixture
def short_of_memory(monkeypatch, sampler):
    """Lets a part of the model fail for more images than `most`, the first `times` times."""

    def fail(part, most, error=ERRORS[0], times=99):
        own, kind, left = getattr(sampler.model, part).__func__, type(sampler.model), [times]

        def failing(self, latents, *args, **kwargs):
            if len(latents) > most and left[0]:
                left[0] -= 1
                raise error
            return own(self, latents, *args, **kwargs)

        monkeypatch.setattr(kind, part, failing)

    return fail


# With guidance the network is asked for twice as many images as the run has.
@pytest.mark.parametrize(("part", "most"), [("predict", 4), ("predict", 2), ("decode", 1)])
@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_batch_that_does_not_fit_is_made_in_halves_with_the_same_seeds(
    sampler, short_of_memory, part, most, error
):
    whole = sampler("a cat", plugins=["blue"], **RUN)
    short_of_memory(part, most, error)
    # A guide decodes too, so that all of its run is made in halves, not the last decode alone.
    with pytest.warns(UserWarning, match="made in batches of [12]: .*out of memory"):
        parts = sampler("a cat", plugins=["blue"], **RUN)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-4, atol=1e-4)
    assert (parts.run, len(parts.images)) == (whole.run, 4)
    assert [picture.run for picture in parts.images] == [whole.run] * 4
    assert [(r.index, r.plugin, len(r.loss)) for r in parts.trace] == [
        (r.index, r.plugin, 4) for r in whole.trace
    ]
    for ours, theirs in zip(parts.trace, whole.trace, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)


def test_the_last_decode_alone_is_made_in_parts(sampler, short_of_memory):
    whole = sampler("a cat", **RUN)
    short_of_memory("decode", 1)
    parts = sampler("a cat", **RUN)
    assert torch.equal(parts.latents, whole.latents)
    for ours, theirs in zip(parts.images, whole.images, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_one_image_that_does_not_fit_is_an_error_that_says_what_helps(sampler, short_of_memory):
    short_of_memory("predict", 0)
    words = "out of memory.*What helps: checkpointing='on'.*decoder='tiny'.*smaller.* than 32x32"
    with pytest.raises(OutOfMemoryError, match=words) as caught:
        sampler("a cat", plugins=["blue"], steps=2, seed=1)
    assert caught.value.latents is None
    with pytest.raises(OutOfMemoryError) as caught:
        sampler("a cat", steps=2, seed=1)
    assert "checkpointing" not in str(caught.value)


def test_finished_latents_are_kept_where_their_decode_does_not_fit(sampler, short_of_memory):
    expected = sampler("a cat", steps=2, seed=1).latents
    short_of_memory("decode", 0)
    with pytest.raises(OutOfMemoryError) as caught:
        sampler("a cat", steps=2, seed=1)
    assert torch.equal(caught.value.latents, expected)


def test_a_guide_that_needs_too_much_is_not_skipped_but_made_in_halves(sampler):
    class Greedy(Guide):
        def loss_guidance(self, step):
            if len(step.image) > 1:
                raise ERRORS[0]
            return step.image.mean((1, 2, 3))

    with pytest.warns(UserWarning, match="made in batches"):
        result = sampler("a cat", plugins=[Greedy()], on_error="skip", **RUN)
    assert all(len(record.loss) == 4 and record.error is None for record in result.trace)


def test_images_that_may_change_places_are_not_made_apart(sampler, short_of_memory):
    class Stays(Plugin):
        def resample(self, step):
            return None

    short_of_memory("predict", 4)
    with pytest.raises(OutOfMemoryError, match="fewer images at once"):
        sampler("a cat", plugins=[Stays()], **RUN)


@pytest.mark.parametrize(
    "size", [{"height": 2**20, "width": 2**20}, {"num_images": 10**9}, {"width": 10**30}]
)
def test_a_size_that_cannot_fit_is_refused_before_it_is_tried(sampler, size):
    with pytest.raises(InputError, match="cannot be made here: at least .* GiB"):
        sampler.stream("a cat", **{**RUN, **size})
