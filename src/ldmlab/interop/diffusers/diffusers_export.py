"""Our model as a diffusers folder: a pipeline if one exists, else its modules; compared after writing."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.checkpoints import save_tensors
from ldmlab.errors import InputError
from ldmlab.interop import verify
from ldmlab.interop.diffusers import diffusers_build as build
from ldmlab.interop.diffusers.diffusers_first_stages import folded, scale_of, single_factor
from ldmlab.interop.diffusers.diffusers_schedulers import scheduler_options, token_values
from ldmlab.interop.diffusers.diffusers_sd3 import SD3_PIPELINE, compare_texts
from ldmlab.interop.diffusers.diffusers_texts import BERT_TARGET, CLIP_TARGET, text_length
from ldmlab.interop.imported import assembled, assembled_first_stage
from ldmlab.interop.renaming import Node, downsampling
from ldmlab.model_files import ModelFiles

Exported = tuple[str, verify.Differences]  # what it is, and the largest difference of each part
_SCRATCH = "vocabulary"


def export_folder(ours: ModelFiles, folder: Path) -> Exported:
    """Write into an empty folder, load again with diffusers, compare.

    InputError for what diffusers cannot hold and for a difference of 1e-4 or more; the caller then drops the folder.
    """
    spec = ours.spec
    with build.quiet_diffusers() as diffusers:
        if spec["kind"] == "first_stage":  # its latents are raw
            state, size = ours.parts["first_stage"], spec["image_size"]
            module = build.diffusers_first_stage(diffusers, spec["first_stage"], state, size, 1.0)
            module.save_pretrained(folder)
            stage, found = assembled_first_stage(ours), type(module).from_pretrained(folder)
            return type(module).__name__, _compare_first_stage(verify.raw_latents(stage), found, 1.0)
        if spec["kind"] != "latent_diffusion":
            raise InputError(f"a model of kind {spec['kind']} has no class in diffusers; use --format ldmlab.")
        return Export(diffusers, ours, folder).run()


def _compare_first_stage(ours: Any, found: Any, factor: float, shift: float = 0.0) -> verify.Differences:
    def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = found.encode(images)
        for name in ("latents", "latent"):  # of VQModel and AutoencoderDC, without spread
            if hasattr(encoded, name):
                return getattr(encoded, name) * factor, None
        return (encoded.latent_dist.mean - shift) * factor, encoded.latent_dist.std * factor

    return verify.compare_first_stage(ours, encode, lambda latents: found.decode(latents / factor + shift).sample)


class Export:
    """Export of one latent diffusion model to a folder."""

    def __init__(self, diffusers: Any, files: ModelFiles, folder: Path) -> None:
        self.diffusers, self.spec, self.parts, self.folder = diffusers, files.spec, files.parts, folder
        self.plan = plan(self.spec)
        self.std, self.shift = scale_of(self.spec["latent_scale"])
        sd3 = self.plan.pipeline == SD3_PIPELINE and len(self.shift.unique()) == 1  # which shifts latents too
        self.moved = float(self.shift[0]) if sd3 else 0.0
        factor = single_factor(self.std, self.shift - self.moved)
        # the super-resolution pipeline hands latents to the first stage as they are
        self.fold = factor is None or (self.plan.pipeline == SUPER_RESOLUTION and factor != 1)
        self.factor = 1.0 if factor is None or self.fold else factor
        self.rows = None if kind(self.spec["backbone"]) == "MMDiT" else build.class_rows(self.spec, self.parts)
        conditioners = self.spec["conditioners"]
        self.text = next((name for name, node in conditioners.items() if node["_target_"] in TEXTS), None)
        self.ours = assembled(files)

    def run(self) -> Exported:
        """Write, read, compare."""
        modules = self._modules()
        kinds = {name: type(module) for name, module in modules.items()}
        pipeline_class = getattr(self.diffusers, str(self.plan.pipeline), None)
        if pipeline_class is None:
            for name, module in modules.items():
                module.save_pretrained(self.folder / name)
            self._keep_conditioner()
        else:  # Stable Diffusion's pipelines have parts that check images; ldmlab has none
            stable = str(self.plan.pipeline).startswith("StableDiffusion")
            more: dict[str, Any] = {}
            if self.plan.pipeline == "DiTPipeline":
                more = {"id2label": self.spec.get("origin", {}).get("id2label")}
            elif stable and self.plan.pipeline != SD3_PIPELINE:
                more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline_class(**modules, **more).save_pretrained(self.folder)
        self._keep_vocabulary()
        absent = {name: None for name, module in modules.items() if module is None}
        del modules
        if pipeline_class is None:
            found = {name: kind.from_pretrained(self.folder / name) for name, kind in kinds.items()}
            return f"modules {', '.join(sorted(found))} ({self.plan.why})", self._compare(found)
        return str(self.plan.pipeline), self._compare(pipeline_class.from_pretrained(self.folder, **absent).components)

    def _modules(self) -> dict[str, Any]:
        """Folder name => module of diffusers."""
        spec = self.spec
        side = spec["image_size"] if isinstance(spec["image_size"], int) else min(spec["image_size"])  # squares
        latent_side = side // downsampling(spec["first_stage"])
        modules = {self.plan.denoiser: self._denoiser(latent_side), "scheduler": self._scheduler()}
        if self.plan.first_stage is not None:
            node, state = spec["first_stage"], self.parts["first_stage"]
            if self.fold:
                node, state = folded(node, state, self.std, self.shift)
            stage = build.diffusers_first_stage(self.diffusers, node, state, side, self.factor, self.moved)
            modules[self.plan.first_stage] = stage
        if self.plan.pipeline == SD3_PIPELINE:
            ((name, node),) = spec["conditioners"].items()
            state = {k.removeprefix(f"{name}."): t for k, t in self.parts["conditioner"].items()}
            modules |= build.diffusers_sd3_texts(node, state, self.folder / _SCRATCH)
        if self.plan.text is not None and self.text is not None:
            node, prefix = spec["conditioners"][self.text], f"{self.text}."
            state = {k.removeprefix(prefix): t for k, t in self.parts["conditioner"].items() if k.startswith(prefix)}
            modules[self.plan.text] = build.diffusers_text_encoder(node, state)
            path = getattr(self._conditioner.tokenizer, "path", None)
            modules["tokenizer"] = build.diffusers_tokenizer(node, path, self.folder / _SCRATCH)
        return modules

    def _denoiser(self, side: int) -> Any:
        if self.plan.denoiser == "transformer":
            return build.diffusers_transformer(self.diffusers, self.spec, self.parts["denoiser"], side, self.rows)
        return build.diffusers_unet(self.diffusers, self.spec, self.parts, side, self.rows)

    def _scheduler(self) -> Any:
        name, options = scheduler_options(self.spec["diffusion"], token_values(self.spec["backbone"]))
        return getattr(self.diffusers, name)(**options)

    @property
    def _conditioner(self) -> Any:
        return self.ours.conditioners[str(self.text)]

    def _keep_vocabulary(self) -> None:
        """The tokenizer's plain files, which older releases need, in addition to what transformers writes."""
        scratch = self.folder / _SCRATCH
        if scratch.is_dir():
            for file in scratch.iterdir():
                shutil.copy(file, self.folder / "tokenizer" / file.name)
            shutil.rmtree(scratch)

    def _keep_conditioner(self) -> None:
        """Weights of conditioners that diffusers has no class for, under our names."""
        nodes = self.spec["conditioners"].items()
        tables = [name for name, node in nodes if self.rows is not None and node.get("slot") == "vector"]
        theirs = tuple(f"{name}." for name in [*tables, self.text] if name is not None)
        state = {key: t for key, t in self.parts.get("conditioner", {}).items() if not key.startswith(theirs)}
        if state:
            save_tensors(self.folder / "conditioner.safetensors", state)

    def _compare(self, found: Mapping[str, Any]) -> verify.Differences:
        """Every part of the written folder against ours."""

        def denoiser(x: Tensor, t: Tensor, tokens: Tensor | None, vector: Tensor | None) -> Tensor:
            name = "pooled_projections" if kind(self.spec["backbone"]) == "MMDiT" else "class_labels"
            inputs = {"encoder_hidden_states": tokens, name: vector, "timestep": t}
            given = {name: value for name, value in inputs.items() if value is not None}
            return found[self.plan.denoiser](x, **given).sample

        result = {"denoiser": verify.compare_denoiser(self.ours.backbone, denoiser, self.rows)}
        result["schedule"] = verify.compare_schedule(self.ours, found["scheduler"], token_values(self.spec["backbone"]))
        if self.plan.first_stage is not None:
            result |= _compare_first_stage(self.ours, found[self.plan.first_stage], self.factor, self.moved)
        if self.plan.pipeline == SD3_PIPELINE:
            result["text encoders"] = compare_texts(next(iter(self.ours.conditioners.values())), found)
        if self.plan.text is not None and self.text is not None:
            length = text_length(self.spec["conditioners"][self.text])
            encoder, tokenizer = found[self.plan.text], found["tokenizer"]
            result["text encoder"] = verify.compare_text(self._conditioner, tokenizer, encoder, length)
        return result


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
    if kind(spec["diffusion"]["prediction"]) in ("VelocityPrediction", "EdmPrediction"):
        if kinds == ["Sd3Text"] and stage == "KLAutoencoder" and kind(spec["backbone"]) == "MMDiT":
            return SD3_PIPELINE, ""
        return None, "no pipeline is written for this network on such a path"
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
