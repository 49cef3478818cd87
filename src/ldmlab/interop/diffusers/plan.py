"""Which pipeline of diffusers can run a model of ours, and what it calls the parts; none: modules, each by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.texts import BERT_TARGET, CLIP_TARGET

Spec = Mapping[str, Any]
_LENGTH, _FACTOR = 77, 8  # fixed in LDMTextToImagePipeline


@dataclass(frozen=True)
class Plan:
    """Names of folders; `why` says what keeps the model from a pipeline."""

    pipeline: str | None
    first_stage: str | None  # folder of the first stage; None: there are only pixels
    text: str | None = None  # folder of the text encoder
    why: str = ""
    unscaled: bool = False  # the pipeline hands latents to the first stage as they are


def plan(spec: Spec) -> Plan:
    """For a latent diffusion model's description."""
    stage = kind(spec["first_stage"])
    nodes = list(spec["conditioners"].values())
    told = [kind(node) for node in nodes]
    text = next((node for node in nodes if node["_target_"] in (CLIP_TARGET, BERT_TARGET)), None)
    names = {"KLAutoencoder": "vae", "Identity": None}
    folders = names.get(stage, "vqvae"), None if text is None else "text_encoder"
    if stage == "Identity":
        return Plan(None if told else "DDIMPipeline", *folders, why=_because(told) if told else "")
    if not told:
        return Plan("LDMPipeline", "vqvae")
    if told == ["LowResolution"]:
        if spec["backbone"]["out_channels"] == 3:
            return Plan("LDMSuperResolutionPipeline", "vqvae", unscaled=True)
        return Plan(None, *folders, why="LDMSuperResolutionPipeline wants latents of 3 channels")
    if text is None:
        return Plan(None, *folders, why=_because(told))
    others = [node for node in nodes if node is not text]
    if not others and stage == "KLAutoencoder" and text["_target_"] == CLIP_TARGET:
        return Plan("StableDiffusionPipeline", "vae", "text_encoder")
    if not others:
        return _ldm_text(spec, text, folders)
    if _is_sd_inpainting(others, spec) and stage == "KLAutoencoder" and text["_target_"] == CLIP_TARGET:
        return Plan("StableDiffusionInpaintPipeline", "vae", "text_encoder")
    return Plan(None, *folders, why=_because(told))


def _ldm_text(spec: Spec, text: Spec, folders: tuple[str | None, str | None]) -> Plan:
    """The paper's text-to-image pipeline has its factor and its number of tokens written into it."""
    factor, length = downsampling(spec["first_stage"]), text_length(text)
    if factor == _FACTOR and length == _LENGTH:
        return Plan("LDMTextToImagePipeline", "vqvae", "bert")
    why = f"LDMTextToImagePipeline wants a first stage of f={_FACTOR} and {_LENGTH} tokens, not f={factor} and {length}"
    return Plan(None, *folders, why=why)


def _is_sd_inpainting(nodes: list[Spec], spec: Spec) -> bool:
    """Mask as 0 and 1, then the latent of the image with grey holes: 9 channels with the noisy latent."""
    if [kind(node) for node in nodes] != ["Mask", "MaskedLatent"] or spec["backbone"]["in_channels"] != 9:
        return False
    mask, masked = nodes
    return (mask.get("keep", -1.0), mask.get("hole", 1.0), masked.get("hole", -1.0)) == (0.0, 1.0, 0.0)


def _because(told: list[str]) -> str:
    return f"no pipeline of diffusers is told {', '.join(told)}"


def kind(node: Spec) -> str:
    """The last part of a node's target."""
    return str(node["_target_"]).rpartition(".")[2]


def downsampling(node: Spec) -> int:
    """f of a first stage's node."""
    return int(2 ** (len(node["channel_mult"]) - 1)) if "channel_mult" in node else 1


def text_length(node: Spec) -> int:
    """Tokens of a text conditioner's node."""
    if node["_target_"] == BERT_TARGET:
        return int(node.get("length", _LENGTH))
    if not node.get("config"):
        raise InputError(f"conditioner {node.get('name')} does not carry its configuration; export the run again.")
    return int(node["config"]["text_cfg"].get("context_length", _LENGTH))
