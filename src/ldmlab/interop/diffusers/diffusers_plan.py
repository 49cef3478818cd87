"""Which pipeline of diffusers a model of ours becomes, and the folders of its modules."""

from dataclasses import dataclass

from ldmlab.interop.diffusers.diffusers_sd3 import SD3_PIPELINE
from ldmlab.interop.diffusers.diffusers_texts import BERT_TARGET, CLIP_TARGET, text_length
from ldmlab.interop.renaming import Node, downsampling

SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
_DEEP = "DeepCompressionAutoencoder"
TEXTS = (CLIP_TARGET, BERT_TARGET)
_LENGTH, _FACTOR = 77, 8  # fixed in LDMTextToImagePipeline


@dataclass(frozen=True)
class Plan:
    """Names of folders; `why`: the reason why there is no pipeline."""

    pipeline: str | None
    first_stage: str | None  # folder of the first stage; None: there are only pixels
    text: str | None  # folder of the text encoder
    why: str = ""
    denoiser: str = "unet"  # its folder


def plan(spec: Node) -> Plan:
    stage = kind(spec["first_stage"])
    text = next((node for node in spec["conditioners"].values() if node["_target_"] in TEXTS), None)
    found, why = _pipeline(spec, stage, text)
    folder = {"KLAutoencoder": "vae", _DEEP: "vae", "Identity": None}.get(stage, "vqvae")
    if found is not None and found.startswith("LDM"):
        folder = "vqvae"
    text_folder = "bert" if found == "LDMTextToImagePipeline" else "text_encoder"
    denoiser = "transformer" if kind(spec["backbone"]) in ("DiT", "MMDiT") else "unet"
    return Plan(found, folder, None if text is None else text_folder, why, denoiser)


def _pipeline(spec: Node, stage: str, text: Node | None) -> tuple[str | None, str]:
    """diffusers' pipeline for a model, or why there is none."""
    kinds = [kind(node) for node in spec["conditioners"].values()]
    others = [node for node in spec["conditioners"].values() if node is not text]
    if stage == _DEEP:
        return None, "no pipeline that ldmlab writes takes an AutoencoderDC"
    none = f"no pipeline of diffusers takes {', '.join(kinds)}"
    if kind(spec["diffusion"]["prediction"]) == "VelocityPrediction":
        if kinds == ["Sd3Text"] and stage == "KLAutoencoder" and kind(spec["backbone"]) == "MMDiT":
            return SD3_PIPELINE, ""
        return None, "no pipeline of diffusers runs this network on a flow"
    if kind(spec["backbone"]) in ("DiT", "MMDiT"):
        if stage != "KLAutoencoder" or kinds != ["ClassEmbedder"] or kind(spec["backbone"]) != "DiT":
            return None, none
        classes = others[0]["classes"]
        return ("DiTPipeline", "") if classes == 1000 else (None, f"DiTPipeline requires 1000 classes, not {classes}")
    if stage == "Identity":
        return (None, none) if kinds else ("DDIMPipeline", "")
    if not kinds:
        return "LDMPipeline", ""
    if kinds == ["LowResolution"]:
        if spec["backbone"]["out_channels"] == 3:
            return SUPER_RESOLUTION, ""
        return None, f"{SUPER_RESOLUTION} requires latents of 3 channels"
    if text is not None and stage == "KLAutoencoder" and text["_target_"] == CLIP_TARGET:
        if not others:
            return "StableDiffusionPipeline", ""
        return ("StableDiffusionInpaintPipeline", "") if _is_sd_inpainting(others, spec) else (None, none)
    if text is None or others:
        return None, none
    factor, length = downsampling(spec["first_stage"]), text_length(text)
    if factor == _FACTOR and length == _LENGTH:
        return "LDMTextToImagePipeline", ""
    needs = f"LDMTextToImagePipeline needs a first stage of f={_FACTOR} and {_LENGTH} tokens"
    return None, f"{needs}, not f={factor} and {length}"


def _is_sd_inpainting(nodes: list[Node], spec: Node) -> bool:
    """Mask as 0 and 1, then the latent of the image with grey holes: 9 channels with the noisy latent."""
    if [kind(node) for node in nodes] != ["Mask", "MaskedLatent"] or spec["backbone"]["in_channels"] != 9:
        return False
    mask, masked = nodes
    return (mask.get("keep", -1.0), mask.get("hole", 1.0), masked.get("hole", -1.0)) == (0.0, 1.0, 0.0)


def kind(node: Node) -> str:
    """The last part of a node's target."""
    return str(node["_target_"]).rpartition(".")[2]
