"""Published tables as data, and what a measurement of ours differs in from theirs.

The paper's are in paper_tables.yaml, those of later systems, called published/..., in published_tables.yaml.
"""

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
def source(file: str = "paper") -> dict[str, Any]:
    """All of a file: tables | extra | conflicts, and column_titles | our_scores | conditions of ours."""
    return yaml.safe_load(Path(__file__).with_name(f"{file}_tables.yaml").read_text(encoding="utf-8"))


def source_of(table: str) -> dict[str, Any]:
    """The file that holds the table."""
    return source("published" if table.startswith("published/") else "paper")


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """The paper's tables by name, such as text2img/coco-256."""
    return source()["tables"] | source()["extra"]


def all_tables() -> dict[str, dict[str, Any]]:
    """The paper's and those of later systems."""
    return paper_tables() | source("published")["tables"]


def known_table(name: str, option: str = "protocol.paper_table=") -> dict[str, Any]:
    """The table called `name`; `option`: how it was chosen."""
    known = all_tables()
    if name not in known:
        hint = did_you_mean(name, known, f"there are {', '.join(known)}.")
        raise InputError(f"{option}{name} is no published table; {hint}")
    return known[name]


def conditions_of(name: str) -> dict[str, Any]:
    """Known conditions of a table's measurement: samples | split | rule | images | whole."""
    known = source_of(name)["conditions"]
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
    table = all_tables()[name]
    notes = table.get("notes") or []
    found = [notes] if isinstance(notes, str) else list(notes)
    marked: dict[str, list[str]] = {}
    for row in table["rows"]:
        for mark, text in (row.get("marks") or {}).items():
            footnote = text if isinstance(text, str) else (table.get("footnotes") or {}).get(mark)
            if footnote:
                marked.setdefault(footnote, []).append(row["method"])
    found += [f"{', '.join(names)}: {footnote}" for footnote, names in marked.items()]
    origins = zip(methods(table["rows"]), table["rows"], strict=True)
    found += [f"{method}: {row['origin']}" for method, row in origins if "origin" in row]
    for conflict in source_of(name).get("conflicts", {}).values():
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
    table, conditions = all_tables()[name], conditions_of(name)
    protocol, sampling, reference, features = (
        result[part] for part in ("protocol", "sampling", "reference", "features")
    )
    weights, found = features.get("weights_hash"), []
    if (dataset := table.get("dataset")) and protocol.get("dataset") != dataset:
        found.append(f"other data: {protocol.get('dataset') or 'not named'}, the table's is {dataset}")
    if (size := table.get("resolution")) and reference["image_size"] != size:
        found.append(f"{reference['image_size']} px images, the table's have {size} px")
    if (samples := conditions.get("samples")) and sampling["images"] != samples:
        found.append(f"{sampling['images']:,} samples, the table's are of {samples:,}")
    if features["name"] != PAPER_FEATURES:
        found.append(f"features of {features['name']}, the table's are of {PAPER_FEATURES}")
    elif not str(weights).startswith(PAPER_WEIGHTS):
        found.append(f"features by the weights {weights}, those of the published file are {PAPER_WEIGHTS}...")
    if (split := conditions.get("split")) and reference["split"] != split:
        found.append(f"compared with the {reference['split']} split, the table with {split}")
    if not found:  # the same data set by name: is it prepared as the table's was?
        found = _preparation(conditions, reference, protocol.get("reference_limit"))
    for metric, (option, theirs, decides) in PAPER_OPTIONS.items():
        ours = ((protocol.get("metrics") or {}).get(metric) or {}).get(option, theirs)
        if ours != theirs and any(score in scores for score in decides):
            found.append(f"{option}={ours} of {metric}, the table's tools take {theirs}")
    if against is not None and sampling:
        found += _sampling(sampling, result["model"].get("guiders") or {}, against.get("sampling", {}))
    return tuple(found)


def _preparation(conditions: Mapping[str, Any], reference: Mapping[str, Any], limit: int | None) -> list[str]:
    """limit: the protocol's, of reference images."""
    found, images, held = [], reference["images"], reference.get("split_images")
    rule, ours, listed = conditions.get("rule"), reference["transform"].get("rule"), conditions.get("images")
    if rule and ours != rule:
        found.append(f"reference prepared by the rule {ours}, the table's by {rule}")
    elif rule and reference.get("resized"):
        found.append(f"reference resized again, {reference['resized']}")
    if listed and images != listed:
        found.append(f"{images:,} reference images, the table's list has {listed:,}")
    if conditions.get("whole") and held not in (None, images):
        found.append(f"compared with {images:,} of {held:,} images, the table with all")
    elif conditions.get("whole") and held is None and limit is not None:
        found.append(f"compared with the first {limit:,} images, the table with all")
    return found


def _sampling(ours: Mapping[str, Any], guiders: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Sampler, steps, eta and guidance that the row prints, and ours; without guidance its scale is 1."""
    found = []
    if "steps" in theirs and ours.get("sampler", "ddim") != theirs.get("sampler", "ddim"):
        found.append(f"sampler {ours['sampler']}, the table's row has {theirs.get('sampler', 'ddim')}")
    scale = (theirs.get("scale") if theirs.get("guidance") == "cfg" else 1.0) if theirs else None
    for name, value in {"steps": theirs.get("steps"), "eta": theirs.get("eta"), "guidance_scale": scale}.items():
        own = ours.get(name)
        if isinstance(value, int | float) and isinstance(own, int | float) and float(own) != float(value):
            found.append(f"{name} {own:g}, the table's row has {value:g}")
    forms = ("guidance_interval", "guidance_rescale", "guided_channels", "weak_model")
    found += [f"{name} {ours[name]}, which the table's row lacks" for name in forms if ours.get(name) is not None]
    other = theirs.get("guidance") not in (None, "cfg")  # by a classifier, or by an image
    if other and not guiders:
        found.append(f"no guidance but classifier-free, the table's row has {theirs['guidance']}")
    if guiders and not other:
        found.append(f"guided by {', '.join(guiders)} besides, the table's row is not")
    return found


def barred(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a result may not enter a table: of another set, or its reference is not that by hash which it names."""
    later, model = source("published")["systems"], result["model"]
    own = model.get("backbone") in later["backbones"] or model.get("process") in later["processes"]
    if own and not name.startswith("published/"):
        kind = f"{model['backbone']} on {model['process']}"
        return (f"{kind} is none of the paper's systems; protocol=published_imagenet_256 has a table of its kind",)
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
