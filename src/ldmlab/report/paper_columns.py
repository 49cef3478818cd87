"""Names of columns and rows of the paper's tables, and our scores that belong to them."""

from collections.abc import Mapping, Sequence
from typing import Any

PARAMETERS = "n_params"
_SHOWN = {
    "fid": "FID",
    "fid_train": "FID, training set",
    "fid_adm": "FID, ADM's script",
    "fid_2k_epoch6": "FID after 6 epochs",
    "is": "IS",
    "is_adm": "IS, ADM's script",
    "precision": "Precision",
    "recall": "Recall",
    "lpips_mean": "LPIPS",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "psim": "PSIM",
    "r_fid": "rFID",
    "r_is": "rIS",
    PARAMETERS: "Parameters",
    "samples_per_second": "Samples/s",
    "train_samples_per_second": "Training samples/s",
    "sampling_256_per_second": "Samples/s, 256 px",
    "sampling_512_per_second": "Samples/s, 512 px",
    "train_hours_per_epoch": "Hours an epoch",
    "preference_vs_gt_percent": "Preferred to real, %",
    "preference_score_percent": "Preferred to the other, %",
    "v100_days_generator": "V100 days, generator",
    "v100_days_classifier": "V100 days, classifier",
    "v100_days_total": "V100 days",
}
# Names of our scores by the paper's columns where they differ; `first-stage` and the like are families.
_OURS = {
    "first-stage": {"r_fid": "fid", "r_is": "is"},
    "inpaint": {"lpips_mean": "lpips", "fid_2k_epoch6": "fid"},
    "sr": {"fid_train": "fid_other_split", "samples_per_second": "images_per_second", PARAMETERS: "all_parameters"},
}


def columns_of(directions: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that are printed; deviations are in the cell of their mean."""
    return tuple(column for column in directions if not column.endswith("_std"))


def shown(column: str) -> str:
    """As printed in a table."""
    return _SHOWN[column]


def our_name(table: str, column: str) -> str:
    """The score of ours that a column of the table shows."""
    return _OURS.get(table.split("/")[0], {}).get(column, column)


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
    """The measurement of a row, in words."""
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


def remarks(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes and footnotes of the source."""
    notes = table.get("notes") or []
    found = [notes] if isinstance(notes, str) else list(notes)
    footnotes = table.get("footnotes") or {}
    marks: dict[str, list[str]] = {}
    for row in table["rows"]:
        for name, text in (row.get("marks") or {}).items():
            footnote = text if isinstance(text, str) else footnotes.get(name)
            if footnote:
                marks.setdefault(footnote, []).append(row["method"])
    found += [f"{', '.join(names)}: {footnote}" for footnote, names in marks.items()]
    return tuple(found)


def disagreements(conflicts: Mapping[str, Any], table: str) -> tuple[str, ...]:
    """Values of other sources for rows of a table."""
    found = []
    for conflict in conflicts.values():
        if table not in conflict["tables"]:
            continue
        printed = [
            f"{value['origin']}: {', '.join(f'{name} {text}' for name, text in value.items() if name != 'origin')}"
            for value in conflict["values"]
        ]
        reading = f" ({conflict['reading']})" if "reading" in conflict else ""
        found.append(f"sources disagree on {conflict['about']}: {'; '.join(printed)}{reading}")
    return tuple(found)
