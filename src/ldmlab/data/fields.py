"""The fields of a sample under one rule, wherever they come from: `pack`, `index` and the loaders read them here.

| found | taken as |
|---|---|
| null, NaN, a caption that is an empty list | missing |
| caption: a list | its first entry; all of them stay as `captions` |
| caption: a number | text |
| class_id: 3, 3.0, "3" | 3; anything else makes the sample a bad one |
| half a surrogate pair | the replacement character |
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldmlab.annotations import checked, whole_class

CAPTION, CLASS, BOXES = "caption", "class_id", "boxes"
_DEEPEST = 40  # levels of lists and objects in KEY.json
_LONGEST_JSON, _LONGEST_TEXT = 1 << 24, 1 << 20  # bytes


class MissingField(KeyError):
    """A field that the run reads and the sample lacks."""

    def __str__(self) -> str:
        return str(self.args[0])


def sample_fields(files: Mapping[str, Any]) -> dict[str, Any]:
    """`KEY.json`, with the caption of `KEY.txt` and the class of `KEY.cls` where it has none; ValueError if damaged."""
    fields: Any = parsed(files["json"]) if "json" in files else {}
    if not isinstance(fields, dict):
        raise ValueError("KEY.json is not an object")
    if "txt" in files and is_missing(fields.get(CAPTION)):
        fields[CAPTION] = _text(files["txt"])
    if "cls" in files and is_missing(fields.get(CLASS)):
        text = _text(files["cls"])
        fields[CLASS] = whole_class(text) if text.isdigit() else text
    return clean_fields(fields)


def _text(data: bytes) -> str:
    if len(data) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(data)} bytes; at most {_LONGEST_TEXT} are read")
    return data.decode("utf-8-sig").strip()


def parsed(data: bytes) -> Any:
    """JSON; ValueError also where it is too long or nested too deeply."""
    if len(data) > _LONGEST_JSON:
        raise ValueError(f"KEY.json has {len(data)} bytes; at most {_LONGEST_JSON} are read")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("KEY.json is nested too deeply") from None


def is_missing(value: Any) -> bool:
    """Null and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def clean_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that are missing, all text such that UTF-8 can hold it."""
    found = {clean_text(str(name)): _clean(value) for name, value in fields.items() if not is_missing(value)}
    if isinstance(found.get(CAPTION), list) and all(map(is_missing, found[CAPTION])):
        del found[CAPTION]
    return found


def checked_fields(
    fields: Mapping[str, Any], names: Collection[str] = (CAPTION, CLASS, BOXES), classes: int | None = None
) -> dict[str, Any]:
    """Fields whose caption, class_id and boxes, of those in `names`, are valid; else ValueError.

    classes: how many there are, where that is known; it bounds class_id.
    """
    found = dict(fields)
    if CAPTION in found and CAPTION in names:
        value = found[CAPTION]
        texts = [as_text(entry) for entry in (value if isinstance(value, list) else [value]) if not is_missing(entry)]
        if not texts:
            raise ValueError("its list of captions is empty")
        if isinstance(value, list):
            found.setdefault("captions", texts)
        found[CAPTION] = texts[0]
    if CLASS in found and CLASS in names:
        found[CLASS] = whole_class(found[CLASS], classes)
    if BOXES in found and BOXES in names:
        found[BOXES] = checked(found[BOXES])
    return found


def stored_fields(files: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a sample, validated; a null caption or class makes it a bad sample."""
    fields = sample_fields(files)
    for name in (CAPTION, CLASS):
        if name not in fields and "json" in files and name in parsed(files["json"]):
            raise ValueError(f"its {name} is null, NaN or empty")
    return checked_fields(fields)


def as_text(value: Any) -> str:
    """A caption, or a number in its place, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"its caption is a {type(value).__name__}, not a text")
    return value if isinstance(value, str) else str(value)


def clean_text(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs become the replacement character."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("KEY.json is nested too deeply")
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [_clean(entry, depth + 1) for entry in value]
    if isinstance(value, dict):
        return {clean_text(str(name)): _clean(entry, depth + 1) for name, entry in value.items()}
    return value


def required_fields(files: Mapping[str, Any], names: Sequence[str], classes: int | None = None) -> dict[str, Any]:
    """The named fields of a sample; MissingField where it lacks one, ValueError where one cannot be used."""
    known = sample_fields(files)
    missing = [name for name in names if name not in known]
    if missing:
        raise MissingField(f"no field {', '.join(missing)} (it has {', '.join(sorted(known)) or 'none'})")
    known = checked_fields(known, names, classes)
    found = {name: known[name] for name in names}
    for name, value in found.items():  # for any other field too, a list of texts is replaced by its first entry
        if isinstance(value, list) and value and isinstance(value[0], str):
            found[name] = value[0]
    return found
