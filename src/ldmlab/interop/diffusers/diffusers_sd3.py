"""The three text encoders of Stable Diffusion 3's pipeline and our `Sd3Text`, both ways."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldmlab.conditioners.sd3_text import Sd3Text
from ldmlab.errors import InputError
from ldmlab.interop import verify
from ldmlab.interop.diffusers import diffusers_texts as texts
from ldmlab.interop.diffusers.diffusers_config import read_json, read_weights
from ldmlab.interop.diffusers.diffusers_networks import text_tensors
from ldmlab.interop.renaming import OPTIONS, Node, Part, State, clip_names, names_of, renamed, unfilled

SD3_PIPELINE = "StableDiffusion3Pipeline"
TARGET = "ldmlab.conditioners.sd3_text.Sd3Text"
_CLIP, _T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
_T5_OPTIONS = OPTIONS["diffusers"]["t5"]  # transformers' T5Config => ours, its default
_T5_FIXED = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
_ENCODERS = {"clip": "text_encoder", "clip_2": "text_encoder_2", "t5": "text_encoder_3"}  # ours => folder
Parts = dict[str, dict[str, Tensor]]


def read_texts(folder: Path, index: Mapping[str, Any], width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our conditioner's node and weights; width: of the transformer's tokens. T5 may be absent, as in diffusers."""
    configs = {}
    for ours, name in _ENCODERS.items():
        kind = (index.get(name) or [None, None])[1]
        if kind != (_T5 if ours == "t5" else _CLIP) and not (ours == "t5" and kind is None):
            raise InputError(f"{folder} has {kind} as {name}, which is not supported; supported: {_CLIP} and {_T5}.")
        if kind is not None:
            configs[ours] = read_json(folder / name / "config.json")
    node: dict[str, Any] = {"_target_": TARGET, "width": width, "drop": 0.0, "paddings": []}
    for ours, name in (("clip", "tokenizer"), ("clip_2", "tokenizer_2")):
        padding = texts.clip_padding(folder / name)
        node["paddings"].append(padding)
        node[ours] = _clip(configs[ours], texts.clip_length(folder / name), padding)
    if "t5" in configs:
        node |= {"t5": _t5(configs["t5"]), "vocab": _vocabulary(folder / "tokenizer_3")}
    text = cast(Sd3Text, unfilled(node, "conditioner"))
    for ours, part in parts_of(text).items():
        tensors = read_weights(folder / _ENCODERS[ours])
        if ours == "t5":
            tensors.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
        else:
            tensors = text_tensors(tensors, getattr(text, ours).length)
        part.filled(tensors)
    return node, {f"text.{name}": tensor for name, tensor in text.state_dict().items()}


def _clip(config: Mapping[str, Any], length: int | None, padding: str) -> dict[str, Any]:
    node = texts.node({**config, "architectures": [texts.CLIP]}, padding=padding, length=length)
    return dict(node["config"])


def _t5(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in _T5_FIXED.items():
        if config.get(name, value) != value:
            raise InputError(f"{_T5} with {name}={config[name]} is not supported; supported: {value}.")
    return {ours: config.get(theirs, default) for theirs, (ours, default) in _T5_OPTIONS.items()}


def _vocabulary(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json; save it there with transformers: "
            "T5TokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return str(file.resolve())


def parts_of(text: Sd3Text) -> dict[str, Part]:
    """The encoders of a conditioner, and the names of their tensors in transformers (CLIP's without a prefix)."""
    parts = {}
    for ours in ("clip", "clip_2"):
        module = getattr(text, ours)
        tower = [name for name in module.state_dict() if name.startswith("tower.")]
        names = {**clip_names(tower, ""), "projection.weight": ("text_projection.weight",)}
        parts[ours] = Part(f"text encoder {_ENCODERS[ours]}", module, names)
    if text.t5 is not None:
        names = renamed(text.t5.state_dict(), names_of("diffusers", "t5"))
        parts["t5"] = Part(f"text encoder {_ENCODERS['t5']}", text.t5, names)
    return parts


def foreign_texts(node: Node, state: State, scratch: Path) -> dict[str, tuple[Any, dict[str, Tensor] | None]]:
    """Folder name => module of transformers, fresh, and its tensors; tokenizers, made in `scratch`, have none."""
    transformers: Any = import_module("transformers")
    parts, module = parts_of(unfilled(node, "conditioner")), None
    found: dict[str, tuple[Any, dict[str, Tensor] | None]] = {}
    if "t5" not in parts:
        found["text_encoder_3"] = found["tokenizer_3"] = None, None
    for ours, part in parts.items():
        own = {name.removeprefix(f"{ours}."): tensor for name, tensor in state.items() if name.startswith(f"{ours}.")}
        foreign = part.to_foreign(own)
        if ours == "t5":
            if not Path(node["vocab"]).is_file():
                raise InputError(f"conditioner.vocab={node['vocab']} is gone; put T5's tokenizer.json there again.")
            options = {theirs: node["t5"].get(name, default) for theirs, (name, default) in _T5_OPTIONS.items()}
            module = transformers.T5EncoderModel(transformers.T5Config(**options, feed_forward_proj="gated-gelu"))
            twins = {"encoder.embed_tokens.weight": foreign["shared.weight"]}
            foreign |= {name: tensor for name, tensor in twins.items() if name in module.state_dict()}
            found["tokenizer_3"] = transformers.T5TokenizerFast(tokenizer_file=node["vocab"], extra_ids=0), None
        else:
            pad = node.get("paddings", ("end", "zero"))[ours == "clip_2"]
            clip = {"_target_": texts.CLIP_TARGET, "config": node[ours], "padding": pad}
            module = transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**texts.configuration(clip)[1])
            )
            prefix = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
            foreign = {("" if key.startswith("text_proj") else prefix) + key: t for key, t in foreign.items()}
            found[_ENCODERS[ours].replace("text_encoder", "tokenizer")] = texts.tokenizer_of(clip, scratch), None
        found[_ENCODERS[ours]] = module, foreign
    return found


@torch.no_grad()
def compare_texts(ours: Any, found: Mapping[str, Any]) -> float:
    """Token numbers, which must be equal, and states of captions: empty, short, strange, too long."""
    captions, difference = list(verify.CAPTIONS), 0.0
    lengths = [ours.clip.length, ours.clip_2.length, ours.t5_length]
    ids, states = ours.ids(captions), ours({"caption": captions}, None)
    width, start = ours.width(None), 0
    rows = -(-ours.pooled_width // width)
    for (name, folder), length in zip(_ENCODERS.items(), lengths, strict=True):
        encoder = found.get(folder)
        if encoder is None:
            continue
        tokenizer = found[folder.replace("text_encoder", "tokenizer")]
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        theirs = tokenizer(captions, **options).input_ids
        if not torch.equal(theirs, ids[:, start : start + length]):
            raise InputError(f"export: {folder}'s tokens differ between the two programs; use --format ldmlab.")
        start += length
        if name == "t5":
            mine, other = states[:, -length:], encoder(theirs)[0]
        else:
            output = encoder(theirs, output_hidden_states=True)
            first = 0 if name == "clip" else ours.clip.width
            mine = states[:, rows : rows + length, first : first + getattr(ours, name).width]
            other, pooled = output.hidden_states[-2], 0 if name == "clip" else ours.clip.pooled_width
            ends = states[:, :rows].flatten(1)[:, pooled : pooled + getattr(ours, name).pooled_width]
            difference = max(difference, verify.check_close(folder, ends, output[0]))
        difference = max(difference, verify.check_close(folder, mine, other))
    return difference
