"""`ldmlab sample MODEL "a prompt" ...`: images with their settings inside, a grid, trajectories, sweeps."""

import argparse
import datetime
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.commands.sample_prompts import Inputs, Prompts, add_prompt_options, label
from ldmlab.errors import InputError, memory_ran_out
from ldmlab.inference.sample_settings import SampleSettings, parsed, variants

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel
    from ldmlab.inference.sample_settings import ResolvedSettings

MOST_SHOWN = 144  # images in one grid
_OTHERS = ("sweep", "precision", "weights", "device", "guider", "guider_image", "classifier")  # options in errors
EPILOG = """examples:
  ldmlab sample runs/emoji-1a2b "a red apple" "a clock" --guidance-scale 3
  ldmlab sample runs/emoji-1a2b --prompts prompts.txt --count 4 --size 64x96
  ldmlab sample runs/emoji-1a2b "a red apple" --trajectory
  ldmlab sample runs/emoji-1a2b "a red apple" --sweep steps=1,2,5,10,25,50
  ldmlab sample runs/emoji-1a2b "a red apple" --negative-prompt "a face" --guidance-scale 3
  ldmlab sample runs/emoji-1a2b "a red apple" --from sketch.png --strength 0.6
  ldmlab sample runs/emoji-1a2b --from photo.png --strength 0.3 --count 8        variations
  ldmlab sample runs/emoji-1a2b "a table" --from photo.png --mask hole.png       the rest stays as it is
  ldmlab sample runs/inpainting-1a2b --task inpainting photo.png --mask hole.png
  ldmlab sample runs/upscaler-1a2b --task super_resolution small.png
  ldmlab sample runs/landscapes-1a2b map.png --tile 512                          as large as the map
  ldmlab sample runs/imagenet-1a2b 207 980 --classifier runs/classifier-3c4d --classifier-scale 10
  torchrun --nproc-per-node 2 -m ldmlab sample runs/emoji-1a2b --prompts prompts.txt
  srun -n8 ldmlab sample runs/emoji-1a2b --prompts prompts.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    parser.epilog = EPILOG
    add("model", type=Path, help="model folder, run folder or checkpoint")
    add_prompt_options(parser)
    for setting in fields(SampleSettings):  # as text, so that errors show what was typed; a flag without a value
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.type == (bool | None) else {}
        add(f"--{setting.name.replace('_', '-')}", metavar=setting.name.upper(), help=setting.metadata["help"], **flag)
    add("--classifier", type=Path, help="guide by this stage=classifier run to the classes given as prompts")
    add("--classifier-scale", type=float, help="how strongly (10, the paper's)")
    add(
        "--guider",
        help="squared | lpips: guide the decoded estimate to low_resolution, or to --guider-image;\n"
        "a plugin's: package.Class",
    )
    add("--guider-weight", type=float, help="how strongly (1)")
    add("--guider-image", type=Path, help="an image to guide all samples to, no larger than they are")
    add("--first-index", type=int, default=0, help="number of the first image, to make one of many again (0)")
    add("--sweep", help="one image per value of a setting, such as steps=1,2,5,10,25,50")
    add("--trajectory", action="store_true", help="also the denoising trajectory, as a row and as an animation")
    add("--out", type=Path, help="new or empty folder (outputs/MODEL-N)")
    add("--batch-size", type=int, default=16, help="images at once; changes the speed only (16)")
    add("--weights", default="averaged", help="averaged | raw, for runs (averaged)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")


def run(args: argparse.Namespace) -> int:
    """Check everything, load, sample, write images and grids."""
    with _options_as_typed():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    typed = {one.name: getattr(args, one.name) for one in fields(SampleSettings)}
    settings = SampleSettings(**{name: parsed(name, text) for name, text in typed.items() if text is not None})
    swept, by_name = variants(settings, args.sweep)
    _check_options(args)
    prompts = Prompts.of(args)
    lines = prompts.lines()

    import ldmlab.distributed as distributed

    rank, _ = distributed.join(datetime.timedelta(hours=2))  # only short messages pass, some after a long wait
    try:
        with _loaded(args, prompts, lines, settings, by_name) as job:
            shown = distributed.gather(job.sample(args.batch_size, trajectory=args.trajectory))
            if rank == 0:
                job.save_grid({place: image for part in shown for place, image in part.items()}, swept, prompts.count)
                print(f"{len(job.inputs) * len(job.variants)} images in {job.folder}")
    finally:
        distributed.leave()
    return 0


@contextmanager
def _loaded(
    args: argparse.Namespace,
    prompts: Prompts,
    lines: list[str | Inputs],
    settings: SampleSettings,
    by_name: Mapping[str, SampleSettings],
) -> "Iterator[Job]":
    """The model and its inputs, checked before the folder is created."""
    from ldmlab.build import load
    from ldmlab.inference.inputs import check_size

    model = load(args.model, weights=args.weights, device=args.device).in_precision(args.precision)
    if args.classifier or args.guider:
        from ldmlab.app.guiders import guiders_by_option

        model.with_guiders(*guiders_by_option(vars(args), model))
    inputs = prompts.inputs(model, lines, settings.size if isinstance(settings.size, tuple) else None)
    model.check(inputs)
    resolved = {name: model.resolved(variant, inputs) for name, variant in by_name.items()}
    for variant in resolved.values():
        assert isinstance(variant.size, tuple)
        for one in inputs[:: prompts.count]:
            check_size(one, variant.size, model.enlargement)
    with _own_folder(args.out, args.model) as folder, _memory_explained():
        yield Job(model, inputs, resolved, folder, args.first_index)


@dataclass(frozen=True)
class Job:
    """The images of one call; number `first + i` is that of entry i."""

    model: "LoadedModel"
    inputs: list[Inputs]
    variants: "Mapping[str, ResolvedSettings]"  # by the end of their images' file names
    folder: Path
    first: int

    @property
    def shown(self) -> int:
        """The first of the inputs, which the grid shows."""
        return min(max(MOST_SHOWN // len(self.variants), 1), len(self.inputs))

    def sample(self, batch_size: int, *, trajectory: bool) -> dict[tuple[int, str], Any]:
        """This process's images to files; those of the grid by number and variant."""
        import ldmlab.distributed as distributed
        from ldmlab.inference.grids import save_png
        from ldmlab.inference.model import generate
        from ldmlab.inference.trajectory import Trajectory

        rank, world = distributed.rank(), distributed.world_size()
        mine = len(range(rank, len(self.inputs), world))
        total = mine * sum(len(self.model.grid(settings)) - 1 for settings in self.variants.values())
        shown: dict[tuple[int, str], Any] = {}
        with _progress(total, quiet=rank > 0) as count:
            for name, settings in self.variants.items():
                frames = Trajectory(self.model, settings) if trajectory else None

                def after_step(step: int, x: Any, clean: Any, frames: Trajectory | None = frames) -> Any:
                    count(len(x))
                    return x if frames is None else frames(step, x, clean)

                for numbers, images in generate(
                    self.model,
                    self.inputs,
                    settings,
                    batch_size=batch_size,
                    rank=rank,
                    world=world,
                    first_index=self.first,
                    after_step=after_step,
                ):
                    for number, image in zip(numbers, images.numpy(), strict=True):
                        file = self.folder / f"{number:06d}{name}.png"  # in a sweep 000012_steps-5.png
                        save_png(file, image, self._record(number, settings))
                        if number - self.first < self.shown:
                            shown[number, name] = image
                    if frames is not None:
                        own = [self.inputs[number - self.first] for number in numbers]
                        frames.save(self.folder, own, numbers, [label(one) for one in own])
        return shown

    def _record(self, number: int, settings: "ResolvedSettings") -> dict[str, Any]:
        """All settings that reproduce the image."""
        from importlib.metadata import version

        info, own = self.model.info, self.inputs[number - self.first]
        prompt = {"prompt" if field == "caption" else field: value for field, value in own.items()}
        known = {f"model {key}": info[key] for key in ("path", "fingerprint", "weights", "step") if key in info}
        more = {"precision": self.model.precision, "ldmlab": version("ldmlab")}
        return {**prompt, "index": number, **settings.as_text(), **info.get("guiders", {}), **known, **more}

    def save_grid(self, images: Mapping[tuple[int, str], Any], swept: str | None, count: int) -> None:
        """grid.png, or sweep_NAME.png with a row per image; of at most MOST_SHOWN images."""
        from ldmlab.inference.grids import grid, table

        rows = [[images[self.first + n, name] for name in self.variants] for n in range(self.shown)]
        labels = [label(one) for one in self.inputs[: self.shown]]
        if swept is not None:
            titles = [name.removeprefix("_").replace("-", " ", 1) for name in self.variants]
            table(rows, titles, labels).save(self.folder / f"sweep_{swept}.png")
        else:
            columns = count if 1 < count <= 16 else None
            grid([row[0] for row in rows], labels, columns).save(self.folder / "grid.png")


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Any]:
    """Counts steps of images."""
    from rich.console import Console

    from ldmlab.app.progress import bar

    done = 0
    with bar("sampling", "steps", Console(stderr=True, quiet=quiet)) as show:
        show(0, total)

        def count(images: int) -> None:
            nonlocal done
            done += images
            show(done, total)

        yield count


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options without effect, alone or in combination."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} holds no image; choose 1 or more.")
    if not 0 <= args.first_index < 2**62:
        raise InputError(f"--first-index {args.first_index} is outside 0 .. 2^62; choose a smaller number.")
    if args.trajectory and args.sweep:
        raise InputError("--trajectory and --sweep make different grids; use one at a time.")
    for option, needs in (("classifier_scale", "classifier"), ("guider_weight", "guider"), ("guider_image", "guider")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            typed = f"--{option.replace('_', '-')} {getattr(args, option)}"
            raise InputError(f"{typed} does nothing without --{needs}; add it.")
    _check_folder(args.out)


def _check_folder(out: Path | None) -> None:
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is in use; give a new or empty folder.")


@contextmanager
def _own_folder(out: Path | None, model: Path) -> Iterator[Path]:
    """The folder of --out, or the first free outputs/MODEL-N, which no other command uses meanwhile."""
    import ldmlab.distributed as distributed
    from ldmlab.files import FileLock

    locks: list[FileLock] = []

    def make() -> Path:
        _check_folder(out)
        folder = _new_folder(out, model)
        locks.append(FileLock(folder / ".sampling"))
        if not locks[0].take():
            locks.clear()
            raise InputError(f"--out {folder} is in use by another process; give a new or empty folder.")
        return folder

    folder = distributed.shared(make)
    try:
        yield folder
    finally:
        for lock in locks:
            lock.release(remove=True)
            with suppress(OSError):
                folder.rmdir()  # nothing was written


def _new_folder(out: Path | None, model: Path) -> Path:
    number = 1
    while True:
        folder = out or Path("outputs") / f"{model.resolve().stem}-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"--out {folder} cannot be made ({error.strerror}); give another folder.") from error
        else:
            return folder


@contextmanager
def _options_as_typed() -> Iterator[None]:
    """Settings are `steps=9` in Python; an error of the command names `--steps 9`."""
    try:
        yield
    except InputError as error:
        names = [*(one.name for one in fields(SampleSettings)), *_OTHERS]
        message = re.sub(
            rf"(?<![\w.-])(?:sampler\.)?({'|'.join(names)})=", lambda m: f"--{m[1].replace('_', '-')} ", str(error)
        )
        raise InputError(message) from error


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Inside, a lack of memory becomes one InputError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        raise InputError(
            "the images of one batch do not fit into memory; choose a smaller --batch-size or --size, or --tile 512 "
            "and --window."
        ) from error
