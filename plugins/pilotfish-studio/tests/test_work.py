"""Runs as events, on the emoji model: waiting, stopping, failing, and runs of others."""

import socket
import threading
import warnings

import pytest
from pilotfish_studio import history
from pilotfish_studio.work import Done, Failed, Job, Loading, Stopped, Studio, Taken, Waiting

import pilotfish

RUN = {"prompt": "a fox", "steps": 3, "seed": 4, "plugins": [{"use": "blue"}]}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.sampler({})
    return made


def test_a_job_tells_its_steps_with_losses_and_then_its_pictures(studio):
    *steps, done = studio.events(Job({**RUN, "num_images": 2}, "page", film=True))
    assert [step.index for step in steps] == [0, 1, 2] and steps[0].num_steps == 3
    assert len(steps[1].losses["blue"]) == 2 and len(steps[0].pictures) == 2
    assert [file.name for file in done.files] == ["a-fox-4-1.png", "a-fox-4-2.png"]
    assert done.film.name == "a-fox-4-1.gif" and done.seed == 4
    assert done.losses["blue"][:2] == steps[1].losses["blue"]
    assert pilotfish.Run.parse(pilotfish.read_run(done.files[0]))["seed"] == 4


def test_the_picture_is_the_engines_and_nothing_is_written_over(studio):
    (*_, one), (*_, two) = (studio.events(Job(RUN, "page")) for _ in range(2))
    assert (one.files[0].name, two.files[0].name) == ("a-fox-4.png", "a-fox-4_2.png")
    engine = studio.sampler({})(**RUN).images[0]
    for done in (one, two):
        assert pilotfish.read_picture(done.files[0], "it").tobytes() == engine.tobytes()


def test_two_runs_are_compared_on_one_seed(studio):
    events = [*studio.events(Job({**RUN, "seed": None}, "page", without=("bare", [])))]
    one, two = (event for event in events if isinstance(event, Done))
    assert one.seed == two.seed and two.part == "bare" and "blue" not in two.losses
    assert one.files[0].read_bytes() != two.files[0].read_bytes()


def test_stop_ends_a_run_at_the_next_step_and_the_next_run_is_made(studio):
    events = studio.events(Job({**RUN, "steps": 50}, "page"))
    assert [next(events).index for _ in range(2)] == [0, 1]
    studio.stop("another page")
    assert next(events).index == 2
    studio.stop("page")
    assert [*events] == [Stopped(3)]
    assert isinstance([*studio.events(Job(RUN, "page"))][-1], Done)


def test_runs_wait_in_line_and_a_waiting_one_can_be_stopped(studio):
    first = studio.events(Job({**RUN, "prompt": "first"}, "one"))
    assert isinstance(next(first), Taken)
    second = studio.events(Job(RUN, "two"))
    assert next(second) == Waiting(["first"])
    third = studio.events(Job(RUN, "three"))
    assert next(third) == Waiting(["first", "a fox"])
    assert [job.page for job in studio.line] == ["one", "two", "three"]
    studio.stop("three")
    assert [*third] == [Stopped(0)]
    threading.Timer(0.1, lambda: [*first]).start()
    assert isinstance([*second][-1], Done) and studio.line == []


def test_a_page_that_leaves_gives_its_place_up(studio):
    first = studio.events(Job(RUN, "one"))
    next(first)
    first.close()
    assert studio.line == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1; got 0"),
        ({"plugins": [{"use": "blu"}]}, "Did you mean 'blue'?"),
        ({"plugins": [{"use": "palette"}]}, "give colors"),
        ({"scheduler": "eular"}, "Did you mean 'euler'?"),
        ({"model": "./nowhere"}, "./nowhere"),
    ],
)
def test_errors_are_the_engines_sentences(tmp_path, studio, change, sentence):
    own = Studio(tmp_path) if "model" in change else studio
    *_, last = own.events(Job({**RUN, **change}, "page"))
    assert isinstance(last, Failed) and sentence in last.sentence
    assert own.line == []


class Reaches(pilotfish.Guide):
    """Asks the network while it runs."""

    def loss_guidance(self, step):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


def test_a_run_that_is_not_trusted_reaches_no_network(studio):
    use = f"{__file__}:Reaches"
    job = Job({**RUN, "plugins": [{"use": use}]}, "page", origin="fox.png")
    *_, last = studio.events(job)
    assert "fox.png asks for the network (127.0.0.1)" in last.sentence
    assert "trust it" in last.sentence and "--yes" not in last.sentence
    trusted = Job({**RUN, "plugins": [{"use": use}]}, "page")
    *_, last = studio.events(trusted)
    assert "ConnectionRefusedError" in last.sentence


def test_loading_is_told_once(tmp_path, monkeypatch, studio):
    own = Studio(tmp_path)
    monkeypatch.setattr("pilotfish_studio.work.load", lambda **how: studio.sampler({}))
    kinds = [[type(e) for e in own.events(Job(RUN, "page"))].count(Loading) for _ in range(2)]
    assert kinds == [1, 0]


def test_the_folder_is_searched_and_starred(studio, tmp_path):
    sampler = studio.sampler({})
    for prompt, seed in (("a red fox", 1), ("a cat", 2)):
        pilotfish.save_new(sampler(prompt, steps=1, seed=seed), tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = [made.path.name for made in history.pictures(tmp_path, "FOX red")]
    assert names == ["a-red-fox-1.png"]
    assert len(history.pictures(tmp_path)) == 3 and len(history.pictures(tmp_path, "seed")) == 2
    assert history.star(tmp_path / "a-cat-2.png")
    assert [m.path.name for m in history.pictures(tmp_path, starred=True)] == ["a-cat-2.png"]
    assert not history.star(tmp_path / "a-cat-2.png") and not history.stars(tmp_path)


def test_no_warning_of_ours_is_lost_in_a_page(studio):
    with warnings.catch_warnings(record=True):
        *_, done = studio.events(Job({**RUN, "plugins": [{"use": "blue", "scale": -1}]}, "page"))
    assert isinstance(done, Done) and isinstance(done.remarks, list)
