"""Conditions of the paper's measurements, and all differences of ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmlab.data.manifest import read_manifest
from ldmlab.errors import InputError

PAPER_FEATURES = "inception-2015-12-05"
PAPER_WEIGHTS = "6726825d"  # the SHA-256 of the published file begins so, as in its name
PAPER_OPTIONS = {  # by metric: its option, what the paper's tools take, and our scores that it decides
    "precision_recall": ("neighbours", 3, ("precision", "recall")),
    "is": ("splits", 10, ("is",)),
}


@dataclass(frozen=True)
class Conditions:
    """Known conditions of a table's measurement; None where the source has none."""

    samples: int | None = None
    split: str | None = None  # train | val
    rule: str | None = None  # crop and resize rule of the reference shards
    images: int | None = None  # of the reference
    whole: bool = False  # compared with every image of that split


# By table, or by the family before the slash; protocols.md 1, 4 to 8.
_CONDITIONS = {
    "uncond/celebahq-256": Conditions(50_000, "train", "short_side_bilinear_no_antialias", 25_000, True),
    "uncond/ffhq-256": Conditions(50_000, "train", "short_side_bilinear_no_antialias", 60_000, True),
    "uncond": Conditions(50_000, "train", "lsun", whole=True),
    "class-cond": Conditions(50_000, "train", "short_side_bilinear_no_antialias", whole=True),
    "text2img": Conditions(30_000, "val", images=30_000),
    "layout": Conditions(2048, "val", images=2048),
    "sr": Conditions(None, "val", whole=True),
    "inpaint/efficiency": Conditions(2000, "val", images=2000),
    "inpaint": Conditions(30_000, "val", images=30_000),
    "first-stage": Conditions(None, "val", whole=True),
}


@dataclass(frozen=True)
class Measured:
    """Properties of our own scores that a comparison needs."""

    method: str
    values: Mapping[str, float]  # fid, is, precision, recall, ...
    dataset: str | None
    picture_size: int  # px
    samples: int
    features: str  # the extractor's name
    reference_split: str
    reference_images: int
    reference_rule: str | None  # crop and resize rule of the manifest
    spreads: Mapping[str, float | None] = field(default_factory=dict)
    reference_hash: str | None = None  # of the manifest of the images that were compared with
    current_hash: str | None = None  # of the present manifest; None: it is missing
    pinned_hash: str | None = None  # of the protocol
    sampling: Mapping[str, Any] = field(default_factory=dict)
    weights_hash: str | None = None  # of the extractor's file
    resized: str | None = None  # what was done to the reference in addition to its rule
    reference_of: int | None = None  # images that the split holds; None: not recorded
    reference_limit: int | None = None  # of the protocol
    metrics: Mapping[str, Any] = field(default_factory=dict)  # the protocol's scores with their options
    guiders: Mapping[str, Any] = field(default_factory=dict)  # what guided besides classifier-free guidance


def measured(result: Mapping[str, Any], bucket: str | None = None) -> Measured:
    """From the content of a metrics.json; `bucket`: the scores of one size of hole."""
    reference, sampling = result["reference"], result["sampling"]
    scores = result["scores"] if bucket is None else result["buckets"][bucket]["scores"]
    values = {name: score["value"] for name, score in scores.items()}
    if bucket is None and (rate := sampling.get("images_per_second")) is not None:
        values |= {"images_per_second": rate, f"sampling_{reference['image_size']}_per_second": rate}
    if bucket is None and (count := result["model"].get("parameters")) is not None:
        values |= {"n_params": count, "all_parameters": count + result["model"]["first_stage_parameters"]}
    return Measured(
        method=Path(str(result["model"].get("path", "this model"))).name,
        values=values,
        dataset=result["protocol"].get("dataset"),
        picture_size=reference["image_size"],
        samples=sampling["images"],
        features=result["features"]["name"],
        reference_split=reference["split"],
        reference_images=reference["images"],
        reference_rule=reference["transform"].get("rule"),
        spreads={name: score.get("spread") for name, score in scores.items()},
        reference_hash=reference.get("manifest_hash"),
        current_hash=_current_hash(reference.get("folder")),
        pinned_hash=result["protocol"].get("reference_hash"),
        sampling=sampling,
        weights_hash=result["features"].get("weights_hash"),
        resized=reference.get("resized"),
        reference_of=reference.get("split_images"),
        reference_limit=result["protocol"].get("reference_limit"),
        metrics=result["protocol"].get("metrics") or {},
        guiders=result["model"].get("guiders") or {},
    )


def _current_hash(folder: str | None) -> str | None:
    try:
        return None if folder is None else read_manifest(folder).hash
    except InputError:
        return None


