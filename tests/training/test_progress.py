"""What a run says of itself: a bar on a terminal, lines elsewhere."""

import io
from pathlib import Path

import torch
from rich.console import Console
from toy_stages import TwoGroups, settings

from ldmlab.training.engine import rates_line, summary
from ldmlab.training.step_metrics import StepProgress, duration


def run(console: Console, shown: bool = True) -> str:
    stage = TwoGroups(max_steps=3)
    with StepProgress(shown, console) as progress:
        progress.say("hello [not markup]")
        progress.on_train_start(None, stage)
        for step in (1, 2, 3):
            stage.step, stage.position = step, 4 * step
            stage.metrics.add({"error": torch.tensor(1 / (1 + step))})
            stage.metrics.add({"opponent": torch.tensor(9.0)})
            stage.metrics.close(step)
            progress.on_train_batch_end(None, stage)
    return console.file.getvalue()


def test_without_a_terminal_the_last_step_is_a_line() -> None:
    said = run(Console(file=io.StringIO(), force_terminal=False)).splitlines()
    assert said[0] == "hello [not markup]"
    assert said[1].startswith("toy step 3/3  error 0.2500  ")
    assert said[1].endswith(" images/s  0:00:00 left")
    assert len(said) == 2


def test_on_a_terminal_there_is_a_bar() -> None:
    said = run(Console(file=io.StringIO(), force_terminal=True, width=100))
    assert "3/3" in said
    assert "hello" in said


def test_other_processes_are_silent(tmp_path: Path) -> None:
    assert run(Console(file=io.StringIO()), shown=False) == ""


def test_the_start_says_sizes_and_rates() -> None:
    stage = TwoGroups(accumulate=2)
    line = summary(stage, settings(accumulate=2))
    assert "main 8.4e-05M parameters" in line
    assert "8 images a step (micro_batch 4 x accumulate 2 x 1 processes)" in line
    assert rates_line(stage).startswith("main: AdamW, learning rate 0.001 (as configured)")


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3600 * 26 + 5)] == ["0:00:00", "0:01:01", "26:00:05"]
