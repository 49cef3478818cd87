"""Metrics of the steps, the rows of the log that they become, and progress: a bar, or a line every ten seconds."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from ldmlab import distributed
from ldmlab.errors import InputError

_NAMED = 5  # images of a step in a message
_WINDOW, _LEAST = 100, 20  # steps of a running median, and before there is one


class StepMetrics:
    """Named scalars by step; reading them is the only moment when the host waits for the device."""

    def __init__(self) -> None:
        self._row: dict[str, Tensor] = {}  # of the unfinished step
        self._last: dict[str, Tensor] = {}  # of the latest finished one
        self._unread: list[tuple[int, dict[str, Tensor], list[str]]] = []  # on the device, by step, with its images
        self.skipped = self.in_a_row = 0  # steps that were left out: all, and the latest ones
        self.checked: dict[str, list[float]] = {}  # since the last `read`

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Parts of the running step's values: micro-batches add 1 / accumulate of theirs."""
        parts = [value.detach().float() for value in values.values()]
        parts = list(torch._foreach_mul(parts, share)) if share != 1 else parts
        for name, part in zip(values, parts, strict=True):
            self._row[name] = self._row[name] + part if name in self._row else part

    def close(self, step: int, images: Sequence[str] = ()) -> None:
        """The step is complete; `images`: keys of those that this process saw."""
        self._unread.append((step, self._row, list(images)))
        self._last, self._row = self._row, {}
        self.in_a_row = 0

    def leave_out(self, step: int, images: Sequence[str], most: int) -> None:
        """The running step updated nothing and is no part of a row; InputError after more than `most` in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        name, value = next(((n, float(v)) for n, v in self._row.items() if not math.isfinite(float(v))), ("", math.nan))
        if self.in_a_row > most:
            raise InputError(
                f"{name} became {value} at step {step}, {self.in_a_row} steps in a row have no finite gradient, more "
                f"than trainer.skip_nonfinite={most}; a lower optimizer.learning_rate may help, and the same command "
                f"resumes the run.{_named(images)}"
            )
        distributed.say(f"step {step} is left out: {name} became {value}.{_named(images)}")
        self._row = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `check`."""
        return {"metrics": self.checked, "left_out": [self.skipped, self.in_a_row]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; older checkpoints hold no steps that were left out."""
        self.checked = state["metrics"]
        self.skipped, self.in_a_row = state.get("left_out", (0, 0))

    def latest(self) -> str:
        """The first metric of the latest step, of this process: `loss 0.1234`."""
        return next((f"{name} {float(value):.4f}" for name, value in self._last.items()), "")

    def check(self) -> None:
        """Fetch what has not been seen; InputError names the first metric that is not finite, and its step."""
        if not self._unread:
            return
        stacked = torch.stack([value for _, row, _ in self._unread for value in row.values()])
        values = iter(distributed.mean_(stacked).tolist())
        for step, row, images in self._unread:
            for name in row:
                value = next(values)
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became {value} at step {step}; no checkpoint was written since. A lower "
                        "optimizer.learning_rate, trainer.gradient_clip=1 or trainer.skip_nonfinite=3 may help; the "
                        f"same command resumes the run.{_named(images)}"
                    )
                self.checked.setdefault(name, []).append(value)
        self._unread = []

    def read(self) -> dict[str, float]:
        """Mean of every metric over the steps since the last call."""
        self.check()
        means = {name: sum(values) / len(values) for name, values in self.checked.items()}
        self.checked = {}
        return means


def _named(images: Sequence[str]) -> str:
    """A sentence with the keys of a step's images."""
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return f" Its images here: {', '.join(images[:_NAMED])}{more}." if images else ""


class Logged(pl.LightningModule):
    """What a stage logs becomes the rows of `LogMetrics`."""

    step: int  # updates of the main group
    max_steps: int
    accumulate: int  # micro-batches a step

    def __init__(self) -> None:
        super().__init__()
        self.metrics = StepMetrics()
        self.row: dict[str, Any] = {}  # logged outside `training_step`, for the next row
        self.row_now = False  # whether that row is written at this step, also where none is due

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """A metric of the next row of the log.

        In `training_step` its mean over micro-batches, processes and the steps since the last row, elsewhere its latest
        value; rows come at step 1, every `trainer.log_every` steps, at the last step, and after each validation.
        """
        if self._current_fx_name == "training_step":
            self.metrics.add({name: torch.as_tensor(value)}, 1 / self.accumulate)
            return
        self.row[name] = value
        if self.trainer.validating:
            self.row_now = True
            super().log(name, value, logger=False)

    @property
    def row_due(self) -> bool:
        """Whether a row of training metrics belongs to this step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.step % every == 0 or self.step in (1, self.max_steps)

    @property
    def validation_due(self) -> bool:
        """Whether the Trainer validates at the end of this step."""
        due = self.step * self.accumulate % self.trainer.val_check_interval == 0
        return bool(self.trainer.enable_validation and (due or self.trainer.should_stop))


class GradientAlarm:
    """Says where the norm of a group's gradient is `factor` times its median over the last steps."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._norms: dict[str, deque[float]] = {}

    def look(self, checked: Mapping[str, Sequence[float]], step: int) -> dict[str, float]:
        """Norms since the last row, up to `step` => alarm/NAME: how often it jumped, where it did."""
        found = {}
        for name, values in checked.items():
            if not name.startswith("gradient_norm/"):
                continue
            norms = self._norms.setdefault(name, deque(maxlen=_WINDOW))
            jumps = []
            for norm in values:
                if len(norms) >= _LEAST and norm > self.factor * (usual := median(norms)):
                    jumps.append((norm, usual))
                norms.append(norm)
            if jumps:
                found[f"alarm/{name}"] = float(len(jumps))
                norm, usual = max(jumps)
                distributed.say(
                    f"{name} jumped to {norm:.4g} before step {step}: its median over {_WINDOW} steps is {usual:.4g} "
                    "(trainer.gradient_clip limits it)"
                )
        return found


class LogMetrics(pl.Callback):
    """One row a step at every logger: training metrics when due, and what was logged in validation or by scores.

    It comes after all callbacks that log and before the one that saves checkpoints.
    """

    def __init__(self, gradient_alarm: float | None = None) -> None:
        self._alarm = GradientAlarm(gradient_alarm) if gradient_alarm else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Training metrics of a step whose validation comes now, since the run was killed in it."""
        if pl_module.unvalidated:
            self._read(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Training metrics; the row waits for a validation that follows in this step."""
        if not pl_module.step_complete:
            return
        self._read(pl_module)
        if not pl_module.validation_due:
            self._write(trainer, pl_module)

    def _read(self, pl_module: Any) -> None:
        """Metrics since the last row, where one is due."""
        if pl_module.row_due:
            rates = {f"learning_rate/{group}": rate for group, rate in pl_module.rates().items()}
            pl_module.metrics.check()
            alarms = self._alarm.look(pl_module.metrics.checked, pl_module.step) if self._alarm else {}
            row = pl_module.metrics.read() | rates | {"images": float(pl_module.position)} | alarms
            if pl_module.metrics.skipped:
                row["skipped_steps"] = float(pl_module.metrics.skipped)
            pl_module.row = row | pl_module.row
            for name, value in pl_module.row.items():  # for callbacks that monitor a metric
                pl.LightningModule.log(pl_module, name, value, logger=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The row of a step with validation."""
        self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Nothing that is not finite gets into a checkpoint; a collective call."""
        pl_module.metrics.check()
        checkpoint |= pl_module.metrics.state()

    @staticmethod
    def _write(trainer: pl.Trainer, stage: Any) -> None:
        if trainer.sanity_checking or not stage.row or not (stage.row_due or stage.row_now):
            return
        row = {name: float(value) for name, value in stage.row.items()}
        stage.row, stage.row_now = {}, False
        for logger in trainer.loggers:
            logger.log_metrics(row, stage.step)


_LINE_EVERY_SECONDS = 10.0
_READ_EVERY_SECONDS = 1.0
_SPEED_STEPS = 200  # over which speed is taken


class StepProgress(pl.Callback):
    """Step, loss, images a second and time left; silent unless `shown`."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._shown = shown
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._loss, self._read, self._last_line = "", 0.0, 0.0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_SPEED_STEPS)  # time, step, images

    def __enter__(self) -> "StepProgress":
        if self._shown and self.console.is_terminal:
            texts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*texts, TextColumn("{task.fields[rest]}"), console=self.console, transient=False)
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._shown:
            self.console.print(text, markup=False)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins at the stage's step."""
        self._last_line = time.monotonic()
        self._marks.append((self._last_line, pl_module.step, pl_module.position))
        if self._bar is not None:
            self._bar.add_task(pl_module.kind, total=pl_module.max_steps, completed=pl_module.step, rest="")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not pl_module.step_complete:
            return
        now, step, last = time.monotonic(), pl_module.step, pl_module.max_steps
        self._marks.append((now, step, pl_module.position))
        if self._shown and (now - self._read >= _READ_EVERY_SECONDS or step == last):
            self._read, self._loss = now, pl_module.metrics.latest()  # waits for the device
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, rest=self._rest(last))
        elif self._shown and (now - self._last_line >= _LINE_EVERY_SECONDS or step == last):
            self._last_line = now
            self.say(f"{pl_module.kind} step {step}/{last}  {self._rest(last)}")

    def _rest(self, max_steps: int) -> str:
        (start, first_step, first), (end, step, last) = self._marks[0], self._marks[-1]
        seconds = max(end - start, 1e-9)
        left = (max_steps - step) * seconds / max(step - first_step, 1)
        parts = [self._loss, f"{(last - first) / seconds:.1f} images/s", f"{duration(left)} left"]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
