"""A user study as a folder: what is compared, the items, the rules by which sessions are left out, and the images.

Two tasks, each a forced choice between two images after both were shown for some seconds (paper, appendix E.3.6):
    1   a real image beside a generated one; the score is the share of answers that prefer the generated one
    2   the images of two methods for the same input; the score is the share of answers that prefer each
`study.json` is written once: what counts is known before the first answer.
"""

import hashlib
import io
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from ldmlab.argument_types import check_types
from ldmlab.data.tars import IMAGE_ENDINGS
from ldmlab.errors import InputError, one_of
from ldmlab.files import encodable, read_json, write_atomically, write_json
from ldmlab.inference.grids import read_settings
from ldmlab.open_image import open_image
from ldmlab.stored_names import is_overview


def images_of(folder: Path) -> dict[str, Path]:
    """Image files by name without ending; of `ldmlab sample`, the samples alone."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a folder of images.")
    files = [f for f in folder.iterdir() if f.suffix[1:].lower() in IMAGE_ENDINGS and not f.name.startswith(".")]
    files = sorted(f for f in files if not is_overview(f))
    found = {file.stem: file for file in files}
    if not found:
        raise InputError(f"{folder} holds no images; give another folder.")
    if len(found) < len(files):
        raise InputError(f"{folder} holds two images of one name with different endings; remove one of them.")
    return found


def matched(
    found: Mapping[str, Mapping[str, Path]], inputs: Mapping[str, Path] | None, real: str, seed: int
) -> list[dict[str, str]]:
    """For each comparison the image's name in each set: the same one, or without inputs at random if none is shared."""
    every = [set(files) for files in (*found.values(), *([inputs] if inputs is not None else []))]
    shared = sorted(set.intersection(*every))
    if shared:
        return [dict.fromkeys(found, name) for name in shared]
    if inputs is not None or real not in found:
        raise InputError(
            f"no file name is in all of the {len(every)} folders, so that images cannot be matched; name the images of "
            "one input alike."
        )
    count = min(map(len, found.values()))
    drawn = {name: random.Random(f"{seed}:{name}").sample(sorted(files), count) for name, files in found.items()}
    return [{name: names[number] for name, names in drawn.items()} for number in range(count)]


def caption_of(path: Path) -> str | None:
    """The prompt that `ldmlab sample` wrote into the file."""
    return read_settings(path).get("prompt") if path.suffix.lower() == ".png" else None


def copy_name(content: bytes) -> str:
    """The name of a copy of an image."""
    return f"{hashlib.sha256(content).hexdigest()[:24]}.png"


def _one_caption(first: Path, second: Path) -> str | None:
    """The prompt of two images, which is the same where both have one."""
    one, other = caption_of(first), caption_of(second)
    if one and other and one != other:
        raise InputError(
            f"{first} and {second} are of different prompts ({one!r:.60} and {other!r:.60}); "
            "give images of the same prompts under the same names."
        )
    return other or one


