"""What is known of a shard that is being packed, and the side file that tells a later run it is finished."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ldmlab.data.manifest import ShardInfo, write_atomically
from ldmlab.data.sources import Item


@dataclass
class PackedShard:
    """A shard and what became of it."""

    name: str
    items: list[Item]
    info: ShardInfo | None = None  # None while open, or if no image of it could be read
    fields: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: list[str] = field(default_factory=list)  # names of images below the least side

    def side_file(self, folder: Path) -> Path:
        """Beside the shard until the manifest is written."""
        return folder / f"{self.name}.json"

    def save(self, folder: Path) -> None:
        """Written last, so that a shard with this file is whole."""
        side = {name: value for name, value in asdict(replace(self, items=[])).items() if name != "items"}
        write_atomically(self.side_file(folder), json.dumps(side))

    def take_finished(self, folder: Path) -> bool:
        """Whether an earlier run finished the shard; then what it found is taken over."""
        try:
            side = json.loads(self.side_file(folder).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        info = ShardInfo(**side["info"]) if side["info"] else None
        path = folder / self.name
        if info is not None and not (path.is_file() and path.stat().st_size == info.bytes):
            return False
        self.info, self.fields, self.small = info, side["fields"], side["small"]
        self.bad = [(name, reason) for name, reason in side["bad"]]
        return True


def cut_shards(split: str, items: list[Item], shard_size: int) -> list[PackedShard]:
    """Shards of equal size, the last one smaller."""
    starts = range(0, len(items), shard_size)
    return [PackedShard(f"{split}-{n:06d}.tar", items[start : start + shard_size]) for n, start in enumerate(starts)]
