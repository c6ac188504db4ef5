"""What `blend`, `token-blend` and `token-swap` promise."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from pilotfish_blend import Blend, TokenBlend, TokenSwap
from pilotfish_blend.mixing import mixed
from pilotfish_blend.prompts import factors_at
from pilotfish_blend.syntax import SIGNS, cut
from pilotfish_kit import check_plugin

from pilotfish import InputError, Plugin, Run, SettingsError
from pilotfish.testing import random_sampler

CAT, PUPPY, SKUNK = "a red cat", "a black puppy on a white background", "a skunk, some drawing"


@pytest.fixture(scope="module")
def sampler():
    return random_sampler()


@pytest.fixture(scope="module")
def latents_of(sampler):
    """The final latents of a short run: `latents_of(prompt, plugin, ..., steps=3)`."""

    def run(prompt, *plugins, **options):
        return sampler(prompt, plugins=plugins, **{"steps": 3, "seed": 5, **options}).latents

    return run


@pytest.fixture(scope="module")
def embeddings_of(sampler):
    """The prompt's embedding (T, D) at each step."""

    def run(prompt, *plugins, steps=5):
        stream = sampler.stream(prompt, plugins=plugins, steps=steps, seed=5)
        return [step.embeddings[0].clone() for step in stream]

    return run


@pytest.fixture(scope="module")
def embedding_of(embeddings_of):
    return lambda prompt, *plugins: embeddings_of(prompt, *plugins, steps=1)[0]


