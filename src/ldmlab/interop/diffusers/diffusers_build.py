"""Modules of ours from diffusers' configurations and weights, and modules of diffusers and transformers from ours.

A configuration is the content of `config.json`, with or without `_class_name`; tensors have the names of diffusers'
modules. Modules are built without memory; float32 tensors are used in place, not copied, others become float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers import (
    diffusers_first_stages,
    diffusers_networks,
    diffusers_sd3,
    diffusers_texts,
    diffusers_transformers,
    diffusers_unets,
)
from ldmlab.interop.diffusers.diffusers_networks import CLASS_TABLE
from ldmlab.interop.renaming import Node, State, with_unused_head

Config = Mapping[str, Any]


def build_unet(config: Config, state_dict: State | None = None) -> Any:
    """Our U-Net for a UNet2DConditionModel or UNet2DModel; without weights it is initialised afresh.

    A table of classes inside the network is no part of ours: its rows are tensors to it as `vector` conditioning.
    """
    node = {"_target_": diffusers_unets.TARGET, **diffusers_unets.arguments(config)}
    if state_dict is None:
        return instantiate(node, where="backbone")
    linear = bool(config.get("use_linear_projection", False))
    part = diffusers_networks.unet_part(node, diffusers_unets.kind_of(config), linear_projection=linear)
    return part.filled(diffusers_networks.unet_tensors(state_dict, config))


def build_first_stage(config: Config, state_dict: State | None = None) -> nn.Module:
    """Our KL or VQ first stage for an AutoencoderKL or VQModel; without weights it is initialised afresh."""
    node = diffusers_first_stages.arguments(config)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    part = diffusers_networks.first_stage_part(node, diffusers_first_stages.kind_of(config))
    return part.filled(diffusers_networks.first_stage_tensors(state_dict, config))


def build_text(
    config: Config,
    state_dict: State | None = None,
    padding: str = "end",  # CLIPTextModel: end as Stable Diffusion 1.x | zero as 2.x
) -> nn.Module:
    """Our text conditioner for a CLIPTextModel or an LDMBertModel (the paper's transformer)."""
    node = diffusers_texts.node(config, padding=padding)
    return instantiate(node, where="conditioner") if state_dict is None else filled_text(node, state_dict)


def filled_text(node: Node, state_dict: State) -> nn.Module:
    """The text conditioner of a node with the tensors of its text encoder."""
    length = diffusers_texts.text_length(node)
    return diffusers_networks.text_part(node).filled(diffusers_networks.text_tensors(state_dict, length))


@contextmanager
def quiet_diffusers() -> Iterator[Any]:
    """The package, without its notes and progress bars; InputError when it is not installed."""
    try:
        import diffusers
        from diffusers.utils import logging as notes
        from transformers.utils import logging as more_notes
    except ImportError as error:
        raise InputError(
            f"--format diffusers compares with the originals and needs {error.name}; run `pip install diffusers "
            "transformers`, or use another --format."
        ) from None
    loggers = notes, more_notes
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield diffusers
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            logger.enable_progress_bar()


def class_rows(spec: Node, parts: Mapping[str, State]) -> Tensor | None:
    """The vectors of a class embedder that alone fills the vector slot; there, they are part of the network."""
    vectors = {name: node for name, node in spec["conditioners"].items() if node.get("slot") == "vector"}
    if len(vectors) != 1 or not next(iter(vectors.values()))["_target_"].endswith(".ClassEmbedder"):
        return None
    return parts["conditioner"][f"{next(iter(vectors))}.embedding.weight"].float()


def diffusers_unet(
    diffusers: Any, spec: Node, parts: Mapping[str, State], sample_size: int, rows: Tensor | None
) -> Any:
    """UNet2DConditionModel or UNet2DModel; projections as in the file it came from, else as Stable Diffusion 2.x's."""
    node = spec["backbone"]
    if not node["_target_"].endswith(".UNet"):
        raise InputError(f"backbone={node['_target_']} has no class in diffusers; use --format ldmlab.")
    targets = [other["_target_"] for other in spec["conditioners"].values()]
    usual = node.get("head_channels") is not None and diffusers_texts.CLIP_TARGET in targets
    linear = bool(spec.get("origin", {}).get("linear_projection", usual))
    kind, config = diffusers_unets.configuration(
        node, sample_size=sample_size, linear_projection=linear, classes=None if rows is None else len(rows)
    )
    foreign = diffusers_networks.unet_part(node, kind, linear_projection=linear).to_foreign(parts["denoiser"])
    if rows is not None:  # there, a row is what the U-Net adds to its time vector
        weight, bias = (parts["denoiser"].get(f"vector.{leaf}") for leaf in ("weight", "bias"))
        if weight is not None and bias is not None:
            foreign.pop(CLASS_TABLE.replace("weight", "bias"))
            rows = (rows.double() @ weight.double().T + bias.double()).float()
        foreign[CLASS_TABLE] = rows
    return _filled(getattr(diffusers, kind)(**config), foreign)


def diffusers_transformer(diffusers: Any, spec: Node, state: State, sample_size: int, rows: Tensor | None) -> Any:
    """DiTTransformer2DModel or SD3Transformer2DModel."""
    vectors = [node for node in spec["conditioners"].values() if node.get("slot") == "vector"]
    if rows is not None and not vectors[0].get("null_row", True):
        raise InputError(
            "conditioner.null_row=false: DiTTransformer2DModel requires a row for no class; use --format ldmlab."
        )
    node = spec["backbone"]
    kind, config = diffusers_transformers.configuration(node, sample_size, rows)
    foreign = diffusers_transformers.foreign_state(node, state, rows)
    return _filled(getattr(diffusers, kind)(**config), foreign)


def diffusers_first_stage(
    diffusers: Any, node: Node, state: State, image_size: int, factor: float, shift: float = 0.0
) -> Any:
    """AutoencoderKL or VQModel."""
    kind, config = diffusers_first_stages.configuration(node, image_size=image_size, scaling_factor=factor, shift=shift)
    foreign = diffusers_networks.first_stage_part(node, kind).to_foreign(state)
    return _filled(getattr(diffusers, kind)(**config), foreign)


def diffusers_text_encoder(node: Node, state: State) -> Any:
    """CLIPTextModel or LDMBertModel, the latter with an unused output layer."""
    kind, config = diffusers_texts.configuration(node)
    foreign = diffusers_networks.text_part(node).to_foreign(state)
    if kind == diffusers_texts.CLIP:
        from transformers import CLIPTextConfig, CLIPTextModel

        module = CLIPTextModel(CLIPTextConfig(**config))
        prefix = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
        return _filled(module, {prefix + key: tensor for key, tensor in foreign.items()})
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    foreign = with_unused_head(foreign, "model.embed_tokens", "to_logits")
    return _filled(LDMBertModel(LDMBertConfig(**config)), foreign)


def diffusers_tokenizer(node: Node, vocabulary: Path | None, scratch: Path) -> Any:
    """CLIPTokenizer or BertTokenizer that cuts and pads as ours; their files stay in `scratch`."""
    from transformers import BertTokenizer

    length = diffusers_texts.text_length(node)
    scratch.mkdir(parents=True, exist_ok=True)
    if node["_target_"] == diffusers_texts.BERT_TARGET:
        assert vocabulary is not None
        (scratch / "vocab.txt").write_bytes(vocabulary.read_bytes())
        return BertTokenizer.from_pretrained(scratch, model_max_length=length, do_lower_case=True)
    return diffusers_texts.tokenizer_of(node, scratch)


def diffusers_sd3_texts(node: Node, state: State, scratch: Path) -> dict[str, Any]:
    """Folder name => text encoder or tokenizer of Stable Diffusion 3's pipeline; None where there is no T5."""
    found = diffusers_sd3.foreign_texts(node, state, scratch)
    return {name: module if tensors is None else _filled(module, tensors) for name, (module, tensors) in found.items()}


def _filled(module: Any, state: State) -> Any:
    """The module with these tensors, all of them."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(key for key in own if own[key].shape != state[key].shape)
    if wrong:
        raise InputError(
            f"export: {type(module).__name__} does not fit the weights ({wrong[0]} and {len(wrong) - 1} more); "
            "use --format ldmlab."
        )
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return module.eval()
