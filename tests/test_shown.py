"""How results, traces, steps and samplers look: a line where printed, HTML in a notebook."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image

import pilotfish
from pilotfish.sampling.trace import Record, Trace


class Balanced(HTMLParser):
    """Collects what stands open, and all texts."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def pictures(html):
    data = re.findall(r"data:image/png;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(d))) for d in data]


@pytest.fixture
def result(sampler):
    guides = [pilotfish.guide(lambda step: step.image.mean((1, 2, 3)), name="<b>dark")]
    return sampler("a <i>cat</i>", plugins=guides, steps=3, seed=1, num_images=10)


def test_a_line_tells_pictures_prompt_seed_and_losses(result, sampler):
    assert len(repr(result)) < 200 and "\n" not in repr(result)
    first, last = (result.trace.losses("<b>dark")[i] for i in (0, -1))
    told = f"<b>dark {first:.3g} -> {last:.3g}"
    assert repr(result) == (f"Result(10 pictures of 32x32, prompt='a <i>cat</i>', seed=1, {told})")
    assert repr(result.trace) == f"Trace(3 records: {told})"
    assert repr(Trace()) == "Trace(0 records)"
    assert repr(sampler) == "Sampler(StableDiffusion, float32 on cpu, 32x32)"


def test_a_notebook_shows_small_pictures_and_what_each_guide_did(result):
    html = result._repr_html_()
    page = Balanced(html)
    assert page.open == []
    assert "<b>dark" in page.texts  # as text, not as HTML
    assert "and 2 more" in page.texts and any("a <i>cat</i>" in text for text in page.texts)
    shown = pictures(html)
    assert [p.size for p in shown] == [(32, 32)] * 8
    assert shown[0].tobytes() == result.images[0].tobytes()
    assert "100%" in page.texts  # a single guide's share of the moves


def test_the_curve_falls_with_the_loss():
    values = (4.0, 3.0, 1.0)
    trace = Trace(Record(i, 1.0, "blue", loss=(v,)) for i, v in enumerate(values))
    (points,) = re.findall(r'points="([^"]+)"', trace._repr_html_())
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == [1.0, pytest.approx(1 + 22 / 3, abs=0.05), 23.0]


def test_a_guide_that_failed_says_so_and_one_that_never_acted_is_no_row():
    trace = Trace([Record(0, 1.0, "torn", error="it <tore>")])
    page = Balanced(trace._repr_html_())
    assert "failed at 1 step: it <tore>" in page.texts
    assert Balanced(Trace()._repr_html_()).texts == ["No guide acted."]


def test_a_step_shows_what_it_expects_behind_the_noise(sampler):
    seen = []

    class Look(pilotfish.Plugin):
        def before_step(self, step):
            seen.append(step._repr_html_())

        def after_step(self, step):
            seen.append(step._repr_html_())

    sampler("a cat", plugins=[Look()], steps=1, num_images=2)
    before, after = seen
    assert pictures(before) == [] and len(pictures(after)) == 2
    assert "Step(0 of 1, sigma" in after


def test_a_sampler_tells_what_a_run_takes(sampler):
    page = Balanced(sampler._repr_html_())
    assert page.open == [] and {"steps", "guidance_scale", "height"} <= set(page.texts)


def test_a_notebook_shows_the_latest_step_in_one_place_and_changes_nothing(sampler, monkeypatch):
    told, updates = [], []

    def display(data, raw, display_id):
        told.append(data)
        return SimpleNamespace(update=lambda data, raw: updates.append(data))

    shell = SimpleNamespace(kernel=1)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    dark = pilotfish.guide(lambda step: step.image.mean((1, 2, 3)), name="dark")
    run = {"plugins": [dark], "steps": 3, "seed": 1}
    watched = sampler("a cat", **run, show=True)
    assert len(told) == 1 and len(updates) == 2
    assert re.match(r"step 3 of 3: dark [\d.]+ -> [\d.]+$", updates[-1]["text/plain"])
    first, last = (pictures(data["text/html"])[0] for data in (told[0], updates[-1]))
    assert first.size == (128, 128) and first.tobytes() != last.tobytes()
    assert watched.images[0].tobytes() == sampler("a cat", **run).images[0].tobytes()
    assert len(told) == 1  # not without show=True
    del shell.kernel  # a terminal
    sampler("a cat", **run, show=True)
    assert len(told) == 1


def test_a_trace_tells_shares_and_which_guides_pulled_against_each_other():
    def record(name, loss, share, **cosine):
        return Record(0, 1.0, name, loss=(loss,), share=(share,), cosine=cosine)

    trace = Trace(
        [
            *(record("blue", 0.5, 0.25, clip=(-0.6,)), record("clip", 2, 0.75, blue=(-0.6,))),
            *(record("blue", 0.4, 0.35, clip=(-0.2,)), record("clip", 1, 0.65, blue=(-0.2,))),
            record("calm", 1.0, 0.0, blue=(0.3,)),
        ]
    )
    assert trace.told() == [
        "blue: loss 0.5 -> 0.4 (2 steps), 30% of the moves",
        "clip: loss 2 -> 1 (2 steps), 70% of the moves",
        "calm: loss 1 -> 1 (1 step), 0% of the moves",
        "blue and clip pulled against each other: cosine -0.40 on average",
    ]
    assert trace.told()[-1] in Balanced(trace._repr_html_()).texts
    assert Trace([record("blue", 0.5, 1.0)]).told() == ["blue: loss 0.5 -> 0.5 (1 step)"]
