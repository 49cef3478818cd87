"""What is asked of a folder of shards, and whether they can give it."""

from dataclasses import dataclass
from pathlib import Path

from ldmlab.contracts import Task
from ldmlab.data.manifest import Manifest
from ldmlab.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """What a batch shall hold beside key, position and skipped."""

    image_size: int  # side of the images, px; also of the images behind moments
    images: bool = True
    moments: bool = False
    flip: bool = False  # half of the images mirrored, drawn per (seed, epoch, key)
    fields: tuple[str, ...] = ("caption",)
    states: tuple[str, ...] = ()  # conditioners whose stored states come with the moments
    task: Task | None = None  # derives more from the image, its maps and its boxes

    @property
    def parts(self) -> frozenset[str]:
        """What the task starts from: image (as stored, not cropped) | mask | segmentation | boxes."""
        return self.task.needs if self.task else frozenset()

    @property
    def decoded_size(self) -> int | None:
        """Side of decoded images and maps; None: as stored, for the task to crop."""
        return None if "image" in self.parts else self.image_size


def check_wanted(folder: Path, manifest: Manifest, wanted: Wanted) -> None:
    """Refuse shards that cannot give what is wanted, before any work."""
    latents = manifest.latents or {}
    if manifest.total == 0:
        raise InputError(f"data={folder} holds no samples; pack some images first.")
    if wanted.moments and manifest.kind != "latents":
        raise InputError(
            f"data.latents={folder} holds {manifest.kind}, not latents; encode it with `ldmlab encode`, "
            "or leave data.latents=null to run the first stage while training."
        )
    if wanted.images and manifest.kind == "latents" and not latents.get("carries_images"):
        raise InputError(
            f"data={folder} holds latents without their images; give the image shards they were made from, "
            "or encode again so that images are carried."
        )
    if wanted.moments and "image" in wanted.parts:
        raise InputError(
            f"data.latents={folder} holds latents, but this task crops or changes images; set data.latents=null "
            "and give the first stage as from_run=RUN, so that it runs while training."
        )
    if wanted.moments and latents["image_size"] != wanted.image_size:
        raise InputError(
            f"data.image_size={wanted.image_size}, but the latents in {folder} were encoded at "
            f"{latents['image_size']}; use that size or encode again."
        )
    missing = sorted(set(wanted.states) - (latents.get("states") or {}).keys())
    if missing:
        raise InputError(
            f"data.latents={folder} holds no states of conditioner.{missing[0]}, unlike the training split; encode "
            "both splits alike, or set data.states=false to run the encoder while training."
        )
    if wanted.moments and wanted.flip and not latents["mirrored"]:
        raise InputError(
            f"data.flip=true, but the latents in {folder} were encoded without their mirror images; "
            "encode again with them, or set data.flip=false."
        )
