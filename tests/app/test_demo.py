"""The demo: its flow in a few steps of training, and what it may delete."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.commands import demo
from ldmlab.errors import InputError

_SHORT = {  # by words of a command: options that make it short
    "cpu_first_stage": ["trainer.max_steps=2", "trainer.micro_batch=4"],
    "cpu_clip": ["trainer.max_steps=2", "trainer.micro_batch=8"],
    "cpu_text_to_image": ["trainer.max_steps=2", "trainer.micro_batch=4", "stage.panel_steps=2"],
    "protocol=reconstruction": ["protocol.reference_limit=16"],
    "protocol=demo_emoji": ["protocol.samples=16", "protocol.steps=2"],
    "--trajectory": ["--steps", "4"],
}


def arguments(out: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "device": "cpu", "fresh": False, **changes})


@pytest.mark.slow
def test_the_whole_flow_in_a_folder_with_a_strange_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = demo.flow

    def short(out: Path, recipe: str) -> list[demo.Step]:
        steps = []
        for step in whole(out, recipe):
            more = [
                word for part, words in _SHORT.items() if any(w.endswith(part) for w in step.command) for word in words
            ]
            steps.append(step._replace(command=[*step.command, *more]))
        return steps

    monkeypatch.setattr(demo, "flow", short)
    out = tmp_path / "it's, a=b (1)"
    demo.run(arguments(out))
    printed = capfd.readouterr().out
    assert printed.count("      took ") == 8
    assert (out / "samples" / "grid.png").exists()
    page = (out / "evaluation" / "report.html").read_text()
    assert "From noise to image" in page
    assert "The model that comes along" in page
    demo.run(arguments(out))
    assert capfd.readouterr().out.count("done before; kept.") == 8


def test_only_what_a_demo_made_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_run_step", lambda *_: None)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.png").touch()
    with pytest.raises(InputError, match=r"--fresh: .* holds samples, and nothing shows that a demo made them"):
        demo.run(arguments(tmp_path, fresh=True))
    assert (tmp_path / "samples" / "mine.png").exists()
    out = tmp_path / "demo"
    demo.run(arguments(out))
    (out / "samples").mkdir()
    (out / "notes.txt").touch()
    demo.run(arguments(out, fresh=True))
    assert (out / "notes.txt").exists()
    assert not (out / "samples").exists()
    with pytest.raises(InputError, match="is a file; choose a folder"):
        demo.run(arguments(out / "notes.txt"))
