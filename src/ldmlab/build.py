"""From a description in plain data, and weights, to a model: no Hydra, no Lightning.

`model.yaml` has a `kind`, an `image_size` and a node per part (`_target_` and finished arguments):
first_stage: first_stage; clip: clip; latent_diffusion: first_stage, latent_scale, backbone, conditioners, diffusion,
guidance_trained, sampler, task where there is one; classifier: classifier, first_stage_fingerprint, latent_scale,
schedule. A description comes with a folder, maybe a stranger's: see `instantiate` for what it may name.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmlab import distributed
from ldmlab.checkpoints import fingerprint, load_exactly, without_weights
from ldmlab.errors import InputError, shown
from ldmlab.instantiate import instantiate
from ldmlab.model_files import DESCRIPTION, ModelFiles, read_model
from ldmlab.nn.pixels import to_float
from ldmlab.part_checks import on_registration
from ldmlab.plugins import allow

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
    from ldmlab.inference.model import LoadedModel
    from ldmlab.nn.openclip import OpenClip

_SPARE_VALUES = 50_000_000  # built in addition to what is stored: the half of a CLIP model that is not kept, tables
_SPARE_MODULES = 3_000


@dataclass(frozen=True)
class LoadedFirstStage:
    """A trained first stage, frozen, and the properties recorded with its latents."""

    module: nn.Module
    spec: dict[str, Any]  # its node of model.yaml
    image_size: int  # trained on, px
    fingerprint: str  # of the weights
    files: ModelFiles


def load(
    path: Path | str,
    *,
    weights: str | float = "averaged",
    device: str = "auto",
    plugins: list[str] | str = (),  # type: ignore[assignment]
    trust: bool = False,
) -> "LoadedModel":
    """The latent diffusion model of a run folder, checkpoint or model folder, ready to sample.

    weights: averaged | raw | the length of an average, for runs. plugins: packages from outside whose classes the
    folder may name. trust: it may name anything at all, which can run any code.
    """
    allow(plugins)
    files = _read(path, weights, "latent_diffusion")
    with building(files, trust=trust):
        model = build_latent_diffusion(files.spec, trust=trust)
    fill_latent_diffusion(model, files)
    return ready(model, files, device, path)


def ready(model: "LatentDiffusion", files: ModelFiles, device: str, path: Path | str = "") -> "LoadedModel":
    """A filled model, frozen and on its device, as `load` gives it; path: where it was loaded from."""
    from ldmlab.inference.model import LoadedModel
    from ldmlab.nn import numerics
    from ldmlab.samplers._auto import solver_of

    numerics.fast()
    info = {
        "path": str(path or files.folder),
        "weights": files.weights,
        "step": files.step,
        "fingerprint": fingerprint(model.backbone.state_dict()),
        "spec": files.spec,
    }
    model.eval().requires_grad_(False)
    weak = partial(_load_weak, device=device)
    size, solver = files.spec["image_size"], solver_of(model.path, files.spec)
    return LoadedModel(model.to(pick_device(device)), image_size=size, info=info, solver=solver, load=weak)


def _load_weak(name: str, device: str) -> "LoadedModel":
    """The model PATH, or PATH@WEIGHTS with `weights` of `load`."""
    path, at, weights = name.rpartition("@")
    known = weights in ("averaged", "raw") or re.fullmatch(r"0?\.\d+", weights)
    return load(path, weights=weights, device=device) if at and known else load(name, device=device)


@contextmanager
def building(files: ModelFiles, *, trust: bool = False) -> Iterator[None]:
    """Inside, parts of `files` are built without memory for weights, and no larger than the weights that lie there.

    Exceptions of constructors are reported as faults of the file.
    """
    with ExitStack() as stack:
        if not trust:  # a trusted constructor may compute with its weights
            stack.enter_context(without_weights())
            stack.enter_context(_no_larger_than(files))
        try:
            yield
        except InputError as error:
            raise InputError(f"{files.folder / DESCRIPTION}: {error}") from error
        except (Exception, RecursionError) as error:
            if trust:
                raise
            reason = f"{type(error).__name__}: {shown((str(error).splitlines() or [''])[0])}"
            raise InputError(
                f"{files.folder / DESCRIPTION} describes a model that cannot be built ({reason}); "
                "export or copy it again."
            ) from error


@contextmanager
def _no_larger_than(files: ModelFiles) -> Iterator[None]:
    """Refuse a description that needs far more memory than the stored weights, before it is allocated."""
    tensors = [tensor for part in files.parts.values() for tensor in part.values()]
    largest = {
        "values": 4 * sum(tensor.numel() for tensor in tensors) + _SPARE_VALUES,
        "modules": 4 * len(tensors) + _SPARE_MODULES,
    }
    count = dict.fromkeys(largest, 0)

    def added(module: nn.Module, name: str, new: torch.Tensor | nn.Module | None) -> None:
        kind, number = ("values", new.numel()) if isinstance(new, torch.Tensor) else ("modules", int(new is not None))
        count[kind] += number
        if count[kind] > largest[kind]:
            raise InputError(f"the model described is far larger than its weights (over {largest[kind]:,} {kind}).")

    with on_registration(added):
        yield


def build_latent_diffusion(spec: Mapping[str, Any], *, trust: bool = False, **built: Any) -> "LatentDiffusion":
    """The model that `model.yaml` describes, with fresh weights; `built`: parts that exist already."""
    nodes = {name: spec[name] for name in ("first_stage", "latent_scale", "backbone")} | {"task": spec.get("task")}
    for name, node in nodes.items():
        if name not in built:
            built[name] = instantiate(node, where=name, trust=trust) if node else None
    if "conditioners" not in built:
        built["conditioners"] = {
            name: instantiate(node, where=f"conditioner.{name}", trust=trust)
            for name, node in spec["conditioners"].items()
        }
    built["guidance_trained"] = spec.get("guidance_trained")
    return instantiate(spec["diffusion"], where="diffusion", trust=trust, **built)


def fill_latent_diffusion(model: "LatentDiffusion", files: ModelFiles) -> None:
    """Weights into a built model; every part of it must match exactly."""
    targets = {"first_stage": model.first_stage, "denoiser": model.backbone, "conditioner": model.conditioners}
    for name, module in targets.items():
        if module.state_dict():
            load_exactly(module, _part(files, name), f"{files.folder} ({name})")
    model.objective.weighting = None  # serves training alone; learned weights lie in checkpoints, not in models


def load_first_stage(path: Path | str, weights: str | float = "averaged") -> LoadedFirstStage:
    """The first stage of an autoencoder run, of a model, or next to latent shards; float32, frozen, on the CPU."""
    path = Path(path)
    if (path / "first_stage").is_dir():  # a folder of latent shards includes its first stage
        path = path / "first_stage"
    files = read_model(path, weights)
    if "first_stage" not in files.spec:
        raise InputError(f"{path} is of kind {files.spec['kind']} and has no first stage; give another run.")
    module, spec = frozen_part(files, "first_stage", path), files.spec
    return LoadedFirstStage(module, spec["first_stage"], spec["image_size"], fingerprint(module.state_dict()), files)


@torch.no_grad()
def moments_of(first_stage: Any, images: torch.Tensor, precision: str = "float32") -> torch.Tensor:
    """Images uint8 (B, 3, H, W) => moments of their raw latents (B, 2C or C, h, w), float32, on the CPU.

    precision: of the network, float32 | bfloat16.
    """
    device = next((p.device for p in first_stage.parameters()), images.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return first_stage.encode(to_float(images.to(device))).moments().float().cpu()


def read_clip(path: Path | str, weights: str | float = "averaged") -> ModelFiles:
    return _read(path, weights, "clip")


def load_clip(path: Path | str, weights: str | float = "averaged") -> "OpenClip":
    """A CLIP run with its weights, frozen."""
    files = read_clip(path, weights)
    with building(files):
        clip: OpenClip = instantiate(files.spec["clip"], where="clip")
    load_exactly(clip.model, _part(files, "clip"), f"{path} (clip)")
    clip.model.eval().requires_grad_(False)
    return clip


@dataclass(frozen=True)
class LoadedClassifier:
    """A trained classifier of noisy latents, frozen, and the description of the latents it was trained on."""

    module: nn.Module
    spec: dict[str, Any]  # model.yaml


def load_classifier(path: Path | str, weights: str | float = "averaged") -> LoadedClassifier:
    """The classifier of a stage=classifier run; float32, on the CPU."""
    files = _read(path, weights, "classifier")
    return LoadedClassifier(frozen_part(files, "classifier", path), files.spec)


def pick_device(name: str) -> torch.device:
    """auto: the GPU of this process if there is one; cuda: that GPU; cpu | cuda:N."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", distributed.local_rank() % max(torch.cuda.device_count(), 1))
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device={shown(name)} is no device of torch; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name}: torch finds no GPU here; use device=cpu.")
    return device


def _read(path: Path | str, weights: str | float, kind: str) -> ModelFiles:
    files = read_model(path, weights)
    if files.spec["kind"] != kind:
        raise InputError(f"{files.folder} is a model of kind {files.spec['kind']}, not {kind}; give another run.")
    return files


def frozen_part(files: ModelFiles, name: str, path: Path | str) -> nn.Module:
    """One part of a model that lies at `path`, with its weights; float32, on the CPU."""
    with building(files):
        module: nn.Module = instantiate(files.spec[name], where=name)
    if module.state_dict():
        load_exactly(module, _part(files, name), f"{path} ({name})")
    return module.eval().requires_grad_(False)


def _part(files: ModelFiles, name: str) -> dict[str, torch.Tensor]:
    if name not in files.parts:
        raise InputError(f"{files.folder} has no {name} weights ({name}.safetensors); copy or export the model again.")
    return files.parts[name]
