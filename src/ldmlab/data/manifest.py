"""`manifest.json`: what lies in a folder of shards, written last, so that shards without one are unfinished."""

import hashlib
import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldmlab import format1
from ldmlab.argument_types import check_type, check_types
from ldmlab.data.shard_info import ShardInfo, is_count, is_sha256, places_sha256, read_places, write_places
from ldmlab.disks import open_regular
from ldmlab.errors import LARGEST_SIDE, InputError
from ldmlab.files import file_sha256, write_text

FORMAT_VERSION = 3  # 1: without checksums of samples; 2: places of samples in the JSON
MANIFEST = "manifest.json"
PLAN = "plan.json"  # next to shards of a pack; without a manifest it marks an interrupted one
ENCODE_PLAN = "encode.json"  # the same of an encode: the settings that made the latents
_LATENTS = {"fingerprint": str, "mirrored": bool, "has_logvar": bool, "statistics": dict}
_STATISTICS = {"mean": list[float], "std": list[float], "overall_mean": float, "overall_std": float}


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
    places_sha256: str | None = field(default=None, compare=False, repr=False)  # of the file of places, as it was read
    hash_as_read: str | None = field(default=None, compare=False, repr=False)  # of a file of format 1

    @property
    def total(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def remedy(self) -> str:
        """What is done about damaged shards of which there is no copy."""
        return "pack the images again" if self.kind == "images" else "encode the images again into a new folder"

    @property
    def hash(self) -> str:
        """SHA-256 of the content but its provenance; of formats 1 and 2 that of format 1, which checkpoints hold."""
        if self.hash_as_read:
            return self.hash_as_read
        if self.format_version == 2:
            return format1.manifest_hash({**_content(self), "shards": [shard.plain for shard in self.shards]})
        content = {**_content(self), "places_sha256": self.places_sha256 or places_sha256(self.shards)}
        del content["provenance"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour to lay under transparent pixels of tars made by others."""
        red, green, blue = self.transform.get("background") or (255, 255, 255)
        return red, green, blue


def _content(manifest: Manifest) -> dict[str, Any]:
    """The manifest's own values; of each shard what stands in format 3."""
    content = {name: value for name, value in vars(manifest).items() if name not in ("hash_as_read", "places_sha256")}
    return {**content, "shards": [shard.row for shard in manifest.shards]}


def read_manifest(folder: Path | str, option: str = "data") -> Manifest:
    """The manifest of `folder`, checked for shape, version and against itself; `option`: its name in messages."""
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
    if version not in (1, 2, FORMAT_VERSION) or isinstance(version, bool):
        raise InputError(
            f"{path} has format_version={str(version)[:40]}, this ldmlab reads 1 to {FORMAT_VERSION}; "
            "pack or index the folder again, or use the ldmlab that wrote it."
        )
    try:
        hash_as_read = format1.manifest_hash(content) if version == 1 else None
        content = format1.manifest(content) if version == 1 else content
        check_type(content.get("shards"), list[dict[str, Any]], "shards")
        listed = ShardInfo.from_row if version == FORMAT_VERSION else ShardInfo.from_plain
        shards = [listed(shard) for shard in content.pop("shards")]
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError("it lists a shard twice")
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # no halves of characters, which no file can hold
        manifest = Manifest(shards=shards, **content, hash_as_read=hash_as_read)
        _check(manifest)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error)[:200]
        raise InputError(f"{path} is not a manifest of ours ({reason}); pack or index again.") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Types and ranges of everything that is read from a manifest."""
    check_types(Manifest, vars(manifest), "")
    if is_sha256(manifest.places_sha256) != (manifest.format_version == FORMAT_VERSION):
        raise ValueError(f"places_sha256={str(manifest.places_sha256)[:80]} is not that of format 3")
    if manifest.image_size is not None and not is_count(manifest.image_size, 1, LARGEST_SIDE):
        raise ValueError(f"image_size={manifest.image_size!r:.40} is no side of an image in pixels")
    colour = manifest.transform.get("background")
    check_type(colour, tuple[int, int, int] | None, "transform.background")
    if colour is not None and not all(0 <= part <= 255 for part in colour):
        raise ValueError(f"transform.background={colour!r:.40} is no colour of three numbers 0 .. 255")
    if manifest.latents is not None or manifest.kind == "latents":
        _check_latents(manifest.latents)


def statistics_digest(statistics: dict[str, Any]) -> str:
    """SHA-256 of latents' statistics, which nothing else in a folder could contradict."""
    return hashlib.sha256(json.dumps(statistics, sort_keys=True).encode()).hexdigest()


def _check_latents(latents: Any) -> None:
    check_type(latents, dict, "latents")
    check_type(latents["statistics"], dict, "latents.statistics")
    if latents.get("statistics_sha256", digest := statistics_digest(latents["statistics"])) != digest:  # absent: older
        raise ValueError("latents.statistics is not what was written: its statistics_sha256 differs")
    for name, annotation in _LATENTS.items():
        check_type(latents[name], annotation, f"latents.{name}")
    for name in ("latent_channels", "downsampling", "image_size"):
        if not is_count(latents[name], 1, LARGEST_SIDE):
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
    """Writes the places of the samples, then the manifest, both by atomic rename; one line a shard for a reader."""
    sums = {"format_version": FORMAT_VERSION, "places_sha256": places_sha256(manifest.shards)}
    content = _content(manifest) | sums
    write_places(Path(folder), manifest.shards)
    shards = ",\n".join("  " + json.dumps(shard, separators=(",", ":")) for shard in content.pop("shards"))
    head = json.dumps(content, ensure_ascii=False, indent=1).removesuffix("\n}")
    write_text(Path(folder) / MANIFEST, f'{head},\n "shards": [\n{shards}\n ]\n}}\n')


def check_shards(folder: Path | str, manifest: Manifest, sha256: bool = False) -> None:
    """Every shard is there with the size (and, with `sha256`, the checksum) its manifest records."""
    for shard in manifest.shards:
        if fault := _fault(Path(folder) / shard.name, shard, sha256):
            raise InputError(f"shard {Path(folder) / shard.name} {fault}; copy it again, or {manifest.remedy}.")


def read_complete(folder: Path, sha256: bool = False) -> Manifest:
    """The manifest of a folder that an earlier command finished; InputError where it was damaged since."""
    manifest = read_manifest(folder)
    try:
        check_shards(folder, manifest, sha256)
        if manifest.places_sha256:
            read_places(folder, manifest.shards, manifest.places_sha256)
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(
            f"OUT={folder} was complete and is damaged: {reason}; copy that file again, or delete the folder and run "
            "the same command again."
        ) from None
    return manifest


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
