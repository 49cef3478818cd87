"""Progress of a run: a bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections import deque
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_EVERY_SECONDS = 10.0
_READ_EVERY_SECONDS = 1.0
_WINDOW = 200  # steps over which speed is taken


class StepProgress(pl.Callback):
    """Step, loss, images a second and time left; silent unless `shown`."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._shown = shown
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._loss, self._read, self._last_line = "", 0.0, 0.0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW)  # time, step, images

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
        """A step may be done."""
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
