"""`manifest.json`: what lies in a folder of shards, written last, so that shards without one are unfinished."""

import hashlib
import json
import re
import stat
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ldmlab import format1
from ldmlab.argument_types import check_type, check_types
from ldmlab.errors import LARGEST_SIDE, InputError
from ldmlab.files import open_regular, write_text

FORMAT_VERSION = 2  # 1: without checksums of samples
MANIFEST = "manifest.json"
PLAN = "plan.json"  # next to shards of a pack; without a manifest it marks an interrupted one
ENCODE_PLAN = "encode.json"  # the same of an encode: the settings that made the latents
TAR_BLOCK = 512  # headers and contents are padded to this
# no half characters but those of other encodings
_SHARD_NAME = re.compile("[^/\\\\\0\ud800-\udc7f\udd00-\udfff]{1,200}")
_LATENTS = {"fingerprint": str, "mirrored": bool, "has_logvar": bool, "statistics": dict}
_STATISTICS = {"mean": list[float], "std": list[float], "overall_mean": float, "overall_std": float}


@dataclass(frozen=True)
class ShardInfo:
    """One tar; sample i is its bytes [offsets[i], offsets[i + 1]), the last one ends at the tar's end marker."""

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: list[int]  # byte offset of each sample's first tar header
    crc32c: str = ""  # 8 hexadecimal digits a sample, of its bytes; empty in format 1

    def byte_range(self, sample: int) -> tuple[int, int]:
        """First byte and end of a sample; the last one's end takes in the end marker, which tar readers stop at."""
        end = self.offsets[sample + 1] if sample + 1 < self.samples else self.bytes
        return self.offsets[sample], end


