"""Pictures of a run, checked by what they are made of."""

import builtins
import copy
import dataclasses
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pilotfish_view as view
import pytest
import torch
from PIL import Image, ImageChops
from pilotfish_view.layout import GAP, Label
from pilotfish_view.words import SHADES

from pilotfish import Guide, InputError, PilotfishError, to_pil
from pilotfish.testing import random_sampler

PROMPT = "a watercolor campfire"


class Cheap(Guide):
    """Reads no picture."""

    def loss_guidance(self, step):
        return step.rgb.var(dim=(1, 2, 3))


@pytest.fixture
def sampler(random_sampler):
    return random_sampler


@pytest.fixture
def counted(sampler, monkeypatch):
    """The sampler, and how often its VAE decodes and encodes."""
    counts = {"decode": 0, "encode": 0}
    for name in counts:
        own = getattr(sampler.model, name)

        def call(value, name=name, own=own):
            counts[name] += 1
            return own(value)

        monkeypatch.setattr(sampler.model, name, call)
    return sampler, counts


def shows(picture, text, size=14, paper="white"):
    """Whether a text stands in the picture, to the pixel."""
    label = Label(text, Label(text, 10**6, size).width, size)
    ink = Image.new("RGB", (label.room, label.height), paper)
    label.draw(ink, 0, 0)
    wanted, there = (np.asarray(p.convert("L")) for p in (ink, picture))
    rows, columns = np.nonzero(wanted < wanted.max())
    wanted = wanted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if any(w > t for w, t in zip(wanted.shape, there.shape, strict=True)):
        return False
    places = np.lib.stride_tricks.sliding_window_view(there, wanted.shape)
    darkest = np.unravel_index(np.argsort(wanted, axis=None)[:12], wanted.shape)
    likely = (places[..., *darkest] == wanted[darkest]).all(axis=-1)
    return any((places[tuple(at)] == wanted).all() for at in np.argwhere(likely))


def squares(*colors, side=128):
    return [Image.new("RGB", (side, side), color) for color in colors]


# ---- table ----


def test_a_table_keeps_each_picture_to_the_pixel_and_shows_every_label():
    noise = torch.rand(4, 3, 128, 130, generator=torch.Generator().manual_seed(0))
    a, b, c, d = to_pil(noise)
    sheet = view.table([[a, b], [c, d]], columns=["left", "right"], rows=["up", "down"], title="T")
    assert all(shows(sheet, text) for text in ("left", "right", "up", "down", "T"))
    assert not shows(sheet, "middle")
    right = sheet.width - GAP - 130
    for row, pair in enumerate([(a, b), (c, d)]):
        top = sheet.height - GAP - 128 - (1 - row) * (128 + GAP)
        for column, picture in enumerate(pair):
            left = right - (1 - column) * (130 + GAP)
            cut = sheet.crop((left, top, left + 130, top + 128))
            assert cut.tobytes() == picture.tobytes()


def test_small_pictures_are_enlarged_by_a_whole_factor():
    small = Image.fromarray(np.arange(50 * 40 * 3, dtype=np.uint8).reshape(40, 50, 3))
    sheet = view.table([[small]])
    assert sheet.size == (150 + 2 * GAP, 120 + 2 * GAP)
    cell = sheet.crop((GAP, GAP, GAP + 150, GAP + 120))
    assert np.array_equal(np.asarray(cell)[::3, ::3], np.asarray(small))


def test_an_empty_place_is_as_large_as_a_picture_and_stays_white():
    sheet = view.table([squares("red", "red"), [None]])
    assert sheet.size == view.table([squares("red", "red")] * 2).size
    assert sheet.getpixel((GAP + 5, sheet.height - GAP - 5)) == (255, 255, 255)


