"""The page in a real browser: one server for all tests, tiny runs of the emoji model."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

import pilotfish

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)

FOREIGN = """
from pilotfish import Guide

class Falls(Guide):
    \"\"\"A guide of somebody else that falls over.\"\"\"

    def loss_guidance(self, step):
        raise RuntimeError("it fell over")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def address(tmp_path_factory, folder):
    """A running `pilotfish studio`, beside which somebody else's plugin is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "falls.py").write_text(FOREIGN)
    about = site / "falls-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: falls\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pilotfish.plugins]\nfalls = falls:Falls\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pilotfish", "studio", "--no-browser", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--folder", str(folder)],
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server, server.stdout:
        yield server.stdout.readline().split()[0]
        server.terminate()
        assert server.wait(60) == 143


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    page = opened(browser, address)
    yield page
    assert page.elsewhere == []
    page.close()


def opened(browser, address):
    """A page that is up; `elsewhere` has what it asked other machines for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    page.elsewhere = []

    def asked(request):
        if not request.url.startswith((address, "data:", "blob:")):
            page.elsewhere.append(request.url)

    page.on("request", asked)
    page.goto(address)
    page.locator("#head small").wait_for()  # the server has answered
    return page


def add(page, name):
    page.locator("#add input").fill(name)
    page.keyboard.press("Enter")
    page.locator("li.item.selected", has_text=name).wait_for()


def make(page, prompt="a fox", steps=3, seed=4):
    page.locator("#prompt textarea").fill(prompt)
    for key, value in (("steps", steps), ("seed", seed)):
        page.locator(f"#run-{key} textarea").fill(str(value))
    page.get_by_role("button", name="Generate", exact=True).click()


def used(page):
    return [row.split("\n")[0] for row in page.locator("li.item .name").all_inner_texts()]


def test_a_prompt_with_two_plugins_becomes_the_engines_picture(page, folder):
    add(page, "blue")
    page.locator("#set-target input[type=number]").fill("0.5")
    page.locator("li.item", has_text="target 0.5").wait_for()
    add(page, "sharpness")
    page.locator("li.item").nth(1).get_by_label("move sharpness up").click()
    page.wait_for_function("document.querySelector('li.item .name').innerText.includes('sharp')")
    make(page)
    page.locator("#stage .pictures.done img").wait_for()
    assert page.locator("#stage table.losses th").all_inner_texts() == ["sharpness", "blue"]
    made = pilotfish.read_picture(folder / "a-fox-4.png", "it")
    plugins = ["sharpness", "blue:target=0.5"]
    engine = pilotfish.load()("a fox", steps=3, seed=4, plugins=plugins).images[0]
    assert made.tobytes() == engine.tobytes()


def test_a_dropped_picture_brings_its_run_back(page, folder):
    pilotfish.save_new(pilotfish.load()("a [cat]", steps=3, seed=9, plugins=["blue"]), folder)
    page.locator("#drop input[type=file]").set_input_files(folder / "a-cat-9.png")
    page.locator("li.item").wait_for()
    assert page.locator("#prompt textarea").input_value() == "a [cat]"
    assert page.locator("#run-seed textarea").input_value() == "9"
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#stage .pictures.done img").wait_for()
    first, again = (folder / name for name in ("a-cat-9.png", "a-cat-9_2.png"))
    assert again.read_bytes() == first.read_bytes()


def test_a_run_that_asks_for_more_waits_for_a_word(page, folder, tmp_path):
    harm = tmp_path / "harm.py"
    mark = tmp_path / "was-imported"
    harm.write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom pilotfish import Guide\n"
        "class Harm(Guide):\n    def loss_guidance(self, step): return step.rgb.var((1, 2, 3))\n"
    )
    sampler, use = pilotfish.load(), f"{harm}:Harm"
    result = sampler("harm", steps=1, seed=1, plugins=[use])
    mark.unlink()
    (file,) = result.save(tmp_path / "harm.png")
    page.locator("#drop input[type=file]").set_input_files(file)
    page.locator(".note.ask", has_text="harm.py").wait_for()
    assert page.locator("li.item").count() == 0 and not mark.exists()
    page.get_by_role("button", name="Trust this run").click()
    page.locator("li.item", has_text="Harm").wait_for()
    assert mark.exists()


def test_stop_ends_a_run_and_the_page_goes_on(page):
    make(page, "long", steps=900)
    page.locator("#stage .pictures.live").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator(".note.stopped", has_text="No picture was written").wait_for()
    make(page, "short")
    page.locator("#stage .pictures.done img").wait_for()


def test_somebody_elses_plugin_is_there_and_its_fall_is_told(page):
    add(page, "falls")
    make(page)
    told = page.locator(".note.failed")
    told.wait_for()
    assert "plugin 'falls' (falls 1.0): loss_guidance() raised" in told.inner_text()
    assert "it fell over" in told.inner_text()
    page.get_by_label("falls on").click()
    page.locator("li.item.off").wait_for()
    make(page)
    page.locator("#stage .pictures.done img").wait_for()


def test_two_pages_have_their_own_stacks_and_take_turns(page, browser, address):
    other = opened(browser, address)
    add(page, "blue")
    add(other, "palette")
    make(page, "mine", steps=900)
    page.locator("#stage .pictures.live").wait_for()
    other.get_by_label("palette on").click()
    other.locator("li.item.off").wait_for()
    make(other, "theirs")
    other.locator(".note.waiting", has_text="mine").first.wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    other.locator("#stage .pictures.done img").wait_for()
    assert (used(page), used(other)) == (["blue"], ["palette"])
    other.close()
