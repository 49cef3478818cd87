"""One progress bar for long commands: with rate and time left on a terminal, occasional lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_EVERY_SECONDS = 10.0
Advance = Callable[[int, int], None]  # (done, of how many)


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else "")


@contextmanager
def bar(title: str, unit: str = "batches", console: Console | None = None) -> Iterator[Advance]:
    """`with bar(...) as advance: advance(done, total)`; a quiet console shows nothing."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, console)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(title: str, console: Console) -> Advance:
    began = printed = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < _LINE_EVERY_SECONDS and done < total:
            return
        printed = now
        left = (now - began) / max(done, 1) * (total - done)
        console.print(f"{title}: {done} of {total}, {left:.0f} s left", highlight=False)

    return advance
