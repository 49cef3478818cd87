"""Official files and configurations as model.yaml and tensors under our names, or as single modules of ours.

State dicts have the official file's keys: with their prefix (a whole file will do) or without. Tensors that are float32
are used in place, not copied; others become float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import compvis_first_stages, compvis_unets
from ldmlab.interop.compvis.compvis_config import (
    UNET_TARGET,
    conditioner_node,
    first_stage_spec,
    is_first_stage,
    latent_diffusion_spec,
    model_config,
    read_config,
    scale_node,
)
from ldmlab.interop.compvis.compvis_file import OfficialFile, check_schedule, scale_factor, take_apart
from ldmlab.interop.compvis.compvis_networks import (
    CONDITIONER,
    FIRST_STAGE,
    LOSS,
    UNET,
    Part,
    StateDict,
    build,
    conditioner_part,
    first_stage_part,
    is_table,
    of_part,
    unet_part,
)
from ldmlab.interop.compvis.compvis_shapes import config_of, linear_projections
from ldmlab.interop.compvis.compvis_unets import CLASS_TABLE
from ldmlab.interop.imported import Imported, Mismatch, compare, read_weights, refuse_mismatch

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel


@dataclass(frozen=True)
class _Taken:
    """A network with its tensors of the file."""

    part: Part
    tensors: StateDict

    def ours(self) -> StateDict:
        """Under our names; back under the official ones they must be the file's, bit for bit."""
        ours = self.part.to_ours(self.tensors)
        back = self.part.to_official(ours)
        for name, tensor in self.tensors.items():
            again = back[name]
            if not tensor.is_meta and not bool((again.reshape(tensor.shape) == tensor).all()):
                raise InputError(
                    f"the {self.part.title}'s {name} is not the same after conversion and back (is it not a number?)."
                )
        return ours


def read(
    path: Path | str,
    config: Path | str | Mapping[str, Any] | None = None,
    *,
    weights: str = "averaged",
    prediction: str | None = None,
) -> Imported:
    """An official checkpoint with its YAML file (or the file's content); one InputError lists all differences."""
    if weights not in ("averaged", "raw"):
        raise InputError(f"weights={weights} is unknown; choose averaged or raw.")
    if prediction not in (None, "eps", "v"):
        raise InputError(f"prediction={prediction} is unknown; choose eps or v.")
    state, step = read_weights(Path(path))
    tensors = read_config(Path(config)) if isinstance(config, (str, Path)) else config
    return describe(state, tensors, source=str(path), weights=weights, prediction=prediction, step=step)


def describe(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    source: str = "the state dict",
    weights: str = "averaged",
    prediction: str | None = None,
    step: int | None = None,
) -> Imported:
    """The same for a state dict in memory."""
    file = take_apart(state)
    official = model_config(config) if config is not None else config_of(file, prediction)
    alone = is_first_stage(official)
    if alone != file.is_first_stage:
        has, described = ("whole model", "first stage")[:: -1 if file.is_first_stage else 1]
        raise InputError(
            f"{source} holds a {has} but the configuration describes a {described}; give the matching one."
        )
    spec = first_stage_spec(official) if alone else _model_spec(official["params"], file, prediction)
    taken, used, notes = _networks(spec, file, weights)
    mismatches = {name: t.part.mismatch(t.tensors) for name, t in taken.items()}
    refuse_mismatch({**mismatches, "file": Mismatch([], sorted(file.unknown), [])})
    _check_channels(spec, taken)
    spec |= {"weights": used, "origin": {"format": "compvis", "linear_projection": linear_projections(file.unet)}}
    spec |= {} if step is None else {"step": step}
    return Imported(source, spec, _parts(taken), used, step, notes)


def _model_spec(params: Mapping[str, Any], file: OfficialFile, prediction: str | None) -> dict[str, Any]:
    """model.yaml, with what only the file holds."""
    spec = latent_diffusion_spec(params, prediction, file.conditioner)
    spec["latent_scale"] = scale_node(scale_factor(file, params))
    check_schedule(file, instantiate(spec["diffusion"]["schedule"], where="schedule").betas)
    return spec


def _networks(
    spec: Mapping[str, Any], file: OfficialFile, weights: str
) -> tuple[dict[str, _Taken], str, tuple[str, ...]]:
    """The networks by name, which of their weights are used, and notes for the user."""
    taken = {}
    trained = part = first_stage_part(spec["first_stage"])
    prefix, raw = "", file.first_stage
    if spec["kind"] == "latent_diffusion":
        taken["first stage"] = _Taken(part, file.first_stage)
        trained, prefix, raw = unet_part(spec["backbone"]), UNET, file.unet
    inside = (
        [CLASS_TABLE] if any(node.get("slot") == "vector" for node in spec.get("conditioners", {}).values()) else []
    )
    averaged = file.averaged([*trained.expected, *inside], prefix)
    use_averaged = averaged is not None and weights == "averaged"
    notes: tuple[str, ...] = ()
    if averaged is None and weights == "averaged":
        notes = ("the file holds one set of weights and does not mark them as averaged; they are kept as raw",)
    if averaged is None and file.averages:
        raise InputError("the averaged weights in the file belong to another network; give its own configuration.")
    if not raw and not use_averaged:
        raise InputError("the file holds averaged weights only; import it with --weights averaged.")
    title = ("averaged " if use_averaged else "") + trained.title
    chosen = dict(averaged if use_averaged and averaged is not None else raw)
    tables = {name: chosen.pop(name) for name in inside if name in chosen}
    taken[title] = _Taken(trained, chosen)
    if spec["kind"] == "latent_diffusion":
        taken |= _conditioners(spec["conditioners"], file, tables)
    return taken, "averaged" if use_averaged else "raw", notes


