"""The samples of a folder of shards, each read by its byte range."""

from collections import OrderedDict
from contextlib import ExitStack
from typing import IO, Any

import google_crc32c
import numpy as np

from ldmlab.data.manifest import MANIFEST, Manifest
from ldmlab.data.shard_info import PLACES, byte_range, map_places, read_places
from ldmlab.data.stores import Folder, Store, beside
from ldmlab.data.tars import Files, parse_sample, read_bytes
from ldmlab.disks import open_regular
from ldmlab.errors import InputError

OPEN_SHARDS = 32  # file handles kept per process


class ShardLost(InputError):
    """A shard of a store that cannot be had: it ends the run, unlike a bad sample."""


class ShardReader:
    """The samples of some shards, each one read of a byte range; safe to hand to forked and spawned workers.

    Places and checksums are an array that is mapped, and only the files used last stay open, so that memory and open
    files do not grow with the data. A sample whose bytes differ from the manifest's checksum is refused.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = beside(folder, MANIFEST)  # on this disk; of a store without its shards
        self.store = folder if isinstance(folder, Store) and folder.local is None else None
        self._stored = [(shard.name, shard.bytes, shard.sha256) for shard in manifest.shards] if self.store else []
        self.names = [shard.name for shard in manifest.shards]
        self.counts = [shard.samples for shard in manifest.shards]
        self.ends = np.cumsum(self.counts)  # of each shard's samples, counted over all
        self._sizes = [shard.bytes for shard in manifest.shards]
        self._summed = [shard.summed for shard in manifest.shards]
        self._mapped = manifest.places_sha256 is not None
        if manifest.places_sha256:
            self._places = read_places(beside(folder, PLACES), manifest.shards, manifest.places_sha256)
        else:
            self._places = np.concatenate([shard.places for shard in manifest.shards if shard.places is not None])
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def read(self, shard: int, sample: int) -> tuple[str, Files]:
        """Key and files of a sample; OSError, ValueError or tarfile's errors where the shard is damaged."""
        index = self.index(shard, sample)
        last = sample + 1 == self.counts[shard]
        with ExitStack() as held:
            file = self._file(shard, held)
            data = read_bytes(file.fileno(), *byte_range(self._places, index, last, self._sizes[shard]))
        if self._summed[shard] and google_crc32c.value(data) != self._places[index, 1]:
            raise OSError("its bytes differ from the manifest's checksum")
        return parse_sample(data, self.names[shard])

    def index(self, shard: int, sample: int) -> int:
        """Number of a sample, counted over all shards."""
        return int(self.ends[shard]) - self.counts[shard] + sample

    def label(self, shard: int, sample: int) -> str:
        """How messages name a sample whose key may be unreadable."""
        return f"{self.names[shard]}[{sample}]"

    def fault(self, shard: int, sample: int, error: Exception) -> str:
        """Which sample cannot be used and why, in a few words."""
        return f"{self.label(shard, sample)}: {type(error).__name__}: {str(error)[:200]}"

    def cached_gib(self, shards: int) -> float:
        """What so many of the largest shards take on this machine's disk; 0 where they lie there anyway."""
        return sum(sorted((size for _, size, _ in self._stored), reverse=True)[:shards]) / 2**30

    def fetch_ahead(self, shard: int) -> None:
        """Bring a shard of a store to this machine, unless another process is at it."""
        if self.store:
            self.store.fetch_ahead(*self._stored[shard])

    def _file(self, shard: int, held: ExitStack) -> IO[bytes]:
        """The open file of a shard; reads give their own offset, so processes may share it. One of a store is open,
        and safe from being removed, while it is `held`."""
        if self.store:
            try:
                return held.enter_context(self.store.opened(*self._stored[shard]))
            except (InputError, OSError) as error:
                raise ShardLost(str(error)) from None
        if shard not in self._open:
            self._open[shard] = open_regular(self.folder / self.names[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_places": None if self._mapped else self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._mapped:
            self._places = map_places(self.folder)
