"""Published class-conditional networks (DiT, SiT, REPA, LightningDiT, EDM, EDM2) as models of ours.

Their files hold a network alone: the first stage is a folder of its own, and latents are scaled as each program does.
EDM's networks are of pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError, one_of
from ldmlab.interop import diffusers, dit, edm, edm2, lightningdit, repa, sit, verify
from ldmlab.interop.imported import assembled, network_weights, unpickled
from ldmlab.interop.renaming import Node, Part, State, StateDict, downsampling, fill_parts
from ldmlab.model_files import DESCRIPTION, ModelFiles, read_model

_HOME = "ldmlab.diffusion."
_SD = {"std": [1 / 0.18215], "shift": [0.0]}  # of Stable Diffusion's first stage in DiT and SiT
_EDM2_DATA = 0.5  # deviation of EDM2's latents, from these means and deviations of the same first stage
_PIXELS = {"std": [1.0], "shift": [0.0]}
_EDM2 = {"std": [2 * 4.17, 2 * 4.62, 2 * 3.71, 2 * 3.28], "shift": [5.81, 3.25, 0.12, -2.15]}


class Program(NamedTuple):
    """How one family of files is read."""

    config: Callable[[State, Node], dict[str, Any]]  # the official class's arguments, from names and shapes
    parts: Callable[[Node], tuple[dict[str, Any], dict[str, Any], dict[str, Part]]]  # backbone, labels, what is filled
    diffusion: Callable[[Node], dict[str, Any]]
    scale: Mapping[str, Sequence[float]] | None  # of latents; None: by statistics
    output: Callable[[Node, State], Callable[[Tensor, Tensor, Tensor], Tensor]]  # official network: x, t, classes
    unused: str = "-"  # how the names of tensors begin that serve training alone


def _transformer(
    options: Callable[[Node], Mapping[str, Any]], config: Node
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Part]]:
    backbone, labels = dit.nodes(config, options(config))
    return backbone, labels, dit.parts_of(backbone, labels)


def _one_hot(config: Node) -> dict[str, Any]:
    """The labels' node; {} for a network without."""
    node = {"_target_": "ldmlab.conditioners.class_label.OneHotClass", "classes": config["label_dim"], "drop": 0.0}
    return node if config["label_dim"] else {}


def _unet(program: Any, config: Node) -> tuple[dict[str, Any], dict[str, Any], dict[str, Part]]:
    return program.backbone_node(config), _one_hot(config), {"network": program.network_part(config)}


def _dit_diffusion(config: Node) -> dict[str, Any]:
    mean = {"_target_": f"{_HOME}parameterization.EpsPrediction"}
    learned = config.get("learn_sigma", True)
    return {
        "schedule": {"_target_": f"{_HOME}schedule.Schedule", "name": "linear", "start": 1e-4, "end": 0.02},
        "prediction": {"_target_": f"{_HOME}parameterization.LearnedVariance", "mean": mean} if learned else mean,
        **({"loss": {"_target_": f"{_HOME}diffusion_loss.VariationalLoss"}} if learned else {}),
    }


def _flow(clean: float, towards: str, config: Node) -> dict[str, Any]:
    """A straight path, or REPA's cosine; times are `clean` at the data and 1 - clean at the noise."""
    kind = config.get("path_type", "linear")
    one_of("path_type", kind, ("linear", "cosine"))
    path = f"{_HOME}paths.{kind.title()}Path"
    return {
        "schedule": {"_target_": path, "clean_time": clean, "noise_time": 1 - clean},
        "prediction": {"_target_": f"{_HOME}parameterization.VelocityPrediction", "towards": towards},
    }


def _edm2_diffusion(config: Node) -> dict[str, Any]:
    data = config.get("sigma_data", _EDM2_DATA)
    return {
        "schedule": {"_target_": f"{_HOME}paths.EdmPath"},
        "prediction": {"_target_": f"{_HOME}parameterization.EdmPrediction", "sigma_data": data},
    }


def _unet_output(program: Any, config: Node, state: State) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    model, classes = program.as_official(config, state), config["label_dim"]
    return lambda x, t, y: model.raw(x, t, nn.functional.one_hot(y, classes) if classes else None)


def _repa_output(config: Node, state: State) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    model = repa.as_official(config, state)
    return lambda x, t, y: model(x, t, y)[0]


_TO_DATA = partial(_flow, 1.0, "data")
_REPA = partial(_transformer, repa.options), partial(_flow, 0.0, "noise"), _SD, _repa_output, repa.PROJECTORS
_LIGHTNING = partial(_transformer, lightningdit.options), _TO_DATA, None, lightningdit.as_official
PROGRAMS = {
    "dit": Program(dit.transformer_config, partial(_transformer, dit.options), _dit_diffusion, _SD, dit.as_official),
    "sit": Program(dit.transformer_config, partial(_transformer, sit.options), _TO_DATA, _SD, sit.as_official),
    "repa": Program(dit.repa_config, *_REPA),
    "lightningdit": Program(dit.lightningdit_config, *_LIGHTNING),
    "edm": Program(edm.config_of, partial(_unet, edm), edm.diffusion_nodes, _PIXELS, partial(_unet_output, edm)),
    "edm2": Program(
        edm2.config_of, partial(_unet, edm2), _edm2_diffusion, _EDM2, partial(_unet_output, edm2), edm2.HEAD
    ),
}


