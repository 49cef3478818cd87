"""Images of one `ldmlab sample` as files: each with its settings inside, a grid, trajectories."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ldmlab import distributed
from ldmlab.app.commands.sample_prompts import Inputs, label
from ldmlab.app.filters import Guard
from ldmlab.app.progress import bar
from ldmlab.contracts import AfterStep
from ldmlab.errors import InputError, memory_ran_out, one_of
from ldmlab.inference.grids import grid, save_png, table
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.inference.sample_settings import ResolvedSettings
from ldmlab.inference.trajectory import Trajectory

MOST_SHOWN = 144  # images in one grid
LOCK = ".sampling"  # in the folder of a command that runs
UNFINISHED = ".unfinished"  # in the folder of a command that has not ended: its options
BUSY = "--out {} is in use by another process"


@dataclass(frozen=True)
class Marks:
    """How files are marked as generated; an image that is not marked stays bit for bit what it was."""

    pixels: Callable[[np.ndarray], np.ndarray] | None = None
    sign: Callable[[Path, str], None] | None = None
    check_size: Callable[[int, int], None] = lambda height, width: None  # before any work

    def save(self, path: Path, image: np.ndarray, settings: Mapping[str, Any]) -> None:
        """The marked PNG with its settings."""
        save_png(path, image if self.pixels is None else self.pixels(image), settings)
        if self.sign is not None:
            self.sign(path, path.name)


def marks_of(words: str | None, certificate: Path | None, key: Path | None) -> Marks:
    """The marks of `--mark watermark,credentials`; InputError for others and for options without effect."""
    names = [] if words is None else words.split(",")
    for name in names:
        one_of("--mark", name, ("watermark", "credentials"))
    if "credentials" not in names and (certificate or key):
        raise InputError("--certificate and --key do nothing without --mark credentials; add it.")
    marks = Marks()
    if "watermark" in names:
        from ldmlab.marking.watermark import check_size, watermarked

        marks = Marks(watermarked, None, check_size)
    if "credentials" in names:
        try:
            from ldmlab.marking.credentials import Signer
        except ModuleNotFoundError as error:
            raise InputError(
                f"--mark credentials needs {error.name}; run `pip install 'ldmlab[credentials]'`."
            ) from error
        marks = replace(marks, sign=Signer(certificate, key).sign)
    return marks


@dataclass(frozen=True)
class Job:
    """The images of one call; number `first + i` is that of entry i."""

    model: LoadedModel
    inputs: list[Inputs]
    variants: Mapping[str, ResolvedSettings]  # by the end of their images' file names
    folder: Path
    first: int
    marks: Marks = Marks()
    watch: AfterStep | None = None  # sees every step first
    quiet: bool = False
    guard: Guard | None = None  # of --filter

    @property
    def shown(self) -> int:
        """The first of the inputs, which the grid shows."""
        return min(max(MOST_SHOWN // len(self.variants), 1), len(self.inputs))

    def sample(self, batch_size: int, *, trajectory: bool) -> dict[tuple[int, str], Any]:
        """This process's images to files; those of the grid by number and variant."""
        shown: dict[tuple[int, str], Any] = {}
        rank, world = distributed.rank(), distributed.world_size()
        steps = sum(len(self.model.grid(settings)) - 1 for settings in self.variants.values())
        skip = self.guard.blocked_prompts(self.inputs, self.first) if self.guard else frozenset()
        total, done = len(set(range(rank, len(self.inputs), world)) - skip) * steps, 0
        with bar("sampling", "steps", quiet=rank > 0 or self.quiet) as show:
            show(0, total)
            for name, settings in self.variants.items():
                frames = Trajectory(self.model, settings) if trajectory else None
                shows = trajectory or getattr(settings.build_sampler(), "shows_steps", True)

                def after_step(step: int, x: Any, clean: Any, frames: Trajectory | None = frames) -> Any:
                    nonlocal done
                    done += len(x)
                    show(done, total)
                    for each in (self.watch, frames):
                        x = x if each is None else each(step, x, clean)
                    return x

                part = {"rank": rank, "world": world, "first_index": self.first, "batch_size": batch_size}
                for numbers, images in generate(
                    self.model, self.inputs, settings, after_step=after_step if shows else None, skip=skip, **part
                ):
                    if not shows:  # a solver with steps of its own
                        done += len(numbers) * (len(self.model.grid(settings)) - 1)
                        show(done, total)
                    files = [f"{number:06d}{name}.png" for number in numbers]  # in a sweep 000012_steps-5.png
                    allowed = self.guard.allowed(files, images) if self.guard else [True] * len(files)
                    for number, file, image in compress(zip(numbers, files, images.numpy(), strict=True), allowed):
                        self.marks.save(self.folder / file, image, self._record(number, settings))
                        if number - self.first < self.shown:
                            shown[number, name] = image
                    if frames is not None:
                        own = [self.inputs[number - self.first] for number in numbers]
                        frames.save(self.folder, own, numbers, [label(one) for one in own])
        return shown

    def _record(self, number: int, settings: ResolvedSettings) -> dict[str, Any]:
        info, own = self.model.info, self.inputs[number - self.first]
        prompt = {"prompt" if field == "caption" else field: value for field, value in own.items()}
        known = {f"model {key}": info[key] for key in ("path", "fingerprint", "weights", "step") if key in info}
        more = {"precision": self.model.precision, "ldmlab": version("ldmlab")}
        more |= {"filter": str(self.guard.filter.record())} if self.guard else {}
        return {**prompt, "index": number, **settings.as_text(), **info.get("guiders", {}), **known, **more}

    def save_grid(self, images: Mapping[tuple[int, str], Any], swept: str | None, per_prompt: int) -> None:
        """grid.png, or sweep_NAME.png with a row per image; of at most MOST_SHOWN images, without blocked ones."""
        left = [n for n in range(self.shown) if all((self.first + n, name) in images for name in self.variants)]
        rows = [[images[self.first + n, name] for name in self.variants] for n in left]
        labels = [label(self.inputs[n]) for n in left]
        if not rows:
            return
        if swept is not None:
            titles = [name.removeprefix("_").replace("-", " ", 1) for name in self.variants]
            page, file = table(rows, titles, labels), self.folder / f"sweep_{swept}.png"
        else:
            columns = per_prompt if 1 < per_prompt <= 16 and len(left) == self.shown else None
            page, file = grid([row[0] for row in rows], labels, columns), self.folder / "grid.png"
        self.marks.save(file, np.asarray(page), {})