@dataclass(frozen=True)
class Manifest:
    """A folder of shards; `latents` is None for images, the latent side's own record otherwise."""

    kind: Literal["images", "latents"]
    split: str  # train | val | ...
    shards: list[ShardInfo]
    fields: list[str]  # names in KEY.json
    image_size: int | None  # side of the square images, None if they differ
    transform: dict[str, Any]  # size, rule, background, format, quality
    source: str
    licence: str
    provenance: dict[str, Any]
    classes: list[str] | None = None  # names by class_id
    latents: dict[str, Any] | None = None  # fingerprint, statistics, views
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    hash_as_read: str | None = field(default=None, compare=False, repr=False)  # of a file of format 1

    @property
    def total(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def hash(self) -> str:
        """SHA-256 of the content but its provenance, as of format 1: the same with and without sums of samples."""
        return self.hash_as_read or format1.manifest_hash(_content(self))

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour to lay under transparent pixels of tars made by others."""
        red, green, blue = self.transform.get("background") or (255, 255, 255)
        return red, green, blue


def _content(manifest: Manifest) -> dict[str, Any]:
    """As it is written, shards included."""
    content = {name: value for name, value in vars(manifest).items() if name != "hash_as_read"}
    return {**content, "shards": [vars(shard) for shard in manifest.shards]}


def read_manifest(folder: Path | str, option: str = "data") -> Manifest:
    """The manifest of `folder`, checked for shape, version and against itself; `option`: its name in messages."""
    refuse_address(str(folder), option)
    path = Path(folder) / MANIFEST
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(_missing(str(folder), option)) from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a manifest; pack or index the folder again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); pack or index the folder again.") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise InputError(
            f"{path} has format_version={str(version)[:40]}, this ldmlab reads 1 and {FORMAT_VERSION}; "
            "pack or index the folder again, or use the ldmlab that wrote it."
        )
    try:
        hash_as_read = format1.manifest_hash(content) if version == 1 else None
        content = format1.manifest(content) if version == 1 else content
        check_type(content.get("shards"), list[dict[str, Any]], "shards")
        shards = [_checked_shard(shard) for shard in content.pop("shards")]
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError("it lists a shard twice")
        manifest = Manifest(shards=shards, **content, hash_as_read=hash_as_read)
        _check(manifest)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error)[:200]
        raise InputError(f"{path} is not a manifest of ours ({reason}); pack or index again.") from None
    return manifest


def _is_count(value: Any, least: int = 0, most: int = 1 << 62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _checked_shard(shard: dict[str, Any]) -> ShardInfo:
    info = ShardInfo(**shard)
    if not isinstance(info.name, str) or not _SHARD_NAME.fullmatch(info.name) or info.name in (".", ".."):
        raise ValueError(f"shard {str(info.name)[:80]!r} has no name of a file in its folder")
    if not _is_count(info.samples, 1) or not _is_count(info.bytes, 1):
        raise ValueError(f"shard {info.name} has samples={info.samples!r:.40} and bytes={info.bytes!r:.40}")
    offsets = info.offsets
    if not isinstance(offsets, list) or not all(isinstance(offset, int) for offset in offsets):
        raise ValueError(f"offsets of shard {info.name} is no list of whole numbers")
    if len(offsets) != info.samples:
        raise ValueError(f"shard {info.name} has samples={info.samples} and {len(offsets)} offsets")
    if any(offset % TAR_BLOCK for offset in offsets):
        raise ValueError(f"an offset of shard {info.name} is no multiple of {TAR_BLOCK}, where headers of tars begin")
    if offsets[0] < 0 or not all(a < b for a, b in pairwise([*offsets, info.bytes])):
        raise ValueError(f"the offsets of shard {info.name} do not rise from 0 to its {info.bytes} bytes")
    if not isinstance(info.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", info.sha256):
        raise ValueError(f"shard {info.name} has no SHA-256")
    sums = info.crc32c
    if not isinstance(sums, str) or len(sums) not in (0, 8 * info.samples) or not re.fullmatch("[0-9a-f]*", sums):
        raise ValueError(f"shard {info.name} does not have one CRC32C per sample")
    return info


def _check(manifest: Manifest) -> None:
    """Types and ranges of everything that is read from a manifest."""
    check_types(Manifest, vars(manifest), "")
    if manifest.image_size is not None and not _is_count(manifest.image_size, 1, LARGEST_SIDE):
        raise ValueError(f"image_size={manifest.image_size!r:.40} is no side of an image in pixels")
    colour = manifest.transform.get("background")
    check_type(colour, tuple[int, int, int] | None, "transform.background")
    if colour is not None and not all(0 <= part <= 255 for part in colour):
        raise ValueError(f"transform.background={colour!r:.40} is no colour of three numbers 0 .. 255")
    if manifest.latents is not None or manifest.kind == "latents":
        _check_latents(manifest.latents)


def _check_latents(latents: Any) -> None:
    check_type(latents, dict, "latents")
    for name, annotation in _LATENTS.items():
        check_type(latents[name], annotation, f"latents.{name}")
    for name in ("latent_channels", "downsampling", "image_size"):
        if not _is_count(latents[name], 1, LARGEST_SIDE):
            raise ValueError(f"latents.{name}={latents[name]!r:.40} is no whole number in 1 .. {LARGEST_SIDE}")
    for name, annotation in _STATISTICS.items():
        value = latents["statistics"][name]
        check_type(value, annotation, f"latents.statistics.{name}")
        if value == []:
            raise ValueError(f"latents.statistics.{name} is empty")
    states = latents.get("states")
    check_type(states, dict[str, dict[str, Any]] | None, "latents.states")
    for name, made in (states or {}).items():
        check_type(made["reads"], list[str], f"latents.states.{name}.reads")


def refuse_address(folder: str, option: str) -> None:
    """InputError for s3:// and the like."""
    if "://" in folder:
        raise InputError(
            f"{option}={folder} is an address; ldmlab reads shards from folders: copy them to a disk or mount the "
            "store."
        )


def _missing(folder: str, option: str) -> str:
    named = f"{option}={folder}"
    where = Path(folder)
    if not where.is_dir():
        return f"{named} is not a folder; give a folder of shards as `ldmlab pack` writes it."
    if (where / ENCODE_PLAN).exists():
        return f"{named} is an unfinished encode; run the same `ldmlab encode` again to finish it."
    if (where / PLAN).exists():
        return f"{named} has no {MANIFEST} because its pack was interrupted; run the same `ldmlab pack` again."
    inside = sorted(path.parent.name for path in where.glob(f"*/{MANIFEST}"))
    if inside:
        return f"{named} has no {MANIFEST}, but its folders {', '.join(inside)} have; name one of them."
    if any(where.glob("*.tar")):
        return f"{named} holds shards without {MANIFEST}; write it with `ldmlab index {folder}`."
    return f"{named} holds neither shards nor {MANIFEST}; make them with `ldmlab pack SOURCE {folder}`."


def write_manifest(folder: Path | str, manifest: Manifest) -> None:
    """Writes by atomic rename; one line a shard, so that a person can read the rest."""
    content = _content(manifest)
    shards = ",\n".join("  " + json.dumps(shard, separators=(",", ":")) for shard in content.pop("shards"))
    head = json.dumps(content, ensure_ascii=False, indent=1).removesuffix("\n}")
    write_text(Path(folder) / MANIFEST, f'{head},\n "shards": [\n{shards}\n ]\n}}\n')


def check_shards(folder: Path | str, manifest: Manifest, sha256: bool = False) -> None:
    """Every shard is there with the size (and, with `sha256`, the checksum) its manifest records."""
    for shard in manifest.shards:
        if fault := _fault(Path(folder) / shard.name, shard, sha256):
            raise InputError(f"shard {Path(folder) / shard.name} {fault}; copy or pack it again.")


def _fault(path: Path, shard: ShardInfo, sha256: bool) -> str | None:
    try:
        found = path.stat()
    except OSError:
        return "is missing although its manifest lists it"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size != shard.bytes:
        how = "shorter" if found.st_size < shard.bytes else "longer"
        return f"has {found.st_size} bytes, {how} than its manifest records ({shard.bytes})"
    if sha256 and file_sha256(path) != shard.sha256:
        return "has another checksum than its manifest records"
    return None


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
