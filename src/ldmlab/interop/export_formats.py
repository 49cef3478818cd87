"""A model as a folder in a format of ours or of others: `writer(files, folder)`, each checked by what it wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from ldmlab.checkpoints import save_checkpoint
from ldmlab.errors import InputError
from ldmlab.interop import compvis, verify
from ldmlab.interop.assembly import Imported, assembled
from ldmlab.model_files import ModelFiles, read_model, write_model_folder

PARTS = ("first_stage", "denoiser", "conditioner", "clip", "classifier")  # what a model is; a run keeps more


class Written(NamedTuple):
    """What lies in the folder now."""

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
    """model.ckpt and config.yaml as the official code reads them; imported again and run beside ours."""
    state, config = compvis.export(files.spec, files.parts)
    save_checkpoint(folder / "model.ckpt", {"state_dict": state, "global_step": files.step or 0})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    found = compvis.read(folder / "model.ckpt", folder / "config.yaml", weights="raw")
    own = Imported(str(files.folder), files.spec, files.parts, files.weights)
    differences = verify.compare_imports(own, found)
    usage = 'from ldmlab.interop import compvis\n\nmodel = compvis.load("model.ckpt", "config.yaml")'
    return Written("official checkpoint model.ckpt and config.yaml", differences, usage)


def write_diffusers(files: ModelFiles, folder: Path) -> Written:
    """A pipeline, or modules where none exists; loaded by diffusers and run beside ours."""
    from ldmlab.interop.diffusers.exporting import export_folder

    what, differences = export_folder(files.spec, files.parts, folder)
    loader = what.split()[0]
    if loader == "modules":
        return Written(what, differences, "")
    usage = f'from diffusers import {loader}\n\npipeline = {loader}.from_pretrained("THIS_FOLDER")'
    return Written(what, differences, usage, _CAPTIONS if (folder / "tokenizer" / "merges.txt").is_file() else "")


_CAPTIONS = (
    "Captions with curly quotes, HTML entities or an exclamation mark that stands alone may be cut into other tokens "
    "by transformers' tokenizer than by ldmlab's."
)


FORMATS: dict[str, Callable[[ModelFiles, Path], Written]] = {
    "ldmlab": write_ldmlab,
    "safetensors": write_ldmlab,
    "compvis": write_compvis,
    "diffusers": write_diffusers,
}