def _conditioners(nodes: Mapping[str, Any], file: OfficialFile, tables: StateDict) -> dict[str, _Taken]:
    """Each conditioner; the one with tensors gets the file's. A second copy of the first stage is left aside.

    tables: what the U-Net holds of them.
    """
    every = {name: conditioner_part(node) for name, node in nodes.items()}
    parts = {name: part for name, part in every.items() if CLASS_TABLE not in part.expected}
    tensors = file.conditioner
    if not any(part.expected for part in parts.values()) and _is_copy(tensors, file.first_stage):
        tensors = {}
    holder = next((name for name, part in parts.items() if part.expected), next(iter(parts), None))
    own = {name: tables if name not in parts else tensors if name == holder else {} for name in every}
    taken = {f"conditioner {name}": _Taken(part, own[name]) for name, part in every.items()}
    if not parts and tensors:
        raise InputError(
            f"the file holds {len(tensors)} tensors of a conditioner, the configuration has none; give the "
            "configuration that belongs to these weights."
        )
    return taken


def _is_copy(tensors: StateDict, first_stage: StateDict) -> bool:
    """Whether the conditioner's tensors are the first stage's."""
    return tensors.keys() == first_stage.keys() and all(
        tensors[name].shape == first_stage[name].shape and bool((tensors[name] == first_stage[name]).all())
        for name in tensors
    )


def _check_channels(spec: Mapping[str, Any], taken: Mapping[str, _Taken]) -> None:
    """The U-Net's inputs must be the latent and what is concatenated to it."""
    if spec["kind"] != "latent_diffusion":
        return
    stage: Any = taken["first stage"].part.module
    side = spec["image_size"][0] if isinstance(spec["image_size"], list) else spec["image_size"]
    size = side // stage.downsampling
    latent = LatentSpec(stage.latent_channels, size, size, stage.downsampling)
    modules: list[Any] = [t.part.module for name, t in taken.items() if name.startswith("conditioner ")]
    extra = sum(module.width(latent) for module in modules if module.slot == "spatial")
    expected = (latent.channels + extra, latent.channels)
    has = (spec["backbone"]["in_channels"], spec["backbone"]["out_channels"])
    if has != expected:
        raise InputError(
            f"the U-Net has {has[0]} input and {has[1]} output channels, first stage and conditions make {expected[0]} "
            f"and {expected[1]}; give the configuration that belongs to these weights."
        )


def _parts(taken: Mapping[str, _Taken]) -> dict[str, StateDict]:
    """Tensors by the files of a model folder."""
    parts: dict[str, StateDict] = {}
    for title, network in taken.items():
        kind, _, name = title.partition(" ")
        if kind == "conditioner":
            ours = {f"{name}.{key}": tensor for key, tensor in network.ours().items()}
            parts.setdefault("conditioner", {}).update(ours)
        elif network.part.title == "U-Net":
            parts["denoiser"] = network.ours()
        else:
            parts["first_stage"] = network.ours()
    return {name: part for name, part in parts.items() if part}


State = Mapping[str, Tensor]


def build_unet(config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our U-Net for `unet_config.params`; with fresh weights unless a state dict is tensors.

    A table of classes (`num_classes`) is no part of ours: `label_emb.weight[class_id]` is its `vector` conditioning,
    added to the time vector as it is. Of a whole file `read` and `load` make a ClassEmbedder of it.
    """
    node = {"_target_": UNET_TARGET, **compvis_unets.arguments(config_params)}
    if state_dict is None:
        return instantiate(node, where="backbone")
    tensors = of_part(state_dict, UNET)
    if (width := node.get("vector_width")) and (table := tensors.pop(CLASS_TABLE, None)) is not None:
        expected = torch.empty(config_params["num_classes"], width, device="meta")
        refuse_mismatch({"U-Net": compare({CLASS_TABLE: table}, {CLASS_TABLE: expected})})
    return build(unet_part(node), tensors)


def build_first_stage(
    config_params: Mapping[str, Any],
    state_dict: State | None = None,
    target: str | None = None,  # official class; None: VQ if the params name a codebook, else KL
) -> nn.Module:
    """Our first stage for `first_stage_config.params`; networks of its loss in the state dict are left aside."""
    node = compvis_first_stages.arguments(target or compvis_first_stages.target_of(config_params), config_params)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    tensors = {key: tensor for key, tensor in of_part(state_dict, FIRST_STAGE).items() if not key.startswith(LOSS)}
    return build(first_stage_part(node), tensors)


def build_conditioner(target: str, config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our conditioner for `cond_stage_config`; a text encoder may have the fields of `CLIPTextConfig` as params."""
    if state_dict is None:
        return instantiate(conditioner_node(target, config_params), where="conditioner")
    tensors = {key: tensor for key, tensor in of_part(state_dict, CONDITIONER).items() if not is_table(key)}
    return build(conditioner_part(conditioner_node(target, config_params, tensors)), tensors)


def load(
    checkpoint_path: Path | str,
    config_path: Path | str | None = None,  # official YAML; None: derived from the weights of Stable Diffusion
    weights: str = "averaged",  # averaged, where the file has them | raw
    *,
    prediction: str | None = None,  # eps | v, where neither configuration nor weights determine it
    device: str = "auto",
) -> "LoadedModel":
    """A whole official model, ready to sample, as `ldmlab.load` gives it; nothing is written."""
    from ldmlab.interop.imported import loaded_model

    return loaded_model(read(checkpoint_path, config_path, weights=weights, prediction=prediction), device)
