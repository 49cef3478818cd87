"""`ldmlab play MODEL [MODEL2]`: a page on which a model, or two side by side, can be tried.

examples:
  ldmlab play runs/emoji-1a2b
  ldmlab play runs/emoji-1a2b runs/emoji-3c4d                  both from the same noise
  ldmlab play runs/emoji-1a2b --host 0.0.0.0 --password-file secret.txt
  ldmlab play runs/emoji-1a2b --filter concepts.yaml           blocked images are counted, not shown

The page is for this machine alone unless --host says otherwise, which needs a password: typed, in a file, or in the
environment variable LDMLAB_PLAY_PASSWORD. What is made is kept under --out with its settings, as by ldmlab sample.
"""

import argparse
import os
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.cli import at_least
from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.app.filters import ConceptFilter
    from ldmlab.app.sample_files import Marks
    from ldmlab.inference.model import LoadedModel
    from ldmlab.play.form import Wanted
    from ldmlab.play.job_queue import Live
    from ldmlab.play.playground import Playground, Prepared

EXTRA = "pages"  # of pyproject.toml
PASSWORD = "LDMLAB_PLAY_PASSWORD"  # environment variable
_LOCAL = ("127.0.0.1", "localhost", "::1")
_LEAST_PASSWORD = 8  # letters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="model folder, run folder or checkpoint; one or two")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine only)")
    add("--port", type=int, default=8500, help="(8500)")
    add("--password", help="for another --host; everyone on this machine can read it, unlike the next")
    add("--password-file", type=Path, help=f"its first line is the password; or the variable {PASSWORD}")
    add("--out", type=Path, help="folder of what is made (outputs/MODEL-play)")
    add("--max-upload", type=int, default=10, help="MB of an uploaded file (10)")
    add("--max-images", type=int, default=8, help="images of one request (8)")
    add("--max-side", type=int, default=1024, help="px, of a result (1024)")
    add("--filter", type=Path, metavar="FILE", help="block prompts and images by the concepts of this yaml file (none)")
    add("--mark", default="auto", help="watermark, credentials, both with a comma, none; auto: what can be (auto)")
    add("--weights", default="averaged", help="averaged | raw | length of an average, for runs (averaged)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")


def run(args: argparse.Namespace) -> None:
    from ldmlab.disks import disk_errors

    for name in ("uvicorn", "starlette"):
        if not find_spec(name):
            raise InputError(f"ldmlab play needs {name}; run `pip install 'ldmlab[{EXTRA}]'`.")
    at_least(args, max_upload=1, max_images=1, max_side=1)
    if len(args.models) > 2:
        raise InputError(f"ldmlab play shows one model or two, not {len(args.models)}; leave some out.")
    password = chosen_password(args)
    out = args.out or Path("outputs") / f"{args.models[0].resolve().stem}-play"
    new = not out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        serve(args, out, password)
    finally:
        if new:
            with suppress(OSError):  # it holds something
                out.rmdir()


def serve(args: argparse.Namespace, out: Path, password: str | None) -> None:
    """The page, until a signal ends it."""
    import uvicorn

    from ldmlab.app.listening import address_of, listening_at
    from ldmlab.disks import locked
    from ldmlab.play.playground import application

    busy = f"--out {out} is in use by another process"
    with locked(out / ".playing", busy, remove=True), listening_at(args.host, args.port) as listening:
        app = application(playground_of(args, out), password)
        print(f"{address_of(listening, args.host)} (stop with Ctrl-C; images go to {out})", flush=True)
        config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run([listening])


