"""The paper's tables as data, and our row in one of them with everything that keeps it from being compared."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ldmlab.errors import InputError

PAPER_FEATURES = "inception-2015-12-05"
_SAMPLES = {"uncond": 50_000, "class-cond": 50_000, "text2img": 30_000, "layout": 2048, "inpaint": 30_000}
_SPLIT = {"uncond": "train", "class-cond": "train", "text2img": "val", "layout": "val", "inpaint": "val"}
# Rule that prepared the reference pictures, and how many there were where a source says so.
_RULE = {
    "celebahq": "short_side_bilinear_no_antialias",
    "ffhq": "short_side_bilinear_no_antialias",
    "lsun_churches": "lsun",
    "lsun_bedrooms": "lsun",
}
_REFERENCE_PICTURES = {"celebahq": 25_000, "ffhq": 60_000, "mscoco": 30_000}


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


@dataclass(frozen=True)
class PaperTable:
    """A published table with our row; `reasons` is empty when the numbers may stand side by side."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool, Mapping[str, str]], ...]  # method, is the paper's, printed values
    ours: tuple[str, Mapping[str, str]]
    reasons: tuple[str, ...]
    origin: str

    @property
    def comparable(self) -> bool:
        """Whether every condition that we know of is met."""
        return not self.reasons


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """All tables by name, such as text2img/coco-256."""
    content = yaml.safe_load((files("ldmlab.evaluation") / "paper_tables.yaml").read_text(encoding="utf-8"))
    return content["tables"] | content["extra"]


def place(name: str, measured: Measured) -> PaperTable:
    """Our row in the table `name`."""
    known = paper_tables()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise InputError(f"protocol.paper_table={name} is no table of the paper; {hint}")
    table = known[name]
    columns = tuple(key for key in table["directions"] if not key.endswith("_std") and key != "n_params")
    return PaperTable(
        name=name,
        title=f"{table['title']} ({table['paper_table']})" if "paper_table" in table else table["title"],
        columns=columns,
        rows=tuple((row["method"], row["is_ldm"], _printed(row, columns)) for row in table["rows"]),
        ours=(measured.method, {c: f"{measured.values[c]:.4g}" for c in columns if c in measured.values}),
        reasons=_reasons(name, table, measured),
        origin=table["origin"],
    )


def _printed(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, str]:
    """Values as the source prints them, with their deviation."""
    metrics, printed = row["metrics"], row.get("printed", {})
    shown = {}
    for column in columns:
        if column in metrics:
            text = str(printed.get(column, metrics[column]))
            spread = metrics.get(f"{column}_std")
            shown[column] = text if spread is None else f"{text} ± {spread}"
    return shown


def _reasons(name: str, table: Mapping[str, Any], measured: Measured) -> tuple[str, ...]:
    """Every known difference between the paper's measurement and ours."""
    family, dataset = name.split("/")[0], table.get("dataset")
    found = []
    if dataset and measured.dataset != dataset:
        found.append(f"other data: {measured.dataset or 'not named'}, the paper's is {dataset}")
    if (size := table.get("resolution")) and measured.picture_size != size:
        found.append(f"{measured.picture_size} px pictures, the paper's have {size} px")
    if (samples := _SAMPLES.get(family)) and measured.samples != samples:
        found.append(f"{measured.samples:,} samples, the paper drew {samples:,}")
    if measured.features != PAPER_FEATURES:
        found.append(f"features of {measured.features}, the paper's are of {PAPER_FEATURES}")
    if (split := _SPLIT.get(family)) and measured.reference_split != split:
        found.append(f"compared with the {measured.reference_split} split, the paper with {split}")
    if not found:  # the same data set by name: is it prepared as the paper's was?
        found += _preparation(str(dataset), measured)
    return tuple(found)


def _preparation(dataset: str, measured: Measured) -> list[str]:
    rule, pictures = _RULE.get(dataset), _REFERENCE_PICTURES.get(dataset)
    found = []
    if rule and measured.reference_rule != rule:
        found.append(f"reference prepared by the rule {measured.reference_rule}, the paper's by {rule}")
    if pictures and measured.reference_pictures != pictures:
        found.append(f"{measured.reference_pictures:,} reference pictures, the paper's list has {pictures:,}")
    return found
