"""The exception for user errors, and the format of values in its message."""

import difflib
import re
import reprlib
import traceback
from collections.abc import Iterable
from typing import Any

LARGEST_SIDE = 1 << 16  # px
_LONGEST_MESSAGE = 1500  # characters
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = 120


class InputError(ValueError):
    """An input that cannot be used; the message is one sentence: option, value, why, way out.

    Commands print the message and end with exit code 2; any other exception is a fault of ours and keeps its
    traceback. Very long messages are cut.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught ") and "Original Traceback" in message:  # from a loader process, by torch
            message = message.strip().rpartition("\n")[2].partition(": ")[2] or message
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE - 100]} ... {message[-90:]}"
        super().__init__(message)


def one_of(option: str, value: Any, known: Iterable[str]) -> None:
    """InputError for a choice that is not among the known ones."""
    if value not in (choices := tuple(known)):
        raise InputError(f"{option}={shown(value)} is unknown; choose one of {', '.join(choices)}.")


def check_fraction(option: str, value: float) -> None:
    """InputError outside of [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"{option}={value} is no fraction; choose 0 or more, below 1.")


def check_side(option: str, value: int | None) -> None:
    """InputError for an invalid side of an image in pixels."""
    if value is None or not 1 <= value <= LARGEST_SIDE:
        raise InputError(f"{option}={value} is no side of an image; choose 1 .. {LARGEST_SIDE} px.")


def check_text(option: str, text: str) -> None:
    """InputError for text that no UTF-8 file can hold."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{option}={text!r:.60} holds half of a surrogate pair, which is no UTF-8; type it again.")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a sentence: the nearest of the known names, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Of its message, cut where it is very long; the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def lost_loader(error: BaseException) -> str:
    """Why a loader process ended, where the error comes of that; empty for others.

    Torch names the process unless it dies while a batch is handed over: then the connection to it breaks. An error that
    a process only passes on ("Caught ValueError in DataLoader worker process 0") is none of these.
    """
    if re.search(r"DataLoader worker \(pid", str(error)):
        return first_line(error).rstrip(".")
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    passed = any(re.match(r"(torch\.)?multiprocessing\b", name) for name in modules)  # the connection to a process
    broken = passed and isinstance(error, EOFError | ConnectionError)
    return f"it was killed or has exited: {first_line(error).rstrip('.')}" if broken else ""


def memory_ran_out(error: BaseException) -> bool:
    """Whether memory was exhausted: Python's, a GPU's, or the host's as torch's allocator reports it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error))
    )


def shown(value: Any) -> str:
    """A value of any size or depth as text of bounded length; text as it was typed."""
    if isinstance(value, str):
        return value if len(value) <= 120 else f"{value[:80]}...{value[-20:]}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _VALUES.repr(value)
