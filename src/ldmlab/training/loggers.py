"""Metrics and images to metrics.csv and samples/, and optionally to TensorBoard or W&B: Lightning's loggers."""

import csv
import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from ldmlab import distributed, format1
from ldmlab.disks import disk_errors, open_regular
from ldmlab.errors import InputError
from ldmlab.files import write_text
from ldmlab.inference.grids import grid as label_grid
from ldmlab.training.run_folder import RunFolder


class RunFiles(Logger):
    """metrics.csv, one row a step, and samples/NAME/step_XXXXXXXX.png; of the first process."""

    name, version = "files", 0

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Keep what was logged up to `step`, where a resumed run continues; later rows will be written again."""
        self._path, self._samples = run.metrics, run.samples
        self._latest: dict[str, str] = {}  # the last row
        self._place = 0  # where it begins in the file
        self._columns: list[str] = []
        if distributed.rank() == 0:
            self._columns, rows = self._read()
            self._rewrite([row for row in rows if int(row["step"]) <= step])

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """What was logged before; a damaged table is renamed, since the checkpoints are enough to continue."""
        try:
            return read_metrics(self._path)
        except InputError as error:
            aside = self._path.with_name("metrics.damaged.csv")
            self._path.rename(aside)
            distributed.say(f"{error} It is now {aside}; a new table begins.")
            return [], []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, or complete the last one where it is of the same step; new names become new columns."""
        if distributed.rank():
            return
        row = {"step": str(step), **{name: f"{float(v):.9g}" for name, v in metrics.items() if name != "epoch"}}
        if again := self._latest.get("step") == row["step"]:
            row = self._latest | row
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(read_metrics(self._path)[1][: -1 if again else None])
        with open(self._path, "r+", newline="") as file:
            self._place = file.seek(*((self._place, 0) if again and not new else (0, 2)))
            csv.DictWriter(file, self._columns).writerow(row)
            file.truncate()
        self._latest = row

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        if not self._columns:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())

    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        """A PNG of a grid, uint8 (H, W, 3)."""
        path = self._samples / key / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(path)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a metrics.csv, without a last row that a killed process left unfinished."""
    if not path.exists():
        return [], []
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        reader = csv.DictReader(lines)
        reader.fieldnames = [format1.metric(name) for name in reader.fieldnames or []]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}).") from error
    if lines and "step" not in reader.fieldnames:
        raise InputError(f"{path} is damaged (it has no column step).")
    rows = [row for row in reader if None not in row.values() and row["step"].isdecimal()]
    return list(reader.fieldnames), rows


def lost_rows(path: Path, step: int, log_every: int) -> str:
    """A sentence about the rows that a metrics.csv should hold up to `step` and does not; empty if it holds the last.

    A damaged table, which nobody reads again in a finished run, is one as well.
    """
    try:
        rows = read_metrics(path)[1]
    except InputError as error:
        return str(error)
    last = max((int(row["step"]) for row in rows), default=0)
    return f"{path} ends at step {last}; its rows up to step {step} are lost." if last < step - step % log_every else ""


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files under the run folder."""

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder  # below the run folder

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Events after `step` of an earlier start are hidden by TensorBoard itself."""
        super().__init__(run.path / self.folder, name="", version="", purge_step=step + 1)


def open_all(loggers: Sequence[Any], run: RunFolder, settings: dict[str, Any], step: int) -> None:
    """Ours learn the run, others its settings; where one fails, those before are closed."""
    with ExitStack() as opened:
        for logger in loggers:
            own = hasattr(logger, "open")
            with disk_errors(run.path if own else logger.save_dir or run.path):
                if isinstance(logger, TensorBoardLogger) and not own:
                    logger.experiment  # noqa: B018  opens its file; log_hyperparams would hide what prevents it
                logger.open(run, settings, step) if own else logger.log_hyperparams(settings)
            opened.callback(logger.finalize, "failed")
        opened.pop_all()


def close_all(loggers: Sequence[Any], status: str) -> None:
    """Close all, also when one of them fails, or the Trainer did so already."""
    with ExitStack() as stack:
        for logger in reversed(loggers):
            stack.callback(logger.finalize, status)


def log_images(
    loggers: Sequence[Any], name: str, images: Tensor, step: int, labels: Sequence[str] | None = None, title: str = ""
) -> None:
    """Images uint8 (N, H, W, 3) as one grid to every logger that takes images, with a label each and a title."""
    grid = np.asarray(label_grid(list(images.cpu().numpy()), labels, title=title))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, grid, step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[grid], step=step)
