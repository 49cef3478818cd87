"""A whole study in a real browser: mouse and keys, a closed tab, a killed server, the page of results."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from serving import Served, image_folder, made_study

from ldmlab.app.cli import dispatch


def choose(page: Page, side: str, *, by_key: bool) -> None:
    """Wait until the question is open, then answer."""
    button = page.locator(f"#choose-{side}")
    page.wait_for_function(f"!document.getElementById('choose-{side}').disabled")
    done = page.evaluate("document.getElementById('progress').value")
    if by_key:
        page.keyboard.press("ArrowLeft" if side == "left" else "ArrowRight")
    else:
        button.click()
    page.wait_for_function(f"document.getElementById('progress').value > {done}")


@pytest.mark.slow
def test_a_rater_takes_the_whole_study(browser: Browser, tmp_path: Path) -> None:
    given = image_folder(tmp_path / "inputs", range(8), 900)
    served = Served(made_study(tmp_path, "--checks", "1", "--seconds", "0.2", "--input", str(given)))
    context = browser.new_context()
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(served.url)
    page.get_by_text("I agree, start").click()
    for number in range(4):
        choose(page, "left", by_key=number % 2 == 0)
    page.wait_for_function("!document.getElementById('choose-left').disabled")
    assert page.locator("#left").get_attribute("class") == "hidden"  # shown for 0.2 s
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / "item.png")
    page.close()  # the tab
    page = context.new_page()
    page.goto(served.url)
    choose(page, "right", by_key=False)
    assert len(served.lines()) == 1 + 5
    page.wait_for_function("!document.getElementById('choose-left').disabled")
    served.kill()
    page.keyboard.press("ArrowRight")  # is kept, and sent when the server is back
    page.get_by_text("No connection to the study").wait_for()
    served.start()
    for _ in range(11 - 6):
        choose(page, "right", by_key=False)
    page.get_by_text("Thank you.").wait_for()
    page.close()
    served.kill()
    assert not faults
    answers = [json.loads(line) for line in served.lines()[1:]]
    assert [one["side"] for one in answers] == ["left"] * 4 + ["right"] * 7
    assert len({one["item"] for one in answers}) == 11
    study = json.loads((served.study / "study.json").read_text())
    rules = study["rules"] | {"least_answers": 1, "checks_wrong": 1, "median_seconds": 0.0, "one_side": 1.0}
    (served.study / "study.json").write_text(json.dumps(study | {"rules": rules}))
    dispatch(["study", "report", str(served.study)])
    page = context.new_page()
    page.goto((served.study / "report.html").as_uri())
    assert "b preferred to a" in page.inner_text("body")
    assert "sessions that count" in page.inner_text("body")


@pytest.mark.slow
def test_two_raters_at_once(browser: Browser, tmp_path: Path) -> None:
    served = Served(made_study(tmp_path, "--checks", "0", "--seconds", "0"))
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(served.url)
        page.get_by_text("I agree, start").click()
    for _ in range(10):
        for page, side in zip(pages, ("left", "right"), strict=True):
            choose(page, side, by_key=False)
    for page in pages:
        page.get_by_text("Thank you.").wait_for()
    served.kill()
    events = [json.loads(line) for line in served.lines()]
    by_session = {event["session"]: event["number"] for event in events if event["kind"] == "start"}
    assert sorted(by_session.values()) == [0, 1]
    for session in by_session:
        assert len({one["item"] for one in events if one["session"] == session and one["kind"] == "answer"}) == 10