def test_long_labels_are_wrapped_into_the_width_of_their_column():
    label = Label("a very long prompt with anextraordinarilylongwordinit " * 3, 100, 14)
    assert label.width <= 100 and len(label.lines) > 5
    assert "".join(label.lines).replace(" ", "") == label.text.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pictures": []}, "needs a picture"),
        ({"pictures": [[None]]}, "needs a picture"),
        ({"pictures": [squares("red")], "columns": ["a", "b"]}, "columns must be 1 labels"),
        ({"pictures": [squares("red")], "rows": ["a", "b"]}, "rows must be 1 labels"),
    ],
)
def test_a_table_of_nothing_or_with_labels_to_spare_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        view.table(arguments.pop("pictures"), **arguments)


def test_a_strip_shows_pictures_of_one_height_side_by_side_each_above_its_label():
    wide, narrow = Image.new("L", (64, 32), 0), Image.new("RGB", (10, 20), "red")
    sheet = view.strip([wide, narrow], ["wide", "narrow"], height=160)
    assert sheet.size == (10 + 320 + 10 + 80 + 10, 10 + 160 + 10 + 20)
    assert sheet.crop((10, 10, 330, 170)).getcolors() == [(320 * 160, (0, 0, 0))]
    assert sheet.crop((340, 10, 420, 170)).getcolors() == [(80 * 160, (255, 0, 0))]
    below = np.asarray(sheet.crop((0, 170, *sheet.size)).convert("L"))
    middles = [np.nonzero(part.min(axis=0) < 128)[0] for part in (below[:, :335], below[:, 335:])]
    assert (middles[0].min() + middles[0].max()) / 2 == pytest.approx(170, abs=2)
    assert (middles[1].min() + middles[1].max()) / 2 == pytest.approx(380 - 335, abs=2)


@pytest.mark.parametrize(("pictures", "labels"), [([], []), (["red"], ["a", "b"])])
def test_a_strip_without_a_label_for_each_picture_is_refused(pictures, labels):
    with pytest.raises(InputError, match=f"got {len(pictures)} pictures and {len(labels)} labels"):
        view.strip(squares(*pictures), labels)


def test_letters_beyond_english_are_written():
    one, other = Label("é", 100, 14), Label("ж", 100, 14)
    masks = [bytes(label.font.getmask(label.text)) for label in (one, other)]
    assert masks[0] != masks[1]  # not both the box that stands for an unknown letter


# ---- latents ----


