"""New folders of models: import of a foreign model, and export in any format; written completely or not at all.

Every import is run once, every export is compared with what was written.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import yaml
from torch import Tensor

from ldmlab.build import frozen_part, load_first_stage, moments_of
from ldmlab.checkpoints import save_checkpoint
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.few_steps import FewSteps
from ldmlab.disks import disk_errors, locked
from ldmlab.errors import InputError
from ldmlab.files import clear_unfinished, markdown_line
from ldmlab.instantiate import locate
from ldmlab.interop import compvis, verify
from ldmlab.interop.imported import assembled, assembled_first_stage
from ldmlab.model_files import ModelFiles, read_model, write_model_folder

PARTS = ("first_stage", "denoiser", "conditioner", "clip", "classifier")  # what a model is; a run keeps more
_USAGE = 'import ldmlab\n\nmodel = ldmlab.load("THIS_FOLDER")'
_SIDE = 8  # px of the check's latents; every published model takes it


def write_import(files: ModelFiles, out: Path) -> None:
    """The model folder at `out`, which must be new; nothing is there unless every check passed."""
    check_new(out)
    check_runs(files)
    name = markdown_line(files.folder.name)
    origin = f"imported from `{name}` ({files.weights} weights); the licence of its source applies."
    with new_folder(out) as folder:
        (folder / "README.md").write_text(card(files, origin, usage=usage_of(files.spec)), encoding="utf-8")
        _write(folder, files.spec, files.parts)


def _write(folder: Path, spec: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
    """A model folder whose files equal the tensors, bit for bit; read again with one in memory at a time."""
    write_model_folder(folder, spec, parts)
    for name, part in parts.items():
        with safetensors.safe_open(folder / f"{name}.safetensors", framework="pt", device="cpu") as file:
            for key, tensor in part.items():
                if not torch.equal(file.get_tensor(key), tensor):
                    raise InputError(
                        f"{name}.safetensors: {key} was not written as it was read; check the disk and try again."
                    )


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
        clear_unfinished(out.parent, out.name)
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
def check_runs(files: ModelFiles) -> None:
    """All tensors and the networks' outputs for noise are finite."""
    for part, tensors in files.parts.items():
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise InputError(f"{files.folder}: {part} holds values that are no numbers ({bad[0]}); use another file.")
    outputs: dict[str, Any] = {}
    stage: Any
    if files.spec["kind"] == "first_stage":
        stage = assembled_first_stage(files)
    else:
        model, node, noise = assembled(files), files.spec["backbone"], verify.noise
        stage = model.first_stage
        extra = node["in_channels"] - stage.latent_channels  # a learned variance doubles out_channels
        context, vector = node.get("context_width"), node.get("vector_width")
        conditioning = Conditioning(  # in every slot that the U-Net has
            tokens=noise(1, 4, context) if context else None,
            spatial=noise(1, extra, _SIDE, _SIDE) if extra else None,
            vector=noise(1, vector) if vector else None,
        )
        latents = noise(1, stage.latent_channels, _SIDE, _SIDE)
        outputs["denoiser"] = model.backbone(latents, torch.tensor([500.0]), conditioning)
    side = _SIDE * stage.downsampling
    outputs["encoder"] = stage.encode(verify.noise(1, 3, side, side).clamp(-1, 1)).mean
    outputs["decoder"] = stage.decode(outputs["encoder"])
    for name, output in outputs.items():
        if not bool(torch.isfinite(output).all()):
            raise InputError(f"{files.folder}: the {name} makes values that are no numbers; use another file.")


def card(files: ModelFiles, origin: str, facts: Sequence[str] = (), usage: str = "") -> str:
    """README.md: description, origin, use (lines of Python)."""
    spec = files.spec
    what = f"A {spec['kind'].replace('_', ' ')} for images of {spec['image_size']} px"
    lines = [f"# {markdown_line(files.folder.resolve().name)}", "", f"{what}, {origin}", ""]
    if spec["kind"] == "latent_diffusion":
        inputs = markdown_line(", ".join(map(str, spec["conditioners"]))) or "nothing (unconditional)"
        trained = spec.get("guidance_trained")
        guided = "trained" if trained is True else "not trained" if trained is False else "unknown"
        first_stage, denoiser = (markdown_line(spec[name].get("_target_")) for name in ("first_stage", "backbone"))
        lines.append(f"- takes as input: {inputs}; classifier-free guidance: {guided}")
        lines.append(f"- first stage: `{first_stage}`, denoiser: `{denoiser}`")
    lines += facts
    return "\n".join([*lines, *(["", "```python", usage, "```"] if usage else []), ""])


