"""One evaluation for averages of several lengths: what is checked before the first of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.averaging import checked_length
from ldmlab.data.output_folder import open_plan
from ldmlab.disks import disk_errors
from ldmlab.errors import InputError
from ldmlab.evaluation.run import check_out
from ldmlab.files import by_step

PLAN = "lengths.json"  # the options of all evaluations below a folder
_FREE = (  # may differ between two of them
    *("weights", "out", "device", "batch_size", "compile", "wandb", "keep_reference", "images", "paths", "plugins"),
)


@contextmanager
def lengths_in(config: Mapping[str, Any], model: Path, out: Path) -> Iterator[None]:
    """Evaluations of several lengths; options with which none was finished bind no later ones."""
    new = begin_lengths(config, model, out)
    try:
        yield
    except BaseException:
        if new and distributed.rank() == 0 and not any(out.glob("length_*/metrics.json")):
            with suppress(OSError):
                (out / PLAN).unlink()
                out.rmdir()
        raise


def begin_lengths(config: Mapping[str, Any], model: Path, out: Path) -> bool:
    """Whether these are the first evaluations of a folder; model: its folder.

    InputError for lengths that no average has, and for a folder of evaluations with other options.
    """
    lengths = config["weights"]
    if not lengths:
        raise InputError("weights=[] names no weights; give averaged, raw, or lengths such as [0.05,0.10].")
    for length in lengths:
        checked_length(length, "weights")
    if len({f"{length:g}" for length in lengths}) < len(lengths):
        raise InputError(f"weights={lengths} names a length twice; give each once.")
    checkpoints = by_step(model / "checkpoints", ".ckpt")  # those found at another step are of another curve
    plan = {name: value for name, value in config.items() if name not in _FREE}
    plan["checkpoint"] = checkpoints[-1].stem if checkpoints else None

    def begin() -> bool:
        if new := not (out / PLAN).exists():
            check_out(out)
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            open_plan(out / PLAN, plan, f"out={out}")
        return new

    return distributed.shared(begin)