def test_channels_are_gray_from_the_least_value_of_all_to_the_most():
    latents = torch.randn(2, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    sheet = view.channels(latents)
    low, high = latents.min(), latents.max()
    expected = ((latents - low) / (high - low) * 255).round()
    left = sheet.width - GAP - 128
    top = sheet.height - GAP - 128
    last = np.asarray(sheet.crop((left, top, left + 128, top + 128)))[..., 0]
    assert np.array_equal(last, expected[1, 3].numpy())
    assert shows(sheet, "channel 3") and shows(sheet, "image 2")


@pytest.mark.parametrize("latents", [torch.zeros(4, 8, 8), torch.full((1, 4, 8, 8), torch.nan)])
def test_what_are_no_latents_has_no_channels(latents):
    with pytest.raises(InputError, match="latents must be finite and of shape"):
        view.channels(latents)


def test_latents_that_are_all_alike_have_channels_too():
    assert view.channels(torch.ones(1, 4, 8, 8)).getextrema()


def test_a_round_trip_tells_the_vaes_own_error_for_one_encode_and_one_decode(counted):
    sampler, counts = counted
    (picture,) = to_pil(torch.rand(1, 3, 33, 34, generator=torch.Generator().manual_seed(0)))
    trip = view.roundtrip(sampler, picture)
    assert counts == {"encode": 1, "decode": 1}
    assert trip.before.size == trip.after.size == (34, 32)  # the VAE's factor is 2
    image = torch.from_numpy(np.asarray(trip.before) / np.float32(255)).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = sampler.model.encode(image)
        again = sampler.model.decode(latents).clamp(0, 1)
    torch.testing.assert_close(trip.latents, latents)
    # Memory in another order may round to the next of 255 levels.
    difference = np.asarray(trip.after, int) - np.asarray(to_pil(again)[0], int)
    assert np.abs(difference).max() <= 1
    torch.testing.assert_close(trip.error, (again - image)[0].abs().mean(dim=0))
    assert trip.rms == pytest.approx(float((again - image).square().mean().sqrt()))
    assert trip.psnr == pytest.approx(10 * math.log10(1 / trip.rms**2))
    assert trip._repr_png_().startswith(b"\x89PNG")


def test_a_picture_too_small_for_the_vae_is_refused(sampler):
    with pytest.raises(InputError, match="at least 2 x 2 pixels, the VAE's factor; got 1 x 9"):
        view.roundtrip(sampler, Image.new("RGB", (1, 9)))


# ---- schedule ----


SCHEDULERS = (
    *("ddim", "ddpm", "pndm", "lms", "euler", "heun", "euler-ancestral", "kdpm2"),
    *("kdpm2-ancestral", "dpmsolver-multistep", "dpmsolver-singlestep", "deis-multistep"),
    *("unipc-multistep", "edm-euler"),
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_holds_what_the_loop_meets_with_every_scheduler(sampler, name):
    schedule = view.schedule(sampler.model.new_scheduler(name), 6)
    steps = sampler.stream("a cat", scheduler=name, steps=6, seed=0)
    met = [(float(s.timestep), s.alpha, s.sigma) for s in steps]
    assert met == [*zip(schedule.timesteps, schedule.alphas, schedule.sigmas, strict=True)]
    assert len(schedule) == len(met)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_schedule_of_a_flow_is_that_of_the_models_own_runs(family):
    """Where the model's size shifts it, too, which a scheduler alone refuses."""
    sampler = random_sampler(family=family)
    schedule = view.schedule(sampler.model.new_scheduler("flowmatch-euler"), 4, sampler.model)
    met = [(s.timestep, s.alpha, s.sigma) for s in sampler.stream("a cat", steps=4, seed=0)]
    assert met == [*zip(schedule.timesteps, schedule.alphas, schedule.sigmas, strict=True)]
    assert (schedule.alphas[0], schedule.sigmas[0]) == (0, 1)


@pytest.mark.parametrize("decoded", [False, True])
def test_a_film_of_a_flow_begins_with_noise_and_ends_with_the_picture(decoded):
    """Latents at sigma 1 hold nothing of x0; both are shown at one size at every level."""
    sampler = random_sampler(family="sd3")
    stream = sampler.stream("a cat", steps=3, seed=0)
    film = view.Film(decoded=decoded)
    for step in stream:
        film.add(step)
        shown = step.latents / math.hypot(step.alpha, step.sigma)
        noisy = sampler.model.decode(shown) if decoded else sampler.model.rgb(shown)
        assert (
            ImageChops.difference(film._pictures[-1][0], to_pil(noisy.detach())[0]).getbbox()
            is None
        )
    assert film.sheet().size[1] > 3 * 32


def test_a_schedule_equals_the_schedulers_own_arrays_and_leaves_it_alone():
    euler, ddim = diffusers.EulerDiscreteScheduler(), diffusers.DDIMScheduler()
    before = euler.timesteps.clone(), euler.sigmas.clone()
    shown, other = view.schedule(euler, 20), view.schedule(ddim, 20)
    assert torch.equal(euler.timesteps, before[0]) and torch.equal(euler.sigmas, before[1])
    euler.set_timesteps(20)
    ddim.set_timesteps(20)
    assert shown.timesteps == tuple(euler.timesteps.tolist())
    assert shown.sigmas == tuple(euler.sigmas[:-1].tolist())
    alphas = ddim.alphas_cumprod[ddim.timesteps].sqrt()
    torch.testing.assert_close(torch.tensor(other.alphas), alphas)


def test_a_schedule_is_a_table_and_a_plot(sampler):
    schedule = view.schedule(diffusers.EulerDiscreteScheduler(), 4)
    head, *rows = str(schedule).splitlines()
    assert head.split() == ["step", "timestep", "alpha", "sigma"]
    values = [[float(cell) for cell in row.split()] for row in rows]
    assert [row[0] for row in values] == [0, 1, 2, 3]
    assert [row[3] for row in values] == pytest.approx(list(schedule.sigmas), abs=1e-4)
    assert schedule.picture().size == (800, 600)


def without(monkeypatch, *packages):
    """As if the packages were not installed."""
    own = builtins.__import__

    def missing(name, *rest):
        if name.split(".")[0] in packages:
            raise ImportError(name)
        return own(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch):
    schedule = view.schedule(diffusers.DDIMScheduler(), 4)
    without(monkeypatch, "matplotlib")
    with pytest.raises(PilotfishError, match=r"pip install 'pilotfish-view\[plot\]'"):
        schedule.picture()


# ---- a first step of nothing but noise: alpha = 0 ----


@pytest.fixture(scope="module")
def zero_snr():
    """A model of v-prediction and a scheduler that begins without any signal."""
    config = {"name": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return random_sampler(prediction_type="v_prediction"), config


def test_a_schedule_begins_with_nothing_but_noise(zero_snr):
    sampler, config = zero_snr
    schedule = view.schedule(sampler.model.new_scheduler(config), 4)
    assert (schedule.alphas[0], schedule.sigmas[0]) == (0, 1)
    assert schedule.picture().size == (800, 600)


@pytest.mark.parametrize("decoded", [False, True])
def test_a_film_begins_with_nothing_but_noise(zero_snr, decoded):
    sampler, config = zero_snr
    (first, *rest) = sampler.stream(PROMPT, steps=3, seed=1, scheduler=config)
    assert first.alpha == 0
    film = view.film([first, *rest], decoded=decoded)
    show = sampler.model.decode if decoded else sampler.model.rgb
    side, way = (128, Image.Resampling.NEAREST) if decoded else (256, Image.Resampling.BICUBIC)
    expected = to_pil(show(first.latents))[0].resize((side, side), way)
    frame = film.frames[0]
    left, top = frame.width - 2 * (side + GAP), frame.height - (side + GAP)
    assert frame.crop((left, top, left + side, top + side)).tobytes() == expected.tobytes()


# ---- tokens ----


def test_tokens_are_the_tokenizers(sampler):
    tokenizer = sampler.model.text_encoders[0].tokenizer
    tokens = view.tokens(sampler, "a watercolor puppyzz")
    expected = tokenizer("a watercolor puppyzz").input_ids
    assert list(tokens.ids[: tokens.used]) == expected
    assert list(tokens.pieces[: tokens.used]) == tokenizer.convert_ids_to_tokens(expected)
    assert len(tokens) == tokenizer.model_max_length
    assert set(tokens.pieces[tokens.used :]) == {tokenizer.pad_token}


def test_a_token_table_has_a_line_for_each_position(sampler):
    tokens = view.tokens(sampler, PROMPT)
    head, *rows, padding = str(tokens).splitlines()
    assert head.split() == ["position", "id", "piece"]
    cells = zip(range(tokens.used), tokens.ids, tokens.pieces, strict=False)
    assert [row.split() for row in rows] == [[str(c) for c in cell] for cell in cells]
    assert padding == f"and {77 - tokens.used} more of <|endoftext|> as padding"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_padding_is_told_from_the_end_whatever_it_is_padded_with(sampler, pad):
    encoder = sampler.model.text_encoders[0]
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.pad_token = pad
    model = SimpleNamespace(text_encoders=(dataclasses.replace(encoder, tokenizer=tokenizer),))
    tokens = view.tokens(SimpleNamespace(model=model), PROMPT)
    assert tokens.pieces[tokens.used - 1] == tokenizer.eos_token
    assert tokens.pieces[-1] == pad and tokens.used == 5


def test_a_picture_of_tokens_shows_pieces_ids_and_positions(sampler):
    tokens = view.tokens(sampler, "a puppyzz")
    picture = tokens.picture()
    for position in range(tokens.used):
        piece, id = tokens.pieces[position], tokens.ids[position]
        for text in (piece, f"id {id}", f"position {position}"):
            assert any(shows(picture, text, 16, shade) for shade in SHADES), text


def test_a_full_prompt_has_no_padding(sampler):
    with pytest.warns(UserWarning, match="Dropped"):
        tokens = view.tokens(sampler, "a " * 100)
    assert tokens.used == len(tokens) == 77 and "padding" not in str(tokens)


# ---- film ----


def test_a_film_has_a_frame_for_each_step_and_decodes_nothing(counted):
    sampler, counts = counted
    sampler.model.rgb(torch.zeros(1, 4, 2, 2))  # fits its matrix, once for each model
    counts.update(encode=0)
    stream = sampler.stream(PROMPT, scheduler="heun", steps=3, seed=1, num_images=2)
    film = view.film(stream)
    assert len(film) == len(film.frames) == len(stream) == 5
    assert counts == {"decode": 0, "encode": 0}
    assert len({frame.size for frame in film.frames}) == 1
    assert len(stream.result().images) == 2


@pytest.mark.parametrize("decoder", ["vae", "linear"])
def test_a_decoded_film_costs_two_decodes_a_step_whatever_the_guides_see_by(counted, decoder):
    sampler, counts = counted
    view.film(sampler.stream(PROMPT, steps=3, seed=1, decoder=decoder), decoded=True)
    assert counts["decode"] == 6


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_frame_shows_noisy_latents_of_one_size_left_and_x0_right(sampler, scheduler):
    steps = list(sampler.stream(PROMPT, steps=3, seed=1, scheduler=scheduler))
    film = view.film(steps)
    for step, frame in zip(steps, film.frames, strict=True):
        noisy = step.latents / math.hypot(step.alpha, step.sigma)
        right = frame.width - GAP - 256
        top = frame.height - GAP - 256
        for left, latents in ((right - 256 - GAP, noisy), (right, step.x0)):
            (small,) = to_pil(sampler.model.rgb(latents))
            expected = small.resize((256, 256), Image.Resampling.BICUBIC)
            cell = frame.crop((left, top, left + 256, top + 256))
            assert cell.tobytes() == expected.tobytes()
        assert shows(frame, "noisy latents", 18) and shows(frame, "predicted x0", 18)
        caption = f"step {step.index + 1} of 3, sigma {step.sigma:.3g}"
        assert shows(frame, caption, 18)


def test_the_last_frame_of_a_decoded_film_is_the_picture_when_nothing_is_added_after_it(sampler):
    stream = sampler.stream(PROMPT, steps=3, seed=1, scheduler="euler")
    film = view.film(stream, decoded=True)
    (picture,) = stream.result().images  # Euler's last step goes to x0
    frame = film.frames[-1]
    cell = frame.crop((frame.width - GAP - 128, frame.height - GAP - 128, *frame.size))
    assert np.array_equal(np.asarray(cell)[:128:4, :128:4], np.asarray(picture))


@pytest.mark.parametrize(("rows", "shown"), [(3, [1, 3, 5]), (1, [1]), (9, [1, 2, 3, 4, 5])])
def test_a_sheet_shows_steps_from_first_to_last(sampler, rows, shown):
    film = view.film(sampler.stream(PROMPT, steps=5, seed=1))
    sheet = film.sheet(rows)
    assert [n for n in range(1, 6) if shows(sheet, f"step {n} of 5")] == shown


def test_a_gif_has_every_frame_and_stays_at_the_last(sampler, tmp_path):
    film = view.film(sampler.stream(PROMPT, steps=4, seed=1))
    with Image.open(film.save(tmp_path / "new" / "film.gif")) as gif:
        assert gif.n_frames == 4
        durations = [gif.info["duration"] for at in range(4) if not gif.seek(at)]
    assert durations == [100, 100, 100, 2000]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio's reader
def test_an_mp4_has_every_frame_with_even_sides(sampler, tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    film = view.film(sampler.stream(PROMPT, steps=4, seed=1, width=34))
    frames = imageio.imread(film.save(tmp_path / "film.mp4"), plugin="FFMPEG")
    height, width = (side + side % 2 for side in film.frames[0].size[::-1])
    assert frames.shape == (4, height, width, 3)
    ours = np.asarray(film.frames[2]).astype(float)
    assert np.abs(frames[2][: len(ours), : ours.shape[1]] - ours).mean() < 12  # it is compressed
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_a_film_that_cannot_be_written_is_refused(sampler, tmp_path, monkeypatch):
    film = view.Film()
    with pytest.raises(InputError, match=r"film\.avi: end a film's name in \.gif or \.mp4"):
        film.save("film.avi")
    with pytest.raises(InputError, match="no step was taken"):
        film.save(tmp_path / "film.gif")
    with pytest.raises(InputError, match="needs steps and rows; got 0 steps, 8 rows"):
        film.sheet()
    without(monkeypatch, "imageio", "imageio_ffmpeg")
    with pytest.raises(PilotfishError, match=r"pip install 'pilotfish-view\[film\]'"):
        film.save("film.mp4")


# ---- grid ----

GRID = {"steps": 2, "seed": 4}


def test_each_cell_of_a_grid_is_the_single_runs_picture_to_the_bit(sampler):
    grid = view.grid(
        sampler,
        PROMPT,
        plugins=[Cheap(every=2)],
        x="plugins.Cheap.scale=0,3",
        y="seed=1,2",
        steps=2,
    )
    singles = [
        [
            sampler(PROMPT, plugins=[Cheap(every=2, scale=scale)], seed=seed, steps=2).images[0]
            for scale in (0, 3)
        ]
        for seed in (1, 2)
    ]
    cells = [[result.images[0] for result in row] for row in grid.results]
    assert [[c.tobytes() for c in row] for row in cells] == [
        [s.tobytes() for s in row] for row in singles
    ]
    sheet, (down, right) = grid.picture(), (128 + GAP, 128 + GAP)
    left, top = sheet.width - 2 * right, sheet.height - 2 * down
    for row, column in itertools.product(range(2), range(2)):
        corner = left + column * right, top + row * down
        cell = sheet.crop((*corner, corner[0] + 128, corner[1] + 128))
        assert np.array_equal(np.asarray(cell)[::4, ::4], np.asarray(singles[row][column]))
    assert all(shows(sheet, text) for text in ("seed = 1", "seed = 2"))
    assert shows(sheet, "Cheap.scale = 0") and shows(sheet, "Cheap.scale = 3")


@pytest.mark.parametrize(
    ("axis", "different"),
    [
        (
            'prompt="a cat, red",a black puppy',
            [{"prompt": "a cat, red"}, {"prompt": "a black puppy"}],
        ),
        ("scheduler=ddim,euler", [{"scheduler": "ddim"}, {"scheduler": "euler"}]),
        ("guidance_scale=1,7.5", [{"guidance_scale": 1}, {"guidance_scale": 7.5}]),
        ("steps=1,2", [{"steps": 1}, {"steps": 2}]),
        ("height=32,48", [{"height": 32}, {"height": 48}]),
        ("mu=1,3", [{"preset": {"base": "balanced", "mu": mu}} for mu in (1.0, 3.0)]),
    ],
)
def test_an_axis_takes_any_setting_of_a_run(sampler, axis, different):
    plugins = [Cheap()] if axis.startswith("mu") else []
    grid = view.grid(sampler, PROMPT, x=axis, plugins=plugins, **GRID)
    for result, options in zip(grid.results[0], different, strict=True):
        single = sampler(**{"prompt": PROMPT, "plugins": plugins, **GRID, **options})
        assert torch.equal(result.latents, single.latents)
    assert grid.picture()


def test_a_seed_that_is_not_given_is_one_for_all_cells(sampler):
    grid = view.grid(sampler, PROMPT, x="steps=1,2", y="guidance_scale=1,3", seed=None)
    assert len({result.run.seed for row in grid.results for result in row}) == 1


def test_several_images_of_a_run_stand_side_by_side(sampler):
    grid = view.grid(sampler, PROMPT, x="guidance_scale=1,3", num_images=3, **GRID)
    assert grid.picture().width == 2 * 192 + 3 * GAP  # 3 pictures of 32, enlarged twice


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"x": "seed=1,2", "y": "steps=2,0"}, "seed=1, steps=0: steps must be a whole number"),
        ({"x": "sed=1,2"}, "sed=1: no key called 'sed'. Did you mean 'seed'"),
        ({"x": "plugins.Cheap.scal=1"}, "scal=1: Cheap: no setting 'scal'. Did you mean 'scale'"),
        ({"x": "plugins.blue.scale=1"}, "no plugin in this run called 'blue'"),
        ({"x": "scheduler=ddim,eular"}, "scheduler=eular: no scheduler called 'eular'"),
        ({"x": "height=32,33"}, "height=33: height must be a multiple of 2"),
        ({"x": "seed=1", "y": "seed=2"}, "the two axes must be two settings; got seed twice"),
        ({"x": "seed="}, "an axis is KEY=VALUE,VALUE"),
        ({"x": "seed"}, "an axis is KEY=VALUE,VALUE"),
        ({"x": "seed=1,,2"}, "an axis is KEY=VALUE,VALUE"),
    ],
)
def test_everything_in_a_grid_is_checked_before_the_first_picture(
    sampler, monkeypatch, axes, words
):
    monkeypatch.setattr(sampler.model, "predict", None)
    with pytest.raises(InputError, match=words):
        view.grid(sampler, PROMPT, plugins=[Cheap()], **axes)


