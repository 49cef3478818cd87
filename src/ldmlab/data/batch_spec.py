"""What the batches of a run hold, and whether a folder of shards can serve it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldmlab.contracts import Task
from ldmlab.data.manifest import Manifest
from ldmlab.errors import InputError
from ldmlab.stored_names import maker_of


@dataclass(frozen=True)
class BatchSpec:
    """Entries of a batch besides key, position and skipped."""

    image_size: int  # side of the images, px; also of the images behind moments
    images: bool = True
    moments: bool = False
    flip: bool = False  # half of the images mirrored, by (seed, epoch, key)
    fields: tuple[str, ...] = ("caption",)
    states: tuple[str, ...] = ()  # conditioners whose stored states come with the moments
    task: Task | None = None  # derives more from the image, its maps and its boxes
    classes: int | None = None  # bound of class_id; None: the classes that the manifest names, if any
    tokenizers: Mapping[str, Any] = field(default_factory=dict)  # of `caption`, by conditioner

    @property
    def parts(self) -> frozenset[str]:
        """What the task starts from: image (as stored, not cropped) | mask | segmentation | boxes."""
        return self.task.needs if self.task else frozenset()

    @property
    def decoded_size(self) -> int | None:
        """Side of decoded images and maps; None: as stored, for the task to crop."""
        return None if "image" in self.parts else self.image_size


def check_spec(named: str, manifest: Manifest, spec: BatchSpec) -> None:
    """Refuse shards that cannot serve `spec`, before any work; named: "OPTION=FOLDER"."""
    latents = manifest.latents or {}
    if manifest.total == 0:
        raise InputError(f"{named} holds no samples; pack some images first.")
    if spec.moments and manifest.kind != "latents":
        raise InputError(
            f"{named} holds {manifest.kind}, not latents; encode it with `ldmlab encode`, "
            "or leave data.latents=null to run the first stage while training."
        )
    if spec.images and manifest.kind == "latents" and not latents.get("carries_images"):
        raise InputError(
            f"{named} holds latents without their images; give the image shards they were made from, "
            "or encode again so that images are carried."
        )
    if spec.moments and "image" in spec.parts:
        raise InputError(
            f"{named} holds latents, but this task crops or changes images; set data.latents=null "
            "and give the first stage as from_run=RUN, so that it runs while training."
        )
    if spec.moments and latents["image_size"] != spec.image_size:
        raise InputError(
            f"data.image_size={spec.image_size}, but the latents of {named} were encoded at "
            f"{latents['image_size']}; use that size or encode again."
        )
    if missing := sorted(set(spec.states) - (latents.get("states") or {}).keys()):
        raise InputError(
            f"{named} holds no states of {maker_of(missing[0])}, unlike the training split; encode "
            "both splits alike, or set data.states=false to run the encoder while training."
        )
    if spec.moments and spec.flip and not latents["mirrored"]:
        raise InputError(
            f"data.flip=true, but the latents of {named} were encoded without their mirror images; "
            "encode again with them, or set data.flip=false."
        )
