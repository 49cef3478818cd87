"""The manifest of tars made by others, for instance by img2dataset: each is read once, none is changed."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldmlab.data.manifest import Manifest, ShardInfo, write_manifest
from ldmlab.data.output_folder import readable_error
from ldmlab.data.shards import IMAGE_ENDINGS, scan_tar
from ldmlab.data.workers import in_order
from ldmlab.errors import InputError
from ldmlab.provenance import provenance


@dataclass
class _Seen:
    """What the samples of one tar hold."""

    info: ShardInfo | None = None
    fields: dict[str, None] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    images: int = 0
    fault: str | None = None  # why the tar cannot be used


def index(
    tars: list[Path],
    *,
    split: str = "train",
    origin: str = "",
    licence: str = "",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,  # tars done, of how many
) -> Manifest:
    """Writes `manifest.json` beside the tars."""
    paths = _paths(tars)
    seen: list[_Seen] = []
    for one in in_order(_look, paths, min(workers, len(paths))):
        seen.append(one)
        if progress:
            progress(len(seen), len(paths))
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
        picture_size=width if width == height else None,
        transform={},
        source=origin,
        licence=licence,
        provenance=provenance(),
    )
    try:
        write_manifest(paths[0].parent, manifest)
    except OSError as error:
        raise InputError(f"TARS={paths[0].parent}: the manifest cannot be written ({readable_error(error)}).") from None
    return manifest


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

    def visit(key: str, ending: str, content: bytes) -> None:
        if ending in IMAGE_ENDINGS:
            seen.images += 1
            try:
                seen.sizes.add(Image.open(io.BytesIO(content)).size)
            except Exception:  # a broken image is the loader's to skip and count
                seen.sizes.add((0, 0))
        elif ending == "json" and not seen.fields:
            fields = json.loads(content)
            seen.fields.update(dict.fromkeys(fields if isinstance(fields, dict) else {}))
        elif ending in ("txt", "cls"):
            seen.fields.setdefault("caption" if ending == "txt" else "class_id")

    try:
        scan = scan_tar(path, visit)
        if not seen.images:
            raise InputError(f"shard {path} holds no images ({', '.join(IMAGE_ENDINGS)}); leave it out.")
        seen.info = ShardInfo(path.name, len(scan.keys), scan.bytes, scan.sha256, scan.offsets)
    except InputError as error:
        seen.fault = str(error)
    except ValueError as error:
        seen.fault = f"shard {path} holds a .json that is none ({error}); mend it or leave it out."
    return seen
