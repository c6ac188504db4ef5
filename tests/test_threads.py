"""One sampler, many runs at a time: each equals the run alone."""

import dataclasses
import threading

import pytest
import torch

from pilotfish import Guide, Plugin


class Red(Guide):
    def loss_guidance(self, step):
        return step.image[:, 0].mean(dim=(1, 2))


class Word(Plugin):
    def vocabulary(self):
        return {"<ink>": torch.full((2, 16), 0.5)}


class Louder(Plugin):
    """Changes token embeddings, and encodes another prompt while it does."""

    def embedding_transform(self, embedding, encode):
        if embedding.stage == "token":
            return dataclasses.replace(embedding, values=embedding.values * 3)
        return dataclasses.replace(embedding, values=encode("a blue puppy").values)


RUNS = {
    "plain": {},
    "guided": {"plugins": [Red()]},
    "checkpointed": {"plugins": [Red(gradient="latents")], "checkpointing": "on"},
    "words": {"plugins": [Word()]},
    "embeddings": {"plugins": [Louder()]},
    "hard mask": {"plugins": [Red(mask=(0, 0, 0.5, 1), mask_edge="hard")]},
}


@pytest.mark.parametrize("count", [2, 8])
def test_every_run_in_a_thread_of_its_own_equals_the_run_alone(sampler, count):
    def run(name, seed):
        return sampler("a red <ink> cat", steps=2, seed=seed, **RUNS[name]).latents

    jobs = [(name, seed) for seed in range(count) for name in RUNS][: 3 * count]
    alone = {job: run(*job) for job in jobs}
    beside, barrier = {}, threading.Barrier(count)

    def work(mine):
        barrier.wait(30)
        for job in mine:
            beside[job] = run(*job)

    threads = [threading.Thread(target=work, args=(jobs[i::count],)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(beside[job], alone[job]) for job in jobs)


def test_a_run_inside_another_ones_hook_changes_neither(sampler):
    class Inside(Plugin):
        def loss_guidance(self, step):
            return None

        def embedding_transform(self, embedding):
            if embedding.stage == "token" and embedding.role == "positive":
                inner.append(sampler("a cat", steps=1, seed=5).latents)

    inner = []
    outer = sampler("a red cat", steps=2, seed=1, plugins=[Inside()]).latents
    assert torch.equal(outer, sampler("a red cat", steps=2, seed=1).latents)
    assert torch.equal(inner[0], sampler("a cat", steps=1, seed=5).latents)