def conditions_of(name: str) -> Conditions:
    """Known conditions of a table's measurement."""
    return _CONDITIONS.get(name) or _CONDITIONS.get(name.split("/")[0], Conditions())


def reasons(name: str, table: Mapping[str, Any], ours: Measured, against: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Every known difference between the paper's measurement and ours."""
    conditions = conditions_of(name)
    dataset, found = table.get("dataset"), []
    if dataset and ours.dataset != dataset:
        found.append(f"other data: {ours.dataset or 'not named'}, the paper's is {dataset}")
    if (size := table.get("resolution")) and ours.picture_size != size:
        found.append(f"{ours.picture_size} px images, the paper's have {size} px")
    if (samples := conditions.samples) and ours.samples != samples:
        found.append(f"{ours.samples:,} samples, the paper drew {samples:,}")
    if ours.features != PAPER_FEATURES:
        found.append(f"features of {ours.features}, the paper's are of {PAPER_FEATURES}")
    elif not str(ours.weights_hash).startswith(PAPER_WEIGHTS):
        found.append(f"features by the weights {ours.weights_hash}, those of the published file are {PAPER_WEIGHTS}...")
    if (split := conditions.split) and ours.reference_split != split:
        found.append(f"compared with the {ours.reference_split} split, the paper with {split}")
    if not found:  # the same data set by name: is it prepared as the paper's was?
        found += _preparation(conditions, ours)
    return (*found, *_options(ours), *_sampling(ours, against))


def _preparation(conditions: Conditions, ours: Measured) -> list[str]:
    found = []
    if conditions.rule and ours.reference_rule != conditions.rule:
        found.append(f"reference prepared by the rule {ours.reference_rule}, the paper's by {conditions.rule}")
    elif conditions.rule and ours.resized:
        found.append(f"reference resized again, {ours.resized}")
    if conditions.images and ours.reference_images != conditions.images:
        found.append(f"{ours.reference_images:,} reference images, the paper's list has {conditions.images:,}")
    if conditions.whole and ours.reference_of not in (None, ours.reference_images):
        found.append(f"compared with {ours.reference_images:,} of {ours.reference_of:,} images, the paper with all")
    elif conditions.whole and ours.reference_of is None and ours.reference_limit is not None:
        found.append(f"compared with the first {ours.reference_limit:,} images, the paper with all")
    return found


def _options(ours: Measured) -> list[str]:
    """Options of scores that the paper's tools set otherwise."""
    found = []
    for name, (option, theirs, decides) in PAPER_OPTIONS.items():
        node = ours.metrics.get(name) or {}
        if ours.values.keys() & set(decides) and node.get(option, theirs) != theirs:
            found.append(f"{option}={node[option]} of {name}, the paper's tools take {theirs}")
    return found


def barred(ours: Measured) -> tuple[str, ...]:
    """Why a result may not enter a table: it must name its reference by hash, the one pinned and the one there."""
    if ours.reference_hash is None:
        return ("the result does not record the hash of its reference images",)
    found = []
    if ours.pinned_hash not in (None, ours.reference_hash):
        found.append("compared with other images than the protocol pins (manifest hash)")
    if ours.current_hash not in (None, ours.reference_hash):
        found.append("the reference shards have changed since (manifest hash)")
    return tuple(found)


def _sampling(ours: Measured, against: Mapping[str, Any] | None) -> list[str]:
    """Sampler, steps, eta and guidance that the row prints, and ours."""
    if against is None or not ours.sampling:
        return []
    theirs = against.get("sampling", {})
    found = []
    if "steps" in theirs and ours.sampling.get("sampler", "ddim") != theirs.get("sampler", "ddim"):
        found.append(f"sampler {ours.sampling['sampler']}, the paper's row has {theirs.get('sampler', 'ddim')}")
    printed = {"steps": theirs.get("steps"), "eta": theirs.get("eta"), "guidance_scale": _scale(theirs)}
    found += [
        f"{name} {ours.sampling[name]:g}, the paper's row has {value:g}"
        for name, value in printed.items()
        if isinstance(value, int | float) and isinstance(ours.sampling.get(name), int | float)
        if float(ours.sampling[name]) != float(value)
    ]
    other = theirs.get("guidance") not in (None, "cfg")  # by a classifier, or by an image
    if other and not ours.guiders:
        found.append(f"no guidance but classifier-free, the paper's row has {theirs['guidance']}")
    if ours.guiders and not other:
        found.append(f"guided by {', '.join(ours.guiders)} besides, the paper's row is not")
    return found


def _scale(theirs: Mapping[str, Any]) -> float | None:
    """Of classifier-free guidance in the paper's row; 1 where it is off; None for rows without sampling."""
    if not theirs:
        return None
    return theirs.get("scale") if theirs.get("guidance") == "cfg" else 1.0
