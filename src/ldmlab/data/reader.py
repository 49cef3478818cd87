"""Single samples out of tar shards: one read of a byte range the manifest names, parsed by webdataset.

Offsets are kept as one compact array and only the files used last stay open, so that memory and open files do not grow
with the number of shards.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ldmlab.data.manifest import Manifest
from ldmlab.data.tar_samples import parse_sample

OPEN_SHARDS = 32  # file handles kept per process

Files = dict[str, bytes]  # a sample's files by ending: {"webp": ..., "json": ...}


class ShardReader:
    """The samples of a folder of shards; safe to hand to forked and spawned workers."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.names = [shard.name for shard in manifest.shards]
        self.counts = [shard.samples for shard in manifest.shards]
        self._first = np.cumsum([0, *self.counts])  # where a shard's offsets begin
        self._offsets = np.fromiter((o for s in manifest.shards for o in s.offsets), np.int64, int(self._first[-1]))
        self._sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()

    def read(self, shard: int, sample: int) -> tuple[str, Files]:
        """Key and files of a sample; OSError or tarfile's errors where the shard is damaged."""
        begin = int(self._offsets[self._first[shard] + sample])
        last = sample + 1 == self.counts[shard]
        end = int(self._sizes[shard] if last else self._offsets[self._first[shard] + sample + 1])
        data = os.pread(self._file(shard).fileno(), end - begin, begin)
        if len(data) < end - begin:
            raise OSError("the shard ends inside this sample")
        files = parse_sample(data, self.names[shard])
        return files.pop("__key__"), {name: value for name, value in files.items() if not name.startswith("__")}

    def index(self, shard: int, sample: int) -> int:
        """Number of a sample, counted over all shards."""
        return int(self._first[shard]) + sample

    def label(self, shard: int, sample: int) -> str:
        """How messages name a sample whose key may be unreadable."""
        return f"{self.names[shard]}[{sample}]"

    def _file(self, shard: int) -> io.FileIO:
        """The open file of a shard; reads give their own offset, so processes may share it."""
        if shard not in self._open:
            self._open[shard] = io.FileIO(self.folder / self.names[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
