"""The playground in a real browser, on tiny random models: every control, mouse, uploads, two clients, a kill."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playing import Playing, write_model
from playwright.sync_api import Browser, Page, sync_playwright

from ldmlab.inference.grids import read_settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = 120_000  # ms
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("LDMLAB_NEEDS_BROWSER"),
        reason="no chromium is installed; apt-get install chromium",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def play(tmp_path: Path) -> Iterator["Player"]:
    player = Player(tmp_path)
    yield player
    for one in player.running:
        if one.process.poll() is None:
            one.end()
    assert not player.faults


class Player:
    """Servers of one test and pages on them; a fault of a script or a request to elsewhere fails the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running, self.faults = folder, list[Playing](), list[str]()

    def serve(self, *kinds: str | None, more: tuple[str, ...] = (), **options: int) -> Playing:
        models = [str(write_model(self.folder / f"model-{n}", kind, n, **options)) for n, kind in enumerate(kinds)]
        self.running.append(Playing(self.folder / "out", *models, *more))
        return self.running[-1]

    def open(self, browser: Browser, served: Playing) -> Page:
        page = browser.new_context(viewport={"width": 1280, "height": 800}, bypass_csp=True).new_page()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        own = (served.url, "data:", "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else self.faults.append(asked.url))
        page.set_default_timeout(LONG)
        page.goto(served.url)
        page.wait_for_function("document.getElementById('sampler').options.length > 0")
        return page


def made(page: Page) -> None:
    """Press the button and wait for the images of the newest result."""
    before = page.locator("article").count()
    page.locator("#make").click()
    ended = "n => document.querySelectorAll('article').length > n || document.getElementById('problem').textContent"
    page.wait_for_function(ended, arg=before)
    assert page.inner_text("#problem") == ""
    page.wait_for_function("[...document.querySelectorAll('article img')].every((i) => i.complete && i.naturalWidth)")


def shot(page: Page, name: str) -> None:
    """A screenshot to be looked at, where LDMLAB_SCREENSHOTS names a folder."""
    if folder := os.environ.get("LDMLAB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def files(served: Playing, number: int = 1) -> list[str]:
    folder = served.out / f"{number:04d}"
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))


def test_captions_and_every_setting(browser: Browser, play: Player) -> None:
    served = play.serve("caption")
    page = play.open(browser, served)
    for hidden in ("#class_id", "#boxes", "#labels", "#low_resolution", "#reference"):
        assert page.locator(hidden).is_hidden()
    page.fill("#caption", "a red apple")
    page.fill("#negative", "a face")
    page.fill("#steps", "6")
    page.fill("#guidance_scale", "4")
    page.select_option("#sampler", "heun")
    page.fill("#size", "64x96")
    page.select_option("#count", "2")
    page.click("#new-seed")
    seed = page.input_value("#seed")
    made(page)
    shot(page, "caption")
    assert files(served) == ["000000.png", "000001.png", "grid.png"]
    settings = read_settings(served.out / "0001" / "000001.png")
    wanted = {"prompt": "a red apple", "negative_prompt": "a face", "steps": "6", "guidance_scale": "4.0"}
    wanted |= {"sampler": "heun", "size": "64x96", "seed": seed, "index": "1"}
    assert {name: settings[name] for name in wanted} == wanted
    with Image.open(served.out / "0001" / "000000.png") as image:
        assert image.size == (96, 64)
