"""Values computed from the fields of every sample, cached in `.cache/` beside the manifest.

A file is named by hashes of the manifest, and of what is computed and its code; a change of any of them makes another.
Files of earlier manifests are deleted when one is written.
It holds a line of JSON (the different values, a CRC32C) and a little-endian int32 a sample: the number of its value, or
-1 for a sample that could not be read, which is tried again at every start. One process of a machine reads the shards
and the others wait for it. If `.cache/` cannot be written, the file goes to `sample_values` in the folder of fetched
files; if neither can be written, every process reads the shards at every start, which is logged.
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
Compute = Callable[[dict[str, Any]], str | None]  # fields of a sample => its value


class SampleValues(NamedTuple):
    """The value of sample i, counted over all shards, is `values[numbers[i]]`."""

    values: list[str | None]  # the different ones
    numbers: NDArray[np.int32]  # (samples,), UNREAD for a sample that cannot be read

    def texts(self) -> NDArray[Any]:
        """One text a sample; "" where there is none."""
        return np.array([*(value or "" for value in self.values), ""])[self.numbers]


class SampleFunction(NamedTuple):
    """What is computed from every sample; `key` identifies all that the values depend on besides the samples."""

    key: str | None  # None: unknown, so values are not cached
    compute: Compute
    validated: Collection[str] = ()  # fields in which a fault makes the sample an unreadable one


def field_value(field: str) -> SampleFunction:
    """The value of a field as text; None where a sample lacks it."""
    return SampleFunction(_key("field", field), lambda known: str(known[field]) if field in known else None)


def kept_by(task: Any, keeps: Callable[[Mapping[str, Any]], bool], validated: Collection[str]) -> SampleFunction:
    """Whether a task keeps a sample: "yes" or None. Cached if the task is a dataclass of plain values."""
    key = None
    if dataclasses.is_dataclass(task) and not isinstance(task, type):
        key = _key("kept", dataclasses.asdict(task), *(base for base in type(task).__mro__ if base is not object))
    return SampleFunction(key, lambda known: "yes" if keeps(known) else None, validated)


def _key(kind: str, value: Any, *classes: type) -> str | None:
    """The value, the names of the classes, and a hash of their code and of the code that reads fields."""
    names = dict.fromkeys([annotations.__name__, decode.__name__, *(one.__module__ for one in classes)])
    try:
        code = "".join(inspect.getsource(sys.modules[name]) for name in names)
        parts = [kind, value, *(f"{one.__module__}.{one.__qualname__}" for one in classes)]
        return json.dumps([*parts, hashlib.sha256(code.encode()).hexdigest()], sort_keys=True)
    except (OSError, KeyError, TypeError, ValueError):  # no source, or a value that is not plain
        return None


def sample_values(reader: ShardReader, manifest_hash: str, function: SampleFunction, named: str) -> SampleValues:
    """The values of all samples, from the file or else from the shards; `named`: "OPTION=FOLDER"."""
    total = int(sum(reader.counts))
    if function.key is None:
        logger.info("%s: the samples that its task keeps cannot be cached, so every start reads all samples.", named)
        return _computed(reader, function)
    manifest, name = (hashlib.sha256(text.encode()).hexdigest()[:32] for text in (manifest_hash, function.key))
    name = f"{manifest}-{name}"
    places = [folder / f"{name}.values" for folder in (reader.folder / ".cache", weights_folder() / "sample_values")]
    found = next((one for place in places if (one := _read(place, total))), None)
    if found is None:
        place = next(filter(_writable, places), None)
        if place is None:
            logger.warning("%s and %s cannot be written to: every start reads all samples of %s.", *places, named)
            return _computed(reader, function)
        with locked(place.with_suffix(".lock"), f"{named} is being read", wait=True, quiet=True, remove=True):
            found = _read(place, total)  # another process was first
            if found is None:
                if place == places[0]:  # the other folder is shared by all data
                    for old in {*place.parent.glob("*.values")} - {*place.parent.glob(f"{manifest}-*.values")}:
                        old.unlink(missing_ok=True)
                return _write(place, _computed(reader, function))
    return _computed(reader, function, found)


def _computed(reader: ShardReader, function: SampleFunction, before: SampleValues | None = None) -> SampleValues:
    """The values by reading every sample, or those that `before` lacks."""
    values, numbers = before or SampleValues([], np.full(sum(reader.counts), UNREAD, np.int32))
    known = {value: number for number, value in enumerate(values)}
    for index in np.flatnonzero(numbers == UNREAD):
        try:
            fields = sample_fields(reader.read(*split_index(reader.ends, int(index)))[1], function.validated)
        except ShardLost:
            raise
        except BAD_SAMPLE:
            continue
        value = function.compute(fields)
        numbers[index] = known.setdefault(value, len(values))
        if numbers[index] == len(values):
            values.append(value)
    return SampleValues(values, numbers)


def _writable(place: Path) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place.parent, os.W_OK | os.X_OK)


def _write(place: Path, found: SampleValues) -> SampleValues:
    data = found.numbers.astype(_CODE).tobytes()
    head = json.dumps({"values": found.values, "crc32c": google_crc32c.value(data)}).encode()
    try:
        write_atomically(place, lambda temporary: temporary.write_bytes(head + b"\n" + data))
    except InputError as error:
        logger.warning("values of samples are not cached: %s", error)
    return found


def _read(place: Path, total: int) -> SampleValues | None:
    """The file's content; None if it is missing or damaged."""
    try:
        with open_regular(place) as file:
            head, _, data = file.read().partition(b"\n")
        parts = json.loads(head)
        values, numbers = parts["values"], np.frombuffer(data, _CODE).astype(np.int32)
        fits = len(numbers) == total and parts["crc32c"] == google_crc32c.value(data)
        plain = isinstance(values, list) and all(value is None or isinstance(value, str) for value in values)
        if fits and plain and numbers.min() >= UNREAD and numbers.max() < len(values):
            return SampleValues(values, numbers)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
