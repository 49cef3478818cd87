"""What a measurement of ours differs in from the paper's, and what keeps it out of the paper's tables."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from ldmlab.data.manifest import read_manifest
from ldmlab.errors import InputError
from ldmlab.report.paper_source import conditions_of, paper_tables

PAPER_FEATURES = "inception-2015-12-05"
PAPER_WEIGHTS = "6726825d"  # the SHA-256 of the published file begins so, as in its name
PAPER_OPTIONS = {  # by metric: its option, what the paper's tools take, and our scores that it decides
    "precision_recall": ("neighbours", 3, ("precision", "recall")),
    "is": ("splits", 10, ("is",)),
}


def reasons(
    name: str, result: Mapping[str, Any], scores: Collection[str], against: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Every known difference between the measurement of table `name` and that of `scores`; against: the row."""
    table, conditions = paper_tables()[name], conditions_of(name)
    protocol, sampling, reference, features = (
        result[part] for part in ("protocol", "sampling", "reference", "features")
    )
    weights, found = features.get("weights_hash"), []
    if (dataset := table.get("dataset")) and protocol.get("dataset") != dataset:
        found.append(f"other data: {protocol.get('dataset') or 'not named'}, the paper's is {dataset}")
    if (size := table.get("resolution")) and reference["image_size"] != size:
        found.append(f"{reference['image_size']} px images, the paper's have {size} px")
    if (samples := conditions.get("samples")) and sampling["images"] != samples:
        found.append(f"{sampling['images']:,} samples, the paper drew {samples:,}")
    if features["name"] != PAPER_FEATURES:
        found.append(f"features of {features['name']}, the paper's are of {PAPER_FEATURES}")
    elif not str(weights).startswith(PAPER_WEIGHTS):
        found.append(f"features by the weights {weights}, those of the published file are {PAPER_WEIGHTS}...")
    if (split := conditions.get("split")) and reference["split"] != split:
        found.append(f"compared with the {reference['split']} split, the paper with {split}")
    if not found:  # the same data set by name: is it prepared as the paper's was?
        found = _preparation(conditions, reference, protocol.get("reference_limit"))
    for metric, (option, theirs, decides) in PAPER_OPTIONS.items():
        ours = ((protocol.get("metrics") or {}).get(metric) or {}).get(option, theirs)
        if ours != theirs and any(score in scores for score in decides):
            found.append(f"{option}={ours} of {metric}, the paper's tools take {theirs}")
    if against is not None and sampling:
        found += _sampling(sampling, result["model"].get("guiders") or {}, against.get("sampling", {}))
    return tuple(found)


def _preparation(conditions: Mapping[str, Any], reference: Mapping[str, Any], limit: int | None) -> list[str]:
    """limit: the protocol's, of reference images."""
    found, images, held = [], reference["images"], reference.get("split_images")
    rule, ours, listed = conditions.get("rule"), reference["transform"].get("rule"), conditions.get("images")
    if rule and ours != rule:
        found.append(f"reference prepared by the rule {ours}, the paper's by {rule}")
    elif rule and reference.get("resized"):
        found.append(f"reference resized again, {reference['resized']}")
    if listed and images != listed:
        found.append(f"{images:,} reference images, the paper's list has {listed:,}")
    if conditions.get("whole") and held not in (None, images):
        found.append(f"compared with {images:,} of {held:,} images, the paper with all")
    elif conditions.get("whole") and held is None and limit is not None:
        found.append(f"compared with the first {limit:,} images, the paper with all")
    return found


def _sampling(ours: Mapping[str, Any], guiders: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Sampler, steps, eta and guidance that the row prints, and ours; without guidance its scale is 1."""
    found = []
    if "steps" in theirs and ours.get("sampler", "ddim") != theirs.get("sampler", "ddim"):
        found.append(f"sampler {ours['sampler']}, the paper's row has {theirs.get('sampler', 'ddim')}")
    scale = (theirs.get("scale") if theirs.get("guidance") == "cfg" else 1.0) if theirs else None
    for name, value in {"steps": theirs.get("steps"), "eta": theirs.get("eta"), "guidance_scale": scale}.items():
        own = ours.get(name)
        if isinstance(value, int | float) and isinstance(own, int | float) and float(own) != float(value):
            found.append(f"{name} {own:g}, the paper's row has {value:g}")
    other = theirs.get("guidance") not in (None, "cfg")  # by a classifier, or by an image
    if other and not guiders:
        found.append(f"no guidance but classifier-free, the paper's row has {theirs['guidance']}")
    if guiders and not other:
        found.append(f"guided by {', '.join(guiders)} besides, the paper's row is not")
    return found


def barred(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a result may not enter a table: it must name its reference by hash, the one pinned and the one there."""
    used, folder = result["reference"].get("manifest_hash"), result["reference"].get("folder")
    if used is None:
        return ("the result does not record the hash of its reference images",)
    found = []
    if result["protocol"].get("reference_hash") not in (None, used):
        found.append("compared with other images than the protocol pins (manifest hash)")
    with suppress(InputError):  # the shards are no longer there
        if folder is not None and read_manifest(folder).hash != used:
            found.append("the reference shards have changed since (manifest hash)")
    return tuple(found)
