"""A tar being written: under a temporary name until it is whole, hashed as it grows."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ldmlab.data.manifest import ShardInfo
from ldmlab.data.tar_samples import END_MARKER


class ShardFile:
    """One shard; either `finish` or `abandon` closes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by `finish` or `abandon`
        self._digest, self._bytes, self._offsets = hashlib.sha256(), 0, list[int]()

    def append(self, samples: bytes, offsets: Sequence[int] = (0,)) -> None:
        """Tar members of whole samples, and where in them each sample begins."""
        self._offsets += [self._bytes + offset for offset in offsets]
        self._write(samples)

    def finish(self) -> ShardInfo | None:
        """The shard under its own name; None, and no file, if it has no sample."""
        if not self._offsets:
            self.abandon()
            return None
        self._write(END_MARKER)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return ShardInfo(self._path.name, len(self._offsets), self._bytes, self._digest.hexdigest(), self._offsets)

    def abandon(self) -> None:
        """Leaves nothing of an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)
