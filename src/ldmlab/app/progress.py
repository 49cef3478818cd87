"""One progress bar for long commands: a live one with time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_SECONDS = 10.0


@contextmanager
def bar(title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """`with bar(...) as advance: advance(done, total)`."""
    if not shown:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _live(title) as advance:
            yield advance
    else:
        yield _lines(title)


@contextmanager
def _live(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(title: str) -> Callable[[int, int], None]:
    began = said = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _LINE_EVERY_SECONDS and done < total:
            return
        said = now
        left = (now - began) / max(done, 1) * (total - done)
        print(f"{title}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
