"""Modules of ours from diffusers' configurations and weights, and modules of diffusers and transformers from ours.

A configuration is the content of `config.json`, with or without `_class_name`; tensors have the names of diffusers'
modules. Modules are built without memory; float32 tensors are used in place, not copied, others become float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import fill, without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers import diffusers_first_stages, diffusers_names, diffusers_texts, diffusers_unets
from ldmlab.interop.imported import compare, refuse_mismatch

StateDict = Mapping[str, Tensor]
CLASS_TABLE = "class_embedding.weight"  # with num_class_embeds: rows are the U-Net's vector conditioning


def build_unet(config: Mapping[str, Any], state_dict: StateDict | None = None) -> UNet:
    """Our U-Net for a UNet2DConditionModel or UNet2DModel; without weights it is initialised afresh.

    A table of classes inside the network is no part of ours: its rows are tensors to it as `vector` conditioning.
    """
    arguments = diffusers_unets.arguments(config)
    if state_dict is None:
        return UNet(**arguments)
    with without_weights():
        unet = UNet(**arguments)
    tensors = diffusers_names.modern_names(state_dict)
    if not config.get("flip_sin_to_cos", True):
        tensors = diffusers_names.cosines_first(tensors)
    if config.get("num_class_embeds") is not None:
        tensors.pop(CLASS_TABLE, None)
    linear = bool(config.get("use_linear_projection", False))
    expected = diffusers_names.to_diffusers(unet.state_dict(), arguments, linear_projection=linear)
    projections = [name for name in expected if name.endswith((".proj_in.weight", ".proj_out.weight"))]
    refuse_mismatch({diffusers_unets.kind_of(config): compare(tensors, expected, projections)})
    fill(unet, diffusers_names.to_ours(tensors, arguments))
    return unet


def build_first_stage(config: Mapping[str, Any], state_dict: StateDict | None = None) -> nn.Module:
    """Our KL or VQ first stage for an AutoencoderKL or VQModel; without weights it is initialised afresh."""
    node = diffusers_first_stages.arguments(config)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    with without_weights():
        stage: nn.Module = instantiate(node, where="first_stage")
    tensors = diffusers_first_stages.with_quant_convs(diffusers_names.modern_names(state_dict), config)
    expected = diffusers_first_stages.to_diffusers(stage.state_dict(), node)
    linear = [name for name in expected if ".attentions." in name]
    refuse_mismatch({diffusers_first_stages.kind_of(config): compare(tensors, expected, linear)})
    fill(stage, diffusers_first_stages.to_ours(tensors, node))
    return stage


def build_text(
    config: Mapping[str, Any],
    state_dict: StateDict | None = None,
    padding: str = "end",  # CLIPTextModel: end as Stable Diffusion 1.x | zero as 2.x
) -> nn.Module:
    """Our text conditioner for a CLIPTextModel or an LDMBertModel (the paper's transformer)."""
    node = diffusers_texts.node(config, padding=padding)
    if state_dict is None:
        return instantiate(node, where="conditioner")
    return filled_text(node, config, state_dict)


def filled_text(node: Mapping[str, Any], config: Mapping[str, Any], state_dict: StateDict) -> nn.Module:
    """The text conditioner of a node with the tensors of the text encoder that has this configuration."""
    with without_weights():
        text: nn.Module = instantiate(node, where="conditioner")
    tensors = diffusers_texts.to_ours(state_dict, node)
    expected = {name: tensor.to("meta") for name, tensor in text.state_dict().items()}
    refuse_mismatch({f"text encoder {diffusers_texts.kind_of(config)}": compare(tensors, expected)})
    fill(text, tensors)
    return text


Spec = Mapping[str, Any]
State = Mapping[str, Tensor]


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


def class_rows(spec: Spec, parts: Mapping[str, State]) -> Tensor | None:
    """The vectors of a class embedder that alone fills the vector slot; there, they are part of the network."""
    vectors = {name: node for name, node in spec["conditioners"].items() if node.get("slot") == "vector"}
    if len(vectors) != 1 or not next(iter(vectors.values()))["_target_"].endswith(".ClassEmbedder"):
        return None
    return parts["conditioner"][f"{next(iter(vectors))}.embedding.weight"].float()


def _added_rows(rows: Tensor, denoiser: State) -> Tensor:
    """What the U-Net adds to its time vector for each row."""
    if "vector.weight" not in denoiser:
        return rows
    return (rows.double() @ denoiser["vector.weight"].double().T + denoiser["vector.bias"].double()).float()


def diffusers_unet(
    diffusers: Any, spec: Spec, parts: Mapping[str, State], sample_size: int, rows: Tensor | None
) -> Any:
    """UNet2DConditionModel or UNet2DModel; projections as in the file it came from, else as Stable Diffusion 2.x's."""
    node = spec["backbone"]
    if not node["_target_"].endswith(".UNet"):
        raise InputError(f"backbone={node['_target_']} has no class in diffusers; use --format ldmlab.")
    targets = [other["_target_"] for other in spec["conditioners"].values()]
    usual = node.get("head_channels") is not None and diffusers_texts.CLIP_TARGET in targets
    linear = bool(spec.get("origin", {}).get("linear_projection", usual))
    classes = None if rows is None else len(rows)
    kind, config = diffusers_unets.configuration(
        node, sample_size=sample_size, linear_projection=linear, classes=classes
    )
    state = {key: tensor for key, tensor in parts["denoiser"].items() if rows is None or not key.startswith("vector.")}
    foreign = diffusers_names.to_diffusers(state, node, linear_projection=linear)
    if rows is not None:
        foreign[CLASS_TABLE] = _added_rows(rows, parts["denoiser"])
    return _filled(getattr(diffusers, kind)(**config), foreign)


def diffusers_first_stage(diffusers: Any, node: Spec, state: State, image_size: int, factor: float) -> Any:
    """AutoencoderKL or VQModel."""
    kind, config = diffusers_first_stages.configuration(node, image_size=image_size, scaling_factor=factor)
    return _filled(getattr(diffusers, kind)(**config), diffusers_first_stages.to_diffusers(state, node))


def diffusers_text_encoder(node: Spec, state: State) -> Any:
    """CLIPTextModel or LDMBertModel."""
    kind, config = diffusers_texts.configuration(node)
    foreign = diffusers_texts.to_diffusers(state, node)
    if kind == diffusers_texts.CLIP:
        from transformers import CLIPTextConfig, CLIPTextModel

        module = CLIPTextModel(CLIPTextConfig(**config))
        prefix = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
        return _filled(module, {prefix + key: tensor for key, tensor in foreign.items()})
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return _filled(LDMBertModel(LDMBertConfig(**config)), foreign)


def diffusers_tokenizer(node: Spec, vocabulary: Path | None, length: int, scratch: Path) -> Any:
    """CLIPTokenizer or BertTokenizer that cuts and pads as ours; their files stay in `scratch`."""
    from transformers import AddedToken, BertTokenizer, CLIPTokenizer

    scratch.mkdir(parents=True, exist_ok=True)
    if node["_target_"] == diffusers_texts.BERT_TARGET:
        assert vocabulary is not None
        (scratch / "vocab.txt").write_bytes(vocabulary.read_bytes())
        return BertTokenizer.from_pretrained(scratch, model_max_length=length, do_lower_case=True)
    diffusers_texts.write_clip_files(scratch)
    token = diffusers_texts.pad_token(node.get("padding", "zero"))
    pad = AddedToken(token, single_word=True, normalized=False)  # where it is "!", one at a word's end is no padding
    return CLIPTokenizer.from_pretrained(scratch, model_max_length=length, pad_token=pad)


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
