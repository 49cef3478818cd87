"""One progress bar for long commands: with rate and time left on a terminal, occasional lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_EVERY_SECONDS = 10.0
Advance = Callable[[int, int], None]  # (done, of how many)
T = TypeVar("T")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else "")


@contextmanager
def bar(title: str, unit: str = "batches", *, quiet: bool = False) -> Iterator[Advance]:
    """`with bar(...) as advance: advance(done, total)`."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _lines(title, console)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def track(items: Iterable[T], count: int, title: str) -> Iterator[T]:
    with bar(title) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, count)


def _lines(title: str, console: Console) -> Advance:
    began = printed = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= _LINE_EVERY_SECONDS or done >= total:
            printed = now
            left = (now - began) / max(done, 1) * (total - done)
            console.print(f"{title}: {done} of {total}, {left:.0f} s left", highlight=False)

    return advance
