"""The manifest of tars made by others, for instance by img2dataset: each is read once, none is changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldmlab.data.decode import CAPTION, stored_fields
from ldmlab.data.manifest import Manifest, write_manifest
from ldmlab.data.output_folder import BAD, Destination
from ldmlab.data.shard_cache import ShardCache, shards_folder
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.shards import Folder, Store, manifest_of, shards_at
from ldmlab.data.tars import IMAGE_ENDINGS, image_ending, parse_sample, scan_tar
from ldmlab.data.transfers import is_address
from ldmlab.data.workers import in_order
from ldmlab.disks import disk_errors
from ldmlab.errors import InputError
from ldmlab.files import write_json
from ldmlab.open_image import open_image
from ldmlab.provenance import provenance


@dataclass
class _Seen:
    """What the samples of one tar hold."""

    info: ShardInfo | None = None
    fields: dict[str, None] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    images: int = 0
    with_caption: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # "SHARD: KEY", reason
    fault: str | None = None  # why the tar cannot be used


@dataclass(frozen=True)
class Indexed:
    """The manifest, and what the loaders will find in its samples."""

    manifest: Manifest
    folder: str  # or address, where it lies now
    bad: list[tuple[str, str]]  # samples that will be skipped: name, reason
    without_caption: int  # 0 where no sample has one


def index_tars(
    tars: Sequence[Path | str],
    *,
    split: str = "train",
    origin: str | None = None,  # None: the folder's name
    licence: str = "",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,  # tars done, of how many
) -> Indexed:
    """Writes `manifest.json` next to the tars, and `bad.json` if some samples cannot be used."""
    look, each, out = _remote(str(tars[0])) if is_address(str(tars[0])) else _local(tars)
    seen: list[_Seen] = []
    for one in in_order(look, each, min(workers, len(each))):
        seen.append(one)
        if progress:
            progress(len(seen), len(each))
    if faults := [one.fault for one in seen if one.fault]:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    sizes = set[tuple[int, int]]().union(*(one.sizes for one in seen))
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    manifest = Manifest(
        kind="images",
        split=split,
        shards=[one.info for one in seen if one.info],
        fields=list(dict.fromkeys(name for one in seen for name in one.fields)),
        image_size=width if width == height else None,
        transform={},
        source=origin or Path(out.given).resolve().name,
        licence=licence,
        provenance=provenance(),
    )
    if bad := [entry for one in seen for entry in one.bad]:
        write_json(out.folder / BAD, [{"name": name, "reason": reason} for name, reason in bad])
    write_manifest(out.folder, manifest)
    out.send(option="TARS")
    captions = sum(one.with_caption for one in seen)
    return Indexed(manifest, out.given, bad, manifest.total - captions if captions else 0)


def _local(tars: Sequence[Path | str]) -> tuple[Callable[[Any], _Seen], Sequence[Any], Destination]:
    """How a tar is looked at, the tars, and where their manifest goes."""
    paths = _paths([Path(tar) for tar in tars])
    _check_replaced(paths[0].parent)
    return _look, paths, Destination.of(str(paths[0].parent))


def _remote(address: str) -> tuple[Callable[[Any], _Seen], Sequence[Any], Destination]:
    """The same of an address or pattern."""
    store = shards_at(address, "TARS", ShardCache(shards_folder(), float("inf")))
    assert isinstance(store, Store)
    out = Destination.of(store.base, "TARS", shared=True)
    sizes = store.sizes() or {}
    if not (names := store.names or sorted(name for name in sizes if name.endswith(".tar"))):
        raise InputError(f"TARS={address}: there is no .tar file; give the address of a folder with tars.")
    if missing := [name for name in names if name not in sizes]:
        raise InputError(f"TARS={address}: {missing[0]} does not exist; correct the pattern.")
    _check_replaced(replace(store, names=None))
    return partial(_look_at, store), [(name, sizes[name]) for name in names], out


def _look_at(store: Store, tar: tuple[str, int]) -> _Seen:
    """Scans one tar of a store, which is fetched for that."""
    (name, size), place = tar, shards_folder()
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="index-", dir=place) as folder:
        try:
            store.fetch(name, path := Path(folder) / name, size)
        except InputError as error:
            return _Seen(fault=str(error))
        seen = _look(path)
        seen.fault = seen.fault and seen.fault.replace(str(path), store.url(name))
        return seen


def _check_replaced(folder: Folder) -> None:
    """Refuse a folder whose manifest `pack` or `encode` wrote: it says more than an index can find out."""
    try:
        before = manifest_of(folder)
    except InputError:  # none, or a damaged one
        return
    if before.kind != "images" or before.transform:
        raise InputError(f"{folder} has the manifest that it was written with; use it as it is, or index a copy.")


def _paths(tars: list[Path]) -> list[Path]:
    """The tars, also of folders, in one folder and sorted."""
    paths = sorted({path for tar in tars for path in (tar.glob("*.tar") if tar.is_dir() else [tar])})
    if not paths:
        raise InputError(f"TARS={' '.join(map(str, tars))}: there is no .tar file; give tars or their folder.")
    for path in paths:
        if not path.is_file():
            raise InputError(f"TARS={path} does not exist; give tars or their folder.")
    folders = sorted({str(path.parent) for path in paths})
    if len(folders) > 1:
        raise InputError(f"TARS lie in several folders ({', '.join(folders)}); index one folder at a time.")
    return paths


def _look(path: Path) -> _Seen:
    """Scans one tar; a fault comes back as its sentence."""
    seen = _Seen()

    def count(key: str, data: bytes) -> None:
        """Counts a sample in, and notes why the loaders will skip it if they will."""
        try:
            _, files = parse_sample(data, path.name)
            ending = image_ending(files)
            if ending is None:
                raise ValueError(f"no image among its files ({', '.join(sorted(files))})")
            seen.images += 1
            if ending in ("jpg", "jpeg", "png") and not files[ending][-16:].strip(b"\0"):
                raise ValueError("its image ends in zeros, as an unfinished download does")
            with open_image(files[ending]) as image:
                seen.sizes.add(image.size)
            fields = stored_fields(files)
        except Exception as error:  # whatever a decoder raises on broken bytes
            seen.bad.append((f"{path.name}: {key}", str(error) or type(error).__name__))
        else:
            seen.fields.update(dict.fromkeys(fields))
            seen.with_caption += CAPTION in fields

    try:
        seen.info, _ = scan_tar(path, count)
        if not seen.images:
            raise InputError(f"shard {path} holds no images ({', '.join(IMAGE_ENDINGS)}); leave it out.")
    except InputError as error:
        seen.fault = str(error)
    return seen
