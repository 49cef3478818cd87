"""From a description in plain data, and weights, to a model: no Hydra, no Lightning.

`model.yaml` has a `kind`, an `image_size` and a node per part (`_target_` and finished arguments):
first_stage: first_stage; clip: clip; latent_diffusion: first_stage, latent_scale, backbone, conditioners, diffusion,
guidance_trained, sampler, task where there is one; classifier: classifier, first_stage_fingerprint, latent_scale,
schedule.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmlab.checkpoints import fingerprint, load_exactly, without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import ModelFiles, read_model
from ldmlab.nn.pixels import to_float

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
    from ldmlab.inference.model import LoadedModel
    from ldmlab.nn.openclip import OpenClip


@dataclass(frozen=True)
class LoadedFirstStage:
    """A trained first stage, frozen, and what latents made with it must remember."""

    module: nn.Module
    spec: dict[str, Any]  # its node of model.yaml
    image_size: int  # trained on, px
    fingerprint: str  # of the weights
    files: ModelFiles


def load(path: Path | str, *, weights: str = "averaged", device: str = "auto", trust: bool = False) -> "LoadedModel":
    """The latent diffusion model of a run folder, checkpoint or model folder, ready to sample.

    weights: averaged | raw, for runs. Targets outside ldmlab are refused unless `trust`.
    """
    from ldmlab.inference.model import LoadedModel

    files = _of_kind(read_model(path, _checked(weights)), "latent_diffusion")
    with nullcontext() if trust else without_weights():  # a stranger's constructor may compute with its weights
        model = build_latent_diffusion(files.spec, trust=trust)
    fill_latent_diffusion(model, files)
    model.eval().requires_grad_(False)
    chosen = pick_device(device)
    return LoadedModel(
        model.to(chosen),
        image_size=files.spec["image_size"],
        info={
            "path": str(path),
            "weights": files.weights,
            "step": files.step,
            "fingerprint": fingerprint(model.backbone.state_dict()),
            "spec": files.spec,
        },
    )


def build_latent_diffusion(spec: Mapping[str, Any], *, trust: bool = False) -> "LatentDiffusion":
    """The model that `model.yaml` describes, with fresh weights."""
    parts = {
        "first_stage": instantiate(spec["first_stage"], where="first_stage", trust=trust),
        "latent_scale": instantiate(spec["latent_scale"], where="latent_scale", trust=trust),
        "backbone": instantiate(spec["backbone"], where="backbone", trust=trust),
        "conditioners": {
            name: instantiate(node, where=f"conditioner.{name}", trust=trust)
            for name, node in spec["conditioners"].items()
        },
        "guidance_trained": spec["guidance_trained"],
        "task": instantiate(spec["task"], where="task", trust=trust) if spec.get("task") else None,
    }
    return instantiate(spec["diffusion"], where="diffusion", trust=trust, **parts)


def fill_latent_diffusion(model: "LatentDiffusion", files: ModelFiles) -> None:
    """Weights into a built model; every part of it must match exactly."""
    targets = {"first_stage": model.first_stage, "denoiser": model.backbone, "conditioner": model.conditioners}
    for name, module in targets.items():
        if module.state_dict():
            load_exactly(module, _part(files, name), f"{files.folder} ({name})")


def load_first_stage(path: Path | str, weights: str = "averaged") -> LoadedFirstStage:
    """The first stage of an autoencoder run, of a model, or beside latent shards; float32, frozen, on the CPU."""
    path = Path(path)
    if (path / "first_stage").is_dir():  # a folder of latent shards carries the first stage that made them
        path = path / "first_stage"
    files = read_model(path, _checked(weights))
    if "first_stage" not in files.spec:
        raise InputError(f"{path} is of kind {files.spec.get('kind')} and has no first stage; give another run.")
    with without_weights():
        module = instantiate(files.spec["first_stage"], where="first_stage")
    if module.state_dict():
        load_exactly(module, _part(files, "first_stage"), f"{path} (first_stage)")
    module.eval().requires_grad_(False)
    return LoadedFirstStage(
        module, files.spec["first_stage"], files.spec["image_size"], fingerprint(module.state_dict()), files
    )


@torch.no_grad()
def moments_of(first_stage: Any, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, 3, H, W) => moments of their raw latents (B, 2C or C, h, w), float32, on the CPU."""
    device = next((p.device for p in first_stage.parameters()), images.device)
    return first_stage.encode(to_float(images.to(device))).moments().float().cpu()


def read_clip(path: Path | str, weights: str = "averaged") -> ModelFiles:
    """Description and weights of a CLIP run."""
    return _of_kind(read_model(path, _checked(weights)), "clip")


def load_clip(path: Path | str, weights: str = "averaged") -> "OpenClip":
    """A CLIP run with its weights, frozen."""
    files = read_clip(path, weights)
    clip: OpenClip = instantiate(files.spec["clip"], where="clip")
    load_exactly(clip.model, _part(files, "clip"), f"{path} (clip)")
    clip.model.eval().requires_grad_(False)
    return clip


@dataclass(frozen=True)
class LoadedClassifier:
    """A trained classifier of noisy latents, frozen, and the description of the latents it knows."""

    module: nn.Module
    spec: dict[str, Any]  # model.yaml


def load_classifier(path: Path | str, weights: str = "averaged") -> LoadedClassifier:
    """The classifier of a stage=classifier run; float32, on the CPU."""
    files = _of_kind(read_model(path, _checked(weights)), "classifier")
    module = instantiate(files.spec["classifier"], where="classifier")
    load_exactly(module, _part(files, "classifier"), f"{path} (classifier)")
    return LoadedClassifier(module.eval().requires_grad_(False), files.spec)


def pick_device(name: str) -> torch.device:
    """auto: the GPU if there is one; cpu | cuda | cuda:N."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name}: torch finds no GPU here; use device=cpu.")
    return device


def _checked(weights: str) -> str:
    if weights not in ("averaged", "raw"):
        raise InputError(f"weights={weights} is unknown; choose averaged or raw.")
    return weights


def _of_kind(files: ModelFiles, kind: str) -> ModelFiles:
    if files.spec.get("kind") != kind:
        raise InputError(f"{files.folder} is a model of kind {files.spec.get('kind')}, not {kind}; give another run.")
    return files


def _part(files: ModelFiles, name: str) -> dict[str, torch.Tensor]:
    if name not in files.parts:
        raise InputError(f"{files.folder} has no {name} weights ({name}.safetensors); copy or export the model again.")
    return files.parts[name]
