"""Which images go to validation: whole groups, evenly over the values of a field, by hash and not by order."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from ldmlab.data.image_sources import Item
from ldmlab.errors import InputError


@dataclass(frozen=True)
class SplitRule:
    """How images are held out; the default holds out none."""

    val: float = 0.0  # share of groups
    group: str | None = None  # images with one value of this field stay on one side; None: all rows of an image
    group_strip: str | None = None  # pattern cut out of that value first: what variants differ in
    stratify: str | None = None  # the share holds within each value of this field
    val_least: int = 1  # groups held out of each value, at least
    seed: int = 0
    name: str = "train"  # split that gets the rest

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise InputError(f"val={self.val} is no fraction; choose 0 <= val < 1.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"split={self.name} is not a folder's name; use letters, digits, _ and -.")
        if self.group_strip is not None and self.group is None:
            raise InputError(f"group-strip={self.group_strip} needs --group FIELD to cut from; name the field.")
        if self.val and self.name == "val":
            raise InputError(f"split=val with val={self.val} leaves no training split; drop one of them.")
        try:
            re.compile(self.group_strip or "")
        except re.error as error:
            raise InputError(f"group-strip={self.group_strip} is not a regular expression ({error}); fix it.") from None

    @property
    def fields(self) -> set[str]:
        """Fields that items must have."""
        return {name for name in (self.group, self.stratify) if name is not None}


def split_items(items: list[Item], rule: SplitRule) -> dict[str, list[Item]]:
    """Split name => items in their order."""
    if not rule.val:
        return {rule.name: items}
    # key => key of the first row of the same image: a table may hold several rows an image
    first: dict[tuple[str, tuple[int, int] | None], str] = {}
    strata: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    home: dict[str, str] = {}  # group => stratum of its first image
    for index, item in enumerate(items):
        if rule.group is None:
            group = first.setdefault((os.path.normpath(item.path), item.span), item.key)
        else:
            group = str(_value(item, rule.group))
            group = re.sub(rule.group_strip, "", group) if rule.group_strip else group
        stratum = home.setdefault(group, str(_value(item, rule.stratify)) if rule.stratify else "")
        strata[stratum][group].append(index)
    held: set[int] = set()
    for groups in strata.values():
        ordered = sorted(groups, key=lambda group: blake2b(f"{rule.seed}/{group}".encode(), digest_size=8).hexdigest())
        count = min(max(round(rule.val * len(ordered)), rule.val_least), len(ordered) - 1)
        held.update(index for group in ordered[:count] for index in groups[group])
    val = [item for index, item in enumerate(items) if index in held]
    if not val:
        raise InputError(f"val={rule.val} holds out none of {len(items)} images; raise it or drop --group.")
    return {rule.name: [item for index, item in enumerate(items) if index not in held], "val": val}


def _value(item: Item, name: str) -> Any:
    if name not in item.fields and item.fault is None:
        found = ", ".join(item.fields) or "none"
        raise InputError(f"{item.name} has no field {name}, its fields are {found}; name one of them.")
    return item.fields.get(name)


def with_class_ids(items: list[Item], name: str) -> tuple[list[Item], list[str]]:
    """Items with `class` and `class_id` from the sorted distinct values of a field, and the names by class_id."""
    values = [_value(item, name) for item in items]
    classes = sorted({str(value) for value in values if value is not None})
    number = {value: index for index, value in enumerate(classes)}
    labelled = []
    for item, value in zip(items, values, strict=True):
        if value is None:
            labelled.append(replace(item, fault=item.fault or f"has no value in field {name}"))
        else:
            labelled.append(replace(item, fields={**item.fields, "class": str(value), "class_id": number[str(value)]}))
    return labelled, classes
