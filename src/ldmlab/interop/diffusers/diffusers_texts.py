"""Text encoders of diffusers' pipelines and ours, with their tokenizers: CLIPTextModel and LDMBertModel."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.common_names import clip_node, from_hugging_face, to_hugging_face
from ldmlab.interop.diffusers.diffusers_config import read_json
from ldmlab.interop.published_weights import WEIGHTS

CLIP, BERT = "CLIPTextModel", "LDMBertModel"
_NO_LENGTH = 1_000_000  # from here on, transformers' tokenizers mean none
_LDM_LENGTH = 77  # fixed in LDMTextToImagePipeline
Config = Mapping[str, Any]
_CLIP_DEFAULTS: dict[str, Any] = {  # of transformers' CLIPTextConfig
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_BERT_DEFAULTS: dict[str, Any] = {  # of diffusers' LDMBertConfig
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "d_model": 1280,
    "activation_function": "gelu",
    "scale_embedding": False,
}
_BLOCK = {
    "norm_attention": "self_attn_layer_norm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "norm_mlp": "final_layer_norm",
    "expand": "fc1",
    "shrink": "fc2",
}
_ENDS = {
    "tokens": "model.embed_tokens",
    "positions": "model.embed_positions",
    "norm": "model.layer_norm",
    "unused_head": "to_logits",
}
HOME = "ldmlab.conditioners."
CLIP_TARGET, BERT_TARGET = f"{HOME}text.open_clip_text", f"{HOME}text.TransformerText"


def kind_of(config: Config) -> str:
    """The class a configuration belongs to."""
    named = [*(config.get("architectures") or ()), config.get("_class_name"), config.get("model_type")]
    if BERT in named or "ldmbert" in named or "encoder_ffn_dim" in config:
        return BERT
    if CLIP in named or "clip_text_model" in named or not any(named):
        return CLIP
    raise InputError(f"the text encoder {named[0]} is not supported; supported: {CLIP} and {BERT}.")


def node(
    config: Config,
    *,
    padding: str = "end",  # CLIP's
    length: int | None = None,  # to which CLIP's tokenizer pads; None: to the encoder's positions
    vocabulary: str | None = None,  # path of BERT's tokens
) -> dict[str, Any]:
    """The node of our conditioner. Its length is that of the tokens diffusers' pipelines pass to the encoder."""
    if kind_of(config) == CLIP:
        options = _CLIP_DEFAULTS | {key: config[key] for key in _CLIP_DEFAULTS if key in config}
        if options["layer_norm_eps"] != 1e-5:
            raise InputError(
                f"{CLIP} with layer_norm_eps={options['layer_norm_eps']} is not supported; supported: 1e-5."
            )
        options["max_position_embeddings"] = min(options["max_position_embeddings"], length or _NO_LENGTH)
        return clip_node(options, padding=padding)
    options = _BERT_DEFAULTS | {key: config[key] for key in _BERT_DEFAULTS if key in config}
    width = options["d_model"]
    fixed = {"encoder_ffn_dim": 4 * width, "head_dim": 64, "activation_function": "gelu", "scale_embedding": False}
    for key, value in fixed.items():
        if options[key] != value:
            raise InputError(f"{BERT} with {key}={options[key]} is not supported; supported: {value}.")
    return {
        "_target_": BERT_TARGET,
        "width": width,
        "depth": options["encoder_layers"],
        "length": min(options["max_position_embeddings"], _LDM_LENGTH),
        "vocab_size": options["vocab_size"],
        "vocab": vocabulary,
        "heads": options["encoder_attention_heads"],
        "drop": 0.0,
        "unused_head": True,
    }


def configuration(ours: Mapping[str, Any]) -> tuple[str, Config]:
    """Class and options for the node of a text conditioner of ours; InputError for what there is no class for."""
    if ours["_target_"] == BERT_TARGET:
        width = ours.get("width", 1280)
        return BERT, {
            "vocab_size": ours.get("vocab_size", 30522),
            "max_position_embeddings": ours.get("length", 77),
            "encoder_layers": ours.get("depth", 32),
            "encoder_ffn_dim": 4 * width,
            "encoder_attention_heads": ours.get("heads", 8),
            "d_model": width,
        }
    if ours["_target_"] != CLIP_TARGET or not ours.get("config"):
        raise InputError(f"conditioner {ours['_target_']} has no text encoder in diffusers; use --format ldmlab.")
    if ours.get("layer", "last") == "pooled":
        raise InputError("conditioner.layer=pooled: diffusers' pipelines read states per token; use --format ldmlab.")
    config, text = ours["config"], ours["config"]["text_cfg"]
    width = text.get("width", 512)
    return CLIP, {
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "projection_dim": config["embed_dim"],
        "num_hidden_layers": text.get("layers", 12) - (ours.get("layer", "last") == "penultimate"),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if ours.get("padding", "zero") == "end" else 0,
    }


def to_ours(state: Mapping[str, Tensor], ours: Mapping[str, Any]) -> dict[str, Tensor]:
    """A text encoder's tensors under our conditioner's names; unknown ones keep foreign."""
    if ours["_target_"] == CLIP_TARGET:
        named = {f"tower.{key}": tensor for key, tensor in from_hugging_face(state).items()}
        return _cut(named, "tower.positional_embedding", ours["config"]["text_cfg"]["context_length"])
    names = {foreign: name for name, foreign in _bert_names(ours).items()}
    result = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        result[f"{names[module]}.{leaf}" if module in names else key] = tensor
    return _cut(result, "transformer.positions.weight", ours.get("length", 77))


