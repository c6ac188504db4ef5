"""Makes the pictures of the page, at three widths: `python docs/make_screenshots.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WIDTHS = {"narrow": (390, 844), "middle": (820, 1180), "wide": (1440, 960)}  # a phone, a tablet
COLORS = 256
SEED, STEPS = "4", "25"


def main() -> None:
    """All three, of one server."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pilotfish", "studio", "--no-browser", "--folder", "out"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        try:
            with sync_playwright() as play:
                path = shutil.which("chromium")
                browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
                for name, (width, height) in WIDTHS.items():
                    page = browser.new_page(viewport={"width": width, "height": height})
                    page.set_default_timeout(60_000)
                    show(page, address, HERE / f"{name}.png", compare=name == "wide")
        finally:
            server.terminate()


def show(page: Any, address: str, file: Path, compare: bool) -> None:
    """Two plugins and a finished run."""
    page.goto(address)
    page.locator("#head small").wait_for()
    for use in ("palette", "blue"):
        page.locator("#add input").fill(use)
        page.keyboard.press("Enter")
        page.locator("li.item.selected", has_text=use).wait_for()
        if use == "palette":
            page.locator("#set-colors textarea").fill("[#f5e9d0, #e8590c, #1b4965]")
            page.locator("li.item", has_text="#e8590c").wait_for()
    page.locator("#set-target").wait_for()  # the form of blue has taken palette's place
    page.locator("#set-scale textarea").fill("[[0, 0.6], [0.5, 0.3], [1, 0]]")
    page.locator("li.item", has_text="0.6").wait_for()
    page.locator("#prompt textarea").fill("a fox on a teal background")
    page.locator("#run-seed textarea").fill(SEED)
    page.locator("#run-steps textarea").fill(STEPS)
    if compare:
        page.get_by_label("Compare with a run without").click()
        page.get_by_role("option", name="without any plugin").click()
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#slider img" if compare else "#stage .pictures.done img").first.wait_for()
    page.wait_for_timeout(2000)
    page.mouse.move(0, 0)
    page.screenshot(path=file, full_page=True)
    Image.open(file).convert("RGB").quantize(COLORS).save(file, optimize=True)
    page.close()


if __name__ == "__main__":
    main()
