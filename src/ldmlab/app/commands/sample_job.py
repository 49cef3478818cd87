"""The work of `ldmlab sample`: images, strips and sheets into one folder, shared between processes."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel
    from ldmlab.inference.sample_settings import SampleSettings

MOST = 144  # images on one sheet


def label(request: dict[str, Any]) -> str:
    """What an image was asked to show, in few words."""
    return ", ".join(text for name, value in request.items() if (text := _shown(name, value)))


def _shown(name: str, value: Any) -> str:
    if name in ("mask", "crop"):
        return ""
    if name == "boxes" and not isinstance(value, str):
        return f"{len(value)} objects"
    if name in ("image", "init_image", "low_resolution", "reference", "segmentation", "boxes"):
        file = Path(str(getattr(value, "image", value))).name
        return f"from {file}" if name == "init_image" else file
    return f"not {value}" if name == "negative_prompt" else str(value)


class Job:
    """One call of the command, on one process."""

    def __init__(
        self,
        model: "LoadedModel",
        requests: list[dict[str, Any]],
        variants: "list[tuple[str | None, SampleSettings]]",  # name of the setting in file names, settings
        folder: Path,
        args: argparse.Namespace,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.requests, self.variants, self.folder = model, requests, variants, folder
        self.args, self.rank, self.world = args, rank, world

    def sample(self) -> None:
        """This process's images to files."""
        from ldmlab.inference.grids import save_png
        from ldmlab.inference.model import generate
        from ldmlab.inference.trajectory import Strip

        first = self.args.first_index
        with self._progress() as count:
            for name, settings in self.variants:
                strip = Strip(self.model, settings) if self.args.trajectory else None

                def after_step(step: int, x: Any, clean: Any, strip: Strip | None = strip) -> Any:
                    count(len(x))
                    return x if strip is None else strip(step, x, clean)

                split = {"rank": self.rank, "world": self.world, "batch_size": self.args.batch_size}
                for numbers, images in generate(
                    self.model, self.requests, settings, first_index=first, after_step=after_step, **split
                ):
                    for number, image in zip(numbers, images.numpy(), strict=True):
                        save_png(self.path(number, name), image, self._record(number, settings))
                    if strip is not None:
                        self._save_strips(strip, numbers)

    def path(self, number: int, name: str | None) -> Path:
        """000012.png, in a sweep 000012_steps-5.png."""
        return self.folder / (f"{number:06d}.png" if name is None else f"{number:06d}_{name}.png")

    def _record(self, number: int, settings: "SampleSettings") -> dict[str, Any]:
        """What it takes to make the image again."""
        from importlib.metadata import version

        info = self.model.info
        request = self.requests[number - self.args.first_index]
        told = {"prompt" if field == "caption" else field: value for field, value in request.items()}
        known = {f"model {key}": info[key] for key in ("path", "fingerprint", "weights", "step") if key in info}
        more = {"precision": self.model.precision, "ldmlab": version("ldmlab")}
        guiders = info.get("guiders", {})
        return {**told, "index": number, **settings.as_text(), **guiders, **known, **more}

    def _save_strips(self, strip: Any, numbers: list[int]) -> None:
        from ldmlab.inference.grids import save_animation, table

        columns, titles = strip.columns(), strip.titles()
        requests = [self.requests[number - self.args.first_index] for number in numbers]
        for number, request, frames in zip(numbers, requests, strip.take(requests, numbers), strict=True):
            title = [label(request)]
            row = table([[frames[c] for c in columns]], [titles[c] for c in columns], title)
            row.save(self.folder / f"{number:06d}_trajectory.png")
            save_animation(self.folder / f"{number:06d}_trajectory.webp", frames)

    def draw_sheet(self, swept: str | None) -> None:
        """grid.png, or sweep_NAME.png with a row per image; of at most MOST images."""
        import numpy as np
        from PIL import Image

        from ldmlab.inference.grids import grid, table

        shown = self.requests[: max(MOST // len(self.variants), 1)]
        numbers = range(self.args.first_index, self.args.first_index + len(shown))
        rows = [[np.asarray(Image.open(self.path(n, name))) for name, _ in self.variants] for n in numbers]
        labels = [label(request) for request in shown]
        if swept is not None:
            titles = [str(name).replace("-", " ", 1) for name, _ in self.variants]
            table(rows, titles, labels).save(self.folder / f"sweep_{swept}.png")
        else:
            columns = self.args.count if 1 < self.args.count <= 16 else None
            grid([row[0] for row in rows], labels, columns).save(self.folder / "grid.png")

    @contextmanager
    def _progress(self) -> Iterator[Any]:
        """Counts steps of images, on the first process only."""
        from rich.console import Console

        from ldmlab.app.progress import bar

        mine = len(range(self.rank, len(self.requests), self.world))
        total, done = mine * sum(len(self.model.grid(settings)) - 1 for _, settings in self.variants), 0
        with bar("sampling", "steps", Console(stderr=True, quiet=self.rank > 0)) as show:
            show(0, total)

            def count(images: int) -> None:
                nonlocal done
                done += images
                show(done, total)

            yield count
