"""A hostile visitor and a clumsy user at the playground, without a browser; and what a filter blocks there."""

import asyncio
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import playground, write_model
from starlette.requests import Request
from starlette.testclient import TestClient
from test_form import arguments, data_url

from ldmlab.app import filters
from ldmlab.app.commands import play
from ldmlab.app.listening import address_of, listening_at
from ldmlab.app.sample_files import Marks
from ldmlab.errors import InputError
from ldmlab.inference.grids import enlargement, grid
from ldmlab.metrics.features import OpenClipFeatures
from ldmlab.nn.openclip import build_clip
from ldmlab.play import form
from ldmlab.play import playground as page
from ldmlab.play.playground import Playground, application
from sampling_models import CLIP

NEUTRAL = ["a cat", "a red apple", "a clock", "two chairs", "the sea", "a house", "green grass", "a blue car"]


class Visitor:
    """Requests to a playground in this process."""

    def __init__(self, shown: Playground) -> None:
        self.shown = shown
        self.client = TestClient(application(shown, None), base_url="http://127.0.0.1:8500")

    def make(self, inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """The answer, or the end of the request."""
        body = {"settings": {"steps": "2", "size": "64"}, "count": 2, **changes, "inputs": inputs}
        answer = self.client.post("/make", content=json.dumps(body), headers={"Content-Type": "application/json"})
        found: dict[str, Any] = answer.json()
        while found.get("state", "waiting") in ("waiting", "running") and "id" in found:
            time.sleep(0.02)
            found = self.client.get(f"/state/{found['id']}").json()
        return found

    def kept(self) -> list[str]:
        """Files in the output folder, but for images of results."""
        return sorted(str(one.relative_to(self.shown.folder)) for one in self.shown.folder.rglob("*") if one.is_file())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("play") / "model", "caption"))


@pytest.fixture
def visitor(model: str, tmp_path: Path) -> Iterator[Visitor]:
    shown, _ = playground(tmp_path / "out", model, "--mark", "none")
    yield Visitor(shown)
    shown.queue.close()


