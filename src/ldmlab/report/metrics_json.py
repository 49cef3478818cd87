"""Reader of metrics.json, and what identifies a measurement."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmlab import format1
from ldmlab.errors import InputError, first_line
from ldmlab.files import read_text

VERSIONS = (1, 2)
_MOST_BYTES = 1 << 28
AGAIN = "run the evaluation again."
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)


def read_record(path: Path, way_out: str, versions: Sequence[int] = VERSIONS) -> dict[str, Any]:
    """A JSON object of a known version with current names; anything else is an InputError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} is larger than {_MOST_BYTES >> 20} MiB, which no evaluation writes; {way_out}")
        found = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); {way_out}") from None
    version = found.get("format_version") if isinstance(found, dict) else None
    if version not in versions or isinstance(version, bool):
        what = f"has format_version={str(version)[:40]}" if isinstance(found, dict) else "is not a JSON object"
        raise InputError(f"{path} {what}, and format {versions[-1]} can be read; {way_out}")
    with reading(path, "a part", way_out):
        return dict(format1.record(found))


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The record of an evaluation folder, or of the `evaluation` folder inside a run; its scores are complete."""
    for place in (folder, folder / "evaluation"):
        try:
            result = read_record(place / "metrics.json", AGAIN)
        except (FileNotFoundError, NotADirectoryError):
            continue
        with reading(place / "metrics.json", "scores"):
            scores = {str(name): dict(score) for name, score in result["scores"].items()}
            for score in scores.values():
                spread, marks = score.get("spread"), score.get("marks") or ()
                score |= {"value": _number(score["value"]), "spread": spread and _number(spread)}
                score["marks"] = [str(mark) for mark in marks]
            result["scores"] = scores
        return result | {"folder": str(place)}
    raise InputError(f"{folder} holds no metrics.json; give a folder that `python evaluate.py` wrote.")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


@contextmanager
def reading(path: Path, part: str, way_out: str = AGAIN) -> Iterator[None]:
    """Inside, damage in `part` of the record `path` becomes one InputError."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise InputError(f"{path}: {part} cannot be read ({reason}); {way_out}") from None


def full_evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The records that may be compared, each once; scores of few samples taken in training may not."""
    results = list({result["folder"]: result for result in map(read_evaluation, folders)}.values())
    for result in results:
        if tag := result.get("in_training"):
            raise InputError(
                f"{result['folder']} was scored while training, on {dict(tag).get('samples')} samples, which compare "
                "within their run alone; score the checkpoint with evaluate.py and give that folder."
            )
    return results


# ---- what a measurement is


def folder_name(result: Mapping[str, Any]) -> str:
    return Path(str(result["model"].get("path", "model"))).name


def title(result: Mapping[str, Any]) -> str:
    """The model's folder name and the protocol."""
    return f"{folder_name(result)} by {result['protocol']['name']}"


def measurement_line(result: Mapping[str, Any]) -> str:
    """What must be equal for scores in one table, as text."""
    reference, features = result["reference"], result["features"]
    known = str(reference.get("manifest_hash") or "not recorded")[:12]
    return (
        f"{result['sampling']['images']:,} samples against {reference['images']:,} images of "
        f"{reference['split']}, {reference['image_size']} px, manifest {known}, features of {features['name']}"
    )


def comparable_groups(results: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of the evaluations that share a table, in order of the first one; without a manifest each has its own."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, result in enumerate(results):
        reference, features = result["reference"], result["features"]
        images = [reference[name] for name in ("image_size", "split", "images")]
        known = reference.get("manifest_hash") or f"unknown, {result.get('folder', id(result))}"
        network = features["name"], features["weights_hash"]
        key = (known, *images, reference.get("task"), *network, result["sampling"]["images"])
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def repeat_line(result: Mapping[str, Any]) -> str:
    """All settings that determine the scores, in one line."""
    sampling, reference, features = result["sampling"], result["reference"], result["features"]
    made, protocol = result.get("provenance") or {}, result["protocol"]
    settings = [f"{name}={result['model'][name]}" for name in ("weights", "step") if name in result["model"]]
    settings += [f"{name}={value}" for name, value in sampling.items() if value is not None and name != "hardware"]
    changed = f" with {', '.join(protocol['changed'])}" if protocol.get("changed") else ""
    parts = [
        f"`{made.get('command', 'command not recorded')}` at commit {made.get('commit')}",
        f"protocol {protocol['name']}{changed}",
        ", ".join(settings),
        f"reference {reference['images']} images of {reference['split']}, {reference['image_size']} px, manifest "
        f"{str(reference.get('manifest_hash'))[:12]}",
        f"features {features['name']}, weights {features['weights_hash']}",
        f"torch {made.get('packages', {}).get('torch', 'version not recorded')}",
    ]
    return "; ".join(filter(None, parts)) + "."
