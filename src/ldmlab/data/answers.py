"""Answers that the fields of every sample give, found once: they lie in `.cache/` beside the manifest.

A file is named after the manifest's hash, the question and the code that answers it; a change of any of them makes
another. It holds a line of JSON (the different answers, a CRC32C) and a little-endian int32 a sample: the number of
its answer, or -1 for one that could not be read, which is tried again at every start. One process of a machine reads
the shards and the others wait for it. Beside a manifest that cannot be written to, the file goes to `answers` in the
folder of fetched files; where neither can be written, every process reads the shards at every start, which is logged.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ldmlab import annotations
from ldmlab.data import decode
from ldmlab.data.decode import BAD_SAMPLE, sample_fields
from ldmlab.data.order import split_index
from ldmlab.data.shards import ShardLost, ShardReader
from ldmlab.disks import locked, open_regular
from ldmlab.errors import InputError
from ldmlab.files import weights_folder, write_atomically

logger = logging.getLogger(__name__)
UNREAD = -1
_CODE = np.dtype("<i4")
Ask = Callable[[dict[str, Any]], str | None]  # fields of a sample => its answer


class Answers(NamedTuple):
    """The answer of sample i, counted over all shards, is `values[numbers[i]]`."""

    values: list[str | None]  # the different ones
    numbers: NDArray[np.int32]  # (samples,), UNREAD for a sample that cannot be read

    def texts(self) -> NDArray[Any]:
        """One text a sample; "" where there is none."""
        return np.array([*(value or "" for value in self.values), ""])[self.numbers]


class Question(NamedTuple):
    """What is found out about every sample; `text` stands for all that the answers depend on besides the samples."""

    text: str | None  # None: unknown, so answers are not kept
    ask: Ask
    validated: Collection[str] = ()  # fields in which a fault makes the sample an unreadable one


def of_field(field: str) -> Question:
    """The value of a field as text; None where a sample lacks it."""
    return Question(_text("field", field), lambda known: str(known[field]) if field in known else None)


def of_rule(task: Any, keeps: Callable[[Mapping[str, Any]], bool], validated: Collection[str]) -> Question:
    """Whether a task keeps a sample: "yes" or None. The task stands for itself if it is a dataclass of plain values."""
    text = None
    if dataclasses.is_dataclass(task) and not isinstance(task, type):
        text = _text("kept", dataclasses.asdict(task), *(base for base in type(task).__mro__ if base is not object))
    return Question(text, lambda known: "yes" if keeps(known) else None, validated)


def _text(kind: str, value: Any, *classes: type) -> str | None:
    """The question with the names of the classes, and a hash of their code and of the code that reads fields."""
    names = dict.fromkeys([annotations.__name__, decode.__name__, *(one.__module__ for one in classes)])
    try:
        code = "".join(inspect.getsource(sys.modules[name]) for name in names)
        question = [kind, value, *(f"{one.__module__}.{one.__qualname__}" for one in classes)]
        return json.dumps([*question, hashlib.sha256(code.encode()).hexdigest()], sort_keys=True)
    except (OSError, KeyError, TypeError, ValueError):  # no source, or a value that is not plain
        return None


def answers(reader: ShardReader, manifest_hash: str, question: Question, named: str) -> Answers:
    """The answers of all samples, from the file or else from the shards; `named`: "OPTION=FOLDER"."""
    total = int(sum(reader.counts))
    if question.text is None:
        logger.info("%s: what its task keeps cannot be stored, so every start reads all samples.", named)
        return _computed(reader, question)
    name = hashlib.sha256(f"{manifest_hash} {question.text}".encode()).hexdigest()
    places = [folder / f"{name}.answers" for folder in (reader.folder / ".cache", weights_folder() / "answers")]
    found = next((one for place in places if (one := _read(place, total))), None)
    if found is None:
        place = next(filter(_writable, places), None)
        if place is None:
            logger.warning("%s and %s cannot be written to: every start reads all samples of %s.", *places, named)
            return _computed(reader, question)
        with locked(place.with_suffix(".lock"), f"{named} is being read", wait=True, quiet=True, remove=True):
            found = _read(place, total)  # another process was first
            if found is None:
                return _write(place, _computed(reader, question))
    return _computed(reader, question, found)


def _computed(reader: ShardReader, question: Question, before: Answers | None = None) -> Answers:
    """The answers by reading every sample, or those that `before` lacks."""
    values, numbers = before or Answers([], np.full(sum(reader.counts), UNREAD, np.int32))
    known = {value: number for number, value in enumerate(values)}
    for index in np.flatnonzero(numbers == UNREAD):
        try:
            fields = sample_fields(reader.read(*split_index(reader.ends, int(index)))[1], question.validated)
        except ShardLost:
            raise
        except BAD_SAMPLE:
            continue
        answer = question.ask(fields)
        numbers[index] = known.setdefault(answer, len(values))
        if numbers[index] == len(values):
            values.append(answer)
    return Answers(values, numbers)


def _writable(place: Path) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place.parent, os.W_OK | os.X_OK)


def _write(place: Path, found: Answers) -> Answers:
    data = found.numbers.astype(_CODE).tobytes()
    head = json.dumps({"values": found.values, "crc32c": google_crc32c.value(data)}).encode()
    try:
        write_atomically(place, lambda temporary: temporary.write_bytes(head + b"\n" + data))
    except InputError as error:
        logger.warning("answers are not kept: %s", error)
    return found


def _read(place: Path, total: int) -> Answers | None:
    """What lies there; None where that is nothing, or not what `_write` wrote."""
    try:
        with open_regular(place) as file:
            head, _, data = file.read().partition(b"\n")
        parts = json.loads(head)
        values, numbers = parts["values"], np.frombuffer(data, _CODE).astype(np.int32)
        fits = len(numbers) == total and parts["crc32c"] == google_crc32c.value(data)
        plain = isinstance(values, list) and all(value is None or isinstance(value, str) for value in values)
        if fits and plain and numbers.min() >= UNREAD and numbers.max() < len(values):
            return Answers(values, numbers)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