def test_refused_and_failed_requests_leave_no_file(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, words in (
        ({"init_image": data_url(64), "mask": data_url(64)}, "mask goes with image"),
        ({"image": data_url(64), "mask": data_url(64)}, "the mask has no hole"),
        ({"init_image": data_url(64), "image": "?"}, "did not arrive whole"),
    ):
        assert words in visitor.make({"caption": "a cat", **body})["error"]
    assert visitor.kept() == []

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "no space", str(paths[0]))

    start = {"caption": "a cat", "init_image": data_url(64)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "no space left" in visitor.make(start)["error"]
    with monkeypatch.context() as patch:
        patch.setattr(Marks, "save", full)
        assert "no space left" in visitor.make(start)["error"]
    assert visitor.kept() == []
    assert visitor.make(start)["state"] == "done"
    assert len([name for name in visitor.kept() if name.startswith("inputs/")]) == 1


def test_nothing_that_is_typed_ends_in_a_fault(visitor: Visitor, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, words in (
        ({"size": "9" * 5000}, "is not a size"),
        ({"guidance_scale": "1e308"}, "guidance_scale=1e308 is outside"),
        ({"\ud800": "1"}, "is no input or setting"),
    ):
        assert words in visitor.make({"caption": "a cat"}, settings=settings)["error"]
    assert "a sweep over 100000" in visitor.make({"caption": "a cat"}, sweep="1," * 99_999 + "1")["error"]
    found = visitor.make({"caption": "\0\x1b[31m\u202e" + "x" * 1900})
    assert found["state"] == "done"
    made = visitor.shown.folder / "0001" / "000000.png"
    image = f"/image/{found['id']}/000000.png"
    assert visitor.client.get(image).content == made.read_bytes()
    made.unlink()
    assert "has been removed" in visitor.client.get(image).json()["error"]
    assert "Traceback" not in capsys.readouterr().err


def test_boxes_hold_nothing_else(visitor: Visitor) -> None:
    able = {**visitor.shown.able, "reads": ["boxes"]}
    body = {"inputs": {"boxes": [{"class_id": 1, "box": [0, 0, 1, 1], "more": "x" * 100}]}, "settings": {}, "count": 1}
    with pytest.raises(InputError, match="each with class_id and box alone"):
        form.read_form(body, able, visitor.shown.limits)


def test_a_visitor_who_leaves() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(InputError, match="did not arrive whole"):
        asyncio.run(page._body(request, 100))


def test_only_own_leftovers_are_removed(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [out / ".mine.part", out / "runs" / ".0001.part", out / "0007" / "notes.txt", out / ".12.part"]
    own = [out / ".0003.part" / "000000.png", out / "inputs" / f".{'0a' * 8}.png.x1.part"]
    for path in (*others, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    shown, _ = playground(out, model, "--mark", "none")
    assert all(path.exists() for path in others)
    assert not any(path.exists() for path in own)
    (out / "0008").mkdir()  # made beside the running server
    assert Visitor(shown).make({"caption": "a cat"})["folder"] == str(out / "0009")
    shown.queue.close()


def test_a_model_that_is_missing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    for name in ("new", "kept"):
        with pytest.raises(InputError, match="model is neither a folder nor a checkpoint"):
            play.run(arguments("--out", name, "--port", "0"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_addresses_and_passwords(tmp_path: Path) -> None:
    for host in ("a" * 100 + ".example", "nowhere.invalid", "1.2.3.4", "\udcff"):
        with pytest.raises(InputError, match="cannot be used"):
            listening_at(host, 0)
    with pytest.raises(InputError, match="--host is empty"):
        listening_at("", 0)
    with listening_at("127.0.0.1", 0) as taken, pytest.raises(InputError, match="cannot be used"):
        listening_at("127.0.0.1", taken.getsockname()[1])
    if socket.has_dualstack_ipv6():
        with listening_at("::1", 0) as taken:
            assert address_of(taken, "::1") == f"http://[::1]:{taken.getsockname()[1]}/"
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path, tmp_path / "pipe"):  # neither waits for somebody who writes
        with pytest.raises(InputError, match="cannot be read"):
            play.chosen_password(arguments("--password-file", str(file)))
    with pytest.raises(InputError, match="bytes that are no UTF-8"):
        play.chosen_password(arguments("--password", "\udcff" * 9))


def test_long_strips_are_not_enlarged_beyond_bounds() -> None:
    assert enlargement(torch.zeros(2, 1024, 3).numpy()) == 1
    assert enlargement(torch.zeros(16, 64, 3).numpy()) == 8
    assert max(grid([torch.zeros(2, 64, 3, dtype=torch.uint8).numpy()]).size) < 1100


def test_a_filter(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = OpenClipFeatures(build_clip(config=CLIP), "tiny")
    monkeypatch.setattr(filters, "_clip", lambda path, node: features)
    file, neutral = tmp_path / "f.yaml", f"clip: {{run: r}}\nneutral: {json.dumps(NEUTRAL)}\n"
    for limits, what in (("{images: -1000}", "0 by their prompts, 2 of 2"), ("{prompts: -1000}", "2 by their prompts")):
        file.write_text(f"{neutral}concepts: {{gun: {limits}}}")
        shown, _ = playground(tmp_path / what[0], model, "--mark", "none", "--filter", str(file))
        visitor = Visitor(shown)
        assert visitor.client.get("/able").json()["filter"] == ["gun"]
        assert "the filter cannot check" in visitor.make({"caption": "a cat"}, trajectory=True)["error"]
        found = visitor.make({"caption": "a cat"})
        assert (found["state"], found["previews"]) == ("done", {})
        (part,) = found["parts"]
        assert (part["images"], part["strips"]) == ([], [])
        assert what in part["words"]
        assert visitor.kept() == ["0001/filter.json"]
        shown.queue.close()
    file.write_text(f"{neutral}concepts: {{gun: 1000}}")
    shown, _ = playground(tmp_path / "open", model, "--mark", "none", "--filter", str(file))
    (part,) = Visitor(shown).make({"caption": "a cat"})["parts"]
    assert part["images"] == ["000000.png", "000001.png"]
    assert "blocked: 0 by their prompts, 0 of 2 images" in part["words"]
    shown.queue.close()


def test_no_preview_of_what_a_filter_may_block(visitor: Visitor) -> None:
    request = page.Request(lambda one: {})
    for previews in (False, True):
        watch = page.Live(request, visitor.shown.models[0], 0, (64, 64), previews)
        watch(0, torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32))
        assert bool(request.previews) == previews
