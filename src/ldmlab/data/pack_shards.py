"""Images to image shards: `KEY.webp|png|jpg` and `KEY.json` in tars, the same bytes for any number of workers.

OUT/SPLIT holds `plan.json` (options and a hash of the list of images) from the start, every finished shard with a
side file `SHARD.json`, and at the end `manifest.json` and `bad.json`. An interrupted pack continues where it stopped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ldmlab.data.image_sources import Item, Source, with_fields
from ldmlab.data.manifest import MANIFEST, PLAN, Manifest, read_complete, write_manifest
from ldmlab.data.opt_out import OptOut, with_urls_of_file
from ldmlab.data.output_folder import BAD, ShardFile, finished_shard, folder_in_use, open_plan
from ldmlab.data.pack_images import Encoding, Part, encode_part
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.splits import SplitRule, split_items, with_class_ids
from ldmlab.data.transforms import Transform
from ldmlab.data.workers import in_order, processors
from ldmlab.errors import InputError
from ldmlab.files import clear_unfinished, read_json, write_json
from ldmlab.provenance import provenance

_PART = 8  # images a worker takes at once
Progress = Callable[[int, int], None]  # images done, of how many
Encode = Callable[[list[Item]], Part]  # a part of a shard; runs in workers


@dataclass(frozen=True)
class PackOptions:
    """Settings that change the shards; kept in the plan for the continuation of an interrupted pack."""

    transform: Transform = field(default_factory=Transform)
    encoding: Encoding = field(default_factory=Encoding)
    split: SplitRule = field(default_factory=SplitRule)
    class_field: str | None = None  # its sorted distinct values become class_id
    min_side: int = 0  # smaller images are left out, in pixels
    shard_size: int = 1000  # images
    exclude: OptOut | None = None  # images that are left out by a list

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise InputError(f"shard-size={self.shard_size}; give at least 1 image a shard.")


@dataclass
class _Shard:
    """A shard and what became of it."""

    path: Path
    items: list[Item]
    info: ShardInfo | None = None  # None while open, or if no image of it could be read
    fields: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: list[str] = field(default_factory=list)  # names of images below the least side
    excluded: list[str] = field(default_factory=list)  # how each image of the opt-out list was found

    @property
    def side_file(self) -> Path:
        """Beside the shard, written after it, until the manifest is written."""
        return self.path.with_name(f"{self.path.name}.json")

    def take(self, side: dict[str, Any]) -> bool:
        """What an earlier run found."""
        self.info, self.fields, self.small = side["info"], side["fields"], side["small"]
        self.excluded = side.get("excluded", [])
        self.bad = [(name, reason) for name, reason in side["bad"]]
        return True


@dataclass
class PackResult:
    """What lies in OUT now."""

    manifests: dict[str, Manifest] = field(default_factory=dict)  # by split
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: int = 0  # left out by min_side
    excluded: Counter[str] = field(default_factory=Counter)  # left out by the opt-out list: how they were found
    complete_before: bool = False  # nothing was left to do


def pack(
    source: Source,
    out: Path,
    options: PackOptions | None = None,
    *,
    origin: str = "",
    licence: str = "",
    workers: int | None = None,  # None: all cores
    max_bad: float = 0.1,  # share of unreadable images above which the pack fails
    progress: Progress | None = None,
    encode: Encode | None = None,  # for items that are no files, such as generated scenes; None: read and transform
) -> PackResult:
    """Writes OUT/train and, with `split.val`, OUT/val."""
    options = options or PackOptions()
    items, classes = list(source.items), source.classes
    if (options.split.val and options.split.fields) or options.class_field:
        items = [with_fields(item) for item in items]
    if options.class_field:
        items, classes = with_class_ids(items, options.class_field)
    if options.exclude is not None:
        items = with_urls_of_file(items)
    splits = split_items(items, options.split)
    about = {"source": origin, "licence": licence, "classes": classes}
    work = _Pack(out, options, splits, about, max_bad, progress)
    work.check_faults()
    try:
        with folder_in_use(out):
            return work.run(encode, workers or processors())
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InputError(
            f"OUT={out} cannot be written: {why}; fix that and run the same command to continue."
        ) from None
    except BrokenProcessPool:
        raise InputError(
            f"workers={workers}: a worker process was killed, perhaps out of memory; "
            "run the same command with fewer workers to continue."
        ) from None


def _published(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without what is nobody's business: of an opt-out list, the folder in which it lies on this machine."""
    options = plan.get("options")
    if not isinstance(options, dict) or "exclude" not in options:
        return plan
    listed = options["exclude"]
    named = {"exclude": {**listed, "path": Path(str(listed.get("path"))).name}} if isinstance(listed, dict) else {}
    return {**plan, "options": {key: value for key, value in options.items() if key != "exclude"} | named}


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
        self.shards: dict[str, list[_Shard]] = {}
        size = options.shard_size
        for split, items in splits.items():
            parts = [items[start : start + size] for start in range(0, len(items), size)]
            self.shards[split] = [_Shard(out / split / f"{split}-{n:06d}.tar", part) for n, part in enumerate(parts)]
        self.total, self.done = sum(map(len, splits.values())), 0
        self.bad: list[tuple[str, str]] = []  # name, reason

    def check_faults(self) -> None:
        """Refuses what is known before an image is read, so that nothing is written for it."""
        items = chain.from_iterable(shard.items for shard in chain.from_iterable(self.shards.values()))
        self._check_bad([(item.name, item.fault) for item in items if item.fault], final=True)

    def run(self, encode: Encode | None, workers: int) -> PackResult:
        """Plans, packs what is missing, writes the manifests."""
        finished = [self._open(split, shards) for split, shards in self.shards.items()]
        if all(finished):
            manifests = {split: read_complete(self.out / split) for split in self.shards}
            return PackResult(manifests, complete_before=True)
        missing = []
        self._count(0, [])
        for shard in chain.from_iterable(self.shards.values()):
            if finished_shard(shard.side_file, shard.path, shard.take):
                self._count(len(shard.items), shard.bad)
            else:
                missing.append(shard)
        chunks = [shard.items[i : i + _PART] for shard in missing for i in range(0, len(shard.items), _PART)]
        if chunks:
            o = self.options
            how: dict[str, Any] = {
                "transform": o.transform,
                "encoding": o.encoding,
                "min_side": o.min_side,
                "exclude": o.exclude,
            }
            encode = encode or partial(encode_part, **how)
            with closing(in_order(encode, chunks, min(workers, len(chunks)))) as parts:
                for shard in missing:
                    self._write(shard, parts)
        self._check_bad(self.bad, final=True)
        return self._finish()

    def _open(self, split: str, shards: list[_Shard]) -> bool:
        """Stores the plan of a split or compares it with the one there; True if the split is complete."""
        folder = self.out / split
        folder.mkdir(exist_ok=True)
        done = (folder / MANIFEST).exists()
        if done and not (folder / PLAN).exists():
            raise InputError(
                f"OUT={self.out} already holds a {split} split made with other options; choose a new folder."
            )
        digest = hashlib.sha256()
        for item in chain.from_iterable(shard.items for shard in shards):
            known = [item.key, item.name, item.span, item.fields, item.fault, *sorted(item.maps)]
            known += [] if item.caption is None else [{"caption": item.caption}]
            digest.update(json.dumps(known).encode())
        plan = _published({"options": json.loads(json.dumps(asdict(self.options))), "images": digest.hexdigest()})
        before = read_json(folder / PLAN)
        if isinstance(before, dict) and before != plan and _published(before) == plan:
            write_json(folder / PLAN, plan)  # of a version that kept the whole path of the list
        same_options = isinstance(before, dict) and before.get("options") == plan["options"]
        special = {"images": "other images or captions in SOURCE"} if same_options else None
        open_plan(folder / PLAN, plan, f"OUT={self.out}", special)
        return done

    def _write(self, shard: _Shard, parts: Iterator[Part]) -> None:
        """One shard, then its side file."""
        names: dict[str, None] = {}
        file = ShardFile(shard.path)
        try:
            for start in range(0, len(shard.items), _PART):
                part = next(parts)
                file.append(part.data, part.offsets)
                names.update(dict.fromkeys(part.fields))
                shard.bad += part.bad
                shard.small += part.small
                shard.excluded += part.excluded
                self._count(min(_PART, len(shard.items) - start), part.bad)
                self._check_bad(self.bad, final=False)
            shard.info = file.finish()
        finally:
            file.abandon()
        shard.fields = list(names)
        found = {"fields": shard.fields, "bad": shard.bad, "small": shard.small, "excluded": shard.excluded}
        write_json(shard.side_file, {"info": shard.info.plain if shard.info else None, **found})

    def _count(self, images: int, bad: list[tuple[str, str]]) -> None:
        self.done += images
        self.bad += bad
        if self.progress:
            self.progress(self.done, self.total)

    def _check_bad(self, bad: list[tuple[str, str]], final: bool) -> None:
        """Stops as soon as the share is certain to be passed."""
        if len(bad) <= self.max_bad * self.total:
            return
        few = "; ".join(f"{name} {reason}" for name, reason in bad[:3])
        count = f"{len(bad)}{'' if final else ' or more'}"
        raise InputError(
            f"max-bad={self.max_bad}: {count} of {self.total} images cannot be used "
            f"({few}); fix them, or raise --max-bad and run the same command to continue."
        )

    def _clear(self) -> None:
        """Nothing stays of splits that cannot be finished with these options: others are refused beside them."""
        for split, shards in self.shards.items():
            folder = self.out / split
            if (folder / MANIFEST).exists():
                continue
            ours = [folder / PLAN, folder / BAD, *(path for shard in shards for path in (shard.path, shard.side_file))]
            for path in (*ours, *folder.glob("*.tmp")):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # unless it holds something else

    def _finish(self) -> PackResult:
        result, o = PackResult(), self.options
        for split, shards in self.shards.items():
            if not any(shard.info for shard in shards):
                self._clear()
                raise InputError(
                    f"OUT={self.out}: no image is left for the {split} split; check min-side, val and exclude."
                )
        for split, shards in self.shards.items():
            folder = self.out / split
            if bad := [entry for shard in shards for entry in shard.bad]:
                write_json(folder / BAD, [{"name": name, "reason": reason} for name, reason in bad])
            ways = Counter(way for shard in shards for way in shard.excluded)
            result.excluded += ways
            result.manifests[split] = Manifest(
                kind="images",
                split=split,
                shards=[shard.info for shard in shards if shard.info],
                fields=list(dict.fromkeys(name for shard in shards for name in shard.fields)),
                image_size=o.transform.size if o.transform.square else None,
                transform={**asdict(o.transform), "background": [*o.transform.background], **asdict(o.encoding)},
                provenance=provenance(),
                extra={"opt_out": o.exclude.record(ways)} if o.exclude else {},
                **self.about,
            )
            write_manifest(folder, result.manifests[split])
            for leftover in (*(shard.side_file for shard in shards), *folder.glob("*.tmp")):  # also of killed processes
                leftover.unlink(missing_ok=True)
            clear_unfinished(folder)
            result.bad += bad
            result.small += sum(len(shard.small) for shard in shards)
        return result
