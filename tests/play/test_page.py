"""The playground in a real browser, on tiny random models: every control, mouse, uploads, two clients, a kill."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playing import Playing, Served, write_model
from playwright.sync_api import Browser, Page

from ldmlab.inference.grids import read_settings

LONG = 240_000  # ms
pytestmark = pytest.mark.slow


class Player:
    """Servers of one test and pages on them; a fault of a script or a request to elsewhere fails the test."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser = folder, browser
        self.servers, self.faults = list[Served | Playing](), list[str]()

    def models(self, *kinds: str | None) -> list[str]:
        return [str(write_model(self.folder / f"model-{n}", kind, n)) for n, kind in enumerate(kinds)]

    def serve(self, *kinds: str | None, more: tuple[str, ...] = ()) -> Served:
        served = Served(self.folder / "out", *self.models(*kinds), *more)
        self.servers.append(served)
        return served

    def open(self, served: Served | Playing) -> Page:
        size = {"width": 1280, "height": 800}
        page = self.browser.new_context(viewport=size, bypass_csp=True).new_page()  # wait_for_function evaluates text
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        own = (served.url, "data:", "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else self.faults.append(asked.url))
        page.goto(served.url)
        page.wait_for_function("document.getElementById('sampler').options.length > 0")
        return page


@pytest.fixture
def play(tmp_path: Path, browser: Browser) -> Iterator[Player]:
    player = Player(tmp_path, browser)
    yield player
    for context in browser.contexts:
        context.close()
    for one in player.servers:
        one.end()
    assert not player.faults


def make(page: Page) -> str:
    """Press the button and wait for the newest result or for a sentence, which is returned."""
    before = page.locator("article").count()
    page.locator("#make").click()
    page.wait_for_function(
        "n => !document.getElementById('make').disabled && (document.querySelectorAll('article').length > n"
        " || document.getElementById('problem').textContent)",
        arg=before,
    )
    page.wait_for_function("[...document.querySelectorAll('article img')].every((i) => i.complete && i.naturalWidth)")
    return page.inner_text("#problem")


def drag(page: Page, canvas: str, *points: tuple[float, float]) -> None:
    """With the mouse, through points in shares of the canvas."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    (x, y), *rest = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(x, y)
    page.mouse.down()
    for x, y in rest:
        page.mouse.move(x, y, steps=8)
    page.mouse.up()


def shot(page: Page, name: str) -> None:
    """A screenshot to be looked at, where LDMLAB_SCREENSHOTS names a folder."""
    if folder := os.environ.get("LDMLAB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def files(served: Served | Playing, number: int = 1) -> list[str]:
    folder = served.out / f"{number:04d}"
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))


def picture(path: Path, side: int, base: int = 0) -> str:
    """Coarse squares of random colours, as a file."""
    pixels = np.random.default_rng(base).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(path)
    return str(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_captions_and_every_setting(play: Player) -> None:
    served = play.serve("caption")
    page = play.open(served)
    for hidden in ("#class_id", "#boxes", "#labels", "#low_resolution", "#reference", "#hole", "#sweep"):
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
    assert make(page) == ""
    shot(page, "caption")
    assert files(served) == ["000000.png", "000001.png", "grid.png"]
    settings = read_settings(served.out / "0001" / "000001.png")
    wanted = {"prompt": "a red apple", "negative_prompt": "a face", "steps": "6", "guidance_scale": "4.0"}
    wanted |= {"sampler": "heun", "size": "64x96", "seed": seed, "index": "1"}
    assert {name: settings[name] for name in wanted} == wanted
    assert pixels(served.out / "0001" / "000000.png").shape == (64, 96, 3)


def test_bad_values_end_in_a_sentence(play: Player) -> None:
    page = play.open(play.serve("caption", more=("--max-side", "256")))
    for field, value, words in (
        ("#steps", "many", "steps=many is not a whole number"),
        ("#steps", "5000", "steps=5000 are too many here"),
        ("#size", "63", "is not a multiple of 2"),
        ("#size", "512", "choose at most 256 px"),
        ("#guidance_scale", "", "guidance_scale= is not a finite number"),
        ("#seed", "-1", "seed=-1 is outside"),
        ("#negative", "a face", "negative_prompt"),
    ):
        before = page.input_value(field)
        if field == "#negative":
            page.fill("#guidance_scale", "1")
        page.fill(field, value)
        assert words in make(page)
        assert page.input_value(field) == value  # nothing typed is lost
        page.fill(field, before)


def test_classes_strips_and_a_start_image(play: Player) -> None:
    served = play.serve("class_id", more=("--mark", "none"))
    page = play.open(served)
    assert page.locator("#caption").is_hidden()
    page.select_option("#class_id", "7")
    page.select_option("#count", "2")
    page.fill("#steps", "4")
    page.check("input[value=trajectory]")
    assert make(page) == ""
    assert files(served) == ["000000.png", "000001.png", "grid.png", "trajectory.png"]
    assert read_settings(served.out / "0001" / "000000.png")["class_id"] == "7"
    page.check("input[value=sweep]")
    page.fill("#sweep", "1,4")
    assert make(page) == ""
    shot(page, "strips")
    assert files(served, 2) == [
        *(f"{n:06d}_steps-{steps}.png" for n in (0, 1) for steps in (1, 4)),
        "sweep_steps.png",
    ]
    page.check("input[name=strip][value='']")
    page.check("input[value=image]")
    assert "Choose an image" in make(page)
    page.set_input_files("#image", picture(play.folder / "start.png", 96))
    page.fill("#strength", "0.25")
    assert make(page) == ""
    settings = read_settings(served.out / "0003" / "000000.png")
    assert settings["strength"] == "0.25"
    assert pixels(Path(settings["init_image"])).shape == (64, 64, 3)
    page.check("input[value=hole]")
    assert "has no hole" in make(page)
    drag(page, "#hole", (0.1, 0.1), (0.3, 0.9), (0.2, 0.2))
    assert make(page) == ""
    shot(page, "hole")
    settings = read_settings(served.out / "0004" / "000000.png")
    given, hole, made = (pixels(path) for path in (settings["image"], settings["mask"], served.out / "0004/000000.png"))
    assert 0.05 < (hole[..., 0] == 255).mean() < 0.5
    assert np.array_equal(made[hole[..., 0] == 0], given[hole[..., 0] == 0])
    assert not np.array_equal(made, given)
    page.check("#erase")
    page.fill("#brush", "100")
    drag(page, "#hole", (0.1, 0.1), (0.3, 0.9), (0.2, 0.2), (0.1, 0.5))
    assert "has no hole" in make(page)
    page.uncheck("#erase")
    drag(page, "#hole", (0.5, 0.5), (0.6, 0.6))
    page.click("#hole-clear")
    assert "has no hole" in make(page)


def test_boxes_by_mouse(play: Player) -> None:
    served = play.serve("boxes")
    page = play.open(served)
    page.fill("#steps", "4")
    assert "draw at least one" in make(page)
    page.select_option("#boxes-class", label="cat")
    drag(page, "#boxes", (0.25, 0.25), (0.75, 0.5))
    page.select_option("#boxes-class", label="tree")
    drag(page, "#boxes", (0.9, 0.9), (0.5, 0.6))
    drag(page, "#boxes", (0.1, 0.1), (0.2, 0.2))
    page.click("#boxes-undo")
    assert make(page) == ""
    shot(page, "boxes")
    boxes = json.loads(read_settings(served.out / "0001" / "000000.png")["boxes"].replace("'", '"'))
    assert [box["class_id"] for box in boxes] == [1, 2]
    np.testing.assert_allclose(boxes[0]["box"], [0.25, 0.25, 0.75, 0.5], atol=0.02)  # a screen pixel or two
    np.testing.assert_allclose(boxes[1]["box"], [0.5, 0.6, 0.9, 0.9], atol=0.02)
    page.click("#boxes-clear")
    assert "draw at least one" in make(page)


def test_a_label_map_by_mouse(play: Player) -> None:
    served = play.serve("segmentation")
    page = play.open(served)
    page.fill("#steps", "4")
    page.select_option("#labels-class", "1")
    page.click("#labels-fill")
    page.select_option("#labels-class", "3")
    page.fill("#labels-brush", "30")
    drag(page, "#labels", (0.2, 0.5), (0.8, 0.5))
    assert make(page) == ""
    shot(page, "labels")
    labels = pixels(Path(read_settings(served.out / "0001" / "000000.png")["segmentation"]))
    assert labels.shape == (64, 64)
    assert set(np.unique(labels)) == {1, 3}
    assert (labels[28:36, 14:50] == 3).all()
    assert (labels[:10] == 1).all()


def test_uploads_and_their_limits(play: Player) -> None:
    served = play.serve("low_resolution", more=("--max-upload", "1"))
    page = play.open(served)
    assert page.locator("#start-part").is_hidden()
    assert page.locator("#size-part").is_hidden()
    assert "Choose a file first" in make(page)
    large = play.folder / "large.png"
    large.write_bytes(os.urandom((1 << 20) + 1))
    page.set_input_files("#low_resolution", str(large))
    assert "more than the 1 MB taken here" in page.inner_text("#problem")
    broken = play.folder / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    page.set_input_files("#low_resolution", str(broken))
    assert "low_resolution cannot be read as an image" in make(page)
    page.set_input_files("#low_resolution", picture(play.folder / "wide.png", 600))
    assert "more than 1024 px a side" in make(page)
    page.set_input_files("#low_resolution", picture(play.folder / "small.png", 40))
    page.fill("#steps", "4")
    page.select_option("#count", "1")
    assert make(page) == ""
    assert pixels(served.out / "0001" / "000000.png").shape == (80, 80, 3)
    for content in (b"x" * (5 << 20), b'{"inputs": {"low_resolution": "' + b"A" * (2 << 20) + b'"}, "settings": {}}'):
        asked = urllib.request.Request(f"{served.url}/make", content, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(asked, timeout=60)


@pytest.mark.parametrize("kind", ["reference", "mask", None])
def test_other_inputs(kind: str | None, play: Player) -> None:
    served = play.serve(kind, more=("--mark", "none"))
    page = play.open(served)
    page.fill("#steps", "4")
    assert page.locator("#guidance-part").is_visible() == (kind == "reference")
    if kind == "reference":
        page.set_input_files("#reference", picture(play.folder / "look.png", 50))
    if kind == "mask":
        assert page.locator("#starts").is_hidden()
        page.set_input_files("#image", picture(play.folder / "whole.png", 64))
        drag(page, "#hole", (0.6, 0.6), (0.8, 0.8))
    assert make(page) == ""
    assert files(served) == [*(f"{n:06d}.png" for n in range(4)), "grid.png"]


def test_two_models_start_from_the_same_noise(play: Player) -> None:
    first, _ = play.models("caption", "caption")
    served = Served(play.folder / "out", first, first, "--mark", "none")
    play.servers.append(served)
    page = play.open(served)
    assert "from the same noise" in page.inner_text("header")
    page.fill("#caption", "a clock")
    page.fill("#steps", "4")
    assert make(page) == ""
    shot(page, "two_models")
    assert files(served) == [f"{part}/{name}.png" for part in (1, 2) for name in ("000000", "000001", "grid")]
    here, there = (pixels(served.out / "0001" / part / "000001.png") for part in "12")
    assert np.array_equal(here, there)
    assert page.locator("article .images img").count() == 4


def test_two_clients_and_a_stop(play: Player) -> None:
    served = play.serve("class_id")
    slow, quick = play.open(served), play.open(served)
    slow.fill("#steps", "500")
    slow.select_option("#count", "8")
    slow.click("#make")
    slow.wait_for_function("document.querySelector('#previews img')")
    shot(slow, "running")
    quick.fill("#steps", "2")
    quick.click("#make")
    quick.get_by_text("1 before yours").wait_for()
    slow.click("#stop")
    slow.get_by_text("Stopped; nothing was kept.").wait_for()
    quick.wait_for_function("document.querySelectorAll('article').length === 1")
    assert slow.locator("article").count() == 0
    assert [file.name for file in served.out.iterdir() if file.name.startswith("00")] == ["0002"]
    assert not list(served.out.glob(".*.part"))


def test_a_killed_server_leaves_nothing_behind(play: Player) -> None:
    served = Playing(play.folder / "out", *play.models("class_id"))
    play.servers.append(served)
    page = play.open(served)
    page.fill("#steps", "500")
    page.click("#make")
    page.wait_for_function("document.querySelector('#previews img')")
    served.end(signal.SIGKILL)
    page.get_by_text("The server does not answer").wait_for()
    assert not list(served.out.rglob("*.png"))
    served.start()  # on the same port, with the same folder
    assert not list(served.out.glob(".*.part"))
    page.fill("#steps", "2")
    assert make(page) == ""
    assert files(served) == [*(f"{n:06d}.png" for n in range(4)), "grid.png"]
    assert "Traceback" not in served.end()
    served.start()
    assert "Traceback" not in served.end(signal.SIGINT)
    assert not (served.out / ".playing").exists()
    served.start()