def chosen_password(args: argparse.Namespace) -> str | None:
    """From one of three places; needed where others can reach the page."""
    from ldmlab.files import read_text

    given = {"--password": args.password, PASSWORD: os.environ.get(PASSWORD)}
    if args.password_file is not None:
        try:
            given["--password-file"] = read_text(args.password_file).partition("\n")[0].strip()
        except (OSError, ValueError) as error:
            raise InputError(f"--password-file {args.password_file} cannot be read ({error}); give another.") from error
    given = {name: word for name, word in given.items() if word is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both give a password; give one of them.")
    if not given:
        if args.host not in _LOCAL:
            raise InputError(
                f"--host {args.host} opens the page to others, which needs a password; add --password-file FILE."
            )
        return None
    (name, word), *_ = given.items()
    if len(word) < _LEAST_PASSWORD:
        raise InputError(f"{name} holds fewer than {_LEAST_PASSWORD} letters; choose a longer password.")
    if word.encode(errors="ignore").decode() != word:
        raise InputError(f"{name} holds bytes that are no UTF-8, which no browser sends; choose another password.")
    return word


def chosen_marks(choice: str) -> tuple["Marks", str]:
    """The marks of `--mark`, and what the page says of them."""
    from dataclasses import replace

    from ldmlab.app.sample_files import marks_of
    from ldmlab.marking.watermark import LEAST_SIDE

    if choice == "none":
        return marks_of(None, None, None), "not marked"
    if choice != "auto":
        return marks_of(choice, None, None), f"marked as generated: {choice.replace(',', ' and ')}"
    signed = all(find_spec(name) for name in ("c2pa", "cryptography"))
    marks = marks_of("watermark,credentials" if signed else "watermark", None, None)
    whole = marks.pixels
    assert whole is not None
    fitting = replace(
        marks,
        pixels=lambda image: whole(image) if min(image.shape[:2]) >= LEAST_SIDE else image,
        check_size=lambda height, width: None,
    )
    words = f"watermark (from {LEAST_SIDE} px on)" + (" and signed credentials" if signed else "")
    return fitting, f"marked as generated: {words}"


def playground_of(args: argparse.Namespace, out: Path) -> "Playground":
    """The models, loaded, and the limits of the options."""
    from ldmlab.app.filters import read_filter
    from ldmlab.build import load
    from ldmlab.play.form import Limits, abilities
    from ldmlab.play.playground import Playground

    marks, words = chosen_marks(args.mark)
    block = None if args.filter is None else read_filter(args.filter, args.device)
    models = [load(one, weights=args.weights, device=args.device).in_precision(args.precision) for one in args.models]
    limits = Limits(args.max_upload << 20, args.max_images, args.max_side)
    able = abilities(models, [one.resolve().name for one in args.models], limits, words)
    able["filter"] = None if block is None else sorted(block.concepts)
    prepare = partial(prepared, marks=marks, block=block)
    return Playground(models, able, limits, out, prepare, previews=block is None)


def prepared(
    model: "LoadedModel", wanted: "Wanted", marks: "Marks", block: "ConceptFilter | None" = None
) -> "Prepared":
    """Checked as `ldmlab sample` does; its `run` samples and writes as it does."""
    import numpy as np

    from ldmlab.app.commands.sample import check_variants
    from ldmlab.app.commands.sample_prompts import label
    from ldmlab.app.filters import Guard
    from ldmlab.app.sample_files import Job, sampling
    from ldmlab.inference.trajectory import Trajectory
    from ldmlab.play.playground import Prepared

    if wanted.trajectory and block is not None:
        raise InputError("a trajectory shows noisy images, which the filter cannot check; leave it out.")
    checked = [wanted.inputs] * wanted.count
    model.check(checked)
    resolved = {name: model.resolved(one, checked) for name, one in wanted.by_name.items()}
    first = next(iter(resolved.values()))
    check_variants(resolved.values(), checked[:1], model.enlargement, marks.check_size, wanted.trajectory)

    def run(given: dict[str, Any], folder: Path, live: "Live") -> str:
        """Image files, their grid or sweep, and the trajectory, all marked; what the filter blocked."""
        inputs, guard = [given] * wanted.count, None if block is None else Guard(block)
        frames = Trajectory(model, first) if wanted.trajectory else None
        watch = live if frames is None else (lambda step, x, clean: frames(step, live(step, x, clean), clean))
        with sampling(folder, "ldmlab play"):
            job = Job(model, inputs, resolved, folder, 0, marks, watch, quiet=True, guard=guard)
            shown = job.sample(wanted.count, trajectory=False)
            job.save_grid(shown, wanted.swept, wanted.count)
            if frames is not None:
                page = frames.page(frames.take(inputs, [*range(wanted.count)]), [*map(label, inputs)])
                marks.save(folder / "trajectory.png", np.asarray(page), {})
            return "" if guard is None else guard.finish(folder, len(resolved))[1].removeprefix("; ")

    notes = [f'the end of the caption is too long for this model: "{end}"' for end in model.lost(wanted.inputs)]
    total = wanted.count * sum(len(model.grid(one)) - 1 for one in resolved.values())
    assert isinstance(first.size, tuple)
    return Prepared(run, first.size, total, notes)
