"""A model card: what is recorded of a model, what a person states of it in `card.yaml`, and the files made of both.

`card.json` keeps the facts (training, data, scores) beside a model, by names of folders and without paths of the
machine; README.md is written from it and from card.yaml.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldmlab.app.run_records import comparison_fields
from ldmlab.data.data_sheet import data_record
from ldmlab.errors import InputError, did_you_mean, shown
from ldmlab.files import encodable, read_json, read_text, write_json, write_text
from ldmlab.instantiate import instantiate
from ldmlab.model_files import CONFIG, DATA, DESCRIPTION, model_folder, read_config, read_description, read_yaml
from ldmlab.report.line_chart import Points
from ldmlab.report.metrics_json import AGAIN, read_evaluation, reading, title
from ldmlab.report.model_card import PERSON, SHARES, card_markdown, section_title
from ldmlab.report.score_curves import read_curves, run_charts
from ldmlab.training.run_folder import FINISHED

FACTS, AUDIT = "card.json", "audit.json"
_SETTINGS = ("optimizer", "lr_schedule")  # groups whose options a card lists
_OF_A_KIND = {"first_stage": ("loss",), "latent_diffusion": ("diffusion",)}
_TRAINER = ("micro_batch", "accumulate", "precision", "averaging_decay", "gradient_clip")
_OF_AN_EVALUATION = (
    *("scores", "evaluators", "sampling", "reference", "features", "protocol", "model"),
    *("by_class", "sweep", "sample_curves"),
)
_CHARTS, _POINTS = 6, 5  # of a run, the most informative first; and of a line, from its first to its last
_AUDIT_AGAIN = "run `ldmlab audit` again."
_RESTORE = "restore its files from a copy."
Facts = dict[str, Any]  # runs and evaluations by name, audit; plain types


def read_facts(folder: Path) -> Facts:
    """What an earlier card of the folder holds."""
    way_out = "delete it and run `ldmlab card` again."
    return _printable(folder / FACTS, lambda path: _object(path, way_out), way_out)


def _object(path: Path, way_out: str) -> Facts:
    """The JSON object of a file; empty without one."""
    found = read_json(path)
    if not isinstance(found, dict) and path.exists():
        raise InputError(f"{path} is damaged; {way_out}")
    return found or {}


def _printable(path: Path, read: Callable[[Path], Facts], way_out: str) -> Facts:
    """Facts of `path` by which a card can be written; InputError with the way out for others."""
    with reading(path, "what a card prints of it", way_out):
        facts: Facts = _without_paths(read(path))
        card_markdown({}, facts)
        return facts


def collect(folder: Path, more: Iterable[Path] = ()) -> Facts:
    """Facts of a run or model folder, and of runs of its parts, evaluations and audits; newer ones replace older."""
    facts: Facts = {"runs": {}, "evaluations": {}, "audit": None, **read_facts(folder)}
    for place in (folder, *more):
        known = _is_run(place)
        if known:
            facts["runs"] |= _printable(place, _runs, _RESTORE)["runs"]
        for path in sorted(place.rglob("metrics.json")):
            found = _printable(path, _evaluation, AGAIN)["evaluations"]
            known, facts["evaluations"] = known or bool(found), facts["evaluations"] | found
        for path in sorted(place.rglob(AUDIT)):
            known = True
            facts["audit"] = _printable(path, _audit, _AUDIT_AGAIN)["audit"] or facts["audit"]
        if place is not folder and not known:
            raise InputError(f"{place} holds no run, no metrics.json and no {AUDIT}; leave it out.")
    return facts


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / DESCRIPTION).is_file() and (folder / "metrics.csv").is_file()


def _runs(folder: Path) -> Facts:
    """A run, and as KIND:1, KIND:2, ... those with whose weights it began, as far as they or their cards are there."""
    kind = str(read_description(folder)["kind"])
    found, places = {kind: _run(folder)}, [folder.resolve()]
    while (before := _before(places[-1])) and before not in places:
        if not _is_run(before):  # a model folder, whose card has the runs that made it
            of_kind = {name: run for name, run in read_facts(before).get("runs", {}).items() if _kind(name) == kind}
            return {"runs": found | {f"{kind}:{len(places) + n}": run for n, run in enumerate(of_kind.values())}}
        if read_description(before)["kind"] != kind:
            break
        found[f"{kind}:{len(places)}"] = _run(before)
        places.append(before)
    return {"runs": found}


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _before(folder: Path) -> Path | None:
    """The run or model folder that `init_from` of a run names, also by one of a run's checkpoints."""
    source = read_config(folder).get("init_from")
    with suppress(InputError):  # it may be gone
        return model_folder(source).resolve() if source else None
    return None


