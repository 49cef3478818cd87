"""What the playground refuses, without a browser: requests, passwords, foreign hosts; and its marks."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playing import playground, write_model
from starlette.testclient import TestClient

from ldmlab.app.cli import Parser
from ldmlab.app.commands import play
from ldmlab.errors import InputError
from ldmlab.play.form import Limits, as_files, read_form
from ldmlab.play.playground import application

ABLE = {"reads": ["caption"], "samplers": ["auto", "ddim"], "enlargement": 4}
LIMITS = Limits(upload_bytes=10_000, images=4, side=128)


def data_url(side: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def request(**changes: Any) -> dict[str, Any]:
    inputs = {"caption": "a clock", **changes.pop("inputs", {})}
    return {"inputs": inputs, "settings": changes.pop("settings", {}), "count": 2, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": {"boxes": []}}, "boxes is no input"),
        ({"inputs": {"caption": 3}}, "caption is not a text"),
        ({"inputs": {"caption": "x" * 3000}}, "caption is not a text"),
        ({"inputs": {"init_image": "AAAA"}}, "init_image cannot be read as an image"),
        ({"inputs": {"init_image": "?"}}, "init_image did not arrive whole"),
        ({"inputs": {"init_image": "/etc/passwd"}}, "init_image"),
        ({"inputs": {"init_image": data_url(200)}}, "gives an image of more than 128 px"),
        ({"inputs": {"init_image": "A" * 20_000}}, "more than the 0.0095"),
        ({"settings": {"weak_model": "/etc"}}, "weak_model is no input or setting"),
        ({"settings": {"sampler": "os.system"}}, "sampler=os.system is not one"),
        ({"settings": {"steps": "1e9"}}, "steps=1e9 is not a whole number"),
        ({"settings": {"steps": "5000"}}, "steps=5000 are too many"),
        ({"settings": {"size": "4096"}}, "size=4096x4096 is too large"),
        ({"count": 5}, "count=5 is not a number of 1 .. 4"),
        ({"sweep": ",".join(map(str, range(1, 20)))}, "a sweep over 19"),
        ({"sweep": "1,2", "trajectory": True}, "choose one of them"),
        ({"other": 1}, "load the page again"),
    ],
)
def test_requests_that_the_page_does_not_send(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_form(request(**changes), ABLE, LIMITS)


def test_a_label_map_keeps_its_numbers(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 300], [7, 65535, 2]], dtype="<u2")
    sent = {"height": 2, "width": 3, "data": base64.b64encode(labels.tobytes()).decode()}
    able = {**ABLE, "reads": ["segmentation"]}
    body = {"inputs": {"segmentation": sent}, "settings": {}, "count": 1}
    with (
        as_files(read_form(body, able, LIMITS).inputs, tmp_path) as inputs,
        Image.open(inputs["segmentation"]) as image,
    ):
        assert np.array_equal(np.array(image), labels)
    with pytest.raises(InputError, match="did not arrive whole"):
        read_form({**body, "inputs": {"segmentation": {**sent, "width": 4}}}, able, LIMITS)


def arguments(*words: str) -> Any:
    parser = Parser()
    play.add_arguments(parser)
    return parser.parse_args(["model", *words])


def test_another_host_needs_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("twelve words\n")
    assert play.chosen_password(arguments()) is None
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 opens the page to others, which needs a password"):
        play.chosen_password(arguments("--host", "0.0.0.0"))
    with pytest.raises(InputError, match="fewer than 8 letters"):
        play.chosen_password(arguments("--host", "0.0.0.0", "--password", "short"))
    with pytest.raises(InputError, match="cannot be read"):
        play.chosen_password(arguments("--password-file", str(tmp_path / "none")))
    assert play.chosen_password(arguments("--host", "0.0.0.0", "--password-file", str(secret))) == "twelve words"
    monkeypatch.setenv(play.PASSWORD, "another one")
    assert play.chosen_password(arguments("--host", "0.0.0.0")) == "another one"
    with pytest.raises(InputError, match="give one of them"):
        play.chosen_password(arguments("--password-file", str(secret)))


def test_who_gets_in_and_what_is_refused(tmp_path: Path) -> None:
    shown, _ = playground(tmp_path / "out", str(write_model(tmp_path / "model", "class_id")))
    local = TestClient(application(shown, None), base_url="http://127.0.0.1:8500")
    assert local.get("/able").json()["reads"] == ["class_id"]
    assert "default-src 'self'" in local.get("/").headers["content-security-policy"]
    assert local.get("/able", headers={"Host": "elsewhere.example"}).status_code == 421
    assert local.post("/make", content="{}", headers={"Content-Type": "text/plain"}).status_code == 400
    for body in ("{", "[]", "{}", json.dumps(request())):
        answer = local.post("/make", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"].endswith(".")
    for path in ("/state/none", "/image/none/000000.png"):
        assert local.get(path).json()["error"]
    guarded = TestClient(application(shown, "twelve words"), base_url="http://elsewhere.example")
    assert guarded.get("/able").status_code == 401
    assert guarded.get("/able", auth=("any", "wrong words")).status_code == 401
    assert guarded.get("/able", auth=("any", "twelve words")).status_code == 200
    shown.queue.close()


def test_two_models_with_other_inputs_are_refused(tmp_path: Path) -> None:
    models = [str(write_model(tmp_path / str(kind), kind)) for kind in ("class_id", None)]
    with pytest.raises(InputError, match="class_id takes class_id, None takes nothing"):
        playground(tmp_path / "out", *models)


def test_marks_are_on_by_default() -> None:
    large, small = (np.full((side, side, 3), 128, np.uint8) for side in (64, 32))
    marks, words = play.chosen_marks("auto")
    assert "watermark" in words
    assert marks.pixels is not None
    assert not np.array_equal(marks.pixels(large), large)
    assert np.array_equal(marks.pixels(small), small)
    assert play.chosen_marks("none")[0].pixels is None
    assert play.chosen_marks("watermark")[0].sign is None
