"""Files of a model card: `card.yaml`, which a person fills in; README.md and card.json, which are written from it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmlab.app.card_facts import FACTS, Facts
from ldmlab.errors import InputError, did_you_mean, shown
from ldmlab.files import read_text, write_json, write_text
from ldmlab.model_files import DATA, read_yaml
from ldmlab.report.model_card import PERSON, card_markdown, section_title

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
