"""Metrics and images to metrics.csv and samples/, and optionally to TensorBoard or W&B."""

import csv
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ldmlab import distributed, format1
from ldmlab.errors import InputError
from ldmlab.files import open_regular, write_text
from ldmlab.inference.grids import grid as label_grid
from ldmlab.training.run_folder import RunFolder


class Logger(Protocol):
    """A destination of metrics and images, opened by the first process of a run."""

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None: ...  # step: resumed from

    def numbers(self, values: dict[str, float], step: int) -> None: ...

    def image(self, name: str, grid: np.ndarray, step: int) -> None: ...  # uint8 (H, W, 3)

    def close(self, success: bool) -> None: ...


class Files:
    """metrics.csv, one row a call with a step column, and samples/NAME/step_XXXXXXXX.png."""

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Keep what was logged up to `step`; later rows will be written again."""
        self._path, self._samples = run.metrics, run.samples
        self._columns, rows = self._read()
        self._rewrite([row for row in rows if int(row["step"]) <= step])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """What was logged before; a damaged table is renamed, since the checkpoints are enough to continue."""
        try:
            return read_metrics(self._path)
        except InputError as error:
            aside = self._path.with_name("metrics.damaged.csv")
            self._path.rename(aside)
            distributed.say(f"{error} It is now {aside}; a new table begins.")
            return [], []

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Append a row; new names become new columns."""
        row = {"step": str(step), **{name: f"{value:.9g}" for name, value in values.items()}}
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite(read_metrics(self._path)[1])
        with open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        if not self._columns:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())

    def image(self, name: str, grid: np.ndarray, step: int) -> None:
        """A PNG."""
        path = self._samples / name / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(path)

    def close(self, success: bool) -> None:
        """Every row is on disk already."""


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


@dataclass
class TensorBoard:
    """TensorBoard's event files under the run folder."""

    folder: str = "tensorboard"  # below the run folder
    _logger: Any = field(default=None, init=False)

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Events after `step` of an earlier start are hidden by TensorBoard itself."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._logger = SummaryWriter(str(run.path / self.folder), purge_step=step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self._logger.add_scalar(name, value, step)

    def image(self, name: str, grid: np.ndarray, step: int) -> None:
        """One image."""
        self._logger.add_image(name, grid, step, dataformats="HWC")

    def close(self, success: bool) -> None:
        """Flush and close."""
        self._logger.close()


class Loggers:
    """All loggers of a run as one; it does nothing on other processes than the first."""

    def __init__(self, loggers: Sequence[Logger], first: bool) -> None:
        self._loggers: list[Logger] = [Files(), *loggers] if first else []
        self._open: list[Logger] = []

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """Open all; `step` is where a resumed run continues."""
        for logger in self._loggers:
            logger.open(run, settings, step)
            self._open.append(logger)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        """Scalars of a step to every logger."""
        for logger in self._open:
            logger.numbers(values, step)

    def log_images(
        self, name: str, images: Tensor, step: int, labels: Sequence[str] | None = None, title: str = ""
    ) -> None:
        """Images uint8 (N, H, W, 3) as one grid to every logger, with a label each and a title."""
        if self._open:
            grid = labelled_grid(images, labels, title) if labels or title else image_grid(images)
            for logger in self._open:
                logger.image(name, grid, step)

    def close(self, success: bool) -> None:
        """Close all, also when one of them fails."""
        with ExitStack() as stack:
            while self._open:
                stack.callback(self._open.pop().close, success)


def labelled_grid(images: Tensor, labels: Sequence[str] | None, title: str) -> np.ndarray:
    """As `image_grid`, small images enlarged, each with its label below: uint8 (H', W', 3)."""
    columns = int(np.ceil(np.sqrt(len(images))))
    return np.asarray(label_grid(list(images.cpu().numpy()), labels, columns, title))


def image_grid(images: Tensor, gap: int = 2) -> np.ndarray:
    """Images uint8 (N, H, W, 3) in rows of about sqrt(N), white between them: uint8 (H', W', 3)."""
    count, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = int(np.ceil(count / columns))
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images.cpu().numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
