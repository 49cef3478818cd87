"""What the paper's tables were measured on, and all in which a measurement of ours differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmlab.data.manifest import read_manifest
from ldmlab.errors import InputError

PAPER_FEATURES = "inception-2015-12-05"


@dataclass(frozen=True)
class Conditions:
    """What a source says of the measurement behind a table; None where it says nothing."""

    samples: int | None = None
    split: str | None = None  # train | val
    rule: str | None = None  # crop and resize rule of the reference shards
    pictures: int | None = None  # of the reference


# By table, or by the family before the slash; protocols.md 1, 4 to 8.
_CONDITIONS = {
    "uncond/celebahq-256": Conditions(50_000, "train", "short_side_bilinear_no_antialias", 25_000),
    "uncond/ffhq-256": Conditions(50_000, "train", "short_side_bilinear_no_antialias", 60_000),
    "uncond": Conditions(50_000, "train", "lsun"),
    "class-cond": Conditions(50_000, "train", "short_side_bilinear_no_antialias"),
    "text2img": Conditions(30_000, "val", pictures=30_000),
    "layout": Conditions(2048, "val", pictures=2048),
    "sr": Conditions(None, "val"),
    "inpaint/efficiency": Conditions(2000, "val", pictures=2000),
    "inpaint": Conditions(30_000, "val", pictures=30_000),
    "first-stage": Conditions(None, "val"),
}


@dataclass(frozen=True)
class Measured:
    """What a comparison needs to know about our own numbers."""

    method: str
    values: Mapping[str, float]  # fid, is, precision, recall, ...
    dataset: str | None
    picture_size: int  # px
    samples: int
    features: str  # the extractor's name
    reference_split: str
    reference_pictures: int
    reference_rule: str | None  # crop and resize rule of the manifest
    spreads: Mapping[str, float | None] = field(default_factory=dict)
    reference_hash: str | None = None  # of the manifest of the pictures that were compared with
    current_hash: str | None = None  # of the manifest that now lies there; None: it is not here
    pinned_hash: str | None = None  # that the protocol asks for
    sampling: Mapping[str, Any] = field(default_factory=dict)


def measured(result: Mapping[str, Any], bucket: str | None = None) -> Measured:
    """From the content of a metrics.json; `bucket`: the scores of one size of hole."""
    reference, sampling = result["reference"], result["sampling"]
    scores = result["scores"] if bucket is None else result["buckets"][bucket]["scores"]
    values = {name: score["value"] for name, score in scores.items()}
    if bucket is None and (rate := sampling.get("pictures_per_second")) is not None:
        values |= {"pictures_per_second": rate, f"sampling_{reference['image_size']}_per_second": rate}
    return Measured(
        method=Path(str(result["model"].get("path", "this model"))).name,
        values=values,
        dataset=result["protocol"].get("dataset"),
        picture_size=reference["image_size"],
        samples=sampling["pictures"],
        features=result["features"]["name"],
        reference_split=reference["split"],
        reference_pictures=reference["pictures"],
        reference_rule=reference["transform"].get("rule"),
        spreads={name: score.get("spread") for name, score in scores.items()},
        reference_hash=reference.get("manifest_hash"),
        current_hash=_current_hash(reference.get("folder")),
        pinned_hash=result["protocol"].get("reference_hash"),
        sampling=sampling,
    )


def _current_hash(folder: str | None) -> str | None:
    try:
        return None if folder is None else read_manifest(folder).hash
    except InputError:
        return None


def conditions_of(name: str) -> Conditions:
    """What is known of the measurement behind a table."""
    return _CONDITIONS.get(name) or _CONDITIONS.get(name.split("/")[0], Conditions())


def reasons(name: str, table: Mapping[str, Any], ours: Measured, against: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Every known difference between the paper's measurement and ours."""
    conditions = conditions_of(name)
    dataset, found = table.get("dataset"), []
    if dataset and ours.dataset != dataset:
        found.append(f"other data: {ours.dataset or 'not named'}, the paper's is {dataset}")
    if (size := table.get("resolution")) and ours.picture_size != size:
        found.append(f"{ours.picture_size} px pictures, the paper's have {size} px")
    if (samples := conditions.samples) and ours.samples != samples:
        found.append(f"{ours.samples:,} samples, the paper drew {samples:,}")
    if ours.features != PAPER_FEATURES:
        found.append(f"features of {ours.features}, the paper's are of {PAPER_FEATURES}")
    if (split := conditions.split) and ours.reference_split != split:
        found.append(f"compared with the {ours.reference_split} split, the paper with {split}")
    if not found:  # the same data set by name: is it prepared as the paper's was?
        found += _preparation(conditions, ours)
    return (*found, *_other_reference(ours), *_sampling(ours, against))


def _preparation(conditions: Conditions, ours: Measured) -> list[str]:
    found = []
    if conditions.rule and ours.reference_rule != conditions.rule:
        found.append(f"reference prepared by the rule {ours.reference_rule}, the paper's by {conditions.rule}")
    if conditions.pictures and ours.reference_pictures != conditions.pictures:
        found.append(f"{ours.reference_pictures:,} reference pictures, the paper's list has {conditions.pictures:,}")
    return found


def _other_reference(ours: Measured) -> list[str]:
    """A result must name its reference by hash, and that hash must be the one pinned and the one that lies there."""
    if ours.reference_hash is None:
        return ["the result does not say by hash which pictures it was compared with"]
    found = []
    if ours.pinned_hash not in (None, ours.reference_hash):
        found.append("compared with other pictures than the protocol pins (manifest hash)")
    if ours.current_hash not in (None, ours.reference_hash):
        found.append("the reference shards have changed since (manifest hash)")
    return found


def _sampling(ours: Measured, against: Mapping[str, Any] | None) -> list[str]:
    """Steps and eta that the row prints, and ours."""
    theirs = (against or {}).get("sampling", {})
    told = {"steps": theirs.get("steps"), "eta": theirs.get("eta")}
    if theirs.get("guidance") == "cfg":
        told["guidance"] = theirs.get("scale")
    return [
        f"{name} {ours.sampling[name]:g}, the paper's row has {value:g}"
        for name, value in told.items()
        if isinstance(value, int | float) and isinstance(ours.sampling.get(name), int | float)
        if float(ours.sampling[name]) != float(value)
    ]
