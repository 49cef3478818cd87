"""The folder latents are encoded to: what it was begun with, which shards are finished, and the manifest at the end."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldmlab.data.latent_shards import ENCODE_PLAN, FinishedShard, Statistics
from ldmlab.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from ldmlab.errors import InputError
from ldmlab.provenance import provenance

FINISHED = ".encoded"  # one file per finished shard
_PLAN_TEMPORARY = "encode.tmp"


@dataclass(frozen=True)
class LatentSettings:
    """What makes latents what they are; two folders with equal settings and source are interchangeable."""

    fingerprint: str  # hash of the first stage's weights
    latent_channels: int
    downsampling: int
    image_size: int  # px; images of another size are resized while reading
    mirrored: bool = True  # also encode the mirror image
    dtype: str = "float16"  # float16 | float32
    carries_images: bool = False  # keep the image beside its moments
    first_stage: dict[str, Any] | None = None  # how to build it, plain types
    states: dict[str, Any] | None = None  # by conditioner: what made the states stored beside the moments, plain types

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise InputError(f"encode.dtype={self.dtype} is not a format of latents; choose float16 or float32.")
        if self.image_size % self.downsampling:
            raise InputError(
                f"data.image_size={self.image_size} is not divisible by the first stage's downsampling "
                f"{self.downsampling}; choose a multiple of it."
            )

    @property
    def told(self) -> tuple[str, ...]:
        """Fields of KEY.json that the stored states are made from."""
        reads = {field for made in (self.states or {}).values() for field in made["reads"]}
        return tuple(sorted(reads - {"reference"}))  # that is the image itself


def open_plan(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` ours, or refuse what other settings began; every process may come first."""
    plan = json.loads(json.dumps(plan))  # tuples as lists, as they come back from the file
    ours = {FINISHED, ENCODE_PLAN, _PLAN_TEMPORARY}  # another process may be just as far
    if out.exists() and not (out / ENCODE_PLAN).exists() and {path.name for path in out.iterdir()} - ours:
        raise InputError(f"OUT={out} holds something else than latents; choose a new folder.")
    (out / FINISHED).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        path = out / ENCODE_PLAN
        if not path.exists():
            temporary = out / _PLAN_TEMPORARY
            temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
            os.replace(temporary, path)
        before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("fingerprint") != plan["fingerprint"]:
        raise InputError(f"OUT={out} holds latents of another first stage; choose a new folder.")
    differing = [name for name in plan if before.get(name) != plan[name]]
    if differing:
        values = ", ".join(f"{name}={before.get(name)} there, {plan[name]} now" for name in differing)
        raise InputError(f"OUT={out} was begun with other settings ({values}); use the same or choose a new folder.")


def side_file(out: Path, name: str) -> Path:
    """What is known of the finished shard `name`."""
    return out / FINISHED / f"{name}.json"


def finished_shard(out: Path, manifest: Manifest, shard: int) -> FinishedShard | None:
    """What is known of a finished shard; None where it is still to do."""
    name = manifest.shards[shard].name
    known = FinishedShard.load(side_file(out, name))
    if known and known.info and (not (out / name).exists() or (out / name).stat().st_size != known.info.bytes):
        return None
    return known


def complete(out: Path, source: Manifest, settings: LatentSettings, max_bad: float) -> Manifest | None:
    """Write the manifest if all shards of all processes are finished."""
    shards = [finished_shard(out, source, shard) for shard in range(len(source.shards))]
    done = [shard for shard in shards if shard is not None]
    if len(done) < len(shards):
        return None
    skipped = [reason for shard in done for reason in shard.skipped]
    if len(skipped) > max_bad * source.total:
        raise InputError(
            f"encode: {len(skipped)} of {source.total} images cannot be read ({skipped[0]}), more than the allowed "
            f"share of {max_bad:g}; repair the shards, or allow a larger share and run the same command again."
        )
    with _locked(out):
        if not (out / MANIFEST).exists():
            write_manifest(out, _manifest(source, settings, done, skipped))
            for leftover in out.glob("*.tmp"):  # of killed processes
                leftover.unlink(missing_ok=True)
    return read_manifest(out)


def _manifest(source: Manifest, settings: LatentSettings, done: list[FinishedShard], skipped: list[str]) -> Manifest:
    statistics = Statistics()
    for shard in done:
        statistics.add(shard.statistics)
    moment_channels = max(shard.moment_channels for shard in done)
    return Manifest(
        kind="latents",
        split=source.split,
        shards=[shard.info for shard in done if shard.info],
        fields=source.fields,
        picture_size=source.picture_size if settings.carries_images else settings.image_size,
        transform=source.transform,
        source=source.source,
        licence=source.licence,
        provenance=provenance(),
        classes=source.classes,
        latents={
            **asdict(settings),
            "has_logvar": moment_channels > settings.latent_channels,
            "statistics": statistics.summary(),
            "source_hash": source.hash,
        },
        extra={**source.extra, "skipped": skipped},
    )


class _locked:
    """One process at a time; the system frees the lock of a killed one."""

    def __init__(self, out: Path) -> None:
        self._path = out / FINISHED / "lock"

    def __enter__(self) -> None:
        self._lock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