class Watch(Plugin):
    """Keeps the positive embeddings that it is offered, by stage."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def embedding_transform(self, embedding):
        if embedding.role == "positive":
            self.seen[embedding.stage] = embedding


class Ink(Plugin):
    """Adds the word `<ink>`."""

    def vocabulary(self):
        return {"<ink>": torch.randn(1, 16, generator=torch.Generator().manual_seed(9))}


# ---- blend: which prompts, and how much of each ----


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
@pytest.mark.parametrize("weights", [{PUPPY: 1}, {PUPPY: 3}, {PUPPY: 1, SKUNK: 0}])
def test_blend_of_one_prompt_is_bit_identical_to_that_prompt(latents_of, weights, mode):
    blended = latents_of(CAT, Blend(prompts=weights, mode=mode), negative_prompt="a photo")
    assert torch.equal(blended, latents_of(PUPPY, negative_prompt="a photo"))


def test_blend_of_weight_zero_leaves_the_image_bit_identical(latents_of):
    assert torch.equal(latents_of(CAT, Blend(prompts={PUPPY: 0})), latents_of(CAT))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({CAT: 0.25, PUPPY: 0.75}, (0.25, 0.75, 0)),
        ({CAT: 2, PUPPY: 1, SKUNK: 1}, (0.5, 0.25, 0.25)),
        ({PUPPY: 0.3}, (0.7, 0.3, 0)),  # the rest is the run's own prompt's
        ({CAT: 0.1, PUPPY: 0.3, SKUNK: 0.1}, (0.6, 0.3, 0.1)),
        ({PUPPY: 0.7, SKUNK: 0.2 + 0.1}, (0, 0.7, 0.3)),
    ],
)
def test_lerp_is_the_weighted_mean(embedding_of, weights, shares):
    each = torch.stack([embedding_of(prompt) for prompt in (CAT, PUPPY, SKUNK)])
    expected = torch.tensordot(torch.tensor(shares), each, dims=1)
    torch.testing.assert_close(embedding_of(CAT, Blend(prompts=weights)), expected)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_pooled_embeddings_are_mixed_alike(sampler, mode):
    def pooled(prompt, *plugins):
        watch = Watch()
        sampler(prompt, plugins=[*plugins, watch], steps=1, seed=0)
        return watch.seen["prompt"].pooled

    blended = pooled(CAT, Blend(prompts={PUPPY: 0.3}, mode=mode))
    assert blended.shape == (1, 16)
    torch.testing.assert_close(blended, mixed([pooled(CAT), pooled(PUPPY)], [0.7, 0.3], mode))


def test_negative_prompt_is_left_alone(sampler):
    roles = []

    class Roles(Plugin):
        def embedding_transform(self, embedding):
            if embedding.role == "negative" and embedding.stage == "prompt":
                roles.append(embedding.values)

    for plugins in ([Roles()], [Blend(prompts={PUPPY: 1}), Roles()]):
        sampler(CAT, plugins=plugins, steps=1, seed=0, negative_prompt="a photo")
    assert all(torch.equal(roles[0], values) for values in roles[1:])
    assert len(roles) == 3  # once, and once more at the step


def test_words_that_other_plugins_add_may_stand_in_blended_prompts(latents_of):
    blended = latents_of(CAT, Ink(), Blend(prompts={"a <ink> puppy": 1}))
    assert torch.equal(blended, latents_of("a <ink> puppy", Ink()))


def test_blend_takes_the_run_prompt_as_the_plugins_before_it_left_it(embedding_of):
    class Double(Plugin):
        def embedding_transform(self, embedding):
            if embedding.stage == "prompt":
                return dataclasses.replace(embedding, values=embedding.values * 2)

    expected = 0.5 * 2 * embedding_of(CAT) + 0.5 * embedding_of(PUPPY)
    blended = embedding_of(CAT, Double(), Blend(prompts={PUPPY: 0.5}))
    torch.testing.assert_close(blended, expected)


def test_prompts_are_encoded_once_however_many_steps(sampler):
    calls = []
    encoder = sampler.model.text_encoder
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        blend = Blend(prompts={PUPPY: 1, SKUNK: 1}, schedule="travel")
        sampler(CAT, plugins=[blend], steps=6, seed=0)
    finally:
        handle.remove()
    assert len(calls) == 4  # prompt, negative prompt, and two


# ---- slerp ----


def random_vectors(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def test_slerp_of_two_is_shoemakes_formula():
    a, b = random_vectors(2, 1, 7, 16).double()
    part = 0.3
    angle = torch.acos(torch.cosine_similarity(a, b, dim=-1))[..., None]
    directions = [v / v.norm(dim=-1, keepdim=True) for v in (a, b)]
    expected = (
        torch.sin((1 - part) * angle) * directions[0] + torch.sin(part * angle) * directions[1]
    ) / torch.sin(angle)
    length = (1 - part) * a.norm(dim=-1) + part * b.norm(dim=-1)
    values = mixed([a.float(), b.float()], [1 - part, part], "slerp")
    torch.testing.assert_close(values, (expected * length[..., None]).float())


def test_slerp_of_many_does_not_depend_on_their_order():
    vectors = list(random_vectors(4, 1, 7, 16))
    weights = [0.4, 0.3, 0.2, 0.1]
    expected = mixed(vectors, weights, "slerp")
    torch.testing.assert_close(mixed(vectors[::-1], weights[::-1], "slerp"), expected)


def test_slerp_of_corners_of_a_cube_is_the_middle():
    values = mixed(list(torch.eye(3)), [1, 1, 1], "slerp")
    torch.testing.assert_close(values, torch.full((3,), 1 / math.sqrt(3)))


def test_slerp_ends_where_no_vector_pulls_any_more():
    units = torch.nn.functional.normalize(random_vectors(3, 5, 8), dim=-1)
    weights = torch.tensor([0.5, 0.3, 0.2])
    mean = mixed(list(units), weights.tolist(), "slerp")
    along = (units * mean).sum(-1, keepdim=True)
    pulls = weights.view(3, 1, 1) * (units - along * mean) * along.acos() / along.acos().sin()
    # Angles from a cosine in float32 carry 1e-4 where they are small.
    torch.testing.assert_close(pulls.sum(0), torch.zeros(5, 8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_mixing_equal_vectors_gives_them_back(mode):
    vector = random_vectors(1, 7, 16)
    torch.testing.assert_close(mixed([vector] * 3, [1, 2, 3], mode), vector)
    zero = torch.zeros(1, 7, 16)
    assert torch.equal(mixed([zero, zero], [1, 1], mode), zero)


# ---- schedules ----


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_travel_starts_at_the_first_prompt_and_ends_at_the_last(embeddings_of, mode):
    prompts = dict.fromkeys([PUPPY, SKUNK, "a blue otter"], 1)
    seen = embeddings_of(CAT, Blend(prompts=prompts, schedule="travel", mode=mode), steps=5)
    for index, prompt in ((0, PUPPY), (2, SKUNK), (4, "a blue otter")):
        assert torch.equal(seen[index], embeddings_of(prompt, steps=1)[0])
    half = mixed([seen[0], seen[2]], [1, 1], mode)
    torch.testing.assert_close(seen[1], half)


def test_travel_changes_the_picture_on_the_way(latents_of):
    travel = latents_of(CAT, Blend(prompts={PUPPY: 1, SKUNK: 1}, schedule="travel"))
    constant = latents_of(CAT, Blend(prompts={PUPPY: 1, SKUNK: 1}))
    ends = [latents_of(PUPPY), latents_of(SKUNK)]
    assert not any(torch.equal(travel, other) for other in (constant, *ends))


def test_constant_weights_stay(embeddings_of):
    first, *others = embeddings_of(CAT, Blend(prompts={PUPPY: 0.4}))
    assert len(others) == 4
    assert all(torch.equal(first, other) for other in others)


def test_moments_hold_at_their_ends_and_lie_on_lines_between():
    schedule = {0.25: [1.0, 0.0], 0.75: [0.0, 2.0]}
    factors = [factors_at(when / 8, schedule, 2) for when in range(9)]
    assert factors[:3] == [[1, 0]] * 3
    assert factors[3:6] == [[0.75, 0.5], [0.5, 1], [0.25, 1.5]]
    assert factors[6:] == [[0, 2]] * 3


def test_factors_multiply_the_weights(embeddings_of):
    blend = Blend(prompts={PUPPY: 3, SKUNK: 1}, schedule={0: [1, 0], 1: [1, 3]})
    first, _, last = embeddings_of(CAT, blend, steps=3)
    puppy, skunk = (embeddings_of(p, steps=1)[0] for p in (PUPPY, SKUNK))
    assert torch.equal(first, puppy)
    torch.testing.assert_close(last, (puppy + skunk) / 2)


def test_one_step_is_the_first_moment(embedding_of):
    blend = Blend(prompts={PUPPY: 1, SKUNK: 1}, schedule="travel")
    assert torch.equal(embedding_of(CAT, blend), embedding_of(PUPPY))


def test_a_moment_at_which_no_prompt_has_a_weight_is_refused(latents_of):
    blend = Blend(prompts={PUPPY: 0, SKUNK: 1}, schedule={0: [1, 0], 1: [1, 1]})
    with pytest.raises(InputError, match=r"at moment 0 .* weights are \[0.0, 1.0\], factors"):
        latents_of(CAT, blend)


# ---- token-swap ----


@pytest.mark.filterwarnings("ignore:brackets in a prompt")
@pytest.mark.parametrize(
    ("prompt", "word", "by", "expected"),
    [
        ("a puppy on a red background", "puppy", "cat", "a cat on a red background"),
        ("a Puppy, (puppy) and puppy's!", "puppy", "cat", "a cat, (cat) and cat's!"),
        ("a puppy and a puppyish otter", "puppy", "cat", "a cat and a puppyish otter"),
        ("a puppy", "puppy", "zebra", "a zebra"),  # five tokens for one
        ("a zebra and a cat", "Zebra", "otter", "a otter and a cat"),
        ("a red puppy", "red puppy", "blue green cat", "a blue green cat"),
        ("a puppy", "puppy", "puppy", "a puppy"),
    ],
)
def test_token_swap_equals_the_prompt_with_the_other_word(latents_of, prompt, word, by, expected):
    options = {"negative_prompt": "a puppy photo"}  # which keeps its puppy
    swapped = latents_of(prompt, TokenSwap(word=word, by=by), **options)
    assert torch.equal(swapped, latents_of(expected, **options))


def test_swaps_follow_one_another(latents_of):
    swaps = [TokenSwap(word="puppy", by="cat"), TokenSwap(word="skunk", by="puppy")]
    assert torch.equal(latents_of("a puppy, a skunk", *swaps), latents_of("a cat, a puppy"))


# ---- token-blend ----


def rows(sampler, *words):
    """The words' rows in the encoder's table."""
    encoder = sampler.model.text_encoders[0]
    ids = encoder.tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words])
    return encoder.network.get_input_embeddings().weight[ids]


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ({"puppy": 0.5, "skunk": 0.5}, (0.5, 0.5, 0)),
        ({"skunk": 0.25}, (0.75, 0.25, 0)),  # the rest is the word's own
        ({"skunk": 2, "cat": 6}, (0, 0.25, 0.75)),
    ],
)
def test_token_blend_gives_the_word_the_weighted_mean_of_rows(sampler, mix, shares):
    watch = Watch()
    plugins = [TokenBlend(word="puppy", mix=mix), watch]
    sampler("a puppy on a red background", plugins=plugins, steps=1, seed=0)
    expected = torch.tensor(shares) @ rows(sampler, "puppy", "skunk", "cat")
    embedding = watch.seen["token"]
    torch.testing.assert_close(embedding.values[0, 2], expected)
    assert embedding.tokens[1] == "a</w>" and embedding.tokens[3] == "on</w>"


def test_token_blend_of_one_word_is_bit_identical_to_that_word(latents_of):
    for mix, expected in (({"puppy": 1}, "puppy"), ({"cat": 0}, "puppy"), ({"cat": 1}, "cat")):
        blended = latents_of("a puppy", TokenBlend(word="puppy", mix=mix))
        assert torch.equal(blended, latents_of(f"a {expected}"))


def test_words_of_as_many_tokens_are_mixed_token_by_token(sampler):
    watch = Watch()
    plugins = [TokenBlend(word="red cat", mix={"blue otter": 0.5}), watch]
    sampler("a red cat", plugins=plugins, steps=1, seed=0)
    red, cat, blue, otter = rows(sampler, "red", "cat", "blue", "otter")
    expected = torch.stack([(red + blue) / 2, (cat + otter) / 2])
    torch.testing.assert_close(watch.seen["token"].values[0, 2:4], expected)


def test_words_of_other_numbers_of_tokens_are_refused_with_the_tokens(latents_of):
    blend = TokenBlend(word="cat", mix={"zebra": 0.5})
    with pytest.raises(
        InputError,
        match=r"token-blend: .* same number of tokens; in text_encoder 'zebra' is 5 "
        r"\(z e b r a\), 'cat' is 1 \(cat\). Choose other words, or",
    ):
        latents_of("a cat", blend)


def test_each_text_encoder_gets_vectors_of_its_own_table(sampler):
    first = sampler.model.text_encoders[0]
    other = random_sampler(seed=1).model.text_encoders[0]
    encoders = (first, dataclasses.replace(other, name="text_encoder_2"))
    run = SimpleNamespace(plugins=[], model=SimpleNamespace(text_encoders=encoders))
    plugin = TokenBlend(word="cat", mix={"puppy": 0.5})
    state = plugin.setup()
    plugin.prompt_transform("a cat", run, state)
    (vectors,) = plugin.vocabulary(run, state).values()
    for encoder in encoders:
        half = rows(SimpleNamespace(model=SimpleNamespace(text_encoders=[encoder])), "cat", "puppy")
        torch.testing.assert_close(vectors[encoder.name], half.mean(0, keepdim=True))


@pytest.mark.parametrize("plugin", [TokenBlend(word="fox", mix={"cat": 1}), "token-swap"])
def test_a_word_that_the_prompt_has_not_is_refused(latents_of, plugin):
    if plugin == "token-swap":
        plugin = TokenSwap(word="fox", by="cat")
    with pytest.raises(InputError, match=r"the prompt has no word 'fox'; it is 'a foxy <fox> cat'"):
        latents_of("a foxy <fox> cat", plugin)


def test_words_that_other_plugins_add_can_be_replaced_but_not_taken(latents_of):
    swapped = latents_of("a <ink> puppy", Ink(), TokenSwap(word="<ink>", by="red"))
    assert torch.equal(swapped, latents_of("a red puppy"))
    with pytest.raises(InputError, match=r"text_encoder has no word <ink>; a word that another"):
        latents_of("a <ink> puppy", Ink(), TokenSwap(word="puppy", by="<ink>"))


def test_words_are_not_looked_for_inside_the_words_of_other_plugins(latents_of):
    plugins = [TokenBlend(word="puppy", mix={"cat": 1}), TokenSwap(word="cat", by="otter")]
    assert torch.equal(latents_of("a puppy, a cat", *plugins), latents_of("a cat, a otter"))


# ---- the syntax in prompts ----


@pytest.mark.parametrize(
    ("prompt", "plugin", "same_prompt", "same_plugin"),
    [
        ("a [[puppy -> cat]], red", TokenSwap(), "a cat, red", None),
        ("a [[puppy->zebra]], red", TokenSwap(), "a zebra, red", None),
        (
            "a [[puppy + skunk]] and a puppy",
            TokenBlend(),
            "a cat and a puppy",
            TokenBlend(word="cat", mix={"puppy": 1, "skunk": 1}),
        ),
        (
            "a [[puppy:3 + skunk:.5+skunk : 0.5]]",
            TokenBlend(),
            "a cat",
            TokenBlend(word="cat", mix={"puppy": 0.75, "skunk": 0.25}),
        ),
        (
            "a [[red puppy | blue]] drawing",
            Blend(),
            "",
            Blend(prompts={"a red puppy drawing": 0.5, "a blue drawing": 0.5}),
        ),
        (
            "[[a puppy:3 | a skunk:1]]",
            Blend(mode="slerp"),
            "",
            Blend(prompts={"a puppy": 3, "a skunk": 1}, mode="slerp"),
        ),
        (
            "a [[puppy | skunk | cat]]",
            Blend(schedule="travel"),
            "",
            Blend(prompts={"a puppy": 1, "a skunk": 1, "a cat": 1}, schedule="travel"),
        ),
    ],
)
def test_a_mark_equals_its_settings(latents_of, prompt, plugin, same_prompt, same_plugin):
    expected = latents_of(same_prompt, *filter(None, [same_plugin]))
    assert torch.equal(latents_of(prompt, plugin), expected)


def test_marks_of_several_plugins_stand_in_one_prompt(latents_of):
    prompt = "a [[cat -> otter]], a [[puppy + skunk]] and a [[red | blue]] picture"
    marked = latents_of(prompt, TokenSwap(), TokenBlend(), Blend())
    settings = latents_of(
        "a otter, a [[puppy + skunk]] and a [[red | blue]] picture", TokenBlend(), Blend()
    )
    assert torch.equal(marked, settings)
    assert not torch.equal(marked, latents_of("a otter, a puppy and a red picture"))


def test_marks_and_settings_work_in_one_prompt(latents_of):
    swap = TokenSwap(word="cat", by="otter")
    marked = latents_of("a cat and a [[puppy -> skunk]]", swap)
    assert torch.equal(marked, latents_of("a otter and a skunk"))


@pytest.mark.parametrize(
    "mark",
    [
        *(
            "[[cat]]",
            "[[]]",
            "[[cat, puppy]]",
            "[[cat => puppy]]",
            "[[cat:0.5]]",
            "[[cat & puppy]]",
        ),
        *("[[cat + ]]", "[[ | cat]]", "[[-> cat]]", "[[cat:1 + :1]]"),
        *("[[cat:x + puppy]]", "[[cat:-1 + puppy]]", "[[cat: + puppy]]", "[[cat:nan + puppy]]"),
        *("[[cat:0 + puppy:0]]", "[[a cat: red | puppy]]"),
        *("[[cat -> puppy -> skunk]]", "[[cat:2 -> puppy]]", "[[cat + puppy | skunk]]"),
        *(
            "[[cat",
            "cat]]",
            "[[cat + puppy]",
            "cat + puppy]]",
            "[[cat | [[a + b]]]]",
            "[[[a + b]]]",
        ),
    ],
)
def test_unknown_syntax_is_refused_and_told(mark):
    run = SimpleNamespace(plugins=[{"use": name} for name in SIGNS])
    with pytest.raises(
        InputError, match=r"(cannot read \[\[|without its partner).*Expected \[\[word -> word\]\]"
    ):
        cut(f"a {mark} on a red background", run)


@pytest.mark.parametrize("plugin", [TokenSwap(), TokenBlend(), Blend(prompts={CAT: 1})])
def test_each_plugin_refuses_unknown_syntax(latents_of, plugin):
    with pytest.raises(InputError, match=r"cannot read \[\[cat\]\] in the prompt. Expected"):
        latents_of("a [[cat]]", plugin)


def test_signs_of_the_syntax_inside_a_word_are_refused(latents_of):
    with pytest.raises(InputError, match=r"\[\[a=b \+ cat\]\] must hold words; 'a=b' is none: no"):
        latents_of("[[a=b + cat]]", TokenBlend())


@pytest.mark.parametrize(
    ("mark", "plugin", "missing"),
    [
        ("[[cat -> puppy]]", TokenBlend(word="red", mix={"blue": 1}), "token-swap"),
        ("[[cat + puppy]]", Blend(prompts={CAT: 1}), "token-blend"),
        ("[[cat | puppy]]", TokenSwap(word="red", by="blue"), "blend"),
    ],
)
def test_a_mark_whose_plugin_is_not_in_the_run_is_refused(latents_of, mark, plugin, missing):
    with pytest.raises(InputError, match=f"is for the plugin '{missing}', which this run does not"):
        latents_of(f"a red {mark}", plugin)


@pytest.mark.parametrize("module", ["pilotfish_blend", "pilotfish_blend.words"])
def test_a_plugin_named_by_its_module_reads_its_marks(latents_of, module):
    assert torch.equal(latents_of("a [[red -> blue]] cat", f"{module}:TokenSwap"),
                       latents_of("a blue cat"))  # fmt: skip


@pytest.mark.filterwarnings("ignore:brackets in a prompt")  # which are told to weigh nothing
@pytest.mark.parametrize(
    "text",
    [
        "a cat, (red:1.2), [blue], {green}; 'black' \"white\"",
        "a cat... 50% off! really? a/b & c*d = e -> f + g | h: 0.5",
        "a cat -- [ [not doubled] ] #1 @home ~ ^ _x_ <b> $5",
        "it's a cat's [a [b] ] :0.5",
    ],
)
def test_ordinary_punctuation_is_text(latents_of, text):
    swapped = latents_of(text, TokenSwap(word="cat", by="puppy"))
    assert torch.equal(swapped, latents_of(text.replace("cat", "puppy")))
    assert torch.equal(latents_of(CAT, Blend(prompts={text: 1})), latents_of(text))


@pytest.mark.parametrize("plugin", [TokenSwap(), TokenBlend()])
def test_a_plugin_with_nothing_to_do_is_refused(latents_of, plugin):
    with pytest.raises(InputError, match=r"nothing to do: .* no mark in 'a red cat'. Marks: \[\["):
        latents_of(CAT, plugin)


@pytest.mark.parametrize(
    ("prompt", "prompts", "came"),
    [
        (CAT, {}, "got 0 prompts, and 0 such marks in 'a red cat'"),
        ("a [[cat | puppy]]", {CAT: 1}, "got 1 prompts, and 1 such marks"),
        ("a [[cat | puppy]] on [[red | blue]]", {}, "got 0 prompts, and 2 such marks"),
    ],
)
def test_blend_takes_prompts_from_one_place(latents_of, prompt, prompts, came):
    with pytest.raises(InputError, match=r"blend takes its setting prompts, or one \[\[.*" + came):
        latents_of(prompt, Blend(prompts=prompts))


def test_blend_with_a_mark_refuses_to_stand_before_a_plugin_that_changes_the_prompt(latents_of):
    with pytest.raises(InputError, match=r"the plugin of \[\[cat -> otter\]\] must come first"):
        latents_of("a [[cat -> otter]] [[red | blue]]", Blend(), TokenSwap())
    with pytest.raises(InputError, match=r"listed after it changed the prompt.*List blend last"):
        latents_of("a cat [[red | blue]]", Blend(), TokenSwap(word="cat", by="puppy"))
    with pytest.raises(InputError, match=r"schedule must be lists .* each prompt \(2\); got"):
        latents_of("a [[red | blue]]", Blend(schedule={0: [1]}))


# ---- settings ----


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        (
            Blend,
            {"prompts": {CAT: -1}},
            r"prompts.a red cat must be greater than or equal to 0; got",
        ),
        (Blend, {"prompts": {CAT: float("nan")}}, "prompts.a red cat must be"),
        (Blend, {"prompts": [CAT]}, "prompts must be a valid dictionary; got"),
        (Blend, {"prompts": {"a [[b | c]]": 1}}, r"the prompts without \[\[ and \]\]; got"),
        (Blend, {"mode": "cubic"}, "mode must be 'lerp' or 'slerp'; got 'cubic'"),
        (Blend, {"schedule": "fast"}, "schedule must be 'constant', 'travel', or .* got 'fast'"),
        (Blend, {"schedule": {}}, "schedule must be 'constant', 'travel', or"),
        (Blend, {"schedule": {2: [1, 0]}}, r"moments, 0 to 1, .*; got \{2: \[1, 0\]\}"),
        (Blend, {"schedule": {0: "10"}}, "lists of one factor for each"),
        (Blend, {"schedule": {0: [0, 0]}}, "not all 0; got"),
        (Blend, {"schedule": {0: [1, -1]}}, "numbers >= 0"),
        (Blend, {"prompts": {CAT: 1}, "schedule": "travel"}, "'constant' with one prompt; to trav"),
        (Blend, {"prompts": {CAT: 1}, "schedule": {0: [1, 2]}}, r"for each prompt \(1\); got"),
        (TokenBlend, {"word": "cat"}, r"mix must be a mapping .* if word is given, and only then"),
        (TokenBlend, {"mix": {"cat": 1}}, "mix must be a mapping .* and only then; got"),
        (TokenBlend, {"word": "cat", "mix": {"a|b": 1}}, r"'a\|b' is none: no \[ \] < >"),
        (TokenBlend, {"word": "cat", "mix": {" ": 1}}, "' ' is none"),
        (TokenBlend, {"word": "cat", "mix": {"puppy": -1}}, "mix.puppy must be greater than or"),
        (TokenSwap, {"word": "cat"}, "by must be a word if word is given, and only then; got ''"),
        (TokenSwap, {"by": "cat"}, "by must be a word if word is given"),
        (TokenSwap, {"word": "a:b", "by": "cat"}, "by must be a word for a word; 'a:b' is none"),
    ],
)
def test_wrong_settings_are_named(plugin, settings, message):
    with pytest.raises(SettingsError, match=message):
        plugin(**settings)


PLUGINS = {
    "blend": Blend(prompts={"a red puppy": 0.3, "a, b": 0.3}, mode="slerp"),
    "travel": Blend(prompts={"a red puppy": 1, CAT: 1}, schedule="travel"),
    "moments": Blend(prompts={"a red puppy": 1, CAT: 1}, schedule={0: [1, 0], 0.5: [1, 2]}),
    "token-blend": TokenBlend(word="cat", mix={"puppy": 0.3, "skunk": 0.3}),
    "token-swap": TokenSwap(word="cat", by="puppy"),
}


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
def test_a_run_is_repeated_from_its_file(sampler, plugin):
    result = sampler(CAT, plugins=[plugin], steps=3, seed=0)
    (table,) = Run.parse(result.run.to_toml())["plugins"]
    assert table["use"] == ("blend" if isinstance(plugin, Blend) else plugin.kind)
    again = sampler(CAT, plugins=[table], steps=3, seed=0)
    assert torch.equal(again.latents, result.latents)


@pytest.mark.parametrize(
    ("use", "plugin"),
    [
        ("blend:prompts={a red puppy=0.3,'a, b'=0.3},mode=slerp", "blend"),
        ("blend:prompts={a red puppy=1,a red cat=1},schedule={0=[1,0],0.5=[1,2]}", "moments"),
        ("token-blend:word=cat,mix={puppy=0.3,skunk=0.3}", "token-blend"),
        ("token-swap:word=cat,by=puppy", "token-swap"),
    ],
)
def test_settings_may_be_written_on_the_command_line(latents_of, use, plugin):
    assert torch.equal(latents_of(CAT, use), latents_of(CAT, PLUGINS[plugin]))


# ---- in a run ----


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
def test_plugins_keep_the_contract_of_plugins(sampler, plugin):
    check_plugin(plugin, sampler)


@pytest.mark.parametrize("name", ["travel", "token-blend"])
def test_half_precision_runs(name):
    sampler = random_sampler(dtype=torch.bfloat16)
    latents = sampler(CAT, plugins=[PLUGINS[name]], steps=2, seed=0).latents
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()


def test_one_instance_serves_two_runs_at_once(sampler, latents_of):
    blend = Blend(schedule="travel")
    swap = TokenSwap()
    prompts = ["a [[puppy -> cat]] and a [[red | blue]] otter", "a [[white | skunk]] [[a -> b]]"]
    streams = [sampler.stream(p, plugins=[swap, blend], steps=3, seed=5) for p in prompts]
    for _ in zip(*streams, strict=True):
        pass
    for prompt, stream in zip(prompts, streams, strict=True):
        alone = latents_of(prompt, TokenSwap(), Blend(schedule="travel"))
        assert torch.equal(stream.result().latents, alone)


def test_nothing_of_a_run_is_kept_after_it_also_when_it_fails(sampler):
    class Fail(Plugin):
        def before_step(self, step):
            raise RuntimeError("no")

    blend, swap = Blend(prompts={PUPPY: 0.5}), TokenSwap(word="cat", by="puppy")
    size = len(sampler.model.tokenizer)
    for last in ([], [Fail()]):
        try:
            sampler(CAT, plugins=[swap, blend, *last], steps=1, seed=0)
        except Exception as error:
            assert "raised RuntimeError" in str(error)
        assert all(vars(plugin).keys() == {"settings"} for plugin in (blend, swap))
    assert len(sampler.model.tokenizer) == size


@pytest.mark.slow
def test_a_puppy_skunk_is_more_of_a_skunk_the_more_weight_it_has():
    import pilotfish

    pytest.importorskip("pilotfish_emoji")
    from pilotfish_emoji import OBJECTS, judge

    emoji, sees = pilotfish.load(), judge.load()
    prompt = "a {} on a teal background".format

    def skunk(plugin):
        result = emoji(
            prompt("puppy"), plugins=[plugin], steps=10, guidance_scale=4, seed=0, num_images=4
        )
        image = emoji.model.decode(result.latents).clamp(0, 1)
        return sees.judge(image).object[:, OBJECTS.index("skunk")].mean().item()

    for plugin in (
        lambda weight: Blend(prompts={prompt("skunk"): weight}),
        lambda weight: TokenBlend(word="puppy", mix={"skunk": weight}),
    ):
        shares = [skunk(plugin(weight)) for weight in (0, 0.5, 1)]
        assert shares[0] < 0.1 and shares[2] > 0.8
        assert shares == sorted(shares)
