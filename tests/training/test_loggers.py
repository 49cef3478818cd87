"""Numbers and images reach every logger that is on, under the run's id."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.inference.grids import labels_of
from ldmlab.training.loggers import (
    RunFiles,
    TensorBoard,
    close_all,
    log_images,
    open_all,
    read_metrics,
)
from ldmlab.training.run_folder import RunFolder


def images() -> torch.Tensor:
    return torch.arange(5 * 4 * 6 * 3).reshape(5, 4, 6, 3).remainder(256).byte()


def log_some(loggers: list[Any], run: RunFolder, first_step: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    open_all(loggers, run, {"seed": 0}, first_step - 1)
    for logger in loggers:
        logger.log_metrics({"loss": 1.5}, first_step)
        logger.log_metrics({"loss": 1.25, "val/loss": 2.0}, first_step + 1)
    log_images(loggers, "samples", images(), first_step + 1)
    close_all(loggers, "success")


class Shown:
    """A logger that keeps its images."""

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        (self.grid,) = images


def grid_of(labels: list[str] | None, title: str) -> np.ndarray:
    shown = Shown()
    log_images([shown], "samples", images(), 1, labels, title)
    return shown.grid


def test_a_grid_keeps_every_image() -> None:
    large = images().numpy().repeat(32, axis=1).repeat(32, axis=2)  # 4 x 6 px to 128 x 192
    grid = grid_of(None, "")
    assert np.array_equal(grid[8:136, 8:200], large[0])
    assert any(np.array_equal(grid[-136:-8, left : left + 192], large[4]) for left in (8, 208, 408))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_logger_that_cannot_write_is_a_sentence(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^/proc/here cannot be made because /proc takes no new files; choose"):
        open_all([kind("/proc/here/logs")], RunFolder.create(tmp_path, "toy"), {"seed": 0}, 0)


@pytest.mark.parametrize(
    ("labels", "title"),
    [(["a red apple", "猫", "", "class 3", "x" * 300], ""), (None, "input | output"), (["a"] * 5, "b")],
)
def test_labels_and_titles_are_written_beside_the_images(labels: list[str] | None, title: str) -> None:
    plain, marked = grid_of([""] * 5, ""), grid_of(labels, title)
    assert marked.shape[1] == plain.shape[1]
    ink = [int((grid == 40).all(axis=2).sum()) for grid in (plain, marked)]  # the colour of letters
    assert ink[1] > ink[0]


def test_labels_are_captions_or_classes() -> None:
    assert labels_of({"caption": ["a", "b"], "class_id": torch.tensor([1, 2])}) == ["a", "b"]
    assert labels_of({"class_id": torch.tensor([1, 2])}) == ["class 1", "class 2"]
    assert labels_of({"moments": torch.zeros(2)}) == []


def test_files_grow_columns_and_are_cut_at_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "toy")
    log_some([RunFiles()], run, 4)
    with open(run.metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "4", "loss": "1.5", "val/loss": ""},
        {"step": "5", "loss": "1.25", "val/loss": "2"},
    ]
    assert Image.open(run.samples / "samples" / "step_00000005.png").size == (408, 416)  # two columns
    files = RunFiles()
    files.open(run, {}, 4)
    assert [row["step"] for row in read_metrics(run.metrics)[1]] == ["4"]
    for values in ({"loss": 3.0}, {"val/loss": 4.0}, {"more": 5.0, "loss": 6.0}):  # of one step: one row
        files.log_metrics(values, 5)
    assert read_metrics(run.metrics)[1][1:] == [{"step": "5", "loss": "6", "val/loss": "4", "more": "5"}]
    files.log_metrics({"loss": 7.0}, 6)
    assert [row["step"] for row in read_metrics(run.metrics)[1]] == ["4", "5", "6"]


def test_other_processes_than_the_first_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, "toy")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    files = RunFiles()
    files.open(run, {}, 0)
    files.log_metrics({"loss": 1.0}, 1)
    assert not run.metrics.exists()


def test_tensorboard_gets_scalars_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder.create(tmp_path, "toy")
    log_some([TensorBoard()], run, 1)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.5), (2, 1.25)]
    assert [e.step for e in events.Images("samples")] == [2]


def test_all_loggers_are_closed_when_one_fails(tmp_path: Path) -> None:
    closed: list[Any] = []

    class Fails(RunFiles):
        def finalize(self, status: str) -> None:
            closed.append(status)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        close_all([Fails(), Fails()], "failed")
    assert closed == ["failed", "failed"]
    closed.clear()
    with pytest.raises(OSError, match="gone"):
        open_all([Fails(), object()], RunFolder.create(tmp_path, "toy"), {}, 0)
    assert closed == ["failed"]
