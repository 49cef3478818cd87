"""Pictures to image shards: `KEY.webp|png|jpg` and `KEY.json` in tars, the same bytes for any number of workers.

OUT/SPLIT holds `plan.json` (options and a hash of the list of pictures) from the start, every finished shard with a
side file `SHARD.json`, and at the end `manifest.json` and `bad.json`; so an interrupted pack goes on where it stopped.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ldmlab.data.encode_pictures import Encoding, Part, encode_part, start_worker
from ldmlab.data.manifest import Manifest, ShardInfo, read_manifest, write_atomically, write_manifest
from ldmlab.data.output_folder import folder_in_use, open_plan, readable_error
from ldmlab.data.sources import Item, Source, with_fields
from ldmlab.data.splits import SplitRule, split_items, with_class_ids
from ldmlab.data.tar_samples import END_MARKER
from ldmlab.data.transforms import Transform
from ldmlab.data.workers import processors
from ldmlab.errors import InputError
from ldmlab.provenance import provenance

BAD = "bad.json"
_PART = 32  # pictures a worker takes at once
_AHEAD = 4  # parts waiting or under way for each worker
Progress = Callable[[int, int], None]  # pictures done, of how many


@dataclass(frozen=True)
class PackOptions:
    """Everything that changes the shards; kept in the plan, so that an interrupted pack goes on with the same."""

    transform: Transform = field(default_factory=Transform)
    encoding: Encoding = field(default_factory=Encoding)
    split: SplitRule = field(default_factory=SplitRule)
    class_field: str | None = None  # its sorted distinct values become class_id
    min_side: int = 0  # smaller pictures are left out, in pixels
    shard_size: int = 1000  # pictures

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise InputError(f"shard-size={self.shard_size}; give at least 1 picture a shard.")


@dataclass
class PackResult:
    """What lies in OUT now."""

    manifests: dict[str, Manifest] = field(default_factory=dict)  # by split
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: int = 0  # left out by min_side
    complete_before: bool = False  # nothing was left to do


@dataclass
class _Shard:
    """A shard and what became of it."""

    name: str
    items: list[Item]
    info: ShardInfo | None = None  # None while open, or if no picture of it could be read
    fields: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    small: list[str] = field(default_factory=list)


def pack(
    source: Source,
    out: Path,
    options: PackOptions | None = None,
    *,
    origin: str = "",
    licence: str = "",
    workers: int | None = None,  # None: all cores
    max_bad: float = 0.1,  # share of unreadable pictures above which the pack fails
    progress: Progress | None = None,
) -> PackResult:
    """Writes OUT/train and, if asked, OUT/val."""
    options = options or PackOptions()
    items, classes = list(source.items), source.classes
    if (options.split.val and options.split.fields) or options.class_field:
        items = [with_fields(item) for item in items]
    if options.class_field:
        items, classes = with_class_ids(items, options.class_field)
    splits = split_items(items, options.split)
    about = {"source": origin, "licence": licence, "classes": classes}
    try:
        with folder_in_use(out):
            return _Pack(out, options, splits, about, max_bad, progress).run(workers or processors())
    except OSError as error:
        reason = f"{readable_error(error)}; mend that, then run the same command to continue"
        raise InputError(f"OUT={out} cannot be written: {reason}.") from None
    except BrokenProcessPool:
        raise InputError(
            f"workers={workers}: a worker process was killed, perhaps out of memory; "
            "run the same command with fewer workers to continue."
        ) from None


class _Pack:
    """One run of the command over all splits."""

    def __init__(
        self,
        out: Path,
        options: PackOptions,
        splits: dict[str, list[Item]],
        about: dict[str, Any],
        max_bad: float,
        progress: Progress | None,
    ) -> None:
        self.out, self.options, self.about = out, options, about
        self.max_bad, self.progress = max_bad, progress
        self.shards = {split: _cut(split, items, options.shard_size) for split, items in splits.items()}
        self.total, self.done = sum(len(items) for items in splits.values()), 0
        self.bad: list[tuple[str, str]] = []  # name, reason

    def run(self, workers: int) -> PackResult:
        """Plans, packs what is missing, writes the manifests."""
        finished = [open_plan(self.out, split, self._plan(shards)) for split, shards in self.shards.items()]
        if all(finished):
            manifests = {split: read_manifest(self.out / split) for split in self.shards}
            return PackResult(manifests, complete_before=True)
        missing = [(split, shard) for split, shard in self._all() if not self._take_finished(split, shard)]
        self._report()
        if missing:
            self._pack_missing(missing, min(workers, -(-sum(len(s.items) for _, s in missing) // _PART)))
        self._check_bad(final=True)
        return self._finish()

    def _all(self) -> Iterator[tuple[str, _Shard]]:
        return ((split, shard) for split, shards in self.shards.items() for shard in shards)

    def _plan(self, shards: list[_Shard]) -> dict[str, Any]:
        """What must be equal for finished shards to be kept."""
        digest = hashlib.sha256()
        for shard in shards:
            for item in shard.items:
                told = [item.key, item.name, item.span, item.fields, item.fault, *sorted(item.maps)]
                digest.update(json.dumps(told).encode())
        return {"options": json.loads(json.dumps(asdict(self.options))), "pictures": digest.hexdigest()}

    def _side_file(self, split: str, shard: _Shard) -> Path:
        return self.out / split / f"{shard.name}.json"

    def _take_finished(self, split: str, shard: _Shard) -> bool:
        """Reads the side file of a shard finished by an earlier run."""
        try:
            side = json.loads(self._side_file(split, shard).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        info = ShardInfo(**side["info"]) if side["info"] else None
        path = self.out / split / shard.name
        if info is not None and not (path.is_file() and path.stat().st_size == info.bytes):
            return False
        shard.info, shard.fields, shard.small = info, side["fields"], side["small"]
        shard.bad = [(name, reason) for name, reason in side["bad"]]
        self.bad += shard.bad
        self.done += len(shard.items)
        return True

    def _pack_missing(self, missing: list[tuple[str, _Shard]], workers: int) -> None:
        """Workers encode parts of any shard, this process writes them in order."""
        o = self.options
        encode = partial(encode_part, transform=o.transform, encoding=o.encoding, min_side=o.min_side)
        chunks = (s.items[i : i + _PART] for _, s in missing for i in range(0, len(s.items), _PART))
        if workers == 1:
            parts = map(encode, chunks)
            for split, shard in missing:
                self._write(split, shard, parts)
            return
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
        try:
            ordered = _ordered(pool, encode, chunks, _AHEAD * workers)
            for split, shard in missing:
                self._write(split, shard, ordered)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, split: str, shard: _Shard, parts: Iterator[Part]) -> None:
        """One shard under a temporary name, then its rename and its side file."""
        path = self.out / split / shard.name
        temporary = path.with_name(path.name + ".tmp")
        digest, offsets, size = hashlib.sha256(), [], 0
        names: dict[str, None] = {}
        try:
            with open(temporary, "wb") as file:
                for start in range(0, len(shard.items), _PART):
                    part = next(parts)
                    offsets += [size + offset for offset in part.offsets]
                    size += file.write(part.data)
                    digest.update(part.data)
                    names.update(dict.fromkeys(part.fields))
                    shard.bad += part.bad
                    self.bad += part.bad
                    shard.small += part.small
                    self.done += min(_PART, len(shard.items) - start)
                    self._report()
                    self._check_bad(final=False)
                size += file.write(END_MARKER)
                digest.update(END_MARKER)
                file.flush()
                os.fsync(file.fileno())
            if offsets:
                os.replace(temporary, path)
                shard.info = ShardInfo(shard.name, len(offsets), size, digest.hexdigest(), offsets)
        finally:
            temporary.unlink(missing_ok=True)
        shard.fields = list(names)
        side = {name: value for name, value in asdict(replace(shard, items=[])).items() if name != "items"}
        write_atomically(self._side_file(split, shard), json.dumps(side))

    def _report(self) -> None:
        if self.progress:
            self.progress(self.done, self.total)

    def _check_bad(self, final: bool) -> None:
        """Stops as soon as the share is certain to be passed."""
        if len(self.bad) <= self.max_bad * self.total:
            return
        few = "; ".join(f"{name} {reason}" for name, reason in self.bad[:3])
        count = f"{len(self.bad)}{'' if final else ' or more'}"
        raise InputError(
            f"max-bad={self.max_bad}: {count} of {self.total} pictures cannot be read "
            f"({few}); mend them, or raise --max-bad and run the same command to continue."
        )

    def _finish(self) -> PackResult:
        result = PackResult()
        for split, shards in self.shards.items():
            if not any(shard.info for shard in shards):
                raise InputError(f"OUT={self.out}: no picture is left for the {split} split; check min-side and val.")
        for split, shards in self.shards.items():
            bad = [entry for shard in shards for entry in shard.bad]
            rows = [{"name": name, "reason": reason} for name, reason in bad]
            if rows:
                write_atomically(self.out / split / BAD, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
            result.manifests[split] = self._manifest(split, shards)
            write_manifest(self.out / split, result.manifests[split])
            for shard in shards:
                self._side_file(split, shard).unlink(missing_ok=True)
            result.bad += bad
            result.small += sum(len(shard.small) for shard in shards)
        return result

    def _manifest(self, split: str, shards: list[_Shard]) -> Manifest:
        o = self.options
        return Manifest(
            kind="images",
            split=split,
            shards=[shard.info for shard in shards if shard.info],
            fields=list(dict.fromkeys(name for shard in shards for name in shard.fields)),
            picture_size=o.transform.size if o.transform.square else None,
            transform={**o.transform.record(), **asdict(o.encoding)},
            provenance=provenance(),
            **self.about,
        )


def _ordered(
    pool: ProcessPoolExecutor, encode: Callable[[list[Item]], Part], chunks: Iterable[list[Item]], ahead: int
) -> Iterator[Part]:
    """Encoded parts in order, a bounded number of them ahead of the writer."""
    waiting: deque[Future[Part]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _cut(split: str, items: list[Item], shard_size: int) -> list[_Shard]:
    """Shards of equal size, the last one smaller."""
    starts = range(0, len(items), shard_size)
    return [_Shard(f"{split}-{n:06d}.tar", items[start : start + shard_size]) for n, start in enumerate(starts)]
