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
from ldmlab.interop.diffusers import diffusers_build, diffusers_config
from ldmlab.interop.diffusers.diffusers_first_stages import folded, scale_of, single_factor
from ldmlab.interop.diffusers.diffusers_texts import BERT_TARGET, CLIP_TARGET
from ldmlab.interop.imported import Imported, assembled, assembled_first_stage

Spec = Mapping[str, Any]
_LENGTH, _FACTOR = 77, 8  # fixed in LDMTextToImagePipeline


@dataclass(frozen=True)
class Plan:
    """Names of folders; `why`: the reason why there is no pipeline."""

    pipeline: str | None
    first_stage: str | None  # folder of the first stage; None: there are only pixels
    text: str | None = None  # folder of the text encoder
    why: str = ""
    unscaled: bool = False  # the pipeline hands latents to the first stage as they are


def plan(spec: Spec) -> Plan:
    """For a latent diffusion model's description."""
    stage = kind(spec["first_stage"])
    nodes = list(spec["conditioners"].values())
    kinds = [kind(node) for node in nodes]
    text = next((node for node in nodes if node["_target_"] in (CLIP_TARGET, BERT_TARGET)), None)
    names = {"KLAutoencoder": "vae", "Identity": None}
    folders = names.get(stage, "vqvae"), None if text is None else "text_encoder"
    if stage == "Identity":
        return Plan(None if kinds else "DDIMPipeline", *folders, why=_because(kinds) if kinds else "")
    if not kinds:
        return Plan("LDMPipeline", "vqvae")
    if kinds == ["LowResolution"]:
        if spec["backbone"]["out_channels"] == 3:
            return Plan("LDMSuperResolutionPipeline", "vqvae", unscaled=True)
        return Plan(None, *folders, why="LDMSuperResolutionPipeline requires latents of 3 channels")
    if text is None:
        return Plan(None, *folders, why=_because(kinds))
    others = [node for node in nodes if node is not text]
    if not others and stage == "KLAutoencoder" and text["_target_"] == CLIP_TARGET:
        return Plan("StableDiffusionPipeline", "vae", "text_encoder")
    if not others:
        return _ldm_text(spec, text, folders)
    if _is_sd_inpainting(others, spec) and stage == "KLAutoencoder" and text["_target_"] == CLIP_TARGET:
        return Plan("StableDiffusionInpaintPipeline", "vae", "text_encoder")
    return Plan(None, *folders, why=_because(kinds))


def _ldm_text(spec: Spec, text: Spec, folders: tuple[str | None, str | None]) -> Plan:
    """The paper's text-to-image pipeline has a fixed factor and number of tokens."""
    factor, length = downsampling(spec["first_stage"]), text_length(text)
    if factor == _FACTOR and length == _LENGTH:
        return Plan("LDMTextToImagePipeline", "vqvae", "bert")
    why = f"LDMTextToImagePipeline needs a first stage of f={_FACTOR} and {_LENGTH} tokens, not f={factor} and {length}"
    return Plan(None, *folders, why=why)


def _is_sd_inpainting(nodes: list[Spec], spec: Spec) -> bool:
    """Mask as 0 and 1, then the latent of the image with grey holes: 9 channels with the noisy latent."""
    if [kind(node) for node in nodes] != ["Mask", "MaskedLatent"] or spec["backbone"]["in_channels"] != 9:
        return False
    mask, masked = nodes
    return (mask.get("keep", -1.0), mask.get("hole", 1.0), masked.get("hole", -1.0)) == (0.0, 1.0, 0.0)


def _because(kinds: list[str]) -> str:
    return f"no pipeline of diffusers takes {', '.join(kinds)}"


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


Parts = Mapping[str, Mapping[str, Tensor]]
Exported = tuple[str, verify.Differences]  # what it is, and the largest difference of each part


def export_folder(spec: Spec, parts: Parts, folder: Path) -> Exported:
    """Write into an empty folder, load again with diffusers, compare.

    InputError for what diffusers cannot hold and for a difference of 1e-4 or more; the caller then drops the folder.
    """
    with diffusers_build.quiet_diffusers() as diffusers:
        if spec["kind"] == "first_stage":
            return _export_first_stage(diffusers, spec, parts, folder)
        if spec["kind"] != "latent_diffusion":
            raise InputError(f"a model of kind {spec['kind']} has no class in diffusers; use --format ldmlab.")
        return Export(diffusers, spec, parts, folder).run()


def _export_first_stage(diffusers: Any, spec: Spec, parts: Parts, folder: Path) -> Exported:
    """An autoencoder alone: its latents are raw."""
    node = spec["first_stage"]
    module = diffusers_build.diffusers_first_stage(diffusers, node, parts["first_stage"], spec["image_size"], 1.0)
    module.save_pretrained(folder)
    stage = assembled_first_stage(_imported(spec, parts))
    found = type(module).from_pretrained(folder)
    return type(module).__name__, verify.compare_first_stage(verify.raw_latents(stage), found, 1.0)


def _imported(spec: Spec, parts: Parts) -> Imported:
    return Imported("the model", dict(spec), {name: dict(part) for name, part in parts.items()}, "raw")


