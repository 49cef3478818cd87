"""Modules of diffusers and transformers that hold our weights; the one place that builds them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.diffusers import first_stages, texts, tokenizers, unet_names
from ldmlab.interop.diffusers.modules import CLASS_TABLE
from ldmlab.interop.diffusers.unet_config import configuration as unet_configuration

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


def unet(diffusers: Any, spec: Spec, parts: Mapping[str, State], sample_size: int, rows: Tensor | None) -> Any:
    """UNet2DConditionModel or UNet2DModel; projections as in the file it came from, else as Stable Diffusion 2.x's."""
    node = spec["backbone"]
    if not node["_target_"].endswith(".UNet"):
        raise InputError(f"backbone={node['_target_']} has no class in diffusers; use --format ldmlab.")
    told = [other["_target_"] for other in spec["conditioners"].values()]
    usual = node.get("head_channels") is not None and texts.CLIP_TARGET in told
    linear = bool(spec.get("origin", {}).get("linear_projection", usual))
    classes = None if rows is None else len(rows)
    kind, config = unet_configuration(node, sample_size=sample_size, linear_projection=linear, classes=classes)
    state = {key: tensor for key, tensor in parts["denoiser"].items() if rows is None or not key.startswith("vector.")}
    theirs = unet_names.to_diffusers(state, node, linear_projection=linear)
    if rows is not None:
        theirs[CLASS_TABLE] = _added_rows(rows, parts["denoiser"])
    return _filled(getattr(diffusers, kind)(**config), theirs)


def first_stage(diffusers: Any, node: Spec, state: State, image_size: int, factor: float) -> Any:
    """AutoencoderKL or VQModel."""
    kind, config = first_stages.configuration(node, image_size=image_size, scaling_factor=factor)
    return _filled(getattr(diffusers, kind)(**config), first_stages.to_diffusers(state, node))


def text_encoder(node: Spec, state: State) -> Any:
    """CLIPTextModel or LDMBertModel."""
    kind, config = texts.configuration(node)
    theirs = texts.to_diffusers(state, node)
    if kind == texts.CLIP:
        from transformers import CLIPTextConfig, CLIPTextModel

        module = CLIPTextModel(CLIPTextConfig(**config))
        prefix = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
        return _filled(module, {prefix + key: tensor for key, tensor in theirs.items()})
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return _filled(LDMBertModel(LDMBertConfig(**config)), theirs)


def tokenizer(node: Spec, vocabulary: Path | None, length: int, scratch: Path) -> Any:
    """CLIPTokenizer or BertTokenizer that cuts and pads as ours; their files stay in `scratch`."""
    from transformers import AddedToken, BertTokenizer, CLIPTokenizer

    scratch.mkdir(parents=True, exist_ok=True)
    if node["_target_"] == texts.BERT_TARGET:
        assert vocabulary is not None
        (scratch / "vocab.txt").write_bytes(vocabulary.read_bytes())
        return BertTokenizer.from_pretrained(scratch, model_max_length=length, do_lower_case=True)
    tokenizers.write_clip_files(scratch)
    token = tokenizers.pad_token(node.get("padding", "zero"))
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
