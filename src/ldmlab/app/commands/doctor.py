"""`ldmlab doctor`: what this machine has for ldmlab, what is wrong with it, and the command that mends each.

Ends with 1 where something is wrong. It reads only; weights are hashed, which takes a few seconds for the largest.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_EXTRAS = {  # of pyproject.toml, and what each is for
    "dashboards": "ldmlab dashboard --wandb",
    "cloud": "shards at s3:// and gs://",
    "credentials": "ldmlab sample --mark credentials, ldmlab verify",
    "pages": "ldmlab study serve, ldmlab play",
    "cluster": "launcher=slurm|local, sweeper=optuna",
    "dev": "make test, export to diffusers checked against diffusers itself",
}
_LEAST_GIB = 2.0  # of free disk: a run's checkpoints at the demo's size


class Finding(NamedTuple):
    """A line of the table."""

    what: str
    value: str
    wrong: str = ""  # what is wrong and the way out; empty: nothing


def run(args: argparse.Namespace) -> int:
    wrong: list[str] = []
    for title, findings in (
        ("packages", packages()),
        ("devices", devices()),
        ("disk", disks()),
        ("weights at hand", weights()),
        ("plugins", plugin_packages()),
    ):
        print(title)
        for finding in readable(title, findings):
            print(f"  {'!' if finding.wrong else ' '} {finding.what:<28} {finding.value}")
            wrong += [finding.wrong] * bool(finding.wrong)
        print()
    print("\n".join([f"{len(wrong)} to mend:", *(f"  {one}" for one in wrong)]) if wrong else "nothing is wrong")
    return 1 if wrong else 0


def readable(title: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings up to a file or folder that may not be read, which is one as well."""
    try:
        yield from findings
    except OSError as error:
        reason = f"{error.filename or title} cannot be read ({(error.strerror or str(error)).lower()})"
        yield Finding(title, reason, f"{reason}; make it readable, or name another folder.")


def packages() -> Iterator[Finding]:
    """Python, ldmlab and each requirement that is missing or of another version; extras by what they are for."""
    from packaging.requirements import Requirement

    yield Finding("python", platform.python_version())
    needed = [Requirement(text) for text in importlib.metadata.requires("ldmlab") or []]
    yield Finding("ldmlab", importlib.metadata.version("ldmlab"))
    base = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in base:
        if text := _unmet(one):
            yield Finding(one.name, text, f"{one.name}: {text}; run `pip install '{one.name}{one.specifier}'`.")
        elif one.name in ("torch", "pytorch-lightning"):
            yield Finding(one.name, importlib.metadata.version(one.name))
    for extra, use in _EXTRAS.items():
        more = [one for one in needed if one not in base and one.marker and one.marker.evaluate({"extra": extra})]
        unmet = [f"{one.name} ({text})" for one in more if (text := _unmet(one))]
        state = f"no: {', '.join(unmet)}; pip install 'ldmlab[{extra}]'" if unmet else "yes"
        yield Finding(f"[{extra}]", f"{use}: {state}")


def _unmet(requirement: "Requirement") -> str:
    """Why a requirement is not met; empty if it is."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    fits = requirement.specifier.contains(found, prereleases=True)
    return "" if fits else f"{found} instead of {requirement.specifier}"


def devices() -> Iterator[Finding]:
    """Processor and cards, with what training in half precision finds there."""
    import torch

    from ldmlab.nn.cards import card_named
    from ldmlab.training.settings import fast_precision

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("processor", f"{cores} cores, {kind}; trainer.precision=auto is {fast_precision('cpu')}")
    for index in range(torch.cuda.device_count()):
        name, bytes_ = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
        peak = card_named(name)
        known = f"{peak.half:g} TFLOP/s in half precision" if peak else "peak unknown: no MFU is logged"
        yield Finding(f"cuda:{index}", f"{name}, {bytes_ / 2**30:.0f} GiB, {known}")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    if shutil.which("nvidia-smi"):
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding(
            "gpu", "none usable", f"gpu: nvidia-smi is here but no card is usable ({built}); see `nvidia-smi`."
        )
    else:
        yield Finding("gpu", "none; training runs on the processor")


def disks() -> Iterator[Finding]:
    """Free space and whether one may write, where runs, temporary files, weights and loader workers' batches go."""
    from ldmlab.files import weights_folder

    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir()), "weights": weights_folder()}
    if Path("/dev/shm").is_dir():
        places["loader workers"] = Path("/dev/shm")  # batches pass through it
    for name, path in places.items():
        present = next(one for one in (path, *path.absolute().parents) if one.is_dir())
        free = shutil.disk_usage(present).free / 2**30
        wrong = f"{path} may not be written to; choose another folder." if not os.access(present, os.W_OK) else ""
        if name == "loader workers" and free < 0.5:
            wrong = (
                f"{path} has {free:.2f} GiB for the batches of workers; `docker run --shm-size=8g`, or data.workers=0."
            )
        elif name != "loader workers" and free < _LEAST_GIB:
            wrong = f"{path} has {free:.1f} GiB left; free some space."
        yield Finding(name, f"{free:.1f} GiB free in {path}", wrong)


def weights() -> Iterator[Finding]:
    """Published files, whether they are here and whole, their licences and uses."""
    from ldmlab.files import file_sha256, weights_folder
    from ldmlab.interop.published_weights import WEIGHTS

    for name, entry in WEIGHTS.items():
        path, wrong = weights_folder() / entry.file, ""
        state = f"no: `ldmlab fetch {name}` ({entry.mib} MiB)"
        if path.is_file():
            state = "yes"
            if not file_sha256(path).startswith(entry.sha256):
                state, wrong = "damaged", f"{path} is damaged; delete it and run `ldmlab fetch {name}`."
        yield Finding(name, f"{state}; {entry.licence}; {entry.used_for}", wrong)
    clips = sorted(path.name for path in (weights_folder() / "clip").glob("*") if path.is_file())
    yield Finding(
        "clip", f"{', '.join(clips) or 'none: `ldmlab fetch clip --model NAME`'}; open_clip models, each its licence"
    )


def plugin_packages() -> Iterator[Finding]:
    """Packages whose classes files may name: by entry point and by LDMLAB_PLUGINS, which every command checks."""
    from ldmlab.errors import InputError
    from ldmlab.plugins import VARIABLE, allow, by_entry_point

    for name in (one.strip() for one in os.environ.get(VARIABLE, "").split(",")):
        if name:
            yield Finding(name, f"allowed by {VARIABLE}")
    for name in sorted(by_entry_point()):
        try:
            allow(name, "entry point")
            yield Finding(name, "allowed by its entry point")
        except InputError as error:
            yield Finding(name, "cannot be imported", str(error))
    if not (os.environ.get(VARIABLE) or by_entry_point()):
        yield Finding("none", f"{VARIABLE} and the entry point ldmlab.plugins name no package")