def _run(folder: Path) -> Facts:
    config, spec, origin = read_config(folder), read_description(folder), _object(folder / "provenance.json", _RESTORE)
    curves = read_curves(folder / "metrics.csv")
    return {
        "name": folder.resolve().name,
        "step": int(max((points[-1][0] for points in curves.values()), default=0)),
        "finished": (folder / FINISHED).exists(),
        "fields": comparison_fields(spec),
        "settings": _settings(config, spec["kind"]),
        "init_from": Path(config["init_from"]).name if config.get("init_from") else None,
        "cost": _cost(curves, origin),
        "curves": _curves(folder),
        "data": _object(folder / DATA, _RESTORE) or _data_now(config),
        **{name: origin.get(name) for name in ("commit", "python", "packages", "time_utc")},
    }


def _settings(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Options by their names in a configuration, classes without their packages."""
    found: dict[str, Any] = {f"trainer.{name}": config["trainer"].get(name) for name in _TRAINER}
    found["seed"] = config.get("seed")

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                add(f"{name}.{key}" if key != "_target_" else name, part)
        elif value is not None and value != []:
            found[name] = value.rpartition(".")[2] if isinstance(value, str) and value.startswith("ldmlab.") else value

    for group in (*_SETTINGS, *_OF_A_KIND.get(kind, ())):
        add(group, config.get(group))
    return {name: value for name, value in found.items() if value is not None}


def _cost(curves: Mapping[str, Points], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Images and hours of training by the rows of the log, without validation; PFLOP where they were counted."""
    images, rates = dict(curves.get("images", ())), dict(curves.get("speed/images_per_second", ()))
    single, flops = (
        dict(curves.get(f"speed/{name}", ())) for name in ("images_per_second_and_device", "tflops_per_device")
    )
    seconds = pflop = seen = devices = 0.0
    for step, count in sorted(images.items()):
        if (rate := rates.get(step)) and count > seen:
            devices = max(devices, round(rate / single.get(step, rate)))
            seconds += (count - seen) / rate
            pflop += (count - seen) / rate * flops.get(step, 0.0) * devices / 1000
            seen = count
    return {
        "images": int(max(images.values(), default=0)),
        "hours": round(seconds / 3600, 3),
        "devices": int(devices),
        "hardware": origin.get("hardware"),
        "pflop": float(f"{pflop:.4g}") if pflop else None,
    }


def _curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """A few points of each line of the most informative charts, evenly spread."""
    found = {}
    for chart in run_charts(folder / "metrics.csv")[:_CHARTS]:
        for line, points in chart.series.items():
            ends = sorted({round(part * (len(points) - 1) / (_POINTS - 1)) for part in range(_POINTS)})
            found[chart.title if line == chart.title else f"{chart.title}, {line}"] = [points[end] for end in ends]
    return found


def _data_now(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a run that recorded nothing of its data, what lies in their folders now; None where they are gone."""
    try:
        data = instantiate(config["data"], where="data", seed=config["seed"])
        return data_record(data, data.kind)[0]
    except InputError:
        return None


def _evaluation(path: Path) -> Facts:
    """What a card prints of a record, unless it was made while training; images stay where they are."""
    result = read_evaluation(path.parent)
    if result.get("in_training"):
        return {"evaluations": {}}
    kept = {name: result[name] for name in _OF_AN_EVALUATION if name in result}
    near = result.get("neighbours")
    kept["neighbours"] = near and {name: part for name, part in near.items() if not isinstance(part, list)}
    return {"evaluations": {title(result): kept}}


def _audit(path: Path) -> Facts:
    """Of `ldmlab audit`: its advice, and shares of samples by model; None for the record of one model alone."""
    content = _object(path, _AUDIT_AGAIN)
    if "audits" not in content:
        return {"audit": None}
    shares = [{name: one[name]["value"] for name in SHARES} | {"label": one["label"]} for one in content["audits"]]
    return {"audit": {"advice": [str(text) for text in content["advice"]], "audits": shares}}


def _without_paths(value: Any) -> Any:
    """The same with each absolute path cut to its last part, and of characters that can be written."""
    if isinstance(value, Mapping):
        return {encodable(str(name)): _without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part) for part in value]
    if isinstance(value, str):
        return encodable(Path(value).name if value.startswith("/") else value)
    return value


PERSONS, README = "card.yaml", "README.md"
_HEAD = (
    "# What only a person knows about this model: a text or a list of texts each, all of them needed for an export.\n"
)
_FIRST = f"\n## {section_title(next(iter(PERSON)))}\n"
NO_CARD = "This folder has no model card: intended use, limits and risks of the model are not stated."


def write_template(folder: Path) -> None:
    """An empty card.yaml, where there is none."""
    if not (folder / PERSONS).exists():
        write_text(folder / PERSONS, _HEAD + "".join(f'{name}: ""  # {what}\n' for name, what in PERSON.items()))


def read_person(folder: Path) -> dict[str, list[str]]:
    """Paragraphs by field, only those that say something; InputError for what is no text."""
    path = folder / PERSONS
    content: dict[str, Any] = read_yaml(path) if path.exists() else {}
    for name, value in content.items():
        if name not in PERSON:
            hint = did_you_mean(name, PERSON, f"there are {', '.join(PERSON)}.")
            raise InputError(f"{path} has {name}, which is no field of a model card; {hint}")
        if not isinstance(value, str | list | None) or not all(isinstance(part, str) for part in value or ()):
            raise InputError(f"{path}: {name}={shown(value)} is no text and no list of texts; put it in quotes.")
    texts = {name: [value] if isinstance(value, str) else value or [] for name, value in content.items()}
    filled = {name: [text.strip() for text in parts if text.strip()] for name, parts in texts.items()}
    return {name: parts for name, parts in filled.items() if parts}


def empty_fields(person: dict[str, list[str]]) -> list[str]:
    return [name for name in PERSON if name not in person]


def filled_in(folder: Path, model: Path) -> dict[str, list[str]]:
    """What a person wrote; InputError while a field is empty."""
    person = read_person(folder)
    if empty := empty_fields(person):
        raise InputError(
            f"{folder / PERSONS} leaves {', '.join(empty)} empty, and a model is given away with a model card; fill "
            f"them in (`ldmlab card {model}` writes the file), or give --without-card for private use."
        )
    return person


def write_card(folder: Path, head: str, person: dict[str, list[str]], facts: Facts) -> None:
    """README.md below `head`, and the facts."""
    text = f"{head.rstrip()}\n\n{card_markdown(person, facts)}"
    write_text(folder / README, text)
    write_json(folder / FACTS, facts)


def head_of(folder: Path) -> str | None:
    """The README up to a card's first section, with the sections that others wrote above it."""
    if not (folder / README).is_file():
        return None
    try:
        return read_text(folder / README).partition(_FIRST)[0]
    except UnicodeDecodeError:
        raise InputError(f"{folder / README} is not UTF-8; delete it and run `ldmlab card` again.") from None


def carry(folder: Path, out: Path, names: Sequence[str] = (PERSONS, DATA)) -> None:
    """Copies of what a model folder keeps of a run beside the weights."""
    for name in names:
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name} is a link, and what it names may be private; put the file itself there.")
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
