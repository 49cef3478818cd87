"""A command in a forked child that is killed at any of its writes below a folder."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmlab.app.cli import dispatch

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link")


def writes_of(words: Sequence[str], folder: Path, killed_at: int | None = None) -> int:
    """How many writes below the folder a command begins; before number `killed_at`, from 1, it is killed."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        _run(words, folder, killed_at, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        count = len(file.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if killed_at is None else -signal.SIGKILL), f"{words}: exit code {code}"
    return count


def _run(words: Sequence[str], folder: Path, killed_at: int | None, writer: int) -> None:
    begun = 0

    def follow(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal begun
        changes = event in _CHANGES or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if changes and isinstance(arguments[0], str | Path) and folder in Path(arguments[0]).absolute().parents:
            begun += 1
            os.write(writer, b".")
            if begun == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(follow)
    try:
        os._exit(dispatch(list(words)) or 0)
    finally:
        os._exit(1)