def test_a_grid_that_breaks_off_still_shows_what_it_has(sampler):
    made = view.Grid(
        lambda own: sampler.stream(**own), {"prompt": PROMPT, "steps": 1}, "seed=1,2,3"
    )

    def take(stream):
        if stream.run.seed == 2:
            raise KeyboardInterrupt
        return stream.result()

    with pytest.raises(KeyboardInterrupt):
        made.run(take)
    assert [result is not None for result in made.results[0]] == [True, False, False]
    assert made.picture().width == 3 * 128 + 4 * GAP


# ---- the module ----


def test_neither_a_name_nor_a_commands_help_loads_more_than_it_needs():
    code = (
        "import sys, pilotfish, pilotfish_view\n"
        "from pilotfish_view.command import grid, view\n"
        "for command in (grid, view): command(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)\n"
        "for name in pilotfish_view.__all__: assert getattr(pilotfish_view, name).__doc__, name\n"
        "heavy = {'matplotlib', 'imageio', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_losses_are_drawn_for_every_guide_and_refused_for_none(sampler):
    def red(step):
        return step.rgb[:, 0].mean(dim=(1, 2))

    def dark(step):
        return step.rgb.mean(dim=(1, 2, 3))

    one, two = (
        view.losses(sampler("a cat", plugins=plugins, steps=3, seed=0).trace)
        for plugins in ([red], [red, dark])
    )
    assert one.size == two.size == (800, 500) and one.tobytes() != two.tobytes()
    with pytest.raises(InputError, match="the trace is empty"):
        view.losses(sampler("a cat", steps=1).trace)
