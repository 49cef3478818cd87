"""The paper's tables as data (paper_tables.yaml), and what a measurement of ours differs in from theirs."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldmlab.data.manifest import read_manifest
from ldmlab.errors import InputError, did_you_mean

PARAMETERS = "n_params"
PAPER_FEATURES = "inception-2015-12-05"
PAPER_WEIGHTS = "6726825d"  # the SHA-256 of the published file begins so, as in its name
PAPER_OPTIONS = {  # by metric: its option, what the paper's tools take, and our scores that it decides
    "precision_recall": ("neighbours", 3, ("precision", "recall")),
    "is": ("splits", 10, ("is",)),
}


@cache
def source() -> dict[str, Any]:
    """All of it: tables | extra | conflicts, and column_titles | our_scores | conditions of ours."""
    return yaml.safe_load(Path(__file__).with_name("paper_tables.yaml").read_text(encoding="utf-8"))


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """All tables by name, such as text2img/coco-256."""
    return source()["tables"] | source()["extra"]


def known_table(name: str, option: str = "protocol.paper_table=") -> dict[str, Any]:
    """The table called `name`; `option`: how it was chosen."""
    known = paper_tables()
    if name not in known:
        hint = did_you_mean(name, known, f"there are {', '.join(known)}.")
        raise InputError(f"{option}{name} is no table of the paper; {hint}")
    return known[name]


def conditions_of(name: str) -> dict[str, Any]:
    """Known conditions of a table's measurement: samples | split | rule | images | whole."""
    known = source()["conditions"]
    return known.get(name) or known.get(name.split("/")[0], {})


def amount(parameters: float) -> str:
    """1.45B, 400M, 812k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter}"
    return f"{parameters:g}"


def methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the rows, with the differences of rows of one name in brackets."""
    facts = [_facts(row) for row in rows]
    names = []
    for row, own in zip(rows, facts, strict=True):
        twins = [one for other, one in zip(rows, facts, strict=True) if other["method"] == row["method"]]
        apart = [text for key, text in own.items() if len({twin.get(key) for twin in twins}) > 1]
        names.append(f"{row['method']} ({', '.join(apart)})" if apart else str(row["method"]))
    return names


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    sampling, training, first = (row.get(name) or {} for name in ("sampling", "training", "first_stage"))
    facts = {
        "task": row.get("task"),
        "dataset": row.get("dataset"),
        "codebook": first.get("codebook") and f"{first['codebook']:,} codes",
        "iterations": training.get("iters") and f"{amount(training['iters'])} iterations",
        "steps": sampling.get("steps") and f"{sampling['steps']} steps",
        "eta": None if sampling.get("eta") is None else f"eta {sampling['eta']:g}",
        "scale": sampling.get("scale") and f"guidance {sampling['scale']:g}",
    }
    return {name: str(text) for name, text in facts.items() if text}


def remarks(name: str) -> tuple[str, ...]:
    """Notes and footnotes of the source of a table, and values that other sources have for its rows."""
    table = paper_tables()[name]
    notes = table.get("notes") or []
    found = [notes] if isinstance(notes, str) else list(notes)
    marked: dict[str, list[str]] = {}
    for row in table["rows"]:
        for mark, text in (row.get("marks") or {}).items():
            footnote = text if isinstance(text, str) else (table.get("footnotes") or {}).get(mark)
            if footnote:
                marked.setdefault(footnote, []).append(row["method"])
    found += [f"{', '.join(names)}: {footnote}" for footnote, names in marked.items()]
    for conflict in source()["conflicts"].values():
        if name in conflict["tables"]:
            printed = [
                f"{value['origin']}: {', '.join(f'{key} {text}' for key, text in value.items() if key != 'origin')}"
                for value in conflict["values"]
            ]
            reading = f" ({conflict['reading']})" if "reading" in conflict else ""
            found.append(f"sources disagree on {conflict['about']}: {'; '.join(printed)}{reading}")
    return tuple(found)


# ---- what keeps a measurement of ours out of these tables


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
