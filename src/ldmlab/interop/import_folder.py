"""A model read from a foreign format, checked by running it, as a model folder of ours: whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop.assembly import Imported, assembled, assembled_first_stage
from ldmlab.model_files import write_model_folder

_LATENT_SIDE = 8  # px of the check; every published model takes it
_TOKENS = 4


def write_import(imported: Imported, out: Path) -> None:
    """The model folder at `out`, which must be new; nothing is there unless every check passed."""
    check_new(out)
    check_runs(imported)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        (temporary / "README.md").write_text(card(imported), encoding="utf-8")
        write_model_folder(temporary, imported.spec, imported.parts)
        for name, part in imported.parts.items():
            _check_written(temporary / f"{name}.safetensors", part)
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(out: Path) -> None:
    """Refuse to mix with something that is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out} is not empty; choose a new folder.")


@torch.inference_mode()
def check_runs(imported: Imported) -> None:
    """Every tensor is a number, and so is what the networks make of noise."""
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
    """The same every time, one image."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _check_written(path: Path, part: dict[str, Tensor]) -> None:
    """What is on disk is what was read, bit for bit; one tensor in memory at a time."""
    for name, tensor in part.items():
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            if not torch.equal(file.get_tensor(name), tensor):
                raise InputError(f"{path.name}: {name} was not written as it was read; check the disk and try again.")


def card(imported: Imported) -> str:
    """README.md: what it is, where it comes from, how to use it."""
    spec = imported.spec
    lines = [
        f"# {Path(imported.source).name}",
        "",
        f"A {spec['kind'].replace('_', ' ')} for images of {spec['image_size']} px, imported from "
        f"`{Path(imported.source).name}` ({imported.weights} weights); the licence of its source applies.",
        "",
    ]
    if spec["kind"] == "latent_diffusion":
        told = ", ".join(spec["conditioners"]) or "nothing (unconditional)"
        lines += [
            f"- told: {told}",
            "",
            "```python",
            "import ldmlab",
            "",
            'model = ldmlab.load("THIS_FOLDER")',
            "```",
            "",
        ]
    return "\n".join(lines)
