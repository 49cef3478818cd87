"""Official configurations and weights in and out: CompVis/latent-diffusion and Stable Diffusion 1.x and 2.x.

Here they come in: whole files as model.yaml and tensors under our names, or single modules of ours. State dicts have
the official file's keys: with their prefix (a whole file will do) or without. Tensors that are float32 are used in
place, not copied; others become float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmlab.build import ready
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError, one_of
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import compvis_conditioners, compvis_config
from ldmlab.interop.compvis import compvis_networks as networks
from ldmlab.interop.compvis.compvis_export import export
from ldmlab.interop.compvis.compvis_file import OfficialFile, check_schedule, config_of, linear_projections, take_apart
from ldmlab.interop.imported import assembled, read_weights
from ldmlab.interop.renaming import Mismatch, Part, State, StateDict, compare, refuse_mismatch
from ldmlab.model_files import ModelFiles

__all__ = ["build_conditioner", "build_first_stage", "build_unet", "export", "load", "read"]


if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel

Spec = dict[str, Any]
Taken = dict[str, tuple[Part, StateDict]]  # name in messages => a network and its tensors of the file


def read(
    path: Path | str,
    config: Path | str | Mapping[str, Any] | None = None,
    *,
    weights: str = "averaged",
    prediction: str | None = None,
) -> ModelFiles:
    """An official checkpoint with its YAML file (or the file's content); one InputError lists all differences."""
    one_of("weights", weights, ("averaged", "raw"))
    one_of("prediction", prediction or "eps", ("eps", "v"))
    state, step = read_weights(Path(path))
    content = compvis_config.read_config(Path(config)) if isinstance(config, (str, Path)) else config
    return describe(state, content, source=str(path), weights=weights, prediction=prediction, step=step)


def describe(
    state: State,
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the state dict",
    weights: str = "averaged",
    prediction: str | None = None,
    step: int | None = None,
) -> ModelFiles:
    """The same for a state dict in memory."""
    file = take_apart(state)
    official = compvis_config.model_config(config) if config is not None else config_of(file, prediction)
    params, alone = official["params"], "ddconfig" in official["params"]
    if alone != file.is_first_stage:
        has, described = ("whole model", "first stage")[:: -1 if file.is_first_stage else 1]
        raise InputError(
            f"{source} holds a {has} but the configuration describes a {described}; give the matching one."
        )
    if alone:
        spec = compvis_config.first_stage_spec(official)
    else:
        spec = compvis_config.latent_diffusion_spec(params, prediction, file.conditioner)
        spec["latent_scale"] = compvis_config.scale_node(file.scale_factor(params))
        check_schedule(file, instantiate(spec["diffusion"]["schedule"], where="schedule").betas)
    taken, used, notes = _networks(spec, file, weights)
    mismatches = {name: part.mismatch(tensors) for name, (part, tensors) in taken.items()}
    refuse_mismatch({**mismatches, "file": Mismatch([], sorted(file.unknown), [])})
    if not alone:
        _check_channels(spec, taken)
    spec |= {"weights": used, "origin": {"format": "compvis", "linear_projection": linear_projections(file.unet)}}
    spec |= {} if step is None else {"step": step}
    return ModelFiles(Path(source), spec, _parts(taken), used, step, notes)


def _networks(spec: Spec, file: OfficialFile, weights: str) -> tuple[Taken, str, tuple[str, ...]]:
    """The networks, which of their weights are used, and notes for the user."""
    conditioners = spec.get("conditioners", {})
    inside = [networks.CLASS_TABLE] if any(node.get("slot") == "vector" for node in conditioners.values()) else []
    trained, prefix, raw = networks.first_stage_part(spec["first_stage"]), "", file.first_stage
    taken: Taken = {}
    if spec["kind"] == "latent_diffusion":
        taken["first stage"] = trained, file.first_stage
        trained, prefix, raw = networks.unet_part(spec["backbone"]), networks.UNET, file.unet
    averaged = file.averaged([*trained.expected, *inside], prefix)
    if averaged is None and file.averages:
        raise InputError("the averaged weights in the file belong to another network; give its own configuration.")
    use_averaged = averaged is not None and weights == "averaged"
    if not raw and not use_averaged:
        raise InputError("the file holds averaged weights only; import it with --weights averaged.")
    notes: tuple[str, ...] = ()
    if averaged is None and weights == "averaged":
        notes = ("the file holds one set of weights and does not mark them as averaged; they are kept as raw",)
    chosen = dict(averaged if averaged is not None and use_averaged else raw)
    tables = {name: chosen.pop(name) for name in inside if name in chosen}
    taken[("averaged " if use_averaged else "") + trained.title] = trained, chosen
    if spec["kind"] == "latent_diffusion":
        taken |= _conditioners(conditioners, file, tables)
    return taken, "averaged" if use_averaged else "raw", notes


def _conditioners(nodes: Mapping[str, Any], file: OfficialFile, tables: StateDict) -> Taken:
    """Each conditioner; the one with tensors gets the file's. A second copy of the first stage is left aside.

    tables: what the U-Net holds of them.
    """
    every = {name: networks.conditioner_part(node) for name, node in nodes.items()}
    parts = {name: part for name, part in every.items() if networks.CLASS_TABLE not in part.expected}
    tensors, first_stage = file.conditioner, file.first_stage
    if not parts and tensors:
        raise InputError(
            f"the file holds {len(tensors)} tensors of a conditioner, the configuration has none; give the "
            "configuration that belongs to these weights."
        )
    holder = next((name for name, part in parts.items() if part.expected), None)
    if holder is None:
        holder = next(iter(parts), None)
        if tensors.keys() == first_stage.keys() and all(torch.equal(t, first_stage[k]) for k, t in tensors.items()):
            tensors = {}
    own = {name: tables if name not in parts else tensors if name == holder else {} for name in every}
    return {f"conditioner {name}": (part, own[name]) for name, part in every.items()}


def _check_channels(spec: Spec, taken: Taken) -> None:
    """The U-Net's inputs must be the latent and what is concatenated to it."""
    stage: Any = taken["first stage"][0].module
    side = spec["image_size"][0] if isinstance(spec["image_size"], list) else spec["image_size"]
    size = side // stage.downsampling
    latent = LatentSpec(stage.latent_channels, size, size, stage.downsampling)
    modules: list[Any] = [part.module for name, (part, _) in taken.items() if name.startswith("conditioner ")]
    extra = sum(module.width(latent) for module in modules if module.slot == "spatial")
    expected = (latent.channels + extra, latent.channels)
    has = (spec["backbone"]["in_channels"], spec["backbone"]["out_channels"])
    if has != expected:
        raise InputError(
            f"the U-Net has {has[0]} input and {has[1]} output channels, first stage and conditions make {expected[0]} "
            f"and {expected[1]}; give the configuration that belongs to these weights."
        )


def _parts(taken: Taken) -> dict[str, StateDict]:
    """Tensors under our names, by the files of a model folder."""
    parts: dict[str, StateDict] = {}
    for title, (part, tensors) in taken.items():
        kind, _, name = title.partition(" ")
        ours = _converted(part, tensors)
        if kind == "conditioner":
            parts.setdefault(kind, {}).update({f"{name}.{key}": tensor for key, tensor in ours.items()})
        else:
            parts["denoiser" if part.title == "U-Net" else "first_stage"] = ours
    return {name: tensors for name, tensors in parts.items() if tensors}


def _converted(part: Part, tensors: StateDict) -> StateDict:
    """Under our names; back under the official ones they must be the file's, bit for bit."""
    ours = part.to_ours(tensors)
    back = part.to_foreign(ours)
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool((back[name].reshape(tensor.shape) == tensor).all()):
            raise InputError(
                f"the {part.title}'s {name} is not the same after conversion and back (is it not a number?)."
            )
    return ours


def build_unet(config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our U-Net for `unet_config.params`; with fresh weights unless a state dict is given.

    A table of classes (`num_classes`) is no part of ours: `label_emb.weight[class_id]` is its `vector` conditioning,
    added to the time vector as it is. Of a whole file `read` and `load` make a ClassEmbedder of it.
    """
    node = {"_target_": compvis_config.UNET_TARGET, **networks.unet_arguments(config_params)}
    if state_dict is None:
        return instantiate(node, where="backbone")
    tensors = networks.of_part(state_dict, networks.UNET)
    if (width := node.get("vector_width")) and (table := tensors.pop(networks.CLASS_TABLE, None)) is not None:
        expected = torch.empty(config_params["num_classes"], width, device="meta")
        refuse_mismatch({"U-Net": compare({networks.CLASS_TABLE: table}, {networks.CLASS_TABLE: expected})})
    return networks.unet_part(node).filled(tensors)


def build_first_stage(
    config_params: Mapping[str, Any],
    state_dict: State | None = None,
    target: str | None = None,  # official class; None: VQ if the params name a codebook, else KL
) -> nn.Module:
    """Our first stage for `first_stage_config.params`; networks of its loss in the state dict are left aside."""
    node = networks.first_stage_arguments(target or networks.target_of(config_params), config_params)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    return networks.first_stage_part(node).filled(networks.of_part(state_dict, networks.FIRST_STAGE))


def build_conditioner(target: str, config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our conditioner for `cond_stage_config`; a text encoder may have the fields of `CLIPTextConfig` as params."""
    if state_dict is None:
        return instantiate(compvis_conditioners.arguments(target, config_params), where="conditioner")
    tensors = networks.of_part(state_dict, networks.CONDITIONER)
    return networks.conditioner_part(compvis_conditioners.arguments(target, config_params, tensors)).filled(tensors)


def load(
    checkpoint_path: Path | str,
    config_path: Path | str | None = None,  # official YAML; None: derived from the weights of Stable Diffusion
    weights: str = "averaged",  # averaged, where the file has them | raw
    *,
    prediction: str | None = None,  # eps | v, where neither configuration nor weights determine it
    device: str = "auto",
) -> "LoadedModel":
    """A whole official model, ready to sample, as `ldmlab.load` gives it; nothing is written."""
    files = read(checkpoint_path, config_path, weights=weights, prediction=prediction)
    if files.spec["kind"] != "latent_diffusion":
        raise InputError(f"{files.folder} is a {files.spec['kind']}, which samples nothing; use `ldmlab import`.")
    return ready(assembled(files), files, device)