def read(
    path: Path,
    program: str,
    first_stage: Path | None,
    *,
    config: Mapping[str, Any] | None = None,  # arguments of the official class that do not follow from shapes
    weights: str = "averaged",
    statistics: Path | None = None,  # LightningDiT's latents_stats.pt
) -> ModelFiles:
    """The file and its first stage, run beside the official form; InputError for all that does not fit."""
    one_of("format", program, tuple(PROGRAMS))
    family = PROGRAMS[program]
    if first_stage is None and program != "edm":
        _refuse_without_stage(path)
    state, used, own = network_weights(path, weights)
    if program != "edm":
        own.pop("precond", None)
    given = {**own, **(config or {})}
    found = {**family.config(state, given), **given}
    if "hidden_size" in found and "num_heads" not in found:
        raise InputError(f"{path}: the number of heads does not follow from shapes; give num_heads in a --config file.")
    backbone, labels, parts = family.parts(found)
    known = {name: edm2.vector(tensor) for name, tensor in state.items() if not name.startswith(family.unused)}
    tensors = _tensors(parts, edm.without_constants(found, known) if program == "edm" else known)
    stage, of_stage = _first_stage(first_stage, path, backbone["in_channels"])
    side = found.get("input_size", found.get("img_resolution", 0)) * downsampling(stage)
    scale = family.scale or _statistics(statistics, program)
    spec = {
        **{"kind": "latent_diffusion", "image_size": side, "first_stage": stage, "backbone": backbone},
        "conditioners": {"class_label": labels} if labels else {},
        "latent_scale": {"_target_": f"{_HOME}latent_space.LatentScale", **scale},
        "diffusion": {"_target_": f"{_HOME}latent_diffusion.LatentDiffusion", **family.diffusion(found)},
        "guidance_trained": bool(labels.get("null_row")),
        **{"sampler": {"_target_": "ldmlab.samplers._auto.Auto"}, "origin": {"format": program}, "weights": used},
    }
    left = len(state) - len(known)
    notes = (f"{family.unused}* ({left} tensors) serve training alone and were left out",) if left else ()
    files = ModelFiles(path, spec, {**of_stage, **tensors}, used, notes=notes)
    _compare(files, family.output(found, state))
    return files


def _tensors(parts: Mapping[str, Part], known: State) -> dict[str, StateDict]:
    """Ours from the official ones; the inverse gives the same bits."""
    weights = {name: tensor for name, tensor in known.items() if name not in dit.CONSTANTS}
    fill_parts(parts, weights)
    for part in parts.values():
        _check_bits(part, weights)
    tensors = {"denoiser": parts["network"].module.state_dict()}
    if "labels" in parts:
        table = parts["labels"].module.state_dict()
        tensors["conditioner"] = {f"class_label.{name}": tensor for name, tensor in table.items()}
    return tensors


def _check_bits(part: Part, state: State) -> None:
    """The tensors come back from ours bit for bit."""
    own = {name: state[name].float() for name in part.expected}
    for name, tensor in part.to_foreign(part.module.state_dict()).items():
        if not torch.equal(tensor.reshape(own[name].shape), own[name]):
            raise InputError(f"{name} of the {part.title} is not the same when it is written again.")


def _refuse_without_stage(path: Path) -> None:
    raise InputError(
        f"{path} holds only the denoiser; give its first stage by --first-stage DIR, an AutoencoderKL of diffusers or "
        "a model folder."
    )


def _first_stage(folder: Path | None, path: Path, channels: int) -> tuple[dict[str, Any], dict[str, StateDict]]:
    """Its node and tensors; without a folder none at all, for networks of pixels."""
    if folder is None:
        if channels != 3:
            _refuse_without_stage(path)
        return {"_target_": "ldmlab.first_stages.identity.Identity"}, {}
    ours = (folder / DESCRIPTION).is_file()
    files = read_model(folder) if ours else ModelFiles(folder, *diffusers.read_folder(folder), "raw")
    if "first_stage" not in files.spec:
        raise InputError(f"{folder} has no first stage; give an AutoencoderKL of diffusers or a model folder with one.")
    node = files.spec["first_stage"]
    if (own := node.get("latent_channels", 3)) != channels:
        raise InputError(f"{folder} has {own} latent channels, {path} takes {channels}.")
    return node, {name: part for name, part in files.parts.items() if name == "first_stage"}


def _statistics(path: Path | None, program: str) -> dict[str, list[float]]:
    """Means and deviations of latents by channel."""
    if path is None:
        raise InputError(f"--format={program} scales latents by statistics; give --statistics latents_stats.pt.")
    content = unpickled(path)
    found = [content.get(name) for name in ("std", "mean")] if isinstance(content, Mapping) else []
    values = [value.flatten().tolist() for value in found if isinstance(value, Tensor)]
    if len(values) != 2:
        raise InputError(f"{path} holds no tensors mean and std; give LightningDiT's latents_stats.pt.")
    return {"std": values[0], "shift": values[1]}


@torch.no_grad()
def _compare(files: ModelFiles, official: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The model, as it will be read, against the official form on the same input."""
    model = assembled(files)
    node = files.spec["backbone"]
    side = 8 * int(getattr(model.backbone, "size_step", 1))
    labels: Any = model.conditioners["class_label"] if files.spec["conditioners"] else None
    last = 0 if labels is None else labels.classes - 1
    x, y = verify.noise(2, node["in_channels"], side, side), torch.tensor([0, last])
    t = torch.tensor([0.25, 0.75]) if not hasattr(model.schedule, "steps") else torch.tensor([1.0, 500.0])
    vector = None if labels is None else labels({"class_id": y}, model.encode)
    verify.check_close("network", model.backbone(x, t, Conditioning(vector=vector)), official(x, t, y))
