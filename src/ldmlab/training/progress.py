"""Progress of a run: a bar on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ldmlab.training.stage import Stage

_LINE_EVERY_SECONDS = 10.0
_READ_EVERY_SECONDS = 1.0
_WINDOW = 200  # steps over which speed is taken


class StepProgress:
    """Step, loss, images a second and time left; silent unless `shown`."""

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._shown = shown
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._loss, self._read = "", 0.0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_WINDOW)
        self._last_line = 0.0

    def __enter__(self) -> "StepProgress":
        if self._shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rest]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=False)
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._shown:
            self.console.print(text, markup=False)

    def start(self, stage: Stage) -> None:
        """Training begins at the stage's step."""
        self._marks.append((time.monotonic(), stage.step, stage.position))
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.add_task(stage.kind, total=stage.max_steps, completed=stage.step, rest="")

    def step(self, stage: Stage) -> None:
        """One step is done."""
        now = time.monotonic()
        self._marks.append((now, stage.step, stage.position))
        if self._shown and (now - self._read >= _READ_EVERY_SECONDS or stage.step == stage.max_steps):
            self._read, self._loss = now, stage.metrics.latest()  # waits for the device
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=stage.step, rest=self._rest(stage))
        elif self._shown and (now - self._last_line >= _LINE_EVERY_SECONDS or stage.step == stage.max_steps):
            self._last_line = now
            self.say(f"{stage.kind} step {stage.step}/{stage.max_steps}  {self._rest(stage)}")

    def _rest(self, stage: Stage) -> str:
        (start, first_step, first), (end, last_step, last) = self._marks[0], self._marks[-1]
        seconds = max(end - start, 1e-9)
        left = (stage.max_steps - stage.step) * seconds / max(last_step - first_step, 1)
        parts = [self._loss, f"{(last - first) / seconds:.1f} images/s", f"{duration(left)} left"]
        return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