def _cut(state: dict[str, Tensor], positions: str, length: int) -> dict[str, Tensor]:
    """The same without the unused positions after `length`."""
    return {**state, positions: state[positions][:length]} if positions in state else state


def to_diffusers(state: Mapping[str, Tensor], ours: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our conditioner's tensors under the text encoder's names, with an unused output layer where BERT requires one."""
    if ours["_target_"] == CLIP_TARGET:
        return to_hugging_face({key.removeprefix("tower."): tensor for key, tensor in state.items()})
    names = _bert_names(ours)
    result = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        result[f"{names[module]}.{leaf}"] = tensor
    tokens = result["model.embed_tokens.weight"]
    idle = {"to_logits.weight": torch.zeros_like(tokens), "to_logits.bias": tokens.new_zeros(len(tokens))}
    return idle | result


def _bert_names(ours: Mapping[str, Any]) -> dict[str, str]:
    """Our module name => LDMBertModel's."""
    names = {f"transformer.{mine}": foreign for mine, foreign in _ENDS.items()}
    for k in range(ours.get("depth", 32)):
        names |= {f"transformer.blocks.{k}.{mine}": f"model.layers.{k}.{foreign}" for mine, foreign in _BLOCK.items()}
    return names


_START, _END = "<|startoftext|>", "<|endoftext|>"
_PADDINGS = {_END: "end", "!": "zero"}  # "!" has the number 0


def clip_padding(folder: Path) -> str:
    """zero | end, by the pad token; a vocabulary that is not CLIP's is refused."""
    if _vocabulary(folder) != clip_vocabulary():
        raise InputError(f"{folder} has another vocabulary than CLIP's, which is not supported; use another model.")
    settings = _settings(folder)
    token = settings.get("pad_token", _END)
    content = token["content"] if isinstance(token, dict) else token
    if content not in _PADDINGS:
        raise InputError(f"{folder} pads with {content!r}, which is not supported; supported: {_END} and !.")
    return _PADDINGS[content]


def clip_length(folder: Path) -> int | None:
    """To how many tokens diffusers' pipelines pad; None where the tokenizer's settings name no number."""
    length = _settings(folder).get("model_max_length")
    if length is None or (isinstance(length, (int, float)) and length >= _NO_LENGTH):
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise InputError(f"{folder}: model_max_length={length} is no number of tokens; copy the folder again.")
    return length


def _settings(folder: Path) -> dict[str, Any]:
    """The settings in a tokenizer's own files."""
    files = (folder / name for name in ("special_tokens_map.json", "tokenizer_config.json"))
    return {key: value for file in files if file.is_file() for key, value in read_json(file).items()}


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their numbers, as older and newer releases of transformers keep them."""
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    return _fast_tokenizer(folder / "tokenizer.json")["model"]["vocab"]


def _fast_tokenizer(file: Path) -> dict[str, Any]:
    """The content of tokenizer.json, with a vocabulary in it."""
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{file} has no vocabulary; copy the folder again.")
    return content


def clip_vocabulary() -> dict[str, int]:
    """CLIP's tokens and their numbers, with the marks that transformers uses for start and end."""
    table: dict[str, int] = dict(SimpleTokenizer().encoder)
    marks = {"<start_of_text>": _START, "<end_of_text>": _END}
    return {marks.get(token) or token: number for token, number in table.items()}


def pad_token(padding: str) -> str:
    """The padding token."""
    return next(token for token, name in _PADDINGS.items() if name == padding)


def write_clip_files(folder: Path) -> None:
    """vocab.json and merges.txt, from which transformers' CLIPTokenizer is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    ranks = SimpleTokenizer().bpe_ranks
    merges = [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def bert_vocabulary(folder: Path) -> str | None:
    """Path of the vocabulary, or None for the published one, which `ldmlab fetch wordpiece` brings."""
    file, fast = folder / "vocab.txt", folder / "tokenizer.json"
    lower = _settings(folder).get("do_lower_case", True)
    if file.is_file():
        content = file.read_bytes()
    elif fast.is_file():
        file, settings = fast, _fast_tokenizer(fast)
        tokens = sorted(settings["model"]["vocab"], key=settings["model"]["vocab"].__getitem__)
        content = "".join(f"{token}\n" for token in tokens).encode()
        normalizer = settings.get("normalizer") or {}
        if settings["model"].get("type", "WordPiece") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
            raise InputError(f"{fast} is not supported; supported: WordPiece with BERT's normalizer.")
        lower = lower and normalizer.get("lowercase", True)
    else:
        raise InputError(f"{folder} has neither vocab.txt nor tokenizer.json; copy the model's tokenizer there.")
    if not lower:
        raise InputError(f"{folder}: a tokenizer that keeps capitals (do_lower_case=false) is not supported.")
    published = hashlib.sha256(content).hexdigest().startswith(WEIGHTS["wordpiece"].sha256)
    return None if published else str(file.resolve())
