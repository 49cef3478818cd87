"""Answers are stored once and survive a killed server; requests that do not fit are refused and change nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, made_study

from ldmlab.study.answers import Answers
from ldmlab.study.design import read_study


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(made_study(tmp_path, "--checks", "1"))
    yield server
    server.kill()


def answer(served: Served, session: str, side: str = "left") -> tuple[int, dict[str, object]]:
    item = served.next(session)["item"]
    return served.post("/answer", {"session": session, "item": item["id"], "side": side, "seconds": 1.25})


def test_a_session_from_consent_to_the_end(served: Served) -> None:
    assert served.post("/start", {})[0] == 400
    session = served.post("/start", {"agree": True})[1]["session"]
    state = served.next(session)
    assert (state["done"], state["of"]) == (0, 2 + 8 + 1)  # practice, items, a check
    assert not {"methods", "kind", "swapped"} & state["item"].keys()
    while state["item"] is not None:
        status, state = answer(served, session)
        assert status == 200
    events = [json.loads(line) for line in served.lines()]
    assert [event["kind"] for event in events] == ["start"] + ["answer"] * 11
    assert {key for event in events for key in event} == {
        *("kind", "session", "number"),
        *("item", "side", "chosen", "seconds"),
    }  # nothing about the person


def test_a_killed_server_and_a_torn_line_lose_no_answer(served: Served) -> None:
    session = served.post("/start", {"agree": True})[1]["session"]
    for _ in range(3):
        answer(served, session)
    before = served.next(session)
    served.kill()
    with open(served.study / "answers.jsonl", "a") as file:
        file.write('{"kind": "answer", "session": "')  # as a power cut leaves it
    served.start()
    assert served.next(session) == before
    assert answer(served, session)[0] == 200
    answers = Answers(served.study, read_study(served.study))
    assert len(answers.sessions[session].answers) == 4


def test_a_second_answer_and_wrong_requests_change_nothing(served: Served) -> None:
    session = served.post("/start", {"agree": True})[1]["session"]
    item = served.next(session)["item"]["id"]
    answer(served, session)
    lines = served.lines()
    good = {"session": session, "item": item, "side": "left", "seconds": 1.0}
    for wrong, status in (
        ({}, 409),  # a second answer
        ({"item": "99999"}, 409),
        ({"session": "unknown"}, 404),
        ({"session": None}, 404),
        ({"side": "both"}, 400),
        ({"seconds": "soon"}, 400),
        ({"seconds": float("nan")}, 400),
        ({"side": "left" * 1000}, 413),
    ):
        found, value = served.post("/answer", good | wrong)
        assert (found, "error" in value) == (status, True), wrong
    assert served.post("/answer", b"[1, 2]")[0] == 400
    assert served.post("/answer", b"\xff")[0] == 400
    assert served.lines() == lines
    for path in ("/image/..%2fstudy.json", "/image/nothing.png", "/next?session=unknown"):
        with pytest.raises(OSError, match="404"):
            served.get(path)


def test_one_server_a_study(served: Served) -> None:
    command = [sys.executable, "-m", "ldmlab", "study", "serve", str(served.study)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2
    assert "is served by another process" in second.stderr


def test_a_port_in_use_is_one_sentence(served: Served, tmp_path: Path) -> None:
    other = made_study(tmp_path / "other")
    command = [sys.executable, "-m", "ldmlab", "study", "serve", str(other), "--port", str(served.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2
    assert f"--port {served.port} cannot be used" in second.stderr
    assert "Traceback" not in second.stderr