class Copies:
    """Copies of images as PNG without metadata, named by content, so that no name tells the method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, source: Path, *, damaged: bool = False) -> str:
        try:
            with open_image(source) as image:
                pixels = image.convert("RGB")
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read ({error}); repair or remove it.") from error
        if damaged:
            small = pixels.resize((6, 6), Image.Resampling.BOX).resize(pixels.size, Image.Resampling.NEAREST)
            pixels = small.filter(ImageFilter.GaussianBlur(max(pixels.size) / 40))
        buffer = io.BytesIO()
        pixels.save(buffer, "PNG")
        content = buffer.getvalue()
        name = copy_name(content)
        if not (self.folder / name).exists():
            write_atomically(self.folder / name, lambda path: path.write_bytes(content))
        return name


REAL = "real"
FILE, IMAGES = "study.json", "images"
KINDS = ("item", "practice", "check")
QUESTIONS = {
    (1, False): "Which image is the better one?",
    (1, True): "Which side restores the middle image better, at high quality?",
    (2, False): "Which image fits better?",
    (2, True): "Which side restores the middle image better?",
}
CONSENT = (
    "You will compare pairs of images. We store your choices and how long each took; nothing about you, your machine "
    "or your address. You may stop at any time by closing the page, and go on later in the same browser."
)
_COPY = re.compile(r"[0-9a-f]{24}\.png")
_PRACTICE = 2


@dataclass(frozen=True)
class Rules:
    """Sessions that are left out, stated before the first answer."""

    least_answers: int = 10  # fewer than these
    checks_wrong: int = 1  # more wrong attention checks than this
    median_seconds: float = 0.3  # a shorter median time from the question to the answer
    one_side: float = 0.95  # a larger share of answers on one side


@dataclass(frozen=True)
class Item:
    """Two images to choose from; of a practice item and of a check the first one is whole and the second damaged."""

    id: str
    kind: str  # item | practice | check
    methods: tuple[str, str]
    images: tuple[str, str]  # files in images/, named by their content
    given: str | None = None  # file of the input
    caption: str | None = None


@dataclass(frozen=True)
class Study:
    """What study.json holds."""

    title: str
    task: int  # 1 | 2
    question: str
    methods: Mapping[str, str]  # name: where its images came from
    items: tuple[Item, ...]
    seconds: float = 3.0  # that images are shown before the question; 0: until the answer
    per_session: int = 50
    seed: int = 0
    consent: str = CONSENT
    rules: Rules = field(default_factory=Rules)
    paper_table: str | None = None

    @property
    def rated(self) -> list[Item]:
        """Items whose answers count."""
        return [item for item in self.items if item.kind == "item"]

    def of_session(self, number: int) -> list[tuple[Item, bool]]:
        """The items of session `number` (from 0) in order, and whether the sides are swapped.

        Sessions take the items in turn from shuffled rounds, so that all items are seen equally often.
        """
        rated, take = self.rated, min(self.per_session, len(self.rated))
        chosen: list[Item] = []
        for place in range(number * take, (number + 1) * take):
            turn = random.Random(f"{self.seed}:round:{place // len(rated)}").sample(rated, len(rated))
            if (item := turn[place % len(rated)]) in chosen:  # from the end of one round and the start of the next
                item = next(other for other in turn if other not in chosen)
            chosen.append(item)
        rng = random.Random(f"{self.seed}:session:{number}")
        rng.shuffle(chosen)
        for check in (item for item in self.items if item.kind == "check"):
            chosen.insert(rng.randint(1, len(chosen)), check)
        practice = [item for item in self.items if item.kind == "practice"]
        return [(item, rng.random() < 0.5) for item in (*practice, *chosen)]


def read_study(folder: Path) -> Study:
    """The study of a folder; InputError where there is none."""
    value = read_json(folder / FILE)
    if not isinstance(value, dict) or value.get("format") != "ldmlab study 1":
        raise InputError(f"{folder} holds no study; make one with `ldmlab study make`.")
    try:
        items = tuple(_item(item) for item in value.pop("items"))
        rules, fields = value.pop("rules"), {k: v for k, v in value.items() if k != "format"}
        check_types(Rules, rules, FILE)
        check_types(Study, fields, FILE)
        study = Study(**fields, items=items, rules=Rules(**rules))
        one_of("task", str(study.task), ("1", "2"))
        if not (study.rated and study.per_session >= 1 and study.seconds >= 0 and rules["least_answers"] >= 1):
            raise ValueError("no item, or a session without one")
        if study.seed < 0 or any(set(item.methods) - study.methods.keys() for item in study.rated):
            raise ValueError("a negative seed, or an item of a method that is none of the study's")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{folder / FILE} is damaged ({error}); make the study again.") from error
    return study


def _item(value: Mapping[str, Any]) -> Item:
    """An item of study.json; its images may only be copies in images/."""
    check_types(Item, value, FILE)
    item = Item(**{**value, "methods": tuple(value["methods"]), "images": tuple(value["images"])})
    for name in (*item.images, *((item.given,) if item.given is not None else ())):
        if not _COPY.fullmatch(name):
            raise ValueError(f"{name!r:.40} is no copy of an image")
    one_of("kind", item.kind, KINDS)
    return item


def check_new(folder: Path) -> None:
    """InputError where something lies that a study cannot be written to."""
    ours = (IMAGES, f".{FILE}.*.part")  # of a process that was killed
    if held := sorted(entry.name for entry in folder.glob("*") if not any(map(entry.match, ours))):
        raise InputError(f"--out {folder} holds files already ({held[0]}); give a new or empty folder.")


def make_study(
    folder: Path,
    sets: Mapping[str, Path],  # method: folder of its images
    task: int,
    *,
    real: Path | None = None,
    given: Path | None = None,  # inputs, such as low-resolution or masked images
    checks: int = 4,
    **settings: Any,  # of Study
) -> Study:
    """Match the images by file name, copy them and write study.json into a new folder."""
    one_of("--task", str(task), ("1", "2"))
    if task == 1 and real is None:
        raise InputError("--task 1 compares with real images; give them by --real FOLDER.")
    if task == 2 and len(sets) < 2:
        raise InputError("--task 2 compares methods; give two folders or more.")
    check_new(folder)
    found = {name: images_of(path) for name, path in sets.items()}
    found |= {REAL: images_of(real)} if real is not None else {}
    inputs = images_of(given) if given is not None else None
    seed = settings.get("seed", 0)
    names = matched(found, inputs, REAL, seed)
    pairs = [(REAL, name) for name in sets] if task == 1 else list(combinations(sets, 2))
    put = Copies(folder / IMAGES)
    items = _rated(found, inputs, names, pairs, put)
    best = found[REAL if real is not None else next(iter(sets))]
    items += _plain(
        random.Random(f"{seed}:checks").choices(sorted(best.values()), k=checks + _PRACTICE), len(items), put
    )
    methods = {name: encodable(str(path)) for name, path in {**sets, REAL: real}.items() if path is not None}
    question = settings.pop("question", None) or QUESTIONS[task, inputs is not None]
    study = Study(task=task, question=question, methods=methods, items=tuple(items), **settings)
    write_json(folder / FILE, {"format": "ldmlab study 1", **asdict(study)})
    return study


def _rated(
    found: Mapping[str, Mapping[str, Path]],
    inputs: Mapping[str, Path] | None,
    names: Sequence[Mapping[str, str]],
    pairs: Sequence[tuple[str, str]],
    put: Copies,
) -> list[Item]:
    """An item for each matched image and pair of methods."""
    items: list[Item] = []
    for name in names:
        for a, b in pairs:
            files = found[a][name[a]], found[b][name[b]]
            given = None if inputs is None else put(inputs[name[a]])
            images = put(files[0]), put(files[1])
            items.append(Item(f"{len(items):05d}", "item", (a, b), images, given, _one_caption(*files)))
    return items


def _plain(sources: Sequence[Path], first: int, put: Copies) -> list[Item]:
    """A whole image against the same one damaged: for practice, then the checks."""
    return [
        Item(
            f"{first + number:05d}",
            "practice" if number < _PRACTICE else "check",
            ("whole", "damaged"),
            (put(source), put(source, damaged=True)),
        )
        for number, source in enumerate(sources)
    ]


def names_of(paths: Sequence[Path], names: str | None) -> dict[str, Path]:
    """Methods by name: those of `names` (a,b), or of the folders."""
    words = [encodable(path.resolve().name) for path in paths] if names is None else names.split(",")
    if len(words) != len(paths) or len(set(words)) < len(words) or REAL in words or "" in words:
        raise InputError(
            f"--names {','.join(words)} must be {len(paths)} different names, none of them {REAL}; write --names a,b."
        )
    return dict(zip(words, paths, strict=True))