class Export:
    """Export of one latent diffusion model to a folder."""

    def __init__(self, diffusers: Any, spec: Spec, parts: Parts, folder: Path) -> None:
        self.diffusers, self.spec, self.parts, self.folder = diffusers, spec, parts, folder
        self.plan = plan(spec)
        self.std, self.shift = scale_of(spec["latent_scale"])
        factor = single_factor(self.std, self.shift)
        self.fold = factor is None or (self.plan.unscaled and factor != 1)
        self.factor = 1.0 if factor is None or self.fold else factor
        self.rows = diffusers_build.class_rows(spec, parts)
        self.text = next((name for name, node in spec["conditioners"].items() if node["_target_"] in _TEXTS), None)
        self.ours = assembled(_imported(spec, parts))

    def run(self) -> Exported:
        """Write, read, compare."""
        modules = self._modules()
        kinds = {name: type(module) for name, module in modules.items()}
        if self.plan.pipeline is None:
            for name, module in modules.items():
                module.save_pretrained(self.folder / name)
            self._keep_conditioner()
        else:
            self._pipeline_class(**modules, **self._absent()).save_pretrained(self.folder)
        self._keep_vocabulary()
        del modules
        if self.plan.pipeline is None:
            found = {name: kind.from_pretrained(self.folder / name) for name, kind in kinds.items()}
            what = f"modules {', '.join(sorted(found))} ({self.plan.why})"
        else:
            pipeline = self._pipeline_class.from_pretrained(self.folder)
            found, what = dict(pipeline.components), self.plan.pipeline
        return what, self._compare(found)

    @property
    def _pipeline_class(self) -> Any:
        return getattr(self.diffusers, str(self.plan.pipeline))

    def _modules(self) -> dict[str, Any]:
        """Folder name => module of diffusers."""
        spec = self.spec
        size = _side(spec["image_size"])
        f = downsampling(spec["first_stage"])
        modules = {
            "unet": diffusers_build.diffusers_unet(self.diffusers, spec, self.parts, size // f, self.rows),
            "scheduler": self.diffusers.DDIMScheduler(**diffusers_config.scheduler_options(spec["diffusion"])),
        }
        if self.plan.first_stage is not None:
            node, state = spec["first_stage"], self.parts["first_stage"]
            if self.fold:
                state = folded(state, self.std, self.shift, node["latent_channels"])
            modules[self.plan.first_stage] = diffusers_build.diffusers_first_stage(
                self.diffusers, node, state, size, self.factor
            )
        if self.plan.text is not None and self.text is not None:
            node, prefix = spec["conditioners"][self.text], f"{self.text}."
            state = {k.removeprefix(prefix): t for k, t in self.parts["conditioner"].items() if k.startswith(prefix)}
            modules[self.plan.text] = diffusers_build.diffusers_text_encoder(node, state)
            path = getattr(self._conditioner.tokenizer, "path", None)
            modules["tokenizer"] = diffusers_build.diffusers_tokenizer(
                node, path, text_length(node), self.folder / _SCRATCH
            )
        return modules

    @property
    def _conditioner(self) -> Any:
        return self.ours.conditioners[str(self.text)]

    def _absent(self) -> dict[str, Any]:
        """Parts of Stable Diffusion's pipelines that check images; ldmlab has none."""
        if not str(self.plan.pipeline).startswith("StableDiffusion"):
            return {}
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def _keep_vocabulary(self) -> None:
        """The tokenizer's plain files, which older releases need, in addition to what transformers writes."""
        scratch = self.folder / _SCRATCH
        if scratch.is_dir():
            for file in scratch.iterdir():
                shutil.copy(file, self.folder / "tokenizer" / file.name)
            shutil.rmtree(scratch)

    def _keep_conditioner(self) -> None:
        """Weights of conditioners that diffusers has no class for, under our names."""
        skipped = tuple(f"{name}." for name in [self.text, *self.spec["conditioners"]] if self._is_theirs(name))
        state = {key: t for key, t in self.parts.get("conditioner", {}).items() if not key.startswith(skipped)}
        if state:
            save_tensors(self.folder / "conditioner.safetensors", state)

    def _is_theirs(self, name: str | None) -> bool:
        """Whether a conditioner is the text encoder, or has become the U-Net's table of classes."""
        if name is None:
            return False
        return name == self.text or (self.rows is not None and self.spec["conditioners"][name].get("slot") == "vector")

    def _compare(self, found: Mapping[str, Any]) -> verify.Differences:
        """Every part of the written folder against ours."""
        ours = self.ours
        result = {"U-Net": verify.compare_unet(ours.backbone, found["unet"], self.rows)}
        result["schedule"] = verify.compare_schedule(ours, found["scheduler"])
        if self.plan.first_stage is not None:
            result |= verify.compare_first_stage(ours, found[self.plan.first_stage], self.factor)
        if self.plan.text is not None and self.text is not None:
            length = text_length(self.spec["conditioners"][self.text])
            encoder, tokenizer = found[self.plan.text], found["tokenizer"]
            result["text encoder"] = verify.compare_text(self._conditioner, tokenizer, encoder, length)
        return result


_SCRATCH = "vocabulary"
_TEXTS = (CLIP_TARGET, BERT_TARGET)


def _side(size: int | list[int]) -> int:
    """diffusers' pipelines default to squares."""
    return size if isinstance(size, int) else min(size)
