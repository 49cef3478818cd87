"""New folders of models: import of a foreign model, and export in any format; written completely or not at all.

Every import is run once, every export is compared with what was written.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import yaml
from torch import Tensor

from ldmlab.checkpoints import save_checkpoint
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.files import disk_errors, locked
from ldmlab.interop import compvis, verify
from ldmlab.interop.imported import Imported, assembled, assembled_first_stage
from ldmlab.model_files import ModelFiles, read_model, write_model_folder

_LATENT_SIDE = 8  # px of the check; every published model takes it
_TOKENS = 4


def write_import(imported: Imported, out: Path) -> None:
    """The model folder at `out`, which must be new; nothing is there unless every check passed."""
    check_new(out)
    check_runs(imported)
    with new_folder(out) as folder:
        (folder / "README.md").write_text(card(imported), encoding="utf-8")
        write_model_folder(folder, imported.spec, imported.parts)
        for name, part in imported.parts.items():
            _check_written(folder / f"{name}.safetensors", part)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `out` at the end of a block without an error; one process at a time."""
    check_new(out)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be made ({error.strerror}); choose another folder.") from error
    lock = out.parent / f".{out.name}.lock"
    with disk_errors(out), locked(lock, f"out={out} is being written by another command", remove=True):
        check_new(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        try:
            yield temporary
            for path in [temporary, *temporary.rglob("*")]:  # usual rights, whatever writers of temporary files chose
                path.chmod(0o755 if path.is_dir() else 0o644)
            temporary.replace(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new(out: Path) -> None:
    """Refuse a folder with other content."""
    try:
        full = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise InputError(f"out={out} cannot be used ({error.strerror}); choose another folder.") from error
    if full:
        raise InputError(f"out={out} is not empty; choose a new folder.")


@torch.inference_mode()
def check_runs(imported: Imported) -> None:
    """All tensors and the networks' outputs for noise are finite."""
    for part, tensors in imported.parts.items():
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise InputError(
                f"{imported.source}: {part} holds values that are no numbers ({bad[0]}); use another file."
            )
    if imported.spec["kind"] == "first_stage":
        outputs = _run_first_stage(assembled_first_stage(imported))
    else:
        model = assembled(imported)
        latents = _noise(imported.spec["backbone"]["out_channels"], _LATENT_SIDE, _LATENT_SIDE)
        outputs = _run_first_stage(model.first_stage)
        outputs["denoiser"] = model.backbone(latents, torch.tensor([500.0]), _noise_conditioning(imported.spec))
    for name, output in outputs.items():
        if not bool(torch.isfinite(output).all()):
            raise InputError(f"{imported.source}: the {name} makes values that are no numbers; use another file.")


def _run_first_stage(stage: Any) -> dict[str, Tensor]:
    side = _LATENT_SIDE * stage.downsampling
    moments = stage.encode(_noise(3, side, side).clamp(-1, 1))
    return {"encoder": moments.mean, "decoder": stage.decode(moments.mean)}


def _noise_conditioning(spec: dict[str, Any]) -> Conditioning:
    """Noise in every slot that the U-Net has."""
    node = spec["backbone"]
    context, vector = node.get("context_width"), node.get("vector_width")
    extra = node["in_channels"] - node["out_channels"]
    return Conditioning(
        tokens=_noise(_TOKENS, context) if context else None,
        spatial=_noise(extra, _LATENT_SIDE, _LATENT_SIDE) if extra else None,
        vector=_noise(vector) if vector else None,
    )


def _noise(*shape: int) -> Tensor:
    """One image of fixed random pixels."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _check_written(path: Path, part: dict[str, Tensor]) -> None:
    """The files equal the tensors read, bit for bit; one tensor in memory at a time."""
    for name, tensor in part.items():
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            if not torch.equal(file.get_tensor(name), tensor):
                raise InputError(f"{path.name}: {name} was not written as it was read; check the disk and try again.")


def card(imported: Imported) -> str:
    """README.md: description, origin, use."""
    spec = imported.spec
    lines = [
        f"# {Path(imported.source).name}",
        "",
        f"A {spec['kind'].replace('_', ' ')} for images of {spec['image_size']} px, imported from "
        f"`{Path(imported.source).name}` ({imported.weights} weights); the licence of its source applies.",
        "",
    ]
    if spec["kind"] == "latent_diffusion":
        inputs = ", ".join(spec["conditioners"]) or "nothing (unconditional)"
        lines += [
            f"- takes as input: {inputs}",
            "",
            "```python",
            "import ldmlab",
            "",
            'model = ldmlab.load("THIS_FOLDER")',
            "```",
            "",
        ]
    return "\n".join(lines)


PARTS = ("first_stage", "denoiser", "conditioner", "clip", "classifier")  # what a model is; a run keeps more


class Written(NamedTuple):
    """Content of the finished folder."""

    what: str
    differences: verify.Differences  # the largest of each part between their program and ours
    usage: str  # lines of Python
    note: str = ""  # what others do differently around the networks


def write_ldmlab(files: ModelFiles, folder: Path) -> Written:
    """Our model folder: model.yaml and NAME.safetensors, read again and equal bit for bit."""
    parts = {name: part for name, part in files.parts.items() if name in PARTS}
    write_model_folder(folder, {**files.spec, "weights": files.weights, "step": files.step}, parts)
    found = read_model(folder)
    for name, part in parts.items():
        if any(not torch.equal(tensor, found.parts[name][key]) for key, tensor in part.items()):
            raise InputError(
                f"export: {name}.safetensors was not written as it was read; check the disk and try again."
            )
    if files.spec["kind"] == "latent_diffusion":
        assembled(Imported(str(folder), found.spec, found.parts, found.weights))
    usage = 'model = ldmlab.load("THIS_FOLDER")' if files.spec["kind"] == "latent_diffusion" else ""
    return Written(f"model folder with {', '.join(sorted(parts))}", {}, usage and f"import ldmlab\n\n{usage}")


def write_compvis(files: ModelFiles, folder: Path) -> Written:
    """model.ckpt and config.yaml as the official code reads them; imported again and compared with our model."""
    state, config = compvis.export(files.spec, files.parts)
    save_checkpoint(folder / "model.ckpt", {"state_dict": state, "global_step": files.step or 0})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    found = compvis.read(folder / "model.ckpt", folder / "config.yaml", weights="raw")
    own = Imported(str(files.folder), files.spec, files.parts, files.weights)
    differences = verify.compare_imports(own, found)
    usage = 'from ldmlab.interop import compvis\n\nmodel = compvis.load("model.ckpt", "config.yaml")'
    return Written("official checkpoint model.ckpt and config.yaml", differences, usage)


def write_diffusers(files: ModelFiles, folder: Path) -> Written:
    """A pipeline, or modules where none exists; loaded by diffusers and compared with our model."""
    from ldmlab.interop.diffusers.diffusers_export import export_folder

    what, differences = export_folder(files.spec, files.parts, folder)
    loader = what.split()[0]
    if loader == "modules":
        return Written(what, differences, "")
    usage = f'from diffusers import {loader}\n\npipeline = {loader}.from_pretrained("THIS_FOLDER")'
    return Written(what, differences, usage, _CAPTIONS if (folder / "tokenizer" / "merges.txt").is_file() else "")


_CAPTIONS = (
    "Captions with curly quotes, HTML entities or a separate exclamation mark may be cut into other tokens "
    "by transformers' tokenizer than by ldmlab's."
)


FORMATS: dict[str, Callable[[ModelFiles, Path], Written]] = {
    "ldmlab": write_ldmlab,
    "safetensors": write_ldmlab,
    "compvis": write_compvis,
    "diffusers": write_diffusers,
}