def usage_of(spec: Mapping[str, Any]) -> str:
    """Lines of Python that load a model folder; none for a part alone."""
    return _USAGE if spec["kind"] == "latent_diffusion" else ""


class Written(NamedTuple):
    what: str
    differences: verify.Differences  # the largest of each part between their program and ours
    usage: str  # lines of Python
    note: str = ""  # what others do differently around the networks


def write_ldmlab(files: ModelFiles, folder: Path) -> Written:
    """Our model folder: model.yaml and NAME.safetensors, read again and equal bit for bit."""
    parts = {name: part for name, part in files.parts.items() if name in PARTS}
    _write(folder, {**files.spec, "weights": files.weights, "step": files.step}, parts)
    what = f"model folder with {', '.join(sorted(parts))}"
    if files.spec["kind"] == "latent_diffusion":
        assembled(read_model(folder))
    return Written(what, {}, usage_of(files.spec))


def halved(files: ModelFiles) -> ModelFiles:
    """Weights as float16, of values below 65,504; a part then differs by up to a 2,048th of each weight."""
    parts = {
        name: {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in part.items()}
        for name, part in files.parts.items()
    }
    for name, part in parts.items():
        if large := [key for key, tensor in part.items() if not bool(torch.isfinite(tensor).all())]:
            raise InputError(f"--precision float16: {name} has values above 65504 ({large[0]}); use float32.")
    return replace(files, parts=parts)


def with_first_stage(files: ModelFiles, path: Path) -> ModelFiles:
    """The model with the first stage at `path`, whose decoder alone may differ: images have the same latents in both.

    Both encode noise; a difference above 1 % of the latents' deviation is refused (float16 rounds by 0.2).
    """
    if files.spec["kind"] != "latent_diffusion":
        raise InputError(f"--first-stage: {files.folder} is of kind {files.spec['kind']}, which decodes no latents.")
    ours, theirs = frozen_part(files, "first_stage", files.folder), load_first_stage(path)
    side = files.spec["image_size"]
    images = torch.randint(256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, after = (moments_of(module, images) for module in (ours, theirs.module))
    if before.shape != after.shape:
        shapes = " and ".join(str(tuple(moments.shape[1:])) for moments in (before, after))
        raise InputError(f"--first-stage={path}: its latents have another shape, {shapes}; tune the decoder alone.")
    difference = float((after - before).abs().max() / before.std())
    if not difference < 0.01:
        raise InputError(
            f"--first-stage={path}: its latents are others (a difference of {difference:.1%} of the deviation), which "
            "the denoiser does not know; tune the decoder behind the model's own encoder, stage.trained=[decoder]."
        )
    weights = {name: part for name, part in theirs.files.parts.items() if name == "first_stage"}  # f = 1 has none
    return replace(files, spec={**files.spec, "first_stage": theirs.spec}, parts={**files.parts, **weights})


def check_many_steps(files: ModelFiles) -> None:
    """Other programs would sample a model of few steps as what it is not."""
    kind = locate(files.spec["diffusion"], where="diffusion") if "diffusion" in files.spec else None
    if isinstance(kind, type) and issubclass(kind, FewSteps):
        raise InputError(f"{files.folder} is a {kind.__name__} model, of few steps; use --format ldmlab.")


def write_compvis(files: ModelFiles, folder: Path) -> Written:
    """model.ckpt and config.yaml as the official code reads them; imported again and compared with our model."""
    check_many_steps(files)
    state, config = compvis.export(files.spec, files.parts)
    save_checkpoint(folder / "model.ckpt", {"state_dict": state, "global_step": files.step or 0})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    found = compvis.read(folder / "model.ckpt", folder / "config.yaml", weights="raw")
    differences = verify.compare_imports(files, found)
    usage = 'from ldmlab.interop import compvis\n\nmodel = compvis.load("model.ckpt", "config.yaml")'
    return Written("official checkpoint model.ckpt and config.yaml", differences, usage)


def write_diffusers(files: ModelFiles, folder: Path) -> Written:
    """A pipeline, or modules where none exists; loaded by diffusers and compared with our model."""
    from ldmlab.interop.diffusers.diffusers_export import export_folder

    check_many_steps(files)
    what, differences = export_folder(files, folder)
    loader = what.split()[0]
    if loader == "modules":
        return Written(what, differences, "")
    absent = loader.startswith("StableDiffusion3") and not (folder / "text_encoder_3").is_dir()
    more = ", text_encoder_3=None, tokenizer_3=None" if absent else ""
    usage = f'from diffusers import {loader}\n\npipeline = {loader}.from_pretrained("THIS_FOLDER"{more})'
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