@contextmanager
def sampling(folder: Path, command: str) -> Iterator[None]:
    """Inside, the folder notes `command`, which may be run again after a failure; a lack of memory is an InputError."""
    if distributed.rank() == 0:
        (folder / UNFINISHED).write_text(command, encoding="utf-8")
    try:
        yield
    except BaseException as error:
        if not any(folder.glob("*.png")):
            (folder / UNFINISHED).unlink(missing_ok=True)
        if not memory_ran_out(error):
            raise
        raise InputError(
            "the images of one batch do not fit into memory; choose a smaller --batch-size or --size, or --tile 512 "
            "and --window."
        ) from error
    if distributed.rank() == 0:
        (folder / UNFINISHED).unlink()


def check_folder(out: Path, command: str) -> None:
    """A new or empty folder, or that of this very command when it did not end: its images are made again."""
    names = [entry.name for entry in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    held = [name for name in names if name not in (LOCK, UNFINISHED)]
    note = out / UNFINISHED
    if held and not (note.is_file() and note.read_text(encoding="utf-8", errors="replace") == command):
        raise InputError(f"--out {out} holds files already ({min(held)}); give a new or empty folder.")


def output_folder(out: Path | None, model: Path, command: str) -> Path:
    """The folder of --out, or the first free outputs/MODEL-N, made now."""
    if out is not None:
        check_folder(out, command)
    number = 0
    while True:
        number += 1
        folder = out or Path("outputs") / f"{model.resolve().stem}-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"--out {folder} cannot be made ({error.strerror}); give another folder.") from error
