"""`manifest.json`: what lies in a folder of shards, written last, so that shards without one are unfinished."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # beside shards of a pack; without a manifest it marks an interrupted one
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardInfo:
    """One tar; sample i is its bytes [offsets[i], offsets[i + 1]), the last one ends at the tar's end marker."""

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: list[int]  # byte offset of each sample's first tar header

    def byte_range(self, sample: int) -> tuple[int, int]:
        """First byte and end of a sample; the last one's end takes in the end marker, which tar readers stop at."""
        end = self.offsets[sample + 1] if sample + 1 < self.samples else self.bytes
        return self.offsets[sample], end


@dataclass(frozen=True)
class Manifest:
    """A folder of shards; `latents` is None for images, the latent side's own record otherwise."""

    kind: str  # images | latents
    split: str  # train | val | ...
    shards: list[ShardInfo]
    fields: list[str]  # names in KEY.json
    picture_size: int | None  # side of the square images, None if they differ
    transform: dict[str, Any]  # size, rule, background, format, quality
    source: str
    licence: str
    provenance: dict[str, Any]
    classes: list[str] | None = None  # names by class_id
    latents: dict[str, Any] | None = None  # fingerprint, statistics, views
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def total(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def hash(self) -> str:
        """SHA-256 of the content; where and when it was made is left out."""
        content = {name: value for name, value in asdict(self).items() if name != "provenance"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of `folder`, checked for shape and version."""
    folder = Path(folder)
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(_missing(folder)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read ({error}); pack or index the folder again.") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{folder / MANIFEST} has format_version={version}, this ldmlab reads {FORMAT_VERSION}.")
    try:
        shards = [ShardInfo(**shard) for shard in content.pop("shards")]
        return Manifest(shards=shards, **content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is not a manifest of ours ({error}); pack or index again.") from None


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"data={folder} is not a folder; give a folder of shards as `ldmlab pack` writes it."
    if (folder / PLAN).exists():
        return f"data={folder} has no {MANIFEST} because its pack was interrupted; run the same `ldmlab pack` again."
    inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return f"data={folder} has no {MANIFEST}, but its folders {', '.join(inside)} have; name one of them."
    if any(folder.glob("*.tar")):
        return f"data={folder} holds shards without {MANIFEST}; write it with `ldmlab index {folder}`."
    return f"data={folder} holds neither shards nor {MANIFEST}; make them with `ldmlab pack SOURCE {folder}`."


def write_manifest(folder: Path | str, manifest: Manifest) -> None:
    """Writes by atomic rename; one line a shard, so that a person can read the rest."""
    content = {item.name: getattr(manifest, item.name) for item in fields(manifest) if item.name != "shards"}
    head = json.dumps(content, ensure_ascii=False, indent=1).removesuffix("\n}")
    shards = ",\n".join("  " + json.dumps(asdict(shard), separators=(",", ":")) for shard in manifest.shards)
    write_atomically(Path(folder) / MANIFEST, f'{head},\n "shards": [\n{shards}\n ]\n}}\n')


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_shards(folder: Path | str, manifest: Manifest, sha256: bool = False) -> None:
    """Every shard is there with the size (and, if asked, the checksum) its manifest says."""
    for shard in manifest.shards:
        path = Path(folder) / shard.name
        try:
            size = path.stat().st_size
        except OSError:
            raise InputError(
                f"shard {path} is missing although its manifest lists it; copy or pack it again."
            ) from None
        if size != shard.bytes:
            how = "shorter" if size < shard.bytes else "longer"
            raise InputError(
                f"shard {path} has {size} bytes, {how} than its manifest says ({shard.bytes}); copy or pack it again."
            )
        if sha256 and file_sha256(path) != shard.sha256:
            raise InputError(f"shard {path} has another checksum than its manifest says; copy or pack it again.")


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
